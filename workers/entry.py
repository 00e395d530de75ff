"""Frame of every worker process around its role: read its files, run, and leave with the right exit code."""

import argparse
import ctypes
import gc
import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from sl_queue.config.environment import EVENTS, FINAL_EXIT, LOG, LOG_FORMAT, METRICS, check
from sl_queue.errors import JobError, SlQueueError
from sl_queue.launch import process
from sl_queue.launch.process import leave_on_sigterm, leaving, spare_stderr
from sl_queue.local.supervise import die_with_parent
from sl_queue.observe.fan_out import fan_out
from sl_queue.observe.json_lines import EventFile, JsonFormatter, error_line
from sl_queue.observe.log import to_log
from sl_queue.protocol.events import Loaded, Observer, ending
from sl_queue.protocol.messages import SCHEDULER

if TYPE_CHECKING:
    from sl_queue.config.job import Job

PREDICTION = "prediction"  # the name of one that is given none
Role = Literal["scheduler", "feature", "label", "hand"]

FINAL_CODES = frozenset({2, 3, 4, 5, 6, 70})

_PR_SET_DUMPABLE = 4


def main(role: Role) -> None:
    """Run one worker until its run is finished; exits as `sl_queue.errors` lists."""
    spare_stderr()
    with exiting():
        _run(role)


@contextmanager
def exiting() -> Iterator[None]:
    """Exit with SL_QUEUE_FINAL_EXIT, if set, where no restart helps: a container engine cannot tell codes apart."""
    try:
        yield
    except SystemExit as end:
        final = _final_exit()
        if final is None or end.code not in FINAL_CODES:
            raise
        print(f"exit code {end.code}, reported as {final} ({FINAL_EXIT.name}): no restart fixes this", file=sys.stderr)
        raise SystemExit(final) from None


def _final_exit() -> int | None:
    """Read the variable; None also for a wrong value, which is why the worker ends then."""
    with suppress(JobError):
        code: int | None = FINAL_EXIT.read()
        return code
    return None


@dataclass(slots=True)
class _Worker:
    """The worker of this process, as observers know it. Mutable: it gets its party's name from the files."""

    name: str
    observe: Observer

    def end(self, error: SlQueueError) -> None:
        self.observe(ending(self.name, error))


def _run(role: Role) -> None:
    with leaving():
        worker = _Worker(role, _observer())
    with leaving(on_end=worker.end):
        check()
    say = print_as_json if LOG_FORMAT.read() == "json" else process.say
    die_with_parent()
    arguments = _arguments(role)
    keeps_nothing = role == "hand" or getattr(arguments, "serve", False) or getattr(arguments, "explain", False)
    after = "" if keeps_nothing else "; a restart resumes from the last checkpoint"
    leave_on_sigterm(say, after=after)
    _log_to_stderr()
    with leaving(f"interrupted{after}", say, worker.end):
        import sl_queue.transport.rabbitmq.link  # noqa: F401 - with the others, before anything is awaited
        from sl_queue.config.job import Job  # inside, so that a mistake in a file is one line and not a traceback

        job = Job.load(arguments.job)
        if job.security.seal:
            leave_no_core()
        if role == "scheduler":
            _schedule(job, arguments, worker)
        else:
            _serve(role, job, arguments, worker)


def _schedule(job: "Job", given: argparse.Namespace, worker: _Worker) -> None:
    from sl_queue.launch.scheduler import run_scheduler  # without torch

    worker.observe(Loaded(SCHEDULER))
    about = (given.broker, given.state, given.key, given.metrics_port)
    run_scheduler(job, *about, worker.observe, given.predict, given.track)


def _serve(role: Literal["feature", "label", "hand"], job: "Job", given: argparse.Namespace, worker: _Worker) -> None:
    """Do what is asked for of a party: train, predict, answer requests, or compute for its worker."""
    from sl_queue.config.job import PartyFile

    if role == "hand":
        from sl_queue.launch.hand_process import run_hand

        party_file = PartyFile.load(given.party)
        worker.name = party_file.party
        run_hand(job, party_file, given.broker)
        return
    with _loading():
        from sl_queue.launch.party import run_party

    party_file = PartyFile.load(given.party)
    worker.name = party_file.party
    worker.observe(Loaded(worker.name))
    place = (given.broker, given.state, given.key)
    if given.serve or given.explain:
        from sl_queue.launch.service_worker import run_service

        run_service(role, job, party_file, given.run, *place, explain=given.explain)
    elif given.predict is not None:
        from sl_queue.launch.prediction_worker import run_prediction

        run_prediction(role, job, party_file, given.predict, given.run, *place, worker.observe)
    else:
        run_party(role, job, party_file, *place, given.metrics_port, worker.observe, standby=given.standby)


