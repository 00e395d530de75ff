"""A password that was not escaped is never shown, in whatever way the URL is wrong."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sl_queue.checking.check import check_job
from sl_queue.config.job import Job, PartyFile
from sl_queue.errors import JobError
from sl_queue.launch.connect import connector
from sl_queue.launch.operator import read_status, request_stop, watch_status
from sl_queue.launch.scheduler import run_scheduler
from sl_queue.protocol.broker_url import fault
from sl_queue.transport.rabbitmq.address import Address
from tests.support.credit import write_credit
from tests.support.forked import sl_queue

FIRST, SECOND = "hunterA", "hunterB"  # nothing else contains them
JOB = Job(
    name="credit",
    seed=7,
    epochs=1,
    batch_size=4,
    parties={"bank": {"role": "feature", "cut": [2]}, "insurer": {"role": "label"}},
)
specials = st.sampled_from("#?/@:%[]&=;,+ \\\"'<>{}|^`~!$*()\n\t漢℀\u202e") | st.sampled_from(
    [
        "%zz",
        "?cacertfile=",
        "?connection_attempts=",
        "?heartbeat=",
        "?frame_max=",
        "&ssl_options=",
        "?x=",
        "#a@",
        "//",
        "::",
    ]
)
passwords = st.tuples(st.sampled_from([FIRST, f"12{FIRST}"]), st.lists(specials, max_size=4), st.just(SECOND)).map(
    lambda parts: parts[0] + "".join(parts[1]) + parts[2]
)
places = st.sampled_from(["@h/v", "@h:5671/v", "@h:port/v", "@h,g:5/v", "@h/v?heartbeat=x", "@", "@/v", "@h:0/", ""])


def shown_by(action: Callable[[], Any]) -> str:
    """Everything that an error of the action would show, with SL_QUEUE_DEBUG too; empty if there is none."""
    try:
        action()
    except JobError as error:
        return f"{error} {error!r} {''.join(traceback.format_exception(error))}"
    return ""


@given(st.sampled_from(["amqp", "amqps", "http", "amqp:"]), passwords, places)
@example("amqp", "hunterA#hunterB", "@h/v")
@example("amqp", "hunterA?hunterB", "@h/v")
@example("amqp", "12?connection_attempts=hunterAhunterB", "@h/v")
@example("amqps", "hunterA℀hunterB", "@h/v")
@example("amqp", "[hunterAhunterB", "@h/v")
def test_no_error_of_a_url_shows_any_of_its_password(scheme: str, password: str, place: str) -> None:
    url = f"{scheme}://bank:{password}{place}"
    if place == "" and "@" in password:
        return  # nobody can tell its end from a host
    said = [
        shown_by(lambda: Address.parse(url)),
        shown_by(lambda: connector(JOB, url)("bank", 1)),
        shown_by(lambda: PartyFile(party="bank", broker=url, data={"source": "m:f"})),
        shown_by(lambda: PartyFile(party="bank", data={"source": "m:f"}).broker_url(url)),
        str(fault(url)),
    ]
    if fault(url) is None and not said[0]:
        said += [f"{address} {address!r}" for address in Address.parse(url)]
    for text in said:
        assert FIRST not in text
        assert SECOND not in text


ENTRIES: dict[str, Callable[[str], Any]] = {
    "status": lambda url: watch_status(JOB, url),
    "the newest status": lambda url: read_status(JOB, url),
    "stop": lambda url: request_stop(JOB, url),
    "scheduler": lambda url: run_scheduler(JOB, url, Path("nowhere")),
}
BAD = {
    "hash": "amqp://u:hunterA#x@h/v",
    "question": "amqp://u:hunterA?x@h/v",
    "slash": "amqp://u:hunterA/x@h/v",
    "port": "amqp://u:hunterA:x@h:port/v",
    "option": "amqp://u:hunterA@h/v?connection_attempts=hunterB",
    "unknown option": "amqp://u:hunterA@h/v?hunterB=1",
    "form": "amqp://u:hunterA℀@h/v",
}


@pytest.mark.parametrize("url", BAD.values(), ids=BAD)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_way_in_says_what_is_wrong_in_words_of_its_own(
    entry: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the scheduler makes its folder
    (tmp_path / "url").write_text(f"{url}\n")
    (tmp_path / "url").chmod(0o600)
    written = [f"file:{tmp_path / 'url'}"] if entry == "scheduler" else []  # the command has read it before
    for where in (url, *written):
        said = shown_by(lambda where=where: ENTRIES[entry](where))  # type: ignore[misc]
        assert "the broker's URL cannot be used" in said
        assert FIRST not in said and SECOND not in said


@pytest.mark.parametrize("url", BAD.values(), ids=BAD)
def test_check_says_what_is_wrong_without_the_password(url: str, tmp_path: Path) -> None:
    told: list[str] = []
    assert check_job(write_credit(tmp_path), [], url, lambda finding: told.append(finding.text)) == 2
    assert any("the broker's URL cannot be used" in line for line in told)
    assert FIRST not in " ".join(told) and SECOND not in " ".join(told)


def test_a_command_with_a_wrong_url_is_one_line_also_with_a_traceback(tmp_path: Path) -> None:
    job = write_credit(tmp_path)
    done = sl_queue("--debug", "status", job, SL_QUEUE_BROKER=BAD["hash"])
    assert done.returncode == 2
    assert "write @ as %40, / as %2F, : as %3A, # as %23, ? as %3F" in done.stderr
    assert FIRST not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:hunter%232@h:5672/v",
        "amqps://[::1]:5671/",
        "amqp://a:b@h,g:5673/%2F?heartbeat=5&connection_attempts=3",
        "amqp://h",
        "amqp://u@h/v",
    ],
)
def test_a_url_that_is_right_is_read(url: str) -> None:
    assert fault(url) is None
    assert Address.parse(url)
