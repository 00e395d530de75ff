"""A party's base model: rows -> forward -> activation ... gradient -> backward -> update.

With `staleness` a forward of step s may come before all s updates were applied. An update in place would then
invalidate its graph, so such a forward runs on a copy of the weights, one copy for all forwards between the same two
updates. Its gradient is added to the live weights, in its own step. Buffers (BatchNorm) are always the live ones, in
forward order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sl_queue.compute.flight import Ends, InFlight
from sl_queue.compute.inputs import n_offers, offer
from sl_queue.compute.model import Model
from sl_queue.compute.modules.graph import hooks_made
from sl_queue.compute.modules.handover import Take
from sl_queue.compute.running import blame, on_device, tensors_in
from sl_queue.compute.spec import ComputeSpec
from sl_queue.cut.crossing import BaseCut, require_shape
from sl_queue.cut.guard import UNGUARDED, Guard, place
from sl_queue.cut.rows import CutRows
from sl_queue.cut.tensors import Inputs, take_rows
from sl_queue.errors import ComputeError, JobError, LocalProtocolError
from sl_queue.protocol.checkpoint import State, Weights
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches, Positions
from sl_queue.protocol.table import Table


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """A micro-batch's rows of this party's table."""

    micro_batch: MicroBatch
    inputs: Inputs = field(repr=False)  # (rows, *anything), or several of them
    rows: CutRows


@dataclass(slots=True)
class TorchBaseStage:
    """ports.BaseStage over torch. Mutable: it holds the model and what is in flight."""

    model: Model
    features: npt.NDArray[np.generic] = field(repr=False)  # (all rows, *anything)
    table: Table
    batches: Batches
    cut: BaseCut  # to the label holder
    remark: str | None = None  # what a person should know of the features as the model gets them
    _updates: int = 0  # applied since the initial weights
    _prepared: PreparedRows | None = None
    _in_flight: dict[MicroBatch, InFlight] = field(default_factory=dict)
    _copy: Mapping[str, Tensor] | None = None  # of the weights as they are now, if a forward has run ahead

    @property
    def module(self) -> nn.Module:
        return self.model.module

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Look up the micro-batch's rows, for `forward`."""
        positions = self.batches.rows(micro_batch)
        rows = CutRows.of(self.table.row_keys, positions)
        self._prepared = PreparedRows(micro_batch, self.inputs(positions), rows)

    def forward(self, micro_batch: MicroBatch) -> Payload:
        """Return the activation of a training micro-batch, as it is sent; random draws are keyed by the micro-batch."""
        if self._prepared is None or self._prepared.micro_batch != micro_batch:
            self.prepare(micro_batch)
        prepared, self._prepared = self._prepared, None
        assert prepared is not None
        weights, hooks = self._weights_of(micro_batch.step), hooks_made()
        with self.model.drawing("forward", micro_batch):
            where = place(self.model.party, micro_batch)
            outputs, penalty = self.model.run_with_penalty(prepared.inputs, where, weights)
        learning = [place for place, output in enumerate(outputs) if output.requires_grad]
        payload = self.cut.leave(self.model.joined(outputs), micro_batch, prepared.rows, learning)
        self._in_flight[micro_batch] = InFlight(outputs, hooks, weights, prepared.rows, penalty)
        return payload

    def backward(self, micro_batch: MicroBatch, gradient: Payload) -> None:
        """Add a micro-batch's gradient to those of the parameters; in the order of the forwards.

        An activation that the loss does not depend on adds nothing: parameters without any gradient in a step are not
        updated, as when the layers are trained as one module.
        """
        if next(iter(self._in_flight), None) != micro_batch or micro_batch.step != self._updates:
            raise LocalProtocolError(f"backward {micro_batch} in step {self._updates}; in flight: {self._flying()}")
        flight = self._in_flight.pop(micro_batch)
        arrived = self.cut.arrive_each(gradient, micro_batch, flight.rows)
        self.differentiate(micro_batch, flight, [self.returned(micro_batch, flight, tensor) for tensor in arrived])

    def returned(self, micro_batch: MicroBatch, flight: InFlight, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient of the model's own output, of which a defence may have sent another one."""
        returning = self.cut.guard.returning
        if returning is None or gradient is None:
            return gradient
        inputs = self.inputs(self.batches.rows(micro_batch))
        if not isinstance(inputs, Tensor) or len(flight.outputs) > 1:
            raise JobError(f"party {self.model.party!r}: [privacy] changes gradients of one array to one output only")
        share = len(flight.rows) / self.batches.rows_in_step(micro_batch.step)
        return returning.apply(gradient, flight.outputs[0], inputs, share)

    def differentiate(self, micro_batch: MicroBatch, flight: InFlight, gradients: Sequence[Tensor | None]) -> None:
        """Do the backward pass of an activation and of a penalty; random draws in it are keyed by the micro-batch.

        Without a gradient the loss does not depend on that output. A penalty counts as its rows do in the step.
        """
        if self.model.scaling is not None and not self.model.scaling.see(gradients):
            return  # the label holder leaves the step out
        ends: list[Ends] = []
        pairs = zip(flight.outputs, gradients, strict=True)
        learning = [(output, g) for output, g in pairs if g is not None and output.requires_grad]
        if learning:  # there is a parameter to learn
            ends.append(([output for output, _ in learning], [gradient for _, gradient in learning]))
        if flight.penalty is not None and flight.penalty.requires_grad:
            share = len(flight.rows) / self.batches.rows_in_step(micro_batch.step)
            ends.append(([flight.penalty], [torch.full_like(flight.penalty, share * self.model.loss_scale)]))
        where = f"{place(self.model.party, micro_batch)}: the backward pass of {self.model.name}"
        for roots, of_roots in ends:
            scope = self.model.differentiating(roots, flight.hooks, micro_batch)
            with blame(f"{where} failed"), scope:
                if self.model.scaling is None:
                    flight.backpropagate(self.module, roots, of_roots, keep=roots is not ends[-1][0])
                else:
                    flight.backpropagate_in_range(self.module, roots, of_roots, where)

    def update(self) -> None:
        """Make one optimizer step with the gradients since the last one."""
        if any(micro_batch.step == self._updates for micro_batch in self._in_flight):
            raise LocalProtocolError(f"update {self._updates} with {self._flying()} in flight")
        self.model.step(self._updates)
        self._updates += 1
        self._copy = None

    def predict(self, micro_batch: MicroBatch) -> Payload:
        """Return the activation of held-out rows in evaluation mode."""
        return self.cut.leave(*self._prediction(micro_batch))

    def prediction(self, micro_batch: MicroBatch, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Compute as `predict` does, for a fuse model in the same process: each output."""
        activation, _, rows = self._prediction(micro_batch, weights)
        self.cut.check(activation, micro_batch, rows)
        return [activation] if self.model.outputs is None else self.model.outputs.split(activation)

    def _prediction(
        self, micro_batch: MicroBatch, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, MicroBatch, CutRows]:
        """Return the output for held-out rows, of that micro-batch, and the rows."""
        positions = self.batches.holdout_part(micro_batch.index)
        rows = CutRows.of(self.table.row_keys, positions, held_out=True)
        with self.model.evaluating(), self.model.drawing("evaluate", micro_batch):
            where = f"{place(self.model.party, micro_batch)} (held-out rows)"
            return self.model.run(self.inputs(positions), where, weights), micro_batch, rows

    def inputs(self, positions: Positions) -> Inputs:
        """Return these rows of the table, for the model."""
        return take_rows(self.features, positions, self.model.dtype, self.model.device)

    def fused_in_place(
        self,
        micro_batch: MicroBatch,
        positions: Positions,
        rows: CutRows,
        weights: Mapping[str, Tensor] | None = None,
    ) -> InFlight:
        """Compute a training micro-batch's activation for a fuse model in the same process: nothing crosses."""
        hooks = hooks_made()
        with self.model.drawing("forward", micro_batch):
            where = place(self.model.party, micro_batch)
            outputs, penalty = self.model.run_with_penalty(self.inputs(positions), where, weights)
        self.cut.check(self.model.joined([output.detach() for output in outputs]), micro_batch, rows)
        return InFlight(outputs, hooks, weights, rows, penalty)

    def state(self) -> State:
        """Return a copy of everything that a step changes."""
        if self._in_flight:
            raise LocalProtocolError(f"a checkpoint with {self._flying()} in flight")
        state = self.model.state()
        return State(state.tensors, {**state.values, "updates": self._updates})

    def load(self, state: State) -> None:
        """Become what `state` described; nothing is in flight afterwards."""
        self.model.load(state)
        self._updates = state.values["updates"]
        self._in_flight.clear()
        self.cut.forget()
        self._copy = self._prepared = None

    def weights(self) -> Weights:
        """Return the base model's own state_dict."""
        return self.model.weights()

    def _weights_of(self, step: int) -> Mapping[str, Tensor] | None:
        """Return None for the live weights when all earlier updates are in them, else the copy of this version."""
        if step < self._updates:
            raise LocalProtocolError(f"a forward of step {step} after {self._updates} updates")
        if step == self._updates:
            return None
        if self._copy is None:
            self._copy = {
                name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
                for name, parameter in self.module.named_parameters()
            }
        return self._copy

    def _flying(self) -> str:
        return ", ".join(map(str, self._in_flight)) or "nothing"


def base_stage(
    spec: ComputeSpec, table: Table, batches: Batches, take: Take | None = None, guard: Guard = UNGUARDED
) -> TorchBaseStage:
    """Build a party's base stage with initial weights, and find out in which form its model takes the features.

    `take` says how to come by a module that is given in code; without it, as a copy. `guard` is put in at its cut.
    Raises JobError, and ShapeError if the model takes none or its output is not the cut.
    """
    party, cut = spec.party, spec.layers.cut(spec.party)
    if cut is None or table.features is None:
        missing = "a cut in the job" if cut is None else "features in its table"
        raise JobError(f"party {party!r} has a base model, but not {missing}")
    refused: list[ComputeError] = []
    for choice in range(n_offers(table)):
        try:
            return _stage(spec, table, batches, choice, take, guard)
        except ComputeError as error:
            refused.append(error)
    first, *others = refused
    if not others:
        raise first
    raise type(first)("; and with the same numbers in another form: ".join(map(str, refused))) from first


def require_no_defence(party: str, guards: Iterable[Guard]) -> None:
    """Raise JobError for a defence, which would change gradients that are scaled."""
    if any(guard.defence is not None or guard.returning is not None for guard in guards):
        raise JobError(
            f'party {party!r}: precision = "fp16" scales gradients, which [privacy] bounds as they are; use "bf16"'
        )


def _stage(
    spec: ComputeSpec, table: Table, batches: Batches, choice: int, take: Take | None, guard: Guard
) -> TorchBaseStage:
    """Build the stage on one of the forms that features are offered in. Raises ComputeError if its model refuses it."""
    party, layers = spec.party, spec.layers
    if layers.precision is not None and layers.precision.name == "fp16":
        require_no_defence(party, [guard])
    shape = layers.cut(party)
    assert shape is not None

    def sample(dtype: torch.dtype) -> Inputs:
        features = offer(spec, table, dtype, choice).features
        return take_rows(features, np.arange(min(2, table.n_rows)), dtype, torch.device("cpu"))

    model = Model.build(spec, "base", sample, take, batches.steps)
    offered = offer(spec, table, model.dtype, choice)
    trial = sample(model.dtype)
    output = model.try_out(on_device(trial, model.device), ahead=layers.staleness > 0 and party != layers.label_holder)
    cut = BaseCut(
        party=party,
        peer=layers.label_holder,
        shape=shape,
        dtype=model.dtype,
        device=model.device,
        wire=layers.wire,
        model=model.name,
        guard=guard,
        outputs=model.outputs,
        overflows=model.scaling is not None,
    )
    require_shape(output, len(tensors_in(trial)[0]), cut, f"party {party!r}")
    if offered.fault is not None:
        raise JobError(offered.fault)
    if party in layers.feature_parties:
        cut.require_fitting(output.dtype, batches.most_rows, layers.micro_batches)
    return TorchBaseStage(model, offered.features, table, batches, cut, offered.remark)
