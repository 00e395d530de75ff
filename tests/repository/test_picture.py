"""The picture of the house in the documentation is that of the code."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_picture_is_that_of_the_code() -> None:
    command = [sys.executable, "ops/picture.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    picture = (ROOT / "docs" / "house.svg").read_text()
    rooms = {path.parent.name for path in ROOT.glob("sl_queue/*/__init__.py")}
    assert len(rooms) > 15
    assert [room for room in sorted(rooms) if f">{room}</text>" not in picture] == []


def test_the_page_that_shows_it_names_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert "](house.svg)" in page
    rooms = {path.parent.name for path in ROOT.glob("sl_queue/*/__init__.py")}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in page] == []
