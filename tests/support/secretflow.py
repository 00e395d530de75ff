"""SecretFlow's torch applications as their authors wrote them: `python -m tests.support.secretflow CHECKOUT`.

CHECKOUT is a folder with secretflow_fl/ of their repository. Its packages import a whole cluster when they begin, so
only the files of the applications are imported, from where they are. Each application is compared bit for bit with a
plain PyTorch loop, with parameter groups, schedule, clipping and average, and is stopped and resumed at every step.
"""

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tests.compute.test_applications import require_plain_weights, require_resumed
from tests.support.applications import ROWS, Application

ROOT = "secretflow_fl"
PACKAGES = ("", ".ml", ".ml.nn", ".ml.nn.core", ".ml.nn.applications", ".ml.nn.sl", ".ml.nn.sl.defenses")
ITEMS, PAST, WIDTH = 11, 4, 9  # of sequences: known items, items in a history, width of a vector


def import_applications(checkout: Path) -> dict[str, Any]:
    """Import the six modules without running what their packages do besides."""
    for package in PACKAGES:
        module = ModuleType(f"{ROOT}{package}")
        module.__path__ = [str(checkout / ROOT / package.strip(".").replace(".", "/"))]
        sys.modules[module.__name__] = module
    if "torchmetrics" not in sys.modules:
        metrics = ModuleType("torchmetrics")  # their base class names it in annotations alone
        metrics.Metric = object  # type: ignore[attr-defined]
        sys.modules["torchmetrics"] = metrics
    names = ("dnn", "deepfm", "din", "bst", "vgg", "resnet")
    return {name: import_module(f"{ROOT}.ml.nn.applications.sl_{name}_torch") for name in names}


def applications(given: dict[str, Any]) -> Iterator[tuple[str, Application]]:
    """Yield each application by name, built as its authors do it, on made-up rows."""
    draw = np.random.default_rng(3)
    torch.manual_seed(11)
    numbers = {party: draw.normal(size=(ROWS, 4)).astype(np.float32) for party in ("alice", "bob")}
    codes = {party: [draw.integers(0, ITEMS, ROWS) for _ in range(2)] for party in ("alice", "bob")}
    mixed = {party: [*codes[party], numbers[party]] for party in codes}
    yield "DNN", dnn(given["dnn"], mixed)
    yield "DeepFM", deepfm(given["deepfm"], mixed)
    visits = [draw.integers(1, ITEMS, (ROWS, 1)), draw.integers(1, ITEMS, (ROWS, 1))]
    visits.append(np.where(draw.random((ROWS, PAST)) < 0.3, 0, draw.integers(1, ITEMS, (ROWS, PAST))))
    visits[2][:, 0] = 1  # nobody's history is empty
    rows = {"alice": visits, "bob": [draw.integers(0, ITEMS, (ROWS, 1)) for _ in range(3)]}
    yield "DIN", sequences(given["din"].DINBase, given["din"].DINFuse([6 * WIDTH, 24]), 3 * WIDTH, rows)
    width = (2 + PAST) * WIDTH
    yield "BST", sequences(given["bst"].BSTBase, given["bst"].BSTfuse([width + 3 * WIDTH, 32]), width, rows)
    images = {party: draw.normal(size=(ROWS, 3, 32, 16)).astype(np.float32) for party in ("alice", "bob")}
    vgg, resnet = given["vgg"], given["resnet"]
    yield "VGG", pictures(vgg.VGGBase, (), vgg.VGGFuse(dnn_units_size=[2 * 4608, 64]), 4608, images)
    blocks = (resnet.BasicBlock, [2, 2, 2, 2])
    yield "ResNet", pictures(resnet.ResNetBase, blocks, resnet.ResNetFuse(), 512, images)


def dnn(module: Any, features: dict[str, Any]) -> Application:
    bases = {party: module.DnnBase([ITEMS, ITEMS, 4], [16, 8], sparse_feas_indexes=[0, 1]) for party in features}
    return Application(
        bases, module.DnnFuse([8, 8], [16, 1]), {p: [8] for p in bases}, features, loss="torch.nn:BCELoss"
    )


def deepfm(module: Any, features: dict[str, Any]) -> Application:
    bases = {party: module.DeepFMBase([ITEMS, ITEMS, 4], [16, 8], continuous_feas_index=[2]) for party in features}
    cuts = {party: [[8], [1], [4], [4]] for party in bases}
    return Application(bases, module.DeepFMFuse([8, 8], [16, 1]), cuts, features, loss="torch.nn:BCELoss")


def sequences(base: Any, fuse: Any, width: int, features: dict[str, Any]) -> Application:
    """Build DIN or BST: alice has users, items and histories, bob three codes of the user."""
    names = {"alice": ["user", "item", "history"], "bob": ["gender", "age", "work"]}
    sizes = {name: [ITEMS, WIDTH] for each in names.values() for name in each}
    bases = {
        "alice": base(names["alice"], sizes, "item", {"history": PAST}, ["history"]),
        "bob": base(names["bob"], sizes, None, {}),
    }
    return Application(bases, fuse, {"alice": [width], "bob": [3 * WIDTH]}, features, loss="cross_entropy")


def pictures(base: Any, arguments: tuple[Any, ...], fuse: Any, width: int, features: dict[str, Any]) -> Application:
    """Build VGG or ResNet: each party has half of every image."""
    bases = {party: base(*arguments) for party in features}
    return Application(bases, fuse, {p: [width] for p in bases}, features, classes=10)


def main() -> None:
    """Compare all of them, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.secretflow", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a folder with secretflow_fl/")
    parser.add_argument("names", nargs="*", help="applications; default: all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name, app in applications(import_applications(asked.checkout)):
        if asked.names and name not in asked.names:
            continue
        require_plain_weights(app)
        print(f"{name}: the weights of plain PyTorch, bit for bit", flush=True)
        for staleness in (0, 1):
            require_resumed(app, staleness)
        print(f"{name}: resumed at every step, with staleness 0 and 1, to the same bits", flush=True)


if __name__ == "__main__":
    main()
