"""The installed product is made of few parts, and small."""

import pytest
import torch

from benchmarks.parts import MOST_BYTES, MOST_PACKAGES, measure_parts


def test_the_installed_product_is_of_few_parts() -> None:
    parts = measure_parts()
    assert {"sl-queue", "torch", "pika", "filelock"} <= set(parts)
    assert not {"scikit-learn", "scipy", "pandas", "joblib"} & set(parts)
    if torch.version.cuda is None:
        assert len(parts) <= MOST_PACKAGES, sorted(parts)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings CUDA, which is larger than all else")
def test_the_installed_product_is_small() -> None:
    assert sum(measure_parts().values()) <= MOST_BYTES
