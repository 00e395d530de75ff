"""Clients that ask badly, slowly, for too much or over broken TLS get a clear answer, and the service goes on."""

import http.client
import json
import shutil
import socket
import ssl
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.prediction import ServeFile
from sl_queue.deployment.certificates import Certificate, new_authority, new_server
from sl_queue.errors import JobError
from sl_queue.launch import http_listener, http_service
from sl_queue.launch.http_listener import HttpServer
from sl_queue.launch.http_service import Api
from sl_queue.launch.service_worker import _token
from sl_queue.security.server_certificate import ServerCertificate
from tests.compute.test_prediction import files
from tests.compute.test_service_on_faults import customers
from tests.compute.test_serving import Service, service, trained
from tests.support.waiting import await_that

__all__ = ["service", "trained"]  # fixtures
HOST = "127.0.0.1"
NOW = datetime.now(UTC)


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Read an answer."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


def goes_on(service: Service) -> bool:
    return bool(service.ask([int(service.ids[0])]).status_code == 200)


def test_a_body_of_100_mb_is_refused_before_it_is_read(service: Service) -> None:
    with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n" + b" " * 1000)
        status, said = answer_of(connection)
    assert status == 413 and "1048576 bytes" in said["error"]
    assert goes_on(service)


def test_a_body_of_unknown_length_is_read_up_to_the_limit(service: Service) -> None:
    with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(17):
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        status, _ = answer_of(connection)
    assert status == 413
    assert goes_on(service)


def test_a_body_that_comes_too_slowly_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_service, "BODY_S", 0.3)
    with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
        connection.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{"ids"')
        status, said = answer_of(connection)
    assert status == 408 and "must come within 0.3 s" in said["error"]
    assert goes_on(service)


def test_a_connection_on_which_nothing_is_asked_is_closed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listener, "REQUEST_S", 0.2)
    with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
        connection.sendall(b"POST /predict HT")
        assert connection.recv(1000) == b""
    assert goes_on(service)


