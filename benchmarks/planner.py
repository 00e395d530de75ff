"""Is `sl-queue plan` right? What it predicts beside what is measured, with all parties on this machine."""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import goals, transport
from benchmarks.link import Speed, slowed
from benchmarks.processes import Work, cores, together
from benchmarks.report import table
from benchmarks.training import GPIPE, LOCK_STEP, ONE_F_ONE_B, RUN_AHEAD_2, Comparison, Variant, run
from benchmarks.workloads import LABEL, SMALL, W1, Workload, job_of, party_file
from sl_queue.config.job import JobPipeline
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.cut.packing import Wire
from sl_queue.data.table import read_table
from sl_queue.planning.costs import Affine
from sl_queue.planning.measuring import Handling, Link, costs_of, measure
from sl_queue.planning.plan import played
from sl_queue.planning.stopwatch import CACHES_BYTES
from sl_queue.testing.private_broker import PrivateBroker

ORDERS = (LOCK_STEP, GPIPE, ONE_F_ONE_B, RUN_AHEAD_2)
SPEEDS = (None, Speed(20.0))
_numbers = count()


def handling(private: PrivateBroker, quick: bool, speed: Speed | None) -> Handling:
    """Measure a message's cost by bytes; with a `speed`, over the emulated link, which computes on the same cores."""
    found = {size: _spent(size, 20 if quick else 200, private, speed) for size in (16 * 1024, 1024 * 1024)}
    driver, broker, beside = ([(size, spent[part]) for size, spent in found.items()] for part in range(3))
    return Handling(Affine.through(*driver), Affine.through(*broker), Affine.through(*beside))


def _spent(size: int, trips: int, private: PrivateBroker, speed: Speed | None) -> tuple[float, float, float]:
    """Seconds in a driver, in the broker, and what all processes compute for a message beyond its way."""
    with ExitStack() as stack:
        vhost = f"handling{next(_numbers)}"
        url = private.url(vhost)
        stack.callback(private.delete_vhost, vhost)
        far = url if speed is None else stack.enter_context(slowed(url, Speed()))
        works: dict[str, Work] = {"a": (_ask, (url, size, trips)), "b": (_answer, (far, size, trips))}
        found = together(works, 120.0)
    way_s, cpu_s, asking_s = found["a"]
    driver_s = min((asking_s + found["b"]) / 4, way_s / 2)  # of each message each of the two spends as much
    return driver_s, way_s - 2 * driver_s, max(0.0, cpu_s - way_s)


def _ask(url: str, size: int, trips: int) -> tuple[float, float, float]:
    """With cold caches: seconds each way, CPU seconds of the machine a message, and of this process a round trip."""
    end, body, other = transport.LinkEnd(url, "a", "classic"), bytes(size), np.ones(CACHES_BYTES, np.uint8)
    end.send(body)
    end.receive()  # both are connected
    before, own, elsewhere, ways = _machine_cpu_s(), time.process_time(), 0.0, []
    for _ in range(trips):
        began = time.thread_time()
        other.max()
        elsewhere += time.thread_time() - began
        asked = time.perf_counter()
        end.send(body)
        end.receive()
        ways.append((time.perf_counter() - asked) / 2)
    own = time.process_time() - own - elsewhere
    return median(ways), (_machine_cpu_s() - before - elsewhere) / (2 * trips), own / trips


def _answer(url: str, size: int, trips: int) -> float:
    """CPU seconds of this process a round trip."""
    end = transport.LinkEnd(url, "b", "classic")
    transport.answering(end, 1, row=0)
    began = time.process_time()
    transport.answering(end, trips, row=0)
    return (time.process_time() - began) / trips


def _machine_cpu_s() -> float:
    """Return the CPU time of all cores so far; nothing else should be running."""
    spent = [int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(spent) - spent[3] - spent[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


def predicted(workload: Workload, ways: Mapping[Speed | None, Handling]) -> dict[tuple[str, Speed | None], float]:
    """Milliseconds a step, by pipeline and link."""
    import torch

    torch.set_num_threads(1)
    job = job_of(workload, 1)
    files = {party: party_file(workload, party) for party in (*workload.feature_parties, LABEL)}
    importer = Importer()
    specs = {party: resolve(job, file, importer) for party, file in files.items()}
    tables = {party: read_table(spec.table) for party, spec in specs.items()}
    measured = measure(job, {party: spec.compute for party, spec in specs.items()}, tables)
    found = {}
    for speed in SPEEDS:
        link = Link(0.0 if speed is None else speed.rtt_ms, cores=cores())
        costs = costs_of(job, measured, Wire(), link, ways[speed])
        for order in ORDERS:
            found[order.name, speed] = played(job, costs, JobPipeline(**order.table)).step_s * 1e3
    return found


def compare(private: PrivateBroker, quick: bool) -> str:
    """Predicted and measured step times."""
    ways = {speed: handling(private, quick, speed) for speed in SPEEDS}
    rows = []
    for whole, steps in ((SMALL, 100), (W1, 60)):
        workload = replace(whole, rows=whole.batch * (12 if quick else steps))
        expected = together({"plan": (predicted, (workload, ways))}, 120.0)["plan"]
        variants = tuple(Variant("rabbitmq", order, speed=speed) for speed in SPEEDS for order in ORDERS)
        for variant, summary in run(Comparison(workload, variants, 1, repeats=1 if quick else 3), private).items():
            said, took = expected[variant.order.name, variant.speed], summary.middle(lambda run: run.step_ms)
            link = "loopback" if variant.speed is None else str(variant.speed)
            rows.append(
                (workload.name, variant.order.name, link, f"{said:.2f}", f"{took:.2f}", f"{said / took - 1:+.0%}")
            )
    within = sum(abs(float(row[3]) / float(row[4]) - 1) <= 0.2 for row in rows) / len(rows)
    goal = goals.line("share of predictions within 20 % of what was measured", within, 1.0, at_least=True)
    return f"{table(('', 'pipeline', 'link', 'predicted ms', 'measured ms', 'off by'), rows)}\n{goal}\n"
