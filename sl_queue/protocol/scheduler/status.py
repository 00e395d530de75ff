"""Status of a run, as the scheduler reports it: typed here, JSON on its way to the operator and for programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sl_queue.errors import PeerFailed, PeerSilent, RemoteProtocolError
from sl_queue.protocol.control import EpochResult, Waiting
from sl_queue.protocol.messages import BEFORE_FIRST_STEP
from sl_queue.protocol.scheduler.past import Past
from sl_queue.protocol.scheduler.state import Member, Phase, Plan, RunState, history_line
from sl_queue.protocol.text import LONGEST_NAME, printable
from sl_queue.protocol.totals import HAND_TO_COME, OF_HANDS, Totals

HANDS_WAIT_S = 0.5  # a wait for hands that is shorter is none to speak of
ENDED = frozenset({Phase.FINISHED.value, Phase.FAILED.value, Phase.STOPPED.value})


@dataclass(frozen=True, slots=True)
class Wait:
    """The message that a party waits for, from `source`."""

    source: str
    kind: str
    step: int
    index: int  # of the micro-batch
    seconds: float  # since it began to wait

    def __str__(self) -> str:
        return f"{self.kind} {self.step}.{self.index} of {self.source} for {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class PartyStatus:
    """One party; `phase` is finished, refused, stopped, not joined, silent, waiting or here."""

    phase: str  # finished, refused, stopped, not joined, silent, waiting or here
    step: int = BEFORE_FIRST_STEP  # newest trained, from 0
    committed: int = BEFORE_FIRST_STEP  # newest on disk
    silent_s: float | None = None  # since it was heard of
    version: str = ""  # of sl_queue
    refused: str | None = None  # why
    refused_s: float | None = None  # since then
    waiting_for: str | None = None  # in words
    wait: Wait | None = None
    totals: Totals | None = None  # of its process
    hands: int | None = None  # that compute for it now; null: it has no use for any


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run; `phase` is one of `Phase`, or of a later version."""

    phase: str  # gathering, running, stopping, stopped, failed or finished
    job: str = ""  # its name
    run: str | None = None  # its id; null before it has begun
    generation: int = 0  # how often all went back to a common checkpoint
    epoch: int = 0  # epochs done
    epochs: int = 0  # in all
    step: int = BEFORE_FIRST_STEP  # newest at the label holder, from 0
    steps: int | None = None  # in all
    loss: float | None = None  # of that step
    samples: int = 0  # rows trained on by the label holder's process
    parties: Mapping[str, PartyStatus] = field(default_factory=dict)
    history: tuple[EpochResult, ...] = ()  # the newest epochs; the file has them all
    reason: str | None = None
    error: str | None = None  # class name
    failed: str | None = None  # the party whose error it is
    told_at: str | None = None  # ISO 8601; None before there was such a field
    past: Past | None = None  # now and then, for whoever has just begun to watch; programs are not shown it

    @property
    def over(self) -> bool:
        """True if the run has ended, so that nothing more will be reported."""
        return self.phase in ENDED

    def age_s(self, wall: float) -> float | None:
        """Return the seconds since it was reported, by the clocks of two machines; None if it does not say when."""
        try:
            told_at = datetime.fromisoformat(self.told_at or "")
        except ValueError:
            return None
        return max(0.0, wall - told_at.replace(tzinfo=UTC).timestamp())


@dataclass(frozen=True, slots=True)
class Telling:
    """A status, and whether it describes the present."""

    run: RunStatus
    fresh: bool  # the scheduler reported it while we listened
    listened_s: float  # for another one

    @property
    def silent(self) -> bool:
        """True if a scheduler should be telling and does not."""
        return not (self.fresh or self.run.over)

    @property
    def exit_code(self) -> int:
        """Code of the command: as in `errors` for a run that failed and a scheduler that is silent, else 0."""
        if self.silent:
            return PeerSilent.exit_code
        return PeerFailed.exit_code if self.run.phase == Phase.FAILED else 0

    def as_json(self, wall: float) -> dict[str, Any]:
        """Return the status with the time of its report, for programs."""
        age_s = self.run.age_s(wall)
        return {**as_json(self.run), "fresh": self.fresh, "age_s": None if age_s is None else round(age_s, 3)}


