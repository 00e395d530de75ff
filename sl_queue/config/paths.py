"""Paths in a party file, which are looked for in its folder."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from sl_queue.config.schema import shown


def from_folder(path: Path, info: ValidationInfo) -> Path:
    """Look for a path in the folder of the file that names it. Raises ValueError for one that no system has."""
    if "\0" in str(path):
        raise ValueError(f"= {shown(str(path))}; a path holds no NUL character")
    folder = (info.context or {}).get("folder")
    return path if folder is None else folder / path


PathInFolder = Annotated[Path, Field(strict=False), AfterValidator(from_folder)]
