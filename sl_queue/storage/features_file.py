"""The file `final/features.json`: what a party's [features] learned of its training rows, beside its weights."""

from pathlib import Path

from sl_queue.storage.files import unusable, write_durably

NAME = "features.json"


def write_features(state: Path, fitted: str | None) -> None:
    """Have it on disk, in a state folder that the caller has locked. Raises CheckpointError, ResourceShortage."""
    path = state / "final" / NAME
    if fitted is None or (path.exists() and path.read_text(encoding="utf-8") == fitted):
        return
    try:
        write_durably(path, fitted.encode())
    except OSError as error:
        raise unusable(state, error) from error
