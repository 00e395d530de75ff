"""A party's lead, as its hands see it; hand.py is the other side of the conversation.

    Hello ... Welcome, weights;   Ticket -> Claim, Result;   Call -> Result;   weights after each update

Everything is decided in protocol/dispatch; here are the threads: the worker that waits for results, the lane that
brings what hands say, the own hand that computes while nobody else does, and a beat.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.hand_ports import Lane, Workshop
from sl_queue.loops.own_hand import Desk, OwnHand
from sl_queue.protocol import hands as say
from sl_queue.protocol.dispatch import Dispatch
from sl_queue.protocol.events import Observer, StillWaiting, WaitBegan, Waited, ignore
from sl_queue.protocol.hands import PROBE_S, Call, Result, Tensors
from sl_queue.protocol.measures import HandCounts
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.totals import HAND_TO_COME, OF_HANDS

MOST_LOGGED = 10  # unreadable messages, logged one by one
LOOK_S = 0.2  # between two looks of a waiting worker at what may redirect it

log = logging.getLogger("sl_queue")
_NONE: Tensors = MappingProxyType({})


class Lead:
    """ports.Hands. Thread-safe; mutable: it owns threads, and what its Dispatch remembers.

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
        self._party, self._lane = party, lane
        self._check, self._wake, self._patience_s, self._observe = check, wake, patience_s, observe
        self._changed = threading.Condition()
        self._dispatch = Dispatch(party, name, about, secret, alone=own is not None)
        self._lacks, self._unreadable = False, 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._beat, name=f"{party}-hands", daemon=True)]
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
        with self._deciding() as dispatch:
            self._ended.set()
            if home:
                dispatch.farewell(error)
        self._lane.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def counts(self) -> HandCounts:
        """Return the hands that are here, and what was done."""
        with self._changed:
            return self._dispatch.counts(self._lacks)

    # What the worker calls --------------------------------------------------------------------------------------

    def equip(self, tensors: Tensors) -> None:
        with self._deciding() as dispatch:
            dispatch.equip(tensors)

    def begin(self, what: str, micro_batch: MicroBatch, tensors: Tensors = _NONE) -> int:
        with self._deciding() as dispatch:
            return dispatch.begin(what, micro_batch, tensors)

    def go_on(self, task: int, what: str, tensors: Tensors = _NONE) -> None:
        with self._deciding() as dispatch:
            dispatch.go_on(task, what, tensors)

    def is_done(self, task: int, what: str) -> bool:
        with self._changed:
            return self._dispatch.roster.result(task, what) is not None

    def result(self, task: int, what: str) -> Result:
        if (found := self._found(task, what)) is not None:
            return found
        began, cause = time.monotonic(), HAND_TO_COME if self._lacks else what
        self._observe(WaitBegan(self._party, OF_HANDS, cause))
        try:
            return self._awaited(task, what, began)
        finally:
            self._observe(Waited(self._party, OF_HANDS, cause, time.monotonic() - began))

    def _awaited(self, task: int, what: str, began: float) -> Result:
        name_at = self._patience_s
        while (found := self._found(task, what)) is None:
            self._check()
            waited = time.monotonic() - began
            if waited >= name_at:
                name_at += self._patience_s
                here = f"hands: {self._dispatch.hands}"
                why = "none is here; start one: python -m workers.hand" if self._lacks else here
                self._observe(StillWaiting(self._party, "the result of a hand", waited, reason=why))
            with self._changed:
                if self._dispatch.roster.result(task, what) is None:
                    self._changed.wait(LOOK_S)
        return found

    def _found(self, task: int, what: str) -> Result | None:
        """Return the result if it is here. Raises what the model did."""
        with self._changed:
            self._dispatch.raise_failure()
            found = self._dispatch.roster.result(task, what)
            self._lacks = found is None and self._dispatch.lacks
            return found

    def end(self, task: int) -> None:
        with self._changed:
            self._dispatch.roster.end(task)

    def clear(self) -> None:
        with self._changed:
            self._dispatch.roster.clear()

    def raise_failure(self) -> None:
        """Raise what the model did at a hand."""
        with self._changed:
            self._dispatch.raise_failure()

    # What the lane calls ----------------------------------------------------------------------------------------

    def on_session(self, me: str) -> None:
        self.on_lost()

    def on_lost(self) -> None:
        with self._deciding() as dispatch:
            dispatch.lose_all("the connection to the hands' broker was lost", time.monotonic())

    def on_body(self, body: bytes, ticket: int | None) -> None:
        try:
            note = say.decode(body)
        except RemoteProtocolError as error:
            self._unreadable += 1
            if self._unreadable <= MOST_LOGGED:
                log.warning("party %r: %s is dropped", self._party, error)
            return
        if isinstance(note, say.ToLead):
            with self._deciding() as dispatch:
                dispatch.hear(note, time.monotonic())
        self._wake()

    def on_gone(self, to: str) -> None:
        with self._deciding() as dispatch:
            dispatch.lose(to, "it has gone", time.monotonic())

    def on_failure(self, error: SlQueueError) -> None:
        log.warning("party %r: no hand can come any more: %s", self._party, error)
        with self._deciding() as dispatch:
            dispatch.lose_all(str(error), time.monotonic())
            if dispatch.lacks:
                dispatch.fail(error)
        self._wake()

    def _beat(self) -> None:
        """Find out who is still here, until the end."""
        while not self._ended.wait(PROBE_S):
            with self._deciding() as dispatch:
                dispatch.look(time.monotonic())

    @contextmanager
    def _deciding(self) -> Iterator[Dispatch]:
        """Change something: what follows is sent in order, and whoever waits looks again.

        Observers hear of it when the lock is free.
        """
        with self._changed:
            yield self._dispatch
            outgoing, self._dispatch.outgoing = self._dispatch.outgoing, []
            events, self._dispatch.events = self._dispatch.events, []
            for to, note in outgoing:
                self._lane.send(to, say.encode(note))
            self._changed.notify_all()
        for event in events:
            self._observe(event)

    # What the own hand calls ------------------------------------------------------------------------------------

    def _next_own(self) -> Call | None:
        with self._changed:
            while not self._ended.is_set():
                if (call := self._dispatch.next_own()) is not None:
                    return call
                self._changed.wait()
        return None

    def _weights_of(self, version: int) -> say.Weights | None:
        with self._changed:
            return self._dispatch.weights_of(version)

    def _take(self, result: Result) -> None:
        with self._deciding() as dispatch:
            dispatch.keep(result)
        self._wake()

    def _fail(self, error: SlQueueError) -> None:
        with self._deciding() as dispatch:
            dispatch.fail(error)
        self._wake()


def _keyed(workshop: Workshop, secret: bytes) -> Workshop:
    workshop.key_draws(secret)
    return workshop
