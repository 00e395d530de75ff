"""Randomness is a function of what is computed, never of when: every draw is keyed, so there is no state to save.

Dropout and initialisation draw from the process's global generators, which know no keys. So whatever may draw runs
inside `seeded`, which sets those generators from its key and gives them back as they were: building a model and
importing its file, a `source` of rows, every forward pass with its loss, and those backward passes and optimizer steps
in which code that is not torch's own may run (compute/graph): hooks that add noise, checkpointed blocks, optimizers
that sample.

Parties may be threads of one process: a process-wide lock keeps their scopes apart. That holds only as long as nothing
in this process draws outside of a scope; nothing of sl_queue does. A scope costs about 30 microseconds, half of it for
Python's own `random`, which augmentation inside models does use. torch's own backward passes need none, so parties in
threads compute them at the same time. On CUDA autograd runs hooks in a thread of its own, while the thread that called
it holds the lock and waits.

A key without a secret can be computed by every party, and so can everything that is drawn with it. A key with one has
256 bits, and sets all of a generator's state: torch's generator on the CPU takes only 32 bits of a seed, which a peer
that sees a noisy activation could try out in hours.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b, shake_128

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import mtrand

from sl_queue.protocol.messages import MicroBatch

_ONCE = MicroBatch(0, 0)
_WIDE = 1 << 256  # marks a key of 256 bits, however many of them are zero
_SEED = slice(8)  # of torch's CPU generator's state: then two counts
_WORDS = slice(24, 24 + 624 * 8)  # 624 words of 32 bits, as 64 bits each
_GENERATORS = threading.RLock()  # guards this process's global generators; re-entered by a model that trains another


def key(seed: int, party: str, purpose: str, micro_batch: MicroBatch = _ONCE, secret: bytes = b"") -> int:
    """Return the key of one draw: 64 bits, or 256 with a `secret`; different purposes never share one."""
    words = repr((seed, party, purpose, micro_batch.step, micro_batch.index)).encode()
    if not secret:
        return int.from_bytes(blake2b(words, digest_size=8).digest(), "little")
    return int.from_bytes(blake2b(words, digest_size=32, key=secret).digest(), "little") | _WIDE


@contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Draw from generators set by `key` (torch on the CPU and on `device`, NumPy, random); leave them as they were."""
    with _GENERATORS:
        generators = [torch.default_generator, *_cuda_generators(device)]
        states = [generator.get_state() for generator in generators]
        python_state, numpy_generator = random.getstate(), mtrand.get_bit_generator()
        try:
            mtrand.set_bit_generator(_numpy_generator())  # swapped, not copied: copying its state takes 30 us
            _seed(key, generators)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            random.setstate(python_state)
            mtrand.set_bit_generator(numpy_generator)


def generator_states(device: torch.device) -> tuple[bytes, object, bytes]:
    """Return the states of all that `seeded` sets, to compare: if they are equal, nothing was drawn in between."""
    states = [
        generator.get_state().numpy().tobytes() for generator in (torch.default_generator, *_cuda_generators(device))
    ]
    kind, words, *place = np.random.get_state(legacy=True)
    return b"".join(states), random.getstate(), np.asarray(words).tobytes() + repr((kind, place)).encode()


def _seed(key: int, generators: list[torch.Generator]) -> None:
    """Set all generators; a wide key sets all of torch's and NumPy's Mersenne Twisters on the CPU, apart."""
    narrow = key & 0xFFFFFFFFFFFFFFFF
    for generator in generators if key < _WIDE else generators[1:]:
        generator.manual_seed(narrow)
    random.seed(key)
    if key < _WIDE:
        np.random.seed(key & 0xFFFFFFFF)
        return
    secret = (key & (_WIDE - 1)).to_bytes(32, "little")
    state, seed, words = _torch_state()
    seed[0] = narrow
    words[:] = np.frombuffer(shake_128(secret).digest(624 * 4), "<u4")
    generators[0].set_state(state)
    np.random.seed(np.frombuffer(secret, "<u4"))


@cache
def _torch_state() -> tuple[torch.Tensor, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the state of a CPU generator that was seeded just now, and views of its seed and of its words."""
    state = torch.Generator().manual_seed(0).get_state()
    return state, state.numpy()[_SEED].view(np.uint64), state.numpy()[_WORDS].view(np.uint64)


def _cuda_generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return []
    torch.cuda.init()  # type: ignore[no-untyped-call]  # the generators exist only after it
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.cuda.default_generators[index]]


@cache
def _numpy_generator() -> np.random.MT19937:
    return np.random.MT19937()
