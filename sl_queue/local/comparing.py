"""A job trained by all parties, by each one alone, and joined in one process: the gain, and that nothing is lost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sl_queue.compute.equality import joined_weights, largest_difference
from sl_queue.compute.reference import ReferenceRun, train_joined
from sl_queue.compute.silent import Silent
from sl_queue.compute.threads import limit_threads, settings_kept
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.aligning import ids_of, shared_rows
from sl_queue.data.table import read_table
from sl_queue.errors import JobError, SlQueueError
from sl_queue.local.threads import Result, require_all, run_local, shared_threads

Measures = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way of training, and how well its model does."""

    name: str
    measures: Measures  # of held-out rows after the last epoch; the training loss where none are held out
    fault: str = ""  # why there is no model


def compare(job: Job, parties: Sequence[PartyFile]) -> Iterator[Outcome]:
    """Train in every way, one after the other; yields the joint model, each party alone, and the joined layers.

    Alone means that the others send zeros: the fuse model stays as it is. The last outcome says how far its weights are
    from those of the joint model. Raises SlQueueError if the joint model fails; another that fails is an outcome.
    """
    require_all(job, parties)
    joint = run_local(job, parties)
    yield Outcome("joint: all parties", _measures(joint.history))
    if len(job.fused) > 1:
        for party in job.fused:
            try:
                alone = run_local(job, [_silenced(job, file, party) for file in parties])
                yield Outcome(f"{party} alone", _measures(alone.history))
            except SlQueueError as error:
                yield Outcome(f"{party} alone", {}, str(error))
    yield _side_by_side(job, parties, joint)


def _silenced(job: Job, file: PartyFile, alone: str) -> PartyFile:
    """Return a party's file with a base model that sends zeros, unless it is the one that is alone."""
    if file.party == alone or file.base is None:
        return file
    cut = job.parties[file.party].cut
    kept = {"inputs": file.base.inputs} if "inputs" in file.base.model_fields_set else {}
    return file.replace(base={"model": Silent(cut), **kept})


def _side_by_side(job: Job, parties: Sequence[PartyFile], joint: Result) -> Outcome:
    threads = next((file.threads for file in parties if file.threads), None) or shared_threads(len(parties))
    try:
        with settings_kept():
            limit_threads(threads)  # as the run did: kernels add in another order with more
            joined = joined_run(job, parties, int(joint.history[-1]["step"]) + 1)
    except SlQueueError as error:
        return Outcome("joined in one process", {}, str(error))
    split = {f"base of {party}": joint.base(party).state_dict() for party in job.fused}
    difference = largest_difference({**split, "fuse": joint.fuse.state_dict()}, joined_weights(joined))
    return Outcome(f"joined in one process: weights differ by at most {difference:g}", _measures(joined.history))


def joined_run(job: Job, parties: Sequence[PartyFile], steps: int | None = None) -> ReferenceRun:
    """Train the same layers side by side, with all tables in this process. Raises what building a stage raises."""
    importer = Importer()
    specs = {file.party: resolve(job, file, importer) for file in parties}
    shared = shared_rows(ids_of([spec.table for spec in specs.values()])) if job.alignment.method == "psi" else {}
    tables = {party: read_table(spec.table, shared.get(party)) for party, spec in specs.items()}
    holder = tables[job.label_holder]
    if len({table.digest for table in tables.values()}) > 1:
        raise JobError("the parties' tables hold other rows, and the job does not align them")
    return train_joined(
        [spec.compute for spec in specs.values()], tables, job.batches(holder.n_rows, holder.hashes), steps
    )


def _measures(history: Sequence[Mapping[str, object]]) -> Measures:
    last = history[-1]
    held_out = last["holdout"]
    if isinstance(held_out, Mapping):
        return dict(held_out)
    loss = last["loss"]
    assert isinstance(loss, float)
    return {"training loss": loss}


def lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the outcomes as a person reads them, a line each."""
    names = list(outcomes[0].measures)
    width = max(len(outcome.name) for outcome in outcomes)
    yield " " * width + "".join(f"  {name:>14}" for name in names)
    for outcome in outcomes:
        if outcome.fault:
            yield f"{outcome.name:{width}}  no model: {outcome.fault}"
            continue
        values = (outcome.measures.get(name) for name in names)
        yield f"{outcome.name:{width}}" + "".join(f"  {'-' if v is None else f'{v:.6g}':>14}" for v in values)
