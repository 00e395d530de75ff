"""A service answers with the predictions of the trained modules, and says who is missing; over the memory broker."""

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sl_queue
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.asked_ids import request_keys
from sl_queue.launch.answering_versions import id_key
from sl_queue.launch.asked import Asked
from sl_queue.launch.connect import MEMORY, connector
from sl_queue.launch.http_listener import HttpServer
from sl_queue.launch.http_service import MOST_BYTES, Api
from sl_queue.launch.prediction import spec_to_predict
from sl_queue.launch.service import Served, serve_feature, serve_label
from sl_queue.loops.requests import Unanswered
from sl_queue.protocol.serving import MOST_ROWS
from sl_queue.storage.versions import promote
from tests.compute.test_prediction import Base, Fuse, N, files, job, new_rows, states
from tests.support.waiting import await_that


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sl_queue.Result]:
    root = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    labels = (bank[:, 0] - insurer[:, 1] > 0).astype(int)
    parties = files({"bank": sl_queue.Rows(ids, bank), "insurer": sl_queue.Rows(ids, insurer, labels)})
    return root, sl_queue.run_local(job(), parties, out=root)


@dataclass(frozen=True)
class Said:
    """An answer over HTTP."""

    status_code: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Service:
    """Both sides in this process, on rows of their own."""

    def __init__(
        self,
        root: Path,
        at_most: int = 0,
        deadline_s: float = 5.0,
        token: str | None = None,
        model: type[torch.nn.Module] = Base,
        joint: type[torch.nn.Module] = Fuse,
    ) -> None:
        self.rows, self.ids, self.columns = self.rows_of()
        kept = self.rows["bank"].ids != self.ids[7]  # the bank lacks one customer
        self.rows["bank"] = sl_queue.Rows(self.rows["bank"].ids[kept], self.rows["bank"].features[kept])
        given = {"bank": self.rows["bank"], "insurer": self.rows["insurer"]}
        importer, parties = Importer(), files(given, model, joint)
        self.specs = {
            file.party: spec_to_predict(resolve(job(), file, importer), given[file.party], Asked()) for file in parties
        }
        self.connect, self.root, self.at_most, self.deadline_s = connector(job(), MEMORY), root, at_most, deadline_s
        self.bank: Served | None = None
        folder = states(root)
        self.insurer = serve_label(
            job(), self.specs["insurer"], folder["insurer"], self.connect, None, None, deadline_s=deadline_s
        )
        self.start_bank()
        assert self.insurer.label is not None
        self.http = HttpServer(Api(self.insurer.label, "integer", token).app(), "127.0.0.1", 0)

    def rows_of(self) -> Any:
        return new_rows()

    def start_bank(self) -> None:
        about = (job(), self.specs["bank"], states(self.root)["bank"], self.connect, None)
        self.bank = serve_feature(*about, at_most=self.at_most, deadline_s=self.deadline_s)

    def stop_bank(self) -> None:
        if self.bank is not None:
            self.bank.close()
            self.bank = None

    def ask(self, ids: Any, **headers: str | bytes) -> Any:
        return self.post(json.dumps({"ids": ids}).encode(), **headers)

    def post(self, body: bytes, **headers: str | bytes) -> Said:
        return self.request("POST", "/predict", body, headers)

    def get(self, path: str) -> Said:
        return self.request("GET", path)

    def request(self, method: str, path: str, body: bytes | None = None, headers: Any = {}) -> Said:  # noqa: B006
        connection = http.client.HTTPConnection("127.0.0.1", self.http.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return Said(answer.status, answer.read().decode())
        finally:
            connection.close()

    def close(self) -> None:
        self.http.close()
        self.stop_bank()
        self.insurer.close()


@pytest.fixture
def service(trained: tuple[Path, sl_queue.Result]) -> Iterator[Service]:
    found = Service(trained[0])
    yield found
    found.close()


def chance(result: sl_queue.Result, service: Service, place: int) -> float:
    """Compute a probability with the trained modules."""
    with torch.no_grad():
        rows = [place, place]  # as one row alone may be computed by another kernel
        inputs = [
            result.base(party)(torch.tensor(service.columns[party][rows]).float()) for party in ("bank", "insurer")
        ]
        return float(result.fuse(inputs)[0, 0].sigmoid())


def test_answers_are_the_predictions_of_the_modules(service: Service, trained: Any) -> None:
    places = [3, 7, 0, 50]
    said = service.ask([int(service.ids[place]) for place in places] + [1])
    assert said.status_code == 200, said.text
    predictions = said.json()["predictions"]
    assert [one["id"] for one in predictions] == [int(service.ids[place]) for place in places] + [1]
    assert predictions[1] == {"id": int(service.ids[7]), "missing": ["bank"]}
    assert predictions[4] == {"id": 1, "missing": ["bank", "insurer"]}
    for place, one in ((3, predictions[0]), (0, predictions[2]), (50, predictions[3])):
        assert one["probability"] == pytest.approx(chance(trained[1], service, place), abs=1e-6)


def test_the_body_of_an_answer_does_not_wait_until_its_head_is_acknowledged(service: Service) -> None:
    assert service.http._listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # which connections inherit


def test_requests_of_many_clients_get_each_their_own_answer(service: Service, trained: Any) -> None:
    wanted = {place: chance(trained[1], service, place) for place in range(40) if place != 7}

    def one(place: int) -> tuple[int, float]:
        return place, service.ask([int(service.ids[place])]).json()["predictions"][0]["probability"]

    with ThreadPoolExecutor(16) as pool:
        found = dict(pool.map(one, [*wanted] * 3))
    assert found.keys() == wanted.keys()
    assert max(abs(found[place] - wanted[place]) for place in wanted) < 1e-6


def test_rows_that_are_added_together_go_as_one_message_and_each_gets_its_own_answer(
    service: Service, trained: Any
) -> None:
    assert service.insurer.label is not None and service.bank is not None and service.bank.feature is not None
    asked, places = service.insurer.label.service, [3, 0, 50]
    keys = [request_keys([int(service.ids[place])], "integer", id_key(job()))[0] for place in places]
    futures = [asked.add(key) for key in keys if key is not None]
    asked.go()
    for place, future in zip(places, futures, strict=True):
        (found,) = future.result(30).predictions
        assert found is not None
        assert found["probability"] == pytest.approx(chance(trained[1], service, place), abs=1e-6)
    assert len(service.bank.feature._counted) == 1


def test_requests_end_that_wait_behind_a_message_that_nobody_answers(trained: Any) -> None:
    service = Service(trained[0], deadline_s=0.3)
    try:
        service.stop_bank()
        assert service.insurer.label is not None
        asked = service.insurer.label.service
        futures = [asked.add(np.arange(MOST_ROWS, dtype=np.uint64)) for _ in range(3)]  # each a message of its own
        asked.go()
        for future in futures:
            with pytest.raises(Unanswered):
                future.result(30)
    finally:
        service.close()


def test_a_request_to_a_party_that_restarts_is_answered_by_the_next_worker(service: Service) -> None:
    service.stop_bank()
    later = threading.Timer(0.5, service.start_bank)
    later.start()
    said = service.ask([int(service.ids[0])])
    later.join()
    assert said.status_code == 200 and "probability" in said.json()["predictions"][0]


def test_a_silent_party_is_named_after_the_deadline_and_never_counts_as_zeros(trained: Any) -> None:
    began = time.monotonic()
    service = Service(trained[0], deadline_s=0.3)
    try:
        service.stop_bank()
        said = service.ask([int(service.ids[0])])
        assert said.status_code == 503 and said.json()["missing"] == ["bank"]
        assert 0.2 < said.json()["silent_s"] <= round(time.monotonic() - began, 1)  # as it is told
    finally:
        service.close()


def test_a_party_that_is_asked_too_much_refuses_and_says_so_in_its_log(
    trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(trained[0], at_most=3)
    try:
        assert service.ask([int(one) for one in service.ids[:3]]).status_code == 200
        said = service.ask([int(service.ids[4])])
        assert said.status_code == 429 and said.json()["parties"] == ["bank"]
        assert "asked for 1 row beyond 3 an hour" in caplog.text
    finally:
        service.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 422),
        (b"[1]", 422),
        (b'{"ids": []}', 422),
        (b'{"ids": ["a"]}', 422),
        (b'{"ids": [true]}', 422),
        (b'{"ids": [1.5]}', 422),
        (b'{"ids": [' + b"1," * 600 + b"1]}", 422),
        (b" " * (MOST_BYTES + 1), 413),
        (b"[" * 100_000, 422),
    ],
)
def test_bad_requests_get_a_clear_answer_and_the_service_goes_on(service: Service, body: bytes, status: int) -> None:
    said = service.post(body)
    assert said.status_code == status and said.json()["error"]
    assert service.ask([int(service.ids[0])]).status_code == 200


