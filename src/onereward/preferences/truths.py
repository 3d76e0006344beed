"""
What the simulated raters judge by: one measurable truth for each criterion.

A truth is a smooth number for one image under one condition, higher is better. Most of its parts are z-scores: how far
a measure of the repainted region lies from the same measure on real slices of the same task and modality
(`calibrate`). What real slices differ by themselves is no fault: with `e(z) = log(1 + exp(4 (z - 1))) / 4`, nothing
below one standard deviation and linear above, they are

- **quality** = -e(noise - 1) - e(-sharpness): more noise, and less sharpness, against the tissue around the mask,
  than real slices have.
- **realism** = -e(seam) - e(texture): a step in brightness along the border of the mask that the pixels beside it do
  not have; detail spectrum and local contrast against the tissue around the mask, as one length.
- **clinical_relevance** = -(what the label map asks for) - (what the truth shows). Labels: the mean of e(|contrast|)
  over the labelled regions, and 3 (1 - correlation of image and layout). Truth, for removal, for extension and where
  there is no layout to go by: e((difference of coarse anatomy - 0.25) / 0.15) and, for removal, e((|share of the
  lesion that is left| - 0.25) / 0.25). Nobody can see what was in the mask: a guess from the other side and the
  surroundings (`likely_anatomy`) lies 0.24 +- 0.15 from the phantom's truth, and no more is asked of an image. The
  guess stands in for a truth that is unknown.

None of them is a Dice score, a structural similarity, a pixel-wise error or a distance of network features; those are
kept for the evaluation.
"""

import numpy as np
from scipy import ndimage


# ---------------------------------------------------------------------------------------------------------- measures


def noise_level(image: np.ndarray, where: np.ndarray) -> float:
    """
    Standard deviation of white noise: the median response to Immerkær's noise kernel, which neither edges nor smooth
    shading excite much.

    Paper: J. Immerkær, Fast Noise Variance Estimation, CVIU 64 (1996), https://doi.org/10.1006/cviu.1996.0060

    Args:
        image (`np.ndarray` of shape `(H, W)`):
            Grey image.
        where (`np.ndarray` of shape `(H, W)`):
            Pixels to look at, bool.

    Returns:
        `float`: standard deviation, in the unit of the image.
    """
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=float)
    response = ndimage.convolve(image, kernel, mode="nearest")
    # the kernel has norm 6; the median of |N(0, 1)| is 0.6745
    return float(np.median(np.abs(response[where])) / (6 * 0.6745))


def sharpness(image: np.ndarray, where: np.ndarray) -> float:
    """
    Gradient energy of the image blurred by 0.5 pixels over that of the image blurred by 2; brightness and contrast
    cancel, and little noise passes for an edge.

    Args: as in `noise_level`.

    Returns:
        `float`: about 1 for a blurred image, larger for sharper edges.
    """

    def energy(sigma):
        rows, columns = np.gradient(ndimage.gaussian_filter(image, sigma))
        return (rows**2 + columns**2)[where].mean()

    return float(energy(0.5) / (energy(2.0) + 5e-6))


def border_step(image: np.ndarray, mask: np.ndarray) -> float:
    """
    Root mean square step in brightness across the border of the mask, averaged over about three pixels along the
    border first: texture cancels, a seam does not.

    Args:
        image (`np.ndarray` of shape `(H, W)`):
            Grey image.
        mask (`np.ndarray` of shape `(H, W)`):
            Bool. The edge of the image is no border.

    Returns:
        `float`: step in the unit of the image; 0 where there is no border.
    """
    step, pairs = np.zeros(image.shape), np.zeros(image.shape)
    for axis in (0, 1):
        first, second = (np.s_[:-1], np.s_[1:]) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
        rise = image[second] - image[first]
        entering, leaving = mask[second] & ~mask[first], mask[first] & ~mask[second]
        step[second] += rise * entering
        step[first] -= rise * leaving
        pairs[second] += entering
        pairs[first] += leaving
    border = pairs > 0
    if not border.any():
        return 0.0
    step = ndimage.gaussian_filter(step, 1.0)[border] / ndimage.gaussian_filter(pairs, 1.0)[border]
    return float(np.sqrt((step**2).mean()))


