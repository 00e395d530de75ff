"""The tables [holdout] and [test] of a job: rows that the label holder chooses, by a column or by its labels."""

import re
from datetime import date
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from sl_queue.config.schema import IN_CODE, IN_FILE, Schema, shown
from sl_queue.data.spec import ByColumn, Choice, Stratified

_DATE = re.compile(r"\d{4}(-\d\d(-\d\d)?)?")
_BOUND = "a number, or a date like 2026-01-31 or 2026-01"


class JobHoldout(Schema):
    """Choice of rows by the label holder, which tells the other parties which they are and nothing else."""

    column: str | None = Field(
        default=None,
        min_length=1,
        description="the name of a column of the label holder: chooses rows by their values; it is no feature then, "
        "unless data.features or [features] names it",
    )
    from_: int | float | str | date | None = Field(
        default=None, alias="from", description=f"{_BOUND}: the smallest value that is chosen"
    )
    to: int | float | str | date | None = Field(
        default=None, description=f"{_BOUND}: the smallest value above those that are chosen"
    )
    values: list[str | int | float | bool] | None = Field(
        default=None, min_length=1, description="a list of texts, numbers, or true and false: those that are chosen"
    )
    share: float | None = Field(
        default=None, gt=0, lt=1, description="a number between 0 and 1: the share of rows of each class"
    )
    stratify: bool = Field(
        default=False, description="true or false: of the rows of each class of the labels the same share is chosen"
    )

    @field_validator("from_", "to", mode="after")
    @classmethod
    def _is_bound(cls, value: Any) -> Any:
        if isinstance(value, date):
            return value.isoformat()[:10]
        if isinstance(value, bool) or (isinstance(value, str) and not _DATE.fullmatch(value)):
            raise ValueError(f"= {shown(value)}; it must be {_BOUND}")
        return value

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        bounds: list[Any] = [bound for bound in (self.from_, self.to) if bound is not None]
        if self.column is None:
            if self.share is None or not self.stratify or bounds or self.values:
                raise ValueError(
                    "needs a column with `from`, `to` or `values`, or a share with stratify = true; "
                    "a share alone is a number: 0.2"
                )
            return self
        if self.share is not None or self.stratify:
            raise ValueError("has both a column and a share; remove one of them")
        if bool(bounds) == bool(self.values):
            raise ValueError("needs `from` or `to`, or else `values`, of its column")
        if len({isinstance(bound, str) for bound in bounds}) > 1:
            raise ValueError("has a number and a date as `from` and `to`")
        if len(bounds) == 2 and bounds[0] >= bounds[1]:
            raise ValueError("has a `to` that is not above its `from`, so it chooses nothing")
        return self

    def choice(self) -> Choice:
        """Return what it says, as a value."""
        if self.column is None:
            assert self.share is not None
            return Stratified(self.share)
        bounds: list[Any] = [self.from_, self.to]
        return ByColumn(self.column, bounds[0], bounds[1], None if self.values is None else tuple(self.values))


HoldoutSetting = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag(IN_FILE)] | Annotated[JobHoldout, Tag(IN_CODE)],
    Discriminator(lambda value: IN_CODE if isinstance(value, dict | JobHoldout) else IN_FILE),
]
