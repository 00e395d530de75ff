"""Base models with several outputs: by name or in order, in one message, and in plain PyTorch the same bits."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue import SplitModel, check, run_local
from sl_queue.config.job import Job, PartyFile
from sl_queue.cut.several import Outputs
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError, RemoteProtocolError, ShapeError
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import Activation, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.resolved import train_joined
from tests.support.split import Parties, equal_weights, furthest, table_of

ROWS, BATCH = 24, 12


class Fm(nn.Module):
    """DeepFM's terms: linear, deep, and the embedding's sums, of which two are computed without gradient."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear, self.deep, self.factors = nn.Linear(inputs, 1), nn.Linear(inputs, 8), nn.Linear(inputs, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        factors = self.factors(x)
        with torch.no_grad():
            square, low = factors**2, factors - 1
        return [torch.relu(self.deep(x)), self.linear(x), square, low]


class FuseFm(nn.Module):
    """Gets one flat list, party by party and output by output."""

    def __init__(self, parties: int) -> None:
        super().__init__()
        self.out = nn.Linear(8 * parties, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        deep, linear, square = inputs[0::4], inputs[1::4], inputs[2::4]
        fm = sum(torch.sum(each, 1, keepdim=True) for each in square)
        return self.out(torch.cat(deep, 1)) + sum(linear) + 0.1 * fm  # type: ignore[no-any-return]


class Tower(nn.Module):
    """A tower with a logit and an embedding."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.logit, self.embedding, self.idle = nn.Linear(inputs, 1), nn.Linear(inputs, 6), nn.Linear(inputs, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logit": self.logit(x), "embedding": self.embedding(x).reshape(-1, 2, 3), "idle": self.idle(x)}


class TwoTowers(nn.Module):
    """Gets a dict per party; looks at one output of theirs not at all."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: list[dict[str, Tensor]]) -> Tensor:
        one, other = inputs
        match = (one["embedding"] * other["embedding"]).flatten(1).sum(1, keepdim=True)
        return one["logit"] + other["logit"] + self.scale * match


CASES: dict[str, tuple[Any, Any, Any]] = {
    "list": (Fm, FuseFm, [[8], [1], [4], [4]]),
    "dict": (Tower, TwoTowers, {"logit": [1], "embedding": [2, 3], "idle": [2]}),
}
ADAM = {"name": "adam", "lr": 0.05, "weight_decay": 0.1}


def run_of(case: str, own: bool = False, wire: Any = None, whole: bool = False, **pipeline: Any) -> Parties:
    base, fuse, cut = CASES[case]
    torch.manual_seed(1)
    draw = np.random.default_rng(0)
    names = ["a", "holder"] if own else ["a", "b"]
    given: dict[str, Any] = {"a": base(3), names[1]: base(2), "fuse": fuse(2)}
    features = {"a": draw.normal(size=(ROWS, 3)).astype(np.float32), names[1]: draw.normal(size=(ROWS, 2)).astype("f4")}
    labels, ids = draw.integers(0, 2, ROWS), np.arange(ROWS)
    roles: dict[str, Any] = {"a": {"role": "feature", "cut": cut}, names[1]: {"role": "feature", "cut": cut}}
    roles["holder"] = {"role": "label", "cut": cut} if own else {"role": "label"}
    files, tables = {}, {}
    for party in roles:
        parts: dict[str, Any] = {"base": {"model": given[party], "optimizer": ADAM}} if party in given else {}
        if party == "holder":
            parts["fuse"] = {
                "model": given["fuse"],
                "optimizer": ADAM,
                "loss": "bce_with_logits",
                "metrics": ["accuracy"],
            }
        tables[party] = table_of(features.get(party), labels if party == "holder" else None)
        files[party] = PartyFile(party=party, data=Rows(ids, features.get(party), tables[party].labels), **parts)
    settings: dict[str, Any] = {"name": "t", "seed": 7, "epochs": 2, "batch_size": BATCH, "parties": roles}
    settings |= {"pipeline": {"micro_batches": 2, "checkpoint_every": 1, "depth": 4, **pipeline}, "wire": wire or {}}
    settings |= {"fuse": {"whole_batch": whole}}
    return Parties(Job(**settings), files, tables, given)


def plain(run: Parties, parts: int = 2) -> dict[str, nn.Module]:
    modules = {name: copy.deepcopy(module) for name, module in run.given.items()}
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.05, weight_decay=0.1) for module in modules.values()]
    labels = torch.from_numpy(run.tables["holder"].labels).float()
    for epoch in range(2):
        order = row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, BATCH):
            for rows in np.array_split(order[first : first + BATCH], parts):
                found = [modules[p](torch.from_numpy(run.tables[p].features[rows])) for p in run.job.fused]
                inputs = found if isinstance(found[0], dict) else [each for party in found for each in party]
                loss = nn.functional.binary_cross_entropy_with_logits(modules["fuse"](inputs)[:, 0], labels[rows])
                (loss / parts).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return modules


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_a_plain_loop(case: str, own: bool) -> None:
    run = run_of(case, own)
    stages, wanted = run.stages().train(run.pipeline), plain(run)
    for name, module in stages.modules().items():
        assert furthest(module, wanted[name]) < 1e-6, name
    if case == "dict":  # an output that the loss does not depend on has no gradient: Adam's decay leaves it alone
        assert torch.equal(stages.modules()["a"].idle.weight, run.given["a"].idle.weight)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    assert all(equal_weights(joined.bases[party], stages.modules()[party]) for party in run.job.fused)
    assert equal_weights(joined.fuse, stages.modules()["fuse"])


