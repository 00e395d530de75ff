"""Vocabulary of all training loops: the actions of a party, one after the other, and what each does to others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from sl_queue.protocol.messages import Kind, MicroBatch


@dataclass(frozen=True, slots=True)
class Begin:
    """Wait until the scheduler has opened the epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """Look up what the next forward or fuse needs and no peer decides, while messages travel. No effect."""

    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Forward:
    """Feature party: compute and send an activation."""

    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Backward:
    """Feature party: await and apply a gradient."""

    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Fuse:
    """Label holder: await all activations, compute the loss, send all gradients."""

    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Update:
    """Apply the gradients: one optimizer step."""

    step: int


@dataclass(frozen=True, slots=True)
class Predict:
    """Feature party: forward held-out rows with the weights after the epoch's last step, and send the activation.

    `micro_batch` has that step, and counts the held-out micro-batches.
    """

    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Score:
    """Label holder: await all held-out activations of a micro-batch, and add it to the evaluation."""

    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Commit:
    """Confirm, save, acknowledge: nothing is in flight."""

    step: int


FeatureAction = Begin | Prepare | Forward | Backward | Update | Predict | Commit
LabelAction = Begin | Prepare | Fuse | Update | Score | Commit
Action = FeatureAction | LabelAction

Work = Literal["prepare", "forward", "backward", "fuse", "update", "predict", "score", "commit"]


@dataclass(frozen=True, slots=True)
class Effect:
    """Messages and work of an action, in this order: it awaits one message of each peer, works, sends one to each.

    A message has the key of the action's micro-batch. The work of a commit overlaps the actions that follow it, up to
    the first that awaits a message.
    """

    work: Work | None = None
    sends: Kind | None = None
    awaits: Kind | None = None


EFFECTS: Final[Mapping[type[Action], Effect]] = MappingProxyType(
    {
        Begin: Effect(),
        Prepare: Effect("prepare"),
        Forward: Effect("forward", sends=Kind.ACTIVATION),
        Backward: Effect("backward", awaits=Kind.GRADIENT),
        Fuse: Effect("fuse", sends=Kind.GRADIENT, awaits=Kind.ACTIVATION),
        Update: Effect("update"),
        Predict: Effect("predict", sends=Kind.HOLDOUT),
        Score: Effect("score", awaits=Kind.HOLDOUT),
        Commit: Effect("commit"),
    }
)


def notation(actions: Iterable[Action]) -> str:
    """Write actions as `F0.0 B0.0 U0`: X is fuse, P predict, S score, C commit; the beginning of an epoch is a bar.

    What is prepared is left out: it changes no order.
    """
    return " ".join(_word(action) for action in actions if not isinstance(action, Prepare))


def _word(action: Action) -> str:
    match action:
        case Begin(epoch):
            return f"|{epoch}"
        case Fuse(micro_batch):
            return f"X{micro_batch}"
        case Update(step) | Commit(step):
            return f"{type(action).__name__[0]}{step}"
        case _:
            return f"{type(action).__name__[0]}{action.micro_batch}"
