"""Tests of provision: a broker that outsiders cannot use, and no secret of one party in another's folder."""

import dataclasses
import datetime
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pika
import pytest
from pika.exceptions import AMQPConnectionError

from sl_queue.config.job import Job
from sl_queue.deployment.provision import Place, Secret, provision, security_table
from sl_queue.errors import AlignmentError, BrokerUnreachable, JobError
from sl_queue.launch.connect import sealing
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.security.keys import read_key
from sl_queue.testing.private_broker import PrivateBroker, find_server, free_ports
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.retry import Limits
from tests.support.links import Inbox, send

NOW = datetime.datetime.now(datetime.UTC)
PARTIES = {"bank": {"role": "feature", "cut": [2]}, "insurer": {"role": "label"}}
ROLES = ("bank", "insurer", SCHEDULER, OPERATOR)
PLACE = Place(("broker.example", "192.0.2.7"))
IMPATIENT = Limits(first_s=3.0, lost_s=3.0, busy_s=0.5)


def job(**changes: object) -> Job:
    return Job(**{"name": "credit", "seed": 1, "epochs": 1, "batch_size": 4, "parties": PARTIES, **changes})


def write(
    out: Path, *rotate: Secret, place: Place = PLACE, now: datetime.datetime = NOW, agreed: Job | None = None
) -> None:
    provision(agreed or job(), place, out, frozenset(rotate), now)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def changed(before: dict[str, bytes], out: Path) -> set[str]:
    after = contents(out)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


# The folders ------------------------------------------------------------------------------------------------------


def test_everyone_gets_a_folder_with_no_secret_of_anyone_else(tmp_path: Path) -> None:
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*ROLES, "broker", "authority", "security.toml"}
    secrets = [path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".key", ".url")]
    assert len(set(secrets)) == len(secrets) == 2 * len(ROLES) + 2
    passwords = [url.rpartition(b"@")[0].rpartition(b":")[2] for url in secrets if url.startswith(b"amqps")]
    for secret in [*passwords, *(secret for secret in secrets if b"PRIVATE" in secret)]:
        assert sum(secret in body for body in contents(tmp_path).values()) == 1, "a secret is in two files"


def test_only_the_owner_may_read_a_secret(tmp_path: Path) -> None:
    write(tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        secret = path.suffix in (".key", ".url") or path.name == "definitions.json"
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600 if secret else 0o644), path


@pytest.mark.parametrize("hosts", [PLACE.hosts, ("broker.example", "2001:db8::7"), ("2001:db8::7", "2001:db8::8")])
def test_running_it_again_changes_nothing(tmp_path: Path, hosts: tuple[str, ...]) -> None:
    place = dataclasses.replace(PLACE, hosts=hosts)
    write(tmp_path, place=place)
    before = contents(tmp_path)
    write(tmp_path, place=place, now=NOW + datetime.timedelta(days=30))
    assert changed(before, tmp_path) == set()


def test_a_url_that_was_spoilt_is_named_and_not_shown(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / ROLES[0] / "broker.url").write_text("amqps://bank:hunter2@[::1:5671/v")
    before = contents(tmp_path)
    with pytest.raises(JobError, match="the broker's URL cannot be used") as refused:
        write(tmp_path)
    assert "hunter2" not in str(refused.value)
    assert changed(before, tmp_path) == set()


@pytest.mark.parametrize(
    ("rotate", "expected"),
    [
        (Secret.LOGINS, {"broker/definitions.json", *(f"{role}/broker.url" for role in ROLES)}),
        (Secret.CERTIFICATES, {"broker/server.crt", "broker/server.key"}),
        (Secret.KEYS, {"security.toml", *(f"{role}/seal.key" for role in ROLES)}),
        (
            Secret.AUTHORITY,
            {"authority/ca.crt", "authority/ca.key", "broker/server.crt", "broker/server.key", "broker/ca.crt"}
            | {f"{role}/ca.crt" for role in ROLES},
        ),
    ],
)
def test_a_secret_is_made_anew_only_when_asked(tmp_path: Path, rotate: Secret, expected: set[str]) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    write(tmp_path, rotate)
    assert changed(before, tmp_path) == expected


