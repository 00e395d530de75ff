"""Runs of many parties whose models compute next to nothing: what each step costs broker, label holder and the rest.

The label holder and the scheduler are processes of their own, the feature parties threads of a few more. At two steps
the label holder notes the processor time of all of them, so start, checkpoints at the end, and leaving do not count.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Trace
from benchmarks.processes import Work, together
from benchmarks.scale_watch import FULL, LOOKED_AT, POLL_S, broker_pid, cpu_of, watched
from sl_queue.compute.threads import limit_threads
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.spec import Rows
from sl_queue.launch.connect import Connect, topology
from sl_queue.launch.party import serve_party
from sl_queue.launch.scheduler import serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.events import Event, StepDone
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.link import Link
from sl_queue.transport.rabbitmq.link import RabbitLink

LABEL = "label"
BROKER = "broker"
FEATURES = "features"  # all of them together
LIMIT_S = 900.0  # a busy machine needs minutes to read ten million rows three times
TOGETHER = 8  # feature parties in one process
_numbers = count()


@dataclass(frozen=True, slots=True)
class Case:
    """One run: so many parties with such cuts."""

    parties: int
    cut: int
    steps: int
    batch: int = 64
    micro_batches: int = 1
    depth: int = 1
    staleness: int = 0
    dtype: str = "float32"  # on the wire
    sleep_s: float = 0.0  # that each feature party sleeps after a step, in the place of computing
    urls: Mapping[str, str] = field(default_factory=dict, hash=False)  # of parties with another way to the broker

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"party{number}" for number in range(self.parties))

    @property
    def messages(self) -> int:
        """Messages of a step: an activation and a gradient of each party and micro-batch."""
        return 2 * self.parties * self.micro_batches

    @property
    def connections(self) -> int:
        """All parties and the scheduler."""
        return self.parties + 2

    @property
    def queues(self) -> int:
        """Queues of all receivers and senders, and of dead letters."""
        names = self.job.topology()
        roles = (*names.parties, SCHEDULER, "operator")
        return sum(len(names.senders_to(role)) + 1 for role in roles)

    @property
    def job(self) -> Job:
        parties: dict[str, Any] = {name: {"role": "feature", "cut": [self.cut]} for name in self.names}
        order = {"micro_batches": self.micro_batches, "depth": self.depth, "staleness": self.staleness}
        return Job(
            name="scale", seed=7, epochs=1, batch_size=self.batch, parties={LABEL: {"role": "label"}, **parties},
            pipeline={**order, "checkpoint_every": self.steps}, wire={"dtype": self.dtype},
        )  # fmt: skip

    def party_file(self, name: str) -> PartyFile:
        rows, sgd = self.batch * self.steps, {"name": "sgd", "lr": 0.01}
        ids = np.arange(rows)
        if name == LABEL:
            fuse = {"model": Fuse, "optimizer": sgd, "loss": "bce_with_logits"}
            return PartyFile(party=name, data=Rows(ids, None, ids % 2), threads=1, fuse=fuse)
        column = np.random.default_rng(3).standard_normal((rows, 1), np.float32)
        base = {"model": Base, "args": {"cut": self.cut}, "optimizer": sgd}
        return PartyFile(party=name, data=Rows(ids, column, None), threads=1, base=base)


class Base(nn.Module):
    """Multiplies one column with a weight for each place of the cut: one pass over the activation."""

    def __init__(self, cut: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((cut,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Fuse(nn.Module):
    """Adds up the means of all activations: one pass over each."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack([x.mean(1) for x in inputs]).sum(0) + self.bias


@dataclass(frozen=True, slots=True)
class Spent:
    """A moment: the clock, and processor seconds of each role so far."""

    at_s: float
    cpu_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Found:
    """Measurement of a case."""

    case: Case
    step_s: float
    bytes: float  # a step, as the parties handed them to their links
    cpu_s: Mapping[str, float]  # of a step, by role
    memory: float  # bytes that the broker took more than before, at most
    window: float  # bytes that lay unacknowledged at the broker then
    files: int  # open files that the broker had more than before, at most
    sockets: int

    @property
    def causes(self) -> Mapping[str, float]:
        """Amount of each cause in a step."""
        return {
            "messages": self.case.messages,
            "bytes": self.bytes,
            "connection seconds": self.case.connections * self.step_s,
            "seconds": self.step_s,
            "steps": 1.0,
        }


