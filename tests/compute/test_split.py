"""A whole module split: equal to the whole, bit for bit, or refused by the name of the layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sl_queue
from sl_queue import JobError, SplitModel
from sl_queue.compute.running import called
from sl_queue.compute.splitting.split import split
from tests.support import architectures as arch
from tests.support.architectures import normal, whole_numbers

IMAGES = normal(4, 3, 8, 8)
TABLE = normal(6, 5)
COLUMNS = {name: whole_numbers(7, 6) for name in ("user", "city", "item", "brand")}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], Any]] = {
    "resnet": (arch.ResNet, IMAGES, {"clinic": "x"}, "layer1"),
    "resnet inside a block": (arch.ResNet, IMAGES, {"clinic": "x"}, "layer2.0.bn1"),
    "vgg": (arch.VGG, IMAGES, {"clinic": "x"}, "features.3"),
    "vgg before its view": (arch.VGG, IMAGES, {"clinic": "x"}, "features"),
    "densenet": (arch.DenseNet, IMAGES, {"clinic": "x"}, "block1.0"),
    "mobilenet": (arch.MobileNet, IMAGES, {"clinic": "x"}, "features.1"),
    "inception": (arch.Inception, IMAGES, {"clinic": "x"}, "branch3"),
    "unet": (arch.UNet, IMAGES, {"clinic": "x"}, "down2"),
    "vision transformer": (arch.VisionTransformer, IMAGES, {"clinic": "x"}, "encoder.0"),
    "towers": (arch.Towers, TABLE, {"bank": range(3), "insurer": [3, 4]}, None),
    "towers, cut at two layers": (
        arch.Towers,
        TABLE,
        {"bank": slice(0, 3), "insurer": slice(3, None)},
        {"bank": "left.2", "insurer": "right.1"},
    ),
    "wide and deep": (
        arch.WideAndDeep,
        {"item": whole_numbers(10, 6), "numbers": TABLE},
        {"shop": "item", "bank": "numbers"},
        "deep.1",
    ),
    "deepfm": (arch.DeepFM, COLUMNS, {"shop": ["user", "city"], "brand": ["item", "brand"]}, None),
    "cross": (arch.Cross, [normal(6, 3), normal(6, 2)], {"bank": 0, "insurer": [1]}, None),
    "tokens": (arch.TokenTransformer, normal(6, 4), {"bank": [0, 2], "insurer": [1, 3]}, None),
    "readings": (
        arch.Readings,
        {"series": normal(4, 5, 3), "numbers": normal(4, 4)},
        {"plant": "lstm", "office": "numbers"},
        None,
    ),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_parts_put_together_compute_what_the_whole_does(case: str) -> None:
    make, rows, parties, cut = CASES[case]
    whole = make().eval()
    found = split(whole, parties, cut, rows=rows)  # which compares gradients and training mode itself
    with torch.no_grad():
        given = [found.bases[party].eval()(inputs) for party, inputs in found.inputs(rows).items()]
        assert torch.equal(found.fuse.eval()(given), called(whole, rows))
    kept = {name for part in (*found.bases.values(), found.fuse) for name in part.state_dict()}
    assert kept == set(whole.state_dict())
    assert set(found.cuts) == set(parties)


def test_the_gradients_are_those_of_the_whole() -> None:
    whole = arch.ResNet()
    found = split(whole, {"clinic": "x"}, "layer1", rows=IMAGES)
    found.fuse([found.bases["clinic"](IMAGES)]).square().sum().backward()
    whole(IMAGES).square().sum().backward()
    parts = {name: p.grad for part in (found.bases["clinic"], found.fuse) for name, p in part.named_parameters()}
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parts[name], parameter.grad), name
    assert found.cuts == {"clinic": {"layer1": (4, 8, 8)}}


def test_layers_stand_for_the_columns_that_reach_them() -> None:
    found = split(arch.Towers(), {"bank": "left", "insurer": "right"}, rows=TABLE)
    assert found.columns == {"bank": (0, 1, 2), "insurer": (3, 4)}


def test_a_skip_crosses_beside_the_layer_that_is_cut() -> None:
    found = split(arch.UNet(), {"clinic": "x"}, "down2", rows=IMAGES)
    assert sorted(found.cuts["clinic"].values()) == [(4, 8, 8), (8, 4, 4)]


def test_any_number_of_rows_goes_through_the_parts() -> None:
    whole = arch.VisionTransformer().eval()
    found = split(whole, {"clinic": "x"}, "patches", rows=IMAGES)
    for rows in (1, 3, 9):
        images = normal(rows, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(found.fuse.eval()([found.bases["clinic"].eval()(images)]), whole(images))


def test_the_module_stays_as_it_was() -> None:
    whole = arch.ResNet()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    split(whole, {"clinic": "x"}, "layer1", rows=IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    assert whole.training
    assert all(parameter.grad is None for parameter in whole.parameters())


# Refused by name ----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(8, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.wide = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8 + 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.cat([self.left(x[:, :3]), self.right(x[:, 3:]), x[:, :3]], 1))


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Doubting(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


class Doubting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) if y.sum() > 0 else y


class OwnDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(nn.functional.dropout(self.one(x), 0.5, self.training))


class Peeking(nn.Module):
    """A base model's layer that changes what another has put into it: the parts do not agree with the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Counting(), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) + self.one.last)


