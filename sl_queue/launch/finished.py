"""A party whose run has finished: started again it says so, and that it is still what the run was trained with."""

import logging
from pathlib import Path

from sl_queue.compute.fingerprint import fingerprint
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.errors import JobError
from sl_queue.launch.keeping import rules_to_keep
from sl_queue.launch.rows import aligned_before, table_of
from sl_queue.launch.stages import of_start
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol import events
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.holdout_file import chosen_before
from sl_queue.storage.secret_file import read_secret

log = logging.getLogger("sl_queue")


def has_finished(job: Job, spec: PartySpec, folder: Folder, place: Workplace) -> bool:
    """Return True, and say so, if the final weights lie here and the scheduler knows."""
    done = folder.finished()
    if done is None or not done.reported:
        return False
    compare_finished(job, spec, folder)
    place.observe(events.Finished(spec.party, done.step, str(place.state / "final"), already=True))
    return True


def compare_finished(job: Job, spec: PartySpec, folder: Folder) -> None:
    """Raise CheckpointError if a run that has finished was trained on another table, or with other models.

    What is no longer there to compare, in a container whose data has gone for instance, is a line in the log.
    """
    try:
        rules = rules_to_keep(job, spec.party, folder.begun_with)
        if isinstance(spec.chosen_secret, Path):
            spec = spec.with_secret(read_secret(spec.chosen_secret))
        aligned = aligned_before(spec.table, folder.path) if job.alignment.method == "psi" else None
        now = fingerprint(spec.compute, table_of(spec, rules, aligned, chosen_before(folder.path)), rules)
        folder.require({**now, **spec.privacy.fingerprint, **of_start(spec)})
    except JobError as error:
        log.warning("%s: not compared with what the finished run was trained on and with: %s", spec.party, error)
