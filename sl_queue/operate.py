"""What the operator does from outside: read where a run is, and ask it to stop."""

import queue
from typing import Any

from sl_queue.errors import BrokerUnreachable
from sl_queue.job import Job
from sl_queue.launch import connector, require_network
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch, Status, StopRequest
from sl_queue.transport.link import Delivery


def read_status(job: Job, broker: str, timeout_s: float = 3.0) -> dict[str, Any] | None:
    """The newest status that the scheduler published, which stays where it is; None if there is none.

    Raises BrokerUnreachable.
    """
    require_network(broker)
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    link = connector(job, broker)(OPERATOR, 1)
    link.open(arrived.put, lambda: None, lambda _: None)
    try:
        _, status = decode(arrived.get(timeout=timeout_s).body)
        return dict(status.run) if isinstance(status, Status) else None
    except queue.Empty:
        return None
    finally:
        link.close()  # unacknowledged, so it goes back


def request_stop(job: Job, broker: str) -> None:
    """Ask the scheduler for an orderly stop at the next commit. Raises BrokerUnreachable."""
    require_network(broker)
    link = connector(job, broker)(OPERATOR, 1)
    link.open(lambda _: None, lambda: None, lambda _: None)
    try:
        body = encode(Header("", 0, Kind.REPORT, OPERATOR, SCHEDULER, MicroBatch(0, 0)), StopRequest())
        link.publish(SCHEDULER, Kind.REPORT, "", body, persistent=True)
        if not link.flush(timeout_s=10.0):
            raise BrokerUnreachable("the broker did not confirm the request within 10 s; ask again")
    finally:
        link.close()
