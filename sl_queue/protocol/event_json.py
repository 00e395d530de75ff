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
    values = {name: _plain(getattr(event, name)) for name in _FIELDS[kind]}
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


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _plain(number) for name, number in value.items()}
    return list(value) if isinstance(value, tuple) else value
