"""Ledger of a run's releases: each is entered before it is sent; their sum is in `final/privacy.json` at the end."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.errors import JobError
from sl_queue.launch.privacy import response_of
from sl_queue.privacy.guards import EpochMeter
from sl_queue.privacy.releases import epochs_within, worth_of_activations, worth_of_labels, worth_of_sigmas
from sl_queue.privacy.report import report_of_columns, report_of_labels
from sl_queue.privacy.response import Response
from sl_queue.privacy.settings import Settings
from sl_queue.protocol.fingerprints import SEED
from sl_queue.protocol.releases import Release
from sl_queue.protocol.table import Table
from sl_queue.protocol.text import counted
from sl_queue.storage.files import unusable, write_durably
from sl_queue.storage.privacy_ledger import Ledger

log = logging.getLogger("sl_queue")

REPORT = "privacy.json"
_JOB = 12  # characters of a job's digest


@dataclass(slots=True)
class Spending:
    """ports.Spending of one party. Mutable: it remembers which epochs were entered."""

    job: Job
    party: str
    settings: Settings
    ledger: Ledger
    final: Path  # the folder
    secret: str  # a salted digest, or "seed"
    response: Response | None
    meter: EpochMeter | None
    truly: Callable[[], Mapping[str, float | None]]  # the last metrics on true labels
    planned: bool = False  # whether the budget was compared with the whole run
    _entered: set[tuple[str, int, int]] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        job: Job,
        spec: PartySpec,
        table: Table,
        state: Path,
        meter: EpochMeter | None,
        truly: Callable[[], Mapping[str, float | None]],
    ) -> "Spending":
        """Make it of what lies in a state folder, and beside the secret if that is a file."""
        chosen = spec.chosen_secret
        ledger = Ledger(state, chosen if isinstance(chosen, Path) else None)
        about = (job, spec.party, spec.privacy, ledger, state / "final")
        return cls(*about, _digest(spec.compute.secret), response_of(spec, table), meter, truly)

    def begin(self, run: str, generation: int, epoch: int) -> None:
        """Enter what an epoch releases, on disk. Raises JobError if that would pass the budget."""
        if (run, generation, epoch) in self._entered:
            return
        due, known = self._due(run, generation, epoch), self.ledger.releases()
        new = [release for release in due if release not in known]
        if new and self.settings.budget is not None:
            self._require_within(known, new, epoch)
        for release in new:
            self.ledger.enter(release)
        self._entered.add((run, generation, epoch))

    def finish(self, run: str) -> None:
        """Write `final/privacy.json`."""
        releases, public = self.ledger.releases(), self.secret == SEED
        about = (self.settings, releases, run, public)
        if self.party == self.job.label_holder:
            report = report_of_labels(self.party, self.job.feature_parties, *about)
        else:
            report = report_of_columns(self.party, self.job.label_holder, *about)
        response = None if self.response is None else self._chances(self.response)
        found = {**report, "response": response, "measured": None if self.meter is None else self.meter.found}
        if self.response is not None:
            found["holdout_true"] = dict(self.truly())
        try:
            write_durably(self.final / REPORT, json.dumps(found, indent=1).encode())
        except OSError as error:
            raise unusable(self.final.parent, error) from error

    def _chances(self, response: Response) -> dict[str, Any]:
        """Return what prediction needs to undo a response."""
        return {**asdict(response), "keep": response.keep, "swap": response.swap}

    def _due(self, run: str, generation: int, epoch: int) -> list[Release]:
        """List the releases from the beginning of an epoch to its end, evaluation included."""
        about = (self.party, self.job.digest[:_JOB], run)
        found = []
        if self.response is not None:
            own = {"epsilon": self.response.epsilon, "classes": self.response.classes}
            found.append(Release("labels", *about, 0, None, self.secret, **own))  # type: ignore[arg-type]
        if self.settings.max_norm or self.settings.gradients is not None:
            found.append(Release("gradients", *about, 0, None, self.secret))
        if self.settings.clip is not None:
            noise = {"clip": self.settings.clip, "sigma": self.settings.sigma}
            found.append(Release("activations", *about, generation, epoch, self.secret, **noise))  # type: ignore[arg-type]
        return found

    def _require_within(self, known: Sequence[Release], new: Sequence[Release], epoch: int) -> None:
        """Raise JobError if the budget would be passed by these releases, or by the run as a whole."""
        settings, budget = self.settings, self.settings.budget
        assert budget is not None
        labels = worth_of_labels([*known, *new])
        where = f"party {self.party!r}: [privacy] budget = {budget:g}"
        if labels.epsilon is not None and labels.epsilon > budget:
            raise JobError(
                f"{where} would be passed: the responses of this run and of earlier ones on the same rows are worth "
                f"epsilon {labels.epsilon:g} in all; nothing was sent. Raise it, or take the epsilon of an earlier "
                "run, whose responses are then the same and cost nothing more"
            )
        if not settings.sigma:
            return
        left = self.job.epochs - epoch
        fits = epochs_within(known, settings.sigma, budget, settings.delta, left)
        if fits < (1 if self.planned or self.job.early_stopping is not None else left):
            already = worth_of_activations(known, settings.delta).releases
            sigmas = [release.sigma or 0.0 for release in known if release.mechanism == "activations"]
            whole = worth_of_sigmas([*sigmas, *[settings.sigma] * left], settings.delta).epsilon
            raise JobError(
                f"{where} allows {counted(fits, 'more epoch', 'more epochs')}, and {left} are to come: a row "
                f"was released {counted(already, 'time', 'times')} before, and with those it comes to epsilon "
                f"{whole or float('inf'):.2f} at delta {settings.delta:g}; nothing more is sent. "
                f"Raise sigma above {settings.sigma:g} or the budget, or train fewer epochs"
            )
        if not self.planned and fits < left:
            log.warning(
                "%s allows %d of the %d epochs to come; it fails there, unless it stops early", where, fits, left
            )
        self.planned = True


def release_rows(job: Job, spec: PartySpec, state: Path, of: str, folder: Path | None = None) -> None:
    """Enter what a prediction or a service releases of each row, before it is sent; what all comes to is in `folder`.

    `of` names weights and rows: the same once more has the same bits, and is no other release. Raises JobError if the
    budget would be passed.
    """
    settings, chosen = spec.privacy, spec.chosen_secret
    if settings.clip is None:
        return
    ledger = Ledger(state, chosen if isinstance(chosen, Path) else None)
    secret, known = _digest(spec.compute.secret), ledger.releases()
    about = (spec.party, job.digest[:_JOB], of, 0, None, secret)
    release = Release("activations", *about, clip=settings.clip, sigma=settings.sigma)
    if release not in known and not _fits(known, settings):
        worth = worth_of_activations([*known, release], settings.delta)
        raise JobError(
            f"party {spec.party!r}: [privacy] budget = {settings.budget:g} would be passed by these predictions: with "
            f"them a row is released {counted(worth.releases, 'time', 'times')}, worth epsilon "
            f"{worth.epsilon or float('inf'):.2f} at delta {settings.delta:g}; nothing was sent. Raise the budget"
        )
    ledger.enter(release)
    if folder is None:
        return
    about_run = (settings, ledger.releases(), of, secret == SEED)
    report = report_of_columns(spec.party, job.label_holder, *about_run)
    try:
        write_durably(folder / REPORT, json.dumps(report, indent=1).encode())
    except OSError as error:
        raise unusable(folder, error) from error


def _fits(known: Sequence[Release], settings: Settings) -> bool:
    """Return True if one more release of each row's activation is within the budget."""
    if settings.budget is None or not settings.sigma:
        return True
    return epochs_within(known, settings.sigma, settings.budget, settings.delta, 1) == 1


def _digest(secret: bytes) -> str:
    """Name a secret to who compares two ledgers, and tell nothing to anyone else."""
    return blake2b(digest_size=8, key=secret, person=b"sl_queue ledger").hexdigest() if secret else SEED
