"""Image, region and kernel measures as pure functions on tensors.

Every function returns one figure per image (or per image and label) in float64, and NaN or infinity where the figure
is not defined, so that the caller can count the undefined ones instead of averaging them away. Images are
`(B, C, H, W)`, volumes `(B, C, D, H, W)` with `spatial_dims=3`; both in `[0, data_range]`. Masks are
`(B, 1, H, W)` or `(B, 1, D, H, W)` with 1 where the image was repainted. docs/metrics.md has every edge case.
"""

import torch
import torch.nn.functional as F


# Weights of the scales from the finest to the coarsest, of Wang, Simoncelli and Bovik 2003.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

# More than a colour picture with opacity has, or a case with four contrasts.
MAX_CHANNELS = 4


def check_pair(
    images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor | None = None, spatial_dims: int = 2
) -> None:
    """
    Checks that images, targets and masks can be measured against each other.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`, or `(B, C, D, H, W)` with `spatial_dims=3`, floating point.
        targets (`torch.Tensor`):
            Ground truth of the same shape.
        masks (`torch.Tensor`, *optional*):
            Masks of the same shape with one channel.
        spatial_dims (`int`, *optional*, defaults to `2`):
            2 for images, 3 for volumes.

    Raises:
        `ValueError`: when a shape does not fit; when the images hold integers, whose range the default
        `data_range=1.0` would get wrong; or when there are more than four channels, because a stack of slices
        `(1, X, Y, Z)` would otherwise be measured as one picture with X colours.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"`spatial_dims` is {spatial_dims!r}; it must be 2 for images or 3 for volumes.")
    shape = tuple(images.shape)
    wanted = "(B, C, H, W)" if spatial_dims == 2 else "(B, C, D, H, W)"
    if len(shape) != spatial_dims + 2:
        raise ValueError(
            f"`images` have shape {shape}; with spatial_dims={spatial_dims} they must be {wanted}. Volumes need "
            "spatial_dims=3 and an axis for the channels: `volumes[:, None]`."
        )
    if shape[1] > MAX_CHANNELS:
        raise ValueError(
            f"`images` have shape {shape}, which makes {shape[1]} channels of {wanted}. A volume needs "
            "`volumes[:, None]` and spatial_dims=3; other channels go into the batch: `images.flatten(0, 1)[:, None]`."
        )
    if tuple(targets.shape) != shape:
        raise ValueError(f"`targets` have shape {tuple(targets.shape)} but `images` {shape}; they must agree.")
    if not (images.is_floating_point() and targets.is_floating_point()):
        raise ValueError(
            f"`images` are {images.dtype} and `targets` {targets.dtype}; pass floating point in [0, data_range], for "
            "example `images.float() / 255`."
        )
    if masks is not None and tuple(masks.shape) != (shape[0], 1, *shape[2:]):
        raise ValueError(
            f"`masks` have shape {tuple(masks.shape)} but `images` {shape}; expected {(shape[0], 1, *shape[2:])}."
        )


def _masked_mean(values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean of `values` `(B, C, ...)` over the mask and the channels, NaN for an empty mask."""
    inside = (masks > 0.5).expand_as(values)
    total = torch.where(inside, values, 0).flatten(1).sum(1)
    return total / inside.flatten(1).sum(1)


def _decibels(mse: torch.Tensor, data_range: float) -> torch.Tensor:
    return 10 * torch.log10(data_range**2 / mse)


def mae(images: torch.Tensor, targets: torch.Tensor, *, spatial_dims: int = 2) -> torch.Tensor:
    r"""
    Mean absolute error, `$\frac{1}{n}\sum_i |x_i - y_i|$`, one figure per image.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`, or `(B, C, D, H, W)` with `spatial_dims=3`.
        targets (`torch.Tensor`):
            Ground truth of the same shape and range.
        spatial_dims (`int`, *optional*, defaults to `2`):
            2 for images, 3 for volumes.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, in the unit of the images; NaN where a pixel is NaN.

    Raises:
        `ValueError`: as [`check_pair`].
    """
    check_pair(images, targets, spatial_dims=spatial_dims)
    return (images.double() - targets.double()).abs().flatten(1).mean(1)


