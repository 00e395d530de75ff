"""Preparations of a data party before it connects: its rows are read, and its part of the model is built on them.

A standby makes them ahead, from what the worker beside it has agreed on with the others. It only reads then: the state
folder is not its own yet.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fingerprint import fingerprint
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.modules.handover import Take
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.cut.guard import Guard
from sl_queue.launch.keeping import rules_to_keep, secret_to_keep, warn_of_common_draws
from sl_queue.launch.privacy import Parts, parts_of, require_lasting_secret
from sl_queue.launch.rows import aligned_before, aligned_rows, own_version, table_of
from sl_queue.launch.stages import build_stage, of_start
from sl_queue.launch.workplace import Workplace
from sl_queue.loops.lifecycle import Identity
from sl_queue.protocol import events
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.table import Table
from sl_queue.storage import aligned_file, holdout_file, secret_file
from sl_queue.storage.checkpoints import Folder, begun_in
from sl_queue.storage.features_file import write_features
from sl_queue.storage.holdout_file import chosen_before

if TYPE_CHECKING:
    from sl_queue.launch.hands import Lanes

log = logging.getLogger("sl_queue")

Begun = Mapping[str, Any] | None  # the fingerprint of the newest checkpoint
_AGREED = (aligned_file.NAME, holdout_file.NAME, secret_file.NAME)


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """A party's rows, with the spec that has its secret, and the order of work over them."""

    spec: PartySpec
    table: Table
    rules: int
    pipeline: Pipeline
    fingerprint: Mapping[str, Any]  # of all that a step depends on

    @classmethod
    def of(cls, job: Job, spec: PartySpec, table: Table, rules: int) -> "Own":
        """Return rows that were read, with the order of work over them."""
        pipeline = job.pipeline_of(job.batches(table.n_rows, table.chosen_by(rules)))
        depends = {**fingerprint(spec.compute, table, rules), **spec.privacy.fingerprint, **of_start(spec)}
        return cls(spec, table, rules, pipeline, depends)


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A party's part of the model on its rows, and what stands at its cuts."""

    own: Own
    parts: Parts
    stage: TorchBaseStage | TorchFuseStage


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """Preparations of a standby, with what they were made from."""

    built: Built
    begun: tuple[object, ...]

    def holds(self, state: Path, begun: Begun) -> bool:
        """Return True if a worker that starts now would prepare the same."""
        return self.begun == _basis(state, begun)


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the preparations of one party.

    `take` says how to come by a model that is given in code, `guards` are put in at the cuts to these peers, `lanes`
    are the way to hands. `private`: what its models draw is keyed by a secret of its own, unless its file or the run in
    the state folder says no.
    """

    job: Job
    spec: PartySpec
    place: Workplace
    take: Take
    guards: Mapping[str, Guard]
    lanes: "Lanes | None"
    private: bool

    def make(self, folder: Folder, ahead: Ahead | None) -> Built:
        """Prepare what a standby has not made `ahead`; `folder` agrees to go on with what it is made of."""
        spec, place = self.spec, self.place
        if ahead is not None and ahead.holds(place.state, folder.begun_with):
            built = ahead.built
            self._agree(folder, built.own)
            return built
        own = self._read(folder.begun_with)
        place.observe(events.Prepared(spec.party, "table"))
        self._agree(folder, own)
        return self._built(own)

    def make_ahead(self) -> Ahead | None:
        """Prepare beside the worker that has the folder; None as long as its run has no checkpoint."""
        job, spec, state = self.job, self.spec, self.place.state
        begun = begun_in(state)
        if begun is None or not self._has_agreed(begun):
            return None
        basis, rules = _basis(state, begun), rules_to_keep(job, spec.party, begun)
        require_lasting_secret(spec, state, private=self.private)
        spec = self._with_secret(rules, begun)
        aligned = aligned_before(spec.table, state) if job.alignment.method == "psi" else None
        chosen = chosen_before(state) if self._hears else None
        return Ahead(self._built(Own.of(job, spec, table_of(spec, rules, aligned, chosen), rules)), basis)

    @property
    def _hears(self) -> bool:
        return self.job.tells_holdout and self.spec.role != "label"

    def _has_agreed(self, begun: Mapping[str, Any]) -> bool:
        """Tell whether all that a run needs lies in the folder, so that nothing must be made or asked for."""
        state, job = self.place.state, self.job
        aligned = job.alignment.method != "psi" or (state / aligned_file.NAME).exists()
        chosen = not job.tells_holdout or (state / holdout_file.NAME).exists()
        secret = not self.private or "secret" in begun or (state / secret_file.NAME).exists()
        return aligned and chosen and secret

    def _with_secret(self, rules: int, begun: Begun) -> PartySpec:
        spec, state = self.spec, self.place.state
        secret = secret_to_keep(spec.party, spec.chosen_secret, rules, begun, state, private=self.private)
        if self.private and not secret:
            warn_of_common_draws(spec.party, spec.chosen_secret, rules)
        return replace(spec.with_secret(secret), table=replace(spec.table, scratch=state))

    def _read(self, begun: Begun) -> Own:
        """Find and read the rows of the party."""
        job, spec, place = self.job, self.spec, self.place
        aligned = aligned_rows(job, spec, place)
        rules = rules_to_keep(job, spec.party, begun)
        require_lasting_secret(spec, place.state, private=self.private)
        spec = self._with_secret(rules, begun)
        chosen = None
        if self._hears:
            from sl_queue.launch.holdout import hear_held_out  # loaded where a label holder chooses

            chosen = hear_held_out(job, spec, aligned, place, begun=begun is not None)
        table = table_of(spec, rules, aligned, chosen)
        for note in table.notes:
            log.info("%s: %s", spec.party, note)
        return Own.of(job, spec, table, rules)

    def _agree(self, folder: Folder, own: Own) -> None:
        folder.require(own.fingerprint)
        write_features(self.place.state, own.table.fitted)
        if self.job.tells_holdout and not self._hears:
            from sl_queue.launch.holdout import tell_held_out

            begun = folder.begun_with is not None
            tell_held_out(self.job, own.spec, own.table, self.place, begun=begun)

    def _built(self, own: Own) -> Built:
        parts = parts_of(own.spec, own.table, own.pipeline.batches)
        guards = {**parts.guards, **self.guards}
        return Built(
            own, parts, build_stage(self.job, own.spec, own.table, own.pipeline, self.take, guards, self.lanes)
        )


def identity_of(job: Job, own: Own) -> Identity:
    """Describe the worker that begins now."""
    table = own.table
    about = (job.canonical(), table.n_rows, table.digest, table.id_type)
    return Identity(secrets.token_hex(8), *about, rules=own.rules, version=own_version(), party=own.spec.party)


def _basis(state: Path, begun: Begun) -> tuple[object, ...]:
    """Return what a party's rows follow from, besides its files: the run it goes on with, and what was agreed on."""
    found: list[object] = [begun]
    for name in _AGREED:
        try:
            about = (state / name).stat()
            found.append((about.st_ino, about.st_mtime_ns, about.st_size))
        except FileNotFoundError:
            found.append(None)
    return tuple(found)
