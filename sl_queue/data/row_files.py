"""Rows that name their own columns: svmlight (`id label 3:0.5`) and tag:value (`id,tag:value`)."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sl_queue.data.faults import listed
from sl_queue.data.matrices import in_rows
from sl_queue.protocol.text import counted

ID, LABEL = "id", "label"  # what the first fields are called


@dataclass(frozen=True, slots=True)
class RowFile:
    """A text file whose rows have an id, in svmlight a label, and then `column:value`; what is not there is 0."""

    path: Path
    kind: Literal["svmlight", "tag:value"]
    delimiter: str
    lossy: Counter[str] = field(default_factory=Counter[str], repr=False)  # what `rounded` counts
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
        rows, places, values, bad, double = array("q"), array("q"), array("d"), list[int](), list[int]()
        lossy = Counter[str]()
        with self.path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                fields = self._split(line)
                if not fields:
                    continue
                parsed = _pairs(fields[len(first) :], wanted, lossy)
                if parsed is None or len(fields) < len(first):
                    bad.append(number)
                    continue
                if len(dict(parsed)) < len(parsed):
                    double.append(number)
                rows.extend([len(heads[ID])] * len(parsed))
                places.extend(place for place, _ in parsed)
                values.extend(value for _, value in parsed)
                for name, field in zip(first, fields, strict=False):
                    heads[name].append(field)
        dense = np.zeros((len(selected), len(heads[ID])), np.float64)
        dense[np.asarray(places), np.asarray(rows)] = np.asarray(values)
        columns = {name: _head(name, heads[name]) if name in first else dense[place] for name, place in wanted.items()}
        self.lossy.update(lossy)
        return pa.table(columns), list(_faults(bad, double, {name: lossy[name] for name in texts if lossy[name]}))

    def later(self, selected: Sequence[str], texts: Sequence[str]) -> None:
        return None

    def rounded(self, columns: Mapping[str, Any]) -> dict[str, int]:
        return {name: count for name, count in self.lossy.items() if count and name in columns}


def _faults(bad: list[int], double: list[int], codes: Mapping[str, int]) -> Iterator[str]:
    """Say what is wrong with rows, by the numbers of their lines, and with categories that float64 rounds."""
    if bad:
        yield f"{counted(len(bad), 'row is', 'rows are')} not written so, the first of them is line {bad[0]}"
    if double:
        told = counted(len(double), "row names", "rows name")
        yield f"{told} a column more than once, the first of them is line {double[0]}; leave one value of each"
    if codes:
        told = listed(in_rows(name, count) for name, count in codes.items())
        yield f"codes of column {told} need more than 53 bits, and would be rounded; number them 0, 1, 2, ..."


def _pairs(fields: Sequence[str], wanted: Mapping[str, int], lossy: Counter[str]) -> list[tuple[int, float]] | None:
    """Read `column:value` of the wanted columns; None if one of the row is written otherwise.

    Whole numbers that float64 rounds are counted in `lossy`.
    """
    found = []
    for pair in fields:
        name, colon, value = pair.partition(":")
        if not colon:
            return None
        if name in wanted:
            try:
                number = float(value)
            except ValueError:
                return None
            if "_" in value:  # which Python lets stand between digits
                return None
            lossy[name] += _is_rounded(value, number)
            found.append((wanted[name], number))
    return found


def _is_rounded(text: str, number: float) -> bool:
    return abs(number) >= 2.0**53 and math.isfinite(number) and text.lstrip("+-").isdecimal() and int(text) != number


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
