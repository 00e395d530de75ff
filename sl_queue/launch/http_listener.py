"""The label holder's service at an address: HTTP or HTTPS, in a thread of its own."""

import asyncio
import socket
import threading

import uvicorn
import uvloop  # noqa: F401  # which uvicorn imports too late to say that it is missing
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sl_queue.security.server_certificate import ServerCertificate

REQUEST_S = 10.0  # within which the head of a request must come
_MOST_HEAD = 64 * 1024  # bytes of a head, or of what follows a body
_KEPT_S = 5  # that a connection is kept open without a request
_MOST = 1000  # connections and requests at a time, beyond which a client gets 503


class _Impatient(HttpToolsProtocol):
    """Closes a connection whose next request does not begin, or whose head does not end: no client holds a place so.

    Mutable: it counts bytes of which the parser has made nothing yet.
    """

    _due: asyncio.TimerHandle | None = None  # when a head is awaited
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head_is_here()

    def data_received(self, data: bytes) -> None:
        idle = getattr(self, "cycle", None) is None or self.cycle.response_complete
        if idle and self._due is None:
            self._await_head()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > _MOST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"a head has at most {_MOST_HEAD} bytes")

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        self._due = self.loop.call_later(REQUEST_S, self.transport.close)

    def _head_is_here(self) -> None:
        self._unread = 0
        if self._due is not None:
            self._due.cancel()
            self._due = None


class HttpServer:
    """The service at an address, in a thread of its own. Mutable: it is closed."""

    def __init__(self, app: Starlette, host: str, port: int, tls: ServerCertificate | None = None) -> None:
        listener = socket.create_server((host, port), family=_family(host), backlog=1024)
        # asyncio leaves it out for this kind of socket; without it a body waits 40 ms until the head is acknowledged
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=_Impatient,
            loop="uvloop",
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEPT_S,
            limit_concurrency=_MOST,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else str(tls.key),
        )
        self._server, self._listener = uvicorn.Server(config), listener
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait so long; True if the server has ended meanwhile."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Answer what was accepted, then end."""
        self._server.should_exit = True
        self._thread.join(10.0)
        self._listener.close()


def _family(host: str) -> socket.AddressFamily:
    """Return the family to listen on: IPv6 for a host that has no address of IPv4."""
    families = {found[0] for found in socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM)}
    return socket.AF_INET6 if families == {socket.AF_INET6} else socket.AF_INET
