"""Order in which rows are trained on: a pure function of the job, the same on every party and every version.

Positions count rows in canonical order (ascending id). An epoch's order sorts positions by a keyed 64-bit hash, so any
epoch and any step can be computed without the ones before, and a resumed worker needs no random state.

Rows are held out by a hash of their ids, keyed by a seed alone: whoever comes or leaves, nearly all others stay where
they are, in the next job too. How many are held out follows from the number of rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from sl_queue.errors import JobError
from sl_queue.protocol.holdout import Chosen
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.text import counted

Positions = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_MASK = 0xFFFFFFFFFFFFFFFF
_HOLDOUT = -1  # the "epoch" whose order chooses the held-out rows by position


def _splitmix64(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix every bit by a bijection of 64-bit words: Steele, Lea and Flood's finaliser (OOPSLA 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key(*words: int) -> np.uint64:
    key = np.zeros(1, np.uint64)
    for word in words:
        key = _splitmix64(key ^ np.uint64(word & _MASK)) + np.uint64(_GOLDEN)
    return np.uint64(key[0])


def row_order(n_rows: int, seed: int, epoch: int) -> Positions:
    """Return the order in which epoch `epoch` (from 0) visits `n_rows` training rows, as positions in canonical order.

    Shape (n_rows,), int64, a permutation. With a holdout, positions count the rows that are left for training, still
    in canonical order.
    """
    if n_rows < 0:
        raise ValueError(f"n_rows is {n_rows}; it cannot be negative")
    positions = np.arange(1, n_rows + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.argsort(_splitmix64(positions ^ _key(seed, epoch)), kind="stable")


def held_out(n_rows: int, holdout: float) -> int:
    """Return the number of rows that are held out."""
    return round(holdout * n_rows)


def id_hashes(ids: Iterable[bytes], seed: int, count: int = -1) -> Hashes:
    """Hash every id, as UTF-8 text, for the choice of held-out rows; `count` of them, if that is known."""
    key = blake2b(str(seed).encode(), digest_size=32, person=b"sl_queue holdout").digest()
    return hashes_of(ids, count, key)


def hashes_of(ids: Iterable[bytes], count: int, key: bytes) -> Hashes:
    """Hash every id by a key to 64 bits; `count` of them, or -1 if that is not known."""
    words = (int.from_bytes(blake2b(text, digest_size=8, key=key).digest(), "little") for text in ids)
    return np.fromiter(words, np.uint64, count)


def split_by_id(hashes: Hashes, holdout: float) -> tuple[Positions, Positions]:
    """Return positions of the training and of the held-out rows, each ascending: the smallest hashes are held out."""
    return _split(np.argsort(hashes, kind="stable"), holdout)  # equal ones in canonical order


def split_holdout(n_rows: int, seed: int, holdout: float) -> tuple[Positions, Positions]:
    """Split as runs under the first rules do: by position, so that one more row moves nearly all the others."""
    return _split(row_order(n_rows, seed, _HOLDOUT), holdout)


def _split(order: Positions, holdout: float) -> tuple[Positions, Positions]:
    first = held_out(len(order), holdout)
    return np.sort(order[first:]), np.sort(order[:first])


@dataclass(frozen=True)
class Batches:
    """Every step's rows, cut into micro-batches.

    `rows(micro_batch)` are positions in canonical order over all rows of the table; which rows are held out decides
    nothing else, so `hashes` may be left out where only counts are asked for. A step's rows are cut into
    `micro_batches` parts whose sizes differ by at most one, the larger first; a step with fewer rows has fewer parts.
    """

    n_rows: int
    seed: int
    epochs: int
    batch_size: int
    micro_batches: int
    holdout: float = 0.0
    shuffle: bool = True
    drop_last: bool = False
    holdout_seed: int | None = None  # None: `seed`
    test: float = 0.0  # share of rows that are neither trained on nor evaluated: those with the largest hashes
    hashes: Hashes | None = field(default=None, repr=False, compare=False)  # of the ids; None: held out by position
    chosen: Chosen | None = field(default=None, repr=False, compare=False)  # by the label holder; None: by the ids

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            reason = "drop_last = true drops the only batch" if self.training_rows else "no row is left to train on"
            held = f"holdout = {self.holdout}" if self.chosen is None else f"{self.holdout_rows} of them held out"
            raise JobError(
                f"{counted(self.n_rows, 'row', 'rows')} with {held} and batch_size = {self.batch_size}: {reason}; "
                "use a smaller batch_size or holdout, or drop_last = false"
            )

    @cached_property
    def _split(self) -> tuple[Positions, Positions, Positions]:
        """Positions to train on, held out and for a test, each ascending."""
        if self.chosen is not None:
            left = np.ones(self.n_rows, np.bool_)
            left[self.chosen.held_out] = left[self.chosen.test] = False
            return np.flatnonzero(left), self.chosen.held_out, self.chosen.test
        if self.hashes is not None:
            order = np.argsort(self.hashes, kind="stable")
        else:
            order = row_order(self.n_rows, self.seed if self.holdout_seed is None else self.holdout_seed, _HOLDOUT)
        first, last = self.holdout_rows, self.n_rows - self.test_rows
        return np.sort(order[first:last]), np.sort(order[:first]), np.sort(order[last:])

    @property
    def rows_in_epoch(self) -> int:
        """Count the rows that an epoch trains on; with drop_last not all that are not held out."""
        return min(self.training_rows, self.steps_per_epoch * self.batch_size)

    @property
    def training_positions(self) -> Positions:
        """All rows that are not held out, in the order in which they are shuffled."""
        return self._split[0]

    @property
    def holdout_positions(self) -> Positions:
        """The rows that are held out, ascending."""
        return self._split[1]

    @property
    def test_positions(self) -> Positions:
        """The rows that training never touches, ascending."""
        return self._split[2]

    @cached_property
    def training_rows(self) -> int:
        return self.n_rows - self.holdout_rows - self.test_rows

    @cached_property
    def test_rows(self) -> int:
        if self.chosen is not None:
            return len(self.chosen.test)
        return min(held_out(self.n_rows, self.test), self.n_rows - self.holdout_rows)

    @cached_property
    def holdout_rows(self) -> int:
        if self.chosen is not None:
            return len(self.chosen.held_out)
        return held_out(self.n_rows, self.holdout)

    @cached_property
    def steps_per_epoch(self) -> int:
        n, b = self.training_rows, self.batch_size
        return n // b if self.drop_last else -(-n // b)

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        return (step + 1) % self.steps_per_epoch == 0

    def last_step(self, epoch: int) -> int:
        """Return the last step of an epoch."""
        return (epoch + 1) * self.steps_per_epoch - 1

    def rows_in_step(self, step: int) -> int:
        """Return the number of rows that the step trains on."""
        first = (step % self.steps_per_epoch) * self.batch_size
        return min(self.batch_size, self.training_rows - first)

    def parts(self, step: int) -> int:
        """Return the number of micro-batches of the step."""
        return min(self.micro_batches, self.rows_in_step(step))

    def sizes(self, step: int) -> tuple[int, ...]:
        """Count the rows of each micro-batch of a step without looking them up."""
        full, last = self._sizes
        return last if self.ends_epoch(step) else full

    @cached_property
    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of every step of an epoch but its last, and of that."""
        steps = (0, self.steps_per_epoch - 1)
        full, last = (_part_sizes(self.rows_in_step(step), self.parts(step)) for step in steps)
        return full, last

    def rows(self, micro_batch: MicroBatch) -> Positions:
        """Return the rows of a training micro-batch, in training order."""
        step, index = micro_batch.step, micro_batch.index
        first = (step % self.steps_per_epoch) * self.batch_size
        start, stop = _part(self.rows_in_step(step), self.parts(step), index)
        return self._order(self.epoch_of(step))[first + start : first + stop]

    def places(self, positions: Positions, epoch: int) -> dict[MicroBatch, Positions]:
        """Return where these rows are in an epoch: by micro-batch, the places among its rows, ascending."""
        wanted = np.zeros(self.n_rows, np.bool_)
        wanted[positions] = True
        at = np.flatnonzero(wanted[self._order(epoch)[: self.rows_in_epoch]])
        full, last = self._sizes
        starts = np.cumsum([0, *full * (self.steps_per_epoch - 1), *last])  # of all micro-batches
        which = np.searchsorted(starts, at, "right") - 1
        new = np.flatnonzero(np.diff(which, prepend=-1))  # where the next micro-batch begins
        pieces = np.split(at - starts[which], new[1:]) if len(new) else ()
        steps, indices = np.divmod(which[new], len(full))
        names = map(MicroBatch, (epoch * self.steps_per_epoch + steps).tolist(), indices.tolist())
        return dict(zip(names, pieces, strict=True))

    def after(self, micro_batch: MicroBatch) -> MicroBatch | None:
        """Return the next training micro-batch; None after the run's last."""
        step, index = micro_batch.step, micro_batch.index + 1
        if index < self.parts(step):
            return MicroBatch(step, index)
        return MicroBatch(step + 1, 0) if step + 1 < self.steps else None

    @property
    def holdout_parts(self) -> int:
        """Number of held-out micro-batches of an evaluation; each as large as a training one, but the last."""
        return -(-self.holdout_rows // self._holdout_size)

    def holdout_part(self, index: int) -> Positions:
        """Return the rows of held-out micro-batch `index`, in canonical order."""
        size = self._holdout_size
        return self._split[1][index * size : (index + 1) * size]

    @cached_property
    def holdout_sizes(self) -> tuple[int, ...]:
        """Count the rows of each held-out micro-batch."""
        size, rows = self._holdout_size, self.holdout_rows
        return tuple(min(size, rows - first) for first in range(0, rows, size))

    @property
    def most_rows(self) -> int:
        """Rows of the largest message of this job, of training or of held-out rows."""
        full, last = self._sizes
        return max(*full, *last, *self.holdout_sizes)

    @property
    def _holdout_size(self) -> int:
        return -(-self.batch_size // self.micro_batches)

    def _order(self, epoch: int) -> Positions:
        training = self._split[0]
        if not self.shuffle:
            return training
        found = self._orders.get(epoch)
        if found is None:
            found = training[row_order(len(training), self.seed, epoch)]
            for other in [other for other in self._orders if abs(other - epoch) > 1]:
                del self._orders[other]  # a stale forward may be in the next epoch: two are in use at once
            self._orders[epoch] = found
        return found

    @cached_property
    def _orders(self) -> dict[int, Positions]:
        return {}


def _part(n: int, parts: int, index: int) -> tuple[int, int]:
    """Return the bounds of part `index` when n things are cut into `parts` of about equal size, the larger first."""
    size, larger = divmod(n, parts)
    start = index * size + min(index, larger)
    return start, start + size + (index < larger)


def _part_sizes(n: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of all parts of `_part`."""
    return tuple(stop - start for start, stop in (_part(n, parts, index) for index in range(parts)))