@contextmanager
def _loading() -> Iterator[None]:
    """Keep Python from looking for garbage among what libraries are made of, now and whenever it looks later."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _observer() -> Observer:
    """Return what watches this worker: the log, and a file of events where one is asked for."""
    path = EVENTS.read()
    return to_log if path is None else fan_out(to_log, EventFile(path))


def _log_to_stderr() -> None:
    handler, as_json = logging.StreamHandler(sys.stderr), LOG_FORMAT.read() == "json"
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("sl_queue").setLevel(LOG.read().upper())
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # what matters of it is said in our own words
    if as_json:  # what Python itself would write is a line as well
        logging.captureWarnings(True)
        sys.excepthook = _log_bug


def _log_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("sl_queue").critical("a bug in sl_queue", exc_info=(kind, error, trace))


def print_as_json(text: str) -> None:
    """Write a last line to stderr, as a line of a JSON log."""
    print(error_line(text), file=sys.stderr, flush=True)


def leave_no_core() -> None:
    """Have no core dump of this process written, by the kernel or by a program that it hands one to: keys are in it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _arguments(role: Role) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_module(role)}",
        description=f"The {role} worker of a job. Start it again after any interruption: it resumes.",
    )
    parser.add_argument("--job", type=Path, required=True, help="the job file, the same at every party")
    if role != "scheduler":
        parser.add_argument("--party", type=Path, required=True, help="this party's own file")
    parser.add_argument("--broker", help="URL of the broker; before it comes SL_QUEUE_BROKER, then the party file's")
    if role == "hand":  # which has neither state nor secrets
        return parser.parse_args()
    parser.add_argument("--key", type=Path, help="file with the private key of a job that seals; else SL_QUEUE_KEY")
    parser.add_argument(
        "--metrics-port",
        metavar="[HOST:]PORT",
        default=METRICS.read(),
        help=f"where Prometheus scrapes, this machine only unless a host is given; else {METRICS.name}",
    )
    parser.add_argument(
        "--predict",
        metavar="NAME",
        nargs="?",
        const=PREDICTION,
        help="predict for the rows under [predict] in the party file; another NAME, the same at every worker, is "
        "another prediction",
    )
    if role == "scheduler":
        _add_trackers(parser)
    else:
        _add_versions(parser, role)
    parser.add_argument("--state", type=Path, help="folder of checkpoints and results; default: the party file's")
    given = parser.parse_args()
    if role != "scheduler" and given.standby and (given.serve or given.explain or given.predict is not None):
        parser.error("--standby is for training; of a service start two, of a prediction none is needed")
    return given


def _add_trackers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--track",
        metavar="TRACKER",
        action="append",
        default=[],
        help="feed tensorboard:DIR or mlflow:URL beside the run; may be given again",
    )


def _add_versions(parser: argparse.ArgumentParser, role: Role) -> None:
    """Add what a party does with the weights of a run."""
    parser.add_argument("--run", help="the run whose weights to predict with; else the version in use")
    parser.add_argument(
        "--serve", action="store_true", help="answer single requests for the rows under [predict], over HTTP"
    )
    parser.add_argument(
        "--standby",
        action="store_true",
        help="wait, with everything loaded, while another worker of this party has the state folder, and go on when it "
        "is gone; at once if none has",
    )
    parser.set_defaults(explain=False)
    if role == "label":
        parser.add_argument(
            "--explain",
            action="store_true",
            help="tell what each party and column is worth, on rows of [predict] with labels, by parties that serve",
        )


def _module(role: Role) -> str:
    modules = {"feature": "workers.feature_party", "label": "workers.label_holder"}
    return modules.get(role, f"workers.{role}")
