"""The lead's memory of its hands: who has which task, and what follows when one is claimed, answered or lost. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from sl_queue.protocol.hands import APART_S, MOST_DEATHS, OWN, Call, Result, Tensors, Ticket
from sl_queue.protocol.messages import MicroBatch


@dataclass(slots=True)
class _Task:
    calls: list[Call]
    holder: str | None = None
    results: dict[str, Result] = field(default_factory=dict)
    deaths: int = 0  # of hands that had it
    died_at: float = float("-inf")  # the last that counts
    given: int = 0  # calls that the lead's own hand was given

    @property
    def waits(self) -> bool:
        """True if nobody has it and something of it is unanswered."""
        return self.holder is None and len(self.results) < len(self.calls)


class Roster:
    """The tasks of a party and who has them. Mutable, and used under a lock of its owner.

    `lead`: a name of this process, so that what was meant for an earlier one means nothing.
    """

    def __init__(self, lead: str) -> None:
        self.lead = lead
        self.repeated = 0  # tasks that were dealt again
        self._tasks: dict[int, _Task] = {}  # open ones, in the order in which they were begun
        self._numbers = count()
        self._newest = -1

    def __len__(self) -> int:
        return len(self._tasks)

    def oldest(self, newest_version: int) -> tuple[int, int]:
        """Return the oldest version that an open task names, and the oldest open task, or what comes next."""
        versions = (task.calls[0].version for task in self._tasks.values())
        return min(versions, default=newest_version), next(iter(self._tasks), self._newest + 1)

    def begin(self, what: str, micro_batch: MicroBatch, version: int, tensors: Tensors) -> int:
        """Open a task with its first call, and return its number: a ticket is due."""
        self._newest = number = next(self._numbers)
        self._tasks[number] = _Task([Call(self.lead, number, what, micro_batch, version, tensors)])
        return number

    def go_on(self, number: int, what: str, tensors: Tensors) -> tuple[Call, bool]:
        """Add a call to a task, on its weights; returns it, and True if a ticket is due."""
        task = self._tasks[number]
        first, waited = task.calls[0], task.waits
        task.calls.append(Call(self.lead, number, what, first.micro_batch, first.version, tensors))
        return task.calls[-1], task.waits and not waited

    def ticket(self, number: int) -> Ticket:
        """Return what a hand gets of a task that waits."""
        first = self._tasks[number].calls[0]
        here = first.fits_ticket
        tensors = first.tensors if here else {}
        return Ticket(self.lead, number, first.what if here else "", first.micro_batch, first.version, tensors)

    def claim(self, hand: str, number: int) -> tuple[Call, ...] | None:
        """Give a task to a hand: the calls that its ticket did not bring. None if it is another's, is done or unknown.

        A hand that has it already gets no call twice.
        """
        task = self._tasks.get(number)
        if task is not None and task.holder == hand:
            return ()
        if task is None or not task.waits:
            return None
        task.holder = hand
        return tuple(task.calls[1:] if task.calls[0].fits_ticket else task.calls)

    def next_own(self, *, alone: bool) -> Call | None:
        """Return what the lead's own hand has to do next; new tasks only while it is `alone`."""
        for task in self._tasks.values():
            if (task.holder == OWN and len(task.calls) > task.given) or (alone and task.waits):
                task.given = task.given if task.holder == OWN else 0
                task.holder = OWN
                task.given += 1
                return task.calls[task.given - 1]
        return None

    def take(self, result: Result) -> bool:
        """Keep the answer to a call, whoever gave it; False if it is known, or was not asked for."""
        task = self._tasks.get(result.task)
        if result.lead != self.lead or task is None or result.what in task.results:
            return False
        if all(call.what != result.what for call in task.calls):
            return False
        task.results[result.what] = result
        return True

    def leave(self, hand: str, now: float, *, dead: bool = True) -> Iterator[int]:
        """Take what a lost hand had from it; yields the tasks for which tickets are due.

        A `dead` hand was at the oldest of its tasks; if that was the end of another one a moment ago, both count once.
        """
        for number, task in self._tasks.items():
            if task.holder != hand:
                continue
            task.holder = None
            if task.waits:
                if dead and now - task.died_at >= APART_S:
                    task.deaths, task.died_at = task.deaths + 1, now
                dead = False
                self.repeated += 1
                yield number

    def put_back(self, hand: str, number: int) -> bool:
        """Take a task from a hand that cannot go on with it; True if a ticket is due."""
        task = self._tasks.get(number)
        if task is None or task.holder != hand:
            return False
        task.holder = None
        self.repeated += task.waits
        return task.waits

    def deadly(self) -> MicroBatch | None:
        """Return the micro-batch of a task over which too many hands were lost."""
        found = (task.calls[0].micro_batch for task in self._tasks.values() if task.deaths >= MOST_DEATHS)
        return next(found, None)

    def result(self, number: int, what: str) -> Result | None:
        """Return the answer to a call, if it is here."""
        return self._tasks[number].results.get(what)

    def holder(self, number: int) -> str:
        """Return who has a task; empty if nobody has, or if there is no such task."""
        task = self._tasks.get(number)
        return (task.holder if task is not None else None) or ""

    def is_open(self, number: int) -> bool:
        """Return True while a task has not ended."""
        return number in self._tasks

    def waiting(self) -> tuple[int, ...]:
        """Return the tasks that nobody has."""
        return tuple(number for number, task in self._tasks.items() if task.waits)

    def busy(self) -> frozenset[str]:
        """Return who has a task with something unanswered."""
        tasks = self._tasks.values()
        return frozenset(t.holder for t in tasks if t.holder is not None and len(t.results) < len(t.calls))

    def end(self, number: int) -> None:
        """Close a task: nobody will need its calls again."""
        del self._tasks[number]

    def clear(self) -> None:
        """Forget every task; what hands still answer is dropped."""
        self._tasks.clear()
