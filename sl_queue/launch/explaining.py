"""An explanation over a broker: the label holder measures, feature parties that serve answer for their own columns.

A party, or one of its columns, is worth as much as the result gets worse when its values are dealt out to other rows.
Which columns another party has is unknown here: they have numbers, and each party learns what its own are worth.
"""

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sl_queue.compute.evaluated import evaluate
from sl_queue.compute.objective import Objective
from sl_queue.compute.trained import evaluating_fuse
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.data.to_predict import ToPredict
from sl_queue.errors import AlignmentError
from sl_queue.launch.answering_versions import versions_of
from sl_queue.launch.asked import schedule_of
from sl_queue.launch.connect import Connect
from sl_queue.launch.importance import REPEATS, Explained, Importance, measure_of, require_defined
from sl_queue.launch.service import PREFETCH, Models
from sl_queue.loops.explaining import Questions
from sl_queue.loops.requests import Found
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.serving import MOST_ROWS, Deal, Keys, Worth
from sl_queue.security.sealing import Seal
from sl_queue.storage.pieces import PieceFolder
from sl_queue.storage.versions import choose_version
from sl_queue.transport.serving_channel import ServingChannel

MOST_EXPLAINED = 10_000  # rows, drawn from more
_HERE = MicroBatch(0, 0)

Inputs = Sequence[Mapping[str, list[Any]]]  # of each part of the rows, by party


def explain_over(
    job: Job, spec: PartySpec, state: Path, connect: Connect, seal: Seal | None, run: str | None = None
) -> Explained:
    """Explain on the rows of `spec`, with labels, that all parties serve. Raises SlQueueError."""
    about, version = measure_of(job, spec), choose_version(state, run)
    versions = versions_of(job, spec, state)
    models = Models(spec, version, versions if spec.party in spec.compute.layers.cuts else None)
    patience_s = job.broker.patience
    channel = ServingChannel(
        connect(spec.party, PREFETCH, confirms=False), spec.party, job.topology(), secrets.token_hex(8),
        lambda came: questions.take(came), deadline_s=patience_s, patience_s=patience_s, seal=seal,
    )  # fmt: skip
    questions = Questions(channel, version.run, patience_s, lambda: channel.failure)
    channel.open()
    try:
        rows = versions.rows(version)
        assert rows.keys is not None
        found = _Measure(job, spec, models, questions, _objective(job, spec, models, rows), rows.keys, about).explain()
    finally:
        channel.close()
    found.of(spec.party, others=True).keep(version.path)
    return found


def _objective(job: Job, spec: PartySpec, models: Models, rows: ToPredict) -> Objective:
    batches = schedule_of(job, rows.table.n_rows).batches
    parts = ("base", "fuse") if spec.party in spec.compute.layers.cuts else ("fuse",)
    weights = {part: models.version.weights(part) for part in parts}
    return evaluating_fuse(spec.compute, rows.table, batches, weights, PieceFolder(Path()), {})[1]


@dataclass(slots=True)
class _Measure:
    """One explanation. Mutable: it finds out which rows all parties have."""

    job: Job
    spec: PartySpec
    models: Models
    questions: Questions
    objective: Objective
    keys: Keys  # of the label holder's rows, in canonical order
    measure: tuple[str, float]  # the metric, and its sign
    positions: Any = None  # of the rows that are looked at
    parts: Sequence[Keys] = ()

    def explain(self) -> Explained:
        """Measure the result as it is, then without each party and each column."""
        self._find_rows()
        plain: list[dict[str, list[Any]]] = [{} for _ in self.parts]
        parties = [*self.job.feature_parties, *([self.spec.party] if self.models.base is not None else [])]
        for party in parties:
            for inputs, part in zip(plain, self._of(party, None) or (), strict=True):
                inputs[party] = part
        metric, sign = self.measure
        before = require_defined(metric, self._value(plain, metric), len(self.positions))
        found: list[Importance] = []
        for party in parties:
            worse = [sign * (value - before) for value in self._without(party, plain, metric)]
            names = (None, *(f"column {place}" for place in range(len(worse) - 1)))
            if party == self.spec.party:
                names = (None, *(self.models.columns or names[1:]))
            else:
                self.questions.tell(party, Worth(metric, worse))
            found += [Importance(party, name, value) for name, value in zip(names, worse, strict=True)]
        return Explained(metric, before, len(self.positions), found)

    def _find_rows(self) -> None:
        """Look at rows that all parties have, `MOST_EXPLAINED` at most."""
        positions = np.arange(len(self.keys))
        if len(positions) > MOST_EXPLAINED:
            draw = np.random.default_rng(self.job.seed % 2**63)
            positions = np.sort(draw.choice(positions, MOST_EXPLAINED, replace=False))
        for party in self.job.feature_parties:
            answers = self.questions.ask(party, _parts(self.keys[positions])) or ()
            positions = positions[np.concatenate([answer.found for answer in answers])]
            if not len(positions):
                raise AlignmentError(f"{party} serves none of the label holder's rows under [predict]")
        self.positions, self.parts = positions, _parts(self.keys[positions])

    def _of(self, party: str, deal: Deal | None) -> list[list[Any]] | None:
        """Return a party's outputs for all parts of the rows; None if it has no such column."""
        if party == self.spec.party:
            base = self.models.base
            assert base is not None
            if deal is not None and deal.column is not None and deal.column >= base.columns:
                return None
            return [_all_of(party, *base.in_place(_HERE, keys, deal)) for keys in self.parts]
        answers = self.questions.ask(party, self.parts, deal)
        if answers is None:
            return None
        found = []
        for keys, answer in zip(self.parts, answers, strict=True):
            if answer.activation is None or not answer.found.all():
                raise _changed(party)
            found.append(self.models.fuse.arrive(party, _HERE, keys, answer.activation))
        return found

    def _without(self, party: str, plain: Inputs, metric: str) -> Iterator[float]:
        """Yield the metric with all of a party's values dealt out, then with each column's."""
        for column in itertools.chain((None,), itertools.count()):
            values = []
            for order in range(REPEATS):
                dealt = self._of(party, Deal(column, order))
                if dealt is None:
                    return
                values.append(self._value([{**i, party: own} for i, own in zip(plain, dealt, strict=True)], metric))
            yield float(np.mean(values))

    def _value(self, inputs: Inputs, metric: str) -> float:
        outputs = np.concatenate([self.models.fuse.fuse(_HERE, part) for part in inputs])
        whole = np.zeros((len(self.keys), *outputs.shape[1:]), outputs.dtype)
        whole[self.positions] = outputs
        value = evaluate(self.objective, whole, [self.positions]).metrics[metric]
        return float("nan") if value is None else value


def _all_of(party: str, found: Found, outputs: list[Any] | None) -> list[Any]:
    if outputs is None or not found.all():
        raise _changed(party)
    return outputs


def _changed(party: str) -> AlignmentError:
    return AlignmentError(f"{party} has changed its rows meanwhile; start again")


def _parts(keys: Keys) -> list[Keys]:
    return [keys[first : first + MOST_ROWS] for first in range(0, len(keys), MOST_ROWS)]
