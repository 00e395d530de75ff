"""A trained model as its users meet it: predicted with, evaluated, listed, exported; and workers that are killed."""

import http.client
import json
import signal
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.support.credit import FILES, write_credit
from tests.support.forked import Forked, environment, forked, sl_queue
from tests.support.waiting import await_that

NEW = 3000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the example, and write new customers of both companies, in an order of each one's own."""
    folder = tmp_path_factory.mktemp("after")
    job = write_credit(folder)
    assert sl_queue("local", job, *(folder / name for name in FILES)).returncode == 0
    rng = np.random.default_rng(5)
    ids = rng.permutation(np.arange(70_000, 70_000 + NEW))
    order = rng.permutation(NEW)
    bank, insurer = rng.standard_normal((3, NEW)), rng.standard_normal((2, NEW))
    columns = {"customer_id": ids[order], "age": bank[0], "income": bank[1], "balance": bank[2]}
    pa.parquet.write_table(pa.table(columns), folder / "bank_new.parquet")
    labels = (bank[0][np.argsort(order)] + insurer[0] > 0).astype(int)
    rows = {"customer_id": ids, "claims": insurer[0], "mileage": insurer[1], "defaulted": labels}
    pa.csv.write_csv(pa.table(rows), folder / "insurer_new.csv")
    with (folder / "bank.toml").open("a") as file:
        file.write('\n[predict]\npath = "bank_new.parquet"\n')
    with (folder / "insurer.toml").open("a") as file:
        file.write('\n[predict]\npath = "insurer_new.csv"\nout = "predictions.csv"\n')
    return folder


def files(folder: Path) -> list[Path]:
    return [folder / "job.toml", *(folder / name for name in FILES)]


def test_new_customers_are_predicted_in_the_order_of_the_label_holders_file(trained: Path) -> None:
    done = sl_queue("predict", *files(trained))
    assert done.returncode == 0, done.stderr
    assert f"{NEW} predictions with run " in done.stdout
    found = pa.csv.read_csv(trained / "predictions.csv")
    assert found.column_names == ["customer_id", "probability"]
    assert found["customer_id"].to_pylist() == pa.csv.read_csv(trained / "insurer_new.csv")["customer_id"].to_pylist()


def test_an_evaluation_says_loss_metrics_and_tables_and_draws_them(trained: Path) -> None:
    done = sl_queue("evaluate", *files(trained), "--out", trained / "seen", "--plot")
    assert done.returncode == 0, done.stderr
    found = json.loads((trained / "seen" / "evaluation.json").read_text())
    assert found["rows"] == NEW and found["metrics"]["auroc"] > 0.7
    (card,) = (trained / "state" / "insurer" / "versions").glob("*/card.md")
    assert f"## Evaluation\n\nOn {NEW} rows.\n" in card.read_text()
    report = sl_queue("report", trained / "job.toml", "--state", trained / "state" / "scheduler", "--out", trained)
    assert report.returncode == 0, report.stderr
    assert "Evaluation at insurer" in (trained / "report.html").read_text()
    assert sum(map(sum, found["tables"]["confusion"])) == NEW
    assert (trained / "seen" / "evaluation.svg").read_text().count("<path") == 5
    held = sl_queue("evaluate", *files(trained), "--held-out", "--out", trained / "held")
    assert held.returncode == 0, held.stderr
    found = json.loads((trained / "held" / "evaluation.json").read_text())
    history = (trained / "state" / "insurer" / "history.jsonl").read_text().splitlines()
    wanted = json.loads(history[-1])["holdout"]
    assert found["rows"] == 40
    assert {name: round(value, 6) for name, value in found["metrics"].items()} == {
        name: round(wanted[name], 6) for name in found["metrics"]
    }


def test_an_explanation_ranks_what_the_labels_were_made_of(trained: Path) -> None:
    done = sl_queue("explain", *files(trained), "--out", trained / "why")
    assert done.returncode == 0, done.stderr
    lines = (trained / "why" / "importance.csv").read_text().splitlines()
    assert lines[0] == "party,column,auroc worse by"
    worse = {tuple(line.split(",")[:2]): float(line.split(",")[2]) for line in lines[1:]}
    assert worse["bank", "age"] > 0.05 and worse["insurer", "claims"] > 0.05  # label: age + claims > 0
    noise = [value for (_, column), value in worse.items() if column in ("income", "balance", "mileage")]
    assert max(map(abs, noise)) < 0.05 < worse["bank", "(all)"]


