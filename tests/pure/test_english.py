"""English of docstrings: a function's opens with a verb (ruff's D401), nothing with a headless question word."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("sl_queue", "workers", "benchmarks", "tests", "ops")
WITH_MESSAGES = ("sl_queue", "workers", "benchmarks")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
HEADLESS = re.compile(r"(what|whether|who|whose|how|which|where|when|why)\b", re.IGNORECASE)
FOREIGN = re.compile(
    r"\b(?:anew|mend(?:s|ed|ing)?|(?:is|are|was|were|been|be) told(?! apart)"
    r"|(?:that|rows|labels|numbers) (?:is|are) none|since [\d.]+ s)\b",
    re.IGNORECASE,
)


def faults(module: ast.Module) -> Iterator[str]:
    """Yield what is wrong with the docstrings of a module, each with its line."""
    for node in ast.walk(module):
        docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if docstring and (found := HEADLESS.match(docstring) or FOREIGN.search(docstring)):
            yield f"{node.body[0].lineno}: {found.group()!r} in {docstring.splitlines()[0]!r}"


def strings(module: ast.Module) -> Iterator[str]:
    """Yield what is wrong with the other strings of a module: messages to users among them."""
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (found := FOREIGN.search(node.value)):
            yield f"{node.lineno}: {found.group()!r} in {node.value[:60]!r}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_messages_are_written_as_an_engineer_speaks(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = ast.parse(path.read_text())
        found = [*faults(module), *(strings(module) if folder in WITH_MESSAGES else ())]
        wrong += [f"{path}:{fault}" for fault in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "docstring",
    [
        "What is sent.",
        "Whether it is.",
        "Train anew.",
        "Report as it was told.",
        "Find a number that is none.",
        "Wait, since 61 s.",
    ],
)
def test_what_an_engineer_would_not_say_is_found(docstring: str) -> None:
    assert list(faults(ast.parse(f'def f():\n    """{docstring}"""\n')))
    assert not list(faults(ast.parse('def f():\n    """Wait for 61 s."""\n')))
