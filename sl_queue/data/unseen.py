"""Categories of new rows that training had not seen, counted by column."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.feature_values import texts
from sl_queue.data.features import Fitted

MOST_UNSEEN = 0.1  # share of new rows with a category that training had not seen: more is an error


def unseen(fitted: Fitted, columns: Mapping[str, Any], most: float = MOST_UNSEEN) -> tuple[list[str], list[str]]:
    """Count the new rows with categories that training had not seen: notes, and faults beyond a share of rows."""
    notes, faults = [], []
    for name, learned in fitted.columns.items():
        if learned["kind"] != "category":
            continue
        found = texts(columns[name])
        known = pa.array([*learned["categories"], *learned["rare"]], pa.large_string())
        count = len(found) - found.null_count - (pc.sum(pc.is_in(found.drop_null(), known)).as_py() or 0)
        told = f"[features] {name}: {count} of {len(found)} new rows hold a category that training had not seen"
        if count > most * len(found):
            faults.append(
                f"{told}; more than {most:.0%} is refused: is it the same column, written alike? If it is, say "
                'unseen = "other" in [predict]'
            )
        elif count:
            notes.append(f'{told}: they count as "other"')
    return notes, faults
