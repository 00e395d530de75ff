"""A prediction with every role as a thread of this process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sl_queue.compute.threads import limit_threads, settings_kept
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, data_to_predict, resolve
from sl_queue.config.user_code import Importer
from sl_queue.launch.asked import Asked
from sl_queue.launch.connect import MEMORY, Channels, connector, key_file, sealing
from sl_queue.launch.prediction import Predicted, predict_party, spec_to_predict
from sl_queue.launch.scheduler import OnStatus, serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.local.threads import key_in, require_all, shared_threads
from sl_queue.local.together import run_together
from sl_queue.protocol.messages import SCHEDULER


def predict_threads(
    job: Job,
    parties: Sequence[PartyFile],
    states: Mapping[str, Path],
    asked: Asked,
    on_status: OnStatus = lambda _: None,
    broker: str = MEMORY,
    keys: Path | None = None,
    rows: Mapping[str, Any] | None = None,
) -> Predicted:
    """Predict with the weights in the state folders of the parties, and return what the label holder has.

    `rows`: by party, Rows or FileSpec in the place of [predict]. Nothing of the prediction is kept. Raises the error of
    the party that failed.
    """
    specs = _specs(job, parties, asked, rows)
    connect, channels, files = connector(job, broker), Channels(), {file.party: file for file in parties}
    found: dict[str, Predicted | None] = {}

    def place(role: str, state: Path) -> Workplace:
        seal = sealing(job, role, key_file(key_in(keys, role), files.get(role)), broker)
        return Workplace(connect, state, channels, seal)

    with ExitStack() as stack:
        root = Path(stack.enter_context(TemporaryDirectory(prefix="sl_queue-predict-")))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(settings_kept())

        def party(name: str) -> None:
            limit_threads(files[name].threads or shared_threads(len(parties)))
            found[name] = predict_party(job, specs[name], asked, place(name, states[name]), root / name)

        def scheduler() -> None:
            serve_scheduler(job, place(SCHEDULER, root / SCHEDULER), on_status, late_s=0.0, prediction=asked.name)

        work: dict[str, Callable[[], None]] = {SCHEDULER: scheduler, **{name: partial(party, name) for name in specs}}
        run_together(work, channels, "interrupted; nothing was written")
    predicted = found[job.label_holder]
    assert predicted is not None
    return predicted


def _specs(
    job: Job, parties: Sequence[PartyFile], asked: Asked, rows: Mapping[str, Any] | None
) -> dict[str, PartySpec]:
    """Resolve the parties with the rows to predict."""
    require_all(job, parties)
    importer = Importer()
    given = rows or {file.party: data_to_predict(file) for file in parties}
    return {file.party: spec_to_predict(resolve(job, file, importer), given.get(file.party), asked) for file in parties}
