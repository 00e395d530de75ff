"""Stages: what crosses the cut is checked, randomness is keyed, and every mistake of a user is named."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import Tensor, nn

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.losses import LOSSES
from sl_queue.compute.model import device_of, limit_threads
from sl_queue.compute.optimizers import optimizer_names
from sl_queue.compute.seeds import key, seeded
from sl_queue.compute.spec import NAMED_LOSSES as LOSSES_OF_FILES
from sl_queue.cut.tensors import from_payload, is_finite, to_payload
from sl_queue.errors import (
    CheckpointError,
    ComputeError,
    JobError,
    LocalProtocolError,
    NonFiniteError,
    RemoteProtocolError,
    ShapeError,
)
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.storage.checkpoints import Folder
from tests.support.resolved import computes, final_module, fingerprint
from tests.support.split import Concatenated, Parties, Stages, equal_weights, furthest, parties

CPU = torch.device("cpu")
FIRST = MicroBatch(0, 0)
ROWS = 20


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_draws() -> Iterator[None]:
    before = torch.get_num_threads()
    limit_threads(1)
    torch.manual_seed(3)
    yield
    limit_threads(before)


def setup(**changes: Any) -> Parties:
    """One feature party, `bank`, and a label holder with a base model, `insurer`; nothing is wrong with them."""
    draw = np.random.default_rng(5)
    features = {"bank": draw.normal(size=(ROWS, 3)), "insurer": draw.normal(size=(ROWS, 2))}
    settings: dict[str, Any] = {
        "bases": {"bank": nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "insurer": nn.Linear(2, 3)},
        "fuse": Concatenated(7, 1),
        "features": {party: columns.astype(np.float32) for party, columns in features.items()},
        "labels": draw.integers(0, 2, ROWS),
        "cuts": {"bank": [4], "insurer": [3]},
        "label_holder": "insurer",
        "batch_size": 8,
    }
    return parties(**settings | changes)


def stages(**changes: Any) -> Stages:
    return setup(**changes).stages()


def raised(kind: type[Exception], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    return str(caught.value)


# Payloads -----------------------------------------------------------------------------------------------------------

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64)
INTEGERS = (torch.int64, torch.int8, torch.uint16, torch.bool)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 4), (5,), (3, 2, 2)], ids=str)
def test_a_payload_gives_back_the_tensor_in_memory_of_its_own(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    payload = to_payload(tensor, b"rows")
    assert (payload.dtype, payload.shape, payload.rows) == (str(dtype)[6:], shape, b"rows")
    unaligned = memoryview(b"x" + bytes(payload.data))[1:]  # and read-only
    back = from_payload(Payload(payload.dtype, shape, unaligned))
    assert back.dtype == dtype
    assert torch.equal(back.to(torch.complex128), tensor.to(torch.complex128))
    assert back.data_ptr() % 64 == 0
    assert to_payload(back) == Payload(payload.dtype, shape, payload.data)


def test_a_payload_is_a_copy_in_c_order_without_a_graph() -> None:
    live = torch.arange(6.0).reshape(2, 3).requires_grad_()
    payload = to_payload(live.T)
    with torch.no_grad():
        live.zero_()
    assert np.frombuffer(payload.data, "<f4").tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (Payload("float32", (2, 3), bytes(23)), r"float32 \(2, 3\) takes 24 bytes, but holds 23"),
        (Payload("float32", (2**62, 2**62), b""), "but holds 0"),
        (Payload("float32", (-1, -6), bytes(24)), "a shape cannot be"),
        (Payload("Tensor", (1,), bytes(4)), "'Tensor' is no dtype"),
        (Payload("no_such", (1,), bytes(4)), "'no_such' is no dtype"),
    ],
)
def test_a_payload_that_lies_about_itself_is_refused(payload: Payload, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        from_payload(payload)


def test_finite_numbers_with_an_infinite_sum_are_finite() -> None:
    assert is_finite(torch.full((3,), 3e38))
    assert is_finite(torch.zeros(0))
    assert not is_finite(torch.tensor([1.0, torch.nan]))
    assert not is_finite(torch.tensor([torch.inf, -torch.inf]))


# Keyed draws --------------------------------------------------------------------------------------------------------


def test_every_part_of_a_key_changes_it() -> None:
    base = (7, "bank", "base forward", MicroBatch(3, 1))
    others = [(8, *base[1:]), (7, "ban", "kbase forward", base[3]), (7, "bank", "base evaluate", base[3])]
    others += [(*base[:3], MicroBatch(1, 3)), (*base[:3], MicroBatch(3, 2))]
    assert len({key(*words) for words in (base, *others)}) == 6
    assert 0 <= key(*base) < 2**64


def draws() -> tuple[float, float, float, float]:
    first, _ = np.random.randn(2)
    return torch.rand(()).item(), random.random(), float(np.random.rand()), float(first)


def divide_by_zero() -> None:
    with seeded(5, CPU):
        draws()
        raise ZeroDivisionError


def test_a_seeded_scope_repeats_its_draws_and_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    undisturbed = [draws() for _ in range(3)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    found = [draws()]
    with seeded(5, CPU):
        first = draws()
    found.append(draws())
    with pytest.raises(ZeroDivisionError):
        divide_by_zero()
    found.append(draws())
    with seeded(6, CPU):
        np.random.seed(9)  # as models do
        assert draws()[:2] != first[:2]
    # Of a pair of normal draws NumPy keeps the second one, and a swap of generators drops it: ours are all first ones.
    assert found == undisturbed


def test_parties_that_are_threads_of_one_process_do_not_disturb_each_other() -> None:
    def draw(number: int) -> Tensor:
        with seeded(number, CPU):
            first = torch.rand(3)
            time.sleep(0.002)
            return torch.cat([first, torch.rand(3)])

    alone = [draw(n) for n in range(8)]
    together: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: draw(n)})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[n], together[n]) for n in range(8))


class Drawn(nn.Module):
    """Draws its weights, and noise in every forward, from all three generators."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.bias = nn.Parameter(torch.tensor([random.random(), *np.random.rand(width - 1)], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return self.linear(x) + self.bias + noise  # type: ignore[no-any-return]


