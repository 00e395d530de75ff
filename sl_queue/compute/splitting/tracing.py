"""Graph of a whole module: as deep as a cut needs it, with every layer that is not looked into as one node."""

import operator
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import map_arg

from sl_queue.errors import JobError

PATH = "path"  # in a node's meta: the layer in whose forward it stands; "" of the module itself


@dataclass(frozen=True, slots=True)
class Traced:
    """A module's graph, and the value of each node for the sample rows."""

    module: nn.Module
    graph: Graph
    values: Mapping[Node, Any] = field(repr=False)

    @property
    def nodes(self) -> list[Node]:
        """All nodes but the output, in the order in which they run."""
        return [node for node in self.graph.nodes if node.op != "output"]

    @property
    def output(self) -> Node:
        """The node whose arguments the module returns."""
        found: Node = next(node for node in self.graph.nodes if node.op == "output")
        return found


class _Tracer(Tracer):
    """A tracer that enters given layers alone, and runs each step on the rows as it notes it.

    So it can go through what was split into a known number of tensors. Mutable: it knows where it is.
    """

    def __init__(self, inputs: Mapping[str, Any], opened: Collection[str]) -> None:
        super().__init__()
        self.inputs, self.opened, self.inside = inputs, {"", *opened}, [""]
        self.values: dict[Node, Any] = {}
        self.running = False  # a step on the rows, in which nothing is noted

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True for a layer that stays one node."""
        return module_qualified_name not in self.opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Remember the way to a layer that is entered."""
        if self.running:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if name not in self.opened:
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(name)
        found = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not after an error, which is blamed on where it happened
        return found

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a parameter as a node, and as it is while a step runs."""
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Note where the node stands, and what it is for the rows."""
        node: Node = super().create_node(*args, **kwargs)
        node.meta[PATH] = self.inside[-1]
        self.values[node] = self._run(node)
        return node

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Go through a tuple of tensors; how many there are does not depend on their numbers."""
        value = self.values[obj.node]
        if isinstance(value, tuple | list):
            return iter([operator.getitem(obj, index) for index in range(len(value))])
        return super().iter(obj)

    def _run(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: self.values[each])
        self.running = True
        try:
            with torch.no_grad():
                return self._value(node, args, kwargs)
        finally:
            self.running = False

    def _value(self, node: Node, args: Any, kwargs: Any) -> Any:
        match node.op:
            case "placeholder":
                return self.inputs.get(str(node.target))
            case "call_module":
                layer = self.root.get_submodule(str(node.target))
                with evaluating(layer):
                    return layer(*args, **kwargs)
            case "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case "get_attr":
                return operator.attrgetter(str(node.target))(self.root)
        return None


def trace(module: nn.Module, inputs: Any, opened: Collection[str]) -> Traced:
    """Trace a module on sample rows. Raises JobError, which names the layer that refuses."""
    found: list[Traced] = []
    modes = [(each, each.training) for each in module.modules()]
    try:
        for training in (True, False):
            module.train(training)
            found.append(_traced(module, inputs, opened))
    finally:
        for each, mode in modes:
            each.training = mode
    for one, other in zip(found[0].graph.nodes, found[1].graph.nodes, strict=False):
        if one.format_node() != other.format_node():
            raise JobError(
                f"{layer_name(one)} computes otherwise in training than in evaluation by its own code ({one.name}), "
                "which no split can tell apart; write it as a layer, nn.Dropout for instance"
            )
    return found[1]


def _traced(module: nn.Module, inputs: Any, opened: Collection[str]) -> Traced:
    arguments = signature(module.forward).parameters
    named = dict(inputs) if _by_name(module, inputs) else {next(iter(arguments), ""): inputs}
    left = {
        name: p.default
        for name, p in arguments.items()
        if name not in named and p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    }
    tracer = _Tracer({**named, **{f"{name}_1": default for name, default in left.items()}}, opened)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(module, concrete_args=left or None)
    except Exception as error:  # of the user's code under a tracer: anything may come
        first = (str(error).strip().splitlines() or [""])[0]
        told = f"{tracer.inside[-1]!r}" if tracer.inside[-1] else "the module itself"
        raise JobError(
            f"{told} cannot be cut through, since what it does depends on the numbers in it "
            f"({type(error).__name__}: {first}); cut before or after it"
        ) from error
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target).rpartition("_")[0] in left:
            _erase(graph, node)
    return Traced(module, graph, tracer.values)


def _erase(graph: Graph, node: Node) -> None:
    """Take out an argument that has its default, with the checks that fx makes of it."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have the module in evaluation mode; afterwards each layer is in its own again."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, mode in modes:
            each.training = mode


def _by_name(module: nn.Module, inputs: Any) -> bool:
    """Tell whether the inputs are the arguments of forward by name."""
    return isinstance(inputs, Mapping) and inputs.keys() <= signature(module.forward).parameters.keys()


def layer_name(node: Node) -> str:
    """Return how errors name what a node does: by its layer, or by the layer in whose code it stands."""
    if node.op == "call_module":
        return repr(str(node.target))
    within = node.meta.get(PATH, "")
    what = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{what!r} in {within!r}" if within else f"{what!r} in the module's forward"


def around(names: Collection[str]) -> set[str]:
    """Return the layers that contain these."""
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