def rmse(images: torch.Tensor, targets: torch.Tensor, *, spatial_dims: int = 2) -> torch.Tensor:
    r"""
    Root mean squared error, `$\sqrt{\frac{1}{n}\sum_i (x_i - y_i)^2}$`, one figure per image: the root is taken before
    any mean over images. Arguments, result and errors as in [`mae`].
    """
    check_pair(images, targets, spatial_dims=spatial_dims)
    return ((images.double() - targets.double()) ** 2).flatten(1).mean(1).sqrt()


def psnr(
    images: torch.Tensor, targets: torch.Tensor, *, data_range: float = 1.0, spatial_dims: int = 2
) -> torch.Tensor:
    r"""
    Peak signal-to-noise ratio, `$10 \log_{10}(R^2 / \mathrm{MSE})$`, one figure per image. Of a batch,
    `torchmetrics` pools the squared error first, which is another figure.

    Args:
        images, targets, spatial_dims:
            As in [`mae`].
        data_range (`float`, *optional*, defaults to `1.0`):
            `R`, the declared width of the intensity range; never read off the images.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, in dB; infinite for identical images, which
        [`~onereward.evaluation.bootstrap.measured_mean`] counts as failed rather than capping them.

    Raises:
        `ValueError`: as [`check_pair`].
    """
    check_pair(images, targets, spatial_dims=spatial_dims)
    return _decibels(((images.double() - targets.double()) ** 2).flatten(1).mean(1), data_range)


def masked_mae(
    images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, *, spatial_dims: int = 2
) -> torch.Tensor:
    r"""
    Mean absolute error inside the mask, `$\frac{1}{|m|}\sum_{i \in m} |x_i - y_i|$`.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`, or `(B, C, D, H, W)` with `spatial_dims=3`.
        targets (`torch.Tensor`):
            Ground truth of the same shape and range.
        masks (`torch.Tensor`):
            Masks of the same shape with one channel, 1 where the error counts.
        spatial_dims (`int`, *optional*, defaults to `2`):
            2 for images, 3 for volumes.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, in the unit of the images; NaN for an empty mask.

    Raises:
        `ValueError`: as [`check_pair`].
    """
    check_pair(images, targets, masks, spatial_dims)
    return _masked_mean((images.double() - targets.double()).abs(), masks)


def masked_rmse(
    images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, *, spatial_dims: int = 2
) -> torch.Tensor:
    r"""
    Root mean squared error inside the mask, `$\sqrt{\frac{1}{|m|}\sum_{i \in m} (x_i - y_i)^2}$`. Arguments, result
    and errors as in [`masked_mae`].
    """
    check_pair(images, targets, masks, spatial_dims)
    return _masked_mean((images.double() - targets.double()) ** 2, masks).sqrt()


def masked_psnr(
    images: torch.Tensor,
    targets: torch.Tensor,
    masks: torch.Tensor,
    data_range: float = 1.0,
    *,
    spatial_dims: int = 2,
) -> torch.Tensor:
    r"""
    Peak signal-to-noise ratio inside the mask, `$10 \log_{10}(R^2 / \mathrm{MSE}_m)$`, one figure per image.

    Args:
        images, targets, masks, spatial_dims:
            As in [`masked_mae`].
        data_range (`float`, *optional*, defaults to `1.0`):
            `R`, the declared width of the intensity range. It is never read off the images, because the score would
            then depend on outliers of the prediction.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, in dB; infinite for identical regions, NaN for an empty mask.

    Raises:
        `ValueError`: as [`check_pair`].
    """
    check_pair(images, targets, masks, spatial_dims)
    return _decibels(_masked_mean((images.double() - targets.double()) ** 2, masks), data_range)