def test_a_certificate_is_renewed_before_it_ends_and_when_the_broker_moves(tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    write(tmp_path, now=NOW + datetime.timedelta(days=380))
    assert changed(before, tmp_path) == {"broker/server.crt", "broker/server.key"}
    before = contents(tmp_path)
    write(tmp_path, place=replace(PLACE, hosts=("broker.example", "other.example")), now=NOW)
    assert changed(before, tmp_path) == {
        *("broker/server.crt", "broker/server.key"),
        *(f"{role}/broker.url" for role in ROLES),
    }
    assert "@broker.example:5671,other.example:5671/credit?" in (tmp_path / "bank" / "broker.url").read_text()


def test_the_authority_may_lie_elsewhere_until_it_has_to_sign(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "authority" / "ca.key").unlink()
    write(tmp_path)
    with pytest.raises(JobError, match=r"authority/ca.key is needed"):
        write(tmp_path, Secret.CERTIFICATES)


def test_the_table_it_writes_makes_the_job_seal_and_fits_the_keys(tmp_path: Path) -> None:
    write(tmp_path / "out")
    path = tmp_path / "job.toml"
    head = 'name = "credit"\nseed = 1\nepochs = 1\nbatch_size = 4\n[parties.bank]\nrole = "feature"\ncut = [2]\n'
    path.write_text(f'{head}[parties.insurer]\nrole = "label"\n\n{(tmp_path / "out/security.toml").read_text()}')
    agreed = Job.load(path)
    for role in ROLES:
        assert sealing(agreed, role, tmp_path / "out" / role / "seal.key", "amqps://broker/") is not None
    with pytest.raises(AlignmentError):
        sealing(agreed, "bank", tmp_path / "out" / "insurer" / "seal.key", "amqps://broker/")
    before = contents(tmp_path / "out")
    write(tmp_path / "out", agreed=agreed)
    assert changed(before, tmp_path / "out") == set()


def test_a_party_that_made_its_own_key_keeps_it_to_itself(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere")
    keys = {role: read_key(tmp_path / "elsewhere" / role / "seal.key").public for role in ROLES}
    agreed = job(security={"seal": True, "keys": {role: key.texts() for role, key in keys.items()}})
    (tmp_path / "here").mkdir()
    write(tmp_path / "here", agreed=agreed)
    assert not list((tmp_path / "here").rglob("seal.key"))
    assert (tmp_path / "here" / "security.toml").read_text() == security_table(keys)


def test_a_party_may_not_be_called_as_one_of_the_other_folders(tmp_path: Path) -> None:
    parties = {"broker": {"role": "feature", "cut": [2]}, "insurer": {"role": "label"}}
    with pytest.raises(JobError, match="party 'broker' needs another name"):
        write(tmp_path, agreed=job(parties=parties))


def test_passwords_are_kept_salted_and_hashed(tmp_path: Path) -> None:
    write(tmp_path)
    users = json.loads((tmp_path / "broker" / "definitions.json").read_text())["users"]
    assert len({user["password_hash"][:6] for user in users}) == len(ROLES), "the same salt twice"


# The broker -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secured:
    """A broker of our own that runs on what was provisioned."""

    out: Path
    place: Place
    broker: PrivateBroker

    @property
    def port(self) -> int:
        return self.place.port

    def url(self, role: str) -> str:
        text = (self.out / role / "broker.url").read_text().strip()
        return text.replace(f"{self.out}/broker/client", f"{self.out}/{role}/client")

    def link(self, role: str, url: str | None = None) -> RabbitLink:
        return RabbitLink(url or self.url(role), role, job().topology(), 8, limits=IMPATIENT)


@pytest.fixture(scope="module", params=["passwords", "certificates"])
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if find_server() is None:
        pytest.skip("a rabbitmq-server on this machine is needed")
    out, (port,) = tmp_path_factory.mktemp("out"), free_ports(1)
    certificates = request.param == "certificates"
    place = Place(("localhost", "127.0.0.1"), port, str(out / "broker"), str(out / "broker"), certificates)
    write(out, place=place)
    configuration = (out / "broker" / "rabbitmq.conf").read_text().splitlines()
    settings = tuple(line for line in configuration if not line.startswith(("listeners.tcp", "disk_free_limit")))
    plugins = ("rabbitmq_auth_mechanism_ssl",) if certificates else ()
    with PrivateBroker(settings=settings, plugins=plugins) as broker:
        yield Secured(out, place, broker)


def test_every_role_logs_in_over_tls_and_finds_what_it_needs(secured: Secured) -> None:
    own = {"own"} if secured.place.client_certificates else set()
    for role in ROLES:
        inbox = Inbox(secured.link(role)).open()
        ends = inbox.link.connectivity.certificates
        assert set(ends) == {"broker", *own}
        assert all(300 < (at - time.time()) / 86_400 < 400 for at in ends.values())
        inbox.link.close()


def test_nothing_older_than_tls_1_3_is_spoken(secured: Secured) -> None:
    def version(most: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(secured.out / "broker" / "ca.crt"))
        context.maximum_version = most
        plain = socket.create_connection(("127.0.0.1", secured.port), timeout=10)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
            return tls.version()

    assert version(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        version(ssl.TLSVersion.TLSv1_2)


def test_a_broker_that_another_authority_vouches_for_is_not_trusted(secured: Secured, tmp_path: Path) -> None:
    write(tmp_path)
    url = secured.url("bank").replace(f"{secured.out}/broker/ca.crt", f"{tmp_path}/bank/ca.crt")
    with pytest.raises(BrokerUnreachable, match=r"signed by an authority that is not known here: cacertfile"):
        secured.link("bank", url).open(lambda _: None, lambda: None, lambda _: None)


def test_a_broker_under_another_name_is_not_trusted(secured: Secured) -> None:
    url = secured.url("bank").replace("localhost", "127.0.0.2")
    with pytest.raises(BrokerUnreachable, match=r"for another name than '127\.0\.0\.2'"):
        secured.link("bank", url).open(lambda _: None, lambda: None, lambda _: None)


def refuses(port: int, credentials: pika.credentials.PlainCredentials | None, context: ssl.SSLContext | None) -> bool:
    options = None if context is None else pika.SSLOptions(context, "localhost")
    parameters = pika.ConnectionParameters(
        "127.0.0.1",
        port,
        "credit",
        ssl_options=options,
        socket_timeout=5,
        stack_timeout=5,
        blocked_connection_timeout=5,
    )
    if credentials is not None:
        parameters.credentials = credentials
    try:
        pika.BlockingConnection(parameters).close()
    except AMQPConnectionError:
        return True
    return False


class Anonymous(pika.credentials.PlainCredentials):
    """Parts of RabbitMQ 4's default configuration that let anonymous users in."""

    TYPE = "ANONYMOUS"

    def response_for(self, start: object) -> tuple[str, bytes]:
        return "ANONYMOUS", b""


def test_outsiders_are_refused(secured: Secured) -> None:
    trusting = ssl.create_default_context(cafile=str(secured.out / "broker" / "ca.crt"))
    for credentials in (
        pika.PlainCredentials("guest", "guest"),
        pika.PlainCredentials("credit.bank", ""),
        pika.PlainCredentials("credit.bank", "guess"),
        Anonymous("", ""),
    ):
        assert refuses(secured.port, credentials, trusting), credentials
    assert refuses(secured.port, pika.PlainCredentials("guest", "guest"), None), "not TLS"


def test_another_partys_login_or_certificate_opens_nothing_of_this_party(secured: Secured) -> None:
    stolen = secured.url("bank")
    with pytest.raises(BrokerUnreachable, match=r"right"):
        secured.link("insurer", stolen).open(lambda _: None, lambda: None, lambda _: None)


def test_certificates_are_renewed_while_the_broker_runs_and_no_connection_is_lost(secured: Secured) -> None:
    def served() -> str:
        return ssl.get_server_certificate(("127.0.0.1", secured.port), timeout=10)

    certificate = secured.out / "broker" / "server.crt"
    assert served() == certificate.read_text()
    bank, insurer = (Inbox(secured.link(role)).open() for role in ("bank", "insurer"))
    before = served()
    write(secured.out, Secret.CERTIFICATES, place=secured.place)
    secured.broker.evaluate("ssl:clear_pem_cache()")
    assert served() == certificate.read_text() != before
    late = Inbox(secured.link(SCHEDULER)).open()
    send(bank.link, "insurer", b"over the connection that was there before")
    assert insurer.take(1)
    for inbox in (bank, insurer, late):
        assert inbox.reconnects == 0
        inbox.link.close()
