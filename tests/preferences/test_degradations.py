import numpy as np
import pytest

from onereward.preferences.degradations import DEGRADATIONS


def arrays(row, colour):
    image = np.asarray(row["target"]) / 255
    image = np.stack([image, image**1.2, image**0.8], axis=-1) if colour else image
    return image, np.asarray(row["mask"]) > 0, np.asarray(row["label_map"])


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_only_the_inside_of_the_mask_changes(rows, name, colour):
    for number, row in enumerate(rows):
        image, mask, label_map = arrays(row, colour)
        before = image.copy()
        for strength in (0.05, 1.0):
            spoilt = DEGRADATIONS[name](image, mask, label_map, np.random.default_rng(number), strength)
            assert spoilt.shape == image.shape and spoilt.min() >= 0 and spoilt.max() <= 1
            np.testing.assert_array_equal(spoilt[~mask], image[~mask])
            assert np.abs(spoilt - image)[mask].max() > 1 / 255, f"{name} changed nothing"
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_generator_alone_decides(rows, name):
    image, mask, label_map = arrays(rows[0], False)
    first, second, other = (
        DEGRADATIONS[name](image, mask, label_map, np.random.default_rng(seed), 0.7) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, second)
    assert name == "blur" or not np.array_equal(first, other)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_greater_strength_changes_more(rows, name):
    change = {0.1: 0.0, 0.9: 0.0}
    for strength in change:
        for number, row in enumerate(rows):
            image, mask, label_map = arrays(row, False)
            spoilt = DEGRADATIONS[name](image, mask, label_map, np.random.default_rng(number), strength)
            change[strength] += np.abs(spoilt - image)[mask].mean()
    assert change[0.9] > 1.3 * change[0.1]


def test_a_missing_lesion_looks_like_the_tissue_around(rows):
    row = next(row for row in rows if row["task"] == "fill" and row["modality"] == "t2f")  # oedema is bright on FLAIR
    image, mask, label_map = arrays(row, False)
    spoilt = DEGRADATIONS["missing"](image, mask, label_map, np.random.default_rng(0), 1.0)
    healthy, lesion = np.asarray(row["image"]) / 255, label_map > 0
    gap = image[lesion].mean() - healthy[lesion].mean()
    assert gap > 0.1
    assert abs(spoilt[lesion].mean() - healthy[lesion].mean()) < 0.4 * gap
