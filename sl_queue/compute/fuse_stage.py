"""The label holder's part: activations -> fuse model -> loss -> gradients, and the same in evaluation mode for metrics.

Its own base model, if it has one, is fused in place, without a message. Its backward pass is put off until the
gradients that others wait for are on their way.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sl_queue.compute.aggregation import aggregated
from sl_queue.compute.base_stage import InFlight, TorchBaseStage, base_stage
from sl_queue.compute.fitting import fitted, kind_of
from sl_queue.compute.losses import Loss, check_labels, label_tensor, loss_of
from sl_queue.compute.metrics import check_targets, metrics_of, predictions, targets, task_of, undefined
from sl_queue.compute.model import Inputs, Model, blame
from sl_queue.compute.modules.graph import hooks_made
from sl_queue.compute.modules.handover import Copies, Take
from sl_queue.compute.other_metrics import Metric, OfRawOutputs, Task
from sl_queue.compute.outputs import Outputs, doubled, outputs_of
from sl_queue.compute.owned_loss import OwnedLoss, require_no_parameters
from sl_queue.compute.stand_ins import drawn
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.objective import loss_name, metric_name
from sl_queue.cut.crossing import Arrival, Promised, place, received, require_finite
from sl_queue.cut.packing import Wire, asks_for_less, unused
from sl_queue.cut.tensors import cast, described, lent
from sl_queue.errors import ComputeError, LocalProtocolError, NonFiniteError, ShapeError
from sl_queue.ports import State, Table, Weights
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches, Positions

_TRIAL_ROWS = 2
_RANGE_ROWS = 64  # on which the range of the output is looked at
_LARGE = 1e9  # an output that has left every reasonable scale


@dataclass(frozen=True, slots=True)
class Objective:
    """What is learned and measured: the loss against these labels, and the metrics."""

    loss: Loss
    owned: OwnedLoss  # what the loss keeps
    labels: Tensor = field(repr=False)  # all rows as the table has them, on the CPU
    task: Task
    metrics: Mapping[str, Metric]
    outputs: Outputs
    shape: tuple[int, ...]  # of one row's output
    warnings: Sequence[str] = ()  # of what is allowed and was probably not meant


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One held-out micro-batch."""

    rows: int
    loss: float
    output: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True)
class Own:
    """What a micro-batch takes of the label holder alone."""

    micro_batch: MicroBatch
    rows: bytes  # their digest
    labels: Tensor = field(repr=False)  # (rows,) or (rows, *anything)
    flight: InFlight | None = field(repr=False)  # of its base model


