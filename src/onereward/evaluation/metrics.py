"""Image, region and distribution measures as pure functions on tensors.

Every function returns one figure per image (or per image and label) and NaN where the figure is not defined, so that
the caller can count the undefined ones instead of averaging them away. Images are `(B, C, H, W)` in `[0, data_range]`,
masks `(B, 1, H, W)` with 1 where the image was repainted.
"""

import torch
import torch.nn.functional as F


def _masked_mean(values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean of `values` `(B, C, H, W)` over the mask and the channels, NaN for an empty mask."""
    inside = (masks > 0.5).expand_as(values)
    total = torch.where(inside, values, 0).flatten(1).sum(1)
    return total / inside.flatten(1).sum(1)


def masked_mae(images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    r"""
    Mean absolute error inside the mask, `$\frac{1}{|m|}\sum_{i \in m} |x_i - y_i|$`.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`.
        targets (`torch.Tensor`):
            Ground truth of the same shape and range.
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where the error counts.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, in the unit of the images; NaN for an empty mask.
    """
    return _masked_mean((images.double() - targets.double()).abs(), masks)


def masked_psnr(
    images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, data_range: float = 1.0
) -> torch.Tensor:
    r"""
    Peak signal-to-noise ratio inside the mask, `$10 \log_{10}(R^2 / \mathrm{MSE}_m)$`, one figure per image.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`.
        targets (`torch.Tensor`):
            Ground truth of the same shape and range.
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where the error counts.
        data_range (`float`, *optional*, defaults to `1.0`):
            `R`, the declared width of the intensity range. It is never read off the images, because the score would
            then depend on outliers of the prediction.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, in dB; infinite for identical regions, NaN for an empty mask.
    """
    mse = _masked_mean((images.double() - targets.double()) ** 2, masks)
    return 10 * torch.log10(data_range**2 / mse)


def ssim_map(
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
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
            Images of shape `(B, C, H, W)`.
        targets (`torch.Tensor`):
            Ground truth of the same shape and range.
        data_range (`float`, *optional*, defaults to `1.0`):
            `R`, the declared width of the intensity range. SSIM is not shift-invariant: map the images to `[0, R]`
            first.
        window_size (`int`, *optional*, defaults to `11`):
            Side of the window, odd.
        sigma (`float`, *optional*, defaults to `1.5`):
            Standard deviation of the window's weights in pixels.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)` in float64.

    Raises:
        `ValueError`: when the window is even or larger than the image, which has no full window then.
    """
    if window_size % 2 == 0:
        raise ValueError(f"`window_size` is {window_size}; it must be odd, for example {window_size + 1}.")
    if min(images.shape[-2:]) < window_size:
        raise ValueError(
            f"`images` are {images.shape[-2]} x {images.shape[-1]} pixels, smaller than the {window_size} pixel "
            "window; pass larger images or a smaller odd `window_size`."
        )
    # float64: the variances are differences of nearly equal numbers.
    x, y = images.double(), targets.double()
    channels, pad = x.shape[1], window_size // 2
    offsets = torch.arange(-pad, pad + 1, dtype=torch.float64, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()

    def mirrored(size):
        index = torch.arange(-pad, size + pad, device=x.device)
        index = torch.where(index < 0, -index - 1, index)
        return torch.where(index >= size, 2 * size - 1 - index, index)

    rows, columns = mirrored(x.shape[-2]), mirrored(x.shape[-1])

    def blur(a):
        a = a[..., rows, :][..., columns]
        a = F.conv2d(a, weights.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
        return F.conv2d(a, weights.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def ssim(
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
) -> torch.Tensor:
    """
    Mean structural similarity over the windows that lie wholly inside the image, one figure per image.

    Equal to `skimage.metrics.structural_similarity` and MONAI's `SSIMMetric`; torchmetrics from 1.5 on also averages
    the mirrored border and therefore differs, most of all on skull-stripped brains. Arguments as in [`ssim_map`].

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, 1 for identical images.
    """
    values = ssim_map(images, targets, data_range=data_range, window_size=window_size, sigma=sigma)
    pad = window_size // 2
    height, width = values.shape[-2:]
    return values[..., pad : height - pad, pad : width - pad].flatten(1).mean(1)


def masked_ssim(
    images: torch.Tensor,
    targets: torch.Tensor,
    masks: torch.Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
) -> torch.Tensor:
    """
    Structural similarity of the repainted region in its real surroundings (composite mode).

    The region is pasted into the ground truth, and the full-size [`ssim_map`] is averaged over the mask. Setting the
    outside to zero instead, as the BraTS inpainting challenge does, lets a constant fill score 0.69 where this mode
    gives it 0.36.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`.
        targets (`torch.Tensor`):
            Ground truth of the same shape and range.
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where the image was repainted.
        data_range, window_size, sigma:
            As in [`ssim_map`].

    Returns:
        `torch.Tensor` of shape `(B,)` in float64; NaN for an empty mask.
    """
    pasted = torch.where(masks > 0.5, images, targets)
    values = ssim_map(pasted, targets, data_range=data_range, window_size=window_size, sigma=sigma)
    return _masked_mean(values, masks)


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
