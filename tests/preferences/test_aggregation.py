"""Aggregation against choix, published examples, closed forms, and truths that simulated raters voted from."""

import csv
import os
from pathlib import Path

import choix
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit, logsumexp
from scipy.stats import binom, ttest_rel

from onereward.preferences import SimulatedRater
from onereward.preferences.aggregation import (
    _PairDesign,
    dawid_skene,
    fit_pairs,
    fit_ratings,
    majority,
    out_of_range,
    rank_pairs,
    rank_ratings,
)


NAN = np.nan

# A. Dawid and A. Skene (1979), table 1: how five anaesthetists classed 45 patients. The first did so three times.
DAWID_SKENE = """
111 1111|333 4334|112 2122|222 3121|222 3222|222 3322|122 2111|333 3433|222 2223|232 2223|444 4444|222 3343|111 1111
222 3212|121 1111|111 2111|111 1111|111 1111|222 2221|222 1322|222 2222|222 2221|222 3222|221 2222|111 1111|111 1111
232 2222|111 1111|111 1111|112 1121|111 1111|333 3233|111 1111|222 2222|222 3232|433 4343|221 2232|232 3233|333 3432
111 1111|111 1111|121 2111|232 2222|121 1111|222 2222
"""
DAWID_SKENE = [patient.replace(" ", "") for line in DAWID_SKENE.split("\n") for patient in line.split("|") if patient]
ANAESTHETISTS = [
    (patient, observer, int(digit))
    for patient, digits in enumerate(DAWID_SKENE)
    for observer, digit in zip((1, 1, 1, 2, 3, 4, 5), digits, strict=True)
]


def draw(rater, gap, rng):
    """Labels that a rater gives to pairs of this difference of utilities: 1, 0.5 or 0."""
    probabilities = rater.choice_probabilities(np.asarray(gap, dtype=float)[:, None])[:, 0]
    return 1 - (rng.random((len(gap), 1)) > probabilities.cumsum(axis=-1)[:, :2]).sum(axis=-1) / 2


def test_majority_leaves_draws_open():
    ratings = np.array([[1, 1, 0], [1, 0, NAN], [NAN, NAN, NAN], [NAN, 0.5, NAN], [0, 0.5, 0]])
    np.testing.assert_array_equal(majority(ratings), [1, NAN, NAN, 0.5, 0])


def test_dawid_and_skenes_anaesthetists():
    found = dawid_skene(*zip(*ANAESTHETISTS, strict=True), smoothing=0)
    assert len(found.items) == 45 and list(found.values) == [1, 2, 3, 4]
    # table 2 of the paper: marginal probabilities of the four classes
    np.testing.assert_array_equal(found.prior.round(2), [0.40, 0.42, 0.11, 0.07])


def test_em_ends_where_the_likelihood_is_largest():
    # the marginal likelihood, equation 2.7 of the paper, climbed by a general optimiser from the result of EM
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, size=400)
    right = np.array([0.8, 0.7, 0.65])
    answers = np.where(rng.random((400, 3)) < right, truth[:, None], 1 - truth[:, None])
    item, rater = np.repeat(np.arange(400), 3), np.tile(np.arange(3), 400)
    found = dawid_skene(item, rater, answers.ravel(), smoothing=0, tolerance=1e-12, max_iterations=20000)

    def loss(x):
        hit = x[1:].reshape(3, 2)  # hit[r, k]: log-odds that rater r answers 1 if k is true
        log = [
            log_expit(x[0] if k else -x[0]) + log_expit(np.where(answers, hit[:, k], -hit[:, k])).sum(axis=1)
            for k in range(2)
        ]
        return -logsumexp(log, axis=0).sum()

    start = logit(np.concatenate([found.prior[1:], found.confusion[..., 1].ravel()]))
    climbed = minimize(loss, start, method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(found.log_likelihood, -loss(start), rtol=1e-10)
    assert -climbed.fun - found.log_likelihood < 1e-7
    np.testing.assert_allclose(climbed.x, start, atol=2e-3)


def test_a_rater_who_answers_the_same_to_everything_is_no_evidence():
    item, rater = np.repeat(np.arange(60), 3), np.tile(["a", "b", "same"], 60)
    truth = np.arange(60) % 2
    value = np.stack([truth, truth, np.ones(60)], axis=1).ravel()
    found = dawid_skene(item, rater, value)
    np.testing.assert_array_equal(found.labels, truth)
    np.testing.assert_allclose(found.confusion[2], [[0, 1], [0, 1]], atol=1e-3)


def test_dawid_skene_says_when_it_has_not_settled():
    with pytest.warns(UserWarning, match="has not settled after 2 steps"):
        dawid_skene(*zip(*ANAESTHETISTS, strict=True), max_iterations=2)
    with pytest.raises(ValueError, match="`value` holds no answer"):
        dawid_skene(["a"], ["x"], [NAN])


@pytest.fixture
def duels():
    """Decided votes between six items of known utilities, as (winner, loser)."""
    rng = np.random.default_rng(0)
    utility = np.linspace(-1.5, 1.5, 6)
    first, second = rng.integers(0, 6, size=(2, 300))
    first, second = first[first != second], second[first != second]
    won = rng.random(len(first)) < expit(utility[first] - utility[second])
    return np.where(won, first, second), np.where(won, second, first)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.5])
