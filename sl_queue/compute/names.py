"""Names of losses and metrics, as party files and histories have them; needs no torch."""

from collections.abc import Mapping
from typing import Any

NAMED_LOSSES = ("bce_with_logits", "cross_entropy", "mse", "l1", "huber", "poisson", "bce")
LOWER_IS_BETTER = frozenset(
    {"loss", "mse", "mae", "rmse", "mean_absolute_percentage_error", "hamming_distance", "calibration_error"}
)
HIGHER_IS_BETTER = frozenset(
    {"auroc", "accuracy", "f1", "fbeta", "precision", "recall", "average_precision", "r2", "specificity"}
    | {"cohen_kappa", "matthews_corrcoef", "jaccard_index", "explained_variance"}
    | {"pearson_corrcoef", "spearman_corrcoef"}
)


def loss_name(loss: Any) -> Any:
    """Return the name of a loss that is one of ours, and anything else as it is."""
    return loss["name"] if isinstance(loss, Mapping) else loss


def metric_name(metric: Any) -> str:
    """Return the name under which a metric stands in the history."""
    if isinstance(metric, Mapping):
        return str(metric.get("as") or metric_name(metric["name"]))
    if isinstance(metric, str):
        return metric.rpartition(":")[2].rpartition(".")[2]
    return getattr(metric, "__name__", type(metric).__name__)
