"""A copier is found out, and neither an honest model, a bad one, nor real patients are taken for one."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onereward.data.phantom import load_phantom
from onereward.data.schema import rows_to_tensors
from onereward.evaluation.features import Phantom64
from onereward.evaluation.memorisation import (
    SUSPECT_RATIO,
    ImageSet,
    check_memorisation,
    copying_p_value,
    nearest_training_images,
    probability_closer,
)


def brute_force(queries, train, masks, train_cases, own=None):
    """Nearest, and nearest of another case, by one subtraction a pair."""
    queries, train = queries.double().numpy(), train.double().numpy()
    masks = np.broadcast_to(masks.numpy() > 0.5, queries.shape)
    results = []
    for i, (x, inside) in enumerate(zip(queries, masks, strict=True)):
        d = np.array([np.sqrt(((x - y)[inside] ** 2).mean()) for y in train])
        if own is not None:
            d[train_cases == own[i]] = np.inf
        nearest = d.argmin()
        results.append((d[nearest], d[train_cases != train_cases[nearest]].min(), nearest))
    return map(np.array, zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["float", "uint8", "colour"])
@pytest.mark.parametrize("batch_size", [5, 256])
def test_nearest_training_images_equal_brute_force_inside_the_masks(kind, batch_size):
    generator = torch.Generator().manual_seed(0)
    channels = 3 if kind == "colour" else 1
    x, y = (torch.randint(0, 256, (n, channels, 12, 10), generator=generator) for n in (23, 60))
    y[7] = x[3]  # a copy
    y[8] = x[3]  # and another slice of the same case
    y[8, :, 0, 0] += 1
    cases = np.array([str(i // 2 if i not in (7, 8) else 99) for i in range(60)])
    masks = (torch.rand(23, 1, 12, 10, generator=generator) > 0.6).float()
    own = cases[:23]
    expected = brute_force(x / 255, y / 255, masks, cases)
    as_given = (x.to(torch.uint8), y.to(torch.uint8)) if kind == "uint8" else (x / 255, y / 255)
    found = nearest_training_images(*as_given, cases, masks=masks, batch_size=batch_size)
    for value, truth in zip((found.distances, found.next_distances, found.indices), expected, strict=True):
        np.testing.assert_allclose(value, truth, atol=1e-7)
    assert found.distances[3] == 0 and found.ratios[3] == 0
    expected = brute_force(x / 255, y / 255, masks, cases, own)
    found = nearest_training_images(*as_given, cases, masks=masks, case_ids=own, batch_size=batch_size)
    for value, truth in zip((found.distances, found.next_distances, found.indices), expected, strict=True):
        np.testing.assert_allclose(value, truth, atol=1e-7)


def test_nearest_neighbours_of_features_equal_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 8, generator=generator), torch.randn(200, 8, generator=generator)
    distances, indices = NearestNeighbors(n_neighbors=2).fit(y).kneighbors(x)
    found = nearest_training_images(x, y, np.arange(200))
    np.testing.assert_allclose(found.distances, distances[:, 0] / 8**0.5, rtol=1e-6)
    np.testing.assert_allclose(found.ratios, distances[:, 0] / distances[:, 1], rtol=1e-6)
    assert np.array_equal(found.indices, indices[:, 0])


def test_undefined_distances_are_nan_and_equal_neighbours_have_ratio_one():
    train = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    train[4] = train[5] = 0.5
    queries = torch.stack([train[0], train[1], torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), torch.nan)])
    masks = torch.ones(4, 1, 8, 8)
    masks[1] = 0
    found = nearest_training_images(queries, train, list("abcdef"), masks=masks)
    np.testing.assert_array_equal(found.ratios, [0, np.nan, 1, np.nan])
    with pytest.raises(ValueError, match="needs two to choose from"):
        nearest_training_images(queries, train, ["a"] * 6)
    with pytest.raises(ValueError, match="bring the images to one size"):
        nearest_training_images(queries[..., :4], train, list("abcdef"))


def test_probability_closer_is_the_mann_whitney_statistic():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 9, 40).astype(float), rng.integers(1, 10, 30).astype(float)  # with ties
    measured = probability_closer(x, y, np.arange(40), np.arange(100, 130), resamples=500)
    assert measured.value == pytest.approx(mannwhitneyu(y, x).statistic / 1200)
    assert measured.low < measured.value < measured.high
    broken = probability_closer(np.append(x, np.nan), y, np.arange(41), np.arange(100, 130), resamples=20)
    assert (broken.value, broken.n, broken.n_failed) == (measured.value, 40, 1)


def test_copying_p_value_is_small_for_a_few_copies_and_uniform_at_most_without():
    rng = np.random.default_rng(4)
    cases, other = np.repeat(np.arange(60), 2), np.repeat(np.arange(100, 160), 2)
    alarms = {"paired": 0, "unpaired": 0}
    repeats = 200
    for i in range(repeats):
        # Both rows of a case are alike; a tenth of the ratios is below the threshold by nature.
        a, b = (np.repeat(rng.beta(8, 2, 60), 2) + 0.01 * rng.normal(size=120) for _ in range(2))
        alarms["paired"] += copying_p_value(a, b, cases, cases, 400, seed=i) < 0.05
        alarms["unpaired"] += copying_p_value(a, b, cases, other, 400, seed=i) < 0.05
    # 5 % of 200 and four standard errors.
    assert max(alarms.values()) <= 0.05 * repeats + 4 * (0.05 * 0.95 * repeats) ** 0.5, alarms
    a, b = rng.uniform(0.8, 1, 120), rng.uniform(0.8, 1, 120)
    a[:20] = 0.2
    assert copying_p_value(a, b, cases, cases) < 0.01
    assert copying_p_value(a, b, cases, other) < 0.01
    assert copying_p_value(np.full(120, 0.7), b, cases, other) == 1  # a general shift is no copying


def blur(images, sigma):
    reach = torch.arange(-6, 7.0)
    kernel = torch.exp(-(reach**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    images = F.conv2d(F.pad(images, (6, 6, 6, 6), mode="replicate"), kernel)
    return F.conv2d(images, kernel.transpose(2, 3))


@pytest.fixture(scope="module")
def slices():
    """Tumour slices of 150 phantom cases, their masks and healthy sources."""
    dataset = load_phantom(150, contrasts=("t1c",), tasks=("fill",))
    tensors = rows_to_tensors([dataset[i] for i in range(len(dataset))])
    features = Phantom64()(tensors["targets"], tensors["masks"], list(dataset["modality"]))
    return {
        "images": tensors["targets"],
        "sources": tensors["images"],
        "masks": tensors["masks"],
        "case_ids": np.array(dataset["case_id"]),
        "features": features,
    }


def parts(slices, seed, sizes=(90, 30, 30)):
    """Training, held-out and further cases, which an honest model's images are as good as."""
    order = np.random.default_rng(seed).permutation(len(slices["case_ids"]))
    ends = np.cumsum(sizes)
    return [
        ImageSet(slices["images"][rows], slices["case_ids"][rows], slices["masks"][rows], slices["features"][rows])
        for rows in (order[end - size : end] for end, size in zip(ends, sizes, strict=True))
    ]


