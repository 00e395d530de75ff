"""Trackers: what they log, that no restart doubles a point, and that one that is down holds nobody up."""

import http.server
import logging
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sl_queue.errors import JobError
from sl_queue.observe.mlflow import MLflow
from sl_queue.observe.scalars import Scalar, Scalars
from sl_queue.observe.sink import TrackerDown, TrackerRefuses
from sl_queue.observe.tensorboard import TensorBoard, crc32c, steps_in
from sl_queue.observe.tracking import MOST_WAITING, Tracker, parameters_of, sink_of
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus
from sl_queue.protocol.totals import Totals
from sl_queue.testing.private_broker import free_ports
from tests.support.waiting import await_that

JOB = {"name": "toy", "epochs": 3, "pipeline": {"depth": 4}, "security": {"seal": True}, "early_stopping": None}


def status(step: int, *epochs: EpochResult, phase: str = "running", **parties: Totals) -> RunStatus:
    told = {name: PartyStatus("here", totals=totals) for name, totals in parties.items()}
    numbers = {"step": step, "loss": 1.0 / (step + 1), "samples": 32 * (step + 1)}
    return RunStatus(phase, "toy", "r1", history=epochs, parties=told, **numbers)  # type: ignore[arg-type]


class Sink:
    """A tracker in memory that is down until it is not. Mutable."""

    def __init__(self, down: int = 0) -> None:
        self.points: list[tuple[str, int]] = []
        self.down, self.begun, self.phase = down, 0, ""

    def begin(self, run: str, parameters: Mapping[str, str]) -> Mapping[str, int]:
        self.begun += 1
        if self.down:
            self.down -= 1
            raise TrackerDown("the sink is down")
        newest: dict[str, int] = {}
        for name, step in self.points:
            newest[name] = max(step, newest.get(name, -1))
        return newest

    def write(self, scalars: Sequence[Scalar]) -> None:
        self.points += [(each.name, each.step) for each in scalars]

    def end(self, phase: str) -> None:
        self.phase = phase


# What is said -----------------------------------------------------------------------------------------------------


def test_steps_epochs_waits_and_bytes_are_said_once_each() -> None:
    scalars = Scalars()
    told = Totals(10.0, 4.0, {"b": {"gradient": 5.0, "holdout": 1.0}}, sent_bytes=7, received_bytes=9)
    first = scalars.of(status(4, EpochResult(0, 4, 0.5, {"auroc": 0.75, "nothing": None}, 2.0), a=told), 100.0)
    assert {each.name: (each.step, each.value) for each in first} == {
        "loss": (4, 0.2),
        "epoch/loss": (4, 0.5),
        "epoch/seconds": (4, 2.0),
        "holdout/auroc": (4, 0.75),
        "busy/a": (4, 0.4),
        "waits/a/b": (4, 0.6),
        "sent_bytes/a": (4, 7.0),
        "received_bytes/a": (4, 9.0),
    }
    assert scalars.of(status(4, EpochResult(0, 4, 0.5, None, 2.0), a=told), 101.0) == []
    later = scalars.of(status(6, EpochResult(0, 4, 0.5, None, 2.0), EpochResult(1, 6, 0.25), a=told), 102.0)
    assert [(each.name, each.step) for each in later] == [
        ("loss", 6),
        ("samples_per_s", 6),
        ("epoch/loss", 6),
        ("epoch/seconds", 6),
    ]


def test_the_job_is_flat_parameters_without_its_keys() -> None:
    assert parameters_of(JOB) == {"name": "toy", "epochs": "3", "pipeline.depth": "4"}


@pytest.mark.parametrize("text", ["", "tensorboard:", "mlflow:", "mlflow:sqlite:///x", "wandb:x", "mlflow:http://"])
def test_what_is_no_tracker_is_refused_by_name(text: str) -> None:
    with pytest.raises(JobError, match="--track"):
        sink_of(text, "toy")


# Recovery ---------------------------------------------------------------------------------------------------------


def test_a_restart_doubles_no_point_even_where_steps_are_done_again() -> None:
    sink = Sink()
    for first in (0, 3, 1):  # a process that is killed, and two that go on from a checkpoint
        with closing(Tracker("sink", sink, JOB)) as tracker:
            for step in range(first, first + 5):
                tracker.take(status(step, EpochResult(0, 2, 0.5)))
    losses = [step for name, step in sink.points if name == "loss"]
    assert losses == list(range(8))
    assert sink.points.count(("epoch/loss", 2)) == 1


