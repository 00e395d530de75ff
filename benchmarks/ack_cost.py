"""What it costs to acknowledge at checkpoints instead of at once: `python -m benchmarks.ack_cost`.

Two processes play a feature party and the label holder without any computation: activations one way, gradients of the
same size back, a window of them in flight. Both ways of acknowledging take turns, a block each, on connections that
stay open, so whatever else the machine does falls on both.
"""

import multiprocessing
import queue
import sys
import time
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from sl_queue.private_broker import PrivateBroker
from sl_queue.protocol.messages import Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery, Tag
from sl_queue.transport.rabbitmq import RabbitLink

TOPOLOGY = Topology("label", ("feature",))
CHECKPOINT_EVERY, MICRO_BATCHES, DEPTH = 50, 4, 4
BLOCK = CHECKPOINT_EVERY * MICRO_BATCHES  # messages each way in one turn: one checkpoint
SECONDS = 20.0  # for each size
PREFETCH = CHECKPOINT_EVERY * MICRO_BATCHES + DEPTH
SIZES = {"4 KiB": 4 * 1024, "64 KiB": 64 * 1024, "1 MiB": 1024 * 1024}
WAYS = ("at once", "at checkpoints")


@dataclass(slots=True)
class End:  # mutable: it holds what is not acknowledged
    """One party's end of the conversation."""

    link: RabbitLink
    arrived: "queue.SimpleQueue[Delivery]"
    way: str
    held: list[Tag]

    @classmethod
    def open(cls, url: str, party: str, way: str) -> "End":
        arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        link = RabbitLink(url, party, TOPOLOGY, PREFETCH)
        link.open(arrived.put, lambda: None, lambda error: sys.exit(str(error)))
        return cls(link, arrived, way, [])

    def receive(self) -> None:
        self.held.append(self.arrived.get(timeout=60).tag)
        if self.way == "at once":
            self.commit()

    def commit(self) -> None:
        self.link.acknowledge(self.held)
        self.held = []

    def checkpoint(self) -> None:
        """As the recovery law has it: what was sent is confirmed, then what was received is acknowledged."""
        self.link.flush()
        self.commit()


def answer(urls: dict[str, str], body: bytes, turns: Any, ready: Any) -> None:
    """The label holder, in a process of its own: one gradient for each activation."""
    ends = {way: End.open(urls[way], "label", way) for way in WAYS}
    ready.set()
    for way in iter(turns.get, None):
        for _ in range(BLOCK):
            ends[way].receive()
            ends[way].link.publish("feature", Kind.GRADIENT, "run", body, persistent=False)
        ends[way].checkpoint()
    for end in ends.values():
        end.link.close()


def play(end: End, body: bytes) -> float:
    """The feature party, for one block; micro-batches a second."""
    began = time.monotonic()
    for number in range(BLOCK + DEPTH):
        if number < BLOCK:
            end.link.publish("label", Kind.ACTIVATION, "run", body, persistent=False)
        if number >= DEPTH:
            end.receive()
    end.checkpoint()
    return BLOCK / (time.monotonic() - began)


def compare(broker: PrivateBroker, size: int) -> dict[str, list[float]]:
    """Micro-batches a second of each turn, by way of acknowledging."""
    context = multiprocessing.get_context("spawn")
    urls = {way: broker.url(f"{way} {size}") for way in WAYS}
    body = bytes(size)
    told, ready = context.Queue(), context.Event()
    label = context.Process(target=answer, args=(urls, body, told, ready), daemon=True)
    label.start()
    ends = {way: End.open(urls[way], "feature", way) for way in WAYS}
    ready.wait(60)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        for way in WAYS if len(rates[WAYS[0]]) % 2 else reversed(WAYS):
            told.put(way)
            rates[way].append(play(ends[way], body))
    told.put(None)
    label.join(60)
    for end in ends.values():
        end.link.close()
    return rates


def main() -> None:
    """Print both rates and what the law costs, for each size of message."""
    print(f"{'message':>8} {'at once':>12} {'at checkpoints':>15} {'cost: median of the pairs of turns':>36}")
    with PrivateBroker() as broker:
        for name, size in SIZES.items():
            rates = compare(broker, size)
            pairs = list(zip(*(rates[way] for way in WAYS), strict=True))[1:]  # the first is for warming up
            costs = [1 - late / once for once, late in pairs]
            once, late = (median(rate) for rate in zip(*pairs, strict=True))
            low, _, high = quantiles(costs, n=4)
            cost = f"{median(costs):+.1%}, half of them {low:+.1%} to {high:+.1%}"
            print(f"{name:>8} {once:>10.0f}/s {late:>13.0f}/s {cost:>36}  ({len(pairs)} pairs)", flush=True)


if __name__ == "__main__":
    main()
