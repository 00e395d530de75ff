"""Several observers as one."""

import logging
from dataclasses import dataclass, field

from sl_queue.protocol.events import Event, Observer, ignore

log = logging.getLogger("sl_queue")


def fan_out(*observers: Observer) -> Observer:
    """Return an observer that passes each event on to all of these; what one raises reaches nobody else."""
    passed_on = tuple(observer for observer in observers if observer is not ignore)
    return _FanOut(passed_on) if passed_on else ignore


@dataclass(frozen=True, slots=True)
class _FanOut:
    observers: tuple[Observer, ...]
    failed: set[int] = field(default_factory=set)  # places of those whose error was logged

    def __call__(self, event: Event, /) -> None:
        for place, observer in enumerate(self.observers):
            try:
                observer(event)
            except Exception:
                if place not in self.failed:
                    self.failed.add(place)
                    log.exception("an observer of the run has failed; the run goes on")
