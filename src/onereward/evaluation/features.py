"""Features of images and volumes for measures between distributions: what looks at the pictures, and how to stream.

An extractor is any callable `(images, masks=None, modalities=None) -> features`: images `(B, C, H, W)` in [0, 1] (or
volumes `(B, C, X, Y, Z)` for the 3-D ones) to features `(B, d)`. With masks it describes what lies in the mask. There
are four, and a function of your own does as well:

| extractor | looks at | d | what it is |
|---|---|---|---|
| [`Phantom64`] | slices | 32 | the built-in judge, trained on phantom labels; not Inception, not comparable with it |
| [`TransformersFeatures`] | slices | its own | any image backbone of transformers, from a folder or the Hub |
| [`Patches3D`] | volumes | 96 | statistics of blocks at three scales; built in, nothing trained |
| [`Monai3D`] | volumes | its own | a 3-D ResNet of MONAI with weights from a local safetensors file |

Distances in one extractor's features say nothing about distances in another's: name the extractor with every figure.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from onereward.evaluation.segmenter import Segmenter, load_segmenter


# Axes of a volume `(B, C, X, Y, Z)` in RAS+ orientation (`nibabel.as_closest_canonical`) that a slice of the plane is
# perpendicular to.
PLANES = {"sagittal": 2, "coronal": 3, "axial": 4}


def fit_square(images: torch.Tensor, side: int) -> torch.Tensor:
    """
    Pads images with zeros to a square, image in the middle, and resizes it; nothing is stretched or cut off.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`.
        side (`int`):
            Side of the result in pixels.

    Returns:
        `torch.Tensor` of shape `(B, C, side, side)`: bilinear, with an antialiasing filter where it shrinks; the very
        pixels where the images have that size already.
    """
    height, width = images.shape[-2:]
    longest = max(height, width)
    top, left = (longest - height) // 2, (longest - width) // 2
    images = F.pad(images, (left, longest - width - left, top, longest - height - top))
    if longest == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def crop_to_masks(images: torch.Tensor, masks: torch.Tensor, side: int, margin: float = 0.25) -> torch.Tensor:
    """
    Cuts out the square around each mask and brings it to one size.

    Args:
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)`.
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where to look.
        side (`int`):
            Side of the result in pixels.
        margin (`float`, *optional*, defaults to `0.25`):
            What is added on each side, as a share of the longer side of the mask's box. Surroundings are context: a
            region looks wrong by what it stands in. At the edge of the image, the square is filled up with zeros.

    Returns:
        `torch.Tensor` of shape `(B, C, side, side)`; NaN for an empty mask.
    """
    crops = []
    for image, mask in zip(images, masks, strict=True):
        rows, columns = (mask[0] > 0.5).nonzero(as_tuple=True)
        if len(rows) == 0:
            crops.append(image.new_full((1, image.shape[0], side, side), torch.nan))
            continue
        tall, wide = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        square = max(1, round(max(tall, wide) * (1 + 2 * margin)))
        top = int(rows.min()) - (square - tall) // 2
        left = int(columns.min()) - (square - wide) // 2
        height, width = image.shape[-2:]
        # Negative padding cuts.
        around = (-left, left + square - width, -top, top + square - height)
        crops.append(fit_square(F.pad(image[None], around), side))
    return torch.cat(crops)


def _check_images(images: torch.Tensor, dimensions: int = 4) -> None:
    kind = "images of shape (B, C, H, W)" if dimensions == 4 else "volumes of shape (B, C, X, Y, Z)"
    if not torch.is_tensor(images) or images.dim() != dimensions or not images.is_floating_point():
        came = f"{images.dtype} {tuple(images.shape)}" if torch.is_tensor(images) else type(images).__name__
        raise ValueError(f"`images` is {came}; expected {kind} of floats in [0, 1].")
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise ValueError(
            f"`images` has values from {images.min().item():.4g} to {images.max().item():.4g}; expected [0, 1]. "
            "Divide 8-bit images by 255, and map HU or MR intensities through a window with stated bounds."
        )


class Phantom64:
    """
    The built-in extractor: mean and standard deviation, over the image or the mask, of the penultimate features of the
    segmenter that ships with the package, scaled by their spread over real phantom regions
    ([`~onereward.evaluation.segmenter.Segmenter.region_features`]).

    It was trained on labels of 64 px phantom slices. It tells such slices apart by anatomy, contrast and tumour, sees
    colour as its grey mean, and knows nothing of skin or chests; on those it is a fixed filter bank.

    Args:
        segmenter ([`Segmenter`], *optional*, defaults to the shipped one):
            Another one of the kind. Its `card["name"]` then names the extractor.

    Images of another size are padded to a square with zeros and resized ([`fit_square`]); masks likewise, a cell
    counting when any of its pixels is masked. The padding is not described. Where modalities are not given, or one is
    unknown to the segmenter, the features are averaged over all modalities that it knows, for all images of the call.

    Example:

    ```python
    >>> Phantom64()(torch.rand(2, 1, 96, 80)).shape
    torch.Size([2, 32])
    ```
    """

    def __init__(self, segmenter: Segmenter | None = None):
        self.segmenter = load_segmenter() if segmenter is None else segmenter
        self.name = "phantom64" if segmenter is None else segmenter.card.get("name", "a segmenter of your own")

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, modalities: list[str] | None = None
    ) -> torch.Tensor:
        """Features `(B, 32)`, float32, of images `(B, C, H, W)`; NaN where the mask `(B, 1, H, W)` is empty."""
        _check_images(images)
        side = self.segmenter.image_size
        masks = torch.ones_like(images[:, :1]) if masks is None else (masks > 0.5).float()
        height, width = images.shape[-2:]
        longest = max(height, width)
        top, left = (longest - height) // 2, (longest - width) // 2
        masks = F.pad(masks, (left, longest - width - left, top, longest - height - top))
        masks = F.adaptive_max_pool2d(masks, side)
        images = fit_square(images.float().mean(1, keepdim=True), side)
        known = self.segmenter.modalities
        if modalities is not None and set(modalities) <= set(known):
            return self.segmenter.region_features(images, masks, list(modalities))
        return torch.stack([self.segmenter.region_features(images, masks, [m] * len(images)) for m in known]).mean(0)


class TransformersFeatures:
    """
    Pooled features of an image backbone of transformers, its weights read from safetensors alone.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            Hub id or folder of any model that `AutoModel` loads; of a model of images and texts (CLIP, SigLIP) the
            image side.
        revision (`str`, *optional*):
            Commit, branch or tag on the Hub. Give a commit where a figure is to be repeated.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where the model runs.

    Images are padded to a square and resized ([`fit_square`]) to the side that the model's image processor or config
    names, grey is repeated in three channels, and mean and standard deviation are the processor's (ImageNet's when it
    has none). With masks, the square around the mask is looked at ([`crop_to_masks`]). The features are the model's
    `pooler_output`; without one, or where its weights are not in the checkpoint (transformers would draw them at
    random, and the figures would change with each load), the mean of the last hidden state over tokens or places.

    Raises:
        `ValueError`: when weights other than the pooler's are missing.

    Example:

    ```python
    >>> extractor = TransformersFeatures("facebook/dinov2-small")
    >>> extractor(torch.rand(2, 1, 64, 64)).shape
    torch.Size([2, 384])
    ```
    """

    def __init__(
        self, pretrained_model_name_or_path: str | os.PathLike, revision: str | None = None, device: str = "cpu"
    ):
        from transformers import AutoConfig, AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        source = os.fspath(pretrained_model_name_or_path)
        self.name = source if revision is None else f"{source}@{revision}"
        config = AutoConfig.from_pretrained(source, revision=revision)
        config = getattr(config, "vision_config", config)
        self.model, loaded = AutoModel.from_pretrained(
            source,
            config=config,
            revision=revision,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        missing = sorted(loaded["missing_keys"])
        if any("pooler" not in key for key in missing):
            raise ValueError(
                f"`pretrained_model_name_or_path` is {source!r}, whose checkpoint lacks {missing[:3]} and would be "
                "filled up at random; pass a folder or Hub id with all weights of the backbone."
            )
        self.pooled = not missing
        self.model.eval().requires_grad_(False).to(device)
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        except OSError:  # it has none
            processor = {}
        side = processor.get("crop_size") or processor.get("size") or getattr(config, "image_size", 224)
        if isinstance(side, dict):
            side = side.get("height") or side["shortest_edge"]
        self.side = side[0] if isinstance(side, list | tuple) else side
        self.channels = getattr(config, "num_channels", 3)
        mean = processor.get("image_mean") or [0.485, 0.456, 0.406]
        std = processor.get("image_std") or [0.229, 0.224, 0.225]
        self.mean = torch.tensor(mean[: self.channels]).view(1, -1, 1, 1)
        self.std = torch.tensor(std[: self.channels]).view(1, -1, 1, 1)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, modalities: list[str] | None = None
    ) -> torch.Tensor:
        """Features `(B, d)`, float32, of images `(B, C, H, W)`; NaN where the mask `(B, 1, H, W)` is empty."""
        _check_images(images)
        images = images.float()
        images = fit_square(images, self.side) if masks is None else crop_to_masks(images, masks, self.side)
        if images.shape[1] != self.channels:
            images = images.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        output = self.model(pixel_values=((images - self.mean) / self.std).to(self.model.device))
        pooled = getattr(output, "pooler_output", None) if self.pooled else None
        if pooled is None:
            last = output.last_hidden_state
            pooled = last.mean(1) if last.dim() == 3 else last.mean((2, 3))
        return pooled.flatten(1).float().cpu()


class Patches3D:
    r"""
    Statistics of the blocks of a volume at three scales; nothing is trained. Per scale (the volume, and its averages
    over 2 and 4 voxels) and block of a `grid`-cubed division: mean, standard deviation, mean gradient magnitude, and
    root mean square of the difference from the 3-voxel box average (fine texture), the last three as `$\log(x +
    0.001)$`, so that no single one rules the distances.

    Args:
        grid (`int`, *optional*, defaults to `2`):
            Blocks along each axis; `d = 12 * grid ** 3`.

    Raises:
        `ValueError`: for volumes with a side under `8 * grid` voxels.

    Example:

    ```python
    >>> Patches3D()(torch.rand(2, 1, 32, 32, 24)).shape
    torch.Size([2, 96])
    ```
    """

    def __init__(self, grid: int = 2):
        self.grid, self.name = grid, f"patches3d-{grid}"

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, modalities: list[str] | None = None
    ) -> torch.Tensor:
        """Features `(B, 12 * grid ** 3)`, float32, of volumes `(B, C, X, Y, Z)`; with masks, 0 outside counts."""
        _check_images(images, dimensions=5)
        if min(images.shape[2:]) < 8 * self.grid:
            raise ValueError(
                f"`images` are volumes of {tuple(images.shape[2:])} voxels; blocks of a grid of {self.grid} need "
                f"{8 * self.grid} along each axis. Pass a smaller `grid`, or larger volumes."
            )
        volume = images.float().mean(1, keepdim=True)
        if masks is not None:
            volume = volume * (masks > 0.5)

        def blocks(values):
            return F.adaptive_avg_pool3d(values, self.grid).flatten(1)

        parts = []
        for scale in range(3):
            volume = F.avg_pool3d(volume, 2) if scale else volume
            mean = F.adaptive_avg_pool3d(volume, self.grid)
            deviation = (blocks(volume**2) - mean.flatten(1) ** 2).clamp(min=0).sqrt()
            gradient = sum(slope**2 for slope in torch.gradient(volume, dim=(2, 3, 4))).sqrt()
            smooth = F.avg_pool3d(F.pad(volume, (1,) * 6, mode="replicate"), 3, stride=1)
            texture = blocks((volume - smooth) ** 2).sqrt()
            parts += [mean.flatten(1), *((x + 0.001).log() for x in (deviation, blocks(gradient), texture))]
        return torch.cat(parts, dim=1)


class Monai3D:
    """
    Pooled features of a 3-D ResNet of MONAI, e.g. with the weights of
    [MedicalNet](https://huggingface.co/papers/1904.00625).

    Args:
        path (`str` or `os.PathLike`):
            Local `.safetensors` file with the network's weights; a leading `module.` in their names, and the
            classifier (`fc`), are left out. Pickles (`.pth`) are not read: convert them first.
        network (`str`, *optional*, defaults to `"resnet10"`):
            Name of the network in `monai.networks.nets`, `"resnet10"` to `"resnet200"`.
        standardise (`bool`, *optional*, defaults to `True`):
            Whether to bring each volume to mean 0 and standard deviation 1 first, as MedicalNet does.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where the network runs.
        **settings:
            Arguments of the network, e.g. `shortcut_type="A"`, `bias_downsample=False`.

    Raises:
        `ValueError`: when the file is missing, is a pickle, or does not fit the network.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        network: str = "resnet10",
        standardise: bool = True,
        device: str = "cpu",
        **settings,
    ):
        from monai.networks import nets  # takes three seconds

        path = Path(path)
        if path.suffix != ".safetensors" or not path.is_file():
            raise ValueError(
                f"`path` is {str(path)!r}; expected a local .safetensors file. Convert a checkpoint with "
                "`safetensors.torch.save_file(torch.load(checkpoint, weights_only=True), path)`."
            )
        self.name, self.standardise, self.device = f"{network}:{path.name}", standardise, device
        self.network = getattr(nets, network)(
            spatial_dims=3, n_input_channels=1, feed_forward=False, pretrained=False, **settings
        )
        weights = {name.removeprefix("module."): tensor for name, tensor in load_file(path).items()}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"`path` is {str(path)!r}, which does not fit {network!r} with {settings}; pass the `network` and the "
                f"settings that the weights were trained with. {error}"
            ) from error
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, modalities: list[str] | None = None
    ) -> torch.Tensor:
        """Features `(B, d)`, float32, of volumes `(B, C, X, Y, Z)`, grey mean; with masks, 0 outside them."""
        _check_images(images, dimensions=5)
        volumes = images.float().mean(1, keepdim=True)
        if masks is not None:
            volumes = volumes * (masks > 0.5)
        if self.standardise:
            spread = volumes.flatten(1).std(1).clamp(min=1e-6).view(-1, 1, 1, 1, 1)
            volumes = (volumes - volumes.mean((2, 3, 4), keepdim=True)) / spread
        return self.network(volumes.to(self.device)).flatten(1).float().cpu()


