"""A peer with a valid login and key that sends anything: `python -m tests.support.fuzzing_peer --messages 100000`.

The bank of the example trains as it should; beside it somebody with the bank's login and key, and its place in the
run, sends messages of any kind, run, generation, step, shape, size and text to the insurer and the scheduler. The
broker, the three workers and the fuzzer are real. What it prints: how the run ended, whether the weights are those of
a quiet run, each worker's peak memory against what the product states, and how many lines they logged.

With --aim its messages may also have a key that is awaited just then. What is wrong with those is found at last by
the digest of their rows: then the run ends, and says that it was the bank.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import msgpack
import pika

from sl_queue.config.job import Job, PartyFile
from sl_queue.launch.connect import sealing, topology
from sl_queue.launch.party import bounds_of
from sl_queue.local.threads import run_local
from sl_queue.protocol.codec import encode
from sl_queue.protocol.control import (
    Alive,
    EpochDone,
    EpochResult,
    Failed,
    Finish,
    Finished,
    Join,
    Lost,
    Message,
    Open,
    Progress,
    Start,
    Status,
    Stop,
    Stopped,
    StopRequest,
    Waiting,
    kind_of,
)
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.security.sealing import Seal
from sl_queue.testing.private_broker import PrivateBroker
from tests.support.credit import FILES, edit, write_credit
from tests.support.crew import sums
from tests.support.secured import write_keys

MIB = 1024 * 1024
WORKERS = {"scheduler": "scheduler", "insurer": "label_holder", "bank": "feature_party"}
TEXTS = (
    "",
    "bank",
    "\x1b]0;owned\x07",
    "[bold]x[/bold]\n2026-01-01 INFO scheduler: finished",
    "x" * 5000,
    "\ud7ff\u202e",
)


@dataclass(slots=True)
class Fuzzer:
    """Messages of a peer that knows all that a peer can know. Mutable: it draws."""

    me: str
    peer: str  # to whom it sends tensors
    run: str
    steps: int  # of the whole run
    cut: tuple[int, ...]
    seed: int = 0
    aim: bool = False
    near: int = 0  # the step that the peer trains about now
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def messages(self, count: int) -> Iterator[tuple[str, bytes]]:
        """Receivers and plain bodies."""
        for _ in range(count):
            receiver = self.rng.choice([self.peer, self.peer, SCHEDULER])
            yield receiver, self._body(receiver)

    def _body(self, receiver: str) -> bytes:
        draw = self.rng.random()
        if draw < 0.05:
            return self.rng.randbytes(self.rng.randrange(300))
        if draw < 0.08:
            return self._bomb(receiver)
        message = self._tensor() if draw < 0.6 else self._words()
        body = encode(self._header(receiver, message), message)
        if self.rng.random() < 0.1:
            return body[: self.rng.randrange(len(body))]
        if self.rng.random() < 0.05:
            return body[:1] + bytes([self.rng.randrange(128)]) + body[2:]
        return body

    def _header(self, receiver: str, message: Message) -> Header:
        pick = self.rng.choice
        where = message.micro_batch if isinstance(message, Activation | Gradient) else MicroBatch(0, 0)
        sender = pick([self.me] * 20 + [self.peer, SCHEDULER, *TEXTS[:3]])
        to = pick([receiver] * 20 + [self.me, OPERATOR, "x" * 400])
        run = pick([self.run] * 6 + ["", "another"])
        generation = pick([0, 0, 0, 0, 1, 2, self.rng.randrange(10**6)])
        return Header(run, generation, kind_of(message), sender, to, where, pick([-1, 0, self.steps]))

    def _tensor(self) -> Activation | Gradient:
        pick = self.rng.choice
        far = self.steps + self.rng.randrange(10**9)
        step = self.near + self.rng.randrange(30) if self.aim else pick([far, self.steps, 2**63])
        where = MicroBatch(step, pick([0, 0, 1, 2, 10**9]))
        dtype = pick(["float32", "float32", "float64", "int8"])
        rows = pick([1, 2, 4, 8, 16, 1000])
        shape = (rows, *pick([self.cut, self.cut, (7,), ()]))
        items = 1
        for size in shape:
            items *= size
        data = bytes(items * {"float32": 4, "float64": 8, "int8": 1}[dtype])
        packing = pick(["", "", "", "float32/zstd", "float32/relu", "float16/none", "x"])
        payload = Payload(dtype, shape, data if not packing else data[: len(data) // 2], b"x" * 8, packing)
        return pick([Activation(where, payload), Activation(where, payload, holdout=True), Gradient(where, payload)])

    def _words(self) -> Message:
        r = self.rng
        text, number = r.choice(TEXTS), r.choice([0, 1, -1, 5, 2**62])
        kind = r.choice(list(Kind))
        result = EpochResult(number, number, float("nan"), {text[:50]: float("inf")})
        return r.choice(
            [
                Join(text, {"name": text}, number, text, text, text, abs(number), (number,), (result,) * 50, text),
                Progress(text, abs(number), number, (number,) * 100, float("nan"), number),
                EpochDone(text, 0, result),
                Waiting(text, 0, self.me, Kind.GRADIENT, r.randrange(self.steps), 0, float("inf"), -1.0),
                Waiting(text, 0, text, kind, number, number, float("nan"), 0.0),
                Lost(text, 0, self.peer, kind, number, number, 1.0),
                Alive(text),
                Failed(text, "RunStopped", text),
                Stopped(text, number),
                Finished(text, {text: text}),
                StopRequest(text),
                Start(text, self.run, (number,) * 10),
                Open(text, number, number),
                Finish(text, number),
                Stop(text, text, error="RunStopped"),
                Status({"phase": text}),
            ]
        )

    def _bomb(self, receiver: str) -> bytes:
        """Few bytes that say they are many, or many that say nothing."""
        fields = [1, self.run, 0, "report", self.me, receiver, 0, 0, -1, None]
        deep = b"\x91" * 3000 + b"\xc0"
        wide = msgpack.packb([[]] * 40_000)
        step = self.near + self.rng.randrange(30) if self.aim else self.steps
        huge = ["float32", [2**40, 2**20], b"", "float32/zstd"]
        tensor = [1, self.run, 0, "activation", self.me, receiver, step, 0, -1, huge]
        return bytes(
            self.rng.choice(
                [
                    msgpack.packb([*fields, deep]),
                    msgpack.packb([*fields, wide]),
                    msgpack.packb([*tensor, b"\x28\xb5\x2f\xfd" + bytes(20)]),
                    msgpack.packb([2, *fields[1:], b""]),
                    bytes(self.rng.choice([100_000, 2 * MIB])) if self.rng.random() < 0.02 else b"\xdd\xff\xff\xff\xff",
                ]
            )
        )


# The run around it ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Workers:
    """The three workers as processes, with what they log and the most memory they took. Mutable."""

    folder: Path
    url: str
    sealed: bool
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    peak_kib: dict[str, int] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)

    def start(self) -> None:
        for role, worker in WORKERS.items():
            party = [] if role == SCHEDULER else ["--party", f"{role}.toml"]
            environ = {**os.environ, "SL_QUEUE_BROKER": self.url, "SL_QUEUE_THREADS": "1", "SL_QUEUE_LOG": "info"}
            environ["PYTHONPATH"] = os.pathsep.join(
                p for p in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")) if p
            )
            if self.sealed:
                environ["SL_QUEUE_KEY"] = f"keys/{role}/seal.key"
            arguments = ["--job", "job.toml", *party, "--state", f"states/{role}"]
            command = [sys.executable, "-m", f"workers.{worker}", *arguments]
            with self.log(role).open("wb") as log:
                self.running[role] = subprocess.Popen(command, cwd=self.folder, env=environ, stdout=log, stderr=log)

    def log(self, role: str) -> Path:
        return self.folder / f"{role}.log"

    def lines(self) -> int:
        return sum(len(self.log(role).read_bytes().splitlines()) for role in WORKERS)

    def alive(self) -> bool:
        """Note how much memory they took so far; whether the insurer still runs."""
        for role, process in self.running.items():
            if process.poll() is not None:
                self.codes[role] = process.returncode
                continue
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            self.peak_kib[role] = int(peak[0]) if peak else self.peak_kib.get(role, 0)
        return "insurer" not in self.codes

    def newest_step(self) -> int:
        """Return the newest step on the insurer's disk."""
        names = (self.folder / "states" / "insurer" / "checkpoints").glob("step-*.safetensors")
        return max((int(path.stem.removeprefix("step-")) for path in names), default=0)

    def end(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.codes) < len(self.running) and time.monotonic() < deadline:
            self.alive()
            time.sleep(0.05)
        for process in self.running.values():
            process.kill()
            process.wait()


