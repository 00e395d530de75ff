"""From tensors to the output of a user's module: aggregated, called with keyed draws, blamed for what it raises."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from inspect import signature
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from sl_queue.compute.modules.demands import require_dense, require_number
from sl_queue.compute.modules.statistics import Statistics
from sl_queue.compute.precision import computing
from sl_queue.compute.seeds import key, seeded
from sl_queue.compute.spec import LayersSpec, Part, Precision
from sl_queue.cut.several import Outputs
from sl_queue.cut.tensors import Inputs, described
from sl_queue.errors import ComputeError, ShapeError, SlQueueError
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.text import counted, shortened


@dataclass(slots=True, kw_only=True)
class Runnable:
    """A module as it is run. Mutable: running it may change its buffers."""

    party: str
    part: Part
    name: str  # as the party file names it: "bank:BaseModel"
    module: nn.Module
    device: torch.device
    dtype: torch.dtype  # of its parameters: what floating inputs are cast to
    seed: int
    outputs: Outputs | None = None  # of a base model with several
    statistics: Statistics = field(default_factory=Statistics)  # where micro-batches are computed apart
    saw: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # by the newest forward pass, of those
    precision: Precision | None = None  # that it computes in; None: that of its parameters
    secret: bytes = field(default=b"", repr=False)  # of this party: without it whoever knows the job can draw the same

    def drawing(self, purpose: str, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Open a scope in which random numbers depend on seed, party, part, purpose, micro-batch and secret only."""
        return seeded(key(self.seed, self.party, f"{self.part} {purpose}", micro_batch, self.secret), self.device)

    def run(self, inputs: Inputs, where: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the module's output, with other `weights` in the place of its parameters if given."""
        return self.joined(self.run_with_penalty(inputs, where, weights)[0])

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs as they cross the cut: several lie side by side."""
        return outputs[0] if self.outputs is None else self.outputs.joined(outputs)

    def run_on(self, inputs: Inputs, rows: int, where: str) -> Tensor:
        """Return as `run` the output for so many rows. Raises ShapeError unless it has one for each."""
        output = self.run(inputs, where)
        if output.shape[:1] != (rows,):
            raise ShapeError(
                f"{where}: {self.name} returns {tuple(output.shape)} for {counted(rows, 'row', 'rows')}; its first "
                "axis must be the rows, also of a single one, whose axis squeeze() takes away and squeeze(-1) keeps"
            )
        return output

    def run_with_penalty(
        self, inputs: Inputs, where: str, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the module's outputs, mostly one, and a loss of its own if a base model returns one beside."""
        failed = blame(f"{where}: {self.name} failed on {described_inputs(inputs)}")
        with failed, computing(self.precision, self.device):
            if weights is not None and self.statistics.feeding:
                with self.statistics.apart(weights) as copies:
                    output = called(self.module, inputs, {**weights, **copies})
                self.saw = self.statistics.seen(copies, weights)
            else:
                output = called(self.module, inputs, weights)
        penalty = None
        if self.part == "base" and is_penalised(output, self.outputs):
            output, penalty = output
            require_number(penalty, f"{where}: the penalty of {self.name}")
        if self.outputs is not None:
            return self.outputs.listed(output, len(tensors_in(inputs)[0]), f"{where}: {self.name}"), penalty
        require_dense(output, f"{where}: {self.name}")
        if self.part == "fuse" and self.precision is not None:
            output = output.to(self.dtype)  # the loss and the metrics are computed in it
        return [output], penalty


def aggregated(tensors: Mapping[str, Sequence[Tensor]], layers: LayersSpec) -> list[Any] | Tensor:
    """Return the fuse model's input from the outputs of each party, mostly one, each (rows, *cut).

    They are taken in job order. `list` hands them over as they are, of several outputs by name a dict; `concat` joins
    them along the first axis after the rows; `sum` and `mean` need equal cuts. Sums are taken in job order, so that
    they are the same bits everywhere.
    """
    each: list[Any] = []
    for party in layers.fused:
        each += layers.outputs[party].given(tensors[party]) if party in layers.outputs else tensors[party]
    match layers.aggregation:
        case "list":
            return each
        case "concat":
            return torch.cat(each, dim=1)
        case "sum":
            total: Tensor = reduce(torch.add, each)
            return total
        case "mean":
            whole: Tensor = reduce(torch.add, each)
            return whole / len(each)
        case _:
            assert_never(layers.aggregation)


def called(module: nn.Module, inputs: Inputs, weights: Mapping[str, Tensor] | None = None) -> Any:
    """Call a module, with other `weights` if given; with keywords, where its forward has them for all of a dict."""
    inputs = _unshared(inputs)
    by_name = isinstance(inputs, dict) and inputs.keys() <= signature(module.forward).parameters.keys()
    args, kwargs = ((), dict(inputs)) if by_name and isinstance(inputs, dict) else ((inputs,), {})
    if weights is None:
        return module(*args, **kwargs)
    return torch.func.functional_call(module, dict(weights), args, kwargs)


def _unshared(inputs: Any) -> Any:
    """Return the same tensors in lists and dicts of the callee's own, out of which it may take them."""
    if isinstance(inputs, list):
        return [_unshared(each) for each in inputs]
    return {name: _unshared(each) for name, each in inputs.items()} if isinstance(inputs, dict) else inputs


def is_penalised(output: Any, outputs: Outputs | None) -> bool:
    """Tell whether a base model returns a penalty beside its activation; a list of two outputs is none."""
    if not isinstance(output, tuple) or len(output) != 2:
        return False
    return outputs is None or isinstance(output[0], list | tuple | dict)


def predicted(output: Tensor) -> Tensor:
    """Return a fuse model's output as predictions have it: on the CPU, in float64 if it is, else in float32."""
    return output.detach().to("cpu", torch.float64 if output.dtype == torch.float64 else torch.float32)


def tensors_in(inputs: Any) -> list[Tensor]:
    """List the tensors of a model's input, those of a fuse model that gets a dict of each party too."""
    if isinstance(inputs, Tensor):
        return [inputs]
    each = inputs.values() if isinstance(inputs, dict) else inputs
    return [tensor for one in each for tensor in tensors_in(one)]


def described_inputs(inputs: Any) -> str:
    """Return dtype and shape of each tensor of an input, and nothing of its numbers."""
    if isinstance(inputs, dict):
        return "{" + ", ".join(f"{name}: {described(tensor)}" for name, tensor in inputs.items()) + "}"
    return described(inputs) if isinstance(inputs, Tensor) else "[" + ", ".join(map(described_inputs, inputs)) + "]"


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move a model's input."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return [tensor.to(device) for tensor in inputs]


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn whatever a user's module, loss or optimizer raises in here into a ComputeError that begins with `what`.

    `sys.exit` too: it would end this worker with a code of the model's own, and nobody would tell the others. Not
    Ctrl-C, which is for the whole process.
    """
    try:
        yield
    except (SlQueueError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ComputeError(f"{what}: {type(error).__name__}: {shortened(str(error))}") from error
