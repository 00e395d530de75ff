"""Faults of a job that several of its numbers show together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sl_queue.config.schema import shown

if TYPE_CHECKING:
    from sl_queue.config.job import Job


def about_aggregation(job: "Job") -> Iterator[str]:
    """Yield which cuts do not fit the aggregation."""
    aggregation = job.fuse.aggregation
    several = [name for name, party in job.parties.items() if party.outputs is not None]
    if several and aggregation != "list":
        yield f'fuse.aggregation = {shown(aggregation)}; party {several[0]!r} has several outputs, which need "list"'
        return
    cuts = {name: party.flat for name, party in job.parties.items() if party.flat is not None}
    told = ", ".join(f"{name} {list(cut)}" for name, cut in cuts.items())
    if aggregation in ("sum", "mean") and len(set(cuts.values())) > 1:
        yield f"fuse.aggregation = {shown(aggregation)} needs equal cuts, but they are {told}"
    if aggregation == "concat" and len({(len(cut), cut[1:]) for cut in cuts.values()}) > 1:
        yield f"fuse.aggregation = 'concat' needs cuts that differ only in their first number, but they are {told}"


def about_numbers(job: "Job") -> Iterator[str]:
    """Yield which numbers do not fit each other."""
    micro_batches = job.pipeline.micro_batches
    if micro_batches > job.batch_size:
        yield f"pipeline.micro_batches = {micro_batches}; it must be at most batch_size, which is {job.batch_size}"
    shares = [each if isinstance(each, float | int) else each.share or 0.0 for each in (job.holdout, job.test)]
    if sum(shares) >= 1:
        yield f"holdout = {shares[0]} and test = {shares[1]} leave no row to train on; together they must be below 1"
    if job.fuse.whole_batch and job.pipeline.depth < micro_batches:
        yield (
            f"pipeline.depth = {job.pipeline.depth}; with fuse.whole_batch all activations of a step are sent before "
            f"the first gradient comes, so it must be at least micro_batches, which is {micro_batches}"
        )
    if job.early_stopping is not None and not job.early_stopping.of_training and job.holdout == 0:
        yield "early_stopping needs held-out rows, but holdout = 0; set holdout, for instance to 0.2"
