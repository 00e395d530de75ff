"""Measurements that a channel makes of itself, for whoever observes it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Connectivity:
    """The connection between a worker and its broker."""

    connected: bool
    changed_s: float  # since it was made or lost; inf while there never was one
    certificates: Mapping[str, float]  # Unix time at which they end: "broker", and "own" of who logs in with one

    @property
    def lost_s(self) -> float:
        """Seconds without a connection: 0 with one, inf while there never was one."""
        return 0.0 if self.connected else self.changed_s


IN_PROCESS = Connectivity(connected=True, changed_s=0.0, certificates={})  # memory://


@dataclass(frozen=True, slots=True)
class Measures:
    """Numbers of a party's channel since its process started; `busy_s` and all of `waited_s` add up to `age_s`."""

    age_s: float
    busy_s: float
    pulse_age_s: float  # since its own thread was last alive
    waited_s: Mapping[tuple[str, str], float]  # by (source, what for)
    silent_s: Mapping[str, float]  # since anything was heard, by peer
    messages: Mapping[str, int]  # data messages applied, redelivered, duplicates, stale, rejected
    sent_bytes: int
    received_bytes: int
    commits: int
    reconnects: int
    broker: Connectivity


@dataclass(frozen=True, slots=True)
class HandCounts:
    """Numbers of a lead: its hands now, and what they did since its process started."""

    hands: int
    calls: int  # done
    repeated: int  # tasks that were dealt again, since whoever had them was lost
    busy_s: float  # of all hands, the lead's own among them
    waiting: int  # tasks that nobody has
    lacks: bool  # whether the run waits for a hand to come
