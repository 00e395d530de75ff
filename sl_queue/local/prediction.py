"""A prediction with every role as a thread of this process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sl_queue.compute.threads import limit_threads, thread_counts_kept
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import data_to_predict, resolve
from sl_queue.config.user_code import Importer
from sl_queue.launch.asked import Asked
from sl_queue.launch.connect import MEMORY, Channels, connector, key_file, sealing
from sl_queue.launch.prediction import Predicted, predict_party, spec_to_predict
from sl_queue.launch.scheduler import OnStatus, serve_scheduler
from sl_queue.local.threads import key_in, require_all, shared_threads
from sl_queue.local.together import run_together
from sl_queue.observe.log import to_log
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.security.sealing import Seal


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
    require_all(job, parties)
    importer = Importer()
    specs = {file.party: resolve(job, file, importer) for file in parties}
    given = rows or {file.party: data_to_predict(file) for file in parties}
    specs = {name: spec_to_predict(spec, given.get(name), asked) for name, spec in specs.items()}
    connect, channels, files = connector(job, broker), Channels(), {file.party: file for file in parties}
    found: dict[str, Predicted | None] = {}

    def seal_of(role: str) -> Seal | None:
        return sealing(job, role, key_file(key_in(keys, role), files.get(role)), broker)

    with ExitStack() as stack:
        root = Path(stack.enter_context(TemporaryDirectory(prefix="sl_queue-predict-")))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(thread_counts_kept())

        def party(name: str) -> None:
            limit_threads(files[name].threads or shared_threads(len(parties)))
            about = (connect, states[name], channels, seal_of(name), to_log, root / name)
            found[name] = predict_party(job, specs[name], asked, *about)

        def scheduler() -> None:
            about = (connect, root / SCHEDULER, on_status, channels, seal_of(SCHEDULER))
            serve_scheduler(job, *about, late_s=0.0, prediction=asked.name)

        work: list[Callable[[], None]] = [scheduler, *(partial(party, name) for name in specs)]
        run_together(work, channels, "interrupted; nothing was written")
    predicted = found[job.label_holder]
    assert predicted is not None
    return predicted
