"""A whole module split where the user says: base models by party, a fuse model, and a proof that nothing changes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sl_queue.compute.modules.handover import copied
from sl_queue.compute.running import blame, called
from sl_queue.compute.splitting.assembly import Assembly
from sl_queue.compute.splitting.owners import Column, Owners, owners_of, table_of
from sl_queue.compute.splitting.proof import require_equal
from sl_queue.compute.splitting.sides import cut_of, sides_of
from sl_queue.compute.splitting.tracing import PATH, Traced, around, evaluating, trace
from sl_queue.errors import ComputeError, JobError

EVERYTHING = "*"  # all columns, of the only party


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A module split: base models by party, the fuse model, and whose columns are whose."""

    bases: dict[str, nn.Module]
    fuse: nn.Module
    columns: dict[str, tuple[Column, ...]]
    cuts: dict[str, dict[str, tuple[int, ...]]]  # shapes of one row of what crosses, by party and by name
    whole: nn.Module = field(repr=False)  # as it was given

    def inputs(self, rows: Any) -> dict[str, Any]:
        """Return each party's share of the whole's input, as its base model takes it."""
        return {party: _share(rows, self.columns[party]) for party in self.bases}

    def joined(self, bases: Mapping[str, nn.Module], fuse: nn.Module) -> nn.Module:
        """Return a copy of the whole with the weights of trained parts."""
        whole = copied(self.whole)
        found = {name: tensor for part in (*bases.values(), fuse) for name, tensor in part.state_dict().items()}
        whole.load_state_dict({**whole.state_dict(), **found})
        return whole


def split(
    module: nn.Module,
    parties: Mapping[str, Any],
    cut: str | Mapping[str, str] | None = None,
    *,
    rows: Any,
) -> Split:
    """Split a module into a base model for each party and a fuse model; the module itself stays as it is.

    `parties` says what each one holds: names of arguments of `forward`, keys of its one dict, places in its one list or
    in axis 1 of its one tensor (numbers, ranges); or names of layers, which stand for all columns that reach them; or
    "*", of the only party.
    `cut` names the last layer of a base model, or one for each of several parties; a party without one keeps all that
    is computed of its columns alone. `rows` are a few rows as the module takes them, at least two, on which split and
    whole are compared bit for bit in outputs and gradients. Raises JobError, which names the layer that cannot be cut.
    """
    whole = running(module, rows)
    traced, owner, cuts = _looked_into(whole, rows, parties, cut)
    owners = owners_of(traced, owner)
    found = divided(traced, owners, owner, list(parties), _by_party(traced, owners, cuts))
    require_equal(whole, found.bases, found.fuse, rows, found.inputs(rows))
    return found


def running(module: nn.Module, rows: Any) -> nn.Module:
    """Return a copy of a module that runs on these rows. Raises JobError if it fails."""
    whole = copied(module)
    try:
        with evaluating(whole), blame("the module fails on these rows"):
            called(whole, rows)
    except ComputeError as error:
        raise JobError(str(error)) from error
    return whole


def divided(
    traced: Traced, owners: Owners, owner: Mapping[Column, str], parties: Sequence[str], cuts: Mapping[str, str]
) -> Split:
    """Make the parts of a traced module, whose `cuts` stand by party. Raises JobError for what cannot be cut."""
    sides = sides_of(traced, owners, parties, cuts)
    columns = {party: tuple(c for c, p in owner.items() if p == party) for party in parties}
    assembly = Assembly(traced, owners, sides, columns)
    bases: dict[str, nn.Module] = {party: assembly.base(party) for party in parties}
    shapes = {p: {n.name: tuple(traced.values[n].shape[1:]) or (1,) for n in sides.crossing[p]} for p in parties}
    return Split(bases, assembly.fuse(), columns, shapes, traced.module)


def _looked_into(
    whole: nn.Module, rows: Any, parties: Mapping[str, Any], cut: str | Mapping[str, str] | None
) -> tuple[Traced, dict[Column, str], list[str]]:
    """Trace as deep as is needed: into what contains a cut or a party's layer, and into what mixes parties."""
    layers = {name for name, _ in whole.named_modules() if name}
    cuts = [cut] if isinstance(cut, str) else list((cut or {}).values())
    for name in cuts:
        if name not in layers:
            raise JobError(f"the module has no layer {name!r}; {_told(layers)}")
    held = _held(parties)
    opened = around(
        [*cuts, *(name for names in held.values() for name in names if isinstance(name, str) and name in layers)]
    )
    while True:
        traced = trace(whole, rows, opened)
        owner = _owner(traced, held, layers)
        owners = owners_of(traced, owner)
        deeper = {
            str(node.target)
            for node in traced.nodes
            if node.op == "call_module"
            and len(owners.parties[node]) > 1
            and node.target not in cuts
            and is_composed(whole.get_submodule(str(node.target)))
            and any(each in owners.raw for each in node.all_input_nodes)
        }
        if not deeper:
            return traced, owner, cuts
        opened |= deeper


