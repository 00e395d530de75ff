"""Output of the command: a progress bar while a run trains, and tables of what came out.

Results go to stdout, the rest to stderr; where that is no terminal, an epoch is a line instead of a bar.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from sl_queue.protocol.alignment import ALIGNING
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.scheduler.state import epoch_text, number_text, worst_reading
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus, Telling
from sl_queue.protocol.text import counted, printable

FILE_WIDTH = 200  # columns of a table that goes to a file or another program: nothing is wrapped
LONGEST_LINE = 2000  # characters of a line of status
RATE_OVER_S = 5.0  # samples/s is the mean over the last seconds


def stdout() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def keep(path: Path, *shown: RenderableType) -> None:
    """Write to a file what is shown."""
    with path.open("w", encoding="utf-8") as file:
        Console(file=file, highlight=False, width=FILE_WIDTH).print(*shown, sep="\n", soft_wrap=True)


class _LogLines(logging.Handler):
    """Log lines above the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        told = time.strftime("%H:%M:%S", time.localtime(record.created))
        self._console.print(f"{told} {self.format(record)}", style=_style(record), markup=False, soft_wrap=True)


def _style(record: logging.LogRecord) -> str:
    return "yellow" if record.levelno >= logging.WARNING else "dim"


class _Bar(Progress):
    """A progress bar with a line below it."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim")


class Screen:
    """Follows a run's status on stderr until it is left; mutable: it draws over what it drew before.

    `epochs`: with a line for each epoch where nobody looks; a scheduler in a process of its own tells them itself.
    """

    def __init__(self, log_level: int = logging.INFO, *, epochs: bool = True) -> None:
        self.console = stderr()
        self._level = log_level
        self._bar = _Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("waiting for the scheduler", total=1, numbers="")
        self._samples: deque[tuple[float, int]] = deque()
        self._tells_epochs = epochs and not self.console.is_terminal
        self._epochs: int | None = None  # shown so far; what a resumed run brings is not shown again
        self._log = _LogLines(self.console)
        self._level_before = logging.NOTSET

    def __enter__(self) -> "Screen":
        log = logging.getLogger("sl_queue")
        log.addHandler(self._log)
        self._level_before = log.level
        log.setLevel(self._level)
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bar.stop()
        log = logging.getLogger("sl_queue")
        log.removeHandler(self._log)
        log.setLevel(self._level_before)

    def line(self, worker: str, text: str) -> None:
        """Print a line that a worker wrote."""
        self.console.print(Text.assemble((f"{worker}: ", "cyan"), text), soft_wrap=True)

    def status(self, status: RunStatus) -> None:
        """Show the newest status of the run."""
        rate = self._samples_per_s(status.samples)
        known = status.epoch if self._epochs is None or not self._tells_epochs else self._epochs
        for done in status.history:
            if done.epoch >= known:
                line = f"{_where_and_numbers(status, done)}  samples/s {_rate(rate)}"
                self.console.print(line, soft_wrap=True, markup=False)
        self._epochs = status.epoch
        self._bar.below = _where_and_numbers(status, status.history[-1]) if status.history else ""
        loss = "" if status.loss is None else f"loss {number_text(status.loss)}  samples/s {_rate(rate)}"
        self._bar.update(
            self._task,
            description=_where(status),
            completed=status.step + 1,
            total=status.steps or 1,
            numbers=loss,
        )

    def _samples_per_s(self, samples: int) -> float | None:
        now = time.monotonic()
        if self._samples and (samples == 0 or samples < self._samples[-1][1]):
            self._samples.clear()  # nothing is trained yet; or the label holder was restarted, and counts from zero
        self._samples.append((now, samples))
        while now - self._samples[0][0] > RATE_OVER_S and len(self._samples) > 2:
            self._samples.popleft()
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else None


def _where(status: RunStatus) -> str:
    if status.phase == "gathering":
        late = [name for name, party in status.parties.items() if party.phase == "not joined"]
        return f"waiting for {', '.join(late)}" if late else "starting"
    if status.phase == ALIGNING:
        each = (f"{name} {party.phase}" for name, party in status.parties.items() if party.phase != "aligned")
        return f"aligning: {', '.join(each)}"
    epoch = min(status.epoch + 1, status.epochs)
    running = "" if status.phase == "running" else f" {status.phase},"
    return f"{status.job}:{running} epoch {epoch}/{status.epochs}"


def _rate(samples_per_s: float | None) -> str:
    return "-" if samples_per_s is None else f"{samples_per_s:,.0f}"


def _where_and_numbers(status: RunStatus, done: EpochResult) -> str:
    return f"{status.job}: {epoch_text(done.epoch, status.epochs, done.loss, done.holdout)}"


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table of text; no markup is read in it."""
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def history_table(history: Sequence[Mapping[str, Any]]) -> Table:
    """Render one row an epoch."""
    metrics = list((history[0]["holdout"] or {}) if history else ())
    names = (_plain(f"held-out {name}") for name in metrics)
    readers = sorted(history[0].get("leak") or {}) if history else []
    columns = [Column(name) for name in (*names, *(_plain(f"read by {party}") for party in readers))]
    table = Table("epoch", "step", "loss", *columns, "seconds", box=None)
    for epoch in history:
        held_out = [number_text((epoch["holdout"] or {}).get(name)) for name in metrics]
        leak = epoch.get("leak") or {}
        read = [number_text(worst_reading(leak.get(party) or {})) for party in readers]
        seconds = f"{epoch['seconds']:.1f}"
        table.add_row(str(epoch["epoch"]), str(epoch["step"]), number_text(epoch["loss"]), *held_out, *read, seconds)
    return table


