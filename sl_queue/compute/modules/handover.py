"""A model given in code, handed over to a run: the very module trains, and afterwards it is what it was.

So hooks that refer to it, layers that share it, scripts and compilers find the module that they know. Where several
stages are built of one module, as `sl-queue check` does, each trains a copy.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor, nn

from sl_queue.compute.modules.remembered import HOOKS
from sl_queue.compute.modules.snapshots import Snapshot
from sl_queue.compute.modules.state import LENT, OWN
from sl_queue.errors import ComputeError, JobError

T = TypeVar("T")
_DEPTH = 4  # of what a loss holds


class Take(Protocol):
    """Ways in which a stage obtains a model or a loss that a party file brings."""

    def __call__(self, party: str, part: str, thing: T, made: bool) -> T:
        """Return the object to train. `made`: a callable of the file has just made it."""


def itself(party: str, part: str, thing: T, made: bool) -> T:
    """Take the object itself: nobody else in this process has a use for it."""
    return thing


class Copies:
    """Take copies, which refer to each other as their originals do. Mutable: it knows what it has copied."""

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}

    def __call__(self, party: str, part: str, thing: T, made: bool) -> T:
        """Return a copy of what was given in code. Raises JobError if it cannot be copied."""
        if made:
            return thing
        try:
            return copied(thing, self._memo)
        except Exception as error:
            if not modules_in(thing):
                return thing
            raise JobError(
                f"party {party!r}: [{part}] {_kind(thing)} cannot be copied ({type(error).__name__}: {error}); "
                "name a callable that makes it"
            ) from error


def copied(thing: T, memo: dict[int, Any] | None = None, anyhow: bool = False) -> T:
    """Return a deep copy, with the hooks on parameters too; functions that refer to the original refer to the copy.

    Tensors that were computed are copied without their graph. `anyhow`: what cannot be copied, a lock, is shared.
    """
    memo = {} if memo is None else memo
    modules = [each for root in modules_in(thing) for each in root.modules()]
    for each in modules:
        for value in vars(each).values():
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
                memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    if anyhow:
        memo |= {id(value): value for each in modules for value in _uncopyable(each, memo)}
    found = copy.deepcopy(thing, memo)
    for parameter in (p for root in modules_in(found) for p in root.parameters() if not p.is_leaf):
        parameter.detach_().requires_grad_()  # a script is copied by operations that autograd follows
    for each in modules:
        _rebind_functions(memo.get(id(each), each), each, memo)
        for parameter in each.parameters(recurse=False):
            twin = memo.get(id(parameter))
            if isinstance(twin, Tensor) and twin is not parameter:
                _copy_hooks(parameter, twin, memo)
    return found


def _uncopyable(module: nn.Module, memo: Mapping[int, Any]) -> Iterator[Any]:
    """Return the plain attributes of a module that have no copy."""
    for name, value in vars(module).items():
        if name not in OWN and not isinstance(value, nn.Module):
            try:
                copy.deepcopy(value, dict(memo) | {id(each): each for each in module.modules()})
            except Exception:
                yield value


def _rebind_functions(twin: nn.Module, module: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let hooks and other functions of a copy refer to it: deepcopy leaves functions as they are."""
    if twin is module:
        return
    for table in (vars(twin), *(vars(twin)[name] for name in HOOKS & vars(twin).keys())):
        if isinstance(table, dict):
            for name, value in list(table.items()):
                if isinstance(value, FunctionType):
                    table[name] = _rebound(value, memo)


def _rebound(function: FunctionType, memo: Mapping[int, Any]) -> FunctionType:
    """Return the function with copies of modules and tensors in the place of what it refers to."""

    def twin(value: Any) -> Any:
        return memo.get(id(value), value) if isinstance(value, nn.Module | Tensor) else value

    cells = function.__closure__ or ()
    closure = tuple(CellType(twin(cell.cell_contents)) if _is_full(cell) else cell for cell in cells)
    there = function.__globals__
    others = {n: twin(there[n]) for n in function.__code__.co_names if n in there and twin(there[n]) is not there[n]}
    moved = any(_is_full(c) and new.cell_contents is not c.cell_contents for c, new in zip(cells, closure, strict=True))
    if not moved and not others:
        return function
    names = {**there, **others} if others else there
    found = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def _copy_hooks(parameter: Tensor, twin: Tensor, memo: Mapping[int, Any]) -> None:
    def bound(hook: Any) -> Any:
        return _rebound(hook, memo) if isinstance(hook, FunctionType) else hook

    if not twin._backward_hooks:
        for hook in (parameter._backward_hooks or {}).values():
            twin.register_hook(bound(hook))  # type: ignore[no-untyped-call]
    if not getattr(twin, "_post_accumulate_grad_hooks", None):
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            twin.register_post_accumulate_grad_hook(bound(hook))  # type: ignore[no-untyped-call]


