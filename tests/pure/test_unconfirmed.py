"""Messages that a link has published and the broker has not confirmed: none is lost, none changes places."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.errors import TransportError
from sl_queue.transport.rabbitmq.unconfirmed import Outgoing, Unconfirmed


def outgoing(body: bytes, expires_at: float | None = None) -> Outgoing:
    return Outgoing("x.bank", "r1.activation.insurer", body, persistent=False, expires_at=expires_at)


def take_all(unconfirmed: Unconfirmed) -> list[int]:
    taken = []
    while (found := unconfirmed.take()) is not None:
        taken.append(found[0])
    return taken


@given(st.integers(1, 30), st.lists(st.sampled_from(["take", "confirm", "again", "restart"]), max_size=60), st.data())
def test_whatever_happens_what_is_not_confirmed_is_published_again_in_order(
    count: int, events: list[str], data: st.DataObject
) -> None:
    unconfirmed = Unconfirmed()
    for number in range(count):
        unconfirmed.add(outgoing(b"%d" % number))
    left, sent = set(range(1, count + 1)), set[int]()
    for event in events:
        some = data.draw(st.sets(st.sampled_from(sorted(sent)))) if sent else set()
        match event:
            case "take" if (taken := unconfirmed.take()) is not None:
                sent.add(taken[0])
            case "confirm":
                unconfirmed.confirm(some)
                left, sent = left - some, sent - some
            case "again":
                unconfirmed.again(some)
                sent -= some
            case "restart":
                unconfirmed.restart()
                sent.clear()
    unconfirmed.restart()
    assert take_all(unconfirmed) == sorted(left)
    assert unconfirmed.flush(0.0) == (not left)


def test_who_waits_up_to_a_mark_does_not_wait_for_what_came_later() -> None:
    unconfirmed = Unconfirmed()
    unconfirmed.add(outgoing(b"before"))
    mark = unconfirmed.last
    unconfirmed.add(outgoing(b"after"))
    take_all(unconfirmed)
    assert not unconfirmed.flush(0.0, mark)
    unconfirmed.confirm([1])
    assert unconfirmed.flush(0.0, mark) and not unconfirmed.flush(0.0)


def test_what_has_expired_is_not_published_and_not_waited_for() -> None:
    unconfirmed = Unconfirmed()
    unconfirmed.add(outgoing(b"alive", expires_at=0.0))
    unconfirmed.add(outgoing(b"activation"))
    assert take_all(unconfirmed) == [2]
    unconfirmed.confirm([2])
    assert unconfirmed.flush(0.0)


def test_who_flushes_learns_why_the_link_failed() -> None:
    unconfirmed = Unconfirmed()
    unconfirmed.add(outgoing(b"lost"))
    threading.Timer(0.05, unconfirmed.fail, [TransportError("the broker is gone")]).start()
    with pytest.raises(TransportError, match="the broker is gone"):
        unconfirmed.flush(90.0)
    with pytest.raises(TransportError, match="the broker is gone"):
        unconfirmed.add(outgoing(b"late"))
