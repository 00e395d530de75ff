"""Every feature party learns which rows the label holder holds out, whoever is killed at whatever operation."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sl_queue.errors import AlignmentError, SlQueueError
from sl_queue.loops import holdout
from sl_queue.loops.holdout import Hearing, Telling, TellingAgain
from sl_queue.protocol.control import Alive
from sl_queue.protocol.holdout import Chosen, chosen_of, chunks_of, session_of
from sl_queue.protocol.topology import Topology
from sl_queue.storage.holdout_file import HeldOut, read_held_out, write_held_out
from sl_queue.transport.alignment_channel import PREFETCH, LinkAlignmentChannel
from sl_queue.transport.memory import MemoryBroker
from tests.support.aligning import CrashingLink
from tests.support.toy_run import Crash, CrashAt

KEYS = np.arange(100, 120, dtype=np.uint64)
CHOSEN = Chosen(np.array([1, 4, 5]), np.array([0, 19]))
TOPOLOGY = Topology("label", ("a", "b"))


@dataclass(slots=True)
class Conversation:
    """A label holder that tells, and two parties that hear; each begins again where it was killed."""

    folder: Path
    crashes: dict[str, CrashAt] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)  # digests of a party's rows, where they are others
    patience_s: float = 20.0
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    heard: dict[str, Chosen | None] = field(default_factory=dict)
    errors: dict[str, SlQueueError] = field(default_factory=dict)
    traffic: list[bytes] = field(default_factory=list)
    begins: list[str] = field(default_factory=list)

    def run(self) -> "Conversation":
        threads = [
            threading.Thread(target=self._supervise, args=(role,), name=f"{role}-main", daemon=True)
            for role in ("label", "a", "b")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in threads)
        return self

    def _supervise(self, role: str) -> None:
        (self.folder / role).mkdir(exist_ok=True)
        while True:
            link, channel = self.broker.link(role, TOPOLOGY, PREFETCH), None
            self.begins.append(role)
            try:
                crash = self.crashes.get(role, CrashAt())
                wrapped: Any = CrashingLink(link, role, crash, lambda _, body: self.traffic.append(bytes(body)))
                incarnation = f"{role}-{len(self.begins)}"
                channel = LinkAlignmentChannel(wrapped, role, TOPOLOGY, incarnation, patience_s=self.patience_s)
                channel.open()
                (self._tell if role == "label" else self._hear)(role, incarnation, channel, crash)
                channel.close()
                return
            except Crash:
                continue
            except SlQueueError as error:
                self.errors[role] = error
                return
            finally:
                link.abort()
                if channel is not None:
                    channel._pulse.end()  # as the end of its process would

    def _tell(self, role: str, incarnation: str, channel: Any, crash: CrashAt) -> None:
        before = read_held_out(self.folder / role)

        def note(told: tuple[str, ...]) -> None:
            crash("before note")
            write_held_out(self.folder / role, HeldOut("rows", CHOSEN, told))
            crash("after note")

        told = () if before is None else before.told
        chunks = tuple(chunks_of(CHOSEN, KEYS))
        Telling(incarnation, "rows", chunks, ("a", "b"), channel, note, time.monotonic, told).serve()

    def _hear(self, role: str, incarnation: str, channel: Any, crash: CrashAt) -> None:
        rows, held = self.rows.get(role, "rows"), read_held_out(self.folder / role)
        hearing = Hearing(role, incarnation, rows, "label", channel, self.patience_s, time.monotonic)
        if held is None:
            found = hearing.ask()
            if found is None:
                hearing.confirm(hearing.other)
                self.heard[role] = None
                return
            held = HeldOut(rows, chosen_of(found, KEYS))
            crash("before kept")
            write_held_out(self.folder / role, held)
            crash("after kept")
        hearing.confirm(session_of(rows))
        self.heard[role] = held.chosen


def told_all(done: Conversation) -> bool:
    return {name: each.digest for name, each in done.heard.items() if each is not None} == dict.fromkeys(
        "ab", CHOSEN.digest
    )


def test_both_hear_the_same_and_the_label_holder_knows_that_they_do(tmp_path: Path) -> None:
    done = Conversation(tmp_path).run()
    assert told_all(done) and done.errors == {}
    kept = read_held_out(tmp_path / "label")
    assert kept is not None and set(kept.told) == {"a", "b"}
    assert (tmp_path / "a/held_out.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("victim", ["label", "a"])
def test_a_kill_at_any_operation_ends_in_the_same_rows(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdout, "TELL_S", 0.05)
    monkeypatch.setattr(holdout, "WAIT_S", 0.02)
    monkeypatch.setattr(holdout, "AGAIN_S", 0.3)
    crashed = 0
    for operation in range(12):
        folder = tmp_path / f"{victim}-{operation}"
        folder.mkdir()
        crash = CrashAt(operation)
        done = Conversation(folder, {victim: crash}).run()
        assert told_all(done), (operation, crash.seen)
        assert done.errors == {} and done.broker.dead_letters == []
        crashed += crash.count > operation
    assert crashed >= 4


def test_a_party_with_other_rows_goes_on_to_hear_from_the_scheduler_how_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdout, "AGAIN_S", 0.2)
    done = Conversation(tmp_path, rows={"b": "others"}).run()
    assert done.heard["b"] is None and done.heard["a"] is not None
    assert not (tmp_path / "b/held_out.json").exists()


@contextmanager
def training(speaker: str, receiver: str, session: str = "") -> Iterator[dict[str, LinkAlignmentChannel]]:
    """Open the channels of two roles, of which one trains: it gives signs of life and tells nothing."""
    broker, over = MemoryBroker(), threading.Event()
    channels = {
        role: LinkAlignmentChannel(broker.link(role, TOPOLOGY, PREFETCH), role, TOPOLOGY, role, patience_s=0.2)
        for role in (speaker, receiver)
    }
    for channel in channels.values():
        channel.open()

    def train() -> None:
        while not over.wait(0.05):
            channels[speaker].tell(receiver, Alive(speaker), session=session)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        yield channels
    finally:
        over.set()
        thread.join()
        for channel in channels.values():
            channel.close()


def test_a_party_that_lost_its_folder_is_told_so_while_the_label_holder_trains() -> None:
    with training("label", "a") as channels:
        hearing = Hearing("a", "a-1", "rows", "label", channels["a"], 0.2, time.monotonic)
        with pytest.raises(AlignmentError, match="the state folder of 'a' was lost"):
            hearing.ask()


def test_a_label_holder_that_lost_its_folder_says_so_while_a_party_trains() -> None:
    told = r"'a' knows which rows.*lost with the state folder of the label holder"
    with training("a", "label", session="the run") as channels:
        about = ("label-1", "rows", tuple(chunks_of(CHOSEN, KEYS)), ("a",), channels["label"], lambda _: None)
        with pytest.raises(AlignmentError, match=told):
            Telling(*about, time.monotonic, patience_s=0.5).serve()


def test_a_party_that_trains_with_may_ask_again_and_not_too_often() -> None:
    sent: list[tuple[str, Any, str]] = []
    now = [0.0]
    again = TellingAgain("rows", lambda: chunks_of(CHOSEN, KEYS), ("a",), lambda: now[0])
    for party, at in (("a", 0.0), ("stranger", 0.0), ("a", 1.0), ("a", 1.0 + holdout.AGAIN_S)):
        now[0] = at
        again(party, lambda *about: sent.append(about))
    assert [(party, session) for party, _, session in sent] == [("a", session_of("rows"))] * 2
    heard = chosen_of({message.micro_batch.index: bytes(message.payload.data) for _, message, _ in sent}, KEYS)
    assert heard.digest == CHOSEN.digest
