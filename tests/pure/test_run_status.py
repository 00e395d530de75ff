"""The status of a run: typed here, and the JSON that programs rely on."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.control import Alive, EpochDone, EpochResult, Waiting
from sl_queue.protocol.messages import Kind
from sl_queue.protocol.scheduler.status import RunStatus, Wait, as_json, describe, from_json
from sl_queue.protocol.totals import Now, Totals
from tests.pure.test_progress import Mind

KEYS = (  # of `sl-queue status --json`: programs rely on them
    *("job", "run", "generation", "phase", "epoch", "epochs", "step", "steps", "loss", "samples"),
    *("parties", "history", "reason", "error", "failed", "told_at"),
)
PARTY_KEYS = ("phase", "step", "committed", "silent_s", "version", "refused", "refused_s", "waiting_for")


def told() -> RunStatus:
    mind = Mind().everyone_joins()
    mind.hear("label", EpochDone("label1", 0, EpochResult(0, 1, 0.25, {"auroc": None}, 1.5)))
    mind.hear("a", Waiting("a1", 0, "label", Kind.GRADIENT, 2, 1, 3.0, 0.5))
    return describe(mind.plan, mind.state, 4.0, 1767225600.0)


def test_the_keys_of_the_json_are_those_that_programs_rely_on() -> None:
    values = as_json(told())
    assert tuple(values) == KEYS
    for party in values["parties"].values():
        assert tuple(party)[: len(PARTY_KEYS)] == PARTY_KEYS
    assert values["told_at"] == "2026-01-01T00:00:00.000+00:00"
    (line,) = values["history"]
    assert line == {"epoch": 0, "step": 1, "loss": 0.25, "holdout": {"auroc": None}, "seconds": 1.5}
    assert values["parties"]["a"]["waiting_for"] == "gradient 2.1 of label for 3 s"


def test_json_gives_back_the_status() -> None:
    status = told()
    assert from_json(json.loads(json.dumps(as_json(status)))) == status
    assert status.parties["a"].wait == Wait("label", "gradient", 2, 1, 3.0)


def test_a_status_of_the_version_before_is_read_and_so_is_one_of_a_later() -> None:
    values = as_json(told())
    earlier = {key: value for key, value in values.items() if key != "told_at"}
    earlier["parties"] = {
        name: {key: value for key, value in party.items() if key not in ("version", "refused_s", "wait")}
        for name, party in values["parties"].items()
    }
    before = from_json(earlier)
    assert before.told_at is None and before.age_s(1767225600.0) is None
    assert before.parties["a"].waiting_for == "gradient 2.1 of label for 3 s"
    later = {**values, "mood": "good", "phase": "aligning", "parties": {"a": {"phase": "aligning", "rows": 7}}}
    assert from_json(later).phase == "aligning"
    assert not from_json(later).over


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (Now("hands", "a hand to come", 61.2), "a hand to come for 61 s"),
        (Now("hands", "forward", 3.0), "a hand's forward for 3 s"),
        (Now("hands", "forward", 0.1), None),
        (Now("label", "gradient", 3.0), None),
        (None, None),
    ],
)
def test_a_status_has_the_hands_of_a_party_and_what_it_awaits_of_them(now: Now | None, said: str | None) -> None:
    mind = Mind().everyone_joins()
    mind.hear("a", Alive("a1", Totals(age_s=5.0, hands=3, now=now)))
    mind.hear("label", Alive("label1", Totals(age_s=5.0, hands=-7)))
    status = describe(mind.plan, mind.state, 4.0, 1767225600.0)
    assert (status.parties["a"].hands, status.parties["label"].hands, status.parties["b"].hands) == (3, 0, None)
    assert status.parties["a"].waiting_for == said
    assert from_json(json.loads(json.dumps(as_json(status)))) == status


@pytest.mark.parametrize("change", [{"parties": 7}, {"epoch": "x"}, {"history": [{}]}, {"parties": {"a": None}}])
def test_what_is_no_status_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="the scheduler's status cannot be read"):
        from_json({**as_json(told()), **change})


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
anything = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(st.dictionaries(st.sampled_from(KEYS), anything))
@settings(max_examples=40)  # each draws values of any shape for up to sixteen keys
def test_whatever_a_scheduler_says_is_a_status_or_is_refused(values: dict[str, Any]) -> None:
    try:
        status = from_json(values)
    except RemoteProtocolError:
        return
    assert isinstance(status, RunStatus)
    as_json(status)
