"""A party's rows for a run: aligned with those of the others, read, and keyed as its file says."""

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sl_queue.compute import seeds
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.data.aligning import ids_digest
from sl_queue.data.spec import TableSpec
from sl_queue.data.table import read_ids, read_row_keys, read_table
from sl_queue.launch.privacy import choice_key, responded, token_key
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.holdout import Chosen
from sl_queue.protocol.table import Table
from sl_queue.storage.aligned_file import Aligned, read_aligned


def aligned_rows(job: Job, spec: PartySpec, place: Workplace) -> Aligned | None:
    """Find the rows that all parties hold; None if the job aligns nothing."""
    if job.alignment.method != "psi":
        return None
    from sl_queue.launch.alignment import align_party  # a job that aligns nothing does without

    with _source_seeded(spec):
        return align_party(job, spec.table, place, own_version())


def aligned_before(table: TableSpec, state: Path) -> Aligned | None:
    """Return what an alignment of these rows has left in a state folder; None if it has left nothing.

    Positions mean nothing in another table. Raises CheckpointError if the rows are not those that were aligned.
    """
    aligned = read_aligned(state)
    if aligned is not None:
        found, where = read_ids(table)
        aligned.require(ids_digest(found), where)
    return aligned


def table_of(spec: PartySpec, rules: int, aligned: Aligned | None = None, chosen: Chosen | None = None) -> Table:
    """Read the party's rows, with responses for labels if its file says so.

    `chosen`: the rows that the label holder holds out, as it said or has on disk; None: it chooses them now.
    """
    with _source_seeded(spec):
        positions, by = None if aligned is None else aligned.positions, choice_key(spec)
        table = read_table(spec.table, positions, rules, token_key(spec), chosen=chosen, choice_key=by, narrow=True)
        return responded(spec, table)


def row_keys_of(spec: PartySpec, aligned: Aligned | None) -> tuple[npt.NDArray[np.uint64], str]:
    """Read the keys of the party's rows, and the digest of all."""
    with _source_seeded(spec):
        return read_row_keys(spec.table, None if aligned is None else aligned.positions)


def _source_seeded(spec: PartySpec) -> AbstractContextManager[None]:
    """Let a source in Python draw random numbers, beside other parties of this process."""
    if getattr(spec.table.data, "source", None) is None:
        return nullcontext()
    return seeds.seeded(seeds.key(spec.compute.layers.seed, spec.party, "source"), torch.device("cpu"))


def own_version() -> str:
    """Look up the installed version of sl_queue; empty where it runs without being installed."""
    try:
        return version("sl_queue")
    except PackageNotFoundError:
        return ""
