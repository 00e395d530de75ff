"""Held-out rows stay held out: the choice follows from each row's id and a seed, and from no other row."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sl_queue
from sl_queue.config.job import Job, PartyFile
from sl_queue.errors import JobError
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches, held_out, id_hashes, split_by_id
from tests.support.credit import ROWS, bank_columns, write_bank, write_credit
from tests.support.tables import read_table

IDS = np.arange(1000, 2000)


def held(ids: np.ndarray, seed: int = 7, holdout: float = 0.2) -> set[int]:
    return set(ids[sl_queue.holdout_rows(ids, seed, holdout)].tolist())


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ("the first leaves", IDS[1:]),
        ("one with a smaller id comes", np.append(999, IDS)),
        ("one with a higher id comes", np.append(IDS, 2000)),
        ("one in the middle leaves", np.delete(IDS, 500)),
    ],
)
def test_when_one_customer_comes_or_leaves_nearly_all_held_out_rows_stay(change: str, others: np.ndarray) -> None:
    assert len(held(IDS)) == 200
    assert len(held(IDS) & held(others)) >= 199, change


def test_when_a_tenth_of_the_customers_are_others_only_as_many_are_held_out_anew() -> None:
    later = np.append(IDS[100:], np.arange(2000, 2100))
    stayed = held(IDS) & set(later.tolist())
    assert len(stayed & held(later)) >= 0.9 * len(stayed)


def test_text_that_reads_like_a_number_is_held_out_like_the_number() -> None:
    as_text = np.array([str(i) for i in IDS])
    assert {int(i) for i in as_text[sl_queue.holdout_rows(as_text, 7, 0.2)]} == held(IDS)


def test_the_choice_does_not_follow_from_the_order_of_the_rows() -> None:
    assert held(IDS[::-1]) == held(np.random.default_rng(0).permutation(IDS)) == held(IDS)


@settings(max_examples=50)
@given(st.sets(st.integers(0, 10_000), min_size=2, max_size=80), st.integers(0, 99), st.floats(0, 0.95))
def test_as_many_are_held_out_as_the_number_of_rows_says(ids: set[int], seed: int, holdout: float) -> None:
    hashes = id_hashes((str(i).encode() for i in sorted(ids)), seed)
    training, held_rows = split_by_id(hashes, holdout)
    assert len(held_rows) == held_out(len(ids), holdout)
    assert sorted([*training, *held_rows]) == list(range(len(ids)))


def test_a_seed_of_its_own_keeps_the_held_out_rows_when_weights_and_order_change() -> None:
    def rows(**job: int) -> tuple[list[int], list[int]]:
        agreed = Job(
            **{"name": "j", "seed": 1, "epochs": 1, "batch_size": 40, "holdout": 0.3} | job,
            parties={"a": {"role": "feature", "cut": [1]}, "b": {"role": "label"}},
        )
        hashes = id_hashes((str(i).encode() for i in range(30)), agreed.seed_of_holdout)
        batches = agreed.batches(30, hashes)
        return batches.holdout_part(0).tolist(), batches.rows(MicroBatch(0, 0)).tolist()

    held_rows, order = rows(holdout_seed=5)
    other_held_rows, other_order = rows(seed=2, holdout_seed=5)
    assert held_rows == other_held_rows
    assert order != other_order
    assert rows(seed=2)[0] != held_rows


def test_both_parties_hold_out_the_same_rows_and_anyone_who_has_the_ids_can_say_which(tmp_path: Path) -> None:
    job = Job.load(write_credit(tmp_path))
    columns = bank_columns(tmp_path)
    shuffled = np.random.default_rng(1).permutation(ROWS)
    write_bank(tmp_path, {name: np.asarray(values)[shuffled] for name, values in columns.items()})
    tables = {name: read_table(job, PartyFile.load(tmp_path / f"{name}.toml")) for name in ("bank", "insurer")}
    batches = {name: job.batches(table.n_rows, table.hashes) for name, table in tables.items()}
    rows = {name: np.concatenate([b.holdout_part(i) for i in range(b.holdout_parts)]) for name, b in batches.items()}
    assert np.array_equal(rows["bank"], rows["insurer"])
    told = sl_queue.holdout_rows(np.arange(ROWS), job.seed, job.holdout)
    assert np.flatnonzero(told).tolist() == rows["bank"].tolist()


def test_counts_and_steps_are_known_from_the_number_of_rows_alone() -> None:
    shape = (100, 7, 2, 16, 4)
    hashes = id_hashes((str(i).encode() for i in range(100)), 7)
    counted, chosen = Batches(*shape, holdout=0.3), Batches(*shape, holdout=0.3, hashes=hashes)
    assert counted == chosen
    assert (counted.steps, counted.holdout_parts) == (chosen.steps, chosen.holdout_parts)
    assert counted.holdout_part(0).tolist() != chosen.holdout_part(0).tolist()


def test_without_held_out_rows_the_order_of_training_is_what_it_was() -> None:
    shape = (50, 7, 2, 16, 1)
    hashes = id_hashes((str(i).encode() for i in range(50)), 7)
    first = MicroBatch(0, 0)
    assert Batches(*shape).rows(first).tolist() == Batches(*shape, hashes=hashes).rows(first).tolist()


def test_ids_that_no_table_may_have_are_refused() -> None:
    with pytest.raises(JobError, match="1 of 3 rows repeat the id of another row"):
        sl_queue.holdout_rows([1, 2, 2], 7, 0.5)


def test_a_test_set_is_never_touched_and_takes_no_held_out_row(tmp_path: Path) -> None:
    table: dict[str, object] = {"name": "j", "seed": 7, "epochs": 2, "batch_size": 16, "holdout": 0.2}
    parties = {"a": {"role": "feature", "cut": [1]}, "b": {"role": "label"}}
    job = Job(**table, test=0.13, parties=parties)
    hashes = id_hashes((str(i).encode() for i in IDS), 7)
    with_test, without = job.batches(1000, hashes), Job(**table, parties=parties).batches(1000, hashes)
    assert (with_test.training_rows, with_test.holdout_rows, with_test.test_rows) == (670, 200, 130)
    assert with_test.holdout_positions.tolist() == without.holdout_positions.tolist()
    touched = {int(row) for step in range(with_test.steps) for row in with_test.rows(MicroBatch(step, 0))}
    touched |= {int(row) for i in range(with_test.holdout_parts) for row in with_test.holdout_part(i)}
    assert not touched & set(with_test.test_positions.tolist())
    assert len(touched) == 870
    told = sl_queue.test_rows(IDS, 7, 0.13)
    assert np.flatnonzero(told).tolist() == with_test.test_positions.tolist()
    assert not (told & sl_queue.holdout_rows(IDS, 7, 0.2)).any()
    assert Job(**table, parties=parties, test=0.0).digest == Job(**table, parties=parties).digest != job.digest
    with pytest.raises(JobError, match="leave no row to train on"):
        Job(**table, parties=parties, test=0.8)
