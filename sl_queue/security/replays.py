"""Statements about the moment that were made before, kept apart from those that are new."""

from collections import OrderedDict, defaultdict

from sl_queue.security.sealing import PROCESSES, Opened, Seal


class ReplayFilter:
    """Tells a statement about the moment from one that was said before. Mutable: it remembers the latest of each.

    It remembers the newest processes of each sender only. So that nothing of a forgotten one counts as new, this
    process then becomes another one to that sender, and believes only who has heard of it.
    """

    def __init__(self, seal: Seal | None = None) -> None:
        self._seal = seal
        self._latest: defaultdict[str, OrderedDict[bytes, dict[str, int]]] = defaultdict(OrderedDict)
        self._wary: set[str] = set()  # senders of whom a process was forgotten

    def is_new(self, opened: Opened, subject: str) -> bool:
        """Return True if this is later than all that the same process said about the subject; then remember it."""
        sender, processes = opened.sender, self._latest[opened.sender]
        known = processes.get(opened.process)
        if known is None:
            if sender in self._wary and not opened.fresh:
                return False
            known = processes[opened.process] = {}
            self._forget_oldest(sender, processes)
        processes.move_to_end(opened.process)
        if opened.sequence <= known.get(subject, -1):
            return False
        known[subject] = opened.sequence
        return True

    def _forget_oldest(self, sender: str, processes: OrderedDict[bytes, dict[str, int]]) -> None:
        if len(processes) > PROCESSES:
            processes.popitem(last=False)
            self._wary.add(sender)
            if self._seal is not None:
                self._seal.renew(sender)

    def forget(self) -> None:
        """Forget everything: what was not acknowledged comes again, and is to be taken again."""
        self._latest.clear()
