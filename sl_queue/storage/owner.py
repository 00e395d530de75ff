"""The owner of a state folder: the job and the party whose files lie in it, and no one else's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sl_queue.errors import CheckpointError
from sl_queue.protocol.fingerprints import differences
from sl_queue.protocol.scheduler.agreement import told_difference
from sl_queue.storage.final import OTHER_FOLDER
from sl_queue.storage.formats import FORMAT, require_format


@dataclass(frozen=True, slots=True)
class Owner:
    """One party of one job; `says` is the job that the digest is of, to tell what differs in another."""

    digest: str
    party: str
    says: Mapping[str, Any]

    @property
    def mark(self) -> dict[str, Any]:
        """Lines about the owner in every file of the folder."""
        return {"format": FORMAT, "job": self.digest, "party": self.party, "says": self.says}

    def require(self, found: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError unless a file with the mark `found` is this owner's."""
        require_format(found, path, OTHER_FOLDER)
        if found.get("party") != self.party:
            raise CheckpointError(f"{path} belongs to party {found.get('party')!r}, not {self.party!r}; {OTHER_FOLDER}")
        if found.get("job") != self.digest:
            says = found.get("says")
            digests = f"digest {str(found.get('job'))[:12]}, and this one is {self.digest[:12]}"
            differing = told_difference(self.says, says) if says else digests
            raise CheckpointError(
                f"{path} belongs to another job ({differing}); {OTHER_FOLDER}; or restore the job file"
            )

    def require_same(self, own: Mapping[str, Any], begun: Mapping[str, Any], path: Path, *, finished: bool) -> None:
        """Raise CheckpointError unless a file was `begun` with the fingerprint that the party has now."""
        differing = "; ".join(differences(begun, own, finished=finished))
        if not differing:
            return
        if finished:
            raise CheckpointError(
                f"party {self.party!r}: {path}: this run is finished, and it was trained with something else: "
                f"{differing}. Restore that to have its final weights, or train from scratch with another state folder"
            )
        raise CheckpointError(
            f"party {self.party!r}: {path} was written with something else, and resuming would not give the same "
            f"weights: {differing}. Restore that, or start from scratch with another state folder"
        )
