"""The tables of a job file: of each party, fuse, pipeline, broker, wire and early stopping."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from sl_queue.config.schema import IN_CODE, IN_FILE, SEVERAL, Schema, shown
from sl_queue.cut.packing import Compress, Dtype
from sl_queue.cut.several import Outputs

LIMIT = 2**63  # integers travel as 64 bits
MOST_PAD = 10_000_000  # which take a party a quarter of an hour

Count = Annotated[int, Field(ge=1, lt=LIMIT)]
_Size = Annotated[int, Field(strict=True, ge=1, lt=LIMIT)]


_Shape = Annotated[tuple[_Size, ...], Field(strict=False, min_length=1)]


def _kind_of_cut(value: Any) -> str:
    if isinstance(value, dict):
        return IN_CODE
    several = isinstance(value, list | tuple) and value and all(isinstance(shape, list | tuple) for shape in value)
    return SEVERAL if several else IN_FILE


class JobParty(Schema):
    """A party as all others know it."""

    role: Literal["feature", "label"] = Field(
        description='"feature" or "label": the label holder has the labels, the fuse model and the loss'
    )
    cut: (
        Annotated[
            Annotated[_Shape, Tag(IN_FILE)]
            | Annotated[dict[str, _Shape], Field(min_length=1), Tag(IN_CODE)]
            | Annotated[tuple[_Shape, ...], Field(strict=False), Tag(SEVERAL)],
            Discriminator(_kind_of_cut),
        ]
        | None
    ) = Field(
        default=None,
        description="a list of whole numbers of at least 1, for instance [32], or a table or list of such lists: the "
        "shape of one row's activation, or of several; a label holder without a base model has none",
    )

    @property
    def outputs(self) -> Outputs | None:
        """The outputs of a base model with several: { logit = [1], embedding = [8] }, or [[1], [8]]."""
        return Outputs.of(self.cut)

    @property
    def flat(self) -> tuple[int, ...] | None:
        """The shape of one row as it crosses: several outputs lie side by side."""
        outputs, cut = self.outputs, self.cut
        if outputs is not None:
            return (sum(outputs.sizes),)
        return None if cut is None else cast(tuple[int, ...], cut)


class JobFuse(Schema):
    """Aggregation of activations into the fuse model's input."""

    aggregation: Literal["list", "concat", "sum", "mean"] = Field(
        default="list",
        description='"list", "concat", "sum" or "mean": how activations become the input of the fuse model',
    )
    whole_batch: bool = Field(
        default=False,
        description="true or false: fuse model and loss see all rows of a step at once, however it is cut",
    )


class JobPipeline(Schema):
    """The order of work, as two integers, and how often it pauses for a checkpoint."""

    micro_batches: Count = Field(default=1, description="a whole number of at least 1: the parts of a step")
    depth: Count = Field(
        default=None,
        validate_default=True,
        description="a whole number of at least 1: activations on their way at most; without it, micro_batches",
    )
    staleness: int = Field(
        default=0, ge=0, lt=LIMIT, description="a whole number of at least 0: updates that a forward may run ahead"
    )
    checkpoint_every: Count = Field(
        default=50, description="a whole number of at least 1: steps from one checkpoint to the next"
    )

    @field_validator("depth", mode="before")
    @classmethod
    def _all_at_once(cls, value: Any, info: ValidationInfo) -> Any:
        return info.data.get("micro_batches", 1) if value is None else value


class JobBroker(Schema):
    """Expectations of the broker, the same at all parties; its address is in each party's own file."""

    persistent: bool = Field(
        default=False, description="true or false: the broker writes messages to disk, so that they survive its restart"
    )
    patience: float = Field(
        default=60.0, ge=0.1, description="a number of at least 0.1: seconds of silence until a waiting worker says so"
    )
    queues: Literal["classic", "quorum"] = Field(
        default="classic", description='"classic" or "quorum": quorum keeps every message on most nodes of a cluster'
    )


class JobWire(Schema):
    """Encoding of activations and gradients on their way."""

    dtype: Dtype = Field(
        default="float32",
        description='"float32" (as the models compute), "bfloat16", "float16" or "int8": the numbers on their way',
    )
    compress: Compress = Field(
        default="none",
        description='"none", "bitmap" (zeros are left out, for ReLU) or "zstd": how the numbers are compressed',
    )


class JobPrecision(Schema):
    """Precision that models compute in, over weights that stay as they are, and the scale of the loss in fp16."""

    name: Literal["float32", "bf16", "fp16"] = Field(
        default="float32", description='"float32", "bf16" or "fp16": dtype of the layers that autocast narrows'
    )
    scale: float = Field(
        default=65536.0, gt=0, le=2.0**40, description="a number above 0: scale of the loss in the first step, of fp16"
    )
    growth_interval: int = Field(
        default=2000,
        ge=1,
        description="a whole number of at least 1: steps without an overflow after which the scale is doubled",
    )

    def problems(self, wire: JobWire) -> Iterator[str]:
        """Yield what does not go with the wire."""
        if self.name == "fp16" and (wire.dtype != "float32" or wire.compress == "bitmap"):
            told = f"wire.dtype = {shown(wire.dtype)}, wire.compress = {shown(wire.compress)}"
            yield (
                f'precision = "fp16" needs gradients that travel as they are: {told}; use dtype = "float32", and '
                'compress = "none" or "zstd"'
            )


class JobAlignment(Schema):
    """Search for the rows that all parties hold."""

    method: Literal["equal", "psi"] = Field(
        default="equal",
        description='"equal" or "psi": all hold the same ids, or private set intersection finds those they share',
    )
    normalise: list[Literal["strip", "nfkc", "casefold"]] = Field(
        default=[], description='a list of "strip", "nfkc" and "casefold": done to ids that are text, in this order'
    )
    at_least: Count = Field(default=1, description="a whole number of at least 1: shared rows without which to stop")
    at_most: Count | None = Field(default=None, description="a whole number of at least 1: ids that a party may bring")
    pad: int = Field(
        default=1000,
        ge=1,
        le=MOST_PAD,
        description=f"a whole number from 1 to {MOST_PAD}: set sizes are reported rounded up to it, with points that "
        "stand for nobody, each of which takes every party as long as an id",
    )

    @model_validator(mode="after")
    def _is_used(self) -> Self:
        beside = sorted(self.model_fields_set - {"method", "normalise"})
        if self.method == "equal" and beside:
            raise ValueError(f'has {", ".join(beside)}, which only method = "psi" has a use for')
        return self


class JobEarlyStopping(Schema):
    """End of training before its last epoch, with the weights of the best one."""

    metric: str = Field(
        description='"loss" or one of the label holder\'s metrics: what has to improve on held-out rows; '
        'with "train_" before it, on training rows'
    )
    patience: Count = Field(description="a whole number of at least 1: epochs without improvement")
    min_delta: float = Field(default=0.0, ge=0, description="a number of at least 0: what counts as an improvement")
    mode: Literal["min", "max"] | None = Field(
        default=None, description='"min" or "max": which value is better; without it, as the metric is known'
    )

    @property
    def of_training(self) -> bool:
        """Tell whether it is measured on training rows: "train_loss", "train_auroc"."""
        return self.metric.startswith("train_")
