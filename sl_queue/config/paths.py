"""Paths in a party file, which are looked for in its folder."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo


def from_folder(path: Path, info: ValidationInfo) -> Path:
    """Look for a path in the folder of the file that names it."""
    folder = (info.context or {}).get("folder")
    return path if folder is None else folder / path


PathInFolder = Annotated[Path, Field(strict=False), AfterValidator(from_folder)]
