"""The likelihood of a vote: Bradley-Terry with ties, after Davidson."""

import torch
import torch.nn.functional as F


def davidson_log_probabilities(difference: torch.Tensor, log_nu: torch.Tensor) -> torch.Tensor:
    r"""
    Log-probabilities that the first image wins, that the second wins, and that the rater sees no difference.

    With d = the first image's logit minus the second's, and the prevalence of ties nu > 0,

        P(first) = exp(d/2) / Z,   P(second) = exp(-d/2) / Z,   P(tie) = nu / Z,   Z = exp(d/2) + exp(-d/2) + nu

    Without ties, nu = 0, this is the Bradley-Terry model, P(first) = sigmoid(d). Swapping the images negates d and
    swaps the first two probabilities, exactly.

    Paper: R. Davidson, On Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparison Experiments,
    JASA 65 (1970), https://doi.org/10.1080/01621459.1970.10481082

    Args:
        difference (`torch.Tensor`):
            Differences d of any shape.
        log_nu (`torch.Tensor`):
            Logarithm of nu, broadcastable to `difference`.

    Returns:
        `torch.Tensor` of shape `(*difference.shape, 3)`: log-probabilities of (first, second, tie).
    """
    half = difference / 2
    return F.log_softmax(torch.stack([half, -half, log_nu.expand_as(half)], dim=-1), dim=-1)


def vote_counts(label_0: torch.Tensor) -> torch.Tensor:
    """
    One vote as counts of (first, second, tie): `label_0` 1, 0 and 0.5 become (1, 0, 0), (0, 1, 0) and (0, 0, 1).

    Args:
        label_0 (`torch.Tensor`):
            The first image's label, of any shape.

    Returns:
        `torch.Tensor` of shape `(*label_0.shape, 3)`, float32.

    Raises:
        `ValueError`: when a label is none of 1, 0 and 0.5.
    """
    counts = torch.stack([label_0 == 1, label_0 == 0, label_0 == 0.5], dim=-1).float()
    if not counts.any(dim=-1).all():
        wrong = label_0[~counts.any(dim=-1)].flatten()[0].item()
        raise ValueError(f"`label_0` holds {wrong}; expected 1 (first wins), 0 (second wins) or 0.5 (tie).")
    return counts


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
            Votes for (first, second, tie). A criterion nobody judged has zeros and does not count.

    Returns:
        `torch.Tensor`: scalar, in nats a vote.
    """
    log_probabilities = davidson_log_probabilities(difference, log_nu)
    return -(counts * log_probabilities).sum() / counts.sum().clamp(min=1)
