"""A party's table: whatever order and file its rows come in, they are the same Table, or one clear complaint."""

import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.config.job import Job, PartyFile
from sl_queue.cut.rows import CutRows
from sl_queue.data.rows import Rows
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.row_order import Positions
from sl_queue.protocol.table import Table
from tests.support.tables import read_table

JOB = Job(
    name="credit",
    seed=7,
    epochs=1,
    batch_size=4,
    parties={
        "bank": {"role": "feature", "cut": [2]},
        "insurer": {"role": "label", "cut": [2]},
        "court": {"role": "feature", "cut": [2]},
    },
)
LABELS_ONLY = Job(
    name="c", seed=7, epochs=1, batch_size=4, parties={"bank": JOB.parties["bank"], "insurer": {"role": "label"}}
)
ROWS = {"id": [30, 4, 200], "age": [1.5, 2.5, 3.5], "y": [0, 1, 1]}


def table(data: Any, party: str = "bank", job: Job = JOB) -> Table:
    return read_table(job, PartyFile(party=party, data=data))


def digest(table: Table, positions: Positions) -> bytes:
    return CutRows.of(table.row_keys, positions).digest


def written(folder: Path, columns: dict[str, Any], suffix: str = ".parquet") -> dict[str, Any]:
    """Write these columns and return the [data] of the file, of which `id` is the id."""
    path, columns_of = folder / f"rows{suffix}", pa.table(columns)
    if suffix == ".csv":
        pa.csv.write_csv(columns_of, path)
    else:
        pa.parquet.write_table(columns_of, path)
    return {"path": path, "id": "id"}


def csv(folder: Path, text: str | bytes, **more: Any) -> dict[str, Any]:
    path = folder / "rows.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return {"path": path, "id": "id", **more}


def complaint(data: Any, party: str = "bank", job: Job = JOB) -> str:
    with pytest.raises(JobError) as raised:
        table(data, party, job)
    said = str(raised.value)
    assert said.startswith(f"party {party!r}, ")
    return said


def same(one: Table, other: Table) -> None:
    assert (one.digest, one.id_type) == (other.digest, other.id_type)
    np.testing.assert_array_equal(one.row_keys, other.row_keys)
    for a, b in ((one.features, other.features), (one.labels, other.labels)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


# The canonical order --------------------------------------------------------------------------------------------

INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30, unique=True)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=30, unique=True)


@given(INTEGERS, st.randoms(use_true_random=False))
def test_whole_numbers_are_ordered_by_value_however_rows_are_shuffled(ids: list[int], random: Any) -> None:
    values = {id_: float(position) for position, id_ in enumerate(ids)}
    shuffled = random.sample(ids, len(ids))
    read = table(Rows(shuffled, np.array([[values[i]] for i in shuffled])))
    assert read.features is not None
    assert read.id_type == "integer"
    assert read.features[:, 0].tolist() == [values[i] for i in sorted(ids)]
    same(read, table(Rows(ids, np.array([[values[i]] for i in ids]))))


@given(TEXTS, st.randoms(use_true_random=False))
def test_text_is_ordered_by_its_bytes_however_rows_are_shuffled(ids: list[str], random: Any) -> None:
    values = {id_: float(position) for position, id_ in enumerate(ids)}
    shuffled = random.sample(ids, len(ids))
    read = table(Rows(shuffled, np.array([[values[i]] for i in shuffled])))
    assert read.features is not None
    assert read.id_type == "text"
    assert read.features[:, 0].tolist() == [values[i] for i in sorted(ids, key=lambda i: i.encode())]
    same(read, table(Rows(ids, np.array([[values[i]] for i in ids]))))


@given(st.one_of(INTEGERS, TEXTS), st.data())
def test_the_digest_and_every_key_change_when_any_id_does(ids: list[Any], data: st.DataObject) -> None:
    changed = list(ids)
    another = (INTEGERS if isinstance(ids[0], int) else TEXTS).map(lambda found: found[0])
    changed[data.draw(st.integers(0, len(ids) - 1))] = data.draw(another.filter(lambda id_: id_ not in ids))
    before, after = (table(Rows(some, np.zeros((len(ids), 1)))) for some in (ids, changed))
    assert before.digest != after.digest
    assert not set(before.row_keys.tolist()) & set(after.row_keys.tolist())


