"""Names of losses and metrics, as party files and histories have them; needs no torch."""

from collections.abc import Mapping
from typing import Any

NAMED_LOSSES = ("bce_with_logits", "cross_entropy", "mse", "l1", "huber", "poisson", "bce")
LOWER_IS_BETTER = frozenset(
    {"loss", "mse", "mae", "rmse", "mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error"}
    | {"symmetric_mean_absolute_percentage_error", "weighted_mean_absolute_percentage_error", "mean_squared_log_error"}
    | {"normalized_root_mean_squared_error", "relative_squared_error", "log_cosh_error", "minkowski_distance"}
    | {"kl_divergence", "jensen_shannon_divergence", "continuous_ranked_probability_score", "tweedie_deviance_score"}
    | {"hamming_distance", "calibration_error", "hinge_loss", "eer"}
)
HIGHER_IS_BETTER = frozenset(
    {"auroc", "accuracy", "f1", "fbeta", "precision", "recall", "average_precision", "r2", "specificity"}
    | {"cohen_kappa", "matthews_corrcoef", "jaccard_index", "explained_variance", "logauc", "exact_match"}
    | {"pearson_corrcoef", "spearman_corrcoef", "concordance_corrcoef", "kendall_rank_corrcoef", "cosine_similarity"}
    | {"negative_predictive_value", "critical_success_index"}
)


def is_lower_better(name: str) -> bool | None:
    """Say whether a metric, in any spelling of its name, is better the lower it is; None if that is not known."""
    plain = plain_name(name).removesuffix("score")
    for names, lower in ((LOWER_IS_BETTER, True), (HIGHER_IS_BETTER, False)):
        if plain in {plain_name(known).removesuffix("score") for known in names}:
            return lower
    return None


def plain_name(name: str) -> str:
    """Return the name of a metric without underscores, in lower case."""
    return name.replace("_", "").lower()


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
