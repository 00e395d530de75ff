"""A broker's URL comes from an option, the environment or a file, and no password of it is shown."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.config.job import PartyFile, redacted
from sl_queue.errors import JobError
from tests.support.job_files import BANK_TOML, party_complaint, written


def test_the_option_comes_before_the_environment_and_that_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SL_QUEUE_BROKER", raising=False)
    party = PartyFile(party="bank", broker="amqp://file", data={"source": "m:f"})
    assert party.broker_url(None) == "amqp://file"
    monkeypatch.setenv("SL_QUEUE_BROKER", "amqp://environment")
    assert party.broker_url(None) == "amqp://environment"
    assert party.broker_url("memory://") == "memory://"
    monkeypatch.setenv("SL_QUEUE_BROKER", "")
    assert party.broker_url(None) == "amqp://file"
    with pytest.raises(JobError, match="has no broker: give --broker URL, set SL_QUEUE_BROKER"):
        PartyFile(party="bank", data={"source": "m:f"}).broker_url(None)
    monkeypatch.setenv("SL_QUEUE_BROKER", "http://u:hunter2@host")
    with pytest.raises(JobError, match=r"SL_QUEUE_BROKER = 'http://u:\*\*\*@host'") as raised:
        party.broker_url(None)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "memory://",
        "amqp://localhost",
        "amqps://bank:hunter2@broker.example:5671/credit",
        "amqp://guest:guest@[::1]:5672/%2F",
        "amqp://guest:guest@[fe80::1%25eth0]:5672/v",
        "amqp://bank:hunter2@bröker.example.:5672/v",
        "amqps://u:hunter2@one:5671,two:5671,[::1]/v",
        "amqp://u:hunter2@h/v?heartbeat=10",
    ],
)
def test_these_urls_are_brokers(url: str) -> None:
    assert PartyFile(party="bank", broker=url, data={"source": "m:f"}).broker_url() == url


@pytest.mark.parametrize(
    "url",
    [
        "ampq://bank:hunter2@h/v",
        "amqp://",
        "amqp://bank:hunter2",
        "bank:hunter2@h",
        "amqp://bank:hunter2/x@h/v",
        "amqp://bank:1/hunter2@h/v",
        "amqp://bank:1#hunter2@h/v",
        "amqp://bank:1?hunter2@h/v",
        "amqp://h:99999/v",
        "amqp://u:hunter2@h,/v",
        "amqp://u:hunter2@a..b/v",
        "amqp://u:hunter2@./v",
        "amqp://u:hunter2@.a/v",
        f"amqps://u:hunter2@{'a' * 64}.example/v",
        f"amqp://u:hunter2@h,{'ö' * 60}:5672/v",
        "amqp://u:hunter2@h:5672,two:99999/v",
        "memory://h",
        "",
    ],
)
def test_these_urls_are_not_and_the_complaint_shows_no_password(url: str) -> None:
    said = party_complaint(broker=url)
    assert "broker = " in said
    assert "amqps://user:password@host" in said
    assert "hunter2" not in said


def test_a_url_in_the_wrong_place_shows_no_password() -> None:
    url = "amqp://bank:hunter2@h/v"
    for changes in ({"broker": [url]}, {"party": 1, "borker": url}, {"device": [url]}, {"threads": url}, {"base": url}):
        assert "hunter2" not in party_complaint(**changes)


def test_no_representation_of_a_party_file_shows_a_password() -> None:
    party = PartyFile(party="bank", broker="amqp://bank:hunter2@h/v", data={"source": "m:f"})
    for text in (repr(party), str(party), f"{party}", f"{[party]}"):
        assert "hunter2" not in text
        assert "amqp://bank:***@h/v" in text


PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=20)


@given(PRINTABLE.filter(lambda p: "***" not in p and p not in "amqps://user@host.example:5671/vhost"))
def test_no_password_survives_redaction_whatever_it_is_made_of(password: str) -> None:
    shown = redacted(f"amqps://user:{password}@host.example:5671/vhost")
    assert shown == "amqps://user:***@host.example:5671/vhost"


def test_a_url_may_lie_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SL_QUEUE_BROKER", raising=False)
    written(tmp_path, "broker.url", "amqps://bank:secret@broker/credit\n").chmod(0o600)
    bank = PartyFile.load(
        written(tmp_path, "bank.toml", BANK_TOML.replace('"amqps://bank@broker:5671/credit"', '"file:broker.url"'))
    )
    assert bank.broker_url() == "amqps://bank:secret@broker/credit"
    assert bank.broker_url(f"file:{tmp_path / 'broker.url'}") == "amqps://bank:secret@broker/credit"
    assert "secret" not in repr(bank)
    (tmp_path / "broker.url").write_text("http://bank:secret@broker/credit")
    for url in (None, "file:nowhere.url"):
        with pytest.raises(JobError) as raised:
            bank.broker_url(url)
        assert "secret" not in str(raised.value) and "broker" in str(raised.value)
