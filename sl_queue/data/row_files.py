"""Rows that name their own columns: svmlight (`id label 3:0.5`) and tag:value (`id,tag:value`)."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sl_queue.protocol.text import counted

ID, LABEL = "id", "label"  # what the first fields are called


@dataclass(frozen=True, slots=True)
class RowFile:
    """A text file whose rows have an id, in svmlight a label, and then `column:value`; what is not there is 0."""

    path: Path
    kind: Literal["svmlight", "tag:value"]
    delimiter: str
    ids_are_text, leaves_zeros_out = True, True

    def fault(self) -> str | None:
        return None

    def names(self) -> list[str]:
        found: set[str] = set()
        with self.path.open(encoding="utf-8-sig") as file:
            for line in file:
                found.update(field.partition(":")[0] for field in self._split(line)[len(self._first) :])
        return [*self._first, *sorted(found, key=_in_order)]

    @property
    def _first(self) -> tuple[str, ...]:
        return (ID, LABEL) if self.kind == "svmlight" else (ID,)

    def _split(self, line: str) -> list[str]:
        line = line.partition("#")[0] if self.kind == "svmlight" else line
        return line.split() if self.kind == "svmlight" else [f.strip() for f in line.split(self.delimiter) if f.strip()]

    def read(self, selected: Sequence[str], texts: Sequence[str]) -> tuple[Any, list[str]]:
        """Read them, and count rows that are not written so."""
        first, wanted = self._first, {name: place for place, name in enumerate(selected)}
        heads: dict[str, list[str]] = {name: [] for name in first}
        rows, places, values, bad = array("q"), array("q"), array("d"), []
        with self.path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                fields = self._split(line)
                if not fields:
                    continue
                parsed = _pairs(fields[len(first) :], wanted)
                if parsed is None or len(fields) < len(first):
                    bad.append(number)
                    continue
                rows.extend([len(heads[ID])] * len(parsed))
                places.extend(place for place, _ in parsed)
                values.extend(value for _, value in parsed)
                for name, field in zip(first, fields, strict=False):
                    heads[name].append(field)
        dense = np.zeros((len(selected), len(heads[ID])), np.float64)
        dense[np.asarray(places), np.asarray(rows)] = np.asarray(values)
        columns = {name: _head(name, heads[name]) if name in first else dense[place] for name, place in wanted.items()}
        faults = (
            [f"{counted(len(bad), 'row is', 'rows are')} not written so, the first of them is line {bad[0]}"]
            if bad
            else []
        )
        return pa.table(columns), faults

    def later(self, selected: Sequence[str], texts: Sequence[str]) -> None:
        return None

    def rounded(self, columns: Mapping[str, Any]) -> dict[str, int]:
        return {}


def _pairs(fields: Sequence[str], wanted: Mapping[str, int]) -> list[tuple[int, float]] | None:
    """Read `column:value` of the wanted columns; None if one of the row is written otherwise."""
    found = []
    for field in fields:
        name, colon, value = field.partition(":")
        if not colon:
            return None
        if name in wanted:
            try:
                found.append((wanted[name], float(value)))
            except ValueError:
                return None
    return found


def _head(name: str, fields: list[str]) -> Any:
    texts = pa.array(fields, pa.string())
    if name == ID:
        return texts
    try:
        return texts.cast(pa.int64())
    except pa.ArrowInvalid:
        pass
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        return texts


def _in_order(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
