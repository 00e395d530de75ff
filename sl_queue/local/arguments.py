"""Arguments of a SplitModel: turned into the job and the party files that they describe, and read back from those."""

from collections.abc import Mapping
from typing import Any

from sl_queue.config.job import Job, PartyFile
from sl_queue.errors import JobError
from sl_queue.local import in_memory, written_model
from sl_queue.local.given_rows import Given, rows_of
from sl_queue.local.written_code import given_parameters

Arguments = Mapping[str, Any]  # by the names that SplitModel gives them
_OWN = ("name", "seed", "epochs", "batch_size", "holdout", "parties", "fuse")  # keys of a job that an argument sets
_LEARNING = ("schedule", "clip_norm", "clip_value", "ema")


def is_of_numbers(loss: Any) -> bool:
    """Tell by the name of the loss that a model predicts numbers."""
    name = loss["name"] if isinstance(loss, Mapping) else loss
    return name in ("mse", "l1", "huber", "poisson")


def job_and_files(given: Mapping[str, Given], arguments: Arguments) -> tuple[Job, list[PartyFile]]:
    """Build the job and the party files; the cuts are found by trying the base models."""
    holder, bases = arguments["label_holder"], arguments["bases"]
    roles: dict[str, Any] = {party: {"role": "feature"} for party in bases}
    roles[holder] = {"role": "label"}
    files = {party: party_file(given[party], arguments) for party in roles}
    for party in bases:
        module = written_model.given_or_made(files[party], "base")
        roles[party]["cut"] = in_memory.shape_of_cut(party, given[party].table(), module)
    job = Job(
        **{
            "name": arguments["name"],
            "seed": arguments["seed"],
            "epochs": arguments["epochs"],
            "batch_size": min(arguments["batch_size"], given[holder].n_rows),
            "holdout": arguments["validation"],
            "parties": roles,
            "fuse": {"aggregation": arguments["aggregation"]},
            **dict(arguments["settings"] or {}),
        }
    )
    return job, list(files.values())


def party_file(given: Given, arguments: Arguments) -> PartyFile:
    """Build the file of one party, with its rows."""
    party, bases = given.party, arguments["bases"]
    tables: dict[str, Any] = {"party": party, "data": rows_of(given), "device": arguments["device"]}
    how = {"optimizer": _optimizer(arguments["optimizer"]), **dict(arguments["learning"] or {})}
    if party in bases:
        tables["base"] = {"model": bases[party], **how}
    if party == arguments["label_holder"]:
        of_fuse = {key: value for key, value in how.items() if key != "groups"}
        objective = {"loss": arguments["loss"], "metrics": list(arguments["metrics"])}
        tables["fuse"] = {"model": arguments["fuse"], **objective, **of_fuse}
    return PartyFile(**tables)


def _optimizer(optimizer: Any) -> Any:
    if optimizer is None:
        return {"name": "adam", "lr": 1e-3}
    if callable(optimizer):
        return given_parameters(optimizer)
    if isinstance(optimizer, str):
        return optimizer if ":" in optimizer else {"name": optimizer}
    if not isinstance(optimizer, Mapping):
        told = f"optimizer is {type(optimizer).__name__}, made for other parameters"
        raise JobError(f'{told}; give a table like {{"name": "adam", "lr": 1e-3}}, or a callable that is given them')
    return dict(optimizer)


def arguments_of(job: Job, files: Mapping[str, PartyFile]) -> dict[str, Any]:
    """Return the arguments that a job and party files, as `save` writes them, were built from."""
    holder = files[job.label_holder]
    assert holder.fuse is not None
    fuse, table = holder.fuse, job.model_dump(exclude_unset=True)
    return {
        "bases": {party: written_model.made(files[party], "base") for party in job.fused},
        "fuse": written_model.made(holder, "fuse"),
        "label_holder": job.label_holder,
        "loss": written_model.resolved(fuse.loss, holder),
        "optimizer": fuse.optimizer,
        "metrics": [written_model.resolved(metric, holder) for metric in fuse.metrics],
        "aggregation": job.fuse.aggregation,
        "epochs": job.epochs,
        "batch_size": job.batch_size,
        "validation": job.holdout if isinstance(job.holdout, float) else 0.0,
        "seed": job.seed,
        "learning": {key: getattr(fuse, key) for key in _LEARNING if getattr(fuse, key) is not None} or None,
        "settings": {key: value for key, value in table.items() if key not in _OWN} or None,
        "name": job.name,
    }
