"""Every error sl_queue raises on purpose: the class says who acts, the exit code tells the supervisor.

    SlQueueError
    ├── JobError               2   a file or an argument is wrong; nothing was started
    ├── AlignmentError         3   the parties disagree before step 0: job, ids, cut
    ├── ProtocolError
    │   ├── RemoteProtocolError    3   a peer sent what it may not send
    │   └── LocalProtocolError    70   this program used the protocol wrongly: a bug in sl_queue
    ├── TransportError        75   the only code worth a restart
    │   ├── BrokerUnreachable      no connection, a refused login, a missing vhost
    │   ├── Unroutable             the broker has no queue for a message
    │   ├── PartyBusy              another worker already serves this party
    │   ├── PeerSilent             a party has not been heard of for too long
    │   └── ResourceShortage       this machine or process has no descriptors or memory left
    ├── CheckpointError        4   the state folder cannot be used or written
    ├── ComputeError           5   the model failed on its own data
    │   ├── ShapeError             a tensor does not have the shape of the cut layer
    │   └── NonFiniteError         NaN or infinity in a loss, an activation or a gradient
    ├── PeerFailed             6   another party failed, and ended the run with its reason
    └── RunStopped             0   the run ended on purpose before its last epoch

A message says what happened, where (party, micro-batch), what was expected, and what to do next.

The law: a code says what its own worker met. A party that fails ends with the code of its error, and with it every
other worker, the scheduler too, with PeerFailed, whatever that party said its error was. Parties that disagree before
step 0 all end with AlignmentError: nobody can tell which of them is wrong.
"""

from typing import ClassVar


class SlQueueError(Exception):
    """Any error that sl_queue raises on purpose."""

    exit_code: ClassVar[int] = 70


class JobError(SlQueueError):
    """A job file, party file or argument is wrong: names the key, the value and what is allowed."""

    exit_code = 2


class AlignmentError(SlQueueError):
    """The parties do not hold the same job or the same rows; found before step 0."""

    exit_code = 3


class ProtocolError(SlQueueError):
    """A message broke the protocol."""


class RemoteProtocolError(ProtocolError):
    """A peer sent a message that it may not send."""

    exit_code = 3


class LocalProtocolError(ProtocolError):
    """Wrong use of the protocol by this program: a bug in sl_queue, please report it."""

    exit_code = 70


class TransportError(SlQueueError):
    """The broker or a peer cannot be reached now; a restart may help."""

    exit_code = 75


class BrokerUnreachable(TransportError):
    """No connection to the broker could be made within the retries."""


class Unroutable(TransportError):
    """The broker returned a message because no queue is bound for it."""


class PartyBusy(TransportError):
    """Another worker already serves this party."""


class PeerSilent(TransportError):
    """A party that this worker waits for has not been heard of for too long."""


class ResourceShortage(TransportError):
    """The machine or this process has run out of file descriptors or memory: a restart frees them."""


class CheckpointError(SlQueueError):
    """The state folder belongs to another job, or a checkpoint cannot be written or read."""

    exit_code = 4


class ComputeError(SlQueueError):
    """A model, loss or optimizer failed."""

    exit_code = 5


class ShapeError(ComputeError):
    """A tensor does not have the shape or dtype that the cut layer promises."""


class NonFiniteError(ComputeError):
    """A loss, activation or gradient is NaN or infinite."""


class PeerFailed(SlQueueError):
    """Another party failed, and the run with it; when its cause is fixed, starting the workers again resumes it."""

    exit_code = 6


class RunStopped(SlQueueError):
    """The run was stopped on purpose; starting the workers again resumes it."""

    exit_code = 0


def _tree(error: type[SlQueueError]) -> dict[str, type[SlQueueError]]:
    found = {error.__name__: error}
    for child in error.__subclasses__():
        found |= _tree(child)
    return found


def named(name: str) -> type[SlQueueError]:
    """Return the error class of that name, or SlQueueError for one of a newer peer that is unknown here."""
    return _tree(SlQueueError).get(name, SlQueueError)


def failure(name: str) -> str:
    """Return the name of a party's error as it may be repeated: SlQueueError for what is no failure of its own.

    A stop, a connection to try again and the failure of yet another party are none.
    """
    no_failure = issubclass(named(name), RunStopped | PeerFailed | TransportError)
    return "SlQueueError" if no_failure else named(name).__name__