def test_bradley_terry_is_choixs(duels, ridge):
    winner, loser = duels
    theirs = choix.opt_pairwise(6, list(zip(winner, loser, strict=True)), alpha=ridge, tol=1e-12)
    rng = np.random.default_rng(1)
    turned = rng.random(len(winner)) < 0.5  # which side won must not matter
    found = fit_pairs(np.where(turned, loser, winner), np.where(turned, winner, loser), 1.0 - turned, ridge=ridge)
    np.testing.assert_allclose(found.utility, theirs - theirs.mean(), atol=1e-6)
    log_likelihood = choix.log_likelihood_pairwise(list(zip(winner, loser, strict=True)), found.utility)
    np.testing.assert_allclose(found.log_likelihood, log_likelihood, rtol=1e-9)
    assert found.groups == 1 and np.isneginf(found.log_tie).all() and np.isnan(found.position).all()


def test_two_items_have_a_closed_form():
    # u = log(won / lost), nu = ties / sqrt(won lost); the decided votes alone tell the difference: a binomial
    won, ties, lost = 40, 20, 25
    found = fit_pairs(["a"] * 85, ["b"] * 85, [1] * won + [0.5] * ties + [0] * lost, ridge=0)
    np.testing.assert_allclose(found.utility[0] - found.utility[1], np.log(won / lost), rtol=1e-7)
    np.testing.assert_allclose(np.exp(found.log_tie), ties / np.sqrt(won * lost), rtol=1e-7)
    c = found.covariance
    np.testing.assert_allclose(c[0, 0] + c[1, 1] - 2 * c[0, 1], 1 / won + 1 / lost, rtol=1e-6)
    # log nu = log ties - (log won + log lost) / 2 of multinomial counts
    np.testing.assert_allclose(found.log_tie_se**2, 1 / ties + (1 / won + 1 / lost) / 4, rtol=1e-6)


def test_the_pull_to_the_left_has_a_closed_form():
    # two items of equal utility on either side: position is the log-odds of the left one
    label, left = [1] * 60 + [0] * 40 + [0] * 60 + [1] * 40, [0] * 100 + [1] * 100
    found = fit_pairs(["a"] * 200, ["b"] * 200, label, left=left, ridge=0)
    np.testing.assert_allclose(found.position, np.log(60 / 40), rtol=1e-6)
    np.testing.assert_allclose(found.position_se**2, (1 / 60 + 1 / 40) / 2, rtol=1e-6)
    np.testing.assert_allclose(found.utility, 0, atol=1e-8)
    without = fit_pairs(["a"] * 200, ["b"] * 200, label, left=[-1] * 200, ridge=0)
    assert np.isnan(without.position).all()


