"""Stages: what crosses the cut is checked, work is done in order, and every mistake is named."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sl_queue.errors import (
    ComputeError,
    LocalProtocolError,
    NonFiniteError,
    RemoteProtocolError,
    ShapeError,
)
from sl_queue.protocol.messages import MicroBatch, Payload
from tests.support.bank import FIRST, raised, setup, stages
from tests.support.split import Concatenated, equal_weights

pytestmark = pytest.mark.usefixtures("one_thread_and_fixed_draws")


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
        "check tests.compute.test_stages:Changing"
    )
    message = raised(NonFiniteError, failing(lambda y: y / 0))
    assert message.startswith("party 'bank', micro-batch 1.0: activation holds NaN or infinity")
    where = "party 'bank', micro-batch 1.0: tests.compute.test_stages:Changing"
    message = raised(ShapeError, failing(lambda y: (y, y, y)))
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
    failed = "the backward pass of tests.compute.test_stages:Changing failed: ArithmeticError: no way back"
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
