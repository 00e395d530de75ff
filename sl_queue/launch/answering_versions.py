"""Versions of a party that answers: each base model is built when it is first asked for, on the rows of that moment."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path

from sl_queue.compute.answering import AnsweringBase, RowIndex
from sl_queue.compute.trained import predicting_base, require_row_kept
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.data.to_predict import ToPredict, read_to_predict
from sl_queue.errors import CheckpointError, JobError, SlQueueError
from sl_queue.launch.importance import NAME, Explained, Importance
from sl_queue.launch.prediction import named_rows, with_own_secret
from sl_queue.launch.privacy import answering_guard
from sl_queue.launch.spending import release_rows
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.serving import Worth
from sl_queue.storage.versions import Version, choose_version

log = logging.getLogger("sl_queue")

_KEPT = 2  # versions in memory: the one in use, and the one before or after it
_FAILED_S = 10.0  # until a version that could not be built is tried again: its table may be large


@dataclass(slots=True)
class Versions:
    """The versions of one party, each on the rows that its table had when it was built.

    Mutable: it remembers the newest few, and which of them have not answered yet.
    """

    spec: PartySpec
    state: Path
    rows: Callable[[Version], ToPredict]
    release: Callable[[Version, ToPredict], None]  # enters what a version's answers tell, before the first of them
    _built: dict[str, AnsweringBase] = field(default_factory=dict)
    _due: dict[str, Callable[[], None]] = field(default_factory=dict)  # releases, by run
    _columns: dict[str, Sequence[str] | None] = field(default_factory=dict)  # names, by run
    _failed: dict[str, tuple[float, SlQueueError]] = field(default_factory=dict)  # when a run was not built, and why

    def base_of(self, run: str) -> AnsweringBase | None:
        """Return the base model of a run, to answer with; None if there is no version of it. Raises SlQueueError."""
        found = self._built.get(run)
        if found is None:
            failed_at, why = self._failed.get(run, (-inf, JobError("")))
            if time.monotonic() - failed_at < _FAILED_S:
                raise why
            found = self._build(run)
        if run in self._due:
            self._due[run]()
            del self._due[run]
        return found

    def _build(self, run: str) -> AnsweringBase | None:
        try:
            return self.build(run)
        except SlQueueError as error:
            self._failed[run] = time.monotonic(), error
            raise

    def build(self, run: str) -> AnsweringBase | None:
        """Read the rows and build the base model of a run, None if there is no version of it. Raises SlQueueError."""
        try:
            version = choose_version(self.state, run)
        except CheckpointError:
            return None
        if version.run != run:
            return None
        weights, rows = version.weights("base"), self.rows(version)
        table = rows.table
        batches = Batches(table.n_rows, self.spec.compute.layers.seed, 1, table.n_rows, 1, shuffle=False)
        about = (self.spec.compute, table, batches, weights, answering_guard(self.spec))
        stage = predicting_base(*about).stage
        require_row_kept(stage)
        assert rows.keys is not None
        found = AnsweringBase(stage, RowIndex.of(rows.keys))
        while len(self._built) >= _KEPT:
            oldest = next(iter(self._built))
            del self._built[oldest]
            self._due.pop(oldest, None)
        self._due[run] = partial(self.release, version, rows)
        self._built[run], self._columns[run] = found, table.columns
        return found

    def columns_of(self, run: str) -> Sequence[str] | None:
        """Return the names of the columns of a base model that was built."""
        return self._columns.get(run)

    def explained(self, run: str, worth: Worth) -> None:
        """Keep what the columns of this party are worth beside the version that it is about."""
        names, party = self.columns_of(run) or (), self.spec.party
        labels = [
            None,
            *(names[place] if place < len(names) else f"column {place}" for place in range(len(worth.worse) - 1)),
        ]
        found = [Importance(party, name, worse) for name, worse in zip(labels, worth.worse, strict=False)]
        folder = choose_version(self.state, run).path
        Explained(worth.metric, float("nan"), 0, found).keep(folder)
        log.info("%s: what its columns are worth to the model is in %s", party, folder / NAME)


def versions_of(job: Job, spec: PartySpec, state: Path) -> Versions:
    """Return the versions that a party answers with, none of them built."""
    spec = with_own_secret(spec, state)

    def rows(version: Version) -> ToPredict:
        return read_to_predict(spec.table, None, version.recipe, version.columns, id_key(job), whole=version.whole)

    def release(version: Version, rows: ToPredict) -> None:
        release_rows(job, spec, state, "/".join(("answered", *named_rows(version, rows).values())))

    return Versions(spec, state, rows, release)


def id_key(job: Job) -> bytes:
    """Return what keys ids in requests: the job, so that no id travels."""
    return bytes.fromhex(job.digest)[:32]
