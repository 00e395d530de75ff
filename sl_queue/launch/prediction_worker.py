"""A worker that predicts: in a process of its own, over a broker."""

from pathlib import Path
from typing import Literal

from sl_queue.compute.threads import limit_threads
from sl_queue.config.environment import THREADS
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.resolve import data_to_predict, resolve
from sl_queue.config.user_code import Importer
from sl_queue.errors import JobError
from sl_queue.launch.asked import Asked
from sl_queue.launch.connect import Channels, connector, key_file, require_network, sealing
from sl_queue.launch.outcome import place_of, write_outcome
from sl_queue.launch.party import state_folder
from sl_queue.launch.prediction import predict_party, spec_to_predict
from sl_queue.observe.log import to_log
from sl_queue.protocol.events import Observer


def run_prediction(
    role: Literal["feature", "label"],
    job: Job,
    party_file: PartyFile,
    name: str,
    run: str | None,
    broker: str | None,
    state: Path | None,
    key: Path | None = None,
    observe: Observer = to_log,
) -> None:
    """Take part in the prediction of that name to its end; the label holder writes its file. Raises SlQueueError.

    Once it is done, another start writes the same file again and leaves.
    """
    spec = resolve(job, party_file, Importer())
    if spec.role != role:
        raise JobError(f"party {spec.party!r} has the role {spec.role!r} in the job, and this worker is for {role!r}")
    leave_out = party_file.predict is not None and party_file.predict.missing == "leave-out"
    asked = Asked(name, run, leave_out=leave_out)
    spec = spec_to_predict(spec, data_to_predict(party_file), asked)
    place = place_of(party_file, None) if role == "label" else None
    url = party_file.broker_url(broker)
    require_network(url)
    limit_threads(party_file.threads or THREADS.read() or None)
    seal = sealing(job, spec.party, key_file(key, party_file), url)
    connect = connector(job, url, again=lambda: party_file.broker_url(broker, again=True))
    folder = state_folder(party_file, state)
    predicted = predict_party(job, spec, asked, connect, folder, Channels(), seal, observe)
    if predicted is not None and place is not None:
        for line in write_outcome(predicted, place):
            print(line, flush=True)
