"""SplitModel.export: every part as a file that runs without sl_queue, on the rows at hand or on given ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sl_queue import JobError, SplitModel
from sl_queue.compute.export import Target, run_exported
from tests.support.split import Concatenated

ROWS = 40


@pytest.fixture(scope="module")
def trained() -> tuple[SplitModel, dict[str, np.ndarray]]:
    draw = np.random.default_rng(1)
    x = {"bank": draw.normal(size=(ROWS, 3)).astype(np.float32), "insurer": draw.normal(size=(ROWS, 2))}
    torch.manual_seed(0)
    bases = {"bank": nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "insurer": nn.Sequential(nn.Linear(2, 5), nn.Tanh())}
    model = SplitModel(
        bases, Concatenated(9, 1), label_holder="insurer", loss="bce_with_logits", epochs=2, progress=False
    )
    model.fit(x, (x["bank"][:, 0] > 0).astype(np.int64))
    return model, x


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_exported_parts_put_together_give_the_models_output(
    trained: tuple[SplitModel, dict[str, np.ndarray]], target: Target, tmp_path: Path
) -> None:
    model, x = trained
    found = {f"{each.path.parent.name}/{each.path.stem}": each for each in model.export(tmp_path, target)}
    assert set(found) == {"bank/base", "insurer/base", "insurer/fuse"}
    rows = {party: torch.from_numpy(array.astype(np.float32)) for party, array in x.items()}
    outputs = {party: run_exported(found[f"{party}/base"].path, {"rows": rows[party]}) for party in x}
    output = run_exported(found["insurer/fuse"].path, outputs)
    assert np.allclose(output[:, 0].numpy(), model.decision_function(x), atol=1e-5)


def test_a_loaded_model_is_exported_on_rows_that_are_given(
    trained: tuple[SplitModel, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    model, x = trained
    loaded = SplitModel.load(model.save(tmp_path / "saved"))
    with pytest.raises(JobError, match="holds no rows; give export a few by features="):
        loaded.export(tmp_path / "out")
    files = [each.path for each in loaded.export(tmp_path / "out", features=x)]
    assert len(files) == 3
    assert all(path.exists() for path in files)


def test_another_target_is_refused_by_name(trained: tuple[SplitModel, dict[str, np.ndarray]], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="'tflite' is unknown; allowed are torch, onnx"):
        trained[0].export(tmp_path, "tflite")  # type: ignore[arg-type]
