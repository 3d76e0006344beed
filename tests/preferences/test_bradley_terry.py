import numpy as np
import pytest
import torch
from scipy.special import expit

from onereward.preferences import davidson_probabilities
from onereward.rewards.losses import davidson_log_probabilities


DELTAS = np.linspace(-8, 8, 33)


def test_without_ties_it_is_bradley_terry():
    p = davidson_probabilities(DELTAS, 0.0)
    np.testing.assert_allclose(p[:, 0], expit(DELTAS), rtol=1e-12)
    np.testing.assert_allclose(p[:, 2], expit(-DELTAS), rtol=1e-12)
    assert (p[:, 1] == 0).all()


@pytest.mark.parametrize("nu", [0.1, 0.5, 2.0])
def test_davidsons_closed_form(nu):
    # with worths w = exp(utility): P(1) = w1 / (w1 + w2 + nu sqrt(w1 w2))
    w1, w2 = np.exp(DELTAS), np.ones_like(DELTAS)
    z = w1 + w2 + nu * np.sqrt(w1 * w2)
    expected = np.stack([w1 / z, nu * np.sqrt(w1 * w2) / z, w2 / z], axis=-1)
    np.testing.assert_allclose(davidson_probabilities(DELTAS, nu), expected, rtol=1e-12)


def test_swapping_the_images_swaps_the_winners():
    swapped = davidson_probabilities(-DELTAS, 0.5)[:, ::-1]
    np.testing.assert_allclose(swapped, davidson_probabilities(DELTAS, 0.5), rtol=1e-14)


def test_ties_leave_the_odds_of_the_decided_votes_alone():
    p = davidson_probabilities(DELTAS, 1.7)
    np.testing.assert_allclose(p[:, 0] / (p[:, 0] + p[:, 2]), expit(DELTAS), rtol=1e-12)


def test_huge_differences_neither_overflow_nor_lose_mass():
    p = davidson_probabilities(np.array([-1e6, 1e6]), 0.5)
    np.testing.assert_array_equal(p, [[0, 0, 1], [1, 0, 0]])


def test_it_is_the_likelihood_that_the_reward_model_is_trained_with():
    theirs = davidson_log_probabilities(torch.from_numpy(DELTAS), torch.tensor(0.5, dtype=torch.float64).log()).exp()
    np.testing.assert_allclose(davidson_probabilities(DELTAS, 0.5), theirs.numpy(), rtol=1e-12)
