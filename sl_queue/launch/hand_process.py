"""A hand of a party in a process of its own. It reads what its party's worker reads, and writes nothing."""

import logging
import threading
from pathlib import Path
from typing import Self

import torch

from sl_queue.compute.hand import TorchHand
from sl_queue.compute.threads import limit_threads
from sl_queue.config.environment import THREADS
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, resolve
from sl_queue.config.user_code import Importer
from sl_queue.errors import JobError, SlQueueError
from sl_queue.hand_ports import Lane
from sl_queue.launch.hands import Lanes, about, require_hands_possible, stage_of
from sl_queue.launch.rows import table_of
from sl_queue.loops.hand import Hand
from sl_queue.protocol.fingerprints import RULES
from sl_queue.protocol.table import Table
from sl_queue.storage.secret_file import read_secret

JOIN_S = 5.0  # for a thread to end after the lead has sent it home

log = logging.getLogger("sl_queue")


def run_hand(job: Job, party_file: PartyFile, broker: str | None) -> None:
    """One hand in this process until the run is over. Raises SlQueueError; AlignmentError if it does not fit."""
    spec = resolve(job, party_file, Importer())
    limit_threads(party_file.threads or THREADS.read() or None)
    lanes = Lanes.of(job, party_file, broker, for_hand=True)
    if lanes is None:
        raise JobError(f"party {spec.party!r}: a hand needs a broker: write a table [hands] into the party's file")
    hand_of(job, spec, lanes.make(False)).serve()
    log.info("%s: the run is over; this hand goes home", spec.party)


def hand_of(job: Job, spec: PartySpec, lane: Lane) -> Hand:
    """Put a hand together, with a table and models of its own."""
    require_hands_possible(job, spec.party)
    if isinstance(spec.chosen_secret, Path):
        spec = spec.with_secret(read_secret(spec.chosen_secret))
    rules = job.rules or RULES
    table = table_of(spec, rules)
    return Hand(spec.party, lane, about(job, spec, table, rules), workshop_of(job, spec, table, rules))


def workshop_of(job: Job, spec: PartySpec, table: Table, rules: int) -> TorchHand:
    """Build what a hand computes with."""
    batches = job.batches(table.n_rows, table.chosen_by(rules))
    return TorchHand(stage_of(spec.compute, table, batches))


class HandThreads:
    """Hands of a party as threads of this process, which end with it; for runs over memory. Mutable: it starts them.

    They are built before the party begins to train, since a module that is trained cannot be copied.
    """

    def __init__(self, job: Job, spec: PartySpec, lanes: Lanes | None, count: int) -> None:
        threads, self._threads = torch.get_num_threads(), list[threading.Thread]()
        for number in range(count if lanes is not None else 0):
            assert lanes is not None
            hand = hand_of(job, spec, lanes.make(False))
            name = f"{spec.party}-hand-{number}"
            self._threads.append(threading.Thread(target=_serve, args=(hand, threads), name=name, daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(JOIN_S)


def _serve(hand: Hand, threads: int) -> None:
    limit_threads(threads)
    try:
        hand.serve()
    except SlQueueError as error:  # the lead says what ended the run
        log.info("a hand ends: %s", error)
