"""The held-out judge: a small U-Net that finds tumour regions, trained on real phantom slices and nothing else.

It never sees a generated image in training and is never a reward. Applied to generated slices it answers three
questions: does `fill` put each region where the label map asked for it, does `remove` leave tumour behind, and are the
repainted regions distributed like real ones (kernel distance of its frozen features)?

The weights that ship with the package, `segmenter_phantom64.safetensors`, are made by

    python -m onereward.evaluation.segmenter --out src/onereward/evaluation/segmenter_phantom64.safetensors

Research use only, not for clinical use.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from onereward.data.schema import LABELS, rows_to_tensors
from onereward.data.whole_file import whole_file, write_json
from onereward.evaluation.bootstrap import percentile_interval, resample_cases, weighted_mean
from onereward.evaluation.metrics import dice


SHIPPED_WEIGHTS = Path(__file__).with_name("segmenter_phantom64.safetensors")

# A region counts in a contrast where the judge finds it on real slices with at least this mean Dice, the customary
# bound of good agreement (Zijdenbos et al. 1994, IEEE TMI 13(4)). The enhancing rim, for one, is told from oedema by
# contrast agent alone: where the judge has to guess on real slices, it cannot judge generated ones.
DICE_FLOOR = 0.7


class Segmenter(nn.Module):
    """
    U-Net of four levels over one grey channel, with one constant input channel per modality.

    Args:
        labels (`dict[str, int]`):
            Name and value of each label, the background (0) included; the values must be `0 ... len(labels) - 1`.
        modalities (`list[str]`):
            Names of the modalities it knows.
        image_size (`int`, *optional*, defaults to `64`):
            Side of the images it is trained on, in pixels; a multiple of 8.
        widths (`list[int]`, *optional*, defaults to `[16, 24, 48, 96]`):
            Channels of each level.
    """

    def __init__(self, labels, modalities, image_size=64, widths=(16, 24, 48, 96)):
        super().__init__()
        if sorted(labels.values()) != list(range(len(labels))):
            raise ValueError(
                f"`labels` has the values {sorted(labels.values())}; they must be 0 ... {len(labels) - 1}."
            )
        self.labels, self.modalities, self.image_size = dict(labels), list(modalities), image_size
        self.card = {}

        def block(inputs, outputs):
            layers = []
            for channels in (inputs, outputs):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(
            block(i, o) for i, o in zip([1 + len(self.modalities), *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(block(deep + skip, skip) for skip, deep in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Conv2d(widths[0], len(labels), 1)
        # Mean and spread of the pooled features over real training regions, so that all of them weigh alike.
        self.register_buffer("feature_mean", torch.zeros(2 * widths[0]))
        self.register_buffer("feature_std", torch.ones(2 * widths[0]))

    def _planes(self, images: torch.Tensor, modalities: list[str]) -> torch.Tensor:
        unknown = sorted(set(modalities) - set(self.modalities))
        if unknown:
            raise ValueError(f"`modalities` holds {unknown}; this segmenter knows {self.modalities}.")
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"`images` are {images.shape[-2]} x {images.shape[-1]} pixels; this segmenter was trained at "
                f"{self.image_size} x {self.image_size}. Resize them first."
            )
        index = torch.tensor([self.modalities.index(m) for m in modalities], device=images.device)
        planes = F.one_hot(index, len(self.modalities)).to(images.dtype)[:, :, None, None]
        planes = planes.expand(-1, -1, *images.shape[-2:])
        return torch.cat([images.mean(1, keepdim=True), planes], dim=1)

    def penultimate(self, images: torch.Tensor, modalities: list[str]) -> torch.Tensor:
        """Features before the last layer, `(B, widths[0], H, W)`, of images `(B, C, H, W)` in [0, 1]."""
        x, skips = self._planes(images, modalities), []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = self.up[level](torch.cat([x, skips[level]], dim=1))
        return x

    def forward(self, images: torch.Tensor, modalities: list[str]) -> torch.Tensor:
        """Logits `(B, len(labels), H, W)` of images `(B, C, H, W)` in [0, 1] and their `B` modalities."""
        return self.head(self.penultimate(images, modalities))

    @torch.no_grad()
    def segment(self, images: torch.Tensor, modalities: list[str]) -> torch.Tensor:
        """
        Finds the regions.

        Args:
            images (`torch.Tensor`):
                Images of shape `(B, C, H, W)` in [0, 1]; colour is averaged to grey.
            modalities (`list[str]`):
                Modality of each image, e.g. `"t1c"`.

        Returns:
            `torch.Tensor` of shape `(B, H, W)`, int64: the likeliest label of each pixel.

        Raises:
            `ValueError`: for a modality or an image size it was not trained on.
        """
        return self.eval()(images.float(), modalities).argmax(1)

    @torch.no_grad()
    def region_features(self, images: torch.Tensor, masks: torch.Tensor, modalities: list[str]) -> torch.Tensor:
        """
        Describes what lies in the mask: mean and standard deviation of each penultimate feature over the mask, scaled
        by their spread over real training regions.

        Args:
            images (`torch.Tensor`):
                Images of shape `(B, C, H, W)` in [0, 1].
            masks (`torch.Tensor`):
                Masks of shape `(B, 1, H, W)`, 1 where to look, not empty.
            modalities (`list[str]`):
                Modality of each image.

        Returns:
            `torch.Tensor` of shape `(B, 2 * widths[0])`, float32.
        """
        features, inside = self.eval().penultimate(images.float(), modalities), (masks > 0.5).float()
        count = inside.sum((2, 3))
        mean = (features * inside).sum((2, 3)) / count
        variance = ((features - mean[:, :, None, None]) ** 2 * inside).sum((2, 3)) / count
        return (torch.cat([mean, variance.sqrt()], dim=1) - self.feature_mean) / self.feature_std

    def counted_contrasts(self, region: str) -> list[str]:
        """The modalities where `region` is visible enough to be judged: mean Dice on real slices >= `DICE_FLOOR`."""
        table = self.card["dice"][region]
        return [m for m in self.modalities if table[m]["mean"] is not None and table[m]["mean"] >= DICE_FLOOR]


def tumour_and_twin(dataset) -> dict:
    """
    Turns the `fill` rows of a data set into labelled slices: the target with its label map, and the healthy source,
    which has none.

    Args:
        dataset (`datasets.Dataset`):
            Rows in the schema of [`onereward.data.schema.FEATURES`]; rows of other tasks are ignored.

    Returns:
        `dict`: `tumour` and `healthy` images `(N, 1, H, W)`, `masks` `(N, 1, H, W)` and `labels` `(N, H, W)`, all
        uint8; `modalities` and `case_ids`, lists of N.

    Raises:
        `ValueError`: when there is no `fill` row with a target.
    """
    tasks = dataset["task"]
    indices = [i for i, task in enumerate(tasks) if task == "fill"]
    if not indices:
        raise ValueError(
            f"`dataset` has no 'fill' rows, only {sorted(set(tasks))}; pass tasks=('fill',) to load_phantom."
        )
    parts = {"tumour": [], "healthy": [], "masks": [], "labels": [], "modalities": [], "case_ids": []}
    for start in tqdm(range(0, len(indices), 256), desc="Reading slices", disable=len(indices) < 1024):
        rows = [dataset[i] for i in indices[start : start + 256]]
        tensors = rows_to_tensors(rows)
        if tensors["targets"] is None:
            raise ValueError(
                "`dataset` has 'fill' rows without a target; a segmenter needs the images with the tumour."
            )
        for name, column in (("tumour", "targets"), ("healthy", "images")):
            parts[name].append((tensors[column].mean(1, keepdim=True) * 255).round().to(torch.uint8))
        parts["masks"].append(tensors["masks"].to(torch.uint8))
        parts["labels"].append(tensors["label_maps"][:, 0].to(torch.uint8))
        parts["modalities"] += [row["modality"] for row in rows]
        parts["case_ids"] += [row["case_id"] for row in rows]
    return {name: torch.cat(part) if torch.is_tensor(part[0]) else part for name, part in parts.items()}


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""
    One minus the soft Dice of each region, pooled over the batch ([V-Net](https://huggingface.co/papers/1606.04797)):
    `$1 - \frac{1}{K-1}\sum_{k \geq 1} \frac{2\sum_i p_{ik} y_{ik} + 1}{\sum_i p_{ik} + \sum_i y_{ik} + 1}$`.

    Args:
        logits (`torch.Tensor`): Logits of shape `(B, K, H, W)`.
        labels (`torch.Tensor`): Labels of shape `(B, H, W)`, int64.
    """
    probabilities = logits.softmax(1)[:, 1:]
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:]
    overlap = (probabilities * truth).sum((0, 2, 3))
    return 1 - ((2 * overlap + 1) / (probabilities.sum((0, 2, 3)) + truth.sum((0, 2, 3)) + 1)).mean()


