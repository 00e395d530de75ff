"""The file of predictions: ids as the label holder's file has them, in its order, and what was predicted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sl_queue.data.ids import readable
from sl_queue.errors import JobError

SUFFIXES = (".parquet", ".csv")


def write_predictions(
    path: Path, ids: Mapping[str, Any], positions: npt.NDArray[np.int64], columns: Mapping[str, npt.NDArray[Any]]
) -> int:
    """Write a row for each id whose position is not negative, whole or not at all; return how many.

    `ids`: Arrow arrays by column, in the order of the file. `positions`: of the row of each id in `columns`, -1 for
    none. One of `columns` that is called like one of `ids` is written as `predicted_` and its name.

    Raises JobError for a name that ends in neither .parquet nor .csv, and for a folder that cannot be written to.
    """
    require_name(path)
    there = positions >= 0
    taken = positions[there]
    written = readable if path.suffix == ".csv" else _stored
    kept = {name: written(column).filter(pa.array(there)) for name, column in ids.items()}
    table = pa.table({**kept, **{_apart(name, ids): pa.array(values[taken]) for name, values in columns.items()}})
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            pa.csv.write_csv(table, unfinished)
        else:
            pa.parquet.write_table(table, unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise JobError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return len(table)


def _stored(ids: Any) -> Any:
    """Return ids of a type that Arrow can filter and Parquet can hold."""
    types = pa.types
    if types.is_string_view(ids.type):
        return ids.cast(pa.large_string())
    is_encoded = types.is_dictionary(ids.type) and isinstance(ids.type.value_type, pa.BaseExtensionType)
    return ids.cast(ids.type.value_type) if is_encoded else ids


def _apart(name: str, ids: Mapping[str, Any]) -> str:
    """Return the name of a column of predictions, another than any of the ids has."""
    return _apart(f"predicted_{name}", ids) if name in ids else name


def require_name(path: Path) -> None:
    """Raise JobError unless the file's name says in which form to write it."""
    if path.suffix not in SUFFIXES:
        raise JobError(f"{path}: predictions are written to a file whose name ends in .parquet or .csv")
