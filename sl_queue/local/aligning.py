"""The rows that all parties hold, found with every role as a thread of this process; nothing is trained."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.launch.alignment import align_party, align_scheduler
from sl_queue.launch.connect import MEMORY, Channels, connector, key_file, sealing
from sl_queue.launch.workplace import Workplace
from sl_queue.local.threads import key_in, require_all
from sl_queue.local.together import run_together
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.security.sealing import Seal
from sl_queue.storage.aligned_file import Aligned, read_aligned
from sl_queue.storage.checkpoints import Folder


def align_threads(
    job: Job,
    parties: Sequence[PartyFile],
    states: Mapping[str, Path],
    on_status: Callable[[RunStatus], None],
    broker: str = MEMORY,
    keys: Path | None = None,
) -> Mapping[str, Aligned]:
    """Align the rows of all parties, and write `aligned.json` into each state folder; what is there is compared.

    Raises the error of the party that failed.
    """
    require_all(job, parties)
    again = all(read_aligned(states[file.party]) is not None for file in parties)
    importer = Importer()
    connect, channels = connector(job, broker), Channels()
    found: dict[str, Aligned] = {}

    def seal_of(role: str, file: PartyFile | None = None) -> Seal | None:
        return sealing(job, role, key_file(key_in(keys, role), file), broker)

    def party(file: PartyFile) -> None:
        state = states[file.party]
        with Folder(state, job_digest=job.digest, party=file.party, job=job.canonical()):
            place = Workplace(connect, state, channels, seal_of(file.party, file))
            aligned = align_party(job, table_spec(job, file, importer), place, confirm=not again)
            assert aligned is not None
            found[file.party] = aligned

    def scheduler() -> None:
        if not again:
            align_scheduler(job, Workplace(connect, states[SCHEDULER], channels, seal_of(SCHEDULER)), on_status)

    work: dict[str, Callable[[], None]] = {SCHEDULER: scheduler, **{one.party: partial(party, one) for one in parties}}
    run_together(work, channels, "interrupted; the same command resumes")
    return {file.party: found[file.party] for file in parties}
