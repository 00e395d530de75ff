"""The walks of an activation and of a status in docs/architecture.md are those that a real run takes."""

import re
from pathlib import Path

import pytest

from tests.support.walks import walk_of_an_activation, walk_of_progress

pytestmark = pytest.mark.timeout(600)  # a profiler looks at every call

TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
LONGEST = 10
IN_MEMORY = dict.fromkeys(("transport/rabbitmq/link.py", "transport/rabbitmq/consuming.py"), "transport/memory.py")


def tables(walk: str) -> list[list[str]]:
    """Return the files in the tables below a heading."""
    section = TEXT.partition(f"\n## {walk}\n")[2].partition("\n## ")[0]
    parts = re.split(r"\n\| file \|.*\n\| --- \|.*\n", section)[1:]
    return [re.findall(r"(?m)^\| `(.*?)` \|", part.partition("\n\n")[0]) for part in parts]


OUT, IN = tables("The walk of an activation")
WORKER, SCHEDULER, TERMINAL = tables("The walk of a status")


def test_an_activation_takes_the_way_that_is_written_down(broker_url: str) -> None:
    legs = walk_of_an_activation(broker_url).legs
    assert legs["out"] == set(OUT)
    assert legs["arrives"] | legs["fused"] == set(IN)


def test_over_memory_it_takes_the_same_way() -> None:
    legs = walk_of_an_activation("memory://").legs
    assert legs["out"] == {IN_MEMORY.get(file, file) for file in OUT}
    assert legs["arrives"] | legs["fused"] == {IN_MEMORY.get(file, file) for file in IN}


def test_a_status_takes_the_way_that_is_written_down(broker_url: str) -> None:
    legs = walk_of_progress(broker_url).legs
    assert legs["made"] | legs["out"] == set(WORKER)
    assert legs["taken"] | legs["decided"] == set(SCHEDULER)
    assert legs["heard"] | legs["shown"] == set(TERMINAL)


@pytest.mark.parametrize("walk", [OUT, IN, WORKER, SCHEDULER, TERMINAL], ids=lambda walk: walk[-1])
def test_no_walk_is_long(walk: list[str]) -> None:
    assert 0 < len(walk) == len(set(walk)) <= LONGEST
