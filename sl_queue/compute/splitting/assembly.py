"""Parts made of the sides of a whole module: steps, the layers that they call, and nothing of the other sides."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from sl_queue.compute.splitting.owners import Column, Owners, Table, is_size, of_one_row, table_of
from sl_queue.compute.splitting.part import Names, Part, Step, step_of, written
from sl_queue.compute.splitting.sides import FUSE, Sides
from sl_queue.compute.splitting.tracing import Traced, layer_name
from sl_queue.errors import JobError

_ROWS = "rows"  # a party's share of the one table


@dataclass(slots=True)
class _Program:
    """Steps of one side. Mutable: it grows in the order of the graph."""

    assembly: "Assembly"
    side: str
    there: set[Node] = field(default_factory=set)  # values that the side has
    steps: list[Step] = field(default_factory=list)
    anchor: str = ""  # a value whose first axis is the rows

    def enter(self, node: Node) -> str:
        """Note a value that enters the side."""
        self.there.add(node)
        self.anchor = self.anchor or node.name
        return node.name

    def add(self, node: Node) -> None:
        """Add a step, after what it needs of nobody's values."""
        if node in self.there:
            return
        for each in node.all_input_nodes:
            self.need(each)
        self.there.add(node)
        self.steps.append(step_of(node))

    def need(self, node: Node) -> None:
        """Have a value that is this side's, or nobody's."""
        if node in self.there:
            return
        if is_size(node, self.assembly.traced) and not all(each in self.there for each in node.all_input_nodes):
            self._size(node)
        else:
            self.add(node)

    def _size(self, node: Node) -> None:
        """Have a size of a value that is on another side: the number of rows, or a number that never changes."""
        value = self.assembly.traced.values[node]
        counts_rows = node.args[1:] in ((0,), (-0,)) and (node.target == "size" or self.assembly.is_shape(node.args[0]))
        step: Step = {"name": node.name, "op": "call_method", "target": "size", "kwargs": {"table": []}}
        if counts_rows:
            self.steps.append(step | {"args": ({"node": self.anchor}, 0)})
        elif isinstance(value, int) and not self.assembly.of_rows(node):
            literal: Step = {"name": node.name, "op": "call_function", "target": "builtins:int", "args": (value,)}
            self.steps.append(literal | {"kwargs": {"table": []}})
        else:
            raise JobError(f"{layer_name(node)} reads a shape on the other side of the cut; read it of a value here")
        self.there.add(node)