def test_workers_explain_over_a_broker_and_each_party_keeps_what_its_own_columns_are_worth(
    trained: Path, broker_url: str
) -> None:
    bank = trained / "bank-explain.toml"
    bank.write_text(f"{(trained / 'bank.toml').read_text()}\n[serve]\nexplain = true\n")
    job, log = ("--job", trained / "job.toml"), trained / "explained.log"
    serve = ("workers.feature_party", *job, "--party", bank, "--serve")
    explain = ("workers.label_holder", *job, "--party", trained / "insurer.toml", "--explain")
    with worker(serve, trained / "serves.log", broker_url), worker(explain, log, broker_url) as explaining:
        assert explaining.wait() == 0, log.read_text()
    (kept,) = (trained / "state" / "bank" / "versions").glob("*/importance.csv")
    worse = {line.split(",")[1]: float(line.split(",")[2]) for line in kept.read_text().splitlines()[1:]}
    assert worse.keys() == {"(all)", "age", "income", "balance"}
    assert worse["age"] > 0.05 > max(abs(worse["income"]), abs(worse["balance"]))
    told = (trained / "importance.csv").read_text()
    assert "insurer,claims," in told and "bank,column 0," in told and "income" not in told


def test_versions_are_listed_promoted_and_exported(trained: Path) -> None:
    job, _, insurer = files(trained)
    listed = sl_queue("versions", job, insurer)
    assert listed.returncode == 0, listed.stderr
    (folder,) = (trained / "state" / "insurer" / "versions").iterdir()
    assert folder.name in listed.stdout and "auroc" in listed.stdout and "in use" in listed.stdout
    assert "defaulted" not in (folder / "card.md").read_text().split("## Data")[0]
    promoted = sl_queue("promote", job, insurer, folder.name[:6])
    assert promoted.returncode == 0 and "is in use" in promoted.stdout
    exported = sl_queue("export", job, insurer, "--to", "torch")
    assert exported.returncode == 0, exported.stderr
    assert "inputs bank, insurer" in exported.stdout
    assert {path.name for path in folder.glob("*.pt2")} == {"base.pt2", "fuse.pt2"}


def test_what_cannot_be_predicted_is_said_in_one_line(trained: Path, tmp_path: Path) -> None:
    lacking = sl_queue("predict", *files(trained), "--state", tmp_path)
    assert lacking.returncode != 0
    assert "holds no trained model" in lacking.stderr
    unknown = sl_queue("predict", *files(trained), "--run", "nowhere")
    assert "no version of run 'nowhere'" in unknown.stderr


def predicted_with(trained: Path, folder: Path, text: str) -> CompletedProcess[str]:
    """Predict with another table of the insurer's, for the first rows of the bank's."""
    bank = pa.parquet.read_table(trained / "bank_new.parquet")
    kept = [i for i, one in enumerate(bank["customer_id"].to_pylist()) if one in (70_000, 70_001)]
    pa.parquet.write_table(bank.take(kept), folder / "b.parquet")
    (folder / "i.csv").write_text(text)
    for name, table in (("bank", "b.parquet"), ("insurer", "i.csv")):
        own = (trained / f"{name}.toml").read_text().split("\n[predict]")[0]
        (trained / f"{name}-other.toml").write_text(f'{own}\n[predict]\npath = "{folder / table}"\n')
    parties = (trained / "bank-other.toml", trained / "insurer-other.toml")
    return sl_queue("predict", trained / "job.toml", *parties, "--out", folder)


def test_columns_are_taken_by_name_in_the_order_of_training_whatever_else_is_there(
    trained: Path, tmp_path: Path
) -> None:
    tables = {
        "as trained": "customer_id,claims,mileage\n70000,0.5,-1.5\n70001,2,0.25\n",
        "turned round": "mileage,claims,customer_id\n-1.5,0.5,70000\n0.25,2,70001\n",
        "one more": "customer_id,another,mileage,claims\n70000,9,-1.5,0.5\n70001,9,0.25,2\n",
    }
    found = {}
    for name, text in tables.items():
        done = predicted_with(trained, tmp_path, text)
        assert done.returncode == 0, (name, done.stderr)
        found[name] = pa.parquet.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert found["turned round"] == found["as trained"] == found["one more"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no column 'customer_id'"),
        ("customer_id,claims,mileage\n", "there are no rows"),
        ("customer_id,claims\n70000,0.5\n70001,2\n", "trained with the column 'mileage', which is not there"),
        ("customer_id,claims,mileage\n70000,0.5,much\n70001,2,1\n", "'mileage' (text: 1 of 2 values are not numbers)"),
        ("customer_id,claims,mileage\n70000,0.5,\n70001,2,1\n", "values are missing in column 'mileage' in 1 of 2"),
        ("customer_id,claims,mileage\na,0.5,1\nb,2,1\n", "the ids of 'bank' are of type integer"),
    ],
)
def test_a_table_that_cannot_be_predicted_is_said_before_anything_is_sent(
    trained: Path, tmp_path: Path, text: str, told: str
) -> None:
    done = predicted_with(trained, tmp_path, text)
    assert done.returncode in (2, 3)
    assert told in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "predictions.parquet").exists()


