"""Hands as processes over a real RabbitMQ: killed, frozen and added for real, and not a bit differs."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.broker import Broker
from tests.support.credit import FILES, edit, write_credit
from tests.system.test_cli import COMMAND, environment, sl_queue

pytestmark = pytest.mark.timeout(600)  # a dozen workers, each of which loads torch

EPOCHS = 30
DROPOUT_AND_NORM = (
    "        self.relu = nn.ReLU()",
    "        self.relu = nn.Sequential(nn.BatchNorm1d(hidden_dim), nn.Dropout(0.2), nn.ReLU())",
)


def write(folder: Path, name: str) -> Path:
    """Write a job whose bank takes its time, with BatchNorm and dropout."""
    job = write_credit(folder)
    edit(job, 'name = "credit"', f'name = "{name}"')
    edit(job, "epochs = 5", f"epochs = {EPOCHS}")
    bank = folder / "bank.py"
    edit(bank, "import torch\n", "import time\n\nimport torch\n")
    edit(bank, "        return self.relu", "        time.sleep(0.06)\n        return self.relu")
    edit(bank, *DROPOUT_AND_NORM)
    return job


def weights(out: Path) -> dict[str, str]:
    paths = sorted(out.glob("*/final/*.safetensors"))
    assert len(paths) == 3
    found = {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in paths}
    lines = (out / "scheduler" / "history.jsonl").read_text().splitlines()
    return {**found, "history": re.sub(r'"seconds": [\d.e-]+', "", "\n".join(lines))}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return final weights and history of a plain run over memory."""
    job = write(tmp_path_factory.mktemp("quiet"), "quiet")
    files = [job, *(job.parent / name for name in FILES)]
    done = sl_queue("local", *files, "--out", job.parent / "run")
    assert done.returncode == 0, done.stderr
    return weights(job.parent / "run")


class Run:
    """`sl-queue local` with hands; mutable: it collects what is said."""

    def __init__(self, job: Path, broker: str, *hands: str) -> None:
        self.job, self.broker, self.out = job, broker, job.parent / "run"
        options = [word for each in hands for word in ("--hands", each)]
        command = [COMMAND, "local", job, *(job.parent / name for name in FILES), "--out", self.out, *options]
        self.process = subprocess.Popen(
            list(map(str, command)),
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
        with self._said:
            enough = self._said.wait_for(lambda: len(re.findall(pattern, self.text)) >= times, timeout=200)
        assert enough, f"{pattern!r} was not said in:\n{self.text}"

    def pids(self, module: str) -> list[int]:
        """Process ids of this run's workers of that kind."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = folder.joinpath("cmdline").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if module in words and str(self.job) in words:
                found.append(int(folder.name))
        return sorted(found)

    def finish(self) -> None:
        try:
            code = self.process.wait(200)
        except subprocess.TimeoutExpired:
            pytest.fail(self.text)
        self._reader.join(10)
        assert code == 0, self.text


@contextmanager
def started(job: Path, broker: str, *hands: str) -> Iterator[Run]:
    run = Run(job, broker, *hands)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


def test_hands_that_are_killed_frozen_and_added_change_no_bit(
    tmp_path: Path, unique: str, broker_url: str, quiet: dict[str, str]
) -> None:
    job, chance = write(tmp_path, unique), random.Random(1)
    with started(job, broker_url, "bank=2", "insurer=1") as run:
        run.until(r"is here; hands: 2")
        frozen = run.pids("workers.hand")[0]
        os.kill(frozen, signal.SIGSTOP)
        for epoch, kind in enumerate(["hand", "hand", "feature_party", "hand", "label_holder", "hand", "hand"]):
            run.until(f"epoch {2 * epoch + 2}/")
            pids = [pid for pid in run.pids(f"workers.{kind}") if pid != frozen]
            os.kill(chance.choice(pids), signal.SIGKILL)
        os.kill(frozen, signal.SIGCONT)
        run.finish()
        assert "given to others" in run.text
    assert weights(run.out) == quiet


def test_a_broker_that_is_killed_costs_hands_nothing(
    tmp_path: Path, unique: str, private_broker: Broker, quiet: dict[str, str]
) -> None:
    job = write(tmp_path, unique)
    with started(job, private_broker.url(), "bank=2") as run:
        run.until("epoch 8/")
        private_broker.restart()
        run.finish()
    assert weights(run.out) == quiet


def test_a_hand_of_another_job_is_sent_away(tmp_path: Path, unique: str, broker_url: str) -> None:
    job = write(tmp_path, unique)
    other = tmp_path / "other"
    other.mkdir()
    edit(write(other, unique), "seed = 7", "seed = 8")
    command = [sys.executable, "-m", "workers.hand", "--job", other / "job.toml", "--party", other / "bank.toml"]
    variables = environment(SL_QUEUE_HANDS_BROKER=broker_url, SL_QUEUE_THREADS="1")
    hand = subprocess.Popen(list(map(str, command)), env=variables, stderr=subprocess.PIPE, text=True)
    try:
        with started(job, broker_url, "bank=0") as run:  # it may be there before its lead
            _, said = hand.communicate(timeout=200)
            assert hand.returncode == 3, said
            assert "does not fit its lead: job was" in said
            run.until("refused, since it would compute other bits")
    finally:
        hand.kill()
        hand.wait()