@dataclass(slots=True)
class TorchFuseStage:
    """ports.FuseStage over torch. Mutable: it holds the models and the sums of the step and of the evaluation."""

    job: Job
    model: Model
    own: TorchBaseStage | None  # the label holder's base model
    objective: Objective
    table: Table
    batches: Batches
    wire: Wire
    _losses: list[tuple[int, float]] = field(default_factory=list)  # of the step so far: rows, mean loss
    _evaluated: dict[int, Evaluated] = field(default_factory=dict)
    _prepared: Own | None = None
    _put_off: tuple[MicroBatch, InFlight, Tensor] | None = None  # the own base model's backward pass: its gradient
    _step: int = 0  # of the last micro-batch

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Rows, labels and the own base model's forward pass, for `forward_backward`."""
        self._own_backward()
        positions, flight = self.batches.rows(micro_batch), None
        rows = self.table.rows_digest(positions)
        if self.own is not None:
            hooks = hooks_made()
            with self.own.model.drawing("forward", micro_batch):
                inputs = self.own.inputs(positions)
                activation = self.own.activation(inputs, place(self.model.party, micro_batch))
            flight = InFlight(activation, hooks, None, rows)
        self._prepared = Own(micro_batch, rows, self._labels(positions), flight)

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        """Loss and gradients of one micro-batch, weighted by its share of the step's rows.

        A party on whose activation the loss does not depend gets a gradient of no bytes, which is not one of zeros.
        """
        if self._prepared is None or self._prepared.micro_batch != micro_batch:
            self.prepare(micro_batch)
        mine, self._prepared = self._prepared, None
        assert mine is not None
        where, n_rows = place(self.model.party, micro_batch), len(mine.labels)
        tensors = self._received(activations, mine.rows, n_rows, where)
        arrivals = {party: Arrival(tensor) for party, tensor in tensors.items()}
        own = None if mine.flight is None else Arrival(mine.flight.activation.detach())
        hooks, entering = hooks_made(), arrivals if own is None else {**arrivals, self.model.party: own}
        inputs = {party: arrival.enter() for party, arrival in entering.items()}
        with self.model.drawing("forward", micro_batch):
            output = self._fused(inputs, where)
            loss, value = self._loss(output, mine.labels, where)
        self._differentiate(loss * (n_rows / self.batches.rows_in_step(micro_batch.step)), hooks, micro_batch)
        self._losses.append((n_rows, value))
        self._step = micro_batch.step
        if mine.flight is not None and own is not None and own.gradient is not None:
            self._put_off = (micro_batch, mine.flight, own.gradient)
        return {
            party: self._answer(arrival, activations[party], mine.rows, f"{where}: gradient for party {party!r}")
            for party, arrival in arrivals.items()
        }

    def _differentiate(self, loss: Tensor, hooks: int, micro_batch: MicroBatch) -> None:
        """Do the backward pass from the loss to the activations; random draws in it are keyed by the micro-batch."""
        where = place(self.model.party, micro_batch)
        if not loss.requires_grad:
            raise ComputeError(
                f"{where}: the loss of {self.model.name} depends on no activation and on no parameter that is trained, "
                "so nothing can be learnt; check for detach(), no_grad() and argmax() in model and loss"
            )
        scope = self.model.differentiating(loss, hooks, micro_batch)
        with blame(f"{where}: the backward pass of {self.model.name} failed"), scope:
            torch.autograd.backward(loss)

    def _answer(self, arrival: Arrival, activation: Payload, rows: bytes, what: str) -> Payload:
        """The gradient of an activation, as it travels."""
        if arrival.gradient is None:
            return unused(activation.dtype, activation.shape, rows)
        require_finite(arrival.gradient, what, "lower the learning rate, or check the loss")
        return self.wire.pack(lent(arrival.gradient, rows), wanted=asks_for_less(activation))

    def update(self) -> float:
        """One optimizer step of fuse and own base; returns the step's loss, the mean over its rows."""
        if not self._losses:
            raise LocalProtocolError("an update without a micro-batch")
        self._own_backward()
        self.model.step(self._step)
        if self.own is not None:
            self.own.update()
        loss = _mean(self._losses)
        self._losses.clear()
        return loss

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        """Add held-out rows to the running evaluation; their outputs stay in memory until `metrics`."""
        positions = self.batches.holdout_part(micro_batch.index)
        where = f"{place(self.model.party, micro_batch)} (held-out rows)"
        inputs = self._received(activations, self.table.rows_digest(positions), len(positions), where)
        if self.own is not None:
            inputs[self.model.party] = self.own.prediction(micro_batch)
        loss = self.objective.owned
        with self.model.evaluating(), loss.evaluating(), self.model.drawing("evaluate", micro_batch):
            output = self._fused(inputs, where)
            labels = self._labels(positions)
            _, value = self._loss(output, labels, where)
        kept = (output.cpu(), labels.cpu()) if self.objective.metrics else (output.new_empty(0), labels.new_empty(0))
        self._evaluated[micro_batch.index] = Evaluated(len(positions), value, *kept)

    def metrics(self) -> Mapping[str, float | None]:
        """Loss and metrics over all rows evaluated since the last call; None where these rows do not define one."""
        parts = [self._evaluated[index] for index in sorted(self._evaluated)]
        if not parts:
            raise LocalProtocolError("metrics without an evaluation")
        self._evaluated.clear()
        found: dict[str, float | None] = {"loss": _mean([(part.rows, part.loss) for part in parts])}
        if self.objective.metrics:
            output, labels = torch.cat([p.output for p in parts]), torch.cat([p.labels for p in parts])
            found |= measured(self.objective, output, labels)
        return found

    def state(self) -> State:
        """A copy of everything that a step changes: fuse, own base, both optimizers, the loss."""
        if self._losses:
            raise LocalProtocolError("a checkpoint in the middle of a step")
        states = [self.model.state(), self.objective.owned.state()] + ([] if self.own is None else [self.own.state()])
        return State(
            {name: tensor for state in states for name, tensor in state.tensors.items()},
            {name: value for state in states for name, value in state.values.items()},
        )

    def load(self, state: State) -> None:
        """Become what `state` described."""
        self.model.load(state)
        self.objective.owned.load(state)
        if self.own is not None:
            self.own.load(state)
        self._losses.clear()
        self._evaluated.clear()
        self._put_off = self._prepared = None

    def weights(self) -> Weights:
        """The state_dict of the fuse model, and of the own base model if there is one."""
        return {**self.model.weights(), **({} if self.own is None else self.own.weights())}

    def _own_backward(self) -> None:
        """Do the backward pass of the own base model that was put off, if there is one."""
        if self._put_off is not None and self.own is not None:
            put_off, self._put_off = self._put_off, None
            self.own.differentiate(*put_off)

    def _received(self, activations: Mapping[str, Payload], rows: bytes, n_rows: int, where: str) -> dict[str, Tensor]:
        """The feature parties' activations in job order, checked, as tensors of their own."""
        missing = [party for party in self.job.feature_parties if party not in activations]
        if missing:
            raise LocalProtocolError(f"{where}: no activation of {', '.join(missing)}")
        dtypes = self.model.accepted()
        found = {}
        for party in self.job.feature_parties:
            shape = (n_rows, *(self.job.cut(party) or ()))
            promised = Promised("activation", party, dtypes, shape, rows, self.wire)
            found[party] = received(activations[party], promised, self.model.device, where)
        return found

    def _fused(self, inputs: Mapping[str, Tensor], where: str) -> Tensor:
        """The fuse model's output; inputs in job order, whatever order they came in."""
        with blame(f"{where}: aggregation {self.job.fuse.aggregation!r} failed"):
            joined = aggregated([inputs[party] for party in self.job.fused], self.job.fuse.aggregation)
        return self.model.run(joined, where)

    def _labels(self, positions: Positions) -> Tensor:
        return self.objective.labels[torch.from_numpy(positions)].to(self.model.device)

    def _loss(self, output: Tensor, labels: Tensor, where: str) -> tuple[Tensor, float]:
        with blame(f"{where}: the loss failed"):
            loss = self.objective.loss(output, labels)
            value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"{where}: the loss is {value}; {why_not_finite(output, self.model.name)}")
        return loss, value


