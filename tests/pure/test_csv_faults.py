"""A CSV file is read row by row as it was meant, or refused with all that is wrong and always the same exit code."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.config.job import Job, PartyFile
from sl_queue.data import csv_file
from sl_queue.errors import JobError
from sl_queue.protocol.table import Table
from tests.support.tables import read_table

JOB = Job(
    name="t",
    seed=1,
    epochs=1,
    batch_size=2,
    parties={"bank": {"role": "feature", "cut": [1]}, "insurer": {"role": "label", "cut": [1]}},
)


def table(folder: Path, text: str | bytes, party: str = "bank", **more: Any) -> Table:
    (folder / "rows.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(JOB, PartyFile(party=party, data={"path": folder / "rows.csv", "id": "id", **more}))


def complaint(folder: Path, text: str | bytes, party: str = "bank", **more: Any) -> str:
    with pytest.raises(JobError) as raised:
        table(folder, text, party, **more)
    return str(raised.value)


# Rows of another length -----------------------------------------------------------------------------------------

RAGGED = "id,x\n1,2\n2,3,4\n" + "".join(f"{i},1\n" for i in range(3, 2000)) + "9\n"


def test_rows_of_another_length_are_counted_and_the_first_one_is_told(tmp_path: Path) -> None:
    said = complaint(tmp_path, RAGGED)
    assert "2 rows have more or fewer fields than the header, the first of them is row 3 of the file" in said


def test_no_callback_of_ours_is_given_to_a_pool_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    read_csv, open_csv = pa.csv.read_csv, pa.csv.open_csv

    def spied(path: Path, reading: Any, parsing: Any, converting: Any) -> Any:
        calls.append((reading.use_threads, parsing.invalid_row_handler is not None))
        return read_csv(path, reading, parsing, converting)

    def opened(path: Path, **options: Any) -> Any:
        calls.append((options["read_options"].use_threads, options["parse_options"].invalid_row_handler is not None))
        return open_csv(path, **options)

    monkeypatch.setattr(pa.csv, "read_csv", spied)
    monkeypatch.setattr(pa.csv, "open_csv", opened)
    complaint(tmp_path, RAGGED)
    assert calls == [(True, False), (True, False), (False, True)]
    calls.clear()
    table(tmp_path, "id,x\n1,2\n")
    assert calls == [(True, False)]


# Quotes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('id,x,note\n1,2,"open\n2,3,a\n3,4,b\n', 2, "never closes"),
        ('id,x,note\n1,2,ok\n2,3,"open\n3,4,"closed"\n', 3, "in the middle of a value"),
        ('id,x,note\n1,2,a\n"2,3,b\n3,4,c\n', 3, "never closes"),
        ('id,x,note\n1,2,"a ""word"\n2,3,"b ""\n3,4,c\n', 3, "never closes"),
        ('id,x,note\n"1","2","a\n"2","3","b"\n', 2, "in the middle of a value"),
        ('\ufeff"id,x\n1,2\n', 1, "never closes"),
        ('id,x,note\n1,2,5" pipe\n2,3,"open\n', 3, "never closes"),
        ('id,x,note\r\n1,2,"open\r\n2,3,a\r\n', 2, "never closes"),
        ('id,x,note\n1,2,"' + "a\n" * 200_000, 2, "never closes"),
    ],
)
def test_a_quote_that_swallows_rows_is_told_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    said = complaint(tmp_path, text)
    assert f"line {line}: a quote" in said and words in said and "close the quote" in said
    assert "1,2" not in said


@pytest.mark.parametrize(
    "note",
    ['"a\nb"', '"a, b"', '"a ""quoted"" word"', '""', '""""', '5" pipe', 'a""b', '"a"b', 'say "it"', "", "'", '"\n"'],
)
def test_quotes_that_swallow_nothing_are_read(tmp_path: Path, note: str) -> None:
    for ending in ("\n", "\r\n", ""):
        text = f"id,note,x\n1,{note},2\n2,{note},3\n3,b,4{ending}"
        read = table(tmp_path, text, features=["x"])
        assert read.features is not None
        assert read.features[:, 0].tolist() == [2, 3, 4]