def test_features_and_labels_follow_their_ids(tmp_path: Path) -> None:
    for suffix in (".csv", ".parquet"):
        read = table({**written(tmp_path, ROWS, suffix), "label": "y"}, "insurer")
        assert read.features is not None
        assert read.labels is not None
        assert read.features.tolist() == [[2.5], [1.5], [3.5]]
        assert read.labels.tolist() == [1, 0, 1]
        assert read.features.dtype == np.float64
        assert read.labels.dtype == np.int64
        assert (read.n_rows, read.id_type) == (3, "integer")


def test_csv_parquet_and_rows_with_the_same_content_are_the_same_table(tmp_path: Path) -> None:
    numbers = {"id": [30, 4, -200], "age": [1.5, 2.5, 3.5]}
    texts = {"id": ["ä", 'b,\n"', "NA"], "age": [1.5, 2.5, 3.5]}
    for columns in (numbers, texts):
        from_rows = table(Rows(columns["id"], np.array(columns["age"])[:, None]))
        same(table(written(tmp_path, columns, ".csv")), from_rows)
        same(table(written(tmp_path, columns, ".parquet")), from_rows)


def test_ids_may_be_stored_in_any_width_or_encoding(tmp_path: Path) -> None:
    wide = table(Rows(np.array([3, 1, 2], np.int64), np.zeros((3, 1))))
    for ids in (np.array([3, 1, 2], np.uint8), [3, 1, 2], np.array([3, 1, 2], object), np.array([3, 1, 2], np.uint64)):
        same(table(Rows(ids, np.zeros((3, 1)))), wide)
    plain = table(Rows(["c", "a", "b"], np.zeros((3, 1))))
    for column in (pa.array(["c", "a", "b"]).dictionary_encode(), pa.array(["c", "a", "b"], pa.large_string())):
        same(table(written(tmp_path, {"id": column, "x": [0.0, 0.0, 0.0]})), plain)
    for texts in (np.array(["c", "a", "b"]), np.array(["c", "a", "b"], np.dtypes.StringDType())):
        same(table(Rows(texts, np.zeros((3, 1)))), plain)
    huge = table(csv(tmp_path, f"id,x\n{2**64 - 1},1.5\n7,2.5\n"))
    assert huge.id_type == "integer"
    same(huge, table(Rows(np.array([2**64 - 1, 7], np.uint64), np.array([[1.5], [2.5]]))))


@pytest.mark.parametrize(
    ("ids", "id_type"),
    [
        (["7", "10", "-3", "0"], "integer"),
        (["001", "1"], "text"),
        (["7", "10", "x"], "text"),
        (["7", "+8"], "text"),
        (["7", "-0"], "text"),
        (["7", "8.0"], "text"),
        (["7", " 8"], "text"),
        (["7", "99999999999999999999999"], "text"),
        (["-7", "18446744073709551615"], "text"),
        (["true", "false"], "text"),
        (["NA", "null"], "text"),
        (["2024-01-01", "2024-01-02"], "text"),
    ],
)
def test_ids_of_a_csv_file_are_numbers_only_if_all_are_written_as_numbers(
    tmp_path: Path, ids: list[str], id_type: str
) -> None:
    read = table(csv(tmp_path, "id,x\n" + "".join(f"{id_},{position}.5\n" for position, id_ in enumerate(ids))))
    assert read.id_type == id_type
    assert read.features is not None
    key = int if id_type == "integer" else str.encode
    assert read.features[:, 0].tolist() == [ids.index(id_) + 0.5 for id_ in sorted(ids, key=key)]


def test_a_number_and_its_text_are_different_ids() -> None:
    numbers, texts = (table(Rows(ids, np.zeros((2, 1)))) for ids in ([1, 2], ["1", "2"]))
    assert numbers.digest != texts.digest
    assert not set(numbers.row_keys.tolist()) & set(texts.row_keys.tolist())


