"""The keys with which parties seal and sign: private ones in a file of their own, public ones in the job.

A key file is PEM (PKCS #8): one X25519 key, and for the scheduler an Ed25519 key with which it signs its commands.
"""

import os
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from sl_queue.errors import JobError
from sl_queue.security.private_file import read_secret

_END = b"-----END PRIVATE KEY-----\n"
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public keys of a party: for sealing to it, and for checking what it signed."""

    seal: X25519PublicKey
    sign: Ed25519PublicKey | None = None

    @classmethod
    def parse(cls, seal: str, sign: str | None = None) -> "PublicKey":
        """Parse the base64 text that stands in the job. ValueError says what is wrong with it."""
        verifying = None if sign is None else Ed25519PublicKey.from_public_bytes(_raw(sign))
        return cls(X25519PublicKey.from_public_bytes(_raw(seal)), verifying)

    def texts(self) -> dict[str, str]:
        """Return it as it stands in the job, under [security.keys.<party>]."""
        texts = {"seal": b64encode(self.seal.public_bytes_raw()).decode()}
        if self.sign is not None:
            texts["sign"] = b64encode(self.sign.public_bytes_raw()).decode()
        return texts


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """The private keys of a party, which it alone knows."""

    seal: X25519PrivateKey = field(repr=False)
    sign: Ed25519PrivateKey | None = field(default=None, repr=False)

    @classmethod
    def generate(cls, *, signs: bool) -> "PrivateKey":
        return cls(X25519PrivateKey.generate(), Ed25519PrivateKey.generate() if signs else None)

    @classmethod
    def parse(cls, pem: bytes) -> "PrivateKey":
        """Parse the contents of a key file. ValueError says what is wrong with them, and shows nothing of them."""
        sealing, signing = None, None
        for block in pem.split(_END)[:-1]:
            try:
                key = load_pem_private_key(block + _END, password=None)
            except (ValueError, TypeError):
                raise ValueError("not a private key in PEM (PKCS #8, without a password)") from None
            if isinstance(key, X25519PrivateKey):
                sealing = key
            elif isinstance(key, Ed25519PrivateKey):
                signing = key
        if sealing is None:
            raise ValueError("no X25519 private key in PEM")
        return cls(sealing, signing)

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.seal.public_key(), None if self.sign is None else self.sign.public_key())

    def pem(self) -> bytes:
        """Return the contents of the key file."""
        keys = (self.seal,) if self.sign is None else (self.seal, self.sign)
        return b"".join(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) for key in keys)


def read_key(path: Path) -> PrivateKey:
    """Return the keys in a file. Raises JobError if there are none, or if others on this machine may read them."""
    try:
        text = read_secret(path, "private key")
    except OSError as error:
        raise JobError(f"{path}: the private key cannot be read ({error.strerror})") from None
    try:
        return PrivateKey.parse(text)
    except ValueError as error:
        raise JobError(f"{path}: {error}; make a key with `sl-queue key`") from None


def write_key(path: Path, key: PrivateKey) -> None:
    """Write a new key file that only its owner may read. Raises JobError rather than overwrite one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise JobError(f"{path}: there is a key already; move it away first") from None
    except OSError as error:
        raise JobError(f"{path}: the private key cannot be written ({error.strerror})") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.pem())


def _raw(text: str) -> bytes:
    raw = b64decode(text, validate=True)
    if len(raw) != _KEY_BYTES:
        raise ValueError(f"{len(raw)} bytes; a public key has {_KEY_BYTES}")
    return raw
