"""Masks for ids that commute: points of Curve25519 times secret numbers, by X25519 of `cryptography`.

An id is hashed to a point by try-and-increment, the twist of the curve left out, and multiplied by one secret of each
party; the order does not matter, so equal ids end at equal points, and who lacks one of the secrets can tell nothing.
X25519 refuses points of small order, whose products say nothing of a secret.

With three parties or more the last to multiply would know finished points of others. So an owner begins with a number
of its own, `blind`, and when its points come back multiplies by `finish`, which takes that number away and puts its
mask in its place: finish = mask / blind modulo the order of the group. X25519 forces some bits of every secret, so
`blind` is drawn until `finish` has them by itself, twice on average.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from sl_queue.errors import RemoteProtocolError

POINT_BYTES = 32

_P = 2**255 - 19
_A = 486662  # of y**2 = x**3 + A x**2 + x
_ORDER = 2**252 + 27742317777372353535851937790883648493  # of the group that all products lie in
_TOP = 2**254  # the bit that X25519 sets
_TRIES = 256
_PERSON = b"sl_queue psi v1"
_PAUSE = 500  # points between two calls of `pulse`


def _jacobi(a: int, n: int) -> int:
    """Compute the Jacobi symbol by the binary algorithm, three times as fast as Euler's criterion by pow."""
    sign = 1
    a %= n
    while a:
        twos = (a & -a).bit_length() - 1
        a >>= twos
        if twos & 1 and n & 7 in (3, 5):
            sign = -sign
        if a & 3 == 3 and n & 3 == 3:
            sign = -sign
        a, n = n % a, a
    return sign if n == 1 else 0


try:  # the extra "psi": the same symbol, six times as fast
    from gmpy2 import jacobi
except ImportError:
    jacobi = _jacobi


def hash_to_curve(text: bytes, symbol: Callable[[int, int], int] = jacobi) -> bytes:
    """Return the u-coordinate of a point of the curve, never of its twist; the first try is right half of the time."""
    for counter in range(_TRIES):
        digest = blake2b(text, digest_size=POINT_BYTES, person=_PERSON, salt=bytes([counter])).digest()
        u = int.from_bytes(digest, "little") >> 1
        if 1 < u < _P and symbol((u * u * u + _A * u * u + u) % _P, _P) == 1:
            return u.to_bytes(POINT_BYTES, "little")
    raise AssertionError("a hash without a point: 2**-256")


@dataclass(frozen=True, slots=True)
class MaskKeys:
    """The secrets of one party for one alignment."""

    mask: bytes = field(repr=False)  # what every set is multiplied by
    blind: bytes = field(repr=False)  # what the own set is multiplied by before it leaves; with two parties, the mask
    pad: bytes = field(repr=False)  # what points that stand for nobody are derived from

    @classmethod
    def generate(cls, parties: int) -> "MaskKeys":
        """Draw new secrets for an alignment of so many parties."""
        mask = secrets.token_bytes(POINT_BYTES)
        blind = mask
        while parties > 2:
            blind = secrets.token_bytes(POINT_BYTES)
            if _quotient(mask, blind) is not None:
                break
        return cls(mask, blind, secrets.token_bytes(POINT_BYTES))

    def own(self, texts: Iterable[bytes], fillers: int, pulse: Callable[[int], None] = lambda _: None) -> bytes:
        """Hash ids and multiply them for their way, in their order, and so many points that stand for nobody after.

        `pulse` is called now and then with how many are done.
        """
        times, out = _times(self.blind), BytesIO()
        pads = (blake2b(str(i).encode(), digest_size=32, key=self.pad).digest() for i in range(fillers))
        done = 0
        for source in (texts, pads):
            for text in source:
                out.write(times(hash_to_curve(text)))
                done += 1
                if done % _PAUSE == 0:
                    pulse(done)
        return out.getvalue()

    def masked(self, points: bytes | memoryview, pulse: Callable[[int], None] = lambda _: None) -> bytes:
        """Multiply another party's points, in their order. Raises RemoteProtocolError for a point of small order."""
        return _product(self.mask, points, pulse)

    def finished(self, points: bytes | memoryview, pulse: Callable[[int], None] = lambda _: None) -> bytes:
        """Turn own points that all others have multiplied into those that all parties agree on."""
        if self.blind == self.mask:
            return bytes(points)
        finish = _quotient(self.mask, self.blind)
        assert finish is not None
        return _product(finish, points, pulse)


def _times(secret: bytes) -> Callable[[bytes], bytes]:
    exchange, load = X25519PrivateKey.from_private_bytes(secret).exchange, X25519PublicKey.from_public_bytes
    return lambda point: exchange(load(point))


def _product(secret: bytes, points: bytes | memoryview, pulse: Callable[[int], None]) -> bytes:
    times, out = _times(secret), BytesIO()
    try:
        for count, first in enumerate(range(0, len(points), POINT_BYTES), 1):
            out.write(times(bytes(points[first : first + POINT_BYTES])))
            if count % _PAUSE == 0:
                pulse(count)
    except ValueError:
        raise RemoteProtocolError("a masked id is a point of small order; the party that sent it is at fault") from None
    return out.getvalue()


def _clamped(secret: bytes) -> int:
    """Return the number that X25519 makes of 32 bytes."""
    return (int.from_bytes(secret, "little") & (_TOP - 8)) | _TOP


def _quotient(mask: bytes, blind: bytes) -> bytes | None:
    """Return bytes that X25519 takes for mask / blind; None if there are none."""
    target = _clamped(mask) * pow(_clamped(blind), -1, _ORDER)
    eighths = (target - _TOP) * pow(8, -1, _ORDER) % _ORDER
    if eighths >= _TOP // 8:
        return None
    return (_TOP + 8 * eighths).to_bytes(POINT_BYTES, "little")
