"""The alignment of rows, put together for a party and for the scheduler; both are done with it before a run begins."""

import logging
import secrets
import time
from collections.abc import Callable

from sl_queue.config.job import Job
from sl_queue.data.aligning import described, id_texts, ids_digest
from sl_queue.data.ids import Ids as TableIds
from sl_queue.data.spec import TableSpec
from sl_queue.data.table import read_ids
from sl_queue.errors import AlignmentError, JobError
from sl_queue.launch.memory import give_memory_back
from sl_queue.launch.workplace import Workplace
from sl_queue.loops.alignment import PartyAlignment
from sl_queue.loops.alignment_ports import Ids
from sl_queue.loops.comparing import Comparing
from sl_queue.protocol.alignment import Ring, Rule
from sl_queue.protocol.comparison import Comparison, standing
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.status import RunStatus, as_json
from sl_queue.storage.aligned_file import Aligned, read_aligned
from sl_queue.storage.alignment_files import PartyFiles, SchedulerFiles
from sl_queue.transport.alignment_channel import PREFETCH, LinkAlignmentChannel

log = logging.getLogger("sl_queue")


def rule_of(job: Job) -> Rule:
    """Return what the job says of the alignment."""
    about = job.alignment
    ring = Ring(job.label_holder, job.feature_parties)
    return Rule(job.canonical(), ring, about.at_least, about.at_most, about.pad)


def require_few(job: Job, rows: int, where: str) -> None:
    """Raise JobError if a party has more rows than it may bring to an alignment."""
    if rows > (job.alignment.at_most or rows):
        raise JobError(f"{where}: it has more rows than alignment.at_most = {job.alignment.at_most}; leave some out")


def align_party(
    job: Job, table: TableSpec, place: Workplace, version: str = "", *, confirm: bool = False
) -> Aligned | None:
    """Find which rows of a party all parties hold, from disk if it was found before; None if the job aligns nothing.

    The caller has locked the state folder. `confirm`: tell the scheduler also of what was found before. Raises
    JobError, AlignmentError, CheckpointError and what the conversation raises.
    """
    if job.alignment.method != "psi":
        return None
    found, where = read_ids(table)
    digest, files = ids_digest(found), PartyFiles(place.state)
    aligned = read_aligned(place.state)
    if aligned is not None:
        aligned.require(digest, where)
        files.forget()  # killed between the two, it would lie there for good
        if not confirm:
            return aligned
    keys, token = files.keys(digest, len(job.parties))
    incarnation = secrets.token_hex(8)
    if aligned is None:
        require_few(job, len(found.texts), where)
    ids = Ids(len(found.texts), lambda: id_texts(found), found.type)
    with place.opened(_channel(job, table.party, place, incarnation)) as channel:
        party = PartyAlignment(
            table.party, incarnation, rule_of(job), ids, token, keys, files, channel, job.broker.patience,
            channel.present_s, version, give_memory_back,
        )  # fmt: skip
        if aligned is None:
            aligned = _converse(party, files, found, digest)
        else:
            files.forget()
        party.confirm(aligned.session)
    log.info("%s: %d of its %d rows are shared by all", table.party, len(aligned.positions), len(found.texts))
    return aligned


def _converse(party: PartyAlignment, files: PartyFiles, found: TableIds, digest: str) -> Aligned:
    try:
        positions, session = party.serve()
    except AlignmentError as error:
        if "no row is shared" not in str(error):
            raise
        told = f"those of {party.party!r} are {described(found)}"
        log.warning("%s: ids may be written differently; %s", party.party, told)
        raise AlignmentError(f"{error}: {told}") from None
    aligned = Aligned(positions, digest, len(found.texts), session)
    files.conclude(aligned)
    return aligned


def align_scheduler(job: Job, place: Workplace, on_status: Callable[[RunStatus], None]) -> int:
    """Serve the alignment until every party has its part; returns how many rows are shared, -1 if none was reported.

    Returns at once if that was so before. The caller has locked the state folder.
    """
    file = SchedulerFiles(place.state)
    outcome = file.load()
    if outcome is not None and outcome.masks is None:
        return -1
    incarnation, comparison = secrets.token_hex(8), Comparison(rule_of(job), outcome)

    def tell(about: Comparison, reason: str | None, error: str | None) -> dict[str, object]:
        status = standing(about, job.name, job.epochs, time.time(), reason, error)
        on_status(status)
        return as_json(status)

    with place.opened(_channel(job, SCHEDULER, place, incarnation)) as channel:
        Comparing(comparison, channel, file, incarnation, job.broker.patience, channel.present_s, tell).serve()
    return -1 if comparison.outcome is None or comparison.outcome.masks is None else len(comparison.outcome.masks)


def _channel(job: Job, role: str, place: Workplace, incarnation: str) -> LinkAlignmentChannel:
    about = (place.connect(role, PREFETCH), role, job.topology(), incarnation)
    return LinkAlignmentChannel(*about, patience_s=job.broker.patience, seal=place.seal, observe=place.observe)
