"""A trained model as a service: single requests to one feature party, sealed, over RabbitMQ on this machine.

The unit is a bare round trip of 64 bytes over the same broker, measured in turns with ours, so that what else the
machine does weighs on both.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median, quantiles
from threading import Event
from typing import Any

from benchmarks import batch_predicting, goals
from benchmarks.asking import TURN, at_rate, in_turns, many
from benchmarks.http_client import HttpClients
from benchmarks.processes import background, together
from benchmarks.report import table
from benchmarks.served import Place, bare_trip, echo, feature_party, label_holder, place_for, single_rows
from sl_queue.compute.threads import limit_threads
from sl_queue.launch.http_listener import HttpServer
from sl_queue.launch.http_service import Api
from sl_queue.launch.process import keep_from_collector
from sl_queue.testing.private_broker import PrivateBroker

CLIENTS = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Number of requests of each measurement."""

    turns: int = 40  # of one client, and of bare round trips between
    requests: int = 8_000  # of many clients
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Found:
    """Measurements of one way to ask."""

    one_s: float  # median of a single client
    bare_s: float  # median of bare trips in turns with it
    one_rate: float  # requests a second
    rate: float  # of many clients
    p99_s: float  # at half of that rate, since the moment at which a request was due
    asked: float  # requests a second that were really asked then

    @property
    def scores(self) -> tuple[float, float, float]:
        """p50 and p99 in bare round trips, and the rate of many clients in that of one."""
        return self.one_s / self.bare_s, self.p99_s / self.bare_s, self.rate / self.one_rate


def measure(one: Callable[[], "Future[Any]"], url: str, sizes: Sizes) -> Found:
    """Measure a way to ask for one row."""
    ours, bare = in_turns(lambda: one().result() and None, bare_trip(url), sizes.turns)
    single, rate = many(one, 1, sizes.turns * TURN), many(one, CLIENTS, sizes.requests)
    late, asked = at_rate(one, rate / 2, sizes.requests)
    return Found(median(ours), median(bare), single, rate, quantiles(late, n=100)[98], asked)


def within(place: Place, sizes: Sizes) -> Found:
    """Measure calls in the label holder's process."""
    limit_threads(1)
    served, keys = label_holder(place), single_rows()
    assert served.label is not None
    service = served.label.service
    keep_from_collector()
    try:
        return measure(lambda: service.predict(next(keys)), place.url, sizes)
    finally:
        served.close()


def http_service(ready: Connection, place: Place) -> None:
    """Serve over HTTP for ever."""
    limit_threads(1)
    served = label_holder(place)
    assert served.label is not None
    server = HttpServer(Api(served.label, "integer", None).app(), "127.0.0.1", 0)
    keep_from_collector()
    ready.send(server.port)
    Event().wait()


def over_http(url: str, port: int, sizes: Sizes) -> Found:
    """Measure requests from a process of their own."""
    with HttpClients(port, CLIENTS) as clients:
        keep_from_collector()
        return measure(clients.ask, url, sizes)


def compare(private: PrivateBroker, quick: bool) -> list[str]:
    """Return a table for both ways to ask."""
    sizes = Sizes(3, 400, 1) if quick else Sizes()
    found: dict[str, list[Found]] = {"in the label holder's process": [], "over HTTP": []}
    with place_for(private, "serve") as place, background(echo, place.url), background(feature_party, place):
        for _ in range(sizes.rounds):
            found["in the label holder's process"].append(together({"within": (within, (place, sizes))}, 300)["within"])
            with background(http_service, place) as port:
                found["over HTTP"].append(together({"http": (over_http, (place.url, port, sizes))}, 300)["http"])
    return [_table(found), _goals(found), *batch_predicting.compare(private, quick)]


def _table(found: dict[str, list[Found]]) -> str:
    rows = []
    for way, rounds in found.items():
        p50, p99, more = (median(each) for each in zip(*(one.scores for one in rounds), strict=True))
        ms = [1e3 * median(values) for values in zip(*((r.bare_s, r.one_s, r.p99_s) for r in rounds), strict=True)]
        rates = [median(values) for values in zip(*((r.one_rate, r.rate, r.asked) for r in rounds), strict=True)]
        cells = (*(f"{one:.2f}" for one in ms), *(f"{one:,.0f}" for one in rates))
        rows.append((way, *cells, f"{p50:.1f}", f"{p99:.1f}", f"{more:.1f}"))
    head = (
        "one row, sealed, one feature party", "bare trip, ms", "p50, ms", "p99 at half the rate, ms", "1 client, 1/s",
        f"{CLIENTS} clients, 1/s", "asked at half the rate, 1/s", "p50 in trips", "p99 in trips", "rate to 1 client",
    )  # fmt: skip
    return table(head, rows)


def _goals(found: dict[str, list[Found]]) -> str:
    lines = []
    for way, rounds in found.items():
        p50, p99, more = (median(each) for each in zip(*(one.scores for one in rounds), strict=True))
        lines += [
            goals.line(f"{way}, p50", p50, 3.0, unit=" bare trips"),
            goals.line(f"{way}, p99 at half of the highest rate", p99, 6.0, unit=" bare trips"),
            goals.line(f"{way}, {CLIENTS} clients to one", more, 10.0, at_least=True),
        ]
    return goals.listed(iter(lines))
