"""The way of a lock-step step over all processes: moments that its workers note, and the path through them.

A worker notes where the product lets one look: taps at the cut, events, and a link around the link. All moments are of
the machine's monotonic clock, each with its thread and what that thread has computed so far.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from sl_queue.cut.guard import Crossing, Guard
from sl_queue.protocol.events import Event, Sent, StepDone, Waited
from sl_queue.protocol.messages import Kind
from sl_queue.transport.link import Delivery, Link

DATA = (Kind.ACTIVATION, Kind.GRADIENT)


class Moment(NamedTuple):
    """A time, and the CPU time that the thread it was noted on has used."""

    at_ns: int
    thread: int
    cpu_ns: int


Key = tuple[str, str, int]  # what, the peer ("" for none), step


@dataclass(slots=True)
class Noted:
    """The moments of one party, by what happened. Mutable while it trains; any thread may note."""

    party: str
    least_bytes: int  # of a message with a tensor
    moments: dict[Key, Moment] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)  # of messages so far, by way and peer

    def note(self, what: str, peer: str, step: int) -> None:
        self.moments[what, peer, step] = Moment(time.monotonic_ns(), threading.get_ident(), time.thread_time_ns())

    def next(self, way: str, peer: str) -> int:
        """Return the step of the next message to or from a peer: in lock-step there is one in each."""
        step = self.counts.get((way, peer), 0)
        self.counts[way, peer] = step + 1
        return step

    def __call__(self, event: Event, /) -> None:
        """Take in an event of the party."""
        match event:
            case Sent(receiver=peer, numbers=numbers) if numbers:
                self.note("encoded", peer, self.next("encoded", peer))
            case Waited(source=peer, step=int(step)):
                self.note("received", peer, step)
            case StepDone(step=step):
                self.note("updated", "", step)

    def guards(self, peers: Sequence[str]) -> Mapping[str, Guard]:
        """Return the taps at the cut to each peer."""
        return {peer: Guard(leaving=Tap(self, "computed", peer)) for peer in peers}


@dataclass(frozen=True, slots=True)
class Tap:
    """Notes a tensor that leaves."""

    noted: Noted
    what: str
    peer: str

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        self.noted.note(self.what, self.peer, crossing.micro_batch.step)


class NotingLink:
    """A link that notes what is published and what is delivered."""

    def __init__(self, link: Link, noted: Noted) -> None:
        self._link, self._noted = link, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def open(self, on_delivery: Callable[[Delivery], None], *others: Any) -> None:
        def deliver(delivery: Delivery) -> None:
            if delivery.redelivered or len(delivery.body) < self._noted.least_bytes:
                on_delivery(delivery)
                return
            step = self._noted.next("delivered", delivery.sender)
            self._noted.note("framed", delivery.sender, step)
            on_delivery(delivery)
            self._noted.note("filed", delivery.sender, step)

        self._link.open(deliver, *others)

    def publish(self, receiver: str, kind: Kind, *arguments: Any, **named: Any) -> None:
        self._link.publish(receiver, kind, *arguments, **named)
        if kind in DATA:
            self._noted.note("handed over", receiver, self._noted.next("handed over", receiver))


@dataclass(frozen=True, slots=True)
class Hop:
    """A piece of the way: its name, whose it is, and its wall and CPU time in one step, in nanoseconds."""

    name: str
    who: str
    wall_ns: int
    cpu_ns: int


# The way from the gradient of one step to that of the next: the name of what comes before a moment, the moment, whose
# moment it is, and the step before.
FEATURE, FUSE = "feature party", "label holder"
WAY = (
    ("", "received", FEATURE, -1),
    ("backward and update", "updated", FEATURE, -1),
    ("forward", "computed", FEATURE, 0),
    ("pack and encode", "encoded", FEATURE, 0),
    ("hand to the socket", "handed over", FEATURE, 0),
    ("kernel, broker, read", "framed", FUSE, 0),
    ("decode and file", "filed", FUSE, 0),
    ("wake the worker", "received", FUSE, 0),
    ("fuse: forward and backward", "computed", FUSE, 0),
    ("pack and encode", "encoded", FUSE, 0),
    ("hand to the socket", "handed over", FUSE, 0),
    ("kernel, broker, read", "framed", FEATURE, 0),
    ("decode and file", "filed", FEATURE, 0),
    ("wake the worker", "received", FEATURE, 0),
)


def way_of(step: int, feature: Noted, label: Noted) -> list[Hop] | None:
    """Return the hops of a step over one feature party; None if a moment of it is missing."""
    found: list[Moment] = []
    for _, what, who, before in WAY:
        here, peer = (feature, label.party) if who == FEATURE else (label, feature.party)
        moment = here.moments.get((what, "" if what == "updated" else peer, step + before))
        if moment is None:
            return None
        found.append(moment)
    hops = []
    for (name, _, who, _), (first, second) in zip(WAY[1:], pairwise(found), strict=True):
        same = first.thread == second.thread and name != "kernel, broker, read"
        hops.append(Hop(name, who, second.at_ns - first.at_ns, second.cpu_ns - first.cpu_ns if same else 0))
    return hops


def last_to_arrive(step: int, features: Sequence[Noted], label: Noted) -> Noted | None:
    """Return the feature party that the label holder waited for longest in a step."""
    arrived = [(label.moments.get(("framed", feature.party, step)), feature) for feature in features]
    known = [(moment.at_ns, feature) for moment, feature in arrived if moment is not None]
    return max(known, key=lambda pair: pair[0])[1] if len(known) == len(features) else None
