"""What a trained last layer is unsure of: a Laplace approximation, its prior chosen by the evidence."""

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from onereward.rewards.losses import davidson_log_probabilities


def fisher_information(
    difference: torch.Tensor, log_nu: torch.Tensor, variance: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    What one vote tells of the difference d of two logits, sum over outcomes o of P(o) (d log P(o) / dd)^2. For
    Davidson's model it is (P(first) + P(second) - (P(first) - P(second))^2) / 4, the negative second derivative of the
    log-likelihood.

    Args:
        difference, log_nu, variance:
            As in [`~onereward.rewards.losses.davidson_log_probabilities`].

    Returns:
        `torch.Tensor`: of the shape of `difference`, from 0 to 1/4.
    """
    with torch.enable_grad():
        difference = difference.detach().requires_grad_()
        outcomes = davidson_log_probabilities(difference, log_nu.detach(), variance).unbind(dim=-1)
        slopes = [torch.autograd.grad(outcome.sum(), difference, retain_graph=True)[0] for outcome in outcomes]
    return sum(outcome.detach().exp() * slope**2 for outcome, slope in zip(outcomes, slopes, strict=True))


def last_layer_posterior(curvature: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    r"""
    The normal distribution of a last layer's weights around those that were learned. With the curvature G of the
    log-likelihood there (its Gauss-Newton matrix, sum of information times f f^T over the votes, f the features) and a
    prior N(0, 1/tau) of each weight, the covariance is (G + tau I)^-1. Of the tau that there are, it is that with the
    largest evidence, up to a constant

        log p(votes | tau) = W/2 log tau - tau/2 |w|^2 - 1/2 log det(G + tau I)

    Papers: D. MacKay, Bayesian Interpolation, Neural Computation 4 (1992), https://doi.org/10.1162/neco.1992.4.3.415;
    [Laplace Redux](https://huggingface.co/papers/2106.14806), section 2.

    Args:
        curvature (`torch.Tensor` of shape `(W, W)`):
            G, symmetric and positive semi-definite.
        weight (`torch.Tensor` of shape `(W,)`):
            The weights that were learned.

    Returns:
        `tuple[torch.Tensor, float]`: a factor F of shape `(W, W)` of the covariance, F F^T; and tau.
    """
    eigenvalues, vectors = torch.linalg.eigh(curvature.double())
    eigenvalues = eigenvalues.clamp(min=0)
    length, values = float((weight.double() ** 2).sum()), eigenvalues.cpu().numpy()

    def negative_log_evidence(log_tau):
        tau = np.exp(log_tau)
        return (tau * length - len(values) * log_tau + np.log(values + tau).sum()) / 2

    tau = float(np.exp(minimize_scalar(negative_log_evidence, bounds=(-7, 14), method="bounded").x))
    return (vectors / (eigenvalues + tau).sqrt()).to(weight), tau
