"""Reader studies against scipy's binomial intervals, closed forms, and simulated readers whose accuracy is known."""

import dataclasses
import json
from itertools import product

import datasets
import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm, ttest_rel

from onereward.evaluation.bootstrap import Measured
from onereward.evaluation.reader_study import (
    crossed_proportion,
    required_votes,
    scored_criteria,
    turing_test,
    win_rate,
)
from onereward.preferences.raters import Proportion, clustered_proportion
from onereward.preferences.schema import VOTE_DEFAULTS, VOTE_FEATURES


RUNS = 200
# Of 200 intervals that cover with probability 0.95 each, fewer than this cover once in a thousand times.
AT_LEAST = binom.ppf(0.001, RUNS, 0.95)


def vote(kind="rating", rater="r1", role="radiologist", case="c1", model_0="real", criterion="realism", **answer):
    answer = {"rating": None, "rating_min": None, "rating_max": None, "label_0": None, "model_1": None} | answer
    if kind == "rating":
        answer = {**answer, "rating_min": answer["rating_min"] or 0.0, "rating_max": answer["rating_max"] or 1.0}
    return VOTE_DEFAULTS | {
        "kind": kind,
        "criterion": criterion,
        "rater": rater,
        "rater_role": role,
        "case_id": case,
        "model_0": model_0,
        **answer,
    }


def ratings(right_real, all_real, right_synthetic, all_synthetic, **columns):
    """One vote a case, with so many right."""
    real = [vote(case=f"real-{i}", rating=float(i < right_real), **columns) for i in range(all_real)]
    return real + [
        vote(case=f"synthetic-{i}", model_0="base", rating=float(i >= right_synthetic), **columns)
        for i in range(all_synthetic)
    ]


# --- shares ---


@pytest.mark.parametrize(("hits", "votes"), [(0, 7), (7, 7), (3, 10), (60, 100), (1, 1)])
def test_independent_votes_of_one_rater_have_clopper_and_pearsons_interval(hits, votes):
    share = crossed_proportion(np.arange(votes) < hits, ["r"] * votes, np.arange(votes))
    theirs = binomtest(hits, votes).proportion_ci(method="exact")
    np.testing.assert_allclose([share.low, share.high], [theirs.low, theirs.high], atol=1e-9)


def test_one_rater_is_the_case_clustered_interval_and_raters_and_cases_are_treated_alike():
    rng = np.random.default_rng(0)
    success, case = rng.random(60) < 0.6, np.repeat(np.arange(20), 3)
    ours, theirs = crossed_proportion(success, ["r"] * 60, case), clustered_proportion(success, case)
    np.testing.assert_allclose([ours.low, ours.high, ours.effective], [theirs.low, theirs.high, theirs.effective])
    rater = np.tile(np.arange(3), 20)
    assert crossed_proportion(success, rater, case) == crossed_proportion(success, case, rater)


def simulate(rng, raters, cases, rater_spread, case_spread, mean):
    z = mean + rater_spread * rng.normal(size=(raters, 1)) + case_spread * rng.normal(size=(1, cases))
    right = z + rng.normal(size=(raters, cases)) > 0
    return right.ravel(), np.repeat(np.arange(raters), cases), np.tile(np.arange(cases), raters)


@pytest.mark.parametrize(
    ("raters", "cases", "rater_spread", "case_spread", "mean"),
    [(8, 60, 0.5, 0.5, 0.0), (8, 60, 0.5, 0.5, 1.0), (3, 60, 0.4, 0.6, 0.3), (20, 40, 0.4, 0.7, 0.0)],
)
def test_the_crossed_interval_covers_the_accuracy_of_raters_and_cases_never_seen(
    raters, cases, rater_spread, case_spread, mean
):
    truth = norm.cdf(mean / np.sqrt(1 + rater_spread**2 + case_spread**2))
    rng = np.random.default_rng(0)
    covered = by_case_only = 0
    for _ in range(RUNS):
        right, rater, case = simulate(rng, raters, cases, rater_spread, case_spread, mean)
        share, narrow = crossed_proportion(right, rater, case), clustered_proportion(right, case)
        covered += share.low <= truth <= share.high
        by_case_only += narrow.low <= truth <= narrow.high
    assert covered >= AT_LEAST
    if raters < 20:
        # Leaving raters out would claim to know raters who were never asked.
        assert by_case_only < AT_LEAST


