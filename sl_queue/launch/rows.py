"""A party's rows for a run: aligned with those of the others, read, and keyed as its file says."""

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version

import torch

from sl_queue.compute import seeds
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.data.table import read_table
from sl_queue.launch.alignment import align_party
from sl_queue.launch.privacy import responded, token_key
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.table import Table
from sl_queue.storage.aligned_file import Aligned


def aligned_rows(job: Job, spec: PartySpec, place: Workplace) -> Aligned | None:
    """Find the rows that all parties hold."""
    with _source_seeded(spec):
        return align_party(job, spec.table, place, own_version())


def table_of(spec: PartySpec, rules: int, aligned: Aligned | None = None) -> Table:
    """Read the party's rows, with responses for labels if its file says so."""
    with _source_seeded(spec):
        positions = None if aligned is None else aligned.positions
        return responded(spec, read_table(spec.table, positions, rules, token_key(spec)))


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
