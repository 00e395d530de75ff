"""Parts that a party's [privacy] puts into its worker: randomized labels, guards at the cut, and a meter."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sl_queue.config.resolve import PartySpec
from sl_queue.cut.guard import UNGUARDED, Guard, Tap
from sl_queue.errors import JobError
from sl_queue.privacy.draws import key_for, seed_secret
from sl_queue.privacy.first_look import Both, FirstLook, Reading
from sl_queue.privacy.guards import (
    ActivationDefence,
    ActivationTap,
    AnswerDefence,
    EpochMeter,
    GradientDefence,
    GradientTap,
    Returning,
    RowIndex,
)
from sl_queue.privacy.meter import ActivationMeter, GradientMeter
from sl_queue.privacy.one_core import on_one_core
from sl_queue.privacy.response import Labels, Response, classes_of, epsilon_for, rarest, respond
from sl_queue.privacy.sampled import Whereabouts
from sl_queue.protocol.fingerprints import SEED
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table

log = logging.getLogger("sl_queue")


def require_lasting_secret(spec: PartySpec, state: Path, *, private: bool) -> None:
    """Raise JobError if a `private` worker's defences would draw again after its state folder is gone."""
    settings, chosen, party = spec.privacy, spec.chosen_secret, spec.party
    if not private or not settings.draws or chosen == SEED:
        return
    inside = isinstance(chosen, Path) and state.resolve() in chosen.resolve().parents
    if chosen is None or inside:
        where = "in its state folder" if inside else "not named"
        raise JobError(
            f"party {party!r}: what [privacy] draws for a row must be the same in the next run, and its secret is "
            f"{where}, where it does not outlive a run: make one with `sl-queue key --private --out {party}.secret`, "
            f'and set [privacy] secret = "{party}.secret"'
        )


def token_key(spec: PartySpec) -> bytes | None:
    """Return what keys the tokens of the party's rows; None if nothing is drawn for a row."""
    return key_for(_base(spec), spec.party, "rows") if spec.privacy.defends_labels else None


def choice_key(spec: PartySpec) -> bytes | None:
    """Return what keys the choice of rows by their labels, so that nobody else can repeat it; None: the seed does."""
    return key_for(spec.compute.secret, spec.party, "holdout") if spec.compute.secret else None


def responded(spec: PartySpec, table: Table) -> Table:
    """Return the table with responses for labels, if the file says so. Raises JobError if there can be none."""
    settings, party = spec.privacy, spec.party
    if settings.labels is None or table.labels is None:
        return table
    assert table.tokens is not None
    where = f"party {party!r}: [privacy] labels = {{ epsilon = {settings.labels:g} }}"
    classes = classes_of(table.labels)
    if table.n_rows > 1 and (table.labels == table.labels[0]).all():
        raise JobError(f"{where} has no use: all labels are of one class")
    if classes is None:
        raise JobError(
            f"{where} needs classes, whole numbers, one a row; these labels are {table.labels.dtype} "
            f"{table.labels.shape}: remove it, or write the labels as classes"
        )
    response = Response(settings.labels, classes)
    rare = rarest(table.labels, response)
    better = epsilon_for(rare.share, len(classes))
    told = (
        f"{where} with {100 * rare.share:.2g} % positives: {100 * rare.says:.3g} % of labels will say positive and "
        f"{100 * rare.right:.2g} % of those are; raise epsilon above {better:g}"
    )
    if rare.hopeless and not settings.prior_ok:
        raise JobError(f"{told}, or accept it with prior_ok = true")
    if rare.doubtful:
        log.warning("%s for most of them to be", told)
    given = respond(table.labels, response, table.tokens, _base(spec), party)
    return replace(table, labels=given, truth=table.labels)


