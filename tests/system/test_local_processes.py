"""`sl-queue local` over a real RabbitMQ: a process for each role, killed, stopped and started again for real."""

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.broker import GIVEN, Broker
from tests.support.credit import FILES, edit, write_credit
from tests.support.forked import Forked, environment, forked, sl_queue
from tests.support.local_run import gone, started, weights, words_of
from tests.support.waiting import await_that

EPOCHS = 40
PATIENCE_S = 8.0  # so long a scheduler of a finished run waits for parties that have lost what it left
PACE = "time.sleep(0.01)"  # in every forward of the bank: long enough for something to happen, however fast the machine


@pytest.fixture
def job(tmp_path: Path, unique: str) -> Path:
    job = write_credit(tmp_path)
    edit(job, 'name = "credit"', f'name = "{unique}"')
    return unhurried(job)


def unhurried(job: Path, patience_s: float = PATIENCE_S) -> Path:
    """Let the job last for seconds; not a number changes."""
    edit(job, "epochs = 5", f"epochs = {EPOCHS}")
    job.write_text(f"{job.read_text()}\n[broker]\npatience = {patience_s}\n")
    bank = job.parent / "bank.py"
    edit(bank, "import torch\n", "import time\n\nimport torch\n")
    edit(bank, "        return self.relu", f"        {PACE}\n        return self.relu")
    return job


