"""Scaling of one party with its hands: emulated compute, which costs no core, and real compute up to the cores.

Every role is a process, as deployed. A step's time is the median of whole epochs, the first left out; its processor
time is that of all processes but the broker's, between the ends of the first epoch and of the last.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import goals
from benchmarks.processes import cores
from benchmarks.report import table
from sl_queue.config.environment import BROKER, HANDS_BROKER, LOCAL, THREADS
from sl_queue.local.supervise import Worker, supervise
from sl_queue.testing.private_broker import PrivateBroker

COUNTS = (1, 2, 4, 8)
VARIANTS: tuple[int | None, ...] = (None, 0, *COUNTS)  # None: no [hands]
MICRO_BATCHES = 16
ROWS_OF_ONE = 4
COLUMNS = 8
SLEEP_S = 0.05  # forwards, and as much backwards
BIG = 1_250_000  # parameters: 5 MB

Found = Mapping[int | None, tuple[float, float]]  # milliseconds a step, and of the processor, by number of hands

MODELS = """import time

import torch
from torch import nn


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


class Base(nn.Module):
    def __init__(self, seconds, width, layers):
        super().__init__()
        self.seconds = seconds
        self.wide = nn.Linear({columns}, width)
        self.deep = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
        self.cut = nn.Linear(width, 4)

    def forward(self, x):
        return Slow.apply(self.cut(self.deep(self.wide(x))), self.seconds)


class Fuse(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs):
        return Slow.apply(self.linear(inputs[0]), self.seconds)
"""


@dataclass(frozen=True, slots=True)
class Load:
    """The compute of each party."""

    name: str
    party: str  # whose it is
    sleep_s: float = SLEEP_S
    width: int = 16
    layers: int = 0
    steps: int = 8  # an epoch

    def bytes_a_step(self) -> int:
        """Return what goes between lead and one hand: weights, and gradients of each micro-batch."""
        base = COLUMNS * self.width + self.width + self.layers * (self.width**2 + self.width) + 4 * self.width + 4
        parameters = base if self.party == "features" else 5
        return 4 * parameters * (1 + MICRO_BATCHES)


def write(folder: Path, load: Load, epochs: int) -> None:
    """Write job, party files, tables and models."""
    rows = MICRO_BATCHES * ROWS_OF_ONE * load.steps
    numbers = np.random.default_rng(0).standard_normal((rows, COLUMNS))
    names = [f"c{column}" for column in range(COLUMNS)]
    lines = [",".join([str(row), *(f"{x:.6f}" for x in numbers[row])]) for row in range(rows)]
    (folder / "features.csv").write_text("\n".join([",".join(["id", *names]), *lines]) + "\n")
    labels = [f"{row},{int(numbers[row, 0] > 0)}" for row in range(rows)]
    (folder / "labels.csv").write_text("\n".join(["id,label", *labels]) + "\n")
    (folder / "models.py").write_text(MODELS.replace("{columns}", str(COLUMNS)))
    own = {party: load.sleep_s if load.party == party else 0.0 for party in ("features", "labels")}
    (folder / "job.toml").write_text(
        f'name = "hands"\nseed = 1\nepochs = {epochs}\nbatch_size = {MICRO_BATCHES * ROWS_OF_ONE}\n'
        '[parties.features]\nrole = "feature"\ncut = [4]\n[parties.labels]\nrole = "label"\n'
        f"[pipeline]\nmicro_batches = {MICRO_BATCHES}\ndepth = {MICRO_BATCHES}\n"
    )
    optimizer = 'optimizer = { name = "sgd", lr = 0.01 }\n'
    args = f"args = {{ seconds = {own['features']}, width = {load.width}, layers = {load.layers} }}\n"
    (folder / "features.toml").write_text(
        'party = "features"\n[data]\npath = "features.csv"\nid = "id"\n[base]\nmodel = "models:Base"\n'
        f"{args}{optimizer}"
    )
    (folder / "labels.toml").write_text(
        'party = "labels"\n[data]\npath = "labels.csv"\nid = "id"\nlabel = "label"\n[fuse]\nmodel = "models:Fuse"\n'
        f'args = {{ seconds = {own["labels"]} }}\nloss = "bce_with_logits"\n{optimizer}'
    )


def measure(broker: PrivateBroker, load: Load, hands: int | None, epochs: int = 4) -> tuple[float, float]:
    """Return milliseconds a step and processor milliseconds a step; None for `hands`: a plain worker."""
    with TemporaryDirectory(prefix="sl_queue-hands-") as temporary:
        folder = Path(temporary)
        write(folder, load, epochs)
        url = broker.url(f"hands-{os.urandom(4).hex()}")
        environ = {**os.environ, BROKER.name: url, THREADS.name: "1", LOCAL.name: "1", "SL_QUEUE_LOG": "warning"}
        spent = Spent(folder / "scheduler" / "history.jsonl")
        workers = list(_workers(folder, load, hands, url))
        with spent.watching():
            failure = supervise(workers, environ, lambda *_: None, lambda _: None, on_start=spent.start)
        assert failure is None, failure
        lines = spent.history.read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines][1:]
    return 1e3 * median(seconds) / load.steps, spent.ms_an_epoch() / load.steps


@dataclass(slots=True)
class Spent:
    """Processor time of processes at the end of each epoch. Mutable: a thread watches the history."""

    history: Path
    pids: dict[str, int] = field(default_factory=dict)
    seen: dict[int, float] = field(default_factory=dict)  # milliseconds, by epochs done
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self, worker: str, pid: int) -> None:
        self.pids[worker] = pid

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            done = self.history.read_text().count("\n") if self.history.exists() else 0
            if done and done not in self.seen:
                with suppress(OSError):  # a process that has ended
                    self.seen[done] = sum(_processor_ms(pid) for pid in self.pids.values())

    def ms_an_epoch(self) -> float:
        """Return the processor time of an epoch, the first left out; NaN if only one was seen."""
        first, last = min(self.seen, default=0), max(self.seen, default=0)
        return (self.seen[last] - self.seen[first]) / (last - first) if last > first else math.nan


def _processor_ms(pid: int) -> float:
    """Read what a process has used, by Linux's count."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _workers(folder: Path, load: Load, hands: int | None, url: str) -> Iterator[Worker]:
    meet = {} if hands is None else {HANDS_BROKER.name: url}
    job = ("--job", str(folder / "job.toml"))

    def worker(name: str, module: str, *options: str, helps: bool = False) -> Worker:
        own = meet if load.party in name else {}
        return Worker(name, (sys.executable, "-m", f"workers.{module}", *job, *options), own, helps)

    yield worker("scheduler", "scheduler", "--state", str(folder / "scheduler"))
    for party, module in (("features", "feature_party"), ("labels", "label_holder")):
        file = ("--party", str(folder / f"{party}.toml"))
        yield worker(party, module, *file, "--state", str(folder / party))
    for number in range(hands or 0):
        yield worker(f"{load.party} {number}", "hand", "--party", str(folder / f"{load.party}.toml"), helps=True)


