"""A party's own set in an alignment: its points as they leave, and its finished masks as they are compared.

A set may be large, and its worker trains afterwards, so little of it is in memory at a time: points and finished masks
are on disk, and what stays is where each of them belongs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError
from sl_queue.loops.alignment_ports import Files
from sl_queue.protocol.alignment import MASK_BYTES, POINT_BYTES, Cut, Masks, as_masks, positions_of
from sl_queue.protocol.text import counted


def _none() -> Masks:
    return as_masks(b"")


@dataclass(slots=True)
class OwnSet:
    """The own ids of a party. Mutable: it holds what the session that it is in has need of."""

    files: Files
    cut: Cut
    n_ids: int  # what is beyond stands for nobody
    places: npt.NDArray[np.integer] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    ascending: Masks = field(default_factory=_none, repr=False)  # all finished masks, while they are asked for
    common: Masks = field(default_factory=_none, repr=False)  # those that all parties hold
    here: set[int] = field(default_factory=set)  # chunks of them that came

    def leave(self, points: bytes) -> None:
        """Sort the points, and put them by: an order that says nothing, and is the same after a restart."""
        each, size = np.frombuffer(points, np.dtype((np.void, POINT_BYTES))), self.cut.size
        self.places = np.argsort(each, kind="stable").astype(np.min_scalar_type(len(each)))
        self.files.put_by(each[self.places[at : at + size]].tobytes() for at in range(0, len(each), size))

    def points(self, chunk: int) -> bytes:
        """Read a chunk of the points as they leave."""
        return self.files.points(chunk * self.cut.size * POINT_BYTES, self.cut.size_of(chunk) * POINT_BYTES)

    def masks(self, session: str, chunk: int) -> memoryview:
        """Return a chunk of all finished masks, ascending."""
        if not len(self.ascending):
            self.ascending = np.empty(self.cut.n_ids, self.common.dtype)
            for number, masks in enumerate(self._finished(session)):
                self.ascending[number * self.cut.size :][: len(masks)] = masks
            self.ascending.sort()
        return self.cut.piece(self.ascending.view(np.uint8).data, chunk)

    def take(self, shared: int, chunk: int, body: memoryview) -> None:
        """Take a chunk of the masks that all hold. Raises RemoteProtocolError for one that cannot be."""
        cut = Cut(shared, self.cut.size)
        if not body or shared > self.cut.n_ids or len(body) != cut.size_of(chunk) * MASK_BYTES:
            raise RemoteProtocolError(
                f"the scheduler sent {len(body)} bytes as chunk {chunk} of {counted(shared, 'shared id', 'shared ids')}"
            )
        if len(self.common) != shared:
            self.common, self.ascending = np.empty(shared, self.common.dtype), _none()
            self.here.clear()
        self.common[chunk * cut.size :][: cut.size] = as_masks(body)
        self.here.add(chunk)

    def positions(self, session: str, shared: int) -> npt.NDArray[np.int64] | None:
        """Find the shared ids, ascending; None while masks are missing. Raises as `positions_of`."""
        if len(self.here) < Cut(shared, self.cut.size).chunks:
            return None
        return positions_of(self._finished(session), self.places, self.common, self.n_ids)

    def forget(self) -> None:
        """Forget what another session had need of."""
        self.ascending = self.common = _none()
        self.here.clear()

    def _finished(self, session: str) -> Iterator[Masks]:
        """Read the finished masks, in the order in which the points left."""
        return (as_masks(self.files.finished(session, chunk)) for chunk in range(self.cut.chunks))