def test_initial_weights_and_noise_follow_from_the_job_alone() -> None:
    bases = {"bank": Drawn, "insurer": nn.Linear(2, 3)}
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    one = stages(bases=bases).bases["bank"]
    draws()
    other = stages(bases=bases).bases["bank"]
    assert one.weights() == other.weights() != stages(bases=bases, seed=8).bases["bank"].weights()
    assert one.forward(FIRST) == other.forward(FIRST)
    noises = [stages(bases=bases, shuffle=False).bases["bank"].forward(MicroBatch(step, 0)) for step in (0, 3)]
    assert noises[0].rows == noises[1].rows, "the same rows in the next epoch"
    assert noises[0] != noises[1]


def test_parties_with_the_same_model_have_different_initial_weights() -> None:
    found = stages(bases={"bank": nn.Linear(3, 4), "insurer": lambda: nn.Linear(2, 3)})
    assert found.fuse.own is not None
    with seeded(key(7, "bank", "base init"), CPU):
        elsewhere = nn.Linear(2, 3)
    with seeded(key(7, "insurer", "base init"), CPU):
        here = nn.Linear(2, 3)
    assert equal_weights(found.fuse.own.module, here)
    assert not equal_weights(found.fuse.own.module, elsewhere)


# From party file to model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "complaint"),
    [
        ({"name": "adm"}, "'adm' is unknown; allowed are adadelta, "),
        ({"name": "lbfgs"}, "evaluates the loss more than once a step"),
        ({"name": "adam", "learning_rate": 1}, "refused by torch.optim.Adam: .*learning_rate"),
        ({"name": "sgd", "lr": -1.0}, "refused by torch.optim.SGD: Invalid learning rate"),
        ({}, r"\[base\] optimizer is missing, and the model has parameters"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_named(optimizer: dict[str, Any], complaint: str) -> None:
    with pytest.raises(JobError, match=complaint):
        stages(optimizer=optimizer)


def test_an_optimizer_that_fails_on_these_gradients_says_so() -> None:
    run = setup(optimizer={"name": "sparseadam"})
    message = raised(ComputeError, lambda: run.stages().train(run.pipeline))
    assert message.startswith(
        "party 'insurer': the optimizer of tests.support.split:Concatenated failed: RuntimeError: Sparse"
    )


def extra_state() -> nn.Module:
    class WithNotes(nn.Linear):
        def get_extra_state(self) -> str:
            return "notes"

    return WithNotes(3, 4)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: 5, "returns int; it must return a torch.nn.Module"),
        (lambda: nn.Linear("3", 4), "fails: TypeError"),  # type: ignore[arg-type]
        (extra_state, "its state_dict holds '_extra_state', a str; only tensors are saved"),
        ("no_such_module:Model", "no_such_module"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(model: Any, complaint: str) -> None:
    message = raised(JobError, lambda: stages(bases={"bank": model, "insurer": nn.Linear(2, 3)}))
    assert complaint in message


def test_a_lazy_layer_takes_its_shape_from_the_rows_and_cuts(tmp_path: Path) -> None:
    lazy = {"bank": lambda: nn.LazyLinear(4), "insurer": nn.LazyLinear(3)}
    run = setup(bases=lazy, fuse=lambda: nn.LazyLinear(1), aggregation="concat")
    found = run.stages()
    assert found.bases["bank"].module.weight.shape == (4, 3)
    assert found.fuse.model.module.weight.shape == (1, 7)
    assert found.bases["bank"].state() == run.stages().bases["bank"].state()
    found.train(run.pipeline)
    with Folder(tmp_path, job_digest="a", party="bank", fingerprint={}) as folder:
        folder.write_final(found.bases["bank"].weights(), run="run", step=4, incarnation="i")
    module = final_module(run.job, run.files["bank"], tmp_path / "final" / "base.safetensors")
    assert equal_weights(module, found.bases["bank"].module)
    assert module(torch.zeros(2, 3)).shape == (2, 4)


def test_a_device_that_is_not_there_is_named() -> None:
    run = setup()
    for device in ("cuda:99", "gpu"):
        file = run.files["bank"].model_copy(update={"device": device})
        message = raised(JobError, lambda file=file: device_of(computes(run.job, [file])[0]))  # type: ignore[misc]
        assert message.startswith(f"party 'bank': device = '{device}' cannot be used here with torch")


def test_a_fingerprint_is_json_and_holds_what_decides_the_bits() -> None:
    run = setup(optimizer={"name": "adam", "betas": (0.8, 0.9)})
    found = fingerprint(run.job, run.files["insurer"])
    assert json.loads(json.dumps(found)) == found
    with_values = {key: value for key, value in found.items() if not key.endswith(("code", "weights", "settings"))}
    assert {key: value for key, value in with_values.items() if value is not None} == {
        "rules": 2,
        "secret": "seed",
        "autocast": "off",
        "default_dtype": "torch.float32",
        "float32_matmul_precision": "highest",
        "torch": torch.__version__,
        "threads": 1,
        "device": "cpu",
        "base.model": "torch.nn.modules.linear:Linear",
        "base.optimizer.name": "adam",
        "base.optimizer.betas": [0.8, 0.9],
        "fuse.model": "tests.support.split:Concatenated",
        "fuse.optimizer.name": "adam",
        "fuse.optimizer.betas": [0.8, 0.9],
        "fuse.loss": "bce_with_logits",
    }


def test_final_weights_become_the_trained_module(tmp_path: Path) -> None:
    run = setup()
    found = run.stages().train(run.pipeline)
    trained: dict[str, TorchBaseStage | TorchFuseStage] = {"bank": found.bases["bank"], "insurer": found.fuse}
    for party, stage in trained.items():
        with Folder(tmp_path / party, job_digest="a", party=party, fingerprint={}) as folder:
            folder.write_final(stage.weights(), run="run", step=4, incarnation="i")
    names = {"bank": [("bank", "base")], "insurer": [("insurer", "base"), ("fuse", "fuse")]}
    for party, parts in names.items():
        for name, part in parts:
            path = tmp_path / party / "final" / f"{part}.safetensors"
            module = final_module(run.job, run.files[party], path)
            assert equal_weights(module, found.modules()[name])
            assert not module.training


# A base model's own mistakes ----------------------------------------------------------------------------------------


def test_an_output_that_is_not_the_cut_is_named_before_anything_is_trained() -> None:
    message = raised(ShapeError, lambda: stages(cuts={"bank": [5], "insurer": [3]}))
    assert message == (
        "party 'bank': activation is float32 (2, 4), the cut layer is float32 (rows, 5); "
        "check torch.nn.modules.container:Sequential"
    )
    classes = {"bank": lambda: nn.Sequential(nn.Linear(3, 4), Rounded()), "insurer": nn.Linear(2, 3)}
    message = raised(ShapeError, lambda: stages(bases=classes))
    assert "activation is int64 (2, 4), the cut layer is float32 (rows, 4)" in message


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


class Changing(nn.Linear):
    """Does `then` to its output once `training_forwards` were made."""

    def __init__(self, then: Callable[[Tensor], Any], after: int = 0) -> None:
        super().__init__(3, 4)
        self.then, self.after = then, after

    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        if not self.training:
            return output
        self.after -= 1
        return self.then(output) if self.after < 0 else output


def failing(then: Callable[[Tensor], Any]) -> Callable[[], object]:
    run = setup(bases={"bank": Changing(then, after=1), "insurer": nn.Linear(2, 3)})
    return lambda: run.stages().train(run.pipeline)


def test_a_base_model_that_goes_wrong_in_training_is_named_with_its_micro_batch() -> None:
    message = raised(ShapeError, failing(lambda y: y[:, :3]))
    assert message == (
        "party 'bank', micro-batch 1.0: activation is float32 (8, 3), the cut layer is float32 (rows, 4); "
        "check tests.compute.test_compute:Changing"
    )
    message = raised(NonFiniteError, failing(lambda y: y / 0))
    assert message.startswith("party 'bank', micro-batch 1.0: activation holds NaN or infinity")
    where = "party 'bank', micro-batch 1.0: tests.compute.test_compute:Changing"
    message = raised(ShapeError, failing(lambda y: (y, y)))
    assert message == f"{where} returns tuple; it must return one tensor"
    message = raised(ComputeError, failing(lambda y: y @ y))
    assert message.startswith(f"{where} failed on float32 (8, 3): RuntimeError: ")


def test_a_backward_pass_that_fails_is_named_with_its_micro_batch() -> None:
    class Irreversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ArithmeticError("no way back")

    message = raised(ComputeError, failing(lambda y: Irreversible.apply(y)))  # type: ignore[no-untyped-call]
    failed = "the backward pass of tests.compute.test_compute:Changing failed: ArithmeticError: no way back"
    assert message == f"party 'bank', micro-batch 1.0: {failed}"


def test_a_trial_leaves_no_trace_in_buffers() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    run = setup(bases={"bank": Counting, "insurer": nn.Linear(2, 3)})
    found = run.stages()
    assert found.bases["bank"].module.calls == 0
    found.train(run.pipeline)
    assert found.bases["bank"].module.calls == 6
    other = run.stages()
    other.bases["bank"].load(found.bases["bank"].state())
    assert other.bases["bank"].module.calls == 6, "also a buffer that a state_dict leaves out"


# What a peer may not send -------------------------------------------------------------------------------------------

TAMPERED: dict[str, tuple[Callable[[Payload], Payload], str]] = {
    "shape": (lambda p: replace(p, shape=(8, 2), data=p.data[:64]), "is float32 (8, 2), expected float32 (8, 4)"),
    "a row less": (lambda p: replace(p, shape=(7, 4), data=p.data[:112]), "is float32 (7, 4), expected float32 (8, 4)"),
    "integers": (lambda p: replace(p, dtype="int32"), "is int32 (8, 4), expected float32 (8, 4)"),
    "too wide": (lambda p: replace(p, dtype="float64", data=bytes(256)), "is float64 (8, 4), expected float32 (8, 4)"),
    "no dtype": (lambda p: replace(p, dtype="Tensor"), "is Tensor (8, 4), expected float32 (8, 4)"),
    "bytes": (lambda p: replace(p, data=p.data[:-1]), "float32 (8, 4) takes 128 bytes, but holds 127"),
    "other rows": (lambda p: replace(p, rows=b"otherrow"), "belongs to other rows (digest 6f74686572726f77, expected"),
    "no rows": (lambda p: replace(p, rows=b""), "belongs to other rows (digest missing"),
    "nan": (lambda p: replace(p, data=b"\0\0\xc0\x7f" + bytes(p.data[4:])), "holds NaN or infinity"),
    "infinity": (lambda p: replace(p, data=b"\0\0\x80\x7f" + bytes(p.data[4:])), "holds NaN or infinity"),
}


@pytest.mark.parametrize(("tamper", "complaint"), TAMPERED.values(), ids=TAMPERED)
def test_an_activation_that_does_not_fit_the_cut_or_the_rows_is_refused_naming_its_sender(
    tamper: Callable[[Payload], Payload], complaint: str
) -> None:
    found = stages()
    activation = tamper(found.bases["bank"].forward(FIRST))
    message = raised(RemoteProtocolError, lambda: found.fuse.forward_backward(FIRST, {"bank": activation}))
    assert message.startswith("party 'insurer', micro-batch 0.0: activation of party 'bank'")
    assert complaint in message


@pytest.mark.parametrize(("tamper", "complaint"), TAMPERED.values(), ids=TAMPERED)
def test_a_gradient_that_does_not_fit_the_cut_or_the_rows_is_refused_naming_the_label_holder(
    tamper: Callable[[Payload], Payload], complaint: str
) -> None:
    found = stages()
    gradient = found.fuse.forward_backward(FIRST, {"bank": found.bases["bank"].forward(FIRST)})["bank"]
    message = raised(RemoteProtocolError, lambda: found.bases["bank"].backward(FIRST, tamper(gradient)))
    assert message.startswith("party 'bank', micro-batch 0.0: gradient of party 'insurer'")
    assert complaint in message


def test_held_out_activations_are_checked_too() -> None:
    found = stages(holdout=0.4)
    held_out = found.bases["bank"].predict(FIRST)
    wrong = replace(held_out, rows=b"other")
    message = raised(RemoteProtocolError, lambda: found.fuse.evaluate(FIRST, {"bank": wrong}))
    where = "party 'insurer', micro-batch 0.0 (held-out rows)"
    assert message.startswith(f"{where}: activation of party 'bank' belongs to other rows")
    training = found.bases["bank"].forward(FIRST)
    raised(RemoteProtocolError, lambda: found.fuse.evaluate(FIRST, {"bank": training}))
    raised(LocalProtocolError, lambda: found.fuse.forward_backward(FIRST, {}))


def test_half_precision_activations_are_taken_by_a_model_made_for_them() -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).bfloat16()

    class Widening(Concatenated):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            seen.add(inputs[0].dtype)
            return super().forward([x.float() for x in inputs])

    seen: set[torch.dtype] = set()
    found = stages(bases={"bank": Half(3, 4), "insurer": nn.Linear(2, 3)}, fuse=Widening(7, 1))
    activation = found.bases["bank"].forward(FIRST)
    assert activation.dtype == "bfloat16"
    assert found.fuse.forward_backward(FIRST, {"bank": activation})["bank"].dtype == "bfloat16"
    assert torch.bfloat16 in seen


# The order of work --------------------------------------------------------------------------------------------------


def test_the_own_base_model_is_differentiated_after_the_gradients_that_others_wait_for() -> None:
    found = stages(bases={"bank": nn.Linear(3, 4), "insurer": nn.Linear(2, 3)})
    assert found.fuse.own is not None
    before = deepcopy(found.fuse.own.module)
    assert found.fuse.forward_backward(FIRST, {"bank": found.bases["bank"].forward(FIRST)})["bank"].data
    assert all(parameter.grad is None for parameter in found.fuse.own.module.parameters())
    found.fuse.update()
    assert not equal_weights(found.fuse.own.module, before)


def test_what_is_prepared_early_has_the_bits_of_what_is_computed_late() -> None:
    run = setup(pipeline={"micro_batches": 2})
    late, early, confused = (run.stages() for _ in range(3))
    second = MicroBatch(0, 1)
    for found, prepared in ((early, FIRST), (confused, second)):
        found.bases["bank"].prepare(prepared)
        found.fuse.prepare(prepared)
    for micro_batch in (FIRST, second):
        sent = [found.bases["bank"].forward(micro_batch) for found in (late, early, confused)]
        assert [bytes(payload.data) for payload in sent] == [bytes(sent[0].data)] * 3
        answers = [f.fuse.forward_backward(micro_batch, {"bank": sent[0]})["bank"] for f in (late, early, confused)]
        assert [bytes(payload.data) for payload in answers] == [bytes(answers[0].data)] * 3


def test_work_out_of_order_is_a_bug_that_says_so() -> None:
    found = stages(pipeline={"micro_batches": 2})
    base, fuse = found.bases["bank"], found.fuse
    first, second = MicroBatch(0, 0), MicroBatch(0, 1)
    sent = {mb: base.forward(mb) for mb in (first, second)}
    gradients = {mb: fuse.forward_backward(mb, {"bank": sent[mb]})["bank"] for mb in (first, second)}
    raised(LocalProtocolError, lambda: base.backward(second, gradients[second]))
    raised(LocalProtocolError, base.update)
    raised(LocalProtocolError, base.state)
    raised(LocalProtocolError, fuse.state)
    base.backward(first, gradients[first])
    raised(LocalProtocolError, lambda: base.backward(first, gradients[first]))
    base.backward(second, gradients[second])
    base.update()
    fuse.update()
    raised(LocalProtocolError, lambda: base.forward(first))
    raised(LocalProtocolError, fuse.update)
    raised(LocalProtocolError, fuse.metrics)


def test_loading_forgets_what_is_in_flight() -> None:
    run = setup(pipeline={"micro_batches": 2, "depth": 4, "staleness": 1}, optimizer={"name": "adam", "lr": 0.1})
    quiet = run.stages().train(run.pipeline)
    disturbed = run.stages()
    fresh = {"bank": disturbed.bases["bank"].state(), "insurer": disturbed.fuse.state()}
    disturbed.train(run.pipeline, stop_after=2)
    for micro_batch in (MicroBatch(3, 0), MicroBatch(4, 0)):
        sent = disturbed.bases["bank"].forward(micro_batch)
        disturbed.fuse.forward_backward(micro_batch, {"bank": sent})
    disturbed.fuse.prepare(FIRST)  # with weights that are about to be replaced
    disturbed.bases["bank"].load(fresh["bank"])
    disturbed.fuse.load(fresh["insurer"])
    disturbed.losses.clear()
    disturbed.train(run.pipeline)
    assert disturbed.losses == quiet.losses
    assert all(equal_weights(module, quiet.modules()[name]) for name, module in disturbed.modules().items())


# Resumed equals uninterrupted ---------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {"amsgrad": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.9, "centered": True},
}
DENSE = sorted(optimizer_names().keys() - {"sparseadam"})


