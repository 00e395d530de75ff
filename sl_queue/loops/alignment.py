"""The alignment of rows, both sides: a party that sends its masked ids around, and the scheduler that compares.

    party: offer -> own points out, WINDOW chunks at a time; others' points masked and passed on; own ones back, on disk
    scheduler: all are here -> asks for finished masks -> compares -> outcome on disk -> tells everyone -> all have it

Nothing is awaited that is not asked for again, and everything that is said twice is the same bytes: a role that is
killed anywhere says what it is, and the others go on. Feature parties have no queues to each other, so what is between
two of them comes by way of the label holder.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sl_queue.errors import AlignmentError, PeerSilent, RemoteProtocolError, SlQueueError, TransportError, named
from sl_queue.loops.alignment_ports import Channel, Files, Ids, Secrets
from sl_queue.loops.own_set import OwnSet
from sl_queue.protocol.alignment import MASK_BYTES, POINT_BYTES, Cut, Ring, Rule, Travel, padded, payload
from sl_queue.protocol.control import Align, Aligned, Aligning, Alive, Failed, Offer, Stop
from sl_queue.protocol.messages import SCHEDULER, Masked
from sl_queue.protocol.scheduler.state import GIVE_UP
from sl_queue.protocol.text import counted, printable

TELL_S = 1.0  # between two signs of life, which also say how far the own set has come
WAIT_S = 0.2
HELD = 256  # messages that are here and not dealt with, of all senders

log = logging.getLogger("sl_queue")


@dataclass(slots=True)
class PartyAlignment:
    """A party's side. Mutable: what it knows of the session that the scheduler named last."""

    party: str
    incarnation: str
    rule: Rule
    ids: Ids
    token: str
    secrets: Secrets
    files: Files
    channel: Channel
    patience_s: float
    clock: Callable[[], float]  # monotonic, seconds
    version: str = ""
    tidy: Callable[[], None] = lambda: None  # called when much that was in memory is not needed any more
    to: str = ""  # the scheduler it has heard of
    offered_to: str = ""
    order: Align | None = None
    travel: Travel = field(default_factory=lambda: Travel(0, 0.0))
    wanted: set[int] = field(default_factory=set)  # chunks of finished masks that the scheduler asked for
    held: deque[Any] = field(default_factory=deque, repr=False)  # taken amid long work
    early: list[Any] = field(default_factory=list, repr=False)  # of a session that it has yet to hear of
    told_at: float = -np.inf
    reconnects: int = 0
    stopped: bool = False  # by the scheduler, who knows why
    own: OwnSet = field(init=False)

    def __post_init__(self) -> None:
        self.own = OwnSet(self.files, self.cut, self.ids.count)

    @property
    def size(self) -> int:
        """Number of ids that it says it brings."""
        return padded(self.ids.count, self.rule.pad)

    @property
    def cut(self) -> Cut:
        """Cutting of the party's own ids into messages."""
        return Cut(self.size, self.rule.chunk)

    @property
    def ring(self) -> Ring:
        return self.rule.ring

    def serve(self) -> tuple[npt.NDArray[np.int64], str]:
        """Take part to the end; returns the positions of the shared rows, ascending, and the session.

        What ends it here, and would not be fixed by a restart, is reported to the scheduler. Raises as `align`.
        """
        try:
            found = self.align()
            assert self.order is not None
            return found, self.order.session
        except TransportError:
            raise
        except SlQueueError as error:
            if not self.stopped:
                failed = Failed(self.incarnation, type(error).__name__, str(error))
                self.channel.tell(SCHEDULER, failed, lasting=True)
            raise

    def align(self) -> npt.NDArray[np.int64]:
        """Take part to the end; returns the positions of the shared rows, ascending.

        Raises AlignmentError, PeerFailed, RunStopped as the scheduler says; RemoteProtocolError, PeerSilent.
        """
        self.own.leave(self.secrets.own(self.ids.texts(), self.size - self.ids.count, self._pulse))
        self.tidy()
        while (found := self._conclusion()) is None:
            arrival = self.held.popleft() if self.held else self.channel.next(WAIT_S)
            if arrival is not None:
                self._take(arrival)
            self._act(self.clock())
        return found

    def confirm(self, session: str) -> None:
        """Tell the scheduler that the outcome of a session is on disk. Raises as `align`.

        One that has lost its own disk believes only what names it, so it is waited for; for a patience, since one that
        knew this before has ended, and one that comes later finds the message.
        """
        known = bool(self.to)
        self._say_aligned(session)
        if not known and self._hears_scheduler(self.clock() + self.patience_s):
            self._say_aligned(session)
        self.channel.flush()

    def _hears_scheduler(self, until: float) -> bool:
        """Wait for a scheduler to say its name. Raises AlignmentError for one of another version."""
        while not self.to and self.clock() < until:
            arrival = self.channel.next(WAIT_S)
            if arrival is not None:
                self._take(arrival)
            for reason in self.channel.foreign().values():
                raise AlignmentError(reason)
        if not self.to:
            log.warning(
                "%s: aligned, and no scheduler was heard; one with a new state folder needs this worker again",
                self.party,
            )
        return bool(self.to)

    def _say_aligned(self, session: str) -> None:
        self.channel.tell(SCHEDULER, Aligned(self.incarnation, session, self.to), lasting=True)

    def _pulse(self, done: int) -> None:
        """Show a sign of life amid long work, and hear whether it still has a point."""
        now = self.clock()
        if now - self.told_at < TELL_S:
            return
        while len(self.held) < HELD and (arrival := self.channel.next(0.0)) is not None:
            if isinstance(arrival.message, Stop | Alive):
                self._take(arrival)
            else:
                self.held.append(arrival)
        self._tell(now)

    def _tell(self, now: float) -> None:
        """Say who is here until the scheduler knows, then how far it is."""
        self.told_at = now
        if self.to and (self.order is None or self.offered_to != self.to):
            self.offered_to = self.to
            about = (self.rule.job, self.token, self.size, self.ids.type, self.to, self.version)
            self.channel.tell(SCHEDULER, Offer(self.incarnation, *about))
        else:
            done = sum(map(self.cut.size_of, self.travel.back))
            self.channel.tell(SCHEDULER, Aligning(self.incarnation, done, self.size))
        self._require_scheduler()

    def _require_scheduler(self) -> None:
        silent_s = self.channel.silent_s(SCHEDULER)
        for reason in self.channel.foreign().values():
            raise AlignmentError(reason)
        if silent_s > GIVE_UP * self.patience_s:
            raise PeerSilent(f"nothing was heard from the scheduler for {silent_s:.0f} s; start both workers again")

    def _act(self, now: float) -> None:
        """Send what is due."""
        if now - self.told_at >= TELL_S:
            self._tell(now)
        if self.order is None:
            return
        if self.channel.reconnects != self.reconnects:
            self.reconnects = self.channel.reconnects
            self.travel.again()
        for chunk in self.travel.due(now):
            self._pass_on(self.party, -1, chunk, self.own.points(chunk))
        if len(self.travel.back) == self.travel.total and self.wanted:
            self._upload(self.order)

    def _upload(self, order: Align) -> None:
        """Send the scheduler the finished masks that it asks for, once for each time it does."""
        for chunk in sorted(self.wanted):
            key, piece = self.ring.key(self.party, 0, chunk), self.own.masks(order.session, chunk)
            self.channel.send(SCHEDULER, Masked(key, payload(piece, MASK_BYTES)), order.session)
        self.wanted.clear()

    # What comes -------------------------------------------------------------------------------------------------

    def _take(self, arrival: Any) -> None:
        """Deal with one message, and acknowledge it."""
        match arrival.message:
            case Alive(incarnation) if arrival.sender == SCHEDULER:
                if incarnation != self.to:
                    self.to, self.told_at = incarnation, -np.inf
            case Align() if arrival.sender == SCHEDULER and arrival.message.incarnation == self.incarnation:
                self._obey(arrival.message)
            case Stop(incarnation, reason, _, error) if arrival.sender == SCHEDULER and incarnation == self.incarnation:
                self.channel.done(arrival)
                self.stopped = True
                raise named(error or "RunStopped")(printable(reason))
            case Masked():
                if not self._of_this_session(arrival):
                    return
                self._take_masked(arrival.sender, arrival.message)
                self.tidy()
            case _:
                pass
        self.channel.done(arrival)

    def _of_this_session(self, arrival: Any) -> bool:
        """Return True for what is to be dealt with now; what may be of a session to come is put by."""
        if self.order is not None and arrival.session == self.order.session:
            return True
        if self.order is None and len(self.early) < HELD:
            self.early.append(arrival)
        else:
            self.channel.done(arrival)  # if it was of a session to come, it will be sent again
        return False

    def _obey(self, order: Align) -> None:
        """Enter the session that the scheduler names. Raises AlignmentError for one that asks too much."""
        mine = order.sizes.get(self.party) == self.size and set(order.sizes) == set(self.ring.parties)
        if not mine or max(order.sizes.values()) > self.rule.largest:
            raise AlignmentError(
                f"the scheduler names the sizes {printable(str(dict(order.sizes)))}; they are not those of this job's "
                f"parties, or beyond alignment.at_most = {self.rule.at_most}"
            )
        before, self.order = self.order, order
        if before is None or before.session != order.session:
            back = self.files.begin(order.session)
            self.travel = Travel(self.cut.chunks, max(1.0, self.patience_s / 2), back)
            self.own.forget()
            self.wanted.clear()
        elif before.round != order.round:
            self.travel.again()
        self.wanted.update(chunk for chunk in order.missing if chunk < self.travel.total)
        self.held.extend(self.early)
        self.early.clear()

    def _take_masked(self, sender: str, message: Masked) -> None:
        """Mask a chunk or pass it on; keep it if it is an own one that has come around."""
        assert self.order is not None
        key, body = message.micro_batch, memoryview(message.payload.data).cast("B")
        if sender == SCHEDULER:
            if self.order.shared is not None:  # else it comes again
                self.own.take(self.order.shared, key.index, body)
            return
        owner, hop = self.ring.place(key, sender, self.party)
        cut = Cut(self.order.sizes[owner], self.rule.chunk)
        if not body or len(body) != cut.size_of(key.index) * POINT_BYTES:
            raise RemoteProtocolError(
                f"{sender!r} sent {len(body)} bytes as chunk {key.index} of the "
                f"{counted(cut.n_ids, 'masked id', 'masked ids')} of {owner!r}"
            )
        if hop == len(self.ring.routes[owner]) - 1:
            if key.index not in self.travel.back:
                finished = np.frombuffer(self.secrets.finished(body, self._pulse), np.uint8).reshape(-1, POINT_BYTES)
                self.files.keep(self.order.session, key.index, finished[:, :MASK_BYTES].tobytes())
            self.travel.came_back(key.index, self.clock())
            return
        if self.ring.routes[owner][hop].masks:
            if not self.files.is_the_same(self.order.session, f"{owner}-{key.index}", body):
                raise RemoteProtocolError(f"{owner!r} sent other ids as chunk {key.index} than before, to try out more")
            body = memoryview(self.secrets.masked(body, self._pulse))
        self._pass_on(owner, hop, key.index, body)

    def _pass_on(self, owner: str, hop: int, chunk: int, body: bytes | memoryview) -> None:
        """Send a chunk on its next stretch."""
        assert self.order is not None
        receiver = self.ring.routes[owner][hop + 1].receiver
        message = Masked(self.ring.key(owner, hop + 1, chunk), payload(body, POINT_BYTES))
        self.channel.send(receiver, message, self.order.session)

    def _conclusion(self) -> npt.NDArray[np.int64] | None:
        """Find the shared rows once everything is here."""
        order = self.order
        if order is None or order.shared is None or len(self.travel.back) < self.travel.total:
            return None
        return self.own.positions(order.session, order.shared)
