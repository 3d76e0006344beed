"""Gaussian densities of a denoising step, averaged over the elements that the mask lets the policy decide."""

import math

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean over the masked elements of each sample.

    A mean and not a sum: the clip range of the policy ratio is then a bound per element, the same for small and large
    lesions. Elements outside the mask are selected away rather than multiplied by 0, so that their gradient is exactly
    0 and no value there, not even NaN, can reach the result.

    Args:
        values (`torch.Tensor`):
            Tensor of shape `(B, C, *spatial)`.
        mask (`torch.Tensor`, *optional*):
            Tensor of shape `(B, 1, *spatial)` (or any shape that broadcasts to `values`), non-zero = inside. Each
            sample needs at least one element inside. All elements count when not given.

    Returns:
        `torch.Tensor`: tensor of shape `(B,)`.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    inside = (mask > 0).expand_as(values)
    return torch.where(inside, values, 0).flatten(1).sum(1) / inside.flatten(1).sum(1)


def gaussian_log_prob(
    value: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Log-density of a diagonal Gaussian, as the mean over the masked elements.

    $$\log p(x) = -\frac{(x - \mu)^2}{2 \sigma^2} - \log \sigma - \frac{1}{2} \log 2 \pi$$

    Args:
        value (`torch.Tensor`):
            Where to evaluate it, of shape `(B, C, *spatial)`.
        mean (`torch.Tensor`):
            Mean, of the shape of `value`.
        std (`torch.Tensor`):
            Standard deviation, above 0, of a shape that broadcasts to `value`.
        mask (`torch.Tensor`, *optional*):
            See [`masked_mean`].

    Returns:
        `torch.Tensor`: tensor of shape `(B,)`, in nats per element.
    """
    log_prob = -((value - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return masked_mean(log_prob, mask)


def gaussian_kl(
    mean: torch.Tensor, reference_mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Kullback-Leibler divergence between two Gaussians of one standard deviation, as the mean over the masked elements.

    $$\mathrm{KL}(\mathcal{N}(\mu, \sigma^2) \,\|\, \mathcal{N}(\mu_\mathrm{ref}, \sigma^2))
    = \frac{(\mu - \mu_\mathrm{ref})^2}{2 \sigma^2}$$

    With $\sigma$ the full standard deviation of the transition this is the penalty of
    [DPOK](https://huggingface.co/papers/2305.16381).

    Args:
        mean (`torch.Tensor`):
            Mean of the policy, of shape `(B, C, *spatial)`; gradients flow through it.
        reference_mean (`torch.Tensor`):
            Mean of the reference, of the same shape.
        std (`torch.Tensor`):
            Standard deviation of both, above 0, of a shape that broadcasts to `mean`.
        mask (`torch.Tensor`, *optional*):
            See [`masked_mean`].

    Returns:
        `torch.Tensor`: tensor of shape `(B,)`, in nats per element.
    """
    return masked_mean((mean - reference_mean) ** 2 / (2 * std**2), mask)
