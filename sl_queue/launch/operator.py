"""Operator's view from outside: read where a run is, and ask it to stop."""

import queue
import time
from dataclasses import dataclass

from sl_queue.config.job import Job
from sl_queue.errors import BrokerUnreachable, JobError, PeerSilent, SlQueueError
from sl_queue.launch.connect import connector, require_network
from sl_queue.protocol.codec import Terms
from sl_queue.protocol.control import Status, StopRequest
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.scheduler.state import Phase
from sl_queue.protocol.scheduler.status import RunStatus, Telling, from_json
from sl_queue.protocol.text import printable
from sl_queue.security.sealing import Seal
from sl_queue.transport.mail import Letter, Mail, Spoilt
from sl_queue.transport.retry import Limits

TIMEOUT_S = 3.0  # the scheduler tells where the run is several times a second
ENDED_S = 1.0  # to wait whether one that reported an end is followed by another that begins
BACKLOG_S = 0.05  # what comes sooner after another lay in the queue with it
ANSWER_S = 20.0  # within which a scheduler that runs has taken a request
PATIENCE = Limits(first_s=5.0, busy_s=10.0)  # somebody waits for the answer; another operator may be asking


def read_status(job: Job, broker: str, timeout_s: float = TIMEOUT_S, seal: Seal | None = None) -> RunStatus | None:
    """Return the newest status that the scheduler published, which stays where it is; None if there is none.

    It may be of a scheduler that is gone. Raises BrokerUnreachable; RemoteProtocolError if the job seals and the status
    cannot be opened.
    """
    require_network(broker)
    statuses = Statuses(job, broker, seal)
    try:
        status = statuses.next(timeout_s)
        return None if status is None else status.run
    finally:
        statuses.close()


def watch_status(job: Job, broker: str, seal: Seal | None = None) -> Telling | None:
    """Return the status that the scheduler reports now, else its last one; None if it never reported any.

    What lies in the queue may be of a scheduler that is gone: only what comes while we listen is of one that runs.
    Raises as `read_status`, and JobError if the scheduler runs another job.
    """
    require_network(broker)
    statuses = Statuses(job, broker, seal)
    try:
        newest = statuses.next(TIMEOUT_S)
        if newest is None:
            return None
        began = time.monotonic()
        while True:
            limit_s = ENDED_S if newest.run.over else TIMEOUT_S
            status = statuses.next(max(0.0, began + limit_s - time.monotonic()))
            listened_s = time.monotonic() - began
            if status is None:
                return Telling(newest.run, fresh=False, listened_s=listened_s) if is_of(job, newest.run) else None
            newest = status
            if listened_s > BACKLOG_S:
                require_of(job, newest.run)
                return Telling(newest.run, fresh=True, listened_s=listened_s)
    finally:
        statuses.close()


def request_stop(job: Job, broker: str, seal: Seal | None = None) -> str:
    """Ask the scheduler for an orderly stop at the next commit; what came of it, in words.

    The request is for the scheduler that runs now, and it has taken it when this returns: nothing is left behind that
    would stop a later start. Raises BrokerUnreachable, PeerSilent; JobError if the scheduler runs another job.
    """
    require_network(broker)
    statuses = Statuses(job, broker, seal)
    try:
        left_behind = statuses.next()
        if left_behind is None:
            return _nothing_to_stop(None, "")
        before = left_behind.run if is_of(job, left_behind.run) else None
        asked, deadline = "", time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            status = statuses.next()
            if status is None:
                return _nothing_to_stop(before, asked)
            require_of(job, status.run)
            phase = status.run.phase
            if phase in (Phase.STOPPING, Phase.STOPPED):
                return "asked to stop at the next commit; start the workers again to resume"
            if phase in (Phase.FINISHED, Phase.FAILED):
                return _nothing_to_stop(status.run, "")
            if status.incarnation != asked:
                asked = status.incarnation
                statuses.answer(StopRequest(asked))
        raise PeerSilent(f"the scheduler did not answer within {ANSWER_S:.0f} s; ask again")
    finally:
        statuses.close()


def is_of(job: Job, run: RunStatus) -> bool:
    """Return whether that is a run of the job: jobs may share a virtual host one after the other."""
    return run.job in ("", job.name)  # the first versions did not say


def require_of(job: Job, run: RunStatus) -> None:
    """Raise JobError for a run of another job."""
    if not is_of(job, run):
        raise JobError(
            f"the scheduler at that broker runs job {printable(run.job)!r}, not {job.name!r}: give the file of that "
            "job, or the broker of this one"
        )


def _nothing_to_stop(run: RunStatus | None, asked: str) -> str:
    """Return what the operator is shown where no scheduler runs. Raises PeerSilent where one should."""
    if asked:
        raise PeerSilent("the scheduler ended before it answered; ask again")
    phase = None if run is None else run.phase
    if run is None or phase in (Phase.GATHERING, Phase.RUNNING, Phase.STOPPING):
        raise PeerSilent("no scheduler of this job is running at that broker, so there is nothing to stop")
    if phase == Phase.FINISHED:
        return f"run {printable(str(run.run))} is finished: there is nothing to stop"
    return f"the run has ended already: {printable(str(run.reason))}"


@dataclass(frozen=True, slots=True)
class Told:
    """Status, and the scheduler that reported it."""

    run: RunStatus
    incarnation: str


class Statuses:
    """The statuses that the scheduler publishes, one after the other. The newest stays in its queue.

    What cannot be read stays there as well: whoever only looks takes nothing away.
    """

    def __init__(self, job: Job, broker: str, seal: Seal | None) -> None:
        self._arrived: queue.SimpleQueue[Letter | SlQueueError] = queue.SimpleQueue()
        self._newest: Letter | None = None
        self._link = connector(job, broker, PATIENCE)(OPERATOR, 2)
        terms = {SCHEDULER: Terms.between(job.topology(), SCHEDULER, OPERATOR)}
        self._mail = Mail(self._link, OPERATOR, terms, "", patience_s=ANSWER_S, seal=seal)
        self._mail.open(self)

    def next(self, timeout_s: float = TIMEOUT_S) -> Told | None:
        """Return the next one; None if none comes. The first may be what an earlier scheduler left behind.

        Raises BrokerUnreachable if the link has failed, RemoteProtocolError for what cannot be read.
        """
        try:
            arrived = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(arrived, SlQueueError):
            raise arrived
        if self._newest is not None:
            self._link.acknowledge([self._newest.delivery.tag])
        self._newest = arrived
        status = arrived.message
        return Told(from_json(status.run), status.incarnation) if isinstance(status, Status) else None

    def answer(self, request: StopRequest) -> None:
        """Send the scheduler a request. Raises BrokerUnreachable if the broker does not confirm it."""
        header = Header("", 0, Kind.REPORT, OPERATOR, SCHEDULER, MicroBatch(0, 0))
        self._mail.send(SCHEDULER, header, request, lasting=False)
        if not self._link.flush(timeout_s=10.0):
            raise BrokerUnreachable("the broker did not confirm the request within 10 s; ask again")

    def close(self) -> None:
        """Leave; the newest status is unacknowledged, so it goes back."""
        self._link.close()

    # What the mail and its link call ----------------------------------------------------------------------------

    def on_letter(self, letter: Letter) -> None:
        self._arrived.put(letter)

    def on_late(self, letter: Letter) -> None:
        pass  # a status is never late

    def on_spoilt(self, spoilt: Spoilt) -> None:
        self._arrived.put(spoilt.reason)

    def on_reconnect(self) -> None:
        pass  # the newest comes again

    def on_failure(self, error: SlQueueError) -> None:
        self._arrived.put(error)
