"""`sl-queue chaos` with hands: leads, hands, the scheduler and both brokers are killed, and not a bit differs."""

import re
from pathlib import Path

from tests.support.credit import FILES, edit
from tests.support.crew import write_job
from tests.support.forked import sl_queue
from tests.support.secured import write_keys

ROLES = ("bank", "insurer", "scheduler", "operator")
RELU = "        self.relu = nn.ReLU()"
SLOW = "        time.sleep(0.02)\n        return self.relu"


def write(folder: Path, *, epochs: int = 24) -> Path:
    """Write a sealed job with Adam, BatchNorm, dropout and early stopping, whose base models take their time."""
    job = write_job(folder, patience=20.0)
    edit(job, "epochs = 8", f"epochs = {epochs}")
    job.write_text(f'{job.read_text()}\n[early_stopping]\nmetric = "loss"\npatience = {epochs}\n')
    job.write_text(f"{job.read_text()}\n{write_keys(folder / 'keys', ROLES)}")
    for name in ("bank.py", "insurer.py"):
        model = folder / name
        edit(model, "import torch\n", "import time\n\nimport torch\n")
        edit(model, RELU, "        self.relu = nn.Sequential(nn.BatchNorm1d(hidden_dim), nn.Dropout(0.2), nn.ReLU())")
        edit(model, "        return self.relu", SLOW)
    return job


def test_killed_leads_hands_and_brokers_change_no_bit(tmp_path: Path) -> None:
    """Sealed, which adds to what may go wrong; without seals hands are killed in test_hands."""
    job = write(tmp_path)
    files = (job, *(tmp_path / name for name in FILES))
    hands = ("--hands", "bank=2", "--hands", "insurer=2", "--keys", tmp_path / "keys")
    faults = ("--kills", "5", "--broker-restarts", "1", "--cuts", "1", "--seed", "3")
    run = sl_queue("chaos", *files, *hands, *faults, timeout_s=580.0)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": equal\n") == 3
    happened = re.findall(r"^ .* s  step +\d+ +\d/8  (.*)", run.stdout, re.MULTILINE)
    assert any("hand" in fault and "SIGKILL" in fault for fault in happened)
    assert {"broker killed and started again", "hands' broker killed and started again"} <= set(happened)
    assert re.search(r"^passed: .*5 x SIGKILL", run.stdout, re.MULTILINE)
