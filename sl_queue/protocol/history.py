"""The history of a run: the results of its epochs, in order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import overload

from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.text import counted

NEWEST = 20  # epochs that a status shows and a worker that joins brings along
PAGE = 200  # epochs in one message, where the scheduler lacks more


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class History:
    """Results of epochs, oldest first. A value: `after` and `until` return another one.

    One more epoch costs the same after 100,000 others: histories that follow from one another share a list that only
    grows, and each sees as much of it as it is long.
    """

    shared: list[EpochResult] = field(default_factory=list)
    length: int = 0

    @classmethod
    def of(cls, results: Iterable[EpochResult]) -> "History":
        """Copy these results."""
        copied = list(results)
        return cls(copied, len(copied))

    def after(self, result: EpochResult) -> "History":
        """Return this history with one more epoch."""
        shared = self.shared if len(self.shared) == self.length else self.shared[: self.length]
        shared.append(result)
        return History(shared, self.length + 1)

    def first(self, count: int) -> "History":
        """Return the first `count` epochs."""
        return History(self.shared, min(count, self.length))

    def until(self, step: int) -> "History":
        """Return the epochs that ended with `step` or before."""
        count = self.length
        while count and self.shared[count - 1].step > step:
            count -= 1
        return self.first(count)

    def newest(self, count: int = NEWEST) -> tuple[EpochResult, ...]:
        """Return the last `count` epochs, oldest first."""
        return tuple(self.shared[max(0, self.length - count) : self.length])

    def page(self, epoch: int, count: int = PAGE) -> tuple[EpochResult, ...]:
        """Return at most `count` epochs, the first of which has that number; empty if it is not here."""
        first = epoch - self[0].epoch if self else 0
        return tuple(self.shared[first : min(first + count, self.length)]) if first >= 0 else ()

    def in_common(self, other: "History") -> int:
        """Count the epochs from the first on that are equal in both."""
        both = min(self.length, other.length)
        if self.shared is other.shared:
            return both
        return next((i for i in range(both) if self.shared[i] != other.shared[i]), both)

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> EpochResult: ...

    @overload
    def __getitem__(self, index: slice) -> list[EpochResult]: ...

    def __getitem__(self, index: int | slice) -> EpochResult | list[EpochResult]:
        if isinstance(index, slice):
            return [self.shared[i] for i in range(*index.indices(self.length))]
        return self.shared[range(self.length)[index]]

    def __iter__(self) -> Iterator[EpochResult]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, History):
            return NotImplemented
        return self.length == other.length == self.in_common(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"History of {counted(self.length, 'epoch', 'epochs')}"