@pytest.mark.parametrize("optimizer", DENSE)
def test_a_run_resumed_from_files_has_the_bits_of_an_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    bias = optimizer != "muon"  # which takes matrices only
    norm = [nn.BatchNorm1d(4), nn.Dropout(0.3)] if bias else [nn.Dropout(0.3)]
    fuse = nn.Linear(7, 1, bias=bias)
    run = setup(
        bases={"bank": nn.Sequential(nn.Linear(3, 4, bias=bias), *norm), "insurer": nn.Linear(2, 3, bias=bias)},
        fuse=fuse,
        aggregation="concat",
        optimizer={"name": optimizer} | SETTINGS.get(optimizer, {}),
        pipeline={"micro_batches": 2, "checkpoint_every": 2, "depth": 3, "staleness": 1},
        epochs=3,
        batch_size=4,
    )
    quiet = run.stages().train(run.pipeline)
    first = run.stages().train(run.pipeline, stop_after=7)
    states = {"bank": first.bases["bank"].state(), "insurer": first.fuse.state()}
    resumed = run.stages()
    resumed.bases["bank"].forward(FIRST)  # forgotten by loading
    anew: dict[str, TorchBaseStage | TorchFuseStage] = {"bank": resumed.bases["bank"], "insurer": resumed.fuse}
    for party, stage in anew.items():
        with Folder(tmp_path / party, job_digest="a", party=party, fingerprint={}) as folder:
            folder.save(7, states[party], run="run", generation=0, values={})
        with Folder(tmp_path / party, job_digest="a", party=party, fingerprint={}) as folder:
            stage.load(folder.load(7).state)
        assert stage.state() == states[party]
    resumed.train(run.pipeline, first_step=8)
    assert first.losses + resumed.losses == quiet.losses
    for name, module in resumed.modules().items():
        assert equal_weights(module, quiet.modules()[name]), name
        assert furthest(module, run.given[name]) > 0
    assert resumed.fuse.state() == quiet.fuse.state()
    assert resumed.bases["bank"].state() == quiet.bases["bank"].state()


