"""The nodes of a broker, in turn, at the URL as it is now: a login that was changed is used by the next attempt."""

import logging
from collections.abc import Callable

from sl_queue.errors import JobError
from sl_queue.transport.rabbitmq.address import Address

log = logging.getLogger("sl_queue")


class Nodes:
    """The node to connect to next. Mutable: it remembers the URL and whose turn it is. Raises JobError for a bad URL.

    `again` gives the URL again before each attempt but the first; what cannot be read or used leaves the one before.
    """

    def __init__(self, url: str, again: Callable[[], str] | None = None) -> None:
        self._url, self._again = url, again
        self._nodes = Address.parse(url)
        self._turn, self._complaint = 0, ""

    @property
    def first(self) -> Address:
        """The node that the URL names first."""
        return self._nodes[0]

    def next(self) -> Address:
        """Return the node of the next attempt; blocks to read a file."""
        if self._again is not None and self._turn:
            self._refresh(self._again)
        self._turn += 1
        return self._nodes[(self._turn - 1) % len(self._nodes)]

    def _refresh(self, again: Callable[[], str]) -> None:
        try:
            url = again()
            if url == self._url:
                return
            nodes = Address.parse(url)
        except JobError as error:  # it is being written, perhaps
            if str(error) != self._complaint:
                log.warning("%s; going on with the broker's URL as it was", error)
            self._complaint = str(error)
            return
        self._url, self._nodes = url, nodes
        log.info("the broker's URL has changed; using it as it is now: %s", self)

    def __str__(self) -> str:
        return " or ".join(str(node) for node in self._nodes)
