"""May a party's micro-batches be computed apart from each other? Found out before anything is trained.

They may if a forward pass is a function of parameters, running averages and its input: what it changes besides those is
named, since the next pass may read it.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.building import tensors_of
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.model import Model
from sl_queue.compute.modules.demands import leaves_of, with_hooks
from sl_queue.compute.modules.snapshots import Snapshot
from sl_queue.compute.modules.state import join
from sl_queue.compute.modules.statistics import COUNT, MEAN, VAR, Statistics, layers_that_count
from sl_queue.compute.running import blame
from sl_queue.compute.stand_ins import drawn_inputs, fused
from sl_queue.cut.tensors import Inputs
from sl_queue.errors import ComputeError, JobError
from sl_queue.protocol.messages import MicroBatch

_ROWS = 4
_TRIAL = MicroBatch(0, 0)


def separate(stage: TorchBaseStage | TorchFuseStage) -> None:
    """Let a stage's micro-batches be computed apart. Raises JobError, which says what stands in the way."""
    _require_plain(stage)
    if isinstance(stage, TorchBaseStage):
        rows = np.arange(min(_ROWS, stage.table.n_rows))
        _separate(stage.model, stage.inputs(rows))
        return
    if stage.own is not None:
        separate(stage.own)
    model, layers = stage.model, stage.layers
    output = _separate(model, fused(layers, drawn_inputs(layers, _ROWS, model.dtype, model.device)))
    _require_steady_loss(stage, output)


def _require_plain(stage: TorchBaseStage | TorchFuseStage) -> None:
    """Raise JobError for forms of a stage that hands do not compute."""
    party = stage.model.party
    if isinstance(stage, TorchFuseStage) and stage.layers.whole_batch:
        raise JobError(
            f"party {party!r}: the fuse model sees all rows of a step at once, so its micro-batches cannot be computed "
            "apart; take [hands] out"
        )
    if stage.model.scaling is not None:
        raise JobError(f'party {party!r}: hands do not compute in precision = "fp16"; use "bf16", or take [hands] out')
    several = stage.model.outputs is not None if isinstance(stage, TorchBaseStage) else bool(stage.layers.outputs)
    if several:
        raise JobError(f"party {party!r}: hands compute base models with one output; take [hands] out")


def _separate(model: Model, inputs: Inputs) -> Tensor:
    """Do one forward and backward pass in training mode, without a trace; returns its output."""
    module = model.module
    before = Snapshot.of(module)
    numbers = {name: tensor.detach().clone() for name, tensor in tensors_of(module)}
    weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    where = f"party {model.party!r}: a trial of {model.name} in training mode"
    try:
        with torch.enable_grad(), model.drawing("trial", _TRIAL), blame(where):
            (output,), penalty = model.run_with_penalty(inputs, f"party {model.party!r}", weights)
            sparse = _sparse(output, weights)
        layers, often = layers_that_count(module, numbers)
        obstacles = [*_changed(model, numbers, layers, often), *_other_ways(model, output), *sparse]
        obstacles += [] if penalty is None else ["it returns a penalty beside its output"]
    except ComputeError as error:
        raise JobError(f"{error}; micro-batches of it cannot be computed apart: take [hands] out") from error
    finally:
        before.put_back()
    if obstacles:
        raise JobError(
            f"party {model.party!r}: the micro-batches of {model.name} cannot be computed apart: "
            f"{'; '.join(obstacles)}; change that, or take [hands] out"
        )
    model.statistics = Statistics(layers)
    return output.detach()


def _changed(model: Model, before: dict[str, Tensor], layers: dict[str, object], often: list[str]) -> Iterator[str]:
    """Yield what a forward pass has changed, and the next may read."""
    known = {join(name, part) for name in (*layers, *often) for part in (MEAN, VAR, COUNT)}
    changed = [n for n, t in tensors_of(model.module) if n in before and n not in known and not _equal(t, before[n])]
    state, lost = model.saved.built.changes(model.module, "")
    for kind in ("attributes", "gone", "buffers", "modes", "learning"):
        changed += list(state.values.get(kind, ()))
    changed += [error.path for error in lost]
    if changed:
        yield f"each forward pass changes {', '.join(map(repr, changed))}, which the next one may read"
    if often:
        yield f"one forward pass uses {', '.join(map(repr, often))} more than once, with running averages"


def _other_ways(model: Model, output: Tensor) -> Iterator[str]:
    """Yield what a forward pass on a copy of the weights, and its backward pass, would pass by."""
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    direct = sorted(names[id(leaf)] for leaf in leaves_of(output) if id(leaf) in names)
    if direct:
        yield f"it uses {', '.join(map(repr, direct))} in another way than by name (a list of its own, a cache)"
    if watched := with_hooks(model.module):
        yield f"there are hooks on the gradients of {', '.join(map(repr, watched))}"


def _sparse(output: Tensor, weights: dict[str, Tensor]) -> list[str]:
    names = [name for name, weight in weights.items() if weight.requires_grad]
    if not output.requires_grad or not names:
        return []
    root = output.real.sum() if output.is_complex() else output.sum()
    found = torch.autograd.grad(root, [weights[name] for name in names], allow_unused=True)
    sparse = [
        name for name, grad in zip(names, found, strict=True) if grad is not None and grad.layout != torch.strided
    ]
    return [f"the gradients of {', '.join(map(repr, sparse))} are sparse; use sparse=False"] if sparse else []


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _require_steady_loss(stage: TorchFuseStage, output: Tensor) -> None:
    """Raise JobError for a loss that remembers anything from one micro-batch to the next."""
    owned, labels = stage.objective.owned, stage.objective.labels
    before, state = Snapshot.of(owned.holder), owned.state()
    rows = np.arange(len(output)) % len(labels)
    some = labels[torch.from_numpy(rows)].to(output.device)
    try:
        with torch.enable_grad(), stage.model.drawing("trial", _TRIAL), blame("the loss"):
            stage.objective.loss_of(output.requires_grad_(), some, rows)
        changed = owned.state() != state
    finally:
        before.put_back()
    if changed:
        raise JobError(
            f"party {stage.model.party!r}: the micro-batches cannot be computed apart: the loss changes what it keeps "
            "from one micro-batch to the next; change that, or take [hands] out"
        )
