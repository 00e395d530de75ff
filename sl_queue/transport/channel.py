"""A party's channel: the recovery law over a link that may lose the broker at any time.

Two threads meet here under one lock: the worker (send, receive) and the link (deliveries, reconnects). A third, the
pulse, tells peers and scheduler a few times a second that this worker is alive and where it is. A fourth commits: the
broker's confirms and the disk take their time while the pipeline fills again, and the first message of the next step
is not given out before. So a worker that is killed meanwhile repeats no more than the steps between two commits, and
prefetch stays what it is. What is decided under the lock (protocol/mailbox) is done outside of it.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from sl_queue.errors import (
    AlignmentError,
    BrokerUnreachable,
    LocalProtocolError,
    PeerSilent,
    RemoteProtocolError,
    RunStopped,
    SlQueueError,
    named,
)
from sl_queue.ports import Measures, Restarted
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.mailbox import Acknowledge, Mailbox, Outbox, Reject, Verdict
from sl_queue.protocol.messages import (
    BEFORE_FIRST_STEP,
    SCHEDULER,
    Activation,
    Alive,
    Finish,
    Gradient,
    Header,
    Joined,
    Kind,
    Lost,
    Message,
    MicroBatch,
    Open,
    Payload,
    Progress,
    Report,
    Start,
    Stop,
    Waiting,
    kind_of,
)
from sl_queue.protocol.orders import Orders
from sl_queue.transport.link import Delivery, Link, Tag
from sl_queue.transport.meter import Meter
from sl_queue.transport.seal import News, Opened, Seal

T = TypeVar("T")

PULSE_S = 0.25  # how often progress is told
GIVE_UP = 10  # patiences of silence after which a waiting worker ends with PeerSilent
OUTBOX_BYTES = 256 * 1024 * 1024  # sent and not yet committed by the receiver; what is older is lost with the broker

log = logging.getLogger("sl_queue")


class PartyChannel:
    """ports.Channel over a link. `patience_s`: seconds of waiting after which it says for whom.

    `seal` keeps messages from the broker; `committer` runs one commit at a time, by default in a thread of its own.
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
    ) -> None:
        self._link, self._party, self._peers, self._incarnation = link, party, peers, incarnation
        self._patience_s, self._persistent, self._depth = patience_s, persistent, depth
        self._seal, self._news, self._meter = seal, News(), Meter()
        self._changed = threading.Condition()
        self._mailbox: Mailbox[Tag] = Mailbox(party)
        self._outbox = Outbox(OUTBOX_BYTES)
        self._orders = Orders()
        self._start: Start | None = None  # the one adopted
        self._committed = BEFORE_FIRST_STEP
        self._peer_committed: dict[str, int] = {}
        self._heard = dict.fromkeys((SCHEDULER, *peers), time.monotonic())
        self._failure: SlQueueError | None = None
        self._describe: Callable[[], Joined] | None = None
        self._introduce_again = False
        self._scheduler_incarnation: str | None = None
        self._progress: Progress | None = None
        self._committer = committer or ThreadPoolExecutor(1, thread_name_prefix=f"{party}-commit")
        self._commit_under_way: Future[None] | None = None
        self._closed = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name=f"{party}-pulse", daemon=True)

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._link.open(self._on_delivery, self._on_reconnect, self._on_failure)
        with self._changed:
            self._heard = dict.fromkeys(self._heard, time.monotonic())
        self._pulse.start()

    def close(self) -> None:
        """Flush what was published, then leave; unacknowledged messages stay at the broker."""
        self._closed.set()
        if self._failure is None:
            self._link.flush(timeout_s=5.0)
        self._link.close()
        self._committer.shutdown()
        if self._pulse.ident is not None:
            self._pulse.join()

    # What the worker calls --------------------------------------------------------------------------------------

    def send(self, receiver: str, message: Activation | Gradient) -> None:
        body = self._encode(receiver, message)
        with self._changed:
            self._outbox.keep(receiver, message.kind, message.micro_batch, body)
        self._publish(receiver, message.kind, body)

    def receive(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload:
        def ask(seconds: float) -> None:
            where = (self._incarnation, self._generation, sender, kind, micro_batch.step, micro_batch.index)
            waiting = Waiting(*where, round(seconds, 3), round(self._silence(sender), 1))
            self._tell(sender, waiting)
            self._tell(SCHEDULER, waiting)

        what = f"{kind} {micro_batch} of party {sender!r}"
        with self._meter.waiting(sender, kind):
            payload = self._wait(lambda: self._mailbox.take(sender, kind, micro_batch), sender, what, ask)
        self.settle()
        return payload

    def commit(self, step: int, save: Callable[[], None]) -> None:
        self.settle()
        self._commit_under_way = self._committer.submit(self._commit, step, save)
        self._commit_under_way.add_done_callback(lambda _: self._notify())

    def settle(self) -> None:
        commit, self._commit_under_way = self._commit_under_way, None
        if commit is not None:
            with self._meter.waiting("disk", "commit"):
                commit.result()

    def _commit(self, step: int, save: Callable[[], None]) -> None:
        """The law: sends are confirmed, then the checkpoint is on disk, then receives are acknowledged."""
        self._await_confirms()
        save()
        with self._changed:
            tags = self._mailbox.commit(step)
            self._committed = step
            stop = self._orders.stop
            if stop is not None and stop.after_step is None:
                self._orders = replace(self._orders, stop=replace(stop, after_step=step))  # this was the next commit
        self._link.acknowledge(tags)
        self._meter.count("commits")

    def flush(self) -> None:
        with self._meter.waiting("broker", "confirm"):
            self._await_confirms()

    def _await_confirms(self) -> None:
        began, name_at = time.monotonic(), self._patience_s
        while not self._link.flush(timeout_s=min(1.0, self._patience_s)):
            with self._changed:
                self._check()
            waited = time.monotonic() - began
            if waited >= name_at:
                name_at += self._patience_s
                self._name_unconfirmed(waited)

    def introduce(self, describe: Callable[[], Joined]) -> None:
        self._describe, self._introduce_again = describe, True
        self._introduce_if_needed()

    def report(self, report: Report) -> None:
        self._tell_progress()  # what is told last is the newest
        self._publish(SCHEDULER, Kind.REPORT, self._encode(SCHEDULER, report), persistent=True)

    def progress(self, report: Progress) -> None:
        with self._changed:
            self._progress = report
            counts = dict(self._mailbox.counts)
        log.debug("%s: step %d is done; messages of this process so far: %s", self._party, report.step, counts)

    def until(self, decision: Callable[[Orders], T | None]) -> T:
        def ask(_: float) -> None:
            self._introduce_again = True

        with self._meter.waiting(SCHEDULER, "order"):
            return self._wait(lambda: decision(self._orders), SCHEDULER, "the scheduler's word", ask)

    def adopt(self, start: Start, resume_step: int) -> None:
        with self._changed:
            self._start, self._committed = start, resume_step
            self._peer_committed.clear()
            self._outbox.adopt(resume_step)
            verdicts = self._mailbox.adopt(start.run, start.generation, resume_step)
        self._carry_out(verdicts)

    @property
    def counts(self) -> dict[str, int]:
        """Messages applied, redelivered, dropped as duplicates and rejected since this process started."""
        with self._changed:
            return dict(self._mailbox.counts)

    @property
    def measures(self) -> Measures:
        """What there is to observe."""
        return self._meter.read(self.counts, {peer: self._silence(peer) for peer in (SCHEDULER, *self._peers)})

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
                if not self._introduce_again:
                    self._changed.wait(min(0.5, pause_s))
            self._introduce_if_needed()
            waited = time.monotonic() - began
            if waited >= ask_at:
                ask(waited)
                pause_s = min(2 * pause_s, self._patience_s)
                ask_at = waited + pause_s
            if waited >= name_at:
                name_at += self._patience_s
                self._name(source, what, waited)

    def _name(self, source: str, what: str, waited: float) -> None:
        """Say whom we wait for, and give up on who has been silent for too long."""
        silent = self._silence(source)
        log.warning("%s: waiting for %s since %.0f s; last heard of it %.0f s ago", self._party, what, waited, silent)
        if silent <= GIVE_UP * self._patience_s:
            return  # also if nothing of it could be opened: whoever runs the broker can put in what nobody can open
        if self._seal is not None and self._seal.never_opened(source):
            raise AlignmentError(
                f"no message of {source!r} can be opened by party {self._party!r}: their jobs do not have the same "
                "[security]; every party needs the same job file"
            )
        raise PeerSilent(
            f"party {self._party!r} waits for {what}, which has been silent for {silent:.0f} s "
            f"({GIVE_UP} times patience); start that worker and this one again: the run resumes"
        )

    def _name_unconfirmed(self, waited: float) -> None:
        """Say that the broker takes nothing, and give up on one that has not for too long."""
        what = f"the broker to confirm what was sent since {waited:.0f} s: an alarm of its, or a receiver's full queue"
        log.warning("%s: waiting for %s", self._party, what)
        if waited > GIVE_UP * self._patience_s:
            raise BrokerUnreachable(f"party {self._party!r} waited for {what}; start this worker again: it resumes")

    def _check(self) -> None:
        """Raise what ends or redirects the worker; called with the lock held."""
        if self._failure is not None:
            raise self._failure
        if self._commit_under_way is not None and self._commit_under_way.done():
            self.settle()
        orders = self._orders
        if orders.stop is not None and orders.stop.error is not None:
            raise named(orders.stop.error)(orders.stop.reason)
        if orders.stop is not None and orders.stop.after_step is not None and self._committed >= orders.stop.after_step:
            raise RunStopped(orders.stop.reason)
        if self._start is not None and orders.start is not None and orders.start.generation > self._start.generation:
            raise Restarted(orders.start)

    def _silence(self, source: str) -> float:
        """Seconds since anything was heard of `source`."""
        with self._changed:
            return time.monotonic() - self._heard[source]

    def _introduce_if_needed(self) -> None:
        with self._changed:
            again, self._introduce_again = self._introduce_again, False
            scheduler = self._scheduler_incarnation or ""
        if again and self._describe is not None:
            self.report(replace(self._describe(), to=scheduler))

    # What the link calls ----------------------------------------------------------------------------------------

    def _on_delivery(self, delivery: Delivery) -> None:
        self._meter.count("received_bytes", len(delivery.body))
        try:
            opened = None if self._seal is None else self._seal.open(delivery.sender, delivery.body)
            header, message = decode(delivery.body if opened is None else opened.body)
        except RemoteProtocolError as error:
            self._carry_out([self._refuse(delivery, str(error))])
            return
        with self._changed:
            self._heard[delivery.sender] = time.monotonic()
            late = opened is not None and self._is_late(delivery.sender, message, opened)
            verdict = Acknowledge((delivery.tag,)) if late else self._decide(delivery, header, message)
            self._changed.notify_all()
        self._carry_out([verdict])
        if isinstance(message, Waiting) and not isinstance(verdict, Reject) and self._is_present(header):
            self._send_again(delivery.sender, message)

    def _decide(self, delivery: Delivery, header: Header, message: Message) -> Verdict[Tag]:
        if header.sender != delivery.sender:
            return self._refuse(delivery, f"says it is from {header.sender!r}, but came from {delivery.sender!r}")
        if isinstance(message, Activation | Gradient):
            if delivery.sender not in self._peers:
                return self._refuse(delivery, f"{header.kind} from {delivery.sender!r}, who sends none")
            self._note_committed(header)
            self._mailbox.counts["redelivered"] += delivery.redelivered
            return self._mailbox.file(delivery.sender, header, message, delivery.tag)
        match message:
            case Start() | Open() | Finish() | Stop():
                if delivery.sender != SCHEDULER:
                    return self._refuse(delivery, f"a command from {delivery.sender!r}; only the scheduler commands")
                if message.incarnation == self._incarnation:
                    self._orders = self._orders.after(message)
            case Alive(incarnation):
                self._note_committed(header)
                if delivery.sender == SCHEDULER and incarnation != self._scheduler_incarnation:
                    self._introduce_again = True
                    self._scheduler_incarnation = incarnation
            case Waiting():
                pass  # answered in _on_delivery, outside of the lock
            case _:
                return self._refuse(delivery, f"{type(message).__name__} is not meant for a party")
        return Acknowledge((delivery.tag,))

    def _is_late(self, sender: str, message: Message, opened: Opened) -> bool:
        """Whether a command was given before; a scheduler that we had not heard of is told who is here."""
        if sender == SCHEDULER and opened.met:
            self._introduce_again = True
        return isinstance(message, Start | Open | Finish | Stop) and not self._news.is_news(opened, "command")

    def _refuse(self, delivery: Delivery, reason: str) -> Reject[Tag]:
        self._mailbox.counts["rejected"] += 1
        return Reject(delivery.tag, reason)

    def _note_committed(self, header: Header) -> None:
        """What a peer has on disk need not be kept for it any more."""
        known = self._peer_committed.get(header.sender, BEFORE_FIRST_STEP)
        if self._is_present(header) and header.committed > known:
            self._peer_committed[header.sender] = header.committed
            self._outbox.committed(header.sender, header.committed)

    def _is_present(self, header: Header) -> bool:
        """Whether it is of the run and generation that this worker is in."""
        return self._start is not None and (header.run, header.generation) == (self._run, self._generation)

    def _send_again(self, receiver: str, waiting: Waiting) -> None:
        """A peer waits for something that we may have sent: send it and all after it again, or say that it is lost."""
        micro_batch = MicroBatch(waiting.step, waiting.index)
        with self._changed:
            again = self._outbox.since(receiver, waiting.kind, micro_batch)
            lost = not again and self._outbox.is_past(receiver, waiting.kind, micro_batch)
        for (_, kind, _), body in again:
            self._publish(receiver, kind, body)
        if again:
            first = f"{waiting.kind} {micro_batch}"
            log.info("%s: sent %d messages again to party %r, from %s on", self._party, len(again), receiver, first)
        if lost:
            where = (receiver, waiting.kind, micro_batch.step, micro_batch.index)
            self.report(Lost(self._incarnation, self._generation, *where, waiting.seconds))

    def _carry_out(self, verdicts: list[Verdict[Tag]]) -> None:
        for verdict in verdicts:
            match verdict:
                case Acknowledge(tags):
                    self._link.acknowledge(tags)
                case Reject(tag, reason):
                    log.warning("%s: rejected a message: %s", self._party, reason)
                    self._link.reject(tag, reason)
                case None:
                    pass

    def _on_reconnect(self) -> None:
        self._meter.count("reconnects")
        with self._changed:
            self._mailbox.disconnect()
            again = list(self._outbox.newest(self._depth))
            self._introduce_again = True
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
            self._meter.beat()
            if self._failure is not None:
                return
            try:
                self._tell_progress()
                if time.monotonic() >= alive_at:
                    alive_at = time.monotonic() + alive_every_s
                    for peer in (SCHEDULER, *self._peers):
                        self._tell(peer, Alive(self._incarnation))
            except SlQueueError:
                return  # the link has failed or is closed: the worker's thread says so

    def _tell_progress(self) -> None:
        with self._changed:
            progress, self._progress = self._progress, None
        if progress is not None:
            self._tell(SCHEDULER, progress)

    def _tell(self, receiver: str, report: Report) -> None:
        """A report that is worth nothing later: not stored by the broker, and forgotten when it is old."""
        body = self._encode(receiver, report)
        self._meter.count("sent_bytes", len(body))
        self._link.publish(receiver, Kind.REPORT, self._run, body, persistent=False, expires_s=self._patience_s)

    def _publish(self, receiver: str, kind: Kind, body: bytes, *, persistent: bool | None = None) -> None:
        self._meter.count("sent_bytes", len(body))
        self._link.publish(
            receiver, kind, self._run, body, persistent=self._persistent if persistent is None else persistent
        )

    def _encode(self, receiver: str, message: Message) -> bytes:
        body = encode(self._header(receiver, message), message)
        return body if self._seal is None else self._seal.seal(receiver, body)

    def _header(self, receiver: str, message: Message) -> Header:
        kind = kind_of(message)
        if kind in (Kind.ACTIVATION, Kind.HOLDOUT, Kind.GRADIENT) and self._start is None:
            raise LocalProtocolError(f"party {self._party!r} sends a {kind} before it adopted a run")
        where = message.micro_batch if isinstance(message, Activation | Gradient) else MicroBatch(0, 0)
        return Header(self._run, self._generation, kind, self._party, receiver, where, self._committed)

    @property
    def _run(self) -> str:
        return self._start.run if self._start is not None else ""

    @property
    def _generation(self) -> int:
        return self._start.generation if self._start is not None else 0
