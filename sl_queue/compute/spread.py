"""A party's stages whose micro-batches are computed by hands. The lead keeps what lasts: weights, optimizer, order.

    update  -> new weights -> hands: all forwards until the next update, at once, wherever there is a hand
    forward <- waits for the result of its micro-batch;     backward -> to the hand that has the graph, at once
    update  <- waits for the gradients of its step, adds them in the order of the micro-batches, one optimizer step

The loop of the role is the same as without hands, and so are checkpoints, messages and bits: what a hand computes is a
function of weights and micro-batch. Everything with an order is done here, and so is all that crosses the cut.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.flight import InFlight
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.hand import OUTPUT, models_of, payloads
from sl_queue.compute.model import Model
from sl_queue.cut.crossing import from_payload
from sl_queue.cut.rows import CutRows
from sl_queue.errors import LocalProtocolError
from sl_queue.hand_ports import Hands
from sl_queue.protocol.checkpoint import State, Weights
from sl_queue.protocol.hands import Result, Tensors
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.text import counted

Answer = Callable[[MicroBatch, Mapping[str, Payload]], None]


@dataclass(slots=True)
class SpreadBaseStage:
    """ports.BaseStage over hands. Mutable: it knows which tasks are under way."""

    whole: TorchBaseStage  # its model, optimizer and cut; it computes nothing here
    hands: Hands
    pipeline: Pipeline
    _updates: int = 0
    _ahead: deque[tuple[MicroBatch, ...]] = field(default_factory=deque)  # forwards to begin after each update
    _tasks: dict[MicroBatch, int] = field(default_factory=dict)
    _learning: dict[MicroBatch, bool] = field(default_factory=dict)  # whether a gradient is awaited
    _held_out: dict[MicroBatch, int] = field(default_factory=dict)
    _sent: dict[MicroBatch, Tensor] = field(default_factory=dict)  # activations, where a defence asks for them again

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Leave that to a hand."""

    def forward(self, micro_batch: MicroBatch) -> Payload:
        """Return the activation; its micro-batch was begun when its weights were there."""
        if micro_batch not in self._tasks:
            self._ahead = deque(self.pipeline.together(micro_batch.step))
            self._begin()
        result = self.hands.result(self._tasks[micro_batch], "forward")
        fold(self.whole.model, result)
        relu, activation = bool(result.values.get("relu")), self._tensor(result)
        if self.whole.cut.guard.returning is not None:
            self._sent[micro_batch] = activation
        return self.whole.cut.leave(activation, micro_batch, self._rows(micro_batch), ends=lambda _: relu)

    def backward(self, micro_batch: MicroBatch, gradient: Payload) -> None:
        """Hand on a gradient; what comes of it is awaited by the update."""
        expected = MicroBatch(self._updates, len(self._learning))
        if micro_batch not in self._tasks or micro_batch != expected:
            raise LocalProtocolError(f"backward {micro_batch} where {expected} is due")
        rows = self._rows(micro_batch)
        (arrived,) = self.whole.cut.arrive_each(gradient, micro_batch, rows)
        sent = self._sent.pop(micro_batch, None)
        flight = InFlight([] if sent is None else [sent], 0, None, rows)
        tensor = self.whole.returned(micro_batch, flight, arrived)
        self._learning[micro_batch] = tensor is not None
        if tensor is not None:
            self.hands.go_on(self._tasks[micro_batch], "backward", payloads({"": tensor}))

    def update(self) -> None:
        """One optimizer step with the gradients since the last one, added in the order of the micro-batches."""
        for micro_batch, learns in self._learning.items():
            task = self._tasks.pop(micro_batch)
            if learns:
                learn(self.whole.model, self.hands.result(task, "backward"))
            self.hands.end(task)
        self._learning.clear()
        self.whole.update()
        self._updates += 1
        equip(self.hands, self.whole)
        self._begin()

    def predict(self, micro_batch: MicroBatch) -> Payload:
        """Return the activation of held-out rows; all of them are begun at once."""
        if micro_batch not in self._held_out:
            parts = [MicroBatch(micro_batch.step, index) for index in range(self.whole.batches.holdout_parts)]
            with evaluating(self.hands, self.whole):
                self._held_out = {part: self.hands.begin("predict", part) for part in parts}
        task = self._held_out.pop(micro_batch)
        tensor = self._tensor(self.hands.result(task, "predict"))
        self.hands.end(task)
        positions = self.whole.batches.holdout_part(micro_batch.index)
        rows = CutRows.of(self.whole.table.row_keys, positions, held_out=True)
        return self.whole.cut.leave(tensor, micro_batch, rows)

    def state(self) -> State:
        """As without hands."""
        if self._tasks:
            raise LocalProtocolError(
                f"a checkpoint with {counted(len(self._tasks), 'micro-batch', 'micro-batches')} in flight"
            )
        return self.whole.state()

    def load(self, state: State) -> None:
        """Become what `state` described; whatever is under way is forgotten."""
        self.hands.clear()
        self.whole.load(state)
        self._updates = state.values["updates"]
        for mutable in (self._ahead, self._tasks, self._learning, self._held_out, self._sent):
            mutable.clear()
        equip(self.hands, self.whole)

    def weights(self) -> Weights:
        """Return the base model's own state_dict."""
        return self.whole.weights()

    def _begin(self) -> None:
        """Begin the forwards that the present weights are for."""
        for micro_batch in self._ahead.popleft() if self._ahead else ():
            self._tasks[micro_batch] = self.hands.begin("forward", micro_batch)

    def _rows(self, micro_batch: MicroBatch) -> CutRows:
        return CutRows.of(self.whole.table.row_keys, self.whole.batches.rows(micro_batch))

    def _tensor(self, result: Result) -> Tensor:
        return from_payload(result.tensors[""], self.whole.model.device)


