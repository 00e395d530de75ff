"""The live page in a browser, fed by statuses: readable in the dark and on a phone, honest when nothing comes."""

from typing import Any

import pytest
from selenium.webdriver import Chrome

from sl_queue.observe.live import Live
from sl_queue.observe.web import WatchServer
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus
from sl_queue.protocol.totals import Now, Totals
from tests.support.browser import chromium, complaints, contrast, overflow, text_of, until

pytestmark = pytest.mark.timeout(240)

AA = 4.5


def totals(age_s: float, source: str = "bank", **counts: Any) -> Totals:
    """Return totals of a worker that has waited a third of its time."""
    waited = {source: {"activation": age_s / 3}, "disk": {"commit": age_s / 9}}
    return Totals(age_s, age_s * 5 / 9, waited, {"applied": 5, "duplicates": 2}, now=Now(source, "x", 2.0), **counts)


def status(step: int, **changes: Any) -> RunStatus:
    """Return a status in which one party is gone and another is refused."""
    leak = {"bank": {"norm": 0.7, "direction": 0.99, "chance": 0.55}}
    history = tuple(
        EpochResult(e, 9 * e, 1 / (e + 1), {"auroc": 0.5 + e / 99}, 1.0, leak, {"f1": 0.5}) for e in range(9)
    )
    counts = {"sent_bytes": 10**6 + 5000 * step, "received_bytes": 10**6, "tensor_bytes": 5, "float32_bytes": 10}
    parties = {
        "bank": PartyStatus("here", step, step - 3, 9.0, totals=totals(1.0 + step, "insurer", **counts)),
        "insurer": PartyStatus("waiting", step, step - 3, 0.1, totals=totals(1.0 + step, **counts)),
        "post": PartyStatus("refused", refused="its job differs: 'seed' is 8 here and 7 there", refused_s=5.0),
    }
    about = {"steps": 100, "samples": 32 * step, "epoch": 9, "epochs": 12, "reason": "asked to"}
    return RunStatus(
        "stopping", "credit", "r1", step=step, loss=0.5, parties=parties, history=history, **about, **changes
    )


@pytest.mark.parametrize("dark", [False, True])
def test_all_that_can_be_shown_can_be_read_in_light_and_dark_and_on_a_phone(dark: bool) -> None:
    live = Live()
    with WatchServer(live, 0) as server, chromium(dark=dark) as chrome:
        chrome.get(server.url)
        for step in range(12):
            live.take(status(step, generation=step // 6))
        until(chrome, lambda c: text_of(c, "step") == "12 / 100", 20)
        assert chrome.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == dark
        assert "bank is gone: nothing heard from it for 9.0 s" in text_of(chrome, "verdict")
        for title in ("loss by step", "held-out auroc", "training f1", "labels as read by bank"):
            assert title in text_of(chrome, "charts")
        rows = text_of(chrome, "table")
        assert "its job differs" in rows
        assert "kB/s" in rows  # of late, beside the bytes in all
        assert "50 %" in rows  # of what float32 would have taken
        live.trouble("the broker refuses the login")
        until(chrome, lambda c: text_of(c, "alert") == "the broker refuses the login", 20)
        assert contrast(chrome) >= AA
        assert overflow(chrome, 400) <= 0
        assert complaints(chrome) == []


def test_a_page_says_when_nothing_is_heard_and_goes_on_by_itself_when_something_is() -> None:
    live = Live()

    def shows(chrome: Chrome, step: int) -> bool:
        """Tell of a step, as a scheduler does again and again, and see whether the page shows it."""
        live.take(status(step))
        return text_of(chrome, "alert") == "" and text_of(chrome, "step") == f"{step + 1} / 100"

    with chromium() as chrome:
        with WatchServer(live, 0) as server:
            chrome.get(server.url)
            until(chrome, lambda c: "Waiting for the scheduler's first word" in text_of(c, "alert"), 20)
            live.take(status(3), age_s=30.0)
            until(chrome, lambda c: "The scheduler has said nothing for 3" in text_of(c, "alert"), 20)
            until(chrome, lambda c: shows(c, 4), 20)
        until(chrome, lambda c: "The connection to sl-queue is lost" in text_of(c, "alert"), 20)
        with WatchServer(live, server.port):
            until(chrome, lambda c: shows(c, 5), 60)
            assert chrome.execute_script("return points.map(p => p[0])") == [3, 4, 5]
