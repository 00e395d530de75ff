"""One optimizer step as a party file asks for it: the step's learning rates, clipping, the optimizer, the average."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sl_queue.compute.eager import prepare_step, step
from sl_queue.compute.optimizer_state import BuiltOptimizer
from sl_queue.compute.spec import ModelSpec
from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.errors import CheckpointError, ComputeError, JobError
from sl_queue.ports import UserCode
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.rates import Schedule

Rate = Callable[[float, int, int], float]  # (a group's own learning rate, step, steps) -> the step's


@dataclass(slots=True)
class Average:
    """The exponential moving average of a module's parameters, as torch's AveragedModel keeps it.

    Mutable: each step changes it. The first step's weights begin it; buffers are the module's own.
    """

    module: nn.Module
    decay: float
    tensors: dict[str, Tensor] = field(repr=False)
    steps: int = 0

    @classmethod
    def of(cls, module: nn.Module, decay: float) -> "Average":
        """Return the average before the first step: the initial weights."""
        return cls(module, decay, {name: p.detach().clone() for name, p in module.named_parameters()})

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's weights into the average."""
        now = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        if not self.steps:
            for name, tensor in self.tensors.items():
                tensor.copy_(now[name])
        else:
            average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
            for dtype in {tensor.dtype for tensor in self.tensors.values()}:
                names = [name for name, tensor in self.tensors.items() if tensor.dtype == dtype]
                average([self.tensors[n] for n in names], [now[n] for n in names], self.steps)
        self.steps += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the body with the average in the place of the module's weights; without a copy."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Let the module's weights and their average change places."""
        for name, parameter in self.module.named_parameters():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data

    def state(self, prefix: str) -> State:
        """Copy the average."""
        return State({f"{prefix}/{n}": to_payload(t) for n, t in self.tensors.items()}, {prefix: self.steps})

    def load(self, prefix: str, state: State) -> None:
        """Become what `state` returned."""
        if prefix not in state.values:
            raise CheckpointError(f"the checkpoint holds no average of the weights ({prefix}), and ema asks for one")
        self.steps = state.values[prefix]
        for name, tensor in self.tensors.items():
            tensor.copy_(from_payload(state.tensors[f"{prefix}/{name}"]))


@dataclass(frozen=True, slots=True)
class Learning:
    """A module's optimizer with all that surrounds its step."""

    module: nn.Module = field(repr=False)
    built: BuiltOptimizer
    part: str
    steps: int  # of the whole job
    rate: Rate | None
    rates: tuple[float, ...]  # of each group, as it was built
    clip_norm: float | None
    clip_value: float | None
    average: Average | None

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        module: nn.Module,
        part: str,
        table: ModelSpec,
        steps: int,
        where: str,
        code: UserCode,
    ) -> "Learning":
        """Read a party file's table. Raises JobError for a schedule that cannot be used."""
        rate = _rate(table.schedule, steps, where, code)
        rates: tuple[float, ...] = ()
        if rate is not None:
            without = [n for n, group in enumerate(optimizer.param_groups) if "lr" not in group]
            if without:
                raise JobError(f"{where} schedule has no use: {type(optimizer).__name__} has no lr")
            rates = tuple(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        built = BuiltOptimizer.of(optimizer, module, f"{part}/optimizer", where)
        prepare_step(optimizer)
        average = None if table.ema is None else Average.of(module, table.ema)
        return cls(module, built, part, steps, rate, rates, table.clip_norm, table.clip_value, average)

    def step(self, number: int) -> None:
        """Apply the gradients; `number` counts optimizer steps from 0."""
        optimizer = self.built.optimizer
        if self.rate is not None:
            for group, base in zip(optimizer.param_groups, self.rates, strict=True):
                self._set(group, self._checked(self.rate(base, number, self.steps), number))
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.module.parameters(), self.clip_value)
        step(optimizer)
        if number == 0:
            self.built.require_savable()
        if self.average is not None:
            self.average.update()

    def forget_gradients(self) -> None:
        """Do what the optimizer's `zero_grad` does; torch's own takes 50 us for profiler and compiler."""
        if self._keeps_gradients:
            self.built.optimizer.zero_grad()
            return
        for parameter in self._parameters():
            parameter.grad = None

    @property
    def _keeps_gradients(self) -> bool:
        """Tell whether the optimizer has a `zero_grad` of its own, which may leave gradients for the next step."""
        return getattr(self.built.optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.built.optimizer.param_groups:
            yield from group["params"]

    def _checked(self, rate: Any, number: int) -> float:
        if not math.isfinite(rate) or rate < 0:
            raise ComputeError(f"{self.built.where} schedule gives a learning rate of {rate} for step {number}")
        return float(rate)

    def _set(self, group: dict[str, Any], rate: float) -> None:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run the body with the weights to evaluate and to give away in the module."""
        if self.average is None:
            yield
            return
        with self.average.swapped_in():
            yield

    def finish(self) -> None:
        """Let the module have the weights to give away, for good: nothing is trained after it."""
        if self.average is not None:
            self.average.swap()

    def state(self) -> State:
        """Copy all that a step changes, besides the module."""
        states = [self.built.state()]
        if self._keeps_gradients:
            of = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
            states.append(State({f"{self.part}/gradient/{name}": to_payload(grad) for name, grad in of.items()}, {}))
        if self.average is not None:
            states.append(self.average.state(f"{self.part}/average"))
        return State.merged(states)

    def load(self, state: State) -> None:
        """Become what `state` returned."""
        self.built.load(state)
        learning = set(self._parameters())
        for name, parameter in self.module.named_parameters():
            if parameter in learning:
                kept = state.tensors.get(f"{self.part}/gradient/{name}")
                parameter.grad = None if kept is None else from_payload(kept, parameter.device)
        if self.average is not None:
            self.average.load(f"{self.part}/average", state)


def _rate(schedule: Any, steps: int, where: str, code: UserCode) -> Rate | None:
    if schedule is None:
        return None
    if isinstance(schedule, Mapping) or (isinstance(schedule, str) and ":" not in schedule):
        return Schedule.of(schedule if isinstance(schedule, Mapping) else {"name": schedule}).rate
    factor = code.load(schedule) if isinstance(schedule, str) else schedule
    try:
        tried = float(factor(0, steps))
    except Exception as error:
        raise JobError(f"{where} schedule fails on (0, {steps}): {type(error).__name__}: {error}") from error
    if not math.isfinite(tried) or tried < 0:
        raise JobError(f"{where} schedule gives {tried:g} for step 0 of {steps}; it must give a factor of at least 0")
    return partial(_scaled, factor, where)


def _scaled(factor: Callable[[int, int], float], where: str, base: float, step: int, steps: int) -> float:
    try:
        return base * factor(step, steps)
    except Exception as error:
        raise ComputeError(f"{where} schedule fails on ({step}, {steps}): {type(error).__name__}: {error}") from error