@pytest.mark.parametrize("case", CASES)
def test_whole_batches_and_narrow_wires_work_with_them(case: str) -> None:
    run = run_of(case, whole=True)
    assert furthest(run.stages().train(run.pipeline).modules()["a"], plain(run, 1)["a"]) < 1e-5
    for wire in ({"dtype": "float16"}, {"dtype": "int8", "compress": "zstd"}, {"compress": "bitmap"}):
        run = run_of(case, wire=wire)
        near = 1e-6 if "dtype" not in wire else 0.5
        assert furthest(run.stages().train(run.pipeline).modules()["a"], plain(run)["a"]) < near


@pytest.mark.parametrize("pipeline", [{}, {"staleness": 1}])
@pytest.mark.parametrize("case", CASES)
def test_a_run_and_a_resumed_one_give_the_same_weights(case: str, pipeline: dict[str, Any]) -> None:
    run = run_of(case, own=True, **pipeline)
    whole = run.stages().train(run.pipeline).modules()
    begun, fresh = run.stages().train(run.pipeline, stop_after=1), run.stages()
    for one, other in zip((*begun.bases.values(), begun.fuse), (*fresh.bases.values(), fresh.fuse), strict=True):
        other.load(one.state())
    resumed = fresh.train(run.pipeline, first_step=2).modules()
    result = run_local(run.job, list(run.files.values()))
    for party in run.job.fused:
        assert equal_weights(resumed[party], whole[party])
        assert equal_weights(result.base(party), whole[party])


# On the wire ---------------------------------------------------------------------------------------------------------


def test_one_message_carries_all_outputs_and_back_come_only_gradients_that_there_are() -> None:
    first = MicroBatch(0, 0)
    for case, there, back in (("list", 17, 9), ("dict", 9, 7)):
        run = run_of(case)
        stages = run.stages()
        sent = {party: base.forward(first) for party, base in stages.bases.items()}
        answers = stages.fuse.forward_backward(first, sent)
        assert len(sent["a"].data) == 6 * 4 * there
        assert len(answers["a"].data) == 6 * 4 * back
        assert answers["a"].shape == sent["a"].shape == (6, there)
        header = Header("r", 0, Kind.ACTIVATION, "a", "holder", first)
        _, message = decode(encode(header, Activation(first, sent["a"])))
        assert isinstance(message, Activation)
        assert message.payload.packing == sent["a"].packing


@pytest.mark.parametrize(
    "mark", ["of:9|", "of:1,0|", "of:0,0|", "of:|", "of:x|", "of:0", "of:00|", "of:-1|", "of:0,1|"]
)
def test_a_peer_that_marks_outputs_wrongly_is_named(mark: str) -> None:
    run, first = run_of("list"), MicroBatch(0, 0)
    stages = run.stages()
    sent = {party: base.forward(first) for party, base in stages.bases.items()}
    answer = stages.fuse.forward_backward(first, sent)["a"]
    wrong = replace(answer, packing=mark)
    if mark == "of:0,1|":
        wrong = replace(answer, packing=mark, data=bytes(answer.data)[:-4])
    with pytest.raises(RemoteProtocolError, match="of party 'holder'"):
        stages.bases["a"].backward(first, wrong)