def painted(condition, images):
    """A model's answer to the conditions: its images inside the masks, the condition's outside."""
    pasted = torch.where(condition.masks > 0.5, images, condition.images)
    features = Phantom64()(pasted, condition.masks, ["t1c"] * len(pasted))
    return ImageSet(pasted, condition.case_ids, condition.masks, features)


def test_a_copier_of_training_images_is_flagged(slices):
    train, heldout, unseen = parts(slices, seed=0)
    copied = train.images[:30]
    noise = 0.05 * torch.randn(copied.shape, generator=torch.Generator().manual_seed(5))
    for name, images in {"exact": copied, "noisy": copied + noise, "blurred": blur(copied, 1)}.items():
        result = check_memorisation(painted(unseen, images.clamp(0, 1)), train, heldout, resamples=100)
        assert result.flagged and result.verdict == "copies", name
        assert "in pixels" in result.reason.lower()
    result = check_memorisation(painted(unseen, copied), train, heldout, resamples=100, pairs=5)
    assert result.spaces["pixels"].exact == 30
    assert len(result.spaces["pixels"].closest) == 5
    for pair in result.spaces["pixels"].closest:
        assert pair["train_case_id"] == train.case_ids[pair["train"]] == train.case_ids[pair["generated"]]
        assert pair["distance"] == 0 == pair["ratio"]