def test_a_state_is_a_copy() -> None:
    run = setup(optimizer={"name": "adam"})
    found = run.stages().train(run.pipeline, stop_after=2)
    before = found.bases["bank"].state()
    copied = {name: bytes(payload.data) for name, payload in before.tensors.items()}
    found.train(run.pipeline, first_step=3)
    assert {name: bytes(payload.data) for name, payload in before.tensors.items()} == copied
    assert found.bases["bank"].state() != before


def test_a_checkpoint_of_another_model_is_refused() -> None:
    state = stages().bases["bank"].state()
    wider = stages(bases={"bank": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), "insurer": nn.Linear(2, 3)})
    message = raised(CheckpointError, lambda: wider.bases["bank"].load(state))
    expected = "party 'bank': the checkpoint is of another model than torch.nn.modules.container:Sequential: 1.bias, "
    assert message.startswith(expected)


# Loss, labels and metrics -------------------------------------------------------------------------------------------


def test_the_losses_of_party_files_are_those_that_there_are() -> None:
    assert tuple(LOSSES) == LOSSES_OF_FILES


def hinge(output: Tensor, labels: Tensor) -> Tensor:
    return torch.relu(1 - output[:, 0] * (2 * labels - 1)).mean()


BAD_LABELS: list[tuple[str, Any, int, str]] = [
    ("cross_entropy", np.arange(ROWS) % 4, 3, "class labels go from 0 to 3, but the fuse model has 3 outputs, for "),
    ("cross_entropy", np.arange(ROWS) % 3 - 1, 3, "class labels go from -1 to 1"),
    ("cross_entropy", np.arange(ROWS) / 2 % 3, 3, "labels are not whole numbers; cross_entropy takes classes 0 to 2"),
    ("bce_with_logits", np.arange(ROWS) % 3, 1, "labels go from 0 to 2; bce_with_logits takes 0 to 1"),
    ("mse", np.where(np.arange(ROWS) == 3, np.nan, 1.0), 1, "labels hold NaN or infinity"),
    ("mse", np.array(["yes"] * ROWS), 1, "labels are <U3; write them as numbers"),
]


