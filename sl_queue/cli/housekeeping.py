"""Housekeeping by an operator: dead letters at the broker, and what a job left behind. In words for people."""

from collections.abc import Iterator, Mapping, Sequence

from sl_queue.config.job import Job
from sl_queue.errors import JobError, PartyBusy
from sl_queue.launch.connect import require_network, topology
from sl_queue.protocol.text import nearest
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.housekeeping import (
    Back,
    DeadLetter,
    Housekeeping,
    NotAllowed,
    Remains,
    readers,
    roles,
    senders,
)

MOST_REASONS = 20  # of a party, that are listed
REASON_LENGTH = 200

Letters = Mapping[str, list[DeadLetter] | NotAllowed]  # by role, or why its queue cannot be read


def parties_of(job: Job, chosen: Sequence[str]) -> tuple[str, ...]:
    """Return the roles that were asked for, or all of them. Raises JobError for an unknown name."""
    known = (*job.parties, *(role for role in roles(job.topology()) if role not in job.parties))
    for name in chosen:
        if name not in known:
            advice = nearest(name, list(known))
            raise JobError(f"PARTY = {name!r}: there is no such party; {advice}it must be {', '.join(known)}")
    return tuple(chosen) or known


def read_dead(job: Job, broker: str, parties: Sequence[str]) -> Letters:
    """Read the dead letters of each party; they stay where they are. Raises NotAllowed if this login can read none."""
    found: dict[str, list[DeadLetter] | NotAllowed] = {}
    with _at(job, broker) as house:
        for party in parties:
            try:
                found[party] = house.dead_letters(party)
            except NotAllowed as error:
                found[party] = error
    refused = [letters for letters in found.values() if isinstance(letters, NotAllowed)]
    if refused and not any(isinstance(letters, list) and letters for letters in found.values()):
        raise refused[0]
    return found


def describe_dead(job: Job, broker: str, found: Letters, now: float) -> Iterator[str]:
    """Yield a line for each party, and one for each sender and reason."""
    names = topology(job, broker)
    for party, letters in found.items():
        if isinstance(letters, NotAllowed):
            yield f"{party}: cannot be read: {letters}"
            continue
        yield f"{party}: {_count(len(letters), 'dead letter')} in {names.dead_letters(party)}"
        yield from _reasons(names, party, letters, now)


def _reasons(names: Topology, party: str, letters: Sequence[DeadLetter], now: float) -> Iterator[str]:
    groups: dict[tuple[str, str], list[DeadLetter]] = {}
    for letter in letters:
        groups.setdefault((letter.queue, letter.reason), []).append(letter)
    known = senders(names, party)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    for (queue, reason), same in largest[:MOST_REASONS]:
        ages = [max(0.0, now - letter.at) for letter in same if letter.at is not None]
        age = f", {_span(min(ages))} to {_span(max(ages))} old" if ages else ""
        cut = sum(not letter.is_whole for letter in same)
        shortened = f", {cut} shortened" if cut else ""
        yield f"  {len(same)} from {known.get(queue, 'nobody known')}{age}{shortened}: {plain(reason)}"
    if len(largest) > MOST_REASONS:
        rest = sum(len(same) for _, same in largest[MOST_REASONS:])
        yield f"  {rest} for {len(largest) - MOST_REASONS} other reasons"


def plain(text: str) -> str:
    """Make a peer's text one line of printable characters, cut to a length that a person reads."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= REASON_LENGTH else f"{shown[:REASON_LENGTH]}..."


def put_back(job: Job, broker: str, parties: Sequence[str]) -> Iterator[str]:
    """Put dead letters back to where they came from; yields a line for each party."""
    with _at(job, broker) as house:
        for party in parties:
            back = house.put_back(party)
            yield f"{party}: {_count(back.count, 'message')} put back"
            yield from _left(back)


def _left(back: Back) -> Iterator[str]:
    for why, count in back.left.items():
        yield f"  {count} stay: they {why}"


def purge_dead(job: Job, broker: str, parties: Sequence[str]) -> Iterator[str]:
    """Remove dead letters; yields a line for each party."""
    with _at(job, broker) as house:
        for party in parties:
            yield f"{party}: {_count(house.purge(party), 'dead letter')} removed"


def find_remains(job: Job, broker: str, *, force: bool) -> Remains:
    """List what the broker has of the job. Raises PartyBusy while somebody reads its queues, unless `force`."""
    with _at(job, broker) as house:
        remains = house.remains()
    connected = readers(topology(job, broker), remains.queues)
    if connected and not force:
        raise PartyBusy(
            f"still connected: {', '.join(connected)}; stop the run first (sl-queue stop), or give --force: what is in "
            "the queues is lost then, and running workers declare them again"
        )
    return remains


def describe_remains(job: Job, broker: str, remains: Remains) -> Iterator[str]:
    """Yield a line for each queue and exchange that would be removed."""
    if not (remains.queues or remains.exchanges):
        yield f"nothing of job {job.name!r} is at that broker"
        return
    yield f"of job {job.name!r}:"
    for queue in remains.queues:
        read = f", read by {queue.consumers}" if queue.consumers else ""
        yield f"  queue {queue.name}: {_count(queue.messages, 'message')}{read}"
    for exchange in remains.exchanges:
        yield f"  exchange {exchange}"


def remove_remains(job: Job, broker: str, remains: Remains, *, force: bool) -> str:
    """Remove it and say what was removed. Raises PartyBusy if a worker has come meanwhile."""
    with _at(job, broker) as house:
        house.remove(remains, in_use=force)
    messages = _count(sum(queue.messages for queue in remains.queues), "message")
    queues, exchanges = _count(len(remains.queues), "queue"), _count(len(remains.exchanges), "exchange")
    return f"removed {queues} with {messages}, and {exchanges}"


def _at(job: Job, broker: str) -> Housekeeping:
    require_network(broker)
    return Housekeeping(broker, topology(job, broker))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _span(seconds: float) -> str:
    for unit_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"
