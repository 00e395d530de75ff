"""The telling of held-out rows, both sides: a label holder that chose them, and a feature party that asks which.

    feature party: shows that it is here, again and again -> keys on disk -> says so, durably -> trains
    label holder: sends the keys to whoever shows itself -> notes on disk who has them -> trains once all have

A sign of life is the question, so nothing piles up at the broker. What a feature party says when it is done is
acknowledged once that is on the label holder's disk: whichever of both is killed, neither waits for what was said.
A party that loses its state folder asks again, and a label holder that trains meanwhile answers as well.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from sl_queue.errors import AlignmentError, PeerSilent
from sl_queue.protocol.alignment import payload
from sl_queue.protocol.control import Alive
from sl_queue.protocol.holdout import KEY_BYTES, is_session, missing, session_of
from sl_queue.protocol.messages import Masked, MicroBatch
from sl_queue.protocol.scheduler.state import GIVE_UP

TELL_S = 0.5
AGAIN_S = 5.0  # after which keys that made no difference are sent again
WAIT_S = 0.2
_KEYS, _DONE = 0, 1  # what a message is, as its step

log = logging.getLogger("sl_queue")


class Channel(Protocol):
    """Channel of a party before its run begins; used by one thread."""

    def send(self, receiver: str, message: Masked, session: str, *, lasting: bool = False) -> None: ...
    def tell(self, receiver: str, message: Alive, *, session: str = "") -> None: ...
    def next(self, timeout_s: float) -> Any | None: ...
    def done(self, arrival: Any) -> None: ...
    def flush(self) -> None: ...
    def silent_s(self, sender: str) -> float: ...


@dataclass(slots=True)
class Telling:
    """The label holder's side. Mutable: who has been sent what, and who has it."""

    incarnation: str
    rows: str  # digest of all rows
    chunks: Sequence[bytes] = field(repr=False)
    parties: tuple[str, ...]
    channel: Channel
    note: Callable[[tuple[str, ...]], None]  # has on disk which parties were told
    clock: Callable[[], float]
    told: tuple[str, ...] = ()
    sent: dict[str, tuple[str, float]] = field(default_factory=dict)  # the worker that was sent the keys, and when
    shown_at: float = -inf
    patience_s: float = inf
    past: dict[str, float] = field(default_factory=dict)  # since when a party that was not told does not ask

    def serve(self) -> None:
        """Tell every feature party, until all have it on disk. Raises what ends the channel.

        Raises AlignmentError if a party has begun: then what is known of its answer was lost here.
        """
        while set(self.parties) - set(self.told):
            arrival = self.channel.next(WAIT_S)
            now = self.clock()
            if arrival is not None:
                self._take(arrival, now)
                self.channel.done(arrival)
            if now - self.shown_at >= TELL_S:
                self.shown_at = now
                for party in self.parties:
                    self.channel.tell(party, Alive(self.incarnation))

    def _take(self, arrival: Any, now: float) -> None:
        sender = arrival.sender
        match arrival.message:
            case Alive(incarnation) if sender in self.parties and sender not in self.told:
                self._require_question(sender, arrival.session, now)
                known, when = self.sent.get(sender, ("", -inf))
                if incarnation != known or now - when >= AGAIN_S:
                    self.sent[sender] = (incarnation, now)
                    self._send(sender)
            case Masked(MicroBatch(step=step)) if step == _DONE and arrival.session == session_of(self.rows):
                if sender in self.parties and sender not in self.told:
                    self.told = (*self.told, sender)
                    self.note(self.told)
            case _:
                pass

    def _require_question(self, party: str, session: str, now: float) -> None:
        if is_session(session):
            self.past.pop(party, None)
        elif now - self.past.setdefault(party, now) > self.patience_s:
            raise AlignmentError(
                f"party {party!r} knows which rows are held out, and that it does was lost with the state folder of "
                "the label holder: restore that folder, or give every party and the scheduler a new one to train from "
                "scratch; if nobody has a checkpoint yet, start that party again"
            )

    def _send(self, party: str) -> None:
        for message in _messages(self.chunks):
            self.channel.send(party, message, session_of(self.rows))


