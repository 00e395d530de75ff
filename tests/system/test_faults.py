"""Faults of real workers at a real broker: each changes no bit or is named."""

import ast
import itertools
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from sl_queue.errors import PeerFailed
from sl_queue.testing.proxy import Proxy
from sl_queue.transport.rabbitmq.address import Address
from tests.support.broker import Broker, own_broker
from tests.support.credit import edit
from tests.support.crew import (
    QUEUES,
    ROLES,
    Crew,
    limit_file_size,
    obey_rights,
    quiet_weights,
    with_heartbeat,
    write_job,
)

PARTIES = ("bank", "insurer")
EXIT_CHECKPOINT = 4


@pytest.fixture
def crew(tmp_path: Path, broker_url: str) -> Iterator[Crew]:
    write_job(tmp_path)
    with Crew(tmp_path, broker_url) as crew:
        yield crew


def nobody_repeated_a_step(crew: Crew, *roles: str) -> None:
    for role in roles:
        for steps in crew.steps(role):
            assert steps == sorted(set(steps)), role


# Killed -----------------------------------------------------------------------------------------------------------


def test_a_worker_killed_again_and_again_before_it_has_a_checkpoint_still_gets_there(
    tmp_path: Path, broker_url: str
) -> None:
    write_job(tmp_path, checkpoint_every=1000)  # only the end of an epoch, every 5 steps, is a checkpoint
    with Crew(tmp_path, broker_url) as crew:
        crew.start()
        for _ in range(6):
            begun = len(crew.steps("bank"))
            crew.await_first_step("bank")
            crew.kill("bank")
            crew.start("bank")
            assert len(crew.steps("bank")) == begun + 1
        crew.finish()
        assert crew.weights() == quiet_weights()
        nobody_repeated_a_step(crew, "insurer")


def test_everything_killed_at_once_and_started_again_in_any_order_goes_on(crew: Crew) -> None:
    crew.start()
    for number, order in enumerate(itertools.permutations(ROLES)):
        crew.await_step("insurer", 4 * number + 2)
        for role in ROLES:
            crew.kill(role)
        crew.start(*order)
    crew.finish()
    assert crew.weights() == quiet_weights()
    assert crew.generation() == 0


def test_without_a_scheduler_the_parties_train_to_the_end_of_the_open_epochs_and_say_whom_they_wait_for(
    crew: Crew,
) -> None:
    crew.start()
    crew.await_step("insurer", 2)
    crew.kill("scheduler")
    crew.await_step("bank", 9)  # the second epoch was open
    for party in PARTIES:
        crew.await_log(party, "s for the scheduler's word")
    crew.start("scheduler")
    crew.finish()
    assert crew.weights() == quiet_weights()
    assert len((crew.states / "scheduler" / "history.jsonl").read_text().splitlines()) == 8
    nobody_repeated_a_step(crew, *PARTIES)


def test_a_zombie_that_wakes_up_after_its_replacement_took_over_changes_nothing(crew: Crew) -> None:
    """Frozen longer than the heartbeat; its replacement works on a copy of the state, as on another machine."""
    slow(crew.folder / "bank.py", seconds=0.05)
    zombie = crew.folder / "zombie"
    crew.start("scheduler", "insurer")
    crew.start("bank", url=with_heartbeat(crew.url, 1), state=zombie)
    crew.await_step("bank", 6)
    crew.signal("bank", signal.SIGSTOP)
    shutil.copytree(zombie, crew.states / "bank")
    frozen = crew.disown("bank")
    crew.start("bank")
    crew.await_step("bank", 15)
    os.kill(frozen.pid, signal.SIGCONT)
    crew.finish()
    assert crew.weights() == quiet_weights()
    nobody_repeated_a_step(crew, "insurer")
    assert not (zombie / "final" / "run.json").exists()


def slow(model: Path, seconds: float) -> None:
    """Slow a forward down without changing what it computes."""
    edit(
        model,
        "        return self.relu",
        f"        import time\n\n        time.sleep({seconds})\n        return self.relu",
    )


def test_a_party_twenty_times_slower_than_the_others_is_waited_for(tmp_path: Path, broker_url: str) -> None:
    write_job(tmp_path)
    slow(tmp_path / "bank.py", seconds=0.06)
    with Crew(tmp_path, broker_url) as crew:
        crew.start()
        crew.finish()
        assert crew.weights() == quiet_weights()
        assert crew.generation() == 0


# The broker -------------------------------------------------------------------------------------------------------


def test_a_broker_that_takes_no_messages_is_named_and_waited_for(crew: Crew, private_broker: Broker) -> None:
    slow(crew.folder / "bank.py", seconds=0.05)
    crew.start()
    crew.await_step("insurer", 6)
    private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)")  # as if its memory were used up
    try:
        for party in PARTIES:
            crew.await_log(party, "the broker takes no messages")
    finally:
        private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")
    crew.finish()
    assert crew.weights() == quiet_weights()
    nobody_repeated_a_step(crew, *PARTIES)


