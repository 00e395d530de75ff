"""Models that answer single requests: activations of a party's rows by key, and the fuse model on gathered ones."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.model import Model
from sl_queue.compute.running import aggregated, blame, predicted
from sl_queue.compute.seeds import generator_states
from sl_queue.compute.spec import LayersSpec
from sl_queue.cut.crossing import FuseCut
from sl_queue.cut.guard import place
from sl_queue.cut.rows import CutRows
from sl_queue.cut.tensors import Inputs, take_rows
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.serving import Deal

Keys = npt.NDArray[np.uint64]
Features = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Positions of a table's rows by the keyed hashes of their ids."""

    keys: Keys = field(repr=False)  # ascending
    positions: npt.NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, keys: Keys) -> "RowIndex":
        """Index the rows of a table, by their keys in its order."""
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], order)

    def look_up(self, keys: Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Return which keys are here, and the positions of those."""
        if not len(self.keys):
            return np.zeros(len(keys), np.bool_), np.zeros(0, np.int64)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        found = self.keys[at] == keys
        return found, self.positions[at[found]]


class _Evaluated:
    """A model that is in evaluation mode for good. Mutable: it finds out whether the model draws at random there.

    Most draw nothing, and are spared the keyed generators, which cost as much as a small model.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._quiet, self._kept = model, False, ExitStack()
        self._kept.enter_context(model.averaged())
        model.module.eval()

    def run(self, inputs: Callable[[], Inputs], rows: int, where: str) -> Tensor:
        """Return the model's output for so many rows."""
        model = self._model
        with torch.inference_mode():
            if self._quiet:
                return model.run_on(inputs(), rows, where)
            with model.drawing("serve", MicroBatch(0, 0)):
                before = generator_states(model.device)
                output = model.run_on(inputs(), rows, where)
                self._quiet = generator_states(model.device) == before
                return output


class AnsweringBase:
    """A party's base model in evaluation mode, on rows that are asked for by key."""

    def __init__(self, stage: TorchBaseStage, index: RowIndex) -> None:
        self._stage, self._index, self._evaluated = stage, index, _Evaluated(stage.model)

    @property
    def columns(self) -> int:
        """Count the columns of the model's input; 0 if it is no table."""
        return n_columns(self._stage.features)

    def answer(
        self, number: MicroBatch, keys: Keys, deal: Deal | None = None
    ) -> tuple[npt.NDArray[np.bool_], Payload | None]:
        """Return which rows are here, and their activation as it leaves the cut; None for none."""
        found, activation, rows = self._run(number, keys, deal)
        return found, None if activation is None else self._stage.cut.leave(activation, number, rows)

    def in_place(
        self, number: MicroBatch, keys: Keys, deal: Deal | None = None
    ) -> tuple[npt.NDArray[np.bool_], list[Tensor] | None]:
        """Do as `answer`, for a fuse model in the same process: each output."""
        found, activation, rows = self._run(number, keys, deal)
        if activation is None:
            return found, None
        self._stage.cut.check(activation, number, rows)
        outputs = self._stage.model.outputs
        return found, [activation] if outputs is None else outputs.split(activation)

    def _run(
        self, number: MicroBatch, keys: Keys, deal: Deal | None
    ) -> tuple[npt.NDArray[np.bool_], Tensor | None, CutRows]:
        found, positions = self._index.look_up(keys)
        rows = rows_of(keys[found])
        if not len(positions):
            return found, None, rows
        where = place(self._stage.model.party, number)
        return found, self._evaluated.run(lambda: self._inputs(positions, deal), len(positions), where), rows

    def _inputs(self, positions: npt.NDArray[np.int64], deal: Deal | None) -> Inputs:
        stage = self._stage
        if deal is None:
            return stage.inputs(positions)
        order = np.random.default_rng([stage.model.seed % 2**63, deal.order]).permutation(len(stage.features))
        dealt = stage.features[order[positions]]
        if deal.column is not None:
            dealt = with_column(stage.features[positions], dealt, deal.column)
        return take_rows(dealt, np.arange(len(dealt)), stage.model.dtype, stage.model.device)


class AnsweringFuse:
    """The fuse model in evaluation mode, on activations of rows that all parties have found."""

    def __init__(self, model: Model, cuts: Mapping[str, FuseCut], layers: LayersSpec) -> None:
        self._model, self._cuts, self._layers, self._evaluated = model, cuts, layers, _Evaluated(model)

    def arrive(self, party: str, number: MicroBatch, keys: Keys, activation: Payload) -> list[Tensor]:
        """Return the outputs of a party for these rows. Raises RemoteProtocolError."""
        return self._cuts[party].arrive_each(activation, number, rows_of(keys))[0]

    def fuse(self, number: MicroBatch, inputs: Mapping[str, list[Tensor]]) -> npt.NDArray[np.generic]:
        """Return the outputs for rows of which all inputs are here, in the same order, shape (rows, *outputs)."""
        where = place(self._model.party, number)

        def joined() -> Any:
            with blame(f"{where}: aggregation {self._layers.aggregation!r} failed"):
                return aggregated(inputs, self._layers)

        rows = len(next(iter(inputs.values()))[0])
        found: npt.NDArray[np.generic] = predicted(self._evaluated.run(joined, rows, where)).numpy()
        return found


def n_columns(features: Features) -> int:
    """Count the columns of features, of which an input that is a dict or a list has a field each; 0 for no table."""
    if features.dtype.names:
        return len(features.dtype.names)
    return features.shape[1] if features.ndim == 2 else 0


def with_column(features: Features, others: Features, place: int) -> Features:
    """Return a copy of features with one column of other rows."""
    found = features.copy()
    if features.dtype.names:
        found[features.dtype.names[place]] = others[features.dtype.names[place]]
    else:
        found[:, place] = others[:, place]
    return found


def outputs_of_rows(stage: TorchBaseStage, positions: npt.NDArray[np.int64], size: int = 4096) -> list[Tensor]:
    """Return a base model's outputs for rows of its table, in evaluation mode, computed in parts of that size."""
    parts: list[list[Tensor]] = []
    model = stage.model
    for first in range(0, len(positions), size):
        with model.evaluating(), model.drawing("explain", MicroBatch(0, 0)):
            activation = model.run(stage.inputs(positions[first : first + size]), f"party {model.party!r}")
        parts.append([activation] if model.outputs is None else model.outputs.split(activation))
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def fused_outputs(model: Model, layers: LayersSpec, inputs: Mapping[str, list[Tensor]]) -> npt.NDArray[np.generic]:
    """Return the fuse model's outputs for all rows at once, in evaluation mode, shape (rows, *outputs)."""
    with model.evaluating(), model.drawing("explain", MicroBatch(0, 0)):
        output = model.run(aggregated(inputs, layers), f"party {model.party!r}")
    found: npt.NDArray[np.generic] = predicted(output).numpy()
    return found


def rows_of(keys: Keys) -> CutRows:
    """Return rows as both sides of the cut know them in a single request."""
    return CutRows.of(keys, np.arange(len(keys)), held_out=True)
