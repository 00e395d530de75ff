"""A peer's text is data: wherever it came from, it is shown as one line of printable characters, without markup."""

import io
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sl_queue.errors import PeerFailed
from sl_queue.observe.console import history_table, status_view
from sl_queue.protocol.control import EpochDone, EpochResult, Failed, Finished, Start, Stop, Waiting
from sl_queue.protocol.messages import Kind
from sl_queue.protocol.scheduler.state import Phase
from sl_queue.protocol.scheduler.status import Telling, as_json, describe, from_json
from sl_queue.protocol.text import LONGEST, printable
from tests.support.post import Post
from tests.support.progress import JOB, PARTIES, Mind, joined

HOSTILE = "x\n2026-11-25 INFO run r is finished\r\x1b]0;owned\x07\x1b[2J\u202eevil\u2028[bold]b[/bold][link=u]"
texts = st.text(st.characters() | st.sampled_from("\n\r\x1b\x07\x9b\u202e\u2066\u200b\u2028[]/"), max_size=60)


def is_a_line(text: str) -> bool:
    return all(unicodedata.category(each)[0] not in "CZ" or each == " " for each in text)


@given(texts | st.text(max_size=2 * LONGEST), st.integers(10, LONGEST))
def test_a_text_becomes_one_line_of_printable_characters_no_longer_than_the_limit(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert is_a_line(shown)
    assert len(shown) <= limit
    assert printable(shown, limit) == shown
    if is_a_line(text) and len(text) <= limit:
        assert shown == text


def leaves(value: Any) -> list[str]:
    """Every text in a status, also those that name something."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in leaves(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in leaves(part)]
    return [value] if isinstance(value, str) else []


@given(texts)
def test_nothing_that_a_party_writes_reaches_status_or_another_party_as_it_is(text: str) -> None:
    for reports in (
        [Failed("a1", text, text)],
        [joined("a2", job=JOB | {text: text, "epochs": text})],
        [joined("a2", rows_digest=text + "x", id_type=text)],
        [joined("a2", held=(1,), run=text)],
        [Waiting("a1", 0, text, Kind.GRADIENT, 0, 0, 1.0, 1.0)],
        [Finished("a1", {text: text})],
    ):
        for mind in (Mind().hear("b", joined("b1")), Mind().everyone_joins()):
            mind.hear("a", *reports)
            told = leaves(as_json(describe(mind.plan, mind.state, 1.0, 0.0)))
            told += [order.reason for _, order in mind.orders if isinstance(order, Stop)]
            assert all(map(is_a_line, told)), told


@given(texts)
def test_a_metric_is_named_by_printable_characters_and_there_are_not_too_many(name: str) -> None:
    holdout = {name: 0.5} | {str(number): 0.0 for number in range(1_000)}
    mind = Mind().everyone_joins().hear("label", EpochDone("label1", 0, EpochResult(0, 1, 0.1, holdout)))
    (line,) = as_json(describe(mind.plan, mind.state, 1.0, 0.0))["history"]
    assert all(map(is_a_line, line["holdout"]))
    assert len(line["holdout"]) <= 100


def test_a_run_whose_name_is_no_name_is_nobodys() -> None:
    mind = Mind()
    for party in PARTIES:
        mind.hear(party, joined(f"{party}1", held=(1,), run=HOSTILE))
    assert mind.state.phase is Phase.FAILED
    assert not mind.ordered(Start)
    assert "names no run" in (mind.state.reason or "")


def rendered(what: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="truecolor")
    console.print(what, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_status_is_shown_without_markup_and_control_characters_whoever_wrote_it() -> None:
    """Also one of a scheduler that lies."""
    mind = Mind().everyone_joins()
    run = as_json(describe(mind.plan, mind.state, 1.0, 0.0)) | {"job": HOSTILE, "reason": HOSTILE, "run": HOSTILE}
    parties = {f"{name}{HOSTILE}": party | {"refused": HOSTILE} for name, party in run["parties"].items()}
    for fresh in (True, False):
        shown = rendered(status_view(Telling(from_json(run | {"parties": parties}), fresh, 3.0), 0.0))
        shown = shown.replace("\x1b[1m", "").replace("\x1b[0m", "")  # the head of the table
        assert "[bold]b[/bold][link=u]" in shown
        assert all(map(is_a_line, shown.splitlines()))
        assert not [line for line in shown.splitlines() if line.startswith("2026-11-25")]


def test_a_history_is_shown_without_markup() -> None:
    line = {"epoch": 0, "step": 1, "loss": 0.1, "holdout": {"[red]auroc": 0.5}, "seconds": 1.0}
    assert "held-out [red]auroc" in rendered(history_table([line]))


def test_a_party_repeats_what_it_is_told_as_one_line() -> None:
    post = Post()
    bank = post.channel("a", adopt=False)
    post.command("a", Stop("a0", "", error="RunStopped"))
    post.command("a", Stop("a1", HOSTILE + "x" * 600, error="PeerFailed"))
    with pytest.raises(PeerFailed) as failed:
        bank.wait_for(lambda orders: orders.finish)
    assert is_a_line(str(failed.value)) and len(str(failed.value)) <= LONGEST
    bank.close()
