"""Ways to repaint a region without a generative model: what a model has to beat before it is worth its weights.

Each is a pure function from images and masks to images. Outside the mask they return every pixel as it was; but for
[`unchanged`] none of them looks under the mask, so that they know no more than the model does.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from onereward.evaluation.segmenter import tumour_and_twin


def _checked(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The mask as booleans `(B, 1, H, W)`, when there is something to go by in every image."""
    if images.ndim != 4 or masks.shape != (len(images), 1, *images.shape[-2:]):
        raise ValueError(
            f"`images` has shape {tuple(images.shape)} and `masks` {tuple(masks.shape)}; expected (B, C, H, W) and "
            "(B, 1, H, W)."
        )
    inside = masks > 0.5
    full = inside.flatten(1).all(1)
    if full.any():
        raise ValueError(
            f"`masks` covers the whole of image(s) {full.nonzero().flatten().tolist()}; there are no surroundings to "
            "fill from. Leave those rows out."
        )
    return inside


def surroundings(masks: torch.Tensor, width: int) -> torch.Tensor:
    """
    The pixels around a mask.

    Args:
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 inside.
        width (`int`):
            How far they reach, in pixels, in every direction and along the diagonals.

    Returns:
        `torch.Tensor` of shape `(B, 1, H, W)`, bool.
    """
    inside = masks > 0.5
    reached = F.max_pool2d(inside.float(), 2 * width + 1, stride=1, padding=width) > 0
    return reached & ~inside


