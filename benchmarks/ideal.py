"""The bubble that a pipeline has by itself: a core for every party, and messages that cost nothing but their link."""

from collections.abc import Mapping, Sequence

from benchmarks.processes import together
from benchmarks.training import Variant
from benchmarks.workloads import LABEL, Workload, job_of, party_file
from sl_queue.config.job import JobPipeline
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.table import read_table
from sl_queue.planning.costs import Affine
from sl_queue.planning.measuring import Handling, Link, costs_of, measure
from sl_queue.planning.plan import played


def bubbles(workload: Workload, variants: Sequence[Variant]) -> Mapping[Variant, float]:
    """Return the bubbles that the pipeline has with the costs of the workload's stages here; nothing for joined."""
    split = [variant for variant in variants if variant.how != "joined"]
    return dict(zip(split, together({"ideal": (_played, (workload, split))}, 120.0)["ideal"], strict=True))


def _played(workload: Workload, variants: Sequence[Variant]) -> list[float]:
    import torch

    torch.set_num_threads(1)
    job = job_of(workload, 1)
    files = {party: party_file(workload, party) for party in (*workload.feature_parties, LABEL)}
    importer = Importer()
    specs = {party: resolve(job, file, importer) for party, file in files.items()}
    tables = {party: read_table(spec.table) for party, spec in specs.items()}
    measured = measure(job, {party: spec.compute for party, spec in specs.items()}, tables)
    found = []
    for variant in variants:
        link = Link() if variant.speed is None else Link(variant.speed.rtt_ms, variant.speed.mbit_s)
        costs = costs_of(job, measured, job.on_the_wire, link, handling=Handling(Affine(), Affine(), Affine()))
        found.append(played(job, costs, JobPipeline(**variant.order.table)).bubble)
    return found
