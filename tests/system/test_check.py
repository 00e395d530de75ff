"""`sl-queue check` finds what can be wrong before anything is started, all of it, and tells no ids."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sl_queue.checking.check import check_job
from sl_queue.checking.findings import Finding, Level
from tests.support.credit import FILES, bank_columns, edit, write_bank, write_credit

torch.set_num_threads(1)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_credit(tmp_path)


def check(job: Path, *parties: str, broker: str | None = None) -> tuple[int, list[Finding]]:
    findings: list[Finding] = []
    code = check_job(job, [job.parent / name for name in parties or FILES], broker, findings.append)
    return code, findings


def texts(findings: list[Finding], level: Level) -> list[str]:
    """Return all of a level, but for the warning that every job without a defence of its labels gets."""
    found = [finding.text for finding in findings if finding.level is level]
    return [text for text in found if "can read your labels" not in text]


def told(findings: list[Finding]) -> str:
    return "\n".join(finding.text for finding in findings)


def test_a_sound_job_has_no_errors_and_its_first_steps_are_equal_bit_for_bit(job: Path) -> None:
    code, findings = check(job)
    assert code == 0
    assert not texts(findings, Level.ERROR) and not texts(findings, Level.WARNING)
    assert "3 steps split and joined: all weights are equal bit for bit" in texts(findings, Level.OK)


def test_it_spells_out_the_order_of_work_the_messages_and_the_names(job: Path) -> None:
    _, findings = check(job)
    said = told(findings)
    assert "|0 F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3 U0" in said
    assert "|0 X0.0 X0.1 X0.2 X0.3 U0" in said
    assert "prefetch: at most" in said
    assert "bank: writes to exchange x.bank, reads queues q.bank.scheduler, q.bank.insurer" in said
    assert "bank: largest message" in said
    assert "broker: a step is 8 messages and" in said
    assert "at the pace of these models" in said


def test_a_single_party_can_check_its_own_side(job: Path) -> None:
    code, findings = check(job, "bank.toml")
    assert code == 0
    assert "bank: the base model's activation is float32 (32, 32), as the cut layer" in texts(findings, Level.OK)
    assert "not looked at: insurer (no party file was given)" in told(findings)
    code, findings = check(job, "insurer.toml")
    assert code == 0
    assert "insurer: fuse model and loss accept the cut layers bank [32], insurer [16]" in texts(findings, Level.OK)


def test_all_errors_are_told_and_the_first_one_decides_the_exit_code(job: Path) -> None:
    edit(job.parent / "bank.toml", "hidden_dim = 32", "hidden_dim = 31")  # a ShapeError, 5
    edit(job.parent / "insurer.toml", 'label = "defaulted"', 'label = "default"')  # a JobError, 2
    code, findings = check(job)
    errors = [finding for finding in findings if finding.level is Level.ERROR]
    assert [finding.exit_code for finding in errors] == [2, 5]
    assert code == 2
    assert "default" in errors[0].text and "(2, 31)" in errors[1].text and "bank:BaseModel" in errors[1].text


def test_party_files_are_read_even_if_the_job_is_wrong(job: Path) -> None:
    edit(job, "epochs = 5", "epoch = 5")
    edit(job.parent / "bank.toml", 'party = "bank"', 'partei = "bank"')
    code, findings = check(job)
    assert code == 2
    assert len(texts(findings, Level.ERROR)) == 2


def test_files_in_another_order_or_of_one_party_or_with_one_folder_are_told_so(job: Path) -> None:
    bank, insurer = job.parent / "bank.toml", job.parent / "insurer.toml"
    found: list[Finding] = []
    assert check_job(bank, [job, insurer], None, found.append) == 2
    assert [text.partition(";")[0] for text in texts(found, Level.ERROR)] == [
        f"{bank}: is a party file",
        f"{job}: is a job file",
    ]
    code, findings = check(job, "bank.toml", "bank.toml")
    assert (code, texts(findings, Level.ERROR)) == (2, ["two files are of the party 'bank'; give one for each party"])
    edit(insurer, "state/insurer", "state/bank")
    code, findings = check(job)
    assert code == 2 and "have one state folder" in texts(findings, Level.ERROR)[0]


def test_different_ids_are_told_as_counts(job: Path) -> None:
    columns = bank_columns(job.parent)
    write_bank(job.parent, {name: values[7:] for name, values in columns.items()})  # type: ignore[index]
    code, findings = check(job)
    assert code == 3
    (error,) = texts(findings, Level.ERROR)
    assert "bank 193" in error and "insurer 200" in error


def test_ids_are_never_told(job: Path) -> None:
    columns = bank_columns(job.parent)
    secret = 987654321
    write_bank(job.parent, {**columns, "customer_id": np.arange(secret, secret + 200)})
    _, findings = check(job)
    assert not re.search(r"98765\d{4}", told(findings))


@pytest.mark.parametrize(
    ("file", "old", "new", "code", "says"),
    [
        ("bank.toml", "hidden_dim = 32", "hidden_dim = 31", 5, "the cut layer is float32 (rows, 32)"),
        ("insurer.toml", "input_dim = 48", "input_dim = 40", 5, "insurer:FuseModel"),
        ("insurer.toml", '"bce_with_logits"', '"cross_entropy"', 2, "class labels go from 0 to 1"),
        ("job.toml", 'cut = [16]', 'cut = [15]', 5, "the cut layer is float32 (rows, 15)"),
        ("bank.py", "return self.relu(self.linear(x))", "raise ValueError('broken')", 5, "broken"),
    ],
)  # fmt: skip
def test_models_are_tried_out(job: Path, file: str, old: str, new: str, code: int, says: str) -> None:
    edit(job.parent / file, old, new)
    found, findings = check(job)
    assert found == code
    assert says in "\n".join(texts(findings, Level.ERROR))


def test_batchnorm_is_tried_on_the_smallest_micro_batch(job: Path) -> None:
    """160 rows in batches of 53 leave one row for the last."""
    edit(job, "batch_size = 128", "batch_size = 53")
    edit(job, "micro_batches = 4", "micro_batches = 1")
    edit(job.parent / "bank.py", "self.relu = nn.ReLU()", "self.relu = nn.Sequential(nn.BatchNorm1d(32), nn.ReLU())")
    code, findings = check(job)
    assert code == 5
    (error,) = texts(findings, Level.ERROR)
    assert "with 1 row(s)" in error and "drop_last = true" in error
    edit(job, "batch_size = 53", "drop_last = true\nbatch_size = 53")
    assert check(job)[0] == 0


def test_a_message_that_rabbitmq_4_refuses_is_a_warning_that_says_what_fits(job: Path) -> None:
    cut = 200_000
    edit(job, "cut = [32]", f"cut = [{cut}]")
    edit(job.parent / "bank.toml", "hidden_dim = 32", f"hidden_dim = {cut}")
    edit(job.parent / "insurer.toml", "input_dim = 48", f"input_dim = {cut + 16}")
    code, findings = check(job)
    assert code == 0
    (warning,) = texts(findings, Level.WARNING)
    fitting = re.search(r"micro_batches = (\d+) fits", warning)
    assert fitting is not None
    edit(job, "micro_batches = 4", f"micro_batches = {fitting[1]}")
    assert not texts(check(job)[1], Level.WARNING)
    edit(job, f"micro_batches = {fitting[1]}", f"micro_batches = {int(fitting[1]) - 1}")
    assert texts(check(job)[1], Level.WARNING)


def test_what_is_not_joined_training_is_said(job: Path) -> None:
    assert "joined training" not in told(check(job)[1])
    edit(job, "[pipeline]", '[wire]\ndtype = "float16"\n\n[pipeline]\nstaleness = 2')
    notes = texts(check(job)[1], Level.NOTE)
    assert any(note.startswith("staleness = 2: ") and "not those of joined training" in note for note in notes)
    assert any(note.startswith("[wire] dtype = 'float16': ") and "not equal" in note for note in notes)


def test_a_module_that_ends_the_process_is_an_error_of_its_file(job: Path) -> None:
    edit(job.parent / "bank.py", "import torch\n", "import sys\n\nimport torch\n\nsys.exit(3)\n")
    code, findings = check(job, "bank.toml")
    assert code == 2
    assert f"importing 'bank' from {job.parent} fails: SystemExit: 3" in told(findings)


@pytest.mark.parametrize(("dtype", "row_bytes"), [("float32", 128), ("float16", 64), ("int8", 32 + 4)])
def test_the_largest_message_is_as_large_as_it_travels(job: Path, dtype: str, row_bytes: int) -> None:
    edit(job, "[pipeline]", f'[wire]\ndtype = "{dtype}"\ncompress = "bitmap"\n\n[pipeline]')
    _, findings = check(job)
    assert f"(32 rows of {row_bytes} bytes and a header)" in told(findings)


def test_too_much_computing_between_two_commits_is_a_warning(tmp_path: Path) -> None:
    job = write_credit(tmp_path, rows=3000)
    bank = job.parent / "bank.py"
    edit(bank, "return self.relu(self.linear(x))", "time.sleep(0.2)\n        return self.relu(self.linear(x))")
    edit(bank, "import torch\n", "import time\n\nimport torch\n")
    edit(job, "batch_size = 128", "batch_size = 1")
    edit(job, "micro_batches = 4", "micro_batches = 1\ncheckpoint_every = 10000")  # 2400 steps of 0.6 s an epoch
    _, findings = check(job, "bank.toml")
    (warning,) = texts(findings, Level.WARNING)
    assert "lower checkpoint_every" in warning
    edit(job, "checkpoint_every = 10000", "checkpoint_every = 100")
    _, findings = check(job, "bank.toml")
    assert not texts(findings, Level.WARNING)


def test_a_model_with_randomness_of_its_own_is_found(job: Path) -> None:
    """A model's draws from the system cannot be repeated, so split and joined differ."""
    bank = job.parent / "bank.py"
    edit(
        bank,
        "return self.relu(self.linear(x))",
        "return self.relu(self.linear(x)) * (1 + random.SystemRandom().random())",
    )
    edit(bank, "import torch\n", "import random\n\nimport torch\n")
    for name in FILES:
        edit(job.parent / name, '"adam"', '"sgd"')  # Adam's first step does not depend on a gradient's size
    code, findings = check(job)
    assert code == 5
    assert "weights differ by up to" in "\n".join(texts(findings, Level.ERROR))


def test_labels_that_nothing_defends_are_a_warning_with_the_number(job: Path) -> None:
    def warnings(*parties: str) -> list[str]:
        findings = [f for f in check(job, *parties)[1] if "can read your labels" in f.text]
        assert all(finding.level is Level.WARNING for finding in findings)
        return [finding.text for finding in findings]

    (warning,) = warnings()
    expected = r"insurer: bank can read your labels from its gradients \(attack AUC (1\.00|0\.9\d) on 160 rows here\)"
    assert re.match(expected, warning)
    (alone,) = warnings("insurer.toml")
    assert "on 160 rows here, with random numbers as activations of bank)" in alone
    edit(job.parent / "insurer.toml", "[data]", "[privacy]\nlabels = { epsilon = 3.0 }\n\n[data]")
    assert not warnings()
