"""Basis of job and party files: TOML in, frozen values out, and one error that says all that is wrong."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from sl_queue.errors import JobError
from sl_queue.protocol.text import nearest

M = TypeVar("M", bound="Schema")
Location = tuple[int | str, ...]

MAX_SHOWN = 80  # characters of a value in an error
MAX_DIGITS = 300  # of a whole number: more are no number of Python's floats, and beyond 4300 none that it prints
MAX_DEPTH = 100  # of tables and lists in each other
IN_FILE, IN_CODE = "<file>", "<code>"  # tags of a value that may be either; they stand in no dotted key
SEVERAL = "<several>"


class Schema(BaseModel):
    """A table of a file, or the same built in code: frozen, no unknown keys, no conversions between types.

    Every field has a description that completes "it must be ..."; complaints are made of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        _require_usable(type(self).__name__, values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise JobError(_complaint(type(self).__name__, type(self), error)) from None

    def replace(self, **changes: Any) -> Self:
        """Return the same with other values for some keys: `job.replace(epochs=20)`. Raises JobError.

        A table that is given replaces the whole table of that name; it may be a dict.
        """
        unknown = changes.keys() - type(self).model_fields.keys()
        if unknown:
            key = sorted(unknown)[0]
            raise JobError(f"{type(self).__name__}: {key} is unknown; {nearest(key, list(type(self).model_fields))}")
        kept = {name: getattr(self, name) for name in self.model_fields_set - changes.keys()}
        found = type(self)(**{**kept, **changes})
        for name in type(self).__private_attributes__:
            setattr(found, name, getattr(self, name))
        return found

    # Tables inside of tables are then not built through __init__, and an error in one keeps its place.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def load(model: type[M], path: Path | str) -> M:
    """Read a TOML file as `model`. Raises JobError, and lets validators see the file's folder in their context."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such file") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    return parsed(model, content, path)


def parsed(model: type[M], content: bytes, path: Path) -> M:
    """Read what a TOML file holds, or would hold, as `model`. Raises JobError."""
    values = _values(content, path)
    _require_kind(path, model, values)
    _require_usable(str(path), values)
    try:
        return model.model_validate(values, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise JobError(_complaint(str(path), model, error)) from None


def _values(content: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise JobError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path}: is not valid TOML: {error}") from None
    except ValueError:  # of Python, which reads no more digits
        raise JobError(f"{path}: holds a whole number of more than {MAX_DIGITS} digits; correct it") from None
    except RecursionError:
        raise JobError(f"{path}: holds lists or tables more than {MAX_DEPTH} deep in each other; write fewer") from None


def _require_usable(source: str, values: Mapping[str, Any]) -> None:
    """Raise JobError for values that no key takes, and that would fail wherever they are compared or shown."""
    problems = list(_unusable(values, ""))
    if problems:
        raise JobError(f"{source}: {problems[0]}")


def _unusable(value: Any, key: str, depth: int = 0) -> Iterator[str]:
    if isinstance(value, int):
        if abs(value) >= 10**MAX_DIGITS:
            yield f"{key} = a number of {value.bit_length()} bits; it must have at most {MAX_DIGITS} digits"
    elif isinstance(value, dict | list | tuple):
        if depth == MAX_DEPTH:
            yield f"{key[:MAX_SHOWN]}... holds lists or tables more than {MAX_DEPTH} deep in each other; write fewer"
            return
        named = value.items() if isinstance(value, dict) else ((f"[{n}]", each) for n, each in enumerate(value))
        for name, inner in named:
            joined = f"{key}.{name}" if key and isinstance(value, dict) else f"{key}{name}"
            yield from _unusable(inner, joined, depth + 1)


def _require_kind(path: Path, model: type[Schema], values: Mapping[str, Any]) -> None:
    """Raise JobError for a party file in the place of a job file, and the other way round."""
    for key, kind, value in (("party", "a party file", str), ("parties", "a job file", dict)):
        if isinstance(values.get(key), value) and key not in model.model_fields:
            raise JobError(f"{path}: is {kind}; a job file comes first, and then the files of its parties")


def redacted(url: str) -> str:
    """Return a broker's URL without its password and options, for people to read."""
    login, at, host = url.rpartition("@")  # the last one, because a password may hold one that was not escaped
    if not at:  # what follows the colon is a port, or a password whose host was forgotten
        return re.sub(r"^((?:[^/]*//)?[^:/?\[]*):(?!\d*(?:[/?]|$))[^?]*", r"\1:***", url).partition("?")[0]
    scheme, separator, user = login.partition("://") if "://" in login else ("", "", login)
    name, colon, _ = user.partition(":")
    return f"{scheme}{separator}{name}{colon and ':***'}@{host.partition('?')[0]}"


def shown(value: Any) -> str:
    """Format a value for an error: short, and without the password of a URL."""
    if isinstance(value, str):
        value = redacted(value) if "://" in value or "@" in value else value
    elif isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"[:MAX_SHOWN]
    elif isinstance(value, dict):
        return f"a table of {', '.join(map(str, value)) or 'nothing'}"[:MAX_SHOWN]
    elif not isinstance(value, bool | int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# One error of all of pydantic's ---------------------------------------------------------------------------------


def _complaint(source: str, model: type[Schema], error: ValidationError) -> str:
    found = [(_location(model, each["loc"]), each) for each in error.errors(include_url=False)]
    inner = {place[:end] for place, _ in found for end in range(len(place))}  # of a list that may be something else
    lines = list(
        dict.fromkeys(line for place, each in found if place not in inner for line in _lines(model, place, each))
    )
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    return "\n  ".join([f"{source}: {len(lines)} things are wrong", *lines])


def _location(model: type[Schema], told: Location) -> Location:
    """Return where a value stands, without the tags that pydantic puts there if it may be of several kinds."""
    found: Location = ()
    before: int | str = ""
    for part in told:
        _, field = _declared_at(model, found)
        is_key = field is None or table_in(field.annotation) is not None or before == IN_CODE
        if part not in (IN_FILE, IN_CODE, SEVERAL) and (is_key or isinstance(part, int)):
            found = (*found, part)
        before = part
    return found


def _lines(model: type[Schema], location: Location, found: Any) -> Iterator[str]:
    key = _dotted(location)
    match found["type"]:
        case "extra_forbidden":  # its value is not shown: it may be a secret that stands in the wrong place
            yield f"{key} is unknown; {_advice(model, location)}"
        case "missing":
            yield f"{key} is missing; it must be {_allowed(model, location)}"
        case "value_error":  # of our own validators: one line for each thing that is wrong
            yield from (f"{key} {line}".lstrip() for line in str(found["ctx"]["error"]).splitlines())
        case _:
            yield f"{key} = {shown(found['input'])}; it must be {_allowed(model, location)}"


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _advice(model: type[Schema], location: Location) -> str:
    """Suggest the table that an unknown key may have been meant for."""
    table, _ = _declared_at(model, location[:-1])
    key, known = str(location[-1]), list(_fields(table))
    advice = nearest(key, known)
    if not advice and key in model.model_fields:
        advice = "it belongs at the top of the file, above the first [table]; "
    if not advice:
        homes = (n for n, f in model.model_fields.items() if (t := table_in(f.annotation)) and key in _fields(t))
        advice = "".join(f"it belongs in [{home}]; " for home in homes)
    return f"{advice}allowed {'in this table' if location[1:] else 'here'} are {', '.join(known)}"


def _allowed(model: type[Schema], location: Location) -> str:
    _, field = _declared_at(model, location)
    return (field.description if field is not None else None) or "something else"


def _declared_at(model: type[Schema], location: Location) -> tuple[type[Schema], FieldInfo | None]:
    """Return the innermost table and the innermost field on the way to a location."""
    table, field = model, None
    parts = iter(location)
    for part in parts:
        if part not in _fields(table):
            break
        field = _fields(table)[str(part)]
        inner = table_in(field.annotation)
        if inner is None:
            break
        table = inner
        if any(get_origin(each) is dict for each in (field.annotation, *get_args(field.annotation))):
            next(parts, None)  # the name of a party
    return table, field


def _fields(table: type[Schema]) -> dict[str, FieldInfo]:
    """Return the keys of a table, as a file names them."""
    return {field.alias or name: field for name, field in table.model_fields.items()}


def table_in(annotation: Any) -> type[Schema] | None:
    """Return the table that an annotation speaks of: `dict[str, JobParty]`, `BaseFile | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Schema):
        return annotation
    return next((table for inner in get_args(annotation) if (table := table_in(inner))), None)
