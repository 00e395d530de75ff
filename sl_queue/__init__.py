"""Split learning over a message queue: organisations train one PyTorch model without moving a column."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sl_queue.checking.check import check
    from sl_queue.checking.findings import Finding
    from sl_queue.compute.splitting.split import Split, split
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.data.spec import Rows
    from sl_queue.data.table import holdout_rows, test_rows
    from sl_queue.errors import (
        AlignmentError,
        BrokerUnreachable,
        CheckpointError,
        ComputeError,
        JobError,
        LocalProtocolError,
        NonFiniteError,
        PartyBusy,
        PeerFailed,
        PeerSilent,
        ProtocolError,
        RemoteProtocolError,
        RunStopped,
        ShapeError,
        SlQueueError,
        TransportError,
        Unroutable,
    )
    from sl_queue.local.history import History
    from sl_queue.local.threads import Result, run_local
    from sl_queue.protocol.schedule.row_order import row_order
    from sl_queue.split_model import SplitModel

__all__ = [
    "AlignmentError",
    "BrokerUnreachable",
    "CheckpointError",
    "ComputeError",
    "Finding",
    "History",
    "Job",
    "JobError",
    "LocalProtocolError",
    "NonFiniteError",
    "PartyBusy",
    "PartyFile",
    "PeerFailed",
    "PeerSilent",
    "ProtocolError",
    "RemoteProtocolError",
    "Result",
    "Rows",
    "RunStopped",
    "ShapeError",
    "SlQueueError",
    "Split",
    "SplitModel",
    "TransportError",
    "Unroutable",
    "check",
    "holdout_rows",
    "row_order",
    "run_local",
    "split",
    "test_rows",
]

_HOMES = {
    "Finding": "checking.findings",
    "History": "local.history",
    "SplitModel": "split_model",
    "check": "checking.check",
    "Job": "config.job",
    "PartyFile": "config.job",
    "Result": "local.threads",
    "Rows": "data.spec",
    "holdout_rows": "data.table",
    "test_rows": "data.table",
    "row_order": "protocol.schedule.row_order",
    "Split": "compute.splitting.split",
    "run_local": "local.threads",
    "split": "compute.splitting.split",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used, so that the protocol can be imported without torch and pika."""
    if name not in __all__:
        raise AttributeError(f"module 'sl_queue' has no attribute {name!r}")
    return getattr(import_module(f"sl_queue.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
