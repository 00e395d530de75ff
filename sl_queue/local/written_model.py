"""A job and its parties as files: to be deployed, or to be loaded again.

folder/job.toml                       the same at every party
folder/bank/bank.toml                 the party's own file
folder/bank/bank.parquet              its rows, where they are written
folder/bank/base.json, .safetensors   a module given in code, with its initial weights
folder/bank/bank_code.py              what makes it, and code taken from a script or notebook
folder/bank/final/base.safetensors    trained weights, of a saved model
"""

import json
import math
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.torch
import torch
from torch import nn
from torch.optim import Optimizer

from sl_queue.compute.building import build_module
from sl_queue.compute.final_weights import settled
from sl_queue.compute.modules.written import write_module
from sl_queue.compute.optimizers import optimizer_names
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.party import BaseFile, FuseFile
from sl_queue.config.resolve import compute_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.given import features_of, labels_of
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError
from sl_queue.local.written_code import CodeFile

Part = Literal["base", "fuse"]
_PARTIES = {"a": {"role": "label"}, "b": {"role": "feature", "cut": [1]}}
_ANY = Job(name="any", seed=0, epochs=1, batch_size=1, parties=_PARTIES)


def write(folder: Path, job: Job, files: Sequence[PartyFile], *, data: bool) -> Path:
    """Write job and party files; with `data` the rows too. Raises JobError for what no file can say."""
    for file in files:
        (folder / file.party).mkdir(parents=True, exist_ok=True)
        _write_party(folder / file.party, file, data=data)
    (folder / "job.toml").write_text(toml(job.model_dump(mode="json", exclude_unset=True, exclude_none=True)))
    return folder


def save(
    folder: Path,
    job: Job,
    files: Mapping[str, PartyFile],
    modules: Mapping[str, nn.Module],
    history: Sequence[Any],
    about: Mapping[str, Any],
) -> Path:
    """Write the same without rows, and the trained weights."""
    write(folder, job, list(files.values()), data=False)
    for name, module in modules.items():
        party, part = (job.label_holder, "fuse") if name == "fuse" else (name, "base")
        final = folder / party / "final"
        final.mkdir(exist_ok=True)
        tensors = {key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}
        safetensors.torch.save_file(tensors, final / f"{part}.safetensors", metadata={"format": "pt"})
    (folder / "model.json").write_text(json.dumps({"history": list(history), **about}, indent=1))
    return folder


def load(folder: Path) -> tuple[Job, dict[str, PartyFile], dict[str, nn.Module], dict[str, Any]]:
    """Load what `save` wrote: the job, the party files, the trained modules, and the rest."""
    job = Job.load(folder / "job.toml")
    files = {party: PartyFile.load(folder / party / f"{party}.toml") for party in job.parties}
    parts: list[tuple[str, str, Part]] = [(party, party, "base") for party in job.fused]
    modules = {}
    for name, party, part in [*parts, ("fuse", job.label_holder, "fuse")]:
        path = folder / party / "final" / f"{part}.safetensors"
        modules[name] = settled(made(files[party], part), party, path)
    return job, files, modules, json.loads((folder / "model.json").read_text())


def made(file: PartyFile, part: Part) -> nn.Module:
    """Build a model of a party file, as it is before training."""
    return build_module(compute_spec(_ANY, file, Importer()), part, None)


def given_or_made(file: PartyFile, part: Part) -> nn.Module:
    """Return a module that the party file holds itself, or build what it names."""
    table = getattr(file, part)
    return table.model if isinstance(table.model, nn.Module) else made(file, part)


def resolved(thing: Any, file: PartyFile) -> Any:
    """Import what a party file names as module:callable; return anything else as it is."""
    if isinstance(thing, Mapping) and ":" in thing["name"]:
        return {**thing, "name": Importer().within(file.folder).load(thing["name"])}
    return Importer().within(file.folder).load(thing) if isinstance(thing, str) and ":" in thing else thing


# A party ----------------------------------------------------------------------------------------------------------


def _write_party(folder: Path, file: PartyFile, *, data: bool) -> None:
    code = CodeFile(folder, f"{file.party.replace('-', '_')}_code")
    table: dict[str, Any] = {"party": file.party, "state": "state"}
    if file.device != "cpu":
        table["device"] = file.device
    table["data"] = _data(folder, file, code, written=data)
    for part in ("base", "fuse"):
        found = getattr(file, part)
        if found is not None:
            table[part] = _part(folder, found, part, code, file.party)
    code.write()
    (folder / f"{file.party}.toml").write_text(toml(table))


