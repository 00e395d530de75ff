"""Computing of a hand: the very functions of its party's stage, on weights that it was given. It learns nothing.

Nothing crosses the cut here: activations and gradients go to the lead as they are, which checks, defends and packs
them. Between the calls of one task a hand keeps what lies between them: the graph of a forward pass until its backward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.flight import InFlight
from sl_queue.compute.fuse_passes import PreparedTargets
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.model import Model
from sl_queue.compute.modules.graph import hooks_made
from sl_queue.compute.running import blame
from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.cut.guard import place
from sl_queue.cut.relu import ends_in_relu
from sl_queue.cut.rows import CutRows
from sl_queue.errors import LocalProtocolError
from sl_queue.protocol.hands import Call, Tensors
from sl_queue.protocol.messages import MicroBatch, Payload

OUTPUT = " output"  # of a micro-batch, where metrics of the training passes are asked for
Named = dict[str, Tensor]
Outcome = tuple[dict[str, Any], dict[str, Payload]]  # values and tensors of a result
Stage = TorchBaseStage | TorchFuseStage


@dataclass(frozen=True, slots=True)
class _Learned:
    """A micro-batch after the fuse model's backward pass."""

    gradients: Named
    saw: Named
    put_off: tuple[InFlight, Tensor] | None  # the own base model's backward pass


_LEFT_FOR: Mapping[str, type] = {"backward": InFlight, "learn": _Learned}  # by an earlier call, which cannot go without


@dataclass(slots=True)
class TorchHand:
    """ports.Workshop over torch. Mutable: it holds weights by version, and what lies between two calls of a task."""

    stage: Stage
    _weights: dict[int, dict[str, Named]] = field(default_factory=dict)  # by version, then by part
    _kept: dict[int, Any] = field(default_factory=dict)  # by task

    def equip(self, version: int, tensors: Tensors, oldest: int, oldest_task: int) -> None:
        """Have another version of the weights; what no call will name any more goes."""
        self._weights = {v: w for v, w in self._weights.items() if v >= oldest}
        self._kept = {task: kept for task, kept in self._kept.items() if task >= oldest_task}
        self._weights[version] = {model.part: _weights_of(model, tensors) for model in models_of(self.stage)}

    def has(self, version: int) -> bool:
        """Return True if these weights are here."""
        return version in self._weights

    def forget(self) -> None:
        """Belong to no lead: another one will say everything again."""
        self._weights.clear()
        self._kept.clear()

    def key_draws(self, secret: bytes) -> None:
        """Let what the models draw follow from the party's secret."""
        for model in models_of(self.stage):
            model.secret = secret

    def do(self, call: Call) -> Outcome | None:
        """Do one call; None if what the call before has left is not here. Raises what the model does.

        A task may come again at any of its calls: what an earlier time has left is then left over, or lacking.
        """
        needed = _LEFT_FOR.get(call.what)
        if needed is not None and not isinstance(self._kept.get(call.task), needed):
            return None
        weights = self._weights[call.version]
        arrived = {name: from_payload(p, models_of(self.stage)[0].device) for name, p in call.tensors.items()}
        if isinstance(self.stage, TorchBaseStage):
            return self._for_base(self.stage, call, weights["base"], arrived)
        return self._for_fuse(self.stage, call, weights, arrived)

    def _for_base(self, stage: TorchBaseStage, call: Call, weights: Named, arrived: Named) -> Outcome:
        match call.what:
            case "forward":
                return self._forward(stage, call, weights)
            case "backward":
                flight: InFlight = self._kept.pop(call.task)
                return {}, payloads(_learned(stage, call.micro_batch, flight, arrived[""]))
            case "predict":
                positions = stage.batches.holdout_part(call.micro_batch.index)
                where = f"{place(stage.model.party, call.micro_batch)} (held-out rows)"
                with stage.model.evaluating(), stage.model.drawing("evaluate", call.micro_batch):
                    return {}, {"": to_payload(stage.model.run(stage.inputs(positions), where, weights))}
        raise LocalProtocolError(f"no hand can {call.what!r}")

    def _forward(self, stage: TorchBaseStage, call: Call, weights: Named) -> Outcome:
        micro_batch, model = call.micro_batch, stage.model
        positions, hooks = stage.batches.rows(micro_batch), hooks_made()
        rows = CutRows.of(stage.table.row_keys, positions)
        with model.drawing("forward", micro_batch):
            activation = model.run(stage.inputs(positions), place(model.party, micro_batch), weights)
        relu = stage.cut.wire.compress == "bitmap" and ends_in_relu(activation)
        self._kept[call.task] = InFlight([activation], hooks, weights, rows)
        return {"relu": relu}, {"": to_payload(activation), **payloads(model.saw)}

    def _for_fuse(self, stage: TorchFuseStage, call: Call, weights: dict[str, Named], arrived: Named) -> Outcome:
        own = weights.get("base")
        match call.what:
            case "prepare":
                self._kept[call.task] = stage.passes.begun(call.micro_batch, own)
                return {}, payloads({} if stage.own is None else stage.own.model.saw)
            case "fuse":
                kept = self._kept.pop(call.task, None)
                mine = kept if isinstance(kept, PreparedTargets) else stage.passes.begun(call.micro_batch, own)
                return self._fuse(stage, call, mine, weights["fuse"], arrived)
            case "learn":
                return self._learn(stage, call.micro_batch, self._kept.pop(call.task))
            case "evaluate":
                each = {party: [tensor] for party, tensor in arrived.items()}
                loss, output = stage.passes.scored(call.micro_batch, each, weights["fuse"], own)
                return {"loss": loss}, {"": to_payload(output)} if stage.objective.metrics else {}
        raise LocalProtocolError(f"no hand can {call.what!r}")

    def _fuse(
        self, stage: TorchFuseStage, call: Call, mine: PreparedTargets, weights: Named, arrived: Named
    ) -> Outcome:
        part = stage.passes.gathered(mine, {party: ([tensor], (0,)) for party, tensor in arrived.items()})
        loss, output, _ = stage.passes.computed([part], weights)
        gradients = {party: each[0].gradient for party, each in part.inputs.items()}
        own = gradients.pop(stage.model.party, None)
        put_off = None if mine.flight is None or own is None else (mine.flight, own)
        seen = {**stage.model.saw, **({OUTPUT: output.detach()} if stage.trained.wanted else {})}
        self._kept[call.task] = _Learned(_taken(weights), seen, put_off)
        found = {party: gradient for party, gradient in gradients.items() if gradient is not None}
        return {"loss": loss}, payloads(found)

    @staticmethod
    def _learn(stage: TorchFuseStage, micro_batch: MicroBatch, kept: _Learned) -> Outcome:
        found = {f"fuse/{name}": p for name, p in payloads({**kept.gradients, **kept.saw}).items()}
        if kept.put_off is not None and stage.own is not None:
            own = _learned(stage.own, micro_batch, *kept.put_off)
            found |= {f"base/{name}": p for name, p in payloads(own).items()}
        return {}, found


