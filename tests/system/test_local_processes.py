"""`sl-queue local` over a real RabbitMQ: a process for each role, killed, stopped and started again for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.credit import FILES, edit, write_credit
from tests.system.test_cli import COMMAND, environment, sl_queue

pytestmark = pytest.mark.timeout(180)

EPOCHS = 40
PACE = "time.sleep(0.01)"  # in every forward of the bank: long enough for something to happen, however fast the machine


@pytest.fixture
def job(tmp_path: Path, unique: str) -> Path:
    job = write_credit(tmp_path)
    edit(job, 'name = "credit"', f'name = "{unique}"')
    return unhurried(job)


def unhurried(job: Path) -> Path:
    """Let the job last for seconds; not a number changes."""
    edit(job, "epochs = 5", f"epochs = {EPOCHS}")
    bank = job.parent / "bank.py"
    edit(bank, "import torch\n", "import time\n\nimport torch\n")
    edit(bank, "        return self.relu", f"        {PACE}\n        return self.relu")
    return job


class Run:
    """`sl-queue local` in a process of its own; mutable: it collects what the process says."""

    def __init__(self, job: Path, broker: str, out: str) -> None:
        self.out = job.parent / out
        files = [job, *(job.parent / name for name in FILES)]
        command = [COMMAND, "local", *map(str, files), "--out", str(self.out)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(SL_QUEUE_BROKER=broker),
        )
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._said:
                    self.lines.append(line)
                    self._said.notify_all()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def until(self, pattern: str, times: int = 1) -> None:
        """Wait until that was said so often."""
        with self._said:
            enough = self._said.wait_for(lambda: len(re.findall(pattern, self.text)) >= times, timeout=60)
        assert enough, f"{pattern!r} was not said in:\n{self.text}"

    def wait(self) -> int:
        code = self.process.wait(120)
        self._reader.join(10)
        return code

    def workers(self) -> dict[str, int]:
        """Return the process id of each role's worker."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            words = _words(folder)
            if any(word.startswith("workers.") for word in words) and str(self.out.parent) in " ".join(words):
                found[Path(words[words.index("--state") + 1]).name] = int(folder.name)
        return found


def _words(process: Path) -> list[str]:
    try:
        return process.joinpath("cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


@contextmanager
def started(job: Path, broker: str, out: str) -> Iterator[Run]:
    run = Run(job, broker, out)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


def weights(out: Path) -> dict[str, str]:
    """SHA-256 of every final weight file."""
    paths = sorted(out.glob("*/final/*.safetensors"))
    assert len(paths) == 3
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in paths}


