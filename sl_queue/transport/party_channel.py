"""A party's channel: the recovery law over a link that may lose the broker at any time.

Two threads meet here under one lock: the worker (send, receive) and the link (deliveries, reconnects). A third, the
pulse, tells peers and scheduler a few times a second that this worker is alive and where it is. A fourth commits: the
broker's confirms and the disk take their time while the pipeline fills again, and the first message of the next step
is not given out before. So a worker that is killed meanwhile repeats no more than the steps between two commits, and
prefetch stays what it is. What is decided under the lock (protocol/timeline) is done outside of it.
"""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from sl_queue.errors import (
    AlignmentError,
    RemoteProtocolError,
    RunStopped,
    SlQueueError,
    named,
)
from sl_queue.ports import Connectivity, Restarted
from sl_queue.protocol import events
from sl_queue.protocol.codec import AnotherVersion, Unreadable, decode, encode
from sl_queue.protocol.events import Observer, ignore
from sl_queue.protocol.messages import (
    SCHEDULER,
    Activation,
    Alive,
    Finish,
    Gradient,
    Header,
    Joined,
    Kind,
    Message,
    MicroBatch,
    Open,
    Payload,
    Progress,
    Report,
    Start,
    Stop,
    Waiting,
)
from sl_queue.protocol.party.bounds import Bounds, control_bytes
from sl_queue.protocol.party.mailbox import Acknowledge, Reject, Verdict
from sl_queue.protocol.party.orders import Orders
from sl_queue.protocol.party.timeline import Timeline
from sl_queue.protocol.text import printable
from sl_queue.security.sealing import OVERHEAD_BYTES, News, Opened, Seal
from sl_queue.transport.link import Delivery, Link, Tag
from sl_queue.transport.liveness import Patience
from sl_queue.transport.refusals import Refusals
from sl_queue.transport.sparing import Sparing
from sl_queue.transport.versions import Versions
from sl_queue.transport.waiting import waiting

T = TypeVar("T")

PULSE_S = 0.25  # how often progress is told
OUTBOX_BYTES = 256 * 1024 * 1024  # sent and not yet committed by the receiver; what is older is lost with the broker

ANSWERS = 40  # of a peer's questions in one patience: it asks no more than half as often


