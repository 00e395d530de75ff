"""Split equals joined, shown on a job's own models and tables: the first optimizer step done both ways, compared."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sl_queue.compute.base import TorchBaseStage, base_stage
from sl_queue.compute.fuse import TorchFuseStage, fuse_stage
from sl_queue.compute.joined import Joined, train_joined
from sl_queue.compute.tensors import from_payload
from sl_queue.job import Job, JobWire, PartyFile
from sl_queue.ports import Table
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.row_order import Batches

Weights = Mapping[str, Mapping[str, Tensor]]  # of each module, "fuse" or "base of <party>", its state_dict


def first_step_difference(
    job: Job, party_files: Sequence[PartyFile], tables: Mapping[str, Table], batches: Batches
) -> float:
    """The largest difference of any weight after the first step, split and joined; 0.0 means equal bit for bit.

    What [wire] rounds away is left out of it.
    """
    job = job.model_copy(update={"wire": JobWire()})
    return largest_difference(
        _split_weights(job, {file.party: file for file in party_files}, tables, batches),
        joined_weights(train_joined(job, party_files, tables, batches, steps=1)),
    )


def largest_difference(one: Weights, other: Weights) -> float:
    """The largest difference of any weight. Raises KeyError if the modules are not the same ones."""
    pairs = [(tensor, other[module][name]) for module, weights in one.items() for name, tensor in weights.items()]
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def joined_weights(joined: Joined) -> Weights:
    """The weights of jointly trained modules, to compare."""
    bases = {_of(party): base.state_dict() for party, base in joined.bases.items()}
    return {**bases, "fuse": joined.fuse.state_dict()}


def _of(party: str) -> str:
    return f"base of {party}"


def _split_weights(job: Job, files: Mapping[str, PartyFile], tables: Mapping[str, Table], batches: Batches) -> Weights:
    holder = job.label_holder
    fuse = fuse_stage(job, files[holder], tables[holder], batches)
    bases = {party: base_stage(job, files[party], tables[party], batches) for party in job.feature_parties}
    _step(fuse, bases, batches.parts(0))
    stages: dict[str, TorchBaseStage | TorchFuseStage] = {**bases, holder: fuse}
    return {
        _of(party) if part == "base" else part: {name: from_payload(payload) for name, payload in weights.items()}
        for party, stage in stages.items()
        for part, weights in stage.weights().items()
    }


def _step(fuse: TorchFuseStage, bases: Mapping[str, TorchBaseStage], parts: int) -> None:
    """What the parties do in the first step, without anything between them."""
    for micro_batch in (MicroBatch(0, index) for index in range(parts)):
        activations = {party: base.forward(micro_batch) for party, base in bases.items()}
        for party, gradient in fuse.forward_backward(micro_batch, activations).items():
            bases[party].backward(micro_batch, gradient)
    fuse.update()
    for base in bases.values():
        base.update()
