"""The command as users meet it: a process of its own, what it says, and its exit code.

The demo runs as installed; the others are forked from a process that has loaded it.
"""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.credit import FILES, bank_columns, edit, write_bank, write_credit
from tests.support.forked import environment, forked, sl_queue
from tests.support.waiting import await_that

Trained = tuple[Path, subprocess.CompletedProcess[str]]

COMMAND = str(Path(sys.executable).with_name("sl-queue"))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_credit(tmp_path)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train once by `sl-queue local --out run`; returns the job, and that command's output."""
    job = write_credit(tmp_path_factory.mktemp("trained"))
    job.write_text(f"{job.read_text()}\n[broker]\npatience = 8.0\n")  # and so long a lost file is waited for
    run = local(job, "--out", job.parent / "run")
    assert run.returncode == 0, run.stderr
    return job, run


@pytest.fixture
def trained(trained_once: Trained, tmp_path: Path) -> Path:
    """Copy it, so that a test may change it."""
    job, _ = trained_once
    return Path(shutil.copytree(job.parent, tmp_path / "trained")) / job.name


def files(job: Path) -> list[Path]:
    return [job, *(job.parent / name for name in FILES)]


def local(job: Path, *options: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return sl_queue("local", *files(job), *options, **changes)


# What works -------------------------------------------------------------------------------------------------------


def test_local_trains_to_final_weights_and_says_where_they_are(trained_once: Trained) -> None:
    job, run = trained_once
    for file in ("bank/final/base", "insurer/final/base", "insurer/final/fuse"):
        path = job.parent / "run" / f"{file}.safetensors"
        assert path.exists() and str(path) in run.stdout
    history = (job.parent / "run" / "scheduler" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == list(range(5))
    assert len(re.findall(r"^ \d ", run.stdout, re.MULTILINE)) == 5  # the table has a row an epoch
    assert "epoch 5/5" in run.stderr and "samples/s" in run.stderr


def test_without_held_out_rows_the_history_has_only_the_loss(job: Path) -> None:
    edit(job, "holdout = 0.2", "# no holdout")
    run = local(job, "--out", job.parent / "run")
    assert run.returncode == 0, run.stderr
    assert re.match(r" epoch +step +loss +seconds *\n", run.stdout)
    assert len(re.findall(r"^ \d ", run.stdout, re.MULTILINE)) == 5
    assert re.search(r"epoch 5/5  loss \d\.\d{4}  samples/s", run.stderr)
    history = (job.parent / "run" / "scheduler" / "history.jsonl").read_text().splitlines()
    assert all(json.loads(line)["holdout"] is None for line in history)


def test_a_wrong_environment_variable_is_one_line() -> None:
    program = "from sl_queue.local.threads import shared_threads; from sl_queue.launch.process import leaving\n"
    command = [sys.executable, "-c", f"{program}with leaving(): shared_threads(2)"]
    env = environment(SL_QUEUE_THREADS="abc")
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "SL_QUEUE_THREADS = 'abc'" in done.stderr


def test_a_finished_run_says_so_and_exits_0(trained_once: Trained) -> None:
    job, first = trained_once
    again = local(job, "--out", job.parent / "run")
    assert again.returncode == 0
    assert again.stdout == first.stdout
    assert "already finished" in again.stderr


def test_final_weights_that_were_altered_are_written_again(trained: Path) -> None:
    job = trained
    final = job.parent / "run" / "bank" / "final" / "base.safetensors"
    whole = final.read_bytes()
    final.write_bytes(b"junk")
    (job.parent / "run" / "scheduler" / "history.jsonl").unlink()
    again = local(job, "--out", job.parent / "run")
    assert again.returncode == 0, again.stderr
    assert final.read_bytes() == whole
    assert (job.parent / "run" / "scheduler" / "history.jsonl").exists()


def test_a_state_that_is_lost_after_the_end_ends_with_what_to_do(trained: Path) -> None:
    job = trained
    shutil.rmtree(job.parent / "run" / "bank")
    again = local(job, "--out", job.parent / "run")
    assert again.returncode == 4
    assert "they are lost; to train from scratch" in again.stderr


def test_another_job_on_the_same_folders_is_told_what_differs(trained: Path) -> None:
    job = trained
    edit(job, "epochs = 5", "epochs = 7")
    again = local(job, "--out", job.parent / "run")
    assert again.returncode == 4
    assert "epochs: 7 here, 5 there" in again.stderr and "--out" in again.stderr


def test_help_shows_the_names_of_tables(job: Path) -> None:
    told = re.sub(r"\s+", " ", sl_queue("plan", "--help").stdout)
    assert "which [pipeline] and [wire] are fastest" in told


def test_without_out_the_state_lies_where_the_party_files_say(job: Path) -> None:
    assert local(job).returncode == 0
    assert (job.parent / "state" / "insurer" / "final" / "fuse.safetensors").exists()
    assert (job.parent / "state" / "scheduler" / "history.jsonl").exists()


def test_the_demo_trains_offline_and_the_joint_model_beats_each_party_alone(tmp_path: Path) -> None:
    command, env = [COMMAND, "demo", "--out", tmp_path / "demo"], environment(SL_QUEUE_BROKER="amqp://nowhere.invalid")
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    joint, left, right, joined = (float(number) for number in re.findall(r"  (0\.\d{4}) *$", run.stdout, re.MULTILINE))
    assert joint == joined
    assert joint > max(left, right) + 0.02
    assert "largest difference of any weight, split and joined: 0\n" in run.stdout
    assert "samples/s" in run.stderr
    (check_line,) = re.findall(r"sl-queue (check .*)", run.stdout)
    assert sl_queue(*check_line.split()).returncode == 0


def test_a_terminal_gets_a_progress_bar(job: Path) -> None:
    edit(job, "epochs = 5", "epochs = 60")
    master, slave = pty.openpty()
    terminal = {"stdout": Path(os.devnull), "stderr": Path(os.ttyname(slave))}
    command, shown = ["sl-queue", "local", *files(job), "--out", job.parent / "run"], b""
    with forked(command, environment(TERM="xterm"), **terminal) as run:
        while run.poll() is None:
            if select.select([master], [], [], 0.05)[0]:
                shown += os.read(master, 65536)
        assert run.wait() == 0
    os.close(slave)
    os.close(master)
    text = shown.decode()
    assert re.search(r"credit: epoch \d+/60 .*━.* step \d+/120  loss \d\.\d+  samples/s [\d.,]+", text)


def test_check_of_a_sound_job_exits_0(job: Path) -> None:
    check = sl_queue("check", *files(job))
    assert check.returncode == 0
    assert "equal bit for bit" in check.stdout


# What is wrong ----------------------------------------------------------------------------------------------------

BASE, FUSE = "hidden_dim = 32", "input_dim = 48"

Spoil = Callable[[Path], None]  # gets the folder


def file_edit(name: str, old: str, new: str) -> Spoil:
    return lambda folder: edit(folder / name, old, new)


def column(name: str, change: Callable[[np.ndarray], object]) -> Spoil:  # type: ignore[type-arg]
    def spoil(folder: Path) -> None:
        columns = bank_columns(folder)
        columns[name] = change(columns[name].copy())  # type: ignore[attr-defined]
        write_bank(folder, columns)

    return spoil


def with_first(value: object) -> Callable[[np.ndarray], object]:  # type: ignore[type-arg]
    return lambda values: [value, *values.tolist()[1:]]


def rows_gone(folder: Path) -> None:
    write_bank(folder, {name: values[7:] for name, values in bank_columns(folder).items()})  # type: ignore[index]


def labels_of_three_classes(folder: Path) -> None:
    edit(folder / "insurer.toml", "bce_with_logits", "cross_entropy")
    edit(folder / "insurer.toml", "output_dim = 1", "output_dim = 2")
    text = (folder / "insurer.csv").read_text()
    (folder / "insurer.csv").write_text(re.sub(r",[01]\n", ",2\n", text, count=1))


WRONG: dict[str, tuple[Spoil, int, str]] = {
    "an unknown key in the job": (file_edit("job.toml", "epochs", "epoches"), 2, "epoches"),
    "a missing key in the job": (file_edit("job.toml", "seed = 7\n", ""), 2, "seed"),
    "an unknown key in a party file": (file_edit("bank.toml", "[base]", "[base]\ndepth = 3"), 2, "depth"),
    "a missing key in a party file": (file_edit("bank.toml", 'model = "bank', '# "'), 2, "base.model"),
    "no label holder": (file_edit("job.toml", '"label"', '"feature"'), 2, "exactly one party holds the labels"),
    "two label holders": (file_edit("job.toml", '"feature"', '"label"'), 2, "exactly one party holds the labels"),
    "a party that is not in the job": (file_edit("bank.toml", 'party = "bank"', 'party = "bnak"'), 2, "bnak"),
    "more micro-batches than rows": (file_edit("job.toml", "micro_batches = 4", "micro_batches = 129"), 2, "128"),
    "a file with a byte order mark and a mistake": (
        lambda folder: (folder / "job.toml").write_text("\ufeff" + (folder / "job.toml").read_text() + "\nx = 1"),
        2,
        r"\.x is unknown",
    ),
    "a file that is not there": (file_edit("bank.toml", "bank.parquet", "bonk.parquet"), 2, "bonk.parquet"),
    "a missing column": (file_edit("bank.toml", '"customer_id"', '"client_id"'), 2, "client_id"),
    "repeated ids": (column("customer_id", with_first(5)), 2, "1 of 200 rows repeat"),
    "null ids": (column("customer_id", with_first(None)), 2, "1 of 200 rows have no id"),
    "a text column": (column("age", lambda values: ["old"] * len(values)), 2, "'age'"),
    "NaN in a feature": (column("age", with_first(float("nan"))), 2, "'age'"),
    "infinity in a feature": (column("income", with_first(float("inf"))), 2, "'income'"),
    "NaN in the labels": (file_edit("insurer.csv", ",1\n", ",nan\n"), 2, "defaulted"),
    "class labels out of range": (labels_of_three_classes, 2, "class labels go from 0 to 2"),
    "parties whose ids differ": (rows_gone, 3, r"193.*200|200.*193"),
    "a base whose output is not the cut": (file_edit("bank.toml", BASE, "hidden_dim = 31"), 5, r"\(rows, 32\)"),
    "a fuse that fails on the cuts": (file_edit("insurer.toml", FUSE, "input_dim = 40"), 5, "insurer:FuseModel"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_local_says_what_is_wrong_and_exits_accordingly(job: Path, what: str) -> None:
    spoil, code, says = WRONG[what]
    spoil(job.parent)
    run = local(job, "--out", job.parent / "run")
    assert run.returncode == code, run.stderr
    assert len(re.findall("^error: ", run.stderr, re.MULTILINE)) == 1
    assert re.search(says, run.stderr)
    assert "Traceback" not in run.stderr
    assert not list(job.parent.glob("run/*/final/*"))


def test_a_nan_loss_in_the_middle_names_party_step_and_what(job: Path) -> None:
    insurer = job.parent / "insurer.py"
    edit(insurer, "import torch\n", "import torch\n\nCALLS = []\n")
    edit(
        insurer,
        "return self.linear(torch.cat(inputs, dim=1))",
        "CALLS.append(0)\n        y = self.linear(torch.cat(inputs, dim=1))\n"
        "        return y * float('nan') if len(CALLS) > 14 else y",
    )
    run = local(job, "--out", job.parent / "run")
    assert run.returncode == 5
    assert re.search(r"party 'insurer', micro-batch [1-9]\.\d.*: the loss is nan", run.stderr)


def test_a_state_folder_of_another_job_is_refused(job: Path) -> None:
    assert local(job, "--out", job.parent / "run").returncode == 0
    edit(job, "seed = 7", "seed = 8")
    run = local(job, "--out", job.parent / "run")
    assert run.returncode == 4
    assert "another job" in run.stderr


def test_a_missing_party_file_is_named(job: Path) -> None:
    run = sl_queue("local", job, job.parent / "bank.toml")
    assert run.returncode == 2
    assert "no file for insurer" in run.stderr


def test_a_party_without_a_state_folder_needs_out(job: Path) -> None:
    edit(job.parent / "bank.toml", "state = ", "# ")
    run = local(job)
    assert run.returncode == 2
    assert "--out" in run.stderr


@pytest.mark.parametrize("party", ["bank", "insurer"])
def test_no_party_has_the_folder_of_the_scheduler(job: Path, party: str) -> None:
    edit(job.parent / f"{party}.toml", f'"state/{party}"', '"state/scheduler"')
    run = local(job)
    assert run.returncode == 2
    assert f"{party}.toml: state = " in run.stderr and f"give party '{party}' another" in run.stderr
    assert not (job.parent / "state").exists()


@pytest.mark.parametrize("command", ["status", "stop"])
def test_status_and_stop_need_a_broker(job: Path, command: str) -> None:
    assert sl_queue(command, job).returncode == 2
    assert "--broker" in sl_queue(command, job).stderr
    assert sl_queue(command, job, "--broker", "memory://").returncode == 2


def test_debug_shows_the_traceback(job: Path) -> None:
    edit(job, "epochs", "epoches")
    assert "Traceback" in local(job, "--debug").stderr
    assert "Traceback" in local(job, SL_QUEUE_DEBUG="1").stderr
    assert "Traceback" not in local(job, SL_QUEUE_DEBUG="0").stderr


def test_ctrl_c_ends_with_130_and_the_run_can_go_on(job: Path) -> None:
    edit(job, "epochs = 5", "epochs = 2000")
    command = ["sl-queue", "local", *files(job), "--out", job.parent / "run"]
    said = job.parent / "said"
    with forked(command, environment(), stdout=Path(os.devnull), stderr=said) as run:
        await_that(lambda: "epoch 3/" in said.read_text(), said.read_text)
        run.send_signal(signal.SIGINT)
        assert run.wait() == 130, said.read_text()
    assert "interrupted; the same command resumes" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert not list(job.parent.glob("run/*/final/*"))
    again = job.parent / "again"
    with forked(command, environment(), stdout=Path(os.devnull), stderr=again):
        await_that(lambda: re.search(r"epoch \d+/", again.read_text()), again.read_text)
    assert int(re.findall(r"epoch (\d+)/", again.read_text())[0]) >= 3
