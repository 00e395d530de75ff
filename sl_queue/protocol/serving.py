"""Single requests to a trained model, as messages: a request names rows by keyed hashes, an answer is an activation.

A request travels as a gradient would and an answer as held-out rows do, under the number of the request and the run
whose weights are meant, so no login needs a new right. An answer says which of the rows it is of; a refusal says why.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.text import counted

Keys = npt.NDArray[np.uint64]

MOST_ROWS: Final = 512  # of one message
OTHER_RUN: Final = "run"
OVER_LIMIT: Final = "limit"
NO_COLUMN: Final = "column"
NOT_EXPLAINED: Final = "explain"
FAILED: Final = "failed"
_KEY_BYTES: Final = 8
_FOUND, _REFUSED, _DEAL, _WORTH, _HOUR_S = "found:", "refused:", "deal:", "worth:", 3600.0


@dataclass(frozen=True, slots=True)
class Deal:
    """Values that are dealt out to other rows: of one of a party's columns, by place, or of all of them (None)."""

    column: int | None
    order: int  # which of the permutations


@dataclass(frozen=True, slots=True)
class Worth:
    """By how much a metric gets worse without a party's columns: all of them, then each by place."""

    metric: str
    worse: Sequence[float]


def request_of(keys: Keys, deal: Deal | None = None) -> Payload:
    """Return a request for these rows, at least one; with a `deal` after the values in question were dealt out."""
    said = "" if deal is None else f"{_DEAL}{-1 if deal.column is None else deal.column}:{deal.order}"
    return Payload("int8", (len(keys), _KEY_BYTES), keys.astype("<u8").tobytes(), b"", said)


def keys_of(request: Payload) -> tuple[Keys, Deal | None]:
    """Read a request. Raises RemoteProtocolError."""
    deal = None
    if request.packing.startswith(_DEAL):
        column, _, order = request.packing.removeprefix(_DEAL).partition(":")
        if re.fullmatch(r"-1|\d{1,6}", column, re.ASCII) and re.fullmatch(r"\d{1,3}", order, re.ASCII):
            deal = Deal(None if column == "-1" else int(column), int(order))
    fits = request.dtype == "int8" and request.shape[1:] == (_KEY_BYTES,) and request.shape[0] <= MOST_ROWS
    if not fits or (request.packing and deal is None):
        raise RemoteProtocolError(f"a request for rows is {request}")
    return np.frombuffer(request.data, "<u8").astype(np.uint64), deal


def worth_payload(worth: Worth) -> Payload:
    """Return what tells a feature party what its columns are worth."""
    values = np.asarray(worth.worse, "<f8")
    return Payload("float64", values.shape, values.tobytes(), b"", f"{_WORTH}{worth.metric}")


def worth_of(request: Payload) -> Worth | None:
    """Read what columns are worth; None for a request for rows. Raises RemoteProtocolError."""
    if not request.packing.startswith(_WORTH):
        return None
    if request.dtype != "float64" or len(request.shape) != 1 or len(request.data) != 8 * request.shape[0]:
        raise RemoteProtocolError(f"an explanation is {request}")
    return Worth(request.packing.removeprefix(_WORTH)[:100], np.frombuffer(request.data, "<f8").tolist())


def answer_of(found: Sequence[bool], activation: Payload | None) -> Payload:
    """Return an answer: the activation of the rows that were found, in the order of the request."""
    bits = np.packbits(np.asarray(found, np.bool_)).tobytes().hex()
    if activation is None:
        return Payload("int8", (1,), b"", b"", f"{_FOUND}{bits}|none")
    return replace(activation, packing=f"{_FOUND}{bits}|{activation.packing}")


def refusal_of(reason: str) -> Payload:
    """Return a refusal: OTHER_RUN, OVER_LIMIT, NO_COLUMN, NOT_EXPLAINED or FAILED."""
    return Payload("int8", (1,), b"", b"", f"{_REFUSED}{reason}")


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, read."""

    found: npt.NDArray[np.bool_] = field(repr=False)  # (rows of the request,)
    activation: Payload | None  # of those, as it left the cut
    refused: str = ""


def read_answer(answer: Payload, rows: int) -> Answered:
    """Read an answer to a request for so many rows. Raises RemoteProtocolError."""
    if answer.packing.startswith(_REFUSED):
        return Answered(np.zeros(rows, np.bool_), None, answer.packing.removeprefix(_REFUSED)[:20])
    if not answer.packing.startswith(_FOUND):
        raise RemoteProtocolError(f"an answer is {answer}")
    bits, _, packing = answer.packing.removeprefix(_FOUND).partition("|")
    try:
        found = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8)).astype(np.bool_)[:rows]
    except ValueError:
        raise RemoteProtocolError("an answer does not say which rows it is of") from None
    if len(found) != rows:
        raise RemoteProtocolError(f"an answer is of {counted(len(found), 'row', 'rows')}, {rows} were asked for")
    return Answered(found, None if packing == "none" else replace(answer, packing=packing))


@dataclass(frozen=True, slots=True)
class Came:
    """A request or an answer that came in."""

    sender: str
    run: str
    number: MicroBatch
    payload: Payload
    done: Callable[[], None]  # acknowledges it


@dataclass(slots=True)
class HourlyLimit:
    """Rows that were answered within the last hour. Mutable: it counts."""

    at_most: int  # 0: no limit
    _counted: deque[tuple[float, int]] = field(default_factory=deque)
    _rows: int = 0

    def admits(self, rows: int, now: float) -> bool:
        """Count rows and return True, if an hour's limit admits them; `now` in seconds, monotonic."""
        while self._counted and self._counted[0][0] <= now - _HOUR_S:
            self._rows -= self._counted.popleft()[1]
        if self.at_most and self._rows + rows > self.at_most:
            return False
        self._counted.append((now, rows))
        self._rows += rows
        return True
