"""Log-probability, KL and their gradients against torch.distributions and a policy solved by hand."""

import torch
from torch.distributions import Normal, kl_divergence

from onereward.policy import gaussian_kl, gaussian_log_prob, masked_mean


def tensors(*shape, count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_masked_mean_is_the_mean_of_the_selected_elements():
    (values,) = tensors(2, 3, 5, 5, count=1)
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :2] = 1
    mask[1, :, 3, 3] = 1
    expected = torch.stack([values[i][mask[i].expand(3, 5, 5) > 0].mean() for i in range(2)])
    torch.testing.assert_close(masked_mean(values, mask), expected)
    torch.testing.assert_close(masked_mean(values), values.mean(dim=(1, 2, 3)))


def test_log_prob_is_that_of_a_normal():
    value, mean = tensors(2, 3, 5, 5)
    std = torch.tensor([0.3, 1.7], dtype=torch.float64).view(2, 1, 1, 1)
    mask = torch.ones(2, 1, 5, 5)
    mask[..., :3] = 0
    expected = Normal(mean, std.expand_as(mean)).log_prob(value)[..., 3:].mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(value, mean, std, mask), expected)


def test_kl_and_its_gradient_are_those_of_torch_distributions():
    mean, reference = tensors(2, 3, 5, 5)
    std = torch.tensor([0.3, 1.7], dtype=torch.float64).view(2, 1, 1, 1)
    mask = torch.ones(2, 1, 5, 5)
    mask[..., :3] = 0
    mean.requires_grad_(True)

    ours = gaussian_kl(mean, reference, std, mask)
    (gradient,) = torch.autograd.grad(ours.sum(), mean)
    divergence = kl_divergence(Normal(mean, std.expand_as(mean)), Normal(reference, std.expand_as(mean)))
    theirs = divergence[..., 3:].mean(dim=(1, 2, 3))
    (expected_gradient,) = torch.autograd.grad(theirs.sum(), mean)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected_gradient)
    assert (gradient[..., :3] == 0).all() and (gradient[..., 3:] != 0).all()


def test_policy_gradient_of_a_linear_reward_has_its_closed_form():
    """For x ~ N(mu, s^2) and r(x) = a x, the gradient of E[r] with respect to mu is a, whatever s."""
    a, s, count = 3.0, 0.7, 200_000
    mu = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = mu.detach() + s * noise
    advantages = a * (x - x.mean()).flatten()
    log_prob = gaussian_log_prob(x, mu.expand_as(x), torch.tensor(s, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((advantages * log_prob).mean(), mu)
    # the estimator's standard error: std(a n^2 s / s) / sqrt(N) = a sqrt(2) / sqrt(N)
    assert abs(gradient.item() - a) < 4 * a * 2**0.5 / count**0.5
