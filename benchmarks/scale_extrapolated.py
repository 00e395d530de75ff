"""Extrapolation of the law to a run that nobody has measured: epoch, broker nodes, links, memory, disks, alignment."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from benchmarks.report import table
from benchmarks.scale_delays import ORDERS, Laws, of_many
from benchmarks.scale_report import Measured
from benchmarks.scale_rows import bytes_of_alignment
from benchmarks.scale_runs import BROKER
from sl_queue.checking.capacity import GIB, HEADER_BYTES, MEASURED

COLUMNS = 64  # of each party's table
EVERY = 50  # steps between two commits
COMPUTE_S = 0.02  # of a pass at a feature party, where delays are simulated
HOURS, MBIT = 3600.0, 8e-6
FAST_LINK = 10e9 / 8  # bytes a second of the label holder's link, for the alignment


@dataclass(frozen=True, slots=True)
class Whole:
    """The run that is extrapolated to."""

    parties: int  # feature parties
    rows: int


@dataclass(frozen=True, slots=True)
class Design:
    """A choice of what crosses."""

    batch: int
    cut: int
    item_bytes: int = 4

    def __str__(self) -> str:
        return f"batch {self.batch:,}, cut {self.cut}, float{8 * self.item_bytes}"


DESIGNS = (
    Design(1024, 64),
    Design(8192, 64),
    Design(8192, 64, 2),
    Design(8192, 8, 2),
    Design(65536, 8, 2),
    Design(8192, 4096, 2),
)


@dataclass(frozen=True, slots=True)
class Needs:
    """Needs of a design."""

    bytes: float  # a step
    step_s: float
    epoch_h: float
    cores: float  # of brokers, at that pace
    window: float  # bytes until a commit

    @property
    def nodes(self) -> int:
        return max(1, ceil(self.cores / (MEASURED.busy * MEASURED.cores)))


def needs(laws: Laws, whole: Whole, design: Design) -> Needs:
    """Apply the law at the label holder's pace: one process handles the messages of all."""
    messages = 2 * whole.parties
    size = messages * (float(design.batch) * design.cut * design.item_bytes + HEADER_BYTES)
    step_s = laws.label({"messages": messages, "bytes": size, "steps": 1.0})
    seconds = (whole.parties + 2) * step_s
    causes = {"messages": messages, "bytes": size, "connection seconds": seconds, "seconds": step_s}
    cores = laws.broker(causes) / step_s
    return Needs(size, step_s, whole.rows / design.batch * step_s / HOURS, cores, size * EVERY)


def extrapolated(measured: Measured, laws: Laws, whole: Whole) -> Iterator[str]:
    """Yield the parts of the report that nobody has measured."""
    most = max(each.case.parties for each in measured.found), max(each.rows for each in measured.of_rows)
    yield (
        f"### Extrapolated: {whole.parties} feature parties and {whole.rows:,} rows\n\n"
        f"Nothing below was measured: it is the law, {whole.parties / most[0]:.1f} times as many parties and "
        f"{whole.rows / most[1]:,.0f} times as many rows as were. Models are left out: theirs comes on top.\n\n"
        f"{_designs(measured, laws, whole)}"
    )
    yield f"### Extrapolated: tables, memory and alignment\n\n{_tables(measured, laws, whole)}"
    yield f"### Simulated: {whole.parties} feature parties whose delays differ\n\n{_simulated(laws, whole)}"


