"""Importing of what a party file names as `module:callable`.

Parties of one process may each have a module of the same name in their own folder, so a module is known here by its
folder and its name.
"""

import importlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sl_queue.errors import JobError
from sl_queue.protocol.text import nearest

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_lock = threading.RLock()  # around sys.path and sys.modules, the process's; re-entered by a module that imports another


@dataclass(frozen=True, slots=True)
class Importer:
    """Modules of the parties of one process, each imported once for its folder. Thread-safe."""

    _modules: dict[tuple[Path | None, str], ModuleType] = field(default_factory=dict, repr=False)

    def within(self, folder: Path | None) -> "Code":
        """Return the code of a party, which lies in `folder`; None: in installed packages only."""
        return Code(self, None if folder is None else folder.absolute())

    def module(self, name: str, folder: Path | None) -> ModuleType:
        """Import the module that `module:callable` names. Raises JobError."""
        module_name = name.partition(":")[0]
        with _lock:
            module = self._modules.get((folder, module_name))
            if module is None:
                module = self._modules[folder, module_name] = _import(name, module_name, folder)
            return module


@dataclass(frozen=True, slots=True)
class Code:
    """ports.UserCode over an importer."""

    importer: Importer
    folder: Path | None

    def load(self, name: str) -> Any:
        """Import the callable that `module:callable` names. Raises JobError."""
        if not NAME.fullmatch(name):
            raise JobError(f"{name!r} is not of the form module:callable")
        module = self.module(name)
        found: Any = module
        for part in name.partition(":")[2].split("."):
            if not hasattr(found, part):
                advice = nearest(part, [known for known in dir(found) if not known.startswith("_")]) or "check the name"
                raise JobError(f"{name!r}: there is no {part!r} in {_place(module)}; {advice.strip()}")
            found = getattr(found, part)
        if not callable(found):
            raise JobError(f"{name!r} is of type {type(found).__name__}; it must be callable")
        return found

    def module(self, name: str) -> ModuleType:
        """Import the module that `module:callable` names. Raises JobError."""
        return self.importer.module(name, self.folder)


class _Folder(str):
    """A party's folder as an entry of sys.path, so that every importer of this process knows it as one."""

    __slots__ = ()


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
    entry = _Folder(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        if folder not in _folders():
            sys.path.append(entry)


def _folders() -> set[Path]:
    return {Path(entry) for entry in sys.path if isinstance(entry, _Folder)}


def _set_aside_others(folder: Path) -> None:
    """Forget modules of other parties' folders whose names this folder has too; who uses them keeps them."""
    others = _folders() - {folder}
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
    try:
        places = [file] if file else list(getattr(module, "__path__", ()))  # a package without __init__.py has no file
    except KeyError:  # whose parent has been set aside before it
        return False
    paths = [Path(place).absolute() for place in places]
    return any(path == folder / f"{top}.py" or path.is_relative_to(folder / top) for path in paths)


def _place(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or f"module {module.__name__!r}"
