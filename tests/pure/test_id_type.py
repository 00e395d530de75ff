"""Parties whose files hold the same ids in different types can say so, and the error says how."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import sl_queue
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.asked_ids import asked_ids
from sl_queue.data.ids import canonical_ids
from sl_queue.errors import JobError
from sl_queue.protocol.scheduler.agreement import differing_id_types
from sl_queue.protocol.table import Table
from tests.support.tables import read_table

JOB = Job(
    name="t",
    seed=1,
    epochs=1,
    batch_size=2,
    parties={"bank": {"role": "feature", "cut": [1]}, "insurer": {"role": "label"}},
)


def table(data: dict[str, Any]) -> Table:
    return read_table(JOB, PartyFile(party="bank", data=data))


def parquet(folder: Path, ids: Any, **more: Any) -> dict[str, Any]:
    pa.parquet.write_table(pa.table({"id": ids, "x": [0.5] * len(ids)}), folder / "rows.parquet")
    return {"path": folder / "rows.parquet", "id": "id", **more}


def csv(folder: Path, ids: list[str], **more: Any) -> dict[str, Any]:
    (folder / "rows.csv").write_text("id,x\n" + "".join(f"{i},0.5\n" for i in ids))
    return {"path": folder / "rows.csv", "id": "id", **more}


def complaint(data: dict[str, Any]) -> str:
    with pytest.raises(JobError) as raised:
        table(data)
    return str(raised.value)


def test_ids_written_as_text_and_as_digits_agree_as_text(tmp_path: Path) -> None:
    texts = table(parquet(tmp_path, ["9", "10", "-3"]))
    for same in (
        csv(tmp_path, ["10", "-3", "9"], id_type="text"),
        {"source": lambda: sl_queue.Rows([9, 10, -3], [[0.5]] * 3), "id_type": "text"},
    ):
        read = table(same)
        assert (read.digest, read.id_type) == (texts.digest, "text")
        assert read.row_keys.tolist() == texts.row_keys.tolist()
    numbers = table(parquet(tmp_path, [9, 10, -3], id_type="text"))
    assert numbers.digest == texts.digest


def test_text_with_leading_zeros_and_numbers_agree_as_integers(tmp_path: Path) -> None:
    numbers = table(parquet(tmp_path, pa.array([7, 12, 2**64 - 1], pa.uint64())))
    zeros = ["007", "012", str(2**64 - 1)]
    for same in (csv(tmp_path, zeros, id_type="integer"), parquet(tmp_path, zeros, id_type="integer")):
        read = table(same)
        assert (read.digest, read.id_type) == (numbers.digest, "integer")
    assert table(csv(tmp_path, zeros)).digest != numbers.digest


def test_without_the_key_ids_are_what_they_were(tmp_path: Path) -> None:
    assert table(csv(tmp_path, ["7", "12"])).digest == table(parquet(tmp_path, [7, 12])).digest
    assert table(csv(tmp_path, ["7", "12"], id_type="integer")).digest == table(parquet(tmp_path, [7, 12])).digest
    assert table(csv(tmp_path, ["007", "12"])).digest == table(parquet(tmp_path, ["007", "12"])).digest


def test_leading_zeros_that_make_two_ids_one_are_refused(tmp_path: Path) -> None:
    assert "1 of 3 rows repeat the id" in complaint(csv(tmp_path, ["7", "007", "8"], id_type="integer"))


def test_text_that_is_no_number_is_counted(tmp_path: Path) -> None:
    said = complaint(csv(tmp_path, ["7", "x31337", "8.5"], id_type="integer"))
    assert "2 of 3 ids are not whole numbers" in said and "31337" not in said


def test_whole_floating_ids_are_explained_and_may_be_declared_whole(tmp_path: Path) -> None:
    floating = pa.array([1.0, 2.0])
    said = complaint(parquet(tmp_path, floating))
    assert "pandas makes whole numbers floating" in said and 'data.id_type = "integer"' in said
    assert table(parquet(tmp_path, floating, id_type="integer")).digest == table(parquet(tmp_path, [1, 2])).digest
    assert "ids are of type double" in complaint(parquet(tmp_path, floating, id_type="text"))
    assert "ids are of type double" in complaint(parquet(tmp_path, pa.array([1.0, 2.5]), id_type="integer"))
    missing = complaint(parquet(tmp_path, pa.array([1.0, float("nan"), None])))
    assert "2 of 3 rows have no id" in missing and "pandas makes" in missing


def test_digits_with_a_point_are_noted_and_may_be_declared_whole(tmp_path: Path) -> None:
    (note,) = table(csv(tmp_path, ["1.0", "2.0"])).notes
    assert "text like 7.0" in note and 'data.id_type = "integer"' in note
    numbers = table(parquet(tmp_path, [1, 2]))
    assert table(csv(tmp_path, ["1.0", "02"], id_type="integer")).digest == numbers.digest


def test_decimal_and_binary_ids_of_databases_are_read(tmp_path: Path) -> None:
    decimals = pa.array([7, 2**64 - 1], pa.uint64()).cast(pa.decimal128(20, 0))
    assert (
        table(parquet(tmp_path, decimals)).digest
        == table(parquet(tmp_path, pa.array([7, 2**64 - 1], pa.uint64()))).digest
    )
    binary = pa.array([b"a", b"b"])
    assert table(parquet(tmp_path, binary, id_type="text")).digest == table(parquet(tmp_path, ["a", "b"])).digest
    assert 'data.id_type = "text"' in complaint(parquet(tmp_path, binary))


def test_a_wrong_id_type_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(JobError, match='"text", "integer" or "uuid"'):
        PartyFile(party="bank", data={"path": "a.csv", "id": "id", "id_type": "int"})


def test_a_difference_of_types_says_which_file_to_change_and_how() -> None:
    said = differing_id_types({"bank": "text", "insurer": "integer", "court": "integer"})
    assert "write id_type = \"text\" under [data] in the party file of 'insurer' and 'court'" in said


NORMALISE = st.lists(st.sampled_from(("strip", "nfkc", "casefold")), unique=True)
ASKED = st.text(max_size=6) | st.uuids().map(str) | st.uuids().map(lambda u: f"{{{str(u).upper()}}}")


@given(ASKED.filter(bool), NORMALISE, st.sampled_from((None, "text", "uuid")))
def test_an_id_that_is_asked_for_is_written_as_that_of_a_table(text: str, normalise: list[str], declared: Any) -> None:
    ids, _ = canonical_ids(pa.array([text]), are_csv=False, id_type=declared, normalise=normalise)
    assume(ids is not None)
    assert ids is not None and asked_ids([text], normalise, declared) == ids.texts.to_pylist()
