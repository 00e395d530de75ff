"""State that objects keep elsewhere than in attributes, in plain values: read, and put back in place.

Generators of random numbers, containers of a kind of their own (a Counter, a list with methods), bytes, arrays of text,
records and objects, sparse tensors, and tensors of a class of their own.
"""

import random
from array import array
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

INNER = "[]"  # the place of it among the attributes of an object
_STATE = "state"  # that of a generator, which has no attributes beside
_BASES: tuple[type, ...] = (OrderedDict, dict, list, deque, set)
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def inner_name(value: Any) -> str:
    """Return the name under which what `inner_of` returns stands among the attributes of an object."""
    return _STATE if is_generator(value) else INNER


def is_generator(value: Any) -> bool:
    """Tell whether a value is a generator of random numbers whose state can be set."""
    kinds = torch.Generator | random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator
    return isinstance(value, kinds) and not isinstance(value, random.SystemRandom)


def inner_of(value: Any) -> Any:
    """Return what `value` keeps elsewhere than in attributes; None of anything that is not known here."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if is_generator(value):
        return _of_generator(value)
    if isinstance(value, bytearray | array):
        return np.frombuffer(bytes(value), np.uint8).copy()
    base = _base(value)
    if base is None or type(value) is base:
        return None
    return base(dict.items(value)) if issubclass(base, dict) else base(base.__iter__(value))


def set_inner(value: Any, inner: Any) -> Any:
    """Give `value` back what `inner_of` returned; returns it, or one made in its place where it cannot hold that."""
    if isinstance(value, Tensor):
        return _set_tensor(value, inner)
    if isinstance(value, np.ndarray):
        return _set_array(value, *inner)
    if is_generator(value):
        _set_generator(value, inner)
    elif isinstance(value, bytearray):
        value[:] = inner.tobytes()
    elif isinstance(value, array):
        del value[:]
        value.frombytes(inner.tobytes())
    else:
        _refill(value, inner)
    return value


def _base(value: Any) -> Any:
    return next((base for base in _BASES if isinstance(value, base)), None)


def _refill(value: Any, items: Any) -> None:
    """Put items into a container as its base class does, past methods of its own."""
    base = _base(value)
    if base is None:
        raise TypeError(f"a {type(value).__name__} holds no items")
    base.clear(value)
    if issubclass(base, dict):
        for key, item in items.items():
            base.__setitem__(value, key, item)
    else:
        (base.update if base is set else base.extend)(value, items)


def _of_generator(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.get_state(legacy=False) if isinstance(value, np.random.RandomState) else value.state


def _set_generator(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator | np.random.RandomState):
        value.set_state(state)
    elif isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.state = state


# Arrays and tensors that are not plain numbers -----------------------------------------------------------------


def _of_array(value: Any) -> Any:
    """Return shape, dtype, and the bytes or objects of an array."""
    shape = tuple(value.shape)
    if value.dtype.hasobject:
        return (shape, "|O", list(value.flat)) if value.dtype.names is None else None
    kind = np.lib.format.dtype_to_descr(value.dtype)
    return shape, kind, np.frombuffer(value.tobytes(), np.uint8).copy()


def _set_array(value: Any, shape: tuple[int, ...], kind: Any, content: Any) -> Any:
    dtype = np.lib.format.descr_to_dtype(kind)
    if dtype.hasobject:
        found = np.empty(len(content), object)
        found[:] = content
    else:
        found = np.frombuffer(content.tobytes(), dtype)
    if value.shape != shape or value.dtype != dtype or not value.flags.writeable:
        return found.reshape(shape).copy()
    value[...] = found.reshape(shape)
    return value


def _of_tensor(value: Any) -> Any:
    if value.layout == torch.sparse_coo:
        return "coo", tuple(value.shape), value.is_coalesced(), value._indices(), value.detach()._values()
    if value.layout in _COMPRESSED:
        by_row = value.layout in (torch.sparse_csr, torch.sparse_bsr)
        edges = value.crow_indices() if by_row else value.ccol_indices()
        others = value.col_indices() if by_row else value.row_indices()
        kind = str(value.layout).removeprefix("torch.sparse_")
        return kind, tuple(value.shape), False, edges, others, value.detach().values()
    plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_lazy(value)
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta" or not plain:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return value.detach().as_subclass(Tensor)


def _set_tensor(value: Any, inner: Any) -> Any:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if isinstance(inner, Tensor):
            if inner.dtype == value.dtype and inner.shape == value.shape:
                value.copy_(inner)
            else:
                value.data = inner.detach().clone().to(value.device).as_subclass(type(value))
            return value
        kind, shape, coalesced, *parts = inner
        if kind == "coo":
            found = torch.sparse_coo_tensor(
                parts[0], parts[1], shape, is_coalesced=coalesced or None, check_invariants=False
            )
        else:
            layout = getattr(torch, f"sparse_{kind}")
            edges, others, numbers = parts
            found = torch.sparse_compressed_tensor(edges, others, numbers, shape, layout=layout, check_invariants=False)
        if value.layout != found.layout or value.dtype != found.dtype:
            return found.clone()
        return value.resize_as_sparse_(found).copy_(found)
