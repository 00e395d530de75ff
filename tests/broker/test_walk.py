"""The walk of an activation, as docs/architecture.md shows it, is the one that a real step takes."""

import re
from pathlib import Path

import pytest

from tests.support.walk import traced

TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
LEGS = re.split(r"\n\| file \|.*\n\| --- \|.*\n", TEXT.partition("## The walk of an activation")[2])[1:]
OUT, ARRIVES, FUSED = ([*re.findall(r"(?m)^\| `(.*?)` \|", leg.partition("\n\n")[0])] for leg in LEGS)
MEMORY = {"transport/rabbitmq/link.py": "transport/memory.py", "transport/rabbitmq/consuming.py": "transport/memory.py"}


@pytest.mark.parametrize("over", ["memory", "rabbitmq"])
def test_the_walk_is_the_one_that_a_real_step_takes(over: str, broker_url: str) -> None:
    walk = traced("memory://" if over == "memory" else broker_url)
    there = MEMORY if over == "memory" else {}
    assert sorted(walk.out.files) == sorted(there.get(file, file) for file in OUT)
    assert sorted(walk.inwards) == sorted(there.get(file, file) for file in (*ARRIVES, *FUSED))


def test_the_walk_is_short() -> None:
    assert len(OUT) <= 10
    assert len(ARRIVES) <= 10