def unchanged(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    The source as it came: the score of doing nothing.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`.
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    _checked(images, masks)
    return images.clone()


def constant_fill(images: torch.Tensor, masks: torch.Tensor, width: int = 2) -> torch.Tensor:
    r"""
    Each channel of the region at the mean of its surroundings, `$\hat x_i = \frac{1}{|r|}\sum_{j \in r} x_j$`.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`.
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where to fill.
        width (`int`, *optional*, defaults to 2):
            How far the surroundings `r` reach, in pixels.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.

    Raises:
        `ValueError`: when shapes do not fit, or a mask covers the whole image.

    Example:

    ```python
    >>> import torch
    >>> from onereward.evaluation.baselines import constant_fill

    >>> images, masks = torch.ones(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    >>> images[..., 2, 2], masks[..., 2, 2] = 0, 1
    >>> constant_fill(images, masks)[0, 0, 2, 2]
    tensor(1.)
    ```
    """
    inside = _checked(images, masks)
    around = surroundings(masks, width).to(images.dtype)
    mean = (images * around).sum((2, 3), keepdim=True) / around.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(inside, mean, images)


def biharmonic(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    r"""
    The smoothest continuation of the surroundings, `$\Delta^2 x = 0$` inside the mask (Chui & Mhaskar 2010, MRA
    functions on graphs and biharmonic inpainting), by `skimage.restoration.inpaint_biharmonic`, clipped to [0, 1].

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)` in [0, 1].
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where to fill.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.

    Raises:
        `ImportError`: without scikit-image.
        `ValueError`: when shapes do not fit, or a mask covers the whole image.
    """
    try:
        from skimage.restoration import inpaint_biharmonic
    except ImportError as error:
        raise ImportError("`biharmonic` needs scikit-image; install it with `pip install scikit-image`.") from error
    inside = _checked(images, masks)
    filled = [
        inpaint_biharmonic(image.double().numpy(), mask[0].numpy(), channel_axis=0)
        for image, mask in zip(images.cpu(), inside.cpu(), strict=True)
    ]
    filled = torch.from_numpy(np.stack(filled)).to(images).clamp(0, 1)
    return torch.where(inside, filled, images)


def _opencv_fill(images: torch.Tensor, masks: torch.Tensor, method: str, radius: float) -> torch.Tensor:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "`telea` and `navier_stokes` need OpenCV; install it with `pip install opencv-python-headless`."
        ) from error
    inside = _checked(images, masks)
    # OpenCV works on 8 bits, one channel at a time; real pixels are put back from the source, not from the 8 bits.
    eight_bits = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    filled = np.stack(
        [
            [cv2.inpaint(channel, mask[0].numpy().astype(np.uint8), radius, getattr(cv2, method)) for channel in image]
            for image, mask in zip(eight_bits, inside.cpu(), strict=True)
        ]
    )
    return torch.where(inside, torch.from_numpy(filled).to(images) / 255, images)


def telea(images: torch.Tensor, masks: torch.Tensor, radius: float = 3.0) -> torch.Tensor:
    """
    Fast marching from the rim inwards (Telea 2004, J. Graphics Tools 9(1)), by `cv2.inpaint(..., INPAINT_TELEA)`.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)` in [0, 1].
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where to fill.
        radius (`float`, *optional*, defaults to 3.0):
            Neighbourhood that a pixel is computed from, in pixels.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, in steps of 1/255 inside the mask.

    Raises:
        `ImportError`: without OpenCV.
        `ValueError`: when shapes do not fit, or a mask covers the whole image.
    """
    return _opencv_fill(images, masks, "INPAINT_TELEA", radius)


def navier_stokes(images: torch.Tensor, masks: torch.Tensor, radius: float = 3.0) -> torch.Tensor:
    """
    Isophotes carried into the region as a fluid carries vorticity (Bertalmio et al. 2001, CVPR), by
    `cv2.inpaint(..., INPAINT_NS)`. Arguments, result and errors as in [`telea`].
    """
    return _opencv_fill(images, masks, "INPAINT_NS", radius)


@dataclass(frozen=True)
class ReferenceSlices:
    """
    Training slices to copy from: each with its tumour, and again without.

    Args:
        images (`torch.Tensor`): slices of shape `(M, C, H, W)` in [0, 1].
        label_maps (`torch.Tensor`): their labels of shape `(M, 1, H, W)`, int64; 0 throughout in a healthy slice.
        modalities (`list[str]`): modality of each slice.
    """

    images: torch.Tensor
    label_maps: torch.Tensor
    modalities: list[str]


def reference_slices(dataset) -> ReferenceSlices:
    """
    The slices of the `fill` rows of a training set, with their tumours and without.

    Args:
        dataset (`datasets.Dataset`):
            Rows in the schema of [`onereward.data.schema.FEATURES`], of cases that are not evaluated on: with the same
            cases in it, [`nearest_patient`] copies the answer.

    Returns:
        [`ReferenceSlices`]: in grey.

    Raises:
        `ValueError`: when there is no `fill` row with a target.
    """
    slices = tumour_and_twin(dataset)
    labels = slices["labels"][:, None].long()
    return ReferenceSlices(
        torch.cat([slices["healthy"], slices["tumour"]]).float() / 255,
        torch.cat([torch.zeros_like(labels), labels]),
        2 * slices["modalities"],
    )


def _slices_of(reference: ReferenceSlices, modality: str) -> torch.Tensor:
    rows = torch.tensor([i for i, name in enumerate(reference.modalities) if name == modality], dtype=torch.long)
    if len(rows) == 0:
        raise ValueError(
            f"`reference` has no slice of modality {modality!r}, only {sorted(set(reference.modalities))}; load the "
            "training rows of that modality too."
        )
    return rows


def nearest_patient(
    images: torch.Tensor,
    masks: torch.Tensor,
    label_maps: torch.Tensor,
    modalities: list[str],
    reference: ReferenceSlices,
    width: int = 4,
) -> torch.Tensor:
    r"""
    The region of the training slice that fits best, pasted in as it is.

    Of the slices `s` of the same modality with labels `l^s`, that with the least

    `$\sum_{i \in r} (x_i - s_i)^2 + \sum_{i \in m} [l_i \neq l^s_i]$`

    where `r` are the surroundings of the mask `m`: a label that is not what was asked for costs as much as the largest
    possible error of a pixel. Where no label is asked for, it is the healthy slice whose surroundings fit best
    (exemplar-based completion from a collection of images, Hays & Efros 2007, ACM TOG 26(3), without their blending).

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)` in [0, 1].
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where to fill.
        label_maps (`torch.Tensor`):
            What to put there, of shape `(B, 1, H, W)`.
        modalities (`list[str]`):
            Modality of each image.
        reference ([`ReferenceSlices`]):
            The training slices, of the same size.
        width (`int`, *optional*, defaults to 4):
            How far the surroundings reach, in pixels.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.

    Raises:
        `ValueError`: when shapes do not fit, a mask covers the whole image, or a modality has no slice.
    """
    inside, around = _checked(images, masks), surroundings(masks, width)
    if reference.images.shape[-2:] != images.shape[-2:]:
        raise ValueError(
            f"`reference` is of {tuple(reference.images.shape[-2:])} pixels and `images` of "
            f"{tuple(images.shape[-2:])}; load both at one size."
        )
    rows_of = {modality: _slices_of(reference, modality) for modality in set(modalities)}
    filled = images.clone()
    for b, modality in enumerate(modalities):
        rows, r, m = rows_of[modality], around[b, 0], inside[b, 0]
        misfit = ((reference.images[rows][:, :, r] - images[b][:, r]) ** 2).mean(1).sum(1)
        wrong = (reference.label_maps[rows][:, 0, m] != label_maps[b, 0, m]).sum(1)
        best = rows[(misfit + wrong).argmin()]
        filled[b] = torch.where(m, reference.images[best].to(images), images[b])
    return filled


def label_means(
    images: torch.Tensor,
    masks: torch.Tensor,
    label_maps: torch.Tensor,
    modalities: list[str],
    reference: ReferenceSlices,
) -> torch.Tensor:
    """
    Each label as one flat grey, its mean over the training slices of the same modality; masked pixels without a label
    continue the surroundings by [`biharmonic`]. The least a model that is told the labels should do.

    Args:
        images, masks, label_maps, modalities, reference:
            As in [`nearest_patient`].

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.

    Raises:
        `ImportError`: without scikit-image.
        `ValueError`: when shapes do not fit, a mask covers the whole image, a modality has no slice, or a label is in
            no training slice of the modality.
    """
    filled, inside = biharmonic(images, masks), _checked(images, masks)
    for modality in dict.fromkeys(modalities):
        rows = _slices_of(reference, modality)
        mine = torch.tensor([name == modality for name in modalities]).view(-1, 1, 1, 1)
        for value in label_maps[mine.flatten()].unique().tolist():
            known = reference.label_maps[rows] == value
            if value == 0:
                continue
            if not known.any():
                raise ValueError(f"`reference` has no pixel of label {value} in {modality!r}; bring more slices.")
            grey = reference.images[rows].mean(1, keepdim=True)[known].mean()
            filled = torch.where(mine & inside & (label_maps == value), grey.to(images), filled)
    return filled