def test_standard_errors_are_those_of_a_numerical_hessian():
    rng = np.random.default_rng(2)
    i, j, r = rng.integers(0, 4, 400), rng.integers(0, 4, 400), rng.integers(0, 3, 400)
    left, label = rng.integers(0, 2, 400), rng.choice([0, 0.5, 1], 400, p=[0.3, 0.2, 0.5])
    label = np.where(i < j, label, 1 - label)
    design = _PairDesign(i, j, label, r, left)
    counts = design.count()
    x = rng.normal(size=design.size)
    _, gradient, hessian = design.loss(x, counts, 0.1)
    step = 1e-5 * np.eye(design.size)
    losses = [[design.loss(x + sign * s, counts, 0.1) for s in step] for sign in (1, -1)]
    np.testing.assert_allclose(
        gradient, [(up[0] - down[0]) / 2e-5 for up, down in zip(*losses, strict=True)], rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(
        hessian, [(up[1] - down[1]) / 2e-5 for up, down in zip(*losses, strict=True)], rtol=1e-5, atol=1e-4
    )


def test_an_undefeated_item_needs_the_penalty():
    pairs = ["a", "a", "b", "c"], ["b", "c", "c", "b"], [1, 1, 1, 1]
    with pytest.raises(ValueError, match="With `ridge` 0 the utilities are not finite"):
        fit_pairs(*pairs, ridge=0)
    found = fit_pairs(*pairs)
    assert found.items[found.utility.argmax()] == "a" and np.isfinite(found.utility_se).all()


def test_groups_without_a_vote_between_them_are_counted():
    assert fit_pairs(["a", "c"], ["b", "d"], [1, 0]).groups == 2
    assert fit_pairs(["a", "c", "b"], ["b", "d", "c"], [1, 0, 0.5]).groups == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((["a"], ["b"], [0.7]), r"`label_0` is 0.7 in row 0; expected 1 \(item 0 won\)"),
        ((["a", "a"], ["b"], [1, 0]), r"different lengths, \[1, 2\]"),
        ((["a"], ["a"], [1]), "no vote on a pair of different items"),
        ((["a"], ["b"], [NAN]), "no vote on a pair of different items"),
    ],
)
def test_what_is_no_vote_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        fit_pairs(*columns)


RATERS = (
    SimulatedRater("simulated-careful", temperature=0.7, tie=0.4),
    SimulatedRater("simulated-mean", temperature=1.0, tie=0.6, position_bias=0.4),
    SimulatedRater("simulated-blurred", temperature=1.6, tie=0.3, position_bias=-0.2),
    SimulatedRater("simulated-reversed", temperature=1.2, tie=0.5, position_bias=0.1),
)


def test_known_bias_and_noise_lie_within_their_intervals_in_95_of_100_runs():
    utility = np.array([-1.0, -0.4, 0.1, 0.3, 1.0])
    sharpness = np.array([1 / rater.temperature for rater in RATERS]) * [1, 1, 1, -1]
    scale = sharpness.mean()  # discriminations have the mean 1, and utilities the unit that goes with it
    truth = np.concatenate(
        [
            utility * scale,
            sharpness / scale,
            np.log([rater.tie for rater in RATERS]),
            [rater.position_bias for rater in RATERS],
        ]
    )
    runs, within = 100, np.zeros(len(truth))
    for run in range(runs):
        rng = np.random.default_rng(run)
        i = rng.integers(0, 5, 350 * len(RATERS))
        j = (i + rng.integers(1, 5, len(i))) % 5
        left, who = rng.integers(0, 2, len(i)), np.repeat(np.arange(len(RATERS)), 350)
        label = np.empty(len(i))
        for number, rater in enumerate(RATERS):
            rows = who == number
            # a simulated rater leans towards the image shown first: here the left one
            gap = (utility[i] - utility[j])[rows] * np.where(left[rows] == 0, 1, -1)
            on_left = draw(rater, gap if number < 3 else -gap, rng)
            label[rows] = np.where(left[rows] == 0, on_left, 1 - on_left)
        found = fit_pairs(i, j, label, who, left)
        value = np.concatenate([found.utility, found.discrimination, found.log_tie, found.position])
        error = np.concatenate([found.utility_se, found.discrimination_se, found.log_tie_se, found.position_se])
        within += np.abs(value - truth) <= 1.96 * error
        assert (found.discrimination < 0).tolist() == [False, False, False, True]
    # Each count is binomial(100, 0.95) if the intervals are what they say. A count this low has a chance of 1 in 1000
    # over all 17 parameters, and so has their mean, whose spread is at most that of one count.
    assert within.min() >= binom.ppf(0.001 / len(truth), runs, 0.95)
    assert within.mean() >= binom.ppf(0.001, runs, 0.95)


