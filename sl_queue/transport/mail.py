"""Messages in and out over a link: what all channels are built on.

What comes in is opened, decoded, and held against the rights of its sender; what cannot be read, is not for this role
or is not its sender's to say is refused here. A statement about the moment that was made before, or to an earlier
process of this role, is late: it is acknowledged and does nothing.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.protocol.addressing import addressee_of, subject_of
from sl_queue.protocol.codec import AnotherVersion, Terms, Unreadable, decode, encode
from sl_queue.protocol.control import Message
from sl_queue.protocol.events import Observer, Received, Sent, ignore
from sl_queue.protocol.measures import Connectivity
from sl_queue.protocol.messages import Header
from sl_queue.security.replays import ReplayFilter
from sl_queue.security.sealing import OVERHEAD_BYTES, Opened, Seal
from sl_queue.transport.link import Delivery, Link, Tag
from sl_queue.transport.refusals import Refusals
from sl_queue.transport.versions import Versions

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that was read, with what is known of its way here; its header names the sender that it came from."""

    header: Header
    message: Message
    delivery: Delivery
    met: bool  # sealed by a process of its sender that had not been heard of


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A delivery that cannot be used, with its header where that much could be read."""

    delivery: Delivery
    reason: RemoteProtocolError

    @property
    def header(self) -> Header | None:
        return self.reason.header if isinstance(self.reason, Unreadable) else None


class Reader(Protocol):
    """Takes what comes in; called on the link's thread, and must not block."""

    def on_letter(self, letter: Letter) -> None:
        """Take a message that is here; it is acknowledged or refused by whoever takes it."""

    def on_late(self, letter: Letter) -> None:
        """Note a statement that does nothing: it is acknowledged already."""

    def on_spoilt(self, spoilt: Spoilt) -> None:
        """Decide about a message that cannot be used; `Mail.refuse` is the usual end of it."""

    def on_reconnect(self) -> None:
        """Note that every tag is void and that what was not acknowledged comes again."""

    def on_failure(self, error: SlQueueError) -> None:
        """Note that the link has given up."""


