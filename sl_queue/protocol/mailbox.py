"""The recovery law, kept in two boxes: what came in and what went out. Pure; the channel acts on what they say.

    An acknowledgement means "its effect is on disk". After a crash everything unacknowledged comes back, and
    everything already seen is dropped by its key.

A delivery is new (filed under its key), a copy of one that is filed or applied but not yet committed, committed long
ago, of an older or a newer generation, or not ours at all. A copy may be acknowledged at once while the first
delivery is still held: the broker keeps that one. After a reconnect all tags are void and the broker delivers
everything again; then the copy takes the place of the first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from typing import Generic, TypeVar

from sl_queue.protocol.messages import BEFORE_FIRST_STEP, Activation, Gradient, Header, Kind, MicroBatch, Payload

Tag = TypeVar("Tag")
Key = tuple[str, Kind, MicroBatch]  # the sender (or receiver, for what went out), what it is, and which


@dataclass(frozen=True, slots=True)
class Acknowledge(Generic[Tag]):
    """The broker may forget these deliveries."""

    tags: tuple[Tag, ...]


@dataclass(frozen=True, slots=True)
class Reject(Generic[Tag]):
    """The delivery is not ours: to the dead letters, with the reason."""

    tag: Tag
    reason: str


Verdict = Acknowledge[Tag] | Reject[Tag] | None  # None: filed, and to be acknowledged by the commit


@dataclass(slots=True)
class _Held(Generic[Tag]):
    tag: Tag | None  # None: void since a reconnect; the broker will deliver it again
    payload: Payload | None  # None: taken, its effect is in memory and not yet on disk


class Mailbox(Generic[Tag]):
    """Received data messages by key, from delivery to commit. Mutable: it is the party's memory of one timeline."""

    def __init__(self, party: str) -> None:
        self._party = party
        self._run: str | None = None
        self._generation = 0
        self._committed = BEFORE_FIRST_STEP
        self._held: dict[Key, _Held[Tag]] = {}
        self._early: list[tuple[Header, Payload, Tag]] = []  # before a run is adopted, or of the next generation
        self.counts: Counter[str] = Counter()

    def adopt(self, run: str, generation: int, committed: int) -> list[Verdict[Tag]]:
        """Enter a run and generation, with everything up to step `committed` already applied."""
        dropped = tuple(held.tag for held in self._held.values() if held.tag is not None)
        early, self._early = self._early, []
        self._run, self._generation, self._committed = run, generation, committed
        self._held.clear()
        verdicts: list[Verdict[Tag]] = [Acknowledge(dropped)] if dropped else []
        return verdicts + [self._file(header, payload, tag) for header, payload, tag in early]

    def file(self, sender: str, header: Header, message: Activation | Gradient, tag: Tag) -> Verdict[Tag]:
        """Decide about one delivery from the queue of `sender`."""
        if header.sender != sender:
            return self._reject(tag, f"says it is from {header.sender!r}, but came from {sender!r}")
        if header.receiver != self._party:
            return self._reject(tag, f"is for {header.receiver!r}, but came to {self._party!r}")
        return self._file(header, message.payload, tag)

    def _file(self, header: Header, payload: Payload, tag: Tag) -> Verdict[Tag]:
        if self._run is None:
            self._early.append((header, payload, tag))
            return None
        if header.run != self._run:
            return self._reject(tag, f"is of run {header.run!r}, this is run {self._run!r}")
        if header.generation > self._generation:
            self._early.append((header, payload, tag))
            return None
        if header.generation < self._generation:
            return self._reject(tag, f"is of generation {header.generation}, this is {self._generation}")
        return self._file_current(header, payload, tag)

    def _file_current(self, header: Header, payload: Payload, tag: Tag) -> Verdict[Tag]:
        key = (header.sender, header.kind, header.micro_batch)
        held = self._held.get(key)
        if header.micro_batch.step <= self._committed:
            self.counts["duplicates"] += 1
            return Acknowledge((tag,))
        if held is None:
            self._held[key] = _Held(tag, payload)
            return None
        self.counts["duplicates"] += 1
        if held.tag is None:
            held.tag = tag
            return None
        return Acknowledge((tag,))

    def take(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload | None:
        """The payload if it is here; it is applied from now on and never given out again."""
        held = self._held.get((sender, kind, micro_batch))
        if held is None or held.payload is None:
            return None
        payload, held.payload = held.payload, None
        self.counts["applied"] += 1
        return payload

    def commit(self, step: int) -> tuple[Tag, ...]:
        """Everything up to `step` is on disk: the tags that may now be acknowledged."""
        self._committed = step
        done = [key for key in self._held if key[2].step <= step]
        tags = (self._held.pop(key).tag for key in done)
        return tuple(tag for tag in tags if tag is not None)

    def disconnect(self) -> None:
        """The connection is gone: every tag is void, and what was not acknowledged will be delivered again."""
        for held in self._held.values():
            held.tag = None
        self._early.clear()

    def _reject(self, tag: Tag, reason: str) -> Reject[Tag]:
        self.counts["rejected"] += 1
        return Reject(tag, reason)


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

    def adopt(self, committed: int) -> None:
        """A new timeline begins: what was sent is void, and nothing up to step `committed` will be sent again."""
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
        """The receiver has everything up to `step` on disk."""
        for key in [key for key in self._kept if key[0] == receiver and key[2].step <= step]:
            self._bytes -= len(self._kept.pop(key))

    def since(self, receiver: str, kind: Kind, micro_batch: MicroBatch) -> list[tuple[Key, bytes]]:
        """What was sent to `receiver` from that message on, in sending order; empty if that one is not kept."""
        first = (receiver, kind, micro_batch)
        if first not in self._kept:
            return []
        later = dropwhile(lambda entry: entry[0] != first, self._kept.items())
        return [(key, body) for key, body in later if key[0] == receiver]

    def newest(self, count: int) -> Iterator[tuple[Key, bytes]]:
        """The last `count` messages to each receiver, in sending order: what a broken connection may have lost."""
        left: Counter[str] = Counter()
        chosen = []
        for key, body in reversed(self._kept.items()):
            left[key[0]] += 1
            if left[key[0]] <= count:
                chosen.append((key, body))
        return reversed(chosen)

    def is_past(self, receiver: str, kind: Kind, micro_batch: MicroBatch) -> bool:
        """Whether that message was sent on this timeline, also before a restart: it will not come again by itself."""
        if micro_batch.step <= self._resumed_at:
            return True
        sent = self._sent.get((receiver, kind))
        return sent is not None and micro_batch <= sent
