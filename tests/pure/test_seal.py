"""Sealed messages: the receiver opens what was sealed for it and nothing else, whoever was restarted in between."""

import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.errors import AlignmentError, JobError, RemoteProtocolError
from sl_queue.security.hpke import Cipher, setup_receiver
from sl_queue.security.keys import PrivateKey, PublicKey, read_key, write_key
from sl_queue.security.replays import ReplayFilter
from sl_queue.security.sealing import _MAGIC, _PREFIX, OVERHEAD_BYTES, Seal, _names

NAMES = ("bank", "insurer", "scheduler")
OWN = {name: PrivateKey.generate(signs=name == "scheduler") for name in NAMES}
PUBLIC = {name: key.public for name, key in OWN.items()}


def process(name: str, cipher: Cipher = Cipher.AES_256_GCM) -> Seal:
    return Seal(name, OWN[name], PUBLIC, cipher)


@pytest.mark.parametrize("cipher", list(Cipher))
@pytest.mark.parametrize("sender", ["bank", "scheduler"])
def test_what_is_sealed_is_opened_by_the_receiver_and_reads_like_noise(cipher: Cipher, sender: str) -> None:
    body = b"the same thousand bytes" * 50
    sealed = process(sender, cipher).seal("insurer", body)
    assert process("insurer", cipher).open(sender, sealed).body == body
    assert b"thousand" not in sealed and sender.encode() not in sealed
    assert len(sealed) - len(body) <= OVERHEAD_BYTES


def test_a_restarted_receiver_opens_what_the_broker_delivers_again() -> None:
    bank = process("bank")
    sealed = [bank.seal("insurer", b"%d" % n) for n in range(5)]
    insurer = process("insurer")
    assert [insurer.open("bank", s).body for s in sealed] == [b"0", b"1", b"2", b"3", b"4"]
    again = process("insurer")
    assert [again.open("bank", s).body for s in reversed(sealed)] == [b"4", b"3", b"2", b"1", b"0"]


def test_a_restarted_sender_never_uses_a_key_and_counter_again() -> None:
    seen = set()
    for _ in range(3):
        bank = process("bank")
        for receiver in ("insurer", "scheduler"):
            seen |= {bank.seal(receiver, b"same")[:52] for _ in range(4)}
    assert len(seen) == 3 * 2 * 4


