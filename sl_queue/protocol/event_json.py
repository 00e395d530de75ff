"""Events as plain values for JSON, and back."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from math import isfinite
from re import sub
from typing import Any, get_args

from pydantic import TypeAdapter

from sl_queue.protocol.events import Event


def name_of(kind: type[Event]) -> str:
    """Return the name of an event in JSON: `step_done` of StepDone."""
    return sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


KINDS: Mapping[str, type[Event]] = {name_of(kind): kind for kind in get_args(Event)}
_NAMES = {kind: name for name, kind in KINDS.items()}
_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in KINDS.values()}


def as_json(event: Event) -> dict[str, Any]:
    """Return an event as a dict of plain values; a number that is not finite is None."""
    kind = type(event)
    values = {name: finite(getattr(event, name)) for name in _FIELDS[kind]}
    return {"event": _NAMES[kind], **values}


def from_json(values: Mapping[str, Any]) -> Event | None:
    """Read an event, ignoring keys it does not know; None for an event of a later version.

    Raises ValueError where a value is missing or of another type.
    """
    name = values.get("event")
    return _reader(name).validate_python(values) if isinstance(name, str) and name in KINDS else None


@cache
def _reader(name: str) -> TypeAdapter[Event]:
    return TypeAdapter(KINDS[name])


def finite(value: Any) -> Any:
    """Return plain values with None for each number that is not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
