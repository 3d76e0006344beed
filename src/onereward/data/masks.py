"""Masks and label maps as numpy arrays: random shapes for training, dilation, and the checks on what users bring."""

import numpy as np
from scipy import ndimage


MASK_KINDS = ("ellipse", "box", "brush", "edge")


def dilate(mask: np.ndarray, px: float) -> np.ndarray:
    """
    Grow a mask by a Euclidean distance: every pixel whose centre lies within `px` of a masked pixel's centre.

    Args:
        mask (`np.ndarray`):
            Mask of shape `(H, W)`; anything non-zero is inside.
        px (`float`):
            Distance in pixels, at least 0.

    Returns:
        `np.ndarray`: boolean mask of shape `(H, W)`.
    """
    mask = np.asarray(mask) != 0
    if px <= 0 or not mask.any():
        return mask
    return ndimage.distance_transform_edt(~mask) <= px


def random_mask(rng: np.random.Generator, shape: tuple[int, int], kind: str | None = None) -> np.ndarray:
    """
    Draw a random region to repaint, for training an inpainting model on more shapes than lesions have.

    Args:
        rng (`np.random.Generator`):
            Source of randomness; equal states give equal masks.
        shape (`tuple[int, int]`):
            Height and width in pixels.
        kind (`str`, *optional*):
            `"ellipse"`, `"box"`, `"brush"` (a free stroke) or `"edge"` (a strip along one side of the field). Drawn
            at random when not given.

    Returns:
        `np.ndarray`: boolean mask of shape `(H, W)`, never empty and never the whole field.
    """
    if kind is None:
        kind = MASK_KINDS[rng.integers(len(MASK_KINDS))]
    if kind not in MASK_KINDS:
        raise ValueError(f"`kind` is {kind!r}; expected one of {MASK_KINDS}.")
    height, width = shape
    # Pixel centres in units of the field, so that shapes mean the same at every size.
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")

    if kind == "edge":
        depth = rng.uniform(0.1, 0.4)
        coordinate = (y, 1 - y, x, 1 - x)[rng.integers(4)]
        return coordinate <= max(depth, coordinate.min())

    if kind == "brush":
        points = [rng.uniform(0.25, 0.75, 2)]
        for _ in range(rng.integers(2, 6)):
            points.append(np.clip(points[-1] + rng.normal(0, 0.15, 2), 0.1, 0.9))
        radius = rng.uniform(0.02, 0.07)
        distance = np.full(shape, np.inf)
        for (y0, x0), (y1, x1) in zip(points[:-1], points[1:], strict=True):
            dy, dx = y1 - y0, x1 - x0
            along = np.clip(((y - y0) * dy + (x - x0) * dx) / max(dy * dy + dx * dx, 1e-12), 0, 1)
            distance = np.minimum(distance, np.hypot(y - y0 - along * dy, x - x0 - along * dx))
    else:
        centre_y, centre_x = rng.uniform(0.2, 0.8, 2)
        half_y, half_x = rng.uniform(0.05, 0.22, 2)
        angle = rng.uniform(0, np.pi)
        v = ((y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)) / half_y
        u = ((y - centre_y) * np.sin(angle) + (x - centre_x) * np.cos(angle)) / half_x
        distance = np.hypot(u, v) if kind == "ellipse" else np.maximum(abs(u), abs(v))
        radius = 1.0
    # On a very small field a shape can fall between pixel centres: its nearest pixel then stands for it.
    return distance <= max(radius, distance.min())


def check_mask(mask: np.ndarray, size: tuple[int, int] | None = None, name: str = "mask") -> np.ndarray:
    """
    Check a mask a user brought and return it as booleans.

    Args:
        mask (`np.ndarray`):
            Array of shape `(H, W)` with two values: `False`/`True`, 0/1 or 0/255. White means repaint.
        size (`tuple[int, int]`, *optional*):
            Height and width the mask must have.
        name (`str`, *optional*, defaults to `"mask"`):
            What to call it in a message, e.g. a file name.

    Returns:
        `np.ndarray`: boolean mask of shape `(H, W)`.

    Raises:
        `ValueError`: when the mask is not two-dimensional, has another size, holds NaN, is empty or is not binary.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"`{name}` has shape {mask.shape}; expected (height, width). Pass one channel.")
    if size is not None and mask.shape != tuple(size):
        raise ValueError(
            f"`{name}` is {mask.shape[0]}x{mask.shape[1]} but the image is {size[0]}x{size[1]} (height x width). "
            "Resize the mask to the image with nearest-neighbour sampling."
        )
    if not np.isfinite(mask).all():
        raise ValueError(f"`{name}` holds NaN or infinite values; expected 0 (keep) and 255 or 1 (repaint).")
    if not mask.any():
        raise ValueError(f"`{name}` is empty; expected at least one pixel of 255 or 1 to say where to repaint.")
    values = np.unique(mask)
    if not (np.isin(values, (0, 1)).all() or np.isin(values, (0, 255)).all()):
        raise ValueError(
            f"`{name}` is not binary: it holds {len(values)} values, e.g. {values[:6].tolist()}; expected 0 and 255 "
            "(or 0 and 1). Threshold it first: `mask > 127`, or `mask > 0` where the values are labels."
        )
    return mask != 0


def check_label_map(
    label_map: np.ndarray, mask: np.ndarray, labels: dict[str, int] | None = None, name: str = "label_map"
) -> np.ndarray:
    """
    Check a label map a user brought and return it as 8-bit integers.

    Args:
        label_map (`np.ndarray`):
            Array of shape `(H, W)` with one integer label a pixel, 0 for background.
        mask (`np.ndarray`):
            The mask of shape `(H, W)` the labels must lie in.
        labels (`dict[str, int]`, *optional*):
            The labels there are, name to value. Any 8-bit value goes when not given.
        name (`str`, *optional*, defaults to `"label_map"`):
            What to call it in a message, e.g. a file name.

    Returns:
        `np.ndarray`: label map of shape `(H, W)`, `uint8`.

    Raises:
        `ValueError`: when size or values are wrong, a label is unknown, or a label lies outside the mask.
    """
    label_map = np.asarray(label_map)
    if label_map.shape != np.shape(mask):
        raise ValueError(
            f"`{name}` has shape {label_map.shape} but the mask has {np.shape(mask)} (height, width). "
            "Resize the label map with nearest-neighbour sampling."
        )
    values = np.unique(label_map)
    if not np.isfinite(values).all() or (values != np.round(values)).any() or values.min() < 0 or values.max() > 255:
        raise ValueError(f"`{name}` must hold whole numbers from 0 to 255; it holds e.g. {values[:6].tolist()}.")
    if labels is not None:
        unknown = sorted(set(values.astype(int).tolist()) - set(labels.values()) - {0})
        if unknown:
            raise ValueError(f"`{name}` holds the unknown label(s) {unknown}; the known ones are {labels}.")
    outside = int(((label_map != 0) & (np.asarray(mask) == 0)).sum())
    if outside:
        raise ValueError(
            f"`{name}` has {outside} labelled pixel(s) outside the mask; labels say what to paint inside it. "
            "Enlarge the mask, or set the label map to 0 outside it."
        )
    return label_map.astype(np.uint8)
