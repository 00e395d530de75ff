"""Short digests of what a run depends on, as fingerprints hold them."""

from hashlib import blake2b

DIGEST_BYTES = 8


def digest_of(body: bytes | memoryview) -> str:
    """Return a short digest of bytes, hexadecimal."""
    digest = digest_begun()
    digest.update(body)
    return digest.hexdigest()


def digest_begun() -> blake2b:
    """Return the digest of nothing yet, to be updated with bytes."""
    return blake2b(digest_size=DIGEST_BYTES)