def why_not_finite(output: Tensor, model: str) -> str:
    """Return where a loss that is not finite comes from, as far as the output shows it, and what to do."""
    finite = output.detach().isfinite()
    if not finite.all():
        bad = int((~finite.reshape(len(output), -1).all(1)).sum())
        return (
            f"the output of {model} holds NaN or infinity in {bad} of {len(output)} rows, of finite activations: look "
            "in it for a division by zero, a logarithm or root of zero or less, or weights that a learning rate too "
            "high has driven away"
        )
    largest = float(output.detach().abs().max())
    if largest > _LARGE:
        return (
            f"the output of {model} has grown to {largest:.0e}: lower the learning rate, or bring features and labels "
            "to a scale near 1"
        )
    return (
        f"the output of {model} is finite, so the loss makes it: look in it for a division by zero, a logarithm or "
        "root of zero or less, and for labels that it is not made for"
    )


def measured(objective: Objective, output: Tensor, labels: Tensor) -> dict[str, float | None]:
    """The metrics of the model's output for these rows, both on the CPU."""
    of_raw = [metric for metric in objective.metrics.values() if isinstance(metric, OfRawOutputs)]
    scores, classes = output, labels
    if len(of_raw) < len(objective.metrics):
        scores, classes = predictions(objective.task, objective.outputs, output, labels)
    return {
        name: metric(output, labels) if metric in of_raw else metric(scores, classes)
        for name, metric in objective.metrics.items()
    }


def undefined_metrics(stage: TorchFuseStage) -> dict[str, str]:
    """Return which metrics the held-out rows do not define, and why; their labels alone decide it."""
    objective, batches = stage.objective, stage.batches
    if not objective.metrics or not batches.holdout_rows:
        return {}
    parts = [torch.from_numpy(batches.holdout_part(index)) for index in range(batches.holdout_parts)]
    labels = objective.labels[torch.cat(parts)]
    output = torch.empty(len(labels), *objective.shape, device="meta")  # whose shape alone is looked at
    return undefined(objective.metrics, objective.task, targets(objective.task, output, labels))


