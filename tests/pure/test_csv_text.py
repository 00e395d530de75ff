"""Tables in any encoding of text, with or without compression; damage has another message than a wrong encoding."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.csv_file import CsvFile
from sl_queue.config.job import PartyFile
from sl_queue.data import csv_text
from sl_queue.data.spec import CsvSpec
from sl_queue.errors import JobError
from tests.pure.test_csv_faults import JOB
from tests.support.tables import read_table

ROWS = "".join(f"{number},{number * 7919 % 1000},北{number}\r\n" for number in range(3000))
TEXT = "id,量,city\r\n" + ROWS


def party(path: Path, **said: str) -> PartyFile:
    return PartyFile(party="bank", data={"path": path, "id": "id", "csv": said, "exclude": ["city"]})


def complaint(path: Path, **said: str) -> str:
    with pytest.raises(JobError) as raised:
        read_table(JOB, party(path, **said))
    return str(raised.value)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk", "gb18030", "big5", "euc_jp", "iso2022_jp_2"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_is_read_whatever_its_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, packed: bool
) -> None:
    monkeypatch.setattr(csv_text, "_BLOCK", 1001)  # so that blocks end anywhere
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    path.write_bytes(gzip.compress(TEXT.encode(encoding)) if packed else TEXT.encode(encoding))
    table = read_table(JOB, party(path, encoding=encoding))
    assert table.columns == ("量",) and table.features is not None
    assert table.features[:, 0].tolist() == [number * 7919 % 1000 for number in range(3000)]
    with csv_text.plain(path, CsvSpec(encoding=encoding)) as plain:
        assert plain.read_bytes().decode("utf-8-sig") == TEXT


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tag:value"])
def test_another_encoding_than_the_one_that_is_said_is_told(tmp_path: Path, packed: bool, kind: str) -> None:
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    path.write_bytes(gzip.compress(TEXT.encode("gbk")) if packed else TEXT.encode("gbk"))
    with pytest.raises(JobError) as raised:
        read_table(JOB, PartyFile(party="bank", data={"path": path, "id": "id", "format": kind}))
    assert "cannot be read (not all of it is utf-8; say what it is, data.csv.encoding" in str(raised.value)
    path.write_bytes(gzip.compress(TEXT.encode("utf-16")[:-1]) if packed else TEXT.encode("utf-16")[:-1])
    assert "not all of it is utf-16" in complaint(path, encoding="utf-16")


def test_damage_anywhere_in_a_gzip_file_is_one_message(tmp_path: Path) -> None:
    whole, path, kinds = gzip.compress(TEXT.encode()), tmp_path / "rows.csv.gz", set()
    places = range(20, len(whole), len(whole) // 25)
    flipped = (whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :] for place in places)
    broken = [whole[: len(whole) // 2], TEXT.encode(), *flipped]
    for content in broken:
        path.write_bytes(content)
        try:
            gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            kinds.add(type(error))
            said = complaint(path)
            assert "cannot be unpacked; it is no gzip file, or damaged: write or copy it again" in said
    assert kinds == {gzip.BadGzipFile, EOFError, zlib.error}


@pytest.mark.parametrize("encoding", ["base64", "rot13", "hex", "zlib", "uft-8"])
def test_what_is_no_encoding_of_text_is_refused_by_name(encoding: str) -> None:
    with pytest.raises(JobError, match=f"the encoding '{encoding}', which Python does not know, or which writes no"):
        CsvFile(encoding=encoding)


def test_a_delimiter_that_is_no_single_byte_is_refused_where_it_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert "has the csv.delimiter '¦', which is no character of ASCII" in complaint(path, delimiter="¦")
    path.write_text("1¦a:2\n2¦a:3\n", encoding="utf-8")
    data = {"path": path, "id": "id", "format": "tag:value", "csv": {"delimiter": "¦"}}
    table = read_table(JOB, PartyFile(party="bank", data=data))
    assert table.features is not None and table.features[:, 0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("header", ["id,x", "\ufeffid,x", '\n"id","x"', "id,x\n", "id,x\n\n"])
def test_a_header_alone_has_no_rows_whether_or_not_its_line_ends(tmp_path: Path, header: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(header, encoding="utf-8")
    with pytest.raises(JobError) as raised:
        read_table(JOB, PartyFile(party="bank", data={"path": path, "id": "id"}))
    assert str(raised.value) == f"party 'bank', {path}: there are no rows"


@pytest.mark.parametrize("features", [None, {"x": {"kind": "number"}}, {"x": {"kind": "date", "parts": ["day"]}}])
@pytest.mark.parametrize("rows", [1, 300_000])
def test_a_number_with_a_sign_in_another_encoding_is_told_as_that(tmp_path: Path, features: Any, rows: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"id,x,name\n" + b"".join(b"%d,5,\xfc\n" % place for place in range(rows)) + b"a,3\xa0,b\n")
    data = {"path": path, "id": "id", "features": ["x"]}
    with pytest.raises(JobError, match="not all of it is utf-8; say what it is"):
        read_table(JOB, PartyFile(party="bank", data=data, features=features))
    path.write_bytes(path.read_bytes().replace(b"\xa0", b""))
    if features is None:
        assert read_table(JOB, PartyFile(party="bank", data=data)).n_rows == rows + 1