def test_workers_that_are_killed_leave_the_same_file_with_each_row_once(trained: Path, broker_url: str) -> None:
    assert sl_queue("predict", *files(trained)).returncode == 0
    wanted = (trained / "predictions.csv").read_bytes()
    (trained / "predictions.csv").unlink()
    commands = {
        "scheduler": ["workers.scheduler", "--state", trained / "state" / "scheduler"],
        "bank": ["workers.feature_party", "--party", trained / "bank.toml"],
        "insurer": ["workers.label_holder", "--party", trained / "insurer.toml"],
    }
    pieces = trained / "state" / "insurer" / "predictions" / "today" / "pieces"
    with ExitStack() as running:

        def start(role: str) -> Forked:
            words = [*commands[role], "--job", trained / "job.toml", "--predict", "today"]
            return running.enter_context(worker(words, trained / f"{role}.log", broker_url))

        workers = {role: start(role) for role in commands}
        for role in commands:
            await_that(lambda: any(pieces.glob("*.npy")) or workers["insurer"].poll() is not None, "no piece came")
            workers[role].kill()
            workers[role] = start(role)
        codes = {role: process.wait() for role, process in workers.items()}
    assert codes == dict.fromkeys(commands, 0), [(trained / f"{role}.log").read_text() for role in commands]
    assert (trained / "predictions.csv").read_bytes() == wanted


def worker(words: Sequence[object], log: Path, broker_url: str) -> AbstractContextManager[Forked]:
    return forked(words, environment(SL_QUEUE_BROKER=broker_url), stdout=log, stderr=log)


def last_words(process: Forked, log: Path) -> str:
    """Ask a worker to end, and return what it says then."""
    process.send_signal(signal.SIGTERM)
    process.wait()
    return log.read_text().splitlines()[-1]


def ask(port: int, ids: list[int]) -> tuple[int, dict[str, object]]:
    """Ask a service; (0, {}) while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", "/predict", json.dumps({"ids": ids}))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except OSError:
        return 0, {}
    finally:
        connection.close()


def test_a_service_answers_over_http_whoever_is_killed(trained: Path, broker_url: str) -> None:
    assert sl_queue("predict", *files(trained)).returncode == 0
    table = pa.csv.read_csv(trained / "predictions.csv")
    first = dict(zip(table["customer_id"].to_pylist()[:5], table["probability"].to_pylist()[:5], strict=True))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    party = trained / "insurer-serve.toml"
    party.write_text(
        f'{(trained / "insurer.toml").read_text()}\n[serve]\nlisten = "127.0.0.1:{port}"\ndeadline = 15.0\n'
    )
    commands = {
        "bank": ["workers.feature_party", "--party", trained / "bank.toml"],
        "insurer": ["workers.label_holder", "--party", party],
    }

    asked: list[tuple[int, dict[str, object]]] = []

    def answered() -> bool:
        asked.append(ask(port, [*first]))
        return asked[-1][0] == 200

    with ExitStack() as running:

        def start(role: str) -> Forked:
            words = [*commands[role], "--job", trained / "job.toml", "--serve"]
            return running.enter_context(worker(words, trained / f"{role}.log", broker_url))

        workers = {role: start(role) for role in commands}
        for role in ("bank", "insurer", "bank"):
            await_that(answered, lambda: str(asked[-1]))
            predictions = asked[-1][1]["predictions"]
            assert isinstance(predictions, list)
            assert {one["id"]: pytest.approx(one["probability"], abs=1e-6) for one in predictions} == first
            workers[role].kill()
            workers[role] = start(role)
        await_that(answered, lambda: str(asked[-1]))
        for role, process in workers.items():
            assert last_words(process, trained / f"{role}.log").endswith("asked to end (SIGTERM)"), "and no checkpoint"
