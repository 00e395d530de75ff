"""A trained model served for measurements: its parties' processes, over a broker, sealed."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import pika

from benchmarks.workloads import LABEL, SMALL, job_of, party_file
from sl_queue.compute.threads import limit_threads
from sl_queue.config.resolve import PartySpec, resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.asked_ids import request_keys
from sl_queue.launch.answering_versions import id_key
from sl_queue.launch.connect import connector
from sl_queue.launch.process import keep_from_collector
from sl_queue.launch.service import Served, serve_feature, serve_label
from sl_queue.local.threads import run_local
from sl_queue.protocol.serving import Keys
from sl_queue.security.hpke import Cipher
from sl_queue.security.keys import PrivateKey
from sl_queue.security.sealing import Seal
from sl_queue.testing.private_broker import PrivateBroker

PARTY = "bank"
JOB = job_of(SMALL, 1, holdout=0.1)
DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Everything that a process of the service needs to begin."""

    url: str
    folder: Path
    pems: dict[str, bytes]

    def seal(self, role: str) -> Seal:
        """Return a role's seal."""
        keys = {name: PrivateKey.parse(pem) for name, pem in self.pems.items()}
        return Seal(role, keys[role], {name: key.public for name, key in keys.items()}, Cipher.AES_256_GCM)

    def spec(self, role: str) -> PartySpec:
        """Return a party of the job, which serves the rows that it trained on."""
        return resolve(JOB, party_file(SMALL, role), Importer())


@contextmanager
def place_for(broker: PrivateBroker, vhost: str) -> Iterator[Place]:
    """Train, and yield a place to serve at."""
    pems = {name: PrivateKey.generate(signs=False).pem() for name in (PARTY, LABEL)}
    with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
        run_local(JOB, [party_file(SMALL, party) for party in SMALL.columns], out=Path(folder))
        yield Place(broker.url(vhost), Path(folder), pems)
    broker.delete_vhost(vhost)


def feature_party(ready: Connection, place: Place) -> None:
    """Answer requests for ever."""
    limit_threads(1)
    about = (JOB, place.spec(PARTY), place.folder / PARTY, connector(JOB, place.url), place.seal(PARTY))
    serve_feature(*about, at_most=0, deadline_s=DEADLINE_S)
    keep_from_collector()
    ready.send(True)
    Event().wait()


def echo(ready: Connection, url: str) -> None:
    """Answer bare messages for ever."""
    channel: Any = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.queue_declare("bare")

    def answer(channel: Any, _: Any, properties: Any, body: bytes) -> None:
        channel.basic_publish("", properties.reply_to, body)

    channel.basic_consume("bare", answer, auto_ack=True)
    ready.send(True)
    channel.start_consuming()


def bare_trip(url: str) -> Callable[[], None]:
    """Return a call that sends 64 bytes to `echo` over the broker and waits for the answer."""
    connection: Any = pika.BlockingConnection(pika.URLParameters(url))
    channel, answers = connection.channel(), []
    channel.basic_consume("amq.rabbitmq.reply-to", lambda *given: answers.append(given[3]), auto_ack=True)
    properties = pika.BasicProperties(reply_to="amq.rabbitmq.reply-to")

    def call() -> None:
        answers.clear()
        channel.basic_publish("", "bare", bytes(64), properties)
        while not answers:
            connection.process_data_events(1)

    return call


def label_holder(place: Place) -> Served:
    """Begin to take requests in this process."""
    about = (JOB, place.spec(LABEL), place.folder / LABEL, connector(JOB, place.url), place.seal(LABEL), None)
    return serve_label(*about, deadline_s=DEADLINE_S)


def single_rows() -> Iterator[Keys]:
    """Yield the keys of single rows, again and again."""
    keys, _ = request_keys(range(SMALL.rows), "integer", id_key(JOB))
    assert keys is not None
    return (keys[row : row + 1] for row in itertools.cycle(range(0, SMALL.rows, 7)))
