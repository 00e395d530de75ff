"""Events as log lines, in words; `record.event` is the event, for handlers that want more than words."""

import logging
from functools import singledispatch

from sl_queue.protocol import events
from sl_queue.protocol.event_json import name_of
from sl_queue.protocol.events import Event
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.state import epoch_text
from sl_queue.protocol.text import counted

log = logging.getLogger("sl_queue")

LEVELS: dict[type[Event], int] = {  # what is not here has no line: it would be several a step
    events.Loaded: logging.DEBUG,
    events.StandsBy: logging.INFO,
    events.TookOver: logging.INFO,
    events.Prepared: logging.DEBUG,
    events.Ready: logging.DEBUG,
    events.Began: logging.DEBUG,
    events.StepDone: logging.DEBUG,
    events.Committed: logging.DEBUG,
    events.Reconnected: logging.DEBUG,  # the link has said so
    events.Finished: logging.INFO,
    events.Resent: logging.INFO,
    events.PhaseChanged: logging.INFO,
    events.Missing: logging.INFO,
    events.HandCame: logging.INFO,
    events.HandLeft: logging.INFO,
    events.HandRefused: logging.WARNING,
    events.Rejected: logging.WARNING,
    events.Foreign: logging.WARNING,
    events.StillWaiting: logging.WARNING,
    events.Refused: logging.WARNING,
    events.GenerationBegan: logging.WARNING,
}


def to_log(event: Event, /) -> None:
    """Write the line of an event, if it has one."""
    if isinstance(event, events.EpochDone):
        level = logging.INFO if event.party == SCHEDULER else logging.DEBUG
    else:
        level = LEVELS.get(type(event), logging.NOTSET)
    if level and log.isEnabledFor(level):
        log.log(level, "%s: %s", event.party, text_of(event), extra={"event": event})


@singledispatch
def text_of(event: Event) -> str:
    """Say an event in words, without who says it."""
    return name_of(type(event)).replace("_", " ")


@text_of.register
def _(event: events.Loaded) -> str:
    return "libraries loaded"


@text_of.register
def _(event: events.StandsBy) -> str:
    return f"stands by: process {event.holder} works with the state folder; goes on from its checkpoint when it is gone"


@text_of.register
def _(_: events.TookOver) -> str:
    return "takes over: the worker before is gone"


@text_of.register
def _(event: events.Prepared) -> str:
    return f"prepared: {event.what}"


@text_of.register
def _(event: events.Ready) -> str:
    return "connected to the broker"


@text_of.register
def _(event: events.Reconnected) -> str:
    return "reconnected; unconfirmed messages were published again"


@text_of.register
def _(event: events.Began) -> str:
    return f"run {event.run}, generation {event.generation}: training from step {event.step + 1} on"


@text_of.register
def _(event: events.StepDone) -> str:
    return f"step {event.step} is done; messages of this process so far: {dict(event.messages or {})}"


@text_of.register
def _(event: events.Committed) -> str:
    return f"step {event.step} is committed, after {event.seconds:.3f} s"


@text_of.register
def _(event: events.EpochDone) -> str:
    if event.epochs is None:
        return f"epoch {event.epoch + 1} is committed"
    text = epoch_text(event.epoch, event.epochs, event.loss, event.holdout)
    return f"{text}  after step {event.step}, {event.seconds or 0.0:.1f} s"


@text_of.register
def _(event: events.Finished) -> str:
    already = f"already finished after step {event.step}" if event.already else "finished"
    return f"{already}; final weights in {event.folder}"


@text_of.register
def _(event: events.Resent) -> str:
    over = f"from {event.first} on" if event.seconds is None else f"in {event.seconds:.0f} s"
    comma = "," if event.seconds is None else ""
    return f"sent {counted(event.messages, 'message', 'messages')} again to party {event.receiver!r}{comma} {over}"


@text_of.register
def _(event: events.Rejected) -> str:
    if event.seconds is None:
        return f"rejected a message of {event.sender!r}: {event.reason}"
    return (
        f"rejected {event.messages:,} further messages of {event.sender!r} in {event.seconds:.0f} s, "
        f"the last: {event.reason}"
    )


@text_of.register
def _(event: events.Foreign) -> str:
    return f"ignores messages of {event.sender!r}: {event.reason}"


@text_of.register
def _(event: events.StillWaiting) -> str:
    text = f"has waited {event.seconds:.0f} s for {event.what}"
    if event.outage_s is not None:
        return f"{text}; its own link to the broker has been unusable for {event.outage_s:.0f} s: {event.reason}"
    if event.silent_s is not None:
        return f"{text}; last heard from it {event.silent_s:.0f} s ago"
    return f"{text}: {event.reason}"


@text_of.register
def _(event: events.HandCame) -> str:
    return f"{event.hand} is here; hands: {event.hands}"


@text_of.register
def _(event: events.HandLeft) -> str:
    return f"{event.hand} is lost: {event.reason}; what it had is given to others; hands: {event.hands}"


@text_of.register
def _(event: events.HandRefused) -> str:
    return f"refused, since it would compute other bits: {event.reason}"


@text_of.register
def _(event: events.PhaseChanged) -> str:
    which = f"job {event.job}" if event.run is None else f"run {event.run}"
    return f"{which} is {event.phase}{f': {event.reason}' if event.reason else ''}"


@text_of.register
def _(event: events.Missing) -> str:
    return f"waiting for {', '.join(event.parties)}"


@text_of.register
def _(event: events.Refused) -> str:
    return f"party {event.refused!r} was refused, and the run waits for it: {event.reason}"


@text_of.register
def _(event: events.GenerationBegan) -> str:
    return (
        f"messages were lost for good; generation {event.generation} begins after step {event.step}, "
        "which all parties hold"
    )
