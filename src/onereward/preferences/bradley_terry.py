"""The probability of a vote, given how much better one image is than the other."""

import numpy as np


def davidson_probabilities(delta: np.ndarray, nu: float | np.ndarray) -> np.ndarray:
    r"""
    Bradley-Terry probabilities with ties, after Davidson. With d = `delta`,

        P(first) = exp(d/2) / Z,   P(tie) = nu / Z,   P(second) = exp(-d/2) / Z,   Z = exp(d/2) + exp(-d/2) + nu

    Without ties, nu = 0, this is the Bradley-Terry model: P(first) = sigmoid(d). Between equals a tie has the
    probability nu / (2 + nu).

    Paper: R. Davidson, On Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparison Experiments,
    JASA 65 (1970), https://doi.org/10.1080/01621459.1970.10481082

    Args:
        delta (`np.ndarray`):
            Utility of the first image minus utility of the second, of any shape.
        nu (`float` or `np.ndarray`):
            Prevalence of ties, at least 0, broadcastable to `delta`.

    Returns:
        `np.ndarray` of shape `(*delta.shape, 3)`: probabilities of (first wins, tie, second wins).

    Example:

    ```python
    >>> davidson_probabilities(0.0, 0.5)
    array([0.4, 0.2, 0.4])
    ```
    """
    half = np.asarray(delta, dtype=float) / 2
    largest = np.abs(half)  # taken out, so that no exponential overflows
    weights = [np.exp(half - largest), np.broadcast_to(nu, half.shape) * np.exp(-largest), np.exp(-half - largest)]
    weights = np.stack(weights, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True)
