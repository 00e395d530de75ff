"""A fingerprint of everything that a step depends on and no checkpoint holds: a run is resumed on the same, or not.

Flat JSON values, kept in every checkpoint and beside the final weights; protocol/fingerprints compares two of them and
says what differs. Code counts by its syntax tree, so comments and layout may change; tables count by their values in
canonical order, so rows may stand in any order and files may move.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.compute.code_digest import code_digests, named, words
from sl_queue.compute.names import NAMED_LOSSES, loss_name
from sl_queue.compute.spec import ComputeSpec, ModelSpec, Part
from sl_queue.cut.crossing import to_payload
from sl_queue.ports import UserCode
from sl_queue.protocol.digests import DIGEST_BYTES, digest_begun, digest_of
from sl_queue.protocol.fingerprints import ONE_BY_ONE, RULES, SEED
from sl_queue.protocol.table import Table

_ROWS = 65_536  # of a table that are looked at at a time


def fingerprint(spec: ComputeSpec, table: Table | None = None, rules: int = RULES) -> dict[str, Any]:
    """Collect what must not change until a checkpoint is resumed, for the same bits to follow; flat, JSON values.

    The number of threads is the calling thread's: sums are split among them. Raises JobError for code that cannot be
    imported.
    """
    found: dict[str, Any] = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    found |= {"device": spec.device, "rules": rules, "secret": _of_secret(spec)}
    found["autocast"] = _autocast(spec.device.partition(":")[0])
    found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    found["default_dtype"] = str(torch.get_default_dtype())
    if table is not None:
        found |= of_table(spec, table)
    parts: tuple[Part, Part] = ("base", "fuse")
    for part in parts:
        if (model := spec.part(part)) is not None:
            found |= _of_part(part, model, spec.code)
    if spec.objective is not None:
        loss = spec.objective.loss
        found |= {"fuse.loss": named(loss_name(loss)), "fuse.outputs": spec.objective.outputs}
        if isinstance(loss, Mapping):
            found |= {f"fuse.loss.{key}": value for key, value in loss.items() if key != "name"}
        known = isinstance(loss, Mapping) or (isinstance(loss, str) and loss in NAMED_LOSSES)
        found |= _of_code("fuse.loss", None if known else loss, spec.code)
        found |= {"fuse.missing_labels": "mask"} if spec.objective.missing else {}
    return found


def _autocast(device: str) -> str:
    """Return the dtype of the calling thread's autocast on a type of device, or "off"."""
    try:
        return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    except RuntimeError:  # no device of torch's: building the model says so
        return "off"


def _of_secret(spec: ComputeSpec) -> str:
    """Hash the secret with salt, so that it names the secret to who has it, and says nothing to anyone else."""
    if not spec.secret:
        return SEED
    salt = blake2b(f"{spec.layers.job_digest} {spec.party}".encode(), digest_size=16).digest()
    return blake2b(spec.secret, digest_size=DIGEST_BYTES, salt=salt, person=b"sl_queue secret").hexdigest()


# Tables ---------------------------------------------------------------------------------------------------------


def of_table(spec: ComputeSpec, table: Table) -> dict[str, Any]:
    """Describe ids, features and labels as they are trained on; names of columns where the table has any."""
    features, columns = table.features, table.columns
    each: list[str] | None = None
    if features is not None and columns is not None and features.ndim == 2 and len(columns) <= ONE_BY_ONE:
        each = _digests(features) if table.narrowed is None else list(table.narrowed.digests)
    fitted = {} if table.fitted is None else {"data.fitted": digest_of(table.fitted.encode())}
    fitted |= {} if table.chosen is None else {"data.held_out": table.chosen.digest}
    return fitted | {
        "data.rows": f"{table.n_rows} {table.digest}",
        "data.columns": None if columns is None else list(columns),
        "data.features": None
        if features is None
        else f"{table.features_dtype} {features.shape} {_together(table, features, each)}",
        "data.features.each": each,
        "data.label": None if table.labels is None else spec.label_column,
        "data.labels": None if table.labels is None else f"{_described(table.labels)} {_digest(table.labels)}",
        **({} if table.weights is None else {"data.weights": _digest(table.weights)}),
    }


