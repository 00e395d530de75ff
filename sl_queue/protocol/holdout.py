"""Rows that the label holder chooses to hold out or to keep for a test, and their names to the other parties.

It sends the key of each such row, a secret hash of its id that only those who hold all ids can compute: two counts,
then the keys of the held-out rows, then those of the test's. Nothing in it depends on a value of the label holder's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.text import counted

Positions = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

KEY_BYTES = 8
CHUNK = 20_000  # keys in a message
_COUNTS = 2  # that stand before the keys
_ABOUT = "held-out "  # begins the name of what is told


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Positions in canonical order of the rows that are not trained on; each ascending, and none in both."""

    held_out: Positions = field(repr=False)
    test: Positions = field(repr=False)

    @classmethod
    def none(cls) -> "Chosen":
        """Return that no row is chosen."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @property
    def digest(self) -> str:
        """Name the choice, for its own party: two that differ in a row have different digests."""
        about = f"{len(self.held_out)} {len(self.test)} ".encode()
        body = np.concatenate([self.held_out, self.test]).astype("<i8").tobytes()
        return blake2b(about + body, digest_size=16, person=b"sl_queue chosen").hexdigest()


def session_of(rows_digest: str) -> str:
    """Name a choice by the rows among which it was made."""
    return f"{_ABOUT}{rows_digest}"


def is_session(name: str) -> bool:
    """Tell a choice of rows from the masked ids of an alignment."""
    return name.startswith(_ABOUT)


def chunks_of(chosen: Chosen, row_keys: Keys) -> Iterator[bytes]:
    """Yield the bodies of the messages that name the chosen rows."""
    counts = np.array([len(chosen.held_out), len(chosen.test)], np.uint64)
    told = np.concatenate([counts, row_keys[chosen.held_out], row_keys[chosen.test]]).astype("<u8")
    for first in range(0, len(told), CHUNK):
        yield told[first : first + CHUNK].tobytes()


def missing(here: Mapping[int, bytes]) -> bool:
    """Return True unless all chunks of a choice are here. Raises RemoteProtocolError for one that cannot be."""
    if 0 not in here:
        return True
    first = np.frombuffer(here[0], "<u8")
    if len(first) < _COUNTS:
        raise RemoteProtocolError("the label holder did not say how many rows it holds out")
    total = _COUNTS + sum(int(count) for count in first[:_COUNTS])
    return any(chunk not in here for chunk in range(-(-total // CHUNK)))


def chosen_of(here: Mapping[int, bytes], row_keys: Keys) -> Chosen:
    """Find the chosen rows among the own ones. Raises RemoteProtocolError for a key that is no row's."""
    told = np.frombuffer(b"".join(here[chunk] for chunk in sorted(here)), "<u8").astype(np.uint64)
    held_out, test = (int(count) for count in told[:_COUNTS])
    if len(told) != _COUNTS + held_out + test:
        raise RemoteProtocolError(
            f"the label holder told {counted(len(told) - _COUNTS, 'row', 'rows')}, and said {held_out + test}"
        )
    order = np.argsort(row_keys, kind="stable")
    ascending = row_keys[order]
    places = np.minimum(np.searchsorted(ascending, told[_COUNTS:]), max(len(ascending) - 1, 0))
    if len(places) and (not len(ascending) or (ascending[places] != told[_COUNTS:]).any()):
        raise RemoteProtocolError("the label holder holds out rows that nobody has")
    found = order[places].astype(np.int64)
    if len(np.unique(found)) < len(found):
        raise RemoteProtocolError("the label holder told a row twice")
    return Chosen(np.sort(found[:held_out]), np.sort(found[held_out:]))
