"""The measures agree with scikit-image, MONAI and scikit-learn, and every empty case has a defined result."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from onereward.evaluation.metrics import (
    dice,
    kernel_distance,
    masked_mae,
    masked_psnr,
    masked_ssim,
    polynomial_kernel,
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
    mae, psnr = masked_mae(x, y, mask), masked_psnr(x, y, mask)
    for b in range(3):
        inside = np.broadcast_to(mask[b].bool().numpy(), (2, 37, 45))
        error = (x[b].double() - y[b].double()).numpy()[inside]
        np.testing.assert_allclose(mae[b], np.abs(error).mean(), rtol=1e-12)
        np.testing.assert_allclose(psnr[b], -10 * np.log10((error**2).mean()), rtol=1e-12)


def test_psnr_equals_monai_when_the_mask_covers_the_image():
    from monai.metrics.regression import PSNRMetric

    x, y = random_pair(6)
    expected = PSNRMetric(max_val=1.0)(x, y).flatten()
    np.testing.assert_allclose(masked_psnr(x, y, torch.ones(3, 1, 37, 45)), expected, rtol=1e-5)


def test_empty_mask_is_undefined_and_identical_images_have_infinite_psnr():
    x, y = random_pair(7, (2, 1, 16, 16))
    mask = torch.zeros(2, 1, 16, 16)
    mask[1] = 1
    for measure in (masked_mae, masked_psnr, masked_ssim):
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
