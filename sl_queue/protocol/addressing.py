"""Senders and receivers of messages: who may say which, whom it is meant for, and which earlier one it replaces."""

from typing import Final

from sl_queue.protocol.control import (
    Align,
    Aligning,
    Alive,
    Finish,
    Join,
    Lost,
    Message,
    Offer,
    Open,
    Progress,
    Start,
    Status,
    Stop,
    StopRequest,
    Waiting,
)
from sl_queue.protocol.messages import PARTIES, Activation, Gradient, Masked, Role

_TO_PARTIES: Final = (Alive, Waiting)  # reports that a party takes


def objection(message: Message, sender: Role, receiver: Role) -> str | None:
    """Say why a message of a kind that WHO_MAY_SAY allows is not for the one to say to the other; None if it is."""
    match message:
        case Status():
            allowed = receiver is Role.OPERATOR
        case Start() | Open() | Finish() | Stop() | Align():
            allowed = receiver in PARTIES
        case StopRequest():
            allowed = sender is Role.OPERATOR
        case Alive():
            allowed = sender is not Role.OPERATOR
        case Activation() | Gradient() | Masked():
            allowed = True
        case _:
            allowed = sender in PARTIES and (receiver is Role.SCHEDULER or isinstance(message, _TO_PARTIES))
    if allowed:
        return None
    to = "a party" if receiver in PARTIES else f"the {receiver}"
    return f"a {type(message).__name__} of the {sender} is not meant for {to}"


def subject_of(message: Message) -> str | None:
    """Name what a newer statement of the same sender replaces this one in; None of facts, which stay true."""
    match message:
        case Activation() | Gradient() | Masked():  # first, as it is asked of every message
            return None
        case Start() | Open() | Finish() | Stop():
            return "command"
        case Alive() | Join() | Lost() | Progress() | StopRequest() | Waiting() | Offer() | Aligning() | Align():
            return message.type
        case _:
            return None


def addressee_of(message: Message) -> str | None:
    """Return the incarnation that a message is meant for; None if it is for whoever reads it."""
    match message:
        case Start() | Open() | Finish() | Stop() | Align():
            return message.incarnation
        case Join() | StopRequest() | Offer():
            return message.to
        case _:
            return None
