"""Parties find the rows that all of them hold, and nothing else, whoever is killed and whatever is sent."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sl_queue.errors import AlignmentError, PeerFailed
from sl_queue.protocol.alignment import MASK_BYTES, as_masks
from sl_queue.protocol.codec import decode
from sl_queue.protocol.messages import SCHEDULER, Masked
from sl_queue.storage.alignment_files import SchedulerFiles
from tests.support.aligning import Alignment
from tests.support.toy_run import CrashAt

IDS = {
    "label": ["a", "b", "c", "d", "e", "f", "g"],
    "one": ["b", "x", "c", "g", "y"],
    "two": ["z", "g", "w", "b", "v", "u", "c", "t", "s"],
}
SHARED = ["b", "c", "g"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("n_parties", [2, 3, 4])
def test_every_party_finds_the_rows_that_all_hold(folder: Path, n_parties: int) -> None:
    ids: dict[str, Any] = {**IDS, "three": ["g", "b", "c", "q"]}
    done = Alignment(folder, dict(list(ids.items())[:n_parties])).run()
    assert done.errors == {}
    assert done.found == dict.fromkeys(done.ids, SHARED)
    assert not (folder / "one/alignment.key").exists() and not (folder / "one/alignment").exists()
    assert (folder / "one/aligned.json").stat().st_mode & 0o077 == 0


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sets(st.integers(0, 12).map(str), max_size=10), min_size=2, max_size=4), st.randoms())
def test_it_is_the_plain_intersection(
    tmp_path_factory: pytest.TempPathFactory, sets: list[set[str]], rng: random.Random
) -> None:
    ids = {f"p{i}": [*sorted(found), "shared"] for i, found in enumerate(sets)}
    for texts in ids.values():
        rng.shuffle(texts)
    done = Alignment(tmp_path_factory.mktemp("run"), ids).run()
    assert done.errors == {}
    assert done.found == {party: sorted(set.intersection(*map(set, ids.values()))) for party in ids}


def test_no_message_repeats_between_two_runs_or_holds_an_id(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        ids = {party: [f"customer-{text * 4}" for text in texts] for party, texts in IDS.items()}
        done = Alignment(tmp_path / name, ids, chunk=2).run()
        masked = [decode(body)[1] for *_, body in done.traffic]
        points = [bytes(m.payload.data) for m in masked if isinstance(m, Masked)]
        runs.append({body[at : at + 16] for body in points for at in range(0, len(body), 16)})
        assert not any(b"customer" in body for *_, body in done.traffic)
    assert len(runs[0]) > 50
    assert not runs[0] & runs[1]


def test_a_relay_never_sees_a_finished_mask_of_anybody_else(tmp_path: Path) -> None:
    done = Alignment(tmp_path, IDS).run()
    seen: dict[str, set[bytes]] = {}
    for _, receiver, body in done.traffic:
        message = decode(body)[1]
        if isinstance(message, Masked):
            data, size = bytes(message.payload.data), message.payload.shape[1]
            seen.setdefault(receiver, set()).update(data[at : at + 16] for at in range(0, len(data), size))
    at_scheduler = seen.pop(SCHEDULER)
    uploaded = [decode(body)[1] for sender, receiver, body in done.traffic if receiver == SCHEDULER]
    assert any(isinstance(message, Masked) for message in uploaded)
    common = {mask for found in [seen["one"] & at_scheduler, seen["two"] & at_scheduler] for mask in found}
    assert len(common) == len(SHARED)  # what the scheduler told, and nothing more
    assert seen["label"] & at_scheduler == common


@pytest.mark.parametrize("role", ["label", "one", SCHEDULER])
def test_a_kill_at_any_operation_ends_with_the_same_rows(tmp_path: Path, role: str) -> None:
    counting = CrashAt()
    ids = {"label": list("abcdef"), "one": list("bcdxyz"), "two": list("cdbuvw")}
    Alignment(tmp_path / "counting", ids, crashes={role: counting}).run()
    operations = range(0, counting.count, max(1, counting.count // 7))

    def killed_at(operation: int) -> Alignment:
        return Alignment(tmp_path / str(operation), ids, crashes={role: CrashAt(operation)}, patience_s=2.0).run()

    with ThreadPoolExecutor(len(operations)) as at_once:  # they do little but wait for who comes again
        for operation, done in zip(operations, at_once.map(killed_at, operations), strict=True):
            assert done.errors == {}, operation
            assert done.found == {party: ["b", "c", "d"] for party in ids}, operation


def test_parties_without_a_shared_row_are_told_so_and_how_many_each_brings(tmp_path: Path) -> None:
    done = Alignment(tmp_path, {"label": ["a"] * 1, "one": ["b", "c", "d", "e", "f"]}, patience_s=5).run()
    assert set(done.errors) == {"label", "one", SCHEDULER}
    for error in done.errors.values():
        assert isinstance(error, AlignmentError)
        assert "no row is shared by all: label up to 4, one up to 8 rows" in str(error)
    assert not (tmp_path / "one/aligned.json").exists()


def test_fewer_rows_than_the_job_asks_for_end_it(tmp_path: Path) -> None:
    done = Alignment(tmp_path, IDS, at_least=4, patience_s=5).run()
    assert {str(error) for error in done.errors.values()} == {
        "3 rows are shared by all, and alignment.at_least = 4: label up to 8, one up to 8, two up to 12 rows"
    }


def test_an_empty_set_is_a_set(tmp_path: Path) -> None:
    done = Alignment(tmp_path, {**IDS, "one": []}, patience_s=5).run()
    assert all("no row is shared by all" in str(error) for error in done.errors.values())
    assert len(done.errors) == 4


def test_more_ids_than_agreed_are_refused(tmp_path: Path) -> None:
    done = Alignment(tmp_path, IDS, at_most=8, patience_s=5).run()
    assert all("alignment.at_most = 8 allows: two up to 12" in str(error) for error in done.errors.values())
    assert len(done.errors) == 4


def test_a_bound_is_rounded_up_as_sizes_are(tmp_path: Path) -> None:
    done = Alignment(tmp_path, IDS, at_most=9, patience_s=5).run()
    assert done.errors == {}


def test_ids_of_different_types_are_named_with_the_remedy(tmp_path: Path) -> None:
    done = Alignment(tmp_path, IDS, types={"one": "integer"}, patience_s=5).run()
    told = {str(error) for error in done.errors.values()}
    assert len(told) == 1
    assert "one integer" in told.pop()


def test_a_party_with_another_set_and_the_key_of_an_old_one_gets_a_new_key(tmp_path: Path) -> None:
    Alignment(tmp_path, {"label": ["a"], "one": ["b"]}, patience_s=0.5).run()
    before = (tmp_path / "one/alignment.key").read_text()
    again = Alignment(tmp_path, {"label": ["a"], "one": ["a", "b"]}).run()
    assert again.errors == {}
    assert again.found == {"label": ["a"], "one": ["a"]}
    assert before not in (tmp_path / "one").glob("*")


def test_a_party_that_lost_its_state_when_others_are_done_is_named(tmp_path: Path) -> None:
    Alignment(tmp_path, IDS).run()
    (tmp_path / "one/aligned.json").unlink()
    (tmp_path / "scheduler/alignment.json").unlink()
    done = Alignment(tmp_path, IDS, patience_s=8).run()
    assert "party 'one' is not aligned" in str(done.errors[SCHEDULER])
    assert "restore that state folder" in str(done.errors["one"])


def test_a_party_that_was_killed_when_all_others_were_done_ends_without_a_scheduler(tmp_path: Path) -> None:
    Alignment(tmp_path, IDS).run()
    again = Alignment(tmp_path, IDS, patience_s=0.5)
    again.serve("label")
    assert again.errors == {}
    assert again.found == {"label": SHARED}


def test_a_scheduler_that_comes_after_the_last_party_has_ended_finds_what_it_said(tmp_path: Path) -> None:
    Alignment(tmp_path, IDS).run()
    file = SchedulerFiles(tmp_path / SCHEDULER)
    outcome = file.load()
    assert outcome is not None
    masks = as_masks(bytes(len(SHARED) * MASK_BYTES))
    for aligned in (frozenset[str](), frozenset({"one", "two"})):  # it waits for one more
        file.save(replace(outcome, masks=masks, aligned=aligned))
    again = Alignment(tmp_path, IDS, patience_s=0.5)
    again.serve("label")
    scheduler = threading.Thread(target=again.serve, args=(SCHEDULER,), daemon=True)
    scheduler.start()
    scheduler.join(30)
    assert not scheduler.is_alive() and again.errors == {}


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda body: body[:-1], "bytes as chunk"),
        (lambda body: body[:32], "bytes as chunk"),
        (lambda body: bytes(32) * (len(body) // 32), "small order"),
    ],
)
def test_a_party_that_sends_what_it_may_not_ends_it_for_all_and_is_named(
    tmp_path: Path, tamper: Any, told: str
) -> None:
    def on_party(party: Any) -> None:
        if party.party == "one":
            send = party.channel.send

            def sent(receiver: str, message: Masked, session: str) -> None:
                body = tamper(bytes(message.payload.data)) if receiver == "label" else message.payload.data
                send(receiver, Masked(message.micro_batch, _bytes(body)), session)

            party.channel.send = sent

    done = Alignment(tmp_path, IDS, on_party=on_party, patience_s=5).run()
    assert told in str(done.errors["label"])
    assert isinstance(done.errors[SCHEDULER], PeerFailed)
    assert not (tmp_path / "label/aligned.json").exists()


def _bytes(body: bytes) -> Any:
    from sl_queue.protocol.messages import Payload

    return Payload("int8", (len(body),), body)


def test_progress_is_told(tmp_path: Path) -> None:
    done = Alignment(tmp_path, IDS).run()
    assert done.statuses