def test_a_broker_killed_and_started_again_rolls_nobody_back(crew: Crew, private_broker: Broker) -> None:
    if QUEUES == "quorum":  # one that is younger than about two seconds does not survive its broker
        slow(crew.folder / "bank.py", seconds=0.1)
    crew.start()
    crew.await_step("insurer", 20 if QUEUES == "quorum" else 6)
    private_broker.restart()
    crew.finish()
    assert crew.weights() == quiet_weights()
    assert crew.generation() == 0
    nobody_repeated_a_step(crew, *PARTIES)


def test_a_broker_that_lost_its_data_rolls_nobody_back(crew: Crew, private_broker: Broker) -> None:
    crew.start()
    crew.await_step("insurer", 6)
    private_broker.kill()
    private_broker.wipe()
    private_broker.start()
    crew.finish()
    assert crew.weights() == quiet_weights()
    assert crew.generation() == 0
    nobody_repeated_a_step(crew, *PARTIES)


@pytest.mark.parametrize("victims", [("bank",), ROLES], ids=" and ".join)
def test_a_broker_and_workers_lost_together_change_no_weight(
    crew: Crew, private_broker: Broker, victims: tuple[str, ...]
) -> None:
    crew.start()
    crew.await_step("insurer", 10)
    private_broker.kill()
    private_broker.wipe()
    for role in victims:
        crew.kill(role)
    private_broker.start()
    crew.start(*victims)
    crew.finish()
    assert crew.weights() == quiet_weights()


@pytest.mark.parametrize("victim", PARTIES)
def test_a_purged_queue_changes_no_weight(crew: Crew, victim: str) -> None:
    crew.start()
    crew.await_step("insurer", 10)
    crew.kill(victim)  # what it had not acknowledged is back in its queues
    purge(crew.url, f"q.{victim}.bank", f"q.{victim}.insurer", f"q.{victim}.scheduler")
    crew.start(victim)
    crew.finish()
    assert crew.weights() == quiet_weights()


def purge(url: str, *queues: str) -> None:
    connection = pika.BlockingConnection([node.parameters("purge") for node in Address.parse(url)])
    for queue in queues:
        if "bank.bank" not in queue and "insurer.insurer" not in queue:
            connection.channel().queue_purge(queue)
    connection.close()


def test_a_run_moves_to_another_broker_when_its_workers_are_started_with_its_url(crew: Crew, unique: str) -> None:
    other = own_broker()
    if other is None:
        pytest.skip("a broker of our own is needed beside the given one")
    with other:
        crew.start()
        crew.await_step("insurer", 10)
        for role in ROLES:
            crew.kill(role)
        crew.start(url=other.url(unique))
        crew.finish()
    assert crew.weights() == quiet_weights()


# The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", PARTIES)
def test_a_connection_cut_in_the_middle_of_a_publish_again_and_again_rolls_nobody_back(
    crew: Crew, private_broker: Broker, victim: str
) -> None:
    with Proxy(private_broker.port) as proxy:
        crew.start(*(role for role in ROLES if role != victim))
        crew.start(victim, url=proxy.url(crew.url))
        for number in range(5):
            crew.await_step(victim, 6 * number)
            proxy.cut_after_bytes = 2500 + 1111 * number  # an activation of 16 rows has 2048 bytes, and its header
        crew.finish()
        assert proxy.accepted >= 5
    assert crew.weights() == quiet_weights()
    assert crew.generation() == 0
    nobody_repeated_a_step(crew, *PARTIES)


def test_a_half_open_connection_is_noticed_and_rolls_nobody_back(crew: Crew, private_broker: Broker) -> None:
    with Proxy(private_broker.port) as proxy:
        crew.start("insurer", "scheduler")
        crew.start("bank", url=proxy.url(with_heartbeat(crew.url, 1)))
        crew.await_step("bank", 6)
        proxy.stall()
        crew.await_log("bank", "lost the broker")
        proxy.resume()
        crew.finish()
    assert crew.weights() == quiet_weights()
    assert crew.generation() == 0
    nobody_repeated_a_step(crew, *PARTIES)


# The disk ---------------------------------------------------------------------------------------------------------


def killed_after(crew: Crew, step: int, *victims: str) -> None:
    crew.start()
    crew.await_step("bank", step)
    for role in victims:
        crew.kill(role)


def everybody_else_was_told(crew: Crew, reason: str) -> bool:
    """Return True if the scheduler and the other party end with the failed party's code, and both say why."""
    assert crew.wait("scheduler") == crew.wait("insurer") == PeerFailed.exit_code
    said = [crew.log(role) for role in ("scheduler", "insurer")]
    return all("party 'bank': the state folder" in text and reason in text for text in said)


