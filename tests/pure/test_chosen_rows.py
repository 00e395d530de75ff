"""Rows that the label holder chooses: by a column, by a date, or a share of each class; and their way to the others."""

from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.holdout import choose
from sl_queue.data.spec import ByColumn, Choices, Rows, Stratified
from sl_queue.data.table import read_table
from sl_queue.errors import JobError, RemoteProtocolError
from sl_queue.protocol.holdout import CHUNK, Chosen, chosen_of, chunks_of, missing
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import held_out, id_hashes

BASE: dict[str, Any] = {"name": "j", "seed": 7, "epochs": 2, "batch_size": 4}
PARTIES = {"bank": {"role": "feature", "cut": [1]}, "insurer": {"role": "label", "cut": [1]}}
MONTHS = ["2025-10", "2025-11", "2025-12", "2026-01"]


def job_of(**settings: Any) -> Job:
    return Job(**{**BASE, "parties": PARTIES, **settings})


def insurer(path: Path, **columns: Any) -> PartyFile:
    table = pa.table({"id": [f"c{number:03d}" for number in range(len(next(iter(columns.values()))))], **columns})
    pa.parquet.write_table(table, path / "insurer.parquet")
    data = {"path": path / "insurer.parquet", "id": "id", "label": "claim"}
    model = {"model": "a:B", "optimizer": {"name": "sgd", "lr": 0.1}}
    return PartyFile(party="insurer", data=data, base=model, fuse={**model, "loss": "bce_with_logits"})


def chosen_in(path: Path, job: Job, **columns: Any) -> tuple[list[int], list[int], tuple[str, ...] | None]:
    columns = {"claim": [number % 2 for number in range(len(next(iter(columns.values()))))], **columns}
    table = read_table(table_spec(job, insurer(path, **columns), Importer()))
    assert table.chosen is not None
    return table.chosen.held_out.tolist(), table.chosen.test.tolist(), table.columns


# What a job may say ----------------------------------------------------------------------------------------------


def test_a_job_that_says_nothing_new_keeps_its_digest_and_one_that_does_has_another() -> None:
    plain = job_of(holdout=0.2)
    assert plain.digest == job_of(holdout=0.2, test=0.0).digest
    told = job_of(holdout={"column": "month", "from": "2026-01"})
    assert told.canonical()["holdout"] == {"column": "month", "from": "2026-01"}
    assert job_of(holdout={"column": "month", "from": date(2026, 1, 1)}).canonical()["holdout"]["from"] == "2026-01-01"
    assert len({plain.digest, told.digest, job_of(holdout=0.2, test={"share": 0.1, "stratify": True}).digest}) == 3


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"column": "month"}, "needs `from` or `to`, or else `values`"),
        ({"column": "month", "from": "January"}, "holdout.from = 'January'; it must be a number, or a date like"),
        ({"column": "month", "from": "2026-01", "to": 7}, "a number and a date"),
        ({"column": "month", "from": "2026-01", "to": "2025-01"}, "chooses nothing"),
        ({"column": "month", "values": ["a"], "to": 7}, "needs `from` or `to`, or else `values`"),
        ({"column": "month", "from": 3, "share": 0.2}, "both a column and a share"),
        ({"share": 0.2}, "a share alone is a number: 0.2"),
        ({"share": 1.5, "stratify": True}, "a number between 0 and 1"),
        ({"colum": "month"}, "holdout.colum is unknown; did you mean 'column'"),
        (1.5, "holdout = 1.5; it must be a number from 0 to below 1, or a table"),
    ],
)
def test_what_cannot_be_meant_is_refused(said: Any, why: str) -> None:
    with pytest.raises(JobError) as raised:
        job_of(holdout=said)
    assert why in str(raised.value)


def test_shares_leave_rows_to_train_on_whoever_chooses_them() -> None:
    with pytest.raises(JobError, match="leave no row to train on"):
        job_of(holdout={"share": 0.6, "stratify": True}, test=0.5)
    with pytest.raises(JobError, match="for the label holder 'insurer' to say"):
        job_of(holdout={"column": "month", "from": 3}).batches(100)


