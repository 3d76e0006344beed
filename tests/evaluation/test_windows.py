"""Windows end where they say, report their bounds, and have no opinion on images without a range."""

import numpy as np
import pytest
import torch

from onereward.evaluation.windows import (
    HU_WINDOWS,
    hu_window,
    percentile_bounds,
    percentile_window,
    scale_to_bounds,
)


@pytest.mark.parametrize("name", HU_WINDOWS)
def test_a_named_window_is_black_grey_and_white_where_level_and_width_say(name):
    level, width = HU_WINDOWS[name]
    hu = torch.tensor([[-3024.0, level - width / 2, level, level + width / 2, 3071.0]]).view(1, 1, 1, 5)
    scaled, bounds = hu_window(hu, name)
    assert scaled.flatten().tolist() == [0, 0, 0.5, 1, 1]
    assert bounds.tolist() == [[level - width / 2, level + width / 2]]


def test_hu_window_equals_monai():
    from monai.transforms import ScaleIntensityRange

    volume = torch.linspace(-1200, 1500, 1000).view(1, 1, 10, 10, 10)
    expected = ScaleIntensityRange(a_min=-160, a_max=240, b_min=0, b_max=1, clip=True)(volume)
    np.testing.assert_allclose(hu_window(volume, (40, 400))[0], expected, atol=1e-6)


def test_percentile_window_equals_monai_and_numpy_image_by_image():
    from monai.transforms import ScaleIntensityRangePercentiles

    images = torch.randn(3, 2, 21, 33, generator=torch.Generator().manual_seed(0)) * 300 + 1000
    scaled, bounds = percentile_window(images, 1, 99)
    for image, mapped, ends in zip(images, scaled, bounds, strict=True):
        np.testing.assert_allclose(ends, np.percentile(image.double().numpy(), [1, 99]), rtol=1e-12)
        expected = ScaleIntensityRangePercentiles(lower=1, upper=99, b_min=0, b_max=1, clip=True)(image)
        np.testing.assert_allclose(mapped, expected, atol=1e-5)


def test_the_foreground_alone_decides():
    image = torch.zeros(1, 1, 20, 20)
    image[..., 5:15, 5:15] = torch.linspace(100, 200, 100).view(10, 10)
    inside = percentile_bounds(image, 0, 100, foreground=image > 0)
    assert inside.tolist() == [[100, 200]]
    assert percentile_bounds(image, 0, 100).tolist() == [[0, 200]]
    assert percentile_bounds(image, foreground=torch.zeros(1, 1, 20, 20)).isnan().all()


def test_the_generated_image_is_scaled_by_the_bounds_of_the_real_one():
    real = torch.linspace(0, 100, 101).view(1, 1, 1, 101)
    generated = torch.full_like(real, 50)
    generated[..., 0] = 10_000  # an outlier that bounds of its own would follow
    _, bounds = percentile_window(real, 0, 100)
    assert scale_to_bounds(generated, bounds).flatten()[:2].tolist() == [1, 0.5]


def test_an_image_without_a_range_is_nan_and_spoils_no_other():
    images = torch.stack([torch.full((1, 4, 4), 7.0), torch.arange(16.0).view(1, 4, 4)])
    scaled, bounds = percentile_window(images)
    assert scaled[0].isnan().all()
    assert bounds[0].tolist() == [7, 7]
    assert scaled[1].isfinite().all()


def test_pixels_that_are_not_finite_do_not_move_the_bounds():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    broken = image.clone()
    broken[..., 0, 0], broken[..., 3, 3] = torch.nan, torch.inf
    assert percentile_bounds(broken, 0, 100).tolist() == [[1, 14]]
    assert percentile_bounds(torch.full((1, 1, 2, 2), torch.nan)).isnan().all()


def test_integers_and_doubles_are_mapped_without_loss():
    assert hu_window(torch.tensor([[-1000, 40, 3000]], dtype=torch.int16), "brain")[0].tolist() == [[0, 0.5, 1]]
    assert hu_window(torch.zeros(1, 2).double(), "brain")[0].dtype == torch.float64


@pytest.mark.parametrize("window,message", [("heart", "expected one of"), ((40, 0), "width must be positive")])
def test_an_unknown_window_is_refused(window, message):
    with pytest.raises(ValueError, match=message):
        hu_window(torch.zeros(1, 4), window)


def test_arguments_that_do_not_fit_are_refused():
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="`lower` is 99"):
        percentile_window(images, 99, 1)
    with pytest.raises(ValueError, match="`foreground` has shape"):
        percentile_window(images, foreground=torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="`bounds` have shape"):
        scale_to_bounds(images, torch.zeros(1, 2))
