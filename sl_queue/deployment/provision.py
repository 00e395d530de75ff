"""Everything a deployment needs, one folder for each party and one for the broker: no secret of one in another's.

    authority/     ca.crt ca.key                       signs certificates; keep it off every machine that runs something
    broker/        rabbitmq.conf definitions.json enabled_plugins ca.crt server.crt server.key
    <role>/        ca.crt broker.url seal.key [client.crt client.key]     for each party, the scheduler, the operator
    <party>-hand/  ca.crt broker.url [client.crt client.key]              for the hands of a party, if it has any
    security.toml  the public keys, to be pasted into the job

What is there is kept, so that it may be run again after every change of the job; secrets are replaced only when asked.
"""

import datetime
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote, unquote, urlencode

from sl_queue.config.job import Job
from sl_queue.deployment.certificates import Certificate, new_authority, new_client, new_server
from sl_queue.deployment.definitions import definitions, hashed, is_hash_of, roles, user_of
from sl_queue.deployment.hands import SUFFIX, hand_user, hands_vhost, with_hands
from sl_queue.errors import JobError
from sl_queue.protocol.broker_url import split
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.security.keys import PrivateKey, PublicKey, read_key

PORT = 5671
BROKER_AT = "/etc/sl_queue"  # where the broker's folder lies on its machine
RENEW_DAYS = 30  # a certificate that ends sooner is replaced
MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # RabbitMQ 4's own; 3.10 would take 128 MiB


class Secret(StrEnum):
    """Secrets that `provision` may replace by new ones."""

    LOGINS = "logins"  # the passwords at the broker
    CERTIFICATES = "certificates"  # of the broker and its clients
    AUTHORITY = "authority"  # what they are signed with; all certificates follow
    KEYS = "keys"  # for sealing; the public ones stand in the job, so all parties need the new job


@dataclass(frozen=True, slots=True)
class Place:
    """Address of the broker, and how one logs in there."""

    hosts: tuple[str, ...]  # names and addresses of the broker, or of its nodes; the URLs try them in turn
    port: int = PORT
    at: str = "."  # a role's folder, as its worker sees it: it is started there, or this is absolute
    broker_at: str = BROKER_AT
    client_certificates: bool = False  # instead of passwords
    hands: tuple[str, ...] = ()  # parties whose hands meet them at this broker


def provision(
    job: Job, place: Place, out: Path, rotate: frozenset[Secret], now: datetime.datetime
) -> dict[str, PublicKey]:
    """Write all folders; returns the public keys by role. Raises JobError where a file cannot be read or written."""
    try:
        return _Folders(job, place, out, rotate, now).write()
    except OSError as error:
        raise JobError(f"{error.filename or out}: {error.strerror}") from None


