"""Exits 0 if the worker whose metrics are at [HOST:]PORT is healthy: alive, and connected to its broker."""

import argparse
import sys
import urllib.error
import urllib.request

from sl_queue.config.environment import METRICS
from sl_queue.launch.process import leaving

TIMEOUT_S = 10.0


def complaint(address: str) -> str | None:
    """Say why the worker there is not healthy; None if it is."""
    host, _, port = address.rpartition(":")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
    try:
        with direct.open(f"http://{host or '127.0.0.1'}:{port}/health", timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return error.read(1000).decode(errors="replace").strip()
    except (OSError, ValueError) as error:
        return f"it does not answer at {address}: {error}"


def main() -> None:
    """Ask the metrics server whether the worker is ready, and exit accordingly."""
    with leaving():
        default = METRICS.read()
    parser = argparse.ArgumentParser(prog="python -m workers.health", description=__doc__)
    parser.add_argument("address", nargs="?", default=default, help=f"default: {METRICS.name}")
    address = parser.parse_args().address
    if address is None:
        parser.error(f"no address is given, and {METRICS.name} is not set")
    found = complaint(address)
    if found is not None:
        print(f"not healthy: {found}")
    sys.exit(0 if found is None else 1)


if __name__ == "__main__":
    main()
