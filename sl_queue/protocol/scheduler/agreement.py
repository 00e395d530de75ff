"""Admission of a party that joins: it must have the same job, the same rows and the same run as the others."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sl_queue.protocol.control import Join
from sl_queue.protocol.scheduler.state import Member, Plan, RunState
from sl_queue.protocol.text import LONGEST_NAME, counted, printable

MAX_KEYS = 10  # of two jobs, named one by one


def disagreement(plan: Plan, state: RunState, sender: str, joined: Join) -> str | None:
    """Explain why this party cannot train with the others, or return None; `state` is from before it joined."""
    return (
        other_job(plan.job, sender, joined.job)
        or _other_rules(plan, state, sender, joined)
        or _other_weights(plan, state, sender, joined)
        or _other_rows(plan, state, sender, joined)
        or _other_run(state, sender, joined)
    )


def other_job(ours: Mapping[str, Any], sender: str, theirs: Mapping[str, Any]) -> str | None:
    """Say in which keys a party's job is not the scheduler's, or None."""
    differing = sorted(differing_keys(theirs, ours).items())
    if not differing:
        return None
    told = "; ".join(
        f"{printable(key, LONGEST_NAME)} = {printable(repr(a), LONGEST_NAME)} at {sender!r}, "
        f"{printable(repr(b), LONGEST_NAME)} at the scheduler"
        for key, (a, b) in differing[:MAX_KEYS]
    )
    further = f", and {len(differing) - MAX_KEYS} more" if len(differing) > MAX_KEYS else ""
    return f"the job files differ, and every party needs the same one: {told}{further}"


def _other_rows(plan: Plan, state: RunState, sender: str, joined: Join) -> str | None:
    """Compare the party's rows with those the run was begun on; before it begins, with those of the parties here."""
    agreed = state.agreed
    if agreed is not None:
        if agreed.rows_digest == joined.rows_digest:
            return None
        return (
            f"the rows differ: {sender!r} has {counted(joined.n_rows, 'row', 'rows')}, run {state.run} was begun "
            f"on {agreed.n_rows}, and their ids differ; restore that table at {sender!r} and start its "
            "worker again, or train from scratch with new state folders everywhere"
        )
    for other in plan.parties:
        member = state.members.get(other, Member())
        if other == sender or not member.here or member.rows_digest == joined.rows_digest:
            continue
        if member.id_type != joined.id_type:
            return differing_id_types({sender: joined.id_type, other: member.id_type or ""})
        return (
            f"the rows differ: {sender!r} has {counted(joined.n_rows, 'row', 'rows')}, {other!r} has {member.n_rows}, "
            "and their ids are not the same; align the tables (private set intersection) so that both hold exactly the "
            "same ids"
        )
    return None


def _other_run(state: RunState, sender: str, joined: Join) -> str | None:
    if joined.run is not None and joined.run != printable(joined.run, LONGEST_NAME):
        return f"the state folder of {sender!r} names no run of sl_queue; give that worker its own folder, or a new one"
    runs = {p: m.run for p, m in state.members.items() if m.run is not None and p != sender}
    if joined.run is not None:
        runs[sender] = joined.run
    if state.run is not None:
        runs["the scheduler"] = state.run
    if len(set(runs.values())) > 1:
        held = ", ".join(f"{p} holds {r}" for p, r in sorted(runs.items()))
        return f"the state folders belong to different runs: {held}; use the folders of one run, or new ones everywhere"
    return None


def _other_rules(plan: Plan, state: RunState, sender: str, joined: Join) -> str | None:
    """Compare the rules: parties that choose held-out rows differently would not agree on a single micro-batch."""
    others = {p: m.rules for p, m in state.members.items() if p in plan.parties and p != sender and m.here}
    for other, rules in others.items():
        if rules is None or rules == joined.rules:
            continue
        older, newer = sorted(((joined.rules, sender), (rules, other)))
        return (
            f"the rules by which a run chooses its held-out rows differ: {older[1]!r} goes by rules {older[0]}, as an "
            f"earlier version of sl_queue or a run that one began does, and {newer[1]!r} by rules {newer[0]}. To go on "
            f"with the run, write rules = {older[0]} at the top of the job file of {newer[1]!r} (no digest changes); "
            "to train from scratch, use this version of sl_queue and a new state folder everywhere"
        )
    return None


def _other_weights(plan: Plan, state: RunState, sender: str, joined: Join) -> str | None:
    """Compare the runs whose weights are brought to a prediction: the base of one with the fuse of another is noise."""
    brought = {p: m.weights for p, m in state.members.items() if p in plan.parties and m.here and m.weights is not None}
    brought[sender] = printable(joined.weights, LONGEST_NAME)
    if len(set(brought.values())) <= 1:
        return None
    told = ", ".join(f"{party} has the weights of run {run or '(none)'}" for party, run in sorted(brought.items()))
    return f"{told}; the parts of a model belong together: name one run at every party with --run"


def differing_id_types(types: Mapping[str, str]) -> str:
    """Say whose ids are of which type, which party file to change, and how."""
    integers = _listed([party for party, kind in types.items() if kind == "integer"])
    texts = _listed([party for party, kind in types.items() if kind == "text"])
    if not integers or not texts:  # a peer may say anything
        return f"the ids of {_listed(list(types))} are of different types"
    return (
        f'the ids of {integers} are of type integer and those of {texts} of type text, and 7 is not the id "7": write '
        f'id_type = "text" under [data] in the party file of {integers}; or, if the text is whole numbers like 007 or '
        f'7.0, id_type = "integer" in that of {texts}'
    )


def _listed(parties: Sequence[str]) -> str:
    return " and ".join(map(repr, parties))


def told_difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """List the keys in which another canonical job differs from ours, each with both values."""
    differing = sorted(differing_keys(here, there).items())
    return "; ".join(f"{key}: {_told(ours)} here, {_told(theirs)} there" for key, (ours, theirs) in differing)


def _told(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted keys whose values differ, with both values; None stands for a missing one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in ours.keys() | theirs.keys():
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differing_keys(a, b, f"{path}{key}.")
        elif _plain(a) != _plain(b):
            found[f"{path}{key}"] = (a, b)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
