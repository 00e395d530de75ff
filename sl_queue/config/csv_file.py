"""The table [data.csv] of a party file."""

from typing import Literal, Self

from pydantic import Field, model_validator

from sl_queue.config.schema import Declared


class CsvFile(Declared):
    """How a CSV file is written."""

    delimiter: str = Field(default=",", min_length=1, max_length=1, description='one character, like ";" or "\\t"')
    encoding: str = Field(default="utf-8", description='a name like "utf-8" or "cp1252"')
    decimal: Literal[".", ","] = Field(default=".", description='"." or ",": what stands before the fraction')
    thousands: str = Field(default="", max_length=1, description='one character between thousands, like "."')
    missing: list[str] = Field(default=[], description='a list of texts that stand for a gap, like ["NA", "?"]')

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> Self:
        if self.thousands and self.thousands in (self.decimal, self.delimiter):
            raise ValueError("uses one character for thousands and for something else")
        if self.delimiter in (self.decimal, '"', "\r", "\n"):
            raise ValueError(f"has the delimiter {self.delimiter!r}, which means something else")
        return self
