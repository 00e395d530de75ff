"""Two walks of a small run: of an activation to the fuse model, and of a worker's progress to the terminal."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor, nn

import sl_queue
from sl_queue.launch.following import Follower
from sl_queue.observe.console import Screen
from sl_queue.protocol.control import Progress, Status
from sl_queue.protocol.messages import Activation, Kind, Payload
from sl_queue.protocol.scheduler.state import RunState
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.transport.link import Delivery
from sl_queue.transport.mail import Letter
from tests.support.walk import Arguments, Mark, Walk

ROWS, COLUMNS, CUT = 13, 31, 67  # of a micro-batch: no other array has such a shape
SHAPES = {(ROWS, COLUMNS), (ROWS, CUT)}
BYTES = ROWS * CUT * 4
MESSAGE = b"\x9b"  # how one begins: an array of 11 fields


class Fuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CUT, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        output: Tensor = self.layer(inputs[0])
        return output


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(COLUMNS, CUT), nn.Tanh())


Beside = Callable[[sl_queue.Job], AbstractContextManager[object]]


def _train(broker: str, walk: Walk, beside: Beside = nullcontext) -> Walk:
    """Train a few steps while traced."""
    rng, n_rows = np.random.default_rng(7), ROWS * 8
    parties = {"bank": {"role": "feature", "cut": [CUT]}, "insurer": {"role": "label"}}
    pipeline = {"micro_batches": 2}
    job = sl_queue.Job(name="walk", seed=7, epochs=2, batch_size=ROWS * 2, parties=parties, pipeline=pipeline)
    ids, adam = np.arange(n_rows), {"name": "adam"}
    x, y = rng.normal(size=(n_rows, COLUMNS)).astype(np.float32), rng.integers(0, 2, n_rows)
    bank = sl_queue.PartyFile(party="bank", data=sl_queue.Rows(ids, x), base={"model": base, "optimizer": adam})
    fuse = {"model": Fuse, "optimizer": adam, "loss": "bce_with_logits"}
    insurer = sl_queue.PartyFile(party="insurer", data=sl_queue.Rows(ids, labels=y), fuse=fuse)
    with walk.traced(), beside(job):
        sl_queue.run_local(job, [bank, insurer], broker=broker)
    return walk


# An activation --------------------------------------------------------------------------------------------------


def has_activation(value: Any) -> bool:
    """Return True for the rows or the activation of a micro-batch, as an array, a message or bytes, or what has one."""
    match value:
        case Tensor() | np.ndarray() | Payload():
            return tuple(value.shape) in SHAPES
        case bytes() | bytearray() | memoryview():
            return len(value) >= BYTES
        case Activation():
            return has_activation(value.payload)
        case Letter():
            return has_activation(value.message)
        case Delivery():
            return has_activation(value.body)
        case list() | tuple():
            return len(value) < 10 and any(map(has_activation, value))
        case dict():
            return len(value) < 10 and any(map(has_activation, value.values()))
    return False


def _is_activation(arguments: Arguments) -> bool:
    return isinstance(arguments["message"], Activation)


OF_AN_ACTIVATION = (
    Mark("TorchBaseStage.prepare", "begin", "out"),
    Mark("TorchBaseStage.forward", "resume", "out"),
    Mark("FeatureParty._gradient", "pause", "out"),
    Mark("MemoryLink.publish", "end", "out"),
    Mark("RabbitLink.publish", "end", "out"),
    Mark("Mail._on_delivery", "begin", "arrives"),
    Mark("Mailbox.file", "end", "arrives", _is_activation),
    Mark("LabelHolder._gather", "begin", "fused"),
    Mark("called", "end", "fused"),
)


def walk_of_an_activation(broker: str) -> Walk:
    """Return the files from a table to the link, from there to the mailbox, and from there to the fuse model."""
    return _train(broker, Walk(has_activation, OF_AN_ACTIVATION))


# A worker's progress --------------------------------------------------------------------------------------------


def has_progress(value: Any) -> bool:
    """Return True for a step that a worker reports, or a run's state or status, and for the bytes of a message."""
    match value:
        case Progress() | RunState() | RunStatus() | Status():
            return True
        case bytes():
            return value[:1] == MESSAGE
        case Letter():
            return has_progress(value.message)
        case Delivery():
            return True
        case list() | tuple():
            return any(map(has_progress, value))
    return isinstance(getattr(value, "run", None), RunStatus)


def _is_progress(arguments: Arguments) -> bool:
    return isinstance(arguments["letter"].message, Progress)


def _reports_progress(arguments: Arguments) -> bool:
    return isinstance(arguments["report"], Progress)


OF_PROGRESS = (
    Mark("Worker.advance", "begin", "made"),
    Mark("Reports.progress", "end", "made"),
    Mark("Reports._send_progress", "begin", "out"),
    Mark("RabbitLink.publish", "end", "out"),
    Mark("Mail._on_delivery", "begin", "arrives"),
    Mark("LinkSchedulerChannel.on_letter", "end", "arrives", _is_progress, "taken"),
    Mark("reduce", "begin", "decided", _reports_progress),
    Mark("reduce", "pause after", "decided", _reports_progress),
    Mark("describe", "resume", "decided"),
    Mark("RabbitLink.publish", "end", "decided", lambda given: given["kind"] is Kind.COMMAND),
    Mark("Statuses.on_letter", "end", "arrives", called="heard"),
    Mark("Statuses.next", "begin", "shown"),
    Mark("Screen.status", "end", "shown"),
)


class _Terminal:
    """Terminal of `sl-queue local`, which shows each status."""

    def __init__(self) -> None:
        self._screen, self.shown = Screen(), threading.Event()

    def take(self, status: RunStatus, age_s: float = 0.0) -> None:
        self._screen.status(status)
        self.shown.set()

    def trouble(self, problem: str) -> None:
        pass


def walk_of_progress(broker: str) -> Walk:
    """Return the files from a step to the link, from there through the scheduler, and from there to the terminal."""

    @contextmanager
    def beside(job: sl_queue.Job) -> Iterator[None]:
        terminal = _Terminal()
        with Follower(job, broker, None, terminal):
            yield
            assert terminal.shown.wait(60.0), "the last status stays where it is"

    return _train(broker, Walk(has_progress, OF_PROGRESS), beside)
