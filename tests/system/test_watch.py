"""The live page of a run over a real broker, in a real browser: one party is slow, is killed, and comes back."""

import os
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from sl_queue.loops.scheduling import STATUS_EVERY_S
from sl_queue.observe.curves import MOST_POINTS
from sl_queue.observe.keeper import Keeper
from sl_queue.observe.live import Live
from sl_queue.observe.web import WatchServer
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.messages import OPERATOR
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus
from sl_queue.protocol.totals import Totals
from sl_queue.testing.private_broker import free_ports
from tests.support.browser import chromium, complaints, overflow, text_of, until
from tests.support.credit import edit
from tests.support.crew import KEYS, ROLES, Crew, write_job
from tests.support.forked import environment, forked, sl_queue
from tests.support.secured import SEALED, write_keys
from tests.support.waiting import await_that


def work_slowly(environ: Mapping[str, str]) -> None:
    """Prepare a worker's process."""
    os.environ.update(environ)


def write_slow_run(folder: Path, name: str) -> Path:
    """Write a sealed job that lasts, whose bank takes a while for each forward pass."""
    job = write_job(folder, checkpoint_every=20)
    edit(job, 'name = "credit"', f'name = "{name}"')
    edit(job, "epochs = 8", "epochs = 2000")
    edit(folder / "bank.py", "    def forward(self, x: torch.Tensor) -> torch.Tensor:\n", SLOW_FORWARD)
    if not SEALED:
        job.write_text(f"{job.read_text()}\n{write_keys(folder / KEYS, (*ROLES, OPERATOR))}")
    return job


SLOW_FORWARD = """    def forward(self, x: torch.Tensor) -> torch.Tensor:
        __import__("time").sleep(0.05)
"""


@contextmanager
def watching(job: Path, url: str, *options: str) -> Iterator[str]:
    """Run `sl-queue watch` and yield the address of its page."""
    said = job.parent / "watch.said"
    words = ("sl-queue", "watch", job, "--broker", url, "--port", "0", *options)
    with forked(words, environment(), stdout=Path(os.devnull), stderr=said):
        await_that(lambda: "http://" in said.read_text(), said.read_text)
        found = re.search(r"http://\S+", said.read_text())
        assert found
        yield found[0]


def start(crew: Crew, role: str, metrics: int) -> None:
    key = crew.folder / KEYS / role / "seal.key"
    environ = {"SL_QUEUE_KEY": str(key), "SL_QUEUE_METRICS_PORT": str(metrics)}
    crew.start(role, prepare=(work_slowly, environ), log_level="info")