def test_aggregated_labels_beat_the_majority():
    # Three fair raters, one careless and one reversed: the majority counts them all alike.
    runs, scores = 20, []
    for run in range(runs):
        rng = np.random.default_rng(run)
        utility = rng.normal(size=12)
        i = rng.integers(0, 12, 150)
        j = (i + rng.integers(1, 12, 150)) % 12
        better = (utility[i] > utility[j]).astype(float)
        raters = [SimulatedRater(f"simulated-{n}", temperature=0.6, tie=0.0) for n in range(5)]
        gap = utility[i] - utility[j]
        labels = np.stack([draw(rater, gap, rng) for rater in raters], axis=1)
        labels[:, 3] = rng.integers(0, 2, 150)
        labels[:, 4] = 1 - labels[:, 4]
        pair, who = np.repeat(np.arange(150), 5), np.tile(np.arange(5), 150)
        by_em = dawid_skene(pair, who, labels.ravel()).labels
        model = fit_pairs(np.repeat(i, 5), np.repeat(j, 5), labels.ravel(), who)
        place = np.searchsorted(model.items, np.stack([i, j]))
        by_utility = (model.utility[place[0]] > model.utility[place[1]]).astype(float)
        scores.append([(label == better).mean() for label in (majority(labels), by_em, by_utility)])
    plain, by_em, by_utility = np.transpose(scores)
    assert ttest_rel(by_em, plain, alternative="greater").pvalue < 1e-4
    assert ttest_rel(by_utility, plain, alternative="greater").pvalue < 1e-4


def test_rater_terms_bring_utilities_nearer_to_the_truth_than_equal_weights():
    rng = np.random.default_rng(0)
    utility = rng.normal(size=8)
    i = rng.integers(0, 8, 600)
    j = (i + rng.integers(1, 8, 600)) % 8
    who = rng.integers(0, 4, 600)
    careful, reversed_ = SimulatedRater("simulated-a", 0.4, 0.3), SimulatedRater("simulated-b", 0.4, 0.3)
    gap = utility[i] - utility[j]
    label = np.where(who < 3, draw(careful, gap, rng), 1 - draw(reversed_, gap, rng))
    with_terms, without = fit_pairs(i, j, label, who), fit_pairs(i, j, label)
    closeness = [np.corrcoef(found.utility, utility)[0, 1] for found in (with_terms, without)]
    assert closeness[0] > closeness[1]
    assert with_terms.log_likelihood > without.log_likelihood + 100