@given(st.lists(st.text(st.sampled_from('a",\n\r'), max_size=6), min_size=1, max_size=8), st.integers(1, 40))
def test_whatever_a_csv_writer_writes_has_no_fault(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], block: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    pa.csv.write_csv(pa.table({"note": values, "x": list(range(len(values)))}), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_file, "_SCANNED_BYTES", block)  # so that quotes stand at the edges of blocks
        assert csv_file.quote_fault(path) is None


# Columns without a name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " ", "\t", "Unnamed: 0", "Unnamed: 0.1", "__index_level_0__"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_column_without_a_name_is_left_out_and_said_so(tmp_path: Path, name: str, position: int) -> None:
    header, row = ["id", "x"], ["{}", "0.5"]
    header.insert(position, name)
    row.insert(position, "17")
    text = ",".join(header) + "\n" + "".join(",".join(row).format(i) + "\n" for i in range(3))
    read = table(tmp_path, text)
    assert read.features is not None
    assert read.features.tolist() == [[0.5]] * 3
    (note,) = read.notes
    assert f"left out {name!r} (column {position + 1})" in note and "row numbers" in note
    named = table(tmp_path, text, features=[name, "x"])
    assert named.features is not None
    assert named.features.tolist() == [[17, 0.5]] * 3
    assert named.notes == ()


def test_several_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    read = table(tmp_path, "\ufeff,id,,x,\n0,1,7,.5,\n1,2,8,1.5,\n")
    assert read.features is not None
    assert read.features.tolist() == [[0.5], [1.5]]
    assert "(column 1)" in read.notes[0] and "(column 3)" in read.notes[0] and "(column 5)" in read.notes[0]


def test_a_parquet_files_row_numbers_are_left_out_and_said_so(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"id": [1], "x": [0.5], "__index_level_0__": [9]}), tmp_path / "rows.parquet")
    read = read_table(JOB, PartyFile(party="bank", data={"path": tmp_path / "rows.parquet", "id": "id"}))
    assert read.features is not None
    assert read.features.tolist() == [[0.5]]
    assert "'__index_level_0__' (column 3)" in read.notes[0]


@pytest.mark.parametrize("first", [0, 1])
def test_a_column_that_only_counts_the_rows_is_noted(tmp_path: Path, first: int) -> None:
    text = "id,index,x\n" + "".join(f"{i * 7},{i + first},{i % 3}\n" for i in range(20))
    (note,) = table(tmp_path, text).notes
    assert "column 'index' counts the rows" in note


# All faults at once ---------------------------------------------------------------------------------------------


def test_all_faults_of_a_table_are_told_at_once(tmp_path: Path) -> None:
    text = (
        'id,age,city,rate,income,y\n1,5,Oslo,"0,5",inf,no\n,6,Bern,"1,5",2.5,yes\n7,,Rome,"2,5",3.5,no\n'
        '7,1,Rome,"1.002,5",nan,no\n1,2\n'
    )
    features = ["age", "city", "rate", "income", "wealth"]
    said = complaint(tmp_path, text, "insurer", label="y", features=features)
    for fault in (
        "7 things are wrong",
        "there is no column 'wealth'",
        "1 row has more or fewer fields",
        "'city' (text), 'rate' (text: numbers with a decimal comma; write a decimal point, or say data.csv.decimal",
        "values are missing in column 'age' in 1 of 4 rows, 'income' in 1 of 4 rows",
        "label column 'y' holds text",
        "1 of 4 rows have no id",
        "1 of 4 rows repeat the id",
    ):
        assert fault in said, fault
    for value in ("Oslo", "0,5", "31337"):
        assert value not in said
    assert "'age' in 1 row" in complaint(tmp_path, "id,age,y\n1,inf,2\n1,2,\n", "insurer", label="y")


def test_another_separator_is_the_one_thing_that_is_wrong(tmp_path: Path) -> None:
    said = complaint(tmp_path, "id;x;y\n1;0,5;1\n2;1,5;0\n", "insurer", label="y")
    assert "there is no column 'id'; its columns are 'id;x;y'; is it separated by semicolons?" in said
    assert "\n" not in said and "fields" not in said and "'y'" not in said


