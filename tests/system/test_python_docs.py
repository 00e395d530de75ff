"""The pages for Python, and for those who come from elsewhere, hold programs that run; the notebook runs too."""

import json
import re
from pathlib import Path

import pytest

from sl_queue import Job, PartyFile, run_local
from tests.support.forked import environment, forked

ROOT = Path(__file__).parents[2]
PAGES = ("python", "from-secretflow", "from-fate", "from-nvflare")
NOTEBOOK = ROOT / "examples" / "notebook" / "split_model.ipynb"


def run(program: str, folder: Path) -> str:
    (folder / "program.py").write_text(program)
    streams = {"stdout": folder / "stdout", "stderr": folder / "stderr"}
    with forked([folder / "program.py"], environment(), cwd=folder, **streams) as process:
        code = process.wait()
    assert code == 0, streams["stderr"].read_text()
    return streams["stdout"].read_text()


@pytest.mark.parametrize("page", PAGES)
def test_the_program_of_a_page_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    *_, program = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    first = run(program, tmp_path).split()[0]
    assert 0 <= float(first) <= 1.5
    for folder in (tmp_path / "moved", tmp_path / "deployed"):
        if folder.exists():
            job = Job.load(folder / "job.toml")
            assert {PartyFile.load(folder / p / f"{p}.toml").party for p in job.parties} == set(job.parties)


def test_a_stranger_needs_fewer_than_fifteen_lines(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    program, *_ = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len([line for line in program.splitlines() if line.strip()]) < 15
    score, predicted = run(program, tmp_path).split(maxsplit=1)
    assert float(score) > 0.5
    assert re.fullmatch(r"\[[01]( [01]){4}\]\s*", predicted)
    job = Job.load(tmp_path / "deployed" / "job.toml")
    files = [PartyFile.load(tmp_path / "deployed" / party / f"{party}.toml") for party in job.parties]
    assert run_local(job.replace(epochs=1), files).history[0]["loss"] > 0


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert run(program, tmp_path).startswith('name = "model"')
    assert (tmp_path / "deployed" / "insurer" / "insurer.parquet").exists()
    assert not any(cell.get("outputs") for cell in cells), "outputs are not kept in git"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_found_from_the_index(page: str) -> None:
    assert f"({page}.md)" in (ROOT / "docs" / "README.md").read_text()
