"""Memory of the run that a party is in: its orders, messages in and out, and what is on disk. Pure.

The channel acts on what comes back.
"""

from dataclasses import replace
from typing import Generic

from sl_queue.errors import LocalProtocolError
from sl_queue.protocol.control import Alive, Finish, Lost, Message, Open, Start, Stop, Waiting, kind_of
from sl_queue.protocol.messages import BEFORE_FIRST_STEP, SCHEDULER, Activation, Gradient, Header, Kind, MicroBatch
from sl_queue.protocol.party.bounds import Bounds
from sl_queue.protocol.party.mailbox import Key, Mailbox, Outbox, Reject, Tag, Verdict
from sl_queue.protocol.party.orders import Orders

_NOWHERE = MicroBatch(0, 0)  # reports and commands are of no micro-batch


class Timeline(Generic[Tag]):
    """One party's part of a run and generation. Mutable: it is the memory of one process.

    `announce`: the scheduler has to hear (again) who is here. `keep_bytes`: sent and not yet committed by the
    receiver; what is older is lost with the broker.
    """

    def __init__(self, party: str, incarnation: str, keep_bytes: int, bounds: Bounds | None = None) -> None:
        self._party, self._incarnation = party, incarnation
        self._start: Start | None = None  # the one that was entered
        self._peer_committed: dict[str, int] = {}
        self.mailbox: Mailbox[Tag] = Mailbox(party, bounds)
        self.outbox = Outbox(keep_bytes)
        self.orders = Orders()
        self.committed = BEFORE_FIRST_STEP
        self.scheduler_incarnation: str | None = None
        self.announce = False

    @property
    def run(self) -> str:
        return self._start.run if self._start is not None else ""

    @property
    def generation(self) -> int:
        return self._start.generation if self._start is not None else 0

    @property
    def newer(self) -> Start | None:
        """The order to begin a newer generation than the one entered."""
        ordered = self.orders.start
        if self._start is None or ordered is None or ordered.generation <= self._start.generation:
            return None
        return ordered

    def enter(self, start: Start, resume_step: int) -> list[Verdict[Tag]]:
        """Enter a run and generation, with everything up to `resume_step` on disk."""
        self.committed = resume_step  # before the generation that it is said with: see `header`
        self._start = start
        self._peer_committed.clear()
        self.outbox.enter(resume_step)
        return self.mailbox.enter(start.run, start.generation, resume_step)

    def commit(self, step: int) -> tuple[Tag, ...]:
        """Commit everything up to `step`; returns what may be acknowledged. A stop at the next commit meant it."""
        self.committed = step
        stop = self.orders.stop
        if stop is not None and stop.after_step is None:
            self.orders = replace(self.orders, stop=replace(stop, after_step=step))
        return self.mailbox.commit(step)

    def disconnect(self, count: int) -> list[tuple[Key, bytes]]:
        """Return the last `count` messages to each receiver: the connection that was lost may have lost them."""
        self.mailbox.disconnect()
        self.announce = True
        return list(self.outbox.newest(count))

    # What goes out ----------------------------------------------------------------------------------------------

    def header(self, receiver: str, message: Message) -> Header:
        """Return the header of a message; any thread may ask for it. Raises LocalProtocolError before a run is entered.

        What is said to be committed in a generation is never more than that: peers forget what they have sent up to it.
        """
        kind, start = kind_of(message), self._start
        if isinstance(message, Activation | Gradient):
            if start is None:
                raise LocalProtocolError(f"party {self._party!r} sends a {kind} before it entered a run")
            where = message.micro_batch
        else:
            where = _NOWHERE
        if start is None:
            return Header("", 0, kind, self._party, receiver, where, self.committed)
        return Header(start.run, start.generation, kind, self._party, receiver, where, self.committed)

    def waiting(self, sender: str, kind: Kind, micro_batch: MicroBatch, seconds: float, silent_s: float) -> Waiting:
        """Return what is reported of a wait for a message."""
        where = (self._incarnation, self.generation, sender, kind, micro_batch.step, micro_batch.index)
        return Waiting(*where, round(seconds, 3), round(silent_s, 1))

    def answer(self, receiver: str, waiting: Waiting) -> tuple[list[tuple[Key, bytes]], Lost | None]:
        """Return what to send again to a peer that waits, from what it waits for on; or that it is lost."""
        micro_batch = MicroBatch(waiting.step, waiting.index)
        again = self.outbox.since(receiver, waiting.kind, micro_batch)
        if again or not self.outbox.is_past(receiver, waiting.kind, micro_batch):
            return again, None
        where = (receiver, waiting.kind, micro_batch.step, micro_batch.index)
        return [], Lost(self._incarnation, self.generation, *where, waiting.seconds)

    # What comes in ----------------------------------------------------------------------------------------------

    def note(self, header: Header, redelivered: bool) -> None:
        """Note what the header of an activation or a gradient tells, before the mailbox decides about it."""
        self._note_committed(header)
        self.mailbox.counts["redelivered"] += redelivered

    def take(self, header: Header, message: Message) -> None:
        """Take an order or a statement; the codec has compared who says what with the rights of its sender."""
        match message:
            case Start() | Open() | Finish() | Stop() if message.incarnation == self._incarnation:
                self.orders = self.orders.after(message)
            case Alive(incarnation):
                self._note_committed(header)
                if header.sender == SCHEDULER and incarnation != self.scheduler_incarnation:
                    self.announce = True
                    self.scheduler_incarnation = incarnation
            case _:
                pass  # a question, which the channel answers, or an order to an earlier process

    def refuse(self, tag: Tag, reason: str, header: Header | None = None) -> Reject[Tag]:
        """Count a delivery that could not be read; with its header, it may be that of the awaited message."""
        if header is not None:
            return self.mailbox.refuse(header, tag, reason)
        self.mailbox.counts["rejected"] += 1
        return Reject(tag, reason)

    def is_present(self, header: Header) -> bool:
        """Return True for a header of the run and generation that this party is in."""
        return self._start is not None and (header.run, header.generation) == (self.run, self.generation)

    def _note_committed(self, header: Header) -> None:
        """Forget what a peer has on disk."""
        known = self._peer_committed.get(header.sender, BEFORE_FIRST_STEP)
        if self.is_present(header) and header.committed > known:
            self._peer_committed[header.sender] = header.committed
            self.outbox.committed(header.sender, header.committed)