def files(job: Path) -> list[Path]:
    return [job, *(job.parent / name for name in FILES)]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the final weights of an undisturbed run over memory://; a job's name does not show in them."""
    job = write_credit(tmp_path_factory.mktemp("quiet"))
    edit(job, "epochs = 5", f"epochs = {EPOCHS}")
    done = sl_queue("local", *files(job), "--out", job.parent / "run")
    assert done.returncode == 0, done.stderr
    return weights(job.parent / "run")


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed, and what was seen while it went on."""

    job: Path
    broker_url: str
    out: Path
    text: str
    command_lines: dict[str, list[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, private_broker: Broker) -> Finished:
    """Run to the end once, for several tests to look at and to go on from."""
    job = write_credit(tmp_path_factory.mktemp("finished"))
    edit(job, 'name = "credit"', 'name = "finished"')
    unhurried(job)
    url = os.environ.get(GIVEN) or private_broker.url("finished")
    with started(files(job), job.parent / "run", url) as run:
        run.until(f"epoch 2/{EPOCHS}")
        command_lines = {role: words_of(pid) for role, pid in run.workers().items()}
        run.finish()
    return Finished(job, url, run.out, run.text, command_lines)


def test_over_rabbitmq_the_weights_are_those_of_memory(finished: Finished, quiet: dict[str, str]) -> None:
    assert weights(finished.out) == quiet
    told = re.findall(r"scheduler: epoch (\d+)/\d+  loss \d\.\d{4}  held-out loss .* s$", finished.text, re.MULTILINE)
    assert told == [str(epoch + 1) for epoch in range(EPOCHS)] and finished.text.count(f"epoch 2/{EPOCHS}") == 1
    history = (finished.out / "scheduler" / "history.jsonl").read_text().splitlines()
    assert len(history) == EPOCHS
    assert str(finished.out / "insurer" / "final" / "fuse.safetensors") in finished.text


def test_no_command_line_and_no_output_shows_the_password_of_the_broker(finished: Finished) -> None:
    password = urlsplit(finished.broker_url).password or "no password"
    assert sorted(finished.command_lines) == ["bank", "insurer", "scheduler"]
    assert not any(password in word for words in finished.command_lines.values() for word in words)
    assert password not in finished.text


def test_what_is_for_one_worker_by_itself_is_kept_from_several(tmp_path: Path, unique: str, broker_url: str) -> None:
    job = write_credit(tmp_path)
    edit(job, 'name = "credit"', f'name = "{unique}"')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = {"SL_QUEUE_METRICS_PORT": str(taken.getsockname()[1]), "SL_QUEUE_FINAL_EXIT": "0"}
        done = sl_queue("local", *files(job), SL_QUEUE_BROKER=broker_url, **own)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("SL_QUEUE_METRICS_PORT is left out") == 1
        edit(tmp_path / "bank.toml", "hidden_dim = 32", "hidden_dim = 31")
        wrong = sl_queue("local", *files(job), "--out", tmp_path / "x", SL_QUEUE_BROKER=broker_url, **own)
    assert wrong.returncode == 5, wrong.stderr


def test_workers_that_are_killed_are_restarted_and_change_nothing(
    job: Path, broker_url: str, quiet: dict[str, str]
) -> None:
    with started(files(job), job.parent / "run", broker_url) as run:
        for epoch, role in ((5, "bank"), (15, "insurer"), (28, "scheduler")):
            run.until(f"epoch {epoch}/")
            os.kill(run.workers()[role], signal.SIGKILL)
            run.until(f"{role}: ended by SIGKILL; restarting")
        run.finish()
    assert weights(run.out) == quiet


def test_an_orderly_stop_exits_0_and_the_same_command_resumes(
    job: Path, broker_url: str, quiet: dict[str, str]
) -> None:
    with started(files(job), job.parent / "run", broker_url) as run:
        run.until("epoch 10/")
        bank = run.workers()["bank"]
        os.kill(bank, signal.SIGSTOP)  # so that the run does not end before it is asked to
        asked = sl_queue("stop", job, SL_QUEUE_BROKER=broker_url)
        assert asked.returncode == 0, asked.stderr
        assert _phase(job, broker_url) == "stopping", "it has been taken when the command returns"
        assert sl_queue("stop", job, SL_QUEUE_BROKER=broker_url).stdout == asked.stdout
        os.kill(bank, signal.SIGCONT)
        run.finish()
        assert "stopped" in run.text
    assert not list(run.out.glob("*/final/*"))
    assert _phase(job, broker_url) == "stopped"
    told = sl_queue("stop", job, SL_QUEUE_BROKER=broker_url)
    assert told.returncode == 0 and "has ended already: stopped by the operator" in told.stdout
    with started(files(job), job.parent / "run", broker_url) as again:
        again.finish()
        assert "epoch 10/" not in again.text
    assert weights(run.out) == quiet


def _phase(job: Path, broker_url: str) -> str:
    """Return the phase of the run, as the operator reads it."""
    status = sl_queue("status", job, "--json", SL_QUEUE_BROKER=broker_url)
    return str(json.loads(status.stdout)["phase"])


def test_status_and_stop_without_a_scheduler_say_so(job: Path, broker_url: str) -> None:
    nobody = sl_queue("status", job, SL_QUEUE_BROKER=broker_url)
    assert nobody.returncode == 75
    assert "start workers.scheduler" in nobody.stderr
    nobody = sl_queue("stop", job, SL_QUEUE_BROKER=broker_url)
    assert nobody.returncode == 75 and "nothing to stop" in nobody.stderr


@dataclass(frozen=True)
class Interrupted:
    """A run whose bank stood still for a while, and that Ctrl-C ended."""

    waited: str  # status while the bank stood still
    code: int
    text: str
    left: list[int]  # process ids of workers that outlived the command


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, private_broker: Broker) -> Interrupted:
    """Run until there is something to see, and press Ctrl-C."""
    job = write_credit(tmp_path_factory.mktemp("interrupted"))
    edit(job, 'name = "credit"', 'name = "interrupted"')
    unhurried(job, patience_s=4.0)  # given up after ten times as long
    url = os.environ.get(GIVEN) or private_broker.url("interrupted")
    shown = [""]
    with started(files(job), job.parent / "run", url) as run:
        run.until("epoch 3/")
        workers = run.workers()
        os.kill(workers["bank"], signal.SIGSTOP)

        def told() -> bool:
            status = sl_queue("status", job, SL_QUEUE_BROKER=url)
            assert status.returncode == 0, status.stderr
            shown[0] = status.stdout
            return bool(re.search(r"bank +silent", shown[0])) and "of bank for" in shown[0]

        await_that(told, lambda: shown[0])
        run.process.send_signal(signal.SIGINT)
        await_that(lambda: is_pending(workers["bank"], signal.SIGTERM), "Ctrl-C ended no worker")
        os.kill(workers["bank"], signal.SIGCONT)  # only now, so that the run does not end before it is interrupted
        code = run.wait()
        left = [pid for pid in workers.values() if not gone(pid)]
    return Interrupted(shown[0], code, run.text, left)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Return True if a frozen process will get this signal when it goes on."""
    (pending,) = re.findall(r"^ShdPnd:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending, 16) >> (number - 1) & 1)


def test_status_tells_where_a_run_is_and_whom_it_waits_for(interrupted: Interrupted) -> None:
    assert re.search(
        r"insurer +waiting +\d+ +\d+ +\d+\.\d s +(activation|holdout) \d+\.\d of bank for \d+ s", interrupted.waited
    )


def test_ctrl_c_ends_the_workers_in_order(interrupted: Interrupted) -> None:
    assert interrupted.code == 130
    assert "interrupted; the same command resumes" in interrupted.text
    assert "Traceback" not in interrupted.text
    ended = re.findall(r"^(\w+): asked to end", interrupted.text, re.MULTILINE)
    assert ended == ["bank", "insurer", "scheduler"]
    assert not interrupted.left


def test_no_worker_outlives_a_killed_command(job: Path, broker_url: str) -> None:
    with started(files(job), job.parent / "run", broker_url) as run:
        run.until_it_is_so(lambda: len(run.workers()) == 3, "three workers")
        workers = list(run.workers().values())
        run.process.kill()
        await_that(lambda: all(gone(pid) for pid in workers), "a worker outlived its command")


def test_an_error_in_training_ends_all_with_the_reason_of_its_party(job: Path, broker_url: str) -> None:
    edit(job.parent / "bank.py", "import torch\n", "import torch\n\nCALLS = []\n")
    edit(
        job.parent / "bank.py",
        "return self.relu(self.linear(x))",
        "CALLS.append(0)\n        return self.relu(self.linear(x)) * (float('nan') if len(CALLS) > 50 else 1)",
    )
    with started(files(job), job.parent / "run", broker_url) as run:
        assert run.wait() == 5, run.text
    (reason,) = re.findall(r"^error: (.*)", run.text, re.MULTILINE)
    assert re.search(r"bank.*micro-batch \d+\.\d", reason)
    assert "NaN" in reason


# A worker of its own, as in a deployment ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    process: Forked
    log: Path

    def ended(self) -> tuple[int, str]:
        return self.process.wait(), self.log.read_text()


@contextmanager
def worker(
    module: str, job: Path, party: str | None, broker: str, name: str = "", states: Path | None = None
) -> Iterator[Worker]:
    """Start a worker; its state goes to a folder of that name, and what it says to a file beside it."""
    role = name or party or "scheduler"
    folder = (states or job.parent / "states") / role
    file = () if party is None else ("--party", job.parent / f"{party}.toml")
    words = [f"workers.{module}", "--job", job, *file, "--state", folder]
    folder.parent.mkdir(exist_ok=True)
    said = folder.parent / f"{role}.log"
    said.unlink(missing_ok=True)
    with forked(words, environment(SL_QUEUE_BROKER=broker), stdout=said, stderr=said) as process:
        yield Worker(process, said)


def run_again(of: Finished, states: Path) -> dict[str, tuple[int, str]]:
    """Start all three workers of the finished run's job on these folders; returns how they end."""
    with ExitStack() as running:
        workers = {
            party or "scheduler": running.enter_context(worker(module, of.job, party, of.broker_url, states=states))
            for module, party in (("feature_party", "bank"), ("label_holder", "insurer"), ("scheduler", None))
        }
        return {role: process.ended() for role, process in workers.items()}


def codes(ends: dict[str, tuple[int, str]]) -> set[int]:
    return {code for code, _ in ends.values()}


def test_a_stop_that_came_too_late_stops_no_later_run(finished: Finished, quiet: dict[str, str]) -> None:
    late = sl_queue("stop", finished.job, SL_QUEUE_BROKER=finished.broker_url)
    assert late.returncode == 0 and "is finished: there is nothing to stop" in late.stdout
    anew = finished.job.parent / "anew"
    ends = run_again(finished, anew)
    assert codes(ends) == {0}, ends
    assert weights(anew) == quiet
    ends = run_again(finished, anew)
    assert codes(ends) == {0} and all("already finished" in said for _, said in ends.values()), ends


def test_final_weights_that_are_lost_after_the_end_come_back(finished: Finished, quiet: dict[str, str]) -> None:
    states = Path(shutil.copytree(finished.out, finished.job.parent / "robbed"))
    shutil.rmtree(states / "bank" / "final")
    ends = run_again(finished, states)
    assert codes(ends) == {0}, ends
    assert weights(states) == quiet
    shutil.rmtree(states / "bank")
    ends = run_again(finished, states)
    assert ends["bank"][0] == 4, ends
    assert "they are lost; to train from scratch" in ends["bank"][1]


def test_different_jobs_at_two_parties_are_refused_with_the_keys_that_differ(
    job: Path, broker_url: str, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    there = write_credit(tmp_path / "there")
    there.write_text(job.read_text().replace("seed = 7", "seed = 8").replace("batch_size = 128", "batch_size = 64"))
    with (
        worker("feature_party", job, "bank", broker_url),
        worker("label_holder", there, "insurer", broker_url) as insurer,
        worker("scheduler", job, None, broker_url) as scheduler,
    ):
        for process in (insurer, scheduler):
            code, said = process.ended()
            assert code == 3, said
            assert "seed" in said and "batch_size" in said
            assert "epochs" not in said.rsplit("error: ")[-1]


def test_a_second_worker_of_a_party_says_so_and_exits_75(job: Path, broker_url: str) -> None:
    bank = ("feature_party", job, "bank", broker_url)
    with worker(*bank), worker("scheduler", job, None, broker_url):
        await_that(lambda: "joined" in _phases(job, broker_url, "bank"), "the first did not join")
        with worker(*bank, name="second") as other:
            code, said = other.ended()
        assert code == 75, said
        assert "bank" in said.rsplit("error: ")[-1]


def _phases(job: Path, broker: str, party: str) -> str:
    status = sl_queue("status", job, "--json", SL_QUEUE_BROKER=broker)
    if status.returncode != 0:
        return ""
    phase = json.loads(status.stdout)["parties"][party]["phase"]
    return "" if phase == "not joined" else "joined"


def test_sigterm_ends_a_worker_at_once_and_it_resumes(job: Path, broker_url: str, quiet: dict[str, str]) -> None:
    states = job.parent / "states"
    with (
        worker("scheduler", job, None, broker_url) as scheduler,
        worker("label_holder", job, "insurer", broker_url) as insurer,
    ):
        with worker("feature_party", job, "bank", broker_url) as bank:
            history = states / "scheduler" / "history.jsonl"
            await_that(lambda: history.exists() and len(history.read_text().splitlines()) > 5, "no epochs")
            bank.process.send_signal(signal.SIGTERM)
            code, said = bank.ended()
        assert code == -signal.SIGTERM
        assert "a restart resumes" in said
        with worker("feature_party", job, "bank", broker_url) as again:
            assert [process.ended()[0] for process in (again, insurer, scheduler)] == [0, 0, 0]
    assert weights(states) == quiet


# Brokers that cannot be used ----------------------------------------------------------------------------------------


def _wrong(url: str) -> dict[str, tuple[str, str]]:
    parts = urlsplit(url)
    return {
        "password": (url.replace(f":{parts.password}@", ":topsecret@"), "wrong user name or password"),
        "vhost": (url.replace(parts.path, "/nowhere"), "nowhere"),
        "port": (f"amqp://{parts.username}:topsecret@{parts.hostname}:1/x", "nothing listens there"),
    }


@pytest.mark.parametrize("wrong", ["password", "vhost", "port"])
@pytest.mark.parametrize("command", ["status", "local", "check"])
def test_a_broker_that_cannot_be_used_is_said_before_anything_starts(
    job: Path, broker_url: str, command: str, wrong: str
) -> None:
    url, says = _wrong(broker_url)[wrong]
    files = [] if command == "status" else [job.parent / name for name in FILES]
    done = sl_queue(command, job, *files, SL_QUEUE_BROKER=url)
    assert done.returncode == 75
    assert says in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert "topsecret" not in done.stderr + done.stdout
    assert not (job.parent / "state").exists()
