"""A process that is stopped for longer than anybody is waited for goes on where it was: Ctrl-Z, or a paused machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sl_queue.protocol.scheduler.state import GIVE_UP

PATIENCE_S = 0.4  # ten of them have to suffice for a thread to get to run on a loaded machine
SCRIPT = f"""
import hashlib, sys
import numpy as np, torch
from torch import nn
import sl_queue

class Fuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, inputs):
        return self.layer(inputs[0])

def base():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh())

rng = np.random.default_rng(1)
ids, x = np.arange(2000), rng.normal(size=(2000, 4)).astype(np.float32)
parties = {{"bank": {{"role": "feature", "cut": [8]}}, "insurer": {{"role": "label"}}}}
job = sl_queue.Job(
    name=sys.argv[1], seed=1, epochs=8, batch_size=50, parties=parties, broker={{"patience": {PATIENCE_S}}}
)
adam = {{"name": "adam"}}
bank = sl_queue.PartyFile(party="bank", data=sl_queue.Rows(ids, x), base={{"model": base, "optimizer": adam}})
fuse = {{"model": Fuse, "optimizer": adam, "loss": "bce_with_logits"}}
insurer = sl_queue.PartyFile(party="insurer", data=sl_queue.Rows(ids, labels=(x[:, 0] > 0).astype(int)), fuse=fuse)
found = sl_queue.run_local(job, [bank, insurer], sys.argv[2], on_epoch=lambda line: print(line["epoch"], flush=True))
weights = [*found.base("bank").state_dict().values(), *found.fuse.state_dict().values()]
print(hashlib.sha256(b"".join(each.numpy().tobytes() for each in weights)).hexdigest(), flush=True)
"""


@contextmanager
def running(folder: Path, name: str, broker: str) -> Iterator["subprocess.Popen[str]"]:
    """Train in a process of its own, which says an epoch a line, and a digest of the weights at the end."""
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    run = subprocess.Popen(
        [sys.executable, "script.py", name, broker], cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGCONT)
        run.kill()
        run.wait()
        if run.stdout is not None:
            run.stdout.close()


def told(run: "subprocess.Popen[str]") -> list[str]:
    """Read what is left of its lines."""
    lines = run.communicate(timeout=120)[0].splitlines()
    assert run.returncode == 0
    return lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    with running(tmp_path_factory.mktemp("undisturbed"), "undisturbed", "memory://") as run:
        return told(run)[-1]


@pytest.mark.parametrize("over", ["memory", "rabbitmq"])
def test_a_run_that_is_stopped_for_longer_than_its_patience_goes_on(
    over: str, undisturbed: str, tmp_path: Path, broker_url: str
) -> None:
    with running(tmp_path, "stopped", "memory://" if over == "memory" else broker_url) as run:
        assert run.stdout is not None
        assert run.stdout.readline()
        run.send_signal(signal.SIGSTOP)
        time.sleep(GIVE_UP * PATIENCE_S + 1.0)
        assert run.poll() is None, "it ended before it was stopped"
        run.send_signal(signal.SIGCONT)
        stopped = told(run)[-1]
    assert stopped == undisturbed
