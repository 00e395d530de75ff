"""Definitions of a job for its broker: users with the least rights, exchanges, queues, bindings and limits.

The format is RabbitMQ's own (`rabbitmqctl import_definitions`). A party may configure nothing, write to its own
exchange with its own routing keys, and read its own queues. All of it is in a virtual host of the job, so that no
right reaches another job.
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from typing import Any

from sl_queue.config.job import Job
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.names import dead_letter_arguments, inbox_arguments

NOTHING = "^$"  # a pattern that no name matches
QUEUE_BYTES = 512 * 1024 * 1024  # ready in one queue; then its sender has to wait
QUEUE_MESSAGES = 100_000
CONNECTIONS_PER_USER = 4  # one, and those that the broker has not yet noticed to be gone
CHANNELS_PER_CONNECTION = 128

_SALT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rights:
    """Regular expressions of what a user may configure, write and read, and with which keys it may publish."""

    configure: str
    write: str
    read: str
    exchange: str
    keys: str


def roles(job: Job) -> tuple[str, ...]:
    """Return everybody who has a login, keys and a folder of their own."""
    return (*job.parties, SCHEDULER, OPERATOR)


def user_of(job: Job, role: str) -> str:
    """Return the name with which a role logs in; users are the broker's, so the job's name stands before it."""
    return f"{job.name}.{role}"


def rights_of(topology: Topology, role: str) -> Rights:
    """Return the least rights that a role needs."""
    exchange = topology.exchange(role)
    queues = [topology.queue(role, sender) for sender in topology.senders_to(role)]
    keys = [
        rf"[^.]+\.({'|'.join(sorted(topology.kinds_between(role, receiver)))})\.{re.escape(receiver)}"
        for receiver in topology.receivers_of(role)
    ]
    return Rights(
        configure=NOTHING,
        write=_any_of([exchange]),
        read=_any_of([*queues, topology.dead_letters(role)]),
        exchange=exchange,
        keys=f"^({'|'.join([*keys, rf'rejected[.]dead[.]{re.escape(role)}'])})$",
    )


def definitions(job: Job, password_hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the broker's side of a job, ready for JSON. `password_hashes`: by role, as `hashed` makes them."""
    names, vhost = job.topology(), job.name
    inboxes = [(receiver, sender) for receiver in roles(job) for sender in names.senders_to(receiver)]
    kind = job.broker.queues
    queues = [_queue(vhost, names.queue(r, s), inbox_arguments(r, kind)) for r, s in inboxes]
    dead = [_queue(vhost, names.dead_letters(role), dead_letter_arguments(kind)) for role in roles(job)]
    bindings = [_binding(vhost, names.exchange(s), names.queue(r, s), names.binding_key(r)) for r, s in inboxes]
    bindings += [
        _binding(vhost, names.dead_exchange(role), names.dead_letters(role), f"*.dead.{role}") for role in roles(job)
    ]
    return {
        "vhosts": [{"name": vhost}],
        "users": [user_entry(user_of(job, role), password_hashes[role]) for role in roles(job)],
        "permissions": [_permission(job, vhost, role) for role in roles(job)],
        "topic_permissions": [_topic_permission(job, vhost, role) for role in roles(job)],
        "parameters": [_vhost_limits(vhost, users=len(roles(job)), queues=len(queues) + len(dead))],
        "policies": [_limits_policy(vhost, names)],
        "exchanges": [_exchange(vhost, names.exchange(role)) for role in roles(job)],
        "queues": [*queues, *dead],
        "bindings": bindings,
    }


def hashed(password: str, salt: bytes) -> str:
    """Hash a password as RabbitMQ keeps it: 4 bytes of salt, then SHA-256 of salt and password."""
    assert len(salt) == _SALT_BYTES
    return b64encode(salt + sha256(salt + password.encode()).digest()).decode()


def is_hash_of(password: str, password_hash: str) -> bool:
    """Return True if `hashed` made this of that password."""
    salt = b64decode(password_hash)[:_SALT_BYTES]
    return compare_digest(hashed(password, salt), password_hash)


def _any_of(names: Sequence[str]) -> str:
    return f"^({'|'.join(map(re.escape, names))})$"


def user_entry(name: str, password_hash: str) -> dict[str, Any]:
    return {
        "name": name,
        "password_hash": password_hash,
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": [],
        "limits": {
            "max-connections": CONNECTIONS_PER_USER,
            "max-channels": CONNECTIONS_PER_USER * CHANNELS_PER_CONNECTION,
        },
    }


def _permission(job: Job, vhost: str, role: str) -> dict[str, Any]:
    rights = rights_of(job.topology(), role)
    patterns = {"configure": rights.configure, "write": rights.write, "read": rights.read}
    return {"user": user_of(job, role), "vhost": vhost, **patterns}


def _topic_permission(job: Job, vhost: str, role: str) -> dict[str, Any]:
    rights = rights_of(job.topology(), role)
    where = {"user": user_of(job, role), "vhost": vhost, "exchange": rights.exchange}
    return {**where, "write": rights.keys, "read": NOTHING}


def _vhost_limits(vhost: str, *, users: int, queues: int) -> dict[str, Any]:
    value = {"max-connections": users * CONNECTIONS_PER_USER, "max-queues": queues}
    return {"vhost": vhost, "component": "vhost-limits", "name": "limits", "value": value}


def _limits_policy(vhost: str, names: Topology) -> dict[str, Any]:
    """Limit the queues of senders, which a flood fills alone; those of dead letters and the operator have their own."""
    inboxes = rf"^{re.escape(names.prefix)}q\.(?!{OPERATOR}\.)[^.]+\.(?!dead$)[^.]+$"
    limits = {"max-length-bytes": QUEUE_BYTES, "max-length": QUEUE_MESSAGES, "overflow": "reject-publish"}
    return {
        "vhost": vhost,
        "name": "limits",
        "pattern": inboxes,
        "apply-to": "queues",
        "priority": 0,
        "definition": limits,
    }


def _exchange(vhost: str, name: str) -> dict[str, Any]:
    kept = {"durable": True, "auto_delete": False, "internal": False, "arguments": {}}
    return {"name": name, "vhost": vhost, "type": "topic", **kept}


def _queue(vhost: str, name: str, arguments: Mapping[str, str | int]) -> dict[str, Any]:
    return {"name": name, "vhost": vhost, "durable": True, "auto_delete": False, "arguments": dict(arguments)}


def _binding(vhost: str, exchange: str, queue: str, key: str) -> dict[str, Any]:
    destination = {"destination": queue, "destination_type": "queue"}
    return {"source": exchange, "vhost": vhost, **destination, "routing_key": key, "arguments": {}}
