"""An explanation over the broker has the same numbers whoever restarts, and tells nobody more than is theirs."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
import torchmetrics
from torch import Tensor

import sl_queue
from sl_queue.compute.names import is_lower_better
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.errors import AlignmentError, JobError, PeerSilent, RemoteProtocolError
from sl_queue.launch.asked import Asked
from sl_queue.launch.connect import MEMORY, connector
from sl_queue.launch.explaining import explain_over
from sl_queue.launch.importance import NAME, Explained, Importance, lines_of
from sl_queue.launch.prediction import spec_to_predict
from sl_queue.launch.service import Served, serve_feature
from sl_queue.local.explaining import explain
from sl_queue.protocol.messages import Payload
from sl_queue.protocol.serving import Deal, Worth, keys_of, request_of, worth_of, worth_payload
from sl_queue.storage.model_card import with_table
from sl_queue.storage.versions import choose_version
from tests.compute.test_prediction import Base, N, files, job, new_rows, states

NAMES = {"bank": ["age", "income", "noise"], "insurer": ["claims", "mileage"]}
JOB = job(broker={"patience": 3.0})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("explained")
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    labels = (bank[:, 0] - insurer[:, 1] > 0).astype(int)
    longer = JOB.replace(epochs=30)
    sl_queue.run_local(
        longer, files({"bank": sl_queue.Rows(ids, bank), "insurer": sl_queue.Rows(ids, insurer, labels)}), out=root
    )
    return root


class Parties:
    """A bank that serves, and what the insurer needs to ask it."""

    def __init__(self, root: Path, *, explains: bool = True, at_most: int = 0, **base: Any) -> None:
        self.root, self.connect, self.bank = root, connector(JOB, MEMORY), None
        self.about: dict[str, Any] = {"at_most": at_most, "deadline_s": 5.0, "explains": explains}
        given, importer = new_rows()[0], Importer()
        bank, insurer = files(given)
        assert bank.base is not None
        self.specs = {
            file.party: spec_to_predict(resolve(JOB, file, importer), given[file.party], Asked(labels=True))
            for file in (bank.replace(base=bank.base.replace(**base)), insurer)
        }

    bank: Served | None

    def start(self) -> "Parties":
        self.bank = serve_feature(JOB, self.specs["bank"], states(self.root)["bank"], self.connect, None, **self.about)
        return self

    def stop(self) -> None:
        if self.bank is not None:
            self.bank.close()
            self.bank = None

    def explain(self) -> Explained:
        return explain_over(JOB, self.specs["insurer"], states(self.root)["insurer"], self.connect, None)


@pytest.fixture
def parties(trained: Path) -> Iterator[Parties]:
    found = Parties(trained).start()
    yield found
    found.stop()


def test_the_columns_that_the_labels_were_made_of_are_worth_most_and_each_party_keeps_its_own(parties: Parties) -> None:
    found = parties.explain()
    worth = {(one.party, one.column): one.worse for one in found.importances}
    assert found.metric == "auroc" and found.rows == 90
    assert len(worth) == 4 + 3
    assert worth["bank", "column 0"] > 0.03 > max(abs(worth["bank", "column 1"]), abs(worth["bank", "column 2"]))
    assert worth["insurer", "column 1"] > worth["insurer", "column 0"]
    kept = {party: list(lines_of(choose_version(parties.root / party).path / NAME)) for party in ("bank", "insurer")}
    assert all(line.startswith(("auroc", "bank")) for line in kept["bank"]) and len(kept["bank"]) == 5
    assert not [line for line in kept["insurer"] if line.startswith("bank  column")]
    assert [line for line in kept["insurer"] if line.startswith("bank  (all)")]
    card = (choose_version(parties.root / "bank").path / "card.md").read_text()
    assert "## Importance" in card and "insurer" not in card.split("## Importance")[1].split("## Use")[0]


def test_a_party_that_restarts_changes_no_number(parties: Parties) -> None:
    wanted = parties.explain()
    parties.stop()
    later = threading.Timer(0.7, parties.start)
    later.start()
    found = parties.explain()
    later.join()
    assert [(o.party, o.column, o.worse) for o in found.importances] == [
        (o.party, o.column, o.worse) for o in wanted.importances
    ]


def test_a_party_that_does_not_answer_or_may_not_is_named(trained: Path) -> None:
    with pytest.raises(PeerSilent, match="bank has not answered for 3 s: start its worker with --serve"):
        Parties(trained).explain()
    for about, error, told in (
        ({"explains": False}, JobError, "bank does not let others explain"),
        ({"at_most": 200}, JobError, "bank answers no more in this hour"),
    ):
        parties = Parties(trained, **about).start()  # type: ignore[arg-type]
        try:
            with pytest.raises(error, match=told):
                parties.explain()
        finally:
            parties.stop()


def test_rows_that_nobody_else_has_are_said(trained: Path) -> None:
    parties = Parties(trained)
    spec = parties.specs["bank"]
    rows = sl_queue.Rows(np.arange(9), np.zeros((9, 3)))
    parties.specs["bank"] = spec_to_predict(spec, rows, Asked())
    parties.start()
    try:
        with pytest.raises(AlignmentError, match="bank serves none of the label holder's rows"):
            parties.explain()
    finally:
        parties.stop()


def test_a_section_of_a_card_is_replaced_and_stands_before_how_to_use_it() -> None:
    card = "# A\n\ntext\n\n## Data\n\nrows\n\n## Use\n\ncode\n"
    once = with_table(card, "Importance", "note", ("a", "b"), [("x|y", "1")])
    assert once.index("## Data") < once.index("## Importance\n\nnote") < once.index("## Use\n\ncode\n")
    assert "| x\\|y | 1 |" in once
    twice = with_table(once, "Importance", "note", ("a", "b"), [("z", "2")])
    assert twice.count("## Importance") == 1 and "x" not in twice.split("## Importance")[1].split("## Use")[0]
    assert with_table(twice, "Importance", "note", ("a", "b"), [("x|y", "1")]) == once


KEYS = np.array([3, 4], np.uint64)


@pytest.mark.parametrize("deal", [None, Deal(None, 0), Deal(7, 2)])
def test_a_request_is_read_as_it_was_written(deal: Deal | None) -> None:
    keys, found = keys_of(request_of(KEYS, deal))
    assert keys.tolist() == [3, 4] and found == deal


@pytest.mark.parametrize(
    "said", ["deal:", "deal:-2:0", "deal:1", "deal:1:", "deal:1:1000", "deal:9999999:0", "deal:1:x", "x"]
)
def test_a_request_that_says_anything_else_is_refused(said: str) -> None:
    with pytest.raises(RemoteProtocolError):
        keys_of(Payload("int8", (2, 8), bytes(16), b"", said))


def test_what_columns_are_worth_is_read_as_it_was_written() -> None:
    assert worth_of(worth_payload(Worth("auroc", [0.5, -0.25]))) == Worth("auroc", [0.5, -0.25])
    assert worth_of(request_of(KEYS)) is None
    with pytest.raises(RemoteProtocolError):
        worth_of(Payload("float64", (2,), bytes(8), b"", "worth:auroc"))


def test_a_line_of_the_table_is_one_line_whatever_a_column_is_called(tmp_path: Path) -> None:
    Explained("auroc", 0.9, 10, [Importance("bank", 'a,"b"\nc', 0.25)]).write(tmp_path / NAME)
    assert list(lines_of(tmp_path / NAME))[1:] == ['bank  a,"b" c  0.25']


def badness(outputs: Tensor, labels: Tensor) -> float:
    """Return how far the outputs are from the labels."""
    return float((outputs.sigmoid().flatten() - labels.flatten()).abs().mean())


class Goodness:
    """The same, turned round, by a name that says nothing."""

    higher_is_better = True

    def __call__(self, outputs: Tensor, labels: Tensor) -> float:
        return -badness(outputs, labels)


def locally(root: Path, metrics: list[Any], agreed: sl_queue.Job = JOB, labels: Any = None, **base: Any) -> Explained:
    """Explain with all rows at hand, by other metrics; `base` is other about the bank's model."""
    given, parties = new_rows()[0], []
    for party in files(given):
        rows, path = given[party.party], root / f"{party.party}.csv"
        columns = {"id": rows.ids, **{f"x{place}": column for place, column in enumerate(rows.features.T)}}
        about = {"path": path, "id": "id"}
        if party.fuse is not None:
            columns["label"] = rows.labels if labels is None else labels
            party = party.replace(fuse=party.fuse.replace(metrics=metrics))
            about["label"] = "label"
        elif base and party.base is not None:
            party = party.replace(base=party.base.replace(**base))
        pa.csv.write_csv(pa.table(columns), path)
        parties.append(party.replace(data=about, predict={"path": path}))
    return explain(agreed, parties, states(root))


