"""A party of another version is named with both versions, and neither waited for nor restarted for ever."""

import threading
import time

import msgpack
import pytest

from sl_queue.errors import AlignmentError
from sl_queue.protocol.codec import VERSION, AnotherVersion, decode, encode
from sl_queue.protocol.control import Alive, Join, Report, Start
from sl_queue.protocol.events import Event, Foreign
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.scheduler.endings import foreign
from sl_queue.protocol.scheduler.state import GIVE_UP, Phase, Plan, RunState
from sl_queue.protocol.topology import Topology
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.scheduler_channel import LinkSchedulerChannel
from sl_queue.transport.versions import Versions
from tests.support.toy_run import CrashAt, ToyRun
from tests.support.waiting import await_that

TOPOLOGY = Topology("label", ("a", "b"))
FIRST = MicroBatch(0, 0)


def of_version(version: int, report: Report, sender: str, receiver: str) -> bytes:
    """Encode a report as a program of another version sends it, which has a field more."""
    fields = msgpack.unpackb(encode(Header("r", 1, Kind.REPORT, sender, receiver, FIRST), report))
    return bytes(msgpack.packb([version, *fields[1:], "more"]))


def test_another_version_is_known_by_its_number_whatever_follows() -> None:
    with pytest.raises(AnotherVersion, match=f"protocol version 2; this program speaks {VERSION}"):
        decode(of_version(2, Alive("a1"), "a", "label"))


def test_who_speaks_nothing_but_another_version_is_named_after_a_patience() -> None:
    versions = Versions(60.0)
    versions.foreign("bank", "protocol 2, this program speaks 1", 0.0)
    versions.foreign("bank", "protocol 2, this program speaks 1", 30.0)
    assert versions.named(59.0) == {}
    assert "party 'bank' speaks protocol 2, this program speaks 1" in versions.named(60.0)["bank"]
    assert "docs/upgrade.md" in versions.named(60.0)["bank"]
    versions.understood("bank")
    assert versions.named(100.0) == {}


def test_what_an_older_version_left_in_a_queue_names_nobody() -> None:
    versions = Versions(60.0)
    for n in range(1000):
        versions.foreign("bank", "protocol 0, this program speaks 1", n / 1000)
    assert versions.named(3600.0) == {}


class Foreigner:
    """Worker of party a that speaks another version: its signs of life, until it is ordered to end. Mutable."""

    def __init__(self, broker: MemoryBroker, receivers: tuple[str, ...], every_s: float) -> None:
        self._ended = threading.Event()
        self._told = (broker, receivers, every_s)
        self._thread = threading.Thread(target=self._live)

    def __enter__(self) -> "Foreigner":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _live(self) -> None:
        broker, receivers, every_s = self._told
        while not self._ended.wait(every_s):
            for receiver in receivers:
                body = of_version(2, Alive("a1"), "a", receiver)
                broker.publish(receiver, "a", body, persistent=False, expires=False)


def test_a_party_ends_with_both_versions_named_when_a_peer_speaks_another_one() -> None:
    broker = MemoryBroker()
    link = broker.link("label", TOPOLOGY, 100)
    label = PartyChannel(link, "label", TOPOLOGY, "label1", patience_s=0.4, persistent=False, depth=1)
    label.open()
    label.enter(Start("label1", "r", (-1,)), -1)
    began = time.monotonic()
    try:
        with (
            Foreigner(broker, ("label",), 0.05),
            pytest.raises(AlignmentError, match=r"'a' speaks protocol 2, this program speaks 1.*upgrade"),
        ):
            label.receive("b", Kind.ACTIVATION, FIRST)
    finally:
        label.close()
    assert time.monotonic() - began >= 0.4
    assert len(broker.dead_letters) < 10


def test_a_scheduler_fails_the_run_with_both_versions_named_and_tells_the_others() -> None:
    run = ToyRun(patience_s=0.4)
    run.on_start = lambda role, _: _be_another() if role == "a" else None
    with (
        Foreigner(run.broker, (SCHEDULER, "label"), 0.05),
        pytest.raises(AlignmentError),
    ):
        run.run()
    told = sorted(str(error) for error in run.errors)
    assert len(told) == 4 and sum("party 'a' speaks protocol 2, this program speaks 1" in text for text in told) == 3
    assert run.ledger.state is not None
    assert run.ledger.state.phase is Phase.FAILED and "speaks protocol 2" in (run.ledger.state.reason or "")


