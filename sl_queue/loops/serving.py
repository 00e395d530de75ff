"""Serving, in full: the feature party above answers, the label holder below asks and gathers.

There are no commits: a request is acknowledged when it was answered, so whoever is killed finds it again. A late answer
is nobody's: the request has ended with the names of the parties that were silent.
"""

import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.serving import (
    MOST_ROWS,
    OTHER_RUN,
    OVER_LIMIT,
    Answered,
    Came,
    HourlyLimit,
    Keys,
    answer_of,
    keys_of,
    read_answer,
    refusal_of,
    request_of,
)

GATHER_S = 0.001  # for which a request waits for others that go with it
_REMEMBERED = 1000  # requests, which may be asked again
_ASKS = 5  # times that a request is sent within its deadline to a party that is silent: a broker may have lost it

Found = npt.NDArray[np.bool_]
Outputs = npt.NDArray[np.generic]


class Post(Protocol):
    """Requests and answers in and out."""

    def ask(self, party: str, run: str, number: MicroBatch, request: Payload) -> None:
        """Send a request to a feature party."""

    def answer(self, run: str, number: MicroBatch, answer: Payload) -> None:
        """Send an answer to the label holder."""


class Base(Protocol):
    """A base model with the weights of one run."""

    def answer(self, number: MicroBatch, keys: Keys) -> tuple[Found, Payload | None]:
        """Return which rows are here, and their activation; None for none."""


@dataclass(slots=True)
class FeatureService:
    """Answers requests one after the other. Mutable: it counts."""

    post: Post
    base_of: Callable[[str], Base | None]  # of a run; None: there is no version of it
    limit: HourlyLimit
    refused: Callable[[int], None]  # is told of rows that were asked for beyond the limit
    rows: int = 0  # answered
    _counted: deque[MicroBatch] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))  # asked once more, not again

    def serve(self, came: Came) -> None:
        """Answer a request, then acknowledge it."""
        keys, base = keys_of(came.payload), self.base_of(came.run)
        if base is None:
            answer = refusal_of(OTHER_RUN)
        elif came.number not in self._counted and not self.limit.admits(len(keys), time.monotonic()):
            answer = refusal_of(OVER_LIMIT)
            self.refused(len(keys))
        else:
            answer = answer_of(*_listed(base.answer(came.number, keys)))
            self._counted.append(came.number)
            self.rows += len(keys)
        self.post.answer(came.run, came.number, answer)
        came.done()


def _listed(found: tuple[Found, Payload | None]) -> tuple[Sequence[bool], Payload | None]:
    return found[0].tolist(), found[1]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one request, row by row."""

    run: str
    outputs: Sequence[Outputs | None]  # of each row; None for one that a party lacks
    lacking: Sequence[tuple[str, ...]]  # the parties that lack each row


class Unanswered(Exception):
    """A request that ended without an answer: parties were silent, hold other weights, or have had enough."""

    def __init__(self, silent: Sequence[str], refused: Mapping[str, str], after_s: float) -> None:
        super().__init__(f"no answer of {', '.join([*silent, *refused])}")
        self.silent, self.refused, self.after_s = tuple(silent), dict(refused), after_s


class Fuse(Protocol):
    """The label holder's models with the weights of one run."""

    run: str
    party: str

    def own(self, number: MicroBatch, keys: Keys) -> tuple[Found, object] | None:
        """Return which rows the label holder has, and its outputs for those; None without a base model."""

    def fused(
        self, number: MicroBatch, keys: Keys, there: Found, own: object, answers: Mapping[str, Answered]
    ) -> Outputs:
        """Return the outputs for the rows that are `there`. Raises RemoteProtocolError for an answer that does not fit."""


@dataclass(slots=True)
class _Asked:
    """One message's worth of rows, on its way."""

    number: MicroBatch
    fuse: Fuse
    keys: Keys
    waiting: list[tuple[int, Future[Outcome]]]  # rows of each request, in order
    began: float
    asks: int = 1
    answers: dict[str, Answered] = field(default_factory=dict)


