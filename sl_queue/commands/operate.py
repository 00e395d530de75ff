"""What the operator does from outside: read where a run is, and ask it to stop."""

import queue
from typing import Any

from sl_queue.errors import BrokerUnreachable, PeerSilent
from sl_queue.job import Job
from sl_queue.launch.broker import connector, require_network
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch, Status, StopRequest
from sl_queue.transport.link import Delivery, Link
from sl_queue.transport.retry import Limits
from sl_queue.transport.seal import Seal

TIMEOUT_S = 3.0  # the scheduler tells where the run is several times a second
PATIENCE = Limits(first_s=5.0, busy_s=10.0)  # somebody waits for the answer; another operator may be asking


def read_status(job: Job, broker: str, timeout_s: float = TIMEOUT_S, seal: Seal | None = None) -> dict[str, Any] | None:
    """The newest status that the scheduler published, which stays where it is; None if there is none.

    Raises BrokerUnreachable; RemoteProtocolError if the job seals and the status cannot be opened.
    """
    require_network(broker)
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    link = connector(job, broker, PATIENCE)(OPERATOR, 1)
    link.open(arrived.put, lambda: None, lambda _: None)
    try:
        body = arrived.get(timeout=timeout_s).body
        _, status = decode(body if seal is None else seal.open(SCHEDULER, body).body)
        return dict(status.run) if isinstance(status, Status) else None
    except queue.Empty:
        return None
    finally:
        link.close()  # unacknowledged, so it goes back


def request_stop(job: Job, broker: str, seal: Seal | None = None) -> None:
    """Ask the scheduler for an orderly stop at the next commit. Raises BrokerUnreachable, PeerSilent."""
    require_network(broker)
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    link = connector(job, broker, PATIENCE)(OPERATOR, 1)
    link.open(arrived.put, lambda: None, lambda _: None)
    try:
        if seal is not None:
            _meet_scheduler(link, arrived, seal)
        body = encode(Header("", 0, Kind.REPORT, OPERATOR, SCHEDULER, MicroBatch(0, 0)), StopRequest())
        if seal is not None:
            body = seal.seal(SCHEDULER, body)
        link.publish(SCHEDULER, Kind.REPORT, "", body, persistent=True)
        if not link.flush(timeout_s=10.0):
            raise BrokerUnreachable("the broker did not confirm the request within 10 s; ask again")
    finally:
        link.close()


def _meet_scheduler(link: Link, arrived: "queue.SimpleQueue[Delivery]", seal: Seal) -> None:
    """Hear of the scheduler that runs now: it takes a sealed request only from who knows of it.

    The first status may be what an earlier one left behind; the second is not.
    """
    try:
        for _ in range(2):
            delivery = arrived.get(timeout=TIMEOUT_S)
            seal.open(SCHEDULER, delivery.body)
            link.acknowledge([delivery.tag])
    except queue.Empty:
        raise PeerSilent("no scheduler of this job is running at that broker, so there is nothing to stop") from None
