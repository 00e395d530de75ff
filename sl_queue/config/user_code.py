"""Importing what a party file names as `module:callable`.

Parties of one process may each have a module of the same name in their own folder, so a module is known here by its
folder and its name.
"""

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sl_queue.config.schema import nearest
from sl_queue.errors import JobError

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_TRIES = 20

_lock = threading.RLock()  # guards what follows, sys.path and sys.modules; re-entered by a module that imports another
_imported: dict[tuple[Path | None, str], ModuleType] = {}
_folders: set[Path] = set()


def module_of(name: str, folder: Path | None) -> ModuleType:
    """Return the module that `module:callable` names, imported. Raises JobError."""
    return _module(name, name.partition(":")[0], folder if folder is None else folder.absolute())


def imported(name: str, folder: Path | None) -> Any:
    """The callable that `module:callable` names, looked for in `folder` first. Thread-safe. Raises JobError."""
    if not NAME.fullmatch(name):
        raise JobError(f"{name!r} is not of the form module:callable")
    module_name, _, path = name.partition(":")
    module = _module(name, module_name, folder if folder is None else folder.absolute())
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            advice = nearest(part, [known for known in dir(found) if not known.startswith("_")]) or "check the name"
            raise JobError(f"{name!r}: there is no {part!r} in {_place(module)}; {advice.strip()}")
        found = getattr(found, part)
    if not callable(found):
        raise JobError(f"{name!r} is of type {type(found).__name__}; it must be callable")
    return found


def _module(name: str, module_name: str, folder: Path | None) -> ModuleType:
    with _lock:
        module = _imported.get((folder, module_name))
        if module is None:
            module = _imported[folder, module_name] = _import(name, module_name, folder)
        return module


def _import(name: str, module_name: str, folder: Path | None) -> ModuleType:
    top = module_name.partition(".")[0]
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        with _first_on_path(folder):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise JobError(f"{name!r}: importing {module_name!r}{_from(folder)} fails: {error}") from error
        where = "" if folder is None else f"in {folder}, nor "
        raise JobError(f"{name!r}: there is no module {error.name!r} {where}among the installed packages") from None
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}"
        raise JobError(f"{name!r}: importing {module_name!r}{_from(folder)} fails: {told}") from error
    if folder is not None and _would_import(folder, top) and not _is_from(folder, top, sys.modules[top]):
        known = _place(sys.modules[top])
        raise JobError(f"{name!r}: Python already knows another module {top!r}, {known}; rename the one in {folder}")
    return module


def _from(folder: Path | None) -> str:
    return "" if folder is None else f" from {folder}"


@contextmanager
def _first_on_path(folder: Path | None) -> Iterator[None]:
    """Let imports look into `folder` first; afterwards last, for what its modules import later."""
    if folder is None:
        yield
        return
    _set_aside_others(folder)
    _folders.add(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _set_aside_others(folder: Path) -> None:
    """Forget modules of other parties' folders whose names this folder has too; who uses them keeps them."""
    others = _folders - {folder}
    if not others:
        return  # nearly always; the search below takes a tenth of a second
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if (_would_import(folder, top) or (folder / top).is_dir()) and any(
            _is_from(other, top, module) for other in others
        ):
            del sys.modules[name]


def _would_import(folder: Path, top: str) -> bool:
    return (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()


def _is_from(folder: Path, top: str, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", ()))  # a package without __init__.py has no file
    paths = [Path(place).absolute() for place in places]
    return any(path == folder / f"{top}.py" or path.is_relative_to(folder / top) for path in paths)


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
    if path.is_relative_to(Path(__file__).parents[1]):
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


def _place(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or f"module {module.__name__!r}"
