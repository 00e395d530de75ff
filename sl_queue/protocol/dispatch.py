"""All that a party's lead decides: who is here, who computes what, and who needs which weights. Pure.

    a note, or the time  ->  Dispatch  ->  notes to send, events to report

The broker deals tickets, and this says what they mean: whoever claims a task is given all its calls, unless another
hand has it, and then drops what the ticket brought. So a hand may be lost at any moment: what is left of its tasks is
given to the next.
"""

from collections.abc import Mapping
from typing import Any

from sl_queue.errors import AlignmentError, ComputeError, SlQueueError, named
from sl_queue.protocol import hands as say
from sl_queue.protocol.events import Event, HandCame, HandLeft, HandRefused
from sl_queue.protocol.fingerprints import differences
from sl_queue.protocol.hands import HANDS, LOOKS, MOST_DEATHS, SILENT_S, TASKS, Call, Result, Tensors
from sl_queue.protocol.measures import HandCounts
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.roster import Roster
from sl_queue.protocol.text import printable


class Dispatch:
    """A lead without threads, clock and lane. Mutable, and used under a lock of its owner.

    `outgoing` and `events` are what its owner has to send and to report, in order. `name` is that of the lead's
    process, so that what was meant for an earlier one means nothing; `about` is what a hand must agree in.
    """

    def __init__(self, party: str, name: str, about: Mapping[str, Any], secret: bytes, *, alone: bool) -> None:
        self._party, self._about, self._secret, self._alone = party, dict(about), secret, alone
        self.roster = Roster(name)
        self.outgoing: list[tuple[str, say.Note]] = []
        self.events: list[Event] = []
        self.failure: SlQueueError | None = None
        self._heard: dict[str, float] = {}  # hands that are here: when something came of them last
        self._weights: dict[int, Tensors] = {}
        self._version, self._looks = 0, 0
        self._passed_by: frozenset[int] = frozenset()  # tasks that waited when idle hands were looked for last
        self._calls, self._busy_s = 0, 0.0

    @property
    def hands(self) -> int:
        """The number of hands that are here."""
        return len(self._heard)

    @property
    def lacks(self) -> bool:
        """True if whoever waits for a result waits for a hand to come."""
        return not self._heard and not self._alone

    def counts(self, lacks: bool) -> HandCounts:
        """Return the hands that are here, and what was done."""
        waiting = len(self.roster.waiting())
        return HandCounts(self.hands, self._calls, self.roster.repeated, self._busy_s, waiting, lacks)

    # What the worker asks for -----------------------------------------------------------------------------------

    def equip(self, tensors: Tensors) -> None:
        """Give these weights to all hands; versions that no open task names are forgotten."""
        self._version += 1
        self._weights[self._version] = tensors
        oldest, _ = self.roster.oldest(self._version)
        self._weights = {version: kept for version, kept in self._weights.items() if version >= oldest}
        if self._heard:
            self._send(HANDS, self._message(self._version))

    def begin(self, what: str, micro_batch: MicroBatch, tensors: Tensors) -> int:
        """Open a task on the newest weights, and return its number."""
        number = self.roster.begin(what, micro_batch, self._version, tensors)
        self._deal((number,))
        return number

    def go_on(self, task: int, what: str, tensors: Tensors) -> None:
        """Add a call to a task, for whoever has it."""
        call, due = self.roster.go_on(task, what, tensors)
        if due:
            self._deal((task,))
        elif (holder := self.roster.holder(task)) in self._heard:
            self._send(holder, call)

    def raise_failure(self) -> None:
        """Raise what the model did at a hand, or that a micro-batch loses every hand that has it."""
        deadly = self.roster.deadly()
        if self.failure is None and deadly is not None:
            self.failure = ComputeError(
                f"party {self._party!r}: {MOST_DEATHS} hands were lost over micro-batch {deadly}, one after the other; "
                "look into their logs, and at the memory that they have"
            )
        if self.failure is not None:
            raise self.failure

    # What comes of hands ----------------------------------------------------------------------------------------

    def hear(self, note: say.ToLead, now: float) -> None:
        """Take what a hand says."""
        if isinstance(note, say.Hello):
            self._welcome(note, now)
            return
        if note.lead != self.roster.lead:
            return
        if note.hand in self._heard:
            self._heard[note.hand] = now
        match note:
            case say.Claim(_, hand, number):
                self._claim(hand, number)
            case Result():
                self.keep(note)
            case say.Back(_, hand, number):
                self._deal((number,) if self.roster.put_back(hand, number) else ())
            case say.Failure(_, _, number, error, message):
                if self.roster.is_open(number):
                    self.fail(named(error)(printable(message)))

    def keep(self, result: Result) -> None:
        """Keep the answer to a call, whoever gave it."""
        seconds = result.values.get("seconds")
        if self.roster.take(result):
            self._calls += 1
            self._busy_s += seconds if isinstance(seconds, float) else 0.0

    def fail(self, error: SlQueueError) -> None:
        """Note what ends the run; the first counts."""
        self.failure = self.failure or error

    def lose(self, hand: str, why: str, now: float, *, dead: bool = True) -> None:
        """Give what a hand has to others; a `dead` one may have been killed by what it was computing."""
        if self._heard.pop(hand, None) is not None:
            self.events.append(HandLeft(self._party, hand, len(self._heard), why))
            self._deal(tuple(self.roster.leave(hand, now, dead=dead)))

    def lose_all(self, why: str, now: float) -> None:
        """Note that no hand can be reached."""
        for hand in tuple(self._heard):
            self.lose(hand, why, now, dead=False)

    def look(self, now: float) -> None:
        """Ask each hand for a sign of life, and deal tasks again that somebody has who does nothing with them.

        A hand that is gone, or silent for long, has nothing any more.
        """
        for hand, heard in tuple(self._heard.items()):
            if heard < now - SILENT_S:
                self.lose(hand, f"nothing was heard of it for {SILENT_S:.0f} s", now, dead=False)
            else:
                self._send(hand, say.Beat(self.roster.lead))
        self._looks += 1
        if self._looks % LOOKS == 0:
            idle, waiting = self._heard.keys() - self.roster.busy(), self.roster.waiting()
            self._deal(tuple(task for task in waiting if task in self._passed_by) if idle else ())
            self._passed_by = frozenset(waiting)

    def farewell(self, error: SlQueueError | None) -> None:
        """Send hands home, with the error that ended the run if one did."""
        name, text = ("", "") if error is None else (type(error).__name__, str(error))
        self._send(HANDS, say.Farewell(name, text))

    def _welcome(self, hello: say.Hello, now: float) -> None:
        hand = hello.hand
        new, self._heard[hand] = hand not in self._heard, now
        if not new:
            return
        wrong = differences(self._about, hello.about)
        if wrong:
            del self._heard[hand]
            reason = f"a hand of party {self._party!r} does not fit its lead: {'; '.join(wrong)}"
            self.events.append(HandRefused(self._party, reason))
            self._send(hand, say.Farewell(AlignmentError.__name__, reason))
            return
        self._send(hand, say.Welcome(self.roster.lead, hand, self._secret.hex()))
        for version in self._weights:
            self._send(hand, self._message(version))
        self.events.append(HandCame(self._party, hand, len(self._heard)))
        self._deal(self.roster.waiting())

    def _claim(self, hand: str, number: int) -> None:
        """Give a task to a hand; if another has it, the broker dealt it again, and that one is asked for a sign."""
        if (holder := self.roster.holder(number)) in self._heard and holder != hand:
            self._send(holder, say.Beat(self.roster.lead))
        calls = self.roster.claim(hand, number) if hand in self._heard else None
        for each in (say.Drop(self.roster.lead, number),) if calls is None else calls:
            self._send(hand, each)

    # What the lead's own hand asks for --------------------------------------------------------------------------

    def next_own(self) -> Call | None:
        """Return what the lead's own hand has to do: new tasks only while no other hand is here."""
        return self.roster.next_own(alone=not self._heard)

    def weights_of(self, version: int) -> say.Weights | None:
        """Return a version of the weights, if a task may still name it."""
        return self._message(version) if version in self._weights else None

    def _deal(self, tasks: tuple[int, ...]) -> None:
        """Have a ticket for each of these tasks among the hands; without any, the own hand finds them by itself."""
        for task in tasks if self._heard else ():
            self._send(TASKS, self.roster.ticket(task))

    def _message(self, version: int) -> say.Weights:
        return say.Weights(self.roster.lead, version, *self.roster.oldest(self._version), self._weights[version])

    def _send(self, to: str, note: say.Note) -> None:
        self.outgoing.append((to, note))
