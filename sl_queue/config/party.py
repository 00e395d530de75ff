"""A party's own file: its table, its models, its broker; private to the party, and never sent."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    InstanceOf,
    PrivateAttr,
    Tag,
    model_validator,
)

from sl_queue.compute.names import NAMED_LOSSES
from sl_queue.config.broker_url import FORM, BrokerUrl, HasBroker, problem_of, read_url
from sl_queue.config.csv_file import CsvFile
from sl_queue.config.environment import BROKER, MOST_THREADS
from sl_queue.config.features import FeatureFile
from sl_queue.config.learning import (
    GROUPS,
    OPTIMIZER,
    SCHEDULE,
    Decay,
    GroupsSetting,
    OptimizerSetting,
    Positive,
    ScheduleSetting,
)
from sl_queue.config.objective import LossSetting, MetricsSetting
from sl_queue.config.paths import PathInFolder
from sl_queue.config.prediction import PredictFile, ServeFile
from sl_queue.config.privacy import PrivacyFile
from sl_queue.config.schema import IN_CODE, IN_FILE, Schema, load, shown
from sl_queue.config.user_code import NAME
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError

_Path = PathInFolder


def _named(what: str) -> Callable[[Any], Any]:
    """Return a validator for what is named `module:callable` in a file, and may be the thing itself in code."""

    def check(value: Any) -> Any:
        if callable(value) or (isinstance(value, str) and NAME.fullmatch(value)):
            return value
        raise ValueError(f"= {shown(value)}; it must be {what}")

    return check


class DataFile(Schema):
    """Place of a party's rows: a table with an id column, or a callable that returns Rows."""

    path: _Path | None = Field(
        default=None,
        description="the name of a .csv, .parquet or .arrow file, or of a folder of .parquet files: this party's table",
    )
    format: Literal["csv", "parquet", "arrow", "svmlight", "tag:value"] | None = Field(
        default=None,
        description='"csv", "parquet", "arrow", "svmlight" or "tag:value": how the file is written; without it, as its '
        "name ends",
    )
    csv: CsvFile = Field(default=CsvFile(), description="a table [data.csv]")
    mapped: bool = Field(
        default=False,
        description="true or false: the numbers that [features] makes lie in a file in the state folder, mapped into "
        "memory, for a table that is larger than memory",
    )
    id: str | list[str] | None = Field(
        default=None,
        description="the name of a column, or a list of names: says which sample a row is of",
    )
    exclude: list[str] = Field(default=[], description='a list of columns, or of patterns like "x*": left out')
    duplicates: Literal["refuse", "first"] = Field(
        default="refuse", description='"refuse" or "first": what becomes of further rows with the same id'
    )
    features: list[str] | None = Field(
        default=None,
        description='a list of column names, for instance ["age", "income"]: what the base '
        "model gets; without it, all but id and "
        "label",
    )
    label: str | list[str] | None = Field(
        default=None, description="the name of a column, or a list of names: the labels, only at the label holder"
    )
    weight: str | None = Field(
        default=None, description="the name of a column: how much each row counts; without it, all alike"
    )
    id_type: Literal["text", "integer", "uuid"] | None = Field(
        default=None,
        description='"text", "integer" or "uuid": what ids are taken as, the same at every party; without it, as '
        "they look",
    )
    source: Annotated[Any, AfterValidator(_named("module:callable, returning sl_queue.Rows"))] | None = Field(
        default=None, description="module:callable, returning sl_queue.Rows: gives the rows in the place of a file"
    )

    @model_validator(mode="after")
    def _is_separated(self) -> Self:
        if self.format != "tag:value" and not self.csv.delimiter.isascii():
            told = "which is no character of ASCII; write the file with another, a tab for instance"
            raise ValueError(f"has the csv.delimiter {self.csv.delimiter!r}, {told}")
        return self

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source is not None:
            beside = [name for name in ("path", "id", "features", "label", "weight") if getattr(self, name) is not None]
            if beside:
                raise ValueError(f"has a source, which gives ids, features and labels; remove {', '.join(beside)}")
            return self
        missing = [name for name in ("path", "id") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"needs a path and an id, or a source; missing: {', '.join(missing)}")
        labels = [self.label] if isinstance(self.label, str) else self.label or []
        others = [*self.ids, *labels, *([] if self.weight is None else [self.weight])]
        wrong = [name for name, count in Counter([*others, *(self.features or [])]).items() if count > 1]
        if wrong:
            raise ValueError(f"names a column more than once among id, label and features: {', '.join(wrong)}")
        return self

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of the columns that together say which sample a row is of."""
        return (self.id,) if isinstance(self.id, str) else tuple(self.id or ())


_Model = Annotated[Any, AfterValidator(_named("module:callable, returning a torch.nn.Module"))]


class BaseFile(Schema):
    """The base model with its optimizer."""

    model: _Model = Field(description="module:callable, returning a torch.nn.Module: called with args")
    args: dict[str, Any] = Field(default={}, description="a table of values: the model's arguments")
    inputs: Literal["tensor", "list", "dict"] = Field(
        default="tensor",
        description='"tensor", "list" or "dict": the columns of a table in one tensor, in a list of them, or by name',
    )
    optimizer: OptimizerSetting = Field(default={}, description=f"{OPTIMIZER}: what changes the weights")
    groups: GroupsSetting = Field(default=[], description=f"{GROUPS}: parameters with numbers of their own")
    schedule: ScheduleSetting = Field(
        default=None, description=f"{SCHEDULE}: the learning rate of each step; without it, one for all"
    )
    clip_norm: Positive | None = Field(default=None, description="a number above 0: the largest norm of a gradient")
    clip_value: Positive | None = Field(default=None, description="a number above 0: the largest value of a gradient")
    ema: Decay | None = Field(
        default=None, description="a number between 0 and 1: how much of the average of the weights stays in each step"
    )

    @model_validator(mode="after")
    def _learns_in_one_way(self) -> Self:
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("has both clip_norm and clip_value; remove one of them")
        if self.groups and not isinstance(self.optimizer, dict):
            raise ValueError("has groups, but an optimizer in code makes its own; remove groups")
        return self


class FuseFile(BaseFile):
    """The fuse model with its optimizer, the loss, and what is measured on held-out rows."""

    loss: LossSetting = Field(
        description=f"{', '.join(NAMED_LOSSES)}, a table with such a name, or module:callable: what is minimized"
    )
    metrics: MetricsSetting = Field(
        default=[],
        description='a list of names, for instance ["auroc", "accuracy"], of tables with one, or of module:callable: '
        "what is measured on held-out rows",
    )
    train_metrics: bool = Field(
        default=False, description="true or false: metrics of the training passes too, as `train` in the history"
    )
    missing_labels: Literal["refuse", "mask"] = Field(
        default="refuse", description='"refuse" or "mask": labels that are NaN or empty; masked ones count for nothing'
    )
    task: Literal["binary", "multiclass", "regression"] | None = Field(
        default=None,
        description='"binary", "multiclass" or "regression": what metrics measure; mostly found without it',
    )
    outputs: Literal["logits", "probabilities", "log_probabilities", "logarithms"] | None = Field(
        default=None,
        description='"logits", "probabilities" or "log_probabilities" of classes, or "logarithms" of numbers: what the '
        "fuse model puts out, for a loss of your own; mostly found without it",
    )


class SecurityFile(Schema):
    """Secrets of this party, by where they lie."""

    key: _Path = Field(description="the name of a file: this party's private key, as `sl-queue key` makes it")


class HandsFile(HasBroker):
    """Hands of this party: processes that compute its micro-batches for its worker, as many as there are."""

    broker: BrokerUrl | None = Field(
        default=None,
        description=f"{FORM}: where the worker meets its hands; without it, the broker of the job, in the virtual host "
        "JOB.PARTY.hands",
    )
    alone: bool = Field(
        default=True,
        description="true or false: the worker computes while no hand is here; false for one without their GPU",
    )


class StartFile(Schema):
    """Weights that a run begins with, of an earlier one."""

    from_: _Path = Field(
        alias="from", description="the name of a folder: state of an earlier run, whose final weights this one takes"
    )
    optimizer: bool = Field(
        default=False, description="true or false: what its optimizer remembered of each parameter is taken too"
    )


class PartyFile(HasBroker):
    """One party's table, models and broker. Read with `PartyFile.load(path)`, or built in code from the same keys."""

    party: str = Field(min_length=1, description="a name in the job: which party this is")
    broker: BrokerUrl | None = Field(default=None, description=f"{FORM}: where the broker is")
    state: _Path | None = Field(default=None, description="the name of a folder: checkpoints and final weights")
    data: Annotated[
        Annotated[DataFile, Tag(IN_FILE)] | Annotated[InstanceOf[Rows], Tag(IN_CODE)],
        Discriminator(lambda value: IN_CODE if isinstance(value, Rows) else IN_FILE),
    ] = Field(description="a table [data] with path and id, or with a source")
    base: BaseFile | None = Field(default=None, description="a table [base] with model and optimizer")
    fuse: FuseFile | None = Field(default=None, description="a table [fuse] with model, optimizer and loss")
    features: dict[str, FeatureFile] | None = Field(
        default=None, description="a table [features] with a line for each column, or for a pattern of columns"
    )
    predict: PredictFile | None = Field(default=None, description="a table [predict] with a path")
    serve: ServeFile = Field(default=ServeFile(), description="a table [serve] with an address or a limit")
    device: str = Field(
        default="cpu",
        min_length=1,
        description='a torch device, for instance "cpu" or "cuda": where the models compute',
    )
    threads: int | None = Field(
        default=None, ge=1, le=MOST_THREADS, description=f"a whole number from 1 to {MOST_THREADS}: torch's threads"
    )
    start: StartFile | None = Field(default=None, description="a table [start] with a folder")
    security: SecurityFile | None = Field(default=None, description="a table [security] with a key")
    hands: HandsFile | None = Field(default=None, description="a table [hands], which may be empty")
    privacy: PrivacyFile = Field(default=PrivacyFile(), description="a table [privacy] with a secret and defences")

    _folder: Path | None = PrivateAttr(None)

    if TYPE_CHECKING:  # tables may be given as dicts

        def __init__(self, /, **values: Any) -> None: ...

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a party file; its paths and modules are looked for in its folder. Raises one JobError for all faults."""
        return load(cls, path)

    def model_post_init(self, context: Any, /) -> None:
        self._folder = (context or {}).get("folder")

    @model_validator(mode="after")
    def _maps_what_features_makes(self) -> Self:
        if isinstance(self.data, DataFile) and self.data.mapped and self.features is None:
            raise ValueError("data.mapped needs a table [features], which makes the numbers that are mapped")
        return self

    @property
    def folder(self) -> Path | None:
        """The folder of the file, where `module:callable` is looked for first; None if built in code."""
        return self._folder

    def broker_url(self, option: str | None = None, *, again: bool = False) -> str:
        """Return the broker to use: `option`, else SL_QUEUE_BROKER, else the file's. Raises JobError if there is none.

        `again`: it was read before, and may have changed.
        """
        for where, url in (("--broker", option), (BROKER.name, BROKER.read()), ("broker", self.broker)):
            if url:
                url = read_url(url, self._folder if where == "broker" else None, again=again)
                problem = problem_of(url)
                if problem is not None:
                    raise JobError(f"{where} = {problem}")
                return url
        raise JobError(
            f"party {self.party!r} has no broker: give --broker URL, set {BROKER.name}, or write `broker` into its "
            f"file; it must be {FORM}"
        )
