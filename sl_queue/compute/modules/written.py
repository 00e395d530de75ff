"""A module given in code, written down so that another process can make it: classes by name, attributes as JSON.

Not a pickle: reading it runs nothing but the classes it names, and only what JSON holds exactly is written. What cannot
be is refused by its path. Numbers of parameters and buffers stand in a safetensors file beside it.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.compute.modules.remembered import HOOKS
from sl_queue.compute.modules.state import LENT, OWN
from sl_queue.errors import JobError

NameOf = Callable[[Any, str], str]  # (class or function, where it stands) -> module:name
_SCALARS = (type(None), bool, int, float, str)
_OF_RNN = {"_flat_weights", "_flat_weight_refs"}  # made again by _init_flat_weights


def write_module(module: nn.Module, path: Path, name_of: NameOf, what: str) -> None:
    """Write `path` and the tensors beside it. Raises JobError for what cannot be written."""
    writer = _Writer(name_of, what)
    tree = writer.tree(module, "")
    safetensors.torch.save_file(writer.tensors, path.with_suffix(".safetensors"))
    path.write_text(json.dumps(tree, indent=1))


def read_module(path: Path | str, names: Mapping[str, Any] | None = None) -> nn.Module:
    """Read the module that `write_module` wrote, in the mode in which it was.

    `names` are those of the module that reads it, `globals()`: its own classes, and modules that it has imported, which
    may be others of the same name elsewhere in this process.
    """
    path = Path(path)
    tensors = safetensors.torch.load_file(path.with_suffix(".safetensors"))
    return _Reader(tensors, names or {}).module(json.loads(path.read_text()), "")


@dataclass(slots=True)
class _Writer:
    """One pass over a module. Mutable: it knows what it has met."""

    name_of: NameOf
    what: str  # begins an error
    tensors: dict[str, Tensor] = field(default_factory=dict)
    met: dict[int, str] = field(default_factory=dict)  # modules, parameters and buffers by id: their first path

    def tree(self, module: nn.Module, path: str) -> dict[str, Any]:
        if id(module) in self.met:
            return {"same": self.met[id(module)]}
        self.met[id(module)] = path
        kind = type(module)
        hooks = sorted(name for name in HOOKS if vars(module).get(name))
        if hooks or isinstance(module, torch.jit.ScriptModule):
            self._refuse(path, f"a {kind.__name__} with hooks" if hooks else "a scripted module")
        own = {name: value for name, value in vars(module).items() if name not in OWN and name != LENT}
        if isinstance(module, nn.RNNBase):
            own = {name: value for name, value in own.items() if name not in _OF_RNN}
        return {
            "class": self.name_of(kind, self._at(path)),
            "training": module.training,
            "attributes": {n: self.value(value, f"{path}.{n}".strip(".")) for n, value in own.items()},
            "parameters": {n: self.tensor(p, f"{path}.{n}".strip(".")) for n, p in module._parameters.items()},
            "buffers": {
                n: self.tensor(b, f"{path}.{n}".strip("."), n not in module._non_persistent_buffers_set)
                for n, b in module._buffers.items()
            },
            "modules": {
                n: None if m is None else self.tree(m, f"{path}.{n}".strip(".")) for n, m in module._modules.items()
            },
        }

    def tensor(self, tensor: Tensor | None, path: str, persistent: bool = True) -> Any:
        if tensor is None:
            return {"persistent": persistent}
        if id(tensor) in self.met:
            return {"same": self.met[id(tensor)], "persistent": persistent}
        if is_lazy(tensor) or type(tensor) not in (Tensor, nn.Parameter):
            self._refuse(path, "a lazy parameter" if is_lazy(tensor) else f"a {type(tensor).__name__}")
        self.met[id(tensor)] = path
        self.tensors[path] = tensor.detach().cpu().clone().contiguous()
        return {"tensor": path, "learns": tensor.requires_grad, "persistent": persistent}

    def value(self, value: Any, path: str) -> Any:
        """Return a plain attribute as JSON."""
        if type(value) in _SCALARS:
            return value
        if type(value) in (list, tuple, torch.Size, set, frozenset):
            items = [self.value(item, f"{path}[{i}]") for i, item in enumerate(value)]
            return {type(value).__name__: items}
        if type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
            return {type(value).__name__: [[key, self.value(v, f"{path}[{key!r}]")] for key, v in value.items()]}
        if isinstance(value, torch.dtype | torch.device):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if isinstance(value, nn.Module) and id(value) in self.met:
            return {"same": self.met[id(value)]}
        if hasattr(value, "__qualname__") and callable(value):
            return {"code": self.name_of(value, self._at(path))}
        return self._refuse(path, f"a {type(value).__name__}")

    def _at(self, path: str) -> str:
        return f"{self.what}: {path!r}" if path else self.what

    def _refuse(self, path: str, kind: str) -> Any:
        raise JobError(
            f"{self._at(path)} is {kind}, which cannot be written down; give a function that makes the model"
        )


@dataclass(slots=True)
class _Reader:
    """One pass over what was written. Mutable: it knows what it has made."""

    tensors: Mapping[str, Tensor]
    names: Mapping[str, Any]
    made: dict[str, Any] = field(default_factory=dict)  # by path

    def module(self, tree: Mapping[str, Any], path: str) -> nn.Module:
        if "same" in tree:
            found: nn.Module = self.made[tree["same"]]
            return found
        kind = _thing(tree["class"], self.names)
        module: nn.Module = kind.__new__(kind)
        nn.Module.__init__(module)
        self.made[path] = module
        for name, about in tree["parameters"].items():
            module.register_parameter(name, self._parameter(about))
        for name, about in tree["buffers"].items():
            module.register_buffer(name, self._tensor(about), persistent=about["persistent"])
        for name, child in tree["modules"].items():
            module.add_module(name, None if child is None else self.module(child, f"{path}.{name}".strip(".")))
        vars(module).update({name: self._value(value) for name, value in tree["attributes"].items()})
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        module.training = tree["training"]
        return module

    def _parameter(self, about: Mapping[str, Any]) -> nn.Parameter | None:
        if "same" in about:
            found: nn.Parameter = self.made[about["same"]]
            return found
        if "tensor" not in about:
            return None
        self.made[about["tensor"]] = nn.Parameter(self.tensors[about["tensor"]].clone(), about["learns"])
        return self._parameter({"same": about["tensor"]})

    def _tensor(self, about: Mapping[str, Any]) -> Tensor | None:
        if "tensor" in about:
            self.made[about["tensor"]] = self.tensors[about["tensor"]].clone()
        where = about.get("tensor", about.get("same"))
        return None if where is None else self.made[where]

    def _value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        match kind:
            case "dict" | "OrderedDict":
                pairs = [(key, self._value(inner)) for key, inner in content]
                return dict(pairs) if kind == "dict" else OrderedDict(pairs)
            case "dtype":
                return getattr(torch, content)
            case "device":
                return torch.device(content)
            case "same":
                return self.made[content]
            case "code":
                return _thing(content, self.names)
        made = {"list": list, "tuple": tuple, "Size": torch.Size, "set": set, "frozenset": frozenset}[kind]
        return made([self._value(item) for item in content])


def _thing(name: str, names: Mapping[str, Any]) -> Any:
    """Find a class or function by `module:name`."""
    module, _, path = name.partition(":")
    first, *rest = module.split(".")
    if module == names.get("__name__"):
        found: Any = names[path.partition(".")[0]]
        parts = path.split(".")[1:]
    elif first in names:
        found, parts = names[first], [*rest, *path.split(".")]
    else:
        found, parts = import_module(module), path.split(".")
    for part in parts:
        found = getattr(found, part)
    return found
