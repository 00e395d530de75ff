"""The recovery law, kept in two boxes: what came in and what went out. Pure; the channel acts on what they say.

    An acknowledgement means "its effect is on disk". After a crash everything unacknowledged comes back, and
    everything already seen is dropped by its key.

A delivery is new (filed under its key), a copy of one that is filed or applied but not yet committed, committed long
ago, of an older or a newer generation, or not ours at all. A copy may be acknowledged at once while the first
delivery is still held: the broker keeps that one. After a reconnect all tags are void and the broker delivers
everything again; then the copy takes the place of the first.

    Whatever is neither applied, refused nor dropped may not hold a place of a finite window.

So a message is held only if its key is within reach of the step that is on disk; protocol/bounds counts those keys,
and the window is sized by it. What an earlier run or generation left behind is dropped, as is what comes of a newer
generation beyond the few that a peer sends unanswered: its sender sends it again when it is asked. Nothing that an
honest peer sends is refused, unless this party has lost a checkpoint that was on disk; then everyone goes back.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Generic, TypeVar

from sl_queue.protocol.messages import BEFORE_FIRST_STEP, Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.party.bounds import Bounds, out_of_reach
from sl_queue.protocol.schedule.pipeline import Reach

Tag = TypeVar("Tag")
Key = tuple[str, Kind, MicroBatch]  # the sender (or receiver, for what went out), what it is, and which

UNUSABLE = 3  # times that the awaited message was asked for and refused: it is sent again and will be no better


@dataclass(frozen=True, slots=True)
class Acknowledge(Generic[Tag]):
    """The broker may forget these deliveries."""

    tags: tuple[Tag, ...]


@dataclass(frozen=True, slots=True)
class Reject(Generic[Tag]):
    """The delivery is not ours, for this reason; a copy may go to the dead letters."""

    tag: Tag
    reason: str
    sender: str = field(default="", compare=False)  # empty: whose queue it came from


Verdict = Acknowledge[Tag] | Reject[Tag] | None  # None: filed, and to be acknowledged by the commit


@dataclass(slots=True)
class _Held(Generic[Tag]):
    tag: Tag | None  # None: void since a reconnect; the broker will deliver it again
    payload: Payload | None  # None: taken, its effect is in memory and not yet on disk


@dataclass(frozen=True, slots=True)
class _Early(Generic[Tag]):
    """A delivery of a run or generation that this party has yet to enter."""

    header: Header
    payload: Payload
    tag: Tag


class Mailbox(Generic[Tag]):
    """Received data messages by key, from delivery to commit. Mutable: it is the party's memory of one timeline.

    `bounds` says what may come; without it anything of this run is taken.
    """

    def __init__(self, party: str, bounds: Bounds | None = None) -> None:
        self._party, self._bounds = party, bounds
        self._run: str | None = None
        self._generation = 0
        self._committed = BEFORE_FIRST_STEP
        self._reach: Reach | None = None
        self._held: dict[Key, _Held[Tag]] = {}
        # by sender; before a run is entered of any, afterwards of one newer generation only
        self._early: defaultdict[str, dict[tuple[str, int, Kind, MicroBatch], _Early[Tag]]] = defaultdict(dict)
        self._asked: Key | None = None  # what was asked for last
        self._unusable: list[str] = []  # why it was refused; at most once each time it was asked for
        self._answered = True
        self.counts: Counter[str] = Counter()

    def enter(self, run: str, generation: int, committed: int) -> list[Verdict[Tag]]:
        """Enter a run and generation, with everything up to step `committed` already applied."""
        dropped = tuple(held.tag for held in self._held.values() if held.tag is not None)
        early = [message for waiting in self._early.values() for message in waiting.values()]
        self._early.clear()
        self._held.clear()
        self._asked = None
        self._run, self._generation = run, generation
        self._move(committed)
        verdicts: list[Verdict[Tag]] = [Acknowledge(dropped)] if dropped else []
        return verdicts + [self._file(each.header, each.payload, each.tag) for each in early]

    def _move(self, committed: int) -> None:
        self._committed = committed
        self._reach = None if self._bounds is None else self._bounds.pipeline.reach(committed)

    def file(self, header: Header, message: Activation | Gradient, tag: Tag) -> Verdict[Tag]:
        """Decide about one delivery; the codec has compared its header with whose queue it came from."""
        return self._file(header, message.payload, tag)

    def _file(self, header: Header, payload: Payload, tag: Tag) -> Verdict[Tag]:
        if self._run is None:
            return self._file_early(header, payload, tag)
        if header.run != self._run or header.generation < self._generation:
            return self._drop(tag)
        if self._bounds is not None:
            problem = self._bounds.objection(header.sender, header.kind, header.micro_batch, payload)
            if problem is not None:
                return self.refuse(header, tag, problem)
        if header.generation > self._generation:
            return self._file_newer(header, payload, tag)
        return self._file_current(header, payload, tag)

    def _file_newer(self, header: Header, payload: Payload, tag: Tag) -> Verdict[Tag]:
        """Keep what a peer sent in a generation that this party is yet to enter, as far as it can have sent it."""
        waiting = self._early[header.sender]
        known = next((each.header.generation for each in waiting.values()), header.generation)
        if header.generation < known:
            return self._drop(tag)
        if header.generation > known:  # its sender has left the other one behind
            left = tuple(each.tag for each in waiting.values())
            waiting.clear()
            self.counts["stale"] += len(left)
            self._file_early(header, payload, tag)
            return Acknowledge(left)
        if self._bounds is not None and len(waiting) >= self._bounds.early:
            return self._drop(tag)
        return self._file_early(header, payload, tag)

    def _file_early(self, header: Header, payload: Payload, tag: Tag) -> Verdict[Tag]:
        waiting = self._early[header.sender]
        key = (header.run, header.generation, header.kind, header.micro_batch)
        if key in waiting:
            self.counts["duplicates"] += 1
            return Acknowledge((tag,))
        waiting[key] = _Early(header, payload, tag)
        return None

    def _file_current(self, header: Header, payload: Payload, tag: Tag) -> Verdict[Tag]:
        key = (header.sender, header.kind, header.micro_batch)
        held = self._held.get(key)
        if header.micro_batch.step <= self._committed:
            self.counts["duplicates"] += 1
            return Acknowledge((tag,))
        if held is None:
            problem = None if self._reach is None else out_of_reach(self._reach, header.kind, header.micro_batch)
            if problem is not None:
                return self.refuse(header, tag, problem)
            self._held[key] = _Held(tag, payload)
            return None
        self.counts["duplicates"] += 1
        if held.tag is None:
            held.tag = tag
            return None
        return Acknowledge((tag,))

    def _drop(self, tag: Tag) -> Acknowledge[Tag]:
        """Let the broker forget what belongs to another run or generation: nobody did wrong."""
        self.counts["stale"] += 1
        return Acknowledge((tag,))

    def refuse(self, header: Header, tag: Tag, problem: str) -> Reject[Tag]:
        """Refuse a tensor for what it is; remembered if it should be the one that was asked for."""
        key = (header.sender, header.kind, header.micro_batch)
        here = (header.receiver, header.run, header.generation) == (self._party, self._run, self._generation)
        if here and key == self._asked and not self._answered:
            self._unusable.append(problem)
            self._answered = True
        reason = f"{header.kind} {header.micro_batch} of {header.sender!r:.100}: {problem}"
        return self._reject(tag, reason, header.sender)

    def ask(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> str | None:
        """Note that a message is asked for; say why it was refused if that was the answer time and again."""
        if self._asked != (sender, kind, micro_batch):
            self._asked, self._unusable = (sender, kind, micro_batch), []
        self._answered = False
        return self._unusable[-1] if len(self._unusable) >= UNUSABLE else None

    def has(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> bool | None:
        """Return True if a message is here and was not given out before, else None: there is nothing to take."""
        held = self._held.get((sender, kind, micro_batch))
        return None if held is None or held.payload is None else True

    def take(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload | None:
        """Return the payload if it is here; it is applied from now on and never given out again."""
        held = self._held.get((sender, kind, micro_batch))
        if held is None or held.payload is None:
            return None
        payload, held.payload = held.payload, None
        self.counts["applied"] += 1
        return payload

    def commit(self, step: int) -> tuple[Tag, ...]:
        """Commit everything up to `step`, which is on disk; returns the tags that may now be acknowledged."""
        self._move(step)
        done = [key for key in self._held if key[2].step <= step]
        tags = (self._held.pop(key).tag for key in done)
        return tuple(tag for tag in tags if tag is not None)

    def disconnect(self) -> None:
        """Void every tag: the connection is gone, and what was not acknowledged will be delivered again."""
        for held in self._held.values():
            held.tag = None
        self._early.clear()

    def _reject(self, tag: Tag, reason: str, sender: str = "") -> Reject[Tag]:
        self.counts["rejected"] += 1
        return Reject(tag, reason, sender)


class Outbox:
    """Sent data messages, kept until their receiver has their effect on disk. Mutable, bounded by bytes.

    The broker is the log, but it need not be durable: what it loses is sent again from here. Whatever a message
    says its sender has committed need not be kept for that sender any more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[Key, bytes] = OrderedDict()  # in sending order; the key names the receiver
        self._sent: dict[tuple[str, Kind], MicroBatch] = {}
        self._resumed_at = BEFORE_FIRST_STEP

    def enter(self, committed: int) -> None:
        """Begin a new timeline: what was sent is void, and nothing up to step `committed` will be sent again."""
        self._kept.clear()
        self._sent.clear()
        self._bytes, self._resumed_at = 0, committed

    def keep(self, receiver: str, kind: Kind, micro_batch: MicroBatch, body: bytes) -> None:
        """Remember a message that is being sent; the oldest are forgotten when there are too many bytes."""
        self._bytes += len(body) - len(self._kept.pop((receiver, kind, micro_batch), b""))
        self._kept[receiver, kind, micro_batch] = body
        self._sent[receiver, kind] = micro_batch
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest)

    def committed(self, receiver: str, step: int) -> None:
        """Forget what the receiver has on disk: everything up to `step`."""
        for key in [key for key in self._kept if key[0] == receiver and key[2].step <= step]:
            self._bytes -= len(self._kept.pop(key))

    def since(self, receiver: str, kind: Kind, micro_batch: MicroBatch) -> list[tuple[Key, bytes]]:
        """Return what was sent to `receiver` from that message on, in sending order; empty if it is not kept."""
        first = (receiver, kind, micro_batch)
        if first not in self._kept:
            return []
        later = dropwhile(lambda entry: entry[0] != first, self._kept.items())
        return [(key, body) for key, body in later if key[0] == receiver]

    def newest(self, count: int) -> Iterator[tuple[Key, bytes]]:
        """Return the last `count` messages to each receiver, in order: what a broken connection may have lost."""
        left: Counter[str] = Counter()
        chosen = []
        for key, body in reversed(self._kept.items()):
            left[key[0]] += 1
            if left[key[0]] <= count:
                chosen.append((key, body))
        return reversed(chosen)

    def is_past(self, receiver: str, kind: Kind, micro_batch: MicroBatch) -> bool:
        """Return True if that message was sent on this timeline, also before a restart: it is not sent by itself."""
        if micro_batch.step <= self._resumed_at:
            return True
        sent = self._sent.get((receiver, kind))
        return sent is not None and micro_batch <= sent
