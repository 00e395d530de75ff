"""English of docstrings: a function's opens with a verb (ruff's D401), nothing with a headless question word."""

import re
from collections.abc import Iterator

import pytest

from tests.support.sources import Source, modules, parsed, source_of

FOLDERS = ("sl_queue", "workers", "benchmarks", "tests", "ops")
WITH_MESSAGES = ("sl_queue", "workers", "benchmarks")
HEADLESS = re.compile(r"(what|whether|who|whose|how|which|where|when|why)\b", re.IGNORECASE)
FOREIGN = re.compile(
    r"\b(?:anew|mend(?:s|ed|ing)?|(?:is|are|was|were|been|be) told(?! apart)"
    r"|(?:that|rows|labels|numbers) (?:is|are) none|since [\d.]+ s)\b",
    re.IGNORECASE,
)


def faults(source: Source) -> Iterator[str]:
    """Yield what is wrong with the docstrings of a module, each with its line."""
    for line, docstring in source.docstrings:
        if found := HEADLESS.match(docstring) or FOREIGN.search(docstring):
            yield f"{line}: {found.group()!r} in {docstring.splitlines()[0]!r}"


def strings(source: Source) -> Iterator[str]:
    """Yield what is wrong with the other strings of a module: messages to users among them."""
    for line, text in source.strings:
        if found := FOREIGN.search(text):
            yield f"{line}: {found.group()!r} in {text[:60]!r}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_messages_are_written_as_an_engineer_speaks(folder: str) -> None:
    wrong = []
    for path in modules(folder):
        source = source_of(path)
        found = [*faults(source), *(strings(source) if folder in WITH_MESSAGES else ())]
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
    assert list(faults(parsed(f'def f():\n    """{docstring}"""\n')))
    assert not list(faults(parsed('def f():\n    """Wait for 61 s."""\n')))