def is_composed(layer: nn.Module) -> bool:
    """Tell whether a layer is one of the user's, or a sequence, made of others."""
    return isinstance(layer, nn.Sequential) or not type(layer).__module__.startswith("torch.nn")


def _by_party(traced: Traced, owners: Owners, cuts: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for layer in cuts:
        party = cut_of(traced, owners, layer)
        if party in found:
            raise JobError(f"{found[party]!r} and {layer!r} are both of {party!r}; a base model ends at one layer")
        found[party] = layer
    return found


# What each party holds ----------------------------------------------------------------------------------------------


def columns_held(traced: Traced, parties: Mapping[str, Any], whole: nn.Module) -> dict[Column, str]:
    """Return the party of each column, as `parties` says of a traced module. Raises JobError."""
    return _owner(traced, _held(parties), {name for name, _ in whole.named_modules() if name})


def _held(parties: Mapping[str, Any]) -> dict[str, list[Any]]:
    if not parties:
        raise JobError("parties is empty: say what each party holds")
    return {party: _listed(what) for party, what in parties.items()}


def _listed(what: Any) -> list[Any]:
    if isinstance(what, str | int):
        return [what]
    found: list[Any] = []
    for each in [what] if isinstance(what, slice | range) else what:
        found += list(each) if isinstance(each, range) else [each]
    return found


def _owner(traced: Traced, held: Mapping[str, Sequence[Any]], layers: Collection[str]) -> dict[Column, str]:
    """Return the party of each column. Raises JobError for one of two parties, or that there is not."""
    known = _known(traced)
    found: dict[Column, str] = {}
    for party, names in held.items():
        columns: list[Column] = []
        for name in names:
            if name == EVERYTHING:
                columns += known[:1] if table_of(traced) is not None else known
            elif isinstance(name, slice):
                columns += range(*name.indices(sum(isinstance(column, int) for column in known)))
            elif isinstance(name, str | int) and name in known:
                columns.append(name)
            elif name in layers:
                columns += _reaching(traced, str(name), known)
            else:
                told = ", ".join(map(repr, known)) if len(known) < 9 else f"{len(known)} columns"
                raise JobError(
                    f"party {party!r}: {name!r} is neither an input of the module ({told}) nor a layer of it"
                )
        for column in columns:
            if found.setdefault(column, party) != party:
                raise JobError(f"column {column!r} is of {found[column]!r} and of {party!r}")
    return found


def _known(traced: Traced) -> list[Column]:
    """List what can be held: arguments, and the keys or columns of the only one."""
    inputs = [node for node in traced.nodes if node.op == "placeholder"]
    names: list[Column] = [str(node.target) for node in inputs]
    if len(inputs) > 1:
        return names
    value = traced.values[inputs[0]]
    if isinstance(value, Mapping):
        return list(value)
    return names + list(range(value.shape[1] if isinstance(value, Tensor) else len(value)))


def _reaching(traced: Traced, layer: str, known: Sequence[Column]) -> list[Column]:
    """List the columns that a layer computes on: those that are alone in it if each is a party of its own."""
    argument = {node.target for node in traced.nodes if node.op == "placeholder"}
    single = {c: str(n) for n, c in enumerate(known) if table_of(traced) is None or c not in argument}
    owners = owners_of(traced, single)
    numbers: set[str] = set()
    for node in traced.nodes:
        inside = node.meta.get(PATH, "")
        if node.op == "call_module" and (node.target == layer or inside == layer or inside.startswith(f"{layer}.")):
            numbers |= owners.parties[node]
    return [column for column, number in single.items() if number in numbers]


def _told(layers: Collection[str]) -> str:
    names = sorted(layers)
    return f"there are {', '.join(names[:12])}" + (", ..." if len(names) > 12 else "")


def _share(rows: Any, columns: Sequence[Column]) -> Any:
    """Return a party's columns of the whole's input."""
    if isinstance(rows, Tensor):
        if all(isinstance(column, str) for column in columns):
            return rows
        return rows[:, torch.tensor(list(columns))].clone()
    if len(columns) == 1:
        return rows[columns[0]]
    if isinstance(rows, Mapping):
        return {column: rows[column] for column in columns}
    return [rows[int(column)] for column in columns]