def objective_of(
    party_file: PartyFile,
    table: Table,
    output: Tensor,
    scaled: Callable[[float], Tensor],
    where: str,
    models: Sequence[nn.Module] = (),
    take: Take | None = None,
) -> Objective:
    """Loss, labels and metrics, tried out on the fuse model's `output` for a few rows, with its graph.

    `scaled(s)` is the output for activations s times as large. What the loss shares with one of `models` is theirs;
    `take` says how to come by a loss that is given in code. Raises JobError, or ComputeError for a loss that fails.
    """
    assert party_file.fuse is not None
    fuse, tried = party_file.fuse, output.detach()
    loss = loss_of(party_file, output.device, take)
    owned = OwnedLoss.of(loss, models, party_file.party, where)
    name: Any = loss_name(fuse.loss)
    check_labels(table.labels, tried, name, where)
    assert table.labels is not None
    kind = name if isinstance(name, str) and ":" not in name else kind_of(loss)
    try:
        with owned.trial():
            fit, warnings, (value, of) = fitted(loss, name, tried, table.labels, where)
        require_no_parameters(value, of, models, where)
        wanted = list(map(metric_name, fuse.metrics))
        task = Task(fuse.task) if fuse.task else task_of(kind, tried, table.labels, wanted, fuse.outputs)
        classes = tried.shape[1] if tried.dim() > 1 else 2
        metrics = metrics_of(fuse.metrics, task, where, party_file.folder, classes)
        usual = [name for name, metric in metrics.items() if not isinstance(metric, OfRawOutputs)]
        check_targets(task, tried, table.labels, usual, where)
        labels = label_tensor(table.labels)
        if usual:
            targets(task, tried, labels[torch.arange(len(tried)) % len(labels)].to(tried.device))
    except ShapeError as error:
        raise ShapeError(f"{where}: {error}") from None
    outputs = outputs_of(fuse.outputs, kind, task, list(metrics), output, scaled, where)
    twice = doubled(kind, f"loss = {name!r}" if isinstance(name, str) else "the loss", output)
    warnings += [twice] if twice else []
    return Objective(fit, owned, labels, task, metrics, outputs, tuple(tried.shape[1:]), warnings)


def _mean(losses: Sequence[tuple[int, float]]) -> float:
    return sum(rows * loss for rows, loss in losses) / sum(rows for rows, _ in losses)


def fuse_stage(
    job: Job, party_file: PartyFile, table: Table, batches: Batches, take: Take | None = None
) -> TorchFuseStage:
    """The label holder's stage with initial weights.

    `take` says how to come by modules and a loss that are given in code; without it, as copies.
    Raises JobError for labels, a loss or metrics that do not suit the model, ShapeError if it fails on the cuts.
    """
    party = party_file.party

    def sample(
        dtype: torch.dtype,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        rows: int = _TRIAL_ROWS,
        scale: float | None = None,
    ) -> Inputs:
        numbers = [drawn(job.seed, p, (rows, *(job.cut(p) or ())), scale) for p in job.fused]
        # In the graph, and no leaves of it, as in a step.
        inputs = [x.to(device, dtype).requires_grad_().clone() for x in numbers]
        return aggregated(inputs, job.fuse.aggregation)

    take = take or Copies()  # of fuse model and loss together: one may hold the other
    model = Model.build(job, party_file, "fuse", sample, take, batches.steps)
    output = model.try_out(sample(model.dtype, model.device), graph=True)
    if output.shape[:1] != (_TRIAL_ROWS,):
        raise ShapeError(
            f"party {party!r}: {model.name} returns {described(output)} for {_TRIAL_ROWS} rows; "
            "its first axis must be the rows"
        )

    def scaled(scale: float) -> Tensor:
        return model.try_out(sample(model.dtype, model.device, _RANGE_ROWS, scale))

    own = base_stage(job, party_file, table, batches, take) if party in job.fused else None
    modules = [model.module] + ([] if own is None else [own.module])
    with model.drawing("loss trial", MicroBatch(0, 0)):
        objective = objective_of(party_file, table, output, scaled, f"party {party!r}", modules, take)
    return TorchFuseStage(job, model, own, objective, table, batches, replace(job.on_the_wire, cast=cast))
