"""Held-out rows that the label holder chooses, put together for a party: told before a run begins, and kept."""

import logging
import secrets
import time

from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.errors import CheckpointError
from sl_queue.launch.rows import row_keys_of
from sl_queue.launch.workplace import Workplace
from sl_queue.loops.holdout import Hearing, Telling, TellingAgain
from sl_queue.protocol.holdout import Chosen, chosen_of, chunks_of, session_of
from sl_queue.protocol.table import Table
from sl_queue.storage.aligned_file import Aligned
from sl_queue.storage.holdout_file import HeldOut, read_held_out, write_held_out
from sl_queue.transport.alignment_channel import PREFETCH, LinkAlignmentChannel

log = logging.getLogger("sl_queue")


def hear_held_out(
    job: Job,
    spec: PartySpec,
    aligned: Aligned | None,
    place: Workplace,
    *,
    begun: bool,
) -> Chosen:
    """Ask the label holder which rows it holds out, unless that is on disk. Raises as the conversation does.

    `begun`: a checkpoint is here too, so the label holder has heard that this party knows.
    """
    row_keys, digest = row_keys_of(spec, aligned)
    held, incarnation = read_held_out(place.state), secrets.token_hex(8)
    if held is not None:
        held.require(digest, f"party {spec.party!r}")
        if begun:
            return held.chosen
    with place.opened(_channel(job, spec.party, incarnation, place)) as channel:
        about = (spec.party, incarnation, digest, job.label_holder, channel, job.broker.patience, channel.present_s)
        hearing = Hearing(*about)
        if held is None:
            found = hearing.ask()
            if found is None:  # the scheduler compares the rows, and says how they differ
                hearing.confirm(hearing.other)
                return Chosen.none()
            held = HeldOut(digest, chosen_of(found, row_keys))
            write_held_out(place.state, held)
        hearing.confirm(session_of(digest))
    log.info("%s: %s", spec.party, _told(held.chosen, len(row_keys)))
    return held.chosen


def tell_held_out(job: Job, spec: PartySpec, table: Table, place: Workplace, *, begun: bool) -> None:
    """Tell every feature party which rows are held out, unless all know. Raises what ends the channel.

    `begun`: a checkpoint is here too, of a run with the same choice. Raises CheckpointError if the others know of
    another choice than the present one.
    """
    assert table.chosen is not None
    held = read_held_out(place.state)
    if held is None and begun:  # which it did once all others knew
        held = HeldOut(table.digest, table.chosen, job.feature_parties)
    if held is not None and held.told and (held.rows, held.chosen.digest) != (table.digest, table.chosen.digest):
        raise CheckpointError(
            f"party {spec.party!r}: the rows to hold out are not those that the other parties know of; restore "
            "the table, or give every party and the scheduler a new state folder to train from scratch"
        )
    told = () if held is None else held.told
    chosen, digest = table.chosen, table.digest

    def note(parties: tuple[str, ...]) -> None:
        write_held_out(place.state, HeldOut(digest, chosen, parties))

    note(told)
    if set(told) < set(job.feature_parties):
        log.info("%s: %s; tells the other parties which", spec.party, _told(chosen, table.n_rows))
        incarnation, chunks = secrets.token_hex(8), tuple(chunks_of(chosen, table.row_keys))
        with place.opened(_channel(job, spec.party, incarnation, place)) as channel:
            about = (incarnation, digest, chunks, job.feature_parties, channel, note, channel.present_s, told)
            Telling(*about, patience_s=job.broker.patience).serve()


def telling_again(job: Job, table: Table) -> TellingAgain:
    """Return what answers a feature party that asks while the label holder trains."""
    chosen, keys = table.chosen, table.row_keys
    assert chosen is not None
    return TellingAgain(table.digest, lambda: chunks_of(chosen, keys), job.feature_parties, time.monotonic)


def _channel(job: Job, party: str, incarnation: str, place: Workplace) -> LinkAlignmentChannel:
    about = (place.connect(party, PREFETCH), party, job.topology(), incarnation)
    return LinkAlignmentChannel(*about, patience_s=job.broker.patience, seal=place.seal, observe=place.observe)


def _told(chosen: Chosen, n_rows: int) -> str:
    test = f", {len(chosen.test)} are for a test" if len(chosen.test) else ""
    return f"{len(chosen.held_out)} of {n_rows} rows are held out{test}"
