"""Draws that a party repeats and nobody else can: each is a function of the party's secret and of what it is for.

A row's draws are keyed by its id, not by its position or by the run: the same row gets the same draw in every epoch,
after a restart and in the next run, on a table that has grown meanwhile too. So whoever adds up epochs or runs gains
nothing. All bits come from BLAKE2 and SHAKE under 256 bits of key, so that no generator's state can be tried out.
"""

from collections.abc import Sequence
from hashlib import blake2b, shake_128

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

_PERSON = b"sl_queue draw"


def seed_secret(seed: int, party: str) -> bytes:
    """Return what stands in for a secret where one person holds all files: every party can compute it."""
    return blake2b(f"{seed} {party}".encode(), digest_size=32, person=b"sl_queue seed").digest()


def key_for(secret: bytes, party: str, purpose: str) -> bytes:
    """Return the key, 32 bytes, of all draws of a party for one purpose; different purposes never share one."""
    return blake2b(f"{len(party)} {party} {purpose}".encode(), digest_size=32, key=secret, person=_PERSON).digest()


def row_tokens(texts: Sequence[bytes], key: bytes) -> Words:
    """Return the token of each id: 64 bits that depend on the id and the key alone. One microsecond a row."""
    tokens = b"".join([blake2b(text, digest_size=8, key=key).digest() for text in texts])
    return np.frombuffer(tokens, "<u8").astype(np.uint64)


def row_words(tokens: Words, key: bytes) -> Words:
    """Return one word of 64 bits for each token, under another key: the row's draw for one purpose."""
    return row_tokens([token.tobytes() for token in tokens.astype("<u8")], key)


def uniform(words: Words) -> Floats:
    """Return numbers of (0, 1) from words of 64 bits; neither end can occur."""
    found: Floats = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return found


def normal(words: Words) -> Floats:
    """Return standard normal numbers from words of 64 bits, by the inverse of the distribution function."""
    found: Floats = torch.special.ndtri(torch.from_numpy(uniform(words))).numpy()
    return found


def normal_stream(key: bytes, count: int) -> Floats:
    """Return `count` standard normal numbers that depend on the key alone."""
    return normal(np.frombuffer(shake_128(key).digest(8 * count), "<u8").astype(np.uint64))


def normal_rows(tokens: Words, key: bytes, width: int) -> Floats:
    """Return a row of `width` standard normal numbers for each token; shape (tokens, width)."""
    streams = b"".join([shake_128(key + token.tobytes()).digest(8 * width) for token in tokens.astype("<u8")])
    return normal(np.frombuffer(streams, "<u8").astype(np.uint64)).reshape(len(tokens), width)
