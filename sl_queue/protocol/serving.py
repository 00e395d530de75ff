"""Single requests to a trained model, as messages: a request names rows by keyed hashes, an answer is an activation.

A request travels as a gradient would and an answer as held-out rows do, under the number of the request and the run
whose weights are meant, so no login needs a new right. An answer says which of the rows it is of; a refusal says why.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.messages import MicroBatch, Payload

Keys = npt.NDArray[np.uint64]

MOST_ROWS: Final = 512  # of one message
OTHER_RUN: Final = "run"
OVER_LIMIT: Final = "limit"
_KEY_BYTES: Final = 8
_FOUND, _REFUSED, _HOUR_S = "found:", "refused:", 3600.0


def request_of(keys: Keys) -> Payload:
    """Return a request for these rows, at least one."""
    return Payload("int8", (len(keys), _KEY_BYTES), keys.astype("<u8").tobytes(), b"")


def keys_of(request: Payload) -> Keys:
    """Read a request. Raises RemoteProtocolError."""
    fits = request.dtype == "int8" and request.shape[1:] == (_KEY_BYTES,) and request.shape[0] <= MOST_ROWS
    if not fits or request.packing:
        raise RemoteProtocolError(f"a request for rows is {request}")
    return np.frombuffer(request.data, "<u8").astype(np.uint64)


def answer_of(found: Sequence[bool], activation: Payload | None) -> Payload:
    """Return an answer: the activation of the rows that were found, in the order of the request."""
    bits = np.packbits(np.asarray(found, np.bool_)).tobytes().hex()
    if activation is None:
        return Payload("int8", (1,), b"", b"", f"{_FOUND}{bits}|none")
    return replace(activation, packing=f"{_FOUND}{bits}|{activation.packing}")


def refusal_of(reason: str) -> Payload:
    """Return a refusal: OTHER_RUN or OVER_LIMIT."""
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
        raise RemoteProtocolError(f"an answer is of {len(found)} rows, {rows} were asked for")
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