def write_job(folder: Path, rows: int, epochs: int, patience: float, sealed: bool) -> Job:
    """Write the example with many short steps in few epochs, which log a line each."""
    path = write_credit(folder, rows)
    edit(path, "epochs = 5", f"epochs = {epochs}")
    edit(path, "batch_size = 128", "batch_size = 16")
    edit(path, "micro_batches = 4", "micro_batches = 2\ncheckpoint_every = 20")
    security = write_keys(folder / "keys", (*WORKERS, OPERATOR)) if sealed else ""
    path.write_text(f"{path.read_text()}\n{security}\n[broker]\npatience = {patience}\n")
    return Job.load(path)


def run_of(folder: Path, timeout_s: float = 120.0) -> str:
    """Return the name of the run, as soon as the insurer has a checkpoint of it."""
    deadline = time.monotonic() + timeout_s
    state = folder / "states" / SCHEDULER / "run.json"
    while time.monotonic() < deadline:
        if state.exists() and list((folder / "states" / "insurer").glob("checkpoints/step-*")):
            return str(json.loads(state.read_text())["state"]["run"])
        time.sleep(0.1)
    raise TimeoutError("the run did not begin")


def flood(url: str, job: Job, fuzzer: Fuzzer, seal: Seal | None, count: int, workers: Workers) -> int:
    """Publish as the bank; returns how many messages were sent while the run lived. What is sent again is no matter."""
    names, sent = topology(job, url), 0
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        for receiver, plain in fuzzer.messages(count):
            body = plain if seal is None or fuzzer.rng.random() < 0.05 else seal.seal(receiver, plain)
            kind = fuzzer.rng.choice([Kind.ACTIVATION, Kind.REPORT])
            channel.basic_publish(names.exchange(fuzzer.me), names.routing_key(fuzzer.run, kind, receiver), body)
            sent += 1
            if sent % 200 == 0:
                if not workers.alive():
                    break
                fuzzer.near = workers.newest_step()
    return sent


