"""Exposure of labels to feature parties, tried on the job's own tables and models before it is started."""

import time
from collections.abc import Iterator, Mapping

from sl_queue.checking.dry_run import Readable
from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.fuse_stage import TorchFuseStage, fuse_stage
from sl_queue.compute.stand_ins import stand_in
from sl_queue.config.job import Job
from sl_queue.cut.guard import Guard
from sl_queue.cut.rows import CutRows
from sl_queue.errors import NonFiniteError
from sl_queue.launch.privacy import class_numbers
from sl_queue.privacy.first_look import FirstLook, Reading
from sl_queue.privacy.guards import RowIndex
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches

LONGEST_S = 10.0  # that is spent on rows


def exposure(job: Job, parties: Mapping[str, Readable], batches: Batches) -> list[str]:
    """Return a warning for each party that can read the labels, in its first steps.

    Nothing of it is kept. Parties whose files are not at hand get random numbers for activations.
    """
    label = parties[job.label_holder]
    classes = class_numbers(label.table)
    if classes is None:
        return []
    readings: list[Reading] = []
    look = FirstLook.of(classes, RowIndex.of(label.table.row_keys), batches.rows_in_epoch, readings.append)
    guards = dict.fromkeys(job.feature_parties, Guard(leaving=look))
    fuse = fuse_stage(label.compute, label.table, batches, None, guards)
    here = {party: parties[party] for party in job.feature_parties if party in parties}
    bases = {name: base_stage(party.compute, party.table, batches) for name, party in here.items()}
    made_up = [party for party in job.feature_parties if party not in bases]
    try:
        _train(job, fuse, bases, look, label, batches)
    except NonFiniteError:
        if not made_up:
            raise
    for party in job.feature_parties:
        look.finish(party)
    more = f", with random numbers as activations of {', '.join(made_up)}" if made_up else ""
    return [reading.told(more) for reading in readings]


def _train(
    job: Job,
    fuse: TorchFuseStage,
    bases: Mapping[str, TorchBaseStage],
    look: FirstLook,
    label: Readable,
    batches: Batches,
) -> None:
    """Train until there are gradients enough, or an epoch is over, or it takes too long."""
    began = time.monotonic()
    for micro_batch in _first_epoch(batches):
        sent = {party: _activation(job, bases, party, label, batches, micro_batch) for party in job.feature_parties}
        gradients = fuse.forward_backward(micro_batch, sent)
        for party, base in bases.items():
            base.backward(micro_batch, gradients[party])
        if micro_batch.index == batches.parts(micro_batch.step) - 1:
            fuse.update()
            for base in bases.values():
                base.update()
        enough = all(look.rows(party) == 0 for party in job.feature_parties)  # said, or nothing is sent to it
        if enough or time.monotonic() - began > LONGEST_S:
            return


def _first_epoch(batches: Batches) -> Iterator[MicroBatch]:
    for step in range(batches.steps_per_epoch):
        for index in range(batches.parts(step)):
            yield MicroBatch(step, index)


def _activation(
    job: Job,
    bases: Mapping[str, TorchBaseStage],
    party: str,
    label: Readable,
    batches: Batches,
    micro_batch: MicroBatch,
) -> Payload:
    if party in bases:
        return bases[party].forward(micro_batch)
    rows = CutRows.of(label.table.row_keys, batches.rows(micro_batch))
    return stand_in(job.seed, party, (len(rows), *(job.cut(party) or ())), "float32", rows.digest)
