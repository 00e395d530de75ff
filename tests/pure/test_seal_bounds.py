"""Bounds of what a seal remembers of its peers; what it forgot is not believed again."""

import tracemalloc

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.codec import AnotherVersion
from sl_queue.security.hpke import Cipher, setup_sender
from sl_queue.security.keys import PrivateKey
from sl_queue.security.replays import ReplayFilter
from sl_queue.security.sealing import _MAGIC, _NOBODY, _PREFIX, PROCESSES, Seal, _names

OWN = {name: PrivateKey.generate(signs=False) for name in ("bank", "insurer", "scheduler")}
PUBLIC = {name: key.public for name, key in OWN.items()}


def process(name: str) -> Seal:
    return Seal(name, OWN[name], PUBLIC, Cipher.AES_256_GCM)


def under_a_fresh_key(sender: str, receiver: str, body: bytes, heard: bytes = _NOBODY) -> bytes:
    """Seal a message as a process does that was never heard of before."""
    enc, context = setup_sender(
        Cipher.AES_256_GCM, PUBLIC[receiver].seal, _names(sender, receiver), OWN[sender].seal,
        X25519PrivateKey.generate(),
    )  # fmt: skip
    prefix = _PREFIX.pack(_MAGIC, enc, heard, 0)
    return prefix + context.seal(0, prefix, body)


def test_a_receiver_remembers_a_few_processes_of_a_sender_however_many_it_makes_up() -> None:
    insurer, news = process("insurer"), ReplayFilter()
    insurer.open("scheduler", process("scheduler").seal("insurer", b""))
    sealed = [under_a_fresh_key("bank", "insurer", b"x") for _ in range(500)]
    for each in sealed[:50]:
        news.is_new(insurer.open("bank", each), "alive")
    tracemalloc.start()
    for each in sealed[50:]:
        news.is_new(insurer.open("bank", each), "alive")
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 100_000
    assert len(insurer._contexts["bank"]) == PROCESSES
    assert len(insurer._contexts["scheduler"]) == 1, "of others nothing is forgotten"


def test_what_an_old_process_sealed_is_still_opened_and_a_live_one_is_never_forgotten() -> None:
    insurer, live, old = process("insurer"), process("bank"), under_a_fresh_key("bank", "insurer", b"old")
    insurer.open("bank", old)
    for _ in range(3 * PROCESSES):
        insurer.open("bank", under_a_fresh_key("bank", "insurer", b"x"))
        assert insurer.open("bank", live.seal("insurer", b"live")).body == b"live"
    assert insurer.open("bank", old).body == b"old"


def test_no_old_command_counts_as_new_when_its_process_was_forgotten() -> None:
    bank = process("bank")
    news = ReplayFilter(bank)
    first = process("scheduler")
    first.open("bank", bank.seal("scheduler", b"joined"))
    command = first.seal("bank", b"stop")
    assert news.is_new(bank.open("scheduler", command), "command")
    for _ in range(PROCESSES):
        later = process("scheduler")
        later.open("bank", bank.seal("scheduler", b"joined"))
        assert news.is_new(bank.open("scheduler", later.seal("bank", b"start")), "command")
    assert first not in (later,)
    for _ in range(2):
        assert not news.is_new(bank.open("scheduler", command), "command"), "it was said before"


def test_a_scheduler_that_was_restarted_many_times_is_believed_once_it_has_heard_of_this_process() -> None:
    bank = process("bank")
    news = ReplayFilter(bank)
    for restart in range(4 * PROCESSES):
        scheduler = process("scheduler")
        bank.open("scheduler", scheduler.seal("bank", b"alive"))
        for _ in range(2):  # a report is answered by a sign of life, and that by a report
            scheduler.open("bank", bank.seal("scheduler", b"joined"))
            bank.open("scheduler", scheduler.seal("bank", b"alive"))
        opened = bank.open("scheduler", scheduler.seal("bank", b"start"))
        assert opened.fresh
        assert news.is_new(opened, "command"), restart


def test_a_seal_of_another_version_is_told_from_garbage() -> None:
    sealed = bytearray(process("bank").seal("insurer", b"x"))
    sealed[3] = 2
    with pytest.raises(AnotherVersion, match="seal version 2; this program speaks 1"):
        process("insurer").open("bank", bytes(sealed))
    with pytest.raises(RemoteProtocolError, match="is not sealed"):
        process("insurer").open("bank", b"SLQ\x02")
