"""Digests of the code that a model or loss is made of, by its syntax tree: comments and layout may change."""

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from sl_queue.compute.source_code import files_of, parsed, source_of
from sl_queue.ports import UserCode
from sl_queue.protocol.digests import digest_of


def named(thing: Any) -> str:
    """Name a model or loss as errors and fingerprints do: module:callable."""
    if isinstance(thing, str):
        return thing
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}:{kind.__qualname__}"


def words(values: Mapping[str, Any]) -> str:
    """Write the plain values among these, by name."""
    told = {name: value for name, value in values.items() if not name.startswith("_") and is_plain(value)}
    return repr(sorted(told.items()))


def is_plain(value: Any) -> bool:
    """Return True for numbers, text, None, and sequences of those."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def code_digests(thing: Any, code: UserCode) -> Iterator[str]:
    """Digest the source of a model or loss: of its module and the user's modules that it imports, if that has a file.

    Of what is given in code in a script or notebook, its own source and that of the functions and classes there that it
    names. Of installed packages the version, as "name version".
    """
    if isinstance(thing, str):
        yield from _of_module(code.module(thing), code.folder)
    elif isinstance(thing, functools.partial):
        yield from code_digests(thing.func, code)
        yield digest_of(repr((list(map(named, thing.args)), words(thing.keywords))).encode())
    elif isinstance(thing, nn.Module):
        for kind in {type(layer) for layer in thing.modules()}:
            yield from _of_object(kind, code.folder)
    else:
        names_itself = isinstance(thing, type | FunctionType | MethodType)
        yield from _of_object(thing if names_itself else type(thing), code.folder)


def _of_object(thing: Any, folder: Path | None) -> Iterator[str]:
    """Digest as `_codes`, but a class or function."""
    function = inspect.unwrap(thing.__func__ if isinstance(thing, MethodType) else thing)
    module = sys.modules.get(function.__module__)
    if module is None or module.__name__ == "__main__" or not getattr(module, "__file__", None):
        yield digest_of("\n".join(_sources(function, set())).encode())
    else:
        yield from _of_module(module, folder)
    if isinstance(function, FunctionType):  # what a factory gave it
        held = [*map(_content, function.__closure__ or ()), *(function.__defaults__ or ())]
        yield digest_of(repr([value for value in held if is_plain(value)]).encode())


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty until the function around it goes on
        return None


def _of_module(module: ModuleType, folder: Path | None) -> Iterator[str]:
    """Return a digest of the user's files behind a module; the version of the package, if it is an installed one."""
    files = files_of(module, folder)
    package = module.__name__.partition(".")[0]
    if files:
        yield digest_of("\n".join(_syntax(path) for path in files).encode())
    elif package not in ("torch", "sl_queue"):  # torch's version is told for everyone
        with suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"


def _sources(thing: Any, seen: set[str]) -> Iterator[str]:
    """Return the syntax of a class or function of a script, and of the script's others that it names."""
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
    """Digest what Python made of code without a source; another version of Python would make something else."""
    functions = (
        [thing] if isinstance(thing, FunctionType) else [f for f in vars(thing).values() if inspect.isfunction(f)]
    )
    for function in functions:
        yield f"{sys.version_info[:2]} {function.__qualname__} {_instructions(function.__code__)}"


def _instructions(code: CodeType) -> str:
    constants = [_instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _syntax(path: Path) -> str:
    """Return a file's syntax without comments, layout and docstrings; its bytes if it is not Python."""
    body = path.read_bytes()
    try:
        return f"{path.name} {_dump(parsed(body))}"
    except (SyntaxError, ValueError):
        return f"{path.name} {digest_of(body)}"


def _dump(node: Any) -> str:
    """Dump as ast.dump, but the same in every version of Python: without docstrings and what is empty."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    told = (f"{name}={_dump(value)}" for name, value in fields.items() if value not in (None, []) and name != "kind")
    return f"{type(node).__name__}({','.join(told)})"
