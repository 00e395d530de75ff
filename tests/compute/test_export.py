"""Exported parts compute what the modules compute, for any number of rows, opened in a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from torch import Tensor, nn

import sl_queue
from sl_queue.compute.export import SUFFIX, ByName, ByParty, Target, export_part, run_exported
from sl_queue.compute.spec import LayersSpec
from sl_queue.cut.packing import Wire
from sl_queue.errors import ComputeError
from sl_queue.launch.exporting import export_party
from tests.compute.test_prediction import N, files, job

LAYERS = LayersSpec("", 0, "telco", ("bank",), {"bank": (2,), "telco": (3,)}, "list", Wire(), 1, 0)
TARGETS: tuple[Target, ...] = ("torch", "onnx")


class Fuse(nn.Module):
    """A fuse model that takes a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        output: Tensor = self.linear(torch.cat(inputs, dim=1))
        return output


class Branching(nn.Module):
    """A model that computes something else for other values."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows * 2.0 if float(rows.sum()) > 0.0 else rows * 3.0


def base() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    layers(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)))  # its statistics are not those it began with
    return layers


@pytest.mark.parametrize("target", TARGETS)
def test_a_base_model_is_the_same_in_a_fresh_process(tmp_path: Path, target: Target) -> None:
    module, rows = base(), torch.randn(7, 4)
    done = export_part(module, {"rows": rows}, target, tmp_path / f"base{SUFFIX[target]}")
    assert (done.inputs, done.rows) == (("rows",), 7)
    assert done.difference < 1e-6
    torch.save(rows, tmp_path / "rows.pt")
    program = (
        "import sys, torch; from pathlib import Path; from sl_queue.compute.export import run_exported\n"
        f"rows = torch.load({str(tmp_path / 'rows.pt')!r})[:5]\n"
        f"torch.save(run_exported(Path({str(done.path)!r}), {{'rows': rows}}), {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "out.pt"), module.eval()(rows[:5]), atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_the_inputs_of_a_fuse_model_bear_the_names_of_the_parties(tmp_path: Path, target: Target) -> None:
    fuse = Fuse()
    inputs = {"bank": torch.randn(6, 2), "telco": torch.randn(6, 3)}
    done = export_part(ByParty(fuse, LAYERS), inputs, target, tmp_path / f"fuse{SUFFIX[target]}")
    assert done.inputs == ("bank", "telco")
    with torch.no_grad():
        assert torch.allclose(run_exported(done.path, inputs), fuse(list(inputs.values())), atol=1e-6)
    if target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
        assert [found.name for found in session.get_inputs()] == ["bank", "telco"]


@pytest.mark.parametrize("target", TARGETS)
def test_what_an_export_would_not_carry_is_refused_and_leaves_no_file(tmp_path: Path, target: Target) -> None:
    rows = torch.tensor([[-3.0], [1.0], [5.0]])  # their sum is positive, that of the first alone is not
    with pytest.raises(ComputeError, match=rf"base\{SUFFIX[target]}"):
        export_part(Branching(), {"rows": rows}, target, tmp_path / f"base{SUFFIX[target]}")
    assert list(tmp_path.iterdir()) == []


class Ignores(nn.Module):
    """A model that takes two columns and looks at one."""

    def forward(self, zone: Tensor, km: Tensor) -> Tensor:
        return zone.reshape(-1, 1) * 2.0


@pytest.mark.parametrize(("target", "inputs"), [("torch", ("zone", "km")), ("onnx", ("zone",))])
def test_an_input_that_a_model_ignores_is_in_no_onnx_file(
    tmp_path: Path, target: Target, inputs: tuple[str, ...]
) -> None:
    rows = {"zone": torch.arange(4.0), "km": torch.ones(4)}
    done = export_part(ByName(Ignores(), ("zone", "km")), rows, target, tmp_path / f"base{SUFFIX[target]}")
    assert done.inputs == inputs
    assert run_exported(done.path, rows).flatten().tolist() == [0.0, 2.0, 4.0, 6.0]


def test_what_onnxruntime_cannot_compute_is_one_message_and_leaves_no_file(tmp_path: Path) -> None:
    rows = torch.randn(4, 4, dtype=torch.bfloat16)
    with pytest.raises(
        ComputeError, match=r"base\.onnx: the model cannot be exported to onnx: .* export with --to torch"
    ):
        export_part(base().bfloat16(), {"rows": rows}, "onnx", tmp_path / "base.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fails_on_rows_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ComputeError, match=r"base\.pt2: the model failed on 3 rows: RuntimeError"):
        export_part(base(), {"rows": torch.randn(3, 9)}, "torch", tmp_path / "base.pt2")


def test_a_base_is_exported_with_what_features_learned_of_the_rows_that_all_share(tmp_path: Path) -> None:
    ids, rng = np.arange(N), np.random.default_rng(0)
    zones = np.where(ids < 150, np.where(ids % 3, "north", "south"), "island")  # islands only among rows of one party
    table = {"id": ids, "zone": zones, "age": rng.standard_normal(N), "income": rng.standard_normal(N)}
    pa.csv.write_csv(pa.table(table), tmp_path / "bank.csv")
    shared = sl_queue.Rows(ids[:150], rng.standard_normal((150, 2)), ids[:150] % 2)
    bank, insurer = files({"bank": shared, "insurer": shared})
    assert bank.base is not None
    features = {"zone": {"kind": "category"}, "age": {"kind": "number"}, "income": {"kind": "number"}}
    base = bank.base.replace(args={"inputs": 6, "cut": 8})  # other, missing, north, south, age, income
    bank = bank.replace(data={"path": tmp_path / "bank.csv", "id": "id"}, features=features, base=base)
    agreed = job(alignment={"method": "psi"}, epochs=1)
    sl_queue.run_local(agreed, [bank, insurer], out=tmp_path / "out")
    (done,) = export_party(agreed, bank, tmp_path / "out" / "bank", "torch", None, None)
    assert (done.path.name, done.rows) == ("base.pt2", 64)
    assert run_exported(done.path, {"rows": torch.zeros(3, 6)}).shape == (3, 8)
