"""Keys that programs read of a run, for the reference: the status as JSON, and the events of JSON logs."""

import re
from collections.abc import Iterator
from inspect import getdoc, getsource
from typing import get_args

from sl_queue.protocol.event_json import name_of
from sl_queue.protocol.events import Rare
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus, Wait
from sl_queue.protocol.totals import Now, Totals

STATUS = {"": RunStatus, "parties.NAME": PartyStatus, "parties.NAME.wait": Wait, "parties.NAME.totals": Totals}
STATUS |= {"parties.NAME.totals.now": Now}

_UNSHOWN = "past"  # of the status on its way to a page, and not in the JSON

_FIELD = re.compile(r"^    (\w+): ([^=#\n]+?)(?: = [^#\n]+)?(?:  # (.*))?$", re.MULTILINE)
_PLAIN = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "None": "null"}


def status_keys() -> Iterator[tuple[str, str, str]]:
    """Yield each key of `sl-queue status --json` with its type and its meaning."""
    for before, kind in STATUS.items():
        for name, annotation, meaning in _FIELD.findall(getsource(kind)):
            if name == _UNSHOWN:
                continue
            yield f"`{before}{'.' * bool(before)}{name}`", _plain(annotation), _sentence(meaning)
    yield "`fresh`", "true or false", "The scheduler reported it while we listened."
    yield "`age_s`", "number or null", "Seconds since it was reported."


def events() -> Iterator[tuple[str, str, str]]:
    """Yield each event of a JSON log with its fields and its meaning."""
    for kind in get_args(Rare):
        fields = ", ".join(f"`{name}`" for name, _, _ in _FIELD.findall(getsource(kind)))
        yield f"`{name_of(kind)}`", fields, " ".join((getdoc(kind) or "").partition("\n\n")[0].split())


def _plain(annotation: str) -> str:
    """Name a type as JSON has it."""
    parts = [part.strip() for part in annotation.split("|")]
    return " or ".join(_PLAIN.get(part, "list" if part.startswith("tuple") else "object") for part in parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""
