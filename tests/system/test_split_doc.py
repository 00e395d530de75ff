"""The page on splitting: its three steps run as they stand."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tests.support.forked import environment, forked

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "split.md"


def test_the_three_steps_of_the_page_run_as_they_stand(tmp_path: Path) -> None:
    text = PAGE.read_text()
    whole, verify = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (command,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    (tmp_path / "whole.py").write_text(whole)
    _, *words = shlex.split(command)
    listed = run(["sl-queue", *words], tmp_path)
    layers = {line.split()[0] for line in listed.splitlines()[1:] if line.strip()}
    assert {"bank.2", "insurer.2"} <= layers
    (tmp_path / "verify.py").write_text(verify)
    found = run([tmp_path / "verify.py"], tmp_path)
    assert 0 < float(found.split()[0]) < 1
    assert "'bank': {'bank_2': (32,)}" in found


def run(words: Sequence[object], folder: Path) -> str:
    said, complained = folder / f"{Path(str(words[0])).name}.said", folder / "complained"
    with forked(words, environment(), cwd=folder, stdout=said, stderr=complained) as process:
        assert process.wait() == 0, complained.read_text()
    return said.read_text()


def test_the_page_is_found_from_the_index() -> None:
    assert "(split.md)" in (ROOT / "docs" / "README.md").read_text()
