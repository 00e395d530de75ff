"""Sizes: a file or a function that has become too long hides a thing that has no name yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sources import ROOT, modules, source_of

PRODUCT = ("sl_queue", "workers", "benchmarks", "ops")
LONGEST_FILE, LONGEST_TEST, LONGEST_FUNCTION = 300, 500, 40


def too_long(path: Path, lines: int) -> Iterator[str]:
    """Say what is too long in a module."""
    source, name = source_of(path), path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    if source.lines > lines:
        yield f"{name} has {source.lines} lines"
    for function, count in source.functions:
        if count > LONGEST_FUNCTION:
            yield f"{name}: {function} has {count} lines"


def test_no_file_and_no_function_of_the_product_is_too_long() -> None:
    assert [told for path in modules(*PRODUCT) for told in too_long(path, LONGEST_FILE)] == []


def test_no_file_and_no_function_of_the_tests_is_too_long() -> None:
    assert [told for path in modules("tests") for told in too_long(path, LONGEST_TEST)] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n" * 300, []),
        ("x = 1\n" * 301, ["m.py has 301 lines"]),
        ("class A:\n    def f(self):\n" + "        pass\n" * 39, []),
        ("class A:\n    async def f(self):\n" + "        pass\n" * 40, ["m.py: f has 41 lines"]),
    ],
)
def test_what_is_too_long_is_named(text: str, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(text)
    assert list(too_long(tmp_path / "m.py", LONGEST_FILE)) == told
