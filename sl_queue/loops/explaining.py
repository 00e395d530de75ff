"""The label holder's questions for an explanation; the feature party answers them as it serves (serving.py).

Every request is asked again until it is answered, whoever is killed meanwhile: what an answer holds depends on the
request alone.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence

from sl_queue.errors import AlignmentError, ComputeError, JobError, PeerSilent, SlQueueError
from sl_queue.loops.requests import Post
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.serving import (
    FAILED,
    NO_COLUMN,
    NOT_EXPLAINED,
    OTHER_RUN,
    OVER_LIMIT,
    Answered,
    Came,
    Deal,
    Keys,
    Worth,
    read_answer,
    request_of,
    worth_payload,
)

_WINDOW = 8  # requests on their way
_AGAIN_S = 2.0  # after which a request is sent again


class Questions:
    """Asks one feature party after the other. Thread-safe; mutable: it waits for answers."""

    def __init__(self, post: Post, run: str, patience_s: float, failure: Callable[[], SlQueueError | None]) -> None:
        self._post, self._run, self._patience_s, self._failure = post, run, patience_s, failure
        self._number, self._came = secrets.randbits(40), threading.Condition()
        self._rows: dict[tuple[str, MicroBatch], int] = {}  # of the requests on their way
        self._answers: dict[tuple[str, MicroBatch], Answered] = {}

    def take(self, came: Came) -> None:
        """Take an answer. Raises RemoteProtocolError for one that cannot be read."""
        with self._came:
            rows = self._rows.get((came.sender, came.number))
            if rows is not None and came.run == self._run:
                self._answers[came.sender, came.number] = read_answer(came.payload, rows)
                self._came.notify_all()
        came.done()

    def ask(self, party: str, parts: Sequence[Keys], deal: Deal | None = None) -> list[Answered] | None:
        """Return the answers for each part of the rows; None if the party has no such column. Raises SlQueueError."""
        found: list[Answered] = []
        for first in range(0, len(parts), _WINDOW):
            found += self._gather(
                party, [(len(keys), request_of(keys, deal)) for keys in parts[first : first + _WINDOW]]
            )
            if found[-1].refused == NO_COLUMN:
                return None
        return found

    def tell(self, party: str, worth: Worth) -> None:
        """Tell a party what its columns are worth. Raises SlQueueError."""
        self._gather(party, [(1, worth_payload(worth))])

    def _gather(self, party: str, requests: Sequence[tuple[int, Payload]]) -> list[Answered]:
        numbers = [MicroBatch(self._number + place, 0) for place in range(len(requests))]
        self._number += len(requests)
        waiting = dict(zip(numbers, requests, strict=True))
        with self._came:
            self._rows = {(party, number): rows for number, (rows, _) in waiting.items()}
            self._answers.clear()
        heard = asked = float("-inf")
        began = time.monotonic()
        while waiting:
            if (failure := self._failure()) is not None:
                raise failure
            now = time.monotonic()
            if now - asked > _AGAIN_S:
                asked = now
                for number, (_, request) in waiting.items():
                    self._post.ask(party, self._run, number, request)
            with self._came:
                self._came.wait(_AGAIN_S / 4)
                there = {number for number in waiting if (party, number) in self._answers}
            heard = time.monotonic() if there else heard
            waiting = {number: each for number, each in waiting.items() if number not in there}
            if waiting and time.monotonic() - max(heard, began) > self._patience_s:
                raise PeerSilent(f"{party} has not answered for {self._patience_s:g} s: start its worker with --serve")
        with self._came:
            found = [self._answers[party, number] for number in numbers]
        _require_answers(party, self._run, found)
        return found


def _require_answers(party: str, run: str, found: Sequence[Answered]) -> None:
    refused = {answer.refused for answer in found} - {"", NO_COLUMN}
    if OTHER_RUN in refused:
        raise AlignmentError(f"{party} has no weights of run {run}; give --run")
    if NOT_EXPLAINED in refused:
        raise JobError(f"{party} does not let others explain by its columns: [serve] explain = true there allows it")
    if OVER_LIMIT in refused:
        raise JobError(f"{party} answers no more in this hour: its at_most is used up; the explanation is incomplete")
    if FAILED in refused:
        raise ComputeError(f"{party} could not compute some of these rows; its log says why")
    if refused:
        raise JobError(f"{party} has refused to answer: {', '.join(sorted(refused))}")
