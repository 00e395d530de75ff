"""Costs of rows: a party's start and memory by the number of its rows, and the alignment of their ids."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import psi
from benchmarks.processes import Work, together
from benchmarks.scale_runs import LIMIT_S
from benchmarks.scale_watch import broker_pid, cpu_of, memory_of
from sl_queue.protocol.alignment import POINT_BYTES, Ring
from sl_queue.testing.private_broker import PrivateBroker

STEPS = 20
BATCH = 4096
CUT = 8
SAMPLE = 1000  # ids that are masked to measure an id


@dataclass(frozen=True, slots=True)
class OfRows:
    """A feature party with so many rows of one column."""

    rows: int
    start_s: float  # processor seconds until it has joined
    step_s: float  # and of a step
    order_s: float  # and of an epoch's order
    peak: float  # bytes of memory more than before


def of_rows(rows: int) -> OfRows:
    """Read so many rows and do a few forward passes, in a process of its own."""
    found: OfRows = together({"rows": (_train, (rows,))}, LIMIT_S)["rows"]
    return found


def _train(rows: int) -> OfRows:
    from benchmarks.scale_runs import Base
    from sl_queue.compute.base_stage import base_stage
    from sl_queue.config.job import Job
    from sl_queue.config.party import PartyFile
    from sl_queue.config.resolve import resolve
    from sl_queue.config.user_code import Importer
    from sl_queue.data.spec import Rows
    from sl_queue.data.table import read_table
    from sl_queue.protocol.messages import MicroBatch
    from sl_queue.protocol.schedule.row_order import row_order

    parties = {"label": {"role": "label"}, "party": {"role": "feature", "cut": [CUT]}}
    job = Job(name="rows", seed=7, epochs=2, batch_size=BATCH, parties=parties)
    column = np.random.default_rng(3).standard_normal((rows, 1), np.float32)
    base = {"model": Base, "args": {"cut": CUT}, "optimizer": {"name": "sgd", "lr": 0.01}}
    file = PartyFile(party="party", data=Rows(np.arange(rows), column, None), threads=1, base=base)
    before = memory_of(os.getpid())
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    spec = resolve(job, file, Importer())
    table = read_table(spec.table)
    batches = job.batches(table.n_rows)
    stage = base_stage(spec.compute, table, batches)
    stage.forward(MicroBatch(0, 0))
    joined = time.process_time()
    for step in range(1, min(STEPS, batches.steps_per_epoch)):
        stage.prepare(MicroBatch(step, 0))
        stage.forward(MicroBatch(step, 0))
    stepped = time.process_time()
    row_order(batches.training_rows, 7, 1)
    ordered = time.process_time()
    peak = memory_of(os.getpid(), "VmHWM:") - before
    steps = max(1, min(STEPS, batches.steps_per_epoch) - 1)
    return OfRows(rows, joined - began, (stepped - joined) / steps, ordered - stepped, peak)


# Alignment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MaskCosts:
    """Processor seconds of one id."""

    own: float  # hashed to a point, and multiplied
    masked: float  # of another party's
    finished: float  # of the own ones that came back

    def of_party(self, parties: int) -> float:
        """Return the processor seconds of one id of every party, at one party."""
        return self.own + (parties - 1) * self.masked + (self.finished if parties > 2 else 0.0)


def mask_costs() -> MaskCosts:
    """Measure the multiplications of an id."""
    from sl_queue.security.masking import MaskKeys

    texts = [f"integer {number}".encode() for number in range(SAMPLE)]
    keys, moments = MaskKeys.generate(3), [time.process_time()]
    own = keys.own(texts, 0)
    moments.append(time.process_time())
    keys.masked(own)
    moments.append(time.process_time())
    keys.finished(own)
    moments.append(time.process_time())
    one, two, three = (float(each) / SAMPLE for each in np.diff(moments))
    return MaskCosts(one, two, three)


def hops(parties: int) -> int:
    """Count the stretches that the chunks of all sets travel; each passes through the broker once."""
    names = tuple(f"party{number}" for number in range(parties - 1))
    return sum(map(len, Ring("label", names).routes.values()))


def bytes_of_alignment(parties: int, rows: float) -> float:
    """Return the bytes that an alignment of so many ids a party sends through the broker, headers left out."""
    return hops(parties) * rows * POINT_BYTES


@dataclass(frozen=True, slots=True)
class Aligned:
    """An alignment of so many parties and ids a side, beside what its law says."""

    parties: int
    ids: int
    cpu_s: float  # of the busiest party
    law_s: float
    broker_s: float
    memory: float  # bytes an id, at the party that takes most
    disk: float  # bytes an id, of a party's state folder


def align(private: PrivateBroker, parties: int, ids: int, costs: MaskCosts) -> Aligned:
    """Align that many parties over a broker."""
    names = ("label", *(f"party{number}" for number in range(parties - 1)))
    vhost = f"scale-psi-{parties}-{ids}"
    url, pid = private.url(vhost), broker_pid(private)
    before = cpu_of(pid)
    with TemporaryDirectory(prefix="sl_queue-scale-") as folder:
        works: dict[str, Work] = {
            name: (_aligning, (place, ids, names, url, folder)) for place, name in enumerate(names)
        }
        works["scheduler"] = (psi.compare_sets, (ids, names, url, folder))
        found: Mapping[str, Any] = together(works, LIMIT_S)
    private.delete_vhost(vhost)
    cpu_s, memory, disk = (max(float(found[name][place]) for name in names) for place in range(3))
    law_s = (ids + psi.WARM_UP) * costs.of_party(parties)
    return Aligned(parties, ids, cpu_s, law_s, cpu_of(pid) - before, memory, disk)


def _aligning(party: int, ids: int, names: Sequence[str], url: str, folder: str) -> tuple[float, float, float]:
    """Return processor seconds, and bytes of memory and of the state folder an id."""
    began = time.process_time()
    peak = psi.take_part(party, ids, names, url, folder)["bytes"]
    spent = time.process_time() - began
    state = Path(folder) / f"{names[party]}-{ids}"
    return spent, peak, sum(path.stat().st_size for path in state.rglob("*") if path.is_file()) / ids
