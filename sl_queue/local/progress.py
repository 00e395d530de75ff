"""Progress for a caller in Python while a run goes on: a line of it, and each epoch once, in order."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from sl_queue.protocol.scheduler.state import number_text

OnStatus = Callable[[Mapping[str, Any]], None]
OnEpoch = Callable[[dict[str, Any]], None]

_BAR = 24  # characters


@dataclass(slots=True)
class Epochs:
    """Hands on each epoch as soon as it is in the scheduler's history. Mutable: it knows how far it has read.

    A run that went back trains epochs again; those are not handed on twice.
    """

    path: Path
    on_epoch: OnEpoch
    next: int = 0
    offset: int = 0

    def __call__(self, status: Mapping[str, Any]) -> None:
        """Look for new epochs; each status is passed on after its history is on disk."""
        if int(status["epoch"]) > self.next:
            self.read()

    def read(self) -> None:
        """Hand on what is new in the file."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self.offset:  # the run went back
            self.offset = 0
        if size == self.offset:
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            body = file.read()
        whole = body[: body.rfind(b"\n") + 1]
        self.offset += len(whole)
        for text in whole.splitlines():
            line = json.loads(text)
            if line["epoch"] >= self.next:
                self.next = line["epoch"] + 1
                self.on_epoch(line)


@dataclass(slots=True)
class Bar:
    """A line on a terminal or in a notebook that is written over; elsewhere a line for each tenth of the run.

    Mutable: it knows what it wrote last.
    """

    file: TextIO = field(default_factory=lambda: sys.stderr)
    shown: int = -1
    width: int = 0

    def __call__(self, status: Mapping[str, Any]) -> None:
        """Show where the run is."""
        done, whole = int(status["epoch"]), int(status["epochs"])
        if self._over:
            self._write(_text(status, done, whole))
        elif done * 10 // whole > self.shown:
            self.shown = done * 10 // whole
            print(_text(status, done, whole), file=self.file, flush=True)

    def close(self) -> None:
        """Leave the last line where it is."""
        if self.width:
            print(file=self.file, flush=True)
            self.width = 0

    @property
    def _over(self) -> bool:
        return self.file.isatty() or "ipykernel" in sys.modules

    def _write(self, text: str) -> None:
        print(f"\r{text:<{self.width}}", end="", file=self.file, flush=True)
        self.width = max(self.width, len(text))


def _text(status: Mapping[str, Any], done: int, whole: int) -> str:
    full = _BAR * done // whole
    line = f"epoch {done}/{whole} [{'=' * full}{' ' * (_BAR - full)}]"
    newest = status["history"][-1] if status["history"] else None
    if newest is None:
        return f"{line} {status['phase']}"
    held_out = "".join(f"  held-out {name} {number_text(v)}" for name, v in (newest["holdout"] or {}).items())
    return f"{line} loss {number_text(newest['loss'])}{held_out}"


def shown(
    on_status: OnStatus | None, on_epoch: OnEpoch | None, progress: bool, history: Path
) -> tuple[OnStatus, Callable[[], None]]:
    """Return what a run calls with each status, and what it calls at its end."""
    epochs = None if on_epoch is None else Epochs(history, on_epoch)
    bar = Bar() if progress else None

    def tell(status: Mapping[str, Any]) -> None:
        if on_status is not None:
            on_status(status)
        if bar is not None:
            bar(status)
        if epochs is not None:
            epochs(status)

    def close() -> None:
        if bar is not None:
            bar.close()

    return tell, close