def compare(broker: PrivateBroker, quick: bool) -> list[str]:
    """Return one table, with R = 1, 2, 4, 8 side by side for each load, and the goals."""
    sleep_s, steps = (0.01, 2) if quick else (SLEEP_S, 8)
    loads = [
        Load("a feature party", "features", sleep_s, steps=steps),
        Load("a label holder", "labels", sleep_s, steps=steps),
        Load("a feature party of 5 MB", "features", sleep_s, 1100, 1, steps),
        Load("a feature party of 5 MB, real compute", "features", 0.0, 1100, 1, steps),
    ]
    found = {
        load: {count: measure(broker, load, count, 3 if quick else max(3, count or 0)) for count in VARIANTS}
        for load in loads
    }
    about = (
        f"Milliseconds a step of {MICRO_BATCHES} micro-batches, which sleep {1e3 * sleep_s:.0f} ms forwards and as "
        f"long backwards unless they compute, on {cores()} cores; in brackets how many times as fast as one "
        "hand; below it, processor ms a step, of all processes but the broker.\n\n"
    )
    head = ("", "MB a step and hand", "no [hands]", "[hands], none here", *(f"R = {count}" for count in COUNTS))
    body = table(head, [row for load in loads for row in _rows(load, found[load])])
    return [about + body + "\n" + goals.listed(line for load in loads for line in _goals(load, found[load]))]


def _rows(load: Load, found: Found) -> Iterator[list[str]]:
    one = found[1][0]
    times = [f"{found[count][0]:.0f}" + (f" ({one / found[count][0]:.2f})" if count else "") for count in VARIANTS]
    yield [load.name, f"{load.bytes_a_step() / 1e6:.2f}", *times]
    yield ["", "processor", *(f"{found[count][1]:.0f}" for count in VARIANTS)]


def _goals(load: Load, found: Found) -> Iterator[str]:
    if not load.sleep_s:
        return
    one, at_four = found[1][0], 0.8 if load.width > 16 else 0.9
    plain, none, name = found[None][0], found[0][0], load.name
    yield goals.line(f"{name}: R = 4 to one hand, of 4", one / found[4][0] / 4, at_four, at_least=True)
    if load.width <= 16:
        yield goals.line(f"{name}: R = 8 to one hand, of 8", one / found[8][0] / 8, 0.8, at_least=True)
        yield goals.line(f"{name}: one hand to a plain worker", one / plain, 1.05)
        yield goals.line(f"{name}: [hands] without a hand to a plain worker", none / plain, 1.05)
