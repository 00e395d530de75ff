"""One part of the model, base or fuse, with its optimizer: built as a party file says, trained, saved, given away."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from sl_queue.compute.building import (
    LAST,
    Sample,
    build_module,
    device_of,
    dtype_of,
    table_of,
    tensors_of,
)
from sl_queue.compute.code_digest import named
from sl_queue.compute.learning import Learning
from sl_queue.compute.modules.demands import (
    leaves_beyond,
    leaves_of,
    require_known,
    require_savable,
    require_within_reach,
)
from sl_queue.compute.modules.graph import runs_only_torch, steps_only_torch
from sl_queue.compute.modules.handover import Take
from sl_queue.compute.modules.shared_values import SharedValues
from sl_queue.compute.modules.snapshots import left_no_trace
from sl_queue.compute.modules.state import Built, begin_training, in_evaluation
from sl_queue.compute.optimizers import build_optimizer
from sl_queue.compute.precision import LossScale, scaling_of
from sl_queue.compute.running import Runnable, blame, tensors_in
from sl_queue.compute.saved_module import SavedModule
from sl_queue.compute.seeds import key, seeded
from sl_queue.compute.spec import ComputeSpec, Part
from sl_queue.compute.threads import require_same_bits
from sl_queue.cut.crossing import CROSSING_DTYPES
from sl_queue.cut.tensors import Inputs
from sl_queue.errors import ComputeError, JobError, ShapeError
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.messages import MicroBatch, Payload

log = logging.getLogger("sl_queue")

IN_EVALUATION = (
    "%s model = %r was built in evaluation mode, and is trained in it: no dropout, and batch statistics as they are; "
    "call .train() on it before, unless that is meant"
)


@dataclass(slots=True, kw_only=True)
class Model(Runnable):
    """A module with its optimizer. Mutable: training is what changes it."""

    learning: Learning | None  # None without parameters
    saved: SavedModule = field(repr=False)  # as checkpoints hold it
    known: bool = False  # whether all parameters were the optimizer's in the first step
    shares_all: bool = False  # what never changes, too: hands do not have it
    scaling: LossScale | None = None  # of its gradients, in fp16

    @property
    def optimizer(self) -> Optimizer | None:
        """Return what changes its parameters; None if it has none."""
        return None if self.learning is None else self.learning.built.optimizer

    @property
    def loss_scale(self) -> float:
        """Return the factor of all gradients of this step."""
        return 1.0 if self.scaling is None else self.scaling.scale

    @property
    def where(self) -> str:
        """Return how errors about the model begin."""
        return f"party {self.party!r}: [{self.part}] model = {self.name!r}"

    @classmethod
    def build(cls, spec: ComputeSpec, part: Part, sample: Sample, take: Take | None = None, steps: int = 1) -> "Model":
        """Return the model with its initial weights, the same wherever and however often it is built.

        `steps` are those of the whole job, on which schedules depend.

        `take` says how to come by a module that is given in code; without it, as a copy.
        """
        table = table_of(spec, part)
        device = device_of(spec)
        require_same_bits(device)
        module = build_module(spec, part, sample, take)
        where, name = f"party {spec.party!r}: [{part}]", named(table.model)
        require_savable(module, f"{where} model = {name!r}")
        module.to(device)
        with seeded(key(spec.layers.seed, spec.party, f"{part} optimizer"), device):
            optimizer = build_optimizer(module, table.optimizer, f"{where} optimizer", table.groups, spec.code)
        if optimizer is not None and not module.training:
            log.warning(IN_EVALUATION, where, name)
        begin_training(module, f"{where} model = {name!r}")
        built = Built.of(module)
        learning = None
        if optimizer is not None:
            learning = Learning.of(optimizer, module, part, table, steps, where, spec.code)
        layers = spec.layers
        return cls(
            party=spec.party,
            part=part,
            name=name,
            module=module,
            learning=learning,
            device=device,
            dtype=dtype_of(module),
            seed=layers.seed,
            saved=SavedModule(spec.party, part, name, module, built, SharedValues.of(module)),
            outputs=layers.outputs.get(spec.party) if part == "base" else None,
            precision=layers.precision,
            scaling=scaling_of(layers.precision),
            secret=spec.secret,
        )

    def differentiating(
        self, roots: Sequence[Tensor], hooks_before: int, micro_batch: MicroBatch
    ) -> AbstractContextManager[None]:
        """Open the scope of a backward pass from `roots`: a keyed one if anything in it may draw random numbers.

        `hooks_before`: `hooks_made()` before the forward pass. torch's own code draws nothing; with no lock around it,
        parties that are threads of one process compute at the same time.
        """
        quiet = all(runs_only_torch(root, hooks_before) for root in roots)
        return nullcontext() if quiet else self.drawing("backward", micro_batch)

    def accepted(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of activations that the module may be given: its own, or narrower ones."""
        if not any(True for _ in self.module.parameters()):
            return CROSSING_DTYPES
        return (self.dtype, *(dtype for dtype in CROSSING_DTYPES if dtype.itemsize < self.dtype.itemsize))

    def try_out(self, inputs: Inputs, *, ahead: bool = False, graph: bool = False) -> Tensor:
        """Return the output in evaluation mode, with its graph if asked for, leaving no trace; ShapeError if it fails.

        Raises JobError for what a run could not train or save; with `ahead` also for a module that does not run on
        other weights than its own.
        """
        try:
            with left_no_trace(self.module):
                output = self._trial(inputs, None)
                again = partial(self._trial, inputs, None)
                self._require_known(leaves_beyond(output, tensors_in(inputs)), again)
                self.saved.tell_of_lost()
        except ComputeError as error:
            raise ShapeError(f"{error}; check {self.name} and its args") from error
        if ahead:
            self._require_within_reach(inputs)
        return output if graph else output.detach()

    def _trial(self, inputs: Inputs, weights: Mapping[str, Tensor] | None) -> Tensor:
        """Return the output in evaluation mode, with its graph."""
        with in_evaluation(self.module), torch.enable_grad(), self.drawing("trial", MicroBatch(0, 0)):
            return self.run(inputs, f"party {self.party!r}", weights)

    def _require_within_reach(self, inputs: Inputs) -> None:
        weights = {name: p.detach().clone().requires_grad_() for name, p in self.module.named_parameters()}
        try:
            with left_no_trace(self.module):
                reached = leaves_of(self._trial(inputs, weights))
        except ComputeError as error:
            raise JobError(f"{self.where} does not run on other weights, as staleness needs: {error}") from error
        require_within_reach(self.module, reached, self.where)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Enter evaluation mode without gradients, with the average of the weights where one is kept.

        Afterwards every submodule is in the mode in which it was.
        """
        with self.averaged(), in_evaluation(self.module):  # a layer may compute of its weights as it enters
            yield

    def averaged(self) -> AbstractContextManager[None]:
        """Open a scope in which the module has the weights to evaluate and to give away."""
        return nullcontext() if self.learning is None else self.learning.averaged()

    def _require_known(self, reached: Sequence[Tensor] = (), again: Callable[[], Tensor] | None = None) -> None:
        """Raise JobError if the module has parameters that the optimizer was not given, or `reached` others."""
        require_known(self.module, self.optimizer, self.saved.built, self.where, reached, again)

    def shared(self) -> dict[str, Tensor]:
        """Return what changes from step to step and a forward pass reads: parameters that train, running averages."""
        if self.shares_all:
            return {name: tensor.detach() for name, tensor in tensors_of(self.module)}
        learning = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        return learning | self.statistics.buffers()

    def learn(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of one micro-batch to those of the parameters, as its backward pass would have done here.

        The tensors are kept, and must be nobody else's.
        """
        for name, parameter in self.module.named_parameters():
            gradient = gradients.get(name)
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    def step(self, number: int) -> None:
        """Apply and forget the gradients of the parameters; `number` counts the optimizer steps from 0."""
        if not self.known:
            self._require_known()
            self.known = True
        if self.scaling is not None and not self.scaling.finish(self.module.parameters(), self.where):
            return  # an overflow at the label holder: the step is left out
        if self.learning is not None:
            quiet = steps_only_torch(self.learning.built.optimizer)
            scope = nullcontext() if quiet else self.drawing("update", MicroBatch(number, 0))
            with blame(f"party {self.party!r}: the optimizer of {self.name} failed"), scope:
                self.learning.step(number)
                self.learning.forget_gradients()

    def state(self) -> State:
        """Return a copy of parameters, of all buffers, the ones that a state_dict leaves out too, and of the optimizer.

        And of what else differs from the module as it was built: modes, what is frozen, plain attributes.
        """
        self._require_known()
        states = [self.saved.state()]
        if self.learning is not None:
            states.append(self.learning.state())
        if self.scaling is not None:
            states.append(self.scaling.state(f"{self.part}/scale"))
        return State.merged(states)

    def load(self, state: State) -> None:
        """Become what `state` returned. Raises CheckpointError if the model is another one."""
        self.saved.load(state)
        if self.scaling is not None:
            self.scaling.load(f"{self.part}/scale", state)
        if self.learning is not None:
            self.learning.load(state)

    def weights(self) -> dict[str, dict[str, Payload]]:
        """Return the module's own state_dict by the name of its part.

        Where an average is kept, that is it, and the weights of the last step are there as the part's "-last".
        """
        with self.averaged():
            found: dict[str, dict[str, Payload]] = {self.part: self.saved.state_dict()}
        if self.learning is not None and self.learning.average is not None:
            found[f"{self.part}{LAST}"] = self.saved.state_dict()
        return found
