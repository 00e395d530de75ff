"""One error for all that is wrong with a table, a line for each fault; never a row, an id or a value."""

from collections.abc import Iterable, Sequence

from sl_queue.errors import JobError

_MANY = 20  # columns that an error lists


def refuse(where: str, faults: Sequence[str]) -> None:
    """Raise one JobError that begins with `where` unless there are no faults."""
    if len(faults) == 1:
        raise JobError(f"{where}: {faults[0]}")
    if faults:
        raise JobError("\n  ".join([f"{where}: {len(faults)} things are wrong", *faults]))


def listed(names: Iterable[str]) -> str:
    """Join a few of many names, as an error shows them."""
    found = list(names)
    more = f" and {len(found) - _MANY} more" if len(found) > _MANY else ""
    return ", ".join(found[:_MANY]) + more
