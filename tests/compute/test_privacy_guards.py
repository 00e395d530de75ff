"""Defences at the cut are functions of what they hide and of a secret: the same bits again, and no draw used twice."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sl_queue.cut.guard import Crossing
from sl_queue.cut.rows import CutRows
from sl_queue.privacy.defences import clipped
from sl_queue.privacy.draws import key_for, row_tokens
from sl_queue.privacy.first_look import FirstLook
from sl_queue.privacy.guards import ActivationDefence, AnswerDefence, GradientDefence, Returning, RowIndex
from sl_queue.protocol.messages import MicroBatch

N, SECRET, OTHER = 50, b"s" * 32, b"t" * 32
KEYS = np.random.default_rng(1).permutation(np.arange(10, 10 + N, dtype=np.uint64) * np.uint64(2**50))
TOKENS = row_tokens([str(i).encode() for i in range(N)], key_for(SECRET, "shop", "rows"))
GENERATOR = torch.Generator().manual_seed(1)
ACTIVATION = torch.randn(8, 5, generator=GENERATOR)


def crossing(rows: Any = slice(0, 8), step: int = 3, *, held_out: bool = False, what: Any = "activation") -> Crossing:
    sender, receiver = ("bank", "shop") if what == "activation" else ("shop", "bank")
    cut_rows = CutRows.of(KEYS, np.arange(N)[rows], held_out=held_out)
    return Crossing(what, sender, receiver, MicroBatch(step, 1), cut_rows)


def test_rows_are_found_again_by_their_keys() -> None:
    assert np.array_equal(RowIndex.of(KEYS)(KEYS[[4, 0, 9]]), [4, 0, 9])


def test_an_activation_that_is_computed_again_has_the_same_noise() -> None:
    defence = ActivationDefence(1.0, 2.0, SECRET)
    sent = defence.apply(ACTIVATION, crossing())
    assert torch.equal(sent, ActivationDefence(1.0, 2.0, SECRET).apply(ACTIVATION.clone(), crossing()))
    assert sent.dtype == ACTIVATION.dtype
    noise = (sent - clipped(ACTIVATION, 1.0)) / 2.0
    assert 0.6 < noise.std().item() < 1.4


def test_no_two_releases_share_noise_that_could_be_subtracted() -> None:
    """Another step, evaluation, another secret; and the same step with one other number, after a forced rollback."""
    defence = ActivationDefence(1.0, 2.0, SECRET)
    sent = defence.apply(ACTIVATION, crossing())
    moved = ACTIVATION.clone()
    moved[3, 2] += 1e-3
    others = [
        defence.apply(ACTIVATION, crossing(step=4)),
        defence.apply(ACTIVATION, crossing(held_out=True)),
        ActivationDefence(1.0, 2.0, OTHER).apply(ACTIVATION, crossing()),
        defence.apply(moved, crossing()),
        defence.apply(ACTIVATION, replace(crossing(), receiver="other")),
        defence.apply(ACTIVATION, crossing(slice(8, 16))),
    ]
    for other in others:
        assert (other - sent).abs().min().item() > 1e-4
        assert (other - sent).std().item() > 1.5


def test_without_sigma_rows_are_clipped_and_nothing_else() -> None:
    sent = ActivationDefence(0.5, 0.0, SECRET).apply(ACTIVATION, crossing())
    assert torch.equal(sent, clipped(ACTIVATION, 0.5))


def test_a_row_keeps_its_draw_of_max_norm_in_every_epoch_and_batch() -> None:
    """The largest row fixes the scale here, so that equal gradients get equal noise, whatever else is in the batch."""
    defence = GradientDefence(None, RowIndex.of(KEYS), TOKENS, SECRET)
    gradient = torch.full((8, 5), 0.1)
    gradient[0] = 1.0
    first = defence.apply(gradient, crossing(slice(0, 8), what="gradient"))
    other = defence.apply(gradient[[0, 5, 2]], crossing([0, 5, 2], step=99, what="gradient"))
    assert torch.allclose(first[[0, 5, 2]], other, atol=1e-6)
    assert not torch.allclose(first[1], gradient[1])
    foreign = GradientDefence(None, RowIndex.of(KEYS), TOKENS, OTHER)
    assert not torch.allclose(foreign.apply(gradient, crossing(what="gradient")), first)


def test_half_of_the_noise_is_drawn_once_for_a_row_and_half_for_each_release() -> None:
    """Against whoever adds up epochs, and against whoever subtracts one from the next."""
    defence = GradientDefence(1.0, RowIndex.of(KEYS), TOKENS, SECRET)
    gradient = torch.ones(N, 400)
    noise = [defence.apply(gradient, crossing(slice(0, N), step, what="gradient")) - 1 for step in (1, 2)]
    assert torch.equal(noise[0], defence.apply(gradient, crossing(slice(0, N), 1, what="gradient")) - 1)
    assert noise[0].std().item() == pytest.approx(1.0, rel=0.05)  # the norm of a row, spread over its numbers
    assert (noise[0] * noise[1]).mean().item() == pytest.approx(0.5, abs=0.05)
    assert (noise[0] - noise[1]).std().item() == pytest.approx(1.0, rel=0.05)


def test_max_norm_draws_the_same_for_every_receiver_so_that_colluders_add_up_nothing() -> None:
    defence = GradientDefence(None, RowIndex.of(KEYS), TOKENS, SECRET)
    gradient = torch.randn(8, 5, generator=GENERATOR)
    to_bank = crossing(what="gradient")
    assert torch.equal(defence.apply(gradient, to_bank), defence.apply(gradient, replace(to_bank, receiver="post")))


def test_the_gradient_goes_back_through_the_clipping() -> None:
    activation = ACTIVATION.clone().requires_grad_()
    clipped(activation, 0.5).backward(torch.ones(8, 5))
    found = Returning(0.5, 0.0).apply(torch.ones(8, 5), ACTIVATION, torch.zeros(8, 2), 1.0)
    assert activation.grad is not None
    assert torch.equal(found, activation.grad)


def test_nopeek_is_added_by_the_share_of_the_step() -> None:
    inputs = torch.randn(8, 3, generator=GENERATOR)
    whole, half = (Returning(None, 2.0).apply(torch.zeros(8, 5), ACTIVATION, inputs, share) for share in (1.0, 0.5))
    assert whole.abs().sum() > 0
    assert torch.allclose(whole, 2 * half, atol=1e-6)


def test_a_first_look_speaks_once_of_each_party_and_only_of_what_can_be_read() -> None:
    labels = np.arange(N) % 2
    said: list[Any] = []
    look = FirstLook.of(labels, RowIndex.of(KEYS), 16, said.append)
    signs = torch.from_numpy(np.where(labels == 1, -1.0, 1.0))[:, None] * torch.tensor([[1.0, 2.0]])
    for start in range(0, N, 8):
        rows = slice(start, start + 8)
        look.see(signs[rows], crossing(rows, what="gradient"))
        noise = torch.randn(len(signs[rows]), 2, generator=GENERATOR)
        look.see(noise, replace(crossing(rows, what="gradient"), receiver="post"))
        look.see(signs[rows], crossing(rows))  # an activation
    assert [(reading.party, reading.rows) for reading in said if reading.party == "bank"] == [("bank", 16)]
    assert said[0].auc == 1.0
    assert "bank can read your labels from its gradients (attack AUC 1.00 on 16 rows here)" in said[0].told()


def test_an_answer_hides_a_row_behind_the_same_noise_however_often_and_with_whom_it_is_asked_for() -> None:
    defence = AnswerDefence(1.0, 2.0, SECRET)
    sent = defence.apply(ACTIVATION, crossing(held_out=True))
    again = defence.apply(ACTIVATION[[5, 2]], crossing([5, 2], step=99, held_out=True))
    assert torch.equal(again, sent[[5, 2]])
    noise = (sent - clipped(ACTIVATION, 1.0)) / 2.0
    assert 0.6 < noise.std().item() < 1.4
    assert len(set(noise.flatten().tolist())) == noise.numel()


def test_no_two_rows_versions_or_secrets_share_the_noise_of_an_answer() -> None:
    sent = AnswerDefence(1.0, 2.0, SECRET).apply(ACTIVATION, crossing(held_out=True)) - clipped(ACTIVATION, 1.0)
    moved = ACTIVATION + 1e-3
    same = ACTIVATION[[0] * 8]
    others = [
        AnswerDefence(1.0, 2.0, OTHER).apply(ACTIVATION, crossing(held_out=True)) - clipped(ACTIVATION, 1.0),
        AnswerDefence(1.0, 2.0, SECRET).apply(moved, crossing(held_out=True)) - clipped(moved, 1.0),
    ]
    for other in others:
        assert (other - sent).abs().min() > 1e-5
    alike = AnswerDefence(1.0, 2.0, SECRET).apply(same, crossing(held_out=True))
    assert len({tuple(row) for row in alike.tolist()}) == 8
    assert torch.equal(
        AnswerDefence(1.0, 0.0, SECRET).apply(ACTIVATION, crossing(held_out=True)), clipped(ACTIVATION, 1.0)
    )
