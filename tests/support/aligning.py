"""A whole alignment over a MemoryBroker, with real secrets and files; any role may be crashed, and comes again."""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sl_queue.errors import SlQueueError
from sl_queue.loops.alignment import PartyAlignment
from sl_queue.loops.alignment_ports import Ids
from sl_queue.loops.comparing import Comparing
from sl_queue.protocol.alignment import Ring, Rule
from sl_queue.protocol.comparison import Comparison
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.security.sealing import Seal
from sl_queue.storage.aligned_file import Aligned, read_aligned
from sl_queue.storage.alignment_files import PartyFiles, SchedulerFiles
from sl_queue.transport.alignment_channel import PREFETCH, LinkAlignmentChannel
from sl_queue.transport.memory import MemoryBroker
from tests.support.toy_run import Crash, CrashAt


class CrashingLink:
    """A link whose role dies at a chosen operation of its own thread."""

    def __init__(self, link: Any, role: str, crash: CrashAt, spy: Callable[[str, bytes], None]) -> None:
        self._link, self._thread, self._crash, self._spy = link, f"{role}-main", crash, spy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def publish(self, receiver: str, kind: Any, run: str, body: bytes, **kwargs: Any) -> None:
        lasting = kwargs.get("expires_s") is None and threading.current_thread().name == self._thread
        self._spy(receiver, body)
        if lasting:
            self._crash("before publish")
        self._link.publish(receiver, kind, run, body, **kwargs)
        if lasting:
            self._crash("after publish")

    def flush(self, timeout_s: float | None = None, mark: int | None = None) -> bool:
        return bool(self._link.flush(timeout_s, mark))

    def acknowledge(self, tags: Any) -> None:
        if threading.current_thread().name == self._thread:
            self._crash("before acknowledge")
        self._link.acknowledge(tags)


@dataclass(slots=True)
class Alignment:
    """Parties with their ids (the first holds the labels), and a scheduler."""

    folder: Path
    ids: Mapping[str, Sequence[str]]
    at_least: int = 1
    at_most: int | None = None
    pad: int = 4
    chunk: int = 3
    patience_s: float = 1.0
    types: Mapping[str, str] = field(default_factory=dict)
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    crashes: dict[str, CrashAt] = field(default_factory=dict)
    errors: dict[str, SlQueueError] = field(default_factory=dict)
    traffic: list[tuple[str, str, bytes]] = field(default_factory=list)  # (sender, receiver, body)
    found: dict[str, list[str]] = field(default_factory=dict)
    statuses: list[float] = field(default_factory=list)
    seal_of: Callable[[str], Seal | None] = lambda role: None
    on_party: Callable[[PartyAlignment], None] = lambda party: None
    numbers: Any = field(default_factory=itertools.count)

    @property
    def rule(self) -> Rule:
        label, *features = self.ids
        return Rule({"name": "toy"}, Ring(label, tuple(features)), self.at_least, self.at_most, self.pad, self.chunk)

    def run(self, timeout_s: float = 30.0) -> "Alignment":
        """To the end; every crashed role is started again, as a supervisor would."""
        roles = (SCHEDULER, *self.ids)
        threads = [threading.Thread(target=self.serve, args=(r,), name=f"{r}-main", daemon=True) for r in roles]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), [t.name for t in threads if t.is_alive()]
        return self

    def serve(self, role: str) -> None:
        """Run one role to its end."""
        while True:
            link = channel = None
            try:
                topology = Topology(*self._sides())
                link = self.broker.link(role, topology, PREFETCH)
                crash = self.crashes.get(role, CrashAt())

                def spy(receiver: str, body: bytes) -> None:
                    self.traffic.append((role, receiver, bytes(body)))

                wrapped: Any = CrashingLink(link, role, crash, spy)
                number = f"{role}-{next(self.numbers)}"
                about = {"patience_s": self.patience_s, "seal": self.seal_of(role)}
                channel = LinkAlignmentChannel(wrapped, role, topology, number, **about)  # type: ignore[arg-type]
                channel.open()
                self._serve(role, number, channel, crash)
                return
            except Crash:
                continue
            except SlQueueError as error:
                self.errors[role] = error
                channel.flush()
                return
            finally:
                if link is not None:
                    link.abort()
                if channel is not None:
                    channel._pulse.end()  # as the end of its process would

    def _sides(self) -> tuple[str, tuple[str, ...]]:
        label, *features = self.ids
        return label, tuple(features)

    def _serve(self, role: str, number: str, channel: LinkAlignmentChannel, crash: CrashAt) -> None:
        if role == SCHEDULER:
            file = SchedulerFiles(self.folder / SCHEDULER)
            comparison = Comparison(self.rule, file.load())

            def on_status(told: Comparison, reason: str | None, error: str | None) -> dict[str, Any]:
                self.statuses.append(sum(told.progress.values()))
                return {}

            Comparing(comparison, channel, file, number, self.patience_s, time.monotonic, on_status).serve()
            return
        state = self.folder / role
        state.mkdir(parents=True, exist_ok=True)
        texts = sorted(self.ids[role])
        files, kind = PartyFiles(state), self.types.get(role, "text")
        if (aligned := read_aligned(state)) is None:
            keys, token = files.keys(" ".join(texts), len(self.ids))
            ids = Ids(len(texts), lambda: (f"{kind} {text}".encode() for text in texts), kind)
        else:
            keys, token, ids = None, "", Ids(0, lambda: (), kind)
        party: Any = PartyAlignment(
            role, number, self.rule, ids, token, keys, files, channel, self.patience_s, time.monotonic  # type: ignore[arg-type]
        )  # fmt: skip
        self.on_party(party)
        if aligned is None:
            positions, session = party.serve()
            aligned = Aligned(positions, "digest", len(texts), session)
            crash("before aligned")
            files.conclude(aligned)
            crash("after aligned")
        party.confirm(aligned.session)
        self.found[role] = [texts[position] for position in aligned.positions]