def test_a_third_of_the_images_copied_is_enough(slices):
    train, heldout, unseen = parts(slices, seed=1)
    images = unseen.images.clone()
    images[:10] = train.images[:10] + 0.02  # brighter, so that none is exact
    result = check_memorisation(painted(unseen, images.clamp(0, 1)), train, heldout, resamples=100)
    assert result.flagged and result.spaces["pixels"].exact == 0
    assert {pair["generated"] for pair in result.spaces["pixels"].closest} <= set(range(10))


def test_a_training_lesion_that_was_moved_with_its_surroundings_is_found_in_features(slices):
    train, heldout, unseen = parts(slices, seed=2)
    images, masks = (torch.roll(x[:30], (8, -8), (2, 3)) for x in (train.images, train.masks))
    condition = ImageSet(images, unseen.case_ids, masks)
    result = check_memorisation(painted(condition, images), train, heldout, resamples=100)
    assert result.flagged and "in features" in result.reason.lower()
    assert result.spaces["pixels"].p_value > 0.01
    hits = [pair["train"] == pair["generated"] for pair in result.spaces["features"].closest]
    assert np.mean(hits) >= 0.75


def test_smooth_and_bad_models_are_closer_than_real_images_yet_no_copiers(slices):
    train, heldout, unseen = parts(slices, seed=3)
    mean = train.images.mean(0, keepdim=True).expand_as(unseen.images)
    models = {"blurred": blur(unseen.images, 2), "constant": torch.full_like(mean, 0.4), "mean": mean}
    for name, images in models.items():
        result = check_memorisation(painted(unseen, images), train, heldout, resamples=100)
        # The distance alone would have called each of them a copier.
        assert result.spaces["pixels"].closer.low > 0.6, name
        assert result.spaces["pixels"].below_p5.value > 0.2, name
        assert not result.flagged, (name, result.reason)
        assert "closer to the training set" in result.reason


def test_an_honest_model_is_rarely_flagged(slices):
    repeats, alarms = 60, 0
    for seed in range(repeats):
        train, heldout, unseen = parts(slices, seed=100 + seed)
        result = check_memorisation(unseen, train, heldout, resamples=2)
        alarms += result.flagged
        assert result.verdict in ("no sign of copying", "copies")
    # 1 % is allowed; three in 60 come by chance in 2 % of such runs at that rate.
    assert alarms <= 3, alarms


def test_held_out_images_against_themselves_are_not_flagged(slices):
    train, heldout, _ = parts(slices, seed=4)
    result = check_memorisation(heldout, train, heldout, resamples=100)
    assert not result.flagged
    for near in result.spaces.values():
        assert near.p_value == 1 and near.closer.value == 0.5


