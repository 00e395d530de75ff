"""Meters: a party attacks what it itself sends, each epoch, on a sample of rows, and says what a peer could read.

Nothing is sent for it, and nothing that is trained depends on it. What a meter has gathered is part of the party's
checkpoint, so that a run that was interrupted measures what an uninterrupted one does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sl_queue.privacy import attacks
from sl_queue.privacy.attacks import Classes, Rows
from sl_queue.privacy.draws import Floats

SAMPLE = 1000  # rows that are looked at
WIDTH = 128  # numbers of a row that are looked at; of wider ones every so many
KNOWN = 5  # rows of a class that an attacker knows, for the direction that it adds up
MOST_CLASSES = 10  # that are scored; the rarest ones

Positions = npt.NDArray[np.int64]
Found = dict[str, float]
Arrays = Mapping[str, npt.NDArray[np.generic]]


def sample(labels: Classes | None, training: Positions, key: bytes) -> Positions:
    """Choose the rows to look at, ascending: all of a small table, else half of them of the rarest class if it can."""
    rng = _rng(key, "sample", 0)
    if len(training) <= SAMPLE:
        return np.sort(training)
    if labels is None:
        return np.sort(rng.choice(training, SAMPLE, replace=False))
    classes, counts = attacks.counted(labels[training])
    of_rarest = labels[training] == classes[counts.argmin()]
    n_rare = min(int(of_rarest.sum()), SAMPLE // 2)
    rare = rng.choice(training[of_rarest], n_rare, replace=False)
    others = training[~of_rarest] if n_rare + int((~of_rarest).sum()) >= SAMPLE else np.setdiff1d(training, rare)
    return np.sort(np.concatenate([rare, rng.choice(others, SAMPLE - len(rare), replace=False)]))


@dataclass(slots=True)
class _Seen:
    """Messages of one kind about the sampled rows in this epoch. Mutable: an epoch fills it."""

    rows: npt.NDArray[np.float32]  # (sample, numbers)
    here: npt.NDArray[np.bool_]  # (sample,)
    norms: npt.NDArray[np.float32]  # (sample,), of all of a row's numbers

    @classmethod
    def empty(cls, n_rows: int, width: int) -> "_Seen":
        rows = np.zeros((n_rows, min(width, WIDTH)), np.float32)
        return cls(rows, np.zeros(n_rows, bool), np.zeros(n_rows, np.float32))

    def add(self, places: Positions, numbers: npt.NDArray[np.float32]) -> None:
        """Keep rows, (rows, numbers), at these places of the sample."""
        self.norms[places] = np.linalg.norm(numbers, axis=1)
        stride = -(-numbers.shape[1] // WIDTH)
        self.rows[places, : -(-numbers.shape[1] // stride)] = numbers[:, ::stride]
        self.here[places] = True


@dataclass(slots=True)
class _Sampled:
    """The sample, and where each row of the table is in it."""

    positions: Positions
    places: npt.NDArray[np.int32] = field(repr=False)  # (rows of the table,); -1: not in the sample

    @classmethod
    def of(cls, positions: Positions, n_rows: int) -> "_Sampled":
        places = np.full(n_rows, -1, np.int32)
        places[positions] = np.arange(len(positions))
        return cls(positions, places)

    def among(self, rows: Positions) -> tuple[Positions, npt.NDArray[np.bool_]]:
        """Return the places of those rows that are in the sample, and which of the rows they are."""
        places = self.places[rows]
        chosen = places >= 0
        return places[chosen].astype(np.int64), chosen


class GradientMeter:
    """The label holder's: what each feature party reads of the labels. Mutable: it gathers, and adds up over epochs."""

    def __init__(self, labels: Classes, training: Positions, key: bytes, given: Classes | None = None) -> None:
        """Meter against `labels`; `given`: the classes that stand in their place, after a response."""
        self._key, self._epoch = key, 0
        self._sample = _Sampled.of(sample(labels, training, key), len(labels))
        self._labels = labels[self._sample.positions]
        self._given = None if given is None else given[self._sample.positions]
        self._gradients: dict[str, _Seen] = {}
        self._activations: dict[str, _Seen] = {}
        self._before: dict[str, npt.NDArray[np.float32]] = {}  # the gradients' rows of the epoch before
        self._patience: dict[str, Floats] = {}  # (sample, scored classes)
        classes, counts = attacks.counted(self._labels)
        few = 1 if len(classes) == 2 else MOST_CLASSES
        self._scored = classes[np.argsort(counts, kind="stable")][:few] if len(classes) > 1 else classes[:0]
        rng = _rng(key, "friends", 0)
        members = [np.flatnonzero(self._labels == c) for c in self._scored]
        self._friends = [rng.choice(m, min(KNOWN, max(1, len(m) // 2)), replace=False) for m in members]

    def samples(self, rows: Positions) -> npt.NDArray[np.bool_]:
        """Say which of these rows of the table are looked at."""
        return self._sample.places[rows] >= 0

    def saw_gradient(self, party: str, rows: Positions, gradient: npt.NDArray[np.float32]) -> None:
        """Take note of what is sent to a party for these rows of the table; shape (rows, *anything)."""
        self._add(self._gradients, party, rows, gradient)

    def saw_activation(self, party: str, rows: Positions, activation: npt.NDArray[np.float32]) -> None:
        """Take note of what a party holds of these rows anyway: its own activations."""
        self._add(self._activations, party, rows, activation)

    def end_epoch(self) -> dict[str, Found]:
        """Return what each party could read of the labels by what it was sent; begins another epoch."""
        found = {party: self._attacked(party, seen) for party, seen in sorted(self._gradients.items())}
        for party, seen in self._gradients.items():
            self._before[party] = np.where(seen.here[:, None], seen.rows, 0)
            self._gradients[party] = _Seen.empty(len(seen.here), seen.rows.shape[1])
        self._activations = {}
        self._epoch += 1
        return found

    def _add(self, kept: dict[str, _Seen], party: str, rows: Positions, tensor: npt.NDArray[np.float32]) -> None:
        places, chosen = self._sample.among(rows)
        if not len(places):
            return
        numbers = tensor[chosen].reshape(len(places), -1)
        if party not in kept:
            kept[party] = _Seen.empty(len(self._sample.positions), numbers.shape[1])
        kept[party].add(places, numbers)

    def _attacked(self, party: str, seen: _Seen) -> Found:
        here, labels, rng = seen.here, self._labels[seen.here], _rng(self._key, party, self._epoch)
        unit, norms = attacks.directions(seen.rows[here].astype(np.float64)), seen.norms[here].astype(np.float64)
        found = {
            "norm": attacks.norm(norms[:, None], labels),
            "direction": attacks.direction(unit, labels, rng),
            "spectral": attacks.spectral(unit, labels),
            "patient": self._patient(party, unit, here),
            "completion": attacks.completion(unit, labels, rng),
            "change": self._changed(party, seen, rng),
        }
        if len(self._scored) > 1:
            found["one_of_each"] = attacks.one_of_each(unit, labels, rng)
        if party in self._activations:
            own = self._activations[party]
            found["probe"] = attacks.completion(own.rows[own.here].astype(np.float64), self._labels[own.here], rng)
        if self._given is not None:
            given = self._given[here]
            found["response"] = attacks.each_class(labels, lambda of_class: given == labels[of_class][0])
        tried = [norms[None], attacks.main_directions(unit, 2), unit[:1] @ unit.T]
        found["chance"] = attacks.chance(np.concatenate(tried), labels, rng)
        return {name: round(value, 4) for name, value in found.items()}

    def _patient(self, party: str, unit: Rows, here: npt.NDArray[np.bool_]) -> float:
        """Add up over all epochs what the direction of a few known rows says of the others."""
        total = self._patience.setdefault(party, np.zeros((len(here), len(self._scored))))
        whole = np.zeros((len(here), unit.shape[1]))
        whole[here] = unit
        scores = []
        for place, (of_class, friends) in enumerate(zip(self._scored, self._friends, strict=True)):
            known = friends[here[friends]]
            if len(known):
                total[here, place] += unit @ (whole[known].mean(0) - unit.mean(0))
            others = np.setdiff1d(np.flatnonzero(here), friends)
            scores.append(attacks.auc(self._labels[others] == of_class, total[others, place]))
        return float(np.mean(scores)) if scores else 0.5

    def _changed(self, party: str, seen: _Seen, rng: np.random.Generator) -> float:
        """Attack what has changed since the epoch before: what is drawn once falls out of the difference."""
        if party not in self._before:
            return 0.5
        both = seen.here & self._before[party].any(1)
        change = (seen.rows[both] - self._before[party][both]).astype(np.float64)
        return attacks.direction(attacks.directions(change), self._labels[both], rng) if both.any() else 0.5

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return all that was gathered so far, by name, for a checkpoint."""
        found: dict[str, npt.NDArray[np.generic]] = {"epoch": np.array([self._epoch], np.int64)}
        for kind, kept in (("gradient", self._gradients), ("activation", self._activations)):
            for party, seen in kept.items():
                found |= {f"{kind}/{part}/{party}": getattr(seen, part) for part in ("rows", "here", "norms")}
        found |= {f"before/{party}": rows for party, rows in self._before.items()}
        return {**found, **{f"patience/{party}": total for party, total in self._patience.items()}}

    def load(self, arrays: Arrays) -> None:
        """Become what `arrays` returned; without any, what a run begins with."""
        self._epoch = int(arrays["epoch"][0]) if "epoch" in arrays else 0
        self._gradients, self._activations = _seen_in(arrays, "gradient"), _seen_in(arrays, "activation")
        self._before = {party: array.astype(np.float32) for party, array in _under(arrays, "before").items()}
        self._patience = {party: array.astype(np.float64) for party, array in _under(arrays, "patience").items()}


class ActivationMeter:
    """A feature party's: what the label holder reads of its columns. Mutable: it gathers over an epoch."""

    def __init__(self, columns: npt.NDArray[np.generic], training: Positions, key: bytes) -> None:
        self._key, self._epoch = key, 0
        self._sample = _Sampled.of(sample(None, training, key), len(columns))
        whole = columns[self._sample.positions].astype(np.float64)
        whole = whole.reshape(len(whole), math.prod(columns.shape[1:]))
        self._columns: Rows = whole[:, :: max(1, -(-whole.shape[1] // WIDTH))]
        self._raw = round(attacks.attribute_raw(self._columns, _rng(key, "raw", 0)), 4)
        self._seen: _Seen | None = None

    def samples(self, rows: Positions) -> npt.NDArray[np.bool_]:
        """Say which of these rows of the table are looked at."""
        return self._sample.places[rows] >= 0

    def saw_activation(self, rows: Positions, activation: npt.NDArray[np.float32]) -> None:
        """Take note of what is sent for these rows of the table; shape (rows, *anything)."""
        places, chosen = self._sample.among(rows)
        if not len(places):
            return
        numbers = activation[chosen].reshape(len(places), -1)
        if self._seen is None:
            self._seen = _Seen.empty(len(self._sample.positions), numbers.shape[1])
        self._seen.add(places, numbers)

    def end_epoch(self) -> Found:
        """Return the share of variance that can be recovered of the columns by what was sent; begins another epoch."""
        seen, self._seen = self._seen, None
        rng = _rng(self._key, "columns", self._epoch)
        self._epoch += 1
        if seen is None or not seen.here.any():
            return {}
        rows, columns = seen.rows[seen.here].astype(np.float64), self._columns[seen.here]
        shuffled = rng.permutation(rows)
        each = attacks.recovered(rows, columns, rng)
        found = {
            "ridge": attacks.together(each, columns),
            "network": attacks.reconstruction(rows, columns, rng, network=True),
            "attribute": max(0.0, float(each.max(initial=0.0))),
            "chance": attacks.attribute(shuffled, columns, rng),
        }
        return {**{name: round(value, 4) for name, value in found.items()}, "attribute_raw": self._raw}

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return all that was gathered so far, by name, for a checkpoint."""
        found: dict[str, npt.NDArray[np.generic]] = {"epoch": np.array([self._epoch], np.int64)}
        seen = {} if self._seen is None else {f"activation/{p}/": getattr(self._seen, p) for p in _PARTS}
        return found | seen

    def load(self, arrays: Arrays) -> None:
        """Become what `arrays` returned; without any, what a run begins with."""
        self._epoch = int(arrays["epoch"][0]) if "epoch" in arrays else 0
        self._seen = _seen_in(arrays, "activation").get("")


_PARTS = ("rows", "here", "norms")


def _under(arrays: Arrays, prefix: str) -> dict[str, npt.NDArray[np.generic]]:
    start = f"{prefix}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _seen_in(arrays: Arrays, kind: str) -> dict[str, _Seen]:
    rows, here, norms = (_under(arrays, f"{kind}/{part}") for part in _PARTS)
    return {
        party: _Seen(rows[party].astype(np.float32), here[party].astype(bool), norms[party].astype(np.float32))
        for party in rows
    }


def _rng(key: bytes, purpose: str, epoch: int) -> np.random.Generator:
    """Return a generator that depends on the key, the purpose and the epoch alone."""
    words = [int.from_bytes(key[:16], "little"), int.from_bytes(purpose.encode(), "little"), epoch]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
