"""Checks at the broker: a job's messages fit it, and each login may do what it must and no more."""

import time
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from sl_queue.checking.findings import Check
from sl_queue.config.broker_url import read_url
from sl_queue.config.job import Job, PartyFile, redacted
from sl_queue.errors import BrokerUnreachable
from sl_queue.launch.connect import MEMORY, topology
from sl_queue.protocol.broker_url import split
from sl_queue.protocol.codec import OVERHEAD_BYTES
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Payload
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.text import counted, size

MESSAGE_LIMIT_BYTES = 16 * 1024 * 1024  # what RabbitMQ 4 accepts by default, header included
DAY_S = 24 * 3600
SOON_DAYS = 30
CERTIFICATES = {
    "broker": "the broker's certificate",
    "own": "the certificate of this login (certfile)",
    "authority": "the authority's certificate (cacertfile)",
}


def message_sizes(check: Check, job: Job, payloads: Mapping[str, Payload], batches: Batches) -> None:
    rows = min(-(-job.batch_size // job.pipeline.micro_batches), batches.n_rows)
    for name in job.feature_parties:
        dtype = payloads[name].dtype if name in payloads else "float32"
        one, two = (job.on_the_wire.bytes_of(dtype, (n, *(job.cut(name) or ()))) for n in (1, 2))
        row_bytes = two - one  # where nothing can be left out
        n_bytes = rows * row_bytes + OVERHEAD_BYTES
        held = counted(rows, "row", "rows")
        text = f"{name}: largest message {size(n_bytes)} ({held} of {row_bytes} bytes and a header)"
        if n_bytes <= MESSAGE_LIMIT_BYTES:
            check.ok(f"{text}; RabbitMQ 4 accepts 16 MiB by default")
            continue
        fitting = (MESSAGE_LIMIT_BYTES - OVERHEAD_BYTES) // row_bytes
        advice = f"micro_batches = {-(-job.batch_size // fitting)} fits" if fitting else "one row alone is too large"
        check.warn(f"{text}; RabbitMQ 4 refuses more than 16 MiB unless max_message_size is raised; {advice}")


def _names(check: Check, job: Job, broker: str) -> None:
    """List the exchanges that each role writes to and the queues it reads."""
    names = topology(job, broker)
    for role in (SCHEDULER, *job.parties):
        queues = ", ".join(names.queue(role, sender) for sender in names.senders_to(role))
        check.detail(f"{role}: writes to exchange {names.exchange(role)}, reads queues {queues}")


def brokers(check: Check, job: Job, files: Sequence[PartyFile], broker: str | None) -> None:
    """Check that every named broker can be reached, and that each login may do what it must and no more."""
    given = check.attempt(lambda: _given(job, broker, files)) if broker else None
    logins = [given] if given is not None else [] if broker else _logins(check, files)
    network = [(url, role) for url, role in logins if not url.startswith(MEMORY)]
    for url, role in network:
        check.attempt(lambda url=url, role=role: _rights(check, job, url, role))  # type: ignore[misc]
    for url in sorted({url for url, _ in network}) or [MEMORY]:
        _names(check, job, url)


def _logins(check: Check, files: Sequence[PartyFile]) -> list[tuple[str, str]]:
    """Return the broker of each party file that names one, and as whom it logs in there."""
    named = [file for file in files if file.broker]
    urls = [(check.attempt(file.broker_url), file.party) for file in named]
    return [(url, party) for url, party in urls if url is not None]


def _given(job: Job, broker: str, files: Sequence[PartyFile]) -> tuple[str, str]:
    """Read the broker's URL, and tell whose login it is. Raises JobError."""
    url = read_url(broker)
    return url, OPERATOR if url.startswith(MEMORY) else _role(job, url, files)


def _role(job: Job, url: str, files: Sequence[PartyFile]) -> str:
    """Return the role that logs in: users are named after job and role, or it is that of the one party at hand."""
    user = unquote(split(url).username or "")
    role = user.removeprefix(f"{job.name}.")
    if role != user and role in (*job.parties, SCHEDULER):
        return role
    return files[0].party if len(files) == 1 else OPERATOR


def _rights(check: Check, job: Job, url: str, role: str) -> None:
    from sl_queue.transport.rabbitmq.names import channels_needed
    from sl_queue.transport.rabbitmq.rights import try_rights  # a check without a broker loads no pika

    names = topology(job, url)
    rights = try_rights(url, role, names)
    check.ok(f"broker {redacted(url)}: reached, login accepted, tried as {role}")
    if split(url).scheme == "amqps":
        check.attempt(lambda: _certificates(check, url))
    if not rights.heartbeat_s:
        check.warn("heartbeat = 0 in the broker's URL: dead connections go unnoticed; remove it")
    needed = channels_needed(names, role)
    if 0 < rights.channels < needed:
        raise BrokerUnreachable(
            f"{role} needs {needed} channels in its connection, the broker allows {rights.channels}: set channel_max = "
            f"{needed} or more in its rabbitmq.conf"
        )
    if rights.too_wide:
        check.warn(
            f"{role}'s login can do more than it needs: {', '.join(rights.too_wide)}; `sl-queue provision` writes "
            "logins with the least rights"
        )
    if rights.missing:
        raise BrokerUnreachable(
            f"{role}'s login lacks rights: {', '.join(rights.missing)}; import the definitions that `sl-queue "
            "provision` wrote"
        )


def _certificates(check: Check, url: str) -> None:
    """Say for how many days each certificate is valid, and warn of those that end soon."""
    from sl_queue.transport.rabbitmq.certificates import try_expiry

    for whose, ends in try_expiry(url).items():
        days = int((ends - time.time()) // DAY_S)
        text = f"{CERTIFICATES[whose]} is valid for {days} days"
        if days >= SOON_DAYS:
            check.ok(text)
        else:
            check.warn(f"{text}; renew it: `sl-queue provision` does, from {SOON_DAYS} days before the end")
