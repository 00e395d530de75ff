"""Comparison of split with joined training: the first steps done both ways, and their weights compared."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sl_queue.checking.dry_run import Readable
from sl_queue.checking.findings import Check
from sl_queue.compute.equality import (
    STEPS,
    Weights,
    bounded,
    first_joined_weights,
    largest_difference,
    split_weights,
)
from sl_queue.compute.spec import ComputeSpec
from sl_queue.config.job import Job
from sl_queue.config.resolve import layers_of
from sl_queue.errors import ComputeError
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from sl_queue.protocol.text import counted

SAME_WITHIN = 1e-6  # float32 rounding, where a kernel adds in another order
COMPARING_S = 20.0  # about as long the comparison with joined training may take, in steps that fit
COMPARED = 4  # times that the steps are done for it


def compare_with_joined(
    check: Check, job: Job, parties: Mapping[str, Readable], batches: Batches, seconds: float
) -> None:
    """Do the first steps split, again, and joined; `seconds` of computing for a micro-batch say how many there may be.

    What `staleness` and a narrower dtype on the wire do on purpose is left out at first, and reported apart.
    """
    step_s = seconds * batches.parts(0)
    steps = min(STEPS, batches.steps, max(1, int(COMPARING_S / COMPARED / max(step_s, 1e-9))))
    trial, exact = _Trial(parties, batches, steps), _exact(job)
    split = trial.split(exact)
    _require_repeatable(split, trial.split(exact), steps)
    difference = largest_difference(split, trial.joined(exact))
    said = f"{_counted(steps)} split and joined{_rows(batches)}"
    if difference == 0.0:
        check.ok(f"{said}: all weights are equal bit for bit")
    elif difference <= SAME_WITHIN:
        check.ok(f"{said}: the weights differ by at most {difference:.1e}, which is rounding")
    else:
        raise ComputeError(f"{said}: weights differ by up to {difference:.1e}; {_blamed(exact, trial)}")
    if exact != job:
        check.note(
            f"{_counted(steps)} as the job says (staleness = {job.pipeline.staleness}, [wire] dtype = "
            f"{job.wire.dtype!r}): the weights are up to {trial.difference(job):.1e} away from joined"
        )


@dataclass(frozen=True, slots=True)
class _Trial:
    """The first steps of all parties, to be done as one job or another says."""

    parties: Mapping[str, Readable]
    batches: Batches
    steps: int

    def split(self, job: Job) -> Weights:
        """Return the weights after these steps, split."""
        return split_weights(self._specs(job), self._tables, job.pipeline_of(self.batches), self.steps)

    def joined(self, job: Job) -> Weights:
        """Return the weights after these steps, joined."""
        return first_joined_weights(self._specs(job), self._tables, self.batches, self.steps)

    def difference(self, job: Job) -> float:
        """Return the largest difference between both."""
        return largest_difference(self.split(job), self.joined(job))

    @property
    def _tables(self) -> dict[str, Table]:
        return {name: party.table for name, party in self.parties.items()}

    def _specs(self, job: Job) -> list[ComputeSpec]:
        return [replace(party.compute, layers=layers_of(job)) for party in self.parties.values()]


def _exact(job: Job) -> Job:
    """Return the same job without the settings that make it differ from joined training."""
    wire = job.wire.model_copy(update={"dtype": "float32"})
    return job.model_copy(update={"wire": wire, "pipeline": job.pipeline.model_copy(update={"staleness": 0})})


def _require_repeatable(once: Weights, again: Weights, steps: int) -> None:
    difference = largest_difference(once, again)
    if not difference <= SAME_WITHIN:
        raise ComputeError(
            f"{_counted(steps)} done twice: weights differ by up to {difference:.1e}; a model, loss or optimizer whose "
            "result depends on more than its inputs, its weights and keyed random numbers (the system's randomness, "
            "time, state outside of the model) cannot be trained exactly, nor resumed"
        )


def _blamed(job: Job, trial: _Trial) -> str:
    """Return what makes the difference, as far as it can be seen."""
    if job.pipeline.depth > 1:
        lock_step = job.model_copy(update={"pipeline": job.pipeline.model_copy(update={"depth": 1})})
        if trial.difference(lock_step) <= SAME_WITHIN:
            return (
                f"with depth = 1 they are equal, with depth = {job.pipeline.depth} they are not: a forward pass "
                "changes what an earlier one's backward pass still needs, such as a buffer changed in place behind "
                "autograd's back (.data, .numpy()); assign it instead, or set depth = 1"
            )
    return (
        "a model or loss whose result depends on more than its inputs, its weights and keyed random numbers cannot be "
        "trained exactly"
    )


def _counted(steps: int) -> str:
    return "one step" if steps == 1 else f"{steps} steps"


def _rows(batches: Batches) -> str:
    few = bounded(batches)
    return "" if few is batches else f" (of {counted(few.batch_size, 'row', 'rows')})"
