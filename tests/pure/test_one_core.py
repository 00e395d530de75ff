"""A meter's linear algebra takes one core, and leaves NumPy as it found it."""

import os
import subprocess
import sys

LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ASK = """
import threading
import numpy as np
from threadpoolctl import ThreadpoolController
from sl_queue.privacy.one_core import on_one_core

square = np.ones((200, 200)) @ np.ones((200, 200))
blas = ThreadpoolController().select(internal_api="openblas")
before, within = [each["num_threads"] for each in blas.info()], []

def look():
    with on_one_core():
        within.append({each["num_threads"] for each in blas.info()})

threads = [threading.Thread(target=look) for _ in range(8)]
look()
for thread in threads: thread.start()
for thread in threads: thread.join()
after = [each["num_threads"] for each in blas.info()]
assert before and before == after, (before, after)
assert within == [{1}] * 9, within
"""


def test_the_body_has_one_thread_and_afterwards_all_are_back_whoever_else_was_at_it() -> None:
    """In a process of its own: here tests are given one thread from the start."""
    environment = {name: value for name, value in os.environ.items() if name not in LIMITS}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
