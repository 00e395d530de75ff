"""The page that shows a run, at http://HOST:PORT: one file, and a stream of server-sent events.

Nothing is asked of the run: it shows what the scheduler reports. Who may look: whoever reaches the port, by a name that
is ours. A page of another site whose name was made to mean this machine (DNS rebinding) has that site's name in the
Host header, and is refused.
"""

import base64
import hashlib
import http.server
import ipaddress
import json
import logging
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from typing import Any

from sl_queue.errors import JobError
from sl_queue.observe.live import Live, Seen

MOST = 32  # connections at once
PATIENCE_S = 10.0  # for a request, and for who does not read what it asked for
TURN_S = 0.1  # to notice that it is closed
ALIVE_S = 2.0  # a stream without news says that it lives

log = logging.getLogger("sl_queue")

DATA = '<script type="application/json" id="kept"></script>'


@cache
def page() -> str:
    """Return the page as it is shipped."""
    return files("sl_queue.observe").joinpath("watch.html").read_text(encoding="utf-8")


def policy() -> str:
    """Return the page's content security policy: its own script and style by digest, and nothing from outside."""
    script, style = (_digests(tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digests(tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def kept_page(kept: Mapping[str, Any]) -> str:
    """Return the page with what was kept of a run in it: a file that needs nobody to answer."""
    data = json.dumps(kept, allow_nan=False).replace("<", "\\u003c")  # so that no value ends the element
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy()}">'
    inlined = DATA.replace("></", f">{data}</")
    return page().replace('<meta charset="utf-8">', f'<meta charset="utf-8">{head}').replace(DATA, inlined)


class WatchServer:
    """The page of one run, in threads of its own from the constructor to `close`. Raises JobError for a taken port.

    `host`: the address to listen at.
    """

    def __init__(self, live: Live, port: int, host: str = "127.0.0.1") -> None:
        self._server: _Server
        try:
            self._server = _Server(live, host, port)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise JobError(f"--port {port}: {reason}; give a free port, or 0 for any") from None
        self.port = int(self._server.server_address[1])
        shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(TURN_S,), name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; streams end within moments. Idempotent."""
        self._server.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "WatchServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def __init__(self, live: Live, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.live, self.host, self.closed = live, host.lower(), threading.Event()
        self.places = threading.BoundedSemaphore(MOST)
        super().__init__((host, port), _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self.places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("who watched has left", exc_info=True)

    def is_ours(self, host: str) -> bool:
        """Return True for a Host header that names this machine: an address, localhost, or what we listen at."""
        name = re.sub(r":\d+$", "", host.strip().lower())
        if name in ("localhost", self.host):
            return True
        with suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return True
        return False


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE_S
    server: _Server

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            pass  # who watched has left

    def do_GET(self) -> None:
        if not self.server.is_ours(self.headers.get("Host", "")):
            self._answer(421, "this page answers to localhost and to addresses only\n", "text/plain")
            return
        match self.path.partition("?")[0]:
            case "/":
                self._answer(200, page(), "text/html")
            case "/events":
                self._stream()
            case _:
                self._answer(404, "there is / and /events\n", "text/plain")

    def _answer(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self._head(status, f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def _stream(self) -> None:
        """Send each view until whoever looks leaves."""
        self._head(200, "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        seen = Seen()
        while not self.server.closed.is_set():
            text, seen = self.server.live.next(seen, ALIVE_S)
            self.wfile.write(b": alive\n\n" if text is None else f"data: {text}\n\n".encode())
            self.wfile.flush()

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", f"{policy()}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")

    def version_string(self) -> str:
        return "sl_queue"

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug("watch: %s", format % arguments)
