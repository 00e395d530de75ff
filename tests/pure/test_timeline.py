"""Knowledge of a party about its run, decided without threads, clocks or a broker."""

import pytest

from sl_queue.errors import LocalProtocolError
from sl_queue.protocol.control import Alive, Message, Start, Stop, Waiting, kind_of
from sl_queue.protocol.messages import SCHEDULER, Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.party.timeline import Timeline

FIRST = MicroBatch(0, 0)
PAYLOAD = Payload("float32", (1, 1), bytes(4), bytes(8))
START = Start("a1", "run", (-1,))


def timeline(adopted: Start | None = START) -> Timeline[int]:
    mine: Timeline[int] = Timeline("a", "a1", 1000)
    if adopted is not None:
        mine.orders = mine.orders.after(adopted)
        mine.enter(adopted, -1)
    return mine


def came(
    mine: Timeline[int], sender: str, message: Message, *, tag: int = 1, generation: int = 1, committed: int = -1
) -> None:
    tensor = message if isinstance(message, Activation | Gradient) else None
    where = FIRST if tensor is None else tensor.micro_batch
    header = Header("run", generation, kind_of(message), sender, "a", where, committed)
    if tensor is None:
        mine.take(header, message)
    else:
        mine.note(header, redelivered=False)
        mine.mailbox.file(header, tensor, tag)


def test_a_tensor_before_a_run_is_adopted_is_our_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="before it entered a run"):
        timeline(None).header("label", Activation(FIRST, PAYLOAD))
    assert timeline().header("label", Activation(FIRST, PAYLOAD)).generation == 1


def test_a_command_for_an_earlier_process_is_done_with_and_not_followed() -> None:
    mine = timeline()
    came(mine, SCHEDULER, Stop("a0", "enough"))
    assert mine.orders.stop is None


def test_a_stop_at_the_next_commit_means_the_next_one_whichever_step_it_is_of() -> None:
    mine = timeline()
    came(mine, SCHEDULER, Stop("a1", "enough"))
    came(mine, "label", Gradient(FIRST, PAYLOAD), tag=7)
    assert mine.commit(4) == (7,)
    assert mine.orders.stop is not None and mine.orders.stop.after_step == 4
    mine.commit(9)
    assert mine.orders.stop.after_step == 4


def test_whoever_waits_is_sent_what_is_kept_and_told_what_is_lost() -> None:
    mine = timeline()
    waiting = Waiting("l1", 1, "a", Kind.ACTIVATION, 0, 0, 2.5, 0.0)
    assert mine.answer("label", waiting) == ([], None)  # not computed yet: it will come
    mine.outbox.keep("label", Kind.ACTIVATION, FIRST, b"body")
    again, lost = mine.answer("label", waiting)
    assert [body for _, body in again] == [b"body"] and lost is None
    came(mine, "label", Alive("l1"), committed=0)  # it has it on disk
    again, lost = mine.answer("label", waiting)
    assert not again and lost is not None
    assert (lost.receiver, lost.kind, lost.step, lost.asked_s) == ("label", Kind.ACTIVATION, 0, 2.5)


def test_what_a_peer_says_of_another_generation_is_not_believed() -> None:
    mine = timeline()
    mine.outbox.keep("label", Kind.ACTIVATION, FIRST, b"body")
    came(mine, "label", Alive("l1"), committed=5, generation=0)
    assert list(mine.outbox.newest(1))


def test_a_new_scheduler_is_told_who_is_here_and_a_known_one_is_not() -> None:
    mine = timeline()
    came(mine, SCHEDULER, Alive("s1"))
    assert mine.announce
    mine.announce = False
    came(mine, SCHEDULER, Alive("s1"))
    came(mine, "label", Alive("l1"))
    assert not mine.announce
    assert mine.disconnect(1) == [] and mine.announce


def test_only_a_newer_generation_than_the_adopted_one_is_newer() -> None:
    mine = timeline()
    assert mine.newer is None
    came(mine, SCHEDULER, Start("a1", "run", (-1, -1)))
    assert mine.newer is not None and mine.newer.generation == 2
    mine.enter(mine.newer, -1)
    assert mine.newer is None