def status_view(telling: Telling, wall: float) -> Group:
    """Render where a run is, who is late and why; `wall` is the time, in seconds since 1970."""
    status = telling.run
    steps = "" if status.steps is None else f" of {status.steps}"
    done = f"{status.epoch} of {counted(status.epochs, 'epoch', 'epochs')}, {status.step + 1}{steps} steps done"
    head = [
        *([_silence(telling, wall), ""] if telling.silent else []),
        f"job {status.job}, run {status.run or '(not begun)'}, generation {status.generation}",
        f"{status.phase}: {done}" if status.phase != ALIGNING else _where(status),
    ]
    if not telling.silent:
        head.append(f"reported {_when(telling, wall)}")
    if status.loss is not None:
        head.append(f"loss {number_text(status.loss)}")
    if status.history and status.history[-1].leak:
        head.append(_leak(status.history[-1].leak))
    if status.reason:
        head.append(f"reason: {status.reason}")
    led = any(party.hands is not None for party in status.parties.values())
    table = Table(
        "party", "state", *(["hands"] if led else []), "steps done", "committed", "silent", "waits for", box=None
    )
    for name, party in status.parties.items():
        silent = "" if party.silent_s is None else f"{party.silent_s:.1f} s"
        phase = f"was {party.phase}" if telling.silent and party.phase not in FIXED else party.phase
        hands = ["" if party.hands is None else party.hands] if led else []
        done, committed = str(party.step + 1), str(party.committed + 1)
        table.add_row(*map(_plain, (name, phase, *hands, done, committed, silent, party.waiting_for or "")))
    ago = "before that" if telling.silent else "ago"
    versions = {party.version for party in status.parties.values() if party.version}
    if len(versions) > 1:
        each = ", ".join(f"{name} {party.version}" for name, party in status.parties.items() if party.version)
        head.append(f"versions of sl_queue differ: {each}")
    refused = [_refusal(name, party, ago) for name, party in status.parties.items() if party.refused]
    return Group(*map(_plain, head), "", table, *map(_plain, refused))


def _leak(leak: Mapping[str, Mapping[str, float]]) -> str:
    """Say what the label holder's meter has found in the newest epoch."""
    each = [
        f"{party} AUC {number_text(worst_reading(found))} (chance {number_text(found.get('chance'))})"
        for party, found in sorted(leak.items())
    ]
    return f"labels as read from gradients: {', '.join(each)}"


FIXED = ("finished", "stopped", "refused", "not joined")  # what a party stays when nobody tells of it any more


def _silence(telling: Telling, wall: float) -> str:
    age_s = telling.run.age_s(wall)
    last = "" if age_s is None else f", {_when(telling, wall)}"
    return (
        f"the scheduler has said nothing for at least {telling.listened_s:.0f} s: it is gone, or it does not reach the "
        f"broker, or the broker takes no messages (a resource alarm). This is its last report{last}; it may be "
        "out of date"
    )


def _when(telling: Telling, wall: float) -> str:
    age_s = telling.run.age_s(wall)
    if age_s is None:
        return "at a time that its version does not say"
    return f"{telling.run.told_at}, {age_s:.0f} s ago" if age_s >= 1.0 else "now"


def _refusal(name: str, party: PartyStatus, ago: str) -> str:
    when = "" if party.refused_s is None else f" {party.refused_s:.0f} s {ago}"
    return f"{name} was refused{when}, and the run waits for a worker of it that agrees: {party.refused}"


def _plain(text: object) -> Text:
    """Take text of a peer, or of the scheduler, as characters and never as markup."""
    return Text(printable(str(text), LONGEST_LINE))


COLOURS = {"ok": "green", "note": "dim", "detail": "dim", "warning": "yellow", "error": "red"}


def show_finding(console: Console, level: str, text: str) -> None:
    """Print a line of `sl-queue check`."""
    console.print(Text.assemble((f"{level:8}", COLOURS[level]), text), soft_wrap=True)