@dataclass(slots=True)
class SpreadFuseStage:
    """ports.FuseStage over hands. Mutable: it knows which tasks are under way.

    `answer` sends the gradients of a micro-batch: as soon as they are here, and in the order of the micro-batches.
    """

    whole: TorchFuseStage
    hands: Hands
    answer: Answer
    _tasks: dict[MicroBatch, int] = field(default_factory=dict)  # of the step
    _unanswered: deque[MicroBatch] = field(default_factory=deque)
    _held_out: dict[MicroBatch, int] = field(default_factory=dict)

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Begin the own base model's forwards of the whole step, while others' activations are on their way."""
        if self.whole.own is not None and micro_batch not in self._tasks:
            for index in range(self.whole.batches.parts(micro_batch.step)):
                part = MicroBatch(micro_batch.step, index)
                self._tasks[part] = self.hands.begin("prepare", part)

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        """Hand activations on, and return no gradients: `answer` is given those."""
        arrived = self._arrived(activations, micro_batch, self._rows(micro_batch))
        if micro_batch in self._tasks:
            self.hands.go_on(self._tasks[micro_batch], "fuse", arrived)
        else:
            self._tasks[micro_batch] = self.hands.begin("fuse", micro_batch, arrived)
        self.hands.go_on(self._tasks[micro_batch], "learn")
        self._unanswered.append(micro_batch)
        self.deliver()
        return {}

    def deliver(self) -> None:
        """Answer what can be answered in its turn; called whenever a result may have come."""
        while self._unanswered and self.hands.is_done(self._tasks[self._unanswered[0]], "fuse"):
            self._deliver_next()

    def _deliver_next(self) -> None:
        """Answer the first micro-batch that is not answered, when its gradients are here."""
        micro_batch = self._unanswered[0]
        result = self.hands.result(self._tasks[micro_batch], "fuse")
        self._unanswered.popleft()
        rows, device = self._rows(micro_batch), self.whole.model.device
        found = {party: from_payload(payload, device) for party, payload in result.tensors.items()}
        cuts = self.whole.cuts.items()
        self.answer(micro_batch, {party: cut.leave_each([found.get(party)], micro_batch, rows) for party, cut in cuts})

    def update(self) -> float:
        """One optimizer step of fuse and own base, when all gradients are given and all are learned from."""
        while self._unanswered:
            self._deliver_next()
        own = self.whole.own
        for micro_batch, task in self._tasks.items():
            if own is not None:
                fold(own.model, self.hands.result(task, "prepare"))
            positions = self.whole.batches.rows(micro_batch)
            self.whole.note(micro_batch, positions, float(self.hands.result(task, "fuse").values["loss"]))
            learned = self.hands.result(task, "learn")
            if (output := learned.tensors.get(f"fuse/{OUTPUT}")) is not None:
                self.whole.trained.add(from_payload(output), positions)
            for model in models_of(self.whole):
                learn(model, learned, f"{model.part}/")
            fold(self.whole.model, learned, "fuse/")
            self.hands.end(task)
        self._tasks.clear()
        loss = self.whole.update()
        equip(self.hands, self.whole)
        return loss

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        """Hand held-out rows on."""
        arrived = self._arrived(activations, micro_batch, self.whole.passes.held_out(micro_batch))
        with evaluating(self.hands, self.whole):
            self._held_out[micro_batch] = self.hands.begin("evaluate", micro_batch, arrived)

    def late_gradients(self) -> Sequence[tuple[MicroBatch, Mapping[str, Payload]]]:
        """Return nothing: `answer` is given all gradients."""
        return ()

    def training_metrics(self) -> Mapping[str, float | None] | None:
        """Return the metrics of the epoch's training passes."""
        return self.whole.training_metrics()

    def evaluation_tables(self) -> Mapping[str, list[list[float]]] | None:
        """Return what a person looks at of the last evaluation."""
        return self.whole.evaluation_tables()

    def _arrived(self, activations: Mapping[str, Payload], micro_batch: MicroBatch, rows: CutRows) -> Tensors:
        arrived = self.whole.arrived(activations, micro_batch, rows)
        return payloads({party: tensor for party, ((tensor,), _) in arrived.items()})

    def metrics(self) -> Mapping[str, float | None]:
        """Return loss and metrics over all rows evaluated since the last call."""
        for micro_batch, task in self._held_out.items():
            result = self.hands.result(task, "evaluate")
            empty = self.whole.objective.labels.new_empty(0)
            output = from_payload(result.tensors[""]) if result.tensors else empty
            self.whole.scoring.keep(micro_batch.index, float(result.values["loss"]), output)
            self.hands.end(task)
        self._held_out.clear()
        return self.whole.metrics()

    def state(self) -> State:
        """As without hands."""
        return self.whole.state()

    def load(self, state: State) -> None:
        """Become what `state` described; whatever is under way is forgotten."""
        self.hands.clear()
        self.whole.load(state)
        for mutable in (self._tasks, self._unanswered, self._held_out):
            mutable.clear()
        equip(self.hands, self.whole)

    def weights(self) -> Weights:
        """Return the state_dict of the fuse model, and of the own base model if there is one."""
        return self.whole.weights()

    def _rows(self, micro_batch: MicroBatch) -> CutRows:
        return CutRows.of(self.whole.table.row_keys, self.whole.batches.rows(micro_batch))