def train_segmenter(
    dataset,
    *,
    labels: dict[str, int] = LABELS,
    steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Segmenter:
    """
    Trains a [`Segmenter`] on the tumour slices and healthy twins of the `fill` rows of a data set.

    Three quarters of each batch are tumour slices, one quarter healthy twins; half of the batch is mirrored.
    Cross-entropy plus soft Dice, AdamW with a one-cycle learning rate.

    Args:
        dataset (`datasets.Dataset`):
            Rows in the schema of [`onereward.data.schema.FEATURES`], square, of one size, with targets.
        labels (`dict[str, int]`, *optional*, defaults to the phantom's):
            Name and value of each label.
        steps (`int`, *optional*, defaults to `2000`):
            Number of updates.
        batch_size (`int`, *optional*, defaults to `32`):
            Slices per update.
        learning_rate (`float`, *optional*, defaults to `3e-3`):
            Peak learning rate.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights and of the order of the slices.

    Returns:
        [`Segmenter`] in eval mode.

    Example:

    ```python
    >>> from onereward.data.phantom import load_phantom
    >>> segmenter = train_segmenter(load_phantom(200, tasks=("fill",)), steps=300)
    >>> regions = segmenter.segment(images, ["t1c"] * len(images))
    ```
    """
    data = tumour_and_twin(dataset)
    modalities = sorted(set(data["modalities"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter(labels, modalities, image_size=data["tumour"].shape[-1])
    model = model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    healthy = batch_size // 4
    model.train()
    progress = tqdm(range(steps), desc="Training the segmenter", mininterval=1)
    for _ in progress:
        index = torch.randint(len(data["labels"]), (batch_size,), generator=generator)
        images, truth = data["tumour"][index].float() / 255, data["labels"][index].long()
        images[:healthy] = data["healthy"][index[:healthy]].float() / 255
        truth[:healthy] = 0
        images[::2], truth[::2] = images[::2].flip(-1), truth[::2].flip(-1)
        logits = model(images, [data["modalities"][i] for i in index])
        loss = F.cross_entropy(logits, truth) + dice_loss(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()

    features = [
        model.region_features(
            data["tumour"][i : i + 256].float() / 255, data["masks"][i : i + 256], data["modalities"][i : i + 256]
        )
        for i in range(0, min(len(data["labels"]), 4096), 256)
    ]
    model.feature_mean, model.feature_std = torch.cat(features).mean(0), torch.cat(features).std(0)
    return model


def dice_per_region(
    segmenter: Segmenter, images: torch.Tensor, label_maps: torch.Tensor, modalities: list[str]
) -> dict[str, torch.Tensor]:
    """
    Dice of each region between what the segmenter finds in the images and the label maps that were asked for.

    Args:
        segmenter ([`Segmenter`]):
            The judge.
        images (`torch.Tensor`):
            Images of shape `(B, C, H, W)` in [0, 1].
        label_maps (`torch.Tensor`):
            Label maps of shape `(B, 1, H, W)`.
        modalities (`list[str]`):
            Modality of each image.

    Returns:
        `dict[str, torch.Tensor]`: region name to `(B,)`; NaN where neither of the two has the region.
    """
    regions = {name: value for name, value in segmenter.labels.items() if value != 0}
    values = dice(segmenter.segment(images, modalities), label_maps[:, 0], list(regions.values()))
    return dict(zip(regions, values.unbind(1), strict=True))


def dice_table(segmenter: Segmenter, dataset, seed: int = 0) -> dict:
    """
    Dice on real slices per region and modality, with a 95 % interval by case.

    Returns:
        `dict`: region -> modality -> `{"mean", "ci95", "n", "n_without"}`, over the `n` slices that have the region;
        the other `n_without` slices have nothing to overlap with.
    """
    data = tumour_and_twin(dataset)
    images, modalities = data["tumour"].float() / 255, np.array(data["modalities"])
    chunks = [
        dice_per_region(segmenter, images[i : i + 256], data["labels"][i : i + 256, None], modalities[i : i + 256])
        for i in range(0, len(images), 256)
    ]
    table = {}
    for region, value in {name: value for name, value in segmenter.labels.items() if value}.items():
        present = (data["labels"] == value).flatten(1).any(1).numpy()
        values = torch.cat([chunk[region] for chunk in chunks]).numpy()
        table[region] = {}
        for modality in segmenter.modalities:
            rows = np.flatnonzero((modalities == modality) & present)
            weights = resample_cases([data["case_ids"][i] for i in rows], seed=seed)
            table[region][modality] = {
                "mean": round(float(values[rows].mean()), 4) if len(rows) else None,
                "ci95": [round(end, 4) for end in percentile_interval(weighted_mean(values[rows], weights))],
                "n": len(rows),
                "n_without": int((modalities == modality).sum() - len(rows)),
            }
    return table


def save_segmenter(segmenter: Segmenter, path: str | os.PathLike) -> None:
    """Writes the weights with their card in the header (safetensors), and the card beside them as JSON to read."""
    path = Path(path)
    architecture = {
        "labels": segmenter.labels,
        "modalities": segmenter.modalities,
        "image_size": segmenter.image_size,
        "widths": [block[0].out_channels for block in segmenter.down],
    }
    card = {**segmenter.card, "architecture": architecture}
    weights = {name: tensor.contiguous() for name, tensor in segmenter.state_dict().items()}
    with whole_file(path) as partial:
        save_file(weights, partial, metadata={"format": "pt", "card": json.dumps(card)})
    write_json(path.with_suffix(".json"), card)


def load_segmenter(path: str | os.PathLike = SHIPPED_WEIGHTS) -> Segmenter:
    """
    Loads a segmenter that [`save_segmenter`] wrote.

    Args:
        path (`str` or `os.PathLike`, *optional*, defaults to the judge that ships with the package):
            A `.safetensors` file.

    Returns:
        [`Segmenter`] in eval mode, frozen; `segmenter.card` holds how it was trained and its Dice on real slices.

    Raises:
        `ValueError`: when the file is missing or is no segmenter.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"`path` is {str(path)!r}, where no file is; train one with `python -m {__name__} --out FILE`."
        )
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    if "card" not in header:
        raise ValueError(
            f"`path` is {str(path)!r}, whose header holds no segmenter card; pass a file of save_segmenter."
        )
    card = json.loads(header["card"])
    segmenter = Segmenter(**card["architecture"])
    segmenter.card = card
    segmenter.load_state_dict(load_file(path))
    return segmenter.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def main(arguments: list[str] | None = None) -> None:
    """Trains a segmenter on the phantom and writes it, from the command line."""
    from onereward.data.phantom import load_phantom

    parser = argparse.ArgumentParser(prog="python -m onereward.evaluation.segmenter", description=__doc__)
    parser.add_argument("--out", required=True, help="file to write, ending in .safetensors")
    parser.add_argument("--train-cases", type=int, default=1500, help="phantom cases to train on, four contrasts each")
    parser.add_argument("--test-cases", type=int, default=256, help="unseen phantom cases to report the Dice on")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    started = time.monotonic()
    train = load_phantom(options.train_cases, tasks=("fill",), seed=options.seed, split="train")
    test = load_phantom(options.test_cases, tasks=("fill",), seed=options.seed, split="test")
    segmenter = train_segmenter(train, steps=options.steps, seed=options.seed)
    slices = tumour_and_twin(train)
    fingerprint = hashlib.sha256(slices["tumour"].numpy().tobytes() + slices["labels"].numpy().tobytes()).hexdigest()
    segmenter.card = {
        "name": "segmenter_phantom64",
        "notice": "Research use only, not for clinical use.",
        "license": "Apache-2.0. Trained on the built-in phantom alone, which derives from the MNI152 template, "
        "copyright 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill "
        "University; see NOTICE.",
        "intended_use": "Held-out judge of images generated on the phantom. Not for real patients' images.",
        "command": " ".join(["python -m onereward.evaluation.segmenter", *(arguments or sys.argv[1:])]),
        "training": {
            "data": f"load_phantom({options.train_cases}, tasks=('fill',), seed={options.seed}, split='train')",
            "data_sha256": fingerprint,
            "slices": len(slices["labels"]),
            "steps": options.steps,
            "seed": options.seed,
            "parameters": sum(p.numel() for p in segmenter.parameters()),
            "seconds": round(time.monotonic() - started),
        },
        "test_data": f"load_phantom({options.test_cases}, tasks=('fill',), seed={options.seed}, split='test')",
        "dice_floor": DICE_FLOOR,
        "dice": dice_table(segmenter, test),
    }
    save_segmenter(segmenter, options.out)
    for region, row in segmenter.card["dice"].items():
        print(region, "  ".join(f"{m} {cell['mean']} {cell['ci95']} (n {cell['n']})" for m, cell in row.items()))


if __name__ == "__main__":
    main()
