"""librabbitmq, the broker's C client: compiled here, and called from Python by who trains by hand."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from torch import Tensor


def compiled(folder: Path, *, shared: bool = False) -> Path | None:
    """Compile the C programs, or a library of them; None without a compiler or librabbitmq-dev, as Debian calls it."""
    program, source = folder / "rabbitmq_c", Path(__file__).with_name("rabbitmq_c.c")
    how = ("-shared", "-fPIC") if shared else ()
    command = ("cc", "-O2", *how, "-o", str(program), str(source), "-lrabbitmq")
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return program


def is_here() -> bool:
    """Tell whether it can be compiled."""
    with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
        return compiled(Path(folder)) is not None


class OverBroker:
    """A connection of librabbitmq for each peer, and two queues."""

    def __init__(self, party: str, peers: Sequence[str], url: str, library: Path) -> None:
        self._c = ctypes.CDLL(str(library))
        self._c.connect_to.restype = ctypes.c_void_p
        parts = urlsplit(url)
        login = (parts.hostname, str(parts.port), parts.username, parts.password, parts.path.removeprefix("/"))
        where = [str(part).encode() for part in login]
        queues = {peer: (f"{party}-{peer}".encode(), f"{peer}-{party}".encode()) for peer in peers}
        self._queues = {peer: ctypes.c_char_p(outbox) for peer, (outbox, _) in queues.items()}
        self._peers = {peer: ctypes.c_void_p(self._c.connect_to(*where, *both)) for peer, both in queues.items()}

    def send(self, tensor: Tensor, peer: str) -> None:
        whole = tensor.contiguous()
        where, size = ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(whole.nbytes)
        self._c.send_numbers(self._peers[peer], self._queues[peer], where, size)

    def receive(self, into: Tensor, peer: str) -> None:
        where, size = ctypes.c_void_p(into.data_ptr()), ctypes.c_size_t(into.nbytes)
        self._c.receive_numbers(self._peers[peer], where, size)

    def close(self) -> None:
        for peer in self._peers.values():
            self._c.disconnect(peer)