def response_of(spec: PartySpec, table: Table) -> Response | None:
    """Return the response that a table's labels went through, for prediction to undo it; None if there was none."""
    epsilon = spec.privacy.labels
    classes = None if table.truth is None else classes_of(table.truth)
    return None if epsilon is None or classes is None else Response(epsilon, classes)


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts that are put into a worker."""

    guards: Mapping[str, Guard]
    meter: EpochMeter | None = None


def parts_of(spec: PartySpec, table: Table, batches: Batches) -> Parts:
    """Make the guards and the meter that a party's [privacy] asks for."""
    make = _parts_of_label_holder if spec.role == "label" else _parts_of_feature_party
    with on_one_core() if spec.privacy.meter else nullcontext():
        return make(spec, table, batches, _base(spec))


def _parts_of_feature_party(spec: PartySpec, table: Table, batches: Batches, base: bytes) -> Parts:
    settings, party, tap, meter = spec.privacy, spec.party, None, None
    if settings.meter and table.features is not None and not table.features.dtype.names:
        about = (batches.training_positions, key_for(base, party, "meter"), table.row_keys)
        columns = ActivationMeter(table.features, *about)
        tap, meter = ActivationTap(columns, Whereabouts(batches, columns.sample)), EpochMeter(columns, spec.peers[0])
    defence = None if settings.clip is None else ActivationDefence(settings.clip, settings.sigma, base)
    returning = Returning(settings.clip, settings.nopeek) if settings.clip is not None or settings.nopeek else None
    if defence is None and tap is None and returning is None:
        return Parts({})
    return Parts({spec.peers[0]: Guard(defence, tap, None, returning)}, meter)


def _parts_of_label_holder(spec: PartySpec, table: Table, batches: Batches, base: bytes) -> Parts:
    settings, party, tap, meter, defence = spec.privacy, spec.party, None, None, None
    index = RowIndex.of(table.row_keys)
    classes = class_numbers(table)
    if settings.meter and classes is not None:
        given = None if table.labels is None or table.truth is None else numbered(table.labels, table.truth)
        about = (batches.training_positions, key_for(base, party, "meter"), table.row_keys)
        gradients = GradientMeter(classes, *about, given)
        tap, meter = GradientTap(gradients, Whereabouts(batches, gradients.sample)), EpochMeter(gradients)
    elif settings.meter:
        log.warning("party %r: [privacy] meter reads classes, and these labels are not; nothing is measured", party)
    if settings.max_norm or settings.gradients is not None:
        assert table.tokens is not None
        defence = GradientDefence(settings.gradients, index, table.tokens, base)
    leaving: Tap | None = tap
    if not spec.privacy.defends_labels and classes is not None:
        look = FirstLook.of(classes, index, batches.rows_in_epoch, _warner(party))
        leaving = look if tap is None else Both(tap, look)
    if leaving is None and defence is None:
        return Parts({})
    return Parts(dict.fromkeys(spec.peers, Guard(defence, leaving, tap)), meter)


def answering_guard(spec: PartySpec) -> Guard:
    """Return the defence of activations in answers to single requests."""
    settings = spec.privacy
    if spec.role == "label" or settings.clip is None:
        return UNGUARDED
    return Guard(AnswerDefence(settings.clip, settings.sigma, _base(spec)))


def _warner(party: str) -> Callable[[Reading], None]:
    """Return what says that labels can be read."""
    return lambda reading: log.warning("%s: %s", party, reading.told())


def class_numbers(table: Table) -> npt.NDArray[np.int64] | None:
    """Return the true class of each row, counted from 0; None if labels are no classes."""
    labels = table.labels if table.truth is None else table.truth
    return None if labels is None or classes_of(labels) is None else numbered(labels, labels)


def numbered(labels: Labels, among: Labels) -> npt.NDArray[np.int64]:
    """Return the class of each label, counted from 0 in the order of the values of `among`."""
    classes = np.unique(among).astype(np.float64)
    return np.searchsorted(classes, labels.reshape(-1).astype(np.float64)).astype(np.int64)


def _base(spec: PartySpec) -> bytes:
    """Return the key of all of a party's defences: its secret, or what anyone can compute of the job."""
    return spec.compute.secret or seed_secret(spec.compute.layers.seed, spec.party)
