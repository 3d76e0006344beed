"""Distances between distributions agree with other libraries, and real images are never far from real images."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from onereward.evaluation.distributions import (
    compare_distributions,
    compare_planes,
    frechet_distance,
    gaussian_kernel,
    mean_pairwise_distance,
    median_distance,
    pair_similarity,
    precision_recall_density_coverage,
    vendi_score,
)
from onereward.evaluation.features import FeatureSet
from onereward.evaluation.metrics import kernel_distance, ssim


def gaussian(rows, dimensions, seed, shift=0.0):
    return torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed)) + shift


def feature_set(features, rows_per_case=1, prefix="c"):
    cases = np.array([f"{prefix}{i // rows_per_case}" for i in range(len(features))])
    return FeatureSet(features, cases, len(features), 0, "test")


def clustered(cases, rows, dimensions, seed, shift=0.0):
    """Rows of a case share most of what they are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(cases, 1, dimensions, generator=generator)
    return (centres + 0.3 * torch.randn(cases, rows, dimensions, generator=generator)).flatten(0, 1) + shift


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dimensions", [2, 16, 64])
def test_frechet_distance_equals_monai(dimensions):
    from monai.metrics.fid import FIDMetric

    mix = gaussian(dimensions, dimensions, 0).double()
    x, y = gaussian(500, dimensions, 1).double() @ mix, gaussian(400, dimensions, 2, shift=0.3).double()
    expected = float(FIDMetric()(x, y))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_rows_than_features_equals_the_eigenvalues_of_the_product():
    x, y = gaussian(12, 40, 3).double(), gaussian(9, 40, 4, shift=0.5).double()
    s, t = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.sqrt(np.clip(np.linalg.eigvals(s @ t).real, 0, None)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(s) + np.trace(t) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_a_shift_is_its_square_and_of_one_row_undefined():
    x = gaussian(300, 5, 5)
    assert frechet_distance(x, x + 2) == pytest.approx(20, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    constant = torch.ones(10, 5)  # covariance 0
    assert frechet_distance(constant, constant + 1) == pytest.approx(5)
    assert np.isnan(frechet_distance(x, x[:1]))


def test_gaussian_mmd_equals_the_double_sum_with_scikit_learns_kernel():
    from scipy.spatial.distance import pdist
    from sklearn.metrics.pairwise import rbf_kernel

    x, y = gaussian(7, 5, 6), gaussian(9, 5, 7, shift=0.5)
    bandwidth = median_distance(y)
    assert bandwidth == pytest.approx(np.median(pdist(y.double().numpy())))
    kxx, kyy, kxy = (rbf_kernel(a.double(), b.double(), gamma=0.5 / bandwidth**2) for a, b in ((x, x), (y, y), (x, y)))
    expected = (kxx.sum() - 7) / 42 + (kyy.sum() - 9) / 72 - 2 * kxy.mean()
    assert float(kernel_distance(x, y, kernel=gaussian_kernel(bandwidth))) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dimensions", [3, 80])
def test_precision_recall_density_and_coverage_equal_scikit_learns_neighbours(dimensions):
    from sklearn.neighbors import NearestNeighbors

    k = 4
    real, fake = gaussian(60, dimensions, 8).numpy(), gaussian(45, dimensions, 9, shift=0.3).numpy()
    radius = NearestNeighbors(n_neighbors=k + 1).fit(real).kneighbors(real)[0][:, -1]
    fake_radius = NearestNeighbors(n_neighbors=k + 1).fit(fake).kneighbors(fake)[0][:, -1]
    index = NearestNeighbors().fit(fake)
    in_real_ball = [index.radius_neighbors(real[[i]], radius[i], return_distance=False)[0] for i in range(60)]
    index = NearestNeighbors().fit(real)
    in_fake_ball = [index.radius_neighbors(fake[[i]], fake_radius[i], return_distance=False)[0] for i in range(45)]
    values = precision_recall_density_coverage(torch.from_numpy(fake), torch.from_numpy(real), k)
    assert values["precision"] == pytest.approx(len(np.unique(np.concatenate(in_real_ball))) / 45)
    assert values["recall"] == pytest.approx(len(np.unique(np.concatenate(in_fake_ball))) / 60)
    assert values["density"] == pytest.approx(sum(map(len, in_real_ball)) / 45 / k)
    assert values["coverage"] == pytest.approx(np.mean([len(ball) > 0 for ball in in_real_ball]))
    too_few = precision_recall_density_coverage(torch.from_numpy(fake[:k]), torch.from_numpy(real), k)
    assert np.isnan(list(too_few.values())).all()


def test_precision_recall_density_and_coverage_equal_the_authors_package():
    prdc = pytest.importorskip("prdc")
    real, fake = gaussian(80, 6, 10).double(), gaussian(70, 6, 11, shift=0.4).double()
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    values = precision_recall_density_coverage(fake, real)
    assert values == pytest.approx({name: expected[name] for name in values})


def test_vendi_score_counts_different_images():
    assert vendi_score(torch.ones(8, 3)) == pytest.approx(1)
    assert vendi_score(torch.eye(6)) == pytest.approx(6)
    assert vendi_score(torch.eye(6).repeat(5, 1)) == pytest.approx(6)
    # Three of four alike: the entropy of (3/4, 1/4).
    alike = torch.tensor([[1.0, 0], [2, 0], [3, 0], [0, 1]])
    assert vendi_score(alike) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    assert np.isnan(vendi_score(torch.zeros(0, 3)))


@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_vendi_score_equals_the_entropy_of_scikit_learns_cosines(shape):
    from scipy.stats import entropy
    from sklearn.metrics.pairwise import cosine_similarity

    x = gaussian(*shape, 12).double()
    eigenvalues = np.clip(np.linalg.eigvalsh(cosine_similarity(x) / len(x)), 0, None)
    assert vendi_score(x) == pytest.approx(np.exp(entropy(eigenvalues)), rel=1e-8)


def test_mean_pairwise_distance_is_between_cases():
    x, cases = gaussian(9, 3, 13).double().numpy(), np.array(list("aabbbccdd"))
    pairs = [(i, j) for i in range(9) for j in range(i) if cases[i] != cases[j]]
    expected = np.mean([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
    assert float(mean_pairwise_distance(torch.from_numpy(x), cases)) == pytest.approx(expected)
    half = torch.tensor([1.0] * 5 + [0] * 4)
    expected = float(mean_pairwise_distance(torch.from_numpy(x[:5]), cases[:5]))
    assert float(mean_pairwise_distance(torch.from_numpy(x), cases, half)) == pytest.approx(expected)
    assert mean_pairwise_distance(torch.from_numpy(x[:2]), cases[:2]).isnan()


def test_an_identity_model_scores_exactly_at_the_floor():
    # Outside small masks a repainted image is its source: without disjoint halves such a model would look better than
    # real images do.
    real = feature_set(clustered(30, 2, 4, seed=14), rows_per_case=2)
    compared = compare_distributions(real, real, resamples=40)
    for name, measure in compared.items():
        assert measure.matched.value == pytest.approx(measure.floor.value, abs=1e-9), name
        assert measure.matched.low == pytest.approx(measure.floor.low, abs=1e-9), name
    assert compared["frechet"].value.value == pytest.approx(0, abs=1e-6)
    assert compared["frechet"].floor.value > 0.1
    assert compared["kid"].value.value < compared["kid"].floor.value


def test_a_degradation_exceeds_the_floor_in_every_measure_that_should_see_it():
    real = feature_set(clustered(60, 2, 4, seed=15), rows_per_case=2)
    worse = feature_set(clustered(60, 2, 4, seed=16, shift=1.0), rows_per_case=2)
    compared = compare_distributions(worse, real, resamples=60)
    for name in ("frechet", "kid", "mmd"):
        assert compared[name].excess.low > 0, name
        assert compared[name].matched.low > compared[name].floor.high, name
    for name in ("precision", "density", "coverage"):
        assert compared[name].excess.high < 0, name
    assert compared["recall"].excess.value < 0  # the few outliers of the shifted ones have balls that reach far
    assert compared["diversity"].excess.low < 0 < compared["diversity"].excess.high  # shifted, not less varied


def test_a_collapsed_model_is_precise_but_neither_diverse_nor_covering():
    real = feature_set(gaussian(80, 4, 17))
    # Noise, so that its nearest neighbours are not at distance 0 of each other.
    one_image = feature_set(real.features[:1].repeat(80, 1) * 0.5 + 1e-4 * gaussian(80, 4, 18), prefix="g")
    compared = compare_distributions(one_image, real, resamples=40)
    assert compared["precision"].value.value == 1
    assert compared["recall"].value.value < 0.05
    assert compared["coverage"].value.value < 0.3
    assert compared["diversity"].value.value < 1e-3 < compared["diversity"].floor.low
    assert compared["vendi"].value.value == pytest.approx(1, abs=1e-3)


def coverage_of_intervals(repeats, shift, names, reference_cases=50):
    """How often the interval holds what such samples give on average (for `kid` and `mmd`: the truth itself)."""
    results = []
    for i in range(repeats):
        x = feature_set(clustered(50, 2, 3, seed=1000 + i, shift=shift), rows_per_case=2, prefix="g")
        y = feature_set(clustered(reference_cases, 2, 3, seed=5000 + i), rows_per_case=2, prefix="r")
        results.append(compare_distributions(x, y, resamples=60, seed=i))
    shares = {}
    for name in names:
        truth = np.mean([r[name].value.value for r in results])
        shares[name] = np.mean([r[name].value.low <= truth <= r[name].value.high for r in results])
    return shares


def test_intervals_cover_what_such_samples_give_on_average():
    # 60 halves and 60 repeats; four standard errors of 0.95 in 60 repeats are 0.11.
    shares = coverage_of_intervals(60, 1.0, ["frechet", "kid", "mmd", "density", "coverage", "diversity", "vendi"])
    for name, share in shares.items():
        assert share >= 0.84, (name, share)


def test_a_null_comparison_is_called_no_difference():
    repeats, held = 60, {}
    for i in range(repeats):
        x, y = (feature_set(clustered(40, 1, 3, seed=s + i), prefix=p) for s, p in ((2000, "g"), (7000, "r")))
        for name, measure in compare_distributions(x, y, resamples=60, seed=i).items():
            held.setdefault(name, []).append(measure.excess.low <= 0 <= measure.excess.high)
            if name in ("kid", "mmd"):  # without bias, so that 0 is the truth
                held.setdefault(f"{name} value", []).append(measure.value.low <= 0 <= measure.value.high)
    shares = {name: np.mean(values) for name, values in held.items()}
    assert np.mean(list(shares.values())) >= 0.95, shares
    assert min(shares.values()) >= 0.95 - 4 * (0.95 * 0.05 / repeats) ** 0.5, shares


def test_resampling_keeps_cases_together():
    # Ten copies of every row are ten rows of the same case, and tell nothing new.
    x, y = gaussian(40, 3, 20, shift=0.5), gaussian(40, 3, 21)
    once = compare_distributions(feature_set(x, prefix="g"), feature_set(y), resamples=100)
    copied = compare_distributions(
        feature_set(x.repeat_interleave(10, 0), 10, "g"), feature_set(y.repeat_interleave(10, 0), 10), resamples=100
    )
    for name in ("frechet", "diversity"):
        width, copied_width = (m[name].value.high - m[name].value.low for m in (once, copied))
        assert copied_width == pytest.approx(width, rel=0.1), name


def test_what_a_figure_rests_on_is_said():
    x, y = gaussian(30, 4, 22), gaussian(60, 4, 23)
    generated = dataclasses.replace(feature_set(x, prefix="g"), n_seen=500, n_failed=3)
    compared = compare_distributions(generated, feature_set(y), resamples=20)
    value = compared["frechet"].value
    assert (value.n, value.n_failed) == (30, 3)
    assert "30 images are under 10 x 4 features" in value.note and "a random 30 of 500 generated images" in value.note
    assert "10 x" not in compared["kid"].value.note
    few = compare_distributions(feature_set(x[:9], 3, "g"), feature_set(y), resamples=20)["kid"].value
    assert np.isnan(few.low) and "no interval" in few.note
    json.dumps({name: dataclasses.asdict(measure) for name, measure in compared.items()})


def test_sets_that_cannot_be_compared_are_refused():
    x = feature_set(gaussian(10, 4, 24))
    with pytest.raises(ValueError, match="describe both with the same extractor"):
        compare_distributions(x, dataclasses.replace(x, extractor="another"))
    with pytest.raises(ValueError, match="`generated` has 1 described"):
        compare_distributions(feature_set(gaussian(1, 4, 25)), x)
    with pytest.raises(ValueError, match="the planes"):
        compare_planes({"axial": x}, {"coronal": x})


def test_the_mean_of_the_planes_is_the_mean_of_their_figures():
    planes = ("axial", "coronal", "sagittal")
    generated = {p: feature_set(clustered(12, 6, 3, seed=30 + i, shift=0.4 * i), 6, "g") for i, p in enumerate(planes)}
    real = {p: feature_set(clustered(14, 6, 3, seed=40 + i), 6) for i, p in enumerate(planes)}
    result = compare_planes(generated, real, resamples=30)
    for name in ("frechet", "kid", "coverage"):
        alone = [compare_distributions(generated[p], real[p], resamples=30)[name] for p in planes]
        assert result["axial"][name] == alone[0]
        assert result["mean"][name].value.value == pytest.approx(np.mean([a.value.value for a in alone]))
        assert result["mean"][name].floor.value == pytest.approx(np.mean([a.floor.value for a in alone]))
    assert result["mean"]["kid"].value.n == 3 * 72


def test_pair_similarity_is_the_mean_over_all_pairs_of_different_cases():
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(50))
    cases = list("aabbcc")
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    apart = [(i, j) for i, j in pairs if cases[i] != cases[j]]
    together = [(i, j) for i, j in pairs if cases[i] == cases[j]]
    for chosen, same_case in ((apart, False), (together, True)):
        first, second = map(list, zip(*chosen, strict=True))
        measured = pair_similarity(images, cases, same_case=same_case, resamples=50, batch_size=5)
        assert measured.value == pytest.approx(ssim(images[first], images[second]).mean().item())
        assert measured.n == len(chosen)
    collapsed = pair_similarity(
        images[:1].expand(40, -1, -1, -1), [str(i) for i in range(40)], pairs=100, resamples=50
    )
    assert collapsed.value == pytest.approx(1) and collapsed.n == 100
    assert pair_similarity(images, list("abcdef"), same_case=True).n == 0
