"""Intervals resample cases: they cover the truth as often as they say, also when the rows of a case are alike."""

import numpy as np
import pytest

from onereward.evaluation.bootstrap import (
    measured_difference,
    measured_mean,
    measured_ratio,
    paired_difference,
    percentile_interval,
    resample_cases,
    weighted_mean,
)


def clustered_sample(rng, cases=40, rows=4):
    """Rows of a case share a Gaussian offset; the mean of the population is 0."""
    values = rng.normal(size=(cases, 1)) + 0.3 * rng.normal(size=(cases, rows))
    return values.ravel(), [f"case-{i}" for i in range(cases) for _ in range(rows)]


def test_a_95_percent_interval_covers_a_gaussian_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    repeats, covered, covered_by_rows = 400, 0, 0
    for i in range(repeats):
        values, cases = clustered_sample(rng)
        low, high = percentile_interval(weighted_mean(values, resample_cases(cases, 500, seed=i)))
        covered += low <= 0 <= high
        rows = [str(j) for j in range(len(values))]
        low, high = percentile_interval(weighted_mean(values, resample_cases(rows, 500, seed=i)))
        covered_by_rows += low <= 0 <= high
    # Four standard errors of a proportion of 0.95 in 400 repeats are 0.044; 40 cases cost the bootstrap about 0.01.
    assert 0.90 <= covered / repeats <= 0.985
    # Counting rows as if they were patients would claim far more than is known.
    assert covered_by_rows / repeats < 0.80


def test_the_interval_is_as_wide_as_students_interval():
    from scipy import stats

    values = np.random.default_rng(1).normal(3, 2, size=200)
    low, high = percentile_interval(weighted_mean(values, resample_cases([str(i) for i in range(200)], 4000)))
    expected = stats.t.interval(0.95, 199, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose([low, high], expected, atol=0.03)


def test_a_resample_draws_whole_cases_and_as_many_as_there_are():
    cases = ["b", "a", "b", "c", "a", "b"]
    counts = resample_cases(cases, 50, seed=3)
    assert counts.shape == (50, 6)
    for case, first in (("a", 1), ("b", 0), ("c", 3)):
        rows = [i for i, name in enumerate(cases) if name == case]
        assert (counts[:, rows] == counts[:, [first]]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()
    assert len(np.unique(counts, axis=0)) > 5
    assert np.array_equal(counts, resample_cases(cases, 50, seed=3))


def test_weighted_mean_is_the_mean_of_the_repeated_rows_and_nan_without_any():
    values = np.array([1.0, 5.0, 9.0])
    weights = np.array([[1.0, 1, 1], [2, 0, 1], [0, 0, 0]])
    result = weighted_mean(values, weights)
    np.testing.assert_allclose(result[:2], [5, np.mean([1, 1, 9])])
    assert np.isnan(result[2])


def test_interval_leaves_out_undefined_resamples():
    assert percentile_interval(np.array([np.nan, 2.0, np.nan, 2.0])) == (2.0, 2.0)
    assert np.isnan(percentile_interval(np.array([np.nan, np.nan]))).all()


def test_what_is_not_finite_is_counted_and_left_out():
    values, cases = np.array([1.0, 3.0, np.nan, np.inf, 5.0]), ["a", "b", "b", "c", "d"]
    found = measured_mean(values, cases, applies=np.array([True, True, True, True, False]))
    assert (found.value, found.n, found.n_failed) == (2.0, 2, 2) and "few cases" in found.note
    assert measured_mean(values[2:4], cases[2:4]).note == "it is not defined for any of them"
    assert measured_mean(values, cases, applies=np.zeros(5, bool)).note == "there is nothing to measure it on"
    assert measured_mean(values[:1], cases[:1]).note == "no interval: a single case"


def test_two_infinite_figures_do_not_differ_by_nothing():
    found = measured_difference([np.inf, 1.0, 2.0], [np.inf, 2.0, 2.5], ["a", "b", "c"])
    assert (found.value, found.n, found.n_failed) == (0.75, 2, 1)
    assert np.isnan(paired_difference([np.inf], [np.inf])).all()


def test_a_ratio_has_the_interval_of_paired_draws():
    rng = np.random.default_rng(0)
    references = rng.uniform(0.5, 1, 60)
    found = measured_ratio(0.8 * references, references, [str(i) for i in range(60)])
    assert found.value == pytest.approx(0.8) and found.high - found.low < 1e-9