@dataclass(frozen=True)
class FeatureSet:
    """
    Features of a stream of images.

    Attributes:
        features (`torch.Tensor`): features `(n, d)`, float32, all finite.
        case_ids (`np.ndarray`): case of each row.
        n_seen (`int`): images that were described, kept or not.
        n_failed (`int`): images that could not be: not finite, or an empty mask.
        extractor (`str`): name of the extractor.
    """

    features: torch.Tensor
    case_ids: np.ndarray
    n_seen: int
    n_failed: int = 0
    extractor: str = ""


class _Reservoir:
    """A uniform sample of a stream (Algorithm R; Vitter 1985, ACM TOMS 11(1)), the same for any batch size."""

    def __init__(self, keep: int, seed: int, extractor: str):
        self.keep, self.rng, self.extractor = keep, np.random.default_rng(seed), extractor
        self.rows, self.case_ids, self.seen, self.failed = [], [], 0, 0

    def add(self, features: torch.Tensor, case_ids) -> None:
        for row, case_id in zip(features, case_ids, strict=True):
            if not row.isfinite().all():
                self.failed += 1
                continue
            place = self.seen if self.seen < self.keep else int(self.rng.integers(self.seen + 1))
            self.seen += 1
            if place == len(self.rows) < self.keep:
                self.rows.append(row.clone())  # a view would keep the whole batch alive
                self.case_ids.append(str(case_id))
            elif place < self.keep:
                self.rows[place], self.case_ids[place] = row.clone(), str(case_id)

    def result(self) -> FeatureSet:
        features = torch.stack(self.rows) if self.rows else torch.zeros(0, 0)
        return FeatureSet(features, np.array(self.case_ids, dtype=str), self.seen, self.failed, self.extractor)


