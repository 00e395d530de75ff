"""A fingerprint of everything that a step depends on and no checkpoint holds: a run is resumed on the same, or not.

Flat JSON values, kept in every checkpoint and beside the final weights; protocol/fingerprints compares two of them and
says what differs. Code counts by its syntax tree, so comments and layout may change; tables count by their values in
canonical order, so rows may stand in any order and files may move.
"""

import ast
import functools
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.objective import LOSSES, loss_name
from sl_queue.config.party import BaseFile
from sl_queue.config.user_code import files_of, module_of, parsed, source_of
from sl_queue.cut.tensors import to_payload
from sl_queue.ports import Table
from sl_queue.protocol.fingerprints import RULES, SEED

_DIGEST_BYTES = 8
_MANY = 256  # columns; more have one digest together, since every checkpoint holds all of them


def fingerprint(
    job: Job, party_file: PartyFile, table: Table | None = None, rules: int = RULES, secret: bytes = b""
) -> dict[str, Any]:
    """Collect what must not change until a checkpoint is resumed, for the same bits to follow; flat, JSON values.

    The number of threads is the calling thread's: sums are split among them. Raises JobError for code that cannot be
    imported.
    """
    found: dict[str, Any] = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    found |= {"device": str(party_file.device), "rules": rules, "secret": _of_secret(job, party_file.party, secret)}
    found["autocast"] = _autocast(str(party_file.device).partition(":")[0])
    found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    found["default_dtype"] = str(torch.get_default_dtype())
    if table is not None:
        found |= _of_table(party_file, table)
    folder = party_file.folder
    if party_file.base is not None:
        found |= _of_part("base", party_file.base, folder)
    if party_file.fuse is not None:
        loss: Any = party_file.fuse.loss
        found |= _of_part("fuse", party_file.fuse, folder)
        found |= {"fuse.loss": named(loss_name(loss)), "fuse.outputs": getattr(party_file.fuse, "outputs", None)}
        if isinstance(loss, Mapping):
            found |= {f"fuse.loss.{key}": value for key, value in loss.items() if key != "name"}
        known = isinstance(loss, Mapping) or (isinstance(loss, str) and loss in LOSSES)
        found |= _of_code("fuse.loss", None if known else loss, folder)
    return found


def named(thing: Any) -> str:
    """Name a model or loss as errors and fingerprints do: module:callable."""
    if isinstance(thing, str):
        return thing
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}:{kind.__qualname__}"


def _autocast(device: str) -> str:
    """The dtype of the calling thread's autocast on a type of device, or "off"."""
    try:
        return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    except RuntimeError:  # no device of torch's: building the model says so
        return "off"


def _of_secret(job: Job, party: str, secret: bytes) -> str:
    """Salted, so that it names the secret to who has it, and tells nothing to anyone else."""
    if not secret:
        return SEED
    salt = blake2b(f"{job.digest} {party}".encode(), digest_size=16).digest()
    return blake2b(secret, digest_size=_DIGEST_BYTES, salt=salt, person=b"sl_queue secret").hexdigest()


# Tables ---------------------------------------------------------------------------------------------------------


def _of_table(party_file: PartyFile, table: Table) -> dict[str, Any]:
    """Ids, features and labels as they are trained on; names of columns where the table has any."""
    features, columns = table.features, table.columns
    each: list[str] | None = None
    if features is not None and columns is not None and features.ndim == 2 and len(columns) <= _MANY:
        each = [_digest(np.ascontiguousarray(features[:, place])) for place in range(len(columns))]
    return {
        "data.rows": f"{table.n_rows} {table.digest}",
        "data.columns": None if columns is None else list(columns),
        "data.features": None if features is None else f"{_described(features)} {_together(features, each)}",
        "data.features.each": each,
        "data.label": None if table.labels is None else getattr(party_file.data, "label", None),
        "data.labels": None if table.labels is None else f"{_described(table.labels)} {_digest(table.labels)}",
    }


def _together(features: npt.NDArray[Any], each: list[str] | None) -> str:
    return _digest(features) if each is None else _hash(",".join(each).encode())


