"""The label holder's service at an address: HTTP or HTTPS, in a thread of its own."""

import asyncio
import socket
import threading

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from sl_queue.security.server_certificate import ServerCertificate

REQUEST_S = 10.0  # within which the head of a request must come
_KEPT_S = 5  # that a connection is kept open without a request
_MOST = 1000  # connections and requests at a time, beyond which a client gets 503


class _Impatient(H11Protocol):
    """Closes a connection on which no request begins: a client that says nothing holds no place for long."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(REQUEST_S, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        asked = getattr(self, "cycle", None) is not None  # None until the first head is here
        if not asked and not self.transport.is_closing():
            self.transport.close()


class HttpServer:
    """The service at an address, in a thread of its own. Mutable: it is closed."""

    def __init__(self, app: Starlette, host: str, port: int, tls: ServerCertificate | None = None) -> None:
        listener = socket.create_server((host, port), backlog=1024)
        # asyncio leaves it out for this kind of socket; without it a body waits 40 ms until the head is acknowledged
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=_Impatient,
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
