"""Private set intersection over RabbitMQ, against processes that do nothing but the same multiplications.

Half of each party's ids are shared. Every party, the scheduler too, is a process of its own.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import goals, processes
from benchmarks.report import machine, table
from sl_queue.testing.private_broker import PrivateBroker

IDS, QUICK_IDS, WARM_UP = 100_000, 4_000, 200  # a side
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
    """Do the multiplications of one party of an alignment, and nothing else; returns the seconds."""
    from sl_queue.security.masking import MaskKeys

    texts = [f"integer {number}".encode() for number in ids_of(party, count)]
    keys = MaskKeys.generate(others + 1)
    began = time.monotonic()
    own = keys.own(texts, 0)
    for _ in range(others):
        keys.masked(own)
    keys.finished(own)
    return {"seconds": time.monotonic() - began}


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
        before, began = _status("VmRSS:"), time.monotonic()
        found = align_party(job, spec, Workplace(connector(job, url), state))
        assert found is not None and len(found.positions) == size // 2
        told = {"seconds": time.monotonic() - began, "bytes": (_status("VmHWM:") - before) / size}
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
        before = _status("VmRSS:")
        align_scheduler(job, Workplace(connector(job, url), state), lambda _: None)
        told = {"bytes": (_status("VmHWM:") - before) / size}
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


def _aligned(names: Sequence[str], count: int, url: str) -> Mapping[str, Any]:
    with TemporaryDirectory(prefix="sl_queue-psi-") as folder:
        works: dict[str, processes.Work] = {
            name: (take_part, (place, count, names, url, folder)) for place, name in enumerate(names)
        }
        works["scheduler"] = (compare_sets, (count, names, url, folder))
        return processes.together(works, LIMIT_S)


def _alone(names: Sequence[str], count: int) -> float:
    works: dict[str, processes.Work] = {
        name: (mask_only, (place, count, len(names) - 1)) for place, name in enumerate(names)
    }
    found = processes.together(works, LIMIT_S)
    return max(float(one["seconds"]) for one in found.values())


def run(broker: PrivateBroker, quick: bool) -> Iterator[str]:
    """Measure two parties and three, each beside the multiplications alone; yields the parts of the report."""
    most = QUICK_IDS if quick else IDS
    yield f"{machine()}\n"
    lines, found = [], {}
    for names, count in ((_NAMES[:2], most // 2), (_NAMES[:2], most), (_NAMES, most // 2)):
        alone, together = _alone(names, count), _aligned(names, count, broker.url(f"psi-{count}-{len(names)}"))
        parties = [together[name] for name in names]
        seconds, peak = max(one["seconds"] for one in parties), max(one["bytes"] for one in parties)
        found[len(names), count] = seconds, alone, peak
        lines.append(
            (
                len(names), f"{count:,}", f"{alone:.1f}", f"{seconds:.1f}", f"{seconds / alone:.2f}", f"{peak:.0f}",
                f"{together['scheduler']['bytes']:.0f}",
            )
        )  # fmt: skip
    head = (
        "parties", "ids a side", "multiplications alone, s", "alignment, s", "ratio", "bytes an id at a party",
        "at the scheduler",
    )  # fmt: skip
    yield table(head, lines)
    seconds, alone, peak = found[2, most]
    yield goals.listed(
        iter(
            [
                goals.line("alignment of two parties, to its multiplications", seconds / alone, MOST_TIME),
                goals.line("peak of a party", peak, MOST_BYTES, unit=" bytes an id"),
            ]
        )
    )
