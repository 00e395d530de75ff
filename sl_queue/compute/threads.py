"""torch's settings of a thread, for whoever trains in threads of its own in a caller's process.

Process-wide in torch, so parties see them: default dtype, deterministic algorithms, precision of matrix products,
anomaly detection. A thread's own, so they do not: autocast, default device, modes, saved-tensor hooks, the current CUDA
device. no_grad and inference_mode are a thread's own, too: parties train under them as without.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sl_queue.errors import JobError

_MEMORY, _FILLED = torch.utils.deterministic, "fill_uninitialized_memory"
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "maia", "ipu", "privateuseone")


def limit_threads(n: int | None) -> None:
    """Let torch compute with `n` threads in the calling thread; None leaves torch's choice."""
    if n is not None:
        torch.set_num_threads(n)


def require_nothing_lost(devices: Iterable[str]) -> None:
    """Raise JobError if the calling thread has set what threads that it starts would silently do without.

    `devices` are those of the parties, as their files name them.
    """
    for what, instead in _lost(tuple(devices)):
        raise JobError(
            f"{what} is set in the thread that calls run_local, but each party trains in a thread of its own, where it "
            f"has no effect; {instead}"
        )


def _lost(devices: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield what is set, and what to do instead."""
    inside = "enter it inside the forward method of the models, and call run_local outside of it"
    for kind in _AUTOCAST_DEVICES:
        with suppress(RuntimeError):  # torch does not know the kind
            if torch.is_autocast_enabled(kind):
                yield f"torch.autocast({kind!r})", inside
    device = torch.get_default_device()
    if device.type != "cpu":
        instead = f"write device = '{device}' into the party files, and call run_local within torch.device('cpu')"
        yield f"the default device {str(device)!r}", instead
    functions: list[object] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in functions if not isinstance(mode, DeviceContext)]
    for mode in (*modes, *_get_current_dispatch_mode_stack()):
        yield f"the mode {type(mode).__name__}", inside
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        yield "a saved_tensors_hooks context", inside
    if "cuda" in devices and torch.cuda._initialized and torch.cuda.current_device() != 0:
        current = torch.cuda.current_device()
        yield f"the current CUDA device {current}", f"write device = 'cuda:{current}' into the party files"


def require_same_bits(device: torch.device) -> None:
    """Have torch choose kernels on a GPU that give the same bits each time, and warn where it has none.

    On a CPU all do. Without this the gradient of a convolution or an embedding adds in another order each time, and
    a step that is repeated after a kill would not be the one that others have seen.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS wants for it, before its first product
    torch.set_deterministic_debug_mode("warn")
    setattr(_MEMORY, _FILLED, False)  # what is never read need not be filled


@contextmanager
def settings_kept() -> Iterator[None]:
    """Give back what parties that train here change: numbers of threads, and how kernels are chosen.

    `torch.set_num_threads` in other threads changes what the next new threads begin with.
    """
    mine, of_new_threads = torch.get_num_threads(), _in_a_new_thread(None)
    _KERNELS.enter()
    try:
        yield
    finally:
        _KERNELS.leave()
        torch.set_num_threads(mine)
        if of_new_threads != mine:
            _in_a_new_thread(of_new_threads)


class _Kernels:
    """The whole process's choice of kernels, as it was before the first of several runs at a time. Mutable."""

    def __init__(self) -> None:
        self._lock, self._runs, self._before = threading.Lock(), 0, (0, True)

    def enter(self) -> None:
        with self._lock:
            if not self._runs:
                self._before = torch.get_deterministic_debug_mode(), getattr(_MEMORY, _FILLED)
            self._runs += 1

    def leave(self) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                mode, filled = self._before
                torch.set_deterministic_debug_mode(mode)
                setattr(_MEMORY, _FILLED, filled)


_KERNELS = _Kernels()


def _in_a_new_thread(count: int | None) -> int:
    """Set the number of threads in a new thread, unless None, and return what it had begun with."""
    found: list[int] = []

    def look() -> None:
        found.append(torch.get_num_threads())
        if count is not None:
            torch.set_num_threads(count)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]
