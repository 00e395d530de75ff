"""Cuts of a module, ranked: by what crosses, by what each side computes, and by how much the activation gives away."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sl_queue.compute.splitting.candidates import Candidate, Floats, Refused, candidates
from sl_queue.compute.splitting.rows import drawn_rows
from sl_queue.config.user_code import Importer
from sl_queue.errors import JobError
from sl_queue.privacy.attacks import reconstruction

LEAST_ROWS = 40  # for an attack that knows half of them
_WIDTH = 64  # numbers of a row that are attacked; of wider ones every so many
_SHAPE = re.compile(r"\d+(,\d+)*")
HEADER = f"{'layer':32} {'party':12} {'base flops':>12} {'other flops':>12} {'bytes/row':>10} {'recovered':>10}"


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to cut a module."""

    candidate: Candidate
    recovered: float | None  # the share of the columns' variance that is read off the activation; None of too few rows


def ranked(module: Any, parties: Mapping[str, Any], rows: Any) -> tuple[list[Cut], list[Refused]]:
    """Return the cuts, the fewest bytes first and then the least work for the party; and the refused layers."""
    found: list[Cut] = []
    refused: list[Refused] = []
    for each in candidates(module, parties, rows):
        if isinstance(each, Refused):
            refused.append(each)
        else:
            found.append(Cut(each, _recovered(each.seen, each.held)))
    return sorted(found, key=lambda cut: (cut.candidate.bytes_per_row, cut.candidate.base_flops)), refused


def _recovered(seen: Floats, held: Floats) -> float | None:
    if len(seen) < LEAST_ROWS:
        return None
    return reconstruction(_narrow(seen), _narrow(held), np.random.default_rng(0))


def _narrow(rows: Floats) -> Floats:
    return rows[:, :: -(-rows.shape[1] // _WIDTH)]


def lines(cuts: Sequence[Cut], refused: Sequence[Refused]) -> Iterator[str]:
    """Yield what a person reads."""
    yield HEADER
    for cut in cuts:
        c = cut.candidate
        read = "-" if cut.recovered is None else f"{cut.recovered:.2f}"
        yield (
            f"{c.layer:32} {c.party:12} {_short(c.base_flops):>12} {_short(c.rest_flops):>12} {c.bytes_per_row:>10} "
            f"{read:>10}"
        )
    if refused:
        yield ""
        yield from (f"not at {each.why}" for each in refused)
    if any(cut.recovered is None for cut in cuts):
        yield ""
        yield f"recovered: needs {LEAST_ROWS} rows of your own, by --rows module:callable"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


# Arguments of the command -------------------------------------------------------------------------------------------


def module_named(name: str, folder: Path) -> Any:
    """Import or build the module that `module:callable` names."""
    found = Importer().within(folder).load(name)
    return found() if isinstance(found, type) or not hasattr(found, "named_modules") else found


def rows_named(rows: str, folder: Path) -> Any:
    """Return rows by `module:callable`, or drawn ones of a shape such as 8,3,32,32. Raises JobError."""
    if _SHAPE.fullmatch(rows):
        return drawn_rows(tuple(map(int, rows.split(","))))
    return Importer().within(folder).load(rows)()


def parties_named(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read NAME=COLUMNS, whose columns are names, numbers, and ranges such as 0:3. Raises JobError."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        party, sign, columns = text.partition("=")
        if not sign or not party or not columns:
            raise JobError(f"--party {text}: it must be NAME=COLUMNS, for instance bank=0:3 or bank=age,income")
        if party in found:
            raise JobError(f"--party {party} is given twice; list its columns behind one, separated by commas")
        found[party] = [_column(word.strip()) for word in columns.split(",")]
    return found


def _column(word: str) -> Any:
    if re.fullmatch(r"\d+:\d+", word):
        first, _, last = word.partition(":")
        return range(int(first), int(last))
    return int(word) if word.isdecimal() else word
