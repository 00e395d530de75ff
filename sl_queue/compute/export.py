"""Export of a trained part to torch.export or ONNX, compared with the module itself before it is said to be done.

A base model takes one input, "rows". A fuse model takes one input per party, named by it, in the order of the job;
the aggregation of the job is part of what is exported. The number of rows stays open.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from sl_queue.compute.running import aggregated, blame, called
from sl_queue.compute.spec import LayersSpec
from sl_queue.compute.stand_ins import drawn_inputs
from sl_queue.errors import ComputeError, JobError, SlQueueError
from sl_queue.protocol.text import counted

Target = Literal["torch", "onnx"]
EXPORT_ROWS = 64  # compared
SUFFIX: Final[Mapping[Target, str]] = {"torch": ".pt2", "onnx": ".onnx"}
TOLERANCE: Final[Mapping[Target, float]] = {"torch": 1e-6, "onnx": 1e-5}  # of the largest output, at least of 1


@dataclass(frozen=True, slots=True)
class Exported:
    """One file, and how far its output is from the module's."""

    path: Path
    inputs: tuple[str, ...]
    rows: int  # compared
    difference: float  # the largest, absolute


class ByName(nn.Module):
    """A base model that takes one array, several by name, or a list; its inputs are tensors in a fixed order."""

    def __init__(self, base: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.base, self.names = base, tuple(names)

    def forward(self, *arrays: Tensor) -> Any:
        """Run the base model."""
        if self.names == ("rows",):
            return self.base(arrays[0])
        if all(name.startswith("rows.") for name in self.names):
            return self.base(list(arrays))
        return called(self.base, dict(zip(self.names, arrays, strict=True)))


class ByParty(nn.Module):
    """A fuse model whose inputs are one tensor per party, or per output of a party, in job order."""

    def __init__(self, fuse: nn.Module, layers: LayersSpec) -> None:
        super().__init__()
        self.fuse, self.layers = fuse, layers

    def forward(self, *tensors: Tensor) -> Any:
        """Aggregate the activations and run the fuse model."""
        each, left = {}, list(tensors)
        for party in self.layers.fused:
            count = len(self.layers.outputs[party].shapes) if party in self.layers.outputs else 1
            each[party], left = left[:count], left[count:]
        return self.fuse(aggregated(each, self.layers))


def named_inputs(inputs: Any) -> dict[str, Tensor]:
    """Return a base model's inputs by name: "rows" for one array, "rows.0" and so on for a list."""
    if isinstance(inputs, Tensor):
        return {"rows": inputs.cpu()}
    if isinstance(inputs, Mapping):
        return {name: tensor.cpu() for name, tensor in inputs.items()}
    return {f"rows.{index}": tensor.cpu() for index, tensor in enumerate(inputs)}


def export_base(module: nn.Module, inputs: Any, target: Target, path: Path) -> Exported:
    """Export a base model, compared on rows as it takes them. Raises what `export_part` raises."""
    named = named_inputs(inputs)
    return export_part(ByName(module.cpu(), tuple(named)), named, target, path)


def export_fuse(module: nn.Module, layers: LayersSpec, dtype: torch.dtype, target: Target, path: Path) -> Exported:
    """Export a fuse model, compared on drawn activations. Raises what `export_part` raises."""
    outputs = drawn_inputs(layers, EXPORT_ROWS, dtype)
    inputs = {name: tensor for party in outputs for name, tensor in _of_party(layers, party, outputs[party])}
    return export_part(ByParty(module, layers), inputs, target, path)


def _of_party(layers: LayersSpec, party: str, outputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name the outputs of a party: by the party, and by the output where it has several."""
    if party not in layers.outputs:
        yield party, outputs[0]
        return
    names = layers.outputs[party].names or tuple(map(str, range(len(outputs))))
    yield from ((f"{party}.{name}", output) for name, output in zip(names, outputs, strict=True))


def export_part(module: nn.Module, inputs: Mapping[str, Tensor], target: Target, path: Path) -> Exported:
    """Write `path` and compare it with `module` on `inputs`, by name, each (rows, *anything), at least two rows.

    `module` takes the inputs in their order. Raises ComputeError if it cannot be exported or computes something else,
    JobError if a library is missing; then `path` is not there.
    """
    names, arguments = tuple(inputs), tuple(inputs.values())
    module = module.eval()
    with torch.no_grad(), blame(f"{path.name}: the model failed on {counted(len(arguments[0]), 'row', 'rows')}"):
        wanted = module(*arguments)
    if not isinstance(wanted, Tensor):
        raise ComputeError(
            f"{path.name}: a model that returns {type(wanted).__name__} cannot be exported; one tensor can"
        )
    unfinished = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        with _quiet():
            write = _write_torch if target == "torch" else _write_onnx
            try:
                write(module, names, arguments, unfinished)
                difference = _compare(module, unfinished, inputs, target, path.name)
                names = inputs_of(unfinished, names)
            except (SlQueueError, KeyboardInterrupt):
                raise
            except Exception as error:  # of tracing any model, and of running what came of it: anything may come
                first = str(error).strip().splitlines()[:1]
                told = f"{type(error).__name__}: {first[0] if first else ''}{_advice(module, arguments, target)}"
                raise ComputeError(f"{path.name}: the model cannot be exported to {target}: {told}") from error
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Exported(path, names, len(arguments[0]), difference)


def run_exported(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run an exported file on inputs by name."""
    if path.suffix == SUFFIX["torch"]:
        with torch.no_grad():
            output: Tensor = torch.export.load(path).module()(*inputs.values())
        return output
    session = _session(path)
    arrays = {found.name: inputs[found.name].numpy() for found in session.get_inputs()}
    return torch.from_numpy(session.run(None, arrays)[0])


def inputs_of(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of these inputs an exported file takes: ONNX leaves out one that the model does not look at."""
    if path.suffix == SUFFIX["torch"]:
        return names
    taken = {found.name for found in _session(path).get_inputs()}
    return tuple(name for name in names if name in taken)


def _session(path: Path) -> Any:
    onnxruntime = _required("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _advice(module: nn.Module, arguments: tuple[Tensor, ...], target: Target) -> str:
    """Say what to do for numbers of a kind that ONNX knows and its runtime hardly computes with."""
    tensors = (*arguments, *module.parameters(), *module.buffers())
    if target == "onnx" and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return "; onnxruntime computes little in bfloat16: export with --to torch"
    return ""


def _write_torch(module: nn.Module, names: tuple[str, ...], arguments: tuple[Tensor, ...], path: Path) -> None:
    rows = torch.export.Dim("rows", min=1)
    shapes: Any = (tuple({0: rows} for _ in arguments),) if isinstance(module, ByName | ByParty) else ({0: rows},)
    torch.export.save(torch.export.export(module, arguments, dynamic_shapes=shapes), path)


def _write_onnx(module: nn.Module, names: tuple[str, ...], arguments: tuple[Tensor, ...], path: Path) -> None:
    _required("onnx")
    axes = {name: {0: "rows"} for name in (*names, "output")}
    torch.onnx.export(
        module,
        arguments,
        str(path),
        dynamo=False,  # the exporter by tracing: one file, and no library beside onnx
        input_names=list(names),
        output_names=["output"],
        dynamic_axes=axes,
    )


def _compare(module: nn.Module, path: Path, inputs: Mapping[str, Tensor], target: Target, told: str) -> float:
    """Return the largest difference on all rows and on the first alone. Raises ComputeError beyond the tolerance."""
    worst = 0.0
    for rows in (len(next(iter(inputs.values()))), 1):
        given = {name: tensor[:rows] for name, tensor in inputs.items()}
        got = run_exported(path, given)
        with torch.no_grad():
            wanted: Tensor = module(*given.values())
        if got.shape != wanted.shape:
            raise ComputeError(
                f"{told}: gives {tuple(got.shape)} for {counted(rows, 'row', 'rows')}, the model {tuple(wanted.shape)}"
            )
        difference = float((got.double() - wanted.double()).abs().max())
        bound = TOLERANCE[target] * max(1.0, float(wanted.double().abs().max()))
        if not difference <= bound:
            raise ComputeError(
                f"{told}: differs from the model by {difference:.3g} on the same {counted(rows, 'row', 'rows')}, more "
                f"than {bound:.3g}; the model depends on something that an export does not carry, a branch on values "
                "for instance"
            )
        worst = max(worst, difference)
    return worst


def _required(library: str) -> Any:
    from importlib import import_module

    try:
        return import_module(library)
    except ImportError as error:
        raise JobError(f"--to onnx needs {library}: pip install 'sl_queue[onnx]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own remarks from the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxruntime")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
