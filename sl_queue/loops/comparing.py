"""The scheduler while rows are aligned: a thin loop around protocol/alignment's Comparison. It holds no ids.

It tells every party a few times a second that it is there, asks for the finished masks that it lacks, and ends when
every party has the outcome on disk. The outcome is on its own disk before anyone hears of it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from sl_queue.errors import PeerFailed, PeerSilent, RunStopped, SlQueueError, failure, named
from sl_queue.loops.alignment_ports import Channel, OutcomeFile
from sl_queue.protocol.alignment import MASK_BYTES, Cut, payload
from sl_queue.protocol.comparison import Comparison
from sl_queue.protocol.control import Align, Aligned, Aligning, Alive, Failed, Join, Offer, Status, Stop, StopRequest
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Masked, MicroBatch
from sl_queue.protocol.scheduler.agreement import other_job
from sl_queue.protocol.scheduler.state import GIVE_UP
from sl_queue.protocol.text import LONGEST, counted, printable

TELL_S = 0.5
AGAIN_S = 5.0  # after which masks that were asked for, or told, and made no difference are so again
STOPPED = "stopped by the operator; start the workers again to resume"

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class _End:
    """Premature end of an alignment, for everyone."""

    error: str
    reason: str
    failed: str | None = None
    since: float = 0.0


@dataclass(slots=True)
class Comparing:
    """Server of an alignment to its end. Mutable: the comparison, and what was sent when."""

    comparison: Comparison
    channel: Channel
    file: OutcomeFile
    incarnation: str
    patience_s: float
    clock: Callable[[], float]
    on_status: Callable[[Comparison, str | None, str | None], Mapping[str, Any]]  # why it ends, and the error
    told_at: float = -inf
    asked: dict[str, tuple[frozenset[int], float]] = field(default_factory=dict)  # chunks of each party, and when
    sent: dict[str, tuple[str, float]] = field(default_factory=dict)  # the worker that was sent the outcome, and when
    stopped: set[str] = field(default_factory=set)  # workers that know how it ended
    end: _End | None = None

    def serve(self) -> None:
        """Run until every party has its part on disk. Raises AlignmentError, PeerFailed, RunStopped, PeerSilent."""
        while not self.comparison.done:
            arrival = self.channel.next(TELL_S / 2)
            now = self.clock()
            if arrival is not None:
                self._take(arrival, now)
                self.channel.done(arrival)
            if self.end is None:
                self._conclude(now)
            if arrival is None or now - self.told_at >= TELL_S:
                self._tell(now)
            if self.end is not None and self._all_know(self.end, now):
                self.channel.flush()
                raise _error(self.end)
        outcome = self.comparison.outcome
        if outcome is not None:
            self.file.save(replace(outcome, masks=None))

    # What comes -------------------------------------------------------------------------------------------------

    def _take(self, arrival: Any, now: float) -> None:
        """Deal with one message."""
        sender, parties = arrival.sender, self.comparison.rule.ring.parties
        match arrival.message:
            case StopRequest(to) if sender == OPERATOR and to == self.incarnation:
                self._fail("RunStopped", STOPPED, now)
            case Offer() if sender in parties and arrival.message.to == self.incarnation:
                self._offered(sender, arrival.message, now)
            case Aligning(_, done, total) if sender in parties:
                self.comparison.progress[sender] = min(1.0, done / max(total, 1))
            case Masked(key, body) if sender in parties:
                self._guarded(lambda: self.comparison.took(sender, arrival.session, key.index, bytes(body.data)), now)
                if not self._awaited(sender):
                    self.told_at = -inf  # ask for the next ones at once
            case Aligned(_, session, to) if sender in parties and (self._means_us(to) or session == self._session):
                self._confirmed(sender, now)
            case Join() if sender in parties and self._means_us(arrival.message.to):
                self._confirmed(sender, now)
            case Failed(_, error, message) if sender in parties:
                who, said = f"party {sender!r}", printable(message, LONGEST)
                reason = said if said.startswith(who) else f"{who}: {said}"
                self._fail(failure(error), reason, now, failed=sender)
            case _:
                pass

    def _means_us(self, to: str) -> bool:
        return to == self.incarnation

    @property
    def _session(self) -> str | None:
        return None if self.comparison.outcome is None else self.comparison.session

    def _confirmed(self, sender: str, now: float) -> None:
        """Note that a party has the outcome on disk; on disk before the message is acknowledged."""
        if sender in self.comparison.aligned:
            return
        problem = self.comparison.confirmed(sender)
        if problem is not None:
            self._fail("AlignmentError", problem, now)
        elif self.comparison.outcome is not None:
            self.file.save(self.comparison.outcome)

    def _offered(self, sender: str, offer: Offer, now: float) -> None:
        problem = other_job(self.comparison.rule.job, sender, offer.job) or self.comparison.offered(sender, offer)
        self.told_at = -inf
        if problem is not None:
            self.comparison.offers[sender] = offer
            self._fail("AlignmentError", problem, now)

    def _conclude(self, now: float) -> None:
        """Compare once everything is here; have the outcome on disk, then let everyone hear of it."""

        def compare() -> None:
            outcome = self.comparison.compared()
            if outcome is None:
                return
            assert outcome.masks is not None
            log.info("scheduler: %s shared by all parties", counted(len(outcome.masks), "row is", "rows are"))
            problem = self.comparison.concluded(outcome)
            if problem is not None:
                self.comparison.outcome = None
                self._fail("AlignmentError", problem, now)
            else:
                self.file.save(outcome)
                self.told_at = -inf

        self._guarded(compare, now)

    def _guarded(self, act: Callable[[], None], now: float) -> None:
        """Let what a party did wrong end the alignment for all."""
        try:
            act()
        except SlQueueError as error:
            self._fail("AlignmentError", str(error), now)

    def _fail(self, error: str, reason: str, now: float, failed: str | None = None) -> None:
        if self.end is None:
            log.warning("scheduler: the alignment ends: %s", reason)
            self.end = _End(error, reason, failed, now)

    # What is sent -----------------------------------------------------------------------------------------------

    def _tell(self, now: float) -> None:
        """Tell every party where it is, and whoever looks on."""
        self.told_at = now
        for party in self.comparison.rule.ring.parties:
            self.channel.tell(party, Alive(self.incarnation))
            offer = self.comparison.offers.get(party)
            if offer is None or party in self.comparison.aligned:
                continue
            if self.end is not None:
                self._stop(party, offer.incarnation, self.end)
            elif self.comparison.session is not None:
                self._order(party, offer.incarnation, now)
            self._require_signs_of_life(party)
        reason, error = (None, None) if self.end is None else (self.end.reason, self.end.error)
        status = dict(self.on_status(self.comparison, reason, error))
        self.channel.tell(OPERATOR, Status(status, self.incarnation), lasting=True)

    def _stop(self, party: str, incarnation: str, end: _End) -> None:
        if party != end.failed and incarnation not in self.stopped:
            error = "PeerFailed" if end.failed is not None else end.error
            self.channel.tell(party, Stop(incarnation, end.reason, error=error), lasting=True)
        self.stopped.add(incarnation)

    def _order(self, party: str, incarnation: str, now: float) -> None:
        """Ask a party for what is missing, and send it the outcome."""
        comparison = self.comparison
        outcome, session = comparison.outcome, comparison.session
        assert session is not None
        masks = None if outcome is None else outcome.masks
        sizes = comparison.sizes if outcome is None else outcome.sizes
        missing: tuple[int, ...] = ()
        if not self._awaited(party) or now - self.asked[party][1] >= AGAIN_S:
            missing = comparison.missing(party)
            self.asked[party] = (frozenset(missing), now)
        shared = None if masks is None else len(masks)
        self.channel.tell(party, Align(incarnation, session, comparison.round, sizes, missing, shared))
        told, when = self.sent.get(party, ("", 0.0))
        if masks is None or (told == incarnation and now - when < AGAIN_S):
            return
        self.sent[party] = (incarnation, now)
        body, cut = memoryview(masks.tobytes()), Cut(len(masks), comparison.rule.chunk)
        for chunk in range(cut.chunks):
            piece = cut.piece(body, chunk)
            self.channel.send(party, Masked(MicroBatch(0, chunk), payload(piece, MASK_BYTES)), session)

    def _awaited(self, party: str) -> frozenset[int]:
        """Return the chunks that a party was asked for and that have not come."""
        asked, _ = self.asked.get(party, (frozenset(), 0.0))
        return asked & frozenset(self.comparison.missing(party))

    def _all_know(self, end: _End, now: float) -> bool:
        """Return True once every worker knows how it ended, or had a patience to ask."""
        parties = self.comparison.rule.ring.parties
        known = {party: self.comparison.offers.get(party) for party in parties}
        told = all(offer is not None and offer.incarnation in self.stopped for offer in known.values())
        return told or now - end.since >= self.patience_s

    def _require_signs_of_life(self, party: str) -> None:
        silent_s = self.channel.silent_s(party)
        if silent_s > GIVE_UP * self.patience_s:
            raise PeerSilent(
                f"nothing was heard from party {party!r} for {silent_s:.0f} s while the rows are aligned; start its "
                f"worker and the {SCHEDULER} again: the alignment resumes"
            )


def _error(end: _End) -> SlQueueError:
    if end.failed is not None:
        return PeerFailed(end.reason)
    return RunStopped(end.reason) if end.error == "RunStopped" else named(end.error)(end.reason)
