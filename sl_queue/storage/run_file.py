"""The scheduler's memory on disk: `run.json`, whole and atomically, and `history.jsonl` for people and tools."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sl_queue.errors import CheckpointError, PartyBusy
from sl_queue.protocol.agreement import told_difference
from sl_queue.protocol.run_state import RunState, history_line
from sl_queue.storage.durable import PRIVATE, is_passing, unusable, warn_of_readers, write_durably

_states: TypeAdapter[RunState] = TypeAdapter(RunState)


class RunFile:
    """One scheduler's state folder; locked while this object lives."""

    def __init__(self, folder: Path, job: Mapping[str, Any], job_digest: str) -> None:
        self._folder, self._job, self._job_digest = folder, job, job_digest
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            warn_of_readers(folder)
            self._lock = os.fdopen(os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, PRIVATE), "w")
        except OSError as error:
            raise unusable(folder, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise PartyBusy(f"another scheduler uses {folder}; stop it, or give this one another --state") from None

    def close(self) -> None:
        """Let another scheduler use the folder."""
        self._lock.close()

    def load(self) -> RunState | None:
        path = self._folder / "run.json"
        if not path.exists():
            return None
        try:
            saved: dict[str, Any] = json.loads(path.read_text())
            digest, state = saved["job"], _states.validate_python(saved["state"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            if isinstance(error, OSError) and is_passing(error):
                raise unusable(self._folder, error) from None
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}); remove it: the parties know the run"
            ) from None
        if digest != self._job_digest:
            says = saved.get("says")
            differing = told_difference(self._job, says) if says else f"digest {str(digest)[:12]}"
            raise CheckpointError(
                f"{self._folder} belongs to another job ({differing}); give the scheduler another folder "
                "(--state, or --out of sl-queue local), or restore the job file"
            )
        return state

    def save(self, state: RunState) -> None:
        lines = "".join(json.dumps(history_line(result)) + "\n" for result in state.history)
        body = json.dumps({"job": self._job_digest, "says": self._job, "state": asdict(state)}, indent=1)
        try:
            write_durably(self._folder / "run.json", body.encode())
            write_durably(self._folder / "history.jsonl", lines.encode())
        except OSError as error:
            raise unusable(self._folder, error) from None
