"""A certificate that TLS refuses is reported with which one, why, and what to do; and when good ones end."""

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sl_queue.checking.broker import _certificates
from sl_queue.checking.findings import Check, Finding, Level
from sl_queue.deployment.certificates import Certificate, new_authority, new_client, new_server
from sl_queue.errors import BrokerUnreachable, TransportError
from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.certificates import AUTHORITY, BROKER, OWN, try_expiry
from sl_queue.transport.rabbitmq.connection import Connection
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.retry import Limits
from tests.support.links import two_parties

NOW = datetime.datetime.now(datetime.UTC)
HOST = "127.0.0.1"
AT_ONCE = Limits(first_s=30.0)


def days(count: int) -> datetime.datetime:
    return NOW + datetime.timedelta(days=count)


@pytest.fixture(scope="module")
def authority() -> Certificate:
    return new_authority("tests", days(-2000))


def written(folder: Path, name: str, made: Certificate) -> Path:
    path = folder / f"{name}.pem"
    path.write_bytes(made.certificate + made.key)
    return path


@contextmanager
def listening(folder: Path, server: Certificate, trusts: Certificate | None = None) -> Iterator[int]:
    """Listen on a port with that certificate, without speaking AMQP; with `trusts` it wants one of the client too."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(written(folder, "server", server))
    if trusts is not None:
        context.load_verify_locations(written(folder, "trusted", trusts))
        context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    plain, _ = listener.accept()
                    plain.settimeout(10)
                    secured = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
                    with secured, suppress(OSError):
                        secured.do_handshake()  # and closes with what it has not read, as brokers do

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def refusal(url: str) -> str:
    link = RabbitLink(url, "bank", two_parties(), limits=AT_ONCE)
    with pytest.raises(BrokerUnreachable) as error:
        link.open(lambda _: None, lambda: None, lambda _: None)
    assert "pw" not in str(error.value)
    return str(error.value)


def url_of(port: int, cacertfile: Path, host: str = HOST, **options: Path) -> str:
    more = "".join(f"&{name}={path}" for name, path in options.items())
    return f"amqps://bank:pw@{host}:{port}/v?cacertfile={cacertfile}{more}"


@pytest.mark.parametrize(
    ("made", "hosts", "said"),
    [
        (-500, (HOST,), "the broker's certificate has expired"),
        (2, (HOST,), "the broker's certificate is not valid yet: set this machine's clock"),
        (0, ("127.0.0.3", "broker.example"), "the broker's certificate is for another name than '127.0.0.1'"),
    ],
)
def test_a_certificate_of_the_broker_that_is_refused_says_why(
    authority: Certificate, tmp_path: Path, made: int, hosts: Sequence[str], said: str
) -> None:
    with listening(tmp_path, new_server(authority, tuple(hosts), days(made))) as port:
        assert said in refusal(url_of(port, written(tmp_path, "ca", authority)))


def test_another_name_is_told_as_one_too(authority: Certificate, tmp_path: Path) -> None:
    with listening(tmp_path, new_server(authority, (HOST,), NOW)) as port:
        assert "for another name than 'localhost'" in refusal(
            url_of(port, written(tmp_path, "ca", authority), "localhost")
        )


def test_an_authority_that_is_not_known_or_that_has_expired_is_told(authority: Certificate, tmp_path: Path) -> None:
    other, old = new_authority("other", NOW), new_authority("old", days(-4000))
    with listening(tmp_path, new_server(authority, (HOST,), NOW)) as port:
        said = refusal(url_of(port, written(tmp_path, "ca", other)))
        assert "signed by an authority that is not known here: cacertfile" in said
    with listening(tmp_path, new_server(old, (HOST,), NOW)) as port:
        assert "has expired, or one that it is signed with" in refusal(url_of(port, written(tmp_path, "ca", old)))


def test_a_broker_that_signs_for_itself_is_not_known(authority: Certificate, tmp_path: Path) -> None:
    with listening(tmp_path, new_authority("self", NOW)) as port:
        assert "an authority that is not known here" in refusal(url_of(port, written(tmp_path, "ca", authority)))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("expired", "this party's own certificate has expired"),
        ("foreign", "does not know the authority that signed this party's own certificate"),
        ("none", "the broker wants a certificate of this party"),
    ],
)
def test_an_own_certificate_that_the_broker_refuses_says_why(
    authority: Certificate, tmp_path: Path, made: str, said: str
) -> None:
    client = {
        "expired": new_client(authority, "bank", days(-500)),
        "foreign": new_client(new_authority("foreign", NOW), "bank", NOW),
        "none": None,
    }[made]
    own = {} if client is None else {"certfile": written(tmp_path, "client", client)}
    with listening(tmp_path, new_server(authority, (HOST,), NOW), trusts=authority) as port:
        assert said in refusal(url_of(port, written(tmp_path, "ca", authority), **own))


def test_check_tells_the_days_that_are_left_and_warns_below_thirty(authority: Certificate, tmp_path: Path) -> None:
    found: list[Finding] = []
    own = written(tmp_path, "client", new_client(authority, "bank", days(-390)))
    with listening(tmp_path, new_server(authority, (HOST,), days(-10)), trusts=authority) as port:
        url = url_of(port, written(tmp_path, "ca", authority), certfile=own)
        assert {BROKER, OWN, AUTHORITY} == set(try_expiry(url))
        _certificates(Check(found.append), url)
    told = {finding.text.split(" is valid for ")[0]: finding for finding in found}
    assert "386 days" in told["the broker's certificate"].text
    assert told["the broker's certificate"].level is told["the authority's certificate (cacertfile)"].level is Level.OK
    ending = told["the certificate of this login (certfile)"]
    assert ending.level is Level.WARNING and "6 days" in ending.text and "sl-queue provision" in ending.text


def test_files_that_are_being_changed_are_tried_again_and_not_a_bug(authority: Certificate, tmp_path: Path) -> None:
    import asyncio

    from sl_queue.transport.rabbitmq.failures import Denied

    ca = written(tmp_path, "ca", authority)
    (address,) = Address.parse(url_of(1, ca))
    ca.write_text("half a certif")

    async def attempt() -> None:
        await Connection(address, "bank").open()

    with pytest.raises(Denied, match="certificates that the broker's URL names cannot be used now"):
        asyncio.run(attempt())


def test_a_broker_that_closes_during_the_handshake_is_tried_again(authority: Certificate, tmp_path: Path) -> None:
    tried: list[int] = []
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    plain, _ = listener.accept()
                    with plain:
                        tried.append(len(plain.recv(65536)))  # the client's first message, all of it: no reset
                    if len(tried) == 2:
                        link.close()

        url = url_of(listener.getsockname()[1], written(tmp_path, "authority", authority))
        link = RabbitLink(url, "bank", two_parties(), limits=Limits(first_s=200.0))
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TransportError, match="party 'bank' is closed"):
            link.open(lambda _: None, lambda: None, lambda _: None)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert len(tried) >= 2