STOPS = {"metric": "badness", "patience": 3, "mode": "min"}


@pytest.mark.parametrize(
    ("metrics", "agreed"),
    [
        (["loss", badness], JOB),
        (["hamming_distance"], JOB),
        ([{"name": "HammingDistance", "as": "share"}], JOB),
        ([Goodness()], JOB),
        ([badness], JOB.replace(early_stopping=STOPS)),
        ([torchmetrics.classification.BinaryHammingDistance()], JOB),
    ],
)
def test_the_best_column_is_worth_most_whichever_way_a_metric_is_better(
    trained: Path, metrics: list[Any], agreed: sl_queue.Job
) -> None:
    found = locally(trained, metrics, agreed)
    worth = {(one.party, one.column): one.worse for one in found.importances}
    assert min(worth["bank", "x0"], worth["insurer", "x1"]) > 0.02
    assert found.ranked()[-1][:2] in [("bank", "x1"), ("bank", "x2"), ("insurer", "x0")]


def test_a_metric_whose_direction_is_not_known_is_refused_by_name(trained: Path) -> None:
    with pytest.raises(JobError, match=r"party 'insurer': whether 'badness', the first of \[fuse\] metrics, is better"):
        locally(trained, [badness])


def test_rows_that_do_not_define_a_metric_are_refused_and_what_was_kept_stays(trained: Path) -> None:
    locally(trained, ["auroc"])
    kept = choose_version(trained / "insurer").path / NAME
    before = kept.read_bytes()
    with pytest.raises(JobError, match="auroc is not defined on the 90 rows"):
        locally(trained, ["auroc"], labels=np.ones(90, int))
    assert kept.read_bytes() == before


