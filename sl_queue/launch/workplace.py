"""The place where a role works: its way to the broker, its state folder, its key, and whoever watches it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from sl_queue.launch.connect import Channel, Channels, Connect
from sl_queue.observe.fan_out import fan_out
from sl_queue.observe.log import to_log
from sl_queue.protocol.events import Observer
from sl_queue.security.sealing import Seal

C = TypeVar("C", bound=Channel)


@dataclass(frozen=True, slots=True)
class Workplace:
    """Everything around a role that is not the job; a process of several roles has one for each."""

    connect: Connect
    state: Path
    channels: Channels = field(default_factory=Channels)  # of all roles in this process
    seal: Seal | None = None
    observe: Observer = to_log

    def watched_by(self, *observers: Observer) -> "Workplace":
        """Return the same place with further observers."""
        return replace(self, observe=fan_out(self.observe, *observers))

    def in_folder(self, state: Path) -> "Workplace":
        """Return the same place with another state folder."""
        return replace(self, state=state)

    @contextmanager
    def opened(self, channel: C) -> Iterator[C]:
        """Open a channel that fails with the others of this process, and close it after the body."""
        try:
            channel.open()
            self.channels.add(channel)
            yield channel
        finally:
            channel.close()
