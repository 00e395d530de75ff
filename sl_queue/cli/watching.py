"""The page of a run beside a command, and what it is given."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sl_queue.config.job import Job
    from sl_queue.observe.live import Live
    from sl_queue.protocol.scheduler.status import RunStatus

PORT = 8000
LOOPBACK = "127.0.0.1"

Watch = Annotated[bool, typer.Option("--watch", help="Show the run on a page in the browser as it goes.")]


@contextmanager
def shown(job: "Job", port: int, host: str, *, browse: bool = False) -> "Iterator[Live]":
    """Show a run on a page while the body runs."""
    from sl_queue.observe.live import Live
    from sl_queue.observe.web import WatchServer
    from sl_queue.planning.ideal import ideal_bubble

    live = Live(partial(ideal_bubble, job))
    with WatchServer(live, port, host) as server:
        print(f"the run is shown at {server.url}", file=sys.stderr, flush=True)
        if browse:
            import webbrowser

            webbrowser.open(server.url)
        yield live


@contextmanager
def shown_if(watch: bool, job: "Job") -> "Iterator[Callable[[RunStatus], None]]":
    """Show a run on this machine while the body runs, if that is asked for; yields what takes its statuses."""
    if not watch:
        yield lambda status: None
        return
    with shown(job, _free(PORT), LOOPBACK) as live:
        yield live.take


def told_to(*takers: "Callable[[RunStatus], None]") -> "Callable[[RunStatus], None]":
    """Return what hands each status to all of these."""

    def tell(status: "RunStatus") -> None:
        for take in takers:
            take(status)

    return tell


def _free(port: int) -> int:
    """Return that port, or 0 for any if another program has it."""
    import socket

    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((LOOPBACK, port))
        except OSError:
            return 0
    return port


def watch_run(job: "Job", broker: str, key: Path | None, port: int, host: str, *, browse: bool) -> None:
    """Show a run at a broker until Ctrl-C."""
    from sl_queue.launch.connect import sealing
    from sl_queue.launch.following import Follower
    from sl_queue.protocol.messages import OPERATOR

    seal = sealing(job, OPERATOR, key, broker)
    with shown(job, port, host, browse=browse) as live, Follower(job, broker, seal, live):
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
