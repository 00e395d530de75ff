"""NumPy's linear algebra on one core: for a few hundred rows further cores only wait, beside parties that compute."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

_TURN = threading.Lock()  # who ends gives back the count that it found


@contextmanager
def on_one_core() -> Iterator[None]:
    """Run the body with one thread of NumPy's BLAS, whatever this process gives it; one body at a time."""
    with _TURN, _blas().limit(limits=1):
        yield


@cache
def _blas() -> Any:
    """Find NumPy's own BLAS; not that of torch, whose threads a party file sets."""
    return ThreadpoolController().select(internal_api="openblas")