def test_perfect_readers_are_not_called_uncertain_and_no_vote_is_no_evidence():
    right, rater, case = np.ones(180), np.repeat(np.arange(3), 60), np.tile(np.arange(60), 3)
    share = crossed_proportion(right, rater, case)
    assert share.value == share.high == 1 and 0.6 < share.low < 0.95
    nothing = crossed_proportion([], [], [])
    assert np.isnan(nothing.value) and (nothing.low, nothing.high, nothing.votes) == (0, 1, 0)
    with pytest.raises(ValueError, match="`case` has 1 entries for 2 votes"):
        crossed_proportion([1, 0], ["a", "a"], ["c"])


@pytest.mark.parametrize(("width", "share", "level"), [(0.1, 0.5, 0.95), (0.2, 0.8, 0.95), (0.3, 0.5, 0.9)])
def test_required_votes_give_the_width_and_one_vote_less_does_not(width, share, level):
    votes = required_votes(width, share, level)

    def scipy_width(number):
        hits = share * number
        # scipy takes whole hits only: those on both sides of a broken number
        found = [
            binomtest(int(h), number).proportion_ci(level, method="exact") for h in {np.floor(hits), np.ceil(hits)}
        ]
        return [interval.high - interval.low for interval in found]

    assert min(scipy_width(votes)) <= width + 1e-9
    assert max(scipy_width(votes - 1)) > width
    # the textbook's formula is a little short of the exact interval
    textbook = 4 * norm.ppf((1 + level) / 2) ** 2 * share * (1 - share) / width**2
    assert textbook < votes < textbook + 2.5 / width


def test_required_votes_follow_kishs_design_effect_and_check_their_arguments():
    assert required_votes(0.1, votes_per_case=3, correlation=0.2) == np.ceil(required_votes(0.1) * 1.4)
    assert required_votes(0.1, votes_per_case=5, correlation=1.0) == 5 * required_votes(0.1)
    for wrong in ({"width": 0}, {"width": 0.1, "share": 1.2}, {"width": 0.1, "votes_per_case": 0.5}):
        with pytest.raises(ValueError, match=f"`{list(wrong)[-1]}` is"):
            required_votes(**wrong)


# --- visual Turing test ---


def test_one_readers_accuracy_is_the_binomial_test_and_has_sensitivity_and_specificity():
    study = turing_test(ratings(16, 20, 12, 20))
    theirs = binomtest(28, 40).proportion_ci(method="exact")
    assert study.accuracy.value == 28 / 40
    np.testing.assert_allclose([study.accuracy.low, study.accuracy.high], [theirs.low, theirs.high], atol=1e-9)
    np.testing.assert_allclose(study.p_value, binomtest(28, 40).pvalue, rtol=1e-9)
    assert (study.specificity.value, study.sensitivity.value) == (16 / 20, 12 / 20)
    theirs = binomtest(12, 20).proportion_ci(method="exact")
    np.testing.assert_allclose([study.sensitivity.low, study.sensitivity.high], [theirs.low, theirs.high], atol=1e-9)
    assert study.verdict == "told apart" and study.raters["r1"] == study.accuracy == study.roles["radiologist"]
    assert study.votes == {"pairs": 0, "ratings": 40, "undecided": 0, "ignored": 0}


def test_calling_everything_real_is_chance_whatever_the_mixture():
    study = turing_test(ratings(90, 90, 0, 10))
    assert study.accuracy.value == 0.5 and study.p_value == 1 and study.verdict == "not told apart"
    assert (study.specificity.value, study.sensitivity.value) == (1, 0)


def test_the_middle_of_any_scale_is_undecided():
    scale = {"rating_min": 1.0, "rating_max": 5.0}
    votes = [vote(case="a", rating=5.0, **scale), vote(case="b", rating=3.0, **scale)]
    votes += [vote(case="c", model_0="base", rating=1.0, **scale), vote(case="d", model_0="base", rating=2.0, **scale)]
    study = turing_test(votes)
    assert (study.accuracy.value, study.specificity.value, study.sensitivity.value) == (0.875, 0.75, 1)
    assert study.votes["undecided"] == 1


def test_pairs_count_the_side_taken_for_real_and_ignore_the_others():
    votes = [
        vote(
            "pair",
            case=f"c{i}",
            model_0="real" if i % 2 else "base",
            model_1="base" if i % 2 else "real",
            label_0=label,
        )
        for i, label in enumerate([0.0, 1.0, 1.0, 1.0, 0.5])  # right, right, wrong, right, tie
    ]
    votes.append(vote("pair", model_0="base", model_1="tuned", label_0=1.0))
    study = turing_test(votes)
    assert study.accuracy.value == 3.5 / 5
    assert study.votes == {"pairs": 5, "ratings": 0, "undecided": 1, "ignored": 1}
    assert study.sensitivity is None and study.specificity is None
    json.dumps(dataclasses.asdict(study), allow_nan=False)


