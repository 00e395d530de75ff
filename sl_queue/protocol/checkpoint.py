"""Values that a party keeps on disk: the state of its stage, checkpoints, and the final weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sl_queue.protocol.messages import Payload

SAVABLE = (  # dtypes of tensors that Checkpoints can keep, and a file in `final/` can hold
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "complex64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)

Weights = Mapping[str, Mapping[str, Payload]]


@dataclass(frozen=True, slots=True)
class State:
    """Everything a stage needs to go on: tensors by name, and JSON values that JSON gives back exactly."""

    tensors: Mapping[str, Payload] = field(repr=False)
    values: Mapping[str, Any]

    @classmethod
    def merged(cls, states: Iterable["State"]) -> "State":
        """Return states of several things, whose names differ, as one."""
        states = list(states)
        tensors = {name: tensor for state in states for name, tensor in state.tensors.items()}
        return cls(tensors, {name: value for state in states for name, value in state.values.items()})


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint as read from disk."""

    run: str
    generation: int
    step: int
    state: State
    values: Mapping[str, Any]  # what the role added: the label holder's newest epoch


@dataclass(frozen=True, slots=True)
class Final:
    """The results that a finished party left in `final/`."""

    run: str
    step: int
    incarnation: str  # of the worker that finished
    digests: Mapping[str, str]  # SHA-256 by file name, hexadecimal
    reported: bool  # the broker has the report that says so
