"""The model card of one party's version: Markdown for whoever is handed the folder.

It says nothing of another party but its name and its cut: no column, no row, no model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sl_queue.protocol.text import counted


@dataclass(frozen=True, slots=True)
class Column:
    """One column of this party's own table."""

    name: str
    kind: str  # as the model sees it: "float32", "category of 12", ...
    gaps: int | None = None  # rows without a value; None if that was not counted


@dataclass(frozen=True, slots=True)
class Card:
    """Everything that a model card says."""

    job: str
    job_digest: str
    run: str
    party: str
    role: str
    parts: Mapping[str, str]  # "base" -> the model as the party file names it
    cuts: Mapping[str, Sequence[int]]  # shape of one row's activation, by party
    rows: int
    held_out: int
    epochs: int
    step: int
    finished_at: str
    columns: Sequence[Column] = ()
    task: str = ""  # loss and number of outputs, at the label holder
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # of held-out rows, at the label holder
    privacy: str = ""  # what was measured and defended
    versions: Mapping[str, str] = field(default_factory=dict)  # of sl_queue, torch, ...

    def markdown(self) -> str:
        """Write the card."""
        return "\n".join([*self._head(), *self._data(), *self._results(), *self._privacy(), *self._use()]) + "\n"

    def _head(self) -> list[str]:
        others = ", ".join(f"`{name}` {tuple(cut)}" for name, cut in self.cuts.items())
        parts = ", ".join(f"`{part}` ({model})" for part, model in self.parts.items())
        epochs = counted(self.epochs, "epoch", "epochs")
        return [
            f"# {self.job}: the part of {self.party}",
            "",
            "One part of a model that several organisations trained together by split learning. Alone it predicts",
            f"nothing: `{self.party}` is the {self.role}, and the parts meet at the cut layer.",
            "",
            f"* Run `{self.run}`, finished {self.finished_at} after step {self.step} ({epochs}).",
            f"* Job digest `{self.job_digest}`.",
            f"* Parts here: {parts}.",
            f"* Shape of one row's activation at the cut layer: {others}.",
            "",
        ]

    def _data(self) -> list[str]:
        lines = ["## Data of this party", "", f"{self.rows} rows, of which {self.held_out} were held out.", ""]
        if self.columns:
            lines += ["| column | kind | rows without a value |", "| --- | --- | --- |"]
            for column in self.columns:
                gaps = "not counted" if column.gaps is None else str(column.gaps)
                lines.append(f"| {_cell(column.name)} | {column.kind} | {gaps} |")
            lines.append("")
        return lines

    def _results(self) -> list[str]:
        if self.role != "label holder":
            return ["## Results", "", "The label holder has the results; they are in the model card of its part.", ""]
        lines = ["## Results", ""]
        if self.task:
            lines += [f"Task: {self.task}.", ""]
        if not self.metrics:
            return [
                *lines,
                "No rows were held out: nothing is known of how well the model does on rows it has not seen.",
                "",
            ]
        lines += [
            f"On {self.held_out} held-out rows, which training never saw:",
            "",
            "| metric | value |",
            "| --- | --- |",
        ]
        lines += [f"| {name} | {_number(value)} |" for name, value in self.metrics.items()]
        return [*lines, ""]

    def _privacy(self) -> list[str]:
        unprotected = (
            "No defence was on. Activations may allow conclusions about columns, and gradients about labels; "
            "`sl-queue privacy` measures how much."
        )
        return ["## Privacy", "", self.privacy or unprotected, ""]

    def _use(self) -> list[str]:
        part = next(iter(self.parts), "base")
        libraries = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            "## Use",
            "",
            "To predict together with the other parties: `sl-queue predict JOB PARTY...`, or each worker with",
            f"`--predict`, with `--run {self.run}` where there are several versions.",
            "",
            "To load this part alone, into the module that the party file names:",
            "",
            "```python",
            "import safetensors.torch",
            f'model.load_state_dict(safetensors.torch.load_file("{part}.safetensors"))',
            "model.eval()",
            "```",
            "",
            f"Written by {libraries}.",
        ]


def with_table(card: str, title: str, note: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a card with a section of that title, in the place of one that it has; before how to use the model."""
    lines = [f"## {title}", "", note, "", _line(head), _line(["---"] * len(head)), *map(_line, rows), "", ""]
    sections = re.split(r"(?m)^(?=## )", card)
    kept = [section for section in sections if not section.startswith(f"## {title}\n")]
    place = next((i for i, section in enumerate(kept) if section.startswith("## Use\n")), len(kept))
    return "".join([*kept[:place], "\n".join(lines), *kept[place:]])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Keep a column's name from ending its cell or its row."""
    return " ".join(text.replace("|", "\\|").split())[:200]


def _number(value: float | None) -> str:
    return "undefined on these rows" if value is None else f"{value:.6g}"
