"""Sealed messages: the broker carries them, and can neither read, alter nor invent one.

    ["SLQ" 1, encapsulated key, heard, sequence, ciphertext]

The ciphertext is the whole encoded message: its name too (run, generation, kind, sender, receiver, micro-batch) is
hidden from the broker, and bound to its tensor by the same authentication tag. What stands before the ciphertext is
authenticated with it. The key belongs to one process of the sender and one receiver: the sender draws a new ephemeral
key in every process, so that its counter may live in memory and no nonce is ever used twice, and the receiver's key
is static, so that it opens after a restart what the broker delivers again.

A copy of a data message is dropped by its name, as the recovery law has it. Reports and commands speak of the moment,
so an old one must not be taken for a new one: `sequence` tells which of one process came later, and `fresh` that the
sender had heard of this very process when it spoke. The channels drop what is late.
"""

import struct
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sl_queue.errors import AlignmentError, LocalProtocolError, RemoteProtocolError
from sl_queue.protocol.codec import AnotherVersion
from sl_queue.security.hpke import TAG_BYTES, Cipher, Context, Unsealable, setup_receiver, setup_sender
from sl_queue.security.keys import PrivateKey, PublicKey

_VERSION = 1
_MAGIC = b"SLQ" + bytes([_VERSION])
_PREFIX = struct.Struct(">4s32s8sQ")
_NAME_BYTES = 8  # of an encapsulated key: enough to tell processes apart; it is authenticated, not secret
_NOBODY = bytes(_NAME_BYTES)
_SIGNATURE_BYTES = 64
PROCESSES = 8  # of each sender, the newest heard of, that are remembered: restarts are few, and a flood is forgotten
OVERHEAD_BYTES = _PREFIX.size + TAG_BYTES + _SIGNATURE_BYTES  # how much larger than its plain body a message may be


@dataclass(frozen=True, slots=True)
class Opened:
    """A message as its sender encoded it, and when in that sender's life it was said."""

    body: bytes = field(repr=False)
    process: bytes  # of the sender
    sequence: int  # among everything that process sealed for us
    fresh: bool  # the sender had heard of this process
    met: bool  # we had not heard of that process
    sender: str = ""


