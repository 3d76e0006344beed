"""The likelihood of a vote: Bradley-Terry with ties, after Davidson."""

import torch
import torch.nn.functional as F


def davidson_log_probabilities(difference: torch.Tensor, log_nu: torch.Tensor) -> torch.Tensor:
    r"""
    Log-probabilities that the first image wins, that the rater sees no difference, and that the second wins.

    With d = the first image's logit minus the second's, and the prevalence of ties nu > 0,

        P(first) = exp(d/2) / Z,   P(tie) = nu / Z,   P(second) = exp(-d/2) / Z,   Z = exp(d/2) + exp(-d/2) + nu

    Without ties, nu = 0, this is the Bradley-Terry model, P(first) = sigmoid(d). The same probabilities, for numpy
    and given nu, are `onereward.preferences.davidson_probabilities`. For rewards, ties as a third outcome avoid the
    bias of leaving them out (https://huggingface.co/papers/2410.05328).

    Paper: R. Davidson, On Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparison Experiments,
    JASA 65 (1970), https://doi.org/10.1080/01621459.1970.10481082

    Args:
        difference (`torch.Tensor`):
            Differences d of any shape.
        log_nu (`torch.Tensor`):
            Logarithm of nu, broadcastable to `difference`.

    Returns:
        `torch.Tensor` of shape `(*difference.shape, 3)`: log-probabilities of (first wins, tie, second wins).
    """
    half = difference / 2
    return F.log_softmax(torch.stack([half, log_nu.expand_as(half), -half], dim=-1), dim=-1)


def preference_loss(difference: torch.Tensor, log_nu: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
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

    Returns:
        `torch.Tensor`: scalar, in nats a vote.
    """
    log_probabilities = davidson_log_probabilities(difference, log_nu)
    return -(counts * log_probabilities).sum() / counts.sum().clamp(min=1)
