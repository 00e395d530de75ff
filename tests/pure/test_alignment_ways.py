"""The ways of masked ids: every other party masks each set once, and nothing comes on a way that it cannot be on."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.errors import RemoteProtocolError
from sl_queue.loops.own_set import OwnSet
from sl_queue.protocol.alignment import (
    CHUNK,
    MASK_BYTES,
    POINT_BYTES,
    Cut,
    Masks,
    Ring,
    Travel,
    as_masks,
    padded,
    positions_of,
)
from sl_queue.protocol.control import Offer, Stop
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.scheduler.reducer import reduce
from sl_queue.protocol.scheduler.state import Plan, RunState
from sl_queue.storage.alignment_files import PartyFiles


@given(st.integers(1, 6))
def test_every_other_party_masks_a_set_once_and_feature_parties_never_meet(n_features: int) -> None:
    ring = Ring("label", tuple(f"f{i}" for i in range(n_features)))
    for owner in ring.parties:
        route = ring.routes[owner]
        assert sorted(hop.receiver for hop in route if hop.masks) == sorted(set(ring.parties) - {owner})
        assert (route[-1].receiver, route[-1].masks) == (owner, False)
        stations = [owner, *(hop.receiver for hop in route)]
        assert all("label" in pair for pair in pairwise(stations))


@given(st.integers(1, 4), st.integers(0, 60), st.sampled_from(["label", "f0", "f1", "scheduler"]))
def test_a_chunk_is_taken_only_on_the_stretch_that_its_name_says(n_features: int, step: int, sender: str) -> None:
    ring = Ring("label", tuple(f"f{i}" for i in range(n_features)))
    allowed = {}
    for owner, route in ring.routes.items():
        came_from = [owner, *(hop.receiver for hop in route)]
        for hop, stretch in enumerate(route):
            allowed[ring.key(owner, hop, 0).step, came_from[hop], stretch.receiver] = (owner, hop)
    for receiver in ring.parties:
        expected = allowed.get((step, sender, receiver))
        if expected is not None:
            assert ring.place(MicroBatch(step, 5), sender, receiver) == expected
        else:
            with pytest.raises(RemoteProtocolError, match="are on no way"):
                ring.place(MicroBatch(step, 5), sender, receiver)


@given(st.integers(0, 10**7), st.integers(1, 5000))
def test_a_size_is_told_rounded_up_and_never_as_nothing(n_ids: int, pad: int) -> None:
    told = padded(n_ids, pad)
    assert told >= max(n_ids, 1) and told % pad == 0 and told - pad < max(n_ids, 1)


@given(st.integers(1, 200), st.integers(1, 50))
def test_pieces_are_the_whole(n_ids: int, size: int) -> None:
    cut, body = Cut(n_ids, size), bytes(range(256)) * 4
    whole = memoryview(body[: n_ids * 2])
    pieces = [cut.piece(whole, chunk) for chunk in range(cut.chunks)]
    assert b"".join(pieces) == whole
    assert [len(piece) // 2 for piece in pieces] == [cut.size_of(chunk) for chunk in range(cut.chunks)]
    assert cut.size_of(cut.chunks) == 0
    assert Cut(10**6).chunks == 10**6 // CHUNK


def test_what_has_not_come_back_is_sent_again_only_after_a_while_or_a_loss() -> None:
    travel = Travel(6, 10.0)
    assert travel.due(0.0) == [0, 1]
    assert travel.due(9.0) == []
    travel.came_back(1, 9.0)
    assert travel.due(9.5) == [2]
    assert travel.due(18.0) == []  # what comes back says that the others are on their way
    travel.again()
    assert travel.due(18.0) == [0, 2]
    assert travel.due(29.0) == [0, 2]


def test_shared_masks_are_found_at_their_positions_and_no_others_are_believed() -> None:
    rng = np.random.default_rng(0)
    own, places = as_masks(rng.bytes(7 * MASK_BYTES)), rng.permutation(7)
    sent = own[places]

    def found(common: Masks) -> list[int]:
        return positions_of([sent[:3], sent[3:6], sent[6:]], places, common, 6).tolist()

    assert found(np.sort(own[[5, 0, 3]])) == [0, 3, 5]
    assert found(own[:0]) == []
    for others in (as_masks(rng.bytes(MASK_BYTES)), own[[2, 2]]):
        with pytest.raises(RemoteProtocolError, match="not among"):
            found(np.sort(others))
    with pytest.raises(RemoteProtocolError, match="nobody has"):
        found(own[6:])


def test_a_party_holds_few_bytes_of_each_of_its_ids(tmp_path: Path) -> None:
    n_ids, rng = 100_000, np.random.default_rng(0)
    points, cut, files = rng.bytes(n_ids * POINT_BYTES), Cut(n_ids, 5000), PartyFiles(tmp_path)
    files.begin("session")
    own = OwnSet(files, cut, n_ids)
    tracemalloc.start()
    try:
        own.leave(points)
        for chunk in range(cut.chunks):
            each = np.frombuffer(own.points(chunk), np.uint8).reshape(-1, POINT_BYTES)
            files.keep("session", chunk, each[:, :MASK_BYTES].tobytes())
        ascending = b"".join(own.masks("session", chunk) for chunk in range(cut.chunks))
        for chunk in range(cut.chunks):
            own.take(n_ids, chunk, cut.piece(memoryview(ascending), chunk))
        assert own.positions("session", n_ids) is not None
        held = tracemalloc.get_traced_memory()[1] - len(ascending)
    finally:
        tracemalloc.stop()
    assert held < 60 * n_ids


def test_more_shared_ids_than_a_party_has_are_not_believed(tmp_path: Path) -> None:
    own = OwnSet(PartyFiles(tmp_path), Cut(4, 4), 4)
    with pytest.raises(RemoteProtocolError, match="chunk 0 of 5 shared ids"):
        own.take(5, 0, memoryview(bytes(4 * MASK_BYTES)))


def test_who_comes_to_align_when_a_run_is_under_way_is_sent_away_with_what_to_do() -> None:
    plan = Plan({"name": "j"}, "label", ("f0",), 1, 5.0)
    offer = Offer("worker-7", {"name": "j"}, "token", 1000, "text", "scheduler")
    state, orders = reduce(plan, RunState(), "f0", offer, 0.0, "run")
    assert state == RunState()
    ((party, stop),) = orders
    assert (party, isinstance(stop, Stop) and stop.incarnation) == ("f0", "worker-7")
    assert isinstance(stop, Stop) and stop.error == "AlignmentError"
    assert "party 'f0' has lost what it knew of it: restore its state folder" in stop.reason
