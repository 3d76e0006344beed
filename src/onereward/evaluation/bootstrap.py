"""Bootstrap intervals that resample patients, not slices (Efron & Tibshirani 1993, An Introduction to the Bootstrap).

Slices, contrasts and seeds of one case are not independent, so a resample draws whole cases with replacement. It is
written as a matrix of row counts: any statistic that takes row weights gets its interval from one matrix product.
"""

import numpy as np


def resample_cases(case_ids: list[str], resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """
    Draws the cases with replacement and says how often each row counts.

    Args:
        case_ids (`list[str]`):
            Case of each row; rows of one case are drawn together.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `np.ndarray` of shape `(resamples, len(case_ids))` in float64.
    """
    cases, case_of_row = np.unique(case_ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(cases), np.full(len(cases), 1 / len(cases)), size=resamples)
    return counts[:, case_of_row].astype(np.float64)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of `values` `(n,)` under each row of `weights` `(..., n)`; NaN where all weights are zero."""
    total = weights.sum(-1)
    return np.divide(weights @ values, total, out=np.full(np.shape(total), np.nan), where=total > 0)


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """
    The central `level` of the resampled statistics.

    Resamples without a defined statistic are left out. With none at all both ends are NaN.
    """
    samples = samples[np.isfinite(samples)]
    if len(samples) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
