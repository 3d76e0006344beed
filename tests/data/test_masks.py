import numpy as np
import pytest
from skimage import morphology

from onereward.data.masks import MASK_KINDS, check_label_map, check_mask, dilate, random_mask
from onereward.data.schema import LABELS


@pytest.mark.parametrize("radius", [1, 2, 3, 5])
def test_dilate_equals_skimage_with_a_disk(radius):
    mask = np.random.default_rng(radius).random((40, 56)) > 0.98
    np.testing.assert_array_equal(dilate(mask, radius), morphology.dilation(mask, morphology.disk(radius)))


def test_dilate_by_nothing_and_of_nothing():
    mask = np.zeros((8, 8), np.uint8)
    assert not dilate(mask, 3).any()
    mask[2, 3] = 255
    np.testing.assert_array_equal(dilate(mask, 0), mask > 0)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (8, 8)])
def test_random_masks_are_proper_regions(kind, shape):
    for seed in range(100):
        mask = random_mask(np.random.default_rng(seed), shape, kind)
        assert mask.shape == shape and mask.dtype == bool
        assert mask.any() and not mask.all()
    again = random_mask(np.random.default_rng(99), shape, kind)
    np.testing.assert_array_equal(mask, again)


def test_edge_masks_lie_on_an_edge_and_others_are_mostly_inside():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        edge = random_mask(rng, (64, 64), "edge")
        assert max(edge[0].mean(), edge[-1].mean(), edge[:, 0].mean(), edge[:, -1].mean()) == 1
        assert random_mask(rng, (64, 64), "brush").mean() < 0.5


def test_random_masks_vary_in_kind_when_none_is_named():
    rng = np.random.default_rng(0)
    edges = [random_mask(rng, (32, 32))[[0, -1]].all(1).any() for _ in range(100)]
    assert 0 < sum(edges) < 60


def test_random_mask_names_an_unknown_kind():
    with pytest.raises(ValueError, match="`kind` is 'star'.*ellipse"):
        random_mask(np.random.default_rng(0), (8, 8), "star")


@pytest.mark.parametrize("white", [True, 1, 255, 1.0])
def test_check_mask_takes_every_way_to_write_a_binary_mask(white):
    mask = np.zeros((4, 5), type(white))
    mask[1, 2] = white
    assert check_mask(mask, (4, 5)).sum() == 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 5)), "`mask` is empty"),
        (np.full((4, 5), 0.5), "not binary.*[Tt]hreshold"),
        (np.array([[0, 1, 255]]), "not binary"),
        (np.full((4, 5), np.nan), "NaN"),
        (np.ones((4, 5, 3)), r"shape \(4, 5, 3\).*one channel"),
        (np.ones((5, 4)), "5x4 but the image is 4x5.*[Rr]esize"),
    ],
)
def test_check_mask_says_what_is_wrong(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, (4, 5) if mask.size == 20 else None)


def test_check_label_map_says_what_is_wrong():
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    good = mask * 3
    np.testing.assert_array_equal(check_label_map(good, mask, LABELS), good)
    for label_map, message in [
        (mask * 7, r"unknown label\(s\) \[7\].*NCR"),
        (np.full((4, 4), 2), r"8 labelled pixel\(s\) outside the mask"),
        (np.ones((3, 4)), r"shape \(3, 4\)"),
        (mask * 1.5, "whole numbers"),
        (mask * -1, "whole numbers"),
        (mask * 300, "0 to 255"),
        (np.where(mask, np.nan, 0), "whole numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_label_map(label_map, mask, LABELS)
