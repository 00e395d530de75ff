"""Random draws of a party's models, keyed by a secret of its own, so that no other party can repeat them."""

import logging
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sl_queue
from sl_queue.compute.seeds import key, seeded
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.errors import CheckpointError, JobError, SlQueueError
from sl_queue.launch.connect import MEMORY, Channels, connector
from sl_queue.launch.party import serve_party
from sl_queue.launch.scheduler import serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.messages import SCHEDULER, MicroBatch
from sl_queue.protocol.scheduler.status import RunStatus, as_json
from sl_queue.storage.secret_file import read_secret, write_secret
from tests.support.first_version import SGD, Enough, files, job, stop_after
from tests.support.split import equal_weights

CPU = torch.device("cpu")
FIRST = MicroBatch(3, 1)
SECRET, OTHER = b"s" * 32, b"t" * 32


# Keys -----------------------------------------------------------------------------------------------------------


def drawn(key: int) -> list[float]:
    """Draw a few numbers of each kind of generator."""
    with seeded(key, CPU):
        return [*torch.randn(5).tolist(), *np.random.rand(5).tolist(), random.random()]


def test_without_a_secret_a_key_is_what_it_always_was() -> None:
    assert key(7, "bank", "base forward", FIRST) == 4269533699582549478


def test_draws_repeat_with_the_same_secret_and_with_no_other() -> None:
    mine = drawn(key(7, "bank", "base forward", FIRST, SECRET))
    assert drawn(key(7, "bank", "base forward", FIRST, SECRET)) == mine
    others = [drawn(key(7, "bank", "base forward", FIRST, secret)) for secret in (b"", OTHER)]
    others.append(drawn(key(7, "bank", "base forward", MicroBatch(3, 2), SECRET)))
    assert not any(set(other) & set(mine) for other in others)


def test_a_secret_reaches_all_of_the_generators_state_and_not_the_32_bits_that_a_seed_sets() -> None:
    secret = key(7, "bank", "base forward", FIRST, SECRET)
    other = secret ^ (1 << 200)  # equal in the bits that torch and NumPy take of a seed
    assert secret & 0xFFFFFFFFFFFFFFFF == other & 0xFFFFFFFFFFFFFFFF
    assert not set(drawn(secret)) & set(drawn(other))
    with seeded(secret & 0xFFFFFFFF, CPU):
        tried = torch.randn(5).tolist()
    assert not set(tried) & set(drawn(secret))


def test_the_generators_of_the_process_are_left_as_they_were() -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    drawn(key(7, "bank", "base forward", FIRST, SECRET))
    assert torch.equal(torch.randn(3), expected)


# The attack -----------------------------------------------------------------------------------------------------


class Clipped(nn.Module):
    """A base model that defends its activations as a book does: clip each row to 1, add Gaussian noise."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.exact = nn.Linear(3, 4), EXACT

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        h = h / h.norm(dim=1, keepdim=True).clamp_min(1.0)
        if not self.training:
            return h
        self.exact.append(h.detach().clone())
        return h + torch.randn_like(h)


class Curious(nn.Module):
    """A fuse model that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        if self.training:
            SEEN.append(inputs[0].detach().clone())
        return self.linear(inputs[0])


EXACT: list[torch.Tensor] = []
SEEN: list[torch.Tensor] = []


def undone(privacy: dict[str, Any]) -> float:
    """Return the largest error left when the label holder subtracts the noise that the job's seed gives."""
    EXACT.clear()
    SEEN.clear()
    agreed = job(epochs=1, holdout=0.0, pipeline={"micro_batches": 1})
    bank, shop = files(privacy=privacy)
    bank = bank.model_copy(update={"base": bank.base.model_copy(update={"model": Clipped, "args": {}})})  # type: ignore[union-attr]
    shop = shop.model_copy(update={"fuse": shop.fuse.model_copy(update={"model": Curious, "args": {}})})  # type: ignore[union-attr]
    sl_queue.run_local(agreed, [bank, shop])
    assert len(SEEN) == len(EXACT) == 4
    errors = []
    for step, (seen, exact) in enumerate(zip(SEEN, EXACT, strict=True)):
        with seeded(key(agreed.seed, "bank", "base forward", MicroBatch(step, 0)), CPU):
            errors.append((seen - torch.randn_like(seen) - exact).abs().max().item())
    return min(errors)


