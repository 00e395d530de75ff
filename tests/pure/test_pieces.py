"""Messages in pieces: whole or not at all."""

import random

from hypothesis import given
from hypothesis import strategies as st

from sl_queue.protocol.pieces import Assembly, pieces


@given(st.binary(max_size=50), st.integers(1, 60))
def test_what_was_cut_is_put_together(body: bytes, most: int) -> None:
    assembly = Assembly()
    *before, last = [assembly.add(piece) for piece in pieces(b"sender 1", 7, body, most)]
    assert last == body
    assert not any(before)


def test_senders_do_not_mix_and_a_gap_gives_nothing() -> None:
    assembly = Assembly()
    one, two = (list(pieces(name, 0, name * 4, 10)) for name in (b"sender 1", b"sender 2"))
    found = [assembly.add(piece) for pair in zip(one, two, strict=True) for piece in pair]
    assert [each for each in found if each] == [b"sender 1" * 4, b"sender 2" * 4]
    assert not any(assembly.add(piece) for piece in (one[0], one[2], one[3]))


def test_noise_is_nothing() -> None:
    assembly, chance = Assembly(), random.Random(1)
    whole = list(pieces(b"sender 1", 0, bytes(100), 10))
    for _ in range(10_000):
        piece = bytearray(chance.choice(whole))
        piece[chance.randrange(len(piece))] ^= 1 << chance.randrange(8)
        assembly.add(bytes(piece[: chance.randrange(len(piece))]))
    assert [assembly.add(piece) for piece in pieces(b"sender 3", 1, b"right" * 5, 10)][-1] == b"right" * 5
