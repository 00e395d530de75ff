"""Reports of workers and of the operator, and commands of the scheduler: idempotent statements about the present."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sl_queue.protocol.messages import Activation, Gradient, Kind, Masked
from sl_queue.protocol.totals import Totals

# Reports ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EpochResult:
    """The label holder's measurements of one epoch; `step` is the epoch's last step, `loss` the mean over its rows."""

    epoch: int
    step: int
    loss: float
    holdout: Mapping[str, float | None] | None = None  # None for a metric that these rows do not define
    seconds: float = 0.0  # as the scheduler saw it pass
    leak: Mapping[str, Mapping[str, float]] | None = None  # by party, what it could read of the labels; None: no meter
    train: Mapping[str, float | None] | None = None  # metrics of the training passes, where they are asked for
    tables: Mapping[str, list[list[float]]] | None = None  # of an epoch that may be the last: who was taken for whom


@dataclass(frozen=True, slots=True)
class Join:
    """A worker is here: what it was asked to train, on which rows, and what it already holds.

    Sent at every start and after every reconnect, so that a scheduler that lost its memory can learn everything again.
    One that was meant for an earlier scheduler may have been left behind by a worker that is gone.
    """

    incarnation: str  # drawn by every new worker process: commands to an earlier one are void
    job: Mapping[str, Any]  # the canonical job, for naming the keys that differ
    n_rows: int
    rows_digest: str  # keyed digest of all row ids in canonical order, hexadecimal
    id_type: str  # "integer" or "text"
    run: str | None  # None: nothing on disk
    generation: int
    held: tuple[int, ...]  # the steps whose checkpoints are on disk, ascending
    epochs: tuple[EpochResult, ...] = ()  # the newest of the label holder's history; the rest on request
    to: str = ""  # the incarnation of the scheduler it was last heard of; none other believes it
    version: str = ""  # of sl_queue, for people; empty before there was such a field
    rules: int = 1  # how it computes what it chooses, such as held-out rows; what the first version does not say is 1
    weights: str = ""  # in a prediction: the run whose trained weights this party brings
    type: Literal["joined"] = "joined"


@dataclass(frozen=True, slots=True)
class Progress:
    """The position of a worker: the step it computes, the last one it committed, and the checkpoints it holds."""

    incarnation: str
    generation: int
    step: int
    held: tuple[int, ...]
    loss: float | None = None
    samples: int = 0  # rows trained on since this worker process started
    type: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class EpochDone:
    """The label holder has committed an epoch and evaluated it."""

    incarnation: str
    generation: int
    result: EpochResult
    type: Literal["epoch_done"] = "epoch_done"


@dataclass(frozen=True, slots=True)
class Epochs:
    """Consecutive epochs of the label holder's history, from one that the scheduler lacks on; as many as a page has."""

    incarnation: str
    generation: int
    results: tuple[EpochResult, ...]
    type: Literal["epochs"] = "epochs"


@dataclass(frozen=True, slots=True)
class Waiting:
    """The sender waits for a message: sent to its source, which sends it again if it has it, and to the scheduler."""

    incarnation: str
    generation: int
    source: str
    kind: Kind
    step: int
    index: int
    seconds: float
    silent: float  # seconds since anything was heard from the source
    type: Literal["waiting"] = "waiting"


