"""Threads of run_local have edges: whatever ends one ends the run, and the caller's thread stays as it was."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sl_queue
from sl_queue.compute.running import blame
from sl_queue.compute.threads import settings_kept
from sl_queue.data.spec import FileSpec
from sl_queue.errors import ComputeError, JobError
from sl_queue.launch.asked import Asked
from sl_queue.local.aligning import align_threads
from sl_queue.local.prediction import predict_threads
from tests.support.split import Concatenated, equal_weights

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
Y = (np.arange(70) % 2).astype(np.int64)
SGD = {"name": "sgd", "lr": 0.1}


class Own(BaseException):
    """An end of a thread that is no Exception."""


class Ending(nn.Module):
    """Raises in its fifth training forward, or in the backward pass of it."""

    def __init__(self, error: BaseException, backward: bool = False) -> None:
        super().__init__()
        self.linear, self.error, self.backward = nn.Linear(6, 4), error, backward
        self.register_buffer("forwards", torch.zeros(()))

    def end(self, *_: Any) -> None:
        raise self.error

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        self.forwards += self.training
        if self.forwards >= 5:
            _ = output.register_hook(self.end) if self.backward else self.end()
        return output


def files(base: Any, fuse: Any = None, loss: Any = "bce_with_logits", data: Any = None) -> list[sl_queue.PartyFile]:
    ids = np.arange(70)
    part = {"model": fuse or Concatenated(4, 1), "optimizer": SGD, "loss": loss}
    rows = data or sl_queue.Rows(ids=ids, features=X)
    return [
        sl_queue.PartyFile(party="a", data=rows, base={"model": base, "optimizer": SGD}, threads=1),
        sl_queue.PartyFile(party="c", data=sl_queue.Rows(ids=ids, labels=Y), fuse=part, threads=1),
    ]


def job(**more: Any) -> sl_queue.Job:
    parties = {"a": {"role": "feature", "cut": [4]}, "c": {"role": "label"}}
    pipeline = {"micro_batches": 2, "checkpoint_every": 3}
    return sl_queue.Job(**{"name": "t", "seed": 7, "epochs": 3, "batch_size": 16, "parties": parties, "pipeline": pipeline} | more)  # fmt: skip  # noqa: E501


def ended(run: Callable[[], Any]) -> BaseException | None:
    """Return the error that ended a run, which must end within half a minute."""
    found: list[BaseException | None] = []

    def go() -> None:
        try:
            run()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(30)
    assert found, "the run goes on"
    return found[0]


# Whatever ends a thread -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", [SystemExit("bye"), SystemExit(0), GeneratorExit(), Own("bye")], ids=repr)
def test_what_ends_a_model_ends_the_run_naming_model_and_micro_batch(error: BaseException, backward: bool) -> None:
    end = ended(lambda: sl_queue.run_local(job(), files(Ending(error, backward))))
    assert isinstance(end, ComputeError)
    assert str(end).startswith("party 'a', micro-batch 2.0: ")
    assert "Ending" in str(end) and type(error).__name__ in str(end)


def test_an_interrupt_raised_in_a_partys_thread_ends_the_run_naming_the_party() -> None:
    end = ended(lambda: sl_queue.run_local(job(), files(Ending(KeyboardInterrupt("here")))))
    assert isinstance(end, ComputeError)
    assert str(end).startswith("party 'a': KeyboardInterrupt: here")


def test_a_loss_and_a_source_that_exit_end_the_run() -> None:
    calls: list[int] = []

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 5:
            sys.exit("enough")
        return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), labels.float())

    end = ended(lambda: sl_queue.run_local(job(), files(nn.Linear(6, 4), loss=loss)))
    assert isinstance(end, ComputeError)
    assert "the loss failed: SystemExit: enough" in str(end)

    def rows() -> Any:
        sys.exit("no rows")

    end = ended(lambda: sl_queue.run_local(job(), files(nn.Linear(6, 4), data={"source": rows})))
    assert isinstance(end, sl_queue.SlQueueError)
    assert "no rows" in str(end) and "'a'" in str(end)


def exits() -> Any:
    sys.exit("no rows")


def broken(_: Any) -> None:
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("data", "on_status", "kind", "told"),
    [
        ({"source": exits}, id, ComputeError, "party 'a': SystemExit: no rows; code that a party runs"),
        (None, broken, sl_queue.SlQueueError, "the scheduler: KeyError: 'mine'"),
    ],
)
def test_whatever_ends_a_role_of_an_alignment_ends_all(
    tmp_path: Path, data: Any, on_status: Any, kind: type[sl_queue.SlQueueError], told: str
) -> None:
    parties = files(nn.Linear(6, 4), data=data)
    states = {role: tmp_path / role for role in ("a", "c", "scheduler")}
    end = ended(lambda: align_threads(job(alignment={"method": "psi"}), parties, states, on_status))
    assert type(end) is kind and str(end).startswith(told)


def test_whatever_ends_a_role_of_a_prediction_ends_all(tmp_path: Path) -> None:
    parties = files(nn.Linear(6, 4))
    sl_queue.run_local(job(), parties, out=tmp_path)
    states, rows = {role: tmp_path / role for role in "ac"}, sl_queue.Rows(ids=np.arange(70), features=X)
    given: dict[str, Any] = {"a": FileSpec(source=exits), "c": sl_queue.Rows(ids=np.arange(70))}
    end = ended(lambda: predict_threads(job(), parties, states, Asked(), rows=given))
    assert type(end) is ComputeError and str(end).startswith("party 'a': SystemExit: no rows; ")
    end = ended(lambda: predict_threads(job(), parties, states, Asked(), broken, rows=given | {"a": rows}))
    assert type(end) is sl_queue.SlQueueError and str(end).startswith("the scheduler: KeyError: 'mine'")


def test_a_model_that_exits_while_it_is_built_is_named_before_training() -> None:
    def build() -> nn.Module:
        sys.exit("no licence")

    end = ended(lambda: sl_queue.run_local(job(), files(build)))
    assert isinstance(end, JobError)
    assert "SystemExit: no licence" in str(end)


def test_ctrl_c_is_not_a_models_fault() -> None:
    with pytest.raises(KeyboardInterrupt), blame("the model failed"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit("mine"), Own("mine")], ids=repr)
def test_what_on_status_raises_comes_back_as_itself_and_the_run_resumes(error: BaseException, tmp_path: Path) -> None:
    def raising(status: Any) -> None:
        if status["epoch"] >= 1:
            raise error

    torch.manual_seed(1)
    base, fuse = nn.Linear(6, 4), Concatenated(4, 1)
    quiet = sl_queue.run_local(job(), files(base, fuse))
    assert ended(lambda: sl_queue.run_local(job(), files(base, fuse), out=tmp_path, on_status=raising)) is error
    assert not [thread for thread in threading.enumerate() if thread.name in ("a", "c", "scheduler")]
    again = sl_queue.run_local(job(), files(base, fuse), out=tmp_path)
    assert equal_weights(again.base("a"), quiet.base("a"))


# What is the caller's own -----------------------------------------------------------------------------------------


def of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def set_in_a_thread(count: int) -> None:
    thread = threading.Thread(target=torch.set_num_threads, args=(count,))
    thread.start()
    thread.join()


@pytest.fixture
def _counts() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_counts")
@pytest.mark.parametrize("new", [2, 3])
def test_the_number_of_torch_threads_is_given_back_after_a_run_and_after_an_error(new: int) -> None:
    torch.set_num_threads(2)
    set_in_a_thread(new)  # what new threads begin with
    sl_queue.run_local(job(epochs=1), files(nn.Linear(6, 4)))
    assert (torch.get_num_threads(), of_a_new_thread()) == (2, new)
    with pytest.raises(ComputeError):
        sl_queue.run_local(job(), files(Ending(ValueError("no"))))
    assert (torch.get_num_threads(), of_a_new_thread()) == (2, new)


@pytest.mark.usefixtures("_counts")
def test_thread_counts_that_other_threads_set_do_leak_without_that() -> None:
    torch.set_num_threads(2)
    with settings_kept():
        set_in_a_thread(1)
        assert of_a_new_thread() == 1
    assert of_a_new_thread() == 2


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


class Noting(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


LOST: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "torch.autocast('cpu') is set": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "torch.autocast('xpu') is set": lambda: torch.autocast("xpu"),
    "the default device 'meta' is set": lambda: torch.device("meta"),
    "default device 'meta' is set": lambda: default_device("meta"),
    "the mode Noting is set": Noting,
    "the mode _FlopCounterMode is set": lambda: FlopCounterMode(display=False),
    "a saved_tensors_hooks context": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}
KEPT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast that is off": lambda: torch.autocast("cpu", enabled=False),
    "the CPU as default device": lambda: torch.device("cpu"),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(False),
}


@pytest.mark.filterwarnings("ignore:.*autocast", "ignore:In .* autocast")
@pytest.mark.parametrize("told", LOST)
def test_settings_of_the_callers_thread_that_parties_would_not_see_are_refused(told: str) -> None:
    with LOST[told](), pytest.raises(JobError, match=r"trains in a thread of its own") as caught:
        sl_queue.run_local(job(), files(nn.Linear(6, 4)))
    assert told in str(caught.value)


@pytest.mark.parametrize("setting", KEPT.values(), ids=KEPT)
def test_settings_that_change_nothing_change_nothing(setting: Callable[[], AbstractContextManager[Any]]) -> None:
    base, fuse = nn.Linear(6, 4), Concatenated(4, 1)
    without = sl_queue.run_local(job(), files(base, fuse))
    with setting():
        within = sl_queue.run_local(job(), files(base, fuse))
    assert equal_weights(within.base("a"), without.base("a"))
    within.base("a")(torch.zeros(2, 6)).sum().backward()
    assert within.base("a").weight.grad is not None


PROGRAM = """
import os, signal, threading, time
from tests.compute.test_thread_edges import Concatenated, files, job, nn
import sl_queue
computing, began = threading.Event(), threading.Event()
class Slow(nn.Linear):
    def forward(self, x):
        computing.set()
        time.sleep(0.3 * began.is_set())
        computing.clear()
        return super().forward(x)
def on_status(status):
    if status["step"] > 0: began.set()
def interrupt():
    began.wait(60)
    computing.wait(60)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    sl_queue.run_local(job(epochs=100000), files(Slow(6, 4)), on_status=on_status)
except KeyboardInterrupt:
    print("interrupted", computing.is_set())
"""


def test_ctrl_c_ends_every_thread_of_a_run() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "interrupted False\n", done.stderr


VARIABLE: ContextVar[float] = ContextVar("VARIABLE", default=1.0)


def test_parties_see_the_callers_context_variables() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(VARIABLE.get())
            return super().forward(x)

    seen: set[float] = set()
    token = VARIABLE.set(3.0)
    sl_queue.run_local(job(epochs=1), files(Scaled(6, 4)))
    VARIABLE.reset(token)
    assert seen == {3.0}


def test_runs_that_overlap_choose_kernels_until_the_last_of_them_ends() -> None:
    with ExitStack() as first, settings_kept():
        first.enter_context(settings_kept())
        torch.set_deterministic_debug_mode("warn")
        first.close()
        assert torch.get_deterministic_debug_mode() == 1
    assert torch.get_deterministic_debug_mode() == 0
