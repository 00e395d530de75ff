"""The outcome of a prediction at the label holder: a file of predictions, an evaluation where labels are known."""

import json
from functools import partial
from pathlib import Path

import numpy as np

from sl_queue.compute.evaluated import Evaluation, evaluate
from sl_queue.compute.predicted import Undo, columns_of
from sl_queue.config.party import PartyFile
from sl_queue.data.predictions import require_name, write_predictions
from sl_queue.data.to_predict import LACKING
from sl_queue.errors import CheckpointError
from sl_queue.launch.importance import EVALUATION, keep_evaluation
from sl_queue.launch.prediction import Predicted
from sl_queue.launch.spending import REPORT
from sl_queue.privacy.response import Response, undone
from sl_queue.protocol.event_json import finite
from sl_queue.protocol.text import counted
from sl_queue.storage.files import write_durably
from sl_queue.storage.versions import Version

NAME = "predictions.parquet"


def place_of(party_file: PartyFile, out: Path | None) -> Path:
    """Return where predictions are written: in `out`, as [predict] says, or beside the party file. Raises JobError."""
    said = None if party_file.predict is None else party_file.predict.out
    if out is not None:
        path = out / (NAME if said is None else said.name)
    else:
        path = said or (party_file.folder or Path()) / NAME
    require_name(path)
    return path


def write_outcome(predicted: Predicted, path: Path) -> list[str]:
    """Write the predictions, and the ids without one beside them; return what to tell."""
    rows, version = predicted.rows, predicted.version
    task, meaning = _meaning(predicted)
    columns = columns_of(predicted.outputs, task, meaning, undoing(version))
    count = write_predictions(path, rows.ids, rows.positions, columns)
    told = [f"{counted(count, 'prediction', 'predictions')} with run {version.run}: {path}"]
    lacking = path.with_name(f"{path.stem}-missing.csv")
    if not rows.missing:
        lacking.unlink(missing_ok=True)  # of an earlier prediction
    else:
        write_predictions(lacking, rows.ids, np.where(rows.positions == LACKING, 0, -1), {})
        lack = "that another party lacks"
        told.append(f"{counted(rows.missing, f'row {lack} has', f'rows {lack} have')} no prediction: {lacking}")
    return told


def write_evaluation(predicted: Predicted, folder: Path) -> Evaluation:
    """Compare the predictions with labels, and write `evaluation.json`."""
    assert predicted.objective is not None
    found = evaluate(predicted.objective, predicted.outputs, predicted.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    body = finite({"run": predicted.version.run, **found.as_json()})
    write_durably(folder / EVALUATION, json.dumps(body, indent=1).encode())
    keep_evaluation(predicted.version.path, body)
    return found


def _meaning(predicted: Predicted) -> tuple[str, str]:
    if predicted.objective is not None:
        return str(predicted.objective.task), str(predicted.objective.outputs)
    return meaning_of(predicted.version, predicted.loss)


def meaning_of(version: Version, loss: str) -> tuple[str, str]:
    """Return task and meaning of the outputs: as the version says, else by the loss that its party file names."""
    about = version.about
    if "task" in about:
        return str(about["task"]), str(about["outputs"])
    tasks = {"bce_with_logits": "binary", "cross_entropy": "multiclass"}
    return tasks.get(loss, "regression"), "logits"


def undoing(version: Version) -> Undo | None:
    """Return what makes probabilities of labels of a version's, which learnt from responses; None if it did not.

    Raises CheckpointError if what the version says of its responses cannot be read.
    """
    body = version.kept(REPORT)
    if body is None:
        return None
    try:
        said = json.loads(body)["response"]
        response = None if said is None else Response(float(said["epsilon"]), tuple(map(float, said["classes"])))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{version.path / REPORT} cannot be read ({type(error).__name__}), and it says which responses the model "
            "learnt from; restore it"
        ) from error
    return None if response is None else partial(undone, response=response)
