"""Findings of `sl-queue check`, and how numbers in them read."""

import pytest

from sl_queue.checking.findings import Check, Finding
from sl_queue.errors import JobError
from sl_queue.protocol.text import counted, size


def test_an_error_that_is_met_twice_is_said_once_and_still_counts() -> None:
    said: list[Finding] = []
    check = Check(said.append)
    for text in ("no such column", "no such model", "no such column"):
        check.error(JobError(text))
    assert [finding.text for finding in said] == ["no such column", "no such model"]
    assert check.exit_code == JobError.exit_code


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [(0, "0.0 KiB"), (5120, "5.0 KiB"), (2**20 - 1, "1024 KiB"), (2**20, "1.0 MiB"), (37 * 2**20, "37.0 MiB")],
)
def test_a_size_is_never_nothing_for_want_of_digits(n_bytes: int, said: str) -> None:
    assert size(n_bytes) == said


def test_one_row_has_and_two_rows_have() -> None:
    assert [counted(number, "row has", "rows have") for number in (0, 1, 2)] == [
        "0 rows have",
        "1 row has",
        "2 rows have",
    ]
