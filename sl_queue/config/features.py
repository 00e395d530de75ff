"""The table [features] of a party file: what becomes of each column."""

import json
from datetime import date
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sl_queue.config.schema import Schema
from sl_queue.data import date_patterns
from sl_queue.data.feature_specs import Category, Date, Missing, Number, Part, Scale, Spec

_OF = {
    "number": {"missing", "indicator", "scale", "knots"},
    "category": {"encode", "rare"},
    "date": {"parts", "at", "format", "missing", "scale"},
}


class FeatureFile(Schema):
    """One line of [features]."""

    kind: Literal["number", "category", "date"] = Field(
        description='"number", "category" or "date": what the column holds'
    )
    missing: Missing = Field(default="error", description='"median", "mean", "zero" or "error": what fills gaps')
    indicator: bool = Field(default=False, description="true or false: a column that says where a value was missing")
    scale: Scale = Field(
        default="standard", description='"standard", "minmax", "quantile" or "none": how numbers are scaled'
    )
    knots: int = Field(
        default=64, ge=2, le=10_000, description="a whole number of at least 2: the knots of the quantile scale"
    )
    encode: Literal["one-hot", "index"] = Field(
        default="one-hot", description='"one-hot" or "index": how categories are encoded, index for nn.Embedding'
    )
    rare: int = Field(
        default=1, ge=1, description="a whole number of at least 1: rows that a category needs for a place of its own"
    )
    parts: list[Part] = Field(
        default=["age"],
        min_length=1,
        description='a list of "year", "month", "day", "weekday" and "age": what is taken from a date',
    )
    at: date | None = Field(default=None, description="a date like 2026-01-01: the day from which ages count")
    format: str | None = Field(
        default=None, description='a pattern of strptime like "%d.%m.%Y": how dates are written that are text'
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        others = sorted(self.model_fields_set - _OF[self.kind] - {"kind"})
        if others:
            allowed = ", ".join(sorted(_OF[self.kind]))
            raise ValueError(f"has {', '.join(others)}, which a {self.kind} has no use for; it may have {allowed}")
        if self.kind == "date" and "age" in self.parts and self.at is None:
            raise ValueError("has the part age, so it needs `at`: the date from which ages count, never that of today")
        if len(set(self.parts)) < len(self.parts):
            raise ValueError("names a part twice")
        if self.format is not None and (fault := date_patterns.fault(self.format)) is not None:
            raise ValueError(f"has the format {self.format!r}, which {fault}")
        return self

    def spec(self) -> Spec:
        """Return what it declares, as a value."""
        match self.kind:
            case "number":
                return Number(self.missing, self.indicator, self.scale, self.knots)
            case "category":
                return Category(self.encode, self.rare)
            case "date":
                return Date(tuple(self.parts), self.at, self.format, Number(self.missing, scale=self.scale))


def specs_of(features: dict[str, FeatureFile] | None) -> dict[str, Spec] | None:
    """Return what a party declares of its columns; None if it has no [features]."""
    return None if features is None else {name: line.spec() for name, line in features.items()}


def as_toml(value: Any) -> str:
    """Write a value of a line of [features] as TOML."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes as JSON does
        case list() | tuple():
            return f"[{', '.join(map(as_toml, value))}]"
        case _:
            return str(value)
