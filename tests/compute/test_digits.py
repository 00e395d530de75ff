"""The demo's digits are those that scikit-learn has, and the package brings them along with their licence."""

import tomllib
from pathlib import Path

from sklearn.datasets import load_digits

from sl_queue.local.digits import read_digits

ROOT = Path(__file__).parents[2]


def test_the_digits_are_scikit_learns_number_for_number() -> None:
    theirs = load_digits()
    images, target = read_digits()
    assert images.shape == (1797, 8, 8) and target.shape == (1797,)
    assert (images == theirs.images).all() and (target == theirs.target).all()


def test_the_package_holds_them_and_says_whose_they_are() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    brought = {path.name for pattern in package_data["sl_queue"] for path in (ROOT / "sl_queue").glob(pattern)}
    assert {"digits.npz", "digits.md"} <= brought
    about = (ROOT / "sl_queue" / "local" / "digits.md").read_text()
    assert "UCI Machine Learning Repository" in about and "CC BY 4.0" in about and "python ops/digits.py" in about