def describe(plan: Plan, state: RunState, now: float, wall: float) -> RunStatus:
    """Describe a run for people; `now` is monotonic, `wall` the time in seconds since 1970."""
    label = state.members.get(plan.label_holder, Member())
    return RunStatus(
        job=plan.job["name"],
        run=state.run,
        generation=state.generation,
        phase=state.phase.value,
        epoch=len(state.history),
        epochs=plan.epochs,
        step=label.step,
        steps=plan.steps(label.n_rows),
        loss=label.loss,
        samples=label.samples,
        parties={party: _party(plan, state, party, now) for party in plan.parties},
        history=state.history.newest(),
        reason=state.reason,
        error=state.error,
        failed=state.failed,
        told_at=datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds"),
    )


def _party(plan: Plan, state: RunState, party: str, now: float) -> PartyStatus:
    member = state.members.get(party, Member())
    silent_s = None if member.heard is None else now - member.heard
    wait = None if member.waiting is None else _wait(member.waiting)
    return PartyStatus(
        phase=_phase(plan, member, silent_s),
        step=member.step,
        committed=member.committed,
        silent_s=None if silent_s is None else round(silent_s, 1),
        version=member.version,
        refused=member.refused,
        refused_s=None if member.refused_at is None else round(now - member.refused_at, 1),
        waiting_for=_of_hands(member.totals) if wait is None else str(wait),
        wait=wait,
        totals=member.totals,
        hands=None if member.totals is None else member.totals.hands,
    )


def _of_hands(totals: Totals | None) -> str | None:
    """Say in words what a party awaits of its hands, if it has done so for a while."""
    if totals is None or totals.now is None or totals.now.source != OF_HANDS or totals.now.seconds < HANDS_WAIT_S:
        return None
    what = totals.now.cause if totals.now.cause == HAND_TO_COME else f"a hand's {totals.now.cause}"
    return f"{what} for {totals.now.seconds:.0f} s"


def _wait(waiting: Waiting) -> Wait:
    return Wait(waiting.source, waiting.kind.value, waiting.step, waiting.index, waiting.seconds)


def _phase(plan: Plan, member: Member, silent_s: float | None) -> str:
    if member.finished is not None:
        return "finished"
    if member.refused is not None:
        return "refused"
    if member.stopped:
        return "stopped"
    if not member.here:
        return "not joined"
    if silent_s is not None and silent_s > plan.patience_s:
        return "silent"
    return "waiting" if member.waiting is not None else "here"


def as_json(status: RunStatus) -> dict[str, Any]:
    """Return a status as plain values, under the keys that `sl-queue status --json` promises."""
    values = {name: getattr(status, name) for name in _KEYS}
    parties = {name: asdict(party) for name, party in status.parties.items()}
    return values | {"parties": parties, "history": [history_line(epoch) for epoch in status.history]}


def on_the_wire(status: RunStatus) -> dict[str, Any]:
    """Return a status as plain values, with the past if it is there, as `from_json` reads it."""
    if status.past is None:
        return as_json(status)
    epochs = [history_line(epoch) for epoch in status.past.epochs]
    return {**as_json(status), "past": {"points": status.past.points, "epochs": epochs}}


_KEYS = (  # in this order
    *("job", "run", "generation", "phase", "epoch", "epochs", "step", "steps", "loss", "samples"),
    *("parties", "history", "reason", "error", "failed", "told_at"),
)


def from_json(values: Mapping[str, Any]) -> RunStatus:
    """Read a status of this version, the one before (it says less) or a later one (it says more).

    Raises RemoteProtocolError for what is no status.
    """
    try:
        told_at = values.get("told_at")
        return _reader().validate_python({**values, "told_at": told_at if isinstance(told_at, str) else None})
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise RemoteProtocolError(
            f"the scheduler's status cannot be read ({printable(wrong, LONGEST_NAME)}): is it of another version?"
        ) from None


@cache
def _reader() -> TypeAdapter[RunStatus]:
    return TypeAdapter(RunStatus)
