"""Decimals as the numbers that they are; whole ones that float64 would round stay what they are."""

from decimal import Decimal
from numbers import Rational
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_WHOLE = pa.decimal256(76, 0)


def narrowed(column: Any) -> Any:
    """Return int64 where the type has no fractions, float64 where it has; decimals where these may round whole numbers.

    Beside fractions float64 rounds anyway.
    """
    if column.type.scale <= 0:
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:  # of more than 64 bits
            return column.cast(_WHOLE)
    found = column.cast(pa.float64())
    if (pc.max(pc.abs(found)).as_py() or 0.0) < 2.0**53:
        return found
    try:
        return column.cast(_WHOLE)
    except pa.ArrowInvalid:  # there are fractions
        return found


def rounded(column: Any) -> int:
    """Count the decimals of a column that float64 rounds; 0 for any other column."""
    if not pa.types.is_decimal(column.type):
        return 0
    return sum(map(is_rounded, column.drop_null().to_pylist()))


def is_rounded(value: Any) -> bool:
    """Return True for a whole number of any type of Python that float64 rounds, written without a fraction."""
    if isinstance(value, Rational):
        return value.denominator == 1 and int(value.numerator) != float(value)
    exponent = value.as_tuple().exponent if isinstance(value, Decimal) else None
    return isinstance(exponent, int) and exponent >= 0 and int(value) != float(value)
