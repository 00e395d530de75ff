"""A new run that begins with the weights of an earlier one, after any change; what is not the same is said.

Weights are matched by name and shape: what both models have is taken over, the rest stays as it was built.
"""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from sl_queue.compute.model import Model
from sl_queue.errors import JobError
from sl_queue.protocol.checkpoint import State

_LISTED = 5  # names in a sentence


def begin_with(models: Iterable[Model], folder: Path) -> list[str]:
    """Give models the final weights in an earlier run's state folder, and say what differs.

    Raises JobError if there are none, or if a model has no tensor of theirs.
    """
    return [said for model in models for said in _given(model, folder / "final" / f"{model.part}.safetensors")]


def _given(model: Model, path: Path) -> Iterable[str]:
    where = f"party {model.party!r}: [{model.part}]"
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise JobError(
            f"{where} begins with the weights of an earlier run, but {path} cannot be read "
            f"({type(error).__name__}); let [start] from name the state folder of a run that has finished"
        ) from None
    own = {name: tensor for name, tensor in model.module.state_dict().items() if isinstance(tensor, Tensor)}
    same = [name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape]
    if own and not same:
        raise JobError(f"{where} shares no tensor with {path}: no name and shape is the same; begin without [start]")
    with torch.no_grad():
        # a module may keep its weights in another form than it saves them in: it takes them back itself
        model.module.load_state_dict({**own, **{name: weights[name] for name in same}}, strict=False)
        if model.learning is not None and model.learning.average is not None:
            for name, parameter in model.module.named_parameters():
                model.learning.average.tensors[name].copy_(parameter)
    for what, names in (
        ("new, and as they were built", [name for name in own if name not in weights]),
        ("of another shape, and as they were built", [n for n in own if n in weights and n not in same]),
        ("not in the model any more", [name for name in weights if name not in own]),
    ):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            yield f"{where} begins with {path}; {', '.join(names[:_LISTED])}{more}: {what}"


def begin_with_moments(models: Iterable[Model], state: State) -> None:
    """Give optimizers what those of an earlier run remembered of parameters of the same name and shape."""
    for model in models:
        if model.learning is None:
            continue
        shapes = {name: tuple(parameter.shape) for name, parameter in model.module.named_parameters()}
        earlier = {n: p.shape for n, p in state.tensors.items() if n.startswith(f"{model.part}/module/")}
        same = {name for name, shape in shapes.items() if earlier.get(f"{model.part}/module/{name}") == shape}
        prefix = f"{model.part}/optimizer/"

        def is_same(name: str, prefix: str = prefix, same: set[str] = same) -> bool:
            return name.startswith(prefix) and name.removeprefix(prefix).rpartition("/")[0] in same

        tensors = {name: payload for name, payload in state.tensors.items() if is_same(name)}
        model.learning.built.load(State(tensors, {name: v for name, v in state.values.items() if is_same(name)}))


def digest_of_start(folder: Path, optimizer: bool) -> str:
    """Digest the final weights that a run begins with: it is resumed with the same. Raises JobError."""
    digest = blake2b(f"optimizer {optimizer}".encode(), digest_size=8)
    paths = sorted((folder / "final").glob("*.safetensors"))
    if not paths:
        raise JobError(f"[start] from = {str(folder)!r}: there are no final weights in it; it must be a state folder")
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