@pytest.mark.parametrize(("loss", "labels", "outputs", "complaint"), BAD_LABELS)
def test_labels_that_do_not_suit_loss_and_model_are_named_before_training(
    loss: str, labels: Any, outputs: int, complaint: str
) -> None:
    message = raised(JobError, lambda: stages(loss=loss, labels=labels, fuse=Concatenated(7, outputs)))
    assert message.startswith("party 'insurer': ")
    assert complaint in message


def test_an_output_that_does_not_suit_the_labels_is_named_before_training() -> None:
    message = raised(ShapeError, lambda: stages(fuse=Concatenated(7, 3)))
    assert message.startswith(
        "party 'insurer': the fuse model's output is float32 (2, 3), the labels are int64 (2,); this loss needs"
    )


def test_a_fuse_that_fails_on_the_cuts_is_named_before_training() -> None:
    message = raised(ShapeError, lambda: stages(fuse=Concatenated(9, 1)))
    failed = "tests.support.split:Concatenated failed on [float32 (2, 4), float32 (2, 3)]: RuntimeError: "
    assert message.startswith(f"party 'insurer': {failed}")
    assert "check tests.support.split:Concatenated and its args" in message

    class Pooling(nn.Module):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return torch.cat(inputs, 1).mean()

    message = raised(ShapeError, lambda: stages(fuse=Pooling()))
    assert "returns float32 () for 2 rows; its first axis must be the rows" in message


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda output, labels: output**2, "the loss returns float32 (2, 1); it must return the mean over the rows"),
        (lambda output, labels: 5, "the loss returns int; it must return"),
        (lambda output, labels: output[5, 5], "failed on output float32 (2, 1) and labels int64 (2,): IndexError"),
        (nn.MarginRankingLoss, "failed on output float32 (2, 1) and labels int64 (2,): TypeError"),
    ],
)
def test_a_loss_of_the_users_own_that_cannot_be_used_is_named(loss: Any, complaint: str) -> None:
    assert complaint in raised(ComputeError, lambda: stages(loss=loss))


