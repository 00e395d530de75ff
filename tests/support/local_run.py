"""`sl-queue local` over a broker: what it says while it runs, and a look at its workers, started as a user's are."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.support.forked import Forked, environment, forked
from tests.support.waiting import await_that

ENDS_S = 200.0


@dataclass(frozen=True, slots=True)
class LocalRun:
    """The command under way, its folder of state folders, and the file with all that was said."""

    process: Forked
    out: Path
    said: Path

    @property
    def text(self) -> str:
        return self.said.read_text()

    def until(self, pattern: str, times: int = 1) -> None:
        """Wait until that was said so often."""
        self.until_it_is_so(lambda: len(re.findall(pattern, self.text)) >= times, pattern)

    def until_it_is_so(self, condition: Callable[[], bool], what: str) -> None:
        def over() -> bool:
            ended = self.process.poll() is not None
            assert condition() or not ended, f"it ended before {what!r}:\n{self.text}"
            return condition()

        await_that(over, lambda: f"{what!r} was waited for:\n{self.text}")

    def workers(self) -> dict[str, int]:
        """Return the process id of each role's worker, by the name of its state folder."""
        found = self._commands()
        return {Path(words[words.index("--state") + 1]).name: pid for pid, words in found if "--state" in words}

    def pids(self, module: str) -> list[int]:
        """Return the process ids of the workers of that kind."""
        return sorted(pid for pid, words in self._commands() if module in words)

    def _commands(self) -> list[tuple[int, list[str]]]:
        folder = str(self.out.parent)
        found = [(int(place.name), words_of(int(place.name))) for place in Path("/proc").glob("[0-9]*")]
        return [
            (pid, words)
            for pid, words in found
            if any(word.startswith("workers.") for word in words) and any(folder in word for word in words)
        ]

    def wait(self) -> int:
        """Return the exit code, when it has ended."""
        await_that(lambda: self.process.poll() is not None, lambda: f"it has not ended:\n{self.text}", ENDS_S)
        return self.process.wait()

    def finish(self) -> None:
        """Wait for a good end."""
        assert self.wait() == 0, self.text


def words_of(pid: int) -> list[str]:
    """Return the command line of a process; of none that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def gone(pid: int) -> bool:
    """Return True if there is no such process, or only its exit code."""
    return words_of(pid) in ([], [""])


@contextmanager
def started(files: Sequence[Path], out: Path, broker: str, *options: str) -> Iterator[LocalRun]:
    """Start `sl-queue local` with these files; it is killed at the end of the `with` statement."""
    out.parent.mkdir(exist_ok=True)
    said = out.parent / f"{out.name}.said"
    said.unlink(missing_ok=True)
    words = ["sl-queue", "local", *files, "--out", out, *options]
    with forked(words, environment(SL_QUEUE_BROKER=broker), stdout=said, stderr=said) as process:
        yield LocalRun(process, out, said)


def weights(out: Path) -> dict[str, str]:
    """Return the SHA-256 of every final weight file."""
    paths = sorted(out.glob("*/final/*.safetensors"))
    assert len(paths) == 3
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in paths}
