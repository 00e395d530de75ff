"""Private set intersection over RabbitMQ, against processes that only hash and multiply, and against openmined-psi.

Half of each party's ids are shared. Every party, the scheduler too, is a process of its own. Seconds of CPUs are those
of all parties, of the scheduler and of the broker: unlike those of the clock, other load hardly changes them.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import goals, processes
from benchmarks.report import table
from sl_queue.testing.private_broker import PrivateBroker

IDS, QUICK_IDS, WARM_UP = 100_000, 4_000, 200  # a side
MOST_GROWTH = 2.1  # of twice as many ids
MOST_TIME = 1.25  # of the multiplications alone
MOST_BYTES = 200.0  # an id
LIMIT_S = 3600.0
_NAMES = ("label", "one", "two")


def ids_of(party: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Make the ids of a party: half of them its own, half shared by all, in no order."""
    half = count // 2
    own = 10_000_000 * (party + 1) + np.arange(count - half)
    return np.random.default_rng(party).permutation(np.concatenate([np.arange(half), own]))


def mask_only(party: int, count: int, others: int) -> dict[str, float]:
    """Hash and multiply as one party of an alignment does, and do nothing else; returns the seconds."""
    from sl_queue.security.masking import MaskKeys

    texts = [f"integer {number}".encode() for number in ids_of(party, count)]
    keys = MaskKeys.generate(others + 1)
    began, computed = time.monotonic(), time.process_time()
    own = keys.own(texts, 0)
    for _ in range(others):
        keys.masked(own)
    keys.finished(own)
    return {"seconds": time.monotonic() - began, "cpu": time.process_time() - computed}


def take_part(party: int, count: int, names: Sequence[str], url: str, folder: str) -> dict[str, float]:
    """Align as a party's worker does; returns the seconds, and the peak of memory an id."""
    from sl_queue.config.job import PartyFile
    from sl_queue.config.resolve import table_spec
    from sl_queue.config.user_code import Importer
    from sl_queue.data.spec import Rows
    from sl_queue.launch.alignment import align_party
    from sl_queue.launch.connect import connector
    from sl_queue.launch.workplace import Workplace

    name, told = names[party], dict[str, float]()
    for size in (WARM_UP, count):  # first a small one, so that libraries are loaded and connections known
        job, state = job_of(names, size), Path(folder) / f"{name}-{size}"
        state.mkdir()
        rows = Rows(ids_of(party, size), np.zeros((size, 1), np.float32), np.zeros(size))
        spec = table_spec(job, PartyFile(party=name, data=rows), Importer())
        Path("/proc/self/clear_refs").write_text("5")
        before, began, computed = _status("VmRSS:"), time.monotonic(), time.process_time()
        found = align_party(job, spec, Workplace(connector(job, url), state))
        assert found is not None and len(found.positions) == size // 2
        told = {"seconds": time.monotonic() - began, "cpu": time.process_time() - computed}
        told["bytes"] = (_status("VmHWM:") - before) / size
    return told


def compare_sets(count: int, names: Sequence[str], url: str, folder: str) -> dict[str, float]:
    """Align as the scheduler does; returns its peak of memory an id of one party."""
    from sl_queue.launch.alignment import align_scheduler
    from sl_queue.launch.connect import connector
    from sl_queue.launch.workplace import Workplace

    told = dict[str, float]()
    for size in (WARM_UP, count):
        job, state = job_of(names, size), Path(folder) / f"scheduler-{size}"
        state.mkdir()
        before, computed = _status("VmRSS:"), time.process_time()
        align_scheduler(job, Workplace(connector(job, url), state), lambda _: None)
        told = {"bytes": (_status("VmHWM:") - before) / size, "cpu": time.process_time() - computed}
    return told


def job_of(names: Sequence[str], count: int) -> Any:
    """Return a job that aligns the rows of these parties, the first of which holds the labels."""
    from sl_queue.config.job import Job

    parties = {name: {"role": "feature", "cut": [1]} for name in names[1:]}
    return Job(
        name=f"psi-{count}-{len(names)}", seed=7, epochs=1, batch_size=16,
        parties={names[0]: {"role": "label", "cut": [1]}, **parties}, alignment={"method": "psi", "pad": 1},
    )  # fmt: skip


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass(frozen=True, slots=True)
class Measured:
    """One alignment, and the same hashes and multiplications by processes that do nothing else."""

    parties: int
    ids: int  # a side
    alone_s: float
    took_s: float
    alone_cpu_s: float
    cpu_s: float
    bytes: float  # at the party that needs most, an id
    scheduler_bytes: float

    @property
    def ratio(self) -> float:
        """Seconds of all CPUs, of those that the multiplications take."""
        return self.cpu_s / self.alone_cpu_s


