"""Surface measures between label maps: Hausdorff distance, HD95, average surface distance and surface Dice.

The surface of a region is the set of its pixels that touch, face to face, a pixel outside of it or the edge of the
image. Distances run from pixel centre to pixel centre in the unit of `spacing`, mm for medical images.
"""

import numpy as np
import torch
from scipy import ndimage


def surface(region: np.ndarray) -> np.ndarray:
    """Pixels of a boolean `region` of any dimension that touch, face to face, the outside or the edge of the image."""
    return region & ~ndimage.binary_erosion(region)


def surface_distances(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """
    Distances of each surface pixel of one region to the nearest surface pixel of the other, both ways.

    Args:
        a, b (`np.ndarray` of dtype bool):
            Two regions on one grid.
        spacing (`tuple[float, ...]`):
            Distance of neighbouring pixels along each axis.

    Returns:
        Two `np.ndarray`: from the surface of `a` to that of `b`, and back; one entry a surface pixel. Where the other
        region is empty the distances are infinite; an empty region has none.
    """
    union = a | b
    if not union.any():
        return np.zeros(0), np.zeros(0)
    # All that is near lies in the box around both; its border is that of the image or background, so that the surfaces
    # stay the same.
    box = ndimage.find_objects(union.astype(np.uint8))[0]
    a, b = surface(a[box]), surface(b[box])

    def distances(start, end):
        if not end.any():
            return np.full(start.sum(), np.inf)
        return ndimage.distance_transform_edt(~end, sampling=spacing)[start]

    return distances(a, b), distances(b, a)


def hausdorff(there: np.ndarray, back: np.ndarray, percentile: float = 100.0) -> float:
    r"""
    Hausdorff distance, `$\max(\max_a d(a, B), \max_b d(b, A))$`, from the result of [`surface_distances`]; with
    `percentile=95` HD95, where each of the two inner maxima is the 95th percentile (linear between order statistics)
    of its own direction.

    Infinite where one region is empty, NaN where both are.
    """
    if len(there) == 0 and len(back) == 0:
        return float("nan")
    if len(there) == 0 or len(back) == 0:
        return float("inf")
    return float(max(np.percentile(there, percentile), np.percentile(back, percentile)))


def average_surface_distance(there: np.ndarray, back: np.ndarray) -> float:
    r"""
    Symmetric average surface distance, `$\frac{\sum_a d(a, B) + \sum_b d(b, A)}{|A| + |B|}$` over the surface pixels,
    from the result of [`surface_distances`]. Infinite where one region is empty, NaN where both are.
    """
    distances = np.concatenate([there, back])
    return float(distances.mean()) if len(distances) else float("nan")


def surface_dice(there: np.ndarray, back: np.ndarray, tolerance: float) -> float:
    r"""
    Surface Dice at a tolerance (Nikolov et al., https://huggingface.co/papers/1809.04430), by surface pixels:

    `$\frac{|\{a : d(a, B) \le \tau\}| + |\{b : d(b, A) \le \tau\}|}{|A| + |B|}$`

    0 where one region is empty, NaN where both are.
    """
    distances = np.concatenate([there, back])
    return float((distances <= tolerance).mean()) if len(distances) else float("nan")


def surface_measures(
    predictions: torch.Tensor,
    references: torch.Tensor,
    labels: list[int],
    *,
    spacing: tuple[float, ...],
    tolerance: float = 1.0,
) -> dict[str, torch.Tensor]:
    """
    Surface measures of each label, one figure per image and label.

    Args:
        predictions (`torch.Tensor`):
            Integer or boolean label maps of shape `(B, H, W)` or `(B, D, H, W)`.
        references (`torch.Tensor`):
            Label maps of the same shape.
        labels (`list[int]`):
            Label values to compare; `[1]` for masks.
        spacing (`tuple[float, ...]`):
            Distance of neighbouring pixels along each spatial axis, in mm where known: `(1.0, 1.0)` makes the unit a
            pixel. Its length says whether the maps are images or volumes.
        tolerance (`float`, *optional*, defaults to `1.0`):
            Distance up to which the surface Dice takes two surfaces for the same, in the unit of `spacing`.

    Returns:
        `dict[str, torch.Tensor]`: `hausdorff`, `hd95`, `average_surface_distance` (in the unit of `spacing`) and
        `surface_dice` (in [0, 1]), each of shape `(B, len(labels))` in float64. A label that only one of the two maps
        has gives infinite distances and a surface Dice of 0; a label that neither has gives NaN throughout.
        [`~onereward.evaluation.bootstrap.measured_mean`] counts both kinds as failed: a mean distance says nothing
        without the number of regions that were missed.

    Raises:
        `ValueError`: when the shapes differ, do not fit `spacing`, or a spacing or the tolerance makes no sense.

    Example:

    ```python
    >>> found = segmenter.segment(images, modalities)
    >>> surface_measures(found, label_maps[:, 0], [1, 2, 3], spacing=(2.0, 2.0))["hd95"].shape
    torch.Size([8, 3])
    ```
    """
    shape = tuple(predictions.shape)
    if tuple(references.shape) != shape:
        raise ValueError(f"`references` have shape {tuple(references.shape)} but `predictions` {shape}.")
    if len(spacing) not in (2, 3) or len(shape) != len(spacing) + 1:
        raise ValueError(
            f"`predictions` have shape {shape} and `spacing` {len(spacing)} entries; expected (B, H, W) with two or "
            "(B, D, H, W) with three. Drop an axis of channels with `[:, 0]`."
        )
    if not all(0 < step < float("inf") for step in spacing):
        raise ValueError(f"`spacing` is {tuple(spacing)}; each entry must be a positive distance.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` is {tolerance}; it must be a distance of 0 or more.")

    predictions, references = predictions.cpu().numpy(), references.cpu().numpy()
    figures = np.empty((4, len(predictions), len(labels)))
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        for j, label in enumerate(labels):
            there, back = surface_distances(prediction == label, reference == label, spacing)
            figures[:, i, j] = (
                hausdorff(there, back),
                hausdorff(there, back, 95),
                average_surface_distance(there, back),
                surface_dice(there, back, tolerance),
            )
    names = ("hausdorff", "hd95", "average_surface_distance", "surface_dice")
    return dict(zip(names, torch.from_numpy(figures), strict=True))