def test_what_could_not_be_said_is_said_later_and_the_run_hears_of_it_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sl_queue.observe.tracking.PAUSE_S", 0.05)
    monkeypatch.setattr("sl_queue.observe.tracking.EVERY_S", 0.05)
    sink = Sink(down=4)
    with caplog.at_level(logging.WARNING, "sl_queue"), closing(Tracker("sink", sink, JOB)) as tracker:
        for step in range(100):
            tracker.take(status(step))
        await_that(lambda: len(sink.points) >= 100, "nothing was said")
    assert sink.begun == 5
    assert [record.getMessage() for record in caplog.records] == [
        "--track sink: the sink is down; it is tried again, and the run goes on"
    ]


def test_a_tracker_that_never_answers_takes_no_time_and_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sl_queue.observe.tracking.LEAVE_S", 0.5)

    class Stuck(Sink):
        def begin(self, run: str, parameters: Mapping[str, str]) -> Mapping[str, int]:
            released.wait()
            return {}

    released = threading.Event()
    tracker = Tracker("stuck", Stuck(), JOB)
    began = time.monotonic()
    for step in range(20_000):
        tracker.take(status(step))
    took_s = time.monotonic() - began
    assert took_s / 20_000 < 0.01  # of each status
    assert len(tracker._waiting) <= MOST_WAITING
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 60.0
    released.set()


def test_a_server_that_is_not_there_is_down_and_its_password_is_not_told() -> None:
    (port,) = free_ports(1)
    with pytest.raises(TrackerDown, match=rf"127\.0\.0\.1:{port} cannot be asked") as raised:
        MLflow(f"http://user:secret@127.0.0.1:{port}", "toy").begin("r1", {})
    assert "secret" not in str(raised.value)


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Answers everything with a redirect to itself, and remembers what it was asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(302)
        self.send_header("Location", "/stolen")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_a_login_is_not_sent_on_to_where_a_server_redirects() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            with pytest.raises(TrackerRefuses, match="answers 302"):
                MLflow(f"http://user:secret@127.0.0.1:{server.server_port}", "toy").begin("r1", {})
        finally:
            server.shutdown()
            thread.join()
    assert [path.partition("?")[0] for path in Elsewhere.asked] == ["/api/2.0/mlflow/experiments/get-by-name"]


# Event files ------------------------------------------------------------------------------------------------------


def test_the_checksum_is_that_of_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def points(count: int) -> list[Scalar]:
    return [Scalar("loss", step, 1.0 / (step + 1), 1e9 + step) for step in range(count)]


def read_back(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own
def test_tensorboard_reads_what_was_written_by_several_processes_each_point_once(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, "toy")
    assert first.begin("r1", {"pipeline.depth": "4|5"}) == {}
    first.write(points(3))
    second = TensorBoard(tmp_path, "toy")
    assert second.begin("r1", {"pipeline.depth": "4|5"}) == {"loss": 2}
    second.write(points(5)[3:])
    found = read_back(tmp_path / "toy-r1")
    assert [(e.step, struct.pack("<f", e.value), e.wall_time) for e in found.Scalars("loss")] == [
        (step, struct.pack("<f", 1.0 / (step + 1)), 1e9 + step) for step in range(5)
    ]
    (text,) = found.Tensors("job")
    assert b"| pipeline.depth | 4 5 |" in text.tensor_proto.string_val[0]


def test_a_torn_event_file_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, "toy")
    board.begin("r1", {})
    board.write(points(3))
    (path,) = (tmp_path / "toy-r1").iterdir()
    whole = path.read_bytes()
    assert [step for _, step in steps_in(whole)] == [0, 1, 2]
    for cut in range(len(whole)):
        assert [step for _, step in steps_in(whole[:cut])] == list(range(sum(1 for _ in steps_in(whole[:cut]))))
    assert [step for _, step in steps_in(whole[:-1])] == [0, 1]


def test_a_folder_that_cannot_be_made_is_a_tracker_that_is_down(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackerDown, match="cannot be written"):
        TensorBoard(tmp_path / "file", "toy").begin("r1", {})
