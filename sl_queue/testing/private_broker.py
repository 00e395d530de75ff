"""A RabbitMQ of our own: on free ports, with its own data, killed and started again at will, gone at the end.

It never touches a broker that already runs: node name, ports, epmd, cookie, password and data folder are all its own.
It ends with this process, even with one that is killed: the broker and its epmd read from pipes that only we hold.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from sl_queue.config.environment import RABBITMQ_SERVER
from sl_queue.errors import BrokerUnreachable, JobError
from sl_queue.testing.broker_contents import HOST, USER, Contents

START_S = 180.0  # two cores with six suites on them took more than 90
COOKIE = ".erlang.cookie"

_SERVERS = ("/usr/lib/rabbitmq/bin/rabbitmq-server",)  # Debian's wrapper on PATH wants to be root and changes the user
_ERL_CALLS = ("/usr/lib/erlang/bin", "/usr/local/lib/erlang/bin")


def find_server() -> Path | None:
    """Find this machine's rabbitmq-server that any user may start with data of their own, or return None.

    The one that SL_QUEUE_RABBITMQ_SERVER names comes first.
    """
    candidates = (RABBITMQ_SERVER.read(), *_SERVERS, shutil.which("rabbitmq-server"))
    found = [Path(path) for path in candidates if path is not None and os.access(path, os.X_OK)]
    return found[0] if found else None


class PrivateBroker(Contents):  # mutable: it owns processes
    """A broker for tests, benchmarks and `sl-queue chaos`; use it in a `with` statement.

    `settings` are further lines of its rabbitmq.conf, `plugins` are enabled; with `joins` it becomes another node of
    that broker, which must run. Its address stays the same when it is killed and started again.
    """

    def __init__(
        self,
        server: Path | None = None,
        settings: tuple[str, ...] = (),
        plugins: tuple[str, ...] = (),
        joins: "PrivateBroker | None" = None,
    ) -> None:
        found = server or find_server()
        if found is None:
            raise JobError("no rabbitmq-server on this machine; install it, for instance Debian's rabbitmq-server")
        self._server = found
        self._settings, self._plugins = settings, plugins
        self._password = secrets.token_hex(8)
        self._vhosts = ["/"]
        self._folder = Path(tempfile.mkdtemp(prefix="sl_queue-broker-"))
        self._broker: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self.port, self._distribution_port, self._epmd_port = free_ports(3)
        self._joins = joins
        if joins is not None:
            self._password, self._vhosts, self._epmd_port = joins._password, joins._vhosts, joins._epmd_port

    @property
    def node(self) -> str:
        """Its name among the nodes of a broker."""
        return f"sl_queue_{self.port}@localhost"

    def __enter__(self) -> "PrivateBroker":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start on the data that is there; returns when it answers. Raises BrokerUnreachable with its log's end."""
        if self._epmd is None and self._joins is None:
            self._epmd = self._spawn("sh", "-c", "epmd & read _; kill $!; wait")  # until its input ends
        self._write_settings()
        self._broker = self._spawn(str(self._server))
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._broker.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise BrokerUnreachable(f"the private broker did not start; the end of its log:\n{self._log_end()}")
            time.sleep(0.02)
        self._restore_vhosts()

    def kill(self) -> None:
        """Kill by SIGKILL, as a power cut would; what was on disk stays."""
        if self._broker is not None:
            _kill(self._broker)
            self._broker = None

    def freeze(self) -> None:
        """Freeze by SIGSTOP: it goes on only after a kill and a start, as a machine that is cut off."""
        if self._broker is not None:
            os.killpg(self._broker.pid, signal.SIGSTOP)

    def stop(self) -> None:
        """Stop in order."""
        if self._broker is not None:
            self._broker.terminate()
            self._broker.wait(START_S)
            self.kill()

    def wipe(self) -> None:
        """Lose all data, as a new broker at the same address; it must not run. Its virtual hosts come back empty."""
        if self._broker is not None:
            raise JobError("kill the private broker before its data is wiped")
        shutil.rmtree(self._folder / "data", ignore_errors=True)

    def restart(self) -> None:
        """Kill, and start on the same data."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill everything and remove every file. Idempotent."""
        self.kill()
        if self._epmd is not None and self._epmd.stdin is not None:
            self._epmd.stdin.close()
            self._epmd.wait(START_S)
            self._epmd = None
        shutil.rmtree(self._folder, ignore_errors=True)

    # Its contents -----------------------------------------------------------------------------------------------

    def evaluate(self, expression: str) -> str:
        """Return the value of an Erlang expression inside the broker, as text: 15 ms where rabbitmqctl takes 500."""
        erl_call = shutil.which("erl_call", path=os.pathsep.join((*_ERL_CALLS, os.environ.get("PATH", ""))))
        if erl_call is not None:
            command = [erl_call, "-r", "-address", f"{HOST}:{self._distribution_port}", "-e"]
            sent = f"{expression}.\n"
        else:
            command = [str(self._server.with_name("rabbitmqctl")), "eval", f"{expression}."]
            sent = ""
        deadline = time.monotonic() + START_S
        while True:
            done = subprocess.run(
                command, input=sent, env=self._environment(), capture_output=True, text=True, timeout=60
            )
            if "failed to connect" not in done.stderr + done.stdout or time.monotonic() > deadline:
                break
            time.sleep(0.1)  # a node that is short of time may not answer erl_call's handshake within its seconds
        if done.returncode != 0 or done.stdout.startswith("{error"):
            raise BrokerUnreachable(f"the private broker refused {expression!r}: {done.stdout}{done.stderr}")
        return done.stdout.removeprefix("{ok, ").removesuffix("}")

    def _answers(self) -> bool:
        return answers(self.port)

    # Its processes ----------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        data = self._folder / "data"
        return {
            **{name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ},
            "HOME": str(self._folder),  # the cookie lies here
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": HOST,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(data),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ALLOW_INPUT": "1",  # no process in between, and the end of its input is its end
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": HOST,
        }

    def _write_settings(self) -> None:
        joining: list[str] = []
        if self._joins is not None:
            shutil.copy(self._joins._folder / COOKIE, self._folder)
            nodes = enumerate((self._joins.node, self.node))
            joining = [f"cluster_formation.classic_config.nodes.{number} = {node}" for number, node in nodes]
        settings = (
            f"default_user = {USER}",
            f"default_pass = {self._password}",
            "loopback_users = none",
            "disk_free_limit.absolute = 50MB",
            *self._settings,
            *joining,
        )
        (self._folder / "rabbitmq.conf").write_text("\n".join(settings) + "\n")
        (self._folder / "enabled_plugins").write_text(f"[{','.join(self._plugins)}].\n")
        (self._folder / "data").mkdir(exist_ok=True)

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._folder / "output").open("ab") as output:
            return subprocess.Popen(
                command,
                env=self._environment(),
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log_end(self, lines: int = 20) -> str:
        logs = sorted((self._folder / "log").glob("*.log"), key=lambda path: path.stat().st_mtime)
        said = [(self._folder / "output").read_text(errors="replace"), *(p.read_text(errors="replace") for p in logs)]
        return "\n".join("\n".join(said).splitlines()[-lines:])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process group that we started, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended by itself
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def free_ports(count: int) -> list[int]:
    """Choose ports that nobody listens on now, below those that outgoing connections use.

    A client that tries again and again while the broker is down could otherwise take the broker's port, or even
    connect to itself.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = 20_000 + secrets.randbelow(12_000)
        try:
            socket.create_server((HOST, port)).close()
        except OSError:
            continue
        ports += [] if port in ports else [port]
    return ports


def answers(port: int) -> bool:
    """Return True if an AMQP broker greets there: its port may be open before it does."""
    try:
        with socket.create_connection((HOST, port), timeout=5.0) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"  # a method frame: connection.start
    except OSError:
        return False
