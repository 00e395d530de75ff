"""A worker that serves: in a process of its own, over a broker, until it is ended."""

import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.resolve import PartySpec, data_to_predict, resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.to_predict import ids_to_predict
from sl_queue.errors import JobError
from sl_queue.launch.asked import Asked
from sl_queue.launch.explaining import explain_over
from sl_queue.launch.importance import NAME, Explained
from sl_queue.launch.party import require_role, workplace_of
from sl_queue.launch.prediction import spec_to_predict
from sl_queue.launch.process import keep_from_collector
from sl_queue.launch.service import Served, serve_feature, serve_label
from sl_queue.observe.log import to_log
from sl_queue.protocol.text import counted
from sl_queue.security.private_file import read_secret
from sl_queue.security.server_certificate import ServerCertificate

log = logging.getLogger("sl_queue")

_IN_FILE = "file:"
_LOOK_S = 0.2


def run_service(
    role: Literal["feature", "label"],
    job: Job,
    party_file: PartyFile,
    run: str | None,
    broker: str | None,
    state: Path | None,
    key: Path | None = None,
    *,
    explain: bool = False,
) -> None:
    """Serve the rows of [predict] until the process is ended; or `explain` by those that serve. Raises SlQueueError."""
    spec = resolve(job, party_file, Importer())
    require_role(spec, role)
    spec = spec_to_predict(spec, data_to_predict(party_file), Asked(labels=explain))
    place, serve = workplace_of(job, party_file, broker, state, key, to_log), party_file.serve
    about = (job, spec, place.state, place.connect, place.seal)
    if role == "feature":
        served = serve_feature(*about, at_most=serve.at_most, deadline_s=serve.deadline, explains=serve.explain)
        keep_from_collector()
        log.info("%s: answers requests", spec.party)
        try:
            _until_failure(served)
        finally:
            served.close()
        return
    if explain:
        _explain(party_file, explain_over(*about, run))
        return
    served = serve_label(*about, run, deadline_s=serve.deadline)
    try:
        _over_http(spec, party_file, served)
    finally:
        served.close()


def _explain(party_file: PartyFile, found: Explained) -> None:
    path = (party_file.folder or Path()) / NAME
    found.write(path)
    print(
        f"{found.metric} {found.value:.6g} on {counted(found.rows, 'row', 'rows')}; worse by so much without: {path}",
        flush=True,
    )
    for party, column, worse in found.ranked():
        print(f"{party}  {column}  {worse}", flush=True)


def _over_http(spec: PartySpec, party_file: PartyFile, served: Served) -> None:
    try:
        from sl_queue.launch.http_listener import HttpServer
        from sl_queue.launch.http_service import Api
    except ImportError as error:
        raise JobError("--serve needs further packages: pip install 'sl_queue[serve]'") from error
    assert served.label is not None
    host, _, port = party_file.serve.listen.rpartition(":")
    tls = _certificate(party_file)
    api = Api(served.label, ids_to_predict(spec.table).type, _token(party_file), lambda: served.channel.failure)
    try:
        server = HttpServer(api.app(), host.strip("[]"), int(port), tls)
    except OSError as error:
        raise JobError(f"[serve] listen = {party_file.serve.listen!r}: {error.strerror or error}") from None
    keep_from_collector()
    where = f"{'http' if tls is None else 'https'}://{host}:{server.port}"
    log.info("%s: serves run %s at %s", spec.party, served.label.models.run, where)
    try:
        while not server.wait(_LOOK_S):
            if served.channel.failure is not None:
                raise served.channel.failure
    finally:
        server.close()


def _certificate(party_file: PartyFile) -> ServerCertificate | None:
    serve = party_file.serve
    if serve.certificate is None or serve.key is None:
        return None
    return ServerCertificate.read(serve.certificate, serve.key, datetime.now(UTC))


def _until_failure(served: Served) -> None:
    while served.channel.failure is None:
        time.sleep(_LOOK_S)
    raise served.channel.failure


def _token(party_file: PartyFile) -> str | None:
    said = party_file.serve.token
    if said is None:
        return None
    if not said.startswith(_IN_FILE):
        raise JobError("[serve] token must be file:PATH, so that it stands in no file that others are shown")
    path = (party_file.folder or Path()) / said.removeprefix(_IN_FILE)
    try:
        token = read_secret(path, "token of the service").decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"[serve] token: {path} cannot be read ({type(error).__name__})") from None
    if len(token) < 16:
        raise JobError(f"[serve] token: {path} holds fewer than 16 characters, which can be guessed")
    if len(token.splitlines()) > 1:
        raise JobError(f"[serve] token: {path} holds several lines, which no request can bear; write it as one")
    return token
