"""The losses push where they should and stop where they should, and their gradients are those of a closed form."""

import pytest
import torch

from onereward.policy import (
    adapt_beta,
    clipped_surrogate,
    ddim_step,
    flow_step,
    gaussian_kl,
    guarded_log_ratio,
    score_function_loss,
)


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
    assert adapt_beta(0.1, kl=0.04, kl_target=0.02, start=0.1) == 0.2
    assert adapt_beta(0.1, kl=0.01, kl_target=0.02, start=0.1) == 0.05
    assert adapt_beta(0.1, kl=0.025, kl_target=0.02, start=0.1) == 0.1


@pytest.mark.parametrize(("kl", "end"), [(0.0, 0.1 / 64), (1.0, 0.1 * 1024)])
def test_beta_keeps_within_reach_of_its_start_however_long_the_target_is_missed(kl, end):
    beta = 0.1
    for _ in range(2000):
        beta = adapt_beta(beta, kl, kl_target=0.02, start=0.1)
    assert beta == end
    assert adapt_beta(beta, 1.0 - kl, kl_target=0.02, start=0.1) == (2 * end if kl == 0 else end / 2)


# A toy policy in one dimension: what the model says is a number theta, the step's mean is linear in it, and the reward
# is -(x - goal)^2, so that the expected reward is -(mean - goal)^2 - std^2 and its gradient is known.
GOAL, ROWS = 0.7, 400_000


def ddim_toy(theta, **kwargs):
    output = theta.expand(ROWS, 1, 1)
    return ddim_step(output, torch.full((ROWS, 1, 1), 0.3).double(), 0.3, 0.5, 0.8, "sample", **kwargs)


def flow_toy(theta, **kwargs):
    output = theta.expand(ROWS, 1, 1)
    return flow_step(output, torch.full((ROWS, 1, 1), 0.3).double(), 0.8, 0.6, 0.7, **kwargs)


@pytest.mark.parametrize("toy", [ddim_toy, flow_toy])
@pytest.mark.parametrize("estimator", ["score_function", "importance_sampling", "importance_sampling_off_policy"])
def test_policy_gradient_of_a_gaussian_toy_is_the_closed_form(toy, estimator):
    noise = torch.randn(ROWS, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta_old = torch.tensor(0.2, dtype=torch.float64)
    theta = (theta_old + (0.1 if estimator.endswith("off_policy") else 0)).requires_grad_(True)
    drawn = toy(theta_old, noise=noise)
    rewards = -((drawn.next_sample - GOAL) ** 2).flatten()
    advantages = rewards - rewards.mean()

    step = toy(theta, next_sample=drawn.next_sample)
    if estimator == "score_function":
        loss = score_function_loss(step.log_prob, advantages)
    else:
        loss = clipped_surrogate((step.log_prob - drawn.log_prob).exp(), advantages, epsilon=1e9)
    ours = torch.autograd.grad(-loss.mean(), theta)[0]

    theta = theta.detach().requires_grad_(True)
    mean = toy(theta, next_sample=drawn.next_sample).mean[0].squeeze()
    expected = torch.autograd.grad(-((mean - GOAL) ** 2), theta)[0]
    assert abs(expected) > 0.1
    assert ours.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("toy", [ddim_toy, flow_toy])
def test_gradient_of_the_penalty_of_a_gaussian_toy_is_the_closed_form(toy):
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(0.2, dtype=torch.float64)
    noise = torch.zeros(ROWS, 1, 1, dtype=torch.float64)
    step, other = toy(theta, noise=noise), toy(reference, noise=noise)
    kl = gaussian_kl(step.mean, other.mean, step.std)
    p, q = (torch.distributions.Normal(s.mean[0], s.std[0]) for s in (step, other))
    expected = torch.distributions.kl_divergence(p, q).sum()
    torch.testing.assert_close(kl[0], expected)
    torch.testing.assert_close(
        torch.autograd.grad(kl[0], theta, retain_graph=True), torch.autograd.grad(expected, theta)
    )


def test_guarded_ratio_is_the_noise_times_the_shift_at_every_step():
    generator = torch.Generator().manual_seed(0)
    old_mean, shift, noise = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = (torch.rand(4, 1, 8, 8, generator=generator) > 0.5).double()
    std = torch.tensor([0.1, 0.3, 1.0, 2.0]).double().view(4, 1, 1, 1)
    value, mean = old_mean + std * noise, old_mean + 0.01 * shift
    inside = mask.expand_as(value) > 0

    def log_prob(mean):
        each = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(value)
        return torch.stack([row[kept].mean() for row, kept in zip(each, inside, strict=True)])

    plain = log_prob(mean) - log_prob(old_mean)
    ours = guarded_log_ratio(plain, mean, old_mean, std, mask)
    expected = torch.stack([(n * s)[kept].mean() for n, s, kept in zip(noise, 0.01 * shift, inside, strict=True)])
    torch.testing.assert_close(ours, expected)
