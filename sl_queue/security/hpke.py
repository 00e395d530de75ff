"""Hybrid public key encryption in authenticated mode (RFC 9180): from one party's key to another's.

DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, and AES-256-GCM or ChaCha20-Poly1305; names and numbers are the RFC's. Only a
holder of the sender's private key can seal, and only the holder of the receiver's can open.
"""

import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

MODE_AUTH = 2
KEM_ID, KDF_ID = 0x0020, 0x0001
ENC_BYTES = KEY_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16

_KEM = b"KEM" + struct.pack(">H", KEM_ID)


class Cipher(StrEnum):
    """The cipher that bodies are encrypted with."""

    AES_256_GCM = "aes-256-gcm"
    CHACHA20_POLY1305 = "chacha20-poly1305"


_Aead = AESGCM | ChaCha20Poly1305
_AEAD: Final[dict[Cipher, tuple[int, Callable[[bytes], _Aead]]]] = {
    Cipher.AES_256_GCM: (0x0002, AESGCM),
    Cipher.CHACHA20_POLY1305: (0x0003, ChaCha20Poly1305),
}


class Unsealable(Exception):
    """These bytes were not sealed by that sender for this receiver, or were altered on the way."""


@dataclass(frozen=True, slots=True)
class Context:
    """One direction of one sender's process; sequence numbers must never be used twice for sealing."""

    _aead: _Aead = field(repr=False)
    _base_nonce: bytes = field(repr=False)

    def seal(self, sequence: int, associated: bytes, plaintext: bytes) -> bytes:
        """Return the ciphertext, TAG_BYTES longer than the plaintext."""
        return self._aead.encrypt(self._nonce(sequence), plaintext, associated)

    def open(self, sequence: int, associated: bytes, ciphertext: bytes | memoryview) -> bytes:
        """Return the plaintext. Raises Unsealable."""
        try:
            return self._aead.decrypt(self._nonce(sequence), ciphertext, associated)
        except InvalidTag:
            raise Unsealable("the authentication tag does not fit") from None

    def _nonce(self, sequence: int) -> bytes:
        counted = sequence.to_bytes(NONCE_BYTES, "big")
        return bytes(a ^ b for a, b in zip(self._base_nonce, counted, strict=True))


def setup_sender(
    cipher: Cipher, receiver: X25519PublicKey, info: bytes, sender: X25519PrivateKey, ephemeral: X25519PrivateKey
) -> tuple[bytes, Context]:
    """Set up the encapsulated key, and the context to seal with (SetupAuthS). `ephemeral` must be new."""
    enc = ephemeral.public_key().public_bytes_raw()
    shared = ephemeral.exchange(receiver) + sender.exchange(receiver)
    known = enc + receiver.public_bytes_raw() + sender.public_key().public_bytes_raw()
    return enc, _context(cipher, _shared_secret(shared, known), info)


def setup_receiver(
    cipher: Cipher, enc: bytes, receiver: X25519PrivateKey, info: bytes, sender: X25519PublicKey
) -> Context:
    """Set up the context to open with (SetupAuthR). Raises Unsealable for an invalid encapsulated key."""
    try:
        shared = receiver.exchange(X25519PublicKey.from_public_bytes(enc)) + receiver.exchange(sender)
    except ValueError:
        raise Unsealable("the encapsulated key is not a point of large order") from None
    known = enc + receiver.public_key().public_bytes_raw() + sender.public_bytes_raw()
    return _context(cipher, _shared_secret(shared, known), info)


def _shared_secret(shared: bytes, known: bytes) -> bytes:
    """Compute ExtractAndExpand of the KEM."""
    return _expand(_KEM, _extract(_KEM, b"", b"eae_prk", shared), b"shared_secret", known, 32)


def _context(cipher: Cipher, shared_secret: bytes, info: bytes) -> Context:
    """Compute KeySchedule, without a pre-shared key."""
    aead_id, aead = _AEAD[cipher]
    suite = b"HPKE" + struct.pack(">HHH", KEM_ID, KDF_ID, aead_id)
    hashes = _extract(suite, b"", b"psk_id_hash", b"") + _extract(suite, b"", b"info_hash", info)
    schedule = bytes([MODE_AUTH]) + hashes
    secret = _extract(suite, shared_secret, b"secret", b"")
    key = _expand(suite, secret, b"key", schedule, KEY_BYTES)
    return Context(aead(key), _expand(suite, secret, b"base_nonce", schedule, NONCE_BYTES))


def _extract(suite: bytes, salt: bytes, label: bytes, key_material: bytes) -> bytes:
    return hmac.digest(salt, b"HPKE-v1" + suite + label + key_material, "sha256")


def _expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labeled = struct.pack(">H", length) + b"HPKE-v1" + suite + label + info
    return HKDFExpand(SHA256(), length, labeled).derive(key)
