"""Dates that are text: the day that is written there, or a refusal, whatever machine reads them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sl_queue.config.features import FeatureFile
from sl_queue.config.job import PartyFile
from sl_queue.data.feature_values import Unusable, days
from sl_queue.errors import JobError
from tests.pure.test_csv_faults import JOB
from tests.support.tables import read_table


def read(pattern: str | None, *values: Any) -> list[str]:
    return [day.isoformat() for day in days(pa.array(values), pattern).to_pylist()]


# Patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "wrong", "right"),
    [
        ("%F", "2026-02-30", "2026-02-28"),
        ("%Y-%m-%d %T", "2026-02-30 10:00:00", "2026-02-28 10:00:00"),
        ("%d.%m.%Y %R", "30.02.2026 10:00", "28.02.2026 10:00"),
        ("%e.%m.%Y", "30.2.2026", "28.2.2026"),
        ("%-d.%-m.%Y", "30.2.2026", "28.2.2026"),
        ("%d.%m.%Y", "30. 2.2026", "28. 2.2026"),
        ("%D", "02/30/26", "02/28/26"),
        ("%C%y%m%d", "20260230", "20260228"),
        ("%Y-%m-%dT%H:%M%z", "2026-02-29T00:30+02:00", "2026-03-01T00:30+02:00"),
        ("%Y-%m-%dT%H:%M%z", "2026-02-31T23:30-05:00", "2026-02-27T23:30-05:00"),
    ],
)
def test_a_day_that_no_month_has_is_refused_however_the_pattern_is_abbreviated(
    pattern: str, wrong: str, right: str
) -> None:
    assert read(pattern, right) == ["2026-02-28"]
    with pytest.raises(Unusable, match=r"1 of 2 values are not dates of the form .*; no month has such a day"):
        read(pattern, right, wrong)


@pytest.mark.parametrize(
    ("pattern", "wrong", "right"),
    [
        ("%Y.%j", "2026.366", {"2024.366": "2024-12-31", "2026.365": "2026-12-31", "2026.033": "2026-02-02"}),
        ("%y%j %H:%M", "26366 10:00", {"24366 10:00": "2024-12-31", "26001 10:00": "2026-01-01"}),
        ("%Y-%U-%w", "2026-53-1", {"2026-18-6": "2026-05-09", "2026-52-4": "2026-12-31", "2028-53-0": "2028-12-31"}),
        ("%Y %W %u", "2026 53 1", {"2026 18 6": "2026-05-09", "2028 00 6": "2028-01-01"}),
    ],
)
def test_a_day_and_a_week_that_the_year_does_not_have_are_refused(
    pattern: str, wrong: str, right: dict[str, str]
) -> None:
    assert read(pattern, *right) == list(right.values())
    with pytest.raises(Unusable, match="1 of 2 values are not dates"):
        read(pattern, next(iter(right)), wrong)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("%d %B %Y", "reads names of days or months, or AM and PM, which differ from machine to machine"),
        ("%Y-%m-%d %I:%M %p", "which differ from machine to machine"),
        ("%Od.%m.%Y", "holds %Od, which says no day"),
        ("%G-W%V", "holds %G, %V, which says no day, or not the same on every machine; it may hold %Y %m %d"),
        ("%Y-W%W", "holds %W without %w"),
        ("%s", "holds %s"),
        ("%d.%m.%Y %H:%M %Z", "written as it stands, like UTC"),
        ("%Y-%m-%d%", "holds %, which"),
        ("%Y-%m-%d %H:%M:%S.%f", "holds %f, which"),
    ],
)
def test_a_pattern_that_says_no_day_is_refused_where_it_is_declared(pattern: str, told: str) -> None:
    with pytest.raises(JobError) as raised:
        FeatureFile(kind="date", parts=["month"], format=pattern)
    assert f"has the format {pattern!r}, which" in str(raised.value) and told in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("%d.%m.%Y", "09.05.2026"),
        ("%d/%m/%y %H:%M:%S", "09/05/26 23:59:59"),
        ("%Y%j", "2026129"),
        ("%Y-%U-%w", "2026-18-6"),
        ("%Y %W %u", "2026 18 6"),
        ("%dth of month %m in %Y, 100%%", "9th of month 5 in 2026, 100%"),
        ("%Y-%m-%dT%H:%M:%S UTC", "2026-05-09T23:00:00 UTC"),
        ("%m.%d.%Y%n%k:%M", "05.09.2026 7:30"),
    ],
)
def test_a_pattern_that_says_a_day_is_allowed_and_read(pattern: str, text: str) -> None:
    assert FeatureFile(kind="date", parts=["month"], format=pattern).format == pattern
    assert read(pattern, text) == ["2026-05-09"]


# Times with a zone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-01-01T00:30+02:00", "2025-12-31"),
        ("2026-01-01 00:30:15.123 +0200", "2025-12-31"),
        ("2026-01-01T00:30:00+02:00[Europe/Berlin]", "2025-12-31"),
        ("2025-12-31T23:30-05", "2026-01-01"),
        ("2025-12-31 23:30 UTC-05:00", "2026-01-01"),
        ("2026-01-01T00:30:00Z", "2026-01-01"),
        ("2026-01-01 00:30 UTC", "2026-01-01"),
        ("2026-01-01T00:30", "2026-01-01"),
        ("2026-01-01 12:30 PM", "2026-01-01"),
        ("2026-01-01+02:00", "2026-01-01"),
    ],
)
def test_a_time_with_an_offset_counts_as_its_day_in_utc_whatever_other_rows_have(text: str, day: str) -> None:
    assert read(None, text) == [day]
    assert read(None, "2026-01-05T00:30", text, "2026-01-06", text) == ["2026-01-05", day, "2026-01-06", day]


@pytest.mark.parametrize("text", ["2026-01-01T00:30 CET", "2026-01-01T00:30[Europe/Berlin]", "2026-01-01 00:30 GMT+2"])
def test_a_zone_that_is_no_offset_is_refused(text: str) -> None:
    with pytest.raises(Unusable, match=r"1 of 2 times have a zone that is no offset like \+02:00"):
        read(None, "2026-01-01", text)


@pytest.mark.parametrize("text", ["2026-01-311", "2026-01-1234", "2026-02-30T00:30+02:00"])
def test_text_that_only_begins_like_a_date_is_refused(text: str) -> None:
    with pytest.raises(Unusable, match="1 of 2 values are not dates like 2026-01-31"):
        read(None, "2026-01-01", text)


# Of a CSV file --------------------------------------------------------------------------------------------------

DATE = {"kind": "date", "parts": ["year", "month", "day"], "scale": "none"}


def of_csv(folder: Path, *texts: str, **said: Any) -> Any:
    rows = "".join(f"{number},{text}\n" for number, text in enumerate(texts))
    (folder / "rows.csv").write_text(f"id,day\n{rows}")
    data = {"path": folder / "rows.csv", "id": "id"}
    features = read_table(JOB, PartyFile(party="bank", data=data, features={"day": {**DATE, **said}})).features
    assert features is not None
    return features.tolist()


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("%d%m%Y", ["01022026", "11032025"]),
        ("%m%d%Y", ["02012026", "03112025"]),
        ("%d%m%y", ["010226", "110325"]),
        ("%Y%m%d", ["20260201", "20250311"]),
        ("%Y-%d-%m", ["2026-01-02", "2025-11-03"]),
        ("%Y-%d-%m %H:%M:%S", ["2026-01-02 10:00:00", "2025-11-03 00:00:00"]),
        ("%Y.%j", ["2026.032", "2025.070"]),
    ],
)
def test_dates_of_a_csv_are_read_as_they_are_written(tmp_path: Path, pattern: str, texts: list[str]) -> None:
    assert of_csv(tmp_path, *texts, format=pattern) == [[2026, 2, 1], [2025, 3, 11]]


def test_a_row_without_a_zone_changes_no_other_row_of_a_csv(tmp_path: Path) -> None:
    zoned = ["2026-01-01T00:30+02:00", "2025-12-31T23:30-05:00"]
    assert of_csv(tmp_path, *zoned) == [[2025, 12, 31], [2026, 1, 1]]
    assert of_csv(tmp_path, *zoned, "2026-01-05T00:30") == [[2025, 12, 31], [2026, 1, 1], [2026, 1, 5]]


@pytest.mark.parametrize("gap", ["", "NA", "NaN", " "])
def test_a_gap_among_dates_is_the_gap_that_it_is_among_numbers(tmp_path: Path, gap: str) -> None:
    found = of_csv(tmp_path, "20260201", gap, "20250311", format="%Y%m%d", missing="zero")
    assert found == [[2026, 2, 1], [0, 0, 0], [2025, 3, 11]]


@pytest.mark.parametrize(("pattern", "number"), [("%d%m%Y", 1022026), ("%d%m%y", 10226), ("%m%d%Y", 2012026)])
def test_a_whole_number_has_the_zero_that_its_date_begins_with(pattern: str, number: int) -> None:
    assert read(pattern, number) == ["2026-02-01"]
    assert read(pattern, str(number)) == ["2026-02-01"]


def test_a_format_that_does_not_fit_dates_in_iso_8601_is_told_to_go() -> None:
    with pytest.raises(Unusable, match="they are written like 2026-01-31: leave format out"):
        days(pa.array(["2026-01-31", "2026-02-01"]), "%d.%m.%Y")


def test_a_format_that_fits_no_row_is_what_is_wrong() -> None:
    with pytest.raises(Unusable, match=r"2 of 3 values are not dates of the form .*; no row is, so correct the format"):
        days(pa.array([None, "09102016", "04052016"]), "%d.%m.%Y")
