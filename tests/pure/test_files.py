"""Files as organisations write them are read as they were meant, whatever their dialect, compression and kind."""

import gzip
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.predictions import write_predictions
from sl_queue.data.to_predict import read_to_predict
from sl_queue.errors import JobError
from sl_queue.protocol.table import Table
from tests.support.tables import read_table

PARTIES = {"bank": {"role": "feature", "cut": [1]}, "insurer": {"role": "label", "cut": [1]}}


def read(data: dict[str, Any], features: dict[str, Any] | None = None, **alignment: Any) -> Table:
    about = {"alignment": alignment} if alignment else {}
    job = Job(name="t", seed=1, epochs=1, batch_size=2, parties=PARTIES, **about)
    party = "insurer" if "label" in data else "bank"
    return read_table(job, PartyFile(party=party, data=data, **({} if features is None else {"features": features})))


def values(table: Table) -> Any:
    assert table.features is not None
    return table.features.tolist()


EXPECTED = [[1234.5, 2.0], [-0.5, 30000.0]]


@pytest.mark.parametrize(
    ("name", "text", "dialect"),
    [
        ("a.csv", "id,x,y\n1,1234.5,2\n2,-0.5,30000\n", {}),
        ("a.csv", "\ufeffid;x;y\n1;1234,5;2\n2;-0,5;30000\n", {"delimiter": ";", "decimal": ","}),
        ("a.csv", 'id;x;y\n1;"1.234,5";2\n2;-0,5;30.000\n', {"delimiter": ";", "decimal": ",", "thousands": "."}),
        ("a.tsv", "id\tx\ty\n1\t1234.5\t2\n2\t-0.5\t30000\n", {}),
        ("a.csv.gz", "id,x,y\n1,1234.5,2\n2,-0.5,30000\n", {}),
        ("a.tsv.gz", 'id\t"x"\ty\n1\t1,234.5\t2\n2\t-0.5\t30,000\n', {"thousands": ","}),
        ("a.csv", 'id,x,y\r\n1,"1234.5",2\r\n2,-0.5,30000\r\n', {"encoding": "utf-16"}),
    ],
)
def test_a_csv_is_read_in_its_dialect(tmp_path: Path, name: str, text: str, dialect: dict[str, Any]) -> None:
    body = text.encode(dialect.get("encoding", "utf-8"))
    (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    table = read({"path": tmp_path / name, "id": "id", "csv": dialect})
    assert (values(table), table.columns) == (EXPECTED, ("x", "y"))


def test_text_of_another_encoding_is_a_category_and_a_quoted_newline_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('id;town\n1;"Köln\nSüd"\n2;Genf\n'.encode("cp1252"))
    csv = {"delimiter": ";", "encoding": "cp1252"}
    table = read({"path": tmp_path / "a.csv", "id": "id", "csv": csv}, {"town": {"kind": "category"}})
    assert table.columns == ("town=other", "town missing", "town=Genf", "town=Köln\nSüd")


def test_codes_with_leading_zeros_stay_what_they_are_and_missing_texts_are_gaps(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,code,x\n1,007,?\n2,7,1.5\n3,?,2.5\n")
    features = {"code": {"kind": "category"}, "x": {"kind": "number", "missing": "zero", "scale": "none"}}
    table = read({"path": tmp_path / "a.csv", "id": "id", "csv": {"missing": ["?"]}}, features)
    assert table.columns == ("code=other", "code missing", "code=007", "code=7", "x")
    assert values(table) == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1.5], [0, 1, 0, 0, 2.5]]


