"""Documents and docstrings name files of the repository that are there."""

import re

from tests.support.sources import ROOT

FOLDERS = "benchmarks|docs|examples|ops|sl_queue|tests|workers"
NAMED = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/(?:[\w-]+/)*[\w-]+\.(?:py|md|toml|yaml|sh|svg|png|txt|json)\b")
TEXTS = ("*.md", "docs/**/*.md", "benchmarks/*.py", "sl_queue/**/*.py", "workers/*.py", "ops/*.py")


def missing(text: str) -> list[str]:
    """Return the files named in a text that are not there."""
    return sorted({name for name in NAMED.findall(text) if not (ROOT / name).exists()})


def test_every_file_that_is_named_is_there() -> None:
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for each in TEXTS for path in ROOT.glob(each)}
    assert {path: names for path, text in texts.items() if (names := missing(text))} == {}


def test_a_file_that_is_not_there_is_found() -> None:
    named = "see `docs/README.md`, [it](tests/nowhere/test_it.py) and /etc/docs/none.md"
    assert missing(named) == ["tests/nowhere/test_it.py"]
