"""Whether a job's messages fit the broker, and each login may do what it must and no more."""

from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from sl_queue.broker_url import split
from sl_queue.commands.findings import Check
from sl_queue.errors import BrokerUnreachable
from sl_queue.job import Job, PartyFile, redacted
from sl_queue.launch.broker import MEMORY, topology
from sl_queue.party_file import read_url
from sl_queue.protocol.codec import OVERHEAD_BYTES
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Payload
from sl_queue.protocol.row_order import Batches

MESSAGE_LIMIT_BYTES = 16 * 1024 * 1024  # what RabbitMQ 4 accepts by default, header included
MIB = 1024 * 1024


def message_sizes(check: Check, job: Job, payloads: Mapping[str, Payload], batches: Batches) -> None:
    rows = min(-(-job.batch_size // job.pipeline.micro_batches), batches.n_rows)
    for name in job.feature_parties:
        dtype = payloads[name].dtype if name in payloads else "float32"
        one, two = (job.on_the_wire.bytes_of(dtype, (n, *(job.cut(name) or ()))) for n in (1, 2))
        row_bytes = two - one  # where nothing can be left out
        size = rows * row_bytes + OVERHEAD_BYTES
        text = f"{name}: largest message {size / MIB:.2f} MiB ({rows} rows of {row_bytes} bytes and a header)"
        if size <= MESSAGE_LIMIT_BYTES:
            check.ok(f"{text}; RabbitMQ 4 accepts 16 MiB by default")
            continue
        fitting = (MESSAGE_LIMIT_BYTES - OVERHEAD_BYTES) // row_bytes
        advice = f"micro_batches = {-(-job.batch_size // fitting)} fits" if fitting else "one row alone is too large"
        check.warn(f"{text}; RabbitMQ 4 refuses more than 16 MiB unless max_message_size is raised; {advice}")


def _names(check: Check, job: Job, broker: str) -> None:
    """What each role writes to and reads from."""
    names = topology(job, broker)
    for role in (SCHEDULER, *job.parties):
        queues = ", ".join(names.queue(role, sender) for sender in names.senders_to(role))
        check.note(f"{role}: writes to exchange {names.exchange(role)}, reads queues {queues}")


def brokers(check: Check, job: Job, files: Sequence[PartyFile], broker: str | None) -> None:
    """Whether every broker that is named can be reached, and whether each login may do what it must and no more."""
    given = check.attempt(lambda: _given(job, broker, files)) if broker else None
    logins = [given] if given is not None else [] if broker else _logins(check, files)
    network = [(url, role) for url, role in logins if not url.startswith(MEMORY)]
    for url, role in network:
        check.attempt(lambda url=url, role=role: _rights(check, job, url, role))  # type: ignore[misc]
    for url in sorted({url for url, _ in network}) or [MEMORY]:
        _names(check, job, url)


def _logins(check: Check, files: Sequence[PartyFile]) -> list[tuple[str, str]]:
    """The broker of each party file that names one, and as whom it logs in there."""
    named = [file for file in files if file.broker]
    urls = [(check.attempt(file.broker_url), file.party) for file in named]
    return [(url, party) for url, party in urls if url is not None]


def _given(job: Job, broker: str, files: Sequence[PartyFile]) -> tuple[str, str]:
    """Read the broker's URL, and tell whose login it is. Raises JobError."""
    url = read_url(broker)
    return url, OPERATOR if url.startswith(MEMORY) else _role(job, url, files)


def _role(job: Job, url: str, files: Sequence[PartyFile]) -> str:
    """Whose login it is: users are named after job and role, or it is that of the one party at hand."""
    user = unquote(split(url).username or "")
    role = user.removeprefix(f"{job.name}.")
    if role != user and role in (*job.parties, SCHEDULER):
        return role
    return files[0].party if len(files) == 1 else OPERATOR


def _rights(check: Check, job: Job, url: str, role: str) -> None:
    from sl_queue.transport.rabbitmq.rights import try_rights  # a check without a broker loads no pika

    rights = try_rights(url, role, topology(job, url))
    check.ok(f"broker {redacted(url)}: reached, login accepted, tried as {role}")
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
