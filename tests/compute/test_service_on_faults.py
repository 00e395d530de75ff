"""A service whose tables, models or rows are not as they should be: right answers or clear refusals, and it goes on."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sl_queue
from sl_queue.checking.check import check
from sl_queue.data.asked_ids import request_keys
from sl_queue.data.spec import FileSpec
from sl_queue.errors import ComputeError, ShapeError
from sl_queue.launch.answering_versions import id_key, versions_of
from sl_queue.launch.asked import Asked
from sl_queue.launch.http_listener import HttpServer
from sl_queue.launch.http_service import Api
from sl_queue.launch.outcome import write_evaluation
from sl_queue.launch.service import serve_label
from sl_queue.local.prediction import predict_threads
from sl_queue.loops.requests import Unanswered
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.serving import Keys
from sl_queue.storage.versions import versions_in
from tests.compute.test_prediction import Base, Fuse, N, files, job, states
from tests.compute.test_serving import Service, chance, service, trained

__all__ = ["service", "trained"]  # fixtures


def write_rows(path: Path, ids: Any, features: Any) -> None:
    lines = [f"{one},{','.join(map(str, row))}" for one, row in zip(ids, features, strict=True)]
    path.write_text("\n".join(["id,a,b,c", *lines]) + "\n")


def keys_of(*ids: int) -> Keys:
    keys, _ = request_keys(ids, "integer", id_key(job()))
    assert keys is not None
    return keys


@pytest.fixture
def filed(trained: Any, tmp_path: Path) -> Iterator[tuple[Service, Path]]:
    """Serve the bank's rows from a file."""
    found, path = Service(trained[0]), tmp_path / "bank.csv"
    found.stop_bank()
    write_rows(path, found.ids, found.columns["bank"])
    table = replace(found.specs["bank"].table, data=FileSpec(path=path, ids=("id",)))
    found.specs["bank"] = replace(found.specs["bank"], table=table)
    yield found, path
    found.close()


def test_a_table_that_is_replaced_under_a_service_gives_nobody_another_customers_row(
    filed: tuple[Service, Path], trained: Any
) -> None:
    service, path = filed
    service.start_bank()
    front = np.arange(4000, 4007)  # ids before all others
    write_rows(path, [*front, *service.ids], [*np.ones((7, 3)), *service.columns["bank"]])
    for place in (0, 3):
        (found,) = service.ask([int(service.ids[place])]).json()["predictions"]
        assert found["probability"] == pytest.approx(chance(trained[1], service, place), abs=1e-6)


def test_a_version_that_is_built_later_names_the_rows_as_its_own_reading_has_them(
    filed: tuple[Service, Path], trained: Any, tmp_path: Path
) -> None:
    service, path = filed
    state = tmp_path / "bank"
    shutil.copytree(trained[0] / "bank", state)
    (first,) = versions_in(state)
    second = first.path.with_name("later")
    shutil.copytree(first.path, second)
    (second / "run.json").write_text(json.dumps({**first.about, "run": "later"}))
    versions = versions_of(job(), service.specs["bank"], state)
    before = versions.base_of(first.run)
    write_rows(path, [4000, *service.ids[:3]], [[1.0, 1.0, 1.0], *service.columns["bank"][:3]])
    after = versions.base_of("later")
    assert before is not None and after is not None
    known, gone = int(service.ids[2]), int(service.ids[9])
    for base in (before, after):
        found, outputs = base.in_place(MicroBatch(0, 0), keys_of(known))
        row = torch.tensor(service.columns["bank"][[2]]).float()
        assert found.all() and outputs is not None
        assert torch.allclose(outputs[0], trained[1].base("bank")(row), atol=1e-6)
    assert before.answer(MicroBatch(0, 0), keys_of(gone))[0].all()
    assert not after.answer(MicroBatch(0, 0), keys_of(gone))[0].any()  # the table of the later version lacks it


# A single row ---------------------------------------------------------------------------------------------------------


class Squeezed(Fuse):
    """A fuse model that takes the axis of the rows away from a single one."""

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward(inputs).squeeze()


