"""Owners of the values of a whole module: a party, as long as a value comes of that party's columns alone.

Operations that only move numbers (indexing, splitting, reshaping) are followed column by column, so that a module that
takes one table and picks its columns itself is split as well as one that takes an argument for each party.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sl_queue.compute.splitting.tracing import Traced, layer_name
from sl_queue.errors import JobError

Column = str | int  # an argument's name, a key of a dict, a place in a list, or in axis 1 of the one table
_MOVING_FUNCTIONS: Final = (
    operator.getitem,
    torch.narrow,
    torch.select,
    torch.split,
    torch.chunk,
    torch.tensor_split,
    torch.unbind,
    torch.index_select,
    torch.squeeze,
    torch.unsqueeze,
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
)
_MOVING_METHODS: Final = frozenset(
    {"narrow", "select", "split", "chunk", "tensor_split", "unbind", "index_select", "squeeze", "unsqueeze"}
    | {"flatten", "reshape", "view", "permute", "transpose", "contiguous"}
)


@dataclass(frozen=True, slots=True)
class Owners:
    """Parties by node, and which nodes are columns as they are."""

    parties: Mapping[Node, frozenset[str]]  # whose columns a value comes of; none: of nobody's
    places: Mapping[Node, Any] = field(repr=False)  # of moved numbers of the one table: of a row, per tensor; or tuples
    raw: frozenset[Node]  # columns as they are, moved or not

    def of(self, node: Node) -> str | None:
        """Return the one party that a value is of; None of several, and of none."""
        found = self.parties[node]
        return next(iter(found)) if len(found) == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The one table that a module takes, whose columns are split."""

    node: Node
    sample: Tensor = field(repr=False)  # (rows, columns, *anything)

    @property
    def width(self) -> int:
        """Numbers of one row."""
        return self.sample[0].numel()

    def places(self) -> Tensor:
        """Return for each number where it stands: row * width + place in the row."""
        return torch.arange(self.sample.numel()).reshape(self.sample.shape)

    def columns_of(self, places: Iterable[int]) -> set[int]:
        """Return the columns that places of a row are in."""
        each = self.width // self.sample.shape[1]
        return {place // each for place in places}


def table_of(traced: Traced) -> Table | None:
    """Return the one table that a module takes; None where it takes several arrays."""
    inputs = [node for node in traced.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(traced.values[inputs[0]], Tensor):
        return None
    return Table(inputs[0], traced.values[inputs[0]])


def owners_of(traced: Traced, owner: Mapping[Column, str]) -> Owners:
    """Follow every column through the graph. Raises JobError for a column that is nobody's."""
    table = table_of(traced)
    parties: dict[Node, frozenset[str]] = {}
    places: dict[Node, Any] = {}
    raw: set[Node] = set()
    for node in traced.nodes:
        if node.op == "placeholder":
            parties[node] = _of_argument(node, traced, owner, table)
            raw.add(node)
            if table is not None and str(node.target) not in owner:
                places[node] = table.places()
            continue
        before = [each for each in node.all_input_nodes if parties[each]]
        moved = _moved(node, traced, places, table)
        if moved is not None and table is not None:
            places[node], raw_parties = moved, frozenset(_party(c, owner) for c in _columns(moved, table))
            parties[node] = raw_parties
            raw.add(node)
        elif node.target is operator.getitem and _is_bundle(node.args[0], traced):
            parties[node] = frozenset({_party(node.args[1], owner)})
            raw.add(node)
        elif is_size(node, traced):
            parties[node] = frozenset()
        else:
            parties[node] = frozenset().union(*(parties[each] for each in before))
            if before and all(each in raw for each in before) and _moves(node):
                raw.add(node)
    return Owners(parties, places, frozenset(raw))


def _of_argument(node: Node, traced: Traced, owner: Mapping[Column, str], table: Table | None) -> frozenset[str]:
    name = str(node.target)
    if name in owner:
        return frozenset({owner[name]})
    if table is not None:
        return frozenset(_party(column, owner) for column in range(table.sample.shape[1]))
    value = traced.values[node]
    if isinstance(value, Tensor):
        raise JobError(f"the argument {name!r} is in no party's columns")
    keys: Sequence[Column] = list(value) if isinstance(value, Mapping) else list(range(len(value)))
    return frozenset(_party(key, owner) for key in keys)


def _party(column: Any, owner: Mapping[Column, str]) -> str:
    if not isinstance(column, str | int) or column not in owner:
        raise JobError(f"column {column!r} is no party's")
    return owner[column]


def _is_bundle(value: Any, traced: Traced) -> bool:
    """Tell whether a node is the one dict or list of arrays that the module takes."""
    if not isinstance(value, Node) or value.op != "placeholder":
        return False
    return isinstance(traced.values[value], Mapping | list | tuple)


def is_size(node: Node, traced: Traced) -> bool:
    """Tell whether a node is a number or a shape rather than a tensor."""
    value = traced.values[node]
    each = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(item, int | float | bool | str | torch.dtype | torch.device | None) for item in each)


def _moves(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _MOVING_METHODS
    return node.op == "call_function" and node.target in _MOVING_FUNCTIONS


def _moved(node: Node, traced: Traced, places: Mapping[Node, Any], table: Table | None) -> Any:
    """Return where the numbers of a node stand in the table; None if it does more than move them."""
    if table is None or not _moves(node) or not node.args or node.args[0] not in places:
        return None
    first, *others = node.args
    assert isinstance(first, Node)
    if not all(is_size(each, traced) for each in node.all_input_nodes if each is not first):
        return None
    rest, named = map_arg((tuple(others), dict(node.kwargs)), lambda each: traced.values[each])
    if node.op == "call_method":
        return getattr(places[first], str(node.target))(*rest, **named)
    assert callable(node.target)
    return node.target(places[first], *rest, **named)


def _columns(places: Any, table: Table) -> set[int]:
    found: set[int] = set()
    for tensor in _tensors(places):
        found |= table.columns_of(np.unique((tensor % table.width).numpy()).tolist())
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def of_one_row(places: Tensor, width: int, node: Node) -> Tensor:
    """Return the places within a row, shape (*of one row). Raises JobError if rows are mixed or moved from axis 0."""
    rows = torch.arange(len(places)).reshape(-1, *[1] * (places.dim() - 1))
    if not torch.equal(places // width, rows.expand_as(places)):
        raise JobError(f"{layer_name(node)} does not keep the rows in axis 0")
    return places[0] % width
