"""Serving, in full: the feature party above answers, the label holder below asks and gathers.

There are no commits: a request is acknowledged once it was answered, so whoever is killed finds it again, and perhaps a
few that were. A late answer is nobody's: the request has ended with the names of the parties that were silent.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from sl_queue.errors import ComputeError, SlQueueError
from sl_queue.loops.requests import Asked, Base, Fuse, Outcome, Post, Request, Unanswered, fused
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.serving import (
    FAILED,
    MOST_ROWS,
    NO_COLUMN,
    NOT_EXPLAINED,
    OTHER_RUN,
    OVER_LIMIT,
    Came,
    HourlyLimit,
    Keys,
    Worth,
    answer_of,
    keys_of,
    read_answer,
    refusal_of,
    request_of,
    worth_of,
)

GATHER_S = 0.005  # after the newest message, at which what waits goes all the same
_SHARE = 0.5  # of the time that an answer takes, if that is longer: over a slow link so few are on their way at once
_NEWEST = 0.125  # weight of the newest answer in the average
_REMEMBERED = 1000  # requests, which may be asked again
_ASKS = 5  # times that a request is sent within its deadline to a party that is silent: a broker may have lost it


@dataclass(slots=True)
class FeatureService:
    """Answers requests one after the other. Mutable: it counts."""

    post: Post
    base_of: Callable[[str], Base | None]  # of a run; None: there is no version of it
    limit: HourlyLimit
    refused: Callable[[int], None]  # is told of rows that were asked for beyond the limit
    explained: Callable[[str, Worth], None] | None = None  # takes what columns are worth; None: nobody may ask for it
    rows: int = 0  # answered
    _counted: dict[MicroBatch, None] = field(default_factory=dict)  # the newest: asked once more, they are not again

    def serve(self, came: Came) -> None:
        """Answer a request, then acknowledge it. Raises RemoteProtocolError for one that cannot be read."""
        worth = worth_of(came.payload)
        answer = self._answer(came) if worth is None else self._thanks(came, worth)
        self.post.answer(came.run, came.number, answer)
        came.done()

    def refuse(self, came: Came) -> None:
        """Say of a request that its rows could not be computed, and acknowledge it."""
        self.post.answer(came.run, came.number, refusal_of(FAILED))
        came.done()

    def _answer(self, came: Came) -> Payload:
        (keys, deal), base = keys_of(came.payload), self.base_of(came.run)
        if base is None:
            return refusal_of(OTHER_RUN)
        if deal is not None and self.explained is None:
            return refusal_of(NOT_EXPLAINED)
        if deal is not None and deal.column is not None and deal.column >= base.columns:
            return refusal_of(NO_COLUMN)
        if came.number not in self._counted and not self.limit.admits(len(keys), time.monotonic()):
            self.refused(len(keys))
            return refusal_of(OVER_LIMIT)
        found, activation = base.answer(came.number, keys, deal)
        self._counted[came.number] = None
        if len(self._counted) > _REMEMBERED:
            del self._counted[next(iter(self._counted))]
        self.rows += len(keys)
        return answer_of(found.tolist(), activation)

    def _thanks(self, came: Came, worth: Worth) -> Payload:
        if self.explained is None:
            return refusal_of(NOT_EXPLAINED)
        self.explained(came.run, worth)
        return answer_of([True], None)


class LabelService:
    """Asks all feature parties at once, and fuses what they answer. Mutable; thread-safe.

    A request goes at once if no other is on its way. Else it waits, with all that come meanwhile, for the next answer,
    and they go as one message: the more is asked, the more goes in each. Over a slow link, or when an answer is lost,
    they go some milliseconds after the message before, or half of a usual answer's time. Own outputs are computed while
    the parties answer. `fuse` is asked for the models of each message, so a new version is taken over between two.
    """

    def __init__(self, post: Post, parties: Sequence[str], fuse: Callable[[], Fuse], deadline_s: float) -> None:
        self._post, self._parties, self._fuse, self._deadline_s = post, tuple(parties), fuse, deadline_s
        self._lock, self._number = threading.Lock(), secrets.randbits(40)  # no two processes number alike
        self._pending: deque[Request] = deque()
        self._asked: dict[MicroBatch, Asked] = {}
        self._trip_s = 0.0  # between a message and its answers, on average
        self._sent_at = 0.0  # of the newest message, monotonic
        self.heard: dict[str, float] = {}
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._gather, self._give_up)]
        self._some_wait, self._closed = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin to take requests."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Take no more requests; those on their way end with an answer or with the deadline."""
        self._closed.set()
        self._some_wait.set()

    def predict(self, keys: Keys) -> Future[Outcome]:
        """Ask for these rows, at most MOST_ROWS; the future may raise Unanswered."""
        found = self.add(keys)
        self.go()
        return found

    def add(self, keys: Keys) -> Future[Outcome]:
        """Do as `predict`, with the next `go`: rows that are added together go together."""
        request = Request(keys)
        with self._lock:
            self._pending.append(request)
        return request.future

    def go(self) -> None:
        """Send what waits, unless a message is on its way: then it goes with the next one."""
        with self._lock:
            idle = not self._asked
        if idle:
            self._prepare(self._send_waiting())
        if self._pending:
            self._some_wait.set()

    def probe(self, fuse: Fuse) -> Future[Outcome]:
        """Ask with other models than those in use, for a row that hardly anyone has, to learn who has this run."""
        request = Request(np.array([secrets.randbits(64)], np.uint64))
        self._prepare(self._send([request], fuse))
        return request.future

    def take(self, came: Came) -> None:
        """Take an answer; one that nobody waits for any more is forgotten."""
        with self._lock:
            self.heard[came.sender] = time.monotonic()
            asked = self._asked.get(came.number)
            if asked is not None and asked.fuse.run == came.run and came.sender in self._parties:
                asked.answers[came.sender] = read_answer(came.payload, len(asked.keys))
            done = asked is not None and self._end(asked)
            if done and asked is not None and asked.asks == 1:
                self._trip_s += (time.monotonic() - asked.began - self._trip_s) * _NEWEST
        if done and asked is not None:
            self._go_on(asked)
        came.done()

    def _end(self, asked: Asked) -> bool:
        """Forget a message once everything for it is there; the lock is held. Return True for who must finish it."""
        return asked.ended(self._parties) and self._asked.pop(asked.number, None) is not None

    def _go_on(self, ended: Asked | None) -> None:
        """Finish a message, after the next one was sent, if some wait for it."""
        while ended is not None:
            following = self._send_waiting()
            self._finish(ended)
            ended = None if following is None else self._prepared(following)

    # Out --------------------------------------------------------------------------------------------------------

    def _gather(self) -> None:
        """Send what waits for longer than an answer should take; and all of it at the end."""
        while not self._closed.is_set():
            self._some_wait.wait()
            self._some_wait.clear()
            while self._pending:
                pause_s = max(GATHER_S, min(self._trip_s, self._deadline_s) * _SHARE)
                left_s = self._sent_at + pause_s - time.monotonic()
                if left_s <= 0 or self._closed.wait(left_s):
                    self._prepare(self._send_waiting())

    def _send_waiting(self) -> Asked | None:
        """Send the requests that wait, as many as fit into one message; None if nothing was sent."""
        with self._lock:
            batch: list[Request] = []
            rows = 0
            while self._pending and (not batch or rows + len(self._pending[0].keys) <= MOST_ROWS):
                batch.append(self._pending.popleft())
                rows += len(batch[-1].keys)
        return self._send(batch) if batch else None

    def _send(self, batch: list[Request], fuse: Fuse | None = None, began: float | None = None) -> Asked | None:
        keys = batch[0].keys if len(batch) == 1 else np.concatenate([request.keys for request in batch])
        try:
            models = self._fuse() if fuse is None else fuse
        except Exception as error:  # whatever it is, nobody waits for an answer that cannot come
            for request in batch:
                request.future.set_exception(error)
            return None
        with self._lock:
            self._number += 1
            self._sent_at = time.monotonic()
            asked = Asked(MicroBatch(self._number, 0), models, keys, batch, began or self._sent_at)
            self._asked[asked.number] = asked
        try:
            for party in self._parties:
                self._post.ask(party, asked.fuse.run, asked.number, request_of(keys))
        except Exception as error:
            self._give_up_on(asked, error)
            return None
        return asked

    def _prepare(self, asked: Asked | None) -> None:
        """Compute the own outputs, while the parties answer; finish the message if they have."""
        if asked is not None:
            self._go_on(self._prepared(asked))

    def _prepared(self, asked: Asked) -> Asked | None:
        """Compute the own outputs; return the message if that was the last that it waited for."""
        try:
            own = asked.fuse.own(asked.number, asked.keys)
        except Exception as error:
            self._give_up_on(asked, error)
            return None
        with self._lock:
            asked.own, asked.prepared = own, True
            return asked if self._end(asked) else None

    # Late -------------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        while not self._closed.wait(min(0.05, self._deadline_s / 4)) or self._asked:
            now = time.monotonic()
            with self._lock:
                late = [asked for asked in self._asked.values() if now - asked.began > self._deadline_s]
                due = [a for a in self._asked.values() if now - a.began > a.asks * self._deadline_s / _ASKS]
            for asked in late:
                silent = [party for party in self._parties if party not in asked.answers]
                refused = {party: a.refused for party, a in asked.answers.items() if a.refused}
                self._give_up_on(asked, Unanswered(silent, refused, now - asked.began))
            for asked in due:
                self._ask_again(asked)

    def _give_up_on(self, asked: Asked, error: Exception) -> None:
        with self._lock:
            mine = self._asked.pop(asked.number, None) is not None
        if mine:
            self._fail(asked, error)

    def _fail(self, asked: Asked, error: Exception) -> None:
        """End a message with an error; if a model failed on its rows, each of several requests is asked on its own."""
        failed = FAILED in error.refused.values() if isinstance(error, Unanswered) else isinstance(error, ComputeError)
        if not failed or len(asked.requests) == 1:
            asked.fail(error)
            return
        for request in asked.requests:
            self._prepare(self._send([request], asked.fuse, asked.began))

    def _ask_again(self, asked: Asked) -> None:
        asked.asks += 1
        for party in self._parties:
            if party not in asked.answers:
                with suppress(SlQueueError):  # the link has failed: the deadline will say who was silent
                    self._post.ask(party, asked.fuse.run, asked.number, request_of(asked.keys))

    # In ---------------------------------------------------------------------------------------------------------

    def _finish(self, asked: Asked) -> None:
        refused = {party: answer.refused for party, answer in asked.answers.items() if answer.refused}
        if refused:
            self._fail(asked, Unanswered((), refused, time.monotonic() - asked.began))
            return
        try:
            predictions, lacking = fused(asked)
        except Exception as error:
            self._fail(asked, error)
            return
        first = 0
        for request in asked.requests:
            part = slice(first, first + len(request.keys))
            request.future.set_result(Outcome(asked.fuse.run, predictions[part], lacking[part]))
            first = part.stop