class Counting(nn.Module):
    last = torch.zeros(5)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        Counting.last = Counting.last + 1
        return y + Counting.last


@pytest.mark.parametrize(
    ("make", "rows", "parties", "cut", "words"),
    [
        (Mixed, TABLE, {"a": range(3), "b": [3, 4]}, None, r"'fc1' takes columns of a and b at once, as they are"),
        (Mixed, TABLE, {"a": range(3), "b": [3, 4]}, "fc2", r"'fc2' mixes columns of a and b; a cut must lie before"),
        (arch.Towers, TABLE, {"a": range(3), "b": [3, 4]}, "head.1", r"'head.1' mixes .* 'left' of a, 'right' of b"),
        (
            Siamese,
            {"a": normal(4, 3), "b": normal(4, 3)},
            {"p": "a", "q": "b"},
            None,
            r"'encoder' is used by .*'p' and",
        ),
        (Shortcut, TABLE, {"a": range(3), "b": [3, 4]}, None, r"'cat' in the module's .* columns of 'a' as"),
        (Deciding, TABLE, {"a": "x"}, "inner.one", r"'inner' cannot be cut through"),
        (OwnDropout, TABLE, {"a": "x"}, "one", r"'dropout' in .* computes otherwise in training"),
        (Peeking, TABLE, {"a": "x"}, "one", r"split"),
        (Mixed, TABLE, {"a": "x"}, "fc3", r"the module has no layer 'fc3'; there are fc1, fc2"),
        (Mixed, TABLE, {"a": "y"}, "fc1", r"party 'a': 'y' is neither an input of the module"),
        (arch.Towers, TABLE, {"a": range(3), "b": [3]}, None, r"column 4 is no party's"),
        (arch.Towers, TABLE, {"a": range(4), "b": [3, 4]}, None, r"column 3 is of 'a' and of 'b'"),
        (arch.Towers, TABLE, {"a": [0, 1, 3], "b": [2, 4]}, None, r"'left.0' takes columns of a and b at once"),
        (arch.Towers, TABLE, {"a": range(3), "b": [3, 4]}, {"a": "left.0", "b": "left.1"}, r"both of 'a'"),
        (Siamese, {"a": normal(4, 3), "b": normal(4, 3)}, {"p": "a", "q": "b"}, "encoder", r"'encoder' is called 2"),
        (
            arch.WideAndDeep,
            {"item": whole_numbers(9, 4)},
            {"p": "item"},
            None,
            r"fails on these rows: TypeError: .*numbers",
        ),
        (Mixed, TABLE, {}, None, r"parties is empty"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_the_name_of_the_layer(
    make: Any, rows: Any, parties: Any, cut: Any, words: str
) -> None:
    with pytest.raises(JobError, match=words):
        split(make(), parties, cut, rows=rows)


def test_a_module_that_decides_is_cut_before_and_after_it() -> None:
    found = split(Deciding(), {"a": "x"}, "inner", rows=TABLE)
    assert set(found.bases["a"].state_dict()) == {f"inner.{n}.{k}" for n in ("one", "two") for k in ("weight", "bias")}


# Trained ------------------------------------------------------------------------------------------------------------


def test_a_split_module_is_trained_written_and_put_together_again(tmp_path: Any) -> None:
    torch.manual_seed(0)
    whole = arch.Towers()
    parts = sl_queue.split(whole, {"bank": range(3), "insurer": [3, 4]}, rows=TABLE)
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.normal(size=(60, 5)).astype(np.float32))
    y = (x[:, 0] + x[:, 4] > 0).long().numpy()
    model = SplitModel(
        parts.bases, parts.fuse, label_holder="insurer", loss="bce_with_logits", epochs=3, progress=False
    )
    model.fit(parts.inputs(x), y)
    trained = parts.joined(model.bases_, model.fuse_).eval()
    with torch.no_grad():
        assert np.array_equal(trained(x)[:, 0].numpy(), model.decision_function(parts.inputs(x)))
    assert not torch.equal(trained.left[0].weight, whole.left[0].weight)
    again = SplitModel.load(model.save(tmp_path / "saved"))
    assert np.array_equal(again.predict(parts.inputs(x)), model.predict(parts.inputs(x)))


def test_several_outputs_of_a_base_model_cross_in_a_run() -> None:
    torch.manual_seed(0)
    parts = sl_queue.split(arch.DeepFM(), {"shop": ["user", "city"], "maker": ["item", "brand"]}, rows=COLUMNS)
    rows = {name: whole_numbers(7, 40) for name in COLUMNS}
    y = (rows["user"] > 3).long().numpy()
    model = SplitModel(parts.bases, parts.fuse, label_holder="maker", loss="bce_with_logits", epochs=2, progress=False)
    features = {p: {n: t.numpy() for n, t in each.items()} for p, each in parts.inputs(rows).items()}
    model.fit(features, y)
    with torch.no_grad():
        expected = parts.joined(model.bases_, model.fuse_).eval()(rows)[:, 0].numpy()
    assert np.array_equal(model.decision_function(features), expected)
