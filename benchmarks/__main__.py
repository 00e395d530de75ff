"""`python -m benchmarks NAME...`: all of them by default; results go to benchmarks/results."""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import processes, report, training
from benchmarks.training import Variant

YARDSTICK = Variant("joined")


def _training(quick: bool, folder: Path) -> None:
    _compare(folder, "training", "Training side by side", training.side_by_side(quick), YARDSTICK, 1 if quick else 3)


def _links(quick: bool, folder: Path) -> None:
    _compare(folder, "links", "Training over slow links", training.over_links(quick), None, 1 if quick else 3)


def _compare(
    folder: Path,
    name: str,
    title: str,
    comparisons: list[training.Comparison],
    yardstick: Variant | None,
    repeats: int,
) -> None:
    with training.broker() as broker:
        found = [(comparison, training.run(comparison, repeats, broker)) for comparison in comparisons]
    plot = report.plot(folder, name, found)
    parts = [report.training(comparison, summaries, yardstick) for comparison, summaries in found]
    report.write(folder, name, title, [*parts, f"![{title}]({plot.name})\n"])


BENCHMARKS: dict[str, Callable[[bool, Path], None]] = {
    "training": _training,
    "links": _links,
}


def main() -> None:
    """Run the benchmarks that are named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that everything runs; results in quick/"
    )
    given = parser.parse_args()
    unknown = set(given.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    folder = report.RESULTS / "quick" if given.quick else report.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    processes.start()
    for name in given.names or BENCHMARKS:
        BENCHMARKS[name](given.quick, folder)


if __name__ == "__main__":
    main()
