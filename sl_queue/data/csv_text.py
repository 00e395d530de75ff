"""The text of a table, whatever encoding and compression its file has."""

import codecs
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sl_queue.data.spec import CsvSpec

DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)  # what reading of a file raises that is not, or no longer, gzip
_BLOCK = 2**24  # characters, or bytes


@contextmanager
def plain(path: Path, dialect: CsvSpec) -> Iterator[Path]:
    """Give the name of the same file as UTF-8 without compression, for as long as it is read.

    What is neither is written to a temporary file, a block at a time. Raises OSError, UnicodeError, and DAMAGED.
    """
    if not _is_packed(path) and codecs.lookup(dialect.encoding).name in ("utf-8", "ascii", "utf-8-sig"):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sl_queue-csv-") as folder:
        copy = Path(folder) / "rows.csv"
        with _opened(path, dialect) as text, copy.open("w", encoding="utf-8", newline="") as out:
            shutil.copyfileobj(text, out, _BLOCK)
        yield copy


def is_damaged(path: Path) -> bool:
    """Tell whether a file is not, or no longer, what its name says: gzip."""
    if not _is_packed(path):
        return False
    try:
        with gzip.open(path) as raw:
            while raw.read(_BLOCK):
                pass
    except DAMAGED:
        return True
    except OSError:
        return False
    return False


def is_no_text(path: Path, dialect: CsvSpec) -> bool:
    """Tell whether a file is written in another encoding than the one that it is said to have."""
    try:
        with _opened(path, dialect) as text:
            while text.read(_BLOCK):
                pass
    except UnicodeError:
        return True
    except (OSError, *DAMAGED):
        return False
    return False


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _opened(path: Path, dialect: CsvSpec) -> IO[Any]:
    if _is_packed(path):
        return gzip.open(path, "rt", encoding=dialect.encoding, newline="")
    return path.open(encoding=dialect.encoding, newline="")
