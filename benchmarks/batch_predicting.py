"""A table predicted in one go, beside the pass over held-out rows that ends an epoch of training: rows a second.

Both compute the same activations and fuse them in the same parts; a prediction keeps the outputs on disk as well.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import goals
from benchmarks.processes import together
from benchmarks.report import table
from benchmarks.workloads import LABEL, Workload, features, job_of, party_file
from sl_queue import Rows
from sl_queue.compute.threads import limit_threads
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.launch.asked import Asked
from sl_queue.launch.connect import connector
from sl_queue.launch.party import serve_party
from sl_queue.launch.prediction import predict_party, spec_to_predict
from sl_queue.launch.scheduler import serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.events import Committed, EpochDone, Event, StepDone
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.testing.private_broker import PrivateBroker

WHOLE = Workload("batch", 65_536, {"bank": 64, LABEL: 16}, (128,), (64,), 1024)
SMALL = Workload("batch", 16_384, {"bank": 64, LABEL: 16}, (128,), (64,), 1024)
WARM_UP = 0.1  # share of a prediction that does not count


@dataclass(slots=True)
class Moments:
    """Moments of a run at the label holder. Mutable: it is filled while the run goes on."""

    steps: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)  # seconds of each over held-out rows
    ended: bool = False  # an epoch, whose checkpoint is not on disk

    def __call__(self, event: Event, /) -> None:
        """Take in an event."""
        match event:
            case StepDone():
                self.steps.append(time.monotonic())
            case EpochDone():
                self.passes.append(time.monotonic() - self.steps[-1])
                self.ended = True
            case Committed() if self.ended:
                self.passes[-1] -= event.seconds  # a prediction writes no checkpoint
                self.ended = False


def compare(private: PrivateBroker, quick: bool) -> list[str]:
    """Return a table of both, in turns."""
    workload, rounds = (SMALL, 1) if quick else (WHOLE, 3)
    held_out, predicted = [], []
    for number in range(rounds):
        with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
            url = private.url(f"batch{number}")
            held_out.append(_run(workload, url, Path(folder), predicts=False))
            predicted.append(_run(workload, url, Path(folder), predicts=True))
            private.delete_vhost(f"batch{number}")
    ratio = median(one / other for one, other in zip(predicted, held_out, strict=True))
    rows = [
        ("held-out pass of training", f"{median(held_out):,.0f}"),
        ("prediction of a table", f"{median(predicted):,.0f}"),
    ]
    line = goals.line("rows predicted to rows held out", ratio, 0.9, at_least=True)
    return [table((f"{workload.rows:,} rows, one feature party", "rows/s"), rows), f"{line}\n"]


def _run(workload: Workload, url: str, folder: Path, *, predicts: bool) -> float:
    """Train, or predict with what was trained; return rows a second."""
    roles = (*workload.columns, SCHEDULER)
    found = together({role: (_worker, (workload, url, folder, role, predicts)) for role in roles}, 600)
    moments: Moments = found[LABEL]
    if predicts:
        first = int(len(moments.steps) * WARM_UP)
        seconds = moments.steps[-1] - moments.steps[first]
        return workload.rows * (len(moments.steps) - 1 - first) / len(moments.steps) / seconds
    return workload.rows / 2 / median(moments.passes)


def _worker(workload: Workload, url: str, folder: Path, role: str, predicts: bool) -> Moments | None:
    limit_threads(1)
    job, moments, asked = job_of(workload, 3, holdout=0.5), Moments(), Asked()
    place = Workplace(connector(job, url), folder / role, observe=moments)
    if role == SCHEDULER:
        name = asked.name if predicts else None
        place = Workplace(connector(job, url), folder / role / str(name))
        serve_scheduler(job, place, lambda _: None, prediction=name)
        return None
    spec = resolve(job, party_file(workload, role), Importer())
    if predicts:
        rows: Any = Rows(np.arange(workload.rows), features(workload, role))
        predict_party(job, spec_to_predict(spec, rows, asked), asked, place)
    else:
        serve_party(job, spec, place)
    return moments