def models_of(stage: Stage) -> tuple[Model, ...]:
    """Return the models of a party's stage."""
    if isinstance(stage, TorchBaseStage):
        return (stage.model,)
    return (stage.model,) if stage.own is None else (stage.model, stage.own.model)


def payloads(tensors: Mapping[str, Tensor]) -> dict[str, Payload]:
    """Return copies of tensors, to be sent."""
    return {name: to_payload(tensor) for name, tensor in tensors.items()}


def _weights_of(model: Model, tensors: Tensors) -> Named:
    """Return a version of a model's weights, each in memory laid out as the model's own."""
    own: Named = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    learning = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    found: Named = {}
    for full_name, payload in tensors.items():
        part, _, name = full_name.partition("/")
        if part == model.part:
            with torch.no_grad():
                tensor = torch.empty_like(own[name]).copy_(from_payload(payload))
            found[name] = tensor.detach().requires_grad_(name in learning)
    return found


def _learned(stage: TorchBaseStage, micro_batch: MicroBatch, flight: InFlight, gradient: Tensor) -> Named:
    """Do a base model's backward pass; random draws in it are keyed by the micro-batch."""
    (activation,), weights, model = flight.outputs, flight.weights, stage.model
    if not activation.requires_grad:
        return {}
    assert weights is not None
    names = [name for name, weight in weights.items() if weight.requires_grad]
    scope = model.differentiating([activation], flight.hooks, micro_batch)
    with blame(f"{place(model.party, micro_batch)}: the backward pass of {model.name} failed"), scope:
        found = torch.autograd.grad(activation, [weights[name] for name in names], gradient, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def _taken(weights: Named) -> Named:
    """Return the gradients that a backward pass has left at the weights, which are free of them afterwards."""
    found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for weight in weights.values():
        weight.grad = None
    return found
