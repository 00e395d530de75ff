"""Source of the user's code, read and parsed: which files decide what a module does, and the syntax of each.

Importing it is another matter: config/user_code.py.
"""

import ast
import inspect
import sysconfig
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_TRIES = 20
_OURS = Path(__file__).parents[1]  # sl_queue

_lock = threading.RLock()  # around CPython's parser, which is the process's: see `parsed`


def parsed(source: str | bytes) -> ast.Module:
    """Parse Python. Thread-safe, which ast.parse is not: CPython 3.11 mixes up two threads that build trees at once.

    Raises SyntaxError, ValueError.
    """
    with _lock:
        for _ in range(_TRIES):
            try:
                return ast.parse(source)
            except SystemError:  # a thread that is none of ours interfered
                continue
        return ast.parse(source)


def source_of(thing: Any) -> str | None:
    """Return the source of a class or function, None if there is none; parses as `parsed` does."""
    with _lock:
        for _ in range(_TRIES):
            try:
                return textwrap.dedent(inspect.getsource(thing))
            except SystemError:
                continue
            except (OSError, TypeError, SyntaxError):
                return None
    return None


def files_of(module: ModuleType, folder: Path | None) -> list[Path]:
    """List the Python files that decide what a module does: its own and what it imports from the same folder, sorted.

    Imports are read from the text, so that modules which others imported do not count. Installed packages, the standard
    library and sl_queue are left out; a module of one of those has no files.
    """
    file = getattr(module, "__file__", None)
    if file is None or not _is_own(Path(file).absolute(), folder):
        return []
    root = _root(module, Path(file).absolute())
    found: dict[Path, str] = {}  # each file with the name of its module
    pending = [(module.__name__, Path(file).absolute()), *_parents(module.__name__, root)]
    while pending:
        name, path = pending.pop()
        if path in found or path.suffix != ".py":
            continue
        found[path] = name
        for imported_name in _imports(path, name):
            pending += [*_located(imported_name, root), *_parents(imported_name, root)]
    return sorted(found)


def _is_own(path: Path, folder: Path | None) -> bool:
    """Return True for a file of the user's: below `folder`, or nowhere that packages are installed to."""
    if path.is_relative_to(_OURS):
        return False
    below = folder is not None and path.is_relative_to(folder.absolute())
    parts = path.relative_to(folder.absolute()).parts if folder is not None and below else path.parts
    if {"site-packages", "dist-packages"} & set(parts):
        return False
    return below or not any(path.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def _root(module: ModuleType, file: Path) -> Path:
    """Return the folder from which the module's full name leads to its file."""
    depth = module.__name__.count(".") + (file.name == "__init__.py")
    return file.parents[depth]


def _parents(name: str, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the packages around a module: importing it runs them."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield from _located(".".join(parts[:count]), root)


def _located(name: str, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the file of a module below `root`, if it is one of the user's."""
    place = root.joinpath(*name.split("."))
    for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if path.is_file() and _is_own(path, root):
            yield name, path
            return


def _imports(path: Path, name: str) -> Iterator[str]:
    """Yield the full names of all modules that a file may import, anywhere in it."""
    try:
        tree = parsed(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*around, *([node.module] if node.module else [])])
            yield from filter(None, [origin, *(f"{origin}.{alias.name}".lstrip(".") for alias in node.names)])
