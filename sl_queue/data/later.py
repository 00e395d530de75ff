"""Columns of a table that are read when they are asked for, one at a time, so that memory holds one and not all."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa


class TemporaryFolder:
    """A folder that is there for as long as anyone holds this."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="sl_queue-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True, eq=False)
class Later(Mapping[str, Any]):
    """Arrow arrays by name; `load` reads one, and is asked again for each use."""

    names: tuple[str, ...]
    load: Callable[[str], Any] = field(repr=False)
    keeps: Any = field(default=None, repr=False)  # what must live as long: a temporary folder

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        pa.default_memory_pool().release_unused()  # of the column before, which would be kept for the next table
        return self.load(name)

    def __contains__(self, name: object) -> bool:
        """Return True if there is such a column; a Mapping would read it to find out."""
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> "Later":
        """Return the same columns, each read within a context."""

        def load(name: str) -> Any:
            with context():
                return self.load(name)

        return Later(self.names, load, self.keeps)

    def then(self, change: Callable[[Any], Any], names: tuple[str, ...] | None = None) -> "Later":
        """Return the same columns, or these of them, each changed when it is read."""
        return Later(self.names if names is None else names, lambda name: change(self.load(name)), self.keeps)
