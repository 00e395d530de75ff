"""First job and party files for a user's own tables, with a comment at each key that a newcomer asks about."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sl_queue.config.features import as_toml

Task = Literal["binary", "multiclass", "regression"]

_LOSSES: Mapping[Task, tuple[str, str]] = {  # and what to measure
    "binary": ("bce_with_logits", '["auroc", "accuracy"]'),
    "multiclass": ("cross_entropy", '["accuracy"]'),
    "regression": ("mse", '["mae"]'),
}
JOB_FILE = "job.toml"
WIDTH = 16  # of each party's activation


@dataclass(frozen=True, slots=True)
class TableOf:
    """The table of one party."""

    party: str
    path: str
    id: str
    label: str | None = None  # only at the label holder


@dataclass(frozen=True, slots=True)
class Start:
    """Answers of which the files are made; the label holder's table is the first."""

    name: str
    tables: Sequence[TableOf]
    task: Task = "binary"
    classes: int = 2  # of a multiclass task
    aligned: bool = True  # the tables hold different ids

    @property
    def outputs(self) -> int:
        """Numbers that the fuse model puts out."""
        return self.classes if self.task == "multiclass" else 1


def files_of(start: Start) -> dict[str, str]:
    """Return the files by name: the job, each party's file, and the models."""
    files = {JOB_FILE: _job(start), "models.py": _models(start)}
    return files | {f"{table.party}.toml": _party(start, table) for table in start.tables}


def _job(start: Start) -> str:
    holder, *others = start.tables
    alignment = (
        """
[alignment]                       # finds the rows that all parties hold, before the run begins
method = "psi"                    # nobody learns which other rows the others have
normalise = ["strip", "casefold"] # done to ids that are text, so that C-17 is c-17; the same at every party
# at_least = 1000                 # stop if fewer rows are shared
# at_most = 1000000               # ids that a party may bring
"""
        if start.aligned
        else ""
    )
    parties = "".join(
        f"""
[parties.{table.party}]
role = "feature"                  # it has columns, and a base model
cut = [{WIDTH}]                        # numbers that its base model puts out for each row: what is sent
"""
        for table in others
    )
    return f"""# What all parties agree on: the same file at every party.
name = {as_toml(start.name)}
seed = 7                          # initial weights, the order of rows and the held-out rows follow from it
epochs = 10                       # passes over the rows
batch_size = 128                  # rows of an optimizer step
holdout = 0.2                     # share of rows that are not trained on; metrics are measured on them
# test = 0.1                      # share of rows that the run never touches: `sl-queue evaluate --test`
{parties}
[parties.{holder.party}]
role = "label"                    # exactly one party holds the labels
cut = [{WIDTH}]                        # without this line it has labels only, and no base model
{alignment}
[pipeline]
micro_batches = 4                 # parts of a step, so that parties compute at the same time
"""


def _party(start: Start, table: TableOf) -> str:
    label = "" if table.label is None else f"label = {as_toml(table.label)}\n"
    fuse = "" if table.label is None else f"\n{_fuse(start)}"
    return f"""# The file of {table.party}; it stays there, and nothing of it is sent.
party = {as_toml(table.party)}
state = {as_toml(f"state/{table.party}")}
# broker = "amqps://user@host:5671/vhost"         # or --broker, or SL_QUEUE_BROKER; not needed on one machine

[data]
path = {as_toml(table.path)}
id = {as_toml(table.id)}          # or a list of columns: ["country", "number"]
{label}# exclude = ["internal_*"]                        # columns to leave out
# csv = {{ delimiter = ";", decimal = "," }}        # how a CSV is written

# `sl-queue features job.toml {table.party}.toml --write` proposes a table [features] from the columns, for you to look
# through: gaps, categories, dates and scales. Without it every column but id and label is a number without gaps.

[base]
model = "models:Base"             # module:callable, from models.py beside this file
args = {{ width = {WIDTH} }}
optimizer = {{ name = "adam", lr = 0.001 }}         # any of torch.optim
{fuse}"""


def _fuse(start: Start) -> str:
    loss, metrics = _LOSSES[start.task]
    scale = ", mean = 0.0, deviation = 1.0" if start.task == "regression" else ""
    about = "# `sl-queue check` tells mean and deviation of the labels, if the model needs them\n" if scale else ""
    return f"""[fuse]                            # joins what the base models put out; only the label holder has it
model = "models:Fuse"
args = {{ inputs = {WIDTH * len(start.tables)}, outputs = {start.outputs}{scale} }}
optimizer = {{ name = "adam", lr = 0.001 }}
{about}loss = {as_toml(loss)}
metrics = {metrics}
"""


_BASE = '''"""Models to begin with: replace them with your own. Each party needs only its own part."""

import torch
from torch import nn


class Base(nn.Module):
    """The columns of one party, as numbers that are sent to the label holder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(width), nn.ReLU())  # lazy: it sees how many columns there are

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)
'''


def _models(start: Start) -> str:
    found = "self.layer(torch.cat(inputs, dim=1))" + ".squeeze(1)" * (start.outputs == 1)
    takes = keeps = ""
    if start.task == "regression":
        takes, found = ", mean: float, deviation: float", f"self.mean + self.deviation * {found}"
        keeps = (
            "\n        self.mean, self.deviation = mean, deviation  # of the labels: what the layer learns is near 0"
        )
    return f'''{_BASE}

class Fuse(nn.Module):
    """What all parties sent, as a prediction."""

    def __init__(self, inputs: int, outputs: int{takes}) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs){keeps}

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return {found}
'''


def is_name(text: str) -> bool:
    """Return True for a name that a party may have, and a file of it."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) is not None