def gone(pids: Iterator[int] | list[int], within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() and _words(Path(f"/proc/{pid}")) != [""] for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the final weights of an undisturbed run over memory://; a job's name does not show in them."""
    job = write_credit(tmp_path_factory.mktemp("quiet"))
    unhurried(job)
    files = [job, *(job.parent / name for name in FILES)]
    done = sl_queue("local", *files, "--out", job.parent / "run")
    assert done.returncode == 0, done.stderr
    return weights(job.parent / "run")


def test_over_rabbitmq_the_weights_are_those_of_memory(job: Path, broker_url: str, quiet: dict[str, str]) -> None:
    with started(job, broker_url, "run") as run:
        run.until(f"epoch 2/{EPOCHS}")
        assert sorted(run.workers()) == ["bank", "insurer", "scheduler"]
        password = urlsplit(broker_url).password or "no password"
        command_lines = [_words(Path(f"/proc/{pid}")) for pid in (*run.workers().values(), run.process.pid)]
        assert not any(password in word for words in command_lines for word in words)
        assert run.wait() == 0, run.text
        assert password not in run.text
    told = re.findall(r"scheduler: epoch (\d+)/\d+  loss \d\.\d{4}  held-out loss .* s$", run.text, re.MULTILINE)
    assert told == [str(epoch + 1) for epoch in range(EPOCHS)] and run.text.count(f"epoch 2/{EPOCHS}") == 1
    assert weights(run.out) == quiet
    history = (run.out / "scheduler" / "history.jsonl").read_text().splitlines()
    assert len(history) == EPOCHS
    assert str(run.out / "insurer" / "final" / "fuse.safetensors") in run.text


def test_workers_that_are_killed_are_restarted_and_change_nothing(
    job: Path, broker_url: str, quiet: dict[str, str]
) -> None:
    with started(job, broker_url, "run") as run:
        for epoch, role in ((5, "bank"), (15, "insurer"), (28, "scheduler")):
            run.until(f"epoch {epoch}/")
            os.kill(run.workers()[role], signal.SIGKILL)
            run.until(f"{role}: ended by SIGKILL; restarting")
        assert run.wait() == 0, run.text
    assert weights(run.out) == quiet


def test_an_orderly_stop_exits_0_and_the_same_command_resumes(
    job: Path, broker_url: str, quiet: dict[str, str]
) -> None:
    with started(job, broker_url, "run") as run:
        run.until("epoch 10/")
        bank = run.workers()["bank"]
        os.kill(bank, signal.SIGSTOP)  # so that the run does not end before it is asked to
        asked = sl_queue("stop", job, SL_QUEUE_BROKER=broker_url)
        assert asked.returncode == 0, asked.stderr
        assert _phase(job, broker_url) == "stopping", "it has been taken when the command returns"
        assert sl_queue("stop", job, SL_QUEUE_BROKER=broker_url).stdout == asked.stdout
        os.kill(bank, signal.SIGCONT)
        assert run.wait() == 0, run.text
        assert "stopped" in run.text
    assert not list(run.out.glob("*/final/*"))
    assert _phase(job, broker_url) == "stopped"
    told = sl_queue("stop", job, SL_QUEUE_BROKER=broker_url)
    assert told.returncode == 0 and "has ended already: stopped by the operator" in told.stdout
    with started(job, broker_url, "run") as again:
        assert again.wait() == 0, again.text
        assert "epoch 10/" not in again.text
    assert weights(run.out) == quiet


def test_a_stop_that_came_too_late_stops_no_later_run(job: Path, broker_url: str, quiet: dict[str, str]) -> None:
    nobody = sl_queue("stop", job, SL_QUEUE_BROKER=broker_url)
    assert nobody.returncode == 75 and "nothing to stop" in nobody.stderr
    with started(job, broker_url, "run") as run:
        assert run.wait() == 0, run.text
    late = sl_queue("stop", job, SL_QUEUE_BROKER=broker_url)
    assert late.returncode == 0 and "is finished: there is nothing to stop" in late.stdout
    with started(job, broker_url, "anew") as anew:
        assert anew.wait() == 0, anew.text
    assert weights(anew.out) == quiet
    with started(job, broker_url, "anew") as again:
        assert again.wait() == 0 and "already finished" in again.text


def test_final_weights_that_are_lost_after_the_end_come_back(job: Path, broker_url: str, quiet: dict[str, str]) -> None:
    with started(job, broker_url, "run") as run:
        assert run.wait() == 0, run.text
    shutil.rmtree(run.out / "bank" / "final")
    with started(job, broker_url, "run") as again:
        assert again.wait() == 0, again.text
    assert weights(run.out) == quiet
    shutil.rmtree(run.out / "bank")
    with started(job, broker_url, "run") as lost:
        assert lost.wait() == 4, lost.text
    assert "they are lost; to train from scratch" in lost.text


def _phase(job: Path, broker_url: str) -> str:
    """Return the phase of the run, as the operator reads it."""
    status = sl_queue("status", job, "--json", SL_QUEUE_BROKER=broker_url)
    return str(json.loads(status.stdout)["phase"])


def test_status_tells_where_a_run_is_and_whom_it_waits_for(job: Path, broker_url: str) -> None:
    nobody = sl_queue("status", job, SL_QUEUE_BROKER=broker_url)
    assert nobody.returncode == 75
    assert "start workers.scheduler" in nobody.stderr
    edit(job, "[pipeline]", "[broker]\npatience = 2.0\n\n[pipeline]")
    with started(job, broker_url, "run") as run:
        run.until("epoch 3/")
        os.kill(run.workers()["bank"], signal.SIGSTOP)

        def told() -> str:
            status = sl_queue("status", job, SL_QUEUE_BROKER=broker_url)
            assert status.returncode == 0, status.stderr
            return status.stdout

        deadline = time.monotonic() + 60
        while not re.search(r"bank +silent", shown := told()) or "of bank for" not in shown:
            assert time.monotonic() < deadline, shown
        assert re.search(
            r"insurer +waiting +\d+ +\d+ +\d+\.\d s +(activation|holdout) \d+\.\d of bank for \d+ s", shown
        )
        os.kill(run.workers()["bank"], signal.SIGCONT)
        assert run.wait() == 0, run.text


def test_ctrl_c_ends_the_workers_in_order(job: Path, broker_url: str) -> None:
    with started(job, broker_url, "run") as run:
        run.until("epoch 3/")
        workers = run.workers()
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130
        assert "interrupted; the same command resumes" in run.text
        assert "Traceback" not in run.text
        ended = re.findall(r"^(\w+): asked to end", run.text, re.MULTILINE)
        assert ended == ["bank", "insurer", "scheduler"]
        assert gone(list(workers.values()), within_s=0)


def test_no_worker_outlives_a_killed_command(job: Path, broker_url: str) -> None:
    with started(job, broker_url, "run") as run:
        run.until("epoch 3/")
        workers = run.workers()
        assert len(workers) == 3
        run.process.kill()
        assert gone(list(workers.values()))


def test_an_error_in_training_ends_all_with_the_reason_of_its_party(job: Path, broker_url: str) -> None:
    edit(job.parent / "bank.py", "import torch\n", "import torch\n\nCALLS = []\n")
    edit(
        job.parent / "bank.py",
        "return self.relu(self.linear(x))",
        "CALLS.append(0)\n        return self.relu(self.linear(x)) * (float('nan') if len(CALLS) > 50 else 1)",
    )
    with started(job, broker_url, "run") as run:
        assert run.wait() == 5, run.text
    (reason,) = re.findall(r"^error: (.*)", run.text, re.MULTILINE)
    assert re.search(r"bank.*micro-batch \d+\.\d", reason)
    assert "NaN" in reason


# A worker of its own, as in a deployment ----------------------------------------------------------------------------


def worker(module: str, job: Path, party: str | None, broker: str, state: str = "states") -> subprocess.Popen[str]:
    folder = job.parent / state / (party or "scheduler")
    file = () if party is None else ("--party", str(job.parent / f"{party}.toml"))
    command = [sys.executable, "-m", f"workers.{module}", "--job", str(job), *file, "--state", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(SL_QUEUE_BROKER=broker)
    )


def ended(process: subprocess.Popen[str], within_s: float = 90) -> tuple[int, str]:
    _, said = process.communicate(timeout=within_s)
    return process.returncode, said


@contextmanager
def workers(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_different_jobs_at_two_parties_are_refused_with_the_keys_that_differ(
    job: Path, broker_url: str, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    there = write_credit(tmp_path / "there")
    there.write_text(job.read_text().replace("seed = 7", "seed = 8").replace("batch_size = 128", "batch_size = 64"))
    bank = worker("feature_party", job, "bank", broker_url)
    insurer = worker("label_holder", there, "insurer", broker_url)
    scheduler = worker("scheduler", job, None, broker_url)
    with workers(bank, insurer, scheduler):
        for process in (insurer, scheduler):
            code, said = ended(process)
            assert code == 3, said
            assert "seed" in said and "batch_size" in said
            assert "epochs" not in said.rsplit("error: ")[-1]


def test_a_second_worker_of_a_party_says_so_and_exits_75(job: Path, broker_url: str) -> None:
    first, scheduler = worker("feature_party", job, "bank", broker_url), worker("scheduler", job, None, broker_url)
    with workers(first, scheduler):
        deadline = time.monotonic() + 60
        while "joined" not in _phases(job, broker_url, "bank"):
            assert time.monotonic() < deadline
        other = worker("feature_party", job, "bank", broker_url, state="elsewhere")
        with workers(other):
            code, said = ended(other)
        assert code == 75, said
        assert "bank" in said.rsplit("error: ")[-1]


def _phases(job: Path, broker: str, party: str) -> str:
    status = sl_queue("status", job, "--json", SL_QUEUE_BROKER=broker)
    if status.returncode != 0:
        return ""
    phase = json.loads(status.stdout)["parties"][party]["phase"]
    return "" if phase == "not joined" else "joined"


def test_sigterm_ends_a_worker_at_once_and_it_resumes(job: Path, broker_url: str, quiet: dict[str, str]) -> None:
    scheduler = worker("scheduler", job, None, broker_url)
    insurer = worker("label_holder", job, "insurer", broker_url)
    bank = worker("feature_party", job, "bank", broker_url)
    with workers(scheduler, insurer, bank):
        history = job.parent / "states" / "scheduler" / "history.jsonl"
        _await(lambda: history.exists() and len(history.read_text().splitlines()) > 5)
        bank.terminate()
        code, said = ended(bank, within_s=10)
        assert code == -signal.SIGTERM
        assert "a restart resumes" in said
        bank = worker("feature_party", job, "bank", broker_url)
        with workers(bank):
            assert [ended(process)[0] for process in (bank, insurer, scheduler)] == [0, 0, 0]
    assert weights(job.parent / "states") == quiet


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