def test_a_loss_may_be_a_class_of_torch() -> None:
    run = setup(loss="torch.nn:SmoothL1Loss", labels=np.linspace(0, 1, ROWS)[:, None])
    found = run.stages()
    value = found.fuse.objective.loss(torch.zeros(2, 1), torch.ones(2, 1))
    assert value == 0.5
    found.train(run.pipeline)


def test_a_loss_that_becomes_nan_is_named_with_its_step() -> None:
    def diverging(output: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(output))
        return output.mean() * (torch.nan if calls.count(8) > 2 else 1.0)

    calls: list[int] = []
    run = setup(loss=diverging)  # steps of 8, 8 and 4 rows; trials are of fewer
    message = raised(NonFiniteError, lambda: run.stages().train(run.pipeline))
    assert message.startswith("party 'insurer', micro-batch 3.0: the loss is nan; the output of ")
    assert "is finite, so the loss makes it" in message


def test_an_infinite_gradient_of_a_finite_loss_is_named_with_the_party_it_is_for() -> None:
    def steep(output: Tensor, labels: Tensor) -> Tensor:
        return (output * 0).abs().sqrt().mean()

    found = stages(loss=steep)
    sent = found.bases["bank"].forward(FIRST)
    message = raised(NonFiniteError, lambda: found.fuse.forward_backward(FIRST, {"bank": sent}))
    assert message.startswith("party 'insurer', micro-batch 0.0: gradient for party 'bank' holds NaN or infinity")