@dataclass(frozen=True, slots=True)
class Lost:
    """The sender was asked for a message that it sent in the past and no longer has."""

    incarnation: str
    generation: int
    receiver: str
    kind: Kind
    step: int
    index: int
    asked_s: float  # how long the receiver had waited when it asked: tells a second question from a second delivery
    type: Literal["lost"] = "lost"


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life from a worker's I/O, also while it computes; goes to every peer, with totals to the scheduler."""

    incarnation: str
    totals: Totals | None = None
    type: Literal["alive"] = "alive"


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker ends for a reason that a restart does not fix."""

    incarnation: str
    error: str  # class name
    message: str
    type: Literal["failed"] = "failed"


@dataclass(frozen=True, slots=True)
class Stopped:
    """A worker ended on purpose after committing `step`."""

    incarnation: str
    step: int
    type: Literal["stopped"] = "stopped"


@dataclass(frozen=True, slots=True)
class Finished:
    """A worker has written its final weights."""

    incarnation: str
    digests: Mapping[str, str]  # file name -> SHA-256, hexadecimal
    type: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True)
class StopRequest:
    """The operator asks for an orderly stop at the next commit."""

    to: str  # the incarnation of the scheduler that the operator has heard of; none other believes it
    type: Literal["stop_request"] = "stop_request"


@dataclass(frozen=True, slots=True)
class Offer:
    """A party is here to align its rows: how many ids it brings, rounded up, and of what type."""

    incarnation: str
    job: Mapping[str, Any]  # canonical
    token: str  # names its secrets and its ids, and tells nothing of them
    size: int
    id_type: str
    to: str  # the incarnation of the scheduler it has heard of; none other believes it
    version: str = ""  # of sl_queue
    type: Literal["offer"] = "offer"


@dataclass(frozen=True, slots=True)
class Aligning:
    """The way that a party's own set has come."""

    incarnation: str
    done: int
    total: int
    type: Literal["aligning"] = "aligning"


@dataclass(frozen=True, slots=True)
class Aligned:
    """A party has on disk which of its rows all parties hold."""

    incarnation: str
    session: str
    to: str  # as in Offer
    type: Literal["aligned"] = "aligned"


_OfARun = Join | Progress | EpochDone | Epochs | Waiting | Lost | Alive | Failed | Stopped | Finished | StopRequest
Report = _OfARun | Offer | Aligning | Aligned


# Commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Train: resume from your newest checkpoint that the present generation admits."""

    incarnation: str
    run: str
    rollback_steps: tuple[
        int, ...
    ] = ()  # for generation 1, 2, ...: the step of the common checkpoint at which it began
    type: Literal["start"] = "start"

    @property
    def generation(self) -> int:
        return len(self.rollback_steps)

    def admits(self, generation: int, step: int) -> bool:
        """Return True if a checkpoint written in `generation` after `step` belongs to the present timeline."""
        return all(step <= base for base in self.rollback_steps[generation:])


@dataclass(frozen=True, slots=True)
class Open:
    """Epochs up to and including `through` may be trained; keep the checkpoint of step `keep`, if any, for later."""

    incarnation: str
    through: int
    keep: int | None = None
    known: int | None = None  # epochs that the scheduler knows: the label holder answers with those that come next
    type: Literal["open"] = "open"


@dataclass(frozen=True, slots=True)
class Finish:
    """Everyone has committed: the weights after `step` are final."""

    incarnation: str
    step: int
    type: Literal["finish"] = "finish"


@dataclass(frozen=True, slots=True)
class Stop:
    """End: at once with `error`, else after committing `after_step` (None: at the next commit)."""

    incarnation: str
    reason: str
    after_step: int | None = None
    error: str | None = None  # class name to raise
    type: Literal["stop"] = "stop"


@dataclass(frozen=True, slots=True)
class Align:
    """All parties are here: send the own ids around, then those finished masks that the scheduler lacks."""

    incarnation: str
    session: str  # names all parties' secrets and ids together: a message of another is void
    round: int  # another one: a worker has come again, and may have lost what it had in hand
    sizes: Mapping[str, int]  # by party
    missing: tuple[int, ...] = ()  # chunks of this party's finished masks, the first few
    shared: int | None = None  # rows that all parties hold, once all masks are here; these follow
    type: Literal["align"] = "align"


Command = Start | Open | Finish | Stop | Align


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the run as the scheduler last saw it; published for the operator."""

    run: Mapping[str, Any]
    incarnation: str = ""  # of the scheduler
    type: Literal["status"] = "status"


Message = Activation | Gradient | Masked | Report | Command | Status


def kind_of(message: Message) -> Kind:
    """Return the kind that a message is filed and routed as."""
    match message:
        case Activation() | Gradient() | Masked():
            return message.kind
        case Start() | Open() | Finish() | Stop() | Align() | Status():
            return Kind.COMMAND
        case _:
            return Kind.REPORT
