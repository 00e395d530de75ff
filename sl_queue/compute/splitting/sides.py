"""Sides of a whole module: the steps of each party's base model, what crosses, and what is left for the fuse."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor
from torch.fx import Node

from sl_queue.compute.splitting.owners import Owners, is_size
from sl_queue.compute.splitting.tracing import Traced, layer_name
from sl_queue.cut.crossing import CROSSING_DTYPES
from sl_queue.errors import JobError
from sl_queue.protocol.text import counted

FUSE: Final = ""  # the side of the fuse model, beside those of the parties by name


@dataclass(frozen=True, slots=True)
class Sides:
    """Side of each node that belongs to one, and the values that cross, by party."""

    of: Mapping[Node, str]
    crossing: Mapping[str, Sequence[Node]]  # in the order in which they are computed


def sides_of(traced: Traced, owners: Owners, parties: Sequence[str], cuts: Mapping[str, str]) -> Sides:
    """Divide the graph; `cuts` are the last layers of bases, of parties that have one. Raises JobError."""
    later = {party: _after(_call_of(traced, layer)) for party, layer in cuts.items()}
    sides: dict[Node, str] = {}
    for node in traced.nodes:
        owner = owners.of(node)
        if not owners.parties[node]:
            continue
        if owner is not None and node not in later.get(owner, ()):
            sides[node] = owner
        elif node not in owners.raw:
            _require_computed(node, owners)
            sides[node] = FUSE
    crossing: dict[str, list[Node]] = {party: [] for party in parties}
    for node, side in sides.items():
        fused = [user for user in node.users if user.op == "output" or sides.get(user) == FUSE]
        if side != FUSE and fused and not is_size(node, traced):
            _require_fit(node, fused[0], side, traced, owners)
            crossing[side].append(node)
    for party in parties:
        if not crossing[party]:
            raise JobError(f"no layer works on the columns of {party!r} alone, so it has no base model")
    return Sides(sides, crossing)


def cut_of(traced: Traced, owners: Owners, layer: str) -> str:
    """Return the party whose base model a layer ends. Raises JobError for a layer that mixes parties."""
    node = _call_of(traced, layer)
    found = sorted(owners.parties[node])
    if len(found) == 1:
        return found[0]
    if not found:
        raise JobError(f"{layer!r} comes of no party's columns, so nothing can be cut there")
    last = {party: _last_layer(traced, owners, party) for party in found}
    told = ", ".join(f"{name!r} of {party}" for party, name in last.items() if name is not None)
    raise JobError(
        f"{layer!r} mixes columns of {' and '.join(found)}; a cut must lie before the parties meet"
        + (f": the last layers that are one party's alone are {told}" if told else "")
    )


def _call_of(traced: Traced, layer: str) -> Node:
    found = [node for node in traced.nodes if node.op == "call_module" and node.target == layer]
    if len(found) != 1:
        told = "is never called" if not found else f"is called {len(found)} times"
        raise JobError(f"{layer!r} {told} in the module's forward, so it is no place to cut")
    return found[0]


def _last_layer(traced: Traced, owners: Owners, party: str) -> str | None:
    layers = [node for node in traced.nodes if node.op == "call_module" and owners.of(node) == party]
    return str(layers[-1].target) if layers else None


def _after(node: Node) -> set[Node]:
    """Return everything that is computed of a node."""
    found: set[Node] = set()
    left = list(node.users)
    while left:
        user = left.pop()
        if user not in found:
            found.add(user)
            left += user.users
    return found


def _require_computed(node: Node, owners: Owners) -> None:
    """Raise JobError for a step of the fuse model that reads columns of several parties as they are."""
    for each in node.all_input_nodes:
        if each in owners.raw and len(owners.parties[each]) > 1:
            mixed = " and ".join(sorted(owners.parties[each]))
            raise JobError(
                f"{layer_name(node)} takes columns of {mixed} at once, as they are: they would have to leave their "
                "party; give each party a layer of its own before it"
            )


def _require_fit(node: Node, user: Node, party: str, traced: Traced, owners: Owners) -> None:
    """Raise JobError for a value that cannot cross."""
    told = layer_name(user) if user.op != "output" else "the module's output"
    if node in owners.raw:
        raise JobError(
            f"{told} takes columns of {party!r} as they are, beside what others have computed: they would leave their "
            "party; give the party a layer of its own before it"
        )
    value, rows = traced.values[node], _rows(traced)
    if not isinstance(value, Tensor):
        raise JobError(f"{layer_name(node)} gives a {type(value).__name__} to {told}; tensors cross a cut")
    if value.dtype not in CROSSING_DTYPES or value.dim() == 0 or len(value) != rows:
        shape = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        raise JobError(
            f"{layer_name(node)} gives {shape} for {counted(rows, 'row', 'rows')} to {told}; what crosses a cut is "
            "floating, a row each"
        )


def _rows(traced: Traced) -> int:
    return next(len(tensor) for tensor in _inputs(traced))


def _inputs(traced: Traced) -> Iterator[Tensor]:
    for node in traced.nodes:
        if node.op == "placeholder":
            value = traced.values[node]
            each = value.values() if isinstance(value, Mapping) else [value] if isinstance(value, Tensor) else value
            yield from each
