"""Surface measures agree with MONAI and with brute force, and a region that one side lacks is never averaged away."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from skimage.metrics import hausdorff_distance

from onereward.evaluation.bootstrap import measured_mean
from onereward.evaluation.surface import surface, surface_distances, surface_measures


NAMES = ("hausdorff", "hd95", "average_surface_distance", "surface_dice")


def square(top, left, side=8, size=24):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, top : top + side, left : left + side] = True
    return mask


def random_regions(number, shape, seed):
    """Overlapping ellipsoids with ragged edges, never empty."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    masks = []
    for _ in range(number):
        centre = np.array([rng.uniform(0.3 * n, 0.7 * n) for n in shape])
        radius = np.array([rng.uniform(0.08 * n, 0.3 * n) for n in shape]) + 0.8
        masks.append((((grid - centre) / radius) ** 2).sum(-1) + rng.uniform(-0.3, 0.3, shape) < 1)
        masks[-1][tuple(centre.astype(int))] = True
    return torch.from_numpy(np.stack(masks))


@pytest.mark.parametrize(
    "number,shape,spacing",
    [
        pytest.param(1000, (64, 64), (1.0, 1.0), marks=pytest.mark.slow),  # MONAI's share is a minute
        (50, (64, 64), (1.0, 1.0)),
        (10, (30, 40), (0.5, 2.0)),
        (10, (12, 20, 16), (3.0, 1.0, 0.7)),
    ],
)
def test_surface_measures_equal_monai(number, shape, spacing):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    a, b = random_regions(number, shape, 0), random_regions(number, shape, 1)
    figures = surface_measures(a, b, [1], spacing=spacing, tolerance=1.5)
    x, y = a[:, None].float(), b[:, None].float()
    expected = {
        "hausdorff": compute_hausdorff_distance(x, y, include_background=True, spacing=spacing),
        "hd95": compute_hausdorff_distance(x, y, include_background=True, percentile=95, spacing=spacing),
        "average_surface_distance": compute_average_surface_distance(
            x, y, include_background=True, symmetric=True, spacing=spacing
        ),
        "surface_dice": compute_surface_dice(x, y, [1.5], include_background=True, spacing=spacing),
    }
    for name in NAMES:
        np.testing.assert_allclose(figures[name], expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("number,shape,spacing", [(1000, (64, 64), (2.0, 0.5)), (20, (9, 20, 14), (3.0, 1.0, 0.7))])
def test_distances_equal_brute_force(number, shape, spacing):
    for a, b in zip(random_regions(number, shape, 2).numpy(), random_regions(number, shape, 3).numpy(), strict=True):
        table = cdist(*[np.argwhere(surface(mask)) * spacing for mask in (a, b)])
        there, back = surface_distances(a, b, spacing)
        np.testing.assert_allclose(there, table.min(1), rtol=1e-12)
        np.testing.assert_allclose(back, table.min(0), rtol=1e-12)


def test_hausdorff_equals_scikit_image():
    a, b = random_regions(20, (20, 30), 4), random_regions(20, (20, 30), 5)
    values = surface_measures(a, b, [1], spacing=(1, 1))["hausdorff"]
    expected = [hausdorff_distance(surface(x), surface(y)) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(values[:, 0], expected)


def test_a_shifted_square_has_its_closed_form():
    figures = surface_measures(square(4, 4), square(4, 6), [1], spacing=(1.0, 3.0), tolerance=0.0)
    # The columns at both ends stick out by two pixels of 3 mm.
    assert figures["hausdorff"].item() == 6
    assert figures["hd95"].item() == 6
    # Of the 28 surface pixels of each, the 12 that top and bottom row share lie on the other's surface.
    assert figures["surface_dice"].item() == pytest.approx(12 / 28)


def test_the_edge_of_the_image_bounds_a_region():
    whole = torch.ones(1, 5, 5, dtype=torch.bool)
    assert surface(whole[0].numpy()).sum() == 16
    centre = torch.zeros_like(whole)
    centre[:, 2, 2] = True
    assert surface_measures(whole, centre, [1], spacing=(1, 1))["hausdorff"].item() == pytest.approx(8**0.5)


def test_every_empty_identical_and_single_pixel_case():
    nothing, region = torch.zeros(1, 24, 24, dtype=torch.bool), square(4, 4)
    pixel, other = square(3, 4, side=1), square(6, 8, side=1)

    def figures(a, b):
        return [surface_measures(a, b, [1], spacing=(1.0, 1.0))[name].item() for name in NAMES]

    assert np.isnan(figures(nothing, nothing)).all()
    assert figures(nothing, region) == figures(region, nothing) == [np.inf, np.inf, np.inf, 0]
    assert figures(region, region) == figures(pixel, pixel) == [0, 0, 0, 1]
    assert figures(pixel, other) == [5, 5, 5, 0]
    assert figures(pixel, square(3, 5, side=1)) == [1, 1, 1, 1]


def test_missed_regions_count_as_failed_and_are_not_averaged():
    nothing = torch.zeros(1, 24, 24, dtype=torch.bool)
    predictions = torch.cat([square(4, 4), nothing, nothing, square(4, 4)])
    references = torch.cat([square(4, 6), square(4, 4), nothing, nothing])
    values = surface_measures(predictions, references, [1], spacing=(1, 1))["hd95"][:, 0]
    counted = measured_mean(values.numpy(), ["a", "b", "c", "d"])
    assert (counted.value, counted.n, counted.n_failed) == (2, 1, 3)


def test_labels_are_measured_one_by_one():
    predictions, references = torch.randint(0, 4, (2, 3, 16, 16), generator=torch.Generator().manual_seed(4))
    together = surface_measures(predictions, references, [3, 1], spacing=(1, 1))
    for j, label in enumerate([3, 1]):
        alone = surface_measures(predictions == label, references == label, [1], spacing=(1, 1))
        for name in NAMES:
            assert torch.equal(together[name][:, j], alone[name][:, 0])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"references": torch.zeros(1, 4, 5)}, "`references` have shape"),
        ({"spacing": (1.0, 1.0, 1.0)}, "`spacing` 3 entries"),
        ({"spacing": (1.0, 0.0)}, "positive distance"),
        ({"tolerance": -1.0}, "`tolerance` is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"predictions": torch.zeros(1, 4, 4), "references": torch.zeros(1, 4, 4), "labels": [1]}
    with pytest.raises(ValueError, match=message):
        surface_measures(**{**arguments, "spacing": (1.0, 1.0), **change})
