"""With SL_QUEUE_TEST_SECURE=1 the tests' brokers speak TLS, and all that workers in processes say is sealed.

`seal` instead of `1` leaves TLS out, for tests that look into AMQP's frames.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sl_queue.deployment.certificates import new_authority, new_server
from sl_queue.deployment.provision import security_table
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.security.keys import PrivateKey, write_key
from sl_queue.testing.private_broker import HOST, PrivateBroker, answers, free_ports

SECURE = os.environ.get("SL_QUEUE_TEST_SECURE", "")
SEALED, TLS = SECURE in ("seal", "1"), SECURE == "1"


def write_keys(folder: Path, roles: Sequence[str]) -> str:
    """Write a private key for every role as `<role>/seal.key`; returns the table for the job."""
    keys = {role: PrivateKey.generate(signs=role == SCHEDULER) for role in roles}
    for role, key in keys.items():
        (folder / role).mkdir(parents=True)
        write_key(folder / role / "seal.key", key)
    return security_table({role: key.public for role, key in keys.items()})


class TlsBroker(PrivateBroker):
    """Its address is one for TLS 1.3."""

    def __init__(self) -> None:
        authority = new_authority("tests", datetime.now(UTC))
        server = new_server(authority, (HOST,), datetime.now(UTC))
        super().__init__()
        (self._plain_port,) = free_ports(1)
        files = {"ca.crt": authority.certificate, "server.crt": server.certificate, "server.key": server.key}
        for name, body in files.items():
            (self._folder / name).write_bytes(body)
        self._settings = (
            f"listeners.ssl.default = {HOST}:{self.port}",
            f"ssl_options.cacertfile = {self._folder}/ca.crt",
            f"ssl_options.certfile = {self._folder}/server.crt",
            f"ssl_options.keyfile = {self._folder}/server.key",
            "ssl_options.versions.1 = tlsv1.3",
        )

    def _answers(self) -> bool:
        return answers(self._plain_port)

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "RABBITMQ_NODE_PORT": str(self._plain_port)}

    def url(self, vhost: str = "/") -> str:
        plain = super().url(vhost)
        return f"{plain.replace('amqp://', 'amqps://')}?cacertfile={self._folder}/ca.crt"