# By a column -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        (MONTHS * 3, {"from": "2026-01"}),
        ([f"{month}-15" for month in MONTHS] * 3, {"from": "2026-01"}),
        ([date(2025, 10, 1), date(2025, 11, 30), date(2025, 12, 31), date(2026, 1, 1)] * 3, {"from": "2026-01"}),
        ([202510, 202511, 202512, 202601] * 3, {"from": 202601}),
        ([1.5, 2.5, 3.5, 4.0] * 3, {"from": 4, "to": 5}),
        (["a", "b", "c", "d "] * 3, {"values": ["d "]}),
        ([1, 2, 3, 7] * 3, {"values": [7.0]}),
        (np.array([1, 2, 3, 7] * 3, np.float16), {"values": [7]}),
        (np.array([1, 2, 3, 7] * 3, np.float16), {"from": 4}),
        (pa.array([*"abcd"] * 3, pa.string_view()), {"values": ["d"]}),
        (pa.array(MONTHS * 3, pa.string_view()), {"from": "2026-01"}),
        ([False, False, False, True] * 3, {"values": [True]}),
    ],
)
def test_rows_are_chosen_by_text_dates_numbers_and_values(tmp_path: Path, values: Any, bounds: Any) -> None:
    job = job_of(holdout={"column": "when", **bounds})
    held, test, columns = chosen_in(tmp_path, job, when=values, age=[1.0] * 12)
    assert (held, test) == ([3, 7, 11], [])
    assert columns == ("age",), "what chooses rows is no feature"


def test_times_with_a_zone_choose_the_same_rows_as_text_and_as_timestamps(tmp_path: Path) -> None:
    texts = ["2026-01-01T00:30+02:00", "2026-01-01T12:00+02:00", "2025-12-31T23:30-05:00", "2025-12-31T12:00Z"]
    times = pa.array([datetime.fromisoformat(text) for text in texts], pa.timestamp("s", "UTC"))
    for bounds, expected in (({"from": "2026-01"}, [1, 2]), ({"from": "2025", "to": "2026-01-01"}, [0, 3])):
        job = job_of(holdout={"column": "when", **bounds})
        for values in (texts, times, [text.replace("T", " ") for text in texts]):
            assert chosen_in(tmp_path, job, when=values, age=[1.0] * 4)[0] == expected


def test_a_csv_whose_months_are_text_and_a_feature_that_chooses(tmp_path: Path) -> None:
    rows = "".join(f"c{number:03d},{MONTHS[number % 4]},{number},{number % 2}\n" for number in range(12))
    (tmp_path / "insurer.csv").write_text("id,month,age,claim\n" + rows)
    file = insurer(tmp_path, claim=[0])
    file = file.replace(data={"path": tmp_path / "insurer.csv", "id": "id", "label": "claim", "features": ["age"]})
    job = job_of(holdout={"column": "month", "from": "2026-01"}, test={"column": "age", "from": 10})
    table = read_table(table_spec(job, file, Importer()))
    assert table.chosen is not None
    assert (table.chosen.held_out.tolist(), table.chosen.test.tolist()) == ([3, 7], [10, 11])
    assert table.columns == ("age",)
    batches = job.batches(table.n_rows, table.chosen)
    touched = {int(row) for step in range(batches.steps) for row in batches.rows(MicroBatch(step, 0))}
    assert touched == {0, 1, 2, 4, 5, 6, 8, 9}
    assert batches.holdout_part(0).tolist() == [3, 7] and batches.test_positions.tolist() == [10, 11]


