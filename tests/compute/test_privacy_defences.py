"""Draws, the response and the defences at the cut: right values, and what a curious party gains by patience."""

import math

import numpy as np
import pytest
import torch

from sl_queue.privacy.accounting import cap_of_epsilon
from sl_queue.privacy.attacks import auc
from sl_queue.privacy.defences import clipped, distance_correlation, isotropic, max_norm, noised, nopeek
from sl_queue.privacy.draws import key_for, normal_rows, normal_stream, row_tokens, row_words, seed_secret, uniform
from sl_queue.privacy.response import Response, classes_of, epsilon_for, rarest, respond, undone

SECRET, OTHER = b"s" * 32, b"t" * 32
N = 40_000
TEXTS = [str(i).encode() for i in range(N)]
TOKENS = row_tokens(TEXTS, key_for(SECRET, "shop", "rows"))


def response(epsilon: float, k: int = 2) -> Response:
    return Response(epsilon, tuple(float(c) for c in range(k)))


# Draws ----------------------------------------------------------------------------------------------------------


def test_a_row_has_its_own_draw_wherever_it_stands_and_only_with_the_secret() -> None:
    key = key_for(SECRET, "shop", "x")
    words = row_words(TOKENS, key)
    assert np.array_equal(row_words(TOKENS[[7, 3]], key), words[[7, 3]])
    assert len(np.unique(words)) == N
    for other in (key_for(OTHER, "shop", "x"), key_for(SECRET, "bank", "x"), key_for(SECRET, "shop", "y")):
        assert not set(row_words(TOKENS[:50], other)) & set(words)
    assert not set(row_tokens(TEXTS[:50], key_for(OTHER, "shop", "rows"))) & set(TOKENS)
    assert key_for(SECRET, "a b", "c") != key_for(SECRET, "a", "b c")
    assert seed_secret(1, "shop") != seed_secret(2, "shop")