def equip(hands: Hands, stage: TorchBaseStage | TorchFuseStage) -> None:
    """Give hands the weights as they are now."""
    shared = {f"{m.part}/{name}": tensor for m in models_of(stage) for name, tensor in m.shared().items()}
    hands.equip(payloads(shared))


@contextmanager
def evaluating(hands: Hands, stage: TorchBaseStage | TorchFuseStage) -> Iterator[None]:
    """Let what begins in here be computed with the weights to evaluate, where an average is kept of them."""
    models = [model for model in models_of(stage) if model.learning is not None and model.learning.average is not None]
    if not models:
        yield
        return
    with ExitStack() as averaged:
        for model in models:
            averaged.enter_context(model.averaged())
        equip(hands, stage)
    yield
    equip(hands, stage)


def fold(model: Model, result: Result, prefix: str = "") -> None:
    """Take what a forward pass elsewhere saw into the running averages."""
    names = model.statistics.buffers()
    seen = {n: result.tensors[prefix + n] for n in names if prefix + n in result.tensors}
    model.statistics.fold({name: from_payload(payload, model.device) for name, payload in seen.items()})


def learn(model: Model, result: Result, prefix: str = "") -> None:
    """Add the gradients of a micro-batch that was computed elsewhere."""
    names = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    found = {n: from_payload(result.tensors[prefix + n], model.device) for n in names if prefix + n in result.tensors}
    model.learn(found)
