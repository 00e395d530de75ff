"""Imports point down only, and every outside package has one owner, as [tool.importlinter] of pyproject.toml says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sources import ROOT, modules


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """Hold the packages in a folder against its contracts."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True, cache_dir=None))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


def test_every_contract_about_imports_is_kept() -> None:
    done = linted(ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


# Modules that are wrong, each with the arrow that the linter must name.
WRONG = {
    "errors_wrong.py": ("sl_queue.errors_wrong", ""),  # a module on no floor
    "protocol/wrong.py": ("from sl_queue import ports", "sl_queue.protocol.wrong -> sl_queue.ports"),
    "protocol/impure.py": ("import time", "sl_queue.protocol.impure -> time"),
    "loops/wrong.py": ("from sl_queue.transport import link", "sl_queue.loops.wrong -> sl_queue.transport.link"),
    "compute/wrong.py": ("from sl_queue.data import table", "sl_queue.compute.wrong -> sl_queue.data.table"),
    "compute/agreed.py": ("from sl_queue.config import job", "sl_queue.compute.agreed -> sl_queue.config.job"),
    "transport/wrong.py": ("from sl_queue.storage import files", "sl_queue.transport.wrong -> sl_queue.storage.files"),
    "launch/wrong.py": ("from sl_queue.cli import main", "sl_queue.launch.wrong -> sl_queue.cli.main"),
    "planning/wrong.py": ("from sl_queue.testing import chaos", "sl_queue.planning.wrong -> sl_queue.testing.chaos"),
    "storage/wrong.py": ("import torch", "sl_queue.storage.wrong -> torch"),
    "security/wrong.py": ("import pika", "sl_queue.security.wrong -> pika"),
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the linter's complaints about a copy with all of these."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("sl_queue", "workers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, (line, _) in WRONG.items():
        (folder / "sl_queue" / name).write_text(f"{line}\n" if line.startswith(("import", "from")) else "")
    done = linted(folder)
    assert done.returncode == 1
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("name", [name for name, (_, arrow) in WRONG.items() if arrow])
def test_an_import_that_points_up_or_sideways_is_found(name: str, complaints: str) -> None:
    assert WRONG[name][1] in complaints


def test_a_module_that_is_on_no_floor_is_found(complaints: str) -> None:
    assert "errors_wrong" in complaints


def names_of(*folders: str) -> list[str]:
    """Return the modules of these packages, to import."""
    files = [path.relative_to(ROOT).with_suffix("") for path in modules(*folders)]
    return sorted(".".join(file.parts).removesuffix(".__init__") for file in files)


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """Return what one process has loaded after each of these parts of the product, one after the other."""
    parts = (
        names_of("sl_queue/protocol", "sl_queue/loops"),
        ["sl_queue.config.job"],
        ["sl_queue.launch.scheduler", "sl_queue.transport.rabbitmq.link", "sl_queue.launch.operator"],
    )
    program = "\n".join(
        f"import sys, {', '.join(names)}; print(*({{'torch', 'pika', 'pyarrow'}} & set(sys.modules)))"
        for names in parts
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_importing_the_protocol_and_the_loops_loads_neither_torch_nor_pika(loaded: list[set[str]]) -> None:
    assert len(names_of("sl_queue/protocol", "sl_queue/loops")) > 12
    assert loaded[0] == set()


def test_reading_job_and_party_files_loads_no_torch_no_pika_and_no_arrow(loaded: list[set[str]]) -> None:
    assert loaded[1] == set()


def test_the_scheduler_and_the_operator_need_no_torch(loaded: list[set[str]]) -> None:
    assert "pika" in loaded[2] and "torch" not in loaded[2]
