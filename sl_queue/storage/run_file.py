"""The scheduler's memory on disk: `run.json`, whole and atomically, and `history.jsonl`, a line an epoch.

The law: the history is written first. A crash in between leaves an epoch that nobody has heard of, or after going
back fewer than there were; the label holder tells those again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sl_queue.errors import CheckpointError, PartyBusy
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.history import History
from sl_queue.protocol.scheduler.agreement import told_difference
from sl_queue.protocol.scheduler.state import Phase, RunState, history_line
from sl_queue.storage.files import Held, is_passing, lock, unusable, warn_of_readers, write_durably
from sl_queue.storage.formats import FORMAT, require_format
from sl_queue.storage.history_file import HistoryFile

_states: TypeAdapter[RunState] = TypeAdapter(RunState)
_histories: TypeAdapter[list[EpochResult]] = TypeAdapter(list[EpochResult])
_ANEW = "give the scheduler another folder (--state, or --out of sl-queue local)"
_ELSEWHERE = ("history", "standing")  # of a state: in a file of its own, and what follows from that


class RunFile:
    """One scheduler's state folder; locked until `close`, or while this object lives."""

    def __init__(self, folder: Path, job: Mapping[str, Any], job_digest: str) -> None:
        self._folder, self._job, self._job_digest = folder, job, job_digest
        self._history = HistoryFile(folder / "history.jsonl")
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            warn_of_readers(folder)
            self._lock = lock(folder)
        except Held as held:
            raise PartyBusy(
                f"another scheduler (process {held.holder}) uses {folder}; stop it, or give this one another --state"
            ) from None
        except OSError as error:
            raise unusable(folder, error) from None

    def close(self) -> None:
        """Let another scheduler use the folder."""
        self._lock.release()

    def load(self) -> RunState | None:
        return _read(self._folder, self._job, self._job_digest, self._history)

    def save(self, state: RunState) -> None:
        kept = asdict(replace(state, history=History()))
        for name in _ELSEWHERE:
            del kept[name]
        if state.phase is Phase.FINISHED:  # once: whoever still holds the lines may be gone by the time they are missed
            kept["history"] = [history_line(result) for result in state.history]
        body = json.dumps({"format": FORMAT, "job": self._job_digest, "says": self._job, "state": kept}, indent=1)
        try:
            self._history.write(state.history)
            write_durably(self._folder / "run.json", body.encode())
        except OSError as error:
            raise unusable(self._folder, error) from None


def read_run(folder: Path, job: Mapping[str, Any], job_digest: str) -> RunState | None:
    """Read a scheduler's folder without using it; None if no run was begun there. Raises CheckpointError."""
    return _read(folder, job, job_digest, HistoryFile(folder / "history.jsonl"))


def _read(folder: Path, job: Mapping[str, Any], job_digest: str, lines: HistoryFile) -> RunState | None:
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = dict(json.loads(path.read_text()))
        require_format(saved, path, _ANEW, default=1)  # the first version did not say
        digest, kept = saved["job"], dict(saved["state"])
        told = kept.pop("history", None)  # of a finished run; earlier versions kept it here all along
        state, history = _states.validate_python(kept), lines.load()
        if told is not None:
            history = History.of(_histories.validate_python(told))
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        if isinstance(error, OSError) and is_passing(error):
            raise unusable(folder, error) from None
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}); remove it: the parties know the run"
        ) from None
    if digest != job_digest:
        says = saved.get("says")
        differing = told_difference(job, says) if says else f"digest {str(digest)[:12]}"
        raise CheckpointError(
            f"{folder} belongs to another job ({differing}); give the scheduler another folder "
            "(--state, or --out of sl-queue local), or restore the job file"
        )
    if history and history[0].epoch != 0:
        history = History()
    return replace(state, history=history)