@pytest.mark.parametrize(
    ("values", "bounds", "why"),
    [
        ([None, *MONTHS], {"from": "2026-01"}, "column 'when' is empty in 1 of 5 rows"),
        (["01.02.2026", *MONTHS], {"from": "2026-01"}, "1 of 5 values are not dates like 2026-01-31 or 2026-01"),
        (["2026-01-311", *MONTHS], {"from": "2026-01"}, "1 of 5 values are not dates like 2026-01-31 or 2026-01"),
        (["2026-01-31 10:00 CET", *MONTHS], {"from": "2026-01"}, "'when': 1 of 5 times have a zone that is no offset"),
        ([1, 2, 3, 4, 5], {"from": "2026-01"}, "the job gives dates as bounds"),
        (["a", "b", "c", "d", "e"], {"from": 3}, "the job gives numbers as bounds"),
        ([1, 2, 3, 4, 5], {"from": 6}, "holdout: no row is chosen by column 'when'"),
        ([1, 2, 3, 4, 5], {"to": 6}, "no row is left to train on"),
    ],
)
def test_a_column_that_cannot_say_is_refused(tmp_path: Path, values: list[Any], bounds: Any, why: str) -> None:
    job = job_of(holdout={"column": "when", **bounds})
    with pytest.raises(JobError) as raised:
        chosen_in(tmp_path, job, when=values, age=[1.0] * 5)
    assert why in str(raised.value)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    job = job_of(holdout={"column": "mnth", "from": "2026-01"})
    with pytest.raises(JobError, match="there is no column 'mnth'; did you mean 'month'"):
        chosen_in(tmp_path, job, month=MONTHS, age=[1.0] * 4)
    rows = PartyFile(party="insurer", data=Rows([1, 2], np.ones((2, 1)), [0, 1]))
    with pytest.raises(JobError, match="a source gives it in a frame"):
        read_table(table_spec(job, rows, Importer()))


@pytest.mark.parametrize("kind", [pa.table, pa.RecordBatch.from_pydict])
@pytest.mark.parametrize("features", [{}, {"features": {"age": {"kind": "number", "scale": "none"}}}])
def test_a_month_in_a_data_frame_chooses_rows_and_is_no_feature(kind: Any, features: Any) -> None:
    frame = kind({"month": ["2025-11", "2026-01", "2025-12"], "age": [1.0, 2.0, 3.0]})
    file = PartyFile(party="insurer", data=Rows([1, 2, 3], frame, [0, 1, 0]), **features)
    table = read_table(table_spec(job_of(holdout={"column": "month", "from": "2026-01"}), file, Importer()))
    assert table.chosen is not None and table.chosen.held_out.tolist() == [1]
    assert table.features.tolist() == [[1.0], [2.0], [3.0]]


def test_another_party_takes_all_rows_as_training_rows_until_it_is_told(tmp_path: Path) -> None:
    job = job_of(holdout={"column": "month", "from": "2026-01"})
    file = PartyFile(party="bank", data=Rows([1, 2, 3], np.ones((3, 1))))
    table = read_table(table_spec(job, file, Importer()))
    assert any("for the label holder to say" in note for note in table.notes)
    told = read_table(table_spec(job, file, Importer()), chosen=Chosen(np.array([1]), np.array([], np.int64)))
    assert job.batches(3, told.chosen).training_positions.tolist() == [0, 2]


# Properties ------------------------------------------------------------------------------------------------------

SETS = st.sets(st.integers(0, 400), min_size=4, max_size=80)
FORMS: Any = st.sampled_from(
    [
        Choices(ByColumn("when", first=6), 0.0),
        Choices(Stratified(0.3), 0.0),
        Choices(0.25, ByColumn("when", first=7)),
        Choices(ByColumn("when", values=("1", "5")), Stratified(0.2)),
        Choices(Stratified(0.2), Stratified(0.2)),
    ]
)


def chosen_ids(form: Choices, ids: set[int]) -> tuple[set[int], set[int], list[str]]:
    """Choose among customers whose values follow from their ids."""
    order = sorted(ids)
    hashes = id_hashes((str(i).encode() for i in order), 3)
    labels = np.array([i % 3 == 0 for i in order], np.int64)
    columns = {"when": pa.array([i % 9 for i in order])}
    found, faults = choose(form, columns, labels, hashes, hashes, {})
    held, test = ({order[p] for p in positions} for positions in (found.held_out, found.test))
    return held, test, faults