def _messages(chunks: Iterable[bytes]) -> Iterator[Masked]:
    for chunk, body in enumerate(chunks):
        yield Masked(MicroBatch(_KEYS, chunk), payload(body, KEY_BYTES))


@dataclass(slots=True)
class TellingAgain:
    """The label holder's side while it trains, for a party that has lost its state folder.

    That party has had the same keys before, so it learns nothing new. Mutable: when whom it told.
    """

    rows: str  # digest of all rows
    chunks: Callable[[], Iterable[bytes]]
    parties: tuple[str, ...]
    clock: Callable[[], float]
    told_at: dict[str, float] = field(default_factory=dict)

    def __call__(self, party: str, send: Callable[[str, Masked, str], None]) -> None:
        """Answer a party that asks, as often as it may ask."""
        now = self.clock()
        if party in self.parties and now - self.told_at.get(party, -inf) >= AGAIN_S:
            self.told_at[party] = now
            for message in _messages(self.chunks()):
                send(party, message, session_of(self.rows))


@dataclass(slots=True)
class Hearing:
    """A feature party's side. Mutable: what it has heard."""

    party: str
    incarnation: str
    rows: str  # digest of all own rows
    label_holder: str
    channel: Channel
    patience_s: float
    clock: Callable[[], float]
    here: dict[int, bytes] = field(default_factory=dict, repr=False)
    shown_at: float = -inf
    other: str = ""  # what is told of other rows, long after this party has asked; before, it may be of an earlier run
    asked_at: float = inf  # first
    since: float = inf  # since when the label holder is heard and says nothing of rows
    warned_at: float = -inf

    def ask(self) -> dict[int, bytes] | None:
        """Ask until all keys are here; None if they are of other rows, which the scheduler will name.

        Raises RemoteProtocolError, AlignmentError if the label holder has begun without this party, PeerSilent.
        """
        while missing(self.here) and not self.other:
            arrival = self.channel.next(WAIT_S)
            now = self.clock()
            if arrival is not None:
                self._take(arrival, now)
                self.channel.done(arrival)
            if now - self.shown_at >= TELL_S:
                self.shown_at, self.asked_at = now, min(self.asked_at, now)
                self.channel.tell(self.label_holder, Alive(self.incarnation), session=session_of(self.rows))
                self._require_answer(now)
        return None if self.other else self.here

    def confirm(self, session: str) -> None:
        """Tell the label holder that the keys are on disk here."""
        message = Masked(MicroBatch(_DONE, 0), payload(bytes(KEY_BYTES), KEY_BYTES))
        self.channel.send(self.label_holder, message, session, lasting=True)
        self.channel.flush()

    def _take(self, arrival: Any, now: float) -> None:
        if arrival.sender != self.label_holder:
            return
        match arrival.message:
            case Masked(MicroBatch(step=step, index=index), body) if step == _KEYS and is_session(arrival.session):
                self.since = inf
                if arrival.session == session_of(self.rows):
                    self.here[index] = bytes(body.data)
                elif now - self.asked_at > AGAIN_S:
                    self.other = arrival.session
            case Alive():
                self.since = min(self.since, now)
            case _:
                pass

    def _require_answer(self, now: float) -> None:
        if now - self.since > GIVE_UP * self.patience_s:
            raise AlignmentError(
                f"the label holder {self.label_holder!r} is training, and does not say again which rows are held out: "
                f"the state folder of {self.party!r} was lost; give every party and the scheduler a new one"
            )
        silent_s = self.channel.silent_s(self.label_holder)
        if silent_s > GIVE_UP * self.patience_s:
            raise PeerSilent(f"nothing was heard from {self.label_holder!r} for {silent_s:.0f} s; start both again")
        if silent_s > self.patience_s and now - self.warned_at > self.patience_s:
            self.warned_at = now
            told = "%s waits for %s, which says what rows are held out; nothing was heard from it for %.0f s"
            log.warning(told, self.party, self.label_holder, silent_s)