def test_names_are_better_as_torchmetrics_says() -> None:
    for module in (torchmetrics.classification, torchmetrics.regression):
        for name, kind in vars(module).items():
            said = getattr(kind, "higher_is_better", None)
            plain = name.removeprefix("Binary").removeprefix("Multiclass")
            if isinstance(said, bool) and not plain.startswith(("Multilabel", "Group", "Fairness")):
                assert is_lower_better(plain) is not said, name
    assert is_lower_better("mape_of_mine") is None


class OfDict(Base):
    """The same model, which takes its columns by name."""

    def forward(self, x0: Tensor, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.stack([x0, x1, x2], dim=1))


class OfList(Base):
    """The same model, which takes a list of columns."""

    def forward(self, x: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(torch.stack(x, dim=1))


@pytest.mark.parametrize(("model", "inputs"), [(OfDict, "dict"), (OfList, "list")])
def test_columns_of_a_model_of_several_inputs_are_worth_the_same(trained: Path, model: type, inputs: str) -> None:
    found = locally(trained, ["auroc"], model=model, inputs=inputs)
    assert ("bank", "x2") in [(one.party, one.column) for one in found.importances]
    assert found == locally(trained, ["auroc"])


def test_they_are_over_a_broker_too(trained: Path, parties: Parties) -> None:
    wanted = parties.explain()
    parties.stop()
    other = Parties(trained, model=OfList, inputs="list").start()
    try:
        assert other.explain() == wanted
    finally:
        other.stop()
