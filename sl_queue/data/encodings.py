"""Arrow columns without the encodings and widths that Arrow's own functions, or NumPy, do not all know."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data import decimals


def plain(column: Any) -> Any:
    """Take off encodings; a decimal without a fraction is a whole number, and float16 becomes float32."""
    types, column = pa.types, unpacked(column)
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_float16(column.type):  # which Arrow can neither round down nor write as text
        return column.cast(pa.float32())
    return decimals.narrowed(column) if types.is_decimal(column.type) else column


def unpacked(column: Any) -> Any:
    """Take off encodings with which Arrow can do little else than cast: views, as polars writes text, and runs."""
    types = pa.types
    if types.is_run_end_encoded(column.type):
        return unpacked(pc.run_end_decode(column))
    if types.is_string_view(column.type):
        return column.cast(pa.large_string())
    if types.is_binary_view(column.type):
        return column.cast(pa.large_binary())
    if not types.is_dictionary(column.type) or not _is_view(column.type.value_type):
        return column
    if isinstance(column, pa.ChunkedArray):
        return pa.chunked_array(list(map(unpacked, column.chunks)) or [pa.array([], pa.large_string())])
    return unpacked(column.dictionary).take(column.indices)


def _is_view(kind: Any) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))
