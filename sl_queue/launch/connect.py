"""Connections of every role to the outside: a link to the broker, a key, and a way to end all at once."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from sl_queue.config.environment import KEY
from sl_queue.config.job import Job, PartyFile
from sl_queue.errors import JobError, SlQueueError
from sl_queue.protocol.broker_url import split
from sl_queue.protocol.topology import Topology
from sl_queue.security.hpke import Cipher
from sl_queue.security.keys import PublicKey, read_key
from sl_queue.security.sealing import Seal
from sl_queue.transport.alignment_channel import LinkAlignmentChannel
from sl_queue.transport.link import Link
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.retry import Limits
from sl_queue.transport.scheduler_channel import LinkSchedulerChannel

MEMORY = "memory://"

Channel = PartyChannel | LinkSchedulerChannel | LinkAlignmentChannel


class Connect(Protocol):
    """Makes links to a broker."""

    def __call__(self, party: str, prefetch: int, *, confirms: bool = True) -> Link:
        """Return the link of a party; one without `confirms` may lose with a connection what it published."""


def topology(job: Job, broker: str) -> Topology:
    """Return the names at that broker: its default virtual host is shared, so the job's name begins each name."""
    vhost = "" if broker == MEMORY else unquote(split(broker).path[1:]) or "/"
    return job.topology(prefix=f"{job.name}." if vhost == "/" else "")


def connector(job: Job, broker: str, limits: Limits = Limits(), again: Callable[[], str] | None = None) -> Connect:
    """Return what connects parties to the broker at that URL; `limits`: for how long, `again`: reads the URL again."""
    if broker == MEMORY:
        from sl_queue.transport.memory import MemoryBroker  # a run over RabbitMQ does without

        memory = MemoryBroker()
        return lambda party, prefetch, **_: memory.link(party, topology(job, broker), prefetch)
    from sl_queue.transport.rabbitmq.link import RabbitLink  # a run over memory loads no pika

    def connect(party: str, prefetch: int, *, confirms: bool = True) -> Link:
        names, queue_type = topology(job, broker), job.broker.queues
        sure = confirms or queue_type == "quorum"  # a channel that refuses for ever is known by what it refuses
        return RabbitLink(
            broker, party, names, prefetch, queue_type=queue_type, limits=limits, again=again, confirms=sure
        )

    return connect


def sealing(job: Job, role: str, key: Path | None, broker: str) -> Seal | None:
    """Return the seal of a role's messages; None if the job asks for none, or if they never leave this process.

    `key` is the file with its private key. Raises JobError without one, AlignmentError if it is not the job's.
    """
    if not job.security.seal or broker == MEMORY:
        return None
    if key is None:
        raise JobError(
            f"the job says seal = true, so {role!r} needs its private key: give --key FILE, set {KEY.name}, or write "
            'key = "FILE" under [security] into its party file'
        )
    keys = {name: PublicKey.parse(keys.seal, keys.sign) for name, keys in job.security.keys.items()}
    return Seal(role, read_key(key), keys, Cipher(job.security.cipher))


def key_file(option: Path | None, party_file: PartyFile | None = None) -> Path | None:
    """Return where a private key lies: `option`, else SL_QUEUE_KEY, else as the party's file says."""
    if option is not None:
        return option
    if given := KEY.read():
        return Path(given)
    return None if party_file is None or party_file.security is None else party_file.security.key


def require_network(url: str) -> None:
    """Raise JobError for memory://, which does not reach beyond one process."""
    if url.startswith(MEMORY):
        raise JobError("a worker in a process of its own needs amqp:// or amqps://; memory:// is for `sl-queue local`")


class Channels:
    """The channels of the roles in this process, to end them all when one role cannot go on. Mutable, thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Channel] = []
        self._error: SlQueueError | None = None

    def add(self, channel: Channel) -> None:
        with self._lock:
            self._open.append(channel)
            error = self._error
        if error is not None:
            channel.fail(error)

    def fail(self, error: SlQueueError) -> None:
        """Raise `error` at whoever waits at a channel now, or opens one later."""
        with self._lock:
            self._error = error
            channels = list(self._open)
        for channel in channels:
            channel.fail(error)
