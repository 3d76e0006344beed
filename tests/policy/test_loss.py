"""The clipped surrogate pushes where it should and stops where it should."""

import pytest
import torch

from onereward.policy import adapt_beta, clipped_surrogate


def gradient_at(ratio, advantage, **kwargs):
    ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(ratio, torch.tensor([advantage], dtype=torch.float64), **kwargs)
    return torch.autograd.grad(loss.sum(), ratio)[0].item()


@pytest.mark.parametrize("advantage", [-2.0, 0.5])
def test_on_policy_gradient_is_that_of_the_plain_policy_gradient(advantage):
    assert gradient_at(1.0, advantage, epsilon=1e-4) == pytest.approx(-advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "pushed"),
    [
        (1.2, 1.0, False),  # good, and more likely already: enough
        (1.2, -1.0, True),  # bad, and more likely: push down
        (0.8, 1.0, True),  # good, and less likely: push up
        (0.8, -1.0, False),  # bad, and less likely already: enough
    ],
)
def test_clip_stops_the_gradient_only_in_the_direction_already_taken(ratio, advantage, pushed):
    assert (gradient_at(ratio, advantage, epsilon=0.1) != 0) == pushed


def test_upper_bound_may_differ_from_the_lower():
    assert gradient_at(1.2, 1.0, epsilon=0.1, epsilon_high=0.3) != 0
    assert gradient_at(1.4, 1.0, epsilon=0.1, epsilon_high=0.3) == 0
    assert gradient_at(0.8, -1.0, epsilon=0.1, epsilon_high=0.3) == 0


def test_beta_follows_the_divergence():
    assert adapt_beta(0.1, kl=0.04, kl_target=0.02) == 0.2
    assert adapt_beta(0.1, kl=0.01, kl_target=0.02) == 0.05
    assert adapt_beta(0.1, kl=0.025, kl_target=0.02) == 0.1
