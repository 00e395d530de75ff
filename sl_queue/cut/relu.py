"""The gradient mask: which values of an activation's gradient are worth sending, known without another byte.

The gradient of a ReLU's zeros is never used. Where a base model ends in one and `compress = "bitmap"`, the bits that
came with its activation also say which gradients are worth sending, and those come without bits of their own.
"""

from math import prod
from typing import Any

from torch import Tensor

from sl_queue.cut.packing import Mask, mask_of
from sl_queue.protocol.messages import Payload

_SAME_NUMBERS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0"}


def gradient_mask(payload: Payload) -> Mask | None:
    """Return which values of an activation's gradient are worth sending; None: all of them.

    The payload has been packed here, or unpacked before: its sizes are right.
    """
    if not payload.packing.endswith("/relu"):
        return None
    narrow = payload.packing.partition("/")[0]
    start = 4 * payload.shape[0] if narrow == "int8" else 4 * (narrow == "float16" and payload.dtype != "float16")
    return mask_of(memoryview(payload.data)[start:], prod(payload.shape), payload)


def ends_in_relu(activation: Tensor) -> bool:
    """Return True if a ReLU gave these numbers, apart from their shape, and nothing but it will see their gradient.

    What the gradients of its zeros are then has no effect. A hook on the activation, or a gradient that is retained,
    sees all of them.
    """
    node = activation.grad_fn
    if node is not None and node.name() in _SAME_NUMBERS:
        relu = activation._base  # None for one view of another: what hooks are between them cannot be seen
        if relu is None or relu.grad_fn is not node.next_functions[0][0]:
            return False
        return not _is_watched(activation) and ends_in_relu(relu)
    return node is not None and node.name() == "ReluBackward0" and not _is_watched(activation)


def _is_watched(tensor: Tensor) -> bool:
    """Tell whether anything looks at the gradient of a tensor with a node."""
    assert tensor.grad_fn is not None
    if tensor._backward_hooks or tensor.retains_grad:
        return True
    node = tensor.grad_fn
    for handle in (node.register_hook(_nothing), node.register_prehook(_nothing)):  # all hooks of a kind share a dict
        hooks = handle.hooks_dict_ref()
        others = hooks is None or len(hooks) > 1
        handle.remove()
        if others:
            return True
    return False


def _nothing(*_: Any) -> None:
    """Change no gradient."""
