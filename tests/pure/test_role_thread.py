"""Roles of this process are waited for until they have ended, whoever is interrupted meanwhile."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType

import pytest

from sl_queue.local.role_thread import RoleThread, run_all


@pytest.fixture
def interrupting() -> Iterator[int]:
    """Yield a signal that interrupts the main thread as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


def test_who_is_interrupted_while_waiting_waits_for_every_thread_to_end(interrupting: int) -> None:
    told, ended = threading.Event(), list[str]()

    def work(name: str) -> None:
        if name == "last":
            os.kill(os.getpid(), interrupting)
        told.wait(60)
        time.sleep(0.2)  # what it was at when it was told takes its time
        ended.append(name)

    threads = [RoleThread(partial(work, name)) for name in ("first", "second", "last")]
    with pytest.raises(KeyboardInterrupt):
        run_all(threads, interrupted=told.set)
    assert sorted(ended) == ["first", "last", "second"]


def test_threads_that_cannot_be_started_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", refuse)
    told = threading.Event()
    with pytest.raises(RuntimeError, match="can't start"):
        run_all([RoleThread(lambda: None), RoleThread(lambda: None)], interrupted=told.set)
    assert told.is_set()