def _part(folder: Path, table: BaseFile | FuseFile, part: str, code: CodeFile, party: str) -> dict[str, Any]:
    where = f"party {party!r}: [{part}]"
    kept = {name: getattr(table, name) for name in type(table).model_fields if name in table.model_fields_set}
    if isinstance(table.model, nn.Module):
        write_module(table.model, folder / f"{part}.json", code.bound, f"{where} model")
        code.add_reader(part)
        kept |= {"model": f"{code.name}:{part}"}
    elif not isinstance(table.model, str):
        kept |= {"model": code.name_of(table.model, f"{where} model")}
    if callable(table.optimizer):
        model = table.model if isinstance(table.model, nn.Module) else table.model(**table.args)
        kept |= {"optimizer": _settings(table.optimizer(model), f"{where} optimizer")}
    for key in ("schedule", "loss"):
        value = kept.get(key)
        if value is not None and not isinstance(value, str | Mapping):
            kept |= {key: code.name_of(value, f"{where} {key}")}
    if "metrics" in kept:
        kept["metrics"] = [_metric(metric, code, f"{where} metrics") for metric in kept["metrics"]]
    return {key: value for key, value in kept.items() if value is not None and value not in ({}, [])}


def _metric(metric: Any, code: CodeFile, where: str) -> Any:
    if isinstance(metric, Mapping) and callable(metric["name"]):
        return {**metric, "name": code.name_of(metric["name"], where)}
    return code.name_of(metric, where) if callable(metric) else metric


def _settings(optimizer: Optimizer, where: str) -> dict[str, Any]:
    """Return an optimizer of torch as a table. Raises JobError for any other."""
    kind = type(optimizer)
    if optimizer_names().get(kind.__name__.lower()) is not kind or len(optimizer.param_groups) > 1:
        raise JobError(
            f'{where} makes a {kind.__name__}, which no file can say; give a table like {{"name": "adam"}}, '
            "with groups in learning"
        )
    known = signature(kind).parameters
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in optimizer.defaults.items() if k in known}
    told = {k: v for k, v in options.items() if v is not None and v != known[k].default and not torch.is_tensor(v)}
    return {"name": kind.__name__.lower(), **{k: v for k, v in told.items() if v != _as_list(known[k].default)}}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# Rows -----------------------------------------------------------------------------------------------------------


def _data(folder: Path, file: PartyFile, code: CodeFile, *, written: bool) -> dict[str, Any]:
    """Write the rows of a party file beside it, and return its [data]."""
    rows = file.data
    if not isinstance(rows, Rows):
        raise JobError(f"party {file.party!r}: its rows are in a file already; write that one")
    path = f"{file.party}.parquet"
    features = features_of(rows.features, len(rows.ids)) if rows.features is not None else None
    labels = labels_of(rows.labels) if rows.labels is not None else None
    arrays = {
        name: None if found is None else found.array for name, found in (("features", features), ("labels", labels))
    }
    flat = all(array is None or (array.ndim <= 2 and not array.dtype.names) for array in arrays.values())
    if not flat or (arrays["labels"] is not None and arrays["labels"].ndim > 1):
        code.add_rows()
        if written:
            there = {name: array for name, array in arrays.items() if array is not None}
            np.savez(folder / "rows.npz", ids=np.asarray(rows.ids), **there)  # type: ignore[arg-type]
        return {"source": f"{code.name}:rows"}
    columns: dict[str, Any] = {"id": rows.ids}
    names: list[str] = []
    if features is not None and features.array is not None:
        numbers = features.array.reshape(len(features.array), -1)
        given = features.names or tuple(f"x{place}" for place in range(numbers.shape[1]))
        names = [f"{name}_" if name in ("id", "label") else name for name in given]
        columns |= {name: numbers[:, place] for place, name in enumerate(names)}
    if arrays["labels"] is not None:
        columns["label"] = arrays["labels"]
    if written:
        pa.parquet.write_table(pa.table({n: pa.array(np.asarray(c)) for n, c in columns.items()}), folder / path)
    found: dict[str, Any] = {"path": path, "id": "id", "features": names}
    return found | ({"label": "label"} if arrays["labels"] is not None else {})


# TOML -----------------------------------------------------------------------------------------------------------


def toml(table: Mapping[str, Any]) -> str:
    """Format a file as TOML: its tables one below the other, [parties.NAME] each by itself, the rest in one line."""
    lines = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if key == "parties":
            lines += [f"\n[parties.{_key(party)}]\n{_flat(about)}" for party, about in value.items()]
        elif isinstance(value, Mapping):
            lines.append(f"\n[{_key(key)}]\n{_flat(value)}")
    return "\n".join(lines) + "\n"


def _flat(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    return json.dumps(str(value), ensure_ascii=False)
