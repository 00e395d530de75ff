"""Versions of a party's trained parts: `<state>/versions/<run>/`, whole or not there, and which of them is in use.

A version is kept when its run has finished, and again at every start that finds the run finished, so a worker that is
killed in between leaves nothing half-made. `current.json` names the version that `predict` and `serve` use; without
it that is the newest. A state folder of an earlier release has only `final/`: that is its one version.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from sl_queue.errors import CheckpointError
from sl_queue.storage.files import write_durably

FORMAT: Final = 1
_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")
_CURRENT: Final = "current.json"


@dataclass(frozen=True, slots=True)
class Version:
    """One run's trained parts of one party."""

    run: str
    path: Path  # the folder with `base.safetensors` and `fuse.safetensors`
    step: int
    job: str  # digest
    finished_at: str | None  # UTC, ISO 8601; None where an earlier release did not write it
    digests: Mapping[str, str]  # SHA-256 by file name
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # of held-out rows, at the label holder
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)  # all of run.json

    @property
    def columns(self) -> Sequence[str] | None:
        """The names of the columns that the base model was trained on, in order; None if they are not known."""
        found = self.about.get("columns")
        return tuple(map(str, found)) if isinstance(found, list) else None

    @property
    def whole(self) -> bool:
        """Say whether the base model was trained on whole numbers alone; False also where that is not known."""
        return self.about.get("whole") is True

    @property
    def beside(self) -> Mapping[str, str]:
        """The SHA-256 by name of what is kept beside the weights; of no file where an earlier release wrote it."""
        found: Mapping[str, str] = self.about.get("beside") or {}
        return found

    @property
    def recipe(self) -> str | None:
        """The recipe that [features] learned of the training rows, as JSON; None without. Raises CheckpointError."""
        found = self.kept("features.json")
        return None if found is None else found.decode("utf-8", errors="replace")

    def kept(self, name: str) -> bytes | None:
        """Return a file that is kept beside the weights; None without. Raises CheckpointError if it was altered."""
        return self.require(name) if name in self.beside or (self.path / name).exists() else None

    def weights(self, part: str) -> Path:
        """Return the file of a part, "base" or "fuse". Raises CheckpointError if it is missing or altered."""
        name = f"{part}.safetensors"
        if name not in self.digests:
            raise CheckpointError(f"version {self.run} in {self.path} has no {part} model")
        self.require(name)
        return self.path / name

    def require(self, name: str) -> bytes:
        """Return what a file holds. Raises CheckpointError if it is missing or altered."""
        path, digest = self.path / name, self.digests.get(name, self.beside.get(name))
        try:
            body = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if digest is not None and sha256(body).hexdigest() != digest:
            raise CheckpointError(f"{path} was altered since run {self.run} wrote it; restore it")
        return body


def keep_version(state: Path, about: Mapping[str, Any], card: str, files: Sequence[Path] = ()) -> Path:
    """Make `<state>/versions/<run>/` of what `final/` holds; `files` are kept beside. Idempotent.

    `about` goes into `run.json` beside run, step and digests. Raises OSError.
    """
    final = json.loads((state / "final" / "run.json").read_bytes())
    versions = state / "versions"
    folder = versions / _required_name(final["run"])
    if (folder / "run.json").exists():
        return folder
    versions.mkdir(mode=0o700, exist_ok=True)
    unfinished = versions / f".{final['run']}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    for source in (*(state / "final" / name for name in final["digests"]), *files):
        _copy(source, unfinished / source.name)
    (unfinished / "card.md").write_text(card, encoding="utf-8")
    beside = {source.name: sha256((unfinished / source.name).read_bytes()).hexdigest() for source in files}
    says = {"job": final["job"], "format": FORMAT, "run": final["run"], "step": final["step"]}
    says |= {"digests": final["digests"], "beside": beside, **about}
    write_durably(unfinished / "run.json", json.dumps(says, indent=1).encode())
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    _sync(versions)
    return folder


def versions_in(state: Path) -> list[Version]:
    """Return the versions of a state folder, oldest first. Raises CheckpointError for one of a newer format."""
    found = [_read(path) for path in (state / "versions").glob("[!.]*/run.json")]
    with suppress(FileNotFoundError):
        final = _read(state / "final" / "run.json")
        if final.run not in {version.run for version in found}:
            found.append(final)
    return sorted(found, key=lambda version: (version.finished_at or "", version.step))


def choose_version(state: Path, run: str | None = None) -> Version:
    """Return the version of `run`, which may be shortened; without it the one in use. Raises CheckpointError."""
    found = versions_in(state)
    if not found:
        raise CheckpointError(f"{state} holds no trained model: train first, or name the folder of a finished run")
    wanted = run or current(state)
    if wanted is None:
        return found[-1]
    matching = [version for version in found if version.run.startswith(wanted)]
    if len(matching) != 1:
        there = ", ".join(version.run for version in found)
        problem = "no version" if not matching else f"{len(matching)} versions"
        raise CheckpointError(f"{state} holds {problem} of run {wanted!r}; there are: {there}")
    return matching[0]


def trained_with(state: Path, version: Version) -> Mapping[str, Any]:
    """Return the fingerprint of what a version was trained on and with; empty if `final/` is of another run."""
    try:
        found = json.loads((state / "final" / "run.json").read_bytes())
        return found["fingerprint"] if found["run"] == version.run else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def current(state: Path) -> str | None:
    """Return the run whose version was promoted, or None. Raises CheckpointError if that cannot be read."""
    path = state / "versions" / _CURRENT
    try:
        return str(json.loads(path.read_bytes())["run"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); promote a version, which replaces it") from error


def promote(state: Path, run: str) -> tuple[str | None, Version]:
    """Put the version of `run` in use; return the run that was in use before, None if that is not known, and it."""
    version, before = choose_version(state, run), None
    with suppress(CheckpointError):
        before = current(state)
    for name in (*version.digests, *version.beside):
        version.require(name)
    (state / "versions").mkdir(mode=0o700, exist_ok=True)
    write_durably(state / "versions" / _CURRENT, json.dumps({"run": version.run, "before": before}).encode())
    return before, version


def _read(path: Path) -> Version:
    try:
        found = json.loads(path.read_bytes())
        if found.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"{path} has format {found['format']}, and this release of sl_queue reads format {FORMAT}: use the "
                "release that wrote it"
            )
        return Version(
            found["run"],
            path.parent,
            int(found["step"]),
            found["job"],
            found.get("finished_at"),
            dict(found["digests"]),
            found.get("holdout") or {},
            found,
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); restore it") from error


def _required_name(run: str) -> str:
    if not _NAME.fullmatch(run):
        raise CheckpointError(f"run {run!r} cannot name a folder")
    return run


def _copy(source: Path, target: Path) -> None:
    """Link a file where the file system can, and else copy it; it is never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        _sync(target)
    target.chmod(0o600)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
