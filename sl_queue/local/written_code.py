"""Code of a script or notebook, written into a module of its own, so that a party file can name it.

What comes from an installed package is named as it is. Of the user's own files copies are made. Of what was defined in
a script or a notebook the source is taken, with what it names there: imports, functions, classes and constants.
"""

import ast
import functools
import inspect
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from sl_queue.compute.source_code import files_of, parsed, source_of
from sl_queue.errors import JobError

_PATH = "from pathlib import Path"
_PLAIN = (type(None), bool, int, float, str, bytes)


@dataclass(slots=True)
class CodeFile:
    """A Python file that grows by what is asked of it. Mutable."""

    folder: Path
    name: str  # of the module
    imports: dict[str, str] = field(default_factory=dict)  # lines by the name that they define
    parts: dict[str, str] = field(default_factory=dict)  # sources by the name that they define
    met: dict[str, Any] = field(default_factory=dict)

    def name_of(self, thing: Any, where: str) -> str:
        """Return `module:name` of a class or function, for which it is in this file if it is nowhere else."""
        target = inspect.unwrap(thing)
        module, qualname = _home(target), getattr(target, "__qualname__", "")
        if module is None:
            raise JobError(
                f"{where} is {qualname or type(thing).__name__}, which no file can name; define it with def or class "
                "at the top of a file or cell"
            )
        if _is_script(module):
            self._take(target, where)
            return f"{self.name}:{qualname}"
        self._copy(module)
        return f"{module.__name__}:{qualname if _leads_to(module, qualname, target) else target.__name__}"

    def bound(self, thing: Any, where: str) -> str:
        """Return as `name_of` does, with a name in this file for what is in another one of the user's.

        Two parties of a process may have modules of the same name; what a file has imported stays its own.
        """
        name = self.name_of(thing, where)
        module, _, path = name.partition(":")
        if module == self.name or not files_of(sys.modules[module], None):
            return name
        top, dot, rest = path.partition(".")
        alias = f"{module.replace('.', '_')}_{top}"
        self.imports[alias] = f"from {module} import {top} as {alias}"
        return f"{self.name}:{alias}{dot}{rest}"

    def add_reader(self, part: str) -> None:
        """Add a function that makes the module written as `part`.json."""
        self.imports |= {"Path": _PATH, "read_module": "from sl_queue.compute.modules.written import read_module"}
        self.parts[part] = (
            f'def {part}():\n    """Make the model as it was in the notebook."""\n'
            f'    return read_module(Path(__file__).with_name("{part}.json"), globals())'
        )

    def add_rows(self) -> None:
        """Add a source that reads rows.npz."""
        self.imports |= {"Path": _PATH, "np": "import numpy as np", "Rows": "from sl_queue import Rows"}
        self.parts["rows"] = (
            'def rows(folder: Path):\n    """Read the rows of this party."""\n'
            '    with np.load(folder / "rows.npz") as arrays:\n'
            '        features = arrays.get("features")\n'
            "        if features is not None and features.dtype.names:\n"
            "            features = {name: features[name] for name in features.dtype.names}\n"
            '        return Rows(arrays["ids"], features, arrays.get("labels"))'
        )

    def write(self) -> None:
        """Write the file, if anything was asked of it."""
        if not self.parts:
            return
        body = "\n\n\n".join(self.parts.values())
        imports = "\n".join(sorted(self.imports.values()))
        constants = "\n".join(f"{name} = {value!r}" for name, value in self.met.items() if isinstance(value, _PLAIN))
        head = "\n\n".join(part for part in (imports, constants) if part)
        (self.folder / f"{self.name}.py").write_text(f"{head}\n\n\n{body}\n" if head else f"{body}\n")

    def _copy(self, module: ModuleType) -> bool:
        """Copy the user's own files behind a module; False for an installed package, which has none."""
        files = files_of(module, None)
        if not files:
            return False
        file = Path(str(module.__file__)).absolute()
        root = file.parents[module.__name__.count(".") + (file.name == "__init__.py")]
        for path in files:
            target = self.folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path != target:
                shutil.copyfile(path, target)
        return True

    def _take(self, thing: Any, where: str) -> None:
        """Take the source of a class or function of a script, and what it names there."""
        name = thing.__qualname__.partition(".")[0]
        if name in self.parts:
            return
        module = sys.modules[thing.__module__]
        top = vars(module)[name]
        source = source_of(top)
        if source is None:
            raise JobError(f"{where}: the source of {name} is not at hand; define it in a file")
        self.parts[name] = ""  # met: it may name itself
        for used in _names_in(source):
            if used in vars(module) and used != name:
                self._take_global(used, vars(module)[used], module, f"{where}: {name}")
        del self.parts[name]  # after what it uses
        self.parts[name] = source.rstrip()

    def _take_global(self, used: str, value: Any, module: ModuleType, where: str) -> None:
        if isinstance(value, ModuleType):
            self.imports[used] = f"import {value.__name__}" + ("" if value.__name__ == used else f" as {used}")
            self._copy(value)
        elif isinstance(value, type | FunctionType) and value.__module__ == module.__name__:
            self._take(value, where)
        elif hasattr(value, "__module__") and hasattr(value, "__qualname__"):
            home = _home(value)
            if home is None:
                raise JobError(f"{where} uses {used!r}, a {type(value).__name__}, which cannot be written down")
            name = value.__qualname__ if _leads_to(home, value.__qualname__, value) else value.__name__
            self.imports[used] = f"from {home.__name__} import {name}" + ("" if name == used else f" as {used}")
            self._copy(home)
        elif _is_plain(value):
            self.met[used] = value
        elif type(value).__module__ not in ("typing", "types"):
            raise JobError(f"{where} uses {used!r}, a {type(value).__name__}, which cannot be written down")


def _home(thing: Any) -> ModuleType | None:
    """Return the module in which a class or function has a name, None if there is none."""
    names = [getattr(thing, "__module__", None), "torch", "torch.nn.functional", "math", "builtins"]
    for module in (sys.modules.get(name or "") for name in names):
        for path in (getattr(thing, "__qualname__", ""), getattr(thing, "__name__", "")):
            if module is not None and path and "<" not in path and _leads_to(module, path, thing):
                return module
    return None


def _is_script(module: ModuleType) -> bool:
    return module.__name__ == "__main__"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _leads_to(module: ModuleType, qualname: str, thing: Any) -> bool:
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found is thing or (found is not None and inspect.unwrap(found) is thing)


def _names_in(source: str) -> list[str]:
    tree = parsed(textwrap.dedent(source))
    return sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})


def of_parameters(make: Any, module: Any) -> Any:
    """Call an optimizer's maker with the parameters of a module."""
    return make(module.parameters())


def given_parameters(make: Any) -> Any:
    """Return what makes an optimizer of a module from what makes one of parameters."""
    return functools.partial(of_parameters, make)
