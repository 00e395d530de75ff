"""A prediction as all its roles agree on it: its name, its order of work, its place on disk. No torch."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from sl_queue.config.job import Job
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.scheduler.state import Plan

NAME: Final = "prediction"  # of one that was given none
_LONGEST: Final = 200  # bytes of a name, in UTF-8
_DEPTH: Final = 8  # parts on their way
_STRETCH: Final = 64  # parts between two commits, at most
_STRETCH_BYTES: Final = 64 * 1024 * 1024  # of one party's activations between two commits


@dataclass(frozen=True, slots=True)
class Asked:
    """Request that all roles of a prediction share; `name` must be the same everywhere."""

    name: str = NAME
    run: str | None = None  # whose weights; None: of the version in use
    labels: bool = False  # compare with labels
    leave_out: bool = False  # rows that another party lacks; else they end the prediction
    held_out: bool = False  # the rows of the training run are asked about, and those that it held out are evaluated
    test: bool = False  # or those that it kept for a test

    @property
    def of_training(self) -> bool:
        """Tell whether the rows of the training run are asked about."""
        return self.held_out or self.test


def schedule_of(job: Job, n_rows: int) -> Pipeline:
    """Return the order of work of a prediction, the same at every party: each row once, in parts of held-out size."""
    size = -(-job.batch_size // job.pipeline.micro_batches)
    batches = Batches(n_rows, job.seed, epochs=1, batch_size=size, micro_batches=1, shuffle=False)
    largest = max(prod(job.cut(party) or ()) for party in job.parties) * 8 * size
    stretch = max(1, min(_STRETCH, _STRETCH_BYTES // max(1, largest)))
    depth = min(_DEPTH, stretch)
    return Pipeline(batches, depth, depth - 1, stretch)


def plan_of_prediction(job: Job, name: str) -> Plan:
    """Return what the scheduler must know of a prediction."""
    return Plan(
        job=canonical_of(job, name),
        label_holder=job.label_holder,
        feature_parties=job.feature_parties,
        epochs=1,
        patience_s=job.broker.patience,
        steps=lambda n_rows: schedule_of(job, n_rows).batches.steps if n_rows else None,
    )


def digest_of(job: Job, name: str) -> str:
    """Return what tells the state of a prediction from that of others."""
    return f"{job.digest}.{name}"


def folder_of(state: Path, name: str) -> Path:
    """Return where a role keeps the state of a prediction, in its state folder. Raises JobError for an unfit name."""
    plain = name.isprintable() and name.strip(" .") == name and not set(name) & {*"/\\:"}
    if not plain or not 0 < len(name.encode()) <= _LONGEST:
        raise JobError(
            f"a prediction cannot be called {name[:_LONGEST]!r}: its name is a folder's, so give --predict a name of 1 "
            f"to {_LONGEST} bytes, without slash, backslash or colon, and without blanks or dots around it"
        )
    return state / "predictions" / name


def canonical_of(job: Job, name: str) -> dict[str, Any]:
    """Return the job as the parties of a prediction compare it."""
    return {**job.canonical(), "prediction": name}


def for_alignment(job: Job) -> Job:
    """Return the job by which rows to predict are aligned: however few are shared."""
    if job.alignment.method != "psi":
        return job
    return job.replace(alignment=job.alignment.replace(at_least=1))
