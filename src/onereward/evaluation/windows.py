"""Intensity windows: to [0, 1] with declared bounds, which a report can then record.

SSIM, PSNR and every network depend on how intensities were mapped to [0, 1]. Take the bounds from the declared window
(CT) or from the *real* image (MR), scale the generated image with the same bounds, and write them into the result.
"""

import numpy as np
import torch


# Level and width in HU, as listed at https://radiopaedia.org/articles/windowing-ct.
HU_WINDOWS = {
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft_tissue": (50, 400),
    "liver": (30, 150),
    "brain": (40, 80),
    "stroke": (40, 40),
    "bone": (400, 1800),
    "temporal_bone": (600, 2800),
}


def scale_to_bounds(images: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """
    Clips each image to its bounds and maps them to [0, 1].

    Args:
        images (`torch.Tensor`):
            Images or volumes of shape `(B, ...)`.
        bounds (`torch.Tensor`):
            Lower and upper bound of each image, `(B, 2)`.

    Returns:
        `torch.Tensor` of the shape of the images in float32, or float64 if they are. An image whose bounds are no
        range (a constant image, or nothing to take percentiles of) is NaN throughout, so that whatever is measured on
        it counts as failed.

    Raises:
        `ValueError`: when `bounds` do not have shape `(B, 2)`.
    """
    if tuple(bounds.shape) != (len(images), 2):
        raise ValueError(
            f"`bounds` have shape {tuple(bounds.shape)} for {len(images)} images; expected {(len(images), 2)}."
        )
    low, high = bounds.to(images.device, torch.float64).view(-1, 2, *[1] * (images.ndim - 1)).unbind(1)
    scaled = ((images.double() - low) / (high - low)).clamp(0, 1)
    scaled = torch.where(high > low, scaled, torch.nan)
    return scaled if images.dtype == torch.float64 else scaled.float()


def hu_window(images: torch.Tensor, window: str | tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Maps CT images through a window of Hounsfield units.

    Args:
        images (`torch.Tensor`):
            Images or volumes of shape `(B, ...)` in HU: slope and intercept of the DICOM file already applied.
        window (`str` or `tuple[float, float]`):
            A name of `HU_WINDOWS`, or level and width in HU.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the images in [0, 1], black at level - width / 2 and white at level +
        width / 2; and the bounds of each image in HU, `(B, 2)` in float64.

    Raises:
        `ValueError`: when the name is unknown or the width is not positive.

    Example:

    ```python
    >>> scaled, bounds = hu_window(torch.tensor([[-1000.0, 0.0, 40.0, 200.0]]), "brain")
    >>> scaled.tolist(), bounds.tolist()
    ([[0.0, 0.0, 0.5, 1.0]], [[0.0, 80.0]])
    ```
    """
    if isinstance(window, str):
        if window not in HU_WINDOWS:
            raise ValueError(
                f"`window` is {window!r}; expected one of {sorted(HU_WINDOWS)}, or a pair (level, width) in HU."
            )
        window = HU_WINDOWS[window]
    level, width = window
    if not width > 0:
        raise ValueError(f"`window` is {tuple(window)}, level and width in HU; the width must be positive.")
    bounds = torch.tensor([[level - width / 2, level + width / 2]], dtype=torch.float64).repeat(len(images), 1)
    return scale_to_bounds(images, bounds), bounds


def percentile_bounds(
    images: torch.Tensor,
    lower: float = 0.5,
    upper: float = 99.5,
    *,
    foreground: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Two percentiles of each image, of all channels together, so that colours keep their ratio.

    Args:
        images (`torch.Tensor`):
            Images or volumes of shape `(B, C, ...)` in any unit.
        lower, upper (`float`, *optional*, default to `0.5` and `99.5`):
            The percentiles, 0 to 100, linear between order statistics.
        foreground (`torch.Tensor`, *optional*):
            Where the percentiles are taken, `(B, 1, ...)`, 1 = count; for example `images > 0` on skull-stripped
            brains, where the black background otherwise decides the lower and dilutes the upper bound. Defaults to
            everywhere.

    Returns:
        `torch.Tensor` of shape `(B, 2)` in float64, in the unit of the images; NaN where the foreground is empty.
        Pixels that are not finite do not count.

    Raises:
        `ValueError`: when the percentiles are out of order or `foreground` does not fit.
    """
    if not 0 <= lower < upper <= 100:
        raise ValueError(f"`lower` is {lower} and `upper` {upper}; expected 0 <= lower < upper <= 100.")
    if foreground is not None and tuple(foreground.shape) != (len(images), 1, *images.shape[2:]):
        raise ValueError(
            f"`foreground` has shape {tuple(foreground.shape)}; expected {(len(images), 1, *images.shape[2:])}."
        )
    bounds = np.full((len(images), 2), np.nan)
    for i, image in enumerate(images):
        # NumPy, because torch.quantile refuses more than 16 million voxels.
        values = image if foreground is None else image[(foreground[i] > 0.5).expand_as(image)]
        values = values.double().cpu().numpy().ravel()
        values = values[np.isfinite(values)]
        if len(values):
            bounds[i] = np.percentile(values, [lower, upper])
    return torch.from_numpy(bounds)


def percentile_window(
    images: torch.Tensor,
    lower: float = 0.5,
    upper: float = 99.5,
    *,
    foreground: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Maps each image through the window between two of its own percentiles, as is usual for MR.

    Scale a generated image with [`scale_to_bounds`] and the bounds of its real one: with bounds of its own, it would
    be judged by its outliers.

    Args:
        images, lower, upper, foreground:
            As in [`percentile_bounds`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the images in [0, 1] as of [`scale_to_bounds`], and the bounds as of
        [`percentile_bounds`].

    Raises:
        `ValueError`: as [`percentile_bounds`].

    Example:

    ```python
    >>> real, bounds = percentile_window(t1n, foreground=t1n > 0)
    >>> generated = scale_to_bounds(predictions, bounds)
    ```
    """
    bounds = percentile_bounds(images, lower, upper, foreground=foreground)
    return scale_to_bounds(images, bounds), bounds