@pytest.mark.parametrize("found", [normal_stream(b"k" * 32, N), normal_rows(TOKENS[: N // 4], b"k" * 32, 4).ravel()])
def test_normal_draws_are_normal(found: np.ndarray) -> None:
    assert abs(found.mean()) < 0.02
    assert abs(found.std() - 1) < 0.02
    assert abs((np.abs(found) > 1.959964).mean() - 0.05) < 0.005


def test_uniform_draws_never_reach_an_end() -> None:
    ends = uniform(np.array([0, 2**64 - 1], np.uint64))
    assert 0 < ends[0] < ends[1] < 1


def test_a_stream_of_nothing_is_empty() -> None:
    assert normal_stream(b"k" * 32, 0).shape == (0,)
    assert normal_rows(TOKENS[:0], b"k" * 32, 3).shape == (0, 3)
    assert row_words(TOKENS[:0], b"k" * 32).shape == (0,)


# The response ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "k"), [(1.0, 2), (3.0, 2), (1.0, 10)])
def test_labels_stay_and_change_with_the_chances_that_epsilon_says(epsilon: float, k: int) -> None:
    labels, mechanism = np.arange(N) % k, response(epsilon, k)
    given = respond(labels, mechanism, TOKENS, SECRET, "shop")
    assert given.dtype == labels.dtype
    assert mechanism.keep / mechanism.swap == pytest.approx(math.exp(epsilon))
    assert mechanism.keep + (k - 1) * mechanism.swap == pytest.approx(1)
    for true in range(k):
        got = np.bincount(given[labels == true], minlength=k) / (labels == true).sum()
        expected = np.where(np.arange(k) == true, mechanism.keep, mechanism.swap)
        assert np.abs(got - expected).max() < 4.5 * math.sqrt(0.25 / (N / k))


def test_a_response_is_the_same_on_a_table_that_has_grown_and_in_another_order() -> None:
    labels = (np.arange(N) % 10 == 0).astype(np.float32)
    whole = respond(labels, response(1.0), TOKENS, SECRET, "shop")
    part = np.random.default_rng(1).permutation(N)[: N // 3]
    tokens = row_tokens([TEXTS[i] for i in part], key_for(SECRET, "shop", "rows"))
    assert np.array_equal(respond(labels[part], response(1.0), tokens, SECRET, "shop"), whole[part])
    assert whole.dtype == np.float32
    assert not np.array_equal(respond(labels, response(1.0), TOKENS, OTHER, "shop"), whole)


def test_responses_of_two_epsilons_are_independent_so_that_their_pair_gives_no_label_away() -> None:
    """With one draw for both, a row that flips at the larger epsilon alone would be read with certainty."""
    labels = np.zeros(N, np.int64)
    one, other = (respond(labels, response(e), TOKENS, SECRET, "shop") for e in (1.0, 2.0))
    flips = [1 / (1 + math.exp(e)) for e in (1.0, 2.0)]
    assert (one & other).mean() == pytest.approx(flips[0] * flips[1], abs=0.006)


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 3.0])
def test_no_attack_on_what_is_made_of_responses_passes_the_cap(epsilon: float) -> None:
    """The best that can be made of a response is the response itself, in every epoch and run the same."""
    labels = (np.arange(N) % 2).astype(np.int64)
    given = respond(labels, response(epsilon), TOKENS, SECRET, "shop").astype(float)
    patient = np.sum([given + 0.0 for _ in range(10)], axis=0)
    error = 1 / math.sqrt(N)
    assert auc(labels == 1, patient) <= cap_of_epsilon(epsilon) + error
    assert auc(labels == 1, patient) == pytest.approx(cap_of_epsilon(epsilon), abs=2 * error)


def test_probabilities_of_responses_become_those_of_labels_again() -> None:
    mechanism = response(2.0)
    true = np.linspace(0, 1, 11)
    reported = true * mechanism.keep + (1 - true) * mechanism.swap
    assert undone(reported, mechanism) == pytest.approx(true)
    assert undone(np.array([0.0, 1.0]), mechanism).tolist() == [0.0, 1.0]
    several = response(1.0, 3)
    true = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    mixed = several.swap + (several.keep - several.swap) * true
    assert undone(mixed, several) == pytest.approx(true)
    assert undone(np.zeros((1, 3)), several) == pytest.approx(np.full((1, 3), 1 / 3))


def test_a_class_that_is_too_rare_for_an_epsilon_is_seen_before() -> None:
    labels = np.zeros(1000, np.int64)
    labels[:7] = 1
    found = rarest(labels, response(2.0))
    assert (found.share, round(found.says, 3), round(found.right, 2)) == (0.007, 0.125, 0.05)
    assert found.hopeless
    assert epsilon_for(0.007, 2) == 4.6
    assert not rarest(labels, response(4.6)).doubtful
    assert rarest(labels, response(4.5)).doubtful


def test_classes_are_whole_numbers_one_a_row() -> None:
    assert classes_of(np.array([0.0, 1.0, 1.0, 0.0])) == (0.0, 1.0)
    assert classes_of(np.array([[3], [1], [1], [3]])) == (1.0, 3.0)
    assert classes_of(np.array([0.5, 1.0, 1.0, 0.0])) is None
    assert classes_of(np.array([1, 1, 1])) is None
    assert classes_of(np.zeros((4, 2))) is None
    assert classes_of(np.arange(100)) is None


# At the cut -----------------------------------------------------------------------------------------------------


def test_max_norm_gives_every_row_the_largest_norm_in_the_mean_and_keeps_its_direction() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((20_000, 3)))
    found = torch.stack([max_norm(gradient, draw) for draw in draws])
    assert torch.equal(found[0, 0], gradient[0])  # the largest is left as it is
    assert torch.equal(found[:, 2], torch.zeros(20_000, 2))  # a row of zeros divides by nothing
    assert found[:, 1].square().sum(1).mean().sqrt().item() == pytest.approx(5.0, rel=0.02)
    assert torch.allclose(found[:, 1, 0] / found[:, 1, 1], torch.full((20_000,), 0.75), atol=1e-4)


def test_max_norm_takes_rows_that_are_nearly_zero() -> None:
    gradient = torch.tensor([[1e-38, 0.0], [1e-42, 0.0], [3.0, 4.0]])
    found = max_norm(gradient, torch.ones(3))
    assert torch.allclose(found, torch.tensor([[5.0, 0.0], [5.0, 0.0], [3.0, 4.0]]))


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 2, 3)])
def test_defences_take_no_row_one_row_and_rows_of_any_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    width = math.prod(shape[1:])
    assert max_norm(tensor, torch.ones(shape[0])).shape == shape
    assert isotropic(tensor, 1.0, torch.ones(shape[0], width)).shape == shape
    assert noised(clipped(tensor, 1.0), 0.5, torch.ones(shape)).shape == shape
    assert nopeek(torch.randn(shape[0], 5), tensor, 1.0).shape == shape


def test_isotropic_noise_is_level_times_the_largest_norm() -> None:
    gradient = torch.zeros(2, 64)
    gradient[0, 0] = 8.0
    found = isotropic(gradient, 0.5, torch.from_numpy(normal_rows(TOKENS[:2], b"k" * 32, 64)))
    assert found[1].norm().item() == pytest.approx(4.0, rel=0.3)


def test_clipping_is_of_rows_and_not_of_the_batch_and_gradients_go_through_it() -> None:
    activation = torch.tensor([[3.0, 4.0], [0.3, 0.4]], requires_grad=True)
    found = clipped(activation, 1.0)
    assert torch.allclose(found, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    found.backward(torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    assert activation.grad is not None
    assert torch.allclose(activation.grad, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), atol=1e-6)  # along a clipped row: 0


def test_distance_correlation_is_one_for_a_similarity_and_small_for_independent_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(400, 3, generator=generator), torch.randn(400, 3, generator=generator)
    assert distance_correlation(x, 2 * x[:, [2, 0, 1]] + 1).item() == pytest.approx(1.0, abs=1e-5)
    assert distance_correlation(x, noise).item() < 0.25


def test_nopeek_is_the_gradient_of_the_distance_correlation() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    h = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    step = torch.zeros_like(h)
    step[3, 1] = 1e-6
    slope = (distance_correlation(x, h + step) - distance_correlation(x, h - step)) / 2e-6
    assert nopeek(x, h, 0.7)[3, 1].item() == pytest.approx(0.7 * slope.item(), rel=1e-5)
    assert not nopeek(torch.zeros(8, 3, dtype=torch.int64), h, 0.7).any()
