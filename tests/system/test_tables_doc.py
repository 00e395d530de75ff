"""docs/tables.md is run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.forked import sl_queue

DOC = Path(__file__).parents[2] / "docs" / "tables.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_goes_from_raw_files_to_a_model(tmp_path: Path) -> None:
    blocks = [(kind, text) for kind, text in BLOCK.findall(DOC.read_text())]
    for kind, text in blocks:
        if kind in ("python", "toml"):
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text)
    subprocess.run([sys.executable, "tables.py"], cwd=tmp_path, check=True, timeout=300)
    (commands,) = (text for kind, text in blocks if kind == "sh")
    said = {}
    for command in commands.splitlines():
        program, *words = command.partition("#")[0].split()
        assert program == "sl-queue"
        done = sl_queue(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said[words[0]] = done.stdout
    assert "rows: 1300 are shared by bank, insurer" in said["check"]
    assert "bank: 1300 of its 2200 rows are shared by all" in said["align"]
    assert "insurer: 1300 of its 2100 rows are shared by all" in said["align"]
    assert "bank: 1300 rows; 10 columns come out of 3, fitted on 1040 training rows" in said["features"]
    assert "held-out auroc" in said["local"]
    for party in ("bank", "insurer"):
        assert (tmp_path / "state" / party / "aligned.json").exists()
        assert (tmp_path / "state" / party / "final" / "features.json").exists()
        assert (tmp_path / "state" / party / "final" / "base.safetensors").exists()