def test_ranks_are_sure_where_items_differ_and_open_where_they_do_not():
    rng = np.random.default_rng(3)
    utility = {"bad": -2.0, "twin-a": 0.0, "twin-b": 0.0, "good": 2.0}
    names = np.array(list(utility))
    i = rng.integers(0, 4, 800)
    j = (i + rng.integers(1, 4, 800)) % 4
    worth = np.array(list(utility.values()))
    label = draw(SimulatedRater("simulated-0", 1.0, 0.5), worth[i] - worth[j], rng)
    ranking = rank_pairs(names[i], names[j], label, clusters=np.arange(800) // 4, resamples=200)
    assert ranking.items[0] == "good" and ranking.items[-1] == "bad" and ranking.clusters == 200
    np.testing.assert_array_equal(ranking.rank_interval[[0, -1]], [[1, 1], [4, 4]])
    np.testing.assert_array_equal(ranking.rank_interval[1:3], [[2, 3], [2, 3]])
    np.testing.assert_array_equal(ranking.best, [1, 0, 0, 0])
    fitted = fit_pairs(names[i], names[j], label)
    np.testing.assert_allclose(ranking.score, np.sort(fitted.utility)[::-1], atol=1e-7)
    # independent votes: bootstrap and information agree on the width
    width = np.ptp(ranking.score_interval, axis=1) / (2 * 1.96)
    np.testing.assert_allclose(width, fitted.utility_se[np.argsort(-fitted.utility)], rtol=0.25)


def test_an_item_that_was_not_drawn_has_no_rank_in_that_draw():
    ranking = rank_pairs(
        ["a"] * 30 + ["rare"], ["b"] * 30 + ["a"], [1] * 20 + [0] * 10 + [1], clusters=np.arange(31), resamples=100
    )
    rare = list(ranking.items).index("rare")
    # in a third of the draws it is absent; in the others it beat the item that beats the third
    assert 0.4 < ranking.best[rare] < 0.85 and ranking.rank_interval[rare, 0] == 1


def test_additive_ratings_are_exact_without_noise_whoever_rated_what():
    rng = np.random.default_rng(4)
    score, severity, case = rng.normal(3, 1, 6), np.array([-0.5, 0.1, 0.4]), rng.normal(size=10)
    m, r, c = (axis.ravel() for axis in np.meshgrid(np.arange(6), np.arange(3), np.arange(10), indexing="ij"))
    kept = rng.random(len(m)) < 0.5  # unbalanced
    m, r, c = m[kept], r[kept], c[kept]
    found = fit_ratings(m, r, score[m] - severity[r] + case[c], c)
    np.testing.assert_allclose(found.score - found.score.mean(), score - score.mean(), atol=1e-10)
    np.testing.assert_allclose(found.severity, severity, atol=1e-10)
    np.testing.assert_allclose(found.noise, 0, atol=1e-10)


def test_what_ratings_cannot_compare_is_counted():
    joined = fit_ratings(["a", "b", "b", "c"], ["x", "x", "y", "y"], [1, 2, 3, 4], [0, 0, 1, 1])
    assert joined.groups == 1
    apart = fit_ratings(["a", "b", "c", "c"], ["x", "x", "x", "y"], [1, 2, 3, 4], [0, 0, 1, 1])
    assert apart.groups == 2  # c was rated on another case than a and b
    assert fit_ratings(["a", "b"], ["x", "x"], [1, 2]).groups == 1
    assert fit_ratings(["a", "b"], ["x", "y"], [1, 2]).groups == 2  # of the raters' making, it may be


def test_balanced_ratings_rank_by_their_means():
    rng = np.random.default_rng(5)
    rating = rng.normal(size=(5, 3, 40)) + np.arange(5)[:, None, None] / 2
    m, r, c = (axis.ravel() for axis in np.meshgrid(np.arange(5), np.arange(3), np.arange(40), indexing="ij"))
    ranking = rank_ratings(m, r, rating.ravel(), c, resamples=400)
    np.testing.assert_allclose(ranking.score, np.sort(rating.mean(axis=(1, 2)))[::-1], rtol=1e-10)
    # against the other items of the case: the standard error of the centred mean
    centred = (rating - rating.mean(axis=(0, 1))).mean(axis=1)[ranking.items]
    error = centred.std(axis=1, ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(np.ptp(ranking.score_interval, axis=1) / (2 * 1.96), error, rtol=0.25)


def test_what_is_beyond_the_scale_is_left_out_with_a_warning():
    np.testing.assert_array_equal(out_of_range([0, 1, 5, 5.5, NAN], 1, 5), [True, False, False, True, False])
    with pytest.warns(UserWarning, match=r"1 of 5 ratings are outside the scale 1 to 5 and are left out: rows 3"):
        ranking = rank_ratings(["a", "b", "a", "b", "a"], ["x"] * 5, [1, 2, 1, 50, 1], scale=(1, 5), resamples=20)
    np.testing.assert_allclose(ranking.score, [2, 1])


@pytest.mark.skipif("ONEREWARD_DATA" not in os.environ, reason="ONEREWARD_DATA is not set")
def test_three_radiologists_rank_the_denoisers_and_their_slips_are_named():
    path = Path(os.environ["ONEREWARD_DATA"]) / "ratings_mtdgan_readers" / "ratings_tidy.csv"
    if not path.is_file():
        pytest.skip("the ratings of the denoisers are not there")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    method, reader = [row["method"] for row in rows], [row["reader"] for row in rows]
    case = [f"{row['region']}-{row['set']}" for row in rows]
    structure = np.array([float(row["structure_1to5"]) for row in rows])
    marked = np.flatnonzero([row["out_of_range"] == "structure" for row in rows])
    np.testing.assert_array_equal(np.flatnonzero(out_of_range(structure, 1, 5)), marked)
    with pytest.warns(UserWarning, match=f"{len(marked)} of 1260 ratings .* rows {marked[0]}, "):
        ranking = rank_ratings(method, reader, structure, case, scale=(1, 5), resamples=200)
    # the references that were hidden among the samples: normal dose is the best there is, low dose the worst
    assert ranking.clusters == 30 and len(ranking.items) == 14
    assert ranking.items[0] == "NDCT" and ranking.items[-1] == "LDCT"
    np.testing.assert_array_equal(ranking.rank_interval[[0, -1]], [[1, 1], [14, 14]])
    noise = -np.abs(np.array([float(row["noise_1to14"]) for row in rows]) - 7)  # 7 is like normal dose
    by_noise = rank_ratings(method, reader, noise, case, resamples=200)
    means = {name: noise[np.array(method) == name].mean() for name in set(method)}  # every reader saw every image
    assert list(by_noise.items) == sorted(means, key=means.get, reverse=True)
    assert by_noise.rank_interval[list(by_noise.items).index("NDCT"), 0] == 1