def test_an_open_quote_is_found_in_any_dialect(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id;x\n1;"open\n2;3\n')
    with pytest.raises(JobError, match="never closes"):
        read({"path": tmp_path / "a.csv", "id": "id", "csv": {"delimiter": ";"}})


@pytest.mark.parametrize("features", [None, {"*": {"kind": "category"}}])
@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (pa.array([1]), pa.array(["1"]), "column 'k' is int64 in 1.parquet and string in deep/2.parquet; write a"),
        (pa.array([True]), pa.array([1]), "column 'k' is bool in 1.parquet and int64 in deep/2.parquet; write a"),
        (pa.array([2**53 + 1]), pa.array([0.5]), "column 'k' is int64 in 1.parquet and double in deep/2.parquet; w"),
        (pa.array([1], pa.date32()), pa.array([1], pa.timestamp("us")), "column 'k' is date32[day] in 1.parquet and"),
        (pa.array(["a"]).dictionary_encode(), pa.array(["a"]), "column 'k' is dictionary<values=string, indices="),
    ],
)
def test_a_column_that_files_of_a_folder_hold_as_different_types_is_named_with_them(
    tmp_path: Path, one: Any, other: Any, told: str, features: Any
) -> None:
    (tmp_path / "rows/deep").mkdir(parents=True)
    ids = pa.array([1], pa.int32())
    for path, values in (("1.parquet", one), ("deep/2.parquet", other)):
        pa.parquet.write_table(pa.table({"id": ids, "k": values, "x": [1.5]}), tmp_path / "rows" / path)
        ids = pa.array([2], pa.int64())  # one of which Arrow makes the other
    with pytest.raises(JobError) as raised:
        read({"path": tmp_path / "rows", "id": "id"}, features)
    assert str(raised.value).startswith(f"party 'bank', {tmp_path / 'rows'}: {told}")
    assert read({"path": tmp_path / "rows", "id": "id", "exclude": ["k"]}, features).n_rows == 2
    with pytest.raises(JobError, match=r"column 'k' is .*, or leave it out"):
        read({"path": tmp_path / "rows", "id": "k"})


def test_a_column_that_is_torn_is_said_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"some text {i}" for i in range(1000)]
    pa.parquet.write_table(pa.table({"id": range(1000), "k": texts}), path, use_dictionary=False)
    page, body = pa.parquet.read_metadata(path).row_group(0).column(1), bytearray(path.read_bytes())
    first, length = page.data_page_offset, page.total_compressed_size
    body[first + length // 2 : first + length] = bytes(length - length // 2)
    path.write_bytes(body)
    with pytest.raises(JobError, match=r"a\.parquet: cannot be read \(\w+\); is it a Parquet file\?"):
        read({"path": path, "id": "id"}, {"k": {"kind": "category", "rare": 2}})


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "rows/2024").mkdir(parents=True)
    pa.parquet.write_table(pa.table({"id": [3, 1], "x": [3.0, 1.0]}), tmp_path / "rows/b.parquet")
    pa.parquet.write_table(pa.table({"x": [2.0], "id": [2]}), tmp_path / "rows/2024/a.parquet")
    assert values(read({"path": tmp_path / "rows", "id": "id"})) == [[1.0], [2.0], [3.0]]
    pa.parquet.write_table(pa.table({"id": [9]}), tmp_path / "rows/c.parquet")
    with pytest.raises(JobError, match="1 of its files have other columns than the first"):
        read({"path": tmp_path / "rows", "id": "id"})


def test_an_arrow_file_is_read(tmp_path: Path) -> None:
    table = pa.table({"id": ["b", "a"], "x": [2, 1]})
    pa.feather.write_feather(table, tmp_path / "a.feather", compression="uncompressed")
    assert values(read({"path": tmp_path / "a.feather", "id": "id"})) == [[1], [2]]
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert values(read({"path": tmp_path / "a.arrow", "id": "id"})) == [[1], [2]]


VIEWS = {"kind": pa.string_view(), "day": pa.string_view(), "raw": pa.binary_view()}


