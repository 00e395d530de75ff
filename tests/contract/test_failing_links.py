"""A channel whose link fails while it is in use or being closed: what it leaves behind, and what it says."""

import threading
import time
from collections.abc import Callable

import pytest

from sl_queue.errors import BrokerUnreachable, SlQueueError, TransportError
from sl_queue.protocol.control import Start
from sl_queue.protocol.messages import SCHEDULER, Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery
from sl_queue.transport.memory import MemoryBroker, MemoryLink
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.scheduler_channel import LinkSchedulerChannel

TOPOLOGY = Topology("label", ("a", "b"))
PATIENCE_S = 60.0


class Failing(MemoryLink):
    """A link that can be failed as RabbitLink fails: whoever publishes or flushes raises, the owner is notified."""

    failure: SlQueueError | None = None

    def open(
        self,
        on_delivery: Callable[[Delivery], None],
        on_reconnect: Callable[[], None],
        on_failure: Callable[[SlQueueError], None],
    ) -> None:
        super().open(on_delivery, on_reconnect, on_failure)
        self.notify = on_failure

    def fail(self, *, notify: bool = True) -> None:
        self.failure = BrokerUnreachable("lost the broker")
        if notify:
            self.notify(self.failure)

    def flush(self, timeout_s: float | None = None, mark: int | None = None) -> bool:
        if self.failure is not None:
            raise self.failure
        return super().flush(timeout_s, mark)


def failing(party: str) -> Failing:
    return Failing(MemoryBroker(), party, TOPOLOGY.senders_to(party), 100)


def channel_over(link: Failing) -> PartyChannel | LinkSchedulerChannel:
    if link.party == SCHEDULER:
        return LinkSchedulerChannel(link, TOPOLOGY, "s1", patience_s=PATIENCE_S)
    return PartyChannel(link, "a", TOPOLOGY, "a1", patience_s=PATIENCE_S, persistent=False, depth=2)


@pytest.mark.parametrize("role", [SCHEDULER, "a"])
@pytest.mark.parametrize("notify", [True, False], ids=["known to the channel", "not yet known to it"])
def test_a_channel_whose_link_has_failed_closes_and_leaves_no_thread_behind(role: str, notify: bool) -> None:
    link = failing(role)
    channel = channel_over(link)
    channel.open()
    link.fail(notify=notify)
    channel.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == f"{role}-pulse"] == []
    with pytest.raises(TransportError):
        link.publish("label", Kind.REPORT, "", b"", persistent=False)


@pytest.mark.parametrize("role", [SCHEDULER, "a"])
def test_a_channel_that_could_not_be_opened_closes(role: str) -> None:
    link = failing(role)
    channel = channel_over(link)
    channel.close()


def test_a_link_that_fails_while_a_channel_closes_leaves_no_commit_behind() -> None:
    link = failing("a")
    bank = channel_over(link)
    assert isinstance(bank, PartyChannel)
    bank.open()
    bank.enter(Start("a1", "r", (-1,)), -1)
    began, may_fail, saved = threading.Event(), threading.Event(), threading.Event()

    def save() -> None:
        began.set()
        assert may_fail.wait(10.0)
        time.sleep(0.2)  # a slow disk
        saved.set()

    bank.commit(1, save)
    assert began.wait(10.0)
    link.fail(notify=False)
    may_fail.set()
    bank.close()
    assert saved.is_set(), "the state folder may be another worker's from now on"
    with pytest.raises(TransportError):
        link.publish("label", Kind.REPORT, "r", b"", persistent=False)
