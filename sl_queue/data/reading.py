"""Reading of a table's file, and what makes it unreadable in the user's words."""

import csv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pyarrow as pa

from sl_queue.data import csv_text, files
from sl_queue.data.spec import CsvSpec, FileKind, FileSpec
from sl_queue.errors import JobError

Reading = Callable[[], AbstractContextManager[None]]  # what a column is read within


@contextmanager
def reading_of(data: FileSpec, kind: FileKind, where: str) -> Iterator[None]:
    """Raise JobError that begins with `where` for what makes a file unreadable."""
    assert data.path is not None
    try:
        yield
    except files.Unlike as error:
        raise JobError(f"{where}: {error}") from None
    except FileNotFoundError:
        raise JobError(f"{where}: there is no such file") from None
    except (OSError, UnicodeError, csv.Error, pa.ArrowException, *csv_text.DAMAGED) as error:
        raise JobError(f"{where}: {_unread(data.path, data.csv, kind, error)}") from None


def _unread(path: Path, dialect: CsvSpec, kind: FileKind, error: Exception) -> str:
    """Say why a file cannot be read."""
    if csv_text.is_damaged(path):
        return "cannot be unpacked; it is no gzip file, or damaged: write or copy it again"
    if kind in files.WITH_TEXT and csv_text.is_no_text(path, dialect):
        told = f'not all of it is {dialect.encoding}; say what it is, data.csv.encoding = "cp1252" for instance'
        return f"cannot be read ({told})"
    if kind == "csv" and "Empty CSV file or block" in str(error):  # a header that no line ends
        return "there are no rows"
    reason = getattr(error, "strerror", None) or type(error).__name__
    return f"cannot be read ({reason}); is it {files.DESCRIBED[kind]}?"
