"""A model without torch whose weights are a hash of everything that happened to them, in order.

One activation applied twice, left out, taken from other weights or out of order changes every later byte, so equal
final weights prove that a run was exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from sl_queue.protocol.checkpoint import Final, Saved, State, Weights
from sl_queue.protocol.messages import MicroBatch, Payload


def digest(*parts: object) -> bytes:
    hashed = sha256()
    for part in parts:
        hashed.update(part if isinstance(part, bytes) else repr(part).encode())
        hashed.update(b"|")
    return hashed.digest()


def payload(*parts: object) -> Payload:
    return Payload("int8", (32,), digest(*parts))


@dataclass(slots=True)
class ToyStage:
    """Both kinds of stage: what goes in is hashed into `gradients`, an update hashes those into `weights`."""

    party: str
    weights_: bytes = b""
    gradients: bytes = b""
    evaluated: bytes = b""
    prepared: MicroBatch | None = None
    in_flight: list[MicroBatch] = field(default_factory=list)
    applied: list[tuple[str, MicroBatch]] = field(default_factory=list)  # a log, not a part of the state

    def prepare(self, micro_batch: MicroBatch) -> None:
        self.prepared = micro_batch

    def forward(self, micro_batch: MicroBatch) -> Payload:
        assert self.prepared in (None, micro_batch), "what was prepared comes next"
        self.in_flight.append(micro_batch)
        self.applied.append(("forward", micro_batch))
        return payload(self.party, self.weights_, micro_batch)

    def backward(self, micro_batch: MicroBatch, gradient: Payload) -> None:
        assert self.in_flight.pop(0) == micro_batch
        self.gradients = digest(self.gradients, bytes(gradient.data), micro_batch)

    def predict(self, micro_batch: MicroBatch) -> Payload:
        return payload(self.party, self.weights_, "holdout", micro_batch)

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        assert self.prepared == micro_batch, "while it waited"
        self.applied.append(("fuse", micro_batch))
        joined = digest(self.weights_, *(p + bytes(a.data).hex() for p, a in sorted(activations.items())))
        self.gradients = digest(self.gradients, joined, micro_batch)
        return {party: payload("gradient", joined, party) for party in activations}

    def late_gradients(self) -> tuple[tuple[MicroBatch, Mapping[str, Payload]], ...]:
        return ()

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        self.evaluated = digest(self.evaluated, *(bytes(a.data) for _, a in sorted(activations.items())))

    def metrics(self) -> Mapping[str, float | None]:
        value, self.evaluated = int.from_bytes(self.evaluated[:4], "big") / 2**32, b""
        return {"loss": value}

    def training_metrics(self) -> Mapping[str, float | None] | None:
        return None

    def evaluation_tables(self) -> Mapping[str, list[list[float]]] | None:
        return None

    def update(self) -> float:
        self.weights_, self.gradients = digest(self.weights_, self.gradients), b""
        return int.from_bytes(self.weights_[:4], "big") / 2**32

    def state(self) -> State:
        assert not self.in_flight, "a checkpoint has nothing in flight"
        return State({}, {"weights": self.weights_.hex()})

    def load(self, state: State) -> None:
        self.weights_, self.gradients, self.evaluated = bytes.fromhex(state.values["weights"]), b"", b""
        self.in_flight.clear()
        self.prepared = None

    def weights(self) -> Weights:
        return {"base": {"weights": Payload("int8", (len(self.weights_),), self.weights_)}}


@dataclass(slots=True)
class MemoryCheckpoints:
    """ports.Checkpoints that survives a worker's crash, but not the test."""

    saved: dict[int, Saved] = field(default_factory=dict)
    kept: int | None = None
    final: Final | None = None
    final_weights: Weights | None = None

    def save(self, step: int, state: State, *, run: str, generation: int, values: Mapping[str, object]) -> None:
        self.saved[step] = Saved(run, generation, step, state, dict(values))
        for old in sorted(self.saved)[:-3]:
            if old != self.kept:
                del self.saved[old]

    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self.saved))

    def load(self, step: int) -> Saved:
        return self.saved[step]

    def newest(self) -> Saved | None:
        return self.saved[max(self.saved)] if self.saved else None

    def keep(self, step: int | None) -> None:
        self.kept = step

    def discard_after(self, step: int) -> None:
        for later in [s for s in self.saved if s > step]:
            del self.saved[later]

    def write_final(self, weights: Weights, *, run: str, step: int, incarnation: str) -> None:
        self.final_weights = weights
        self.final = Final(run, step, incarnation, {}, reported=False)

    def finished(self) -> Final | None:
        return self.final

    def mark_reported(self) -> None:
        assert self.final is not None
        self.final = replace(self.final, reported=True)
