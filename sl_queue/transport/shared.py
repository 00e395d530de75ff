"""State that the parts of a party's channel share."""

import threading
from dataclasses import dataclass

from sl_queue.protocol.events import Observer
from sl_queue.protocol.party.timeline import Timeline
from sl_queue.transport.link import Link, Tag
from sl_queue.transport.liveness import Liveness
from sl_queue.transport.mail import Mail


@dataclass(frozen=True, slots=True)
class Shared:
    """One party's link and mail, its memory of the run, and who is notified when that has changed.

    The worker, the link, the pulse and the committer change the timeline with `changed` held; headers are read without.
    """

    party: str
    incarnation: str
    patience_s: float
    link: Link
    mail: Mail
    timeline: Timeline[Tag]
    changed: threading.Condition
    liveness: Liveness
    observe: Observer
