"""Reference of all that can be set and read: docs/reference.md.

It is written by `python -m sl_queue.cli.reference > docs/reference.md`. Everything in it is taken from where it is
declared: the tables of job and party file, environment variables, errors and metrics.
"""

import ast
import sys
import types
from collections.abc import Iterator, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sl_queue.cli import vocabulary
from sl_queue.config.environment import VARIABLES, Variable
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.schema import Schema, table_in
from sl_queue.errors import SlQueueError
from sl_queue.launch.process import INTERRUPTED, UNSHOWN
from sl_queue.observe import prometheus

HEAD = """# Reference

Every key of job and party file, every environment variable, exit code, metric, key of a status and event. This file is
written by `python -m sl_queue.cli.reference > docs/reference.md`, from where they are declared; a test compares both.
"""
_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "text", list: "list"}
_KINDS = {"GaugeMetricFamily": "gauge", "CounterMetricFamily": "counter", "InfoMetricFamily": "info"}
_WORKERS = {
    "SchedulerCollector": "scheduler",
    "StandbyCollector": "standby",
    "_of_training": "party",
    "_of_hands": "party",
    "_of_channel": "party",
    "_of_vitals": "all",
}


def reference() -> str:
    """Return the whole text."""
    parts = [
        HEAD,
        *_file("Job file", "The same at every party; its digest is compared when they join.", Job),
        *_file("Party file", "A party's own; nothing of it is sent.", PartyFile),
        "## Environment variables\n",
        _table(("variable", "default", "it must be", "meaning"), map(_variable, VARIABLES)),
        "## Exit codes\n",
        _table(("code", "error", "meaning"), _exit_codes()),
        "## Metrics\n\nWhere a worker is given `--metrics-port`, it answers at `/metrics`, and at `/health`.\n",
        _table(("metric", "type", "labels", "of", "meaning"), _metrics()),
        "## Status\n\nKeys of `sl-queue status JOB --json`; a later version may have more.\n",
        _table(("key", "type", "meaning"), vocabulary.status_keys()),
        "## Events\n\nLines of `SL_QUEUE_LOG_FORMAT=json` and of `SL_QUEUE_EVENTS` name one as `event`, with fields.\n",
        _table(("event", "fields", "meaning"), vocabulary.events()),
    ]
    return "\n".join(parts)


# Keys -----------------------------------------------------------------------------------------------------------


def tables(model: type[Schema], title: str = "") -> Iterator[tuple[str, type[Schema]]]:
    """Yield every table of a file with its dotted title, those inside of it after it."""
    yield title, model
    for name, field in model.model_fields.items():
        inner = table_in(field.annotation)
        if inner is not None:
            several = "" if get_origin(field.annotation) is not dict else ".NAME"
            yield from tables(inner, f"{title}.{name}{several}".removeprefix("."))


def keys(model: type[Schema]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the keys of a table that hold no table, or a plain value as well."""
    for name, field in model.model_fields.items():
        if table_in(field.annotation) is None or float in _plain(field.annotation):
            yield field.alias or name, field


def _plain(annotation: Any) -> set[Any]:
    """Return the types among which a value may be."""
    args = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _plain(args[0])
    return {annotation} if get_origin(annotation) not in (Union, types.UnionType) else set().union(*map(_plain, args))


def halves(field: FieldInfo) -> tuple[str, str]:
    """Split the description of a key into what it must be and its meaning."""
    must_be, _, meaning = (field.description or "").partition(": ")
    return must_be, f"{meaning[:1].upper()}{meaning[1:]}." if meaning else ""


def _file(title: str, about: str, model: type[Schema]) -> Iterator[str]:
    yield f"## {title}\n\n{about}\n"
    for name, table in tables(model):
        rows = [_key(key, field) for key, field in keys(table)]
        if rows:
            yield f"### `[{name}]`\n\n{getdoc(table)}\n" if name else "### At the top\n"
            yield _table(("key", "type", "default", "it must be", "meaning"), rows)


def _key(name: str, field: FieldInfo) -> tuple[str, ...]:
    return (f"`{name}`", _type(field.annotation), _default(field), *halves(field))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }" if value else "{ }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _type(annotation: Any) -> str:
    """Name the type of a key as TOML has it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(arg) for arg in args if arg is not types.NoneType))
    if origin is Literal:
        return _TYPES[type(args[0])]
    if origin in (list, tuple):
        return "list"
    if origin is dict or annotation is dict or table_in(annotation) is annotation:
        return "table"
    return _TYPES.get(annotation, "text")


# The rest -------------------------------------------------------------------------------------------------------


def _variable(variable: Variable) -> tuple[str, ...]:
    default = "none" if variable.default is None else f"`{_toml(variable.default)}`"
    return f"`{variable.name}`", default, variable.allowed, variable.meaning


def _exit_codes() -> list[tuple[str, ...]]:
    found = [("0", "", "The run is finished, or the command has done what it was asked.")]
    found += [(str(error.exit_code), f"`{error.__name__}`", _sentence(error)) for error in _errors(SlQueueError)]
    found.append((str(INTERRUPTED), "", "Interrupted with Ctrl-C; the same command resumes from the last checkpoint."))
    lost = "A command succeeded, and stdout did not take all that it showed: a full disk, a pipe that was closed."
    found.append((str(UNSHOWN), "", lost))
    return sorted(found, key=lambda row: int(row[0]))


def _errors(error: type[SlQueueError]) -> Iterator[type[SlQueueError]]:
    yield error
    for child in error.__subclasses__():
        if child.__module__ == SlQueueError.__module__:
            yield from _errors(child)


def _sentence(thing: object) -> str:
    return " ".join((getdoc(thing) or "").partition("\n\n")[0].split())


def _metrics() -> list[tuple[str, ...]]:
    """Read the metrics from the source: some are shown only while a run is in a certain state."""
    tree = ast.parse(Path(prometheus.__file__).read_text())
    found: dict[tuple[str, ...], list[str]] = {}
    for part in tree.body:
        for node in ast.walk(part):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _KINDS:
                assert isinstance(part, ast.ClassDef | ast.FunctionDef)
                found.setdefault(_metric(node, _KINDS[node.func.id]), []).append(_WORKERS[part.name])
    return sorted((*row[:3], ", ".join(dict.fromkeys(workers)), row[3]) for row, workers in found.items())


def _metric(call: ast.Call, kind: str) -> tuple[str, ...]:
    name, meaning = (ast.literal_eval(argument) for argument in call.args[:2])
    labels: list[str] = next((ast.literal_eval(each.value) for each in call.keywords if each.arg == "labels"), [])
    suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
    return f"`{name}{suffix}`", kind, ", ".join(labels), f"{meaning}."


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
