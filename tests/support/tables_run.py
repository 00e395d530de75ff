"""`sl-queue local` as a process of its own, with a look at its workers."""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.system.test_cli import COMMAND


@dataclass(slots=True)
class LocalRun:
    process: subprocess.Popen[str]
    out: Path
    said: Path

    @property
    def text(self) -> str:
        return self.said.read_text()

    def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.text
            time.sleep(0.01)

    def worker(self, role: str) -> int:
        """Return the process id of a role's worker."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = folder.joinpath("cmdline").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if any(word.startswith("workers.") for word in words) and str(self.out / role) in words:
                return int(folder.name)
        raise AssertionError(f"no worker of {role}: {self.text}")

    def wait(self) -> int:
        return self.process.wait(150)


@contextmanager
def started(files: Sequence[Path], out: Path, environ: Mapping[str, str]) -> Iterator[LocalRun]:
    said = out.parent / "said.txt"
    with said.open("w") as file:
        command = [COMMAND, "local", *map(str, files), "--out", str(out)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=dict(environ))
        try:
            yield LocalRun(process, out, said)
        finally:
            process.kill()
            process.wait()
