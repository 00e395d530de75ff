"""The job: the training that all parties agreed on, the same file at every party.

Its digest is compared when they join, so paths, secrets and whatever else is one party's own stand in its party file.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sl_queue.config.canonical import canonical
from sl_queue.config.holdout import HoldoutSetting, JobHoldout
from sl_queue.config.job_numbers import about_aggregation, about_numbers
from sl_queue.config.job_tables import (
    LIMIT,
    Count,
    JobAlignment,
    JobBroker,
    JobEarlyStopping,
    JobFuse,
    JobParty,
    JobPipeline,
    JobPrecision,
    JobWire,
)
from sl_queue.config.party import BaseFile, DataFile, FuseFile, PartyFile
from sl_queue.config.schema import Schema, load, redacted, shown
from sl_queue.config.security import JobSecurity
from sl_queue.cut.packing import Wire
from sl_queue.data.spec import Choices
from sl_queue.errors import JobError
from sl_queue.protocol.codec import ITEM_BYTES, MAX_RANK, MAX_TENSOR_BYTES
from sl_queue.protocol.fingerprints import BY_POSITION
from sl_queue.protocol.holdout import Chosen
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches, Hashes
from sl_queue.protocol.text import counted
from sl_queue.protocol.topology import Topology

__all__ = [
    "BaseFile",
    "DataFile",
    "FuseFile",
    "Job",
    "JobAlignment",
    "JobBroker",
    "JobEarlyStopping",
    "JobFuse",
    "JobHoldout",
    "JobParty",
    "JobPipeline",
    "JobSecurity",
    "JobWire",
    "PartyFile",
    "redacted",
]

MAX_PARTIES = 10_000  # more do not fit into one status
RESERVED = (SCHEDULER, OPERATOR, "dead")  # names of other queues and routing keys

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]


class Job(Schema):
    """Agreement of all parties on what to train. Read with `Job.load(path)`, or built in code from the same keys."""

    name: _Name = Field(description="a name of letters, digits, '_', '-' and '.': begins the names of queues")
    seed: int = Field(
        ge=-LIMIT,
        lt=LIMIT,
        description="a whole number of 64 bits: keys initial weights, the order of rows and all other draws",
    )
    epochs: Count = Field(description="a whole number of at least 1: passes over the rows")
    batch_size: Count = Field(description="a whole number of at least 1: rows per optimizer step")
    holdout: HoldoutSetting = Field(
        default=0.0,
        description="a number from 0 to below 1, or a table [holdout]: the share of rows for evaluation, or how the "
        "label holder chooses them",
    )
    holdout_seed: Annotated[int, Field(ge=-LIMIT, lt=LIMIT)] | None = Field(
        default=None, description="a whole number of 64 bits: chooses the held-out rows; without it, seed"
    )
    test: HoldoutSetting = Field(
        default=0.0,
        description="a number from 0 to below 1, or a table [test]: the share of rows that a run never touches, "
        "neither to train nor to evaluate its epochs, or how the label holder chooses them",
    )
    shuffle: bool = Field(default=True, description="true or false: every epoch has an order of rows of its own")
    drop_last: bool = Field(
        default=False, description="true or false: the last step of an epoch is left out if its batch is not full"
    )
    precision: JobPrecision = Field(
        default=JobPrecision(),
        description='"float32", "bf16" or "fp16", or a table [precision]: what models compute in',
    )
    parties: dict[str, JobParty] = Field(description="a table [parties.NAME] for each party")
    fuse: JobFuse = Field(default=JobFuse(), description="a table [fuse]")
    pipeline: JobPipeline = Field(default=JobPipeline(), description="a table [pipeline]")
    broker: JobBroker = Field(default=JobBroker(), description="a table [broker]")
    wire: JobWire = Field(default=JobWire(), description="a table [wire]")
    alignment: JobAlignment = Field(default=JobAlignment(), description="a table [alignment]")
    early_stopping: JobEarlyStopping | None = Field(default=None, description="a table [early_stopping]")
    security: JobSecurity = Field(default=JobSecurity(), description="a table [security]")
    rules: Literal[1, 2] | None = Field(
        default=None,
        description="1, or 2, the newest: how a run chooses rows and draws; without it, as the run was begun",
    )

    if TYPE_CHECKING:  # tables may be given as dicts

        def __init__(self, /, **values: Any) -> None: ...

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a job file. Raises one JobError that says all that is wrong with it."""
        return load(cls, path)

    @field_validator("precision", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*_about_name(self), *_about_parties(self), *_about_cuts(self), *about_aggregation(self)]
        problems += [*about_numbers(self), *self.precision.problems(self.wire)]
        problems += self.security.problems(self.parties)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    # Who takes part --------------------------------------------------------------------------------------------

    @property
    def label_holder(self) -> str:
        """The party that holds the labels."""
        return next(name for name, party in self.parties.items() if party.role == "label")

    @property
    def feature_parties(self) -> tuple[str, ...]:
        """All other parties, in the order of the job."""
        return tuple(name for name, party in self.parties.items() if party.role == "feature")

    def cut(self, party: str) -> tuple[int, ...] | None:
        """Return the shape of one row's activation of a party; None for a label holder without a base model."""
        return self.parties[party].flat

    @property
    def fused(self) -> tuple[str, ...]:
        """The parties with a base model, in the order of the fuse model's inputs."""
        return tuple(name for name, party in self.parties.items() if party.cut is not None)

    # What follows from it --------------------------------------------------------------------------------------

    @property
    def seed_of_holdout(self) -> int:
        """Seed that chooses the held-out rows."""
        return self.seed if self.holdout_seed is None else self.holdout_seed

    @property
    def tells_holdout(self) -> bool:
        """Tell whether the label holder chooses rows and says which they are."""
        return isinstance(self.holdout, JobHoldout) or isinstance(self.test, JobHoldout)

    @property
    def choices(self) -> Choices | None:
        """Choices of rows by the label holder; None if the ids of the rows choose."""
        if not self.tells_holdout:
            return None
        found = [each.choice() if isinstance(each, JobHoldout) else each for each in (self.holdout, self.test)]
        return Choices(found[0], found[1])

    def batches(self, n_rows: int, by: Hashes | Chosen | None = None) -> Batches:
        """Say which of `n_rows` rows are trained on when. Raises JobError if none is left to train or to stop on.

        `by` chooses the held-out rows: hashes of a Table, or what its label holder chose; without hashes counts are
        right, and positions those of the first rules.
        """
        if self.tells_holdout != isinstance(by, Chosen):
            raise JobError(f"which rows are held out is for the label holder {self.label_holder!r} to say")
        chosen, hashes = (by, None) if isinstance(by, Chosen) else (None, by)
        holdout, test = (0.0 if isinstance(each, JobHoldout) else each for each in (self.holdout, self.test))
        batches = Batches(
            n_rows=n_rows,
            seed=self.seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batches=self.pipeline.micro_batches,
            holdout=holdout,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            holdout_seed=self.holdout_seed,
            test=test,
            hashes=None if self.rules == BY_POSITION else hashes,
            chosen=chosen,
        )
        if batches.steps >= LIMIT:
            told = f"epochs = {self.epochs} of {counted(batches.steps_per_epoch, 'step', 'steps')} each"
            raise JobError(f"{told} are more steps than a message can count, which are below 2**63; use fewer epochs")
        stops = self.early_stopping is not None and not self.early_stopping.of_training
        if stops and batches.holdout_rows == 0 and chosen is None:
            raise JobError(f"holdout = {self.holdout} of {n_rows} rows holds out none; early_stopping needs some")
        return batches

    def pipeline_of(self, batches: Batches) -> Pipeline:
        """Return the order of work on those batches."""
        return Pipeline(batches, self.pipeline.depth, self.pipeline.staleness, self.pipeline.checkpoint_every)

    @property
    def stops_on(self) -> str | None:
        """The metric that may end training early."""
        return None if self.early_stopping is None else self.early_stopping.metric

    @property
    def on_the_wire(self) -> Wire:
        """Encoding of tensors in messages."""
        return Wire(self.wire.dtype, self.wire.compress)

    def topology(self, prefix: str = "") -> Topology:
        """Return the names at the broker."""
        return Topology(self.label_holder, self.feature_parties, prefix)

    # Whether two parties mean the same job ---------------------------------------------------------------------

    def canonical(self) -> dict[str, Any]:
        """Return the job as JSON values with the defaults of the first version; equal if and only if the jobs are.

        `rules` is no part of it: a run keeps those that it was begun with, and parties compare them apart.
        """
        values = canonical(self, self.model_dump(mode="json", exclude={"rules"}))
        values["fuse"]["inputs"] = list(self.fused)  # a JSON object has no order, and that of the parties matters
        return values

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical job, hexadecimal."""
        return sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()


# What only several keys together show ---------------------------------------------------------------------------


def _about_name(job: Job) -> Iterator[str]:
    if f"{job.name}.".startswith("amq."):  # the job's name begins the names of its queues
        yield f"name = {shown(job.name)}; RabbitMQ keeps names that begin with 'amq.' for itself"


def _about_parties(job: Job) -> Iterator[str]:
    for name, party in job.parties.items():
        if not _is_word(name):
            yield f"parties.{name}: a party's name is made of letters, digits, '_' and '-', at most 64"
        elif name in RESERVED:
            yield f"parties.{name}: no party may be called {', '.join(map(repr, RESERVED))}"
        if party.role == "feature" and party.cut is None:
            yield f"parties.{name}.cut is missing; a feature party sends activations, so give their shape: [32]"
    holders = [name for name, party in job.parties.items() if party.role == "label"]
    if len(holders) != 1:
        told = f"{', '.join(holders)} have" if holders else "no party has"
        yield f'parties: {told} role = "label"; exactly one party holds the labels'
    if len(holders) == len(job.parties):
        yield 'parties: no party has role = "feature"; at least one must'
    if len(job.parties) > MAX_PARTIES:
        yield f"parties: there are {len(job.parties)}; a job has at most {MAX_PARTIES}"


def _about_cuts(job: Job) -> Iterator[str]:
    """Yield what a message cannot carry; the label holder's own activations are not sent."""
    narrowest = ITEM_BYTES[job.wire.dtype] if job.wire.dtype != "float32" else ITEM_BYTES["float16"]  # of any model
    for name, party in job.parties.items():
        if party.role != "feature" or party.cut is None:
            continue
        cut = party.flat or ()
        axes, row_bytes = len(cut), prod(cut) * narrowest
        if axes >= MAX_RANK:
            yield (
                f"parties.{name}.cut has {axes} numbers; it must have at most {MAX_RANK - 1}, since a message carries "
                f"tensors of {MAX_RANK} axes and the first is the rows: flatten some of them in the base model"
            )
        elif row_bytes > MAX_TENSOR_BYTES:
            yield (
                f"parties.{name}.cut = {list(cut)}: one row takes at least {row_bytes} bytes, and a message "
                f"carries at most {MAX_TENSOR_BYTES}; use a smaller cut"
            )


def _is_word(name: str) -> bool:
    """Return True if a name can be a word of a routing key, a file name and a part of a queue's name."""
    return name.isascii() and 1 <= len(name) <= 64 and name.replace("_", "a").replace("-", "a").isalnum()
