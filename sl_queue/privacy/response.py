"""Randomised response: every label is replaced, once and for all, so that nobody can be sure of any of them.

With `epsilon` a label stays with the chance e^epsilon / (e^epsilon + classes - 1), else it becomes another class, each
with the same chance. All that is made of the responses afterwards (gradients, weights, metrics, predictions) is
epsilon-differentially private in each label, whatever is added up. The draw is keyed by the row and by `epsilon` and
`classes` too: two responses of different epsilon must be independent, or the pair of them would give labels away.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sl_queue.privacy.draws import Floats, Words, key_for, row_words, uniform

TOO_FEW = 0.1  # share of right ones among the rows that say positive below which hardly anything can be learnt
ENOUGH = 0.4  # the share that an epsilon is recommended for

Labels = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Response:
    """The mechanism: `epsilon`, and the values that a label can have, in ascending order. These count as known."""

    epsilon: float
    classes: tuple[float, ...]

    @property
    def keep(self) -> float:
        """The chance that a label stays what it is."""
        return 1 / (1 + (len(self.classes) - 1) * math.exp(-self.epsilon))

    @property
    def swap(self) -> float:
        """The chance that a label becomes one particular other class."""
        return 1 / (math.exp(self.epsilon) + len(self.classes) - 1)


def classes_of(labels: Labels) -> tuple[float, ...] | None:
    """Return the values of labels, ascending; None unless there is one class a row, as whole numbers."""
    if labels.ndim != 1 and labels.size != len(labels):
        return None
    values = np.unique(labels)
    whole = labels.dtype.kind in "iub" or bool((labels == np.floor(labels)).all())
    return tuple(float(value) for value in values) if whole and 2 <= len(values) <= max(2, len(labels) // 2) else None


def respond(labels: Labels, response: Response, tokens: Words, secret: bytes, party: str) -> Labels:
    """Return the labels as they are used from now on, in their own dtype and shape."""
    classes = np.array(response.classes)
    key = key_for(secret, party, f"response {response.epsilon!r} {response.classes!r}")
    draw = uniform(row_words(tokens, key))
    index = np.searchsorted(classes, labels.reshape(-1).astype(np.float64))
    shift = np.ceil((draw - response.keep) / response.swap).astype(np.int64)  # below or at 0: it stays
    moved = (index + np.clip(shift, 0, len(classes) - 1)) % len(classes)
    return classes[moved].astype(labels.dtype).reshape(labels.shape)


def undone(probabilities: Floats, response: Response) -> Floats:
    """Return the probabilities of true classes from those of responses, shape (rows,) of two classes, or (rows, k).

    The loss is left as it is: trained on responses, a model gives probabilities of responses.
    """
    found = (probabilities - response.swap) / (response.keep - response.swap)
    clipped: Floats = np.clip(found, 0.0, 1.0)
    if clipped.ndim == 1:
        return clipped
    total = clipped.sum(axis=1, keepdims=True)
    result: Floats = np.where(total > 0, clipped / np.where(total > 0, total, 1.0), 1.0 / clipped.shape[1])
    return result


@dataclass(frozen=True, slots=True)
class Rare:
    """The rarest class under a response."""

    share: float  # of all labels, in truth
    says: float  # of all labels, after the response
    right: float  # of those that say so

    @property
    def hopeless(self) -> bool:
        """True if so few of the rows that say positive are, that hardly anything can be learnt."""
        return self.right < TOO_FEW

    @property
    def doubtful(self) -> bool:
        """True if most of the rows that say positive are not."""
        return self.right < ENOUGH


def rarest(labels: Labels, response: Response) -> Rare:
    """Return what becomes of the rarest class."""
    _, counts = np.unique(labels, return_counts=True)
    share = float(counts.min() / counts.sum())
    says = share * response.keep + (1 - share) * response.swap
    return Rare(share, says, share * response.keep / says)


def epsilon_for(share: float, classes: int, right: float = ENOUGH) -> float:
    """Return the smallest epsilon, rounded up to a tenth, with which so many of the rows that say a class are right."""
    needed = math.log(right / (1 - right) * (1 - share) / share)
    return math.ceil(10 * max(needed, 0.0) - 1e-9) / 10 if classes else 0.0
