"""Files of an alignment under way: a party's secrets and finished masks, and the scheduler's outcome.

The law: secrets are on disk before anything that was made with them leaves, so that a worker that comes again says the
same; and an outcome is on disk before anyone hears of it. With the outcome at a party, all that led to it is deleted.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

from sl_queue.errors import CheckpointError
from sl_queue.protocol.alignment import MASK_BYTES, as_masks
from sl_queue.protocol.comparison import Outcome
from sl_queue.security.masking import MaskKeys
from sl_queue.storage.aligned_file import Aligned, write_aligned
from sl_queue.storage.files import PRIVATE, unusable, write_durably

KEY, POINTS, FOLDER = "alignment.key", "alignment.points", "alignment"
OUTCOME, MASKS = "alignment.json", "alignment.masks"  # in the scheduler's folder


@dataclass(frozen=True, slots=True)
class PartyFiles:
    """A party's side, in its state folder that the caller has locked. Raises CheckpointError, ResourceShortage."""

    state: Path

    def keys(self, table: str, parties: int) -> tuple[MaskKeys, str]:
        """Return the secrets for a set of ids, and the token that names both; redrawn for another set."""
        path = self.state / KEY
        try:
            if path.exists():
                path.chmod(PRIVATE)
                found = json.loads(path.read_text())
                if (found["table"], found["parties"]) == (table, parties):
                    keys = MaskKeys(*(bytes.fromhex(found[name]) for name in ("mask", "blind", "pad")))
                    return keys, str(found["token"])
            self.forget()
            keys, token = MaskKeys.generate(parties), secrets.token_hex(16)
            hexadecimal = {name: value.hex() for name, value in asdict(keys).items()}
            body = {**hexadecimal, "token": token, "table": table, "parties": parties}
            write_durably(path, json.dumps(body).encode())
            return keys, token
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} cannot be used; delete it, and the rows are aligned again") from None
        except OSError as error:
            raise unusable(self.state, error) from error

    def begin(self, session: str) -> set[int]:
        """Enter a session, forgetting others; returns the own chunks that came back in it."""
        folder = self.state / FOLDER / session
        try:
            for other in (self.state / FOLDER).glob("*"):
                if other != folder:
                    shutil.rmtree(other)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()}
        except OSError as error:
            raise unusable(self.state, error) from error

    def keep(self, session: str, chunk: int, masks: bytes) -> None:
        """Have a finished chunk of the own set on disk."""
        self._write(session, str(chunk), masks)

    def finished(self, session: str, chunk: int) -> bytes:
        """Read a finished chunk."""
        try:
            return (self.state / FOLDER / session / str(chunk)).read_bytes()
        except OSError as error:
            raise unusable(self.state, error) from error

    def put_by(self, points: Iterable[bytes]) -> None:
        """Write the own points as they leave; a worker that comes again makes them again."""
        try:
            with open(self.state / POINTS, "wb", opener=partial(os.open, mode=PRIVATE)) as file:
                file.writelines(points)
        except OSError as error:
            raise unusable(self.state, error) from error

    def points(self, first: int, size: int) -> bytes:
        """Read so many bytes of them."""
        try:
            with open(self.state / POINTS, "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, first)
        except OSError as error:
            raise unusable(self.state, error) from error

    def is_the_same(self, session: str, name: str, body: bytes | memoryview) -> bool:
        """Return True unless another chunk of that name was masked before: nobody has more ids masked than it said."""
        path, digest = self.state / FOLDER / session / f"seen-{name}", blake2b(body, digest_size=16).digest()
        if path.exists():
            return path.read_bytes() == digest
        self._write(session, path.name, digest)
        return True

    def conclude(self, aligned: Aligned) -> None:
        """Have the outcome on disk, then delete what led to it."""
        write_aligned(self.state, aligned)
        self.forget()

    def forget(self) -> None:
        """Delete the secrets, and what was made with them."""
        for name in (KEY, POINTS):
            (self.state / name).unlink(missing_ok=True)
        shutil.rmtree(self.state / FOLDER, ignore_errors=True)

    def _write(self, session: str, name: str, body: bytes) -> None:
        try:
            write_durably(self.state / FOLDER / session / name, body)
        except OSError as error:
            raise unusable(self.state, error) from error


@dataclass(frozen=True, slots=True)
class SchedulerFiles:
    """The scheduler's side, in its own locked state folder. Raises CheckpointError, ResourceShortage."""

    state: Path

    def load(self) -> Outcome | None:
        """Read the outcome; None if there is none yet."""
        path = self.state / OUTCOME
        try:
            found = json.loads(path.read_text())
            masks = None if found["done"] else as_masks((self.state / MASKS).read_bytes())
            if masks is not None and len(masks) != found["shared"]:
                raise ValueError
            return Outcome(found["tokens"], found["sizes"], masks, frozenset(found["aligned"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} cannot be used; restore it, or use new state folders") from None

    def save(self, outcome: Outcome) -> None:
        """Write it durably; without masks the alignment is done, and nothing is kept of them."""
        masks = outcome.masks
        shared = 0 if masks is None else len(masks)
        found = {"tokens": dict(outcome.tokens), "sizes": dict(outcome.sizes), "shared": shared, "done": masks is None}
        found["aligned"] = sorted(outcome.aligned)
        try:
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            if masks is not None and not outcome.aligned:
                write_durably(self.state / MASKS, masks.tobytes())
            write_durably(self.state / OUTCOME, json.dumps(found).encode())
            if masks is None:
                (self.state / MASKS).unlink(missing_ok=True)
        except OSError as error:
            raise unusable(self.state, error) from error


def split(masks: bytes, size: int) -> Sequence[bytes]:
    """Cut masks into pieces of so many."""
    return [masks[first : first + size * MASK_BYTES] for first in range(0, len(masks), size * MASK_BYTES)]
