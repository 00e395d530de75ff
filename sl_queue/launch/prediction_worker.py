"""A worker that predicts: in a process of its own, over a broker."""

from pathlib import Path
from typing import Literal

from sl_queue.config.environment import LOCAL
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.resolve import data_to_predict, resolve
from sl_queue.config.user_code import Importer
from sl_queue.launch.asked import Asked
from sl_queue.launch.outcome import place_of, write_outcome
from sl_queue.launch.party import require_role, state_folder, workplace_of
from sl_queue.launch.prediction import predict_party, spec_to_predict
from sl_queue.launch.privacy import require_lasting_secret
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
    require_role(spec, role)
    require_lasting_secret(spec, state_folder(party_file, state), private=not LOCAL.read())
    leave_out = party_file.predict is not None and party_file.predict.missing == "leave-out"
    asked = Asked(name, run, leave_out=leave_out)
    spec = spec_to_predict(spec, data_to_predict(party_file), asked)
    output = place_of(party_file, None) if role == "label" else None
    place = workplace_of(job, party_file, broker, state, key, observe)
    predicted = predict_party(job, spec, asked, place)
    if predicted is not None and output is not None:
        for line in write_outcome(predicted, output):
            print(line, flush=True)
