"""Meters: a party attacks what it itself sends, each epoch, on a sample of rows, and says what a peer could read.

Nothing is sent for it, and nothing that is trained depends on it. What a meter has gathered is part of the party's
checkpoint, so that a run that was interrupted measures what an uninterrupted one does.
"""

import math

import numpy as np
import numpy.typing as npt

from sl_queue.privacy import attacks
from sl_queue.privacy.attacks import Classes, Rows
from sl_queue.privacy.draws import Floats, Words
from sl_queue.privacy.sampled import WIDTH, Arrays, Positions, Sampled, Seen, generator, sample, seen_in, under

KNOWN = 5  # rows of a class that an attacker knows, for the direction that it adds up
MOST_CLASSES = 10  # that are scored; the rarest ones

Found = dict[str, float]


class GradientMeter:
    """The label holder's: what each feature party reads of the labels. Mutable: it gathers, and adds up over epochs."""

    def __init__(
        self, labels: Classes, training: Positions, key: bytes, keys: Words, given: Classes | None = None
    ) -> None:
        """Meter against `labels`, one a row; `given`: the classes that stand in their place, after a response.

        `key` keys what is chosen, `keys` name the rows at the cut.
        """
        self._key, self._epoch = key, 0
        self._sample = Sampled.of(sample(labels, training, key), keys)
        self._labels = labels[self._sample.positions]
        self._given = None if given is None else given[self._sample.positions]
        self._gradients: dict[str, Seen] = {}
        self._activations: dict[str, Seen] = {}
        self._before: dict[str, npt.NDArray[np.float32]] = {}  # the gradients' rows of the epoch before
        self._patience: dict[str, Floats] = {}  # (sample, scored classes)
        classes, counts = attacks.counted(self._labels)
        few = 1 if len(classes) == 2 else MOST_CLASSES
        self._scored = classes[np.argsort(counts, kind="stable")][:few] if len(classes) > 1 else classes[:0]
        rng = generator(key, "friends", 0)
        members = [np.flatnonzero(self._labels == c) for c in self._scored]
        self._friends = [rng.choice(m, min(KNOWN, max(1, len(m) // 2)), replace=False) for m in members]

    @property
    def sample(self) -> Positions:
        """The rows that are looked at, by their positions in the table."""
        return self._sample.positions

    def saw_gradient(self, party: str, keys: Words, numbers: npt.NDArray[np.float32]) -> None:
        """Keep what is sent to a party for the rows of these keys; shape (keys, *anything)."""
        self._kept(self._gradients, party, numbers).add(keys, numbers)

    def saw_activation(self, party: str, keys: Words, numbers: npt.NDArray[np.float32]) -> None:
        """Keep what a party holds of these rows anyway: its own activations."""
        self._kept(self._activations, party, numbers).add(keys, numbers)

    def end_epoch(self) -> dict[str, Found]:
        """Return what each party could read of the labels by what it was sent; begins another epoch."""
        kept = {party: seen.settle() for party, seen in sorted(self._gradients.items())}
        found = {party: self._attacked(party, seen) for party, seen in kept.items() if seen.here.any()}
        for party, seen in self._gradients.items():
            self._before[party] = np.where(seen.here[:, None], seen.rows, 0)
            self._gradients[party] = Seen.empty(self._sample, seen.rows.shape[1])
        self._activations = {}
        self._epoch += 1
        return found

    def _kept(self, kept: dict[str, Seen], party: str, numbers: npt.NDArray[np.float32]) -> Seen:
        if party not in kept:
            kept[party] = Seen.empty(self._sample, math.prod(numbers.shape[1:]))
        return kept[party]

    def _attacked(self, party: str, seen: Seen) -> Found:
        here, labels, rng = seen.here, self._labels[seen.here], generator(self._key, party, self._epoch)
        unit, norms = attacks.directions(seen.rows[here].astype(np.float64)), seen.norms[here].astype(np.float64)
        main = attacks.main_directions(unit, len(attacks.counted(labels)[0]))
        found = {
            "norm": attacks.norm(norms[:, None], labels),
            "direction": attacks.direction(unit, labels, rng),
            "spectral": attacks.along(main, labels),
            "patient": self._patient(party, unit, here),
            "completion": attacks.completion(unit, labels, rng),
            "change": self._changed(party, seen, rng),
        }
        if len(self._scored) > 1:
            found["one_of_each"] = attacks.one_of_each(unit, labels, rng)
        if party in self._activations:
            own = self._activations[party].settle()
            found["probe"] = attacks.completion(own.rows[own.here].astype(np.float64), self._labels[own.here], rng)
        if self._given is not None:
            given = self._given[here]
            found["response"] = attacks.each_class(labels, lambda of_class: given == labels[of_class][0])
        tried = [norms[None], main[-1:], unit[:1] @ unit.T]
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
            rest = attacks.others(len(here), friends)
            rest = rest[here[rest]]
            scores.append(attacks.auc(self._labels[rest] == of_class, total[rest, place]))
        return float(np.mean(scores)) if scores else 0.5

    def _changed(self, party: str, seen: Seen, rng: np.random.Generator) -> float:
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
                found |= seen.arrays(kind, party)
        found |= {f"before/{party}": rows for party, rows in self._before.items()}
        return {**found, **{f"patience/{party}": total for party, total in self._patience.items()}}

    def load(self, arrays: Arrays) -> None:
        """Become what `arrays` returned; without any, or of a version with another sample, what a run begins with."""
        self._epoch = int(arrays["epoch"][0]) if "epoch" in arrays else 0
        arrays = self._sample.ours(arrays)
        self._gradients = seen_in(self._sample, arrays, "gradient")
        self._activations = seen_in(self._sample, arrays, "activation")
        self._before = {party: array.astype(np.float32) for party, array in under(arrays, "before").items()}
        self._patience = {party: array.astype(np.float64) for party, array in under(arrays, "patience").items()}


class ActivationMeter:
    """A feature party's: what the label holder reads of its columns. Mutable: it gathers over an epoch."""

    def __init__(self, columns: npt.NDArray[np.generic], training: Positions, key: bytes, keys: Words) -> None:
        self._key, self._epoch = key, 0
        self._sample = Sampled.of(sample(None, training, key), keys)
        whole = columns[self._sample.positions].astype(np.float64)
        whole = whole.reshape(len(whole), math.prod(columns.shape[1:]))
        self._columns: Rows = whole[:, :: max(1, -(-whole.shape[1] // WIDTH))]
        self._raw = round(attacks.attribute_raw(self._columns, generator(key, "raw", 0)), 4)
        self._seen: Seen | None = None

    @property
    def sample(self) -> Positions:
        """The rows that are looked at, by their positions in the table."""
        return self._sample.positions

    def saw_activation(self, keys: Words, numbers: npt.NDArray[np.float32]) -> None:
        """Keep what is sent for the rows of these keys; shape (keys, *anything)."""
        if self._seen is None:
            self._seen = Seen.empty(self._sample, math.prod(numbers.shape[1:]))
        self._seen.add(keys, numbers)

    def end_epoch(self) -> Found:
        """Return the share of variance that can be recovered of the columns by what was sent; begins another epoch."""
        seen, self._seen = self._seen, None
        rng = generator(self._key, "columns", self._epoch)
        self._epoch += 1
        if seen is None or not seen.settle().here.any():
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
        return found | ({} if self._seen is None else self._seen.arrays("activation", ""))

    def load(self, arrays: Arrays) -> None:
        """Become what `arrays` returned; without any, or of a version with another sample, what a run begins with."""
        self._epoch = int(arrays["epoch"][0]) if "epoch" in arrays else 0
        self._seen = seen_in(self._sample, self._sample.ours(arrays), "activation").get("")
