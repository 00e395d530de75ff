"""The canonical form of a job, whose digest outlives every version of sl_queue.

A key that the first version did not have is left out while it has its default, so that the digest of a job that does
not use it stays what it was: parties of two versions agree, and state folders go on.
"""

from typing import Any

from sl_queue.config.schema import Schema

FIRST = frozenset(  # the keys of the first version, which are in every canonical job
    {
        *("name", "seed", "epochs", "batch_size", "holdout", "shuffle", "drop_last"),
        *("parties", "parties.*.role", "parties.*.cut", "fuse", "fuse.aggregation"),
        *("pipeline", "pipeline.micro_batches", "pipeline.depth", "pipeline.staleness", "pipeline.checkpoint_every"),
        *("broker", "broker.persistent", "broker.patience", "broker.queues", "wire", "wire.dtype", "wire.compress"),
        *("early_stopping", "early_stopping.metric", "early_stopping.patience", "early_stopping.min_delta"),
        *("security", "security.seal", "security.cipher", "security.keys"),
        *("security.keys.*.seal", "security.keys.*.sign"),
    }
)


def canonical(table: Schema, values: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Return `values`, a table as JSON, without the later keys that have their defaults; `within` ends with a dot."""
    found = {}
    for name, field in type(table).model_fields.items():
        if name not in values:
            continue
        key, value = f"{within}{name}", getattr(table, name)
        if key not in FIRST and value == field.get_default(call_default_factory=True):
            continue
        found[field.alias or name] = _inner(value, values[name], key)
    return found


def _inner(value: Any, dumped: Any, key: str) -> Any:
    if isinstance(value, Schema):
        return canonical(value, dumped, f"{key}.")
    if isinstance(value, dict):  # of tables by name: of parties, of keys
        return {name: _inner(inner, dumped[name], f"{key}.*") for name, inner in value.items()}
    return dumped
