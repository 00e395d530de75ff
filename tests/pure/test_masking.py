"""Masks commute, blinding leaves no trace, and no point that could be of use to a cheat is taken."""

import math
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.errors import RemoteProtocolError
from sl_queue.security import masking
from sl_queue.security.masking import POINT_BYTES, MaskKeys, hash_to_curve

P = 2**255 - 19
SMALL_ORDER = [  # RFC 7748's curve and its twist
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
]


def around(parties: list[MaskKeys], owner: int, texts: list[bytes]) -> list[bytes]:
    body = parties[owner].own(texts, 0)
    for other, keys in enumerate(parties):
        if other != owner:
            body = keys.masked(body)
    body = parties[owner].finished(body)
    return [body[i : i + POINT_BYTES] for i in range(0, len(body), POINT_BYTES)]


@pytest.mark.parametrize("n_parties", [2, 3, 4, 5])
def test_equal_ids_end_at_equal_points_whoever_owns_them_and_others_do_not(n_parties: int) -> None:
    parties = [MaskKeys.generate(n_parties) for _ in range(n_parties)]
    texts = [b"integer 7", b"text 7", b"", "text Ärger".encode()]
    ends = [around(parties, owner, texts) for owner in range(n_parties)]
    assert all(end == ends[0] for end in ends)
    assert len(set(ends[0])) == len(texts)


def test_with_three_parties_nobody_but_the_owner_sees_finished_points() -> None:
    parties = [MaskKeys.generate(3) for _ in range(3)]
    finished = set(around(parties, 0, [b"a", b"b"]))
    passing = parties[1].own([b"a", b"b"], 0)
    for keys in (parties[0], parties[2]):
        passing = keys.masked(passing)
        assert not finished & {passing[:POINT_BYTES], passing[POINT_BYTES:]}
        assert keys.masked(passing)[:POINT_BYTES] not in finished


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=40))
def test_a_hash_is_a_point_of_the_curve_and_not_of_its_twist(text: bytes) -> None:
    point = hash_to_curve(text)
    u = int.from_bytes(point, "little")
    assert 1 < u < P
    assert pow(u**3 + 486662 * u**2 + u, (P - 1) // 2, P) == 1
    assert hash_to_curve(text, masking._jacobi) == point  # with gmpy2 or without


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**40))
def test_the_jacobi_symbol_is_eulers_criterion(a: int) -> None:
    expected = pow(a, (P - 1) // 2, P)
    assert masking._jacobi(a, P) == (-1 if expected == P - 1 else expected)


def test_the_hash_never_changes() -> None:
    texts = b"".join(hash_to_curve(f"text {i}".encode()) for i in range(100))
    assert blake2b(texts, digest_size=8).hexdigest() == "ae7ae43d072925c3"


@pytest.mark.parametrize("u", SMALL_ORDER)
def test_a_point_of_small_order_is_refused(u: int) -> None:
    with pytest.raises(RemoteProtocolError, match="small order"):
        MaskKeys.generate(2).masked(u.to_bytes(POINT_BYTES, "little"))


def test_fillers_are_the_same_again_and_are_nobodys() -> None:
    keys = MaskKeys.generate(3)
    assert keys.own([b"a"], 5) == keys.own([b"a"], 5)
    assert keys.own([b"a"], 5)[POINT_BYTES:] != MaskKeys.generate(3).own([b"a"], 5)[POINT_BYTES:]
    assert len({keys.own([], 5)[i : i + POINT_BYTES] for i in range(0, 5 * POINT_BYTES, POINT_BYTES)}) == 5


def test_the_number_that_takes_the_blind_away_is_one_that_x25519_leaves_alone() -> None:
    for _ in range(20):
        keys = MaskKeys.generate(3)
        finish = masking._quotient(keys.mask, keys.blind)
        assert finish is not None
        number = int.from_bytes(finish, "little")
        assert number == masking._clamped(finish)
        assert (number * masking._clamped(keys.blind) - masking._clamped(keys.mask)) % masking._ORDER == 0
    assert math.gcd(8, masking._ORDER) == 1
