"""A model whose layers live at several parties, trained from a notebook: fit, evaluate, predict, save, write.

It has no engine of its own. `fit` builds a Job and a PartyFile for each party from what it was given, and runs them
with `run_local`; `write` puts the same two into a folder, to be deployed.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sl_queue.compute.export import Exported, Target
from sl_queue.compute.other_metrics import Task
from sl_queue.compute.outputs import Outputs, numbers
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError
from sl_queue.local import in_memory, written_model
from sl_queue.local.arguments import arguments_of, is_of_numbers, job_and_files, party_file
from sl_queue.local.given_rows import Given, by_party, names_of
from sl_queue.local.history import History
from sl_queue.local.progress import OnEpoch
from sl_queue.local.threads import Result, run_local


class SplitModel:
    """Base models by party, a fuse model, and how they learn; an estimator in the manner of scikit-learn.

    `bases` and `fuse` are modules, or callables that make them; a module is trained itself and is afterwards what it
    was, so that `fit` begins each time from the same weights. `columns` says which columns of one joined table are
    whose, for who gives one instead of one for each party. An optimizer is a table like {"name": "adam", "lr": 1e-3},
    or a callable that is given the parameters; `learning` are other keys of [base] and [fuse]: schedule, clip_norm,
    ema, groups. `settings` are other keys of the job, for instance pipeline={"micro_batches": 4}.

    Mutable: `fit` leaves `history_`, `bases_`, `fuse_`, `job_` and `parties_`.
    """

    def __init__(
        self,
        bases: Mapping[str, Any],
        fuse: Any,
        *,
        label_holder: str,
        loss: Any,
        optimizer: Any = None,
        metrics: Sequence[Any] = (),
        aggregation: str = "list",
        epochs: int = 10,
        batch_size: int = 32,
        validation: float = 0.0,
        seed: int = 0,
        columns: Mapping[str, Sequence[Any]] | None = None,
        learning: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "cpu",
        name: str = "model",
        progress: bool = True,
    ) -> None:
        self.bases, self.fuse, self.label_holder, self.loss = bases, fuse, label_holder, loss
        self.optimizer, self.metrics, self.aggregation = optimizer, metrics, aggregation
        self.epochs, self.batch_size, self.validation, self.seed = epochs, batch_size, validation, seed
        self.columns, self.learning, self.settings = columns, learning, settings
        self.device, self.name, self.progress = device, name, progress

    # scikit-learn's conventions ---------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments that it was built with."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change arguments. Raises JobError for one that there is not."""
        for name, value in params.items():
            if name not in self.get_params():
                raise JobError(f"{name!r} is not an argument of SplitModel; they are {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """Return what scikit-learn asks before it scores: called by it alone."""
        sklearn = sys.modules["sklearn.utils"]
        kind = "regressor" if is_of_numbers(self.loss) else "classifier"
        tags = sklearn.Tags(estimator_type=kind, target_tags=sklearn.TargetTags(required=True))
        if kind == "classifier":
            tags.classifier_tags = sklearn.ClassifierTags()
        else:
            tags.regressor_tags = sklearn.RegressorTags()
        return tags

    def score(self, features: Any, labels: Any, id: str | None = None) -> float:
        """Return accuracy, or R² of a regression."""
        guessed = self.predict(features, id=id)
        wanted = np.asarray(labels).reshape(guessed.shape)
        if not is_of_numbers(self.loss):
            return float((guessed == wanted).mean())
        rest = float(((wanted - guessed) ** 2).sum())
        return 1 - rest / float(((wanted - wanted.mean(axis=0)) ** 2).sum())

    # Training ---------------------------------------------------------------------------------------------------

    def job(self, features: Any, labels: Any, *, id: str | None = None, **changes: Any) -> tuple[Job, list[PartyFile]]:
        """Build the job and the party files that `fit` runs: the cuts are found by trying the base models."""
        if labels is None:
            raise JobError("there are no labels to train on; give an array, or the name of a column")
        given = by_party(features, self.bases, self.columns, self.label_holder, labels, id)
        return job_and_files(given, {**self.get_params(), **changes})

    def fit(
        self,
        features: Any,
        labels: Any,
        *,
        id: str | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        validation: float | None = None,
        progress: bool | None = None,
        on_epoch: OnEpoch | None = None,
        out: Path | str | None = None,
    ) -> History:
        """Train from the initial weights, and return the epochs.

        `features` are a table for each party (arrays, tensors, data frames, datasets), or one table with `columns`.
        With `id`, the name of a column, rows are the same where their ids are; without it, by their places. `labels`
        are an array, or the name of a column of the label holder's table. `on_epoch` gets each epoch as it ends; what
        it raises ends the run and comes back. `out` keeps every party's state: a later call on it resumes.
        """
        given = {"epochs": epochs, "batch_size": batch_size, "validation": validation}
        changes = {name: value for name, value in given.items() if value is not None}
        job, files = self.job(features, labels, id=id, **changes)
        show = self.progress if progress is None else progress
        result = run_local(job, files, out=out, progress=show, on_epoch=on_epoch)
        self._become(job, files, result)
        return self.history_

    def _become(self, job: Job, files: Sequence[PartyFile], result: Result) -> None:
        self.job_, self.parties_ = job, {file.party: file for file in files}
        self.bases_ = {party: result.base(party) for party in job.fused}
        self.fuse_ = result.fuse
        self.history_ = History(result.history)  # type: ignore[arg-type]
        holder = self.parties_[job.label_holder]
        given = holder.data
        assert isinstance(given, Rows)
        rows = {party: file.data for party, file in self.parties_.items() if isinstance(file.data, Rows)}
        self.columns_ = {party: names for party, each in rows.items() if (names := names_of(each.features))}
        table = Given(holder.party, given.ids, given.features, given.labels).table()
        objective = in_memory.objective_for(job, holder, table)
        self.task_, self.outputs_ = objective.task.value, objective.outputs.value
        if objective.task is not Task.REGRESSION:
            self.classes_ = np.arange(objective.shape[0] if objective.task is Task.MULTICLASS else 2)

    # What it has learned ----------------------------------------------------------------------------------------

    def predict(self, features: Any, *, id: str | None = None) -> npt.NDArray[Any]:
        """Predict the class of each row, or its number of a regression, in the order of the label holder's rows.

        Of binary losses 0 or 1, an axis of length one left out.
        """
        output = self.decision_function(features, id=id)
        if is_of_numbers(self.loss):
            return numbers(torch.from_numpy(output), self.outputs_).numpy()
        chances = self._chances(torch.from_numpy(output))
        guessed = chances.argmax(1) if chances.dim() == 2 and self.task_ == Task.MULTICLASS else chances > 0.5
        return guessed.long().numpy()

    def predict_proba(self, features: Any, *, id: str | None = None) -> npt.NDArray[Any]:
        """Predict the probability of each class, (rows, classes); of several binary outputs that of a 1."""
        chances = self._chances(torch.from_numpy(self.decision_function(features, id=id)))
        return (torch.stack([1 - chances, chances], 1) if chances.dim() == 1 else chances).numpy()

    def decision_function(self, features: Any, *, id: str | None = None) -> npt.NDArray[Any]:
        """Compute the fuse model's output of each row, an axis of length one left out."""
        output = self._output(features, None, id)[0]
        if output.dim() == 2 and output.shape[1] == 1:
            output = output[:, 0]
        return output.numpy()

    def evaluate(self, features: Any, labels: Any, *, id: str | None = None) -> dict[str, float | None]:
        """Return loss and metrics of these rows, computed as of held-out ones."""
        output, files, tables = self._output(features, labels, id, ordered=False)
        holder = self.label_holder
        return in_memory.measures_of(self._trained_job, files[holder], tables[holder], output)

    def _output(self, features: Any, labels: Any, id: str | None, ordered: bool = True) -> tuple[Tensor, Any, Any]:
        job, given = self._trained_job, self._given(features, labels, id)
        files = {party: party_file(given[party], self.get_params()) for party in given}
        tables = {party: given[party].table() for party in given}
        modules = {**self.bases_, "fuse": self.fuse_}
        output = in_memory.outputs_of(job, tables, modules)
        if ordered:
            holder = self.label_holder if self.label_holder in given else next(iter(given))
            found = torch.empty_like(output)
            found[torch.from_numpy(given[holder].order())] = output
            output = found
        return output, files, tables

    def _given(self, features: Any, labels: Any, id: str | None) -> dict[str, Given]:
        """Split into each party's rows, with columns in the order of those that it was trained on."""
        given = by_party(features, self.bases, self.columns, self.label_holder, labels, id)
        return {party: each.as_trained(self.columns_.get(party)) for party, each in given.items()}

    @property
    def _trained_job(self) -> Job:
        if not hasattr(self, "job_"):
            raise JobError("this SplitModel has not been trained; call fit, or SplitModel.load")
        return self.job_

    def _chances(self, output: Tensor) -> Tensor:
        return in_memory.chances(output, Task(self.task_), Outputs(self.outputs_))

    # Folders ----------------------------------------------------------------------------------------------------

    def write(self, folder: Path | str) -> Path:
        """Write what was trained as files to deploy: job.toml, and for each party a folder with its file and models.

        The models begin from the weights that they were given with. Tables are written as Parquet, arrays of other
        shapes as .npz. Raises JobError for code that has no name to be imported by.
        """
        return written_model.write(Path(folder), self._trained_job, list(self.parties_.values()), data=True)

    def save(self, folder: Path | str) -> Path:
        """Save the model with its trained weights and its history, without any row; no pickle."""
        modules = {**self.bases_, "fuse": self.fuse_}
        about = {"task": self.task_, "outputs": self.outputs_, "columns": self.columns_}
        return written_model.save(Path(folder), self._trained_job, self.parties_, modules, list(self.history_), about)

    def export(self, folder: Path | str, target: Target = "torch", features: Any = None) -> list[Exported]:
        """Export each trained part to torch.export ("torch") or to ONNX ("onnx"), compared with the part itself.

        On the rows that `fit` was given, or on `features`, as `predict` takes them. Raises JobError for other targets
        and for a model that was loaded and is given no rows, ComputeError for a part that cannot be exported.
        """
        job = self._trained_job
        if features is None:
            given = {p: Given(p, f.data.ids, f.data.features, None) for p, f in self._files_with_rows().items()}
        else:
            given = self._given(features, None, None)
        tables = {party: given[party].table() for party in job.fused}
        return in_memory.export_parts(job, tables, {**self.bases_, "fuse": self.fuse_}, target, Path(folder))

    def _files_with_rows(self) -> dict[str, Any]:
        job = self._trained_job
        files = {party: self.parties_[party] for party in job.fused}
        if not all(isinstance(file.data, Rows) for file in files.values()):
            raise JobError("a model that was loaded holds no rows; give export a few by features=")
        return files

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Load the model that `save` wrote, ready to predict, and to be trained again from its initial weights."""
        job, files, modules, about = written_model.load(Path(folder))
        found = cls(**arguments_of(job, files))
        found.job_, found.parties_ = job, files
        found.bases_ = {party: modules[party] for party in job.fused}
        found.fuse_ = modules["fuse"]
        found.history_ = History(about["history"])
        found.task_, found.outputs_ = about["task"], about["outputs"]
        found.columns_ = about.get("columns", {})
        return found