def quality_measures(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    Noise level and sharpness inside the mask over those of the tissue up to 8 pixels around it, as logarithms.

    Returns:
        `np.ndarray` of shape `(2,)`: (noise, sharpness).
    """
    tissue = _tissue(image)
    inside = _first_large(ndimage.binary_erosion(mask, border_value=1) & tissue, mask & tissue, mask)
    around = _tissue_around(mask, tissue)
    noise = [noise_level(image, where) + 0.015 for where in (inside, around)]  # less is not to be seen
    sharp = [sharpness(image, where) for where in (inside, around)]
    return np.log([noise[0] / noise[1], sharp[0] / sharp[1]])


def realism_measures(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    Seam and texture of the masked region.

    Texture is that of the image blurred by 0.8 pixels, so that noise cannot pass for it, relative to the tissue up to
    8 pixels around the mask.

    Returns:
        `np.ndarray` of shape `(4,)`: seam, the log ratio of the step at the border to the steps one pixel inside and
        one outside; and the differences inside - around of the log ratio of the finer to the coarser half of detail,
        and of mean and standard deviation of the log local contrast.
    """
    beside = ndimage.binary_dilation(mask), ndimage.binary_erosion(mask, border_value=1)
    seam = (border_step(image, mask) + 0.02) / (np.mean([border_step(image, other) for other in beside]) + 0.02)
    tissue = _tissue(image)
    fine, middle, coarse = (ndimage.gaussian_filter(image, sigma) for sigma in (0.8, 1.6, 3.2))
    variance = ndimage.gaussian_filter(fine**2, 1.5) - ndimage.gaussian_filter(fine, 1.5) ** 2
    contrast = np.log(np.sqrt(np.clip(variance, 0, None)) + 0.01)
    texture = []
    for where in (_first_large(mask & tissue, mask), _tissue_around(mask, tissue)):
        bands = [np.sqrt((band[where] ** 2).mean()) + 0.01 for band in (fine - middle, middle - coarse)]
        texture.append(np.array([np.log(bands[0] / bands[1]), contrast[where].mean(), contrast[where].std()]))
    return np.concatenate([[np.log(seam)], texture[0] - texture[1]])


def region_contrasts(image: np.ndarray, mask: np.ndarray, label_map: np.ndarray) -> dict[int, float]:
    """
    Brightness of each labelled region inside the mask: its mean, in standard deviations of the tissue outside the mask
    from that tissue's mean. Without any label the whole mask is one region, of label 0.

    Args:
        image (`np.ndarray` of shape `(H, W)`):
            Grey image.
        mask (`np.ndarray` of shape `(H, W)`):
            Bool.
        label_map (`np.ndarray` of shape `(H, W)`):
            Integer labels, 0 = none.

    Returns:
        `dict[int, float]`: label to contrast, for regions of at least 4 pixels.
    """
    tissue = _tissue(image)
    outside = image[_first_large(~mask & tissue, ~mask)]
    regions = {int(label): mask & (label_map == label) for label in np.unique(label_map[mask]) if label > 0}
    return {
        label: float((image[region].mean() - outside.mean()) / (outside.std() + 0.01))
        for label, region in (regions or {0: mask}).items()
        if region.sum() >= 4
    }


def layout_correlation(
    image: np.ndarray, mask: np.ndarray, label_map: np.ndarray, expected: dict[int, float]
) -> float:
    """
    Pearson correlation, over the mask, of the image blurred by one pixel with the contrast expected of each label.

    Args:
        image, mask, label_map (`np.ndarray` of shape `(H, W)`):
            As in `region_contrasts`.
        expected (`dict[int, float]`):
            Contrast of each label; 0 is that of unlabelled tissue.

    Returns:
        `float`: from -1 to 1; 1 where all of the mask is expected to look the same.
    """
    inside = mask & (_tissue(image) | (label_map > 0))
    wanted = np.zeros(image.shape)
    for label, contrast in expected.items():
        wanted[label_map == label] = contrast
    wanted, found = wanted[inside], ndimage.gaussian_filter(image, 1.0)[inside]
    if inside.sum() < 6 or wanted.std() < 1e-6:
        return 1.0
    return float(((wanted - wanted.mean()) * (found - found.mean())).mean() / (wanted.std() * (found.std() + 0.005)))


def coarse(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image inside the mask, averaged with a Gaussian of 4 pixels that nothing outside the mask enters."""
    weight = ndimage.gaussian_filter(mask.astype(float), 4)
    return np.where(mask, ndimage.gaussian_filter(image * mask, 4) / np.maximum(weight, 1e-9), 0)


def anatomy_difference(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """
    Root mean square difference of the `coarse` image and truth, in standard deviations of the truth's tissue. The four
    pixels next to the border count less, the outermost a quarter: a seam is not anatomy.
    """
    spread = truth[_first_large(_tissue(truth), np.ones_like(mask))].std() + 0.01
    weight = np.minimum(_depth(mask), 4)
    return float(np.sqrt(np.average((coarse(image, mask) - coarse(truth, mask)) ** 2, weights=weight)) / spread)


def residual_lesion(image: np.ndarray, source: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Share of the lesion that is left, by projection of the `coarse` images: 0 in the truth, 1 in the source."""
    lesion, left = (coarse(x, mask) - coarse(truth, mask) for x in (source, image))
    return float((left * lesion)[mask].sum() / ((lesion**2)[mask].sum() + 1e-3))


def surroundings(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with its mask filled by the smooth continuation of the tissue around it: a Gaussian mean of that."""
    sigma = max(2.0, _depth(mask).max())
    known = (~mask & _tissue(image)).astype(float)
    weight = ndimage.gaussian_filter(known, sigma, truncate=8)
    return np.where(mask, ndimage.gaussian_filter(image * known, sigma, truncate=8) / (weight + 1e-12), image)


def likely_anatomy(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    What may have been in the mask, where nobody knows: a blend of the other side of the picture, with the weight of
    the squared correlation of the two sides outside the mask, and the `surroundings`. A brain cut across is symmetric
    and its other side the better guess; of a picture without symmetry the surroundings remain.
    """
    mirrored, mirrored_mask = image[:, ::-1], mask[:, ::-1]
    smooth = surroundings(image, mask)
    known = ~mask & ~mirrored_mask & (_tissue(image) | _tissue(mirrored))
    sides = [ndimage.gaussian_filter(x, 2.5)[known] for x in (smooth, smooth[:, ::-1])]
    if known.sum() < 6 or min(side.std() for side in sides) < 1e-6:
        return smooth
    weight = max(np.corrcoef(*sides)[0, 1], 0) ** 2
    return np.where(mask & ~mirrored_mask, weight * mirrored + (1 - weight) * smooth, smooth)


# ------------------------------------------------------------------------------------------------------------- truths


def read_condition(row: dict) -> dict:
    """
    The arrays of a row (columns of `onereward.data.schema.FEATURES`, pictures decoded) that the measures need.

    Returns:
        `dict`: `source` and `target` (grey, float in [0, 1], of shape `(H, W)`; `target` may be `None`), `mask`
        (bool), `label_map` (int), `task` and `modality`.
    """
    mask = np.asarray(row["mask"]) > 0
    label_map = np.asarray(row["label_map"])
    target = None if row["target"] is None else grey(row["target"])
    names = {"task": row["task"], "modality": row["modality"]}
    return {"source": grey(row["image"]), "target": target, "mask": mask, "label_map": label_map, **names}


def grey(picture) -> np.ndarray:
    """An 8-bit grey or colour picture as floats in [0, 1] of shape `(H, W)`, colours averaged."""
    array = np.asarray(picture, dtype=float) / 255
    return array if array.ndim == 2 else array.mean(axis=-1)


def calibrate(conditions: list[dict]) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """
    Mean and standard deviation of every measure on real slices: the targets or, where there is none, the sources.

    The variance within a group of slices is shrunk towards that within all groups with the weight of 4 slices, so that
    a group of two or three does not run wild.

    Args:
        conditions (`list[dict]`):
            Results of `read_condition`.

    Returns:
        `dict`: `(measure, task, modality)`, or `("contrast", label, modality)`, to `(mean, std)`.

    Raises:
        `ValueError`: when there are no conditions.
    """
    if not conditions:
        raise ValueError("`conditions` is empty; expected at least one real slice to calibrate the measures on.")
    found: dict[str, dict[tuple, list]] = {"quality": {}, "realism": {}, "contrast": {}}
    for condition in conditions:
        real = condition["source"] if condition["target"] is None else condition["target"]
        mask, group = condition["mask"], (condition["task"], condition["modality"])
        found["quality"].setdefault(group, []).append(quality_measures(real, mask))
        found["realism"].setdefault(group, []).append(realism_measures(real, mask))
        for label, contrast in region_contrasts(real, mask, condition["label_map"]).items():
            kind = label if label else condition["task"]
            found["contrast"].setdefault((kind, condition["modality"]), []).append(contrast)

    calibration = {}
    for measure, groups in found.items():
        slices = [np.array(values) for values in groups.values()]
        residuals = [values - values.mean(axis=0) for values in slices]
        freedom = sum(len(values) - 1 for values in slices)
        if freedom:
            pooled = sum((r**2).sum(axis=0) for r in residuals) / freedom
        else:
            pooled = np.concatenate(slices).var(axis=0)
        for group, values, r in zip(groups, slices, residuals, strict=True):
            variance = ((r**2).sum(axis=0) + 4 * pooled) / (len(values) - 1 + 4)
            calibration[(measure, *group)] = values.mean(axis=0), np.sqrt(variance) + 0.05
    return calibration


def judge(image: np.ndarray, condition: dict, calibration: dict) -> dict[str, float]:
    """
    The truths of one image, see the top of this file.

    Args:
        image (`np.ndarray` of shape `(H, W)`):
            Grey image in [0, 1], equal to the source outside the mask.
        condition (`dict`):
            From `read_condition`.
        calibration (`dict`):
            From `calibrate`, on slices of the same tasks and modalities.

    Returns:
        `dict[str, float]`: criterion to truth, 0 at best. A label that no slice of the calibration shows is not
        judged.

    Raises:
        `ValueError`: when the calibration has no slice of this task and modality.
    """
    source, mask, label_map, task = (condition[name] for name in ("source", "mask", "label_map", "task"))
    modality = condition["modality"]
    if ("quality", task, modality) not in calibration:
        raise ValueError(f"`calibration` has no real slice of task {task!r} and modality {modality!r}; add some.")

    mean, std = calibration["quality", task, modality]
    noise, sharp = (quality_measures(image, mask) - mean) / std
    quality = -_excess(noise - 1) - _excess(-sharp)

    mean, std = calibration["realism", task, modality]
    seam, *texture = (realism_measures(image, mask) - mean) / std
    texture = np.sqrt(np.mean(np.square(texture)))
    realism = -_excess(seam) - _excess(texture)

    relevance = 0.0
    labels = np.unique(label_map[mask])
    if task == "fill" or labels.any():
        contrasts = region_contrasts(image, mask, label_map)
        keys = {label: ("contrast", label or task, modality) for label in contrasts}
        real = {label: calibration[key] for label, key in keys.items() if key in calibration}
        if real:
            relevance -= np.mean([_excess(abs(contrasts[label] - m) / s) for label, (m, s) in real.items()])
        if len(labels) > 1:
            expected = {label: m for label, (m, _) in real.items()}
            relevance -= 3 * (1 - layout_correlation(image, mask, label_map, expected))
    truth = condition["target"]
    if truth is None and task != "fill":
        truth = likely_anatomy(source, mask)
    if truth is not None and (task != "fill" or len(labels) == 1):
        relevance -= _excess((anatomy_difference(image, truth, mask) - 0.25) / 0.15)
        if task == "remove":
            relevance -= _excess((abs(residual_lesion(image, source, truth, mask)) - 0.25) / 0.25)
    return {"quality": float(quality), "realism": float(realism), "clinical_relevance": float(relevance)}


def _excess(z):
    return np.logaddexp(0, 4 * (z - 1)) / 4


def _depth(mask):
    """Distance to the border of the mask in pixels, 0 outside; the edge of the image is no border."""
    return ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1]


def _tissue(image):
    """Where there is something to see, unlike in the empty background around a head."""
    return ndimage.gaussian_filter(image, 1.0) > 0.06


def _tissue_around(mask, tissue):
    """Tissue up to 8 pixels from the pixels next to the mask, else all tissue outside the mask, else all outside."""
    near = ndimage.binary_dilation(mask)
    return _first_large(ndimage.binary_dilation(near, iterations=8) & ~near & tissue, ~mask & tissue, ~mask)


def _first_large(*regions):
    """The first region of at least 6 pixels, else the last."""
    return next((region for region in regions if region.sum() >= 6), regions[-1])
