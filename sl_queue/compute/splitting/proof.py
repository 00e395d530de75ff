"""Proof that a split computes what the whole does, bit for bit: outputs, gradients and running averages."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sl_queue.compute.modules.handover import copied
from sl_queue.compute.running import called
from sl_queue.errors import JobError

_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def require_equal(
    whole: nn.Module, bases: Mapping[str, nn.Module], fuse: nn.Module, rows: Any, of: Mapping[str, Any]
) -> None:
    """Raise JobError, which names a layer, unless the parts put together compute what the whole does.

    `rows` are the whole's input, `of` those of each base. Compared in training mode without dropout, whose draws no two
    runs share, and in evaluation mode.
    """
    whole = copied(whole)
    apart = {party: copied(part) for party, part in bases.items()}
    fuse = copied(fuse)
    parts = [*apart.values(), fuse]
    for training in (True, False):
        seen: list[dict[str, Tensor]] = [{}, {}]
        with _mode([whole, *parts], training):
            with _outputs_of([whole], seen[0]):
                expected = called(whole, rows)
            with _outputs_of(parts, seen[1]):
                found, ends = _forward(apart, fuse, of)
        _require_same_outputs(seen[0], seen[1], expected, found, training)
        if training:
            _backward(expected)
            _backward(found)
            for outputs, entered in ends:
                pairs = [(o, e.grad) for o, e in zip(outputs, entered, strict=True) if e.grad is not None]
                if pairs := [(o, g) for o, g in pairs if o.requires_grad]:
                    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            _require_same_gradients(whole, parts)
    _require_same_averages(whole, parts)


def _forward(bases: Mapping[str, nn.Module], fuse: nn.Module, of: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Run the parts as a run does: what crosses is cut off from the graph that it comes of."""
    given, ends = [], []
    for party, base in bases.items():
        output = base(of[party])
        each = list(output.values()) if isinstance(output, dict) else [output]
        leaves = [tensor.detach().clone().requires_grad_(torch.is_grad_enabled()) for tensor in each]
        entered = [leaf.clone() for leaf in leaves]  # a fuse model may change it in place
        given.append(dict(zip(output, entered, strict=True)) if isinstance(output, dict) else entered[0])
        ends.append((each, leaves))
    return fuse(given), ends


def _backward(output: Any) -> None:
    """Do a backward pass from drawn gradients."""
    draw = torch.Generator().manual_seed(0)
    ends = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    gradients = [torch.randn(end.shape, generator=draw, dtype=torch.float32).to(end) for end in ends]
    if ends:
        torch.autograd.backward(ends, gradients)


@contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    for module in modules:
        module.train(training)
        for each in module.modules():
            if isinstance(each, _DROPS):
                each.eval()
            elif training and isinstance(each, nn.RNNBase | nn.MultiheadAttention | nn.Transformer):
                each.dropout = 0.0
    with torch.set_grad_enabled(training):
        yield


@contextmanager
def _outputs_of(modules: Sequence[nn.Module], seen: dict[str, Tensor]) -> Iterator[None]:
    """Note the first output of each layer."""
    hooks = []
    for module in modules:
        for name, layer in module.named_modules():
            if name and type(layer) is not nn.Module:

                def note(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor):
                        seen.setdefault(name, output.detach().clone())

                hooks.append(layer.register_forward_hook(note))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _require_same_outputs(
    whole: Mapping[str, Tensor], parts: Mapping[str, Tensor], expected: Any, found: Any, training: bool
) -> None:
    when = "training" if training else "evaluation"
    for name, output in whole.items():  # in the order in which they ran
        if name in parts and not _same(output, parts[name]):
            raise JobError(f"{name!r} computes other numbers once the module is split, in {when} mode: {_WHY}")
    one, other = list(_tensors(expected)), list(_tensors(found))
    if len(one) != len(other) or not all(map(_same, one, other)):
        raise JobError(f"the output differs once the module is split, in {when} mode: {_WHY}")


_WHY = "the rows in it may lie otherwise in memory, or it depends on what another party computes; cut elsewhere"


def _require_same_gradients(whole: nn.Module, parts: Sequence[nn.Module]) -> None:
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for part in parts:
        for name, parameter in part.named_parameters():
            if not _same(expected[name], parameter.grad):
                raise JobError(f"{name!r} gets another gradient once the module is split: {_WHY}")


def _require_same_averages(whole: nn.Module, parts: Sequence[nn.Module]) -> None:
    expected = dict(whole.named_buffers())
    for part in parts:
        for name, buffer in part.named_buffers():
            if not _same(expected[name], buffer):
                raise JobError(f"{name!r} keeps other numbers once the module is split: {_WHY}")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
