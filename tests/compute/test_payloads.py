"""A payload gives back the tensor that it was made of, and is refused when it lies about itself."""

import numpy as np
import pytest
import torch

from sl_queue.cut.crossing import from_payload, payload_view, to_payload
from sl_queue.cut.tensors import is_finite
from sl_queue.protocol.memory import empty
from sl_queue.protocol.messages import Payload

pytestmark = pytest.mark.usefixtures("one_thread_and_fixed_draws")

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


def test_a_message_gives_its_memory_away_where_that_is_its_receivers_alone_and_aligned() -> None:
    numbers = torch.arange(1024.0)
    message = empty(100 + numbers.nbytes)
    message[100:] = payload_view(numbers, b"").data
    mine, read_only = Payload("float32", (32, 32), message[100:]), Payload("float32", (32, 32), bytes(message[100:]))
    taken = from_payload(mine, passing=True)
    assert np.shares_memory(taken.numpy(), np.frombuffer(message, np.uint8))
    assert from_payload(mine, torch.device("meta"), passing=True).device.type == "meta"
    for copied in (from_payload(mine), from_payload(read_only, passing=True)):
        assert not np.shares_memory(copied.numpy(), np.frombuffer(message, np.uint8))
    assert all(torch.equal(found, numbers.view(32, 32)) for found in (taken, copied))

    short = from_payload(Payload("float32", (31, 32), message[100:-128]), passing=True)
    elsewhere = from_payload(Payload("float32", (1023,), message[104:]), passing=True)
    assert np.shares_memory(short.numpy(), taken.numpy())
    assert not np.shares_memory(elsewhere.numpy(), taken.numpy())  # kernels may sum in another order there
    assert elsewhere.data_ptr() % 64 == 0


def test_nobody_who_gets_a_view_of_a_tensor_takes_it_over() -> None:
    live = torch.zeros(32, 32)
    arrived = from_payload(payload_view(live, b""), passing=True)
    arrived += 1
    assert not live.any()


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (Payload("float32", (2, 3), bytes(23)), r"float32 \(2, 3\) takes 24 bytes, but holds 23"),
        (Payload("float32", (2**62, 2**62), b""), "but holds 0"),
        (Payload("float32", (-1, -6), bytes(24)), "a shape cannot be"),
        (Payload("Tensor", (1,), bytes(4)), "'Tensor' is not a torch dtype"),
        (Payload("no_such", (1,), bytes(4)), "'no_such' is not a torch dtype"),
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
