"""The rows that all parties hold, found with every role as a thread of this process; nothing is trained."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.errors import PeerFailed, RunStopped, SlQueueError
from sl_queue.launch.alignment import align_party, align_scheduler
from sl_queue.launch.connect import MEMORY, Channels, connector, key_file, sealing
from sl_queue.local.threads import key_in, require_all
from sl_queue.observe.log import to_log
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
    errors: list[SlQueueError] = []

    def seal_of(role: str, file: PartyFile | None = None) -> Seal | None:
        return sealing(job, role, key_file(key_in(keys, role), file), broker)

    def party(file: PartyFile) -> None:
        state = states[file.party]
        with Folder(state, job_digest=job.digest, party=file.party, job=job.canonical()):
            about = (job, table_spec(job, file, importer), connect, state, channels, seal_of(file.party, file), to_log)
            aligned = align_party(*about, confirm=not again)
            assert aligned is not None
            found[file.party] = aligned

    def scheduler() -> None:
        if not again:
            align_scheduler(job, connect, states[SCHEDULER], on_status, channels, seal_of(SCHEDULER), to_log)

    def guarded(serve: Callable[[], None]) -> None:
        try:
            serve()
        except SlQueueError as error:
            errors.append(error)
            if not isinstance(error, RunStopped):
                channels.fail(RunStopped(f"another role of this process failed: {error}"))

    work: list[Callable[[], None]] = [scheduler, *(lambda file=file: party(file) for file in parties)]
    threads = [threading.Thread(target=guarded, args=(serve,)) for serve in work]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        channels.fail(RunStopped("interrupted; the same command resumes"))
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise min(errors, key=lambda error: 2 * isinstance(error, RunStopped) + isinstance(error, PeerFailed))
    return {file.party: found[file.party] for file in parties}
