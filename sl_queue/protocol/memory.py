"""Memory for a message or a tensor, laid out so that a tensor in it computes the same bits as one of torch's own."""

from typing import Final

import numpy as np

ALIGNED: Final = 64  # bytes, as torch aligns a tensor: some kernels sum in another order elsewhere


def empty(size: int) -> memoryview:
    """Return memory, not cleared, that ends at a multiple of ALIGNED bytes: a tensor comes last in a message."""
    whole = np.empty(size + ALIGNED, np.uint8)
    skipped = -(_address(whole) + size) % ALIGNED
    return whole[skipped : skipped + size].data


def is_given_away(data: bytes | memoryview) -> bool:
    """Tell whether a tensor may stay in this memory: it may be changed, and it is aligned."""
    if not isinstance(data, memoryview) or data.readonly:
        return False
    return _address(np.frombuffer(data, np.uint8)) % ALIGNED == 0


def _address(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
