"""What raters add of their own to what they see; it is learned beside the reward model and then left behind."""

import torch
from torch import nn


class RaterTerms(nn.Module):
    r"""
    The habits of raters, as in [`~onereward.preferences.aggregation.fit_pairs`] and many-facet Rasch models (J.
    Linacre, Many-Facet Rasch Measurement, 1989), learned together with the reward model, which so need not explain
    them. With a rater r's consistency a_r, pull to the left b_r and severity s_r, for logits u and differences d:

        votes:    d is seen as a_r d + b_r side,     side = 1 where the first image was on the left, -1 on the right
        ratings:  P(top of the scale) = sigmoid(a_r (c u - s_r)),      a rating in between is a share of it

    c is how far the scale spreads. All start at what they are for a rater without habits, and a normal prior holds
    them there until there are votes enough that say otherwise. A reversed rater gets an a_r below 0.

    Args:
        num_raters (`int`):
            Number of raters.
        num_criteria (`int`):
            Number of reward heads.
    """

    # of the priors, in log-odds; raters of one project hardly differ by more
    CONSISTENCY_STD, PULL_STD, SEVERITY_STD = 0.5, 0.5, 1.0

    def __init__(self, num_raters: int, num_criteria: int):
        super().__init__()
        self.consistency = nn.Parameter(torch.ones(num_raters))
        self.pull = nn.Parameter(torch.zeros(num_raters))
        self.severity = nn.Parameter(torch.zeros(num_raters, num_criteria))
        self.log_spread = nn.Parameter(torch.zeros(num_criteria))

    def of_pairs(self, difference: torch.Tensor, raters: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
        """What A votes of `raters`, `(A,)`, see of differences `(A, H)`; `sides` `(A,)` is 1, -1, or 0 for unknown."""
        return self.consistency[raters, None] * difference + (self.pull[raters] * sides)[:, None]

    def of_ratings(self, logits: torch.Tensor, raters: torch.Tensor | None = None) -> torch.Tensor:
        """Log-odds `(A, H)` of the top of the scale, for logits `(A, H)`; without `raters`, of one without habits."""
        spread = self.log_spread.exp() * logits
        return spread if raters is None else self.consistency[raters, None] * (spread - self.severity[raters])

    def penalty(self) -> torch.Tensor:
        """Negative logarithm of the priors, up to a constant: a scalar in nats, for all votes together."""
        return (
            ((self.consistency - 1) ** 2).sum() / self.CONSISTENCY_STD**2
            + (self.pull**2).sum() / self.PULL_STD**2
            + (self.severity**2).sum() / self.SEVERITY_STD**2
        ) / 2