def test_texts_that_read_the_same_one_after_another_are_different_ids() -> None:
    one, other = (table(Rows(ids, np.zeros((2, 1)))) for ids in (["a", "bc"], ["ab", "c"]))
    assert one.digest != other.digest


def test_rows_are_named_by_their_ids_and_order() -> None:
    one, other = (table(Rows(ids, np.random.default_rng(1).normal(size=(3, 1)))) for ids in ([1, 2, 3], [3, 1, 2]))
    positions = np.array([0, 2])
    assert digest(one, positions) == digest(other, positions)
    assert digest(one, positions) != digest(one, positions[::-1])
    assert digest(one, positions) != digest(one, np.array([0, 1]))


# Columns --------------------------------------------------------------------------------------------------------


def test_features_are_all_columns_but_id_and_label_or_those_named_in_their_order(tmp_path: Path) -> None:
    columns = {"b": [1.0, 2.0], "id": [1, 2], "y": [0, 1], "a": [3.0, 4.0], "__index_level_0__": [5, 6]}
    for suffix in (".csv", ".parquet"):
        data = {**written(tmp_path, columns, suffix), "label": "y"}
        assert table(data, "insurer").features.tolist() == [[1, 3], [2, 4]]  # type: ignore[union-attr]
        named = table({**data, "features": ["a", "b"]}, "insurer")
        assert named.features.tolist() == [[3, 1], [4, 2]]  # type: ignore[union-attr]


def test_columns_that_are_not_selected_are_not_looked_at(tmp_path: Path) -> None:
    data = csv(tmp_path, "id,x,name,y\n1,0.5,,\n2,1.5,bob,\n", features=["x"])
    assert table(data).features.tolist() == [[0.5], [1.5]]  # type: ignore[union-attr]


def test_a_label_holder_without_a_cut_reads_labels_only(tmp_path: Path) -> None:
    data = csv(tmp_path, "id,name,y\n2,bob,1\n1,,0\n", label="y")
    read = table(data, "insurer", LABELS_ONLY)
    assert read.features is None
    assert read.labels is not None
    assert read.labels.tolist() == [0, 1]
    assert table({**data, "features": []}, "insurer", JOB).features is None
    assert table(Rows([2, 1], None, [1, 0]), "insurer", LABELS_ONLY).labels.tolist() == [0, 1]  # type: ignore[union-attr]


def test_a_feature_party_never_has_labels() -> None:
    assert table(Rows([1], [[1.0]], [1])).labels is None


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([pa.float32(), pa.float32()], np.float32),
        ([pa.float32(), pa.float64()], np.float64),
        ([pa.int64(), pa.bool_()], np.int64),
        ([pa.bool_(), pa.bool_()], np.float32),
        ([pa.bool_(), pa.float32()], np.float32),
        ([pa.int8(), pa.uint32()], np.int64),
        ([pa.int8(), pa.float32()], np.float32),
        ([pa.uint64(), pa.float64()], np.float64),
        ([pa.float16(), pa.int8()], np.float32),
        ([pa.decimal128(5, 2), pa.int8()], np.float64),
    ],
)
def test_feature_columns_share_one_dtype_that_holds_all_of_them(
    tmp_path: Path, types: list[pa.DataType], expected: Any
) -> None:
    raw: dict[bool, list[Any]] = {True: [Decimal(1), Decimal(0)], False: [1, 0]}
    columns = {
        f"c{i}": pa.array(np.array([1, 0], np.float16))
        if kind == pa.float16()
        else pa.array(raw[pa.types.is_decimal(kind)], pa.int64() if kind == pa.bool_() else kind).cast(kind)
        for i, kind in enumerate(types)
    }
    read = table(written(tmp_path, {"id": [1, 2], **columns}))
    assert read.features is not None
    assert read.features.dtype == expected
    assert read.features.tolist() == [[1, 1], [0, 0]]
    assert read.features.flags.c_contiguous


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([True, False], np.int64),
        (np.array([3, 250], np.uint8), np.int64),
        ([0.5, 1.5], np.float64),
        (np.array([0.5, 1.5], np.float32), np.float32),
    ],
)
def test_labels_are_64_bit_integers_or_stay_floating(tmp_path: Path, labels: Any, dtype: Any) -> None:
    from_file = table({**written(tmp_path, {"id": [1, 2], "x": [1, 2], "y": labels}), "label": "y"}, "insurer")
    from_code = table(Rows([1, 2], [[1], [2]], labels), "insurer")
    for read in (from_file, from_code):
        assert read.labels is not None
        assert read.labels.dtype == dtype
        assert read.labels.tolist() == np.asarray(labels).tolist()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float32),
        (np.dtype(">f8"), np.float64),
        (np.bool_, np.float32),
        (np.uint8, np.uint8),
        (np.int64, np.int64),
        (np.uint32, np.int64),
    ],
)
def test_rows_may_have_any_shape_and_keep_a_dtype_that_torch_computes_with(dtype: Any, expected: Any) -> None:
    images = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    read = table(Rows([2, 1], images))
    assert read.features is not None
    assert read.features.dtype == expected
    assert read.features.dtype.isnative
    np.testing.assert_array_equal(read.features, images[::-1].astype(expected))


