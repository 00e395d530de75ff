"""Final weights of a party: `final/` of its state folder, one file a module, and `run.json`, which is written last."""

import json
import logging
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from sl_queue.protocol.checkpoint import Final, Weights
from sl_queue.storage.files import is_passing, unusable, write_durably
from sl_queue.storage.formats import require_format
from sl_queue.storage.tensor_file import packed

log = logging.getLogger("sl_queue")

SUFFIX = ".safetensors"
OTHER_FOLDER = "give this worker a state folder of its own (--state, or --out of sl-queue local), or remove that one"

Says = Mapping[str, Any]  # what `run.json` holds


def run_json(final: Path) -> Path:
    """Return the file that says whose the weights in the folder are."""
    return final / "run.json"


def write_weights(final: Path, weights: Weights) -> dict[str, str]:
    """Write `<stem>.safetensors` durably; returns each file's SHA-256. Raises OSError."""
    digests = {}
    for stem, tensors in weights.items():
        name, body = f"{stem}{SUFFIX}", packed(tensors, {"format": "pt"})
        write_durably(final / name, body)
        digests[name] = sha256(body).hexdigest()
    return digests


def write_run(final: Path, run: Final, about: Says) -> None:
    """Write that this party has finished; `about`: whose weights these are. Raises OSError."""
    told = {"run": run.run, "step": run.step, "incarnation": run.incarnation, "told": run.reported}
    body = json.dumps({**about, **told, "digests": dict(run.digests)}, indent=1)
    write_durably(run_json(final), body.encode())


def finished_run(state: Path, require_owner: Callable[[Says, Path], None]) -> tuple[Final, Says] | None:
    """Return what was written last, and whose it is; None, with a line in the log, for files that cannot be used.

    Raises CheckpointError for those of another format or, as `require_owner` does, of another owner.
    """
    path = run_json(state / "final")
    if not path.exists():
        return None
    try:
        if "format" in (says := json.loads(path.read_bytes())):
            require_format(says, path, OTHER_FOLDER)  # before anything is read that another format may not have
        final, found = read_final(path.parent)
        require_owner(found, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and is_passing(error):
            raise unusable(state, error) from error
        log.warning("%s cannot be used (%s); the final weights will be written again", path, error)
        return None
    return final, found


def holds_final(state: Path, job_digest: str) -> bool:
    """Return True if a state folder holds the job's final weights, whole, and the scheduler knows."""
    try:
        final, found = read_final(state / "final")
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return final.reported and found.get("job") == job_digest


def read_final(folder: Path) -> tuple[Final, Says]:
    """Read what was written last, and whose it is. Raises OSError, ValueError, KeyError, TypeError."""
    found = json.loads(run_json(folder).read_bytes())
    final = Final(found["run"], found["step"], found["incarnation"], found["digests"], found["told"])
    for name, digest in final.digests.items():
        if sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} is torn or altered")
    return final, found
