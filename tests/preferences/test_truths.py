import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from onereward.data.phantom import load_phantom
from onereward.preferences.degradations import DEGRADATIONS
from onereward.preferences.schema import CRITERIA
from onereward.preferences.truths import (
    border_step,
    calibrate,
    judge,
    layout_correlation,
    likely_anatomy,
    noise_level,
    quality_measures,
    read_condition,
    region_contrasts,
    residual_lesion,
    sharpness,
    surroundings,
)


EVERYWHERE = np.ones((64, 64), bool)
DISC = np.hypot(*(np.indices((64, 64)) - 31.5)) < 14


@pytest.fixture(scope="module")
def phantom_rows():
    return list(load_phantom(8, split="test", tasks=("fill",)))


@pytest.fixture(scope="module")
def conditions():
    return [read_condition(row) for row in load_phantom(3, split="test")]


@pytest.fixture(scope="module")
def calibration():
    return calibrate([read_condition(row) for row in load_phantom(8, split="train")])


@pytest.fixture(scope="module")
def spoilt_truths(conditions, calibration):
    """`[degradation][strength]` -> truths of shape (conditions, criteria); strength 0 is the target itself."""

    def truths(image, condition):
        return [judge(image, condition, calibration)[criterion] for criterion in CRITERIA]

    real = np.array([truths(c["target"], c) for c in conditions])
    table = {}
    for name, degradation in DEGRADATIONS.items():
        table[name] = {0.0: real}
        for strength in (0.15, 0.5, 1.0):
            spoilt = [
                degradation(c["target"], c["mask"], c["label_map"], np.random.default_rng(i), strength)
                for i, c in enumerate(conditions)
            ]
            table[name][strength] = np.array([truths(x, c) for x, c in zip(spoilt, conditions, strict=True)])
    return table


@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.1])
def test_noise_level_is_the_standard_deviation_of_white_noise(sigma):
    rng = np.random.default_rng(0)
    rows, columns = np.indices((64, 64)) / 64
    shading = 0.5 + 0.2 * rows + 0.3 * columns + 0.2 * (rows > 0.5)  # a ramp and an edge
    noisy = shading + sigma * rng.standard_normal((64, 64))
    assert noise_level(noisy, EVERYWHERE) == pytest.approx(sigma, rel=0.06)


def test_noise_level_of_a_ramp_is_zero():
    assert noise_level(np.indices((64, 64))[0] / 64.0, EVERYWHERE) == pytest.approx(0, abs=1e-12)


def test_sharpness_falls_with_blur_and_ignores_contrast():
    image = np.kron(np.random.default_rng(0).random((8, 8)), np.ones((8, 8)))
    values = [sharpness(ndimage.gaussian_filter(image, sigma), EVERYWHERE) for sigma in (0, 0.5, 1, 2, 4)]
    assert all(first > second for first, second in zip(values[:-1], values[1:], strict=True))
    assert sharpness(0.3 + 0.5 * image, EVERYWHERE) == pytest.approx(sharpness(image, EVERYWHERE), rel=0.01)


def test_border_step_measures_a_step_and_not_texture():
    texture = 0.5 + 0.05 * np.random.default_rng(0).standard_normal((64, 64))
    assert border_step(0.5 + 0.2 * DISC, DISC) == pytest.approx(0.2)
    assert border_step(texture, DISC) < 0.05
    assert border_step(texture + 0.2 * DISC, DISC) == pytest.approx(0.2, abs=0.03)
    assert border_step(np.random.default_rng(0).random((64, 64)), EVERYWHERE) == 0  # the field's edge is no border


def test_layout_correlation_is_pearsons():
    label_map = np.where(np.hypot(*(np.indices((64, 64)) - 31.5)) < 7, 2, 1) * DISC
    image = 0.5 + 0.1 * np.random.default_rng(0).standard_normal((64, 64)) + 0.2 * (label_map == 2)
    expected = {1: 0.0, 2: 3.0}
    smooth = ndimage.gaussian_filter(image, 1.0)[DISC]
    oracle = np.corrcoef(smooth, np.where(label_map == 2, 3.0, 0.0)[DISC])[0, 1]
    assert layout_correlation(image, DISC, label_map, expected) == pytest.approx(oracle, rel=0.06)
    assert layout_correlation(1 - image, DISC, label_map, expected) == pytest.approx(-oracle, rel=0.06)


def test_region_contrasts_are_standard_scores_of_the_tissue_outside():
    image = np.where(np.indices((64, 64)).sum(0) % 2, 0.4, 0.6)  # mean 0.5, standard deviation 0.1
    image = np.where(DISC, 0.8, image)
    contrasts = region_contrasts(image, DISC, DISC.astype(int) * 3)
    assert list(contrasts) == [3]
    assert contrasts[3] == pytest.approx(0.3 / (0.1 + 0.01), rel=0.01)
    assert list(region_contrasts(image, DISC, np.zeros((64, 64), int))) == [0]


def test_residual_lesion_is_the_share_that_is_left(conditions):
    for c in (c for c in conditions if c["task"] == "remove"):
        half = (c["source"] + c["target"]) / 2
        shares = [residual_lesion(x, c["source"], c["target"], c["mask"]) for x in (c["target"], half, c["source"])]
        np.testing.assert_allclose(shares, [0, 0.5, 1], atol=0.05)


def test_surroundings_continue_a_constant_and_keep_the_outside():
    image = np.full((64, 64), 0.4)
    np.testing.assert_allclose(surroundings(np.where(DISC, 1.0, image), DISC), image, rtol=1e-9)


