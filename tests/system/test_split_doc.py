"""The page on splitting: its three steps run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "split.md"


def test_the_three_steps_of_the_page_run_as_they_stand(tmp_path: Path) -> None:
    text = PAGE.read_text()
    whole, verify = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (command,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    (tmp_path / "whole.py").write_text(whole)
    _, *words = shlex.split(command)
    listed = run([str(Path(sys.executable).with_name("sl-queue")), *words], tmp_path)
    layers = {line.split()[0] for line in listed.splitlines()[1:] if line.strip()}
    assert {"bank.2", "insurer.2"} <= layers
    (tmp_path / "verify.py").write_text(verify)
    found = run([sys.executable, "verify.py"], tmp_path)
    assert 0 < float(found.split()[0]) < 1
    assert "'bank': {'bank_2': (32,)}" in found


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_found_from_the_index() -> None:
    assert "(split.md)" in (ROOT / "docs" / "README.md").read_text()