def _together(table: Table, features: npt.NDArray[Any], each: list[str] | None) -> str:
    if each is not None:
        return digest_of(",".join(each).encode())
    return _digest(features) if table.narrowed is None else table.narrowed.digests[0]


def _described(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"


def _digests(features: npt.NDArray[Any]) -> list[str]:
    """Return the digest of each column, as `_digest` does, in one pass over the rows."""
    found = [digest_begun() for _ in range(features.shape[1])]
    for first in range(0, len(features), _ROWS):
        part = features[first : first + _ROWS]
        by_column = np.ascontiguousarray(part.T, part.dtype.newbyteorder("<"))
        for place, digest in enumerate(found):
            digest.update(by_column[place].view(np.uint8).data)
    return [digest.hexdigest() for digest in found]


def _digest(array: npt.NDArray[Any]) -> str:
    """Return a digest of an array's values in C order, little-endian."""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return digest_of(plain.reshape(-1).view(np.uint8).data)


# Models, losses and their arguments -----------------------------------------------------------------------------


def _of_part(part: Part, table: ModelSpec, code: UserCode) -> dict[str, Any]:
    found: dict[str, Any] = {f"{part}.model": named(table.model)}
    for group in ("args", "optimizer", "schedule"):
        value = getattr(table, group)
        if isinstance(value, Mapping):
            found |= {f"{part}.{group}.{k}": _plain(v, code) for k, v in value.items()}
        elif value is not None:
            found |= {f"{part}.{group}": named(value)}
            is_code = not isinstance(value, str) or ":" in value
            found |= _of_code(f"{part}.{group}", value, code) if is_code else {}
    if table.inputs != "tensor":
        found[f"{part}.inputs"] = table.inputs
    for key in ("groups", "clip_norm", "clip_value", "ema"):
        if getattr(table, key):
            found[f"{part}.{key}"] = _plain(getattr(table, key), code)
    return found | _of_code(part, table.model, code)


def _of_code(key: str, thing: Any, code: UserCode) -> dict[str, Any]:
    """Return what a model or loss is made of, besides its name."""
    codes = set() if thing is None else set(code_digests(thing, code))
    given = thing if isinstance(thing, nn.Module) else None
    return {
        f"{key}.code": "".join(sorted(each for each in codes if " " not in each)) or None,
        f"{key}.packages": sorted(each for each in codes if " " in each) or None,
        f"{key}.weights": None if given is None else _of_weights(given),
        f"{key}.settings": None if given is None else _of_settings(given),
    }


def _of_weights(module: nn.Module) -> str:
    """Return the parameters and buffers of a module given in code, before anything is trained."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return digest_of("\n".join(f"{name} {_of_tensor(tensor)}" for name, tensor in tensors).encode())


def _of_tensor(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "not yet there"
    try:
        payload = to_payload(tensor.detach(), resizable=True)
    except Exception:  # a dtype or layout that no checkpoint holds: building the model says so
        return f"{tensor.dtype} {tuple(tensor.shape)}"
    return f"{payload} {digest_of(memoryview(payload.data).cast('B'))}"


def _of_settings(module: nn.Module) -> str:
    """Describe the numbers and words that a module given in code and its layers hold, such as Dropout's p."""
    lines = [f"{name} {type(layer).__qualname__} {words(vars(layer))}" for name, layer in module.named_modules()]
    return digest_of("\n".join(lines).encode())


def _plain(value: Any, code: UserCode) -> Any:
    """Return an argument as JSON holds it; a digest of an array, and name and code of anything else."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        pass
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return f"{_described(value)} {_digest(value)}"
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, nn.Module):
        return f"{named(value)} {_of_weights(value)} {_of_settings(value)} {sorted(set(code_digests(value, code)))}"
    return named(value)
