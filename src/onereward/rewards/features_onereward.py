# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
"""What is to be seen of a repainted image without any training: its detail at several scales, by region."""

import torch
import torch.nn.functional as F


NUM_DETAILS, NUM_REGIONS = 13, 6


def _blur(image: torch.Tensor, times: int = 1) -> torch.Tensor:
    for _ in range(times):
        image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel_size=3, stride=1)
    return image


def tissue_mask(source: torch.Tensor) -> torch.Tensor:
    """
    Where there is something to see, unlike in the empty background around a head: above -0.88 once blurred.

    Args:
        source (`torch.Tensor` of shape `(B, C, H, W)`):
            Values in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(B, 1, H, W)`, 0 or 1.
    """
    return (_blur(source.mean(dim=1, keepdim=True), times=2) > -0.88).to(source.dtype)


def pull_push(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """
    Fill in what is not known with a smooth continuation of what is: averages of known pixels over ever larger squares,
    each pixel from the smallest square that holds enough of them (S. J. Gortler et al., The Lumigraph, SIGGRAPH 1996,
    https://doi.org/10.1145/237170.237200).

    Args:
        image (`torch.Tensor` of shape `(B, C, H, W)`):
            Image.
        known (`torch.Tensor` of shape `(B, 1, H, W)`):
            1 where its pixels count.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, equal to `image` where known; 0 everywhere if nothing is.
    """
    levels = [(image * known, known)]
    while max(levels[-1][1].shape[-2:]) > 1:
        levels.append(tuple(F.avg_pool2d(level, 2, ceil_mode=True) for level in levels[-1]))
    filled = torch.zeros_like(levels[-1][0])
    for total, weight in reversed(levels):
        trust = (4 * weight).clamp(max=1)  # a quarter of a square is enough
        filled = F.interpolate(filled, size=total.shape[-2:], mode="bilinear")
        filled = trust * total / weight.clamp(min=1e-6) + (1 - trust) * filled
    return filled


def details(image: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
    """
    What is to be seen in an image without any training: the image itself, three bands of a Laplacian pyramid kept at
    full size, the logarithm of each band's local contrast, the absolute finest band, the absolute gradient; the change
    from the source; coarse differences from the continuation of the surroundings and from the other side of the
    picture; and the image in standard deviations of the tissue outside the mask from that tissue's mean.

    Args:
        image, source (`torch.Tensor` of shape `(B, C, H, W)`):
            Images, values in [-1, 1].
        mask (`torch.Tensor` of shape `(B, 1, H, W)`):
            1 = repainted.
        tissue (`torch.Tensor` of shape `(B, 1, H, W)`):
            From [`tissue_mask`].

    Returns:
        `torch.Tensor` of shape `(B, 13 C, H, W)`.
    """
    fine = _blur(image)
    middle = _blur(fine)
    coarse = _blur(middle, times=2)
    right = F.pad((image[..., 1:] - image[..., :-1]).abs(), (0, 1))
    down = F.pad((image[..., 1:, :] - image[..., :-1, :]).abs(), (0, 0, 0, 1))
    bands = [image - fine, fine - middle, middle - coarse]
    contrasts = [(_blur(band**2, times=2) + 1e-4).log() for band in bands]

    known = tissue * (1 - mask)
    continued = torch.where(mask > 0, pull_push(source, known), source)
    comparisons = [image - source, _blur(image - continued, times=4), _blur(image - image.flip(-1), times=4)]

    weight = known / known.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    mean = (source * weight).sum(dim=(2, 3), keepdim=True)
    std = ((source - mean) ** 2 * weight).sum(dim=(2, 3), keepdim=True).sqrt()
    standardized = (fine - mean) / (std + 0.02)
    return torch.cat([image, *bands, *contrasts, bands[0].abs(), right + down, *comparisons, standardized], dim=1)


def regions(mask: torch.Tensor, one_hot: torch.Tensor, tissue: torch.Tensor, reach: int = 8) -> torch.Tensor:
    """
    Where to look, as weights in [0, 1]: inside the mask, the tissue outside, the tissue up to `reach` pixels around
    it, at its border, beside the border on either side, and each label.

    Args:
        mask (`torch.Tensor` of shape `(B, 1, H, W)`):
            1 = repainted.
        one_hot (`torch.Tensor` of shape `(B, K, H, W)`):
            One-hot labels inside the mask; K may be 0.
        tissue (`torch.Tensor` of shape `(B, 1, H, W)`):
            From [`tissue_mask`].
        reach (`int`, *optional*, defaults to 8):
            Width of the surroundings in pixels.

    Returns:
        `torch.Tensor` of shape `(B, 6 + K, H, W)`.
    """

    def grow(x, by):
        return F.max_pool2d(x, kernel_size=2 * by + 1, stride=1, padding=by)

    def shrink(x, by):
        return -grow(-x, by)

    grown, shrunk = grow(mask, 1), shrink(mask, 1)
    places = [
        mask,
        (1 - mask) * tissue,
        (grow(mask, reach) - mask) * tissue,
        grown - shrunk,
        grow(mask, 3) - grown,
        shrunk - shrink(mask, 3),
    ]
    return torch.cat([*places, one_hot], dim=1)


def region_statistics(features: torch.Tensor, weights: torch.Tensor, floor: float = 0.03) -> torch.Tensor:
    """
    Mean and logarithm of the standard deviation of features over regions; both 0 where a region is empty.

    Args:
        features (`torch.Tensor` of shape `(B, C, h, w)`):
            Feature maps.
        weights (`torch.Tensor` of shape `(B, R, H, W)`):
            Weight of each pixel in each region, averaged to the size of the maps.
        floor (`float`, *optional*, defaults to 0.03):
            Standard deviation that counts as none.

    Returns:
        `torch.Tensor` of shape `(B, 2 R C)`.
    """
    weights = F.adaptive_avg_pool2d(weights, features.shape[-2:]).flatten(2)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-6)
    features = features.flatten(2).transpose(1, 2)
    mean = weights @ features
    variance = (weights @ features**2 - mean**2).clamp(min=0)
    return torch.cat([mean, (variance / floor**2 + 1).log() / 2], dim=2).flatten(1)


def correlation_ratio(features: torch.Tensor, mask: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
    r"""
    How well features follow the label map: the share of their variance inside the mask that lies between labels,

    $$\eta^2 = \frac{\sum_k n_k (\mu_k - \mu)^2}{\sum_i (x_i - \mu)^2}$$

    the similarity of images by which A. Roche et al. register modalities (The Correlation Ratio as a New Similarity
    Measure, MICCAI 1998, https://doi.org/10.1007/BFb0056301).

    Args:
        features (`torch.Tensor` of shape `(B, C, H, W)`):
            Feature maps.
        mask (`torch.Tensor` of shape `(B, 1, H, W)`):
            1 = repainted.
        one_hot (`torch.Tensor` of shape `(B, K, H, W)`):
            One-hot labels inside the mask; K may be 0.

    Returns:
        `torch.Tensor` of shape `(B, C)`, from 0 to 1.
    """
    values, weights, counts = features.flatten(2).transpose(1, 2), one_hot.flatten(2), mask.flatten(2)
    number = counts.sum(dim=2, keepdim=True)
    share = weights.sum(dim=2, keepdim=True) / number
    means = (weights @ values) / weights.sum(dim=2, keepdim=True).clamp(min=1e-6)
    mean = (counts @ values) / number
    variance = (counts @ (values - mean) ** 2) / number
    between = (share * (means - mean) ** 2).sum(dim=1, keepdim=True)
    return (between / (variance + 1e-4)).squeeze(1)
