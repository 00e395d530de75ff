"""The bubble that a job's pipeline leaves by itself: its schedule, played with messages that take no time."""

from collections.abc import Mapping

from sl_queue.config.job import Job
from sl_queue.planning.costs import Affine, Costs, FeatureCosts
from sl_queue.planning.simulation import simulate
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches

WARM_UP = 6
STEPS = 24
FORWARD = 1 / 3  # of what a feature party computes: the backward pass takes about twice as long


def ideal_bubble(job: Job, busy_s: Mapping[str, float]) -> float | None:
    """Return the share of the time in which even the busiest party would wait, were there nothing but computation.

    `busy_s`: what each party computes for a step, in seconds. None if that is not known of every party.
    """
    if any(busy_s.get(party, 0.0) <= 0.0 for party in job.parties):
        return None
    each = {party: busy_s[party] / job.batch_size for party in job.parties}
    nothing = Affine()
    features = {
        party: FeatureCosts(
            forward=Affine(each=FORWARD * each[party]),
            backward=Affine(each=(1 - FORWARD) * each[party]),
            update_s=0.0,
            activation_bytes=nothing,
            gradient_bytes=nothing,
        )
        for party in job.feature_parties
    }
    fuse = Affine(each=each[job.label_holder])
    costs = Costs(features, fuse, fuse_update_s=0.0, commit_s=0.0, fuse_prepare=nothing, handling=nothing)
    order = job.pipeline
    batches = Batches(job.batch_size * STEPS, job.seed, 1, job.batch_size, order.micro_batches)
    pipeline = Pipeline(batches, order.depth, order.staleness, STEPS)
    return simulate(pipeline, costs, WARM_UP).bubble