def measure(scores: Any, labels: Any, metrics: list[str], loss: Any, order: Any = lambda parts: parts) -> Any:
    """Evaluate a model without parameters on scores of its own; half of the rows are held out."""
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    scores = scores.reshape(len(labels), -1)
    run = parties(
        bases={"bank": nn.Identity()},
        fuse=nn.Identity(),
        features={"bank": scores},
        labels=labels,
        cuts={"bank": [scores.shape[1]]},
        aggregation="sum",
        loss=loss,
        metrics=metrics,
        batch_size=4,
        holdout=0.5,
    )
    found, batches = run.stages(), run.job.batches(len(labels))
    for index in order(list(range(batches.holdout_parts))):
        micro_batch = MicroBatch(0, index)
        found.fuse.evaluate(micro_batch, {"bank": found.bases["bank"].predict(micro_batch)})
    rows = np.concatenate([batches.holdout_part(index) for index in range(batches.holdout_parts)])
    return found.fuse.metrics(), scores[rows], labels[rows]


def test_binary_metrics_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 2, 60)
    names = ["auroc", "accuracy", "f1", "precision", "recall", "average_precision"]
    found, scores, held_out = measure(draw.normal(size=60) + labels, labels, names, "bce_with_logits")
    predicted = scores[:, 0] > 0
    assert found == pytest.approx(
        {
            "loss": reference.log_loss(held_out, 1 / (1 + np.exp(-scores[:, 0].astype(np.float64)))),
            "auroc": reference.roc_auc_score(held_out, scores[:, 0]),
            "accuracy": reference.accuracy_score(held_out, predicted),
            "f1": reference.f1_score(held_out, predicted),
            "precision": reference.precision_score(held_out, predicted),
            "recall": reference.recall_score(held_out, predicted),
            "average_precision": reference.average_precision_score(held_out, scores[:, 0]),
        },
        rel=1e-5,
    )


