"""Protocols of what the roles need from the outside world; adapters in transport, compute and storage provide it.

The recovery law governs `Channel` and `Checkpoints`: an acknowledgement means "its effect is on disk". After a crash
everything unacknowledged comes back, and everything already seen is dropped by its key.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from sl_queue.protocol.checkpoint import Final, Saved, State, Weights
from sl_queue.protocol.control import Command, Join, Progress, Report, Start, Status
from sl_queue.protocol.history import History
from sl_queue.protocol.messages import Activation, Gradient, Kind, MicroBatch, Payload
from sl_queue.protocol.party.orders import Orders

T = TypeVar("T")


class BaseStage(Protocol):
    """A feature party's part of the model with its optimizer. Not thread-safe; one worker owns it."""

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Do what the next forward needs and no peer decides; for the time in which messages travel. No effect."""

    def forward(self, micro_batch: MicroBatch) -> Payload:
        """Return the activation of a training micro-batch, shape (rows, *cut), with the digest of its row ids."""

    def backward(self, micro_batch: MicroBatch, gradient: Payload) -> None:
        """Add the gradient of a micro-batch to the parameters' gradients; called once per forward, in forward order."""

    def update(self) -> None:
        """Apply the accumulated gradients: one optimizer step."""

    def predict(self, micro_batch: MicroBatch) -> Payload:
        """Return the activation of held-out rows in evaluation mode; the index counts the held-out micro-batches."""

    def state(self) -> State:
        """Return a copy of everything that a step changes; taken between steps with nothing in flight."""

    def load(self, state: State) -> None:
        """Become what `state()` described, and forget everything in flight."""

    def weights(self) -> Weights:
        """Return the state_dict of each module, by the stem of its file in `final/`: "base", "fuse"."""


class FuseStage(Protocol):
    """The label holder's part: its base model if it has one, the fuse model, the loss and the metrics."""

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Prepare the next `forward_backward`: the own base model needs no activation of others."""

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        """Compute loss and gradients of one micro-batch; returns each feature party's gradient.

        The loss of a micro-batch is weighted by its share of the step's rows, so that a step's gradient is that of
        the mean over all its rows, however unevenly they were cut. Raises RemoteProtocolError for a payload that
        does not fit the cut layer or belongs to other rows, NonFiniteError naming the party or the loss.
        """

    def late_gradients(self) -> Sequence[tuple[MicroBatch, Mapping[str, Payload]]]:
        """Return the gradients of the step's earlier micro-batches that had to wait for its last one, and forget them.

        Where all rows of a step are fused at once, `forward_backward` returns nothing for any but the last.
        """

    def update(self) -> float:
        """Make one optimizer step; returns the step's loss, the mean over its rows."""

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        """Add held-out rows to the running evaluation."""

    def metrics(self) -> Mapping[str, float | None]:
        """Return the loss and metrics over all rows evaluated since the last call, and forget these rows."""

    def training_metrics(self) -> Mapping[str, float | None] | None:
        """Return the metrics of the epoch's training passes, and forget these; None if they are not asked for."""

    def evaluation_tables(self) -> Mapping[str, list[list[float]]] | None:
        """Return what a person looks at of the last evaluation."""

    def state(self) -> State:
        """Return as BaseStage.state."""

    def load(self, state: State) -> None:
        """Load as BaseStage.load."""

    def weights(self) -> Weights:
        """Return as BaseStage.weights."""


class Meter(Protocol):
    """Attacks on what a party sends, each epoch; nothing that is trained depends on it. Mutable: it gathers."""

    def end_epoch(self) -> Mapping[str, Mapping[str, float]]:
        """Return what each other party could read by what it was sent in this epoch; begins another one."""

    def state(self) -> State:
        """Return what a checkpoint must hold, for the same numbers to follow."""

    def load(self, state: State) -> None:
        """Become what `state()` described; forget everything if the checkpoint has nothing of it."""


class Spending(Protocol):
    """Ledger of what a party may release, and has released."""

    def begin(self, run: str, generation: int, epoch: int) -> None:
        """Enter what an epoch releases, on disk, before any of it is sent. Raises JobError if a budget forbids it."""

    def finish(self, run: str) -> None:
        """Say on disk what the run has released, and what that is worth."""


