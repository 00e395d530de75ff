"""Processes that have imported torch already: each is a fork of one that did nothing else."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

Work = tuple[Callable[..., Any], tuple[Any, ...]]

_context = multiprocessing.get_context("forkserver")


def cores() -> int:
    """Count the cores that processes may use; fewer than the machine's below `taskset`."""
    return len(os.sched_getaffinity(0))


def start() -> None:
    """Begin to import what all processes need."""
    _context.set_forkserver_preload(["torch", "benchmarks.preload"])


def together(works: Mapping[str, Work], timeout_s: float) -> dict[str, Any]:
    """Run each function in a process of its own, at the same time; what they return, by name.

    When one fails the others are ended, and its error is raised; TimeoutError if they take too long.
    """
    processes: dict[Connection, tuple[str, ForkServerProcess]] = {}
    found: dict[str, Any] = {}
    try:
        for name, (function, arguments) in works.items():
            mine, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_run, args=(theirs, function, arguments), name=name, daemon=True)
            process.start()
            theirs.close()
            processes[mine] = (name, process)
        while len(found) < len(works):
            ready = wait([c for c, (name, _) in processes.items() if name not in found], timeout_s)
            if not ready:
                raise TimeoutError(f"{', '.join(works.keys() - found.keys())} did not end within {timeout_s:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                name, process = processes[connection]
                found[name] = _received(connection, process)
    finally:
        for _, process in processes.values():
            process.join(0 if len(found) < len(works) else 10)
            process.kill()
            process.join()
    return found


def _received(connection: Connection, process: ForkServerProcess) -> Any:
    try:
        error, value = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process {process.name!r} died with exit code {process.exitcode}") from None
    if error is not None:
        raise RuntimeError(f"the process {process.name!r} failed: {error}")
    return value


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        connection.send((None, function(*arguments)))
    except BaseException as error:
        connection.send((f"{type(error).__name__}: {error}", None))
        raise


@contextmanager
def background(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Start a process that serves while the body runs; yields the first thing that it sends."""
    mine, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield mine.recv()
    finally:
        process.kill()
        process.join()