def test_multiclass_metrics_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(2)
    labels = draw.integers(0, 3, 90)
    names = ["auroc", "accuracy", "f1", "precision", "recall", "average_precision"]
    found, scores, held_out = measure(draw.normal(size=(90, 3)) + np.eye(3)[labels], labels, names, "cross_entropy")
    shares = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum(1, keepdims=True)
    predicted, one_hot = scores.argmax(1), np.eye(3)[held_out]
    assert found == pytest.approx(
        {
            "loss": reference.log_loss(held_out, shares),
            "auroc": reference.roc_auc_score(held_out, shares, multi_class="ovr"),
            "accuracy": reference.accuracy_score(held_out, predicted),
            "f1": reference.f1_score(held_out, predicted, average="macro"),
            "precision": reference.precision_score(held_out, predicted, average="macro"),
            "recall": reference.recall_score(held_out, predicted, average="macro"),
            "average_precision": reference.average_precision_score(one_hot, shares),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("loss", ["mse", nn.functional.l1_loss])
def test_regression_metrics_are_those_of_scikit_learn(loss: Any) -> None:
    draw = np.random.default_rng(3)
    labels = draw.normal(size=(60, 1))
    found, scores, held_out = measure(labels + draw.normal(size=(60, 1)), labels, ["mse", "mae", "r2", "loss"], loss)
    values = {
        "mse": reference.mean_squared_error(held_out, scores),
        "mae": reference.mean_absolute_error(held_out, scores),
        "r2": reference.r2_score(held_out, scores),
    }
    assert found == pytest.approx(values | {"loss": values["mse" if loss == "mse" else "mae"]}, rel=1e-5)


def test_metrics_do_not_depend_on_the_order_of_evaluation() -> None:
    scores = np.random.default_rng(1).normal(size=600)  # enough for their sum to depend on its order
    forward, *_ = measure(scores, np.zeros(600), ["mse"], "mse")
    backward, *_ = measure(scores, np.zeros(600), ["mse"], "mse", lambda parts: parts[::-1])
    assert forward == backward


def test_an_evaluation_starts_anew_after_its_metrics() -> None:
    found = stages(holdout=0.4).fuse
    base = stages(holdout=0.4).bases["bank"]
    found.evaluate(FIRST, {"bank": base.predict(FIRST)})
    assert found.metrics()["loss"] is not None
    assert "without an evaluation" in raised(LocalProtocolError, found.metrics)


@pytest.mark.parametrize(
    ("labels", "loss", "metrics", "undefined"),
    [
        (np.zeros(40, int), "bce_with_logits", ["auroc", "average_precision", "f1", "accuracy", "recall"], 2),
        (np.ones(40, int), "bce_with_logits", ["auroc", "average_precision", "precision"], 2),
        (np.zeros(40, int), "cross_entropy", ["auroc", "average_precision", "f1", "precision", "recall"], 2),
        (np.ones(40), "mse", ["r2", "mse"], 1),
    ],
)
def test_a_metric_that_the_held_out_rows_do_not_define_is_none(
    labels: Any, loss: str, metrics: list[str], undefined: int
) -> None:
    scores = np.random.default_rng(1).normal(size=(40, 3 if loss == "cross_entropy" else 1))
    found, *_ = measure(scores, labels, metrics, loss)
    assert [name for name in metrics if found[name] is None] == metrics[:undefined]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_class_that_no_held_out_row_has_is_left_out_of_the_mean() -> None:
    draw = np.random.default_rng(2)
    labels = draw.integers(0, 2, 60)
    found, scores, held_out = measure(draw.normal(size=(60, 3)), labels, ["auroc"], "cross_entropy")
    shares = torch.from_numpy(scores).double().softmax(1).numpy()
    each = [reference.roc_auc_score(held_out == c, shares[:, c]) for c in (0, 1)]
    assert found["auroc"] == pytest.approx(sum(each) / 2, rel=1e-5)


CLASSES, NUMBERS = np.arange(ROWS) % 2, np.linspace(0, 1, ROWS)[:, None]


@pytest.mark.parametrize(
    ("loss", "labels", "metric", "complaint"),
    [
        ("bce_with_logits", CLASSES, "auc", "'auc' is unknown for a binary loss; allowed are loss, auroc, accuracy"),
        ("mse", NUMBERS, "auroc", "'auroc' is unknown for a regression loss; allowed are loss, mse, mae, r2"),
        (nn.functional.l1_loss, NUMBERS, "f1", "'f1' is unknown for a regression loss"),
        (hinge, CLASSES, "auc", "'auc' is unknown for a binary loss"),
    ],
)
def test_a_metric_that_is_unknown_is_named_with_those_that_are_not(
    loss: Any, labels: Any, metric: str, complaint: str
) -> None:
    assert complaint in raised(JobError, lambda: stages(loss=loss, labels=labels, metrics=[metric]))


@pytest.mark.parametrize("labels", [np.arange(40) % 2, np.arange(40) % 2 * 1.0, np.arange(40) % 2 * 2 - 1])
def test_with_a_loss_of_the_users_own_the_labels_decide_what_is_measured(labels: Any) -> None:
    found, scores, held_out = measure(np.random.default_rng(1).normal(size=40), labels, ["accuracy"], hinge)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(held_out == 1, scores[:, 0] > 0))
    counts, *_ = measure(np.zeros(40), labels, ["mae"], hinge)
    assert counts["mae"] == pytest.approx(np.abs(held_out).mean())
    fractions, *_ = measure(np.zeros(40), labels + 0.25, ["mse"], hinge)
    assert fractions["mse"] == pytest.approx(np.mean((held_out + 0.25) ** 2))


def test_labels_that_no_metric_of_the_task_can_take_are_named_before_training() -> None:
    message = raised(JobError, lambda: stages(loss=hinge, labels=np.arange(ROWS) % 3, metrics=["accuracy"]))
    assert message.startswith("party 'insurer': labels go from 0 to 2; accuracy needs 0 and 1, or -1 and 1")
    three = {"loss": hinge, "labels": np.arange(ROWS) % 4, "fuse": Concatenated(7, 3)}
    message = raised(JobError, lambda: stages(**three, metrics=["f1", "auroc"]))
    assert "class labels go from 0 to 3, but the fuse model has 3 outputs" in message
    stages(**three)


def test_the_steps_loss_is_the_mean_over_its_rows_however_they_are_cut() -> None:
    one = setup()
    same = {"bases": {p: one.given[p] for p in ("bank", "insurer")}, "fuse": one.given["fuse"]}
    three = setup(**same, pipeline={"micro_batches": 3})
    whole, cut = one.stages().train(one.pipeline).losses, three.stages().train(three.pipeline).losses
    assert cut == pytest.approx(whole, rel=1e-5)