def _measured(names: Sequence[str], count: int, broker: PrivateBroker) -> Measured:
    """Measure one after the other, both in as many processes at the same time as there are parties."""
    works: dict[str, processes.Work] = {
        name: (mask_only, (place, count, len(names) - 1)) for place, name in enumerate(names)
    }
    alone = processes.together(works, LIMIT_S).values()
    url, before = broker.url(f"psi-{count}-{len(names)}"), _broker_cpu_s(broker)
    with TemporaryDirectory(prefix="sl_queue-psi-") as folder:
        works = {name: (take_part, (place, count, names, url, folder)) for place, name in enumerate(names)}
        works["scheduler"] = (compare_sets, (count, names, url, folder))
        found = processes.together(works, LIMIT_S)
    cpu_s = sum(one["cpu"] for one in found.values()) + _broker_cpu_s(broker) - before
    parties = [found[name] for name in names]
    return Measured(
        len(names), count, max(one["seconds"] for one in alone), max(one["seconds"] for one in parties),
        sum(one["cpu"] for one in alone), cpu_s, max(one["bytes"] for one in parties), found["scheduler"]["bytes"],
    )  # fmt: skip


def _broker_cpu_s(broker: PrivateBroker) -> float:
    return int(broker.evaluate("element(1, erlang:statistics(runtime))")) / 1000


def _openmined(python: str | None, count: int) -> dict[str, float] | None:
    """Have openmined-psi find the same shared ids, in two processes; None where it is not installed."""
    command = [python or sys.executable, str(Path(__file__).with_name("openmined.py")), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode == 3:
        return None
    if done.returncode:
        raise RuntimeError(f"openmined-psi failed: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run(broker: PrivateBroker, quick: bool, ids: int | None = None, python: str | None = None) -> Iterator[str]:
    """Measure two parties and three, each beside the multiplications alone; yields the parts of the report.

    `ids`: of a side. `python`: an interpreter whose environment has openmined-psi.
    """
    most = ids or (QUICK_IDS if quick else IDS)
    yield f"Hashes by {'gmpy2' if find_spec('gmpy2') else 'Python alone, without gmpy2'}.\n"
    found = [
        _measured(_NAMES[:n], count, broker) for n, count in ((2, most // 2), (2, most), (3, most // 4), (3, most // 2))
    ]
    head = (
        "parties", "ids a side", "alone, s", "alignment, s", "alone, CPU s", "alignment, CPU s", "ratio of CPU s",
        "bytes an id at a party", "at the scheduler",
    )  # fmt: skip
    yield table(head, [_cells(one) for one in found])
    half, two, three_half, three = found
    yield (
        "Part of the peak is messages on their way, which do not grow with a set. From the smaller set to the larger "
        f"one each further id takes a party {_further(half, two):.0f} bytes with two parties and "
        f"{_further(three_half, three):.0f} with three.\n"
    )
    other = _openmined(python, most)
    if other is None:
        yield (
            "openmined-psi is not installed here: `python -m venv DIR && DIR/bin/pip install openmined-psi`, and "
            "`--openmined DIR/bin/python` compares with it\n"
        )
    else:
        yield (
            f"openmined-psi, two processes and a pipe between them, {most:,} ids a side: {other['seconds']:.1f} s, "
            f"{other['cpu']:.1f} CPU s\n"
        )
    yield goals.listed(_goals(found, other))


def _cells(one: Measured) -> tuple[str, ...]:
    seconds = (f"{value:.1f}" for value in (one.alone_s, one.took_s, one.alone_cpu_s, one.cpu_s))
    return (
        str(one.parties), f"{one.ids:,}", *seconds, f"{one.ratio:.2f}", f"{one.bytes:.0f}",
        f"{one.scheduler_bytes:.0f}",
    )  # fmt: skip


def _further(small: Measured, large: Measured) -> float:
    """Return the bytes by which each further id raises the peak of a party."""
    return (large.bytes * large.ids - small.bytes * small.ids) / (large.ids - small.ids)


def _goals(found: Sequence[Measured], other: Mapping[str, float] | None) -> Iterator[str]:
    half, two, three_half, three = found
    yield goals.line("CPU seconds of two parties, to those of hashing and multiplying", two.ratio, MOST_TIME)
    if other is not None:
        yield goals.line("CPU seconds of two parties, to those of openmined-psi", two.cpu_s / other["cpu"], 1.0)
    further = max(_further(half, two), _further(three_half, three))
    yield goals.line("peak of a party", max(two.bytes, three.bytes), MOST_BYTES, unit=" bytes an id")
    yield goals.line("peak of a party, of each further id", further, MOST_BYTES, unit=" bytes an id")
    yield goals.line("CPU seconds of twice the ids, two parties", two.cpu_s / half.cpu_s, MOST_GROWTH)
    yield goals.line("CPU seconds of twice the ids, three parties", three.cpu_s / three_half.cpu_s, MOST_GROWTH)
    yield goals.line("CPU seconds of three parties, to hashing and multiplying", three.ratio, MOST_TIME)
