"""Cost of acknowledging at checkpoints instead of at once: `python -m benchmarks.ack_cost`.

For each way two processes play a feature party and the label holder without any computation: activations to the one,
gradients of the same size back, a window of them in flight. Both ways run at the same time, on the same cores and at
the same broker, so whatever else the machine does falls on both; what counts is who gets further.
"""

import multiprocessing
import queue
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from sl_queue.protocol.messages import Kind
from sl_queue.protocol.topology import Topology
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.link import Delivery, Tag
from sl_queue.transport.rabbitmq.link import RabbitLink

TOPOLOGY = Topology("label", ("feature",))
CHECKPOINT_EVERY, MICRO_BATCHES, DEPTH = 50, 4, 4
BLOCK = CHECKPOINT_EVERY * MICRO_BATCHES  # messages each way between two checkpoints
SIZES = {"4 KiB": 4 * 1024, "64 KiB": 64 * 1024, "1 MiB": 1024 * 1024}
WAYS = ("at once", "at checkpoints")
ROUNDS, SECONDS = 5, 6.0


@dataclass(slots=True)
class End:  # mutable: it holds what is not acknowledged
    """One party's end of the conversation."""

    link: RabbitLink
    arrived: "queue.SimpleQueue[Delivery]"
    at_once: bool
    held: list[Tag]
    received: int = 0

    @classmethod
    def open(cls, url: str, party: str, way: str) -> "End":
        arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        link = RabbitLink(url, party, TOPOLOGY, BLOCK + DEPTH)
        link.open(arrived.put, lambda: None, lambda error: sys.exit(str(error)))
        return cls(link, arrived, way == "at once", [])

    def receive(self) -> None:
        """Take the next message; after every block do what a commit does: confirms first, then acknowledgements."""
        self.held.append(self.arrived.get(timeout=60).tag)
        self.received += 1
        if self.received % BLOCK == 0:
            self.link.flush()
        if self.at_once or self.received % BLOCK == 0:
            self.link.acknowledge(self.held)
            self.held = []


def answer(url: str, way: str, body: bytes) -> None:
    """Play the label holder: one gradient for each activation, until it is ended."""
    end = End.open(url, "label", way)
    while True:
        end.receive()
        end.link.publish("feature", Kind.GRADIENT, "run", body, persistent=False)


def play(url: str, way: str, body: bytes, together: Any, rates: Any) -> None:
    """Play the feature party: micro-batches a second in each round; both ways begin a round together."""
    end = End.open(url, "feature", way)
    for _ in range(DEPTH):
        end.link.publish("label", Kind.ACTIVATION, "run", body, persistent=False)
    found = []
    for _ in range(ROUNDS + 1):
        together.wait(60)
        began, before = time.monotonic(), end.received
        while time.monotonic() - began < SECONDS:
            end.receive()
            end.link.publish("label", Kind.ACTIVATION, "run", body, persistent=False)
        found.append((end.received - before) / (time.monotonic() - began))
    rates.put((way, found[1:]))  # the first is for warming up


def compare(broker: PrivateBroker, size: int) -> dict[str, list[float]]:
    """Micro-batches a second of each round, by way of acknowledging."""
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(len(WAYS)), context.Queue()
    processes = []
    for way in WAYS:
        url, body = broker.url(f"{way} {size}"), bytes(size)
        processes.append(context.Process(target=answer, args=(url, way, body), daemon=True))
        processes.append(context.Process(target=play, args=(url, way, body, together, rates), daemon=True))
    for process in processes:
        process.start()
    try:
        return dict(rates.get(timeout=120) for _ in WAYS)
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    """Print both rates and what the law costs, for each size of message."""
    print(f"{'message':>8} {'at once':>10} {'at checkpoints':>15} {'cost':>8}   of each round")
    with PrivateBroker() as broker:
        for name, size in SIZES.items():
            rates = compare(broker, size)
            once, late = (median(rates[way]) for way in WAYS)
            costs = [1 - b / a for a, b in zip(*(rates[way] for way in WAYS), strict=True)]
            each = "  ".join(f"{cost:+.1%}" for cost in costs)
            print(f"{name:>8} {once:>8.0f}/s {late:>13.0f}/s {median(costs):>+8.1%}   {each}", flush=True)


if __name__ == "__main__":
    main()