def readers(rng, accuracy, raters=8, cases=40):
    """Readers who are right with that probability on every image: half real, half synthetic."""
    votes = []
    for r, c in product(range(raters), range(cases)):
        real, right = c % 2 == 0, rng.random() < accuracy
        votes.append(
            vote(
                rater=f"r{r}",
                role="resident" if r % 2 else "radiologist",
                case=f"c{c}",
                model_0="real" if real else "base",
                rating=float(real == right),
            )
        )
    return votes


def test_a_coin_is_seldom_told_apart_and_readers_of_75_percent_are_found():
    rng = np.random.default_rng(1)
    runs, called, covered = 100, 0, 0
    for _ in range(runs):
        study = turing_test(readers(rng, 0.5))
        called += study.verdict != "not told apart"
        covered += study.accuracy.low <= 0.5 <= study.accuracy.high
    assert called + covered == runs and covered >= binom.ppf(0.001, runs, 0.95)
    study = turing_test(readers(rng, 0.75))
    assert study.verdict == "told apart" and study.p_value < 0.001
    assert set(study.raters) == {f"r{i}" for i in range(8)} and set(study.roles) == {"radiologist", "resident"}
    assert sum(share.votes for share in study.roles.values()) == study.accuracy.votes == 320
    assert turing_test(readers(rng, 0.25)).verdict == "taken for the other"


def test_models_and_real_ones_can_be_chosen():
    votes = ratings(10, 10, 9, 10) + [vote(case=f"t{i}", model_0="tuned", rating=1.0) for i in range(10)]
    assert turing_test(votes, models=["base"]).sensitivity.value == 0.9
    assert turing_test(votes, models=["tuned"]).sensitivity.value == 0.0
    assert turing_test(votes).sensitivity.votes == 20
    with pytest.raises(ValueError, match=r"real images, named 'truth', .* the models are \['base', 'real', 'tuned'\]"):
        turing_test(votes, real="truth")
    with pytest.raises(ValueError, match="of \\['other'\\]"):
        turing_test(votes, models=["other"])
    with pytest.raises(ValueError, match=r"none with `criterion` 'quality'; there are \['realism'\]"):
        turing_test(votes, criterion="quality")
    mixed = [*votes, vote("pair", model_1="base", label_0=1.0)]
    with pytest.raises(ValueError, match="pass `kind`"):
        turing_test(mixed)
    assert turing_test(mixed, kind="pair").accuracy.votes == 1
    with pytest.raises(ValueError, match="lack the column\\(s\\) \\['rating'\\]"):
        turing_test([{k: v for k, v in votes[0].items() if k != "rating"}])


# --- scored criteria ---


def scored(rng, raters=4, cases=30, gain=0.8):
    rows = []
    for c in range(cases):
        level = rng.normal(3, 0.7)
        for r, model in product(range(raters), ("base", "tuned")):
            rating = float(np.clip(np.round(level + gain * (model == "tuned") + rng.normal(0, 0.4)), 1, 5))
            scale = {"rating": rating, "rating_min": 1.0, "rating_max": 5.0}
            rows.append(vote(rater=f"r{r}", case=f"c{c}", model_0=model, criterion="quality", **scale))
    return rows


def test_scores_are_means_and_differences_are_paired_within_rater_and_case():
    rows = scored(np.random.default_rng(0))
    result = scored_criteria(rows)["quality"]
    table = {m: np.array([row["rating"] for row in rows if row["model_0"] == m]) for m in ("base", "tuned")}
    for model, values in table.items():
        assert result.models[model].value == pytest.approx(values.mean()) and result.models[model].n == 120
    (paired,) = result.differences
    assert (paired.first, paired.second, result.scale) == ("base", "tuned", [1.0, 5.0])
    assert paired.difference.value == pytest.approx((table["tuned"] - table["base"]).mean())
    # the same as Student's paired interval of the cases' means, up to the noise of the bootstrap
    by_case = [values.reshape(30, 4).mean(1) for values in table.values()]
    low, high = ttest_rel(by_case[1], by_case[0]).confidence_interval()
    np.testing.assert_allclose([paired.difference.low, paired.difference.high], [low, high], atol=0.05)
    # pairing takes the cases' own level out
    widths = [figure.high - figure.low for figure in (paired.difference, result.models["base"])]
    assert widths[0] < 0.6 * widths[1]


