"""The names at the broker: one topic exchange per sender, one queue per (receiver, sender).

So rights, prefetch and back-pressure are per party: party P writes to `x.P`, reads from `q.P.*`, and nothing else.
"""

from dataclasses import dataclass

from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Kind, Role, kinds_between


@dataclass(frozen=True, slots=True)
class Topology:
    """All exchanges, queues and bindings of one job."""

    label_holder: str
    feature_parties: tuple[str, ...]
    prefix: str = ""  # "credit." where several jobs share a virtual host

    def exchange(self, sender: str) -> str:
        """Return the exchange to which `sender` publishes everything."""
        return f"{self.prefix}x.{sender}"

    def queue(self, receiver: str, sender: str) -> str:
        """Return the queue that `receiver` reads of `sender`."""
        return f"{self.prefix}q.{receiver}.{sender}"

    def dead_letters(self, party: str) -> str:
        """Return the queue in which what `party` refused lies until an operator has looked."""
        return f"{self.prefix}q.{party}.dead"

    def dead_exchange(self, party: str) -> str:
        """Return the exchange through which `party` refuses: its own, so that no further right is needed."""
        return self.exchange(party)

    def senders_to(self, receiver: str) -> tuple[str, ...]:
        """Return those whose messages `receiver` consumes; the first queue serves as the lock of the party."""
        return tuple(s for s in (SCHEDULER, *self.parties, OPERATOR) if self.kinds_between(s, receiver))

    def receivers_of(self, sender: str) -> tuple[str, ...]:
        """Return those to whom `sender` publishes."""
        return tuple(r for r in (SCHEDULER, OPERATOR, *self.parties) if r != sender and sender in self.senders_to(r))

    def kinds_between(self, sender: str, receiver: str) -> frozenset[Kind]:
        """Return what the one may send the other."""
        return kinds_between(self.role_of(sender), self.role_of(receiver))

    def role_of(self, name: str) -> Role:
        """Return what somebody is in this job."""
        if name in (SCHEDULER, OPERATOR):
            return Role(name)
        return Role.LABEL_HOLDER if name == self.label_holder else Role.FEATURE_PARTY

    @property
    def parties(self) -> tuple[str, ...]:
        return (self.label_holder, *self.feature_parties)

    @staticmethod
    def routing_key(run: str, kind: Kind, receiver: str) -> str:
        """Return `<run>.<kind>.<receiver>`; before a run has a name, the run is `new`."""
        return f"{run or 'new'}.{kind}.{receiver}"

    @staticmethod
    def binding_key(receiver: str) -> str:
        """Return the key of every run and kind for that receiver: queues outlive runs, headers tell these apart."""
        return f"*.*.{receiver}"
