"""A report opens anywhere, without anybody to answer; a page is shown beside `sl-queue local`."""

import csv
import json
import os
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

from sl_queue.config.job import Job
from sl_queue.launch.reporting import write_report
from tests.support.browser import chromium, complaints, contrast, overflow, text_of
from tests.support.credit import edit
from tests.support.crew import FILES, write_job
from tests.system.test_cli import COMMAND, environment, sl_queue


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train with a page beside it; returns the folder, and the page as it was."""
    folder = tmp_path_factory.mktemp("finished")
    job = write_job(folder)
    command = [
        COMMAND,
        "local",
        str(job),
        *(str(folder / name) for name in FILES),
        "--out",
        str(folder / "out"),
        "--watch",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stderr.readline())
        assert found
        with urllib.request.urlopen(found[0], timeout=10) as answer:
            shown = answer.read().decode()
        process.stderr.read()
    assert process.returncode == 0
    return folder, shown


def test_local_shows_the_page_beside_the_run(finished: tuple[Path, str]) -> None:
    assert "Who waits for whom" in finished[1]


@pytest.mark.timeout(240)
def test_a_report_opens_without_network_with_all_that_was_found(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    (folder / "out" / "chaos.txt").write_text("passed: 3 x kill\n")
    (folder / "out" / "privacy.txt").write_text("labels, epsilon 1  0.9\n")
    importance = "party,column,auroc worse by\nbank,(all),0.21\nbank,income,0.2\n"
    (folder / "out" / "importance.csv").write_text(importance)
    checked = sl_queue("check", folder / "job.toml", *(folder / name for name in FILES), "--out", folder / "out")
    assert checked.returncode == 0, checked.stderr
    done = sl_queue("report", folder / "job.toml", "--state", folder / "out" / "scheduler", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"customer_id|mileage|income|amqp", page)  # neither columns nor where the broker is
    for dark in (False, True):
        with chromium(dark=dark) as chrome:
            chrome.execute_cdp_cmd("Network.enable", {})
            offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            chrome.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
            chrome.get((tmp_path / "report.html").as_uri())
            assert text_of(chrome, "phase") == "finished"
            assert text_of(chrome, "step") == "40 / 40"
            assert re.search(r"bank computing \d+ %", text_of(chrome, "parties"))
            assert "held-out auroc by epoch" in text_of(chrome, "charts")
            extra = text_of(chrome, "extra")
            assert "passed: 3 x kill" in extra
            assert "labels, epsilon 1  0.9" in extra
            assert "bank: auroc worse by 0.21 without it" in extra
            assert "Privacy of insurer" in extra
            assert '"batch_size": 32' in extra
            assert "Check" in extra
            assert chrome.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == dark
            assert contrast(chrome) >= 4.5
            assert overflow(chrome, 400) <= 0
            assert complaints(chrome) == []


def test_the_curves_are_those_of_the_history(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    write_report(Job.load(folder / "job.toml"), folder / "out" / "scheduler", tmp_path)
    with (tmp_path / "curves.csv").open() as file:
        lines = list(csv.DictReader(file))
    history = [json.loads(line) for line in (folder / "out" / "scheduler" / "history.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["epoch"]]
    assert [float(line["mean_loss"]) for line in epochs] == [epoch["loss"] for epoch in history]
    assert [float(line["held_out_auroc"]) for line in epochs] == [epoch["holdout"]["auroc"] for epoch in history]
    steps = [int(line["step"]) for line in lines]
    assert steps == sorted(steps)


def test_a_run_without_a_trace_has_a_report_of_its_history(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    bare = tmp_path / "scheduler"
    bare.mkdir()
    for name in ("run.json", "history.jsonl"):
        os.link(folder / "out" / "scheduler" / name, bare / name)
    (bare / "trace.json").write_text('{"format": 1, "status": ')  # torn
    html, table = write_report(Job.load(folder / "job.toml"), bare, tmp_path / "out")
    assert '"phase": "finished"' in html.read_text()
    assert len(table.read_text().splitlines()) == 1 + 8


def test_what_is_no_run_of_the_job_is_named(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    nothing = sl_queue("report", folder / "job.toml", "--state", tmp_path)
    assert (nothing.returncode, "holds no run that has begun" in nothing.stderr) == (4, True)
    other = tmp_path / "job.toml"
    other.write_text((folder / "job.toml").read_text())
    edit(other, "seed = 7", "seed = 8")
    wrong = sl_queue("report", other, "--state", folder / "out" / "scheduler", "--out", tmp_path)
    assert (wrong.returncode, "belongs to another job" in wrong.stderr) == (4, True)
    assert not (tmp_path / "report.html").exists()
