"""The commands for a run at a broker: status, watch, stop, dead and cleanup."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from sl_queue.cli.options import Broker, JobPath, OperatorKey, Yes, network_url, print_lines, require_consent
from sl_queue.cli.watching import LOOPBACK, PORT, watch_run
from sl_queue.errors import JobError, PeerSilent


def status(
    job: JobPath,
    broker: Broker = None,
    key: OperatorKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Tell where the run is, who is late and why.

    Exits 0 if the scheduler tells it now or the run has ended, 6 if the run failed, 75 if the scheduler is silent.
    """
    from sl_queue.config.job import Job
    from sl_queue.observe.console import status_view, stdout

    agreed, url = Job.load(job), network_url(broker)
    from sl_queue.launch.connect import sealing
    from sl_queue.launch.operator import watch_status
    from sl_queue.protocol.messages import OPERATOR

    telling = watch_status(agreed, url, sealing(agreed, OPERATOR, key, url))
    if telling is None:
        raise PeerSilent(f"{job}: no scheduler has reported this job at that broker; start workers.scheduler")
    if as_json:
        print(json.dumps(telling.as_json(time.time())))
    else:
        stdout().print(status_view(telling, time.time()), soft_wrap=True)
    raise typer.Exit(telling.exit_code)


def watch(
    job: JobPath,
    broker: Broker = None,
    key: OperatorKey = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Where the page is shown; 0: any free port.")] = PORT,
    host: Annotated[str, typer.Option(help="Address to listen at; by default only this machine may look.")] = LOOPBACK,
    browse: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Show the run on a page as it goes: who waits for whom, the curves, what went wrong. Until Ctrl-C."""
    from sl_queue.config.job import Job

    agreed, url = Job.load(job), network_url(broker)
    watch_run(agreed, url, key, port, host, browse=browse)


def report(
    job: JobPath,
    state: Annotated[Path, typer.Option(help="The scheduler's state folder.")] = Path("state/scheduler"),
    out: Annotated[Path, typer.Option(help="Folder for the two files.")] = Path(),
) -> None:
    """Write report.html, which opens anywhere, and curves.csv of a run that goes on or has ended."""
    from sl_queue.config.job import Job
    from sl_queue.launch.reporting import write_report

    try:
        for path in write_report(Job.load(job), state, out):
            print(path)
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}; give --state and --out folders that can be used") from None


def stop(job: JobPath, broker: Broker = None, key: OperatorKey = None) -> None:
    """Stop the run in an orderly way at the next commit; a later start resumes."""
    from sl_queue.config.job import Job

    agreed, url = Job.load(job), network_url(broker)
    from sl_queue.launch.connect import sealing
    from sl_queue.launch.operator import request_stop
    from sl_queue.protocol.messages import OPERATOR

    print(request_stop(agreed, url, sealing(agreed, OPERATOR, key, url)))


def dead(
    job: JobPath,
    parties: Annotated[list[str] | None, typer.Argument(metavar="[PARTY...]", help="Names; default: all.")] = None,
    broker: Broker = None,
    requeue: Annotated[bool, typer.Option("--requeue", help="Put them back into the queues they came from.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="Remove them.")] = False,
    yes: Yes = False,
) -> None:
    """Show the messages that workers refused, from whom and why; put them back, or remove them."""
    from sl_queue.config.job import Job

    if requeue and purge:
        raise JobError("--requeue and --purge: give one of them")
    agreed, url = Job.load(job), network_url(broker)
    from sl_queue.cli.housekeeping import describe_dead, parties_of, purge_dead, put_back, read_dead

    chosen = parties_of(agreed, parties or [])
    found = read_dead(agreed, url, chosen)
    print_lines(describe_dead(agreed, url, found, time.time()))
    filled = [party for party, letters in found.items() if isinstance(letters, list) and letters]
    if filled and requeue:
        require_consent(f"put back the dead letters of {', '.join(filled)}", yes)
        print_lines(put_back(agreed, url, filled))
    if filled and purge:
        require_consent(f"remove the dead letters of {', '.join(filled)} for good", yes)
        print_lines(purge_dead(agreed, url, filled))


def cleanup(
    job: JobPath,
    broker: Broker = None,
    force: Annotated[bool, typer.Option("--force", help="Also while workers are connected.")] = False,
    yes: Yes = False,
) -> None:
    """Remove what a finished or abandoned job left at the broker: its queues with all messages, and its exchanges."""
    from sl_queue.config.job import Job

    agreed, url = Job.load(job), network_url(broker)
    from sl_queue.cli.housekeeping import describe_remains, find_remains, remove_remains

    remains = find_remains(agreed, url, force=force)
    print_lines(describe_remains(agreed, url, remains))
    if remains.queues or remains.exchanges:
        require_consent("remove all of it for good", yes)
        print(remove_remains(agreed, url, remains, force=force))