def modules_in(thing: Any, depth: int = _DEPTH) -> list[nn.Module]:
    """Return the modules that a model or a loss is, or holds: as a method's owner, an argument, an attribute."""
    if isinstance(thing, nn.Module):
        return [thing]
    if depth == 0 or isinstance(thing, type | Tensor | str | bytes):
        return []
    inside: list[Any] = []
    if isinstance(thing, MethodType):
        inside = [thing.__self__]
    elif isinstance(thing, partial):
        inside = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, FunctionType):
        inside = [cell.cell_contents for cell in thing.__closure__ or () if _is_full(cell)]
    elif isinstance(thing, list | tuple | dict):
        inside = list(thing.values() if isinstance(thing, dict) else thing)[:1000]
    elif callable(thing):
        inside = list(getattr(thing, "__dict__", {}).values())
    found: dict[int, nn.Module] = {}
    for each in inside:
        found |= {id(module): module for module in modules_in(each, depth - 1)}
    return list(found.values())


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


class Holder(nn.Module):
    """Module view of a loss: the modules in it are registered, everything else is a plain attribute."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        vars(self)["given"] = thing.__self__ if isinstance(thing, MethodType) else thing


class Loan:
    """Models and losses lent to the parties of one process; all are what they were when the context is left.

    Mutable: it remembers what it has lent, and to whom. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lent: dict[tuple[str, str], Any] = {}
        self._snapshots: dict[int, Snapshot] = {}
        self._owners: dict[int, tuple[str, str]] = {}  # by the id of a parameter, a buffer or a module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def __call__(self, party: str, part: str, thing: T, made: bool) -> T:
        """Lend it. Raises JobError if another model has a share of it, or another run is training it."""
        with self._lock:
            for module in modules_in(thing):
                self._claim(party, part, module)
                if id(module) not in self._snapshots:
                    self._lend(party, part, module)
            if not isinstance(thing, nn.Module):
                self._snapshots[id(thing)] = Snapshot.of(Holder(thing))
            self._lent[party, part] = thing
        return thing

    def _lend(self, party: str, part: str, module: nn.Module) -> None:
        if LENT in vars(module):
            raise JobError(
                f"party {party!r}: another run of this process is training the module given as [{part}]; "
                "wait for it, or give each run its own (copy.deepcopy)"
            )
        self._snapshots[id(module)] = Snapshot.of(module)
        vars(module)[LENT] = True
        for parameter in module.parameters():
            parameter.grad = None

    def give_back(self) -> None:
        """Let everything lent be what it was. Idempotent."""
        with self._lock:
            for snapshot in reversed(self._snapshots.values()):
                snapshot.put_back()
                vars(snapshot.module).pop(LENT, None)
            self._snapshots.clear()
            self._owners.clear()
            self._lent.clear()

    def trained(self, party: str, part: str, make: Callable[[], nn.Module] | None) -> nn.Module | None:
        """Return the trained module, apart from the one that will be given back; None if none was trained here.

        `make` is the callable of the party file, if it has one: what it newly makes is nobody's but ours.
        Raises ComputeError if the module cannot be copied.
        """
        module = self._lent.get((party, part))
        if not isinstance(module, nn.Module):
            return None
        if make is not None and not _is_kept(module, make):
            self._snapshots.pop(id(module), None)
            vars(module).pop(LENT, None)
            return module
        try:
            found = copied(module, anyhow=True)
        except Exception as error:
            raise ComputeError(
                f"party {party!r}: the trained {part} model, a {_kind(module)}, cannot be copied "
                f"({type(error).__name__}: {error}); run_local(..., out=FOLDER) leaves its weights in "
                f"FOLDER/{party}/final/{part}.safetensors, or give a callable that makes the model"
            ) from error
        for each in found.modules():
            vars(each).pop(LENT, None)
        return found

    def _claim(self, party: str, part: str, module: nn.Module) -> None:
        me = (party, part)
        for name, each in _holdings(module):
            owner = self._owners.setdefault(id(each), me)
            if owner != me and not (part == "loss" and owner[0] == party):
                raise JobError(
                    f"party {party!r}: [{part}] shares {name} with [{owner[1]}] of party {owner[0]!r}; "
                    "give each model its own (copy.deepcopy), or a callable that makes it"
                )


def _holdings(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, each in module.named_modules():
        yield (f"the submodule {name!r}" if name else "its module"), each
    for name, parameter in module.named_parameters():
        yield f"the parameter {name!r}", parameter
    for name, buffer in module.named_buffers():
        yield f"the buffer {name!r}", buffer


def _is_kept(module: nn.Module, make: Callable[[], nn.Module]) -> bool:
    """Return True if a callable gives the same module each time, which is then the caller's to keep."""
    try:
        return make() is module
    except Exception:
        return False


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}:{type(thing).__qualname__}"