def test_a_csv_column_may_begin_with_whole_numbers_and_end_with_fractions(tmp_path: Path) -> None:
    n, note = 20_000, "a note\nof two lines" * 100  # several blocks of the reader, which end inside of quotes
    data = csv(
        tmp_path, "note,x,id\n" + "".join(f'"{note}",{i},{i}\n' for i in range(n)) + f",0.5,{n}\n", features=["x"]
    )
    assert data["path"].stat().st_size > 2 * 2**24
    read = table(data)
    assert read.features is not None
    assert read.features[:, 0].tolist() == [*range(n), 0.5]


def test_a_csv_file_may_have_very_many_columns(tmp_path: Path) -> None:
    n = 20_000
    header, row = ",".join(f"gene_{i}{'x' * 100}" for i in range(n)), ",".join(["0.25"] * n)
    read = table(csv(tmp_path, f"id,{header}\n1,{row}\n", features=[f"gene_{n - 1}{'x' * 100}"]))
    assert read.features is not None
    assert read.features.tolist() == [[0.25]]


def test_csv_files_with_byte_order_mark_quotes_and_line_breaks_are_read(tmp_path: Path) -> None:
    read = table(csv(tmp_path, '\ufeffid,note,x\r\n"b\nb","c\nd",1.5\r\na,"e,f",2.5\r\n', features=["x"]))
    assert read.features is not None
    assert read.features.tolist() == [[2.5], [1.5]]


# A callable -----------------------------------------------------------------------------------------------------


def test_a_source_gives_rows(tmp_path: Path) -> None:
    (tmp_path / "given_rows.py").write_text(
        "import sl_queue\n\ndef rows():\n    return sl_queue.Rows(ids=['b', 'a'], features=[[1.0], [2.0]])\n"
    )
    (tmp_path / "bank.toml").write_text('party = "bank"\n[data]\nsource = "given_rows:rows"\n')
    read = read_table(JOB, PartyFile.load(tmp_path / "bank.toml"))
    same(read, table(Rows(["b", "a"], [[1.0], [2.0]])))
    same(read, table({"source": lambda: Rows(["b", "a"], [[1.0], [2.0]])}))


def fails() -> Rows:
    raise ValueError("no disk")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (fails, ["data.source = 'fails' fails: ValueError: no disk"]),
        (lambda: [1], ["returns a list", "sl_queue.Rows"]),
        ("no_such_module:rows", ["no_such_module"]),
    ],
)
def test_a_source_that_fails_is_named(source: Any, expected: list[str]) -> None:
    with pytest.raises(JobError) as raised:
        table({"source": source})
    for words in expected:
        assert words in str(raised.value)