class SqueezedBase(Base):
    """A base model that does so."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


def test_a_model_that_fails_on_a_single_row_is_named_before_anything_is_served(trained: Any) -> None:
    with pytest.raises(ShapeError, match=r"'insurer', a trial with a single row: .*Squeezed returns \(\) for 1 row"):
        Service(trained[0], joint=Squeezed)
    service = Service(trained[0])
    try:
        service.stop_bank()
        compute = service.specs["bank"].compute
        table = replace(compute.base, model=SqueezedBase)
        service.specs["bank"] = replace(service.specs["bank"], compute=replace(compute, base=table))
        with pytest.raises(ShapeError, match=r"party 'bank', a trial with a single row: .*SqueezedBase"):
            service.start_bank()
    finally:
        service.close()


def customers(n: int) -> dict[str, sl_queue.Rows]:
    rng = np.random.default_rng(4)
    bank, insurer = rng.standard_normal((n, 3)), rng.standard_normal((n, 2))
    return {"bank": sl_queue.Rows(np.arange(n), bank), "insurer": sl_queue.Rows(np.arange(n), insurer, bank[:, 0] > 0)}


def test_a_prediction_whose_last_part_is_a_single_row_is_refused_before_it_begins(trained: Any) -> None:
    parties, folders = files(customers(N), joint=Squeezed), states(trained[0])
    with pytest.raises(ShapeError, match="a trial with a single row"):
        predict_threads(job(), parties, folders, Asked(), rows=customers(33))
    assert len(predict_threads(job(), parties, folders, Asked(), rows=customers(40)).outputs) == 40


def test_a_check_warns_of_models_that_fail_on_a_single_row() -> None:
    found = check(job(), files(customers(N), SqueezedBase, Squeezed))
    assert not [finding.text for finding in found if finding.level == "error"]
    warned = [finding.text for finding in found if "a trial with a single row" in finding.text]
    assert [text.split(",")[0] for text in warned] == ["party 'bank'", "party 'insurer'", "party 'insurer'"]
    assert not any("single row" in finding.text for finding in check(job(), files(customers(N))))


def test_an_error_that_nobody_foresaw_is_the_answer_to_its_request_alone(service: Service, trained: Any) -> None:
    def undo(chances: Any) -> Any:
        raise ZeroDivisionError

    assert service.insurer.label is not None
    models, one = service.insurer.label.models, [int(service.ids[0])]
    kept, models._about = models._about, (*models._about[:2], undo)
    said = service.ask(one)
    assert said.status_code == 500 and "ZeroDivisionError" in said.json()["error"]
    models._about = kept
    (found,) = service.ask(one).json()["predictions"]
    assert found["probability"] == pytest.approx(chance(trained[1], service, 0), abs=1e-6)
    assert 'requests_total{status="500"} 1' in service.get("/metrics").text


# Rows that a model fails on -------------------------------------------------------------------------------------------


class Squared(Base):
    """A base model that overflows on large columns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x * x).sum(1, keepdim=True).clamp(min=1.0)


