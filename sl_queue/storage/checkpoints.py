"""A party's state folder: `checkpoints/step-*.safetensors`, the final weights in `final/`, and a lock.

The law: a checkpoint is on disk, whole, before anything that it covers is acknowledged, and whatever fails leaves the
ones before as they were. The initial weights are never on disk; they follow from the job.
"""

import json
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from sl_queue.errors import CheckpointError, JobError, LocalProtocolError, PartyBusy
from sl_queue.protocol.checkpoint import Final, Saved, State, Weights
from sl_queue.protocol.messages import BEFORE_FIRST_STEP
from sl_queue.storage.ended_file import forget_end
from sl_queue.storage.files import Held, is_passing, lock, unusable, warn_of_readers, write_durably
from sl_queue.storage.final import SUFFIX, finished_run, run_json, write_run, write_weights
from sl_queue.storage.owner import Owner
from sl_queue.storage.tensor_file import Stored, TornFileError, sealed, unsealed

log = logging.getLogger("sl_queue")

LAST = 3  # how many checkpoints a party keeps, besides the best one
_PREFIX = "step-"


class Folder:
    """ports.Checkpoints in a folder that only one worker may use at a time; locked until `close`.

    `fingerprint` is what must not change between two starts for the same bits to follow; flat, JSON values. Where it
    depends on what lies here, it is given to `require` instead, before anything is loaded or saved. `job` is what the
    digest is of, to say what differs from another; `locked` is the folder's lock, if the caller has it already. Raises
    PartyBusy if another worker has the folder, CheckpointError if it belongs to another job, party or fingerprint.
    Mutable: it remembers which checkpoints are intact.
    """

    def __init__(
        self,
        path: Path,
        *,
        job_digest: str,
        party: str,
        fingerprint: Mapping[str, Any] | None = None,
        job: Mapping[str, Any] | None = None,
        locked: FileLock | None = None,
    ) -> None:
        self._path, self._checkpoints, self._final = path, path / "checkpoints", path / "final"
        self._owner = Owner(job_digest, party, dict(job or {}))
        self._fingerprint: Mapping[str, Any] = {}
        self._begun: dict[int, Mapping[str, Any]] = {}  # the fingerprints of the intact checkpoints
        self._final_says: Mapping[str, Any] | None = None  # what `final/run.json` holds, if this party has finished
        with self._writing():
            for folder in (path, self._checkpoints, self._final):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            warn_of_readers(path)
            self._unlock = weakref.finalize(self, (locked or self._locked()).release)
        try:
            with self._writing():
                forget_end(path)
                self._remove_leftovers()
            self._held = {step for step in self._written() if self._intact(step)}
            self._kept = self._read_kept()
            self.finished()
            if fingerprint is not None:
                self.require(fingerprint)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The state folder."""
        return self._path

    def close(self) -> None:
        """Let another worker use the folder. Idempotent."""
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def begun_with(self) -> Mapping[str, Any] | None:
        """The fingerprint of what lies here, final weights or the newest checkpoint; None if nothing does.

        Empty if final weights are all there is, and an earlier version wrote them.
        """
        if self._final_says is not None and self._final_says.get("fingerprint"):
            return self._final_says["fingerprint"]  # type: ignore[no-any-return]
        if self._held:
            return self._begun[max(self._held)]
        return None if self._final_says is None else {}

    def require(self, fingerprint: Mapping[str, Any]) -> None:
        """Go on with this fingerprint. Raises CheckpointError, saying what differs, if what lies here has another.

        Of a run that has finished only what it was trained on and with is compared, not the machine.
        """
        own = json.loads(json.dumps(fingerprint))
        if self._final_says is None:
            for step in sorted(self._held):
                self._owner.require_same(own, self._begun[step], self._file(step), finished=False)
        elif begun := self.begun_with:
            self._owner.require_same(own, begun, run_json(self._final), finished=True)
        self._fingerprint = own

    def save(self, step: int, state: State, *, run: str, generation: int, values: Mapping[str, Any]) -> None:
        """Write durably and atomically; then drop old ones, keeping the last three and the kept step."""
        if step <= BEFORE_FIRST_STEP:
            raise LocalProtocolError(f"a checkpoint of step {step}: the initial weights are never written")
        about = {
            **self._owner.mark,
            "fingerprint": self._fingerprint,
            "run": run,
            "generation": generation,
            "step": step,
        }
        body = sealed(state.tensors, about | {"state": dict(state.values), "values": dict(values)})
        with self._writing():
            write_durably(self._file(step), body)
            self._held.add(step)
            self._begun[step] = self._fingerprint
            for old in self._written():
                if old not in sorted(self._held)[-LAST:] and old != self._kept:
                    self._remove(old)

    def steps(self) -> tuple[int, ...]:
        """Return the steps of all intact checkpoints, ascending."""
        return tuple(sorted(self._held))

    def load(self, step: int) -> Saved:
        """Load the checkpoint of `step`. Raises CheckpointError if there is no intact one."""
        stored = self._read(step)
        if stored is None:
            self._held.discard(step)
            held = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self._path} holds no intact checkpoint of step {step}; intact are: {held}")
        about = stored.about
        state = State(stored.tensors, about["state"])
        return Saved(about["run"], about["generation"], about["step"], state, about["values"])

    def newest(self) -> Saved | None:
        """Load the newest intact checkpoint, or return None."""
        return self.load(max(self._held)) if self._held else None

    @property
    def kept(self) -> int | None:
        """The step that is kept, or None."""
        return self._kept

    def keep(self, step: int | None) -> None:
        """Keep the checkpoint of `step` until another one is kept, also by a worker that starts again."""
        if step == self._kept:
            return
        with self._writing():
            write_durably(self._checkpoints / "kept.json", json.dumps({"step": step}).encode())
        self._kept = step

    def discard_after(self, step: int) -> None:
        """Forget every checkpoint later than `step`."""
        with self._writing():
            for later in self._written():
                if later > step:
                    self._remove(later)
        if self._kept is not None and self._kept > step:
            self.keep(None)

    # Final weights ----------------------------------------------------------------------------------------------

    def write_final(self, weights: Weights, *, run: str, step: int, incarnation: str) -> None:
        """Write `final/<stem>.safetensors`, then `final/run.json`, which says that this party has finished."""
        with self._writing():
            digests = write_weights(self._final, weights)
        self._write_run(Final(run, step, incarnation, digests, reported=False))

    def finished(self) -> Final | None:
        """Return what `write_final` left; None if this party has not finished."""
        found = finished_run(self._path, self._owner.require)
        self._final_says = None if found is None else found[1]
        return None if found is None else found[0]

    def mark_reported(self) -> None:
        """Note that the scheduler will learn of the end: a worker that starts again has nothing left to do."""
        final = self.finished()
        if final is None:
            raise LocalProtocolError("nothing final was written")
        self._write_run(Final(final.run, final.step, final.incarnation, final.digests, reported=True))

    def _write_run(self, final: Final) -> None:
        with self._writing():
            write_run(self._final, final, self._owner.mark | {"fingerprint": self._fingerprint})

    # Files ------------------------------------------------------------------------------------------------------

    def _file(self, step: int) -> Path:
        return self._checkpoints / f"{_PREFIX}{step:09d}{SUFFIX}"

    def _written(self) -> list[int]:
        """List the steps of all checkpoint files, intact or not, ascending."""
        names = (path.name for path in self._checkpoints.glob(f"{_PREFIX}*{SUFFIX}"))
        numbers = (name.removeprefix(_PREFIX).removesuffix(SUFFIX) for name in names)
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _remove(self, step: int) -> None:
        self._file(step).unlink(missing_ok=True)
        self._held.discard(step)

    def _remove_leftovers(self) -> None:
        """Remove what a worker left that was killed while it wrote."""
        for folder in (self._checkpoints, self._final):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()

    def _read(self, step: int) -> Stored | None:
        """Return None, with a line in the log, for a torn file. Raises CheckpointError for one that is another's."""
        path = self._file(step)
        try:
            stored = unsealed(path)
        except FileNotFoundError:
            return None
        except (TornFileError, OSError) as error:
            if isinstance(error, OSError) and is_passing(error):
                raise unusable(self._path, error) from error
            log.warning("%s is torn or altered (%s); it is skipped", path, error)
            return None
        self._owner.require(stored.about, path)
        self._begun[step] = stored.about["fingerprint"]
        return stored

    def _intact(self, step: int) -> bool:
        return self._read(step) is not None

    def _read_kept(self) -> int | None:
        try:
            step = json.loads((self._checkpoints / "kept.json").read_bytes())["step"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, OSError) and is_passing(error):
                raise unusable(self._path, error) from error
            log.warning("%s: which checkpoint to keep cannot be read (%s); none is kept", self._checkpoints, error)
            return None
        return step if isinstance(step, int) else None

    def _locked(self) -> FileLock:
        try:
            return lock(self._path)
        except Held as held:
            raise PartyBusy(
                f"another worker (process {held.holder}) serves party {self._owner.party!r} "
                f"with {self._path}; stop it first, or let it continue"
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the system into one that says what to do."""
        try:
            yield
        except OSError as error:
            raise unusable(self._path, error) from error


def newest_state(path: Path) -> State:
    """Read the state in a folder's newest checkpoint, of whatever job it is. Raises JobError if there is none."""
    stored = _newest_in(path)
    if stored is not None:
        return State(stored.tensors, stored.about["state"])
    raise JobError(f"{path} holds no checkpoint, so no state of an optimizer; remove optimizer from [start]")


def begun_in(path: Path) -> Mapping[str, Any] | None:
    """Read the fingerprint in a folder's newest checkpoint, beside the worker that has it; None if there is none."""
    stored = _newest_in(path)
    return None if stored is None else stored.about["fingerprint"]


def _newest_in(path: Path) -> Stored | None:
    for file in sorted((path / "checkpoints").glob(f"{_PREFIX}*{SUFFIX}"), reverse=True):
        try:
            return unsealed(file)
        except (TornFileError, OSError):
            continue
    return None