def test_a_label_holder_cannot_undo_noise_that_a_secret_keys(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    assert undone({"secret": tmp_path / "secret"}) > 1.0
    assert undone({"secret": "seed"}) < 1e-5  # as it could before


def test_initial_weights_follow_from_the_job_alone_with_a_secret_too(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    still = {"model": "tests.support.first_version:Noisy", "args": {"inputs": 3}, "optimizer": SGD | {"lr": 0.0}}
    public = sl_queue.run_local(job(), files(base=still))
    private = sl_queue.run_local(job(), files(base=still, privacy={"secret": tmp_path / "secret"}))
    assert equal_weights(public.base("bank"), private.base("bank"))


# In a deployment ------------------------------------------------------------------------------------------------


def deployed(folder: Path, on_status: Any = lambda _: None, **bank: Any) -> None:
    """Run the workers that organisations deploy, as threads; raises the bank's error, or else any."""
    agreed, connect, channels = job(broker={"patience": 5.0}), connector(job(), MEMORY), Channels()
    errors: dict[str, SlQueueError] = {}

    def tell(status: RunStatus) -> None:
        on_status(as_json(status))

    def place(role: str) -> Workplace:
        return Workplace(connect, folder / role, channels)

    def guarded(role: str, serve: Any) -> threading.Thread:
        def run() -> None:
            try:
                serve()
            except Exception as error:
                errors[role] = error if isinstance(error, SlQueueError) else SlQueueError(str(error))
                channels.fail(errors[role])

        thread = threading.Thread(target=run, name=role)
        thread.start()
        return thread

    threads = [
        guarded(SCHEDULER, lambda: serve_scheduler(agreed, place(SCHEDULER), tell, late_s=0.0)),
    ]
    for file in files(**bank):
        serve = lambda file=file: serve_party(  # noqa: E731
            agreed, resolve(agreed, file, Importer()), place(file.party), private=True
        )
        threads.append(guarded(file.party, serve))
    for thread in threads:
        thread.join()
    if errors:
        raise errors.get("bank") or next(iter(errors.values()))


def weights(folder: Path) -> bytes:
    return (folder / "bank" / "final" / "base.safetensors").read_bytes()


def test_a_worker_makes_a_secret_of_its_own_and_draws_with_it(tmp_path: Path) -> None:
    deployed(tmp_path / "one")
    secrets = [tmp_path / "one" / party / "secret" for party in ("bank", "shop")]
    assert len({read_secret(path) for path in secrets}) == 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in secrets)
    deployed(tmp_path / "two")
    assert weights(tmp_path / "one") != weights(tmp_path / "two")
    deployed(tmp_path / "again", privacy={"secret": secrets[0]})
    assert weights(tmp_path / "one") == weights(tmp_path / "again")


def interrupted(folder: Path, **bank: Any) -> None:
    with pytest.raises(SlQueueError):
        deployed(folder, stop_after(2), **bank)
    assert list((folder / "bank" / "checkpoints").glob("step-*"))


def test_a_worker_that_is_started_again_repeats_its_draws(tmp_path: Path) -> None:
    interrupted(tmp_path / "one")
    deployed(tmp_path / "one")
    deployed(tmp_path / "two", privacy={"secret": tmp_path / "one" / "bank" / "secret"})
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_a_run_whose_secret_is_lost_is_refused_by_name(tmp_path: Path) -> None:
    interrupted(tmp_path)
    (tmp_path / "bank" / "secret").unlink()
    with pytest.raises(CheckpointError, match=r"bank/secret is missing; .* restore the file"):
        deployed(tmp_path)


def test_a_run_goes_on_with_no_other_secret(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    write_secret(tmp_path / "other")
    with pytest.raises(CheckpointError, match="the secret that keys this party's draws has changed"):
        deployed(tmp_path / "run", privacy={"secret": tmp_path / "other"})
    with pytest.raises(CheckpointError, match=r"keyed by a secret, now they are keyed by the job's seed"):
        deployed(tmp_path / "run", privacy={"secret": "seed"})


def test_a_run_that_one_person_began_with_the_seed_keeps_it_and_a_worker_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agreed = job(broker={"patience": 5.0})
    with pytest.raises(Enough):
        sl_queue.run_local(agreed, files(), out=tmp_path / "run", on_status=stop_after(2))
    with caplog.at_level(logging.WARNING, "sl_queue"):
        deployed(tmp_path / "run")
    assert "bank: the job's seed alone keys what its models draw at random" in caplog.text
    assert not (tmp_path / "run" / "bank" / "secret").exists()
    sl_queue.run_local(agreed, files(), out=tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o640)
    with pytest.raises(JobError, match=r"others may read this secret \(mode 640\); run: chmod 600"):
        deployed(tmp_path / "run", privacy={"secret": tmp_path / "secret"})


def test_a_file_that_is_no_secret_is_refused_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"hunter2")
    path.chmod(0o600)
    with pytest.raises(JobError, match="a secret has 32 bytes, this file has 7") as caught:
        deployed(tmp_path / "run", privacy={"secret": path})
    assert "hunter2" not in str(caught.value)


def test_no_checkpoint_and_no_representation_shows_a_secret(tmp_path: Path) -> None:
    deployed(tmp_path)
    secret = read_secret(tmp_path / "bank" / "secret")
    kept = [path for path in (tmp_path / "bank").rglob("*") if path.is_file() and path.name != "secret"]
    assert len(kept) >= 5
    for path in kept:
        assert secret not in path.read_bytes()
        assert secret.hex() not in path.read_bytes().decode(errors="replace")
    assert repr(secret)[2:10] not in repr(resolve(job(), files()[0], Importer()).with_secret(secret))
