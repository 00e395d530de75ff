"""Demands on a module that are looked into before anything is trained: what cannot be trained or saved is named."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from sl_queue.compute.modules.handover import modules_in
from sl_queue.compute.modules.remembered import is_iterator
from sl_queue.compute.modules.state import Built, Contents
from sl_queue.cut.crossing import to_payload
from sl_queue.cut.tensors import described, dtype_name
from sl_queue.errors import JobError, NonFiniteError, ShapeError
from sl_queue.protocol.checkpoint import SAVABLE


def require_savable(module: nn.Module, where: str) -> None:
    """Raise JobError for a parameter or buffer that no checkpoint can hold, and for an iterator as an attribute."""
    for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in named:
            if kind == "parameter" and overlaps(tensor):
                raise JobError(
                    f"{where}: numbers of the parameter {name!r} share one place in memory, where no optimizer can "
                    "change them; make it of a tensor's clone()"
                )
            if not is_lazy(tensor) and (problem := _problem(tensor)):
                raise JobError(
                    f"{where}: the {kind} {name!r} is {described(tensor)}, {problem}, and cannot be saved; keep it "
                    "dense in one of float64, float32, float16, bfloat16, complex64, integers or bool, or a constant "
                    "as a plain attribute"
                )
    for path, value in Contents.of(module).attributes().items():
        if is_iterator(value):
            raise JobError(
                f"{where}: the attribute {path!r} is a {type(value).__name__}, and nothing can save where it stands; "
                "keep the values in a list, and a number that says which comes next"
            )


def overlaps(tensor: Tensor) -> bool:
    """Tell whether numbers of a tensor share one place in memory, as those of an expanded one do."""
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return False
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _problem(tensor: Tensor) -> str | None:
    """Return what keeps a tensor from being saved; None if nothing does."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.device.type == "meta":
        return "without numbers (device 'meta')"
    if dtype_name(tensor.dtype) not in SAVABLE:
        return "of a dtype that files cannot hold"
    if type(tensor) not in (Tensor, nn.Parameter):
        try:
            to_payload(tensor, resizable=True)
        except (TypeError, RuntimeError, ValueError, NotImplementedError):
            return f"a {type(tensor).__name__}"
    return None


def require_dense(output: object, what: str) -> None:
    """Raise ShapeError unless a model's output is a tensor with a number in every place."""
    if not isinstance(output, Tensor):
        raise ShapeError(f"{what} returns {type(output).__name__}; it must return one tensor")
    if output.layout != torch.strided or output.is_nested:
        kind = "nested" if output.is_nested else str(output.layout).removeprefix("torch.")
        raise ShapeError(f"{what} returns a {kind} tensor; it must return a dense one")


def require_number(penalty: object, what: str) -> None:
    """Raise ShapeError unless a penalty is one number of a tensor, NonFiniteError if it is none."""
    if not isinstance(penalty, Tensor) or penalty.numel() != 1:
        told = described(penalty) if isinstance(penalty, Tensor) else type(penalty).__name__
        raise ShapeError(f"{what} is {told}; it must be one number, the mean over the rows")
    if not bool(penalty.isfinite()):
        raise NonFiniteError(
            f"{what} is {penalty.item()}; lower the learning rate, or look in it for a division by zero"
        )


def leaves_of(output: Tensor) -> list[Tensor]:
    """Return the tensors at which a backward pass from `output` ends, and whose gradients it adds to."""
    found, nodes = [], [output.grad_fn]
    met = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        fresh = {following for following, _ in node.next_functions} - met
        met |= fresh
        nodes.extend(fresh)
    return found


def leaves_beyond(output: Tensor, inputs: Tensor | list[Tensor]) -> list[Tensor]:
    """Return the leaves that a module's output comes of, apart from those of its inputs."""
    given = [leaf for each in (inputs if isinstance(inputs, list) else [inputs]) for leaf in leaves_of(each)]
    return [leaf for leaf in leaves_of(output) if not any(leaf is each for each in given)]


def require_known(
    module: nn.Module,
    optimizer: Optimizer | None,
    built: Built,
    where: str,
    reached: Sequence[Tensor] = (),
    again: Callable[[], Tensor] | None = None,
) -> None:
    """Raise JobError for a parameter that the optimizer was not given: one that came later, or is none of the module's.

    Also for a submodule with buffers that came later. `reached` is what the module's output comes of. Which of that a
    forward makes for itself, to differentiate by, is found by doing it `again`: that is another tensor each time.
    """
    known = set() if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    now = Contents.of(module)
    late = {name: name in built.learning for name, p in now.parameters.items() if id(p) not in known}
    for name, each in now.modules.items():
        if name not in built.modes and any(buffer is not None for buffer in each._buffers.values()) and not late:
            raise JobError(f"{where} makes the submodule {name!r} in its forward, with buffers; make it in __init__")
    if late:
        names = ", ".join(map(repr, late))
        remedy = (
            "change its numbers in place, under torch.no_grad()"
            if any(late.values())
            else "make it in __init__, or let a lazy layer (nn.LazyLinear, ...) find its shape"
        )
        kind = "parameter" if len(late) == 1 else "parameters"
        raise JobError(f"{where} makes the {kind} {names} in its forward, after the optimizer was built; {remedy}")
    strangers = [leaf for leaf in reached if id(leaf) not in known]
    lasting = leaves_of(again()) if strangers and again is not None else strangers
    strangers = [leaf for leaf in strangers if any(leaf is each for each in lasting)]
    if strangers:
        raise JobError(
            f"{where}: {_place(module, strangers[0])} requires a gradient and is no parameter of the module, so "
            "no optimizer trains it; register it (nn.Parameter, nn.ParameterList, nn.ModuleList), or let it require "
            "no gradient"
        )


def _place(module: nn.Module, tensor: Tensor) -> str:
    """Return the attribute that holds a tensor which is not registered."""
    for path, value in Contents.of(module).attributes().items():
        inside = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        if any(each is tensor for each in inside):
            return f"the tensor in its attribute {path!r}"
        for each in modules_in(value):
            for name, parameter in each.named_parameters():
                if parameter is tensor:
                    return f"the parameter {name!r} of the module in its attribute {path!r}"
    return f"a tensor ({described(tensor)}) that it reaches from outside"


def with_hooks(module: nn.Module) -> list[str]:
    """Name the parameters with hooks on their gradients, which a backward pass on a copy of the weights passes by."""
    named = module.named_parameters()
    return [name for name, p in named if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)]


def require_within_reach(module: nn.Module, reached: Iterable[Tensor], where: str) -> None:
    """Raise JobError for parameters that a forward on a copy of the weights `reached` all the same, or has no hooks of.

    `reached` is what its output comes of.
    """
    if watched := with_hooks(module):
        raise JobError(
            f"{where} has hooks on the gradients of {', '.join(map(repr, watched))}, which a forward that runs ahead "
            "on a copy of the weights would pass by; set staleness = 0"
        )
    names: Mapping[int, str] = {id(parameter): name for name, parameter in module.named_parameters()}
    direct = sorted(names[id(leaf)] for leaf in reached if id(leaf) in names)
    if direct:
        raise JobError(
            f"{where} uses {', '.join(map(repr, direct))} in another way than by name (a list of its own, a cache, "
            "another module), so a forward that runs ahead cannot be given older weights; set staleness = 0"
        )