class Seal:
    """Seals what one role sends and opens what it receives. Thread-safe; one per process and role."""

    def __init__(self, me: str, own: PrivateKey, keys: Mapping[str, PublicKey], cipher: Cipher) -> None:
        if me not in keys or keys[me].texts() != own.public.texts():
            raise AlignmentError(
                f"the private key of {me!r} does not belong to the public one that the job lists under "
                f"[security.keys.{me}]; use the key file of this party, or agree on a new job"
            )
        self._me, self._own, self._keys, self._cipher = me, own, keys, cipher
        self._lock = threading.Lock()
        self._sending: dict[str, tuple[bytes, Context]] = {}
        self._sealed: dict[str, int] = {}
        # by sender who proved to hold its key, then by process; one that was forgotten is derived again
        self._contexts: defaultdict[str, OrderedDict[bytes, Context]] = defaultdict(OrderedDict)
        self._heard: dict[str, tuple[bytes, bool]] = {}  # the sender's newest process, and whether it knows of ours
        self._refused: set[str] = set()

    def seal(self, receiver: str, body: bytes) -> bytes:
        """Return the bytes to publish; `receiver` alone can open them."""
        with self._lock:
            enc, context = self._context_to(receiver)
            sequence = self._sealed[receiver]
            self._sealed[receiver] = sequence + 1
            heard, _ = self._heard.get(receiver, (_NOBODY, False))
        prefix = _PREFIX.pack(_MAGIC, enc, heard, sequence)
        if self._own.sign is not None:
            body = self._own.sign.sign(_signed(self._me, receiver, prefix, body)) + body
        return b"".join((prefix, context.seal(sequence, prefix, body)))

    def open(self, sender: str, sealed: bytes | memoryview) -> Opened:
        """Return what `sender` sealed for us. Raises RemoteProtocolError for anything else."""
        try:
            prefix = bytes(sealed[: _PREFIX.size])
            if len(prefix) == _PREFIX.size and prefix[:3] == _MAGIC[:3] and prefix[3] != _VERSION:
                self._refused.add(sender)
                raise AnotherVersion(prefix[3], _VERSION, "seal", f"a message of {sender!r} cannot be opened: ")
            if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
                raise Unsealable("it is not sealed")
            _, enc, heard, sequence = _PREFIX.unpack(prefix)
            with self._lock:
                known = self._contexts[sender].get(enc) if sender in self._contexts else None
            context = known or self._context_of(sender, enc)
            body = context.open(sequence, prefix, memoryview(sealed)[_PREFIX.size :])
            body = self._verified(sender, prefix, body)
        except Unsealable as error:
            self._refused.add(sender)
            raise RemoteProtocolError(
                f"a message of {sender!r} cannot be opened: {error}. It was altered on the way, or the two parties do "
                "not have the same [security] in their jobs"
            ) from None
        with self._lock:
            self._remember(sender, enc, context)
            ours, _ = self._context_to(sender)
            fresh = heard == ours[:_NAME_BYTES]
            return Opened(body, enc, sequence, fresh, self._meet(sender, enc[:_NAME_BYTES], fresh), sender)

    def renew(self, receiver: str) -> None:
        """Become another process to `receiver`: nothing that it has said before is fresh any more."""
        with self._lock:
            self._sending.pop(receiver, None)

    def _remember(self, sender: str, enc: bytes, context: Context) -> None:
        """Keep the context of a sender's newest processes; called with the lock held."""
        contexts = self._contexts[sender]
        contexts[enc] = context
        contexts.move_to_end(enc)
        if len(contexts) > PROCESSES:
            contexts.popitem(last=False)

    def never_opened(self, sender: str) -> bool:
        """Return True if messages of that sender came, and none of them could be opened."""
        return sender in self._refused and sender not in self._heard

    def _meet(self, sender: str, process: bytes, fresh: bool) -> bool:
        """Remember the sender's newest process; whether it is another than before.

        One that knows of us is alive. Of those that do not, any may be an old one that the broker brought back, so
        they count only as long as there is none better. Called with the lock held.
        """
        known, was_fresh = self._heard.get(sender, (_NOBODY, False))
        if was_fresh and not fresh:
            return False
        self._heard[sender] = (process, fresh)
        return process != known

    def _context_to(self, receiver: str) -> tuple[bytes, Context]:
        """Return this process's context for sealing to `receiver`; called with the lock held."""
        if receiver not in self._sending:
            info, ephemeral = _names(self._me, receiver), X25519PrivateKey.generate()
            key = self._key_of(receiver).seal
            self._sending[receiver] = setup_sender(self._cipher, key, info, self._own.seal, ephemeral)
            self._sealed[receiver] = 0
        return self._sending[receiver]

    def _context_of(self, sender: str, enc: bytes) -> Context:
        info = _names(sender, self._me)
        return setup_receiver(self._cipher, enc, self._own.seal, info, self._key_of(sender).seal)

    def _verified(self, sender: str, prefix: bytes, body: bytes) -> bytes:
        """Return the message without its signature, if that sender signs."""
        key = self._key_of(sender).sign
        if key is None:
            return body
        signature, message = body[:_SIGNATURE_BYTES], body[_SIGNATURE_BYTES:]
        try:
            key.verify(signature, _signed(sender, self._me, prefix, message))
        except InvalidSignature:
            raise Unsealable("the signature does not fit") from None
        return message

    def _key_of(self, name: str) -> PublicKey:
        if name not in self._keys:
            raise LocalProtocolError(f"[security.keys] has no key of {name!r}")
        return self._keys[name]


def _names(sender: str, receiver: str) -> bytes:
    """Name from whom to whom, so that no key serves in another role."""
    names = (name.encode() for name in (sender, receiver))
    return b"sl_queue seal 1" + b"".join(struct.pack(">H", len(name)) + name for name in names)


def _signed(sender: str, receiver: str, prefix: bytes, body: bytes) -> bytes:
    return b"sl_queue sign 1" + _names(sender, receiver) + prefix + body