def test_a_mark_is_read_as_it_was_written() -> None:
    outputs = Outputs.of({"b": [2], "a": [3, 4]})
    assert outputs is not None
    assert (outputs.names, outputs.sizes) == (("a", "b"), (12, 2))
    payload = Payload("float32", (5, 12), b"", b"", "float32/none")
    marked = outputs.marked(payload, [0], (5, 14))
    assert marked.packing == "of:0|float32/none"
    assert outputs.parts_of(marked) == ((0,), replace(payload, shape=(5, 14)))
    assert outputs.marked(payload, [0, 1], (5, 12)) is payload


# Refused -------------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Returns something of its linear output."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(3, 1), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.layer(x))


@pytest.mark.parametrize(
    ("cut", "then", "words"),
    [
        ([[1], [1]], lambda y: y, "returns Tensor; the cut asks for a list of tensors"),
        ({"u": [1], "v": [1]}, lambda y: [y, y], "returns list; the cut asks for a dict of tensors"),
        ({"u": [1], "v": [1]}, lambda y: {"u": y}, "returns 'u'; the cut has u, v"),
        ([[1], [1]], lambda y: [y, y, y], "returns 3 tensors; the cut has 2"),
        ([[1], [2]], lambda y: [y, y], r"output number 1 is float32 (2, 1), the cut says (rows, 2)"),
        ({"u": [1], "v": [1]}, lambda y: {"u": y, "v": y.double()}, "all outputs must be of one dtype"),
        ([1], lambda y: y.to_sparse(), "returns a sparse_coo tensor; it must return a dense one"),
        ([1], lambda y: [y], "returns list; it must return one tensor"),
    ],
)
def test_outputs_that_are_not_the_cut_are_refused_by_name(cut: Any, then: Any, words: str) -> None:
    run = run_of("list")
    parties = {"a": {"role": "feature", "cut": cut}, "holder": {"role": "label"}}
    base = {"model": Returns(then), "optimizer": ADAM}
    file = run.files["a"].replace(base=base)
    job = run.job.replace(parties=parties)
    from tests.support.resolved import base_stage

    with pytest.raises(ShapeError) as caught:
        base_stage(job, file, run.tables["a"], job.batches(ROWS))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("cut", "fuse", "words"),
    [
        ({"u": [0]}, {}, "parties.a.cut.u[0] = 0; it must be"),
        ([[1], [0]], {}, "parties.a.cut[1][0] = 0; it must be"),
        ([[1], [1]], {"aggregation": "sum"}, "party 'a' has several outputs, which need \"list\""),
    ],
)
def test_a_job_says_what_is_wrong_with_several_outputs(cut: Any, fuse: Any, words: str) -> None:
    run = run_of("list")
    with pytest.raises(JobError) as caught:
        run.job.replace(parties={"a": {"role": "feature", "cut": cut}, "holder": {"role": "label"}}, fuse=fuse)
    assert words in str(caught.value)


def test_a_table_of_outputs_has_no_order_and_a_list_has_one() -> None:
    def job(cut: Any) -> Job:
        return run_of("list").job.replace(parties={"a": {"role": "feature", "cut": cut}, "holder": {"role": "label"}})

    one, other = job({"u": [1], "v": [2]}), job({"v": [2], "u": [1]})
    assert one.digest == other.digest
    assert one.parties["a"].outputs == other.parties["a"].outputs
    assert job([[1], [2]]).digest != job([[2], [1]]).digest
    assert job([[1], [2]]).cut("a") == (3,)


@pytest.mark.parametrize("case", CASES)
def test_a_notebook_finds_several_outputs_by_itself(case: str, tmp_path: Any) -> None:
    run = run_of(case)
    model = SplitModel(
        {p: run.given[p] for p in ("a", "b")},
        run.given["fuse"],
        label_holder="holder",
        loss="bce_with_logits",
        epochs=2,
        progress=False,
    )
    x = {party: run.tables[party].features for party in ("a", "b")}
    model.fit(x, run.tables["holder"].labels)
    assert model.job_.parties["a"].outputs == run.job.parties["a"].outputs
    found = check(model.job_, model.parties_)
    assert [finding.text for finding in found if finding.level == "error"] == []
    assert any("equal bit for bit" in finding.text or "split and joined" in finding.text for finding in found), found
    modules = model.bases_
    with torch.no_grad():
        found = [modules[p](torch.from_numpy(x[p])) for p in ("a", "b")]
        inputs = found if case == "dict" else [each for party in found for each in party]
        wanted = model.fuse_(inputs)[:, 0].numpy()
    assert np.allclose(model.decision_function(x), wanted, atol=1e-6)
