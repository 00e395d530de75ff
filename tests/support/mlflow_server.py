"""A real MLflow server of a test's own, over SQLite: the flask application of mlflow-skinny."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sl_queue.testing.private_broker import free_ports

START_S = 90.0  # it imports half a second of libraries, and makes its tables
SERVE = "import sys; from mlflow.server import app; app.run(port=int(sys.argv[1]))"


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Yield the URL of a server that keeps its runs in that folder."""
    (port,) = free_ports(1)
    environ = {
        **os.environ,
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder / "artifacts"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    log = folder / "mlflow.log"
    with (
        log.open("w") as out,
        subprocess.Popen((sys.executable, "-c", SERVE, str(port)), env=environ, stdout=out, stderr=out) as process,
    ):
        try:
            _await(f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _await(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            ask(url, "experiments/get-by-name", experiment_name="Default")  # makes its tables
            return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)


def ask(url: str, path: str, **query: str) -> dict[str, Any]:
    """Read something from a server."""
    with urllib.request.urlopen(f"{url}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
        return dict(json.loads(answer.read()))


def search(url: str, experiment: str) -> list[dict[str, Any]]:
    """List the runs of an experiment."""
    found = ask(url, "experiments/get-by-name", experiment_name=experiment)["experiment"]["experiment_id"]
    body = json.dumps({"experiment_ids": [found]}).encode()
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/runs/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return list(json.loads(answer.read()).get("runs", []))
