"""Whole numbers that a floating dtype holds exactly, and those that it rounds."""

from typing import Any

import numpy as np
import numpy.typing as npt

BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}  # of a whole number, by the name of the dtype


def rounded(values: npt.NDArray[np.integer], dtype: str) -> npt.NDArray[np.bool_]:
    """Return True for each whole number that `dtype` rounds; 2**30 is exact in float32, 2**30 + 1 is not."""
    bits = BITS[dtype]
    found = np.zeros(values.shape, np.bool_)
    if not values.size or values.dtype.itemsize * 8 <= bits:
        return found
    if int(values.max()) <= 2**bits and int(values.min()) >= -(2**bits):
        return found
    size = np.abs(values).astype(np.uint64)  # also right for -2**63, whose absolute value is itself
    lowest = size & (~size + np.uint64(1))  # the lowest bit that is set
    np.greater_equal(size // np.maximum(lowest, np.uint64(1)), np.uint64(2**bits), out=found)
    return found


def rounded_whole(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.bool_]:
    """Return True for the whole numbers that are rounded; where there are fractions all numbers are rounded anyway."""
    if values.dtype.kind != "f":
        return rounded(values, dtype)
    largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
    if largest <= 2 ** BITS[dtype] or largest >= 2**63 or not (values == np.floor(values)).all():
        return np.zeros(values.shape, np.bool_)
    return rounded(values.astype(np.int64), dtype)