def test_the_other_side_of_a_symmetric_picture_is_the_likely_anatomy():
    half = ndimage.gaussian_filter(np.random.default_rng(0).random((64, 32)), 2) * 3 - 1
    symmetric = np.clip(np.concatenate([half, half[:, ::-1]], axis=1), 0.1, 0.9)
    mask = np.roll(DISC, 17, axis=1) & (np.indices((64, 64))[1] > 31)
    np.testing.assert_allclose(likely_anatomy(np.where(mask, 0, symmetric), mask), symmetric, atol=0.02)
    # without symmetry the surroundings remain
    lopsided = np.where(np.indices((64, 64))[1] < 32, 1 - symmetric, symmetric)
    np.testing.assert_array_equal(likely_anatomy(lopsided, mask), surroundings(lopsided, mask))


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        ("blur", "quality"),
        ("noise", "quality"),
        ("seam", "realism"),
        ("blur", "realism"),
        ("misplaced", "clinical_relevance"),
        ("missing", "clinical_relevance"),
        ("intensity_shift", "clinical_relevance"),
    ],
)
def test_a_truth_falls_with_its_own_degradation(spoilt_truths, name, criterion):
    by_strength = [spoilt_truths[name][s][:, CRITERIA.index(criterion)] for s in (0.0, 0.15, 0.5, 1.0)]
    means = [values.mean() for values in by_strength]
    assert all(better > worse for better, worse in zip(means[:-1], means[1:], strict=True)), means
    assert (by_strength[0] > by_strength[-1]).mean() > 0.85


@pytest.mark.parametrize(
    ("name", "criterion"),
    [("seam", "quality"), ("misplaced", "quality"), ("misplaced", "realism"), ("noise", "clinical_relevance")],
)
def test_a_truth_hardly_minds_the_degradation_of_another(spoilt_truths, name, criterion):
    own = {"quality": "noise", "realism": "seam", "clinical_relevance": "missing"}[criterion]
    head = CRITERIA.index(criterion)
    fall = {n: (spoilt_truths[n][0.0] - spoilt_truths[n][1.0])[:, head].mean() for n in (name, own)}
    assert abs(fall[name]) < 0.25 * fall[own]


def test_the_criteria_are_not_one(spoilt_truths):
    deviations = []
    for name in spoilt_truths:
        deviations += [spoilt_truths[name][s] - spoilt_truths["blur"][0.0] for s in (0.0, 0.15, 0.5, 1.0)]
    correlation = np.corrcoef(np.concatenate(deviations).T)
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.6


def test_what_was_asked_for_beats_what_was_there(conditions, calibration):
    margins = [
        judge(c["target"], c, calibration)["clinical_relevance"]
        - judge(c["source"], c, calibration)["clinical_relevance"]
        for c in conditions
        if c["task"] != "extend"
    ]
    assert min(margins) > 0 and np.mean(margins) > 2


@pytest.mark.parametrize("task", ["fill", "remove"])
def test_real_images_without_labels_or_truth_can_be_judged(phantom_rows, task):
    # what `load_folder` makes of a real image: its own lesion to fill, or a lesion to remove with no truth
    real = []
    for row in phantom_rows:
        target, nothing = row["target"] if task == "fill" else None, Image.new("L", row["image"].size)
        real.append({**row, "task": task, "image": row["target"], "target": target, "label_map": nothing})
    conditions = [read_condition(row) for row in real]
    calibration = calibrate(conditions)
    margins = []
    for condition, row in zip(conditions, phantom_rows, strict=True):
        healthy, lesion = (np.asarray(row[x]) / 255 for x in ("image", "target"))
        good, bad = (lesion, healthy) if task == "fill" else (healthy, lesion)
        good, bad = (judge(image, condition, calibration) for image in (good, bad))
        assert np.isfinite([*good.values(), *bad.values()]).all()
        margins.append(good["clinical_relevance"] - bad["clinical_relevance"])
    assert np.mean(margins) > 1.5 and np.mean(np.array(margins) > 0) > 0.8


def test_colour_images_are_judged_like_grey_ones(rows, calibration):
    grey = {**rows[0]}
    colour = {**grey, **{name: grey[name].convert("RGB") for name in ("image", "target")}}
    first, second = (read_condition(row) for row in (grey, colour))
    np.testing.assert_allclose(first["target"], second["target"], atol=1e-12)
    assert first["target"].shape == second["target"].shape


def test_calibration_is_the_mean_and_a_pooled_variance(conditions):
    fill = [c for c in conditions if c["task"] == "fill" and c["modality"] in ("t1c", "t2f")]
    calibration = calibrate(fill)
    groups = {
        m: [quality_measures(c["target"], c["mask"]) for c in fill if c["modality"] == m] for m in ("t1c", "t2f")
    }
    n = len(groups["t1c"])
    pooled = np.mean([np.var(values, axis=0, ddof=1) for values in groups.values()], axis=0)  # groups of equal size
    for modality, values in groups.items():
        mean, std = calibration["quality", "fill", modality]
        np.testing.assert_allclose(mean, np.mean(values, axis=0))
        variance = ((n - 1) * np.var(values, axis=0, ddof=1) + 4 * pooled) / (n - 1 + 4)
        np.testing.assert_allclose(std, np.sqrt(variance) + 0.05)
    alone = calibrate(fill[:1])["quality", "fill", fill[0]["modality"]]
    np.testing.assert_allclose(alone[1], 0.05)


def test_an_unknown_modality_is_named(conditions, calibration):
    with pytest.raises(ValueError, match="no real slice of task 'fill' and modality 'dwi'"):
        judge(conditions[0]["target"], {**conditions[0], "modality": "dwi"}, calibration)
    with pytest.raises(ValueError, match="`conditions` is empty"):
        calibrate([])
