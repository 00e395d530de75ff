"""Names of columns that a file was expected to have, and what its header has instead."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from sl_queue.data.faults import listed
from sl_queue.protocol.text import nearest

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def about_names(selected: Sequence[str], known: list[str]) -> Iterator[str]:
    """Yield what is wrong with columns that are wanted by name: not there, or there twice."""
    counts = Counter(known)
    for name in selected:
        if counts[name] > 1:
            yield f"{counts[name]} columns are called {name!r}; rename them"
        elif counts[name] == 0:
            there = f"its columns are {_told(known)}{another_separator(known)}"
            yield f"there is no column {name!r}; {nearest(name, known)}{there}"


def about_trained(trained: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a table that lacks columns that a model was trained on."""
    missing = (name for name in trained if name not in known)
    yield from (f"the model was trained with the column {name!r}, which is not there" for name in missing)


def _told(known: list[str]) -> str:
    """List the names of columns, without numbers and further lines: a file without a header has rows there."""
    names = [name.partition("\n")[0] for name in known if not _NUMBER.fullmatch(name)]
    numbers = len(known) - len(names)
    if not numbers:
        return listed(map(repr, names)) or "none"
    told = [*map(repr, names), f"{numbers} whose names are numbers"]
    return f"{listed(told)}; is its first line a header?"


def another_separator(known: list[str]) -> str:
    """Return advice on a header that was written with another separator, empty for any other."""
    found = [told for sign, told in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")) if sign in "".join(known[:1])]
    return (
        f"; is it separated by {found[0]}? write it with commas, or say data.csv.delimiter"
        if found and len(known) == 1
        else ""
    )