def gaussian_window(window_size: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """Weights `(window_size,)` of a normalised Gaussian window in float64; in more dimensions, their outer product."""
    offsets = torch.arange(window_size, dtype=torch.float64) - window_size // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def mirror(a: torch.Tensor, pad: int, spatial_dims: int) -> torch.Tensor:
    """`a` continued by `pad` pixels at each end of the last `spatial_dims` axes as `d c b a | a b c d | d c b a`."""
    for dim in range(-spatial_dims, 0):
        size = a.shape[dim]
        index = torch.arange(-pad, size + pad, device=a.device)
        index = torch.where(index < 0, -index - 1, index)
        a = a.index_select(dim, torch.where(index >= size, 2 * size - 1 - index, index))
    return a


def ssim_terms(
    x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, data_range: float | torch.Tensor, spatial_dims: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The two factors of structural similarity in every window that lies wholly inside, luminance and contrast-structure:

    `$l = \frac{2\mu_x\mu_y + C_1}{\mu_x^2+\mu_y^2+C_1}$` and
    `$cs = \frac{2\sigma_{xy} + C_2}{\sigma_x^2+\sigma_y^2+C_2}$` with `$C_1 = (0.01 R)^2$`, `$C_2 = (0.03 R)^2$`.

    Args:
        x, y (`torch.Tensor`):
            Images in float64 with `spatial_dims` axes at the end: the variances are differences of nearly equal
            numbers.
        weights (`torch.Tensor` of shape `(w,)`):
            Weights of the window along each axis.
        data_range (`float` or `torch.Tensor`):
            `R`.
        spatial_dims (`int`):
            Number of axes that the window spans.

    Returns:
        Two `torch.Tensor` in float64 with each spatial axis `w - 1` shorter.
    """

    def blur(a):
        # A sum of shifted copies: for one thin window several times as fast as a float64 convolution.
        for dim in range(-spatial_dims, 0):
            size = a.shape[dim] - len(weights) + 1
            total = a.narrow(dim, 0, size) * weights[0]
            for k in range(1, len(weights)):
                total.add_(a.narrow(dim, k, size), alpha=float(weights[k]))
            a = total
        return a

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * cov + c2) / (var_x + var_y + c2)


def _check_window(images: torch.Tensor, targets: torch.Tensor, data_range: float, window_size: int) -> None:
    if window_size % 2 == 0:
        raise ValueError(f"`window_size` is {window_size}; it must be odd, for example {window_size + 1}.")
    size = tuple(images.shape[2:])
    if min(size) < window_size:
        raise ValueError(
            f"`images` are {' x '.join(map(str, size))} pixels, smaller than the {window_size} pixel "
            "window; pass larger images or a smaller odd `window_size`."
        )
    low, high = (float(targets.min()), float(targets.max())) if len(targets) else (0.0, 0.0)
    if low < -1e-4 * data_range or high > (1 + 1e-4) * data_range:
        raise ValueError(
            f"`targets` range over [{low:g}, {high:g}] but `data_range` is {data_range:g}. SSIM changes when both "
            "images are shifted; bring them to [0, data_range] first, see `onereward.evaluation.windows`."
        )


def ssim_map(
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    spatial_dims: int = 2,
) -> torch.Tensor:
    r"""
    Structural similarity at every pixel (Wang et al. 2004, IEEE TIP 13(4)), with Gaussian weights:

    `$\frac{(2\mu_x\mu_y + C_1)(2\sigma_{xy} + C_2)}{(\mu_x^2+\mu_y^2+C_1)(\sigma_x^2+\sigma_y^2+C_2)}$` with
    `$C_1 = (0.01 R)^2$`, `$C_2 = (0.03 R)^2$`.

    The map has the size of the image: windows that reach over the edge see the image mirrored there
    (`d c b a | a b c d`), as in
    `skimage.metrics.structural_similarity(..., gaussian_weights=True, use_sample_covariance=False, full=True)`.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`, or `(B, C, D, H, W)` with `spatial_dims=3`.
        targets (`torch.Tensor`):
            Ground truth of the same shape, in `[0, data_range]`.
        data_range (`float`, *optional*, defaults to `1.0`):
            `R`, the declared width of the intensity range. SSIM is not shift-invariant: map the images to `[0, R]`
            first. Values of the prediction beyond it are measured as they are.
        window_size (`int`, *optional*, defaults to `11`):
            Side of the window, odd.
        sigma (`float`, *optional*, defaults to `1.5`):
            Standard deviation of the window's weights in pixels.
        spatial_dims (`int`, *optional*, defaults to `2`):
            2 for images, 3 for volumes with a window in all three directions.

    Returns:
        `torch.Tensor` of the shape of the images in float64.

    Raises:
        `ValueError`: when the window is even or larger than the image, which has no full window then; when the targets
        leave `[0, data_range]`; and as [`check_pair`].
    """
    check_pair(images, targets, spatial_dims=spatial_dims)
    _check_window(images, targets, data_range, window_size)
    x, y = (mirror(a.double(), window_size // 2, spatial_dims) for a in (images, targets))
    luminance, contrast = ssim_terms(x, y, gaussian_window(window_size, sigma), data_range, spatial_dims)
    return luminance * contrast


def ssim(
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    spatial_dims: int = 2,
) -> torch.Tensor:
    """
    Mean structural similarity over the windows that lie wholly inside the image, one figure per image.

    Equal to `skimage.metrics.structural_similarity` and MONAI's `SSIMMetric`; torchmetrics from 1.5 on also averages
    the mirrored border and therefore differs, most of all on skull-stripped brains. Arguments and errors as in
    [`ssim_map`].

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, 1 for identical images.
    """
    check_pair(images, targets, spatial_dims=spatial_dims)
    _check_window(images, targets, data_range, window_size)
    weights = gaussian_window(window_size, sigma)
    luminance, contrast = ssim_terms(images.double(), targets.double(), weights, data_range, spatial_dims)
    return (luminance * contrast).flatten(1).mean(1)


def masked_ssim(
    images: torch.Tensor,
    targets: torch.Tensor,
    masks: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    spatial_dims: int = 2,
) -> torch.Tensor:
    """
    Structural similarity of the repainted region in its real surroundings (composite mode).

    The region is pasted into the ground truth, and the full-size [`ssim_map`] is averaged over the mask. Setting the
    outside to zero instead, as the BraTS inpainting challenge does, lets a constant fill score far higher
    ([`~onereward.evaluation.brats2023.local_synthesis`] gives both).

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`, or `(B, C, D, H, W)` with `spatial_dims=3`.
        targets (`torch.Tensor`):
            Ground truth of the same shape and range.
        masks (`torch.Tensor`):
            Masks of the same shape with one channel, 1 where the image was repainted.
        data_range, window_size, sigma, spatial_dims:
            As in [`ssim_map`].

    Returns:
        `torch.Tensor` of shape `(B,)` in float64; NaN for an empty mask.

    Raises:
        `ValueError`: as [`ssim_map`].
    """
    check_pair(images, targets, masks, spatial_dims)
    pasted = torch.where(masks > 0.5, images, targets)
    settings = {"window_size": window_size, "sigma": sigma, "spatial_dims": spatial_dims}
    return _masked_mean(ssim_map(pasted, targets, data_range=data_range, **settings), masks)


def ms_ssim_scales(size: tuple[int, ...], window_size: int = 11) -> int:
    """
    Scales that MS-SSIM has on images of this size: the image is halved as long as a full window still fits, at most
    five times in all.

    Args:
        size (`tuple[int, ...]`):
            Length of each spatial axis in pixels.
        window_size (`int`, *optional*, defaults to `11`):
            Side of the window.

    Returns:
        `int` from 0 (not even one window fits) to 5.

    Example:

    ```python
    >>> ms_ssim_scales((64, 64)), ms_ssim_scales((256, 176))
    (3, 5)
    ```
    """
    return sum(min(size) // 2**scale >= window_size for scale in range(len(MS_SSIM_WEIGHTS)))


def ms_ssim(
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    spatial_dims: int = 2,
) -> tuple[torch.Tensor, int]:
    r"""
    Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003, Asilomar):

    `$\prod_{j<M} \max(\overline{cs}_j, 0)^{w_j} \cdot \max(\overline{l \cdot cs}_M, 0)^{w_M}$`, the factors of
    [`ssim_terms`] averaged over each scale, which is the one before averaged over 2 x 2 pixels.

    Where the image is too small for five scales there are fewer, and their weights are divided by their sum. Figures
    of different numbers of scales are not comparable, hence the number beside the figure.

    Args:
        images, targets, data_range, window_size, sigma, spatial_dims:
            As in [`ssim_map`].

    Returns:
        `tuple[torch.Tensor, int]`: figures of shape `(B,)` in float64 within [0, 1], 1 for identical images, and the
        number of scales, at most 5.

    Raises:
        `ValueError`: as [`ssim_map`].
    """
    return _ms_ssim(images, targets, None, data_range, window_size, sigma, spatial_dims)


def masked_ms_ssim(
    images: torch.Tensor,
    targets: torch.Tensor,
    masks: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    spatial_dims: int = 2,
) -> tuple[torch.Tensor, int]:
    """
    Multi-scale structural similarity of the repainted region in its real surroundings.

    The region is pasted into the ground truth; at each scale the full-size map is averaged over the pixels that hold
    any masked pixel. Arguments as in [`masked_ssim`], result as in [`ms_ssim`] with NaN for an empty mask.
    """
    check_pair(images, targets, masks, spatial_dims)
    pasted = torch.where(masks > 0.5, images, targets)
    return _ms_ssim(pasted, targets, masks, data_range, window_size, sigma, spatial_dims)


def _ms_ssim(images, targets, masks, data_range, window_size, sigma, spatial_dims):
    check_pair(images, targets, spatial_dims=spatial_dims)
    _check_window(images, targets, data_range, window_size)
    scales, window = ms_ssim_scales(images.shape[2:], window_size), gaussian_window(window_size, sigma)
    weights = torch.tensor(MS_SSIM_WEIGHTS[:scales], dtype=torch.float64)
    halve = F.avg_pool2d if spatial_dims == 2 else F.avg_pool3d
    x, y, inside = images.double(), targets.double(), None if masks is None else (masks > 0.5).double()
    product = 1.0
    for scale, weight in enumerate(weights / weights.sum()):
        if masks is None:
            luminance, contrast = ssim_terms(x, y, window, data_range, spatial_dims)
        else:
            mirrored = (mirror(a, window_size // 2, spatial_dims) for a in (x, y))
            luminance, contrast = ssim_terms(*mirrored, window, data_range, spatial_dims)
        values = luminance * contrast if scale == scales - 1 else contrast
        mean = values.flatten(1).mean(1) if masks is None else _masked_mean(values, inside)
        product = product * mean.clamp(min=0) ** weight
        # An odd last row is dropped as elsewhere, but not under a mask, which may lie in that row alone.
        if scale < scales - 1:
            x, y = (halve(a, 2, ceil_mode=masks is not None) for a in (x, y))
            inside = None if masks is None else (halve(inside, 2, ceil_mode=True) > 0).double()
    return product, scales


def image_measures(
    images: torch.Tensor,
    targets: torch.Tensor,
    masks: torch.Tensor | None = None,
    *,
    data_range: float = 1.0,
    spatial_dims: int = 2,
) -> dict[str, torch.Tensor]:
    """
    All image measures of this file at once, plain or inside the mask.

    Args:
        images, targets, data_range, spatial_dims:
            As in [`ssim_map`].
        masks (`torch.Tensor`, *optional*):
            As in [`masked_ssim`]. Without them the whole image is measured.

    Returns:
        `dict[str, torch.Tensor]`: `mae`, `rmse`, `psnr` (dB), `ssim`, `ms_ssim` and `ms_ssim_scales` (how many scales
        `ms_ssim` has) -> `(B,)` in float64. `psnr` is infinite for identical images; all but `ms_ssim_scales` are NaN
        for an empty mask.

    Raises:
        `ValueError`: as [`ssim_map`].

    Example:

    ```python
    >>> figures = image_measures(images, targets, masks)
    >>> report = {name: measured_mean(values, case_ids) for name, values in figures.items()}
    ```
    """
    dims = {"spatial_dims": spatial_dims}
    ranged = {"data_range": data_range, **dims}
    if masks is None:
        figures = {
            "mae": mae(images, targets, **dims),
            "rmse": rmse(images, targets, **dims),
            "psnr": psnr(images, targets, **ranged),
            "ssim": ssim(images, targets, **ranged),
        }
        multiscale, scales = ms_ssim(images, targets, **ranged)
    else:
        figures = {
            "mae": masked_mae(images, targets, masks, **dims),
            "rmse": masked_rmse(images, targets, masks, **dims),
            "psnr": masked_psnr(images, targets, masks, **ranged),
            "ssim": masked_ssim(images, targets, masks, **ranged),
        }
        multiscale, scales = masked_ms_ssim(images, targets, masks, **ranged)
    return {**figures, "ms_ssim": multiscale, "ms_ssim_scales": torch.full_like(multiscale, scales)}


def dice(predictions: torch.Tensor, references: torch.Tensor, labels: list[int]) -> torch.Tensor:
    r"""
    Dice overlap of each label, `$2|A \cap B| / (|A| + |B|)$`.

    Args:
        predictions (`torch.Tensor`):
            Integer label maps of shape `(B, ...)`.
        references (`torch.Tensor`):
            Integer label maps of the same shape.
        labels (`list[int]`):
            Label values to compare.

    Returns:
        `torch.Tensor` of shape `(B, len(labels))` in float64. A label that only one of the two has scores 0; a label
        that neither has is NaN, because there is nothing to agree on (MONAI's `ignore_empty` would also drop the case
        where only the reference is empty, and thereby every false alarm).
    """
    predictions, references = predictions.flatten(1), references.flatten(1)
    columns = []
    for label in labels:
        a, b = predictions == label, references == label
        columns.append(2 * (a & b).sum(1).double() / (a.sum(1) + b.sum(1)).double())
    return torch.stack(columns, 1)


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    r"""The kernel of KID, `$k(x, y) = (x^\top y / d + 1)^3$` for features of `d` dimensions."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kernel_distance(
    features: torch.Tensor,
    references: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    reference_weights: torch.Tensor | None = None,
    kernel=polynomial_kernel,
) -> torch.Tensor:
    r"""
    Unbiased squared maximum mean discrepancy; with the default kernel, the Kernel Inception Distance of
    [Demystifying MMD GANs](https://huggingface.co/papers/1801.01401) on features of your own:

    `$\frac{1}{m(m-1)}\sum_{i \neq j} k(x_i, x_j) + \frac{1}{n(n-1)}\sum_{i \neq j} k(y_i, y_j)
    - \frac{2}{mn}\sum_{i,j} k(x_i, y_j)$`

    Args:
        features (`torch.Tensor`):
            Features of shape `(m, d)`, of comparable scale in every dimension.
        references (`torch.Tensor`):
            Features of shape `(n, d)` of real images.
        weights (`torch.Tensor`, *optional*):
            How often each row of `features` counts, `(..., m)`: the counts of a bootstrap. A row is never paired with
            its own copies, which would make every resample look further away than the sample. Defaults to once each.
        reference_weights (`torch.Tensor`, *optional*):
            The same for `references`, `(..., n)`.
        kernel (`Callable`, *optional*, defaults to [`polynomial_kernel`]):
            Maps `(m, d)` and `(n, d)` features to the `(m, n)` matrix of kernel values.

    Returns:
        `torch.Tensor` in float64 of the leading shape of the weights (a scalar without them). Zero in expectation when
        both come from one distribution, so slightly negative values occur; NaN with fewer than two rows on either
        side.
    """
    u = torch.ones(len(features)) if weights is None else weights
    v = torch.ones(len(references)) if reference_weights is None else reference_weights
    u, v = u.to(features.device, torch.float64), v.to(references.device, torch.float64)

    def within(matrix, w):
        pairs = ((w @ matrix) * w).sum(-1) - w**2 @ matrix.diagonal()
        return pairs / (w.sum(-1) ** 2 - (w**2).sum(-1))

    between = ((u @ kernel(features, references)) * v).sum(-1) / (u.sum(-1) * v.sum(-1))
    return within(kernel(features, features), u) + within(kernel(references, references), v) - 2 * between
