"""Text for people: what peers wrote, made harmless, and what a mistyped name was probably meant to be.

A peer's text is data: what another party wrote reaches a log, a status or a terminal as one line of characters.

`printable` is applied where such a text enters, so that whoever shows it need not think of it again.
"""

import difflib
from collections.abc import Iterable

LONGEST = 500  # characters of a reason
LONGEST_NAME = 80  # of a metric, a run, a value of a job


def printable(text: str, limit: int = LONGEST) -> str:
    """Return one line of at most `limit` characters: what moves a cursor, turns text around or is invisible is escaped.

    Escaped is whatever Unicode calls a control, a format (bidirectional marks too), a separator other than the space,
    a surrogate, private or unassigned.
    """
    return shortened("".join(each if each.isprintable() else _escaped(each) for each in text[: limit + 1]), limit)


def shortened(text: str, limit: int = LONGEST) -> str:
    """Return at most `limit` characters: a library may list every backend that it has."""
    return text if len(text) <= limit else f"{text[: max(0, limit - 3)]}..."


def counted(number: int, one: str, many: str) -> str:
    """Return "1 row has" or "2 rows have": a number, with what is said of so many."""
    return f"{number} {one if number == 1 else many}"


def size(n_bytes: float) -> str:
    """Return a number of bytes for people: "3.4 KiB", "16 MiB"."""
    number, unit = (n_bytes / 1024, "KiB") if n_bytes < 1024 * 1024 else (n_bytes / (1024 * 1024), "MiB")
    return f"{number:.1f} {unit}" if number < 100 else f"{number:.0f} {unit}"


def _escaped(character: str) -> str:
    return "\\n" if character == "\n" else character.encode("unicode_escape").decode("ascii")


def nearest(key: str, known: Iterable[str]) -> str:
    """Return `did you mean 'epochs'? `, or nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""
