"""A party's lead, as its hands see it; hand.py is the other side of the conversation.

    Hello ... Welcome, weights;   Ticket -> Claim -> Call ... Result, Call ... Result;   weights after each update

RabbitMQ deals tickets, and the lead decides what they mean: whoever claims a task is given all its calls, unless
another hand has it. So a hand may be lost at any moment: what is left of its tasks is given to the next.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from types import MappingProxyType
from typing import Any

from sl_queue.errors import AlignmentError, ComputeError, RemoteProtocolError, SlQueueError, named
from sl_queue.hand_ports import Lane, Workshop
from sl_queue.loops.own_hand import Desk, OwnHand
from sl_queue.protocol import hands as say
from sl_queue.protocol.events import (
    Event,
    HandCame,
    HandLeft,
    HandRefused,
    Observer,
    StillWaiting,
    WaitBegan,
    Waited,
    ignore,
)
from sl_queue.protocol.fingerprints import differences
from sl_queue.protocol.hands import HANDS, MOST_DEATHS, TASKS, Call, Result, Tensors
from sl_queue.protocol.measures import HandCounts
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.roster import Roster
from sl_queue.protocol.text import printable

PROBE_S = 0.25  # between two looks at who is still here
LOOKS = 4  # after so many, a task that waits while a hand is idle is dealt again
SILENT_S = 10.0  # without a sign of a hand, and what it has is given to others
MOST_LOGGED = 10  # unreadable messages, logged one by one

log = logging.getLogger("sl_queue")
_NONE: Tensors = MappingProxyType({})


class Lead:
    """ports.Hands. Thread-safe; mutable: it knows who is here, and who does what.

    `check` raises what ends or redirects the worker, `wake` interrupts one that waits for a peer. `own` makes what
    computes while no hand is here.
    """

    def __init__(
        self,
        party: str,
        lane: Lane,
        about: Mapping[str, Any],
        name: str,
        *,
        secret: bytes = b"",
        check: Callable[[], None] = lambda: None,
        wake: Callable[[], None] = lambda: None,
        own: Callable[[], Workshop] | None = None,
        patience_s: float = 30.0,
        observe: Observer = ignore,
    ) -> None:
        self._party, self._lane, self._about, self._secret = party, lane, dict(about), secret
        self._check, self._wake, self._patience_s, self._observe = check, wake, patience_s, observe
        self._changed, self._roster = threading.Condition(), Roster(name)
        self._weights: dict[int, Tensors] = {}
        self._version = 0
        self._heard: dict[str, float] = {}  # hands that are here: when something came of them last
        self._failure: SlQueueError | None = None
        self._events: list[Event] = []  # to be told when the lock is free
        self._calls, self._busy_s, self._lacks, self._unreadable = 0, 0.0, False, 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._beat, name=f"{party}-hands", daemon=True)]
        self._alone = own
        if own is not None:
            desk = Desk(self._next_own, self._weights_of, self._take, self._fail)
            self._threads.append(OwnHand(party, lambda: _keyed(own(), secret), desk).thread)

    def open(self) -> None:
        """Let hands come. Raises BrokerUnreachable, PartyBusy."""
        self._lane.open(self)
        for thread in self._threads:
            thread.start()

    def close(self, error: SlQueueError | None = None, *, home: bool = True) -> None:
        """End; sends hands `home`, with the error that ended the run if one did."""
        with self._locked():
            self._ended.set()
            if home:
                name, text = ("", "") if error is None else (type(error).__name__, str(error))
                self._send(HANDS, say.Farewell(name, text))
        self._lane.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def counts(self) -> HandCounts:
        """Return the hands that are here, and what was done."""
        with self._changed:
            waiting, repeated = len(self._roster.waiting()), self._roster.repeated
            return HandCounts(len(self._heard), self._calls, repeated, self._busy_s, waiting, self._lacks)

    # What the worker calls --------------------------------------------------------------------------------------

    def equip(self, tensors: Tensors) -> None:
        with self._locked():
            self._version += 1
            self._weights[self._version] = tensors
            oldest, _ = self._roster.oldest(self._version)
            self._weights = {v: w for v, w in self._weights.items() if v >= oldest}
            if self._heard:
                self._send(HANDS, self._message(self._version))

    def begin(self, what: str, micro_batch: MicroBatch, tensors: Tensors = _NONE) -> int:
        with self._locked():
            number = self._roster.begin(what, micro_batch, self._version, tensors)
            self._deal((number,))
            return number

    def go_on(self, task: int, what: str, tensors: Tensors = _NONE) -> None:
        with self._locked():
            call, holder = self._roster.go_on(task, what, tensors)
            if holder is None:
                self._deal((task,))
            elif holder in self._heard:
                self._send(holder, call)

    def is_done(self, task: int, what: str) -> bool:
        with self._changed:
            return self._roster.result(task, what) is not None

    def result(self, task: int, what: str) -> Result:
        if (found := self._found(task, what)) is not None:
            return found
        began, source = time.monotonic(), "hands" if self._alone or self._heard else "a hand to come"
        self._observe(WaitBegan(self._party, source, what))
        try:
            return self._awaited(task, what, began)
        finally:
            self._observe(Waited(self._party, source, what, time.monotonic() - began))

    def _awaited(self, task: int, what: str, began: float) -> Result:
        name_at = self._patience_s
        while (found := self._found(task, what)) is None:
            self._check()
            waited = time.monotonic() - began
            if waited >= name_at:
                name_at += self._patience_s
                here = len(self._heard)
                why = f"hands: {here}" if here or self._alone else "none is here; start one: python -m workers.hand"
                self._observe(StillWaiting(self._party, "the result of a hand", waited, reason=why))
            with self._changed:
                if self._roster.result(task, what) is None:
                    self._changed.wait(0.2)
        return found

    def _found(self, task: int, what: str) -> Result | None:
        """Return the result if it is here. Raises what the model did."""
        with self._changed:
            self._raise_failure()
            found = self._roster.result(task, what)
            self._lacks = found is None and not self._heard and self._alone is None
            return found

    def end(self, task: int) -> None:
        with self._changed:
            self._roster.end(task)

    def clear(self) -> None:
        with self._changed:
            self._roster.clear()

    def raise_failure(self) -> None:
        """Raise what the model did at a hand."""
        with self._changed:
            self._raise_failure()

    def _raise_failure(self) -> None:
        deadly = self._roster.deadly()
        if self._failure is None and deadly is not None:
            self._failure = ComputeError(
                f"party {self._party!r}: {MOST_DEATHS} hands were lost over micro-batch {deadly}, one after the other; "
                "look into their logs, and at the memory that they have"
            )
        if self._failure is not None:
            raise self._failure

    # What the lane calls ----------------------------------------------------------------------------------------

    def on_session(self, me: str) -> None:
        with self._locked():
            for hand in tuple(self._heard):
                self._lose(hand, "the connection to the hands' broker was lost", dead=False)

    def on_body(self, body: bytes, ticket: int | None) -> None:
        try:
            note = say.decode(body)
        except RemoteProtocolError as error:
            self._unreadable += 1
            if self._unreadable <= MOST_LOGGED:
                log.warning("party %r: %s is dropped", self._party, error)
            return
        with self._locked():
            if isinstance(note, say.ToLead):
                self._hear(note)
        self._wake()

    def on_gone(self, to: str) -> None:
        with self._locked():
            self._lose(to, "it has gone")

    def on_failure(self, error: SlQueueError) -> None:
        log.warning("party %r: no hand can come any more: %s", self._party, error)
        with self._locked():
            for hand in tuple(self._heard):
                self._lose(hand, str(error), dead=False)
            if self._alone is None:
                self._failure = error
        self._wake()

    def _hear(self, note: say.ToLead) -> None:
        if isinstance(note, say.Hello):
            self._welcome(note)
            return
        if note.lead != self._roster.lead:
            return
        if note.hand in self._heard:
            self._heard[note.hand] = time.monotonic()
        match note:
            case say.Claim(_, hand, number):
                self._claim(hand, number)
            case Result():
                self._keep(note)
            case say.Back(_, hand, number):
                self._deal((number,) if self._roster.put_back(hand, number) else ())
            case say.Failure(_, _, number, error, message):
                if self._roster.is_open(number) and self._failure is None:
                    self._failure = named(error)(printable(message))

    def _claim(self, hand: str, number: int) -> None:
        """Give a task to a hand; if another has it, the broker dealt it again, and that one is asked for a sign."""
        if (holder := self._roster.holder(number)) in self._heard and holder != hand:
            self._send(holder, say.Beat(self._roster.lead))
        calls = self._roster.claim(hand, number) if hand in self._heard else ()
        for each in calls or (say.Drop(self._roster.lead, number),):
            self._send(hand, each)

    def _welcome(self, hello: say.Hello) -> None:
        hand = hello.hand
        new, self._heard[hand] = hand not in self._heard, time.monotonic()
        if not new:
            return
        wrong = differences(self._about, hello.about)
        if wrong:
            del self._heard[hand]
            reason = f"a hand of party {self._party!r} does not fit its lead: {'; '.join(wrong)}"
            self._events.append(HandRefused(self._party, reason))
            self._send(hand, say.Farewell(AlignmentError.__name__, reason))
            return
        self._send(hand, say.Welcome(self._roster.lead, hand, self._secret.hex()))
        for version in self._weights:
            self._send(hand, self._message(version))
        self._events.append(HandCame(self._party, hand, len(self._heard)))
        self._deal(self._roster.waiting())

    def _keep(self, result: Result) -> None:
        seconds = result.values.get("seconds")
        if self._roster.take(result):
            self._calls += 1
            self._busy_s += seconds if isinstance(seconds, float) else 0.0

    def _lose(self, hand: str, why: str, *, dead: bool = True) -> None:
        if self._heard.pop(hand, None) is not None:
            self._events.append(HandLeft(self._party, hand, len(self._heard), why))
            self._deal(tuple(self._roster.leave(hand, dead=dead)))

    def _deal(self, tasks: tuple[int, ...]) -> None:
        """Have a ticket for each of these tasks among the hands; without any, the own hand finds them by itself."""
        for task in tasks if self._heard else ():
            self._send(TASKS, say.Ticket(self._roster.lead, task))

    def _message(self, version: int) -> say.Weights:
        return say.Weights(self._roster.lead, version, *self._roster.oldest(self._version), self._weights[version])

    def _send(self, to: str, note: say.Note) -> None:
        self._lane.send(to, say.encode(note))

    def _beat(self) -> None:
        """Find out who is still here, and give out tickets again that somebody has who does nothing with them."""
        passed_by: frozenset[int] = frozenset()
        for look in count(1):
            if self._ended.wait(PROBE_S):
                return
            with self._locked():
                self._look_for_hands()
                if look % LOOKS == 0:
                    idle, waiting = self._heard.keys() - self._roster.busy(), self._roster.waiting()
                    self._deal(tuple(task for task in waiting if task in passed_by) if idle else ())
                    passed_by = frozenset(waiting)

    def _look_for_hands(self) -> None:
        """Ask each for a sign: a hand that is gone, or silent for long, has nothing any more."""
        late = time.monotonic() - SILENT_S
        for hand, heard in tuple(self._heard.items()):
            if heard < late:
                self._lose(hand, f"nothing was heard of it for {SILENT_S:.0f} s", dead=False)
            else:
                self._send(hand, say.Beat(self._roster.lead))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Change something; whoever waits looks again, and observers hear of it when the lock is free."""
        with self._changed:
            yield
            self._changed.notify_all()
            events, self._events = self._events, []
        for event in events:
            self._observe(event)

    # What the own hand calls ------------------------------------------------------------------------------------

    def _next_own(self) -> Call | None:
        with self._changed:
            while not self._ended.is_set():
                if (call := self._roster.next_own(alone=not self._heard)) is not None:
                    return call
                self._changed.wait()
        return None

    def _weights_of(self, version: int) -> say.Weights | None:
        with self._changed:
            return self._message(version) if version in self._weights else None

    def _take(self, result: Result) -> None:
        with self._locked():
            self._keep(result)
        self._wake()

    def _fail(self, error: SlQueueError) -> None:
        with self._locked():
            self._failure = self._failure or error
        self._wake()


def _keyed(workshop: Workshop, secret: bytes) -> Workshop:
    workshop.key_draws(secret)
    return workshop