class Channel(Protocol):
    """The place where a worker sends and receives by key, and commits. Used by one thread."""

    def send(self, receiver: str, message: Activation | Gradient) -> None:
        """Publish and return at once; the broker's confirm is awaited by the next commit.

        The message is kept and sent again after a reconnect, or when the receiver asks, until it must be superseded.
        """

    def receive(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload:
        """Block until that message is here. Raises PeerSilent, RunStopped, Restarted, TransportError."""

    def commit(self, step: int, save: Callable[[], None]) -> None:
        """Confirm sends, `save` the checkpoint of `step`, acknowledge receives; in this order, beside what comes next.

        What comes next may be sent meanwhile. Nothing is received before the commit has ended, so nothing is learned;
        `receive` raises what ended it.
        """

    def wait_committed(self) -> None:
        """Block until the last commit has ended. Raises what `save` did, and like `receive`."""

    def announce(self, describe: Callable[[], Join]) -> None:
        """Report to the scheduler who is here, and again after a reconnect and to a new scheduler."""

    def report(self, report: Report) -> None:
        """Send the scheduler a report at once; the broker keeps it even when it restarts."""

    def progress(self, report: Progress) -> None:
        """Report to the scheduler some time soon; a newer one replaces it."""

    def flush(self) -> None:
        """Block until the broker has confirmed everything sent and reported so far."""

    def wait_for(self, decision: Callable[[Orders], T | None]) -> T:
        """Block until the scheduler's orders satisfy `decision`, and return what it returned.

        Raises RunStopped and Restarted like `receive`; TransportError when the broker is lost for good.
        """

    def enter(self, start: Start, resume_step: int) -> None:
        """Enter the run and generation of `start` with everything up to `resume_step` already applied."""


class SchedulerChannel(Protocol):
    """The scheduler's side: reports from anyone, in each sender's order."""

    def reports(self, timeout_s: float) -> Sequence[tuple[str, Report, bool]]:
        """Return the reports that came since the last call, as (party, report, delivered again).

        Waits at most `timeout_s` for the first.
        """

    def command(self, party: str, command: Command | Status) -> None:
        """Publish a command to a party; the broker keeps it even when it restarts."""

    def acknowledge(self) -> None:
        """Acknowledge what `reports` returned: it has taken effect on disk."""

    def deaf_s(self) -> float:
        """Return the seconds, all in all, in which its own connection could not carry anything, or it did not run."""

    def unreadable_senders(self) -> Sequence[str]:
        """Return the parties in whose name messages came, of which none could be opened."""

    def foreign(self) -> Mapping[str, str]:
        """Name parties that have spoken nothing but another version for a patience, with what to do about it."""


class HistoryLog(Protocol):
    """The label holder's own history on disk; used by one thread at a time."""

    def load(self) -> History:
        """Return the epochs that were written, whole ones only."""

    def write(self, history: History) -> None:
        """Have these epochs on disk and no others; costs as much as what is new."""


class Checkpoints(Protocol):
    """A party's checkpoints on disk; the only thing resumed from. Used by one thread at a time."""

    @property
    def kept(self) -> int | None:
        """The step that `keep` named last, also in an earlier process."""

    def save(self, step: int, state: State, *, run: str, generation: int, values: Mapping[str, Any]) -> None:
        """Write durably and atomically; then drop old ones, keeping the last three and the kept step."""

    def steps(self) -> tuple[int, ...]:
        """Return the steps of all intact checkpoints, ascending; torn or altered files are skipped with a log line."""

    def load(self, step: int) -> Saved:
        """Return the checkpoint of `step`. Raises CheckpointError if there is no intact one."""

    def newest(self) -> Saved | None:
        """Return the newest intact checkpoint, or None."""

    def keep(self, step: int | None) -> None:
        """Keep the checkpoint of `step` until this is called again: the best epoch so far."""

    def discard_after(self, step: int) -> None:
        """Forget every checkpoint later than `step`: they belong to an abandoned generation."""

    def write_final(self, weights: Weights, *, run: str, step: int, incarnation: str) -> None:
        """Write `final/<stem>.safetensors`, then `final/run.json`, which says that this party has finished."""

    def finished(self) -> Final | None:
        """Return what `write_final` left; None if this party has not finished."""

    def mark_reported(self) -> None:
        """Note that the broker has the final report: a worker that starts again has nothing left to do."""


class UserCode(Protocol):
    """The Python code of one party: its models, losses and sources, named as `module:callable`."""

    @property
    def folder(self) -> Path | None:
        """Return the folder that is looked into first; None: installed packages only."""

    def load(self, name: str) -> Any:
        """Import the callable of that name. Thread-safe. Raises JobError."""

    def module(self, name: str) -> ModuleType:
        """Import the module of that callable. Raises JobError."""
