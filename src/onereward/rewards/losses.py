# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
"""The likelihood of an answer: of a vote on a pair, Bradley-Terry with ties after Davidson, and of a rating."""

import numpy as np
import torch
import torch.nn.functional as F


NO_TIES = -30.0  # a logarithm of nu that rules ties out
NODES = 32  # of the Gauss-Hermite sum, exact to 2e-4 up to a standard deviation of 4


def davidson_log_probabilities(
    difference: torch.Tensor, log_nu: torch.Tensor, variance: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Log-probabilities that the first image wins, that the rater sees no difference, and that the second wins.

    With d = the first image's logit minus the second's, and the prevalence of ties nu > 0,

        P(first) = exp(d/2) / Z,   P(tie) = nu / Z,   P(second) = exp(-d/2) / Z,   Z = exp(d/2) + exp(-d/2) + nu

    Without ties, nu = 0, this is the Bradley-Terry model, P(first) = sigmoid(d). The same probabilities, for numpy
    and given nu, are `onereward.preferences.davidson_probabilities`. For rewards, ties as a third outcome avoid the
    bias of leaving them out (https://huggingface.co/papers/2410.05328).

    Where the logits are uncertain, d ~ N(difference, variance), these are the logarithms of the mean probabilities, as
    HPSv3 has them for two outcomes (https://huggingface.co/papers/2508.03789): the more uncertain, the closer to what
    chance would say. The integral is a Gauss-Hermite sum, without noise.

    Paper: R. Davidson, On Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparison Experiments,
    JASA 65 (1970), https://doi.org/10.1080/01621459.1970.10481082

    Args:
        difference (`torch.Tensor`):
            Differences d of any shape.
        log_nu (`torch.Tensor`):
            Logarithm of nu, broadcastable to `difference`.
        variance (`torch.Tensor`, *optional*):
            Variances of d, at least 0, of the shape of `difference`.

    Returns:
        `torch.Tensor` of shape `(*difference.shape, 3)`: log-probabilities of (first wins, tie, second wins).
    """
    if variance is not None:
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        nodes, weights = (difference.new_tensor(x) for x in (nodes, weights / weights.sum()))
        spread = difference[..., None] + variance.clamp(min=1e-12).sqrt()[..., None] * nodes
        of_nodes = davidson_log_probabilities(spread, log_nu[..., None])
        return torch.logsumexp(of_nodes + weights.log()[:, None], dim=-2)
    half = difference / 2
    return F.log_softmax(torch.stack([half, log_nu.expand_as(half), -half], dim=-1), dim=-1)


def smoothed(labels: torch.Tensor, label_smoothing_factor: float) -> torch.Tensor:
    r"""
    What labels are worth when each may be the contrary of what was meant: with epsilon = `label_smoothing_factor`,
    (1 - epsilon) y + epsilon (1 - y), the conservative labels of https://ericmitchell.ai/cdpo.pdf.

    Args:
        labels (`torch.Tensor`):
            Votes (first wins, tie, second wins) along the last dimension of three.
        label_smoothing_factor (`float`):
            Probability that a vote is for the wrong side, from 0 to below 1/2.

    Returns:
        `torch.Tensor`: of the same shape and sum.
    """
    return (1 - label_smoothing_factor) * labels + label_smoothing_factor * labels.flip(-1)


def preference_loss(
    difference: torch.Tensor, log_nu: torch.Tensor, counts: torch.Tensor, variance: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Mean negative log-likelihood of the votes under Davidson's model.

    Votes on one pair are counted, not listed, so several raters, and soft labels, cost nothing extra. The loss of a
    pair and of the same pair in swapped order are equal, since each logit depends on its own image alone: both orders
    that OneReward trains (https://huggingface.co/papers/2508.21066, equation 3) are one here.

    Args:
        difference (`torch.Tensor` of shape `(P, H)`):
            Logit of the first image minus logit of the second, for P pairs and H criteria.
        log_nu (`torch.Tensor` of shape `(H,)`):
            Logarithm of the prevalence of ties, one a criterion.
        counts (`torch.Tensor` of shape `(P, H, 3)`):
            Votes (first wins, tie, second wins). A criterion nobody judged has zeros and does not count.
        variance (`torch.Tensor` of shape `(P, H)`, *optional*):
            Variances of the differences, where the logits are uncertain.

    Returns:
        `torch.Tensor`: scalar, in nats a vote.
    """
    log_probabilities = davidson_log_probabilities(difference, log_nu, variance)
    return -(counts * log_probabilities).sum() / counts.sum().clamp(min=1)
