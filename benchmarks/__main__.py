"""`python -m benchmarks NAME...`: all of them by default; results go to benchmarks/results."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import bytes as fewer_bytes
from benchmarks import (
    goals,
    hands,
    ideal,
    messages,
    overheads,
    parties,
    planner,
    privacy,
    processes,
    psi,
    report,
    restart,
    scale,
    serve_killed,
    serving,
    tables,
    trace,
    training,
    transport,
)
from benchmarks.training import Variant
from sl_queue.testing.private_broker import PrivateBroker

YARDSTICK = Variant("joined")

Benchmark = Callable[[PrivateBroker, bool, Path], list[str]]


def _training(broker: PrivateBroker, quick: bool, folder: Path) -> list[str]:
    return _compared(broker, training.side_by_side(quick), YARDSTICK, folder / "training.png", goals.training)


def _links(broker: PrivateBroker, quick: bool, folder: Path) -> list[str]:
    return _compared(broker, training.over_links(quick), None, folder / "links.png", goals.links)


def _compared(
    broker: PrivateBroker,
    comparisons: list[training.Comparison],
    yardstick: Variant | None,
    plot: Path,
    wanted: Callable[[goals.Found], Iterator[str]],
) -> list[str]:
    found = [(comparison, training.run(comparison, broker)) for comparison in comparisons]
    report.plot(plot, found)
    parts = [
        report.training(comparison, summaries, ideal.bubbles(comparison.workload, comparison.variants), yardstick)
        for comparison, summaries in found
    ]
    return [*parts, f"![ms a step]({plot.name})\n", goals.listed(wanted(found))]


BENCHMARKS: dict[str, tuple[str, Benchmark]] = {
    "training": ("Training side by side", _training),
    "links": ("Training over slow links", _links),
    "trace": ("A step of lock-step, hop by hop", trace.compare),
    "messages": ("What messages cost", lambda broker, quick, _: messages.compare(broker, quick)),
    "transport": ("The way of a message", lambda broker, quick, _: [transport.compare(broker, quick)]),
    "wire": ("Fewer bytes", lambda broker, quick, _: [fewer_bytes.compare(broker, quick)]),
    "plan": ("Predicted and measured", lambda broker, quick, _: [planner.compare(broker, quick)]),
    "parties": ("Many parties", lambda broker, quick, _: parties.compare(broker, quick)),
    "scale": ("How a run grows", scale.compare),
    "hands": ("One party, many workers", lambda broker, quick, _: hands.compare(broker, quick)),
    "tables": ("A party's table", lambda _, quick, __: list(tables.run(quick))),
    "psi": ("Alignment of rows", lambda broker, quick, _: list(psi.run(broker, quick))),
    "serve": ("A service", lambda broker, quick, _: serving.compare(broker, quick)),
    "restart": ("A killed worker's next step", lambda broker, quick, _: restart.compare(broker, quick)),
    "watch": ("A run that is watched", lambda broker, quick, _: overheads.watch(broker, quick)),
    "meter": ("A run that measures what leaks", lambda broker, quick, _: overheads.meter(broker, quick)),
    "privacy": ("Defences of labels", lambda _, quick, __: ["\n".join(privacy.compare(quick))]),
}


def main() -> None:
    """Run the benchmarks that are named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; into quick/")
    parser.add_argument(
        "--minutes", type=float, help="with serve: a load of so long, in which a process is killed every minute"
    )
    parser.add_argument("--ids", type=int, help="with psi: ids of each party, in the place of 100,000")
    parser.add_argument("--openmined", help="with psi: a Python whose environment has openmined-psi, to compare with")
    given = parser.parse_args()
    unknown = set(given.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    folder = report.RESULTS / "quick" if given.quick else report.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    processes.start()
    with PrivateBroker() as broker:
        if given.minutes is not None:
            if given.names != ["serve"]:
                parser.error("--minutes goes with serve alone")
            found = serve_killed.compare(broker, given.minutes)
            report.write(folder / "serve_killed.md", "A service whose processes are killed", found)
            return
        if given.ids is not None or given.openmined is not None:
            if given.names != ["psi"]:
                parser.error("--ids and --openmined go with psi alone")
            found = list(psi.run(broker, given.quick, given.ids, given.openmined))
            report.write(folder / "psi.md", BENCHMARKS["psi"][0], found)
            return
        for name in given.names or BENCHMARKS:
            title, benchmark = BENCHMARKS[name]
            report.write(folder / f"{name}.md", title, benchmark(broker, given.quick, folder))


if __name__ == "__main__":
    main()
