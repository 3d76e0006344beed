"""Perceptual distances: LPIPS where its package is installed, or the features of any network at hand.

LPIPS (https://huggingface.co/papers/1801.03924) was calibrated on people's judgements of photographs. On medical
images it is a distance between textures as a photograph network sees them, no more. `lpips` brings torchvision and
downloads its trunk, hence an extra; [`FeatureDistance`] is the same distance without learned weights on a network of
your own.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

from onereward.evaluation.metrics import check_pair


SMALLEST = 32  # pixels; below, the trunks of LPIPS have nothing left after their pooling


def feature_distance_maps(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r"""
    Squared distance of unit-length features at each place, `$\sum_c (\hat{x}_c - \hat{y}_c)^2$`, the inner term of
    [LPIPS](https://huggingface.co/papers/1801.03924) without its learned weights.

    Args:
        first, second (`torch.Tensor`):
            Feature maps of shape `(B, C, h, w)`.

    Returns:
        `torch.Tensor` of shape `(B, h, w)` in [0, 4].
    """
    return ((F.normalize(first, dim=1) - F.normalize(second, dim=1)) ** 2).sum(1)


def load_lpips(net: str = "alex") -> Callable:
    """
    LPIPS of the `lpips` package.

    Args:
        net (`str`, *optional*, defaults to `"alex"`):
            Trunk, `"alex"`, `"vgg"` or `"squeeze"`. The package downloads its weights on first use.

    Returns:
        `Callable`: `distance(images, targets, masks=None)` -> `(B,)` in float64, lower is more alike, with
        `distance.name` to report it by; arguments as those of [`FeatureDistance`].

    Raises:
        `ImportError`: when the package is not installed, or does not load.

    Example:

    ```python
    >>> lpips = load_lpips("alex")
    >>> lpips(images, targets).shape
    torch.Size([8])
    ```
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise ImportError(
            "LPIPS needs the `lpips` package, which brings torchvision and downloads its weights: "
            "`pip install onereward[lpips]`. Without it, measure with `FeatureDistance(path)` on a network of your "
            f"own, or leave LPIPS out. The import said: {error}"
        ) from error
    model = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)

    @torch.no_grad()
    def distance(images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        images, targets = _pair(images, targets, masks)
        model.to(images.device).spatial = masks is not None
        values = model(2 * images - 1, 2 * targets - 1)
        return _mean(values.double(), masks)

    distance.name = f"lpips_{net}"
    return distance


class FeatureDistance:
    """
    Perceptual distance in the features of a network of your own: [`feature_distance_maps`] of each hidden layer,
    averaged over the image or the mask, then over the layers.

    It is *not* LPIPS and its numbers do not compare with LPIPS, nor between networks; `name` says what it is.

    Args:
        path (`str` or `os.PathLike`):
            Local folder or Hub id of an image backbone in transformers' format, with safetensors weights. Its
            `preprocessor_config.json` gives mean and standard deviation of the pixels; 0.5 and 0.5 without one.
            Images go in at their own size, so the network must take that size.

    Attributes:
        name (`str`):
            `features:` and the last part of the path, to report the figures by.

    Raises:
        `ValueError`: when there is no such model, or it gives no hidden layers.

    Example:

    ```python
    >>> distance = FeatureDistance("models/my-resnet")
    >>> distance(images, targets, masks)  # (B,), NaN where the mask is empty
    ```
    """

    def __init__(self, path: str | os.PathLike):
        from transformers import AutoImageProcessor, AutoModel

        try:
            self.model = AutoModel.from_pretrained(path, use_safetensors=True).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`path` is {str(path)!r}, from which no image backbone loads; pass a folder with config.json and "
                f"model.safetensors. Loading said: {error}"
            ) from error
        try:
            processor = AutoImageProcessor.from_pretrained(path)
            mean, std = processor.image_mean, processor.image_std
        except (OSError, ValueError, ImportError, AttributeError):
            mean, std = [0.5], [0.5]
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.channels = getattr(self.model.config, "num_channels", 3)
        self.name = f"features:{os.path.basename(os.path.normpath(path))}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor`):
                Images of shape `(B, C, H, W)` in [0, 1], at least 32 pixels a side. Grey is repeated for a colour
                network.
            targets (`torch.Tensor`):
                Ground truth of the same shape.
            masks (`torch.Tensor`, *optional*):
                Masks of shape `(B, 1, H, W)`, 1 where the image was repainted: the region is pasted into the target,
                and the distance, brought to the size of the image, is averaged over the mask.

        Returns:
            `torch.Tensor` of shape `(B,)` in float64; 0 for identical images, NaN for an empty mask.

        Raises:
            `ValueError`: when shapes do not fit or the images are smaller than 32 pixels.
        """
        images, targets = _pair(images, targets, masks, self.channels)
        model = self.model.to(images.device)
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        size, patch_size = images.shape[-2:], getattr(model.config, "patch_size", None)
        layers = [
            _maps(model(pixel_values=(pixels - mean) / std, output_hidden_states=True), size, patch_size)
            for pixels in (images, targets)
        ]
        if not layers[0]:
            raise ValueError(f"`path` holds a {type(model).__name__}, which gives no hidden layers; pass another one.")
        total = 0
        for first, second in zip(*layers, strict=True):
            values = feature_distance_maps(first, second)[:, None].double()
            if masks is not None:
                values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
            total = total + _mean(values, masks)
        return total / len(layers[0])


def _pair(images, targets, masks, channels=3):
    """Checked, pasted and repeated to the channels of the network."""
    check_pair(images, targets, masks)
    if min(images.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"`images` are {images.shape[-2]} x {images.shape[-1]} pixels; perceptual networks need {SMALLEST} or "
            "more. Enlarge both images alike and say so in the report."
        )
    if images.shape[1] not in (1, channels):
        raise ValueError(f"`images` have {images.shape[1]} channels but the network takes 1 or {channels}.")
    if masks is not None:
        images = torch.where(masks > 0.5, images, targets)
    return (a.float().expand(-1, channels, -1, -1) for a in (images, targets))


def _maps(output, size: tuple[int, int], patch_size: int | None) -> list[torch.Tensor]:
    """The hidden layers as `(B, C, h, w)`; the tokens of a vision transformer laid out again, without class tokens."""
    layers = getattr(output, "reshaped_hidden_states", None) or output.hidden_states or ()
    if any(layer.ndim == 3 for layer in layers):
        height, width = size[0] // patch_size, size[1] // patch_size
        layers = [layer[:, -height * width :].transpose(1, 2).unflatten(2, (height, width)) for layer in layers]
    return list(layers)


def _mean(values: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """Mean of maps `(B, 1, h, w)` over all, or of full-size ones over the mask; NaN for an empty mask."""
    if masks is None:
        return values.flatten(1).mean(1)
    inside = (masks > 0.5).double()
    return (values * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