@pytest.mark.parametrize("party", ["bank", "insurer"])
def test_a_row_on_which_a_model_overflows_is_refused_alone_and_all_others_are_answered(
    trained: Any, party: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Overflowing(trained[0], party)
    try:
        label = service.insurer.label
        assert label is not None
        wanted = service.ask([int(service.ids[3])]).json()["predictions"][0]["probability"]
        bad, good = keys_of(int(service.ids[0])), keys_of(int(service.ids[3]))
        futures = [label.service.add(keys) for keys in (good, bad, good)]
        label.service.go()  # as one message
        for future in (futures[0], futures[2]):
            (found,) = future.result(30).predictions
            assert found is not None and found["probability"] == pytest.approx(wanted, abs=1e-6)
        with pytest.raises((Unanswered, ComputeError)):
            futures[1].result(30)
        said = service.ask([int(service.ids[0])])
        assert said.status_code == 500 and party in said.json()["error"]
        assert service.ask([int(service.ids[3])]).status_code == 200
        assert party == "insurer" or "a request was refused: party 'bank'" in caplog.text
    finally:
        service.close()


class Overflowing(Service):
    """A service in which the first row of a party is too large for its model."""

    def __init__(self, root: Path, party: str) -> None:
        self.party = party
        super().__init__(root, model=Squared)

    def rows_of(self) -> Any:
        rows, ids, columns = super().rows_of()
        features = rows[self.party].features.copy()
        features[np.asarray(rows[self.party].ids) == ids[0]] = 1e25  # the square is no float32
        return {**rows, self.party: replace(rows[self.party], features=features)}, ids, columns


# Numbers --------------------------------------------------------------------------------------------------------------


class Exponential(Fuse):
    """A fuse model whose output is infinite for some rows."""

    def forward(self, inputs: list[Tensor]) -> Tensor:
        output = super().forward(inputs)
        return torch.where(output > output.median(), torch.inf, output)


def valued(root: Path, name: str, value: Any) -> None:
    """Let the versions of a party say so."""
    for version in versions_in(root / name):
        (version.path / "run.json").write_text(json.dumps({**version.about, **value}))


def test_a_prediction_that_is_not_finite_is_null_and_its_request_has_the_others(trained: Any, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained[0], root)
    valued(root, "insurer", {"task": "regression", "outputs": "values"})
    service = Service(root, joint=Exponential)
    try:
        said = service.ask([int(one) for one in service.ids[:3]])
        assert said.status_code == 200 and "Infinity" not in said.text
        values = [one["value"] for one in said.json()["predictions"]]
        assert values.count(None) == 1 and all(isinstance(value, float | None) for value in values)
    finally:
        service.close()


def test_an_evaluation_that_is_not_finite_is_written_as_json(trained: Any, tmp_path: Path) -> None:
    parties, rows = files(customers(N), joint=Exponential), customers(40)
    predicted = predict_threads(job(), parties, states(trained[0]), Asked(labels=True), rows=rows)
    found = write_evaluation(predicted, tmp_path)
    assert found.metrics["loss"] is not None and not np.isfinite(found.metrics["loss"])
    said = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert said["metrics"]["loss"] is None and said["rows"] == 40


class Far(Fuse):
    """A fuse model in float64 whose outputs differ by less than float32 can tell there."""

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward(inputs).double() * 1e-3 + 1e6


def test_what_is_served_of_a_model_in_float64_is_what_is_predicted(trained: Any, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained[0], root)
    valued(root, "insurer", {"task": "regression", "outputs": "values"})
    service = Service(root, joint=Far)
    try:
        kept = {party: {int(one): place for place, one in enumerate(r.ids)} for party, r in service.rows.items()}
        ids = [int(one) for place, one in enumerate(service.ids[:20]) if place != 7]
        rows = {
            party: sl_queue.Rows(ids, given.features[[kept[party][one] for one in ids]], np.arange(len(ids)) % 2)
            for party, given in service.rows.items()
        }
        outputs = predict_threads(job(), files(customers(N), joint=Far), states(root), Asked(), rows=rows)
        wanted = outputs.outputs[outputs.rows.positions, 0]
        assert wanted.dtype == np.float64 and len(set(wanted.astype(np.float32))) < len(ids)
        served = [one["value"] for one in service.ask(ids).json()["predictions"]]
        assert served == pytest.approx(wanted, abs=1e-8, rel=0)
        assert len(set(served)) == len(ids)
    finally:
        service.close()


# Ids of several columns -----------------------------------------------------------------------------------------------


def test_ids_of_two_columns_are_asked_for_as_lists(trained: Any, tmp_path: Path) -> None:
    service, lands = Service(trained[0]), ("de", "fr")
    try:
        service.stop_bank()
        service.http.close()
        service.insurer.close()
        for party, names in (("bank", "a,b,c"), ("insurer", "a,b")):
            rows = zip(service.ids, service.columns[party], strict=True)
            lines = [f"{lands[one % 2]},{one},{','.join(map(str, row))}" for one, row in rows]
            (tmp_path / f"{party}.csv").write_text("\n".join([f"land,nr,{names}", *lines]) + "\n")
            data = FileSpec(path=tmp_path / f"{party}.csv", ids=("land", "nr"))
            table = replace(service.specs[party].table, data=data, labels=False, normalise=("strip", "casefold"))
            service.specs[party] = replace(service.specs[party], table=table)
        folder = states(trained[0])["insurer"]
        service.insurer = serve_label(
            job(), service.specs["insurer"], folder, service.connect, None, None, deadline_s=5.0
        )
        service.start_bank()
        assert service.insurer.label is not None
        service.http = HttpServer(Api(service.insurer.label, "text", None).app(), "127.0.0.1", 0)
        first = int(service.ids[0])
        land = lands[first % 2]
        asked = [[land, first], [f" {land.upper()} ", str(first)], f"{land}\x1f{first}", ["it", first]]
        *found, unknown = service.ask(asked).json()["predictions"]
        assert [one["id"] for one in found] == asked[:3] and unknown["missing"] == ["bank", "insurer"]
        for one in found:
            assert one["probability"] == pytest.approx(chance(trained[1], service, 0), abs=1e-6)
        for wrong in ([land], f"{land},{first}", [land, first, 1], [land, None], [land, True], {"nr": first}, first):
            said = service.ask([asked[0], wrong])
            assert said.status_code == 422 and said.json()["places"] == [1], wrong
            assert said.json()["error"] == "ids must be lists of 2: land, nr"
        items = service.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
        (one,) = [each["schema"]["properties"]["ids"]["items"] for each in items.values()]
        assert (one["type"], one["minItems"], one["maxItems"]) == ("array", 2, 2)
        assert '{&quot;ids&quot;: [["a", 17]]}' in service.get("/docs").text
    finally:
        service.close()
