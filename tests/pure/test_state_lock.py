"""A state folder's lock: one worker at a time, of this version or of the one before, and gone with its process."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sl_queue.errors import PartyBusy
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.files import Held, lock, this_machine
from sl_queue.storage.run_file import RunFile

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
import threading
from pathlib import Path
from sl_queue.storage.files import lock
taken = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def checkpoints(path: Path) -> Folder:
    return Folder(path, job_digest="a", party="bank", fingerprint={})


def scheduler(path: Path) -> RunFile:
    return RunFile(path, {}, "a")


@contextmanager
def locked_by_the_version_before(path: Path) -> Iterator[None]:
    """Hold the lock as it was taken before: flock on the file `lock`, with the process number in it."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, 0)
        os.write(descriptor, b"4321")
        yield
    finally:
        os.close(descriptor)


def test_a_worker_of_the_version_before_keeps_this_one_out(tmp_path: Path) -> None:
    with locked_by_the_version_before(tmp_path):
        with pytest.raises(PartyBusy, match=r"another worker \(process 4321\) serves party 'bank'"):
            checkpoints(tmp_path)
        with pytest.raises(PartyBusy, match=r"another scheduler \(process 4321\) uses .*--state"):
            scheduler(tmp_path)
    checkpoints(tmp_path).close()


@pytest.mark.parametrize("take", [checkpoints, scheduler])
def test_this_worker_keeps_one_of_the_version_before_out(
    tmp_path: Path, take: Callable[[Path], Folder | RunFile]
) -> None:
    with closing(take(tmp_path)):
        assert (tmp_path / "lock").read_text().split() == [str(os.getpid()), this_machine()]
        with pytest.raises(BlockingIOError), locked_by_the_version_before(tmp_path):
            pass
    with locked_by_the_version_before(tmp_path):
        pass


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(Held) as held:
            lock(tmp_path)
        assert held.value.holder == str(other.pid)
        other.send_signal(signal.SIGKILL)
        other.wait()
        lock(tmp_path).release()


def test_a_lock_is_released_by_whoever_closes_it_in_another_thread(tmp_path: Path) -> None:
    ledger = scheduler(tmp_path)
    closing_thread = threading.Thread(target=ledger.close)
    closing_thread.start()
    closing_thread.join()
    scheduler(tmp_path).close()


def test_a_lock_file_that_cannot_be_written_leaves_the_folder_free(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(OSError, match="lock"):
        lock(tmp_path)
    (tmp_path / "lock").rmdir()
    lock(tmp_path).release()