class PartyChannel:
    """ports.Channel over a link. `patience_s`: seconds of waiting after which it says for whom.

    `seal` keeps messages from the broker; `committer` runs one commit at a time, by default in a thread of its own.
    `bounds` says what peers may send; without it anything that can be read is taken.
    """

    def __init__(
        self,
        link: Link,
        party: str,
        peers: tuple[str, ...],
        incarnation: str,
        *,
        patience_s: float,
        persistent: bool,
        depth: int,
        seal: Seal | None = None,
        committer: Executor | None = None,
        bounds: Bounds | None = None,
        observe: Observer = ignore,
    ) -> None:
        self._link, self._party, self._sources, self._incarnation = link, party, (SCHEDULER, *peers), incarnation
        self._patience_s, self._persistent, self._depth = patience_s, persistent, depth
        self._seal, self._news, self._observe = seal, News(seal), observe
        self._pulse_at = time.monotonic()
        self._refusals, self._versions = Refusals(party, patience_s, observe), Versions(patience_s)
        self._largest = {} if bounds is None else {s: bounds.largest_bytes(s) + OVERHEAD_BYTES for s in self._sources}
        self._answered: dict[str, float] = {}  # when each peer's last question was, monotonic
        self._resent = Sparing(patience_s)
        self._changed = threading.Condition()
        self._timeline: Timeline[Tag] = Timeline(party, peers, incarnation, OUTBOX_BYTES, bounds)
        self._patience = Patience(
            party,
            patience_s,
            lambda source: seal is not None and seal.never_opened(source),
            link.outage,
            observe=observe,
        )
        self._patience.hear(self._sources)  # so that whoever observes may ask before it is open
        self._failure: SlQueueError | None = None
        self._describe: Callable[[], Joined] | None = None
        self._progress: Progress | None = None
        self._telling = threading.RLock()  # entered again where memory:// delivers on the publisher's thread
        self._committer = committer or ThreadPoolExecutor(1, thread_name_prefix=f"{party}-commit")
        self._commit_under_way: Future[None] | None = None
        self._closed = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name=f"{party}-pulse", daemon=True)

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._patience.hear(self._sources)
        self._link.open(self._on_delivery, self._on_reconnect, self._on_failure)
        self._patience.hear(self._sources)
        self._pulse.start()

    def close(self) -> None:
        """Flush what was published, then leave; unacknowledged messages stay at the broker."""
        self._closed.set()
        try:
            if self._failure is None:
                with suppress(SlQueueError):  # the link has failed a moment ago
                    self._link.flush(timeout_s=5.0)
        finally:
            self._link.close()
            self._tell_counts(all_of_it=True)
            self._committer.shutdown()  # once this returns, the state folder may become another worker's
            if self._pulse.ident is not None:
                self._pulse.join()

    # What the worker calls --------------------------------------------------------------------------------------

    def send(self, receiver: str, message: Activation | Gradient) -> None:
        body = self._encode(receiver, message)
        with self._changed:
            self._timeline.outbox.keep(receiver, message.kind, message.micro_batch, body)
        self._publish(receiver, message.kind, body)

    def receive(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload:
        what = f"{kind} {micro_batch} of party {sender!r}"

        def ask(seconds: float) -> None:
            with self._changed:
                unusable = self._timeline.mailbox.ask(sender, kind, micro_batch)
            if unusable is not None and seconds >= self._patience_s:
                raise RemoteProtocolError(
                    f"party {self._party!r} waits for {what}; whatever comes of it is refused: {unusable}; "
                    "compare job, models and versions of both parties"
                )
            question = self._timeline.waiting(sender, kind, micro_batch, seconds, self._patience.silence_s(sender))
            self._tell(sender, question)
            self._tell(SCHEDULER, question)

        with waiting(self._observe, self._party, sender, kind, micro_batch):
            payload = self._wait(lambda: self._timeline.mailbox.take(sender, kind, micro_batch), sender, what, ask)
        self.settle()
        return payload

    def commit(self, step: int, save: Callable[[], None]) -> None:
        self.settle()
        self._commit_under_way = self._committer.submit(self._commit, step, save, self._link.mark())
        self._commit_under_way.add_done_callback(lambda _: self._notify())

    def settle(self) -> None:
        commit, self._commit_under_way = self._commit_under_way, None
        if commit is not None:
            with waiting(self._observe, self._party, "disk", "commit"):
                commit.result()

    def _commit(self, step: int, save: Callable[[], None], mark: int) -> None:
        """The law: sends are confirmed, then the checkpoint is on disk, then receives are acknowledged."""
        began = time.monotonic()
        self._await_confirms(mark)
        save()
        with self._changed:
            tags = self._timeline.commit(step)
        self._link.acknowledge(tags)
        self._observe(events.Committed(self._party, self._timeline.generation, step, time.monotonic() - began))

    def flush(self) -> None:
        with waiting(self._observe, self._party, "broker", "confirm"):
            self._await_confirms(self._link.mark())

    def _await_confirms(self, mark: int) -> None:
        """Of what was sent up to the mark: there is always more, and it would never end."""
        began, name_at = time.monotonic(), self._patience_s
        while not self._link.flush(min(1.0, self._patience_s), mark):
            with self._changed:
                self._check()
            waited = time.monotonic() - began
            if waited >= name_at:
                name_at += self._patience_s
                self._patience.name_broker(waited)

    def introduce(self, describe: Callable[[], Joined]) -> None:
        self._describe, self._timeline.introduce = describe, True
        self._introduce_if_needed()

    def report(self, report: Report) -> None:
        self._tell_progress()  # what is told last is the newest
        self._publish(SCHEDULER, Kind.REPORT, self._encode(SCHEDULER, report), persistent=True)

    def progress(self, report: Progress) -> None:
        with self._changed:
            self._progress = report
            counts = dict(self._timeline.mailbox.counts)
        about = (report.generation, report.step, report.samples, report.loss, counts)
        self._observe(events.StepDone(self._party, *about))

    def until(self, decision: Callable[[Orders], T | None]) -> T:
        def ask(_: float) -> None:
            self._timeline.introduce = True

        with waiting(self._observe, self._party, SCHEDULER, "order"):
            return self._wait(lambda: decision(self._timeline.orders), SCHEDULER, "the scheduler's word", ask)

    def adopt(self, start: Start, resume_step: int) -> None:
        with self._changed:
            verdicts = self._timeline.adopt(start, resume_step)
        self._carry_out(verdicts, self._party)

    @property
    def counts(self) -> dict[str, int]:
        """Messages applied, redelivered, dropped as duplicates or stale, and rejected since this process started."""
        with self._changed:
            return dict(self._timeline.mailbox.counts)

    @property
    def silent_s(self) -> dict[str, float]:
        """Seconds since anything was heard, by peer."""
        return {peer: self._patience.silence_s(peer) for peer in self._sources}

    @property
    def pulse_age_s(self) -> float:
        """Seconds since the pulse last beat; it does so several times a second."""
        return time.monotonic() - self._pulse_at

    @property
    def connectivity(self) -> Connectivity:
        """The connection to the broker, now."""
        return self._link.connectivity

    # Waiting ----------------------------------------------------------------------------------------------------

    def _wait(self, take: Callable[[], T | None], source: str, what: str, ask: Callable[[float], None]) -> T:
        """Block until `take` gives something; ask for it with growing pauses, and name whom we wait for."""
        began = time.monotonic()
        ask_at = pause_s = self._patience_s / 20
        name_at = self._patience_s
        while True:
            with self._changed:
                self._check()
                taken = take()
                if taken is not None:
                    return taken
                if not self._timeline.introduce:
                    self._changed.wait(min(0.5, pause_s))
            self._introduce_if_needed()
            waited = time.monotonic() - began
            if waited >= ask_at:
                ask(waited)
                pause_s = min(2 * pause_s, self._patience_s)
                ask_at = waited + pause_s
            if waited >= name_at:
                name_at += self._patience_s
                self._require_one_version()
                self._patience.name(source, what, waited)

    def _require_one_version(self) -> None:
        """Raise AlignmentError for a peer that has spoken nothing but another version for a patience."""
        for reason in self._versions.named(time.monotonic()).values():
            raise AlignmentError(reason)

    def _check(self) -> None:
        """Raise what ends or redirects the worker; called with the lock held."""
        if self._failure is not None:
            raise self._failure
        if self._commit_under_way is not None and self._commit_under_way.done():
            self.settle()
        stop = self._timeline.orders.stop
        if stop is not None and stop.error is not None:
            raise named(stop.error)(printable(stop.reason))
        if stop is not None and stop.after_step is not None and self._timeline.committed >= stop.after_step:
            raise RunStopped(printable(stop.reason))
        if self._timeline.newer is not None:
            raise Restarted(self._timeline.newer)

    def _introduce_if_needed(self) -> None:
        with self._changed:
            again, self._timeline.introduce = self._timeline.introduce, False
            scheduler = self._timeline.scheduler_incarnation or ""
        if again and self._describe is not None:
            self.report(replace(self._describe(), to=scheduler))

    # What the link calls ----------------------------------------------------------------------------------------

    def _on_delivery(self, delivery: Delivery) -> None:
        self._observe(events.Received(self._party, delivery.sender, len(delivery.body), delivery.redelivered))
        try:
            opened, header, message = self._read(delivery)
        except RemoteProtocolError as error:
            self._refuse(delivery, error)
            return
        if not delivery.redelivered:  # what came before says nothing of now
            self._patience.hear((delivery.sender,))
        self._versions.understood(delivery.sender)
        with self._changed:
            late = opened is not None and self._is_late(delivery.sender, message, opened)
            verdict = Acknowledge((delivery.tag,)) if late else self._file(delivery, header, message)
            answers = isinstance(message, Waiting) and not isinstance(verdict, Reject)
            answers = answers and self._timeline.is_present(header)
            self._changed.notify_all()
        self._carry_out([verdict], delivery.sender)
        if isinstance(message, Waiting) and answers:
            self._send_again(delivery.sender, message)

    def _read(self, delivery: Delivery) -> tuple[Opened | None, Header, Message]:
        """Open and decode a delivery. Raises RemoteProtocolError, before it is looked at if it is too large."""
        sender, size = delivery.sender, len(delivery.body)
        most = self._largest.get(sender, size)
        if size > most:
            raise RemoteProtocolError(f"a message of {size} bytes; the largest that {sender!r} sends has {most}")
        opened = None if self._seal is None else self._seal.open(sender, delivery.body)
        header, message = decode(delivery.body if opened is None else opened.body, control_bytes(sender))
        return opened, header, message

    def _refuse(self, delivery: Delivery, error: RemoteProtocolError) -> None:
        """Refuse what cannot be read."""
        if isinstance(error, AnotherVersion):
            self._versions.foreign(delivery.sender, error.speaks, time.monotonic())
        with self._changed:
            verdict: Verdict[Tag]
            if isinstance(error, Unreadable):
                verdict = self._timeline.refuse_unreadable(delivery.sender, error.header, delivery.tag, str(error))
            else:
                verdict = self._timeline.refuse(delivery.tag, str(error))
            self._changed.notify_all()
        self._carry_out([verdict], delivery.sender)

    def _file(self, delivery: Delivery, header: Header, message: Message) -> Verdict[Tag]:
        return self._timeline.file(delivery.sender, header, message, delivery.tag, delivery.redelivered)

    def _is_late(self, sender: str, message: Message, opened: Opened) -> bool:
        """Whether a command was given before; a scheduler that we had not heard of is told who is here."""
        if sender == SCHEDULER and opened.met:
            self._timeline.introduce = True
        return isinstance(message, Start | Open | Finish | Stop) and not self._news.is_news(opened, "command")

    def _send_again(self, receiver: str, waiting: Waiting) -> None:
        """A peer waits for something that we may have sent: send it and all after it again, or say that it is lost."""
        now = time.monotonic()
        if now - self._answered.get(receiver, -math.inf) < self._patience_s / ANSWERS:
            return  # it asks again; who asks without end has no more sent than it can read
        self._answered[receiver] = now
        with self._changed:
            again, lost = self._timeline.answer(receiver, waiting)
        for (_, kind, _), body in again:
            self._publish(receiver, kind, body)
        if again and self._resent.note(receiver, len(again), now):
            first = f"{waiting.kind} {MicroBatch(waiting.step, waiting.index)}"
            self._observe(events.Resent(self._party, receiver, len(again), first))
        if lost is not None:
            self.report(lost)

    def _tell_counts(self, *, all_of_it: bool = False) -> None:
        """Log what has happened too often to be logged each time."""
        now = time.monotonic()
        self._refusals.tell(now, all_of_it=all_of_it)
        for receiver, count, seconds in self._resent.due(now, all_of_it=all_of_it):
            self._observe(events.Resent(self._party, receiver, count, seconds=seconds))

    def _carry_out(self, verdicts: list[Verdict[Tag]], sender: str) -> None:
        for verdict in verdicts:
            match verdict:
                case Acknowledge(tags):
                    self._link.acknowledge(tags)
                case Reject(tag, reason, by):
                    if self._refusals.note(by or sender, reason, time.monotonic()):
                        self._link.reject(tag, reason)
                    else:
                        self._link.acknowledge([tag])
                case None:
                    pass

    def _on_reconnect(self) -> None:
        self._observe(events.Reconnected(self._party))
        with self._changed:
            again = self._timeline.disconnect(self._depth)
            self._changed.notify_all()
        for (receiver, kind, _), body in again:
            self._publish(receiver, kind, body)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    fail = _on_failure  # also for who composes several roles in one process

    # Publishing -------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """The pulse: progress as soon as there is some, a sign of life a few times per patience."""
        alive_every_s = min(self._patience_s / 4, 5.0)
        alive_at = 0.0
        while not self._closed.wait(min(PULSE_S, alive_every_s)):
            self._pulse_at = time.monotonic()
            self._tell_counts()
            if self._failure is not None:
                return
            try:
                self._tell_progress()
                if time.monotonic() >= alive_at:
                    alive_at = time.monotonic() + alive_every_s
                    for peer in self._sources:
                        self._tell(peer, Alive(self._incarnation))
            except SlQueueError:
                return  # the link has failed or is closed: the worker's thread says so

    def _tell_progress(self) -> None:
        """Taken and told as one, so that no other thread tells something newer in between."""
        with self._telling:
            with self._changed:
                progress, self._progress = self._progress, None
            if progress is not None:
                self._tell(SCHEDULER, progress)

    def _tell(self, receiver: str, report: Report) -> None:
        """A report that is worth nothing later: not stored by the broker, and forgotten when it is old."""
        body = self._encode(receiver, report)
        self._observe(events.Sent(self._party, receiver, Kind.REPORT, len(body)))
        self._link.publish(
            receiver, Kind.REPORT, self._timeline.run, body, persistent=False, expires_s=self._patience_s
        )

    def _publish(self, receiver: str, kind: Kind, body: bytes, *, persistent: bool | None = None) -> None:
        self._observe(events.Sent(self._party, receiver, kind, len(body)))
        self._link.publish(
            receiver, kind, self._timeline.run, body, persistent=self._persistent if persistent is None else persistent
        )

    def _encode(self, receiver: str, message: Message) -> bytes:
        body = encode(self._timeline.header(receiver, message), message)
        return body if self._seal is None else self._seal.seal(receiver, body)
