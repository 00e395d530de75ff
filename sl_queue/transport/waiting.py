"""Waits as events."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sl_queue.protocol.events import Observer, WaitBegan, Waited
from sl_queue.protocol.messages import MicroBatch


@contextmanager
def waiting(
    observe: Observer,
    party: str,
    source: str,
    cause: str,
    micro_batch: MicroBatch | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Tell an observer that the body is a wait of `party` for `source`."""
    observe(WaitBegan(party, source, cause))
    began = clock()
    try:
        yield
    finally:
        where = () if micro_batch is None else (micro_batch.step, micro_batch.index)
        observe(Waited(party, source, cause, clock() - began, *where))
