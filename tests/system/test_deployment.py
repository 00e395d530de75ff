"""The whole deployment: TLS, logins with the least rights, sealed messages, a process for every role, and crashes."""

import datetime
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sl_queue.config.job import Job
from sl_queue.deployment.provision import Place, provision
from sl_queue.errors import AlignmentError, BrokerUnreachable
from sl_queue.protocol.messages import OPERATOR
from sl_queue.testing.private_broker import PrivateBroker, find_server, free_ports
from tests.support.credit import edit
from tests.support.crew import ROLES, Crew, quiet_weights, sums, write_job
from tests.support.forked import sl_queue
from tests.support.waiting import await_that

PATIENCE_S = 2.0

pytestmark = [
    pytest.mark.skipif(find_server() is None, reason="needs a rabbitmq-server on this machine"),
]


@dataclass(frozen=True)
class Deployment:
    crew: Crew
    broker: PrivateBroker
    out: Path

    def start(self, *roles: str, login: str | None = None, key: str | None = None, job: Path | None = None) -> None:
        """Start workers with what was provisioned for them, or with what belongs to another role."""
        for role in roles or ROLES:
            url = f"file:{self.out}/{login or role}/broker.url"
            prepare = (use_key, str(self.out / (key or role) / "seal.key"))
            self.crew.start(role, url=url, prepare=prepare, job=job)


def use_key(path: str) -> None:
    os.environ["SL_QUEUE_KEY"] = path


@pytest.fixture(params=["passwords", "certificates"])
def deployment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    yield from deployed(tmp_path, patience=15.0, client_certificates=request.param == "certificates")


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Provision once, with passwords, and start one broker for those that ask it who may do what."""
    folder = tmp_path_factory.mktemp("provisioned")
    yield from deployed(folder, patience=PATIENCE_S, client_certificates=False)


@pytest.fixture
def plain(provisioned: Deployment, tmp_path: Path) -> Iterator[Deployment]:
    """Give a test job, states and crew of its own, and take what it leaves in the queues."""
    folder, broker = tmp_path / "crew", provisioned.broker
    shutil.copytree(
        provisioned.crew.folder, folder, ignore=shutil.ignore_patterns("out", "states", "*.log", "*.events")
    )
    with Crew(folder, "") as crew:
        yield Deployment(crew, broker, provisioned.out)
    await_that(lambda: broker.evaluate("length(rabbit_networking:connections())") == "0", "a worker is still connected")
    broker.evaluate("[rabbit_amqqueue:purge(Q) || Q <- rabbit_amqqueue:list()]")


@pytest.fixture
def hasty(plain: Deployment) -> Deployment:
    edit(plain.crew.job, f"patience = {PATIENCE_S}", "patience = 0.5")
    return plain


def write_sealed_job(folder: Path, place: Place, patience: float = PATIENCE_S) -> Path:
    """Write the example's job with its keys, and what belongs to each role in `out`."""
    job, out = write_job(folder, patience=patience), folder / "out"
    provision(Job.load(job), place, out, frozenset(), datetime.datetime.now(datetime.UTC))
    job.write_text(f"{job.read_text()}\n{(out / 'security.toml').read_text()}")
    return job


def deployed(folder: Path, *, patience: float, client_certificates: bool) -> Iterator[Deployment]:
    out, (port,) = folder / "out", free_ports(1)
    place = Place(("localhost",), port, str(out / "broker"), str(out / "broker"), client_certificates)
    write_sealed_job(folder, place, patience)
    for role in (*ROLES, OPERATOR):
        edit(out / role / "broker.url", str(out / "broker"), str(out / role))
    configuration = (out / "broker" / "rabbitmq.conf").read_text().splitlines()
    settings = tuple(line for line in configuration if not line.startswith(("listeners.tcp", "disk_free_limit")))
    plugins = ("rabbitmq_auth_mechanism_ssl",) if client_certificates else ()
    with PrivateBroker(settings=settings, plugins=plugins) as broker, Crew(folder, "") as crew:
        yield Deployment(crew, broker, out)