class Mail:
    """The messages of one role. Thread-safe; mutable: it remembers who spoke when.

    `terms`: what is taken of each sender. `largest`: the most bytes that a sender's message may have, before it is
    sealed; without an entry any size is taken. `incarnation`: names this process of the role. `fresh_only`: believe
    statements about the moment only of who has heard of this process, where messages are sealed.
    """

    def __init__(
        self,
        link: Link,
        role: str,
        terms: Mapping[str, Terms],
        incarnation: str,
        *,
        patience_s: float,
        largest: Mapping[str, int] | None = None,
        seal: Seal | None = None,
        fresh_only: bool = False,
        observe: Observer = ignore,
    ) -> None:
        self._link, self._terms, self._incarnation, self._patience_s = link, terms, incarnation, patience_s
        self._seal, self._fresh_only, self._replays = seal, fresh_only, ReplayFilter(seal)
        self._largest = {sender: size + OVERHEAD_BYTES for sender, size in (largest or {}).items()}
        self._role, self._observe = role, observe
        self._refusals, self._versions = Refusals(role, patience_s, observe), Versions(patience_s)
        self._lock = threading.Lock()  # of the replay filter
        self._reader: Reader

    def open(self, reader: Reader) -> None:
        """Connect and read. Raises BrokerUnreachable, PartyBusy."""
        self._reader = reader
        self._link.open(self._on_delivery, reader.on_reconnect, reader.on_failure)

    def close(self, *, failed: bool) -> None:
        """Flush what was sent, unless the link has `failed`, then leave; what is unacknowledged stays at the broker."""
        try:
            if not failed:
                self._link.flush(timeout_s=5.0)
        except SlQueueError as error:  # the link has failed a moment ago
            log.debug("closing: %s", error)
        finally:
            self._link.close()
            self.log_refusals(all_of_it=True)

    # What goes out ----------------------------------------------------------------------------------------------

    def send(self, receiver: str, header: Header, message: Message, *, lasting: bool) -> None:
        """Publish a report or command; one that is not `lasting` is forgotten after a patience.

        What lasts is kept by the broker even when it restarts.
        """
        body = self.sealed(receiver, header, message)
        expires_s = None if lasting else self._patience_s
        self._observe(Sent(self._role, receiver, header.kind, len(body)))
        self._link.publish(receiver, header.kind, header.run, body, persistent=lasting, expires_s=expires_s)

    def sealed(self, receiver: str, header: Header, message: Message) -> bytes:
        """Return the bytes of a message as they travel."""
        body = encode(header, message)
        return body if self._seal is None else self._seal.seal(receiver, body)

    # What comes in ----------------------------------------------------------------------------------------------

    def _on_delivery(self, delivery: Delivery) -> None:
        self._observe(Received(self._role, delivery.sender, len(delivery.body), delivery.redelivered))
        try:
            letter, opened = self._read(delivery)
        except RemoteProtocolError as error:
            if isinstance(error, AnotherVersion):
                self._versions.foreign(delivery.sender, error.speaks, time.monotonic())
            self._reader.on_spoilt(Spoilt(delivery, error))
            return
        self._versions.understood(delivery.sender)
        if self._is_late(letter, opened):
            self._link.acknowledge([delivery.tag])
            self._reader.on_late(letter)
        else:
            self._reader.on_letter(letter)

    def _read(self, delivery: Delivery) -> tuple[Letter, Opened | None]:
        """Open and decode a delivery. Raises RemoteProtocolError, before it is looked at if it is too large."""
        sender, body = delivery.sender, delivery.body
        size = len(body)
        most = self._largest.get(sender, size)
        if size > most:
            raise RemoteProtocolError(f"a message of {size} bytes; the largest that {sender!r} sends has {most}")
        opened = None if self._seal is None else self._seal.open(sender, body)
        header, message = decode(body if opened is None else opened.body, self._terms[sender])
        met = opened is not None and opened.met
        return Letter(header, message, delivery, met), opened

    def _is_late(self, letter: Letter, opened: Opened | None) -> bool:
        subject = subject_of(letter.message)
        if subject is None:
            return False
        if addressee_of(letter.message) not in (None, self._incarnation):
            return True
        if opened is None:
            return False
        if self._fresh_only and not opened.fresh:
            return True
        with self._lock:
            return not self._replays.is_new(opened, subject)

    def refuse(self, sender: str, tag: Tag, reason: str) -> None:
        """Refuse a delivery for good; of the many of one sender only the first few are kept as dead letters."""
        if self._refusals.note(sender, reason, time.monotonic()):
            self._link.reject(tag, reason)
        else:
            self._link.acknowledge([tag])

    def take_again(self) -> None:
        """Take what was said before once more: it was not acknowledged, so the broker delivers it again."""
        with self._lock:
            self._replays.forget()

    # What is known of senders -----------------------------------------------------------------------------------

    def foreign(self) -> Mapping[str, str]:
        """Name senders of which nothing came for a patience but messages of another version, with what to do."""
        return self._versions.named(time.monotonic())

    def has_understood(self, sender: str) -> bool:
        """Return True if this process has ever read a message of `sender`."""
        return self._versions.has_understood(sender)

    def is_unreadable(self, sender: str) -> bool:
        """Return True if messages of `sender` came, and none of them could be opened."""
        return self._seal is not None and self._seal.never_opened(sender)

    def log_refusals(self, *, all_of_it: bool = False) -> None:
        """Log the refusals that are only counted; at the end `all_of_it`."""
        self._refusals.tell(time.monotonic(), all_of_it=all_of_it)

    @property
    def connectivity(self) -> Connectivity:
        """The connection to the broker, now."""
        return self._link.connectivity
