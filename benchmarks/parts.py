"""Count and size of the packages that the installed product is made of: `python -m benchmarks.parts`.

It follows the run-time dependencies of pyproject.toml through what is installed here; tests, tools and benchmarks do
not count.
"""

import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MOST_PACKAGES = 36
MOST_BYTES = 1_200_000_000  # with a torch without CUDA

Parts = dict[str, int]  # bytes by package


def measure_parts() -> Parts:
    """Return the size of every package that an installation without extras needs, the product's own first."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: Parts = {"sl-queue": sum(path.stat().st_size for path in (ROOT / "sl_queue").rglob("*") if path.is_file())}
    waiting = [Requirement(line) for line in declared]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name not in found:
            part = distribution(name)
            found[name] = size_of(part)
            waiting += [need for need in map(Requirement, part.requires or ()) if needed(need, wanted.extras)]
    return found


def needed(requirement: Requirement, extras: set[str]) -> bool:
    """Return True for a requirement of this platform, without extras or with one of these."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def size_of(part: Distribution) -> int:
    """Add up the files of a package."""
    paths = (Path(str(part.locate_file(file))) for file in part.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parts = measure_parts()
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{len(parts)} packages of at most {MOST_PACKAGES}, {sum(parts.values()) / 1e9:.2f} of {MOST_BYTES / 1e9} GB")


if __name__ == "__main__":
    main()
