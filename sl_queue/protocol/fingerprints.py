"""Differences between the fingerprint that a run was begun with and the present one, in sentences.

A fingerprint says what a step depends on besides its checkpoint: flat, JSON values, made in compute/fingerprint. One
that an earlier version wrote lacks the keys that came later; those are not compared, and the next checkpoint has them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

RULES = 2  # how a run computes what it chooses: draws keyed by a secret of each party, held-out rows by their ids
BY_POSITION = 1  # as the first version did: draws keyed by the job's seed alone, held-out rows by their positions

ONE_BY_ONE = 256  # columns of a table with a digest each; of more all have one together, as every checkpoint holds them

SEED = "seed"  # in the place of a secret: draws that every party can repeat

_SHOWN = 5  # columns that a sentence names
_FIRST = re.compile(  # in every version, or there whenever the party file says it
    r"torch|threads|device|start|privacy\..+|data\.(weights|held_out)|fuse\.missing_labels"
    r"|fuse\.loss(\.(pos_weight|weight|label_smoothing|delta|log_input|full))?"
    r"|(base|fuse)\.(model|(args|optimizer|schedule)\..+|optimizer|schedule|inputs|groups|clip_norm|clip_value|ema)"
)
_OF_THE_MACHINE = re.compile(
    r"torch|threads|device|secret|autocast|default_dtype|float32_matmul_precision|(base|fuse)(\.loss)?\.packages"
)
_TABLE = {"data.rows", "data.columns", "data.features", "data.features.each", "data.label", "data.labels"}


def rules_of(found: Mapping[str, Any]) -> int:
    """Return the rules of a run, by the fingerprint of one of its checkpoints."""
    return int(found.get("rules", BY_POSITION))


def differences(found: Mapping[str, Any], own: Mapping[str, Any], *, finished: bool = False) -> list[str]:
    """Say each thing in which `own` is not what a run was begun with.

    Of a run that has finished the machine does not count: nothing is computed any more.
    """
    keys = {key for key in found.keys() | own.keys() if key in found or _FIRST.fullmatch(key)}
    if finished:
        keys = {key for key in keys if not _OF_THE_MACHINE.fullmatch(key)}
    differing = [key for key in sorted(keys) if (key in found, found.get(key)) != (key in own, own.get(key))]
    about_table = list(_of_table(found, own)) if _TABLE & set(differing) else []
    return [*about_table, *(_sentence(key, found, own) for key in differing if key not in _TABLE)]


def _sentence(key: str, found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    named = {"base": own.get("base.model"), "fuse": own.get("fuse.model"), "fuse.loss": own.get("fuse.loss")}
    named |= {k: own.get(k) for k in ("base.optimizer", "fuse.optimizer", "base.schedule", "fuse.schedule")}
    match key.rpartition("."):
        case (part, _, "code") if part in named:
            return f"the source code of {named[part]} has changed"
        case (part, _, "weights") if part in named:
            return f"the initial weights of {named[part]}, given in code, differ"
        case (part, _, "settings") if part in named:
            return f"the attributes of {named[part]}, given in code, differ"
        case ("data", _, "fitted"):
            return "what [features] learned from the training rows differs: the table or [features] has changed"
        case ("data", _, "held_out"):
            return "the rows that are held out, or kept for a test, are others: the table has changed"
        case ("", _, "secret"):
            return _about_secret(found.get(key), own.get(key))
        case _:
            return f"{key} was {found.get(key, 'not there')!r}, now {own.get(key, 'not there')!r}"


def _about_secret(before: Any, now: Any) -> str:
    if SEED not in (before, now):
        return "the secret that keys this party's draws has changed"
    was, became = ("the job's seed", "a secret") if before == SEED else ("a secret", "the job's seed")
    return f"this party's draws were keyed by {was}, now they are keyed by {became} ([privacy] secret)"


def _of_table(found: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences about the table: names of columns and counts, never a value."""
    rows = found.get("data.rows") != own.get("data.rows")
    if rows:
        before, now = (str(side.get("data.rows")).split()[0] for side in (found, own))
        had, has = (f"{count} row{'s'[: count != '1']}" for count in (before, now))
        yield f"the table had {had}, now {now}" if before != now else f"the ids of the {has} differ"
    columns = list(_of_columns(found.get("data.columns"), own.get("data.columns")))
    yield from columns
    if found.get("data.label") != own.get("data.label"):
        yield f"the label column was {found.get('data.label')!r}, now {own.get('data.label')!r}"
    if rows:
        return  # their values cannot be compared
    yield from (sentence for sentence in _of_values(found, own) if not columns)
    if found.get("data.labels") != own.get("data.labels") and found.get("data.label") == own.get("data.label"):
        yield _changed("the labels", found.get("data.labels"), own.get("data.labels"))


def _of_columns(before: list[str] | None, now: list[str] | None) -> Iterator[str]:
    """Describe how the names of the feature columns changed."""
    if before is None or now is None:
        if before != now:
            yield f"the columns were {before}, now {now}"
        return
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    if gone:
        yield f"{_listed(gone)} gone"
    if new:
        yield f"{_listed(new)} added"
    kept = [name for name in before if name in now]
    moved = [name for name, other in zip(kept, [n for n in now if n in before], strict=True) if name != other]
    if moved:
        yield f"{_listed(moved)} moved to another place"


def _of_values(found: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Describe how the features changed, in the same columns and rows."""
    if found.get("data.features") == own.get("data.features"):
        return
    before, now = (side.get("data.features.each") or () for side in (found, own))
    each = zip(own.get("data.columns") or (), before, now, strict=False)  # only up to so many columns have their own
    names = [name for name, value, other in each if value != other]
    if names:
        yield f"the values of {_listed(names)} differ"
    else:
        yield _changed("the features", found.get("data.features"), own.get("data.features"))


def _changed(what: str, before: Any, now: Any) -> str:
    """Return True if values differ, or dtype and shape already do."""
    shapes = [str(side).rpartition(" ")[0] or "not there" for side in (before, now)]
    return f"the values of {what} differ" if shapes[0] == shapes[1] else f"{what} were {shapes[0]}, now {shapes[1]}"


def _listed(names: list[str]) -> str:
    """Name columns, not too many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"column{'s'[: len(names) > 1]} {', '.join(map(repr, names[:_SHOWN]))}{more}"