def test_a_worker_of_another_version_in_a_run_that_goes_on_is_refused_alone() -> None:
    """Party a is killed and started again in another version by mistake, then in the right one."""
    run = ToyRun(patience_s=0.4, crashes={"a": CrashAt(40)})
    lives: list[str] = []
    refused: list[str | None] = []

    def start(role: str, _: object) -> None:
        if role == "a":
            lives.append(role)
            if len(lives) == 2:
                with Foreigner(run.broker, (SCHEDULER, "label"), 0.05):
                    await_that(lambda: run.ledger.state is not None and run.ledger.state.members["a"].refused)
                    assert run.ledger.state is not None
                    refused.append(run.ledger.state.members["a"].refused)

    run.on_start = start
    run.run()
    assert len(lives) == 2 and "speaks protocol 2, this program speaks 1" in str(refused[0])
    assert run.errors == [] and run.weights() == ToyRun().run().weights()


def test_a_party_that_has_committed_waits_for_a_peer_of_another_version_and_names_it() -> None:
    seen: list[Event] = []
    broker = MemoryBroker()
    link = broker.link("label", TOPOLOGY, 100)
    label = PartyChannel(
        link, "label", TOPOLOGY, "label1", patience_s=0.1, persistent=False, depth=1, observe=seen.append
    )
    label.open()
    label.enter(Start("label1", "r", (-1,)), 5)
    began = time.monotonic()
    try:
        with Foreigner(broker, ("label",), 0.02), pytest.raises(AlignmentError, match="'a' speaks protocol 2"):
            label.receive("a", Kind.ACTIVATION, MicroBatch(6, 0))
    finally:
        label.close()
    assert time.monotonic() - began > GIVE_UP * 0.1, "as long as for one that is silent"
    refused = [(event.sender, event.reason) for event in seen if isinstance(event, Foreign)]
    assert refused and all(sender == "a" and "'a' speaks protocol 2" in reason for sender, reason in refused)


PLAN = Plan({"name": "toy"}, "label", ("a", "b"), 3, 60.0)


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.STOPPING])
def test_the_scheduler_refuses_a_party_of_another_version_without_ending_a_run_that_goes_on(phase: Phase) -> None:
    state, orders = foreign(PLAN, RunState(phase, run="r"), "a", "speaks protocol 2", 7.0)
    assert (state.phase, state.members["a"].refused, state.members["a"].refused_at, orders) == (
        phase,
        "speaks protocol 2",
        7.0,
        (),
    )
    assert foreign(PLAN, state, "a", "speaks protocol 2", 8.0)[0] is state, "once"


def test_an_operator_of_another_version_ends_no_run_and_no_gathering() -> None:
    for phase in Phase:
        state = RunState(phase)
        assert foreign(PLAN, state, OPERATOR, "speaks protocol 2", 7.0) == (state, ())


def _be_another() -> None:
    """End where the worker of another version takes over."""
    raise AlignmentError("a is of another version")


def test_a_worker_says_which_version_of_the_program_it_is_and_older_ones_need_not() -> None:
    broker = MemoryBroker()
    channel = LinkSchedulerChannel(broker.link(SCHEDULER, TOPOLOGY), TOPOLOGY, "s1", patience_s=60.0)
    channel.open()
    told = [Join("a1", {}, 9, "d", "integer", None, 0, (), to="s1", version=version) for version in ("", "0.2.0")]
    for joined in told:
        body = encode(Header("", 0, Kind.REPORT, "a", SCHEDULER, FIRST), joined)
        broker.publish(SCHEDULER, "a", body, persistent=False, expires=False)
    try:
        assert [report.version for _, report, _ in channel.reports(0.0)] == ["", "0.2.0"]  # type: ignore[union-attr]
    finally:
        channel.close()
