"""The rows that a meter looks at: chosen once, found again by their keys, and kept of each epoch's messages.

While a run trains, a meter copies the sampled rows of each message, and no more: where they are in each micro-batch is
looked up for a whole epoch, norms and the rest are computed for many messages at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from sl_queue.cut.guard import Crossing
from sl_queue.privacy import attacks
from sl_queue.privacy.attacks import Classes
from sl_queue.privacy.draws import Words
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches

SAMPLE = 500  # rows that are looked at
WIDTH = 64  # numbers of a row that are looked at; of wider ones every so many
PENDING = 2**20  # numbers that are copied before norms are taken

Positions = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[np.generic]]

_NOWHERE = np.zeros(0, np.int64)


def sample(labels: Classes | None, training: Positions, key: bytes) -> Positions:
    """Choose the rows to look at, ascending: all of a small table, else half of them of the rarest class if it can."""
    rng = generator(key, "sample", 0)
    if len(training) <= SAMPLE:
        return np.sort(training)
    if labels is None:
        return np.sort(rng.choice(training, SAMPLE, replace=False))
    classes, counts = attacks.counted(labels[training])
    of_rarest = labels[training] == classes[counts.argmin()]
    n_rare = min(int(of_rarest.sum()), SAMPLE // 2)
    rare = rng.choice(training[of_rarest], n_rare, replace=False)
    others = training[~of_rarest] if n_rare + int((~of_rarest).sum()) >= SAMPLE else np.setdiff1d(training, rare)
    return np.sort(np.concatenate([rare, rng.choice(others, SAMPLE - len(rare), replace=False)]))


def generator(key: bytes, purpose: str, epoch: int) -> np.random.Generator:
    """Return a generator that depends on the key, the purpose and the epoch alone."""
    words = [int.from_bytes(key[:16], "little"), int.from_bytes(purpose.encode(), "little"), epoch]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sample of a table, found by the rows' keys."""

    positions: Positions  # in the table, ascending
    _ascending: Words = field(repr=False)  # keys
    _places: Positions = field(repr=False)  # in the sample, of each of these keys

    @classmethod
    def of(cls, positions: Positions, keys: Words) -> "Sampled":
        """Take the sampled positions of a table, and the keys of all its rows."""
        order = np.argsort(keys[positions], kind="stable")
        return cls(positions, keys[positions][order], order)

    def __len__(self) -> int:
        return len(self.positions)

    def ours(self, arrays: Arrays) -> Arrays:
        """Return what was kept of this sample; nothing if it is of another one, as of a version that took more rows."""
        fits = all(
            name == "epoch" or (len(array) == len(self) and array.shape[1:] <= (WIDTH,))
            for name, array in arrays.items()
        )
        return arrays if fits else {}

    def find(self, keys: Words) -> tuple[Positions, Positions]:
        """Return the places in the sample of those rows that are in it, and where among `keys` they are."""
        if not len(self._ascending):
            return self._places, self._places
        at = np.searchsorted(self._ascending, keys)
        chosen = np.flatnonzero(self._ascending.take(at, mode="clip") == keys)
        return self._places[at[chosen]], chosen


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Places of the rows of a sample in the micro-batches, looked up once an epoch."""

    batches: Batches
    positions: Positions = field(repr=False)  # in the table
    _epochs: dict[int, dict[MicroBatch, Positions]] = field(default_factory=dict, repr=False)  # the newest two

    def __call__(self, crossing: Crossing) -> Positions:
        """Return the places among the rows that cross in training."""
        at = crossing.micro_batch
        if crossing.rows.held_out:
            return _NOWHERE
        epoch = self.batches.epoch_of(at.step)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a stale forward may be in the next one
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self.batches.places(self.positions, epoch)
        return self._epochs[epoch].get(at, _NOWHERE)


@dataclass(slots=True)
class Seen:
    """Messages of one kind about the sampled rows in this epoch. Mutable: an epoch fills it."""

    sample: Sampled
    rows: npt.NDArray[np.float32]  # (sample, numbers)
    here: npt.NDArray[np.bool_]  # (sample,)
    norms: npt.NDArray[np.float32]  # (sample,), of all of a row's numbers
    _pending: list[tuple[Words, npt.NDArray[np.float32]]] = field(default_factory=list, repr=False)
    _numbers: int = 0  # in `_pending`

    @classmethod
    def empty(cls, sample: Sampled, width: int) -> "Seen":
        """Begin an epoch; `width`: of a whole row, or of what was kept of it."""
        rows = np.zeros((len(sample), min(width, WIDTH)), np.float32)
        return cls(sample, rows, np.zeros(len(sample), bool), np.zeros(len(sample), np.float32))

    def add(self, keys: Words, numbers: npt.NDArray[np.float32]) -> None:
        """Keep the rows of these keys, (rows, *anything), that are of the sample; they are the caller's no more."""
        self._pending.append((keys, numbers))
        self._numbers += numbers.size
        if self._numbers > PENDING:
            self.settle()

    def settle(self) -> "Seen":
        """Take in what was added."""
        if self._pending:
            places, chosen = self.sample.find(np.concatenate([keys for keys, _ in self._pending]))
            numbers = np.concatenate([n.reshape(len(n), prod(n.shape[1:])) for _, n in self._pending])[chosen]
            self._pending, self._numbers = [], 0
            self.norms[places] = np.linalg.norm(numbers, axis=1)
            stride = -(-numbers.shape[1] // WIDTH)
            self.rows[places, : -(-numbers.shape[1] // stride)] = numbers[:, ::stride]
            self.here[places] = True
        return self

    def arrays(self, kind: str, party: str) -> dict[str, npt.NDArray[np.generic]]:
        """Return all of it by name, for a checkpoint."""
        self.settle()
        return {f"{kind}/{part}/{party}": getattr(self, part) for part in _PARTS}


_PARTS = ("rows", "here", "norms")


def under(arrays: Arrays, prefix: str) -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays whose names begin with `prefix/`, without that."""
    start = f"{prefix}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def seen_in(sample: Sampled, arrays: Arrays, kind: str) -> dict[str, Seen]:
    """Read what `Seen.arrays` returned of each party."""
    rows, here, norms = (under(arrays, f"{kind}/{part}") for part in _PARTS)
    return {
        party: Seen(sample, rows[party].astype(np.float32), here[party].astype(bool), norms[party].astype(np.float32))
        for party in rows
    }