def packed(path: Path, ids: Any, **columns: Any) -> dict[str, Any]:
    """Write an Arrow file of columns that are views, dictionaries of views and runs; return its [data]."""
    told = {name: pa.array(values, VIEWS.get(name)) for name, values in columns.items()}
    codes = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.uint32()), pa.array(["a", "b"], pa.string_view()))
    table = pa.table({"id": ids, **told, "code": codes, "run": pa.RunEndEncodedArray.from_arrays([2, 3], [5.0, 7.0])})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return {"path": path, "id": "id"}


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(["x", "y", "z"], pa.string_view()),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), pa.array(["x", "y", "z"], pa.string_view())),
        pa.RunEndEncodedArray.from_arrays([1, 2, 3], ["x", "y", "z"]),
    ],
    ids=["views", "dictionary", "runs"],
)
def test_views_dictionaries_of_them_and_runs_are_what_they_stand_for(tmp_path: Path, ids: Any) -> None:
    columns = {"kind": ["u", None, "v"], "day": ["2026-01-03", "2026-01-04", "2026-01-05"], "raw": [b"r", b"r", b"s"]}
    data = packed(tmp_path / "a.arrow", ids, **columns)
    features = {
        "run": {"kind": "number", "scale": "none"},
        "day": {"kind": "date", "parts": ["day"], "scale": "none"},
        "*": {"kind": "category"},
    }
    found = read(data, features)
    assert found.columns == tuple(
        f"{name}{end}" if name in ("kind", "raw", "code") else end
        for name, *ends in (
            ("kind", "=other", " missing", "=u", "=v"),
            ("", "day.day"),
            ("raw", "=other", " missing", "=r", "=s"),
            ("code", "=other", " missing", "=a", "=b"),
            ("", "run"),
        )
        for end in ends
    )
    one = [0, 0, 1, 0]
    other, gap = [0, 0, 0, 1], [0, 1, 0, 0]
    assert values(found) == [
        [*one, 3, *one, *one, 5],
        [*gap, 4, *one, *other, 5],
        [*other, 5, *other, *gap, 7],
    ]
    pa.parquet.write_table(pa.table({"id": ["z", "y", "x"], "x": [1, 2, 3]}), tmp_path / "b.parquet")
    assert found.digest == read({"path": tmp_path / "b.parquet", "id": "id"}).digest
    assert values(read({**data, "features": ["run"]})) == [[5], [5], [7]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_polars_writes_by_default_is_read_and_predicted(tmp_path: Path, suffix: str) -> None:
    frame = pl.DataFrame({"id": ["b", "a"], "town": ["u", "v"], "x": [2.0, 1.0]})
    frame.with_columns(pl.col("town").cast(pl.Categorical)).write_ipc(tmp_path / "a.arrow")
    data, features = {"path": tmp_path / "a.arrow", "id": "id"}, {"town": {"kind": "category"}, "x": {"kind": "number"}}
    assert read(data, features).columns == ("town=other", "town missing", "town=u", "town=v", "x")
    job = Job(name="t", seed=1, epochs=1, batch_size=2, parties=PARTIES)
    file = PartyFile(party="bank", data={**data, "features": ["x"]})
    rows = read_to_predict(table_spec(job, file, Importer()), None, None)
    out = tmp_path / f"out{suffix}"
    write_predictions(out, rows.ids, rows.positions, {"value": np.array([10.0, 20.0])})
    written = pa.csv.read_csv(out) if suffix == ".csv" else pa.parquet.read_table(out)
    assert written.to_pydict() == {"id": ["b", "a"], "value": [20.0, 10.0]}


def test_numbers_of_two_bytes_are_categories_and_ids_as_those_of_four_are(tmp_path: Path) -> None:
    features = {"k": {"kind": "category"}, "half": {"kind": "category"}}
    for name, dtype in (("a", np.float16), ("b", np.float32)):
        columns = {"id": [1, 2, 3], "k": [7, 8, np.nan], "half": [0.5, 0.25, 0.5]}
        table = pa.table({column: pa.array(np.array(given, dtype)) for column, given in columns.items()})
        pa.parquet.write_table(table, tmp_path / f"{name}.parquet")
    one, other = (
        read({"path": tmp_path / f, "id": "id", "id_type": "integer"}, features) for f in ("a.parquet", "b.parquet")
    )
    assert one.columns == ("k=other", "k missing", "k=7", "k=8", "half=other", "half missing", "half=0.25", "half=0.5")
    assert (one.columns, values(one), one.digest) == (other.columns, values(other), other.digest)
    with pytest.raises(JobError, match=r'say that they are: data\.id_type = "integer"'):
        read({"path": tmp_path / "a.parquet", "id": "id"}, features)


def test_types_of_parquet_become_numbers(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array(["x", "y"]).dictionary_encode(),
            "small": pa.array([1, 2], pa.uint8()),
            "flag": [True, False],
            "money": pa.array([1, 2], pa.int64()).cast(pa.decimal128(21, 2)),
            "seen": pa.array([0, 86400 * 10**6], pa.timestamp("us")),
            "town": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    features = {
        "town": {"kind": "category"},
        "seen": {"kind": "date", "parts": ["day"], "scale": "none"},
        "*": {"kind": "number", "scale": "none"},
    }
    found = read({"path": tmp_path / "a.parquet", "id": "id"}, features)
    assert values(found) == [[1, 1, 1, 1, 0, 0, 1, 0], [2, 0, 2, 2, 0, 0, 0, 1]]


def test_rows_that_name_their_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.svmlight").write_text("b 1 2:0.5 10:3\na 0 # nothing\n\n")
    table = read({"path": tmp_path / "a.svmlight", "id": "id", "label": "label"})
    assert (table.columns, values(table)) == (("2", "10"), [[0.0, 0.0], [0.5, 3.0]])
    assert table.labels is not None and table.labels.tolist() == [0, 1]
    (tmp_path / "tags.txt").write_text("b,x:1,y:2\na,y:0.5\n")
    table = read({"path": tmp_path / "tags.txt", "id": "id", "format": "tag:value"})
    assert (table.columns, values(table)) == (("x", "y"), [[0.0, 0.5], [1.0, 2.0]])
    (tmp_path / "tags.txt").write_text("b,x:1,y\nc,x:1\n")
    with pytest.raises(JobError, match="1 row is not written so, the first of them is line 1"):
        read({"path": tmp_path / "tags.txt", "id": "id", "format": "tag:value"})


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("svmlight", "1 0 3:1\n2 1 3:0.5 4:1 3:0.7\n3 0 3:1 3:1\n", "2 rows name a column more than once, the first "),
        ("tag:value", "1,a:1\n2,b:1,b:2\n", "1 row names a column more than once, the first of them is line 2"),
        ("svmlight", "1 0 3:1\n2 1 3:1_000\n", "1 row is not written so, the first of them is line 2"),
        ("svmlight", "1 0 3:9007199254740993\n2 1 3:9007199254740992\n", "whole numbers of column '3' in 1 row need"),
        ("tag:value", "1,a:-9223372036854775807\n2,a:1\n", "whole numbers of column 'a' in 1 row need"),
    ],
)
def test_a_row_that_names_a_column_twice_or_is_rounded_is_refused(
    tmp_path: Path, kind: str, text: str, told: str
) -> None:
    (tmp_path / "rows.txt").write_text(text)
    data = {"path": tmp_path / "rows.txt", "id": "id", "format": kind, "exclude": ["label"]}
    with pytest.raises(JobError) as raised:
        read(data)
    assert told in str(raised.value)


