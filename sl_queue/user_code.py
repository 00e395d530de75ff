"""Importing what a party file names as `module:callable`.

Parties of one process may each have a module of the same name in their own folder, so a module is known here by its
folder and its name.
"""

import importlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sl_queue.declared import nearest
from sl_queue.errors import JobError

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_lock = threading.RLock()  # guards what follows, sys.path and sys.modules; re-entered by a module that imports another
_imported: dict[tuple[Path | None, str], ModuleType] = {}
_folders: set[Path] = set()


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


def _place(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or f"module {module.__name__!r}"
