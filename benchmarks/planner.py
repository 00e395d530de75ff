"""Is `sl-queue plan` right? What it predicts beside what is measured, with all parties on this machine."""

import os
import time
from dataclasses import replace

import numpy as np

from benchmarks import goals, transport
from benchmarks.link import Speed
from benchmarks.processes import Work, together
from benchmarks.report import table
from benchmarks.training import GPIPE, LOCK_STEP, ONE_F_ONE_B, RUN_AHEAD_2, Comparison, Variant, run
from benchmarks.workloads import LABEL, SMALL, W1, Workload, job_of, party_file
from sl_queue.commands.plan import CACHES_BYTES, Handling, Link, costs_of, measure, played
from sl_queue.data.table import read_table
from sl_queue.job import JobPipeline
from sl_queue.local.private_broker import PrivateBroker
from sl_queue.protocol.simulation import Affine
from sl_queue.protocol.wire import Wire

ORDERS = (LOCK_STEP, GPIPE, ONE_F_ONE_B, RUN_AHEAD_2)
SPEEDS = (None, Speed(20.0))


def handling(private: PrivateBroker, quick: bool) -> Handling:
    """What a message costs in CPU time, by bytes."""
    found = {size: _cpu_s(size, 20 if quick else 200, private) for size in (16 * 1024, 1024 * 1024)}
    broker, end = ([(size, spent[part]) for size, spent in found.items()] for part in (0, 1))
    return Handling(Affine.through(*broker), Affine.through(*end))


def _cpu_s(size: int, trips: int, private: PrivateBroker) -> tuple[float, float]:
    """Of the broker and of one driver, for a message."""
    vhost = f"handling{size}"
    url = private.url(vhost)
    before = _broker_cpu_s(private)
    works: dict[str, Work] = {
        "a": (_converse, (url, "a", size, trips)),
        "b": (_converse, (url, "b", size, trips)),
    }
    ends = sum(together(works, 120.0).values())
    broker = _broker_cpu_s(private) - before
    private.delete_vhost(vhost)
    return broker / (2 * trips), float(ends) / (4 * trips)


def _broker_cpu_s(private: PrivateBroker) -> float:
    return int(private.evaluate("element(1, erlang:statistics(runtime))")) / 1e3


def _converse(url: str, party: str, size: int, trips: int) -> float:
    """Send and receive in turns, with cold caches as after a step; the CPU seconds that it took."""
    end, body = transport.LinkEnd(url, party, "classic"), bytes(size)
    end.send(body)
    end.receive()  # both are connected
    began, other, elsewhere = time.process_time(), np.ones(CACHES_BYTES, np.uint8), 0.0
    for _ in range(trips):
        before = time.thread_time()
        other.max()
        elsewhere += time.thread_time() - before
        end.send(body)
        end.receive()
    return time.process_time() - began - elsewhere


def predicted(workload: Workload, way: Handling) -> dict[tuple[str, Speed | None], float]:
    """Milliseconds a step, by pipeline and link."""
    import torch

    torch.set_num_threads(1)
    job = job_of(workload, 1)
    files = {party: party_file(workload, party) for party in (*workload.feature_parties, LABEL)}
    tables = {party: read_table(job, file) for party, file in files.items()}
    measured = measure(job, files, tables)
    found = {}
    for speed in SPEEDS:
        link = Link(0.0 if speed is None else speed.rtt_ms, cores=os.cpu_count())
        costs = costs_of(job, measured, Wire(), link, way)
        for order in ORDERS:
            found[order.name, speed] = played(job, costs, JobPipeline(**order.table)).step_s * 1e3
    return found


def compare(private: PrivateBroker, quick: bool) -> str:
    """Predicted and measured step times."""
    way = handling(private, quick)
    rows = []
    for whole, steps in ((SMALL, 100), (W1, 60)):
        workload = replace(whole, rows=whole.batch * (12 if quick else steps))
        expected = together({"plan": (predicted, (workload, way))}, 120.0)["plan"]
        variants = tuple(Variant("rabbitmq", order, speed=speed) for speed in SPEEDS for order in ORDERS)
        for variant, summary in run(Comparison(workload, variants, 1), private).items():
            said, took = expected[variant.order.name, variant.speed], summary.middle(lambda run: run.step_ms)
            link = "loopback" if variant.speed is None else str(variant.speed)
            rows.append(
                (workload.name, variant.order.name, link, f"{said:.2f}", f"{took:.2f}", f"{said / took - 1:+.0%}")
            )
    within = sum(abs(float(row[3]) / float(row[4]) - 1) <= 0.2 for row in rows) / len(rows)
    goal = goals.line("share of predictions within 20 % of what was measured", within, 1.0, at_least=True)
    return f"{table(('', 'pipeline', 'link', 'predicted ms', 'measured ms', 'off by'), rows)}\n{goal}\n"
