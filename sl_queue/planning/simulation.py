"""Simulation of a step: the pipeline's own actions, played with measured costs instead of models. Pure.

Each worker does its actions in order; a message passes its sender's driver, the broker, its party's link and its
receiver's driver: drivers and links take one after the other, the broker one of each party and direction. Where all
parties share one machine's cores, what is computed or handled at the same time is slowed down evenly, also by what a
message costs beside its way, such as its confirm, and a little by who computes on another core. What a worker does
after it has waited takes longer, the longer it has waited: its caches are cold, and its core asleep.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from sl_queue.planning.costs import COLD_S, LABEL, Affine, Costs
from sl_queue.protocol.messages import Kind, MicroBatch
from sl_queue.protocol.schedule.actions import EFFECTS, Action, Begin, Commit, Predict, Score, Update, Work
from sl_queue.protocol.schedule.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Prediction:
    """Outcome of a simulated run."""

    step_s: float
    busy: Mapping[str, float]  # by party, LABEL for the label holder: share of the time

    @property
    def bubble(self) -> float:
        """The share of the time in which even the busiest party waits."""
        return 1.0 - max(self.busy.values())


Message = tuple[str, Kind | None, MicroBatch]  # feature party, kind (None: a checkpoint on its way to disk), which


@dataclass(frozen=True, slots=True)
class _Work:
    seconds: float


@dataclass(frozen=True, slots=True)
class _Await:
    message: Message


@dataclass(frozen=True, slots=True)
class _Send:
    message: Message
    size: float  # bytes


@dataclass(frozen=True, slots=True)
class _Save:
    done: Message  # awaited as a message is


_Script = Generator["_Work | _Await | _Send | _Save", None, None]


def simulate(pipeline: Pipeline, costs: Costs, warm_up: int = 0) -> Prediction:
    """Play the whole of `pipeline`; steps before `warm_up` do not count."""
    return _Simulation(pipeline, costs).run(warm_up)


class _Simulation:
    """One run. Mutable: its clock moves on."""

    def __init__(self, pipeline: Pipeline, costs: Costs) -> None:
        self._pipeline, self._costs = pipeline, costs
        self._now = 0.0
        self._numbers = itertools.count()
        self._computing: dict[str, float] = {}  # seconds of work left, by worker or line
        self._due: list[tuple[float, int, _Send]] = []  # messages under way
        self._arrived: set[Message] = set()
        self._awaited: dict[Message, tuple[str, float]] = {}  # by whom, since when
        self._cold_factor: dict[str, float] = {}
        self._lines: dict[str, deque[tuple[float, Callable[[], None]]]] = {}  # seconds of work, and what follows it
        self._link_free: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._updates: list[tuple[float, dict[str, float]]] = []
        self._work = {party: _feature_work(costs, party) for party in costs.features} | {LABEL: _label_work(costs)}
        self._scripts: dict[str, _Script] = {LABEL: self._script(LABEL, pipeline.label_actions(0))}
        self._scripts |= {party: self._script(party, pipeline.feature_actions(0)) for party in costs.features}

    def run(self, warm_up: int) -> Prediction:
        for worker in self._scripts:
            self._busy[worker] = 0.0
            self._advance(worker)
        while self._computing or self._due:
            self._to_next_event()
        (began, busy_then), (ended, busy) = self._updates[warm_up], self._updates[-1]
        steps = len(self._updates) - 1 - warm_up
        spent = ended - began
        return Prediction(spent / steps, {w: min(1.0, (busy[w] - busy_then[w]) / spent) for w in self._scripts})

    # The workers ------------------------------------------------------------------------------------------------

    def _script(self, worker: str, actions: Iterable[Action]) -> _Script:
        """Play the effects of a worker's actions, as the loops have them."""
        peers = tuple(self._costs.features) if worker == LABEL else (worker,)
        saving: _Save | None = None
        for action in actions:
            effect = EFFECTS[type(action)]
            if isinstance(action, Commit):
                saving = _Save((worker, None, MicroBatch(action.step, 0)))
                yield saving
                continue
            micro_batch, rows = self._micro_batch(action)
            for peer in peers if effect.awaits is not None else ():
                yield _Await((peer, effect.awaits, micro_batch))
                if saving is not None:
                    yield _Await(saving.done)
                    saving = None
            if effect.work is not None:
                yield _Work(self._work[worker][effect.work](rows))
            for peer in peers if effect.sends is not None else ():
                yield _Send((peer, effect.sends, micro_batch), self._size(peer, effect.sends, rows))
            if worker == LABEL and isinstance(action, Update):
                self._updates.append((self._now, dict(self._busy)))

    def _micro_batch(self, action: Action) -> tuple[MicroBatch, int]:
        """Return the key of an action's messages, and its rows."""
        match action:
            case Begin() | Update() | Commit():
                return MicroBatch(0, 0), 0
            case Predict(micro_batch) | Score(micro_batch):
                return micro_batch, self._pipeline.batches.holdout_sizes[micro_batch.index]
            case _:
                return action.micro_batch, self._pipeline.batches.sizes(action.micro_batch.step)[
                    action.micro_batch.index
                ]

    def _size(self, party: str, kind: Kind | None, rows: int) -> float:
        costs = self._costs.features[party]
        return (costs.gradient_bytes if kind is Kind.GRADIENT else costs.activation_bytes)(rows)

    # The clock --------------------------------------------------------------------------------------------------

    def _advance(self, worker: str) -> None:
        """Let a worker go on until it computes or waits."""
        for wish in self._scripts[worker]:
            match wish:
                case _Work(seconds):
                    self._computing[worker] = seconds * self._cold_factor.get(worker, 1.0)
                    return
                case _Await(message):
                    if message in self._arrived:
                        self._arrived.discard(message)
                        self._cold_factor[worker] = 1.0
                        continue
                    self._awaited[message] = worker, self._now
                    return
                case _Save(done):
                    self._queue(f"disk of {worker}", self._costs.commit_s, partial(self._deliver, done))
                case _Send():
                    self._leave(worker, wish)
                    if self._costs.cores is not None:
                        self._computing[f"overhead {next(self._numbers)}"] = self._costs.overhead(wish.size)

    def _leave(self, worker: str, sent: _Send) -> None:
        """Send through the sender's driver, then through the broker, then over the link."""
        party, kind, _ = sent.message

        def to_broker() -> None:
            self._queue(f"{kind} of {party}", self._costs.handling(sent.size), lambda: self._carry(sent))

        self._queue(f"driver of {worker}", self._costs.driver(sent.size), to_broker)

    def _queue(self, line: str, seconds: float, then: Callable[[], None]) -> None:
        """Do work after what waits in that line already."""
        waiting = self._lines.setdefault(line, deque())
        waiting.append((seconds, then))
        if len(waiting) == 1:
            self._computing[line] = seconds

    def _to_next_event(self) -> None:
        """Advance to the moment at which the next work ends or the next message arrives."""
        rate = self._rate()
        first = min(self._computing, key=self._computing.__getitem__, default=None)
        ends = self._now + self._computing[first] / rate if first is not None else float("inf")
        if self._due and self._due[0][0] <= ends:
            moment, _, sent = heapq.heappop(self._due)
            self._pass(moment, rate)
            party, kind, _ = sent.message
            receiver = party if kind is Kind.GRADIENT else LABEL
            self._queue(f"driver of {receiver}", self._costs.driver(sent.size), lambda: self._deliver(sent.message))
            return
        assert first is not None
        self._pass(ends, rate)
        del self._computing[first]
        if first in self._scripts:
            self._advance(first)
        elif first in self._lines:
            self._handled(first)

    def _rate(self) -> float:
        """Return the speed of everyone who computes now, as a share of that of one alone."""
        cores, computing = self._costs.cores, len(self._computing)
        if cores is None or computing <= 1:
            return 1.0
        others = min(computing, cores) - 1
        return min(1.0, cores / computing) / (1.0 + (self._costs.contention - 1.0) * others)

    def _pass(self, moment: float, rate: float) -> None:
        passed, self._now = moment - self._now, moment
        for name in self._computing:
            self._computing[name] = max(0.0, self._computing[name] - passed * rate)
            if name in self._busy:
                self._busy[name] += passed

    def _handled(self, line: str) -> None:
        """Go on with what follows, and with the next in the line."""
        waiting = self._lines[line]
        _, then = waiting.popleft()
        if waiting:
            self._computing[line] = waiting[0][0]
        then()

    def _carry(self, sent: _Send) -> None:
        """Carry over the link, after what is on it already."""
        party, kind, _ = sent.message
        line = f"{kind} of {party}"
        free = max(self._now, self._link_free.get(line, 0.0))
        if self._costs.bytes_per_s is not None:
            free += sent.size / self._costs.bytes_per_s
        self._link_free[line] = free
        heapq.heappush(self._due, (free + self._costs.rtt_s / 2, next(self._numbers), sent))

    def _deliver(self, message: Message) -> None:
        if message not in self._awaited:
            self._arrived.add(message)
            return
        worker, since = self._awaited.pop(message)
        self._cold_factor[worker] = 1.0 + (self._costs.cold_factor - 1.0) * min(1.0, (self._now - since) / COLD_S)
        self._advance(worker)


def _feature_work(costs: Costs, party: str) -> Mapping[Work, Affine]:
    """Return the seconds by the rows of an action; a forward in evaluation mode counts as one in training."""
    each = costs.features[party]
    return {
        "prepare": each.prepare,
        "forward": each.forward,
        "backward": each.backward,
        "predict": each.forward,
        "update": Affine(each.update_s),
    }


def _label_work(costs: Costs) -> Mapping[Work, Affine]:
    """Return the seconds by the rows of an action; an evaluation counts as a step without its update."""
    return {
        "prepare": costs.fuse_prepare,
        "fuse": costs.fuse,
        "score": costs.fuse,
        "update": Affine(costs.fuse_update_s),
    }
