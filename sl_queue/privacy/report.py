"""`final/privacy.json`: what a run has defended, against whom, how well, and what it has not. A lawyer can read it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sl_queue.privacy.releases import Worth, worth_of_activations, worth_of_labels
from sl_queue.privacy.settings import Settings
from sl_queue.protocol.releases import Release

METRICS = "the metrics and losses in the history, as far as they are numbers over many rows"
METER = "the meter's own numbers in the history, which are made from true labels over many rows"
MEMBERS = "who is in the run: the ids that all parties hold"
WEIGHTS = "what the base model learns of a row and shows in the activations of other rows"
COLUMNS = "what a party's own columns say of the labels without any training"


def report_of_labels(
    party: str, others: Sequence[str], settings: Settings, releases: Sequence[Release], run: str, public: bool
) -> dict[str, Any]:
    """Report on the label holder."""
    mechanisms, open_to = [], []
    readers = ", ".join(others)
    if settings.labels is not None:
        worth = worth_of_labels(releases)
        mechanisms.append(
            _mechanism(
                "randomised response, drawn once for each row",
                "the label of each row, in training and in evaluation, and whatever is made of it",
                f"{readers}, and whoever sees weights, predictions or the history",
                "one row has another label",
                worth,
                "its own formula: the ratio of the chances of a response",
            )
        )
    if settings.max_norm or settings.gradients is not None:
        mechanisms.append(
            _mechanism(
                _noise_of_gradients(settings),
                "the label of each row, in the gradients alone; the fuse model learns from exact ones",
                readers,
                "one row has another label",
                Worth(1, None, 0.0, 1.0),
                "none: its worth is what the meter measures",
            )
        )
    if not mechanisms:
        open_to.append(f"every label: {readers} can read them from gradients")
    elif settings.labels is None:
        open_to.append("labels beyond what the meter measures: no epsilon bounds what gradients with noise tell")
    if settings.labels is None:
        open_to.append(METRICS)
    elif settings.meter:
        open_to.append(METER)
    return _report(party, mechanisms, [*open_to, MEMBERS, COLUMNS], releases, run, settings, public)


def _noise_of_gradients(settings: Settings) -> str:
    once = "drawn once for each row"
    if settings.max_norm:
        return f"max-norm, {once}"
    return f"noise of {settings.gradients or 0:g} times the largest gradient, half of it {once}, half for each release"


def report_of_columns(
    party: str, label_holder: str, settings: Settings, releases: Sequence[Release], run: str, public: bool
) -> dict[str, Any]:
    """Report on a feature party."""
    mechanisms, open_to = [], []
    if settings.clip is not None:
        worth = worth_of_activations(releases, settings.delta)
        noise = f", normal noise of deviation {settings.sigma:g} times that, drawn for each release" * bool(
            settings.sigma
        )
        mechanisms.append(
            _mechanism(
                f"activations clipped to norm {settings.clip:g} row by row{noise}",
                "each row's own activation, in training and in evaluation, given the base model's weights",
                label_holder,
                "one row is replaced by any other",
                worth,
                "the exact formula of composed Gaussian mechanisms (Balle and Wang 2018); sampling gains nothing, "
                "since the label holder knows the rows of a batch",
            )
        )
        open_to.append(WEIGHTS)
    if settings.nopeek:
        mechanisms.append(
            _mechanism(
                f"NoPeek, weight {settings.nopeek:g}: a smaller distance correlation of columns and activations",
                "columns, as far as the meter measures it",
                label_holder,
                "one row is replaced by any other",
                Worth(0, None, 0.0, 1.0),
                "none: its worth is what the meter measures",
            )
        )
    if not mechanisms:
        open_to.append(f"the columns: {label_holder} can recover of them what the meter measures from activations")
    return _report(party, mechanisms, [*open_to, MEMBERS], releases, run, settings, public)


def _mechanism(
    mechanism: str, protects: str, against: str, neighbours: str, worth: Worth, accountant: str
) -> dict[str, Any]:
    return {
        "mechanism": mechanism,
        "protects": protects,
        "against": against,
        "neighbours": neighbours,
        "releases_a_row": worth.releases,
        "epsilon": None if worth.epsilon is None else round(worth.epsilon, 4),
        "delta": worth.delta,
        "auc_cap": None if worth.epsilon is None else round(worth.cap, 4),
        "accountant": accountant,
    }


def _report(
    party: str,
    mechanisms: list[dict[str, Any]],
    not_protected: list[str],
    releases: Sequence[Release],
    run: str,
    settings: Settings,
    public: bool,
) -> dict[str, Any]:
    if public and settings.draws:
        not_protected = ["anything: the job's seed keys every draw, so every party can undo the noise", *not_protected]
    earlier = sorted({release.run for release in releases} - {run})
    found = {
        "party": party,
        "mechanisms": mechanisms,
        "earlier_runs": len(earlier),
        "budget": settings.budget,
        "not_protected": not_protected,
    }
    return {**found, "text": paragraph(found)}


def paragraph(report: Mapping[str, Any]) -> str:
    """Return the report as a paragraph, for a model card."""
    sentences = [_sentence(each) for each in report["mechanisms"]]
    if not sentences:
        sentences = [f"Party {report['party']} used no defence."]
    if report["earlier_runs"]:
        sentences.append(f"These numbers count {report['earlier_runs']} earlier runs under the same secret as well.")
    sentences.append(f"Not protected: {'; '.join(report['not_protected'])}.")
    return " ".join(sentences)


def _sentence(mechanism: Mapping[str, Any]) -> str:
    about = f"{mechanism['mechanism'][:1].upper()}{mechanism['mechanism'][1:]}, protects {mechanism['protects']}"
    if mechanism["epsilon"] is None:
        return f"{about}, against {mechanism['against']}; no epsilon bounds it."
    delta = f" and delta {mechanism['delta']:g}" if mechanism["delta"] else ""
    releases = mechanism["releases_a_row"]
    return (
        f"{about}, against {mechanism['against']}: epsilon {mechanism['epsilon']:g}{delta} in all, over {releases} "
        f"release{'s' * (releases != 1)} of a row, where neighbours differ in that {mechanism['neighbours']}. "
        f"No attack on it has an AUC above {mechanism['auc_cap']:.2f}."
    )
