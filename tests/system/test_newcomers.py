"""Workers that do not fit a run are sent away alone; the others of a party that fails end with code 6."""

from typing import Any

import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.errors import PeerFailed, RunStopped, SlQueueError, TransportError, failure, named
from sl_queue.protocol.control import Alive, Failed, Finished, Progress, Start, Stop, StopRequest
from sl_queue.protocol.messages import OPERATOR
from sl_queue.protocol.scheduler.endings import ending
from sl_queue.protocol.scheduler.state import GIVE_UP, Phase, RunState, durable, missing, silent
from sl_queue.protocol.scheduler.status import RunStatus, describe
from tests.support.credit import edit
from tests.support.crew import Crew, quiet_weights, write_job
from tests.support.progress import JOB, PARTIES, Mind, joined

OTHERS: dict[str, dict[str, Any]] = {
    "rows": {"rows_digest": "other", "n_rows": 9},
    "id type": {"rows_digest": "other", "id_type": "text"},
    "job": {"job": JOB | {"seed": 8}},
    "run": {"held": (1,), "run": "another"},
    "a run that is no name": {"held": (1,), "run": "r\x1b[2J"},
}


def described(mind: Mind, now: float = 1.0) -> RunStatus:
    return describe(mind.plan, mind.state, now, 0.0)


# While a run goes on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopping", [False, True], ids=["running", "stopping"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_worker_that_comes_back_with_something_else_is_refused_alone(other: str, stopping: bool) -> None:
    mind = Mind().everyone_joins().hear("a", Progress("a1", 0, 3, (1, 3)))
    if stopping:
        mind.hear(OPERATOR, StopRequest("s"))
    phase, before = mind.state.phase, mind.state.members["a"]
    mind.hear("a", joined("a2", **OTHERS[other]), now=5.0)
    ((party, order),) = mind.orders
    assert party == "a" and isinstance(order, Stop)
    assert (order.incarnation, order.error) == ("a2", "AlignmentError")
    assert mind.state.phase is phase
    told = described(mind, now=7.0)
    assert told.reason == (None if not stopping else mind.state.reason)
    assert told.parties["a"].phase == "refused"
    assert told.parties["a"].refused == order.reason
    assert told.parties["a"].refused_s == 2.0
    after = mind.state.members["a"]
    assert (after.rows_digest, after.held, after.run, after.incarnation) == (
        before.rows_digest, before.held, before.run, before.incarnation,
    )  # fmt: skip


def test_who_was_refused_and_then_agrees_goes_on_with_the_run() -> None:
    mind = Mind().everyone_joins().hear("a", joined("a2", **OTHERS["rows"]))
    mind.hear("a", Failed("a2", "AlignmentError", "the rows differ"))
    assert mind.state.phase is Phase.RUNNING, "what it says as it leaves ends nobody"
    mind.hear("a", joined("a3", held=(1,)))
    assert mind.ordered(Start) == {"a": Start("a3", "r")}
    assert described(mind).parties["a"].refused is None


def test_the_reason_says_what_the_run_was_begun_on_and_what_to_do() -> None:
    mind = Mind().everyone_joins().hear("a", joined("a2", **OTHERS["rows"]))
    reason = mind.state.members["a"].refused or ""
    assert "'a' has 9 rows, run r was begun on 10" in reason
    assert "restore that table at 'a'" in reason and "new state folders everywhere" in reason
    assert "other" not in reason


def test_who_is_refused_again_and_again_is_silent_all_the_same() -> None:
    mind = Mind().everyone_joins()
    for second in range(GIVE_UP + 2):
        for party in ("b", "label"):
            mind.hear(party, Alive(f"{party}1"), now=float(second))
        mind.hear("a", joined(f"a{second + 2}", **OTHERS["rows"]), now=float(second))
    assert silent(mind.plan, mind.state, 0.0, GIVE_UP + 1.0) == {"a": GIVE_UP + 1.0}


def test_a_run_that_was_stopped_and_gathers_again_refuses_who_has_other_rows_alone() -> None:
    mind = Mind().everyone_joins()
    mind.hear("b", Failed("b1", "CheckpointError", "the disk is full")).restart()
    mind.hear("b", joined("b2", held=(1,))).hear("a", joined("a2", **OTHERS["rows"]))
    assert mind.state.phase is Phase.GATHERING
    assert missing(mind.plan, mind.state) == ("a", "label")
    mind.hear("label", joined("label2", held=(1,)))
    assert not mind.ordered(Start)
    mind.hear("a", joined("a3", held=(1,)))
    assert set(mind.ordered(Start)) == set(PARTIES)


