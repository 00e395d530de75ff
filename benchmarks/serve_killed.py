"""A service under load while its processes are killed: every answer is compared, and none may be lost.

Clients ask over HTTP, each for a few rows after the other, and ask again where a connection breaks: what they asked is
lost if it is refused, or not answered within `LOST_S`. Each part in turn is ended by SIGKILL and started again: the
feature party's worker, the label holder's, the broker; and the feature party's connection is cut.
"""

import http.client
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import goals
from benchmarks.report import table
from benchmarks.served_files import PARTIES, ROWS, Served, trained
from sl_queue.config.environment import BROKER, LOCAL, THREADS
from sl_queue.testing.private_broker import PrivateBroker, free_ports
from sl_queue.testing.proxy import Proxy

LOST_S = 300.0
DEADLINE_S = 240.0  # of a request, within which a killed worker is back
CLIENTS = 8
KILLS = ("bank", "insurer", "connection", "broker")
WARM_UP_S = 30.0  # of a process, after which its memory must be flat
_MODULES = {"bank": "workers.feature_party", "insurer": "workers.label_holder"}


@dataclass(slots=True)
class Found:
    """Outcome of a load. Mutable, under its lock: clients count."""

    answered: int = 0
    wrong: int = 0
    retried: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # by what was said at the end
    slowest_s: float = 0.0
    killed: Counter[str] = field(default_factory=Counter)
    growth: dict[str, float] = field(default_factory=dict)  # MB after the warm-up, the most of any one process
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


class Workers:
    """The processes of both parties. Mutable: they are killed and started again."""

    def __init__(self, served: Served, urls: dict[str, str], found: Found) -> None:
        self._served, self._urls, self._found = served, urls, found
        self._running = {party: self._start(party) for party in PARTIES}

    def _start(self, party: str) -> "tuple[subprocess.Popen[bytes], list[float]]":
        folder = self._served.folder
        files = ("--job", str(folder / "job.toml"), "--party", str(self._served.party(party)))
        environ = {**os.environ, BROKER.name: self._urls[party], LOCAL.name: "1", THREADS.name: "1"}
        with (folder / f"{party}.log").open("ab") as log:
            command = [sys.executable, "-m", _MODULES[party], *files, "--serve"]
            return subprocess.Popen(command, env=environ, stderr=log), [float("inf")]

    def kill(self, party: str) -> None:
        """Kill a process by SIGKILL, and start the next."""
        process, _ = self._running[party]
        process.kill()
        process.wait()
        self._running[party] = self._start(party)

    def warm_up(self) -> None:
        """Let the warm-up of new processes begin: they have answered."""
        for _, memory in self._running.values():
            memory[0] = min(memory[0], time.monotonic() + WARM_UP_S)

    def measure(self) -> None:
        """Note how much each process has grown since its warm-up."""
        for party, (process, memory) in self._running.items():
            if time.monotonic() > memory[0]:
                memory.append(_resident_mb(process.pid))
                grown = memory[-1] - memory[1]
                self._found.growth[party] = max(self._found.growth.get(party, 0.0), grown)

    def close(self) -> None:
        """Kill all."""
        for process, _ in self._running.values():
            process.kill()
            process.wait()


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def client(port: int, served: Served, seed: int, ended: threading.Event, found: Found) -> None:
    """Ask until it is over."""
    draw = random.Random(seed)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LOST_S)) as connection:
        while not ended.is_set():
            ids = draw.sample(range(ROWS), draw.choice((1, 1, 1, 5, 40)))
            began = time.monotonic()
            status, said = _answer(connection, ids, found)
            with found.lock:
                found.slowest_s = max(found.slowest_s, time.monotonic() - began)
                if status != 200:
                    found.lost[f"{status} {said[:200]}"] += 1
                    continue
                found.answered += 1
                found.wrong += not _right(json.loads(said)["predictions"], ids, served)