def _described(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"


def _digest(array: npt.NDArray[Any]) -> str:
    """A digest of an array's values in C order, little-endian."""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return _hash(plain.reshape(-1).view(np.uint8).data)


def _hash(body: bytes | memoryview) -> str:
    return blake2b(body, digest_size=_DIGEST_BYTES).hexdigest()


# Models, losses and their arguments -----------------------------------------------------------------------------


def _of_part(part: Literal["base", "fuse"], table: BaseFile, folder: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {f"{part}.model": named(table.model)}
    for group in ("args", "optimizer", "schedule"):
        value = getattr(table, group)
        if isinstance(value, Mapping):
            found |= {f"{part}.{group}.{k}": _plain(v, folder) for k, v in value.items()}
        elif value is not None:
            found |= {f"{part}.{group}": named(value)}
            code = value if not isinstance(value, str) or ":" in value else None
            found |= {} if code is None else _of_code(f"{part}.{group}", code, folder)
    for key in ("groups", "clip_norm", "clip_value", "ema"):
        if getattr(table, key):
            found[f"{part}.{key}"] = _plain(getattr(table, key), folder)
    return found | _of_code(part, table.model, folder)


def _of_code(key: str, thing: Any, folder: Path | None) -> dict[str, Any]:
    """What a model or loss is made of, besides its name."""
    codes = set() if thing is None else set(_codes(thing, folder))
    given = thing if isinstance(thing, nn.Module) else None
    return {
        f"{key}.code": "".join(sorted(code for code in codes if " " not in code)) or None,
        f"{key}.packages": sorted(code for code in codes if " " in code) or None,
        f"{key}.weights": None if given is None else _of_weights(given),
        f"{key}.settings": None if given is None else _of_settings(given),
    }


def _of_weights(module: nn.Module) -> str:
    """The parameters and buffers of a module given in code, before anything is trained."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return _hash("\n".join(f"{name} {_of_tensor(tensor)}" for name, tensor in tensors).encode())


def _of_tensor(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "not yet there"
    try:
        payload = to_payload(tensor.detach())
    except Exception:  # a dtype or layout that no checkpoint holds: building the model says so
        return f"{tensor.dtype} {tuple(tensor.shape)}"
    return f"{payload} {_hash(memoryview(payload.data).cast('B'))}"


def _of_settings(module: nn.Module) -> str:
    """Numbers and words that a module given in code and its layers hold as plain attributes, such as Dropout's p."""
    lines = [f"{name} {type(layer).__qualname__} {_words(vars(layer))}" for name, layer in module.named_modules()]
    return _hash("\n".join(lines).encode())


def _words(values: Mapping[str, Any]) -> str:
    told = {name: value for name, value in values.items() if not name.startswith("_") and _is_plain(value)}
    return repr(sorted(told.items()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any, folder: Path | None) -> Any:
    """An argument as JSON holds it; a digest of an array, and name and code of anything else."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        pass
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return f"{_described(value)} {_digest(value)}"
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, nn.Module):
        return f"{named(value)} {_of_weights(value)} {_of_settings(value)} {sorted(set(_codes(value, folder)))}"
    return named(value)


# Code -----------------------------------------------------------------------------------------------------------


def _codes(thing: Any, folder: Path | None) -> Iterator[str]:
    """Digest the source of a model or loss: of its module and the user's modules that it imports, if that has a file.

    Of what is given in code in a script or notebook, its own source and that of the functions and classes there that it
    names. Of installed packages the version, as "name version".
    """
    if isinstance(thing, str):
        yield from _of_module(module_of(thing, folder), folder)
    elif isinstance(thing, functools.partial):
        yield from _codes(thing.func, folder)
        yield _hash(repr((list(map(named, thing.args)), _words(thing.keywords))).encode())
    elif isinstance(thing, nn.Module):
        for kind in {type(layer) for layer in thing.modules()}:
            yield from _of_object(kind, folder)
    else:
        yield from _of_object(thing if isinstance(thing, type | FunctionType | MethodType) else type(thing), folder)


def _of_object(thing: Any, folder: Path | None) -> Iterator[str]:
    """As _codes, of a class or function."""
    function = inspect.unwrap(thing.__func__ if isinstance(thing, MethodType) else thing)
    module = sys.modules.get(function.__module__)
    if module is None or module.__name__ == "__main__" or not getattr(module, "__file__", None):
        yield _hash("\n".join(_sources(function, set())).encode())
    else:
        yield from _of_module(module, folder)
    if isinstance(function, FunctionType):  # what a factory gave it
        held = [*map(_content, function.__closure__ or ()), *(function.__defaults__ or ())]
        yield _hash(repr([value for value in held if _is_plain(value)]).encode())


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty until the function around it goes on
        return None


def _of_module(module: ModuleType, folder: Path | None) -> Iterator[str]:
    """A digest of the user's files behind a module; the version of the package, if it is an installed one."""
    files = files_of(module, folder)
    package = module.__name__.partition(".")[0]
    if files:
        yield _hash("\n".join(_syntax(path) for path in files).encode())
    elif package not in ("torch", "sl_queue"):  # torch's version is told for everyone
        with suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"


def _sources(thing: Any, seen: set[str]) -> Iterator[str]:
    """The syntax of a class or function of a script, and of the script's others that it names."""
    seen.add(thing.__qualname__)
    source = source_of(thing)
    try:
        tree = None if source is None else parsed(source)
    except SyntaxError:  # a lambda in the middle of a call
        tree = None
    if tree is None:
        yield from _bytecode(thing)
        return
    yield f"{thing.__qualname__} {_dump(tree)}"
    module = sys.modules.get(thing.__module__)
    around = {} if module is None else vars(module)
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        other = around.get(name)
        if not isinstance(other, type | FunctionType) or other.__module__ != thing.__module__:
            continue
        if other.__qualname__ not in seen:
            yield from _sources(other, seen)


def _bytecode(thing: Any) -> Iterator[str]:
    """Without a source, what Python made of it; another version of Python would make something else."""
    functions = (
        [thing] if isinstance(thing, FunctionType) else [f for f in vars(thing).values() if inspect.isfunction(f)]
    )
    for function in functions:
        yield f"{sys.version_info[:2]} {function.__qualname__} {_instructions(function.__code__)}"


def _instructions(code: CodeType) -> str:
    constants = [_instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _syntax(path: Path) -> str:
    """A file's syntax without comments, layout and docstrings; its bytes if it is not Python."""
    body = path.read_bytes()
    try:
        return f"{path.name} {_dump(parsed(body))}"
    except (SyntaxError, ValueError):
        return f"{path.name} {_hash(body)}"


def _dump(node: Any) -> str:
    """As ast.dump, but the same in every version of Python: without docstrings and what is empty."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    told = (f"{name}={_dump(value)}" for name, value in fields.items() if value not in (None, []) and name != "kind")
    return f"{type(node).__name__}({','.join(told)})"
