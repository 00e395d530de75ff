"""The hand in a lead's own process: it computes while no other hand is here, through the same code as those."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sl_queue.errors import ComputeError, SlQueueError
from sl_queue.hand_ports import Workshop
from sl_queue.protocol.hands import OWN, Call, Result, Weights


@dataclass(frozen=True, slots=True)
class Desk:
    """The lead, as its own hand sees it."""

    next_call: Callable[[], Call | None]  # blocks; None at the end
    weights: Callable[[int], Weights | None]  # None once no task names that version
    answer: Callable[[Result], None]
    failed: Callable[[SlQueueError], None]


@dataclass(frozen=True, slots=True)
class OwnHand:
    """A thread that does one call after the other; `make` builds what it computes with, in that thread."""

    party: str
    make: Callable[[], Workshop]
    desk: Desk
    thread: threading.Thread = field(init=False, repr=False)

    def __post_init__(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self.party}-own-hand", daemon=True)
        object.__setattr__(self, "thread", thread)

    def _run(self) -> None:
        workshop: Workshop | None = None
        while (call := self.desk.next_call()) is not None:
            try:
                workshop = workshop or self.make()
                self._do(workshop, call)
            except SlQueueError as error:
                self.desk.failed(error)
            except Exception as error:
                self.desk.failed(ComputeError(f"party {self.party!r}: {type(error).__name__}: {error}"))

    def _do(self, workshop: Workshop, call: Call) -> None:
        if not workshop.has(call.version):
            weights = self.desk.weights(call.version)
            if weights is None:  # the task was forgotten meanwhile
                return
            workshop.equip(weights.version, weights.tensors, weights.oldest, weights.oldest_task)
        result = done(workshop, call, OWN)
        if result is not None:
            self.desk.answer(result)


def done(workshop: Workshop, call: Call, hand: str) -> Result | None:
    """Do a call; None if what came before it is not there."""
    began = time.monotonic()
    outcome = workshop.do(call)
    if outcome is None:
        return None
    values = {**outcome[0], "seconds": time.monotonic() - began}
    return Result(call.lead, hand, call.task, call.what, values, outcome[1])
