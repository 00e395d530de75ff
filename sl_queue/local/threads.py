"""Every role of a run as a thread of this process: for notebooks, tests and `sl-queue local`."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sl_queue.compute.building import LAST
from sl_queue.compute.modules.handover import Loan, Take
from sl_queue.compute.results import lend_given, trained_module
from sl_queue.compute.threads import limit_threads, require_nothing_lost, settings_kept
from sl_queue.config.environment import THREADS
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, agree, resolve
from sl_queue.config.user_code import Importer
from sl_queue.errors import JobError, PeerFailed, RunStopped, SlQueueError
from sl_queue.launch.connect import MEMORY, Channels, connector, key_file, sealing
from sl_queue.launch.finished import compare_finished
from sl_queue.launch.hand_process import HandThreads
from sl_queue.launch.hands import Lanes
from sl_queue.launch.party import serve_party
from sl_queue.launch.scheduler import LATE_S, OnStatus, serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.local.progress import OnEpoch, shown
from sl_queue.local.role_thread import RoleThread, ending, run_all
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.state import RunState, history_line
from sl_queue.protocol.scheduler.status import RunStatus, as_json
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.final import holds_final


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a run: the history, one dict an epoch as in history.jsonl, and the trained modules."""

    history: list[dict[str, Any]]
    modules: Mapping[tuple[str, str], nn.Module | SlQueueError] = field(repr=False)  # or why there is none
    label_holder: str

    def base(self, party: str) -> nn.Module:
        """Return the trained base model of a party, in evaluation mode on the CPU. KeyError if it has none.

        Raises ComputeError for a module that was given in code and cannot be copied.
        """
        return _there(self.modules[party, "base"])

    @property
    def fuse(self) -> nn.Module:
        """The trained fuse model, in evaluation mode on the CPU; raises as `base` does."""
        return _there(self.modules[self.label_holder, "fuse"])


def _there(found: nn.Module | SlQueueError) -> nn.Module:
    if isinstance(found, SlQueueError):
        raise found
    return found


def run_local(
    job: Job,
    parties: Sequence[PartyFile] | Mapping[str, PartyFile],
    broker: str = MEMORY,
    out: Path | str | None = None,
    on_status: Callable[[Mapping[str, Any]], None] | None = None,
    keys: Path | str | None = None,
    *,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
) -> Result:
    """Train with every role as a thread of this process, and return the history and the trained modules.

    A module given in code is trained itself, and is what it was when this returns or raises; the result holds copies.
    `broker` is memory:// or an amqp(s):// URL; `out` keeps each role's state under `out/<party>` and `out/scheduler`
    (run again on the same folder, it resumes), None forgets it. `on_status` gets the status a few times a second, as
    `sl-queue status --json` prints it, with the newest 20 epochs; `on_epoch` gets the line of each epoch in
    history.jsonl, once and in order, also of those that an earlier call has trained. `progress` shows a line on stderr.
    `keys` is a folder with `<role>/seal.key` for a job that seals; over memory:// nothing leaves the process, and
    nothing is sealed.

    Models draw random numbers from Python's, NumPy's and torch's global generators, which are set from a key for each
    forward pass. They are the whole process's: code of your own that draws from them in another thread meanwhile, or in
    `on_status`, changes what the models draw. Give it a generator of its own.

    Of the calling thread the parties see its context variables, but not what torch keeps for each thread: autocast, a
    default device, modes and saved-tensor hooks around this call are refused, and no_grad and inference_mode change
    nothing. The caller's number of torch threads is given back at the end.

    Raises the error of the party that failed, RunStopped if the run was stopped, and whatever `on_status` or `on_epoch`
    raises, which ends the run everywhere. Run again on the same `out`, it resumes.
    """
    with ExitStack() as stack:
        root = Path(out) if out is not None else Path(stack.enter_context(TemporaryDirectory(prefix="sl_queue-")))
        states = {role: root / role for role in (*job.parties, SCHEDULER)}
        folder = None if keys is None else Path(keys)
        files = list(parties.values()) if isinstance(parties, Mapping) else list(parties)
        tell, close = shown(on_status, on_epoch, progress, states[SCHEDULER] / "history.jsonl")
        stack.callback(close)
        return run_threads(job, files, broker, states, lambda status: tell(as_json(status)), folder)


def run_threads(
    job: Job,
    parties: Sequence[PartyFile],
    broker: str,
    states: Mapping[str, Path],
    on_status: OnStatus,
    keys: Path | None = None,
    hands: Mapping[str, int] = MappingProxyType({}),
) -> Result:
    """Run as `run_local`, with the state of each role, the scheduler's too, in a folder of its own choice.

    `hands`: how many threads compute the micro-batches of a party, besides its own.
    """
    require_all(job, parties)
    require_nothing_lost(party.device for party in parties)
    with torch.inference_mode(False), Loan() as loan:  # what is made in that mode could not be trained any further
        importer = Importer()
        specs = {party.party: resolve(job, party, importer) for party in parties}
        lend_given((spec.compute for spec in specs.values()), loan)
        with settings_kept():
            run_state = _Threads(job, parties, specs, broker, states, on_status, keys, loan, hands).run()
        history = [history_line(result) for result in run_state.history]
        modules: dict[tuple[str, str], nn.Module | SlQueueError] = {}
        for party, spec in specs.items():
            for path in sorted((states[party] / "final").glob("*.safetensors")):
                if path.stem.endswith(LAST):
                    continue
                try:
                    modules[party, path.stem] = trained_module(spec.compute, path, loan)
                except SlQueueError as error:  # raised to whoever asks for that module; the others are here
                    modules[party, path.stem] = error
        return Result(history, modules, job.label_holder)


