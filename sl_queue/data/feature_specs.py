"""Declarations of a party's columns: how each becomes numbers. Values only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

Missing = Literal["median", "mean", "zero", "error"]
Scale = Literal["standard", "minmax", "quantile", "none"]
Part = Literal["year", "month", "day", "weekday", "age"]

_PATTERN = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Number:
    """A column of numbers: what fills its gaps, and how it is scaled."""

    missing: Missing = "error"
    indicator: bool = False  # a column of its own says where a value was missing
    scale: Scale = "standard"
    knots: int = 64  # of the quantile scale

    kind = "number"


@dataclass(frozen=True, slots=True)
class Category:
    """A column of categories: rare, unseen and missing ones have places of their own."""

    encode: Literal["one-hot", "index"] = "one-hot"
    rare: int = 1  # training rows that a category needs to have a place of its own

    kind = "category"


@dataclass(frozen=True, slots=True)
class Date:
    """A column of dates: the parts that are taken from it, each as a number."""

    parts: tuple[Part, ...] = ("age",)
    at: date | None = None  # the day from which ages count, in days; the day of training is never meant
    format: str | None = None  # of dates that are text, as strptime reads it; None: ISO 8601
    number: Number = Number()  # what becomes of each part

    kind = "date"


Spec = Number | Category | Date


def resolve(declared: Mapping[str, Spec], columns: Sequence[str]) -> tuple[dict[str, Spec], list[str]]:
    """Give every column its declaration, the first whose name or pattern matches; and say what has none."""
    found: dict[str, Spec] = {}
    faults = []
    for column in columns:
        spec = next((spec for pattern, spec in declared.items() if matches(pattern, column)), None)
        if spec is None:
            faults.append(
                f"[features] declares nothing for column {column!r}; add a line for it, or leave it out: "
                f'data.exclude = ["{column}"]'
            )
        else:
            found[column] = spec
    return found, [*_unknown(declared, columns), *faults]


def matches(pattern: str, column: str) -> bool:
    """Return True if a name or a pattern like "x*" stands for that column."""
    return pattern == column or fnmatchcase(column, pattern)


def _unknown(declared: Mapping[str, Spec], columns: Sequence[str]) -> Iterator[str]:
    for name in declared:
        if name not in columns and not _PATTERN & set(name):
            close = get_close_matches(name, columns, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            yield f"[features] {name}: there is no such column among the features{meant}"