def test_a_scheduler_that_is_restarted_still_refuses_and_remembers_whom_it_refused() -> None:
    mind = Mind().everyone_joins().hear("a", joined("a2", **OTHERS["rows"])).restart()
    assert described(mind).parties["a"].refused
    assert durable(mind.state).members["a"].refused
    mind.hear("a", joined("a3", **OTHERS["job"]))
    assert mind.ordered(Stop)["a"].error == "AlignmentError"
    assert mind.state.phase is Phase.RUNNING


def test_where_everybody_is_refused_nobody_waits() -> None:
    mind = Mind(state=RunState(run="mine", agreed=Mind().everyone_joins().state.agreed))
    for party in PARTIES:
        mind.hear(party, joined(f"{party}1", held=(1,), run="another"))
    assert mind.state.phase is Phase.FAILED
    assert ending(mind.state) == "AlignmentError"


def test_a_run_that_ends_has_no_refused_party() -> None:
    mind = Mind().everyone_joins().hear("a", joined("a2", **OTHERS["rows"])).hear("a", joined("a3"))
    for party, life in (("a", 3), ("b", 1), ("label", 1)):
        mind.hear(party, Finished(f"{party}{life}", {}))
    assert mind.state.phase is Phase.FINISHED


# A party that fails -------------------------------------------------------------------------------------------


@given(st.sampled_from(["RunStopped", "PeerFailed", "AlignmentError", "PeerSilent", "ComputeError", "x"]) | st.text())
def test_no_party_chooses_the_code_of_the_others_by_what_it_says_its_error_was(error: str) -> None:
    mind = Mind().everyone_joins().hear("a", Failed("a1", error, "it failed"))
    assert {p: o.error for p, o in mind.ordered(Stop).items()} == {"b": "PeerFailed", "label": "PeerFailed"}
    assert named(ending(mind.state)) is PeerFailed
    told = named(described(mind).error)
    assert told.exit_code not in (0, TransportError.exit_code, PeerFailed.exit_code)
    mind.hear("b", joined("b2"))
    assert mind.ordered(Stop)["b"].error == "PeerFailed", "who comes later, too"


def test_a_disagreement_that_a_party_claims_after_a_real_one_changes_no_code() -> None:
    mind = Mind().hear("a", joined("a1")).hear("b", joined("b1", **OTHERS["rows"]))
    assert ending(mind.state) == "AlignmentError", "before a run began nobody knows who is wrong"
    mind.hear("a", Failed("a1", "ComputeError", "x"))
    assert ending(mind.state) == "AlignmentError"


def test_every_error_that_is_a_failure_keeps_its_name_and_no_other_does() -> None:
    def tree(error: type[SlQueueError]) -> list[type[SlQueueError]]:
        return [error, *(below for child in error.__subclasses__() for below in tree(child))]

    for error in tree(SlQueueError):
        kept = failure(error.__name__) == error.__name__
        assert kept == (not issubclass(error, RunStopped | PeerFailed | TransportError)), error


# Real workers -------------------------------------------------------------------------------------------------


def test_a_worker_that_comes_back_on_another_table_ends_alone_and_on_the_right_one_resumes(
    tmp_path: Any, broker_url: str
) -> None:
    write_job(tmp_path)
    table = tmp_path / "bank.parquet"
    whole = table.read_bytes()
    with Crew(tmp_path, broker_url) as crew:
        crew.start()
        crew.await_step("insurer", 6)
        crew.kill("bank")
        rows = parquet.read_table(table)
        parquet.write_table(rows.slice(0, len(rows) - 1), table)
        crew.start("bank", state=crew.folder / "elsewhere")
        assert crew.wait("bank") == 3
        assert "the rows differ" in crew.log("bank")
        crew.await_log("scheduler", "party 'bank' was refused")
        table.write_bytes(whole)
        crew.start("bank")
        crew.finish()
        assert crew.weights() == quiet_weights()


def test_the_others_of_a_party_that_fails_end_with_six(tmp_path: Any, broker_url: str) -> None:
    write_job(tmp_path)
    boom = tmp_path / "boom"
    edit(
        tmp_path / "bank.py",
        "        return self.relu",
        f"        import os\n\n        assert not os.path.exists({str(boom)!r})\n        return self.relu",
    )
    with Crew(tmp_path, broker_url) as crew:
        crew.start()
        crew.await_step("insurer", 6)
        boom.touch()
        assert [crew.wait(role) for role in ("bank", "insurer", "scheduler")] == [5, 6, 6]
        assert "error: party 'bank'" in crew.log("insurer")
