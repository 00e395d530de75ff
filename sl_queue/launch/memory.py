"""Memory that was freed, given back to the system: the C library keeps it for what may come."""

import ctypes
from functools import cache
from typing import Any


def give_memory_back() -> None:
    """Give back what is not in use any more; takes a millisecond."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """Return malloc_trim; None for a C library without it."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
