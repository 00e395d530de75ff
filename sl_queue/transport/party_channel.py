"""A party's channel: the recovery law over a link that may lose the broker at any time.

Two threads meet here under one lock: the worker (send, receive) and the link (deliveries, reconnects). A third, the
pulse, tells peers and scheduler a few times a second that this worker is alive and where it is. A fourth commits: the
broker's confirms and the disk take their time while the pipeline fills again, and the first message of the next step
is not given out before. So a worker that is killed meanwhile repeats no more than the steps between two commits, and
prefetch stays what it is. What is decided under the lock (protocol/party) is done outside of it.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from sl_queue.errors import RunStopped, SlQueueError, named
from sl_queue.protocol import events
from sl_queue.protocol.codec import Terms
from sl_queue.protocol.control import Alive, Join, Progress, Report, Start, Waiting
from sl_queue.protocol.events import Observer, ignore
from sl_queue.protocol.holdout import is_session
from sl_queue.protocol.measures import Connectivity
from sl_queue.protocol.messages import SCHEDULER, Activation, Gradient, Kind, Masked, MicroBatch, Payload
from sl_queue.protocol.party.bounds import Bounds, control_bytes
from sl_queue.protocol.party.mailbox import Acknowledge, Reject, Verdict
from sl_queue.protocol.party.orders import Orders, Restarted
from sl_queue.protocol.party.timeline import Timeline
from sl_queue.protocol.text import printable
from sl_queue.protocol.topology import Topology
from sl_queue.protocol.totals import Totalling
from sl_queue.security.sealing import Seal
from sl_queue.transport.commits import Commits
from sl_queue.transport.link import Link, Tag
from sl_queue.transport.liveness import Liveness
from sl_queue.transport.mail import Letter, Mail, Spoilt
from sl_queue.transport.pulse import Pulse
from sl_queue.transport.reporting import Reports, report_every_s
from sl_queue.transport.resending import Resending
from sl_queue.transport.shared import Shared
from sl_queue.transport.waiting import waiting
from sl_queue.transport.waits import Waits

T = TypeVar("T")
SendApart = Callable[[str, Masked, str], None]

OUTBOX_BYTES = 256 * 1024 * 1024  # sent and not yet committed by the receiver; what is older is lost with the broker


class PartyChannel:
    """ports.Channel over a link. `patience_s`: seconds of waiting after which it says for whom.

    `seal` keeps messages from the broker; `committer` runs one commit at a time, by default in a thread of its own.
    `bounds` says what peers may send; without it anything that can be read is taken.
    """

    def __init__(
        self,
        link: Link,
        party: str,
        topology: Topology,
        incarnation: str,
        *,
        patience_s: float,
        persistent: bool,
        depth: int,
        seal: Seal | None = None,
        committer: Executor | None = None,
        bounds: Bounds | None = None,
        observe: Observer = ignore,
        totals: Totalling | None = None,
    ) -> None:
        self._link, self._party, self._sources = link, party, topology.senders_to(party)
        self._patience_s, self._persistent, self._depth = patience_s, persistent, depth
        terms = {sender: Terms.between(topology, sender, party, control_bytes(sender)) for sender in self._sources}
        largest = {} if bounds is None else {sender: bounds.largest_bytes(sender) for sender in self._sources}
        self._mail = Mail(
            link, party, terms, incarnation, patience_s=patience_s, largest=largest, seal=seal, observe=observe
        )
        self._timeline: Timeline[Tag] = Timeline(party, incarnation, OUTBOX_BYTES, bounds)
        self._changed, self._observe = threading.Condition(), observe
        every_s = report_every_s(patience_s)
        self._pulse = Pulse(party, every_s, self._beat, first_s=every_s)
        self._liveness = Liveness(
            party, patience_s, self._mail.is_unreadable, link.outage, observe=observe, absent_s=self._pulse.absent_s
        )
        self._liveness.hear(self._sources)  # so that whoever observes may ask before it is open
        shared = Shared(
            party, incarnation, patience_s, link, self._mail, self._timeline, self._changed, self._liveness, observe
        )
        committer = committer or ThreadPoolExecutor(1, thread_name_prefix=f"{party}-commit")
        self._reports = Reports(shared, self._sources, None if totals is None else lambda: totals(self.counts))
        self._commits, self._resending = Commits(shared, committer, self._check), Resending(party, patience_s, observe)
        self._failure: SlQueueError | None = None
        self._waits = Waits(shared, self._reports, self._check)
        self.on_asked: Callable[[str, SendApart], None] = lambda *_: None  # by a party, which rows are held out

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._liveness.hear(self._sources)
        self._mail.open(self)
        self._liveness.hear(self._sources)
        self._pulse.start()

    def close(self) -> None:
        """Flush what was published, then leave; unacknowledged messages stay at the broker."""
        self._pulse.end()
        try:
            self._mail.close(failed=self._failure is not None)
        finally:
            self._resending.log_counts(all_of_it=True)
            self._commits.close()  # once this returns, the state folder may become another worker's
            self._pulse.join()

    # What the worker calls --------------------------------------------------------------------------------------

    def send(self, receiver: str, message: Activation | Gradient) -> None:
        body = self._mail.sealed(receiver, self._timeline.header(receiver, message), message)
        with self._changed:
            self._timeline.outbox.keep(receiver, message.kind, message.micro_batch, body)
        self._publish(receiver, message.kind, body, message.payload.numbers)

    def receive(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload:
        what = f"{kind} {micro_batch} of party {sender!r}"
        ask = partial(self._reports.ask, sender, kind, micro_batch)
        here = partial(self._timeline.mailbox.has, sender, kind, micro_batch)
        with waiting(self._observe, self._party, sender, kind, micro_batch):
            self._waits.until(here, sender, what, ask)
        with self._changed:
            payload = self._timeline.mailbox.take(sender, kind, micro_batch)
        assert payload is not None  # this thread alone takes
        self.wait_committed()
        return payload

    def commit(self, step: int, save: Callable[[], None]) -> None:
        self.wait_committed()
        self._commits.begin(step, save)

    def wait_committed(self) -> None:
        self._commits.wait()

    def flush(self) -> None:
        self._commits.flush()

    def announce(self, describe: Callable[[], Join]) -> None:
        self._reports.announce(describe)

    def report(self, report: Report) -> None:
        self._reports.report(report)

    def progress(self, report: Progress) -> None:
        self._reports.progress(report)
        done = (report.generation, report.step, report.samples, report.loss, self.counts)
        self._observe(events.StepDone(self._party, *done))

    def wait_for(self, decision: Callable[[Orders], T | None]) -> T:
        with waiting(self._observe, self._party, SCHEDULER, "order"):
            ask = self._reports.announce_again
            return self._waits.until(lambda: decision(self._timeline.orders), SCHEDULER, "the scheduler's word", ask)

    def enter(self, start: Start, resume_step: int) -> None:
        with self._changed:
            verdicts = self._timeline.enter(start, resume_step)
        for verdict in verdicts:
            self._carry_out(verdict, self._party)

    @property
    def counts(self) -> dict[str, int]:
        """Messages applied, redelivered, dropped as duplicates or stale, and rejected since this process started."""
        with self._changed:
            return dict(self._timeline.mailbox.counts)

    @property
    def silent_s(self) -> dict[str, float]:
        """Seconds since anything was heard, by peer."""
        return {peer: self._liveness.silence_s(peer) for peer in self._sources}

    @property
    def pulse_age_s(self) -> float:
        """Seconds since the pulse last beat; it does so several times a second."""
        return self._pulse.age_s

    @property
    def connectivity(self) -> Connectivity:
        """The connection to the broker, now."""
        return self._mail.connectivity

    # Waiting ----------------------------------------------------------------------------------------------------

    def when_woken(self, between: Callable[[], None]) -> None:
        """Set what a worker that waits here does when it is woken, in its own thread."""
        self._waits.between = between

    def wake(self) -> None:
        """Wake a worker that waits here, once; from any thread."""
        self._waits.wake()

    def check(self) -> None:
        """Raise what ends or redirects the worker, as `receive` does; for who waits for something else."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        """Raise what ends or redirects the worker; called with the lock held."""
        if self._failure is not None:
            raise self._failure
        if self._commits.has_ended:
            self.wait_committed()
        stop = self._timeline.orders.stop
        if stop is not None and stop.error is not None:
            raise named(stop.error)(printable(stop.reason))
        if stop is not None and stop.after_step is not None and self._timeline.committed >= stop.after_step:
            raise RunStopped(printable(stop.reason))
        if self._timeline.newer is not None:
            raise Restarted(self._timeline.newer)

    # What the mail and its link call ----------------------------------------------------------------------------

    def on_letter(self, letter: Letter) -> None:
        header, message, delivery = letter.header, letter.message, letter.delivery
        if not delivery.redelivered:  # what came before says nothing of now
            self._liveness.hear((header.sender,))
        with self._changed:
            if letter.met and header.sender == SCHEDULER:
                self._timeline.announce = True
            verdict: Verdict[Tag] = Acknowledge((delivery.tag,))
            if isinstance(message, Activation | Gradient):
                self._timeline.note(header, delivery.redelivered)
                verdict = self._timeline.mailbox.file(header, message, delivery.tag)
            else:
                self._timeline.take(header, message)
            self._changed.notify_all()
        if verdict is not None:
            self._carry_out(verdict, header.sender)
        if isinstance(message, Waiting) and self._timeline.is_present(header):
            self._send_again(header.sender, message)
        elif isinstance(message, Alive) and is_session(header.run):
            self.on_asked(header.sender, self._reports.send_apart)

    def on_late(self, letter: Letter) -> None:
        if letter.met and letter.header.sender == SCHEDULER:
            with self._changed:
                self._timeline.announce = True
                self._changed.notify_all()

    def on_spoilt(self, spoilt: Spoilt) -> None:
        delivery = spoilt.delivery
        with self._changed:
            verdict = self._timeline.refuse(delivery.tag, str(spoilt.reason), spoilt.header)
            self._changed.notify_all()
        self._carry_out(verdict, delivery.sender)

    def on_reconnect(self) -> None:
        self._observe(events.Reconnected(self._party))
        with self._changed:
            again = self._timeline.disconnect(self._depth)
            self._changed.notify_all()
        for (receiver, kind, _), body in again:
            self._publish(receiver, kind, body)

    def on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    fail = on_failure  # also for who composes several roles in one process

    def _send_again(self, receiver: str, waiting: Waiting) -> None:
        """Send again what a peer waits for and all after it, or report that it is lost."""
        if not self._resending.may_answer(receiver):
            return
        with self._changed:
            again, lost = self._timeline.answer(receiver, waiting)
        for (_, kind, _), body in again:
            self._publish(receiver, kind, body)
        self._resending.log_first(receiver, waiting, len(again))
        if lost is not None:
            self.report(lost)

    def _carry_out(self, verdict: Verdict[Tag], sender: str) -> None:
        match verdict:
            case Acknowledge(tags):
                self._link.acknowledge(tags)
            case Reject(tag, reason, by):
                self._mail.refuse(by or sender, tag, reason)
            case None:
                pass

    def _beat(self) -> None:
        self._mail.log_refusals()
        self._resending.log_counts()
        if self._failure is not None:
            raise self._failure
        self._reports.beat()

    def _publish(self, receiver: str, kind: Kind, body: bytes, numbers: int = 0) -> None:
        self._observe(events.Sent(self._party, receiver, kind, len(body), numbers))
        self._link.publish(receiver, kind, self._timeline.run, body, persistent=self._persistent)
