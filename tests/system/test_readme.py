"""The README is true: its commands run, its files are those of the example, its links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BROKER = "amqp://guest:guest@localhost:5672/%2F"  # as the README writes it


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Lay out a fresh clone after its first two commands, as far as the others need one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=lambda _, names: _not_tracked(names))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def _not_tracked(names: list[str]) -> set[str]:
    ignored = (ROOT / "examples/credit/.gitignore").read_text().split()
    return {name for name in names if name in ("__pycache__", *(line.strip("/") for line in ignored))}


def run(command: list[str], folder: Path, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    """Run a command as someone does who has installed nothing: what is in .venv is not on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SL_QUEUE_", "VIRTUAL_ENV"))}
    own = Path(sys.executable).parent
    path = os.pathsep.join(place for place in kept["PATH"].split(os.pathsep) if Path(place) != own)
    environ = {**kept, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_its_commands_run_as_printed_one_after_the_other_in_one_shell(folder: Path, broker_url: str) -> None:
    shell = blocks("sh")
    assert len(shell) == 3
    assert BROKER in README
    (activate,) = re.findall(r"^    (\. \S+)", README, re.MULTILINE)
    script = "\n".join([activate, *shell]).replace(BROKER, broker_url)
    done = run(["bash", "-e", "-c", script], folder, timeout_s=550)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    for weights in ("bank/final/base", "insurer/final/base", "insurer/final/fuse"):
        assert (folder / "examples/credit/state" / f"{weights}.safetensors").exists()


def test_without_its_first_commands_the_others_are_not_found(folder: Path) -> None:
    done = run(["bash", "-c", "sl-queue --help"], folder)
    assert done.returncode == 127, done.stdout


def test_its_python_runs(folder: Path) -> None:
    make_data = run([sys.executable, "examples/credit/make_data.py", "500"], folder)
    assert make_data.returncode == 0, make_data.stderr
    (block,) = blocks("python")
    done = run([sys.executable, "-c", block], folder)
    assert done.returncode == 0, done.stderr
    assert "'auroc':" in done.stdout and "BaseModel(" in done.stdout


def test_the_joined_training_of_the_documents_gives_the_bits_of_the_split_one(tmp_path: Path) -> None:
    (program,) = blocks("python", (ROOT / "docs/joined.md").read_text())
    done = run([sys.executable, "-c", program], tmp_path)
    assert done.stdout == "equal bit for bit: True\n", done.stderr


def test_its_files_are_those_of_the_example() -> None:
    files = [block.removeprefix("# ").split("\n", 1) for block in blocks("toml")]
    assert [name for name, _ in files] == ["examples/credit/job.toml", "examples/credit/bank.toml"]
    for name, text in files:
        assert (ROOT / name).read_text() == text


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


def test_its_first_two_commands_are_targets_of_the_makefile() -> None:
    assert re.findall(r"^    make (\w+)", README, re.MULTILINE) == ["demo", "test"]
    for target in ("demo", "test"):
        planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {"demo": "sl-queue demo", "test": "pytest"}[target] in planned.stdout
