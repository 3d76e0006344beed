"""Bootstrap intervals that resample patients, not slices (Efron & Tibshirani 1993, An Introduction to the Bootstrap).

Slices, contrasts and seeds of one case are not independent, so a resample draws whole cases with replacement. It is
written as a matrix of row counts: any statistic that takes row weights gets its interval from one matrix product.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """
    A figure with its interval and what it rests on.

    Args:
        value (`float`):
            The figure, NaN where it is not defined.
        low, high (`float`):
            Ends of its 95 % interval, NaN where there is none.
        n (`int`):
            Images, or pairs of them, that it rests on.
        n_failed (`int`, *optional*, defaults to 0):
            Those that it was meant for, but where it is not defined.
        note (`str`, *optional*, defaults to `""`):
            Why there is no figure, or why it says little.
    """

    value: float
    low: float
    high: float
    n: int
    n_failed: int = 0
    note: str = ""


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
    if len(case_ids) == 0:
        return np.zeros((resamples, 0))
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


def measured_mean(
    values: np.ndarray, case_ids: list[str], applies: np.ndarray | None = None, resamples: int = 2000, seed: int = 0
) -> Measured:
    """
    Mean of one figure an image, with its interval by case.

    Args:
        values (`np.ndarray` of shape `(N,)`):
            Figures. Those that are not finite are counted as failed, and left out.
        case_ids (`list[str]`):
            Case of each image.
        applies (`np.ndarray` of shape `(N,)`, *optional*):
            Whether the figure is meant for the image; all when not given.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the bootstrap.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        [`Measured`]

    Example:

    ```python
    >>> measured_mean(np.array([1.0, 3.0, np.nan]), ["a", "b", "b"])
    Measured(value=2.0, low=1.0, high=3.0, n=2, n_failed=1, note='')
    ```
    """
    values, case_ids = np.asarray(values, dtype=float), np.asarray(case_ids)
    applies = np.ones(len(values), bool) if applies is None else np.asarray(applies, dtype=bool)
    kept = applies & np.isfinite(values)
    weights = resample_cases(case_ids[applies], resamples, seed)[:, kept[applies]]
    return _measured(lambda w: weighted_mean(values[kept], w), weights, case_ids[kept], applies.sum() - kept.sum())


def measured_difference(
    before: np.ndarray,
    after: np.ndarray,
    case_ids: list[str],
    applies: np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Measured:
    """
    Mean of `after - before` of the same images, with its paired interval by case. Arguments as in [`measured_mean`];
    an image fails where either figure is not finite.
    """
    return measured_mean(paired_difference(before, after), case_ids, applies, resamples, seed)


def paired_difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`after - before`, NaN where either is not finite: that of two infinite figures is not 0."""
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    both = np.isfinite(before) & np.isfinite(after)
    return np.subtract(after, before, out=np.full(before.shape, np.nan), where=both)


def measured_ratio(
    values: np.ndarray,
    references: np.ndarray,
    case_ids: list[str],
    applies: np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Measured:
    """
    Mean of `values` over the mean of `references` of the same images, with its paired interval by case. Arguments as
    in [`measured_mean`]; an image fails where either figure is not finite.
    """
    values, references = np.asarray(values, dtype=float), np.asarray(references, dtype=float)
    case_ids = np.asarray(case_ids)
    applies = np.ones(len(values), bool) if applies is None else np.asarray(applies, dtype=bool)
    kept = applies & np.isfinite(values) & np.isfinite(references)
    weights = resample_cases(case_ids[applies], resamples, seed)[:, kept[applies]]

    def ratio(w):
        return weighted_mean(values[kept], w) / weighted_mean(references[kept], w)

    return _measured(ratio, weights, case_ids[kept], applies.sum() - kept.sum())


def _measured(statistic: Callable, weights: np.ndarray, case_ids: np.ndarray, n_failed: int) -> Measured:
    number, cases = weights.shape[1], len(np.unique(case_ids))
    if number == 0:
        note = "it is not defined for any of them" if n_failed else "there is nothing to measure it on"
        return Measured(np.nan, np.nan, np.nan, 0, int(n_failed), note)
    value = float(statistic(np.ones((1, number)))[0])
    low, high = percentile_interval(statistic(weights)) if cases > 1 else (np.nan, np.nan)
    note = "no interval: a single case" if cases == 1 else "a rough interval: few cases" if cases < 20 else ""
    return Measured(value, low, high, number, int(n_failed), note)


def plain(value):
    """Dataclasses as dicts, and what is not finite as `None`: JSON has no NaN."""
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
