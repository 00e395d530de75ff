"""Commands around a party's secret: `key --private` makes it, `check` uses it, and `local` needs none."""

from pathlib import Path

import pytest

from sl_queue.storage.secret_file import read_secret, write_secret
from tests.support.credit import edit, write_credit
from tests.support.forked import sl_queue
from tests.system.test_check import check, told
from tests.system.test_cli import local

DROPOUT = "        return self.relu"


@pytest.fixture
def job(tmp_path: Path, unique: str) -> Path:
    """Write the example, with a bank whose model draws."""
    job = write_credit(tmp_path)
    edit(job, 'name = "credit"', f'name = "{unique}"')
    edit(tmp_path / "bank.py", DROPOUT, "        x = torch.nn.functional.dropout(x, 0.5, self.training)\n" + DROPOUT)
    return job


def named(job: Path, secret: str) -> None:
    bank = job.parent / "bank.toml"
    bank.write_text(f'{bank.read_text()}\n[privacy]\nsecret = "{secret}"\n')


def test_key_makes_a_secret_that_only_its_owner_may_read_and_prints_the_table_for_the_party_file(
    tmp_path: Path,
) -> None:
    out = tmp_path / "bank.secret"
    made = sl_queue("key", "--private", "--out", out)
    assert made.returncode == 0, made.stderr
    assert f'[privacy]\nsecret = "{out}"' in made.stdout
    assert out.stat().st_mode & 0o777 == 0o600
    assert read_secret(out).hex() not in made.stdout
    again = sl_queue("key", "--private", "--out", out)
    assert again.returncode == 2
    assert "there is a file already" in again.stderr


@pytest.mark.parametrize(("arguments", "told"), [(["bank", "--private"], "has no NAME"), ([], "give the NAME")])
def test_a_key_is_of_somebody_and_a_secret_is_not(tmp_path: Path, arguments: list[str], told: str) -> None:
    wrong = sl_queue("key", *arguments, "--out", tmp_path / "key")
    assert wrong.returncode == 2
    assert told in wrong.stderr
    assert not (tmp_path / "key").exists()


def test_check_compares_split_and_joined_with_the_secret_that_is_configured(job: Path) -> None:
    write_secret(job.parent / "bank.secret")
    named(job, "bank.secret")
    code, findings = check(job)
    assert code == 0
    assert "split and joined: all weights are equal bit for bit" in told(findings)


def test_check_finds_a_secret_that_is_missing_or_that_others_may_read(job: Path) -> None:
    named(job, "bank.secret")
    code, findings = check(job)
    assert code == 2
    assert "bank.secret: the secret of [privacy] cannot be read" in told(findings)
    write_secret(job.parent / "bank.secret")
    (job.parent / "bank.secret").chmod(0o644)
    code, findings = check(job)
    assert code == 2
    assert "others may read this secret (mode 644)" in told(findings)


def test_local_gives_the_same_bits_as_threads_and_as_processes_with_a_model_that_draws(
    job: Path, broker_url: str
) -> None:
    threads = local(job, "--out", job.parent / "threads")
    assert threads.returncode == 0, threads.stderr
    processes = local(job, "--out", job.parent / "processes", "--broker", broker_url)
    assert processes.returncode == 0, processes.stderr
    for name in ("bank/final/base", "insurer/final/fuse"):
        one, other = ((job.parent / run / f"{name}.safetensors").read_bytes() for run in ("threads", "processes"))
        assert one == other
    assert not (job.parent / "processes" / "bank" / "secret").exists()
    edit(job.parent / "bank.py", "0.5", "0.4")
    again = local(job, "--out", job.parent / "processes", "--broker", broker_url)
    assert again.returncode == 4
    assert "the source code of bank:BaseModel has changed" in again.stderr