def _designs(measured: Measured, laws: Laws, whole: Whole) -> str:
    rows = []
    for design in DESIGNS:
        need = needs(laws, whole, design)
        mbit = MBIT * need.bytes / need.step_s
        rows.append(
            (
                design, f"{need.bytes / 1e6:,.1f}", f"{1e3 * need.step_s:,.0f}", _short(need.epoch_h),
                f"{need.cores:.1f}", need.nodes, f"{mbit / 2 / whole.parties:,.0f}", f"{mbit / 2:,.0f}",
                f"{need.window / GIB:,.1f}", max(1, int(MEASURED.memory_bytes / need.bytes)),
            )
        )  # fmt: skip
    head = (
        "", "MB a step", "ms a step, label holder", "hours an epoch", "broker cores", "broker nodes",
        "Mbit/s each way, a party's link", "Mbit/s each way, label holder's link", f"GiB at the broker, {EVERY} steps",
        "steps between commits that fit a node",
    )  # fmt: skip
    about = (
        "The pace is the label holder's: one process handles the messages of all parties, and staleness hides all "
        f"other times. A broker node has {MEASURED.cores} cores as here, in use by {MEASURED.busy:.0%} for long, and "
        f"{MEASURED.memory_bytes / GIB:.1f} GiB for messages. The label holder's connection ends at one node, which so "
        "carries all of its bytes, however many nodes there are; copies of quorum queues are left out, and so is the "
        "rounding to float16.\n\n"
    )
    return f"{about}{table(head, rows)}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _tables(measured: Measured, laws: Laws, whole: Whole) -> str:
    last, parties = measured.of_rows[-1], whole.parties + 1
    each = whole.rows / last.rows
    per = measured.memory.each
    column_bytes = whole.rows * COLUMNS * 4
    masks_s, sent = whole.rows * measured.masks.of_party(parties), bytes_of_alignment(parties, whole.rows)
    few, many = measured.aligned[:2]  # of two parties both: what more ids take more
    memory = max(0.0, (many.memory * many.ids - few.memory * few.ids) / (many.ids - few.ids))
    broker_h = sent * measured.laws[BROKER].each["bytes"] / HOURS
    two = whole.rows * measured.masks.of_party(2)
    connections = parties + 1
    rows = [
        ("broker, memory of connections and queues, GiB", f"{connections * per['connections'] / GIB:.2f}"),
        ("broker, open files", f"{connections * measured.files.each['connections']:,.0f}"),
        ("scheduler, cores", f"{connections * measured.laws['scheduler'].each['connection seconds']:.2f}"),
        ("start of a party, CPU hours", f"{last.start_s * each / HOURS:.2f}"),
        ("order of an epoch at each party, CPU hours", f"{last.order_s * each / HOURS:.2f}"),
        ("memory of a party with one column, GiB", f"{last.peak * each / GIB:,.0f}"),
        (
            f"disk for a mapped table of {COLUMNS} float32 columns and ids, GiB",
            f"{(column_bytes + 8 * whole.rows) / GIB:,.0f}",
        ),
        ("PSI of all parties, CPU hours at each party", f"{masks_s / HOURS:,.0f}"),
        ("PSI of all parties, TB through the broker", f"{sent / 1e12:,.1f}"),
        ("PSI of all parties, broker CPU hours for these bytes", f"{broker_h:,.0f}"),
        ("PSI of all parties, hours of 10 Gbit/s at the label holder", f"{sent / FAST_LINK / HOURS:,.0f}"),
        ("PSI of two parties, memory of a party, GiB", f"{memory * whole.rows / GIB:,.0f}"),
        ("PSI, a party's state folder, GiB", f"{many.disk * whole.rows / GIB:,.1f}"),
        ("PSI of two parties, CPU hours at each", f"{two / HOURS:,.0f}"),
        ("PSI of two parties, TB through the broker", f"{bytes_of_alignment(2, whole.rows) / 1e12:.2f}"),
    ]
    return table(("", "needs"), rows)


def _simulated(laws: Laws, whole: Whole) -> str:
    rows = [
        (name, *(f"{1e3 * step_s:.0f}" for step_s in times))
        for name, times in of_many(laws, whole.parties, 1024, 64, COMPUTE_S)
    ]
    head = ("round trip of the parties' links", *(f"{order.name}, ms a step" for order in ORDERS))
    about = (
        f"Batch 1,024, cut 64; each feature party computes {1e3 * COMPUTE_S:.0f} ms forwards and as long backwards on "
        "cores of its own; costs of messages by the law.\n\n"
    )
    return f"{about}{table(head, rows)}"
