"""A run feeds a real MLflow server and TensorBoard's files; its scheduler is killed, and no point is there twice."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pure.test_tracking import read_back
from tests.support.crew import Crew, quiet_weights, write_job
from tests.support.mlflow_server import ask, mlflow_server, search


def track(options: Sequence[str]) -> None:
    """Prepare a scheduler's process."""
    sys.argv += options


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own
def test_a_run_is_tracked_with_each_point_once_though_its_scheduler_is_killed(tmp_path: Path, broker_url: str) -> None:
    write_job(tmp_path)
    board = tmp_path / "board"
    with mlflow_server(tmp_path) as url, Crew(tmp_path, broker_url) as crew:
        prepare = (track, ("--track", f"tensorboard:{board}", "--track", f"mlflow:{url}"))
        crew.start("scheduler", prepare=prepare, log_level="info").start("bank", "insurer")
        crew.await_step("insurer", 12)
        crew.kill("scheduler")
        crew.start("scheduler", prepare=prepare, log_level="info")
        crew.finish()
        assert crew.weights() == quiet_weights()

        history = [json.loads(line) for line in (crew.states / "scheduler" / "history.jsonl").read_text().splitlines()]
        losses = {epoch["step"]: epoch["loss"] for epoch in history}
        (run,) = search(url, "credit")
        assert run["info"]["status"] == "FINISHED"
        parameters = {each["key"]: each["value"] for each in run["data"]["params"]}
        assert parameters["pipeline.micro_batches"] == "2"
        names = {each["key"] for each in run["data"]["metrics"]}
        assert {"loss", "epoch/loss", "holdout/auroc"} <= names
        for name in names:
            found = ask(url, "metrics/get-history", run_id=run["info"]["run_id"], metric_key=name)["metrics"]
            steps = [int(each["step"]) for each in found]
            assert sorted(steps) == sorted(set(steps)), name
            if name == "epoch/loss":
                assert {int(each["step"]): each["value"] for each in found} == losses

        (folder,) = board.iterdir()
        events = read_back(folder)
        assert {event.step: event.value for event in events.Scalars("epoch/loss")} == pytest.approx(losses, rel=1e-6)
        for tag in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(tag)]
            assert sorted(steps) == sorted(set(steps)), tag
