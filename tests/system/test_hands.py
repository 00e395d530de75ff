"""Hands as processes over a real RabbitMQ: killed, frozen and added for real, and not a bit differs."""

import os
import random
import re
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.broker import Broker
from tests.support.credit import FILES, edit, write_credit
from tests.support.forked import environment, forked, sl_queue
from tests.support.local_run import LocalRun, started, weights

EPOCHS = 20
DROPOUT_AND_NORM = (
    "        self.relu = nn.ReLU()",
    "        self.relu = nn.Sequential(nn.BatchNorm1d(hidden_dim), nn.Dropout(0.2), nn.ReLU())",
)


def write(folder: Path, name: str, *, pace_s: float = 0.06) -> Path:
    """Write a job with BatchNorm and dropout, whose bank takes its time."""
    job = write_credit(folder)
    edit(job, 'name = "credit"', f'name = "{name}"')
    edit(job, "epochs = 5", f"epochs = {EPOCHS}")
    bank = folder / "bank.py"
    edit(bank, "import torch\n", "import time\n\nimport torch\n")
    edit(bank, "        return self.relu", f"        time.sleep({pace_s})\n        return self.relu")
    edit(bank, *DROPOUT_AND_NORM)
    return job


def result(out: Path) -> dict[str, str]:
    """Return the final weights and the history, without times."""
    lines = (out / "scheduler" / "history.jsonl").read_text().splitlines()
    return {**weights(out), "history": re.sub(r'"seconds": [\d.e-]+', "", "\n".join(lines))}


def files(job: Path) -> list[Path]:
    return [job, *(job.parent / name for name in FILES)]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return final weights and history of a plain run over memory."""
    job = write(tmp_path_factory.mktemp("quiet"), "quiet", pace_s=0.0)
    done = sl_queue("local", *files(job), "--out", job.parent / "run")
    assert done.returncode == 0, done.stderr
    return result(job.parent / "run")


def with_hands(job: Path, broker: str, *hands: str) -> AbstractContextManager[LocalRun]:
    """Start `sl-queue local` with so many hands of these parties."""
    return started(files(job), job.parent / "run", broker, *(word for each in hands for word in ("--hands", each)))


def test_hands_that_are_killed_frozen_and_added_change_no_bit(
    tmp_path: Path, unique: str, broker_url: str, quiet: dict[str, str]
) -> None:
    job, chance = write(tmp_path, unique), random.Random(1)
    with with_hands(job, broker_url, "bank=2", "insurer=1") as run:
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
    assert result(run.out) == quiet


def test_a_broker_that_is_killed_costs_hands_nothing(
    tmp_path: Path, unique: str, private_broker: Broker, quiet: dict[str, str]
) -> None:
    job = write(tmp_path, unique)
    with with_hands(job, private_broker.url(), "bank=2") as run:
        run.until("epoch 8/")
        private_broker.restart()
        run.finish()
    assert result(run.out) == quiet


def test_a_hand_of_another_job_is_sent_away(tmp_path: Path, unique: str, broker_url: str) -> None:
    job = write(tmp_path, unique)
    other = tmp_path / "other"
    other.mkdir()
    edit(write(other, unique), "seed = 7", "seed = 8")
    words = ["workers.hand", "--job", other / "job.toml", "--party", other / "bank.toml"]
    variables = environment(SL_QUEUE_HANDS_BROKER=broker_url, SL_QUEUE_THREADS="1")
    said = other / "hand.log"
    with forked(words, variables, stdout=said, stderr=said) as hand, with_hands(job, broker_url, "bank=0") as run:
        assert hand.wait() == 3, said.read_text()  # it may be there before its lead
        assert "does not fit its lead: job was" in said.read_text()
        run.until("refused, since it would compute other bits")
