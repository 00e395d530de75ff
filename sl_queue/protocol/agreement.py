"""Whether a party that joins can train with the others: the same job, the same rows, the same run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sl_queue.protocol.messages import Joined
from sl_queue.protocol.run_state import Member, Plan, RunState


def disagreement(plan: Plan, state: RunState, sender: str, joined: Joined) -> str | None:
    """Why this party cannot train with the others, or None."""
    differing = differing_keys(joined.job, plan.job)
    if differing:
        pairs = sorted(differing.items())
        told = "; ".join(f"{key} = {a!r:.80} at {sender!r}, {b!r:.80} at the scheduler" for key, (a, b) in pairs)
        return f"the job files differ: {told}. Every party needs the same job file"
    for other in plan.parties:
        member = state.members.get(other, Member())
        if other == sender or not member.here or member.rows_digest == joined.rows_digest:
            continue
        if member.id_type != joined.id_type:
            return differing_id_types({sender: joined.id_type, other: member.id_type or ""})
        return (
            f"the rows differ: {sender!r} has {joined.n_rows} rows, {other!r} has {member.n_rows}, and their ids are "
            "not the same; align the tables (private set intersection) so that both hold exactly the same ids"
        )
    runs = {p: m.run for p, m in state.members.items() if m.run is not None}
    if state.run is not None:
        runs["the scheduler"] = state.run
    if len(set(runs.values())) > 1:
        held = ", ".join(f"{p} holds {r}" for p, r in sorted(runs.items()))
        return f"the state folders belong to different runs: {held}; use the folders of one run, or new ones everywhere"
    return None


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
    """The keys in which another canonical job differs from ours, each with both values."""
    differing = sorted(differing_keys(here, there).items())
    return "; ".join(f"{key}: {_told(ours)} here, {_told(theirs)} there" for key, (ours, theirs) in differing)


def _told(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; None stands for a missing one."""
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