def test_threads_that_seal_together_never_share_a_counter() -> None:
    bank, insurer = process("bank"), process("insurer")
    sealed: list[bytes] = []

    def seal_many() -> None:
        sealed.extend(bank.seal("insurer", b"x") for _ in range(200))

    threads = [threading.Thread(target=seal_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened = [insurer.open("bank", s) for s in sealed]
    assert sorted(o.sequence for o in opened) == list(range(800))
    assert len({o.process for o in opened}) == 1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.data())
def test_an_altered_cut_or_invented_message_is_rejected_with_a_clear_error(body: bytes, data: st.DataObject) -> None:
    sealed = bytearray(process("scheduler").seal("bank", body))
    match data.draw(st.sampled_from(["edit", "cut", "add", "forge", "invent"])):
        case "edit":
            sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del sealed[data.draw(st.integers(0, len(sealed) - 1)) :]
        case "add":
            sealed += data.draw(st.binary(min_size=1, max_size=20))
        case "forge":  # in the right form, with any keys and numbers
            enc, heard = data.draw(st.binary(min_size=32, max_size=32)), data.draw(st.binary(min_size=8, max_size=8))
            prefix = _PREFIX.pack(_MAGIC, enc, heard, data.draw(st.integers(0, 2**64 - 1)))
            sealed = bytearray(prefix + data.draw(st.binary(max_size=200)))
        case _:
            sealed = bytearray(data.draw(st.binary(max_size=200)))
    with pytest.raises(RemoteProtocolError, match=r"a message of 'scheduler' cannot be opened"):
        process("bank").open("scheduler", bytes(sealed))


def test_a_message_opens_at_its_receiver_only_and_only_as_from_its_sender() -> None:
    sealed = process("bank").seal("insurer", b"activation")
    for receiver, sender in (("scheduler", "bank"), ("insurer", "scheduler"), ("bank", "bank"), ("bank", "insurer")):
        with pytest.raises(RemoteProtocolError):
            process(receiver).open(sender, sealed)


def test_who_stole_a_partys_key_still_cannot_command_it() -> None:
    """With it he can seal to that party as if he were anybody, as with any such encryption; so commands are signed."""
    ephemeral = X25519PrivateKey.generate()
    enc = ephemeral.public_key().public_bytes_raw()
    forger = setup_receiver(
        Cipher.AES_256_GCM, enc, OWN["bank"].seal, _names("scheduler", "bank"), PUBLIC["scheduler"].seal
    )
    prefix = _PREFIX.pack(_MAGIC, enc, bytes(8), 0)
    forged = prefix + forger.seal(0, prefix, bytes(64) + b"stop")
    unsigned = {**PUBLIC, "scheduler": PublicKey(PUBLIC["scheduler"].seal)}
    assert Seal("bank", OWN["bank"], unsigned, Cipher.AES_256_GCM).open("scheduler", forged).body.endswith(b"stop")
    with pytest.raises(RemoteProtocolError, match="signature"):
        process("bank").open("scheduler", forged)


def test_a_key_that_is_not_the_one_in_the_job_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(AlignmentError, match=r"the private key of 'bank' .* \[security.keys.bank\]"):
        Seal("bank", PrivateKey.generate(signs=False), PUBLIC, Cipher.AES_256_GCM)


def test_parties_that_do_not_have_the_same_keys_in_their_jobs_can_be_told_from_a_broker_that_edits() -> None:
    other = {**PUBLIC, "bank": PrivateKey.generate(signs=False).public}
    insurer = Seal("insurer", OWN["insurer"], other, Cipher.AES_256_GCM)
    assert not insurer.never_opened("bank")
    with pytest.raises(RemoteProtocolError):
        insurer.open("bank", process("bank").seal("insurer", b""))
    assert insurer.never_opened("bank")
    honest, bank = process("insurer"), process("bank")
    honest.open("bank", bank.seal("insurer", b""))
    with pytest.raises(RemoteProtocolError):
        honest.open("bank", bank.seal("insurer", b"")[:-1])
    assert not honest.never_opened("bank")


# Statements about the moment --------------------------------------------------------------------------------------


def test_two_processes_know_of_each_other_after_each_has_spoken() -> None:
    bank, scheduler = process("bank"), process("scheduler")
    first = scheduler.open("bank", bank.seal("scheduler", b"joined"))
    assert (first.fresh, first.met) == (False, True)
    answer = bank.open("scheduler", scheduler.seal("bank", b"alive"))
    assert (answer.fresh, answer.met) == (True, True)
    second = scheduler.open("bank", bank.seal("scheduler", b"joined"))
    assert (second.fresh, second.met) == (True, False)


def test_nothing_said_to_an_earlier_process_is_fresh_for_a_later_one() -> None:
    bank, scheduler = process("bank"), process("scheduler")
    bank.open("scheduler", scheduler.seal("bank", b"alive"))
    old = bank.seal("scheduler", b"joined")
    assert scheduler.open("bank", old).fresh
    assert not process("scheduler").open("bank", old).fresh


@pytest.mark.parametrize("restarted", ["bank", "scheduler"])
def test_after_a_restart_they_know_of_each_other_again_whatever_the_broker_brings_back(restarted: str) -> None:
    live = {"bank": process("bank"), "scheduler": process("scheduler")}

    def say(sender: str, receiver: str) -> bool:
        return live[receiver].open(sender, live[sender].seal(receiver, b"alive")).fresh

    say("bank", "scheduler")
    assert say("scheduler", "bank") and say("bank", "scheduler")
    pairs = (("bank", "scheduler"), ("scheduler", "bank"))
    stale = {(sender, receiver): live[sender].seal(receiver, b"") for sender, receiver in pairs}
    live[restarted] = process(restarted)
    for (sender, receiver), sealed in stale.items():
        live[receiver].open(sender, sealed)
    say("bank", "scheduler")
    say("scheduler", "bank")
    for (sender, receiver), sealed in stale.items():
        live[receiver].open(sender, sealed)
    say("bank", "scheduler")
    assert say("scheduler", "bank") and say("bank", "scheduler")


def test_a_statement_is_news_once_and_an_older_one_never_again() -> None:
    bank, scheduler, news = process("bank"), process("scheduler"), ReplayFilter()
    first, second = (scheduler.open("bank", bank.seal("scheduler", b"")) for _ in range(2))
    restarted = scheduler.open("bank", process("bank").seal("scheduler", b""))
    assert news.is_new(second, "joined")
    assert not news.is_new(second, "joined") and not news.is_new(first, "joined")
    assert news.is_new(first, "progress")
    assert news.is_new(restarted, "joined")
    news.forget()
    assert news.is_new(first, "joined")


# Key files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", [False, True])
def test_a_key_file_gives_back_the_key_and_only_its_owner_may_read_it(tmp_path: Path, signs: bool) -> None:
    key, path = PrivateKey.generate(signs=signs), tmp_path / "a.key"
    write_key(path, key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path).public.texts() == key.public.texts()
    assert PublicKey.parse(**key.public.texts()).texts() == key.public.texts()
    assert "seal" not in repr(key)
    with pytest.raises(JobError, match="there is a key already"):
        write_key(path, key)
    path.chmod(0o640)
    with pytest.raises(JobError, match="chmod 600"):
        read_key(path)


def test_a_file_that_is_no_key_file_is_refused_without_showing_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    for text in ("", "secret", "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n"):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(JobError) as refused:
            read_key(path)
        assert "secret" not in str(refused.value) and str(path) in str(refused.value)
    with pytest.raises(JobError, match="cannot be read"):
        read_key(tmp_path / "none.key")


@pytest.mark.parametrize("text", ["", "bm8=", "!!!"])
def test_a_public_key_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        PublicKey.parse(text)