def security_table(keys: Mapping[str, PublicKey]) -> str:
    """Format the table [security] of a job with those keys."""
    lines = ["[security]", "seal = true"]
    for role, key in keys.items():
        lines += ["", f"[security.keys.{role}]", *(f'{name} = "{text}"' for name, text in key.texts().items())]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class _Folders:
    job: Job
    place: Place
    out: Path
    rotate: frozenset[Secret]
    now: datetime.datetime

    def write(self) -> dict[str, PublicKey]:
        taken = {"authority", "broker"}.intersection(self.job.parties)
        if taken:
            raise JobError(f"party {taken.pop()!r} needs another name: a folder of that name has another use")
        authority = self._authority()
        self._require_parties()
        passwords = {role: self._password(role) for role in roles(self.job)}
        for role in roles(self.job):
            self._login(role, user_of(self.job, role), self.job.name, authority, passwords[role])
        of_hands = {party: self._password(f"{party}{SUFFIX}") for party in self.place.hands}
        for party, password in of_hands.items():
            user, vhost = hand_user(self.job, party), hands_vhost(self.job, party)
            self._login(f"{party}{SUFFIX}", user, vhost, authority, password)
        self._broker(authority, passwords, of_hands)
        keys = {role: self._key(role) for role in roles(self.job)}
        _write(self.out / "security.toml", security_table(keys).encode())
        return keys

    def _require_parties(self) -> None:
        for party in self.place.hands:
            if party not in self.job.parties:
                raise JobError(f"--hands {party}: it must be one of {', '.join(self.job.parties)}")
            if f"{party}{SUFFIX}" in self.job.parties:
                raise JobError(f"party {party + SUFFIX!r} needs another name: a folder of that name has another use")

    def _authority(self) -> Certificate:
        folder = self.out / "authority"
        known = _known(folder, "ca")
        if known is not None and Secret.AUTHORITY not in self.rotate:
            return known
        made = new_authority(self.job.name, self.now)
        _write(folder / "ca.crt", made.certificate)
        _write(folder / "ca.key", made.key, secret=True)
        return made

    def _login(self, name: str, user: str, vhost: str, authority: Certificate, password: str) -> None:
        folder, place = self.out / name, self.place
        _write(folder / "ca.crt", authority.certificate)
        options = {"cacertfile": f"{place.at}/ca.crt"}
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@"
        if place.client_certificates:
            self._certificate(folder, "client", authority, (user,), lambda: new_client(authority, user, self.now))
            options |= {"certfile": f"{place.at}/client.crt", "keyfile": f"{place.at}/client.key"}
            login, options["auth_mechanism"] = "", "external"
        nodes = ",".join(f"[{host}]:{place.port}" if ":" in host else f"{host}:{place.port}" for host in place.hosts)
        where = f"{nodes}/{quote(vhost, safe='')}?{urlencode(options, safe='/')}"
        _write(folder / "broker.url", f"amqps://{login}{where}\n".encode(), secret=True)

    def _broker(self, authority: Certificate, passwords: Mapping[str, str], of_hands: Mapping[str, str]) -> None:
        folder, hosts = self.out / "broker", self.place.hosts
        self._certificate(folder, "server", authority, hosts, lambda: new_server(authority, hosts, self.now))
        _write(folder / "ca.crt", authority.certificate)
        _write(folder / "rabbitmq.conf", _configuration(self.place).encode())
        plugins = ["rabbitmq_prometheus", *(["rabbitmq_auth_mechanism_ssl"] if self.place.client_certificates else [])]
        _write(folder / "enabled_plugins", f"[{','.join(plugins)}].\n".encode())
        known = _known_hashes(folder / "definitions.json")
        hashes = {role: self._hash(passwords[role], known.get(user_of(self.job, role))) for role in passwords}
        of_hand = {p: self._hash(password, known.get(hand_user(self.job, p))) for p, password in of_hands.items()}
        body = json.dumps(with_hands(definitions(self.job, hashes), self.job, of_hand), indent=2) + "\n"
        _write(folder / "definitions.json", body.encode(), secret=True)

    def _hash(self, password: str, known: str | None) -> str:
        if self.place.client_certificates:
            return ""  # no password opens this login
        if known and is_hash_of(password, known):
            return known
        return hashed(password, secrets.token_bytes(4))

    def _certificate(
        self, folder: Path, stem: str, authority: Certificate, names: tuple[str, ...], make: Callable[[], Certificate]
    ) -> None:
        """Keep the certificate that is there as long as it is good."""
        known = _known(folder, stem)
        soon = self.now + datetime.timedelta(days=RENEW_DAYS)
        good = known is not None and known.names == names and known.expires > soon and known.is_by(authority)
        if good and Secret.CERTIFICATES not in self.rotate:
            return
        if not authority.key:
            raise JobError(f"{self.out}/authority/ca.key is needed to sign a certificate for {', '.join(names)}")
        made = make()
        _write(folder / f"{stem}.crt", made.certificate)
        _write(folder / f"{stem}.key", made.key, secret=True)

    def _password(self, role: str) -> str:
        """Return the password that stands in the role's URL, or a new one."""
        path = self.out / role / "broker.url"
        if path.exists() and Secret.LOGINS not in self.rotate:
            password = split(path.read_text().strip()).password
            if password:
                return unquote(password)
        return secrets.token_urlsafe(32)

    def _key(self, role: str) -> PublicKey:
        """Return the public key of a role; if only the job knows it, its private half is in safer hands than these."""
        path, listed = self.out / role / "seal.key", self.job.security.keys.get(role)
        if path.exists() and Secret.KEYS not in self.rotate:
            return read_key(path).public
        if listed is not None and not path.exists():
            return PublicKey.parse(listed.seal, listed.sign)
        key = PrivateKey.generate(signs=role == SCHEDULER)
        _write(path, key.pem(), secret=True)
        return key.public


def _configuration(place: Place) -> str:
    """Format the configuration that the broker reads when it starts."""
    login = (
        [
            "auth_mechanisms.1 = EXTERNAL",
            "ssl_options.verify = verify_peer",
            "ssl_options.fail_if_no_peer_cert = true",
            "ssl_cert_login_from = subject_alternative_name",
            "ssl_cert_login_san_type = dns",
        ]
        if place.client_certificates
        else ["auth_mechanisms.1 = PLAIN"]  # neither ANONYMOUS nor AMQPLAIN
    )
    lines = [
        "listeners.tcp = none",
        f"listeners.ssl.default = {place.port}",
        f"ssl_options.cacertfile = {place.broker_at}/ca.crt",
        f"ssl_options.certfile = {place.broker_at}/server.crt",
        f"ssl_options.keyfile = {place.broker_at}/server.key",
        "ssl_options.versions.1 = tlsv1.3",
        *login,
        f"load_definitions = {place.broker_at}/definitions.json",
        f"max_message_size = {MAX_MESSAGE_BYTES}",
        "disk_free_limit.absolute = 1GB",
    ]
    return "\n".join(lines) + "\n"


def _known(folder: Path, stem: str) -> Certificate | None:
    """Load the certificate that lies there, without its key if that has been moved away."""
    certificate, key = folder / f"{stem}.crt", folder / f"{stem}.key"
    if not certificate.exists():
        return None
    return Certificate(certificate.read_bytes(), key.read_bytes() if key.exists() else b"")


def _known_hashes(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    return {user["name"]: user["password_hash"] for user in json.loads(path.read_text())["users"]}


def _write(path: Path, body: bytes, *, secret: bool = False) -> None:
    """Write whole or not at all; never readable for others, not even for a moment, if it is a secret."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    temporary, mode = path.with_name(f".{path.name}.tmp"), 0o600 if secret else 0o644
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(mode)
    temporary.replace(path)
