"""A run at an MLflow server, over its REST API with the standard library."""

import base64
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from sl_queue.errors import JobError
from sl_queue.observe.scalars import Scalar, named
from sl_queue.observe.sink import TrackerDown, TrackerRefuses

TIMEOUT_S = 10.0
TAG = "sl_queue.run"
LONGEST_VALUE = 500  # characters of a parameter that every version takes
MOST_PARAMETERS = 100  # of one request
PHASES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
LATER = frozenset({408, 425, 429})  # besides 5xx: codes of a server that may take it later


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refusal of redirects: another server would be sent the login."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class MLflow:
    """The experiment has the job's name; the run is found again by its tag. Mutable: it knows the run's id.

    `url` may have USER:PASSWORD@ in it.
    """

    def __init__(self, url: str, job: str) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            port = "" if parts.port is None else f":{parts.port}"
        except ValueError:
            raise JobError("--track mlflow: the port of its URL is no number") from None
        if not parts.hostname:
            raise JobError("--track mlflow: its URL names no host")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._base = f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}/api/2.0/mlflow/"
        self._where, self._job, self._id = f"{host}{port}", job, ""
        self._headers = {"Content-Type": "application/json"}
        if parts.username is not None:
            login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"

    def begin(self, run: str, parameters: Mapping[str, str]) -> Mapping[str, int]:
        experiment = self._experiment()
        found = self._call(
            "runs/search",
            {"experiment_ids": [experiment], "filter": f"tags.`{TAG}` = '{run}'", "max_results": 1},
        )
        if found.get("runs"):
            self._id = str(found["runs"][0]["info"]["run_id"])
            self._call("runs/update", {"run_id": self._id, "status": "RUNNING"})
        else:
            tags = [{"key": TAG, "value": run}, {"key": "mlflow.runName", "value": f"{self._job} {run}"}]
            begun = {"experiment_id": experiment, "start_time": _now_ms(), "tags": tags}
            self._id = str(self._call("runs/create", begun)["run"]["info"]["run_id"])
        data = self._call("runs/get", None, {"run_id": self._id})["run"].get("data", {})
        self._log_parameters(parameters, {each["key"] for each in data.get("params", ())})
        return {str(each["key"]): int(each.get("step", 0)) for each in data.get("metrics", ())}

    def write(self, scalars: Sequence[Scalar]) -> None:
        metrics = [
            {"key": each.name, "value": each.value, "timestamp": int(each.at_s * 1000), "step": each.step}
            for each in scalars
        ]
        if metrics:
            self._call("runs/log-batch", {"run_id": self._id, "metrics": metrics})

    def end(self, phase: str) -> None:
        if phase in PHASES:
            self._call("runs/update", {"run_id": self._id, "status": PHASES[phase], "end_time": _now_ms()})

    def _experiment(self) -> str:
        try:
            found = self._call("experiments/get-by-name", None, {"experiment_name": self._job})
            return str(found["experiment"]["experiment_id"])
        except TrackerRefuses as refused:
            if refused.args[1:] != (404,):
                raise
        return str(self._call("experiments/create", {"name": self._job})["experiment_id"])

    def _log_parameters(self, parameters: Mapping[str, str], there: set[str]) -> None:
        """Add the parameters that are not there: the server takes each once."""
        cut = {named(name): value[:LONGEST_VALUE] for name, value in parameters.items()}
        missing = [{"key": name, "value": value} for name, value in cut.items() if name not in there]
        for start in range(0, len(missing), MOST_PARAMETERS):
            self._call("runs/log-batch", {"run_id": self._id, "params": missing[start : start + MOST_PARAMETERS]})

    def _call(self, path: str, body: Any, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Ask; with a body it is a POST. Raises TrackerDown, TrackerRefuses with the server's code."""
        url = f"{self._base}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
                return dict(json.loads(answer.read() or b"{}"))
        except urllib.error.HTTPError as error:
            told = f"the server at {self._where} answers {error.code} to {path}"
            if error.code >= 500 or error.code in LATER:
                raise TrackerDown(told) from None
            raise TrackerRefuses(told, error.code) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise TrackerDown(f"the server at {self._where} cannot be asked ({reason})") from None


def _now_ms() -> int:
    return int(time.time() * 1000)
