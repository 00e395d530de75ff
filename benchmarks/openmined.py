"""The intersection of two sets of ids by openmined-psi, in two processes; run by an interpreter that has the package.

    python benchmarks/openmined.py COUNT

Writes the seconds and the CPU seconds of both as JSON. Exits with 3 if the package is not there.
"""

import json
import multiprocessing
import random
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection

PACKAGE = "private_set_intersection.python"


def ids_of(party: int, count: int) -> list[str]:
    """Make the ids of a party: half of them its own, half shared, in no order."""
    half = count // 2
    own = [10_000_000 * (party + 1) + number for number in range(count - half)]
    found = [str(number) for number in [*range(half), *own]]
    random.Random(party).shuffle(found)
    return found


def serve(pipe: Connection, count: int) -> None:
    """Answer as the server does."""
    psi = import_module(PACKAGE)

    ids, began = ids_of(0, count), time.process_time()
    server = psi.server.CreateWithNewKey(True)
    setup = server.CreateSetupMessage(1e-9, count, ids, psi.DataStructure.RAW).SerializeToString()
    request = psi.Request()
    request.ParseFromString(pipe.recv_bytes())
    response = server.ProcessRequest(request).SerializeToString()
    pipe.send_bytes(setup)
    pipe.send_bytes(response)
    pipe.send(time.process_time() - began)


def main(count: int) -> None:
    """Ask as the client does, and write what it took."""
    psi = import_module(PACKAGE)

    ids = ids_of(1, count)
    mine, theirs = multiprocessing.Pipe()
    began, computed = time.monotonic(), time.process_time()
    process = multiprocessing.Process(target=serve, args=(theirs, count))
    process.start()
    client = psi.client.CreateWithNewKey(True)
    mine.send_bytes(client.CreateRequest(ids).SerializeToString())
    setup, response = psi.ServerSetup(), psi.Response()
    setup.ParseFromString(mine.recv_bytes())
    response.ParseFromString(mine.recv_bytes())
    shared = client.GetIntersection(setup, response)
    assert len(shared) == count // 2, len(shared)
    seconds, own = time.monotonic() - began, time.process_time() - computed
    print(json.dumps({"seconds": seconds, "cpu": own + mine.recv()}))
    process.join()


if __name__ == "__main__":
    if find_spec(PACKAGE.partition(".")[0]) is None:
        sys.exit(3)
    main(int(sys.argv[1]))
