"""docs/reference.md says all that can be set and read, in the words of where it is declared."""

import re
from pathlib import Path

import pytest

from sl_queue.cli.reference import halves, keys, reference, tables
from sl_queue.config.environment import VARIABLES
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.schema import Schema

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "reference.md"


def test_the_reference_is_what_is_declared() -> None:
    hint = "run: python -m sl_queue.cli.reference > docs/reference.md"
    assert FILE.read_text() == reference(), hint


@pytest.mark.parametrize("model", [Job, PartyFile])
def test_every_key_says_what_it_must_be_and_its_meaning(model: type[Schema]) -> None:
    found = [(title, key, *halves(field)) for title, table in tables(model) for key, field in keys(table)]
    assert len(found) > 15
    assert [f"[{title}] {key}" for title, key, must_be, meaning in found if not must_be or not meaning] == []
    assert [title for title, table in tables(model) if not table.__doc__] == []


def test_every_variable_exit_code_and_metric_is_there() -> None:
    text = FILE.read_text()
    assert [variable.name for variable in VARIABLES if f"| `{variable.name}` |" not in text] == []
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)} == {0, 2, 3, 4, 5, 6, 70, 74, 75, 130}
    source = (ROOT / "sl_queue" / "observe" / "prometheus.py").read_text()
    declared = set(re.findall(r'"(sl_queue_\w+)"', source))
    named = {name.removesuffix("_total").removesuffix("_info") for name in re.findall(r"`(sl_queue_\w+)` \|", text)}
    assert len(declared) > 15
    assert named == declared


def test_a_key_of_a_table_by_name_is_found() -> None:
    assert {title for title, _ in tables(Job)} >= {"", "parties.NAME", "pipeline", "security.keys.NAME"}
