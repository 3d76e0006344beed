"""Spoil an image on purpose, inside the mask only.

Every function takes `(image, mask, label_map, rng, strength)` and returns a new image:

- `image` (`np.ndarray` of shape `(H, W)` or `(H, W, C)`): float in [0, 1].
- `mask` (`np.ndarray` of shape `(H, W)`): bool, True = the part that may change.
- `label_map` (`np.ndarray` of shape `(H, W)`): integer labels, 0 = background; all zero where there is none.
- `rng` (`np.random.Generator`): the only source of chance.
- `strength` (`float`): from 0 (hardly visible) to 1 (obvious).

Outside the mask the result is bit for bit the input; inside it stays in [0, 1].
"""

import numpy as np
from scipy import ndimage


def blur(image, mask, label_map, rng, strength):
    """Gaussian blur with a standard deviation of 0.5 to 1.8 pixels."""
    return _paste(image, mask, _smooth(image, 0.5 + 1.3 * strength))


def noise(image, mask, label_map, rng, strength):
    """White Gaussian noise with a standard deviation of 0.02 to 0.12; the empty background stays empty."""
    sigma = 0.02 + 0.10 * strength
    return _paste(image, mask, image + sigma * rng.standard_normal(image.shape) * _tissue(image))


def seam(image, mask, label_map, rng, strength):
    """A step in brightness at the border of the mask, of 10 % to 50 %, that fades away over 1 to 3 pixels inwards."""
    depth = _depth(mask)
    step = (0.1 + 0.4 * strength) * np.exp(-(depth - 1) / rng.uniform(1, 3))
    brighter = rng.random() < 0.5 and image[mask].mean() < 0.6
    return _paste(image, mask, image * _like(1 + step if brighter else 1 - step, image))


def intensity_shift(image, mask, label_map, rng, strength):
    """
    One part made 0.1 to 0.4 brighter or darker: a label where there are labels, else a round spot. A spot in healthy
    tissue is what a left-over or invented lesion looks like.
    """
    part = _part(image, mask, label_map, rng, 0.2)
    shift = 0.1 + 0.3 * strength
    mean = image[part].mean()
    if mean + shift > 1 or (mean >= shift and rng.random() < 0.5):
        shift = -shift
    return _paste(image, mask, image + shift * _like(_smooth(part.astype(float), 0.7), image) * _tissue(image))


def misplaced(image, mask, label_map, rng, strength):
    """The content of the mask pushed aside by 2 to 8 pixels, less near the border, so that no seam appears."""
    depth = _depth(mask)
    reach = max(depth.max(), 1.0)
    distance = min(2 + 6 * strength, 0.8 * reach)
    angle = rng.uniform(0, 2 * np.pi)
    pull = distance * depth / reach
    rows, columns = np.indices(mask.shape)
    where = (rows - pull * np.sin(angle), columns - pull * np.cos(angle))
    planes = image.reshape(*mask.shape, -1)
    moved = [ndimage.map_coordinates(planes[..., c], where, order=3, mode="nearest") for c in range(planes.shape[-1])]
    return _paste(image, mask, np.stack(moved, axis=-1).reshape(image.shape))


def missing(image, mask, label_map, rng, strength):
    """One part painted over with tissue from elsewhere in the image, with a soft edge and matched brightness.

    Of a labelled lesion one label goes, and above a strength of 0.5 all of them; without labels a disc that covers 10
    % to 40 % of the mask.
    """
    lesion = mask & (label_map > 0)
    part = lesion if strength > 0.5 and lesion.any() else _part(image, mask, label_map, rng, 0.1 + 0.3 * strength)
    part = ndimage.binary_dilation(part) & mask
    rim = ndimage.binary_dilation(part, iterations=2) & ~part
    best, donor = np.inf, image
    for dy, dx in rng.integers(-(max(mask.shape) // 2), max(mask.shape) // 2 + 1, size=(48, 2)):
        shifted = np.roll(image, (dy, dx), axis=(0, 1))
        # tissue from inside the mask is a poor donor
        cost = np.abs(shifted - image)[rim].mean() + np.roll(mask, (dy, dx), axis=(0, 1))[part].mean()
        if cost < best:
            best, donor = cost, shifted + (image - shifted)[rim].mean(axis=0)
    weight = _like(np.clip(2 * _smooth(part.astype(float), 1.0), 0, 1), image)
    return _paste(image, mask, weight * donor + (1 - weight) * image)


DEGRADATIONS = {
    "blur": blur,
    "noise": noise,
    "seam": seam,
    "intensity_shift": intensity_shift,
    "misplaced": misplaced,
    "missing": missing,
}


def _paste(image, mask, changed):
    return np.where(_like(mask, image), np.clip(changed, 0, 1), image)


def _depth(mask):
    """Distance to the border of the mask in pixels, 0 outside; the edge of the image is no border."""
    return ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1]


def _like(plane, image):
    return plane[..., None] if image.ndim == 3 else plane


def _smooth(image, sigma):
    return ndimage.gaussian_filter(image, (sigma, sigma) + (0,) * (image.ndim - 2))


def _tissue(image):
    return np.clip(image / 0.08, 0, 1)


def _part(image, mask, label_map, rng, share):
    """A random label inside the mask or, without labels, a random disc of tissue that covers about a `share` of it."""
    present = np.unique(label_map[mask & (label_map > 0)])
    if len(present):
        return mask & (label_map == rng.choice(present))
    seat = mask & (image.reshape(*mask.shape, -1).mean(axis=-1) > 0.08)
    y, x = rng.choice(np.argwhere(seat if seat.any() else mask))
    radius = max(np.sqrt(share * mask.sum() / np.pi), 1.5)
    rows, columns = np.indices(mask.shape)
    return mask & ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)