def measure(private: PrivateBroker, case: Case, vhost: str | None = None) -> Found:
    """Run a case to its end, on a virtual host that is there or on one of its own."""
    own = vhost or f"scale{next(_numbers)}"
    url, pid = private.url(own), broker_pid(private)
    try:
        with TemporaryDirectory(prefix="sl_queue-scale-") as folder, watched(private, pid, Path(folder)) as seen:
            found = together(_works(case, url, pid, Path(folder)), LIMIT_S)
    finally:
        if vhost is None:
            private.delete_vhost(own)
    (first, began), (last, ended) = found[LABEL][1]
    steps = last - first
    cpu_s = {role: (ended.cpu_s[role] - spent) / steps for role, spent in began.cpu_s.items()}
    traces: list[Trace] = [found[LABEL][0], *(trace for name, each in found.items() if "-" in name for trace in each)]
    sent = sum(trace.marks[last].sent_bytes - trace.marks[first].sent_bytes for trace in traces) / steps
    step_s = (ended.at_s - began.at_s) / steps
    return Found(case, step_s, sent, cpu_s, seen.memory, sent * (last + 1), seen.files, seen.sockets)


def _works(case: Case, url: str, pid: int, folder: Path) -> dict[str, Work]:
    names = case.names
    groups = {f"features-{first}": names[first : first + TOGETHER] for first in range(0, len(names), TOGETHER)}
    works: dict[str, Work] = {name: (_features, (case, group, url, folder, name)) for name, group in groups.items()}
    works[LABEL] = (_label, (case, url, folder, pid, tuple(groups)))
    works[SCHEDULER] = (_scheduler, (case, url, folder))
    return works


# The processes --------------------------------------------------------------------------------------------------


def _label(
    case: Case, url: str, folder: Path, pid: int, groups: Sequence[str]
) -> tuple[Trace, list[tuple[int, Spent]]]:
    trace, notes = Trace(LABEL), list[tuple[int, Spent]]()

    def observe(event: Event) -> None:
        trace(event)
        if isinstance(event, StepDone) and event.step in (case.steps // 5, case.steps - 2):
            notes.append((event.step, _spent(pid, folder, groups)))
            if event.step == case.steps - 2:  # before the commit: all messages so far lie at the broker
                (folder / FULL).touch()
                while not (folder / LOOKED_AT).exists():
                    time.sleep(POLL_S)

    _serve(case, LABEL, url, folder, observe)
    return trace, notes


def _spent(pid: int, folder: Path, groups: Sequence[str]) -> Spent:
    pids = {name: int((folder / f"{name}.pid").read_text()) for name in (*groups, SCHEDULER)}
    cpu_s = {name: cpu_of(each) for name, each in pids.items()}
    features = sum(cpu_s.pop(name) for name in groups)
    return Spent(time.monotonic(), {BROKER: cpu_of(pid), LABEL: time.process_time(), FEATURES: features, **cpu_s})


def _features(case: Case, names: Sequence[str], url: str, folder: Path, group: str) -> list[Trace]:
    (folder / f"{group}.pid").write_text(str(os.getpid()))
    traces, errors = {name: Trace(name) for name in names}, list[BaseException]()

    def observed(name: str, event: Event) -> None:
        traces[name](event)
        if isinstance(event, StepDone):
            time.sleep(case.sleep_s)  # on the party's thread, which holds nothing that others wait for

    def serve(name: str) -> None:
        try:
            _serve(case, name, case.urls.get(name, url), folder, partial(observed, name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return list(traces.values())


def _serve(case: Case, name: str, url: str, folder: Path, observe: Callable[[Event], None]) -> None:
    logging.getLogger("sl_queue").setLevel(logging.ERROR)  # warnings of each party, all the same
    limit_threads(1)
    job = case.job
    spec = resolve(job, case.party_file(name), Importer())
    serve_party(job, spec, Workplace(_connecting(job, url), folder / name, observe=observe))


def _scheduler(case: Case, url: str, folder: Path) -> None:
    (folder / f"{SCHEDULER}.pid").write_text(str(os.getpid()))
    job = case.job
    serve_scheduler(job, Workplace(_connecting(job, url), folder / SCHEDULER), lambda _: None)


def _connecting(job: Job, url: str) -> Connect:
    def connect(party: str, prefetch: int, **_: bool) -> Link:
        return RabbitLink(url, party, topology(job, url), prefetch)

    return connect
