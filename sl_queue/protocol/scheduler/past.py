"""Past of a run, for whoever begins to watch it when it is far on: its curves, thinned so that they fit in a status.

It is sent unasked and now and then, so its cost does not depend on how many watch, nor on how long the run has been.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.history import History

MOST_POINTS = 400
MOST_NUMBERS = 2000  # in all epochs together; an epoch with many metrics has many

Point = tuple[int, float, float | None]  # step, loss, samples/s


@dataclass(frozen=True, slots=True)
class Past:
    """Points and epochs, oldest first, evenly thinned; the newest of each are there."""

    points: tuple[Point, ...] = ()
    epochs: tuple[EpochResult, ...] = ()


def past_of(points: Sequence[Point], history: History) -> Past:
    """Thin the points of a run, and the epochs of its history."""
    most = max(1, MOST_NUMBERS // (3 + max(map(_numbers, history.newest(1)), default=0)))
    epochs = (replace(history[place], tables=None) for place in _evenly(len(history), most))
    return Past(tuple(points[place] for place in _evenly(len(points), MOST_POINTS)), tuple(epochs))


def _numbers(result: EpochResult) -> int:
    leak = sum(map(len, (result.leak or {}).values()))
    return leak + len(result.holdout or {}) + len(result.train or {})


def _evenly(count: int, most: int) -> list[int]:
    """Choose at most `most` places below `count`, ascending and evenly far apart, the last one among them."""
    every = -(-count // most)
    return list(range(count - 1, -1, -every))[::-1] if count else []
