"""Fewer bytes for a tensor on its way: narrower numbers, and zeros left out. The same in both directions.

    [scales][which values are here, a bit each][values]

A function of the tensor alone, so whoever computes a message again sends the same bytes, and a resumed run stays
exact. float16 has one scale a message, a power of two that makes the largest number fit and keeps small gradients from
vanishing; int8 has one a row. Without a narrower dtype nothing is lost.

An activation that the loss does not depend on has no gradient, which is not the same as a gradient of zeros: optimizers
skip a parameter without one, but Adam, momentum and weight decay move it for zeros. Its message has no bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.messages import Payload

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
Compress = Literal["none", "bitmap", "zstd"]
Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]  # (items,): which values travel
Cast = Callable[[Array, Array], None]  # the first's numbers into the second, to nearest, ties to even

_NARROWED: Final = ("float64", "float32")  # what a narrower dtype is taken of; others travel as they are
_ITEM: Final[dict[str, Any]] = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "int8": np.int8}
_BITS: Final[dict[int, Any]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WIDTH: Final = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_FITS: Final = 2.0**15  # the largest float16 is almost twice that
_ZSTD_LEVEL: Final = 1


def plain_cast(source: Array, target: Array) -> None:
    """Cast float32, and float16 or the bits of bfloat16, with NumPy alone, which has no instructions for them."""
    if target.dtype == _ITEM["bfloat16"]:
        bits = source.view(np.uint32)
        target[...] = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    elif source.dtype == _ITEM["bfloat16"]:
        target.view(np.uint32)[...] = source.astype(np.uint32) << np.uint32(16)
    else:
        np.copyto(target, source, casting="unsafe")


@dataclass(frozen=True, slots=True)
class Wire:
    """Format in which the tensors of a job travel. float32 means: as the models compute them."""

    dtype: Dtype = "float32"
    compress: Compress = "none"
    cast: Cast = field(default=plain_cast, compare=False, repr=False)

    def pack(self, payload: Payload, *, relu: bool = False, wanted: Mask | None = None) -> Payload:
        """Return the payload as it travels.

        `relu`: the zeros of this activation need no gradient. `wanted`: the values of this gradient that are used,
        where the activation has said so; the others may arrive as zeros.
        """
        if self == AS_IT_IS:
            return payload
        exact = _exact(payload)
        if wanted is not None:
            exact = np.where(wanted.reshape(exact.shape), exact, exact.dtype.type(0))
        narrow = self.dtype if self.dtype != "float32" and payload.dtype in _NARROWED else ""
        whole, values = _narrowed(exact, narrow, self.cast)
        packing, body = self._compressed(exact, values, relu, wanted)
        if body is None and not narrow:
            return payload
        data = whole.data if body is None else b"".join((whole.data[: whole.nbytes - values.nbytes], body))
        return Payload(payload.dtype, payload.shape, data, payload.rows, f"{narrow or payload.dtype}/{packing}")

    def _compressed(self, exact: Array, values: Array, relu: bool, wanted: Mask | None) -> tuple[str, bytes | None]:
        """Return the way that is shortest, and its bytes; None: those of all values."""
        flat = values.reshape(-1)
        if wanted is not None:
            return "wanted", flat[wanted].tobytes()
        if self.compress == "bitmap":
            mask = nonzero(exact)
            body = np.packbits(mask).tobytes() + flat[mask].tobytes()
            if len(body) < flat.nbytes:
                return "relu" if relu else "bitmap", body
        elif self.compress == "zstd":
            body = _zstd().compress(flat, asbytes=True)
            if len(body) < flat.nbytes:
                return "zstd", body
        return "none", None

    def unpack(self, payload: Payload, wanted: Mask | None = None) -> Payload:
        """Return the payload as it was, apart from what narrower numbers lose; one that was not packed as it is.

        Its dtype and shape must have been compared with what is expected: they say how much is allocated. `wanted`:
        the values of this gradient that were asked for. Raises RemoteProtocolError.
        """
        if not payload.packing:
            return payload
        narrow, _, packing = payload.packing.partition("/")
        if narrow != payload.dtype and (narrow != self.dtype or payload.dtype not in _NARROWED):
            raise RemoteProtocolError(f"{payload} travelled as {narrow[:20]}, the job says {self.dtype}")
        items, item = prod(payload.shape), _item(payload.dtype, narrow)
        n_scales = 0 if narrow == payload.dtype else {"float16": 1, "int8": payload.shape[0]}.get(narrow, 0)
        data = memoryview(payload.data)
        scales = np.frombuffer(_taken(data, 4 * n_scales, payload), np.float32)
        values = _values(data[4 * n_scales :], packing, items, item, payload, wanted)
        wide = _widened(scales, values.reshape(payload.shape), payload.dtype, narrow, self.cast)
        return Payload(payload.dtype, payload.shape, wide.reshape(-1).view(np.uint8).data, payload.rows)

    def bytes_of(self, dtype: str, shape: tuple[int, ...], kept: float = 1.0) -> int:
        """Estimate a tensor's size on its way when this share of its values is not zero; zstd counts as bitmap."""
        narrow = self.dtype if self.dtype != "float32" and dtype in _NARROWED else dtype
        items = prod(shape)
        dense = items * _WIDTH[narrow]
        scales = {"float16": 4, "int8": 4 * shape[0]}.get(narrow, 0) if narrow != dtype else 0
        shorter = dense if self.compress == "none" else min(dense, round(dense * kept) + -(-items // 8))
        return scales + shorter


AS_IT_IS: Final = Wire()


def unused(dtype: str, shape: tuple[int, ...], rows: bytes) -> Payload:
    """Return the gradient of an activation that the loss does not depend on: no bytes, however tensors travel."""
    return Payload(dtype, shape, b"", rows, f"{dtype}/unused")


def is_unused(payload: Payload) -> bool:
    """Return True for such a gradient. Raises RemoteProtocolError if it has bytes all the same."""
    if payload.packing != f"{payload.dtype}/unused":
        return False
    _all(memoryview(payload.data), 0, payload)
    return True


def nonzero(array: Array) -> Mask:
    """Return which items are not zero; a negative zero counts as a number, so that nothing is lost."""
    mask: Mask = array.reshape(-1).view(_BITS[array.itemsize]) != 0
    return mask


def _exact(payload: Payload) -> Array:
    """Return the numbers of a payload; of dtypes that NumPy does not know, their bits."""
    dtype: Any = np.uint16 if payload.dtype == "bfloat16" else np.dtype(payload.dtype)
    return np.frombuffer(payload.data, dtype).reshape(payload.shape)


def _item(dtype: str, narrow: str) -> Any:
    """Return the type of the values that travel."""
    return np.float64 if narrow == dtype == "float64" else _ITEM[narrow]


# Narrower numbers -----------------------------------------------------------------------------------------------


@np.errstate(under="ignore")
def _narrowed(exact: Array, narrow: str, cast: Cast) -> tuple[Array, Array]:
    """Return the bytes of scales and values as they travel, and a view of the values among them."""
    if not narrow:
        return exact.reshape(-1).view(np.uint8), exact
    scales = _scales(exact, narrow)
    whole = np.empty(scales.nbytes + exact.size * _WIDTH[narrow], np.uint8)
    whole[: scales.nbytes] = scales.view(np.uint8)
    values = whole[scales.nbytes :].view(_ITEM[narrow]).reshape(exact.shape)
    match narrow:
        case "float16":
            cast(exact * (exact.dtype.type(1) / exact.dtype.type(scales[0])), values)
        case "int8":
            divisors = np.where(scales == 0, np.float32(1), scales).astype(exact.dtype)
            rows = exact.reshape(len(exact), -1) / divisors[:, None]
            np.copyto(values, np.clip(np.rint(rows), -127, 127).reshape(exact.shape), casting="unsafe")
        case _:
            cast(exact.astype(np.float32, copy=False), values)
    return whole, values


def _scales(exact: Array, narrow: str) -> Array:  # (0,), (1,) or (rows,) of float32
    """Return what values are divided by: all of them for float16, those of a row for int8."""
    match narrow:
        case "float16":
            return np.float32(2.0) ** np.array([_exponent(exact)], np.float32)
        case "int8":
            rows: Array = np.abs(exact.reshape(len(exact), -1)).max(axis=1)
            return (rows / 127).astype(np.float32)
        case _:
            return np.empty(0, np.float32)


def _exponent(exact: Array) -> int:
    """Return the exponent by which the largest number is divided to fit float16; within float32's own."""
    largest = max(float(exact.max()), -float(exact.min()))
    _, exponent = np.frexp(largest / _FITS)
    return int(np.clip(exponent, -126, 126)) if largest else 0


@np.errstate(all="ignore")  # what a peer's scales make of it is looked at when it is a tensor
def _widened(scales: Array, values: Array, dtype: str, narrow: str, cast: Cast) -> Array:
    """Return numbers of the dtype that was computed with, in C order."""
    if narrow == dtype:
        return np.ascontiguousarray(values)
    if narrow == "int8":
        rows = values.reshape(len(values), -1).astype(dtype) * scales.astype(dtype)[:, None]
        return np.ascontiguousarray(rows.reshape(values.shape))
    wide = np.empty(values.shape, np.float32 if narrow == "bfloat16" else dtype)
    cast(values, wide)
    if narrow == "float16":
        wide *= wide.dtype.type(scales[0])
    return wide.astype(dtype, copy=False)


# Zeros left out -------------------------------------------------------------------------------------------------


def _values(
    data: memoryview, packing: str, items: int, item: Any, payload: Payload, wanted: Mask | None
) -> Array:  # (items,)
    """Return all values, with the zeros that did not travel."""
    size = np.dtype(item).itemsize
    match packing:
        case "none":
            return np.frombuffer(_all(data, items * size, payload), item)
        case "zstd":
            try:
                body = _zstd().decompress(data, decompressed_size=items * size, asbytes=True)
            except (OSError, ValueError):
                raise RemoteProtocolError(f"{payload}: zstd cannot restore {items * size} bytes") from None
            return np.frombuffer(body, item)
        case "bitmap" | "relu":
            mask = mask_of(data, items, payload)
            data = data[-(-items // 8) :]
        case "wanted" if wanted is not None:
            mask = wanted
        case _:
            raise RemoteProtocolError(f"{payload} is packed in a way that nobody asked for: {packing[:20]!r}")
    values = np.zeros(items, item)
    values[mask] = np.frombuffer(_all(data, int(mask.sum()) * size, payload), item)
    return values


def mask_of(data: memoryview, items: int, payload: Payload) -> Mask:
    """Read which of `items` values travel, a bit each. Raises RemoteProtocolError if bits are missing."""
    bits = np.frombuffer(_taken(data, -(-items // 8), payload), np.uint8)
    return np.unpackbits(bits, count=items).view(np.bool_)


def _taken(data: memoryview, size: int, payload: Payload) -> memoryview:
    if len(data) < size:
        raise RemoteProtocolError(f"{payload}, packed as {payload.packing}, is cut short")
    return data[:size]


def _all(data: memoryview, size: int, payload: Payload) -> memoryview:
    if len(data) != size:
        raise RemoteProtocolError(f"{payload}, packed as {payload.packing}: {size} bytes expected, {len(data)} here")
    return data


def _zstd() -> Any:
    import pyarrow as pa  # only who wants it waits for it

    return pa.Codec("zstd", compression_level=_ZSTD_LEVEL)