def busy_and_age(port: int) -> tuple[float, float]:
    """Read a party's counters as Prometheus does."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    busy = re.search(r"^sl_queue_busy_seconds_total (\S+)", text, re.MULTILINE)
    assert busy
    waits = re.findall(r"^sl_queue_waiting_seconds_total\{[^}]*\} (\S+)", text, re.MULTILINE)
    return float(busy[1]), float(busy[1]) + sum(map(float, waits))


def measured_bubbles(ports: Mapping[str, int], seconds: int) -> list[float]:
    """Return the share of the time in which even the busiest party waits, by Prometheus' counters.

    Of three windows as long as the page's, each a second later: a status may be a second old when it is shown.
    """
    samples = []
    for _ in range(seconds + 3):
        samples.append({role: busy_and_age(port) for role, port in ports.items()})
        time.sleep(1.0)
    windows = zip(samples, samples[seconds:], strict=False)
    return [1 - max((now[r][0] - then[r][0]) / (now[r][1] - then[r][1]) for r in ports) for then, now in windows]


def points(chrome: Chrome) -> list[int]:
    found: list[int] = chrome.execute_script(
        "return [...document.querySelectorAll('#charts [data-points]')].map(e => Number(e.dataset.points))"
    )
    return found


def kill_and_start_again(crew: Crew, chrome: Chrome, metrics: int) -> float:
    """Kill the bank and start it again; returns the seconds after which the page showed that it was gone."""
    killed = time.monotonic()
    crew.kill("bank")
    until(chrome, lambda c: "bank is gone" in text_of(c, "verdict"))
    dead_s = time.monotonic() - killed
    start(crew, "bank", metrics)
    until(chrome, lambda c: "bank a new process goes on from its checkpoint" in text_of(c, "log"))
    until(chrome, lambda c: "bank is gone" not in text_of(c, "verdict"))
    assert "bank is heard again" in text_of(chrome, "log")
    return dead_s


@pytest.fixture
def crew(tmp_path: Path, broker_url: str, unique: str) -> Iterator[Crew]:
    write_slow_run(tmp_path, unique)
    with Crew(tmp_path, broker_url) as started:
        yield started


def test_the_page_shows_who_is_waited_for_who_is_killed_and_who_comes_back(crew: Crew) -> None:
    ports = dict(zip(ROLES, free_ports(len(ROLES)), strict=True))
    key = ("--key", str(crew.folder / KEYS / OPERATOR / "seal.key"))
    for role in ROLES:
        start(crew, role, ports[role])
    crew.await_step("insurer", 15)  # a page that is opened late
    with watching(crew.job, crew.url, *key) as url, chromium() as chrome:
        began = time.monotonic()
        chrome.get(url)
        until(chrome, lambda c: "bank is waited for: insurer waits for its" in text_of(c, "verdict"))
        said_s = time.monotonic() - began
        assert re.search(r"activations( and held-out activations)? \d+ % of the time", text_of(chrome, "verdict"))
        assert text_of(chrome, "phase") == "running"

        until(chrome, lambda c: c.execute_script("return points.length > 0 && points[0][0] < 10"))
        assert "held-out auroc by epoch" in text_of(chrome, "charts")

        bubbles = measured_bubbles({role: ports[role] for role in ("bank", "insurer")}, 10)
        shown = int(text_of(chrome, "bubble").split()[0]) / 100
        assert min(abs(shown - bubble) for bubble in bubbles) <= 0.05
        assert re.search(r"even bank, the busiest, waits; ideal \d+ %", text_of(chrome, "bubbleof"))

        assert sl_queue("status", str(crew.job), "--broker", crew.url, *key).returncode == 0  # beside the page

        had = until(chrome, lambda c: points(c) if points(c) and points(c)[0] > 5 else None)
        chrome.refresh()
        until(chrome, lambda c: len(points(c)) == len(had) and points(c)[0] >= had[0])

        dead_s = kill_and_start_again(crew, chrome, ports["bank"])
        assert overflow(chrome, 400) <= 0
        assert complaints(chrome) == []
        done = sl_queue("report", crew.job, "--state", crew.states / "scheduler", "--out", crew.folder)
        assert done.returncode == 0, done.stderr
        assert '"phase": "running"' in (crew.folder / "report.html").read_text()
        print(f"said who is waited for after {said_s:.1f} s, shown dead after {dead_s:.1f} s")
        print(f"bubble {shown} on the page, by Prometheus {bubbles}")


def test_a_sealed_run_is_shown_to_nobody_without_the_key(tmp_path: Path, broker_url: str, unique: str) -> None:
    job = write_slow_run(tmp_path, unique)
    done = sl_queue("watch", str(job), "--broker", broker_url, "--port", "0")
    assert done.returncode == 2
    assert "'operator' needs its private key" in done.stderr


def test_ten_thousand_steps_are_light_for_the_scheduler_and_for_the_browser(tmp_path: Path) -> None:
    live, keeper = Live(), Keeper(tmp_path)
    with WatchServer(live, 0) as server, chromium() as chrome:
        chrome.get(server.url)
        spent_s, told_s = 0.0, 0.0
        for step in range(0, 10_000, 4):
            waited = {"insurer": {"gradient": step / 200}}
            totals = Totals(step / 100, step / 200, waited, {"applied": step, "duplicates": step // 100})
            parties = {name: PartyStatus("here", step, step - 3, 0.1, totals=totals) for name in ("bank", "insurer")}
            numbers = {"step": step, "steps": 10_000, "samples": 32 * step, "epoch": step // 100, "epochs": 100}
            history = tuple(EpochResult(e, 100 * e, 1 / (e + 1), {"auroc": 0.5}) for e in range(step // 100)[-20:])
            began = time.thread_time()
            status = RunStatus(
                "running", "credit", "r1", loss=1 / (step + 1), parties=parties, history=history, **numbers
            )
            keeper.take(status)
            live.take(status)
            spent_s, told_s = spent_s + time.thread_time() - began, told_s + STATUS_EVERY_S
        assert spent_s / told_s < 0.03  # of the scheduler's time, which tells four times a second
        until(chrome, lambda c: "9,997" in text_of(c, "step"))
        assert 500 < points(chrome)[0] <= MOST_POINTS
        chrome.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        heap = chrome.execute_script("return performance.memory.usedJSHeapSize")
        assert heap < 100e6
        print(f"the scheduler's part {spent_s / told_s:.4f}, the page's heap {heap / 1e6:.1f} MB")
