"""Optimizers: any of torch.optim by its name in lower case, with groups of parameters, or one that is made in code."""

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sl_queue.compute.eager import keep_compiler_out
from sl_queue.errors import JobError
from sl_queue.ports import UserCode
from sl_queue.protocol.text import counted, nearest

_NEED_A_CLOSURE = {"lbfgs"}
_WHY_NOT = "evaluates the loss more than once a step, which no party can: none has the whole model; use another"


def optimizer_names() -> dict[str, type[Optimizer]]:
    """Return the optimizers that a party file may name."""
    found = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer)]
    return {c.__name__.lower(): c for c in found if c is not Optimizer and c.__name__.lower() not in _NEED_A_CLOSURE}


def build_optimizer(
    module: nn.Module, settings: Any, key: str, groups: Sequence[Mapping[str, Any]], code: UserCode
) -> Optimizer | None:
    """Build the optimizer that a party file describes at `key`, or that its callable makes, found by `code`.

    None for a module without parameters. Raises JobError.
    """
    if not any(True for _ in module.parameters()):
        return None
    keep_compiler_out()
    if isinstance(settings, Mapping) or not settings:
        return _of_torch(module, dict(settings or {}), groups, key)
    return _made(module, settings, key, code)


# By name --------------------------------------------------------------------------------------------------------


def _of_torch(module: nn.Module, settings: dict[str, Any], groups: Sequence[Mapping[str, Any]], key: str) -> Optimizer:
    named = dict(settings)
    name, no_decay = named.pop("name", None), _patterns(named.pop("no_decay", []))
    known = optimizer_names()
    if name in _NEED_A_CLOSURE:
        raise JobError(f"{key}: {name!r} {_WHY_NOT}")
    if name is not None and name not in known:
        raise JobError(f"{key}: {name!r} is unknown; allowed are {', '.join(sorted(known))}")
    if name is None:
        raise JobError(f'{key} is missing, and the model has parameters; for instance {{ name = "adam", lr = 1e-3 }}')
    where = key.removesuffix(" optimizer")
    optimizer = _built(known[name], _groups(module, groups, no_decay, where), named, f"{key} = {settings}")
    _require_options(optimizer, groups, bool(no_decay), where)
    for number, group in enumerate(groups):  # of a group torch takes any number
        options = {k: v for k, v in group.items() if k != "match"}
        _built(known[name], [torch.zeros(1, 1)], {**named, **options}, f"{where} groups[{number}] = {options}")
    return optimizer


def _built(kind: type[Optimizer], parts: list[Any], options: Mapping[str, Any], what: str) -> Optimizer:
    make: Any = kind
    declared = inspect.signature(kind).parameters
    for name, value in options.items():
        usual = declared[name].default if name in declared else None
        if any(isinstance(x, bool) for x in _each(value)) and all(_is_number(x) for x in _each(usual)):
            raise JobError(f"{what}: {name} = {str(value).lower()}; torch.optim.{kind.__name__} takes numbers there")
    try:
        found: Optimizer = make(parts, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"{what} is refused by torch.optim.{kind.__name__}: {error}") from None
    return found


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _groups(module: nn.Module, groups: Sequence[Mapping[str, Any]], no_decay: Sequence[str], where: str) -> list[Any]:
    """Return the module's parameters as torch's optimizers take them: in groups, or plainly where there are none.

    The first group whose pattern a parameter's name matches has it; what `no_decay` matches has a weight decay of 0,
    wherever it is.
    """
    if not groups and not no_decay:
        return list(module.parameters())
    split: dict[tuple[int, bool], list[nn.Parameter]] = {}
    met: set[str] = set()
    for name, parameter in module.named_parameters():
        number = -1
        for position, group in enumerate(groups):
            matching = [pattern for pattern in _patterns(group["match"]) if fnmatchcase(name, pattern)]
            if matching:
                number = position
                met.update(matching)
                break
        bare = [pattern for pattern in no_decay if fnmatchcase(name, pattern)]
        met.update(bare)
        split.setdefault((number, bool(bare)), []).append(parameter)
    _require_met(module, [*(p for group in groups for p in _patterns(group["match"])), *no_decay], met, where)
    found = []
    for (number, is_bare), parameters in sorted(split.items()):
        options = {} if number < 0 else {k: v for k, v in groups[number].items() if k != "match"}
        found.append({"params": parameters, **options, **({"weight_decay": 0.0} if is_bare else {})})
    return found


def _patterns(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _require_met(module: nn.Module, patterns: Sequence[str], met: set[str], where: str) -> None:
    """Raise JobError if a pattern is of no parameter, most often for a name written wrongly."""
    for pattern in patterns:
        if pattern not in met:
            names = [name for name, _ in module.named_parameters()]
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise JobError(
                f"{where}: {pattern!r} matches no parameter that an earlier pattern left; the model's are {listed}"
            )


def _require_options(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], bare: bool, where: str) -> None:
    """Raise JobError for an option that the optimizer does not have: torch would carry it along without effect."""
    for number, group in enumerate(groups):
        for name in group.keys() - {"match"} - optimizer.defaults.keys():
            advice = nearest(name, list(optimizer.defaults))
            raise JobError(
                f"{where} groups[{number}].{name} is not an option of {type(optimizer).__name__}; {advice}"
                f"allowed are match, {', '.join(optimizer.defaults)}"
            )
    if bare and "weight_decay" not in optimizer.defaults:
        raise JobError(f"{where} optimizer.no_decay has no use: {type(optimizer).__name__} has no weight_decay")


# In code --------------------------------------------------------------------------------------------------------


def _made(module: nn.Module, make: Any, key: str, code: UserCode) -> Optimizer:
    """Return the optimizer that a callable makes of the module."""
    told = make if isinstance(make, str) else getattr(make, "__qualname__", type(make).__name__)
    make = code.load(make) if isinstance(make, str) else make
    try:
        optimizer = make(module)
    except (Exception, SystemExit) as error:
        raise JobError(f"{key} = {told!r} fails on the model: {type(error).__name__}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise JobError(f"{key} = {told!r} returns {type(optimizer).__name__}; it must return a torch.optim.Optimizer")
    if _needs_a_closure(optimizer):
        raise JobError(f"{key} = {told!r}: {type(optimizer).__name__} {_WHY_NOT}")
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if given - own.keys():
        raise JobError(
            f"{key} = {told!r} trains {counted(len(given - own.keys()), 'tensor that is', 'tensors that are')} not the "
            "model's"
        )
    left_out = [name for number, name in own.items() if number not in given]
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if set(left_out) - frozen:
        listed = ", ".join(name for name in left_out if name not in frozen)
        raise JobError(
            f"{key} = {told!r} leaves out {listed}; give it all parameters, or let these require no gradient"
        )
    if left_out:  # a parameter that is frozen learns nothing, whoever has it
        optimizer.add_param_group({"params": [dict(module.named_parameters())[name] for name in left_out]})
    return optimizer


def _needs_a_closure(optimizer: Optimizer) -> bool:
    """Tell whether a step of the optimizer calls for the loss again: LBFGS, SAM."""
    if isinstance(optimizer, torch.optim.LBFGS) or (
        hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")
    ):
        return True
    step = inspect.unwrap(type(optimizer).step)
    parameters = list(inspect.signature(step).parameters.values())[1:]
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