def _answer(connection: http.client.HTTPConnection, ids: Sequence[int], found: Found) -> tuple[int, str]:
    """Return status and body; asks again where the connection breaks, 0 if that does not help."""
    began = time.monotonic()
    while time.monotonic() - began < LOST_S:
        try:
            connection.request("POST", "/predict", json.dumps({"ids": ids}))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException):
            connection.close()  # the next request opens another
            with found.lock:
                found.retried += 1
            time.sleep(0.05)
    return 0, "no answer"


def _right(predictions: Sequence[dict[str, float]], ids: Sequence[int], served: Served) -> bool:
    """Compare with the prediction of the whole table; a matrix product of another size may differ in its last bits."""
    return [one["id"] for one in predictions] == list(ids) and all(
        abs(one["probability"] - served.wanted[int(one["id"])]) < 1e-5 for one in predictions
    )


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with closing(connection), suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


@contextmanager
def asking(port: int, served: Served, clients: int, found: Found) -> Iterator[None]:
    """Let clients ask while the body runs; at its end each has its last answer."""
    ended = threading.Event()
    about = (port, served)
    threads = [threading.Thread(target=client, args=(*about, seed, ended, found)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def load(broker: PrivateBroker, seconds: float, kills: Sequence[str], clients: int = CLIENTS) -> Found:
    """Serve for so long, with these kills evenly spread over it."""
    found = Found()
    (port,) = free_ports(1)
    with TemporaryDirectory(prefix="sl_queue-load-") as folder, Proxy(broker.port) as proxy:
        served, url = trained(Path(folder), port=port, deadline_s=DEADLINE_S), broker.url("load")
        workers = Workers(served, {"bank": proxy.url(url), "insurer": url}, found)
        try:
            _await(lambda: _answers(port), f"the service does not answer; its log: {folder}/insurer.log")
            workers.warm_up()
            with asking(port, served, clients, found):
                for kill in kills:
                    _pass(seconds / (len(kills) + 1), workers)
                    before = found.answered
                    _kill(kill, workers, proxy, broker)
                    found.killed[kill] += 1
                    _await_answers(found, before + clients, kill)
                    workers.warm_up()
                _pass(seconds / (len(kills) + 1), workers)
        finally:
            workers.close()
    return found


def _kill(what: str, workers: Workers, proxy: Proxy, broker: PrivateBroker) -> None:
    match what:
        case "connection":
            proxy.cut()
        case "broker":
            broker.restart()
        case party:
            workers.kill(party)


def _pass(seconds: float, workers: Workers) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, max(0.0, until - time.monotonic())))
        workers.measure()


def _await_answers(found: Found, count: int, after: str) -> None:
    _await(lambda: found.answered > count, f"nothing is answered after the end of {after}")


def _await(done: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + LOST_S
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(what)
        time.sleep(0.05)


def compare(private: PrivateBroker, minutes: float) -> list[str]:
    """Return a table of a load with a kill a minute."""
    found = load(private, 60 * minutes, [*itertools.islice(itertools.cycle(KILLS), max(1, round(minutes)))])
    killed = ", ".join(f"{what} {count}" for what, count in found.killed.items())
    rows = [
        ("answered", f"{found.answered:,}"),
        ("wrong", found.wrong),
        ("lost or refused", ", ".join(f"{count} x {said}" for said, count in found.lost.items()) or 0),
        ("asked again after a broken connection", found.retried),
        ("killed", killed),
        ("slowest answer", f"{found.slowest_s:.1f} s"),
        *((f"growth of {party}, MB", f"{grown:.1f}") for party, grown in found.growth.items()),
    ]
    lines = [
        goals.line("wrong answers", found.wrong, 0),
        goals.line("lost requests", found.lost.total(), 0),
        goals.line("growth of memory, MB", max(found.growth.values(), default=0.0), 5),
    ]
    return [table((f"{minutes:g} minutes, {CLIENTS} clients", ""), rows), goals.listed(iter(lines))]
