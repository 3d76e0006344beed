"""How good a pipeline is on unseen cases, by measures that were never a reward, and whether tuning changed that.

`evaluate_pipeline` generates with fixed seeds and measures; `compare` puts two such results side by side with a paired
bootstrap interval by case. The measures, per task:

| measure | task | better | what it is |
|---|---|---|---|
| `{task}_mae` | all | lower | mean absolute error against the ground truth inside the mask |
| `{task}_ssim` | all | higher | structural similarity to the ground truth inside the mask, in its surroundings |
| `{task}_kernel_distance` | all | lower | kernel distance of the judge's features of repainted and real regions |
| `fill_dice_{region}` | fill | higher | overlap of what the judge finds with what the label map asked for |
| `remove_residual_tumour` | remove | lower | share of the mask where the judge still finds tumour |
| `outside_changed_pixels` | all | lower | pixels outside the mask that differ from the source: must be 0 |

The judge is the [`Segmenter`] that saw real phantom slices only. A region's Dice is over the images whose label map
asks for it, in the contrasts where the judge finds it on real slices.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import torch
from tqdm import tqdm

from onereward.data.schema import rows_to_tensors
from onereward.evaluation.bootstrap import percentile_interval, plain, resample_cases, weighted_mean
from onereward.evaluation.metrics import dice, kernel_distance, masked_mae, masked_psnr, masked_ssim
from onereward.evaluation.segmenter import Segmenter
from onereward.evaluation.surface import surface_measures


@dataclasses.dataclass
class Measure:
    """
    One measure over all generated images.

    Attributes:
        values (`np.ndarray`): figure of each generated image `(N,)`, NaN where it is not defined.
        real (`np.ndarray`): the same figure of the ground truth image `(N,)`.
        applies (`np.ndarray`): whether the measure is meant for that image `(N,)`; a NaN there counts as failed.
        higher_is_better (`bool`): its direction.
    """

    values: np.ndarray
    real: np.ndarray
    applies: np.ndarray
    higher_is_better: bool


@dataclasses.dataclass
class Heldout:
    """
    Generated images and their measures, in the order of the data set, once per seed.

    Attributes:
        images (`torch.Tensor`): generated images `(N, C, H, W)` in [0, 1].
        case_ids (`np.ndarray`): case of each of them.
        tasks (`np.ndarray`): task of each of them.
        measures (`dict[str, Measure]`): all measures but the kernel distances, which no single image has.
        features (`torch.Tensor`, *optional*): the judge's features of the repainted regions `(N, d)`.
        real_features (`torch.Tensor`, *optional*): the same of the ground truth, once per row of the data set; NaN in
            rows without a target.
    """

    images: torch.Tensor
    case_ids: np.ndarray
    tasks: np.ndarray
    measures: dict[str, Measure]
    features: torch.Tensor | None = None
    real_features: torch.Tensor | None = None


@torch.no_grad()
def generate_batch(
    pipeline, rows: list[dict], noise_seeds: list[int], *, num_inference_steps: int, guidance_scale: float
) -> torch.Tensor:
    """One image of each row, `(len(rows), C, H, W)` in [0, 1] on the CPU, from noise of its own seed."""
    tensors = rows_to_tensors([{**row, "target": None} for row in rows])
    output = pipeline(
        prompt=tensors["prompts"],
        image=tensors["images"],
        mask_image=tensors["masks"],
        label_map=tensors["label_maps"] if pipeline.has_label_channels else None,
        task=tensors["tasks"],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in noise_seeds],
        output_type="pt",
    )
    return output.images.cpu()


def noise_seeds(seed: int, rows: Iterable[int]) -> list[int]:
    """Seeds of the noise of rows by their places in the data set, so that no batch size changes an image."""
    return [seed * 1_000_003 + row for row in rows]


@torch.no_grad()
def generate_images(
    pipeline,
    dataset,
    *,
    seeds=(0,),
    batch_size: int = 32,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    adapter: bool = True,
    description: str = "Generating",
) -> torch.Tensor:
    """
    Generates one image per row and seed.

    The noise of an image depends on its seed and on its place in the data set alone, so that two pipelines start from
    the same noise, whatever the batch size.

    Args:
        pipeline ([`OneRewardMaskPipeline`]):
            The pipeline.
        dataset (`datasets.Dataset`):
            Rows in the schema of [`onereward.data.schema.FEATURES`], of one size and mode.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`):
            One image is made for each.
        batch_size (`int`, *optional*, defaults to `32`):
            Images per call of the pipeline.
        num_inference_steps (`int`, *optional*, defaults to `20`):
            Denoising steps.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Weight of classifier-free guidance.
        adapter (`bool`, *optional*, defaults to `True`):
            `False` switches the LoRA adapters of the pipeline off for this call and on again after it.
        description (`str`, *optional*, defaults to `"Generating"`):
            Text of the progress bar.

    Returns:
        `torch.Tensor` of shape `(len(seeds) * len(dataset), C, H, W)` in [0, 1] on the CPU: all rows with the first
        seed, then all with the second.
    """
    batches = [
        (seed, range(start, min(start + batch_size, len(dataset))))
        for seed in seeds
        for start in range(0, len(dataset), batch_size)
    ]
    images = []
    progress_settings, training = getattr(pipeline, "_progress_bar_config", {}), pipeline.unet.training
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    if not adapter:
        pipeline.disable_lora()
    try:
        with tqdm(total=len(seeds) * len(dataset), desc=description, unit="image") as progress:
            for seed, indices in batches:
                rows, seeds_of_rows = [dataset[i] for i in indices], noise_seeds(seed, indices)
                settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
                images.append(generate_batch(pipeline, rows, seeds_of_rows, **settings))
                progress.update(len(indices))
    finally:
        if not adapter:
            pipeline.enable_lora()
        pipeline.unet.train(training)
        pipeline.set_progress_bar_config(**progress_settings)
    return torch.cat(images)


def _figures(
    images: torch.Tensor,
    tensors: dict,
    modalities: list[str],
    segmenter: Segmenter | None,
    detailed: bool,
    perceptual: Callable | None,
) -> dict:
    """Every figure of each image `(B,)`, and the judge's features `(B, d)`, whatever the task."""
    sources, targets = (tensors[name].expand_as(images) for name in ("images", "targets"))
    masks = tensors["masks"]
    inside = masks[:, 0] > 0.5
    figures = {
        "mae": masked_mae(images, targets, masks),
        "ssim": masked_ssim(images, targets, masks),
        "changed_pixels": ((images != sources).any(1) & ~inside).flatten(1).sum(1),
    }
    if detailed:
        figures["psnr"] = masked_psnr(images, targets, masks)
    if perceptual is not None:
        figures["lpips"] = perceptual(images, targets, masks)
    if segmenter is not None:
        found = segmenter.segment(images, modalities)
        figures["residual_tumour"] = ((found > 0) & inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
        regions = {name: value for name, value in segmenter.labels.items() if value}
        overlaps = dice(found, tensors["label_maps"][:, 0], list(regions.values()))
        figures |= {f"dice_{name}": column for name, column in zip(regions, overlaps.unbind(1), strict=True)}
        if detailed:
            surfaces = surface_measures(found, tensors["label_maps"][:, 0], list(regions.values()), spacing=(1.0, 1.0))
            for kind in ("hd95", "surface_dice"):
                columns = zip(regions, surfaces[kind].unbind(1), strict=True)
                figures |= {f"{kind}_{name}": column for name, column in columns}
        figures |= {f"asks_{name}": (tensors["label_maps"] == i).flatten(1).any(1) for name, i in regions.items()}
        figures["features"] = segmenter.region_features(images, masks, modalities)
    return figures


@torch.no_grad()
def measure_images(
    images: torch.Tensor,
    dataset,
    *,
    segmenter: Segmenter | None = None,
    batch_size: int = 128,
    detailed: bool = False,
    perceptual: Callable | None = None,
) -> Heldout:
    """
    Measures generated images against the rows that they were made for.

    Args:
        images (`torch.Tensor`):
            Generated images of shape `(S * len(dataset), C, H, W)` in [0, 1], in the order of [`generate_images`].
        dataset (`datasets.Dataset`):
            The rows. Those without a target are left out of every measure that needs one.
        segmenter ([`Segmenter`], *optional*):
            The judge, from [`~onereward.evaluation.segmenter.load_segmenter`]. Leave it out, and with it its measures,
            for images of another kind or size than it was trained on.
        batch_size (`int`, *optional*, defaults to `128`):
            Images measured at once.
        detailed (`bool`, *optional*, defaults to `False`):
            Whether to measure, too, `{task}_psnr` in dB, infinite and so failed for an identical region, and of each
            region `fill_hd95_{region}` in pixels and `fill_surface_dice_{region}` within 1 pixel
            ([`~onereward.evaluation.surface.surface_measures`]); a region that the judge does not find has no hd95,
            and fails.
        perceptual (`Callable`, *optional*):
            Distance `(images, targets, masks) -> (B,)` to measure as `{task}_lpips`, from
            [`~onereward.evaluation.perceptual.load_lpips`].

    Returns:
        [`Heldout`]

    Raises:
        `ValueError`: when the number of images is no multiple of the number of rows.
    """
    if len(images) == 0 or len(images) % len(dataset):
        raise ValueError(
            f"`images` holds {len(images)} images for {len(dataset)} rows; pass one image per row and seed, all rows "
            "of the first seed first."
        )
    repeats = len(images) // len(dataset)
    generated, real, has_target = [[] for _ in range(repeats)], [], []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Measuring", disable=len(images) < 512):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        has_target += [row["target"] is not None for row in rows]
        # A stand-in where the truth is unknown; the figures that use it are dropped below.
        tensors = rows_to_tensors([{**row, "target": row["target"] or row["image"]} for row in rows])
        modalities = [row["modality"] for row in rows]
        truth = tensors["targets"].expand(-1, images.shape[1], -1, -1)
        real.append(_figures(truth, tensors, modalities, segmenter, detailed, perceptual))
        for repeat in range(repeats):
            first = repeat * len(dataset) + start
            chunk = images[first : first + len(rows)]
            generated[repeat].append(_figures(chunk, tensors, modalities, segmenter, detailed, perceptual))

    generated = [chunk for chunks in generated for chunk in chunks]
    generated = {name: torch.cat([chunk[name].cpu() for chunk in generated]) for name in generated[0]}
    real = {name: torch.cat([chunk[name].cpu() for chunk in real]).float() for name in real[0]}
    for figure in real.values():
        figure[~torch.tensor(has_target)] = torch.nan
    features, real_features = generated.pop("features", None), real.pop("features", None)

    tasks, modalities = np.tile(dataset["task"], repeats), np.tile(dataset["modality"], repeats)
    has_target = np.tile(has_target, repeats)

    def measure(figure, applies, higher_is_better):
        values, truth = generated[figure].double().numpy(), np.tile(real[figure].double().numpy(), repeats)
        return Measure(values, truth, applies, higher_is_better)

    measures = {}
    for task in dict.fromkeys(tasks.tolist()):
        measures[f"{task}_mae"] = measure("mae", (tasks == task) & has_target, False)
        measures[f"{task}_ssim"] = measure("ssim", (tasks == task) & has_target, True)
        if detailed:
            measures[f"{task}_psnr"] = measure("psnr", (tasks == task) & has_target, True)
        if perceptual is not None:
            measures[f"{task}_lpips"] = measure("lpips", (tasks == task) & has_target, False)
        if segmenter is not None and task == "remove":
            measures["remove_residual_tumour"] = measure("residual_tumour", tasks == task, False)
        if segmenter is not None and task == "fill":
            for region in [name for name, value in segmenter.labels.items() if value]:
                counted = np.isin(modalities, segmenter.counted_contrasts(region))
                counted &= generated[f"asks_{region}"].numpy()
                measures[f"fill_dice_{region}"] = measure(f"dice_{region}", (tasks == task) & counted, True)
                for kind, higher_is_better in (("hd95", False), ("surface_dice", True)) if detailed else ():
                    applies = (tasks == task) & counted
                    measures[f"fill_{kind}_{region}"] = measure(f"{kind}_{region}", applies, higher_is_better)
    measures["outside_changed_pixels"] = measure("changed_pixels", np.ones(len(tasks), bool), False)
    measures = {name: measure for name, measure in measures.items() if measure.applies.any()}
    return Heldout(images, np.tile(dataset["case_id"], repeats), tasks, measures, features, real_features)


def evaluate_pipeline(
    pipeline,
    dataset,
    *,
    segmenter: Segmenter | None = None,
    seeds=(0,),
    batch_size: int = 32,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    adapter: bool = True,
    description: str = "Generating",
) -> Heldout:
    """
    Generates with fixed seeds and measures the result: [`generate_images`], then [`measure_images`]; see there for the
    arguments.

    Returns:
        [`Heldout`]

    Example:

    ```python
    >>> from onereward.data.phantom import load_phantom
    >>> from onereward.evaluation.heldout import compare, evaluate_pipeline
    >>> from onereward.evaluation.segmenter import load_segmenter

    >>> unseen = load_phantom(32, split="test")
    >>> settings = {"segmenter": load_segmenter(), "seeds": (0,), "num_inference_steps": 10}
    >>> before = evaluate_pipeline(pipeline, unseen, adapter=False, **settings)
    >>> after = evaluate_pipeline(pipeline, unseen, **settings)
    >>> compare(before, after)["remove_ssim"]["ci95"]
    ```
    """
    images = generate_images(
        pipeline,
        dataset,
        seeds=seeds,
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        adapter=adapter,
        description=description,
    )
    return measure_images(images, dataset, segmenter=segmenter)


def _entry(before, after, real, differences, n, n_failed, higher_is_better) -> dict:
    low, high = percentile_interval(differences)
    better, worse = (low > 0, high < 0) if higher_is_better else (high < 0, low > 0)
    return {
        "before": plain(before),
        "after": plain(after),
        "real": plain(real),
        "difference": plain(after - before),
        "ci95": [plain(low), plain(high)],
        "n": int(n),
        "n_failed": int(n_failed),
        "higher_is_better": higher_is_better,
        "verdict": "better" if better else "worse" if worse else "no difference",
    }


def compare(before: Heldout, after: Heldout, *, resamples: int = 2000, seed: int = 0) -> dict[str, dict]:
    """
    Compares two evaluations of the same rows and seeds.

    Args:
        before ([`Heldout`]):
            The result without the adapter, or of pipeline A.
        after ([`Heldout`]):
            The result with it, or of pipeline B.
        resamples (`int`, *optional*, defaults to `2000`):
            Resamples of the bootstrap, which draws cases, not images.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict[str, dict]`: measure -> plain JSON values: `before`, `after` and `real` (the same measure of the ground
        truth; for a kernel distance that of one half of the real cases to the other), `difference` (after - before),
        `ci95` (its paired 95 % interval), `n` images, `n_failed` images where the figure is not defined in one of the
        two, `higher_is_better`, and `verdict`: "better" or "worse" when the interval leaves out 0, else "no
        difference".

    Raises:
        `ValueError`: when the two do not hold the same cases and tasks in the same order.
    """
    if not (np.array_equal(before.case_ids, after.case_ids) and np.array_equal(before.tasks, after.tasks)):
        raise ValueError(
            "`before` and `after` are of different rows or seeds; evaluate both on the same data set with the same "
            "`seeds`."
        )
    weights = resample_cases(before.case_ids, resamples, seed)
    report = {}
    for name, a in before.measures.items():
        b = after.measures[name]
        rows = a.applies & np.isfinite(a.values) & np.isfinite(b.values)
        real_rows = a.applies & np.isfinite(a.real)
        report[name] = _entry(
            a.values[rows].mean() if rows.any() else np.nan,
            b.values[rows].mean() if rows.any() else np.nan,
            a.real[real_rows].mean() if real_rows.any() else np.nan,
            weighted_mean(b.values[rows] - a.values[rows], weights[:, rows]),
            rows.sum(),
            a.applies.sum() - rows.sum(),
            a.higher_is_better,
        )
    if before.real_features is not None:
        report |= _compare_kernel_distances(before, after, weights)
    return report


def _compare_kernel_distances(before: Heldout, after: Heldout, weights: np.ndarray) -> dict[str, dict]:
    size = len(before.real_features)
    has_target = before.real_features.isfinite().all(1).numpy()
    report = {}
    for task in dict.fromkeys(before.tasks.tolist()):
        real_rows = np.flatnonzero((before.tasks[:size] == task) & has_target)
        rows = np.flatnonzero((before.tasks == task) & np.tile(has_target, len(before.tasks) // size))
        if len(real_rows) < 4:  # two halves of two
            continue
        real = before.real_features[real_rows]
        half = np.isin(before.case_ids[real_rows], np.unique(before.case_ids[real_rows])[::2])
        counts = {
            "weights": torch.from_numpy(weights[:, rows]),
            "reference_weights": torch.from_numpy(weights[:, real_rows]),
        }
        differences = kernel_distance(after.features[rows], real, **counts) - kernel_distance(
            before.features[rows], real, **counts
        )
        report[f"{task}_kernel_distance"] = _entry(
            float(kernel_distance(before.features[rows], real)),
            float(kernel_distance(after.features[rows], real)),
            float(kernel_distance(real[half], real[~half])),
            differences.numpy(),
            len(rows),
            0,
            False,
        )
    return report