def test_large_numbers_of_rows_that_name_their_columns_are_rounded_where_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("1,a:9007199254740993,b:9007199254740993.0\n2,a:9007199254740992,b:1e300\n")
    data = {"path": tmp_path / "rows.txt", "id": "id", "format": "tag:value"}
    assert values(read({**data, "features": ["b"]})) == [[2.0**53], [1e300]]
    number, category = {"kind": "number", "scale": "minmax"}, {"kind": "category"}
    assert values(read({**data, "features": ["a"]}, {"a": number})) == [[0.0], [0.0]]
    with pytest.raises(JobError, match="codes of column 'a' in 1 row need more than 53 bits"):
        read({**data, "features": ["a"]}, {"a": category})


def test_features_are_chosen_by_patterns_and_left_out_by_others(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,x1,x2,y,z\n1,1,2,3,4\n")
    data = {"path": tmp_path / "a.csv", "id": "id"}
    assert read({**data, "features": ["y", "x*"], "exclude": ["x2"]}).columns == ("y", "x1")
    assert read({**data, "exclude": ["x*"]}).columns == ("y", "z")


# Ids ------------------------------------------------------------------------------------------------------------


def test_several_columns_are_one_id(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"n": [1, 12], "c": ["a1", "a"], "x": [2.0, 1.0]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("x,c,n\n1,a,12\n2,a1,1\n")
    one, other = (read({"path": tmp_path / name, "id": ["c", "n"]}) for name in ("a.parquet", "b.csv"))
    assert one.digest == other.digest
    assert values(one) == [[1.0], [2.0]] == values(other)
    (tmp_path / "b.csv").write_text("x,c,n\n1,a,\n2,a1,1\n")
    with pytest.raises(JobError, match="1 of 2 rows have no id"):
        read({"path": tmp_path / "b.csv", "id": ["c", "n"]})


def test_uuids_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    ids = [UUID(int=7), UUID(int=2**100)]
    raw = pa.array([i.bytes for i in ids], pa.binary(16))
    pa.parquet.write_table(pa.table({"id": raw, "x": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text(f"id,x\n{{{str(ids[1]).upper()}}},2\n{ids[0].hex},1\n")
    (tmp_path / "c.csv").write_text("id,x\n" + "".join(f"{i},{n}\n" for n, i in enumerate(ids, 1)))
    tables = [read({"path": tmp_path / n, "id": "id", "id_type": "uuid"}) for n in ("a.parquet", "b.csv", "c.csv")]
    assert len({table.digest for table in tables}) == 1
    assert tables[0].digest == read({"path": tmp_path / "c.csv", "id": "id"}).digest
    with pytest.raises(JobError, match=r'say so: data\.id_type = "uuid"'):
        read({"path": tmp_path / "a.parquet", "id": "id"})
    (tmp_path / "b.csv").write_text("id,x\n7,2\n")
    with pytest.raises(JobError, match="1 of 1 ids are not UUIDs"):
        read({"path": tmp_path / "b.csv", "id": "id", "id_type": "uuid"})


def test_ids_are_written_alike_as_the_job_says(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"id": [" ANNA", "Straße", "\u2160"], "x": [1, 2, 3]}), tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"id": ["anna", "STRASSE", "i"], "x": [1, 2, 3]}), tmp_path / "b.parquet")
    steps = {"normalise": ["strip", "nfkc", "casefold"]}
    one, other = (read({"path": tmp_path / n, "id": "id"}, **steps) for n in ("a.parquet", "b.parquet"))
    assert one.digest == other.digest
    assert values(one) == values(other) == [[1], [3], [2]]
    pa.parquet.write_table(pa.table({"id": ["Anna", "anna"], "x": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="1 of 2 rows repeat the id of another row"):
        read({"path": tmp_path / "a.parquet", "id": "id"}, **steps)


def test_repeated_ids_are_refused_with_row_numbers_or_the_first_is_taken(tmp_path: Path) -> None:
    ids = np.array([5, 7, 5, 6, 7, 5])
    pa.parquet.write_table(pa.table({"id": ids, "x": [1, 2, 3, 4, 5, 6]}), tmp_path / "a.parquet")
    with pytest.raises(JobError) as raised:
        read({"path": tmp_path / "a.parquet", "id": "id"})
    assert "3 of 6 rows repeat the id of another row" in str(raised.value)
    assert "rows 3, 5, 6 of the table" in str(raised.value)
    table = read({"path": tmp_path / "a.parquet", "id": "id", "duplicates": "first"})
    assert values(table) == [[1], [4], [2]]
    assert table.notes == ("3 of 6 rows repeat the id of another row; the first row of each id is used",)