def play(folder: Path, url: str, options: argparse.Namespace) -> int:
    """Play a quiet run in this process, then one that is flooded."""
    job = write_job(folder, options.rows, options.epochs, options.patience, options.seal)
    run_local(job, [PartyFile.load(folder / name) for name in FILES], out=folder / "quiet")
    pipeline = job.pipeline_of(job.batches(options.rows))
    key = folder / "keys" / "bank" / "seal.key" if options.seal else None
    seal = sealing(job, "bank", key, url)
    workers = Workers(folder, url, options.seal)
    workers.start()
    try:
        run = run_of(folder)
        workers.alive()
        before, began = dict(workers.peak_kib), time.monotonic()
        fuzzer = Fuzzer(
            "bank", "insurer", run, pipeline.batches.steps, job.cut("bank") or (), options.seed, options.aim
        )
        sent = flood(url, job, fuzzer, seal, options.messages, workers)
        seconds = time.monotonic() - began
    finally:
        workers.end(options.timeout)
    equal = sums(folder / "states") == sums(folder / "quiet")
    stated = bounds_of(job, "insurer", pipeline).memory_bytes
    return say(options, workers, Outcome(sent, seconds, equal, stated, before))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a flood."""

    sent: int
    seconds: float
    equal: bool  # the weights, to those of a quiet run
    stated_bytes: int  # what peers may take of the insurer's memory
    before_kib: dict[str, int]  # each worker's peak when the flood began


def say(options: argparse.Namespace, workers: Workers, outcome: Outcome) -> int:
    """Print what came of it; 0 if all is as promised."""
    said = workers.log("insurer").read_text(errors="replace").splitlines()
    named = any("error" in line and "'bank'" in line for line in said)
    finished = set(workers.codes.values()) == {0} and len(workers.codes) == len(WORKERS)
    peak = {role: kib / 1024 for role, kib in workers.peak_kib.items()}
    grown = {role: mib - outcome.before_kib.get(role, 0) / 1024 for role, mib in peak.items()}
    usual, stated, lines = 128.0, outcome.stated_bytes / MIB, workers.lines()
    print(f"sent {outcome.sent:,} of {options.messages:,} messages while the run lived, {outcome.seconds:.0f} s")
    print(f"exit codes {workers.codes}; bank named: {named}")
    print(f"weights: {'equal to those of a quiet run' if outcome.equal else 'not those of a quiet run'}")
    for role in WORKERS:
        print(f"{role}: peak {peak[role]:.0f} MiB, {grown[role]:.0f} more than when the flood began")
    print(f"stated for what peers send to the insurer: {stated:.0f} MiB; evaluation and metrics take up to {usual:.0f}")
    print(f"{lines} lines logged by all workers together")
    bounded = grown["insurer"] < stated + usual and grown[SCHEDULER] < usual and grown["bank"] < usual
    ended_well = (finished and outcome.equal) or (named and not finished)
    print("as promised" if ended_well and bounded and lines < 100 else "NOT as promised")
    if not ended_well:
        for role in WORKERS:
            print(f"--- {role}", *workers.log(role).read_text(errors="replace").splitlines()[-15:], sep="\n")
    return 0 if ended_well and bounded and lines < 100 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seal", action="store_true", help="a job with [security] seal = true")
    parser.add_argument("--aim", action="store_true", help="also at keys that are awaited")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--patience", type=float, default=5.0)
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds from the end of the flood to that of the run"
    )
    parser.add_argument("--out", type=Path, help="an empty folder to keep: logs and state folders of the workers")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="sl_queue-fuzz-") as folder, PrivateBroker() as broker:
        return play(options.out or Path(folder), broker.url("fuzz"), options)


if __name__ == "__main__":
    sys.exit(main())
