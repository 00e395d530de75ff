"""Table of who may say what to whom, which the codec, the queues at the broker and their rights follow."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.codec import Terms, decode, encode
from sl_queue.protocol.control import (
    Align,
    Aligned,
    Aligning,
    Alive,
    EpochDone,
    EpochResult,
    Epochs,
    Failed,
    Finish,
    Finished,
    Join,
    Lost,
    Message,
    Offer,
    Open,
    Progress,
    Start,
    Status,
    Stop,
    Stopped,
    StopRequest,
    Waiting,
    kind_of,
)
from sl_queue.protocol.messages import (
    OPERATOR,
    SCHEDULER,
    Activation,
    Gradient,
    Header,
    Kind,
    Masked,
    MicroBatch,
    Payload,
)
from sl_queue.protocol.topology import Topology

TOPOLOGY = Topology("label", ("a", "b"))
EVERYBODY = (*TOPOLOGY.parties, SCHEDULER, OPERATOR)
FIRST = MicroBatch(0, 0)
PAYLOAD = Payload("float32", (1, 1), bytes(4), bytes(8))
RESULT = EpochResult(0, 1, 0.5)

ACTIVATION = {("a", "label"), ("b", "label")}
GRADIENT = {("label", "a"), ("label", "b")}
BETWEEN_PARTIES = ACTIVATION | GRADIENT
TO_SCHEDULER = {(party, SCHEDULER) for party in TOPOLOGY.parties}
TO_PARTIES = {(SCHEDULER, party) for party in TOPOLOGY.parties}

ALLOWED: list[tuple[Message, set[tuple[str, str]]]] = [
    (Activation(FIRST, PAYLOAD), ACTIVATION),
    (Activation(FIRST, PAYLOAD, holdout=True), ACTIVATION),
    (Gradient(FIRST, PAYLOAD), GRADIENT),
    (Masked(FIRST, PAYLOAD), BETWEEN_PARTIES | TO_SCHEDULER | TO_PARTIES),
    (Offer("i", {}, "t", 1, "text", "s"), TO_SCHEDULER),
    (Aligning("i", 1, 2), TO_SCHEDULER),
    (Aligned("i", "x", "s"), TO_SCHEDULER),
    (Align("i", "x", 1, {}), TO_PARTIES),
    (Alive("i"), BETWEEN_PARTIES | TO_SCHEDULER | TO_PARTIES),
    (Waiting("i", 1, "a", Kind.GRADIENT, 0, 0, 1.0, 0.0), BETWEEN_PARTIES | TO_SCHEDULER),
    (Join("i", {}, 1, "", "", None, 0, ()), TO_SCHEDULER),
    (Progress("i", 1, 0, ()), TO_SCHEDULER),
    (EpochDone("i", 1, RESULT), TO_SCHEDULER),
    (Epochs("i", 1, (RESULT,)), TO_SCHEDULER),
    (Lost("i", 1, "a", Kind.GRADIENT, 0, 0, 1.0), TO_SCHEDULER),
    (Failed("i", "JobError", "x"), TO_SCHEDULER),
    (Stopped("i", 1), TO_SCHEDULER),
    (Finished("i", {}), TO_SCHEDULER),
    (StopRequest("s"), {(OPERATOR, SCHEDULER)}),
    (Start("i", "r"), TO_PARTIES),
    (Open("i", 1), TO_PARTIES),
    (Finish("i", 1), TO_PARTIES),
    (Stop("i", "x"), TO_PARTIES),
    (Status({}), {(SCHEDULER, OPERATOR)}),
]


def said(message: Message, sender: str, receiver: str) -> bytes:
    return encode(Header("r", 1, kind_of(message), sender, receiver, FIRST), message)


@pytest.mark.parametrize(("message", "allowed"), ALLOWED, ids=lambda value: type(value).__name__)
def test_each_message_is_read_from_who_may_say_it_to_whom_it_may_be_said(
    message: Message, allowed: set[tuple[str, str]]
) -> None:
    read = set()
    for sender, receiver in product(EVERYBODY, EVERYBODY):
        try:
            decode(said(message, sender, receiver), Terms.between(TOPOLOGY, sender, receiver))
            read.add((sender, receiver))
        except RemoteProtocolError:
            pass
    assert read == allowed


def test_there_is_a_queue_for_whoever_may_say_anything_and_no_other() -> None:
    pairs = set().union(*(allowed for _, allowed in ALLOWED))
    assert {(s, r) for r in EVERYBODY for s in TOPOLOGY.senders_to(r)} == pairs
    assert {(s, r) for s in EVERYBODY for r in TOPOLOGY.receivers_of(s)} == pairs
    assert TOPOLOGY.senders_to("label")[0] == SCHEDULER, "whose queue is the lock of the party"


def test_a_login_may_publish_what_its_role_says_and_nothing_else() -> None:
    for sender, receiver in product(EVERYBODY, EVERYBODY):
        kinds = {kind_of(message) for message, allowed in ALLOWED if (sender, receiver) in allowed}
        assert TOPOLOGY.kinds_between(sender, receiver) == kinds


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"sender": "b"}, "says it is from 'b', but came from 'a'"),
        ({"receiver": "bank"}, "is for 'bank', but came to 'label'"),
        ({"kind": Kind.GRADIENT}, "gradient from 'a', who sends none"),
    ],
)
def test_what_is_forged_or_misaddressed_is_refused_by_its_header(wrong: dict[str, Any], reason: str) -> None:
    header = replace(Header("r", 1, Kind.ACTIVATION, "a", "label", FIRST), **wrong)
    with pytest.raises(RemoteProtocolError, match=reason):
        decode(encode(header, Activation(FIRST, PAYLOAD)), Terms.between(TOPOLOGY, "a", "label"))


def test_a_start_is_on_the_wire_as_every_version_reads_it() -> None:
    body = said(Start("i", "r", (-1, 3)), SCHEDULER, "a")
    assert b"\xa5bases\x92\xff\x03" in body and b"rollback" not in body
    assert decode(body)[1] == Start("i", "r", (-1, 3))
    assert b"\xa6joined" in said(Join("i", {}, 1, "", "", None, 0, ()), "a", SCHEDULER)