def test_a_full_disk_ends_the_run_with_4_and_the_checkpoint_before_survives(crew: Crew) -> None:
    killed_after(crew, 10, *ROLES)
    size = crew.checkpoints("bank")[-1].stat().st_size
    before = {path.name: path.read_bytes() for path in crew.checkpoints("bank")}
    crew.start("insurer", "scheduler")
    crew.start("bank", prepare=(limit_file_size, size - 1), log_level="error")
    assert crew.wait("bank") == EXIT_CHECKPOINT
    assert "cannot be used: File too large" in crew.log("bank") and "make room" in crew.log("bank")
    assert {path.name: path.read_bytes() for path in crew.checkpoints("bank")} == before
    assert everybody_else_was_told(crew, "File too large")
    crew.start()
    crew.finish()
    assert crew.weights() == quiet_weights()


def test_a_folder_that_becomes_read_only_ends_the_run_with_4(crew: Crew) -> None:
    crew.start("insurer", "scheduler")
    crew.start("bank", prepare=(obey_rights, None))
    crew.await_step("bank", 6)
    folder = crew.states / "bank" / "checkpoints"
    folder.chmod(0o500)
    assert crew.wait("bank") == EXIT_CHECKPOINT
    assert "Permission denied" in crew.log("bank") and "fix the permissions" in crew.log("bank")
    assert everybody_else_was_told(crew, "Permission denied")
    folder.chmod(0o700)
    crew.start()
    crew.finish()
    assert crew.weights() == quiet_weights()


def test_torn_and_altered_checkpoints_are_passed_over_and_everyone_goes_back_to_a_common_one(crew: Crew) -> None:
    killed_after(crew, 14, "bank")
    *_, second, last = crew.checkpoints("bank")
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    flipped = bytearray(second.read_bytes())
    flipped[len(flipped) * 3 // 4] ^= 1
    second.write_bytes(flipped)
    crew.start("bank")
    crew.finish()
    assert crew.log("bank").count("is torn or altered") == 2
    assert crew.weights() == quiet_weights()
    assert crew.generation() >= 1


# Restarted differently --------------------------------------------------------------------------------------------


def test_another_number_of_threads_or_another_job_is_refused_and_the_run_goes_on_without(crew: Crew) -> None:
    killed_after(crew, 6, "bank")
    crew.start("bank", threads=2)
    assert crew.wait("bank") == EXIT_CHECKPOINT
    assert "threads was 1, now 2" in crew.log("bank")
    other = crew.folder / "other.toml"
    other.write_text(crew.job.read_text().replace("seed = 7", "seed = 8"))
    crew.start("bank", job=other)
    assert crew.wait("bank") == EXIT_CHECKPOINT
    assert "belongs to another job" in crew.log("bank")
    crew.start("bank")
    crew.finish()
    assert crew.weights() == quiet_weights()


# The clock --------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
NO_WORKER = ("cli", "provision", "certificates", "operate", "prepare")  # what a person starts and reads
MONOTONIC = {"monotonic", "monotonic_ns", "sleep", "perf_counter", "process_time"}
FOR_PEOPLE = {  # when something was told, refused, finished or spent, which is shown and decides nothing
    "sl_queue/checking/broker.py": {"time"},
    "sl_queue/launch/alignment.py": {"time"},
    "sl_queue/launch/following.py": {"time"},
    "sl_queue/launch/service_worker.py": {"datetime"},
    "sl_queue/launch/versions.py": {"datetime"},
    "sl_queue/loops/scheduling.py": {"time"},
    "sl_queue/observe/console.py": {"strftime", "localtime"},
    "sl_queue/observe/json_lines.py": {"datetime"},
    "sl_queue/observe/keeper.py": {"time"},
    "sl_queue/observe/live.py": {"time"},
    "sl_queue/observe/mlflow.py": {"time"},
    "sl_queue/observe/tensorboard.py": {"time"},
    "sl_queue/observe/tracking.py": {"time"},
    "sl_queue/protocol/comparison.py": {"datetime"},
    "sl_queue/protocol/scheduler/status.py": {"datetime"},
    "sl_queue/security/server_certificate.py": {"datetime"},
    "sl_queue/storage/privacy_ledger.py": {"datetime"},
    "sl_queue/transport/rabbitmq/connection.py": {"time"},
}
DATES = {  # of tables
    *("sl_queue/config/features.py", "sl_queue/config/holdout.py", "sl_queue/data/feature_report.py"),
    *("sl_queue/data/feature_specs.py", "sl_queue/data/feature_values.py", "sl_queue/data/features.py"),
}


def test_no_worker_reads_the_clock_that_may_be_set_back() -> None:
    for path in (*ROOT.glob("sl_queue/**/*.py"), *ROOT.glob("workers/*.py")):
        if path.stem in NO_WORKER or str(path.relative_to(ROOT)) in DATES:
            continue
        shown, text = FOR_PEOPLE.get(str(path.relative_to(ROOT)), set()), path.read_text()
        if not re.search("time|calendar", text):
            continue
        for node in ast.walk(ast.parse(text)):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.Import(names):
                    assert not {name.name for name in names} & {"datetime", "calendar"}, where
                case ast.ImportFrom(module):
                    assert module not in {"time", "datetime", "calendar"} - shown, where
                case ast.Attribute(ast.Name("time"), used):
                    assert used in MONOTONIC | shown, where
