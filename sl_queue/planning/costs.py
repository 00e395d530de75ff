"""Costs that decide a run's speed, apart from its pipeline: seconds by rows and bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sl_queue.protocol.schedule.actions import Work

COLD_S = 0.005  # a worker that has waited so long is as cold as it becomes
LABEL = ""  # the label holder's name in here: no party can be called so


@dataclass(frozen=True, slots=True)
class Affine:
    """A cost with a fixed part and one for each row or byte, in seconds."""

    fixed: float = 0.0
    each: float = 0.0

    def __call__(self, count: float) -> float:
        return self.fixed + self.each * count

    def __add__(self, other: "Affine") -> "Affine":
        return Affine(self.fixed + other.fixed, self.each + other.each)

    def of(self, count: "Affine") -> "Affine":
        """Return this cost where the count follows from another one."""
        return Affine(self(count.fixed), self.each * count.each)

    @classmethod
    def through(cls, one: tuple[float, float], other: tuple[float, float]) -> "Affine":
        """Return the line through two measured (count, seconds), never falling and never below zero."""
        (few, little), (many, much) = sorted((one, other))
        each = max(0.0, (much - little) / (many - few)) if many > few else 0.0
        return cls(max(0.0, little - each * few), each)


@dataclass(frozen=True, slots=True)
class Way:
    """A party's link to the broker, the same in both directions."""

    rtt_s: float = 0.0
    bytes_per_s: float | None = None  # None: no limit


@dataclass(frozen=True, slots=True)
class FeatureCosts:
    """Costs of a feature party's micro-batch by its rows, and sizes of its messages."""

    forward: Affine
    backward: Affine
    update_s: float
    activation_bytes: Affine  # by rows
    gradient_bytes: Affine
    prepare: Affine = Affine()  # for the next forward, when the activation is on its way


@dataclass(frozen=True, slots=True)
class Costs:
    """All that a run's speed depends on, apart from its pipeline."""

    features: Mapping[str, FeatureCosts]
    fuse: Affine  # of one micro-batch with all parties' activations, by rows
    fuse_update_s: float
    commit_s: float  # beside what comes next, until the next message is received
    fuse_prepare: Affine  # before it waits for activations, by rows
    handling: Affine  # of one message by the broker, by bytes
    driver: Affine = Affine()  # of one message by the driver of a worker, at either end
    overhead: Affine = Affine()  # CPU time of a message on shared cores while nobody waits for it, by bytes
    cold_factor: float = 1.0  # slowdown of a worker with cold caches
    contention: float = 1.0  # slowdown beside one other that computes on shared cores; more with each further one
    way: Way = Way()
    ways: Mapping[str, Way] = field(default_factory=dict)  # of feature parties whose link is another
    cores: int | None = None  # that all parties and the broker share; None: enough for each

    def way_of(self, party: str) -> Way:
        """Return the link of a feature party."""
        return self.ways.get(party, self.way)

    def work_of(self, worker: str) -> Mapping[Work, Affine]:
        """Return the seconds by the rows of an action of a feature party, or of LABEL.

        A forward in evaluation mode counts as one in training, an evaluation as a step without its update.
        """
        if worker == LABEL:
            update = Affine(self.fuse_update_s)
            return {"prepare": self.fuse_prepare, "fuse": self.fuse, "score": self.fuse, "update": update}
        each = self.features[worker]
        return {
            "prepare": each.prepare,
            "forward": each.forward,
            "backward": each.backward,
            "predict": each.forward,
            "update": Affine(each.update_s),
        }