def test_a_token_is_asked_for_where_there_is_one(trained: Any) -> None:
    service = Service(trained[0], token="s3cret")
    try:
        assert service.ask([1]).status_code == 401
        assert service.ask([1], authorization="Bearer wrong").status_code == 401
        assert service.ask([1], authorization="Bearer s3cret").status_code == 200
    finally:
        service.close()


def test_version_health_metrics_and_documentation_are_there(service: Service, trained: Any) -> None:
    service.ask([int(service.ids[0])])
    run = service.get("/version").json()["run"]
    assert service.get("/health").json() == {"run": run}
    assert 'sl_queue_serve_requests_total{status="200"} 1' in service.get("/metrics").text
    assert "/predict" in service.get("/openapi.json").json()["paths"]
    assert "POST /predict" in service.get("/docs").text


def test_a_version_is_taken_over_once_all_parties_have_it_and_no_request_fails(trained: Any, tmp_path: Path) -> None:
    root = tmp_path / "both"
    shutil.copytree(trained[0], root)
    rng = np.random.default_rng(3)
    ids = np.arange(N)
    parties = files(
        {
            "bank": sl_queue.Rows(ids, rng.standard_normal((N, 3))),
            "insurer": sl_queue.Rows(ids, rng.standard_normal((N, 2)), ids % 2),
        }
    )
    sl_queue.run_local(job(), parties, out=tmp_path / "other")
    (other,) = (tmp_path / "other" / "insurer" / "versions").iterdir()
    promote(root / "insurer", next((root / "insurer" / "versions").iterdir()).name)
    service = Service(root)

    def served(run: str) -> bool:
        assert service.insurer.label is not None
        service.insurer.label._looked = 0.0  # a second has passed
        said = service.ask([int(service.ids[0])])
        assert said.status_code == 200, said.text
        return bool(said.json()["run"] == run)

    try:
        before = service.ask([int(service.ids[0])]).json()
        shutil.copytree(other, root / "insurer" / "versions" / other.name)
        promote(root / "insurer", other.name)
        assert not any(served(other.name) for _ in range(5)), "the bank has no such version yet"
        shutil.copytree(tmp_path / "other" / "bank" / "versions" / other.name, root / "bank" / "versions" / other.name)
        await_that(lambda: served(other.name), "what both have is served")
        assert before["predictions"] != service.ask([int(service.ids[0])]).json()["predictions"]
    finally:
        service.close()


class Noisy(Base):
    """A base model that draws in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(x.shape[0], 1)


def test_a_model_that_draws_in_evaluation_mode_gives_the_same_answer_again_and_takes_nobody_elses_numbers(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    rows = {
        "bank": sl_queue.Rows(np.arange(N), rng.standard_normal((N, 3))),
        "insurer": sl_queue.Rows(np.arange(N), rng.standard_normal((N, 2)), np.arange(N) % 2),
    }
    sl_queue.run_local(job(), files(rows, Noisy), out=tmp_path)
    service = Service(tmp_path, model=Noisy)
    try:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first, second = (service.ask([int(service.ids[0])]).json()["predictions"] for _ in range(2))
        assert first == second
        assert torch.equal(torch.get_rng_state(), before)
        assert service.ask([int(service.ids[0]), int(service.ids[1])]).status_code == 200
    finally:
        service.close()