@settings(max_examples=60, deadline=None)
@given(FORMS, SETS, st.integers(0, 400))
def test_held_out_rows_stay_held_out_when_one_comes_or_leaves(form: Choices, ids: set[int], other: int) -> None:
    held, test, _ = chosen_ids(form, ids)
    held_later, test_later, _ = chosen_ids(form, ids ^ {other})
    assert not held & test
    if isinstance(form.holdout, ByColumn) and not isinstance(form.test, Stratified):
        assert held ^ held_later <= {other}
    most = 2 + 2 * isinstance(form.test, Stratified)  # a row at the bound of its class, and the one that came
    assert len(test ^ test_later) <= most
    assert len(held ^ held_later) <= 2 * most


@settings(max_examples=40, deadline=None)
@given(SETS, st.floats(0.05, 0.9))
def test_of_each_class_the_same_share_is_chosen(ids: set[int], share: float) -> None:
    held, _, _ = chosen_ids(Choices(Stratified(share), 0.0), ids)
    for own in ({i for i in ids if i % 3 == 0}, {i for i in ids if i % 3}):
        assert len(held & own) == held_out(len(own), share)


def test_labels_that_are_no_classes_have_no_share_of_each() -> None:
    hashes = np.arange(10, dtype=np.uint64)
    for labels, why in ((np.linspace(0, 1, 10), "whole numbers"), (np.ones((10, 2)), "one label a row"), (None, "one")):
        _, faults = choose(Choices(Stratified(0.2), 0.0), {}, labels, hashes, hashes, {})
        assert why in faults[0]


def test_a_secret_of_the_label_holder_chooses_within_classes_so_that_nobody_can_repeat_it(tmp_path: Path) -> None:
    job = job_of(holdout={"share": 0.25, "stratify": True})
    spec = table_spec(job, insurer(tmp_path, age=np.arange(400.0), claim=[i % 2 for i in range(400)]), Importer())
    found = [read_table(spec, choice_key=key).chosen for key in (None, b"1" * 32, b"2" * 32, b"1" * 32)]
    digests = [each.digest for each in found if each is not None]
    assert digests[1] == digests[3]
    assert len(set(digests)) == 3


# Telling ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32))
def test_what_is_told_is_found_among_the_own_rows(n_rows: int, seed: int) -> None:
    places = np.random.default_rng(seed).permutation(n_rows).tolist()
    held, test = sorted(places[: n_rows // 3]), sorted(places[n_rows // 3 : n_rows // 2])
    chosen = Chosen(np.array(held, np.int64), np.array(test, np.int64))
    keys = id_hashes((str(i).encode() for i in range(n_rows)), seed)
    here: dict[int, bytes] = {}
    for number, body in reversed(list(enumerate(chunks_of(chosen, keys)))):
        assert missing(here)
        here[number] = body
    assert not missing(here)
    found = chosen_of(here, keys)
    assert (found.held_out.tolist(), found.test.tolist()) == (held, test)
    assert found.digest == chosen.digest


def test_more_rows_than_a_message_holds_come_in_several() -> None:
    keys = np.arange(3 * CHUNK, dtype=np.uint64)
    chosen = Chosen(np.arange(2 * CHUNK), np.arange(2 * CHUNK, 3 * CHUNK))
    bodies = dict(enumerate(chunks_of(chosen, keys)))
    assert len(bodies) == 4
    assert missing({number: bodies[number] for number in (0, 1, 3)})
    assert chosen_of(bodies, keys).digest == chosen.digest


def told(*words: int) -> dict[int, bytes]:
    return {0: np.array(words, "<u8").tobytes()}


@pytest.mark.parametrize(
    ("here", "why"),
    [
        (told(1, 0, 99), "that nobody has"),
        (told(1, 1, 5, 5), "twice"),
        (told(2, 0, 5), "told 1 row, and said 2"),
        (told(0, 0, 5), "told 1 row, and said 0"),
    ],
)
def test_a_label_holder_that_tells_nonsense_is_named(here: dict[int, bytes], why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        chosen_of(here, np.array([5, 6, 7], np.uint64))
    with pytest.raises(RemoteProtocolError, match="did not say how many"):
        missing({0: b"12345678"})


def test_a_key_among_no_rows_is_nobodys() -> None:
    with pytest.raises(RemoteProtocolError, match="that nobody has"):
        chosen_of(told(1, 0, 5), np.zeros(0, np.uint64))