@dataclass(slots=True)
class Assembly:
    """Parts of one division. Mutable: it knows which side has which tensors."""

    traced: Traced
    owners: Owners
    sides: Sides
    columns: Mapping[str, Sequence[Column]]
    _homes: dict[int, tuple[str, str]] = field(default_factory=dict)  # by id of a tensor: its name and its side

    def base(self, party: str) -> Part:
        """Return a party's base model."""
        program, table = _Program(self, party), table_of(self.traced)
        if table is not None and str(table.node.target) not in self.columns[party]:
            takes: Names = _ROWS
            program.anchor = _ROWS
            self._add_pieces(program, table)
        else:
            takes = self._take_arrays(program, party)
        for node in self._of(party):
            program.add(node)
        return self._part(program, takes, self._returned(program))

    def fuse(self) -> Part:
        """Return the fuse model."""
        program = _Program(self, FUSE)
        takes = [self._taken(program, party) for party in self.columns]
        for nodes in self.sides.crossing.values():
            for node in nodes:
                if self.traced.values[node].dim() == 1:
                    program.steps.append(_method(node.name, "squeeze", node.name, 1))
        for node in self._of(FUSE):
            program.add(node)
        for node in self.traced.output.all_input_nodes:
            program.need(node)
        return self._part(program, takes, written(self.traced.output.args[0]))

    def is_shape(self, value: Any) -> bool:
        """Tell whether a node is the shape of a tensor."""
        return isinstance(value, Node) and isinstance(self.traced.values[value], torch.Size)

    def of_rows(self, node: Node) -> bool:
        """Tell whether a number may depend on how many rows there are."""
        return bool(self.traced.values[node] == len(self._sample())) and not self._is_axis(node)

    def _is_axis(self, node: Node) -> bool:
        of_shape = node.target == "size" or self.is_shape(node.args[0])
        return of_shape and len(node.args) == 2 and bool(node.args[1] != 0)

    def _sample(self) -> Tensor:
        (first, *_) = (node for nodes in self.sides.crossing.values() for node in nodes)
        found: Tensor = self.traced.values[first]
        return found

    def _of(self, side: str) -> list[Node]:
        return [node for node, its in self.sides.of.items() if its == side and node.op != "placeholder"]

    # What enters and leaves -------------------------------------------------------------------------------------

    def _take_arrays(self, program: _Program, party: str) -> Names:
        """Return the names under which a party's arrays enter: alone, by key, or in order."""
        names: dict[Column, str] = {}
        for node in self.traced.nodes:
            column = str(node.target) if node.op == "placeholder" else self._key(node)
            if column is not None and column in self.columns[party]:
                names[column] = names.get(column) or program.enter(node)
                if node.name != names[column]:
                    program.steps.append(_method(node.name, "view_as", names[column], {"node": names[column]}))
                    program.there.add(node)
        mine = [column for column in self.columns[party] if column in names]
        if len(self.columns[party]) == 1:
            return names[mine[0]]
        if all(isinstance(column, str) for column in self.columns[party]):
            return {column: names[column] for column in mine}
        return [names.get(column, f"unused_{column}") for column in self.columns[party]]

    def _key(self, node: Node) -> Any:
        """Return the key of an array that is taken out of the module's one dict or list; None of other nodes."""
        source = node.args[0] if len(node.args) == 2 else None
        if not isinstance(source, Node) or source.op != "placeholder" or node not in self.owners.raw:
            return None
        return None if isinstance(self.traced.values[source], Tensor) else node.args[1]

    def _add_pieces(self, program: _Program, table: Table) -> None:
        """Add what takes the pieces of the table that are computed on out of the party's share of it."""
        shape = table.sample.shape[1:]
        of_row = torch.arange(table.width).reshape(shape)
        own = of_row[torch.tensor(list(self.columns[program.side]))]
        here = {place: number for number, place in enumerate(own.flatten().tolist())}
        for node in self._of(program.side):
            if node not in self.owners.places:
                continue
            program.there.add(node)
            if all(user in self.owners.raw for user in node.users):
                continue
            places = self.owners.places[node]
            if isinstance(places, Tensor):
                wanted = of_one_row(places, table.width, node)
                local = [here[place] for place in wanted.flatten().tolist()]
                program.steps += _piece(node.name, local, tuple(wanted.shape), tuple(own.shape))

    def _returned(self, program: _Program) -> Any:
        nodes = self.sides.crossing[program.side]
        names = {}
        for node in nodes:
            names[node.name] = node.name
            if self.traced.values[node].dim() == 1:
                names[node.name] = f"{node.name}_column"
                program.steps.append(_method(names[node.name], "unsqueeze", node.name, 1))
        if len(nodes) == 1:
            return {"node": names[nodes[0].name]}
        return {"table": [[name, {"node": value}] for name, value in names.items()]}

    def _taken(self, program: _Program, party: str) -> Names:
        names = [program.enter(node) for node in self.sides.crossing[party]]
        return names[0] if len(names) == 1 else {name: name for name in names}

    # Layers -------------------------------------------------------------------------------------------------------

    def _part(self, program: _Program, takes: Names, returns: Any) -> Part:
        part = Part(takes, program.steps, returns)
        for step in program.steps:
            if step["op"] in ("call_module", "get_attr"):
                self._place(part, step["target"], program.side)
        part.training = self.traced.module.training
        return part

    def _place(self, part: Part, target: str, side: str) -> None:
        """Put a layer or a tensor into a part, under its name in the whole."""
        *path, name = target.split(".")
        home: nn.Module = part
        whole = self.traced.module
        for step in path:
            whole = whole.get_submodule(step)
            if step not in home._modules:
                home.add_module(step, nn.Module())
                home.get_submodule(step).training = whole.training
            home = home.get_submodule(step)
        found = getattr(whole, name)
        for inner, tensor in _tensors(found):
            self._claim(tensor, f"{target}.{inner}".rstrip("."), target, side)
        if isinstance(found, nn.Module):
            home.add_module(name, found)
        elif isinstance(found, nn.Parameter):
            home.register_parameter(name, found)
        else:
            home.register_buffer(name, found, persistent=name not in whole._non_persistent_buffers_set)

    def _claim(self, tensor: Tensor, name: str, target: str, side: str) -> None:
        first, home = self._homes.setdefault(id(tensor), (name, side))
        if home != side:
            told = " and ".join(f"party {each!r}" if each else "the fuse model" for each in (home, side))
            raise JobError(
                f"{target!r} is used by {told} ({first!r}), and its weights can live at one place only; give each its "
                "own layer"
            )


def _tensors(found: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, nn.Module):
        yield from found.named_parameters()
        yield from found.named_buffers()
    elif isinstance(found, Tensor):
        yield "", found


def _method(name: str, method: str, of: str, *args: Any) -> Step:
    read = ({"node": of}, *args)
    return {"name": name, "op": "call_method", "target": method, "args": read, "kwargs": {"table": []}}


def _piece(name: str, local: Sequence[int], shape: tuple[int, ...], own: tuple[int, ...]) -> list[Step]:
    """Return the steps that take these numbers of each row of a party's share, in this shape."""
    count, first = len(local), local[0] if local else 0
    if list(local) == list(range(first, first + count)):
        whole = count == _numbers(own)
        if whole and shape == own:
            return [_method(name, "view_as", _ROWS, {"node": _ROWS})]
        flat = _method(f"{name}_flat", "flatten", _ROWS, 1)
        taken = _method(f"{name}_taken", "narrow", f"{name}_flat", 1, first, count)
    else:
        flat = _method(f"{name}_flat", "flatten", _ROWS, 1)
        index = ({"slice": [None, None, None]}, list(local))
        taken = {
            "name": f"{name}_taken",
            "op": "call_function",
            "target": "operator:getitem",
            "args": ({"node": f"{name}_flat"}, index),
            "kwargs": {"table": []},
        }
    if len(shape) == 1:
        return [flat, taken | {"name": name}]
    return [flat, taken, _method(name, "reshape", f"{name}_taken", -1, *shape)]


def _numbers(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
