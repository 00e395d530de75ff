"""Whether the worker whose metrics are at [HOST:]PORT is alive: exits 0 if it is, for container health checks."""

import argparse
import os
import re
import sys
import urllib.request

from workers.entry import METRICS

SILENT_S = 60.0  # a pulse beats several times a second


def is_alive(address: str) -> bool:
    """Whether it answers, and its channel's own thread has been running lately."""
    host, _, port = address.rpartition(":")
    try:
        with urllib.request.urlopen(f"http://{host or '127.0.0.1'}:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return False
    beat = re.search(r"^sl_queue_pulse_age_seconds (\S+)", text, re.MULTILINE)
    return beat is None or float(beat[1]) < SILENT_S


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(prog="python -m workers.health", description=__doc__)
    parser.add_argument("address", nargs="?", default=os.environ.get(METRICS), help=f"default: {METRICS}")
    address = parser.parse_args().address
    if address is None:
        parser.error(f"no address is given, and {METRICS} is not set")
    sys.exit(0 if is_alive(address) else 1)


if __name__ == "__main__":
    main()
