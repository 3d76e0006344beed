"""The measures agree with scikit-image, MONAI and scikit-learn, and every empty case has a defined result."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from skimage.transform import downscale_local_mean

from onereward.evaluation.bootstrap import measured_mean
from onereward.evaluation.metrics import (
    MS_SSIM_WEIGHTS,
    dice,
    image_measures,
    kernel_distance,
    mae,
    masked_mae,
    masked_ms_ssim,
    masked_psnr,
    masked_rmse,
    masked_ssim,
    ms_ssim,
    ms_ssim_scales,
    polynomial_kernel,
    psnr,
    rmse,
    ssim,
    ssim_map,
)


def random_pair(seed, shape=(3, 2, 37, 45)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    return x, (x + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1)


def skimage_map(x, y, data_range=1.0):
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": data_range}
    return structural_similarity(x.double().numpy(), y.double().numpy(), full=True, **settings)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_and_its_map_equal_scikit_image(data_range):
    x, y = random_pair(0)
    x, y = x * data_range, y * data_range
    values, means = ssim_map(x, y, data_range=data_range), ssim(x, y, data_range=data_range)
    for b in range(3):
        expected = [skimage_map(x[b, c], y[b, c], data_range) for c in range(2)]
        np.testing.assert_allclose(values[b], np.stack([full for _, full in expected]), atol=1e-10)
        np.testing.assert_allclose(means[b], np.mean([mean for mean, _ in expected]), atol=1e-10)


def test_a_thousand_pairs_agree_with_scikit_image():
    x, y = random_pair(20, (1000, 1, 64, 64))
    figures = image_measures(x, y)
    for i in range(1000):
        a, b = x[i, 0].double().numpy(), y[i, 0].double().numpy()
        expected = {
            "mae": np.abs(a - b).mean(),
            "rmse": mean_squared_error(b, a) ** 0.5,
            "psnr": peak_signal_noise_ratio(b, a, data_range=1),
            "ssim": skimage_map(x[i, 0], y[i, 0])[0],
        }
        for name, value in expected.items():
            assert figures[name][i].item() == pytest.approx(value, abs=1e-10), name


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_image_measure_agrees_with_monai(number):
    from monai.metrics import MAEMetric, MultiScaleSSIMMetric, PSNRMetric, RMSEMetric, SSIMMetric

    x, y = random_pair(32, (number, 1, 64, 64))
    figures = image_measures(x, y)
    weights = np.array(MS_SSIM_WEIGHTS[:3]) / sum(MS_SSIM_WEIGHTS[:3])
    metrics = {
        "mae": MAEMetric(),
        "rmse": RMSEMetric(),
        "psnr": PSNRMetric(max_val=1.0),
        "ssim": SSIMMetric(spatial_dims=2),
        "ms_ssim": MultiScaleSSIMMetric(spatial_dims=2, weights=weights),
    }
    for name, metric in metrics.items():
        np.testing.assert_allclose(figures[name], metric(x, y).flatten(), atol=1e-4, err_msg=name)
    assert figures["ms_ssim_scales"].tolist() == [3] * number


@pytest.mark.parametrize("shape", [(2, 1, 14, 17, 23), (1, 2, 11, 12, 13)])
def test_volumes_agree_with_scikit_image_and_monai(shape):
    from monai.metrics.regression import SSIMMetric

    x, y = random_pair(21, shape)
    values, means = ssim_map(x, y, spatial_dims=3), ssim(x, y, spatial_dims=3)
    np.testing.assert_allclose(means, SSIMMetric(spatial_dims=3)(x, y).flatten(), atol=1e-5)
    mask = (torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(22)) > 0.8).float()
    inside = masked_ssim(x, y, mask, spatial_dims=3)
    for b in range(shape[0]):
        oracle = [skimage_map(x[b, c], y[b, c]) for c in range(shape[1])]
        np.testing.assert_allclose(values[b], np.stack([full for _, full in oracle]), atol=1e-10)
        np.testing.assert_allclose(means[b], np.mean([mean for mean, _ in oracle]), atol=1e-10)
        # Equal weights, because the mask is the same for both channels.
        pasted = torch.where(mask[b] > 0, x[b], y[b])
        full = [skimage_map(pasted[c], y[b, c])[1][mask[b, 0].bool().numpy()].mean() for c in range(shape[1])]
        np.testing.assert_allclose(inside[b], np.mean(full), atol=1e-10)
        assert psnr(x, y, spatial_dims=3)[b].item() == pytest.approx(
            peak_signal_noise_ratio(y[b].double().numpy(), x[b].double().numpy(), data_range=1), abs=1e-10
        )


@pytest.mark.parametrize("shape,scales", [((2, 1, 176, 180), 5), ((1, 1, 48, 50, 44), 3), ((2, 3, 65, 99), 3)])
def test_ms_ssim_equals_monai_with_the_weights_of_as_many_scales(shape, scales):
    from monai.metrics import MultiScaleSSIMMetric

    x, y = random_pair(23, shape)
    dims = len(shape) - 2
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    values, number = ms_ssim(x, y, spatial_dims=dims)
    assert number == scales
    expected = MultiScaleSSIMMetric(spatial_dims=dims, weights=weights)(x, y).flatten()
    np.testing.assert_allclose(values, expected, atol=1e-4)  # MONAI calculates in float32


@pytest.mark.parametrize("shape", [(2, 1, 89, 95), (1, 2, 25, 22, 23)])
def test_ms_ssim_equals_scipys_filters_in_float64(shape):
    x, y = random_pair(31, shape)
    dims = len(shape) - 2
    values, scales = ms_ssim(x, y, spatial_dims=dims)
    assert scales == {2: 4, 3: 2}[dims]
    for b in range(shape[0]):
        terms, axes = [], tuple(range(1, dims + 1))
        p, t = x[b].double().numpy(), y[b].double().numpy()
        inner = (slice(None), *[slice(5, -5)] * dims)
        for scale in range(scales):

            def blur(a):
                return ndimage.gaussian_filter(a, 1.5, axes=axes, truncate=3.5)[inner]  # noqa: B023

            mp, mt = blur(p), blur(t)
            contrast = (2 * (blur(p * t) - mp * mt) + 9e-4) / (blur(p * p) - mp**2 + blur(t * t) - mt**2 + 9e-4)
            luminance = (2 * mp * mt + 1e-4) / (mp**2 + mt**2 + 1e-4)
            terms.append((contrast * luminance if scale == scales - 1 else contrast).mean())
            whole = (slice(None), *[slice(0, n - n % 2) for n in p.shape[1:]])
            p, t = (downscale_local_mean(a[whole], (1, *[2] * dims)) for a in (p, t))
        weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
        np.testing.assert_allclose(values[b], np.prod(np.array(terms) ** weights), rtol=1e-10)


def test_ms_ssim_has_as_many_scales_as_have_a_full_window():
    assert [ms_ssim_scales((size, 300)) for size in (10, 11, 21, 22, 44, 64, 88, 175, 176, 1024)] == [
        *(0, 1, 1, 2, 3, 3, 4, 4, 5, 5)
    ]
    x, y = random_pair(24, (2, 1, 15, 15))
    values, scales = ms_ssim(x, y)
    assert scales == 1
    np.testing.assert_allclose(values, ssim(x, y), rtol=1e-12)


def test_ms_ssim_of_opposites_is_zero_not_nan():
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(25))
    assert ms_ssim(x, 1 - x)[0].item() == 0


def test_masked_ms_ssim_sees_the_region_alone_at_every_scale():
    x, y = random_pair(26, (3, 1, 47, 47))
    mask = torch.zeros(3, 1, 47, 47)
    mask[0, :, 20:30, 20:30] = 1
    mask[1, :, 46, 46] = 1  # in the odd last row and column, which halving would drop
    values, scales = masked_ms_ssim(x, y, mask)
    assert scales == 3
    assert ((values > 0) & (values < 1)).tolist() == [True, True, False]
    assert values[2].isnan()
    vandalised = torch.where(mask > 0, x, 1 - x)
    assert torch.equal(masked_ms_ssim(vandalised, y, mask)[0][:2], values[:2])
    np.testing.assert_allclose(masked_ms_ssim(y, y, mask)[0][:2], 1, rtol=1e-12)
    single = masked_ms_ssim(x[..., :20, :20], y[..., :20, :20], torch.ones(3, 1, 20, 20))
    assert single[1] == 1
    np.testing.assert_allclose(single[0], ssim_map(x[..., :20, :20], y[..., :20, :20]).flatten(1).mean(1), rtol=1e-12)


def test_a_volume_is_never_measured_as_a_picture_with_many_colours():
    volume = torch.rand(1, 24, 20, 22)
    for measure in (mae, rmse, psnr, ssim, ssim_map, ms_ssim, image_measures):
        with pytest.raises(ValueError, match="24 channels"):
            measure(volume, volume)
        with pytest.raises(ValueError, match="axis for the channels"):
            measure(volume, volume, spatial_dims=3)
        with pytest.raises(ValueError, match="must be"):
            measure(volume[:, None], volume[:, None])
        measure(volume[:, None], volume[:, None], spatial_dims=3)
    with pytest.raises(ValueError, match="`spatial_dims` is 1"):
        mae(volume, volume, spatial_dims=1)


def test_what_would_broadcast_or_has_the_wrong_range_is_refused():
    x = torch.rand(2, 1, 16, 16)
    with pytest.raises(ValueError, match="`targets` have shape"):
        mae(x, x[:1])
    with pytest.raises(ValueError, match="`masks` have shape"):
        masked_mae(x, x, torch.ones(2, 16, 16))
    with pytest.raises(ValueError, match="floating point"):
        psnr((255 * x).byte(), x)
    for shifted in (x - 0.5, 255 * x):
        with pytest.raises(ValueError, match="`targets` range over"):
            ssim(shifted, shifted)
    assert ssim(x + 3, x)[0] < 0.9  # a prediction out of range is measured as it is


def test_each_tiny_constant_and_identical_case_has_its_result():
    constant = torch.full((1, 1, 24, 24), 0.3)
    x = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(27))
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 3, 4] = 1
    for image in (x, constant, torch.zeros_like(x)):
        for figures in (image_measures(image, image), image_measures(image, image, mask)):
            assert figures["mae"] == 0
            assert figures["rmse"] == 0
            assert figures["psnr"] == float("inf")
            assert figures["ssim"].item() == pytest.approx(1, abs=1e-12)
            assert figures["ms_ssim"].item() == pytest.approx(1, abs=1e-12)
    # Of two constants only the luminance differs.
    c1, other = 0.01**2, torch.full((1, 1, 24, 24), 0.7)
    luminance = (2 * 0.3 * 0.7 + c1) / (0.3**2 + 0.7**2 + c1)
    weight = MS_SSIM_WEIGHTS[1] / (MS_SSIM_WEIGHTS[0] + MS_SSIM_WEIGHTS[1])
    assert ms_ssim(constant, other)[0].item() == pytest.approx(luminance**weight, rel=1e-6)
    # One masked pixel.
    figures = image_measures(constant, other, mask)
    assert figures["mae"].item() == figures["rmse"].item() == pytest.approx(0.4, rel=1e-6)
    assert figures["psnr"].item() == pytest.approx(-20 * np.log10(0.4), rel=1e-6)
    # Too small for one window: an error, not a 1.
    tiny = torch.rand(1, 1, 8, 8)
    for measure in (ssim, ssim_map, ms_ssim, image_measures):
        with pytest.raises(ValueError, match="8 x 8 pixels, smaller than"):
            measure(tiny, tiny)
    assert mae(tiny, tiny) == 0
    assert psnr(tiny, tiny) == float("inf")


def test_identical_and_broken_images_count_as_failed_and_are_not_averaged():
    x, y = random_pair(28, (4, 1, 16, 16))
    x[0], x[1] = y[0], torch.nan
    counted = measured_mean(psnr(x, y).numpy(), ["a", "b", "c", "d"])
    assert (counted.n, counted.n_failed) == (2, 2)
    assert counted.value == pytest.approx(psnr(x, y)[2:].mean().item())
    for name, values in image_measures(x, y).items():
        assert values[1].isnan() or name == "ms_ssim_scales"
        assert values[2:].isfinite().all()


def test_figures_do_not_depend_on_the_batch_they_came_in():
    x, y = random_pair(29, (5, 1, 33, 40))
    mask = (torch.rand(5, 1, 33, 40, generator=torch.Generator().manual_seed(30)) > 0.6).float()
    whole = image_measures(x, y, mask)
    for i in range(5):
        for name, values in image_measures(x[i : i + 1], y[i : i + 1], mask[i : i + 1]).items():
            assert values.dtype == torch.float64
            assert values[0].item() == pytest.approx(whole[name][i].item(), rel=1e-12)


def test_ssim_equals_monai():
    from monai.metrics.regression import SSIMMetric

    x, y = random_pair(1, (4, 1, 40, 40))
    expected = SSIMMetric(spatial_dims=2, data_range=1.0)(x, y).flatten()
    np.testing.assert_allclose(ssim(x, y), expected, atol=1e-5)


def test_masked_ssim_is_the_map_of_the_pasted_region_averaged_over_the_mask():
    x, y = random_pair(2, (2, 1, 30, 30))
    mask = torch.zeros(2, 1, 30, 30)
    mask[0, :, :8, :5] = 1  # touches two edges of the field, as `extend` does
    mask[1, :, 12:20, 9:25] = 1
    values = masked_ssim(x, y, mask)
    for b in range(2):
        inside = mask[b, 0].bool().numpy()
        pasted = torch.where(mask[b, 0] > 0, x[b, 0], y[b, 0])
        _, full = skimage_map(pasted, y[b, 0])
        np.testing.assert_allclose(values[b], full[inside].mean(), atol=1e-10)


def test_masked_ssim_ignores_what_lies_outside_the_mask():
    x, y = random_pair(3, (1, 1, 24, 24))
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 6:14, 6:14] = 1
    vandalised = torch.where(mask > 0, x, 1 - x)
    assert torch.equal(masked_ssim(x, y, mask), masked_ssim(vandalised, y, mask))
    assert masked_ssim(y, y, mask).item() == pytest.approx(1, abs=1e-12)


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    c1 = 0.01**2
    expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-6)


def test_ssim_refuses_images_smaller_than_the_window():
    tiny = torch.rand(1, 1, 10, 40)
    with pytest.raises(ValueError, match="smaller than the 11 pixel window"):
        ssim(tiny, tiny)
    assert ssim(tiny, tiny, window_size=9).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="odd"):
        ssim(tiny, tiny, window_size=8)


def test_masked_errors_equal_numpy_on_the_masked_pixels():
    x, y = random_pair(4)
    mask = (torch.rand(3, 1, 37, 45, generator=torch.Generator().manual_seed(5)) > 0.7).float()
    absolute, root, decibels = masked_mae(x, y, mask), masked_rmse(x, y, mask), masked_psnr(x, y, mask)
    for b in range(3):
        inside = np.broadcast_to(mask[b].bool().numpy(), (2, 37, 45))
        error = (x[b].double() - y[b].double()).numpy()[inside]
        np.testing.assert_allclose(absolute[b], np.abs(error).mean(), rtol=1e-12)
        np.testing.assert_allclose(decibels[b], -10 * np.log10((error**2).mean()), rtol=1e-12)
        np.testing.assert_allclose(root[b], np.sqrt((error**2).mean()), rtol=1e-12)


def test_psnr_equals_monai_when_the_mask_covers_the_image():
    from monai.metrics.regression import PSNRMetric

    x, y = random_pair(6)
    expected = PSNRMetric(max_val=1.0)(x, y).flatten()
    np.testing.assert_allclose(masked_psnr(x, y, torch.ones(3, 1, 37, 45)), expected, rtol=1e-5)


def test_empty_mask_is_undefined_and_identical_images_have_infinite_psnr():
    x, y = random_pair(7, (2, 1, 16, 16))
    mask = torch.zeros(2, 1, 16, 16)
    mask[1] = 1
    for measure in (masked_mae, masked_rmse, masked_psnr, masked_ssim):
        assert measure(x, y, mask).isnan().tolist() == [True, False]
    assert masked_psnr(x, x, mask)[1] == float("inf")


def test_dice_equals_monai_and_defines_the_empty_cases():
    from monai.metrics import DiceMetric

    generator = torch.Generator().manual_seed(8)
    a = torch.randint(0, 4, (5, 12, 12), generator=generator)
    b = torch.randint(0, 4, (5, 12, 12), generator=generator)
    a[0][a[0] == 1] = 0
    b[0][b[0] == 1] = 0  # neither has label 1
    a[1][a[1] == 2] = 0  # only the reference has label 2
    b[2][b[2] == 3] = 0  # only the prediction has label 3: a false alarm
    values = dice(a, b, [1, 2, 3])
    assert values[0, 0].isnan()
    assert values[1, 1] == 0
    assert values[2, 2] == 0
    assert values.isnan().sum() == 1

    def one_hot(labels):
        return torch.nn.functional.one_hot(labels, 4).movedim(-1, 1)

    monai = DiceMetric(include_background=False, ignore_empty=True)(one_hot(a), one_hot(b))
    both = ~monai.isnan()
    np.testing.assert_allclose(values[both], monai[both], rtol=1e-6)


def test_kernel_distance_equals_the_double_sum_with_scikit_learns_kernel():
    from sklearn.metrics.pairwise import polynomial_kernel as oracle

    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(7, 5)), rng.normal(0.5, 1, size=(9, 5))
    kxx, kyy, kxy = oracle(x, degree=3), oracle(y, degree=3), oracle(x, y, degree=3)
    expected = (kxx.sum() - np.trace(kxx)) / 42 + (kyy.sum() - np.trace(kyy)) / 72 - 2 * kxy.mean()
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    np.testing.assert_allclose(polynomial_kernel(x, y), kxy, rtol=1e-12)
    np.testing.assert_allclose(kernel_distance(x, y), expected, rtol=1e-10)


def test_kernel_distance_is_unbiased_and_grows_with_a_shift():
    generator = torch.Generator().manual_seed(10)
    same = torch.stack(
        [
            kernel_distance(torch.randn(20, 4, generator=generator), torch.randn(20, 4, generator=generator))
            for _ in range(400)
        ]
    )
    standard_error = same.std() / 20
    assert same.mean().abs() < 4 * standard_error
    assert (same < 0).any()
    shifted = kernel_distance(torch.randn(20, 4, generator=generator) + 1, torch.randn(20, 4, generator=generator))
    assert shifted > same.max()


def test_kernel_distance_weights_count_rows_without_pairing_copies():
    generator = torch.Generator().manual_seed(11)
    x, y = torch.randn(6, 3, generator=generator), torch.randn(8, 3, generator=generator)
    dropped = torch.tensor([[1.0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    values = kernel_distance(x, y, weights=dropped, reference_weights=torch.ones(2, 8))
    np.testing.assert_allclose(values, [kernel_distance(x[:4], y), kernel_distance(x, y)], rtol=1e-12)
    doubled = kernel_distance(x, y, weights=torch.full((6,), 2.0))
    np.testing.assert_allclose(doubled, kernel_distance(x, y), rtol=1e-12)
    assert kernel_distance(x[:1], y).isnan()