class LabelService:
    """Asks all feature parties at once, and fuses what they answer. Mutable; thread-safe.

    Requests that come within `GATHER_S` go as one message. `fuse` is asked for the models of each message, so a
    new version is taken over between two messages.
    """

    def __init__(self, post: Post, parties: Sequence[str], fuse: Callable[[], Fuse], deadline_s: float) -> None:
        self._post, self._parties, self._fuse, self._deadline_s = post, tuple(parties), fuse, deadline_s
        self._requests: queue.Queue[tuple[Keys, Future[Outcome]] | None] = queue.Queue()
        self._lock, self._number = threading.Lock(), secrets.randbits(40)  # no two processes number alike
        self._asked: dict[MicroBatch, _Asked] = {}
        self.heard: dict[str, float] = {}
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._gather, self._give_up)]
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to take requests."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End all requests."""
        self._closed.set()
        self._requests.put(None)

    def predict(self, keys: Keys) -> Future[Outcome]:
        """Ask for these rows, at most MOST_ROWS; the future may raise Unanswered."""
        future: Future[Outcome] = Future()
        self._requests.put((keys, future))
        return future

    def take(self, came: Came) -> None:
        """Take an answer; one that nobody waits for any more is forgotten."""
        with self._lock:
            self.heard[came.sender] = time.monotonic()
            asked = self._asked.get(came.number)
            if asked is not None and asked.fuse.run == came.run and came.sender in self._parties:
                asked.answers[came.sender] = read_answer(came.payload, len(asked.keys))
            done = asked is not None and len(asked.answers) == len(self._parties)
            if done:
                del self._asked[came.number]
        came.done()
        if done and asked is not None:
            self._finish(asked)

    def _gather(self) -> None:
        held: tuple[Keys, Future[Outcome]] | None = None
        while not self._closed.is_set():
            first = held or self._requests.get()
            held = None
            if first is None:
                return
            batch, rows, until = [first], len(first[0]), time.monotonic() + GATHER_S
            while (left := until - time.monotonic()) > 0:
                try:
                    following = self._requests.get(timeout=left)
                except queue.Empty:
                    break
                if following is None:
                    return
                if rows + len(following[0]) > MOST_ROWS:
                    held = following
                    break
                batch.append(following)
                rows += len(following[0])
            self._send(batch)

    def _send(self, batch: list[tuple[Keys, Future[Outcome]]]) -> None:
        keys = np.concatenate([each for each, _ in batch])
        self._number += 1
        waiting = [(len(each), future) for each, future in batch]
        try:
            asked = _Asked(MicroBatch(self._number, 0), self._fuse(), keys, waiting, time.monotonic())
            with self._lock:
                self._asked[asked.number] = asked
            for party in self._parties:
                self._post.ask(party, asked.fuse.run, asked.number, request_of(keys))
        except SlQueueError as error:
            for _, future in batch:
                future.set_exception(error)

    def _give_up(self) -> None:
        while not self._closed.wait(min(0.05, self._deadline_s / 4)):
            now = time.monotonic()
            with self._lock:
                late = [asked for asked in self._asked.values() if now - asked.began > self._deadline_s]
                for asked in late:
                    del self._asked[asked.number]
                due = [a for a in self._asked.values() if now - a.began > a.asks * self._deadline_s / _ASKS]
            for asked in due:
                self._ask_again(asked)
            for asked in late:
                silent = [party for party in self._parties if party not in asked.answers]
                refused = {party: a.refused for party, a in asked.answers.items() if a.refused}
                self._fail(asked, Unanswered(silent, refused, now - asked.began))

    def _ask_again(self, asked: _Asked) -> None:
        asked.asks += 1
        for party in self._parties:
            if party not in asked.answers:
                with suppress(SlQueueError):  # the link has failed: the deadline will say who was silent
                    self._post.ask(party, asked.fuse.run, asked.number, request_of(asked.keys))

    def _finish(self, asked: _Asked) -> None:
        refused = {party: answer.refused for party, answer in asked.answers.items() if answer.refused}
        if refused:
            self._fail(asked, Unanswered((), refused, time.monotonic() - asked.began))
            return
        try:
            self._fulfil(asked)
        except (SlQueueError, RemoteProtocolError) as error:
            self._fail(asked, error)

    def _fulfil(self, asked: _Asked) -> None:
        own = asked.fuse.own(asked.number, asked.keys)
        found = {party: answer.found for party, answer in asked.answers.items()}
        if own is not None:
            found[asked.fuse.party] = own[0]
        there = np.logical_and.reduce(list(found.values()))
        outputs: list[Outputs | None] = [None] * len(asked.keys)
        if there.any():
            fused = asked.fuse.fused(asked.number, asked.keys, there, own, asked.answers)
            for place, row in zip(np.flatnonzero(there), fused, strict=True):
                outputs[place] = row
        lacking = [tuple(party for party, here in found.items() if not here[row]) for row in range(len(asked.keys))]
        first = 0
        for rows, future in asked.waiting:
            part = slice(first, first + rows)
            future.set_result(Outcome(asked.fuse.run, outputs[part], lacking[part]))
            first += rows

    @staticmethod
    def _fail(asked: _Asked, error: Exception) -> None:
        for _, future in asked.waiting:
            future.set_exception(error)
