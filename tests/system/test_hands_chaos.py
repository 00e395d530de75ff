"""`sl-queue chaos` with hands: leads, hands, the scheduler and both brokers are killed, and not a bit differs."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.credit import FILES, edit
from tests.support.crew import write_job
from tests.support.secured import write_keys
from tests.system.test_cli import COMMAND, environment

ROLES = ("bank", "insurer", "scheduler", "operator")
RELU = "        self.relu = nn.ReLU()"
SLOW = "        time.sleep(0.02)\n        return self.relu"


def write(folder: Path, *, epochs: int = 8, sealed: bool = False) -> Path:
    """Write a job with Adam, BatchNorm, dropout and early stopping, whose base models take their time."""
    job = write_job(folder, patience=20.0)
    edit(job, "epochs = 8", f"epochs = {epochs}")
    job.write_text(f'{job.read_text()}\n[early_stopping]\nmetric = "loss"\npatience = {epochs}\n')
    if sealed:
        job.write_text(f"{job.read_text()}\n{write_keys(folder / 'keys', ROLES)}")
    for name in ("bank.py", "insurer.py"):
        model = folder / name
        edit(model, "import torch\n", "import time\n\nimport torch\n")
        edit(model, RELU, "        self.relu = nn.Sequential(nn.BatchNorm1d(hidden_dim), nn.Dropout(0.2), nn.ReLU())")
        edit(model, "        return self.relu", SLOW)
    return job


@pytest.mark.timeout(500)  # it starts two brokers and two dozen workers, each of which loads torch
@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_killed_leads_hands_and_brokers_change_no_bit(tmp_path: Path, sealed: bool) -> None:
    job = write(tmp_path, sealed=sealed)
    files = [str(path) for path in (job, *(tmp_path / name for name in FILES))]
    hands = ["--hands", "bank=2", "--hands", "insurer=2"]
    keys = ["--keys", str(tmp_path / "keys")] if sealed else []
    faults = ["--kills", "5", "--broker-restarts", "1", "--cuts", "1", "--seed", "3"]
    command = [COMMAND, "chaos", *files, *hands, *keys, *faults]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": equal\n") == 3
    happened = re.findall(r"^ .* s  step +\d+ +\d/8  (.*)", run.stdout, re.MULTILINE)
    assert any("hand" in fault and "SIGKILL" in fault for fault in happened)
    assert {"broker killed and started again", "hands' broker killed and started again"} <= set(happened)
    assert re.search(r"^passed: .*5 x SIGKILL", run.stdout, re.MULTILINE)
