"""A hand, as its lead sees it; lead.py is the other side of the conversation. It has nothing to lose and to recover."""

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from sl_queue.errors import AlignmentError, ComputeError, PeerFailed, PeerSilent, RemoteProtocolError, SlQueueError
from sl_queue.hand_ports import Lane, Workshop
from sl_queue.loops.own_hand import done
from sl_queue.protocol import hands as say
from sl_queue.protocol.hands import BEAT_S, LEAD, Call
from sl_queue.protocol.text import printable

GONE_S = 300.0  # without a lead, and a hand ends; it is started again like any worker
_LOOK_S = 1.0  # between two looks whether a lead is there

log = logging.getLogger("sl_queue")


class Hand:
    """Computes for a lead until that needs it no more. Mutable; the lane's thread puts in what this one's does.

    `beat_s`: seconds between two signs of life.
    """

    def __init__(
        self, party: str, lane: Lane, about: Mapping[str, Any], workshop: Workshop, beat_s: float = BEAT_S
    ) -> None:
        self._party, self._lane, self._about, self._workshop = party, lane, dict(about), workshop
        self._beat_s = beat_s
        self._changed = threading.Condition()
        self._inbox: deque[say.ToHand | SlQueueError] = deque()
        self._me = self._lead = ""
        self._mine: dict[int, int | None] = {}  # tasks that it has claimed; their tickets until they are acknowledged
        self._later: list[Call] = []  # whose weights are on their way
        self._heard = time.monotonic()
        self._ended = threading.Event()

    def serve(self) -> None:
        """Work until the run is over. Raises AlignmentError if this hand does not fit, PeerSilent without a lead."""
        hello = threading.Thread(target=self._greet, name=f"{self._party}-hello", daemon=True)
        self._lane.open(self)
        try:
            hello.start()
            while (note := self._next()) is not None:
                self._do(note)
        finally:
            self._ended.set()
            self._lane.close()
            hello.join()

    # What the lane calls ----------------------------------------------------------------------------------------

    def on_session(self, me: str) -> None:
        with self._changed:
            self._me, self._lead = me, ""
            self._inbox.clear()
            self._mine.clear()

    def on_lost(self) -> None:
        """Go on with what is here: another session begins with nothing."""

    def on_body(self, body: bytes, ticket: int | None) -> None:
        try:
            note = say.decode(body)
        except RemoteProtocolError as error:
            log.debug("party %r: %s is dropped", self._party, error)
            note = None
        with self._changed:
            if ticket is not None:
                self._claim(note, ticket)
            elif isinstance(note, say.ToHand):
                self._hear(note)
            self._changed.notify_all()

    def on_gone(self, to: str) -> None:
        with self._changed:
            if to == LEAD and self._lead:
                log.info("party %r: the lead is gone; waiting for the next", self._party)
                self._belong_to("")

    def on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self._inbox.append(error)
            self._changed.notify_all()

    def _claim(self, note: say.Note | None, ticket: int) -> None:
        if not isinstance(note, say.Ticket) or note.lead != self._lead or note.task in self._mine:
            self._lane.done(ticket)
            return
        self._mine[note.task] = ticket
        self._send(say.Claim(self._lead, self._me, note.task))
        if note.call is not None:
            self._inbox.append(note.call)

    def _hear(self, note: say.ToHand) -> None:
        if isinstance(note, say.Welcome):
            self._belong_to(note.lead)
            self._lane.take_tickets()
        elif not isinstance(note, say.Farewell) and note.lead != self._lead:
            return
        self._heard = time.monotonic()
        if isinstance(note, say.Drop):
            self._leave((note.task,))
        elif isinstance(note, say.Weights):
            self._leave([task for task in self._mine if task < note.oldest_task])
        if isinstance(note, say.Welcome | say.Weights | Call | say.Farewell):
            self._inbox.append(note)

    def _belong_to(self, lead: str) -> None:
        """Forget what another lead has said, an earlier process of it, or this one before it lost this hand."""
        self._lead = lead
        self._leave(self._mine)
        self._inbox.clear()

    def _leave(self, tasks: Collection[int]) -> None:
        """Do no more for tasks that others have, or that have ended."""
        kept = [note for note in self._inbox if not (isinstance(note, Call) and note.task in tasks)]
        self._inbox.clear()
        self._inbox.extend(kept)
        for task in tuple(tasks):
            self._acknowledge(task)
            self._mine.pop(task, None)

    def _acknowledge(self, task: int) -> None:
        """Tell the broker that a task needs no other hand for what its ticket asked."""
        if (ticket := self._mine.get(task)) is not None:
            self._mine[task] = None
            self._lane.done(ticket)

    def _send(self, note: say.ToLead) -> None:
        self._lane.send(LEAD, say.encode(note))

    def _greet(self) -> None:
        """Say who is here, again and again: a lead may come at any moment."""
        while True:
            with self._changed:
                if self._me:
                    self._send(say.Hello(self._me, self._about))
            if self._ended.wait(self._beat_s):
                return

    # What the own thread does -----------------------------------------------------------------------------------

    def _next(self) -> say.ToHand | None:
        """Block until there is something to do; None when the run is over.

        Only time in which this thread listens counts as the lead's silence, and not that in which it is stopped.
        """
        with self._changed:
            silent_s, heard = 0.0, self._heard
            while not self._inbox:
                if silent_s > GONE_S:
                    raise PeerSilent(f"party {self._party!r}: no lead for {GONE_S:.0f} s; start its worker")
                asked_at = time.monotonic()
                self._changed.wait(_LOOK_S)
                silent_s += min(_LOOK_S, time.monotonic() - asked_at)
                if self._heard != heard:
                    silent_s, heard = 0.0, self._heard
            note = self._inbox.popleft()
        if isinstance(note, SlQueueError):
            raise note
        if not isinstance(note, say.Farewell):
            return note
        if note.error == AlignmentError.__name__:
            raise AlignmentError(printable(note.message))
        if note.error:
            raise PeerFailed(f"party {self._party!r}: {printable(note.message)}")
        return None

    def _do(self, note: say.ToHand) -> None:
        match note:
            case say.Welcome(_, _, secret):
                self._workshop.forget()
                self._workshop.key_draws(bytes.fromhex(secret))
                self._later.clear()
            case say.Weights(_, version, oldest, oldest_task, tensors):
                self._workshop.equip(version, tensors, oldest, oldest_task)
                ready = [call for call in self._later if self._workshop.has(call.version)]
                self._later = [call for call in self._later if call not in ready and call.version >= oldest]
                for call in ready:
                    self._compute(call)
            case Call():
                if self._workshop.has(note.version):
                    self._compute(note)
                else:
                    self._later.append(note)

    def _compute(self, call: Call) -> None:
        answer: say.ToLead
        try:
            answer = done(self._workshop, call, self._me) or say.Back(call.lead, self._me, call.task)
        except SlQueueError as error:
            answer = say.Failure(call.lead, self._me, call.task, type(error).__name__, str(error))
        except Exception as error:
            text = f"party {self._party!r}, micro-batch {call.micro_batch}: {type(error).__name__}: {error}"
            answer = say.Failure(call.lead, self._me, call.task, ComputeError.__name__, text)
        with self._changed:
            if call.lead == self._lead:
                self._send(answer)
                self._acknowledge(call.task)
                if isinstance(answer, say.Back):
                    self._mine.pop(call.task, None)
