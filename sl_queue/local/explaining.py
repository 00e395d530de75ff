"""Permutation importance of a trained model, with all parties' rows at hand.

A party, or one of its columns, is worth as much as the result gets worse when its values are dealt out to other rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sl_queue.compute.answering import fused_outputs, n_columns, outputs_of_rows, with_column
from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.evaluated import evaluate
from sl_queue.compute.objective import Objective
from sl_queue.compute.predicting import PredictingFuse
from sl_queue.compute.trained import evaluating_fuse, predicting_base
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, data_to_predict, resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.aligning import ids_of, shared_rows
from sl_queue.data.to_predict import ToPredict, read_to_predict
from sl_queue.errors import AlignmentError
from sl_queue.launch.asked import Asked, schedule_of
from sl_queue.launch.importance import REPEATS, Explained, Importance, measure_of, require_defined
from sl_queue.launch.prediction import spec_to_predict
from sl_queue.local.threads import require_all
from sl_queue.storage.pieces import PieceFolder
from sl_queue.storage.versions import Version, choose_version


def explain(
    job: Job, parties: Sequence[PartyFile], states: Mapping[str, Path], run: str | None = None, repeats: int = REPEATS
) -> Explained:
    """Measure what each party and each column is worth on the rows of [predict], whose labels the label holder has.

    The metric is the first that the label holder's file names, else the loss. Raises SlQueueError.
    """
    require_all(job, parties)
    importer, asked = Importer(), Asked(run=run, labels=True)
    specs = {
        file.party: spec_to_predict(resolve(job, file, importer), data_to_predict(file), asked) for file in parties
    }
    metric, sign = measure_of(job, specs[job.label_holder])
    versions = {party: choose_version(states[party], run) for party in specs}
    rows = _rows(job, specs, versions)
    model = _model(job, specs, versions, rows)
    before = require_defined(metric, model.value(metric), model.n_rows)
    found = []
    for party, column, features in _dealt(model.bases, rows, repeats, job.seed):
        after = [model.value(metric, party, dealt) for dealt in features]
        found.append(Importance(party, column, sign * (float(np.mean(after)) - before)))
    explained = Explained(metric, before, model.n_rows, found)
    for party, version in versions.items():
        explained.of(party, others=party == job.label_holder).keep(version.path)
    return explained


@dataclass(slots=True)
class _Model:
    """The joined model on fixed rows. Mutable: a party's features are replaced for a moment."""

    bases: Mapping[str, TorchBaseStage]
    fuse: PredictingFuse
    objective: Objective
    n_rows: int

    def value(self, metric: str, party: str | None = None, features: Any = None) -> float:
        """Return a metric, with other features of one party if given."""
        inputs = {}
        for name, stage in self.bases.items():
            kept = stage.features
            stage.features = features if name == party else kept
            try:
                inputs[name] = outputs_of_rows(stage, np.arange(self.n_rows))
            finally:
                stage.features = kept
        found = evaluate(self.objective, fused_outputs(self.fuse.model, self.fuse.layers, inputs)).metrics[metric]
        return float("nan") if found is None else found


def _rows(job: Job, specs: Mapping[str, PartySpec], versions: Mapping[str, Version]) -> dict[str, ToPredict]:
    shared = shared_rows(ids_of([spec.table for spec in specs.values()])) if job.alignment.method == "psi" else {}
    found = {}
    for party, spec in specs.items():
        version = versions[party]
        about = (shared.get(party), version.recipe, version.columns)
        found[party] = read_to_predict(spec.table, *about, whole=version.whole)
    if len({rows.table.digest for rows in found.values()}) > 1:
        counts = ", ".join(f"{party} {rows.table.n_rows}" for party, rows in found.items())
        raise AlignmentError(f"the parties' rows differ ({counts}), and the job does not align them")
    return found


def _model(
    job: Job, specs: Mapping[str, PartySpec], versions: Mapping[str, Version], rows: Mapping[str, ToPredict]
) -> _Model:
    holder = job.label_holder
    n_rows = rows[holder].table.n_rows
    batches = schedule_of(job, n_rows).batches
    bases = {}
    for party in job.feature_parties:
        weights = versions[party].weights("base")
        bases[party] = predicting_base(specs[party].compute, rows[party].table, batches, weights).stage
    parts = ("base", "fuse") if holder in specs[holder].compute.layers.cuts else ("fuse",)
    own = {part: versions[holder].weights(part) for part in parts}
    nowhere = PieceFolder(Path())  # nothing is written
    fuse, objective = evaluating_fuse(specs[holder].compute, rows[holder].table, batches, own, nowhere, {})
    if fuse.own is not None:
        bases[holder] = fuse.own.stage
    return _Model(bases, fuse, objective, n_rows)


def _dealt(
    bases: Mapping[str, TorchBaseStage], rows: Mapping[str, ToPredict], repeats: int, seed: int
) -> Iterator[tuple[str, str | None, list[npt.NDArray[Any]]]]:
    """Yield each party, and each of its columns, with its features dealt out to other rows, so many times."""
    for party, stage in bases.items():
        features = stage.features
        generator = np.random.default_rng([seed % 2**63, len(party)])
        orders = [generator.permutation(len(features)) for _ in range(repeats)]
        yield party, None, [features[order] for order in orders]
        count, columns = n_columns(features), rows[party].table.columns
        names = columns if columns is not None and len(columns) == count else features.dtype.names or ()
        for place, name in enumerate(names):
            yield party, name, [with_column(features, features[order], place) for order in orders]
