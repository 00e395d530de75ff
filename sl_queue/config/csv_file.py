"""The table [data.csv] of a party file."""

import io
from typing import Literal, Self

from pydantic import Field, model_validator

from sl_queue.config.schema import Schema
from sl_queue.data.spec import CsvSpec


class CsvFile(Schema):
    """Format of a CSV file."""

    delimiter: str = Field(
        default=",", min_length=1, max_length=1, description='one character, like ";": what separates columns'
    )
    encoding: str = Field(default="utf-8", description='a name like "utf-8" or "cp1252": how characters are written')
    decimal: Literal[".", ","] = Field(default=".", description='"." or ",": what stands before the fraction')
    thousands: str = Field(
        default="", max_length=1, description='one character, like ".": what stands between thousands'
    )
    missing: list[str] = Field(
        default=[], description='a list of texts, like ["NA", "?"]: what stands for a gap, besides empty fields'
    )

    def spec(self) -> CsvSpec:
        """Return what it says, as a value."""
        given = "delimiter" in self.model_fields_set
        return CsvSpec(self.delimiter, self.encoding, self.decimal, self.thousands, tuple(self.missing), given)

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> Self:
        if self.thousands == self.decimal:
            raise ValueError("uses one character for thousands and before the fraction")
        if self.delimiter in ('"', "\r", "\n"):
            raise ValueError(f"has the delimiter {self.delimiter!r}, which means something else")
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding)
        except LookupError:
            told = "which Python does not know, or which writes no text"
            raise ValueError(f'has the encoding {self.encoding!r}, {told}; say "utf-8" or "cp1252"') from None
        return self
