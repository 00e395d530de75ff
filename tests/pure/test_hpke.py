"""Authenticated hybrid encryption is that of RFC 9180, byte for byte, and nobody else can seal or open."""

from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.security.hpke import Cipher, Unsealable, setup_receiver, setup_sender


@dataclass(frozen=True)
class Vector:
    """A test vector of the RFC's authors (mode_auth, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256), hexadecimal."""

    cipher: Cipher
    receiver: str
    sender: str
    ephemeral: str
    enc: str
    ciphertexts: dict[int, str]


VECTORS = [
    Vector(
        Cipher.AES_256_GCM,
        receiver="47f1eee3670dfaaf27c30a83d06ee9f257af174727c17b35328ef730dfc1cd81",
        sender="98fdf9b9773578a79d4ba82fbe483c74cc2e3b8d9525d148a18969fd79a74876",
        ephemeral="805b278cabd22c9dbd461bf25771703eda4950ed3ef35b369163097899555356",
        enc="9e59f4b1fa5c876f684765290c34e51145894cc4f244342b9fb1a4bdfd8bb426",
        ciphertexts={
            0: "10b964283ac2cc0bdc4c85ab617291b446bf3832e9359b2c3a0facc50ea75a3c1afd08aeaacd6041d02eb560ec",
            1: "83b24287a5ac672289ccebf5ec303d3c0a85bc60bb7a748014d85179b51c7552ca93a70817ee3140442f92e23b",
            255: "f2783a56b5f0cac017424bbe7d29dc9cc45ea7a6050ef83c3284f5ad7bc889aab2cb46e6916a683b17b903b63e",
            256: "16bc024eb0af9037260c822d45fa786e3c259aab1b7a4a196a72c3e794e78446440ba42b531da44d3d36d0a042",
        },
    ),
    Vector(
        Cipher.CHACHA20_POLY1305,
        receiver="3ca22a6d1cda1bb9480949ec5329d3bf0b080ca4c45879c95eddb55c70b80b82",
        sender="2def0cb58ffcf83d1062dd085c8aceca7f4c0c3fd05912d847b61f3e54121f05",
        ephemeral="c94619e1af28971c8fa7957192b7e62a71ca2dcdde0a7cc4a8a9e741d600ab13",
        enc="f7674cc8cd7baa5872d1f33dbaffe3314239f6197ddf5ded1746760bfc847e0e",
        ciphertexts={
            0: "ab1a13c9d4f01a87ec3440dbd756e2677bd2ecf9df0ce7ed73869b98e00c09be111cb9fdf077347aeb88e61bdf",
            1: "3265c7807ffff7fdace21659a2c6ccffee52a26d270c76468ed74202a65478bfaedfff9c2b7634e24f10b71016",
            74: "323a32f6c87217db499ac6bda975371333f1189a618fbad68e0d8887d1c71b0520fc301f259598de1e48b1044a",
        },
    ),
]
INFO = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
PLAINTEXT = b"Beauty is truth, truth beauty"


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.cipher)
def test_it_is_the_construction_of_the_rfc(vector: Vector) -> None:
    receiver, sender, ephemeral = (
        X25519PrivateKey.from_private_bytes(bytes.fromhex(key))
        for key in (vector.receiver, vector.sender, vector.ephemeral)
    )
    enc, sealing = setup_sender(vector.cipher, receiver.public_key(), INFO, sender, ephemeral)
    opening = setup_receiver(vector.cipher, enc, receiver, INFO, sender.public_key())
    assert enc.hex() == vector.enc
    for sequence, ciphertext in vector.ciphertexts.items():
        associated = f"Count-{sequence}".encode()
        assert sealing.seal(sequence, associated, PLAINTEXT).hex() == ciphertext, sequence
        assert opening.open(sequence, associated, bytes.fromhex(ciphertext)) == PLAINTEXT


ALICE, BOB, EVE = (X25519PrivateKey.generate() for _ in range(3))


@pytest.mark.parametrize("cipher", list(Cipher))
def test_only_the_sender_seals_and_only_the_receiver_opens(cipher: Cipher) -> None:
    enc, sealing = setup_sender(cipher, BOB.public_key(), b"", ALICE, X25519PrivateKey.generate())
    sealed = sealing.seal(0, b"", PLAINTEXT)
    assert setup_receiver(cipher, enc, BOB, b"", ALICE.public_key()).open(0, b"", sealed) == PLAINTEXT
    for receiver, info, sender in (
        (EVE, b"", ALICE),  # not the receiver
        (BOB, b"", EVE),  # not that sender
        (BOB, b"elsewhere", ALICE),  # not in that role
    ):
        with pytest.raises(Unsealable):
            setup_receiver(cipher, enc, receiver, info, sender.public_key()).open(0, b"", sealed)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=20), st.integers(0, 2**64 - 1), st.data())
def test_any_altered_bit_is_noticed(plaintext: bytes, associated: bytes, sequence: int, data: st.DataObject) -> None:
    enc, sealing = setup_sender(Cipher.AES_256_GCM, BOB.public_key(), b"", ALICE, X25519PrivateKey.generate())
    opening = setup_receiver(Cipher.AES_256_GCM, enc, BOB, b"", ALICE.public_key())
    sealed = bytearray(sealing.seal(sequence, associated, plaintext))
    assert opening.open(sequence, associated, bytes(sealed)) == plaintext
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Unsealable):
        opening.open(sequence, associated, bytes(sealed))
    with pytest.raises(Unsealable):
        opening.open(sequence ^ 1, associated, sealing.seal(sequence, associated, plaintext))


def test_an_encapsulated_key_of_small_order_is_refused() -> None:
    for enc in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(Unsealable):
            setup_receiver(Cipher.AES_256_GCM, enc, BOB, b"", X25519PublicKey.from_public_bytes(b"\x09" + bytes(31)))


def test_a_context_never_shows_its_key() -> None:
    _, context = setup_sender(Cipher.AES_256_GCM, BOB.public_key(), b"", ALICE, X25519PrivateKey.generate())
    assert repr(context) == "Context()"