def test_a_case_that_only_one_model_has_is_counted_as_failed():
    rows = scored(np.random.default_rng(0), raters=2, cases=5)
    result = scored_criteria([row for row in rows if (row["model_0"], row["case_id"]) != ("tuned", "c0")])["quality"]
    assert (result.differences[0].difference.n, result.differences[0].difference.n_failed) == (8, 2)
    with pytest.raises(ValueError, match="on the scales"):
        scored_criteria([*rows, vote(criterion="quality", rating=0.5)])
    with pytest.raises(ValueError, match="`criterion` 'beauty'"):
        scored_criteria(rows, criteria=["beauty"])
    with pytest.raises(ValueError, match="`kind` 'rating'; there are"):
        scored_criteria([vote("pair", model_1="base", label_0=1.0)])


# --- preference ---


def test_ties_are_half_a_win_on_either_side():
    base = {"model_0": "base", "model_1": "tuned"}
    swapped = {"model_0": "tuned", "model_1": "base"}
    votes = [
        vote("pair", case="a", **base, label_0=0.0),  # tuned won
        vote("pair", case="b", **swapped, label_0=1.0),  # tuned won
        vote("pair", case="c", **base, label_0=0.5),
        vote("pair", case="d", **swapped, label_0=0.0, role="resident", both_unacceptable=True),  # base won
        vote("pair", case="e", model_0="base", model_1="other", label_0=1.0),
    ]
    study = win_rate(votes, "base", "tuned", criterion="realism")
    assert (study.wins, study.ties, study.losses, study.rate.value) == (2, 1, 1, 0.625)
    assert study.both_unacceptable == 0.25 and study.roles["resident"].value == 0
    assert win_rate(votes, "tuned", "base").rate.value == pytest.approx(1 - study.rate.value)
    with pytest.raises(
        ValueError, match=r"no pair of 'base' and 'tunde'; the models are \['base', 'other', 'tuned'\]"
    ):
        win_rate(votes, "base", "tunde")


def preferences(rng, rate, cases=30, per_case=4, spread=0.8):
    """Votes that lean the same way within a case; `rate` is the mean over cases."""
    threshold = norm.ppf(rate) * np.sqrt(1 + spread**2)
    wins = threshold + spread * rng.normal(size=(cases, 1)) + rng.normal(size=(cases, per_case)) > 0
    return [
        vote("pair", rater=f"r{r}", case=f"c{c}", model_0="base", model_1="tuned", label_0=float(not wins[c, r]))
        for c, r in product(range(cases), range(per_case))
    ]


def test_the_interval_by_case_covers_the_win_rate_and_finds_a_preference():
    rng = np.random.default_rng(2)
    runs = 100
    covered = [0, 0]
    for _ in range(runs):
        for i, rate in enumerate((0.5, 0.7)):
            study = win_rate(preferences(rng, rate), "base", "tuned")
            covered[i] += study.rate.low <= rate <= study.rate.high
    assert min(covered) >= binom.ppf(0.001, runs, 0.95)
    assert win_rate(preferences(rng, 0.8), "base", "tuned").verdict == "better"
    assert win_rate(preferences(rng, 0.2), "base", "tuned").verdict == "worse"


def test_one_vote_a_case_is_the_binomial_test():
    votes = preferences(np.random.default_rng(0), 0.6, cases=50, per_case=1)
    study = win_rate(votes, "base", "tuned")
    theirs = binomtest(study.wins, 50)
    np.testing.assert_allclose(study.p_value, theirs.pvalue, rtol=1e-9)
    interval = theirs.proportion_ci(method="exact")
    np.testing.assert_allclose([study.rate.low, study.rate.high], [interval.low, interval.high], atol=1e-9)


# --- what goes in, what comes out ---


def test_a_data_set_of_votes_gives_the_same_as_its_rows():
    votes = ratings(16, 20, 12, 20)
    rows = [{name: row.get(name) for name in VOTE_FEATURES} for row in votes]
    dataset = datasets.Dataset.from_list(rows, features=VOTE_FEATURES)
    assert turing_test(dataset).accuracy == turing_test(votes).accuracy


def test_results_are_plain_json():
    rng = np.random.default_rng(0)
    for result in (
        turing_test(readers(rng, 0.6)),
        scored_criteria(scored(rng))["quality"],
        win_rate(preferences(rng, 0.6), "base", "tuned"),
    ):
        text = json.dumps(dataclasses.asdict(result), allow_nan=False)
        assert json.loads(text)
        for field in dataclasses.fields(result):
            assert type(getattr(result, field.name)) in (str, int, float, list, dict, Proportion, Measured), field.name