def test_kills_and_broker_restarts_change_no_bit_of_a_sealed_run_over_tls(deployment: Deployment) -> None:
    crew = deployment.crew
    deployment.start()
    for role, step in (("bank", 5), ("insurer", 12), ("scheduler", 0), ("bank", 22)):
        crew.await_step("insurer", step)
        crew.kill(role)
        deployment.start(role)
    deployment.broker.restart()
    crew.finish(timeout_s=150)
    assert crew.weights() == quiet_weights()


def test_a_party_started_with_anothers_login_is_refused(plain: Deployment) -> None:
    plain.start("bank", login="insurer")
    assert plain.crew.wait("bank") == BrokerUnreachable.exit_code
    assert "user 'credit.insurer' needs the read right on 'q.bank.scheduler'" in plain.crew.log("bank")


def test_a_party_started_with_anothers_key_is_refused(plain: Deployment) -> None:
    plain.start("bank", key="insurer")
    assert plain.crew.wait("bank") == AlignmentError.exit_code
    assert "the private key of 'bank' does not belong to the public one" in plain.crew.log("bank")


def test_a_party_started_with_another_job_is_refused_and_told_which_key_differs(plain: Deployment) -> None:
    other = plain.crew.folder / "other.toml"
    other.write_text(plain.crew.job.read_text().replace("epochs = 8", "epochs = 9"))
    plain.start("scheduler", "insurer")
    plain.start("bank", job=other)
    for role in ("bank", "scheduler"):
        assert plain.crew.wait(role) == AlignmentError.exit_code
        assert "epochs = 9 at 'bank', 8 at the scheduler" in plain.crew.log(role)


def test_a_party_whose_job_lists_another_key_of_the_scheduler_is_told_so(hasty: Deployment) -> None:
    job = Job.load(hasty.crew.job)
    ours, theirs = job.security.keys["scheduler"].seal, job.security.keys[OPERATOR].seal
    other = hasty.crew.folder / "other.toml"
    swapped = hasty.crew.job.read_text().replace(ours, "swapped").replace(theirs, ours).replace("swapped", theirs)
    other.write_text(swapped)
    hasty.start("scheduler", "insurer")
    hasty.start("bank", job=other)
    assert hasty.crew.wait("bank") == AlignmentError.exit_code
    assert "no message of 'scheduler' can be opened by party 'bank'" in hasty.crew.log("bank")
    assert hasty.crew.wait("scheduler") == AlignmentError.exit_code
    assert "no message of bank can be opened" in hasty.crew.log("scheduler")


def test_no_log_and_no_command_line_shows_a_secret(plain: Deployment) -> None:
    secrets = [(plain.out / role / "broker.url").read_text().split("@")[0].rpartition(":")[2] for role in ROLES]
    plain.start()
    plain.crew.await_first_step("insurer")
    for role in ROLES:
        process = Path(f"/proc/{plain.crew.pid(role)}")
        shown = (process / "cmdline").read_bytes() + plain.crew.log(role).encode()
        assert not [secret for secret in secrets if secret.encode() in shown]
    plain.crew.finish()


def test_local_runs_a_sealed_job_with_the_keys_of_all(tmp_path: Path, broker_url: str) -> None:
    job, out = write_sealed_job(tmp_path, Place(("localhost",))), tmp_path / "states"
    command = ["local", job, *(tmp_path / f"{party}.toml" for party in ("bank", "insurer")), "--out", out]
    refused = sl_queue(*command, SL_QUEUE_BROKER=broker_url)
    assert refused.returncode == 2 and "'operator' needs its private key" in refused.stderr
    done = sl_queue(*command, "--keys", tmp_path / "out", SL_QUEUE_BROKER=broker_url)
    assert done.returncode == 0, done.stderr
    assert sums(out) == quiet_weights()