def _name(extractor: Callable) -> str:
    return getattr(extractor, "name", getattr(extractor, "__name__", type(extractor).__name__))


def _describe(extractor: Callable, images: torch.Tensor, **conditions) -> torch.Tensor:
    """Features of the images that are finite; the others get a row of NaN."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    finite = images.flatten(1).isfinite().all(1)
    conditions = {name: value for name, value in conditions.items() if value is not None}
    if finite.all():
        return extractor(images, **conditions).float().cpu()
    if not finite.any():
        return torch.full((len(images), 1), torch.nan)
    if "masks" in conditions:
        conditions["masks"] = conditions["masks"][finite]
    if "modalities" in conditions:
        conditions["modalities"] = [m for m, good in zip(conditions["modalities"], finite, strict=True) if good]
    good = extractor(images[finite], **conditions).float().cpu()
    features = torch.full((len(images), good.shape[1]), torch.nan)
    features[finite] = good
    return features


def collect_features(
    extractor: Callable, batches: Iterable[dict], *, keep: int = 2000, seed: int = 0, description: str = "Describing"
) -> FeatureSet:
    """
    Describes a stream of images. Memory stays flat however many there are: of more than `keep` images, a uniform
    random sample is kept.

    Args:
        extractor (`Callable`):
            `(images, masks=None, modalities=None) -> (B, d)`; masks and modalities are passed only where a batch has
            them.
        batches (`Iterable[dict]`):
            Batches with `images` `(B, C, H, W)`, or `(B, C, X, Y, Z)` for an extractor of volumes, floats in [0, 1] or
            uint8; `case_ids`, B of them; and, where known, `masks` `(B, 1, ...)` and `modalities`, B names. A batch
            has features of its own alone, so that its size changes nothing.
        keep (`int`, *optional*, defaults to `2000`):
            Rows to keep. Measures of pairs take memory and time with its square; a Frechet distance wants ten times as
            many as there are features.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sample.
        description (`str`, *optional*, defaults to `"Describing"`):
            Text of the progress bar.

    Returns:
        [`FeatureSet`]

    Example:

    ```python
    >>> images = torch.rand(8, 1, 64, 64)
    >>> found = collect_features(Phantom64(), [{"images": images, "case_ids": list("aabbccdd")}])
    >>> found.features.shape, found.extractor
    (torch.Size([8, 32]), 'phantom64')
    ```
    """
    reservoir = _Reservoir(keep, seed, _name(extractor))
    with tqdm(desc=description, unit="image", mininterval=1, disable=None) as progress:
        for batch in batches:
            conditions = {name: batch.get(name) for name in ("masks", "modalities")}
            reservoir.add(_describe(extractor, batch["images"], **conditions), batch["case_ids"])
            progress.update(len(batch["images"]))
    return reservoir.result()


def volume_slices(volumes: torch.Tensor, plane: str, *, centre: float = 1.0, step: int = 1) -> torch.Tensor:
    """
    The slices of volumes in one plane.

    Args:
        volumes (`torch.Tensor`):
            Volumes of shape `(B, C, X, Y, Z)` in RAS+ orientation (`nibabel.as_closest_canonical`).
        plane (`str`):
            `"axial"`, `"coronal"` or `"sagittal"`.
        centre (`float`, *optional*, defaults to `1.0`):
            Share of the slices to take, around the middle; the outermost ones are often empty.
        step (`int`, *optional*, defaults to `1`):
            Take every `step`-th slice.

    Returns:
        `torch.Tensor` of shape `(B, S, C, H, W)`.

    Raises:
        `ValueError`: for another plane, or a share that is not in (0, 1].
    """
    if plane not in PLANES:
        raise ValueError(f"`plane` is {plane!r}; expected one of {tuple(PLANES)}.")
    if not 0 < centre <= 1:
        raise ValueError(f"`centre` is {centre}; expected a share in (0, 1].")
    slices = volumes.movedim(PLANES[plane], 1)
    taken = max(1, round(centre * slices.shape[1]))
    first = (slices.shape[1] - taken) // 2
    return slices[:, first : first + taken : step]


def collect_plane_features(
    extractor: Callable,
    batches: Iterable[dict],
    *,
    centre: float = 1.0,
    step: int = 1,
    batch_size: int = 64,
    keep: int = 2000,
    seed: int = 0,
    description: str = "Describing",
) -> dict[str, FeatureSet]:
    """
    2.5-D features, as [MAISI](https://huggingface.co/papers/2409.11169) measures volumes: the slices of each plane are
    the samples, every plane is measured by itself, and the three figures are averaged
    ([`~onereward.evaluation.distributions.compare_planes`] does that).

    Args:
        extractor (`Callable`):
            An extractor of slices.
        batches (`Iterable[dict]`):
            Batches with `images`, volumes of shape `(B, C, X, Y, Z)` in [0, 1] or uint8, in RAS+ orientation, and
            `case_ids` and, where known, `modalities`, B of each.
        centre, step:
            As in [`volume_slices`].
        batch_size (`int`, *optional*, defaults to `64`):
            Slices looked at at once.
        keep, seed, description:
            As in [`collect_features`], for each plane.

    Returns:
        `dict[str, FeatureSet]`: plane -> features of its slices, with the case of their volume.
    """
    reservoirs = {plane: _Reservoir(keep, seed, _name(extractor)) for plane in PLANES}
    with tqdm(desc=description, unit="volume", mininterval=1, disable=None) as progress:
        for batch in batches:
            modalities = batch.get("modalities") or [None] * len(batch["images"])
            for volume, case_id, modality in zip(batch["images"], batch["case_ids"], modalities, strict=True):
                for plane, reservoir in reservoirs.items():
                    for part in volume_slices(volume[None], plane, centre=centre, step=step)[0].split(batch_size):
                        known = None if modality is None else [modality] * len(part)
                        reservoir.add(_describe(extractor, part, modalities=known), [case_id] * len(part))
            progress.update(len(batch["images"]))
    return {plane: reservoir.result() for plane, reservoir in reservoirs.items()}