# Complaints: where, which column, how many rows, and never a value ----------------------------------------------


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("id,x\n", {}, ["there are no rows"]),
        ("", {}, ["no column 'id'", "its columns are none"]),
        (b"PK\x03\x04" + b"\x00" * 2**18, {}, ["cannot be read", "comma-separated"]),
        ("\n\nid,x\n1,nan\n", {}, ["'x' in 1 of 1 rows"]),
        (b"id,x\n\xff\xfe,1\n", {}, ["cannot be read", "not all of it is utf-8"]),
        ("id,x\n1,2\n31337,2,3\n31337\n", {}, ["2 rows have more or fewer fields"]),
        (
            "customer,x\n1,2\n",
            {"id": "customr"},
            ["no column 'customr'", "did you mean 'customer'?", "'customer', 'x'"],
        ),
        ("id,x\n1,2\n", {"features": ["z"]}, ["no column 'z'", "'id', 'x'"]),
        ("id,x,x\n1,2,3\n", {}, ["2 columns are called 'x'"]),
        ("id;x\n1;2\n", {}, ["no column 'id'", "'id;x'"]),
        ("id\n1\n", {}, ["there are no features"]),
        ("id,x\n31337,1\n31337,2\n7,3\n31337,4\n", {}, ["2 of 4 rows repeat the id"]),
        ("id,x\n,1\nalice,2\n,3\n", {}, ["2 of 3 rows have no id"]),
        ("id,x,city\n1,2,Oslo\n2,3,Bern\n", {}, ["'city' (text)", "data.features"]),
        ("id,x,day\n1,2,2024-01-01\n", {}, ["'day' (date32"]),
        ("id,x,z\n1,,3\n2,NA,4\n3,1,\n", {}, ["missing", "'x' in 2 of 3 rows", "'z' in 1 of 3 rows"]),
        ("id,x\n1,\n2,\n", {}, ["missing", "'x' in 2 of 2 rows"]),
        ("id,x,z\n1,inf,1\n2,-inf,2\n3,1,3\n", {}, ["NaN or infinity", "'x' in 2 rows of 3"]),
    ],
)
def test_a_csv_file_that_cannot_be_trained_on_is_explained(
    tmp_path: Path, text: str | bytes, more: dict[str, Any], expected: list[str]
) -> None:
    said = complaint(csv(tmp_path, text, **more))
    assert str(tmp_path / "rows.csv") in said
    for words in expected:
        assert words in said
    for value in ("31337", "alice", "Oslo", "2024"):
        assert value not in said


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": pa.array([1.0, 2.0])}, ["ids are of type double"]),
        ({"id": pa.array([True, False])}, ["ids are of type bool"]),
        ({"id": pa.array([1, 2], pa.date32())}, ["ids are of type date32"]),
        ({"id": pa.array([b"a", b"b"])}, ["ids are of type binary"]),
        ({"id": pa.array([1, None])}, ["1 of 2 rows have no id"]),
        ({"id": pa.array(["", None])}, ["2 of 2 rows have no id"]),
        ({"id": pa.array([1, 1])}, ["1 of 2 rows repeat"]),
        ({"x": pa.array(["u", "v"])}, ["'x' (text)"]),
        ({"x": pa.array(["u", "v"]).dictionary_encode()}, ["'x' (text)"]),
        ({"x": pa.array([[1.0], [2.0]])}, ["'x' (list"]),
        ({"x": pa.array([float("nan"), 1.0])}, ["NaN or infinity", "'x' in 1 row of 2"]),
        ({"x": pa.array([None, 1.0])}, ["missing", "'x' in 1 of 2 rows"]),
        ({"x": pa.array([None, True])}, ["missing", "'x' in 1 of 2 rows"]),
        ({"y": pa.array(["no", "yes"])}, ["label column 'y' holds text", "0, 1, 2"]),
        ({"y": pa.array([None, 1])}, ["missing", "'y' in 1 of 2 rows"]),
        ({"y": pa.array([float("inf"), 1.0])}, ["label column 'y'", "1 of 2 rows"]),
        ({"y": pa.array([2**64 - 1, 1], pa.uint64())}, ["label column 'y'", "64 bits"]),
    ],
)
def test_a_parquet_file_that_cannot_be_trained_on_is_explained(
    tmp_path: Path, columns: dict[str, Any], expected: list[str]
) -> None:
    good = {"id": pa.array([1, 2]), "x": pa.array([1.0, 2.0]), "y": pa.array([0, 1])}
    said = complaint({**written(tmp_path, {**good, **columns}), "label": "y"}, "insurer")
    assert str(tmp_path / "rows.parquet") in said
    for words in expected:
        assert words in said


