"""Advice on a label holder's loss and metrics: what is allowed, and was probably not meant."""

from collections.abc import Iterator
from dataclasses import dataclass

from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.label_scale import far_labels
from sl_queue.compute.objective import undefined_metrics


@dataclass(frozen=True, slots=True)
class Advice:
    """A piece of advice; one that `decides` concerns what the job stops on."""

    text: str
    decides: bool = False


def advice(stage: TorchFuseStage, stops_on: str | None) -> Iterator[Advice]:
    """Yield what a person should know before the run: of the model's end, the loss, and what is measured.

    `stops_on` is the metric that ends training early, if one does.
    """
    yield from map(Advice, stage.objective.warnings)
    if stage.objective.adds_up and stage.batches.parts(0) > 1 and not stage.layers.whole_batch:
        yield Advice(
            f"the loss is twice as large of all rows twice: it is a sum, and each of the {stage.batches.parts(0)} "
            "micro-batches of a step counts as a mean does, by its share of the rows. Divide it by them, or set "
            "micro_batches = 1"
        )
    if (far := far_labels(stage)) is not None:
        yield Advice(far)
    metrics = list(stage.objective.metrics)
    if metrics and not stage.batches.holdout_rows:
        held = (
            "the label holder chose none"
            if stage.batches.chosen is not None
            else f"holdout = {stage.batches.holdout:g} of {stage.batches.n_rows} rows holds out none"
            if stage.batches.holdout
            else "holdout = 0"
        )
        yield Advice(
            f"metrics = {metrics} measure nothing, because no row is held out ({held}): set holdout in the job, for "
            "instance to 0.2, or remove the metrics"
        )
    yield from _undefined(stage, stops_on)


def _undefined(stage: TorchFuseStage, stops_on: str | None) -> Iterator[Advice]:
    """Yield which metrics the held-out rows do not define."""
    reasons: dict[str, list[str]] = {}
    undefined = undefined_metrics(stage.objective, stage.batches)
    for name, why in undefined.items():
        if stops_on == name:
            other = "or another holdout_seed" if "loss" in undefined else 'another holdout_seed, or metric = "loss"'
            yield Advice(
                f"early_stopping.metric = {name!r}: {why}, so {name} is undefined and never stops the run; take a "
                f"larger holdout{' ' if other.startswith('or') else ', '}{other}",
                decides=True,
            )
        else:
            reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        are = "is" if len(names) == 1 else "are"
        yield Advice(f"{why}, so {', '.join(names)} {are} undefined; take a larger holdout or another holdout_seed")
