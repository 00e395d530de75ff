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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from sl_queue.planning.costs import COLD_S, LABEL, Costs
from sl_queue.planning.playing import Await, Call, Compute, Give, Message, OverHands, Save, Script, Send
from sl_queue.protocol.messages import Kind, MicroBatch
from sl_queue.protocol.schedule.actions import (
    EFFECTS,
    Action,
    Begin,
    Commit,
    Fuse,
    Predict,
    Score,
    Update,
)
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


def simulate(
    pipeline: Pipeline, costs: Costs, warm_up: int = 0, hands: Mapping[str, int] = MappingProxyType({})
) -> Prediction:
    """Play the whole of `pipeline`; steps before `warm_up` do not count.

    `hands`: how many compute for a party, or for LABEL. What goes between them and their lead takes no time in here.
    """
    return _Simulation(pipeline, costs, hands).run(warm_up)


class _Simulation:
    """One run. Mutable: its clock moves on."""

    def __init__(self, pipeline: Pipeline, costs: Costs, hands: Mapping[str, int]) -> None:
        self._pipeline, self._costs, self._hands = pipeline, costs, hands
        self._now = 0.0
        self._numbers = itertools.count()
        self._computing: dict[str, float] = {}  # seconds of work left, by worker or line
        self._due: list[tuple[float, int, Send]] = []  # messages under way
        self._arrived: set[Message | Call] = set()
        self._awaited: dict[Message | Call, tuple[str, float]] = {}  # by whom, since when
        self._cold_factor: dict[str, float] = {}
        self._lines: dict[str, deque[tuple[float, Callable[[], None]]]] = {}  # seconds of work, and what follows it
        self._link_free: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._updates: list[tuple[float, dict[str, float]]] = []
        self._work = {worker: costs.work_of(worker) for worker in (LABEL, *costs.features)}
        self._scripts: dict[str, Script] = {LABEL: self._script(LABEL, pipeline.label_actions(0))}
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

    def _script(self, worker: str, actions: Iterable[Action]) -> Script:
        """Play the effects of a worker's actions, as the loops have them."""
        peers = tuple(self._costs.features) if worker == LABEL else (worker,)
        saving: Save | None = None
        led = OverHands(worker, self._pipeline, self._seconds, self._work[worker]["update"](0))
        for action in actions:
            effect = EFFECTS[type(action)]
            if isinstance(action, Commit):
                saving = Save((worker, None, MicroBatch(action.step, 0)))
                yield saving
                continue
            micro_batch, rows = self._micro_batch(action)
            for peer in peers if effect.awaits is not None else ():
                yield Await((peer, effect.awaits, micro_batch))
                if saving is not None:
                    yield Await(saving.done)
                    saving = None
            sends = () if effect.sends is None else tuple(self._sent(peer, effect.sends, micro_batch) for peer in peers)
            if worker in self._hands:
                yield from led.play(action, sends)
            elif effect.work is not None:
                yield Compute(self._work[worker][effect.work](rows))
            yield from () if isinstance(action, Fuse) and worker in self._hands else sends
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

    def _seconds(self, call: Call) -> float:
        worker, work, micro_batch = call
        batches = self._pipeline.batches
        sizes = batches.holdout_sizes if work in ("predict", "score") else batches.sizes(micro_batch.step)
        return self._work[worker][work](sizes[micro_batch.index])

    def _sent(self, party: str, kind: Kind, micro_batch: MicroBatch) -> Send:
        costs, batches = self._costs.features[party], self._pipeline.batches
        sizes = batches.holdout_sizes if kind is Kind.HOLDOUT else batches.sizes(micro_batch.step)
        size = costs.gradient_bytes if kind is Kind.GRADIENT else costs.activation_bytes
        return Send((party, kind, micro_batch), size(sizes[micro_batch.index]))

    # The clock --------------------------------------------------------------------------------------------------

    def _advance(self, worker: str) -> None:
        """Let a worker go on until it computes or waits."""
        for wish in self._scripts[worker]:
            match wish:
                case Compute(seconds):
                    self._computing[worker] = seconds * self._cold_factor.get(worker, 1.0)
                    return
                case Await(message):
                    if message in self._arrived:
                        self._arrived.discard(message)
                        self._cold_factor[worker] = 1.0
                        continue
                    self._awaited[message] = worker, self._now
                    return
                case Give((_, _, micro_batch), seconds):
                    line = f"hand {micro_batch.index % self._hands[worker]} of {worker}"
                    self._queue(line, seconds, partial(self._answer, worker, wish))
                case Save(done):
                    self._queue(f"disk of {worker}", self._costs.commit_s, partial(self._deliver, done))
                case Send():
                    self._leave(worker, wish)
                    if self._costs.cores is not None:
                        self._computing[f"overhead {next(self._numbers)}"] = self._costs.overhead(wish.size)

    def _answer(self, worker: str, given: Give) -> None:
        """Have what a hand has done at its lead, which sends what follows."""
        for each in given.sends:
            self._leave(worker, each)
        self._deliver(given.call)

    def _leave(self, worker: str, sent: Send) -> None:
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

    def _carry(self, sent: Send) -> None:
        """Carry over the link, after what is on it already."""
        party, kind, _ = sent.message
        line, way = f"{kind} of {party}", self._costs.way_of(party)
        free = max(self._now, self._link_free.get(line, 0.0))
        if way.bytes_per_s is not None:
            free += sent.size / way.bytes_per_s
        self._link_free[line] = free
        heapq.heappush(self._due, (free + way.rtt_s / 2, next(self._numbers), sent))

    def _deliver(self, message: Message | Call) -> None:
        if message not in self._awaited:
            self._arrived.add(message)
            return
        worker, since = self._awaited.pop(message)
        self._cold_factor[worker] = 1.0 + (self._costs.cold_factor - 1.0) * min(1.0, (self._now - since) / COLD_S)
        self._advance(worker)
