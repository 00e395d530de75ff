"""Specifications of what a party computes: small frozen values, resolved once from the job and its own file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sl_queue.cut.packing import Wire
from sl_queue.cut.several import Outputs
from sl_queue.ports import UserCode

Part = Literal["base", "fuse"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Precision of a job's models."""

    name: Literal["bf16", "fp16"]
    scale: float = 65536.0  # of the loss in the first step, of fp16
    growth_interval: int = 2000  # steps without an overflow after which the scale is doubled


@dataclass(frozen=True, slots=True)
class LayersSpec:
    """The layers of all parties as one network, the same at every party."""

    job_digest: str
    seed: int
    label_holder: str
    feature_parties: tuple[str, ...]
    cuts: Mapping[str, tuple[int, ...]]  # of the parties with a base model, in the order of the fuse model's inputs
    aggregation: Literal["list", "concat", "sum", "mean"]
    wire: Wire  # how activations and gradients travel
    micro_batches: int
    staleness: int
    whole_batch: bool = False  # fuse model and loss see all rows of a step at once
    outputs: Mapping[str, Outputs] = field(default_factory=dict)  # of the parties whose base model has several
    precision: Precision | None = None  # None: as the models are

    @property
    def parties(self) -> tuple[str, ...]:
        """The label holder and all others."""
        return (*self.feature_parties, self.label_holder)

    @property
    def fused(self) -> tuple[str, ...]:
        """The parties with a base model, in the order of the fuse model's inputs."""
        return tuple(self.cuts)

    def cut(self, party: str) -> tuple[int, ...] | None:
        """Return the shape of one row's activation; None for a label holder without a base model."""
        return self.cuts.get(party)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One part of the model with its optimizer."""

    model: Any  # module:callable, or the callable or the module itself
    args: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = field(default_factory=dict)  # a table, module:callable, or the callable itself
    groups: tuple[Mapping[str, Any], ...] = ()  # of parameters, by pattern
    schedule: Any = None  # a table, module:callable, or the callable itself
    clip_norm: float | None = None
    clip_value: float | None = None
    ema: float | None = None  # by how much the average of the weights stays what it was
    inputs: Literal["tensor", "list", "dict"] = "tensor"  # in which form the columns of a table enter


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """The loss, and what is measured on held-out rows."""

    loss: Any  # one of NAMED_LOSSES or a table with its name, module:callable, or the callable itself
    metrics: tuple[Any, ...] = ()  # names, tables with one, module:callable, or callables
    outputs: Literal["logits", "probabilities", "log_probabilities", "logarithms"] | None = None
    task: Literal["binary", "multiclass", "regression"] | None = None
    missing: bool = False  # NaN labels are not known, and count for nothing
    train_metrics: bool = False  # metrics of training rows too


@dataclass(frozen=True, slots=True)
class ComputeSpec:
    """Models, objective and device of one party, and the network that they are a part of."""

    party: str
    layers: LayersSpec
    base: ModelSpec | None
    fuse: ModelSpec | None  # the label holder's
    objective: ObjectiveSpec | None  # the label holder's
    device: str
    code: UserCode  # finds what is named as module:callable
    table_is_file: bool = False  # whose whole numbers mostly mean quantities, and are offered as floating ones first
    label_column: str | None = None
    secret: bytes = field(default=b"", repr=False)  # keys this party's random draws besides the seed; empty: nothing

    @property
    def folder(self) -> Path | None:
        """The folder of the party's own code; None if all is given in code."""
        return self.code.folder

    def part(self, part: Part) -> ModelSpec | None:
        """Return the base or the fuse model."""
        return self.base if part == "base" else self.fuse
