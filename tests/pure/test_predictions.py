"""The file of predictions names each row by its id, whatever type of id a table may have."""

from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from sl_queue.data.ids import canonical_ids
from sl_queue.data.predictions import write_predictions

UUIDS = [UUID(int=7), UUID(int=8), UUID(int=9)]
AS_BYTES, AS_TEXT = [one.bytes for one in UUIDS], [str(one) for one in UUIDS]
AS_IT_IS = pa.csv.ConvertOptions(column_types={"id": pa.string()})
TYPES: dict[str, tuple[Any, Any, list[Any]]] = {  # ids, what they are declared as, what CSV holds
    "uuid": (pa.array(AS_BYTES, pa.uuid()), None, AS_TEXT),
    "16 bytes": (pa.array(AS_BYTES, pa.binary(16)), "uuid", AS_TEXT),
    "16 bytes, encoded": (pa.array(AS_BYTES, pa.binary(16)).dictionary_encode(), "uuid", AS_TEXT),
    "uuid, encoded": (pa.DictionaryArray.from_arrays([0, 1, 2], pa.array(AS_BYTES, pa.uuid())), None, AS_TEXT),
    "bytes of text": (pa.array([b"a", b"b", b"c"]), "text", ["a", "b", "c"]),
    "text": (pa.array(["a", "b", "c"]), None, ["a", "b", "c"]),
    "text, encoded": (pa.array(["a", "b", "c"]).dictionary_encode(), None, ["a", "b", "c"]),
    "views of text": (pa.array(["a", "b", "c"], pa.string_view()), None, ["a", "b", "c"]),
    "numbers": (pa.array([1, 2, 2**64 - 1], pa.uint64()), None, [1, 2, 2**64 - 1]),
    "decimals": (pa.array([Decimal(1), Decimal(2), Decimal(3)]), None, [1, 2, 3]),
    "whole floats": (pa.array([1.0, 2.0, 3.0]), "integer", [1, 2, 3]),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("name", TYPES)
def test_ids_of_any_type_that_may_be_trained_on_are_written(tmp_path: Path, name: str, suffix: str) -> None:
    ids, id_type, texts = TYPES[name]
    assert canonical_ids(ids, are_csv=False, id_type=id_type)[0] is not None
    path = tmp_path / f"p{suffix}"
    assert write_predictions(path, {"id": ids}, np.array([1, -1, 0]), {"value": np.array([0.5, 0.25])}) == 2
    found = pa.csv.read_csv(path, convert_options=AS_IT_IS) if suffix == ".csv" else pa.parquet.read_table(path)
    kept = ids.to_pylist() if suffix == ".parquet" else texts
    assert list(map(str, found["id"].to_pylist())) == [str(kept[0]), str(kept[2])]
    assert found["value"].to_pylist() == [0.25, 0.5]
