"""Loads on a service: one client, many that ask again as soon as they are answered, and a steady rate."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import numpy as np

Call = Callable[[], None]

TURN = 20  # requests, or bare round trips, in a row


def in_turns(ours: Call, bare: Call, turns: int) -> tuple[list[float], list[float]]:
    """Return seconds of each call of ours and of each bare trip, after a turn that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for call, found in zip((ours, bare), seconds, strict=True):
            for _ in range(TURN):
                began = time.perf_counter()
                call()
                if turn:
                    found.append(time.perf_counter() - began)
    return seconds


def many(ask: Callable[[], "Future[Any]"], clients: int, requests: int) -> float:
    """Return answers a second to so many clients, each of which asks again when it is answered."""
    left, done = itertools.count(1), SimpleQueue[None]()

    def again(future: "Future[Any] | None") -> None:
        if future is not None:
            future.result()
        if next(left) <= requests:
            ask().add_done_callback(again)
        else:
            done.put(None)

    began = time.perf_counter()
    for _ in range(clients):
        again(None)
    for _ in range(clients):
        done.get(timeout=120)
    return requests / (time.perf_counter() - began)


def at_rate(ask: Callable[[], "Future[Any]"], rate: float, requests: int) -> tuple[list[float], float]:
    """Ask at random moments, so many times a second on average, whether answers come or not.

    Returns the seconds of each answer since its moment, and how many a second were asked.
    """
    began = time.perf_counter()
    due = began + np.cumsum(np.random.default_rng(3).exponential(1 / rate, requests))
    found, done = [], SimpleQueue[None]()

    def note(at: float) -> Callable[["Future[Any]"], None]:
        def noted(future: "Future[Any]") -> None:
            future.result()
            found.append(time.perf_counter() - at)
            done.put(None)

        return noted

    for at in due:
        while (left := at - time.perf_counter()) > 0:
            time.sleep(left)
        ask().add_done_callback(note(at))
    asked = requests / (time.perf_counter() - began)
    for _ in range(requests):
        done.get(timeout=120)
    return found, asked