def test_a_file_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    good = written(tmp_path, {"id": [1], "x": [1.0]})
    whole = good["path"].read_bytes()
    good["path"].write_bytes(whole[: len(whole) // 2])
    assert "is it a Parquet file?" in complaint(good)
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in complaint({"path": tmp_path / "folder.csv", "id": "id"})
    for name in ("none.csv", "none.parquet"):
        said = complaint({"path": tmp_path / name, "id": "id"})
        assert said.endswith(f"{name}: there is no such file")
    said = complaint({"path": tmp_path / "rows.xlsx", "id": "id"})
    assert "ends in .csv or .parquet" in said
    assert "data.source" in said


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    columns = {f"column_{i}": [1.0] for i in range(200)}
    said = complaint({**written(tmp_path, columns), "id": "id"})
    assert "and 180 more" in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (Rows([], np.zeros((0, 1)), []), ["there are no rows"]),
        (Rows([1, 2], [[1.0]], [0, 1]), ["2 ids", "features for 1 row"]),
        (Rows([1, 2], [[1.0], [2.0]], [0]), ["2 ids", "labels for 1 row"]),
        (Rows([1, 1], [[1.0], [2.0]], [0, 1]), ["1 of 2 rows repeat"]),
        (Rows([1.0, 2.0], [[1.0], [2.0]], [0, 1]), ["ids are of type double"]),
        (Rows(["a", None], [[1.0], [2.0]], [0, 1]), ["1 of 2 rows have no id"]),
        (Rows([1, "a"], [[1.0], [2.0]], [0, 1]), ["whole numbers of 64 bits, or all be text"]),
        (Rows([1, 2**64], [[1.0], [2.0]], [0, 1]), ["whole numbers of 64 bits"]),
        (Rows(["a", "\ud800"], [[1.0], [2.0]], [0, 1]), ["text"]),
        (Rows([[1], [2]], [[1.0], [2.0]], [0, 1]), ["ids have the shape (2, 1)"]),
        (Rows([1, 2], [[1.0], [2.0, 3.0]], [0, 1]), ["different shapes"]),
        (Rows([1, 2], [["a"], ["b"]], [0, 1]), ["features are of dtype", "encode"]),
        (Rows([1, 2], 3.0, [0, 1]), ["not an array of rows"]),
        (Rows([1, 2], None, [0, 1]), ["features are missing"]),
        (Rows([1, 2], [[1.0, np.nan], [np.inf, np.nan]], [0, 1]), ["features", "NaN or infinity in 2 of 2 rows"]),
        (Rows([1, 2], [[1.0], [2.0]], ["no", "yes"]), ["labels are of dtype", "encode"]),
        (Rows([1, 2], [[1.0], [2.0]], [0.5, np.nan]), ["labels", "1 of 2 rows"]),
        (Rows([1, 2], [[1.0], [2.0]]), ["there are no labels", "'insurer' is the label holder"]),
    ],
)
def test_rows_that_cannot_be_trained_on_are_explained(rows: Rows, expected: list[str]) -> None:
    said = complaint(rows, "insurer")
    for words in expected:
        assert words in said


@pytest.mark.usefixtures("without_collector")
def test_many_rows_are_put_in_order_in_a_few_times_what_a_quarter_of_them_takes() -> None:
    def read_in_order(n: int) -> tuple[Table, float]:
        ids = np.random.default_rng(0).permutation(n)
        began = time.thread_time()
        return table(Rows(ids, ids[:, None].astype(np.float64))), time.thread_time() - began

    n = 120_000
    _, quarter_s = read_in_order(n // 4)
    read, seconds = read_in_order(n)
    assert read.features is not None
    assert (read.features[:, 0] == np.arange(n)).all()
    assert len(np.unique(read.row_keys)) == n
    assert seconds < 10 * quarter_s  # a cost that grows with the square would be sixteen times
