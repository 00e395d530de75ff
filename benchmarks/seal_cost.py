"""Cost of sealing: 2 MiB activations from one process to another over RabbitMQ, plain and sealed in turn.

`python -m benchmarks.seal_cost [--rounds 9] [--messages 200]` prints the medians; a private broker is started for it.
"""

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from queue import SimpleQueue

from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import Activation, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.topology import Topology
from sl_queue.security.hpke import Cipher
from sl_queue.security.keys import PrivateKey
from sl_queue.security.sealing import Seal
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.link import Delivery
from sl_queue.transport.rabbitmq.link import RabbitLink

SENDER, RECEIVER = "bank", "insurer"
NAMES = Topology(RECEIVER, (SENDER,))
ROWS, COLUMNS = 1024, 512  # of float32: 2 MiB
WINDOW = 16  # messages that the sender may be ahead of the broker's confirms


def main() -> None:
    """Print megabytes per second, plain and sealed with either cipher, and the cost in percent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seal_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--messages", type=int, default=200, help="in each round")
    given = parser.parse_args()
    variants: list[Cipher | None] = [None, *Cipher]
    speeds: dict[Cipher | None, list[float]] = {variant: [] for variant in variants}
    with PrivateBroker() as broker:
        for number in range(given.rounds + 1):
            for variant in variants:
                speed = _round(broker.url("seal"), variant, given.messages)
                if number:  # the first round warms up
                    speeds[variant].append(speed)
    print(f"{given.rounds} rounds of {given.messages} messages of {ROWS * COLUMNS * 4 / 2**20:g} MiB, medians")
    for variant in variants:
        speed = statistics.median(speeds[variant])
        ratios = [sealed / plain for sealed, plain in zip(speeds[variant], speeds[None], strict=True)]
        spread = f"{min(speeds[variant]):.0f} to {max(speeds[variant]):.0f}"
        cost = 100 * (1 - statistics.median(ratios))
        print(f"{variant or 'plain':20} {speed:7.0f} MB/s ({spread}), cost {cost:.1f} % in the median round")


def _round(url: str, cipher: Cipher | None, messages: int) -> float:
    """Megabytes per second from the first message to the last, as the receiver saw them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    keys = {name: PrivateKey.generate(signs=False) for name in (SENDER, RECEIVER)}
    pems = {name: key.pem() for name, key in keys.items()}
    receiver = context.Process(target=_receive, args=(url, cipher, pems, messages, theirs))
    receiver.start()
    ours.recv()
    _send(url, _seal(SENDER, cipher, pems), messages)
    seconds: float = ours.recv()
    receiver.join()
    return (messages - 1) * ROWS * COLUMNS * 4 / 1e6 / seconds


def _seal(name: str, cipher: Cipher | None, pems: dict[str, bytes]) -> Seal | None:
    if cipher is None:
        return None
    keys = {party: PrivateKey.parse(pem) for party, pem in pems.items()}
    return Seal(name, keys[name], {party: key.public for party, key in keys.items()}, cipher)


def _send(url: str, seal: Seal | None, messages: int) -> None:
    link = RabbitLink(url, SENDER, NAMES)
    link.open(lambda _: None, lambda: None, lambda error: print(error))
    payload = Payload("float32", (ROWS, COLUMNS), bytes(ROWS * COLUMNS * 4), bytes(8))
    for number in range(messages):
        where = MicroBatch(number, 0)
        body = encode(Header("run", 0, Kind.ACTIVATION, SENDER, RECEIVER, where), Activation(where, payload))
        link.publish(
            RECEIVER, Kind.ACTIVATION, "run", body if seal is None else seal.seal(RECEIVER, body), persistent=False
        )
        if number % WINDOW == WINDOW - 1:
            link.flush()
    link.flush()
    link.close()


def _receive(url: str, cipher: Cipher | None, pems: dict[str, bytes], messages: int, answer: Connection) -> None:
    seal = _seal(RECEIVER, cipher, pems)
    times: SimpleQueue[float] = SimpleQueue()
    link = RabbitLink(url, RECEIVER, NAMES, prefetch=2 * WINDOW)

    def take(delivery: Delivery) -> None:
        decode(delivery.body if seal is None else seal.open(delivery.sender, delivery.body).body)
        link.acknowledge([delivery.tag])
        times.put(time.perf_counter())

    link.open(take, lambda: None, lambda error: print(error))
    answer.send("ready")
    seen = [times.get() for _ in range(messages)]
    answer.send(seen[-1] - seen[0])
    link.flush()
    link.close()


if __name__ == "__main__":
    main()
