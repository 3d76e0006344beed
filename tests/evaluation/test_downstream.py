"""Downstream utility: what helps is found, what does not is not called helpful, and chance is called chance."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from onereward import OneRewardMaskPipeline
from onereward.data.folder import load_folder
from onereward.data.phantom import load_phantom, to_png
from onereward.data.schema import FEATURES, split_by_case, validate_row
from onereward.evaluation import downstream
from onereward.evaluation.downstream import (
    ALL,
    POOLED,
    Arm,
    case_table,
    compare_arms,
    crossed_interval,
    downstream_utility,
    gap_of_means,
    largest_region,
    measured_gap,
    plot_downstream,
    read_examples,
    synthetic_rows,
    train_and_score,
    tumour_present,
    tumour_side,
    tumour_size,
    wilcoxon_p,
)
from onereward.preferences.raters import holm


REAL = os.environ.get("ONEREWARD_DATA")
ROOT = Path(__file__).parents[2]
TUMOUR = {"background": 0, "tumour": 1}
SMALL = {"widths": (8, 16, 16), "batch_size": 8, "labels": TUMOUR, "subgroup": tumour_side}


def replace(rows, **columns):
    """The rows with some columns replaced, in their old order."""
    for name, values in columns.items():
        rows = rows.remove_columns(name).add_column(name, values, feature=FEATURES[name])
    return rows.select_columns(list(FEATURES))


@pytest.fixture(scope="module")
def world():
    """FLAIR slices of 110 phantom cases at 32 pixels, every region one label: `train`, `more` cases, and `test`."""

    def half(row):
        picture = np.asarray(row["target"]).reshape(32, 2, 32, 2).mean((1, 3)).round().astype(np.uint8)
        labels, mask = (np.asarray(row[name])[::2, ::2] for name in ("label_map", "mask"))
        pictures = {"image": picture, "target": picture, "mask": mask, "label_map": (labels > 0).astype(np.uint8)}
        return row | {name: to_png(array) for name, array in pictures.items()}

    rows = [half(row) for row in load_phantom(110, contrasts=("t2f",), tasks=("fill",))]
    rows = datasets.Dataset.from_list(rows, features=FEATURES)
    return {"train": rows.select(range(20)), "more": rows.select(range(20, 70)), "test": rows.select(range(70, 110))}


@pytest.fixture(scope="module")
def few(world):
    return {"train": world["train"].select(range(8)), "test": world["test"].select(range(12))}


def quick(few, synthetic, **settings):
    settings = SMALL | {"fractions": (0.5,), "shares": (0.5,), "seeds": (0, 1), "steps": 2} | settings
    return downstream_utility(few["train"], few["test"], synthetic, **settings)


# Known answers.


def test_more_cases_of_the_same_world_help_and_shuffled_labels_do_not(world, tmp_path):
    rng = np.random.default_rng(0)
    labels = [to_png(np.asarray(world["more"][int(i)]["label_map"])) for i in rng.permutation(len(world["more"]))]
    sources = {"more": world["more"], "shuffled": replace(world["more"], label_map=labels)}
    result = downstream_utility(
        world["train"], world["test"], sources, **SMALL, fractions=(0.1,), shares=(0.5,), steps=100
    )
    verdicts = {(c.arm.source, c.group): c.verdict for c in result.comparisons}
    assert verdicts["more", ALL] == "helps"
    assert all(verdict != "helps" for (source, _), verdict in verdicts.items() if source == "shuffled")
    assert verdicts["shuffled", ALL] == "harms"
    # Two of the twenty cases, but all of the other fifty; and a result that anything can read.
    assert {(score.arm.source, score.real_rows, score.synthetic_rows) for score in result.arms} == {
        ("", 2, 0),
        ("more", 2, 50),
        ("shuffled", 2, 50),
    }
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    plot_downstream(result, tmp_path / "result.png")
    assert Image.open(tmp_path / "result.png").size[0] > 1000


def simulated(rng, arms, *, seeds=5, cases=40, of_seed=0.02, of_case=0.1, of_both=0.05, help_in=None, effect=0.0):
    """Scores of arms that differ by nothing but their trainings, but for `effect` in the cases `help_in`."""
    ability = rng.normal(0.6, of_case, cases)
    scores = {}
    for arm in arms:
        luck = rng.normal(0, of_seed, (seeds, 1))  # of a training
        tilt = rng.normal(0, of_both, (seeds, cases))
        scores[arm] = ability + luck + tilt
        if arm.source and help_in is not None:
            scores[arm] = scores[arm] + effect * help_in
    return scores


@pytest.mark.parametrize("of_seed", [0.0, 0.02, 0.05])
def test_other_seeds_are_called_no_difference_in_95_of_100_results(of_seed):
    rng = np.random.default_rng(0)
    arms = [Arm(f, source, share) for f in (0.1, 1.0) for source, share in (("", 0.0), ("a", 0.5), ("a", 1.0))]
    case_ids, groups = np.array([f"{i:02d}" for i in range(40)]), np.array(["rare"] * 10 + ["often"] * 30)
    right, by_cases_alone = 0, 0
    for _ in range(100):
        scores = simulated(rng, arms, of_seed=of_seed)
        found = compare_arms(scores, case_ids, groups, ["rare"])
        assert [c.group for c in found] == ["rare"] * 4 + [ALL] * 4 + ["often"] * 4
        right += all(c.verdict == "no difference" for c in found)
        by_cases_alone += (holm([c.p_wilcoxon for c in found]) < 0.05).any()
    assert right >= 95
    if of_seed:  # why seeds are not left out of the test
        assert by_cases_alone > 50


def test_a_rare_subgroup_that_alone_is_helped_is_found_alone():
    rng = np.random.default_rng(1)
    case_ids = np.array([f"{i:02d}" for i in range(60)])
    groups = np.array(["rare"] * 20 + ["often"] * 40)
    found, wrong = 0, 0
    for _ in range(100):
        scores = simulated(rng, [Arm(0.1), Arm(0.1, "a", 0.5)], cases=60, help_in=groups == "rare", effect=0.15)
        verdicts = {c.group: c.verdict for c in compare_arms(scores, case_ids, groups, ["rare"])}
        found += verdicts["rare"] == "helps"
        wrong += verdicts["often"] != "no difference"
    assert found >= 95
    assert wrong <= 5


def test_few_cases_and_one_training_are_never_a_finding():
    case_ids, groups = np.array(list("abcdefgh")), np.array(["x"] * 5 + ["y"] * 3)
    ones = {Arm(1.0): np.zeros((5, 8)), Arm(1.0, "a", 0.5): np.ones((5, 8))}
    verdicts = {c.group: c.verdict for c in compare_arms(ones, case_ids, groups)}
    assert verdicts == {ALL: "helps", "x": "too few", "y": "too few"}
    single = {arm: scores[:1] for arm, scores in ones.items()}
    assert {c.verdict for c in compare_arms(single, case_ids, groups)} == {"too few"}


# The statistics against oracles.


def sum_of_squares(design, y):
    """What a linear model explains, by least squares."""
    return ((design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum()


def test_the_crossed_test_is_hilliss_f_test_of_two_modalities():
    rng = np.random.default_rng(0)
    seeds, cases = 5, 12
    scores = rng.normal(size=(2, seeds, cases)) + rng.normal(size=(2, 1, cases)) + 0.7 * rng.normal(size=(2, seeds, 1))
    # A three-way analysis of variance, its terms fitted one after the other.
    t, r, c = (index.ravel() for index in np.indices(scores.shape))
    y, terms, explained, ms = scores.ravel(), np.ones((scores.size, 1)), None, {}
    one_hot = {"T": np.eye(2)[t], "R": np.eye(seeds)[r], "C": np.eye(cases)[c]}

    def product(*names):
        columns = np.ones((len(y), 1))
        for name in names:
            columns = (columns[:, :, None] * one_hot[name][:, None, :]).reshape(len(y), -1)
        return columns

    explained, rank = sum_of_squares(terms, y), 1
    for names in ("T", "R", "C", "TR", "TC", "RC", "TRC"):
        terms = np.hstack([terms, product(*names)])
        new, new_rank = sum_of_squares(terms, y), np.linalg.matrix_rank(terms)
        ms[names] = (new - explained) / (new_rank - rank)
        explained, rank = new, new_rank
    error = ms["TR"] + max(ms["TC"] - ms["TRC"], 0)
    p = stats.f.sf(ms["T"] / error, 1, error**2 / (ms["TR"] ** 2 / (seeds - 1)))
    assert crossed_interval(scores[1] - scores[0])[2] == pytest.approx(p, rel=1e-9)


def test_where_cases_do_not_differ_it_is_students_t_over_seeds():
    of_seed = np.array([0.1, 0.3, 0.2, 0.05, 0.4])
    low, high, p = crossed_interval(np.repeat(of_seed[:, None], 7, axis=1))
    expected = stats.ttest_1samp(of_seed, 0)
    assert p == pytest.approx(expected.pvalue)
    np.testing.assert_allclose([low, high], expected.confidence_interval(0.95))
    assert crossed_interval(np.zeros((3, 4))) == (0, 0, 1)
    with pytest.raises(ValueError, match="at least two"):
        crossed_interval(np.zeros((1, 4)))


def test_the_crossed_interval_covers_the_truth_for_other_seeds_and_other_cases():
    rng = np.random.default_rng(0)
    repeats, covered = 2000, 0
    for _ in range(repeats):
        table = 0.3 * rng.normal(size=(5, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(5, 40))
        low, high, _ = crossed_interval(table)
        covered += low <= 0 <= high
    # Four standard errors of a proportion of 0.95 in 2,000 repeats.
    assert abs(covered / repeats - 0.95) < 4 * (0.95 * 0.05 / repeats) ** 0.5


def test_holm_covers_all_comparisons_and_the_p_value_is_the_weaker_of_two():
    rng = np.random.default_rng(2)
    arms = [Arm(0.1), Arm(0.1, "a", 0.5), Arm(0.1, "b", 0.5)]
    case_ids, groups = np.array([f"{i:02d}" for i in range(30)]), np.array(["x", "y"] * 15)
    scores = simulated(rng, arms, cases=30, help_in=np.ones(30), effect=0.1)
    found = compare_arms(scores, case_ids, groups)
    assert len(found) == 6
    for c in found:
        rows = np.ones(30, bool) if c.group == ALL else groups == c.group
        difference = (scores[c.arm] - scores[arms[0]])[:, rows]
        assert c.p_wilcoxon == stats.wilcoxon(difference.mean(0)).pvalue
        assert c.p_value == max(c.p_wilcoxon, c.p_crossed)
        np.testing.assert_allclose([c.difference.low, c.difference.high], crossed_interval(difference)[:2])
        assert c.difference.value == pytest.approx(difference.mean())
    np.testing.assert_array_equal([c.p_holm for c in found], holm([c.p_value for c in found]))
    assert wilcoxon_p(np.zeros(5)) == 1


def test_a_case_counts_once_whatever_the_number_of_its_pictures():
    scores = np.array([[1.0, 1, 1, 0], [0, 0, 0, 1]])
    case_ids = np.array(["a", "a", "a", "b"])
    np.testing.assert_allclose(case_table(scores, case_ids, np.ones(4, bool)), [[1, 0], [0, 1]])
    table = case_table(scores, case_ids, np.array([True, False, False, False]))
    np.testing.assert_allclose(table, [[1, np.nan], [0, np.nan]])


def test_the_gap_is_of_the_best_and_the_worst_subgroup_of_each_resample():
    nan = np.nan
    tables = [np.array([[0.2, 0.4, nan, nan]] * 2), np.array([[nan, nan, 0.9, 0.7]] * 2)]
    everything = np.ones((1, 2)), np.ones((1, 4))
    assert gap_of_means(tables, *everything)[0] == pytest.approx(0.5)
    weights = np.array([[0, 2.0, 0, 2], [1, 1, 0, 0]])
    np.testing.assert_allclose(gap_of_means(tables, np.ones((2, 2)), weights), [0.3, nan])
    narrower = [tables[0] + 0.1, tables[1]]
    change = measured_gap(narrower, tables)
    assert change.value == pytest.approx(-0.1)
    assert change.low == pytest.approx(-0.1)  # the same resamples on both sides
    assert change.high == pytest.approx(-0.1)
    gap = measured_gap(tables)
    assert gap.low == pytest.approx(0.3)
    assert gap.high == pytest.approx(0.7)


def test_a_training_that_diverged_is_counted_and_leaves_both_sides():
    case_ids, groups = np.array([f"{i}" for i in range(8)]), np.array([""] * 8)
    rng = np.random.default_rng(0)
    scores = simulated(rng, [Arm(1.0), Arm(1.0, "a", 0.5)], cases=8)
    whole = {arm: table.copy() for arm, table in scores.items()}
    scores[Arm(1.0)][2] = np.nan
    [found] = compare_arms(scores, case_ids, groups)
    kept = np.array([0, 1, 3, 4])
    assert found.difference.value == pytest.approx((whole[Arm(1.0, "a", 0.5)] - whole[Arm(1.0)])[kept].mean())
    assert found.difference.note == "1 of 5 pairs of trainings failed"
    [real, _] = downstream._score_arms(scores, case_ids, groups, {arm: [(1, 1)] * 5 for arm in scores})
    assert real.failed_seeds == 1
    assert real.scores[ALL].value == pytest.approx(whole[Arm(1.0)][kept].mean())


def test_a_loss_that_is_not_finite_gives_no_score(few):
    examples = read_examples(few["train"], "train", None, None)
    scores = train_and_score(
        *(examples, None, 0.0, examples),
        **{"classes": None, "labels": TUMOUR, "modalities": ["t2f"], "steps": 4, "batch_size": 4, "seed": 0},
        **{"widths": (4, 4), "learning_rate": float("inf"), "device": "cpu"},
    )
    assert np.isnan(scores).all()


# Pairing, fractions and leakage.


def spy_on_training(monkeypatch):
    calls = []

    def record(real, synthetic, share, test, **settings):
        calls.append({"real": real, "synthetic": synthetic, "share": share, **settings})
        return np.zeros(len(test))

    monkeypatch.setattr(downstream, "train_and_score", record)
    return calls


def test_arms_of_a_seed_share_cases_and_steps_and_smaller_fractions_are_part_of_larger(few, monkeypatch):
    calls = spy_on_training(monkeypatch)
    quick(few, few["train"], fractions=(0.25, 0.5, 1.0), shares=(0.25, POOLED, 1.0), seeds=(0, 1, 2))
    assert len(calls) == 3 * 4 * 3
    assert {(call["steps"], call["batch_size"]) for call in calls} == {(2, 8)}
    cases = {}
    for call in calls:
        key = call["seed"], len(call["real"])
        assert cases.setdefault(key, set(call["real"].case_ids)) == set(call["real"].case_ids)
        if call["synthetic"] is not None:  # made from these cases, so never from others
            assert set(call["synthetic"].case_ids) == set(call["real"].case_ids)
    for seed in range(3):
        assert cases[seed, 2] < cases[seed, 4] < cases[seed, 8]
    assert len({frozenset(cases[seed, 2]) for seed in range(3)}) > 1
    assert [call["share"] for call in calls[:4]] == [0, 0.25, 0.5, 1.0]


def test_arms_differ_in_their_data_only(few):
    """Synthetic rows that are the real rows change nothing, at any share."""
    result = quick(few, few["train"], shares=(0.25, 1.0), steps=4)
    assert [c.difference.value for c in result.comparisons if c.group == ALL] == [0, 0]


def test_rows_of_a_test_case_are_refused_and_so_are_their_pictures(few):
    with pytest.raises(ValueError, match=r"`synthetic` has rows of 12 test case"):
        quick(few, few["test"])
    with pytest.raises(ValueError, match=r"`train` has rows of 12 test case"):
        downstream_utility(few["test"], few["test"], few["train"], **SMALL)
    renamed = replace(few["test"], case_id=[f"other-{i}" for i in range(12)])
    with pytest.raises(ValueError, match=r"12 picture\(s\) equal to a test picture"):
        quick(few, renamed)
    with pytest.raises(ValueError, match="`tuned` has rows of 12 test case"):
        quick(few, {"base": few["train"], "tuned": lambda rows, seed: few["test"]})


def test_a_function_makes_rows_from_the_cases_of_the_fraction_alone(few, monkeypatch):
    calls, asked = spy_on_training(monkeypatch), []

    def make(rows, seed):
        asked.append((seed, tuple(rows["case_id"])))
        return rows

    quick(few, make, shares=(0.5, 1.0))
    assert [seed for seed, _ in asked] == [0, 1]  # once for both shares
    real_only = [call for call in calls if call["share"] == 0]
    assert [set(cases) for _, cases in asked] == [set(call["real"].case_ids) for call in real_only]


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(few, tmp_path, monkeypatch):
    whole = quick(few, few["train"], shares=(1.0,))
    train, trained = downstream.train_and_score, []

    def cut_off(*args, **settings):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(settings["seed"])
        return train(*args, **settings)

    monkeypatch.setattr(downstream, "train_and_score", cut_off)
    with pytest.raises(KeyboardInterrupt):
        quick(few, few["train"], shares=(1.0,), runs=tmp_path / "runs.json")
    assert trained == [0, 0, 1]
    trained.clear()
    resumed = quick(few, few["train"], shares=(1.0,), runs=tmp_path / "runs.json")
    assert len(trained) == 1
    assert json.dumps(resumed.to_dict()) == json.dumps(whole.to_dict())
    quick(few, few["train"], shares=(1.0,), runs=tmp_path / "runs.json", subgroup=tumour_size, alpha=0.01)
    assert len(trained) == 1  # nothing of this needs another training
    quick(few, few["train"], shares=(1.0,), runs=tmp_path / "runs.json", seeds=(0, 1, 2))
    assert trained == [1, 2, 2]
    for changed in ({"steps": 3}, {"labels": {"background": 0, "lesion": 1}}):
        with pytest.raises(ValueError, match="other data or with other settings"):
            quick(few, few["train"], shares=(1.0,), runs=tmp_path / "runs.json", **changed)
    with pytest.raises(ValueError, match="other data or with other settings"):
        quick(few, few["train"].select(range(7)), shares=(1.0,), runs=tmp_path / "runs.json")


def test_settings_and_rows_that_cannot_work_are_refused_before_training(few, monkeypatch):
    monkeypatch.setattr(downstream, "train_and_score", lambda *_, **__: pytest.fail("trained"))
    train = few["train"]
    for settings, message in (
        ({"fractions": (0.0,)}, "`fractions`"),
        ({"shares": (1.5,)}, "`shares`"),
        ({"shares": ("half",)}, "`shares`"),
        ({"seeds": (1, 1)}, "same value twice"),
        ({"seeds": (1,)}, "at least two trainings"),
        ({"steps": 1}, "`steps`"),
        ({"labels": {"background": 0, "tumour": 2}}, "`labels`"),
        ({"widths": (4,) * 7}, "fewer `widths`"),
        ({"subgroup": "sex"}, "no column 'sex'"),
        ({"under_represented": ["huge"]}, "holds \\['huge'\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            quick(few, train, **settings)
    with pytest.raises(ValueError, match="without a target"):
        quick(few, replace(train, target=[None] * 8))
    with pytest.raises(ValueError, match="'extend' rows"):
        quick(few, replace(train, task=["extend"] * 8))
    with pytest.raises(ValueError, match="has the modalities"):
        quick(few, replace(train, modality=["ct"] * 8))
    with pytest.raises(ValueError, match="no rows of the 4 case"):
        quick(few, train.select([0]))
    with pytest.raises(ValueError, match="`synthetic` has the label 3"):
        quick(few, replace(train, label_map=[to_png(np.full((32, 32), 3, np.uint8))] * 8))
    with pytest.raises(ValueError, match="`test` has the label 1"):
        quick(few, train, labels={"background": 0}, under_represented=[])


# Rows, subgroups and classifiers.


def test_synthetic_rows_keep_their_case_and_everything_outside_the_mask(tiny_pipeline, phantom):
    rows = phantom.select([i for i, task in enumerate(phantom["task"]) if task == "fill"])
    made = synthetic_rows(tiny_pipeline(), rows, per_row=2, num_inference_steps=1)
    assert made.features == rows.features
    assert list(made["case_id"]) == 2 * list(rows["case_id"])
    assert set(made["source"]) == {"synthetic"}
    for row, origin in zip(made, [*rows, *rows], strict=True):
        validate_row(row)
        outside = np.asarray(origin["mask"]) == 0
        np.testing.assert_array_equal(np.asarray(row["target"])[outside], np.asarray(origin["image"])[outside])
    n = len(rows)
    assert np.asarray(made[0]["target"]).tolist() != np.asarray(made[n]["target"]).tolist()  # other noise


def test_balance_makes_every_subgroup_as_frequent_as_the_largest(tiny_pipeline, phantom):
    fill = phantom.select([i for i, task in enumerate(phantom["task"]) if task == "fill"])
    rows = datasets.concatenate_datasets([fill] * 3).select([0, 1, 2, 3, 4, 5, 6, 0, 2])
    rows = rows.add_column("sex", ["f", "f", "f", "f", "f", "m", "m", "x", "f"])
    made = synthetic_rows(tiny_pipeline(), rows, balance="sex", num_inference_steps=1)
    counts = {sex: (list(rows["sex"]) + list(made["sex"])).count(sex) for sex in "fmx"}
    assert counts == {"f": 6, "m": 6, "x": 6}
    assert "f" not in set(made["sex"])
    with pytest.raises(ValueError, match="nothing is under-represented"):
        synthetic_rows(tiny_pipeline(), rows.select([0, 5]), balance="sex")


def test_what_a_row_shows():
    def row(value, columns):
        labels = np.zeros((10, 10), np.uint8)
        labels[:, columns] = value
        return {"label_map": Image.fromarray(labels)}

    assert [tumour_present(row(v, [1])) for v in (0, 2)] == ["no", "yes"]
    assert [largest_region(row(v, [1])) for v in (0, 2)] == ["0", "2"]
    assert [tumour_side(row(1, c)) for c in ([], [1], [8, 9])] == ["none", "left", "right"]
    one = np.zeros((10, 10), np.uint8)
    one[0, 0] = 1
    sizes = [{"label_map": Image.fromarray(one)}, row(1, []), row(1, [1])]
    assert [tumour_size(r) for r in sizes] == ["small", "none", "large"]


def test_rare_subgroups_are_found_and_listed_first(few, monkeypatch):
    spy_on_training(monkeypatch)
    groups = {case: "rare" if i < 2 else "often" for i, case in enumerate(few["train"]["case_id"])}
    groups |= {case: "rare" if i < 6 else "often" for i, case in enumerate(few["test"]["case_id"])}
    result = quick(few, few["train"], subgroup=lambda row: groups[row["case_id"]])
    assert result.under_represented == ["rare"]
    assert result.groups["rare"] == {"train_cases": 2, "test_cases": 6}
    assert [(c.group, c.under_represented) for c in result.comparisons] == [
        ("rare", True),
        (ALL, False),
        ("often", False),
    ]


def test_a_classifier_learns_a_column_and_its_scores_are_of_right_answers():
    """Bright and dark pictures, which anybody tells apart; labels drawn at random, which nobody does."""
    rng = np.random.default_rng(0)

    def rows(name, number):
        made = []
        for i in range(number):
            bright = i % 2
            picture = to_png(rng.integers(100 * bright, 100 + 100 * bright, (16, 16, 3)).astype(np.uint8))
            empty = to_png(np.zeros((16, 16), np.uint8))
            texts = {"prompt": "", "task": "fill", "modality": "photo", "case_id": f"{name}-{i}", "source": "test"}
            pictures = {"image": picture, "target": picture, "mask": empty, "label_map": empty}
            made.append(texts | pictures)
        table = datasets.Dataset.from_list(made, features=FEATURES)
        return table.add_column("bright", [i % 2 for i in range(number)]).add_column(
            "coin", [int(c) for c in rng.integers(0, 2, number)]
        )

    train, test, more = rows("train", 20), rows("test", 40), rows("more", 20)
    settings = {"fractions": (1.0,), "shares": (0.5,), "seeds": (0, 1), "steps": 30, "widths": (4, 8)}
    result = downstream_utility(train, test, more, outcome="bright", subgroup="bright", **settings)
    assert result.metric == "accuracy"
    assert result.settings["classes"] == ["0", "1"]
    assert [score.scores[ALL].value for score in result.arms] == [1, 1]
    assert all(c.verdict == "no difference" for c in result.comparisons)
    chance = downstream_utility(train, test, more, outcome="coin", **settings)
    assert all(0.25 < score.scores[ALL].value < 0.75 for score in chance.arms)
    with pytest.raises(ValueError, match="`synthetic` has the classes"):
        strange = more.remove_columns("bright").add_column("bright", [7] * 20)
        downstream_utility(train, test, strange, outcome="bright", **settings)


@pytest.mark.skipif(not REAL, reason="ONEREWARD_DATA does not name the real sets")
def test_real_skin_lesions_run_from_disk_to_result():
    folder = Path(REAL) / "skin_isic2017"
    index = {row["image"]: row for row in csv.DictReader((folder / "index.csv").open())}
    names = list(index)
    metadata = [{"file_name": f"images/{n}.jpg", "mask_file_name": f"masks/{n}.png"} for n in names]
    labels = {"background": 0, "lesion": 1}
    rows = load_folder(folder, size=32, mode="RGB", labels=labels, mask_label="lesion", metadata=metadata)
    rows = rows.add_column("keratosis", [int(float(index[n]["seborrheic_keratosis"])) for n in names])
    parts = split_by_case(rows, {"train": 0.3, "more": 0.3, "test": 0.4})
    settings = {"subgroup": "keratosis", "fractions": (0.5,), "shares": (0.5,), "seeds": (0, 1), "steps": 5}
    settings |= {"widths": (4, 8), "labels": labels}
    for outcome in (None, "keratosis"):
        result = downstream_utility(parts["train"], parts["test"], parts["more"], outcome=outcome, **settings)
        assert result.settings["test_cases"] == len(set(parts["test"]["case_id"]))
        assert all(0 <= score.scores[ALL].value <= 1 for score in result.arms)


@pytest.mark.slow
def test_other_seeds_of_real_trainings_are_called_no_difference(world):
    """Twenty trainings on the same cases; any five against any other five."""
    train, test = (read_examples(world[name], name, None, tumour_side) for name in ("train", "test"))
    scores = np.stack(
        [
            train_and_score(
                *(train, None, 0.0, test),
                **{"classes": None, "labels": TUMOUR, "modalities": ["t2f"], "steps": 100, "batch_size": 8},
                **{"widths": (8, 16, 16), "learning_rate": 3e-3, "device": "cpu", "seed": seed},
            )
            for seed in range(20)
        ]
    )
    rng, right, by_cases_alone = np.random.default_rng(0), 0, 0
    for _ in range(100):
        order = rng.permutation(20)
        pair = {Arm(1.0): scores[order[:5]], Arm(1.0, "again", 0.5): scores[order[5:10]]}
        found = compare_arms(pair, test.case_ids, test.groups)
        right += all(c.verdict == "no difference" for c in found)
        by_cases_alone += (holm([c.p_wilcoxon for c in found]) < 0.05).any()
    print(f"no difference: {right} of 100; by a test over cases alone: {100 - by_cases_alone} of 100")
    assert right >= 95


@pytest.mark.slow
def test_the_embedded_base_runs_through_the_whole_protocol(tmp_path):
    """Tumours of the shipped pipeline, balanced within each fraction, whether they help or not."""
    pipeline = OneRewardMaskPipeline.from_pretrained(ROOT / "pipelines" / "onereward-brats")
    train = load_phantom(40, contrasts=("t2f",), tasks=("fill",), split="train")
    test = load_phantom(60, contrasts=("t2f",), tasks=("fill",), split="test")

    def balanced(rows, seed):
        return synthetic_rows(pipeline, rows, balance=tumour_size, seed=seed, num_inference_steps=10)

    settings = {"fractions": (0.5,), "shares": (POOLED,), "steps": 100, "batch_size": 8, "widths": (8, 16, 32)}
    result = downstream_utility(
        train, test, {"all": synthetic_rows(pipeline, train, num_inference_steps=10), "balanced": balanced},
        subgroup=tumour_size, runs=tmp_path / "runs.json", **settings,
    )  # fmt: skip
    assert len(result.arms) == 3
    assert result.comparisons[0].under_represented
    for c in result.comparisons:
        print(c.group, c.arm, c.difference, c.p_holm, c.verdict)
    assert all(np.isfinite(dataclasses.astuple(score.scores[ALL])[0]) for score in result.arms)