def test_a_gap_in_labels_has_a_remedy_of_its_own(tmp_path: Path) -> None:
    said = complaint(tmp_path, "id,x,y\n1,,1\n2,1.5,\n", "insurer", label="y")
    assert "values are missing in column 'x' in 1 of 2 rows" in said
    assert "values are missing in label column 'y' in 1 of 2 rows; " in said
    assert '[fuse] missing_labels = "mask"' in said


def test_a_column_with_a_few_values_that_are_not_numbers_is_told_from_text(tmp_path: Path) -> None:
    said = complaint(tmp_path, "id,x,note\n1,0.5,a\n2,?,b\n3,1e-3,c\n")
    assert "'x' (text: 1 of 3 values are not numbers), 'note' (text)" in said


def test_rows_that_are_all_of_another_length_are_counted_and_none_is_called_missing(tmp_path: Path) -> None:
    said = complaint(tmp_path, "id,x\n1,0.5,\n2,1.5,\n")
    assert "2 rows have more or fewer fields than the header" in said


@pytest.mark.parametrize("text", ["id,größe\n1,2\n", "id,x\ngröße,2\n"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_file_in_another_encoding_is_told_from_one_that_is_no_table(tmp_path: Path, text: str, encoding: str) -> None:
    said = complaint(tmp_path, text.encode(encoding))
    assert "cannot be read (not all of it is utf-8; say what it is, data.csv.encoding" in said


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_another_separator_is_recognised(tmp_path: Path, separator: str, name: str) -> None:
    said = complaint(tmp_path, f"id{separator}x\n1{separator}0,5\n")
    assert "there is no column 'id'" in said and f"separated by {name}" in said


@pytest.mark.parametrize("text", ["31337,0.5\n31338,1.5\n", '"id,x\n31337,0.5\n"\n', "31337,Ada\n31338,Bo\n"])
def test_a_file_without_a_header_is_explained_without_a_number_of_its_rows(tmp_path: Path, text: str) -> None:
    said = complaint(tmp_path, text)
    assert "there is no column 'id'" in said
    assert "31337" not in said and "0.5" not in said
    assert "is its first line a header?" in said or "'id,x'" in said


def test_names_that_occur_twice_are_all_told(tmp_path: Path) -> None:
    said = complaint(tmp_path, "id,x,x,z,z\n1,2,3,4,5\n")
    assert "2 columns are called 'x'" in said and "2 columns are called 'z'" in said


# Thousands in groups --------------------------------------------------------------------------------------------

GROUPED = {"csv": {"delimiter": ";", "decimal": ",", "thousands": "."}}


@pytest.mark.parametrize("gap", ["", "NA", "nan"])
def test_a_gap_among_grouped_numbers_is_a_gap(tmp_path: Path, gap: str) -> None:
    (tmp_path / "rows.csv").write_text(f"id;x\n1;1.234,5\n2;{gap}\n3;7\n")
    features = {"x": {"kind": "number", "missing": "zero", "scale": "none"}}
    file = PartyFile(party="bank", data={"path": tmp_path / "rows.csv", "id": "id", **GROUPED}, features=features)
    read = read_table(JOB, file).features
    assert read is not None and read[:, 0].tolist() == [1234.5, 0.0, 7.0]
    assert "values are missing in column 'x' in 1 of 3 rows" in complaint(
        tmp_path, f"id;x\n1;1.234,5\n2;{gap}\n3;7\n", **GROUPED
    )


def test_grouped_whole_numbers_that_float64_rounds_are_refused(tmp_path: Path) -> None:
    codes = "".join(f"{i};{2**60 + i:,}\n".replace(",", ".") for i in range(4))
    assert "whole numbers of column 'x' in 3 rows need more than 64 bits, or more than 53" in complaint(
        tmp_path, f"id;x\n{codes}", **GROUPED
    )
    exact = table(tmp_path, "id;x\n1;9.007.199.254.740.992\n2;1.152.921.504.606.846.976\n", **GROUPED).features
    assert exact is not None and exact[:, 0].tolist() == [2.0**53, 2.0**60]