@pytest.mark.parametrize("dribbled", [b"POST /predict HT", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
def test_a_connection_whose_next_head_never_ends_is_closed(
    service: Service, monkeypatch: pytest.MonkeyPatch, dribbled: bytes
) -> None:
    monkeypatch.setattr(http_listener, "REQUEST_S", 0.2)
    with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(connection)[0] == 200
        connection.sendall(dribbled)
        while connection.recv(1000):  # it may be told that this is no request
            pass
    assert goes_on(service)


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
@pytest.mark.parametrize(
    "begins",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nX: ",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ",
    ],
    ids=["path", "names", "value", "trailer"],
)
def test_a_head_that_does_not_end_takes_bounded_memory(service: Service, before: bytes, begins: bytes) -> None:
    sent, part = 0, b"x" * 65536
    with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
        connection.sendall(before + begins)
        try:
            while sent < 256 * len(part):
                sent += connection.send(part)
        except OSError:
            pass
    assert sent < 256 * len(part)
    assert goes_on(service)


def test_a_client_that_leaves_before_its_answer_harms_nobody(service: Service) -> None:
    service.stop_bank()
    body = json.dumps({"ids": [int(service.ids[0])]}).encode()
    for _ in range(3):
        with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    service.start_bank()
    assert goes_on(service)


def test_a_client_that_leaves_within_its_body_is_counted_and_leaves_no_traceback(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection((HOST, service.http.port), timeout=30) as connection:
        connection.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"ids"')
    await_that(lambda: 'requests_total{status="499"} 1' in service.get("/metrics").text, "it is counted")
    assert "Traceback" not in caplog.text and not [each for each in caplog.records if each.exc_info]
    assert goes_on(service)


def test_a_token_is_compared_as_it_is_sent(trained: Any) -> None:
    service = Service(trained[0], token="ümlaut-token-of-many-letters")
    try:
        ids, sent = [int(service.ids[0])], "Bearer ümlaut-token-of-many-letters"
        assert service.ask(ids, authorization=sent.encode()).status_code == 200
        assert service.ask(ids, authorization=sent).status_code == 401  # in Latin-1
    finally:
        service.close()


def test_a_token_of_several_lines_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    path = tmp_path / "service.token"
    path.touch(0o600)
    path.write_text("a-token-of-one-line\nand-another-line\n")
    (file,) = (one for one in files(customers(9)) if one.party == "insurer")
    with pytest.raises(JobError, match=r"service\.token holds several lines"):
        _token(file.model_copy(update={"serve": ServeFile(token=f"file:{path}")}))


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.parametrize("host", ["::1", "::", "localhost", "127.0.0.1"])
def test_a_service_listens_on_addresses_of_either_kind(service: Service, host: str) -> None:
    assert service.insurer.label is not None
    server = HttpServer(Api(service.insurer.label, "integer", None).app(), host, 0)
    try:
        asked = http.client.HTTPConnection("::1" if ":" in host else HOST, server.port, timeout=30)
        asked.request("POST", "/predict", json.dumps({"ids": [int(service.ids[0])]}))
        assert asked.getresponse().status == 200
        asked.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    "one", ['"\\ud800"', '"a\\udfff"', "null", "1e400", "-", '{"a": 1}', "[1]", '"' + "x" * 1001 + '"']
)
def test_ids_that_no_table_holds_are_named_by_place(service: Service, one: str) -> None:
    said = service.post(f'{{"ids": [{service.ids[0]}, {one}]}}'.encode())
    assert said.status_code == 422, said.text
    assert said.json().get("places", [1]) == [1]
    assert goes_on(service)


def test_ids_of_text_are_held_against_text(trained: Any) -> None:
    service = Service(trained[0])
    try:
        assert service.insurer.label is not None
        texts = HttpServer(Api(service.insurer.label, "text", None).app(), HOST, 0)
        service.http.close()
        service.http = texts
        assert service.post(b'{"ids": [7]}').status_code == 422
        assert service.post(b'{"ids": ["\\ud800"]}').status_code == 422
        assert service.post(b'{"ids": ["nobody"]}').json()["predictions"][0]["missing"] == ["bank", "insurer"]
    finally:
        service.close()


def test_ids_of_text_are_written_as_those_of_the_tables_and_come_back_as_they_were(trained: Any) -> None:
    service = Service(trained[0])
    try:
        label = service.insurer.label
        assert label is not None
        label.spec = replace(label.spec, table=replace(label.spec.table, normalise=("strip",)))
        service.http.close()
        service.http = HttpServer(Api(label, "text", None).app(), HOST, 0)
        asked = f" {service.ids[0]} "
        (found,) = service.ask([asked]).json()["predictions"]
        assert found["id"] == asked and 0 < found["probability"] < 1
    finally:
        service.close()


def test_the_base_of_another_run_is_refused_by_the_name_of_its_party(trained: Any, tmp_path: Path) -> None:
    root = tmp_path / "lost"
    shutil.copytree(trained[0], root)
    (version,) = (root / "bank" / "versions").iterdir()
    about = json.loads((version / "run.json").read_text())
    (version / "run.json").write_text(json.dumps({**about, "run": "another"}))
    version.rename(version.with_name("another"))
    shutil.rmtree(root / "bank" / "final")
    service = Service(root)
    try:
        said = service.ask([int(service.ids[0])])
        assert said.status_code == 409 and said.json()["parties"] == ["bank"]
        assert "another" not in said.text  # which runs the bank has is its own affair
    finally:
        service.close()


# TLS ----------------------------------------------------------------------------------------------------------------


def written(folder: Path, made: Certificate, name: str = "server") -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(made.certificate)
    key.touch(0o600)
    key.write_bytes(made.key)
    return certificate, key


def test_a_service_with_a_certificate_speaks_https_alone(service: Service, tmp_path: Path) -> None:
    authority = new_authority("tests", NOW)
    files = written(tmp_path, new_server(authority, (HOST,), NOW))
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    assert service.insurer.label is not None
    tls = ServerCertificate.read(*files, NOW)
    server = HttpServer(Api(service.insurer.label, "integer", None).app(), HOST, 0, tls)
    try:
        context = ssl.create_default_context(cafile=tmp_path / "ca.crt")
        connection = http.client.HTTPSConnection(HOST, server.port, timeout=30, context=context)
        connection.request("POST", "/predict", json.dumps({"ids": [int(service.ids[0])]}))
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection(HOST, server.port, context=ssl.create_default_context()).connect()
        plain = http.client.HTTPConnection(HOST, server.port, timeout=30)
        plain.request("GET", "/health")
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.getresponse()
    finally:
        server.close()


def test_a_certificate_that_clients_would_refuse_is_named_before_anything_is_served(tmp_path: Path) -> None:
    authority, days = new_authority("tests", NOW - timedelta(days=3000)), timedelta(days=1)
    good = written(tmp_path, new_server(authority, (HOST,), NOW), "good")
    old = written(tmp_path, new_server(authority, (HOST,), NOW - 2000 * days), "old")
    early = written(tmp_path, new_server(authority, (HOST,), NOW + 2 * days), "early")
    cases = [
        (old, "old.crt: the certificate has expired on .* renew it"),
        (early, "early.crt: the certificate is valid from .* clock"),
        ((good[0], old[1]), "old.key: the key does not belong to the certificate .*good.crt"),
        ((good[0], tmp_path / "none.key"), "none.key: the key cannot be read .No such file"),
        ((tmp_path / "none.crt", good[1]), "none.crt: no certificate in PEM .*No such file"),
        ((good[1], good[1]), "good.key: no certificate in PEM"),
        ((good[0], good[0]), "good.crt: "),
    ]
    for (certificate, key), told in cases:
        with pytest.raises(JobError, match=told):
            ServerCertificate.read(certificate, key, NOW)
    good[1].chmod(0o644)
    with pytest.raises(JobError, match=r"good\.key: others may read this private key .*chmod 600"):
        ServerCertificate.read(*good, NOW)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    certificate, key = written(tmp_path, new_server(new_authority("tests", NOW), (HOST,), NOW))
    private = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))
    began = time.monotonic()
    with pytest.raises(JobError, match="no private key in PEM without a password"):
        ServerCertificate.read(certificate, key, NOW)
    assert time.monotonic() - began < 30
