"""The command `init`: the first job and party files for a user's own tables."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sl_queue.errors import JobError

if TYPE_CHECKING:
    from sl_queue.config.starting import TableOf


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder for the files.")],
    party: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:TABLE:ID", help="A party, its file and its id column; the first has the labels."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The label column of the first party.")] = None,
    task: Annotated[
        Literal["binary", "multiclass", "regression"] | None, typer.Option(help="What is predicted.")
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="Classes of a multiclass task, labelled 0, 1, 2, ...")] = 2,
    name: Annotated[str | None, typer.Option(help="Name of the job; default: that of DIR.")] = None,
    same_ids: Annotated[
        bool, typer.Option("--same-ids", help="All tables hold the same ids; without it, shared ones are searched for.")
    ] = False,
) -> None:
    """Write a job and party files for your own tables, with comments; asks for what no option says."""
    from sl_queue.config.starting import Start, files_of

    tables = _tables(party, label)
    _require_names([table.party for table in tables])
    tables = [replace(table, path=_from(folder, table.path)) for table in tables]
    chosen = task or (
        _asked("What is predicted: binary, multiclass or regression", "binary") if _asks(party) else "binary"
    )
    if chosen not in ("binary", "multiclass", "regression"):
        raise JobError(f"{chosen!r} is none of binary, multiclass and regression")
    called = name or folder.absolute().name.replace(" ", "-")
    start = Start(called, tables, chosen, classes, aligned=not same_ids)  # type: ignore[arg-type]
    files = files_of(start)
    _require_accepted(folder, files)
    _write(folder, files)
    parties = " ".join(f"{table.party}.toml" for table in tables)
    print(f"next, in {folder}:")
    for table in tables:
        print(f"  sl-queue features job.toml {table.party}.toml --write   # look through what it proposes")
    print(f"  sl-queue check job.toml {parties}")
    print(f"  sl-queue local job.toml {parties}")


def _from(folder: Path, path: str) -> str:
    """Return the path of a table as a file in the folder names it: a table that is here may not be there."""
    is_here = Path(path).exists() and not (folder / path).exists()
    return os.path.relpath(path, folder) if is_here and not Path(path).is_absolute() else path


def _require_names(parties: Sequence[str]) -> None:
    """Raise JobError for names that no job has."""
    from sl_queue.config.starting import JOB_FILE, is_name

    if wrong := [party for party in parties if not is_name(party)]:
        raise JobError(f"{wrong[0]!r} is no name of a party: it is made of letters, digits, '_' and '-', at most 64")
    if same := [party for party in parties if f"{party}.toml".lower() == JOB_FILE]:
        raise JobError(f"a party {same[0]!r} would have the job's file, {JOB_FILE}; give it another name")
    if len(set(parties)) < len(parties) or len(parties) < 2:
        raise JobError(
            "a job has at least two parties, each with a name of its own: give --party NAME:TABLE:ID for each"
        )


def _require_accepted(folder: Path, files: dict[str, str]) -> None:
    """Raise JobError for files that `sl-queue check` would refuse."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.config.schema import parsed
    from sl_queue.config.starting import JOB_FILE

    try:
        parsed(Job, files[JOB_FILE].encode(), folder / JOB_FILE)
        for name in files:
            if name.endswith(".toml") and name != JOB_FILE:
                parsed(PartyFile, files[name].encode(), folder / name)
    except (JobError, UnicodeEncodeError) as error:  # a path may hold what is no text
        raise JobError(f"{error}\nnothing is written; give another --name, --party or --label") from None


def _asks(party: Sequence[str] | None) -> bool:
    """Tell whether somebody is asked: nothing was given, and somebody is here."""
    return party is None and sys.stdin.isatty()


def _asked(question: str, default: str | None = None) -> str:
    return str(typer.prompt(question, default=default)).strip()


def _tables(given: Sequence[str] | None, label: str | None) -> "list[TableOf]":
    from sl_queue.config.starting import TableOf

    if given is None:
        if not sys.stdin.isatty():
            raise JobError(
                "which tables? give --party NAME:TABLE:ID for each party, the label holder first, and --label"
            )
        return _asked_tables(label)
    if label is None:
        raise JobError("which column holds the labels? give --label COLUMN, of the first party's table")
    tables = list[TableOf]()
    for text in given:
        name, first, rest = text.partition(":")
        path, second, column = rest.rpartition(":")
        if not (first and second and name and path and column):
            raise JobError(f"--party {text!r}; it must be NAME:TABLE:ID, like bank:bank.csv:customer")
        tables.append(TableOf(name, path, column, label if not tables else None))
    return tables


def _asked_tables(label: str | None) -> "list[TableOf]":
    """Ask for the label holder's table, then for the others, until there is no further one."""
    from sl_queue.config.starting import TableOf

    name = _asked("Name of the party that has the labels")
    path, column = _asked(f"Table of {name}, a .csv or .parquet file"), _asked("Its id column")
    tables = [TableOf(name, path, column, label or _asked("Its label column"))]
    while True:
        further = "" if len(tables) > 1 else None
        name = _asked("Name of another party" + (", or Enter if there is none" if further == "" else ""), further)
        if not name:
            return tables
        tables.append(TableOf(name, _asked(f"Table of {name}"), _asked("Its id column", column)))


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write files that are not there yet. Raises JobError, before any is written, if one is."""
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise JobError(f"{folder / there[0]} is there already, and is left as it is; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            print(folder / name)
    except OSError as error:
        raise JobError(f"{folder}: cannot be written to ({error.strerror})") from None
