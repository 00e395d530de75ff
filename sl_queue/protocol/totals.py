"""Totals of a worker process: what it has done with its time and its messages since it started.

A worker tells the scheduler once a second. Totals only grow, so whoever watches takes differences over any time it
likes, and one that is lost costs nothing.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite

from sl_queue.protocol.text import LONGEST_NAME, printable

TOTALS_S = 1.0  # how often they are told
MOST_CAUSES = 16  # of one source
OF_HANDS = "hands"  # source of a wait for what hands compute
HAND_TO_COME = "a hand to come"  # cause of such a wait while none is here
SELF = ("scheduler", "broker", "disk", OF_HANDS)  # sources of a wait that are no party


@dataclass(frozen=True, slots=True)
class Now:
    """Wait of a worker at this moment."""

    source: str  # a party, scheduler, broker, disk or hands
    cause: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters since the process started; `busy_s` and all of `waited_s` add up to `age_s`."""

    age_s: float = 0.0
    busy_s: float = 0.0  # not waiting for anything
    waited_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by source, then by cause
    messages: Mapping[str, int] = field(default_factory=dict)  # data messages received, by what became of them
    sent_bytes: int = 0
    received_bytes: int = 0
    tensor_bytes: int = 0  # of what was sent, messages with a tensor
    float32_bytes: int = 0  # which would have taken this as float32
    resent: int = 0  # messages sent again because a peer asked
    commits: int = 0  # checkpoints written
    reconnects: int = 0
    now: Now | None = None  # what it waits for
    hands: int | None = None  # that compute for it now; null: it has no use for any


Totalling = Callable[[Mapping[str, int]], Totals]  # given the data messages by fate


def bounded(told: Totals, parties: Collection[str]) -> Totals:
    """Return what is believed of a party's totals: sources that there are, and numbers that are numbers."""
    sources = {*parties, *SELF}
    return replace(
        told,
        age_s=_seconds(told.age_s),
        busy_s=_seconds(told.busy_s),
        waited_s={source: _few(causes) for source, causes in told.waited_s.items() if source in sources},
        messages={_name(fate): max(0, count) for fate, count in list(told.messages.items())[:MOST_CAUSES]},
        now=_now(told.now, sources),
        hands=None if told.hands is None else max(0, told.hands),
    )


def _few(causes: Mapping[str, float]) -> dict[str, float]:
    return {_name(cause): _seconds(seconds) for cause, seconds in list(causes.items())[:MOST_CAUSES]}


def _now(told: Now | None, sources: Collection[str]) -> Now | None:
    if told is None or told.source not in sources:
        return None
    return Now(told.source, _name(told.cause), _seconds(told.seconds))


def _seconds(value: float) -> float:
    return round(value, 3) if isfinite(value) and value > 0 else 0.0


def _name(text: str) -> str:
    return printable(text, LONGEST_NAME)