def require_all(job: Job, parties: Sequence[PartyFile]) -> None:
    """Raise JobError unless there is exactly one file for each party of the job, and each fits the job."""
    for party_file in parties:
        agree(job, party_file)
    given = [party_file.party for party_file in parties]
    missing = [party for party in job.parties if party not in given]
    twice = sorted({party for party in given if given.count(party) > 1})
    if missing or twice:
        problem = f"no file for {', '.join(missing)}" if missing else f"two files for {', '.join(twice)}"
        raise JobError(f"job {job.name!r} has the parties {', '.join(job.parties)}: {problem}")


class _Threads:
    """All roles of a run as threads. Mutable while it runs: it collects how each thread ended."""

    def __init__(
        self,
        job: Job,
        parties: Sequence[PartyFile],
        specs: Mapping[str, PartySpec],
        broker: str,
        states: Mapping[str, Path],
        on_status: OnStatus,
        keys: Path | None,
        take: Take,
        hands: Mapping[str, int],
    ) -> None:
        self._job, self._parties, self._states, self._on_status = job, parties, states, on_status
        self._hands = hands
        self._specs = specs
        self._broker, self._keys, self._take = broker, keys, take
        self._connect = connector(job, broker)
        self._channels = Channels()
        self._errors: list[SlQueueError] = []
        self._raised: BaseException | None = None  # by the caller's on_status
        self._state = RunState()

    def run(self) -> RunState:
        roles = [RoleThread(self._run_scheduler, SCHEDULER)]
        roles += [RoleThread(partial(self._run_one, party), party.party) for party in self._parties]
        stopped = RunStopped("interrupted; run again on the same folder to resume")
        run_all(roles, interrupted=lambda: self._channels.fail(stopped))
        if self._raised is not None:
            raise self._raised
        if self._errors:
            raise min(self._errors, key=_told_by_another)
        return self._state

    def _run_one(self, party_file: PartyFile) -> None:

        def serve() -> None:
            limit_threads(party_file.threads or shared_threads(len(self._parties)))
            place = self._place(party_file.party, party_file)
            spec = self._specs[party_file.party]
            lanes = self._lanes(party_file)
            with HandThreads(self._job, spec, lanes, self._hands.get(spec.party, 0)):
                serve_party(self._job, spec, place, take=self._take, lanes=lanes)

        self._guard(f"party {party_file.party!r}", serve)

    def _lanes(self, party_file: PartyFile) -> Lanes | None:
        """Return the way to the party's hands, which are threads of this process; None if it has none."""
        if party_file.hands is None and not self._hands.get(party_file.party):
            return None
        return Lanes.in_memory(alone=party_file.hands is None or party_file.hands.alone)

    def _run_scheduler(self) -> None:
        def serve() -> None:
            late_s = 0.0 if have_finished(self._job, self._states) else LATE_S
            self._state = serve_scheduler(self._job, self._place(SCHEDULER), self._tell, late_s)

        self._guard("the scheduler", serve)

    def _tell(self, status: RunStatus) -> None:
        """Hand a status to the caller; what on_status raises goes back to it as it is."""
        try:
            self._on_status(status)
        except BaseException as error:
            self._raised = error
            told = f"on_status raised {type(error).__name__}; run again on the same folder to resume"
            raise RunStopped(told) from error

    def _place(self, role: str, party_file: PartyFile | None = None) -> Workplace:
        key = key_file(key_in(self._keys, role), party_file)
        seal = sealing(self._job, role, key, self._broker)
        return Workplace(self._connect, self._states[role], self._channels, seal)

    def _guard(self, role: str, serve: Callable[[], None]) -> None:
        """Keep a thread's error; one that the scheduler cannot tell the others about ends them here."""
        try:
            serve()
        except BaseException as error:
            self._errors.append(end := ending(role, error))
            if not isinstance(end, RunStopped) or self._raised is not None:
                self._channels.fail(RunStopped(f"another role of this process failed: {end}"))


def _told_by_another(error: SlQueueError) -> int:
    """Order errors: first what a role met itself, then that another failed, then that the run was stopped."""
    return 2 if isinstance(error, RunStopped) else int(isinstance(error, PeerFailed))


def have_finished(job: Job, states: Mapping[str, Path]) -> bool:
    """Return True if every party's folder holds its final weights, so that nobody waits for the scheduler."""
    return all(holds_final(states[party], job.digest) for party in job.parties)


def compare_with_finished(job: Job, parties: Sequence[PartyFile], states: Mapping[str, Path]) -> None:
    """Raise CheckpointError if a party's finished run was trained on another table, or with other models."""
    importer = Importer()
    for party_file in parties:
        spec, state = resolve(job, party_file, importer), states[party_file.party]
        with Folder(state, job_digest=job.digest, party=spec.party, job=job.canonical()) as folder:
            compare_finished(job, spec, folder)


def key_in(keys: Path | None, role: str) -> Path | None:
    """Return the private key of a role in a folder as `sl-queue provision` writes it."""
    return None if keys is None else keys / role / "seal.key"


def shared_threads(workers: int) -> int:
    """Return the torch threads for each of several workers on this machine: more than its cores are slower."""
    return int(THREADS.read()) or max(1, (os.cpu_count() or 1) // workers)
