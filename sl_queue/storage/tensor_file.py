"""Tensors and what is said about them in one safetensors file, with a digest over both: no pickle, no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from sl_queue.protocol.messages import Payload

_ABOUT, _DIGEST = "about", "digest"
_DTYPES = {  # safetensors' names in a file, and torch's
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class TornFileError(Exception):
    """The file is not what was written: cut short, or altered."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Contents of a file."""

    tensors: Mapping[str, Payload] = field(repr=False)
    about: Mapping[str, Any]  # JSON values


def packed(tensors: Mapping[str, Payload], metadata: Mapping[str, str]) -> bytes:
    """Encode as a safetensors file that any reader of the format can load, such as safetensors.torch.load_file."""
    return bytes(serialize({name: _spec(payload) for name, payload in tensors.items()}, metadata=dict(metadata)))


def sealed(tensors: Mapping[str, Payload], about: Mapping[str, Any]) -> bytes:
    """Encode as a safetensors file with a digest, by which a reader knows whether it is whole."""
    text = json.dumps(about, sort_keys=True)
    return packed(tensors, {_ABOUT: text, _DIGEST: _digest(text, tensors)})


def unsealed(path: Path) -> Stored:
    """Read a file of `sealed` and check its digest. Raises TornFileError, OSError."""
    body = path.read_bytes()
    try:
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        text, digest = header["__metadata__"][_ABOUT], header["__metadata__"][_DIGEST]
        tensors = {
            name: Payload(_DTYPES[found["dtype"]], tuple(found["shape"]), memoryview(found["data"]))
            for name, found in deserialize(body)  # type: ignore[no-untyped-call]
        }
        about = json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TornFileError(f"{type(error).__name__}: {error}") from None
    if _digest(text, tensors) != digest:
        raise TornFileError("its digest differs")
    return Stored(tensors, about)


def _spec(payload: Payload) -> TensorSpec:
    data = np.frombuffer(payload.data, np.uint8)  # lives as long as the payload, which the caller holds
    return TensorSpec(dtype=payload.dtype, shape=list(payload.shape), data_ptr=data.ctypes.data, data_len=data.nbytes)


def _digest(about: str, tensors: Mapping[str, Payload]) -> str:
    digest = blake2b(about.encode(), digest_size=32)
    for name, payload in sorted(tensors.items()):
        digest.update(repr((name, payload.dtype, payload.shape)).encode())
        digest.update(payload.data)
    return digest.hexdigest()