def test_a_background_shared_with_the_training_set_does_not_count(slices):
    train, heldout, unseen = parts(slices, seed=5)
    # Made for training cases: all but the mask is the training image, and the mask shows tissue of another patient.
    condition = ImageSet(train.images[:30], train.case_ids[:30], train.masks[:30])
    honest = painted(condition, unseen.images)
    result = check_memorisation(honest, train, heldout, resamples=100)
    assert not result.flagged and result.n_own_case == 30
    unmasked = dataclasses.replace(honest, masks=None, features=None)
    with pytest.raises(ValueError, match="not repainted equals the training image by construction"):
        check_memorisation(unmasked, train, dataclasses.replace(heldout, masks=None))
    # The training image itself in the mask is copying; an accurate model looks the same, and the report says so.
    itself = painted(condition, train.images[:30])
    result = check_memorisation(itself, train, heldout, resamples=100)
    assert result.flagged and "accurate model" in result.reason
    assert not check_memorisation(itself, train, heldout, resamples=100, exclude_own_case=True).flagged


def test_two_slices_of_a_copied_case_do_not_hide_the_copy(slices):
    train, heldout, unseen = parts(slices, seed=6)
    noise = 0.01 * torch.randn(train.images.shape, generator=torch.Generator().manual_seed(6))
    doubled = ImageSet(
        torch.cat([train.images, (train.images + noise).clamp(0, 1)]),
        np.tile(train.case_ids, 2),
        train.masks.repeat(2, 1, 1, 1),
    )
    result = check_memorisation(painted(unseen, train.images[:30]), doubled, heldout, resamples=100)
    assert result.flagged and result.spaces["pixels"].ratio.value < SUSPECT_RATIO


def test_few_cases_give_no_verdict_and_what_cannot_be_compared_is_refused(slices):
    train, heldout, unseen = parts(slices, seed=7, sizes=(90, 9, 9))
    result = check_memorisation(unseen, train, heldout, resamples=20)
    assert (result.flagged, result.verdict) == (False, "cannot say")
    json.dumps(dataclasses.asdict(result))
    with pytest.raises(ValueError, match="`heldout` shares 9 case"):
        check_memorisation(unseen, ImageSet(heldout.images, heldout.case_ids), heldout)
    with pytest.raises(ValueError, match="give both"):
        check_memorisation(unseen, train, dataclasses.replace(heldout, masks=None))
    with pytest.raises(ValueError, match="`generated` has"):
        check_memorisation(dataclasses.replace(unseen, case_ids=["a"]), train, heldout)


def test_real_chest_radiographs_of_other_patients_are_not_flagged_and_copies_are():
    folder = os.environ.get("ONEREWARD_DATA")
    if not folder:
        pytest.skip("ONEREWARD_DATA is not set")
    from pathlib import Path

    from PIL import Image

    files = sorted((Path(folder) / "cxr_nih64").rglob("*.png"))
    if not files:
        pytest.skip("the chest radiographs are not there")
    # The files are named patient_number; a patient is a case.
    chosen = files[:: max(1, len(files) // 600)]
    images = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("L"))) for f in chosen])[:, None]
    patients = np.array([f.stem.split("_")[0] for f in chosen])
    cases = np.random.default_rng(0).permutation(np.unique(patients))
    sets = [
        ImageSet(images[rows], patients[rows])
        for rows in (np.isin(patients, part) for part in np.split(cases, [len(cases) // 2, 3 * len(cases) // 4]))
    ]
    train, heldout, unseen = sets
    assert not check_memorisation(unseen, train, heldout, resamples=100).flagged
    some = min(len(unseen.images), len(train.images))
    copies = ImageSet(train.images[:some], [f"g{i}" for i in range(some)])
    assert check_memorisation(copies, train, heldout, resamples=100).flagged


@pytest.mark.slow
def test_ten_thousand_against_ten_thousand_fit_in_a_gigabyte():
    script = """
import resource, torch
from onereward.evaluation.memorisation import nearest_training_images
x, y = torch.randint(0, 256, (2, 10000, 1, 64, 64), dtype=torch.uint8)
masks = torch.zeros(10000, 1, 64, 64, dtype=torch.uint8)
masks[..., 16:48, 16:48] = 1
nearest_training_images(x, y, range(10000), masks=masks)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(output.stdout) < 1.0  # GiB
