"""
How good pipelines and adapters are on images nobody tuned on: pictures are made once and kept, then measured shard by
shard, so that memory stays flat however many there are.

A *painter* repaints rows: a pipeline with or without an adapter ([`pipeline_painter`]), a baseline, or any function of
its kind. [`evaluate_painters`] lets several of them paint the same rows from the same noise, and puts them side by
side.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from onereward.data.whole_file import whole_file, write_json
from onereward.evaluation.bootstrap import (
    Measured,
    measured_difference,
    measured_mean,
    measured_ratio,
    paired_difference,
    plain,
)
from onereward.evaluation.heldout import Heldout, generate_batch, measure_images, noise_seeds
from onereward.evaluation.segmenter import Segmenter
from onereward.preferences.raters import holm


# Rows and seeds, decoded, to pictures of shape (B, C, H, W) in [0, 1]; equal to the source outside the mask.
Painter = Callable[[list[dict], list[int]], torch.Tensor]

SHARD = 64  # rows a file
ADHERENCE = 0.85  # of the Dice on real images: below, a painter does not paint what it was asked for


def pipeline_painter(pipeline, *, num_inference_steps: int = 20, guidance_scale: float = 1.0) -> Painter:
    """
    The painter that a pipeline is, with the adapters that are on.

    Args:
        pipeline ([`OneRewardMaskPipeline`]):
            The pipeline.
        num_inference_steps (`int`, *optional*, defaults to 20):
            Denoising steps.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Weight of classifier-free guidance.

    Returns:
        `Painter`: its batch size is halved until it fits into memory.
    """
    batch_size = SHARD

    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}

    def paint(rows, seeds):
        nonlocal batch_size
        pipeline.set_progress_bar_config(disable=True)
        images = []
        while len(images) < len(rows):
            batch = slice(len(images), len(images) + batch_size)
            try:
                images += generate_batch(pipeline, rows[batch], seeds[batch], **settings)
            except RuntimeError as error:
                if batch_size == 1 or not should_reduce_batch_size(error):
                    raise
                batch_size //= 2  # for all further calls, too
                clear_device_cache(garbage_collection=True)
        return torch.stack(images)

    return paint


def fingerprint(dataset: datasets.Dataset) -> str:
    """16 hexadecimal digits that stand for the rows of a data set, pictures and words, in their order."""
    digest = hashlib.sha256()
    encoded = dataset
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            encoded = encoded.cast_column(column, datasets.Image(decode=False))
    for row in encoded:
        for column in sorted(row):
            value = row[column]
            value = (value["bytes"] or value["path"]) if isinstance(value, dict) else value
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()[:16]


def paint_all(
    painter: Painter, dataset: datasets.Dataset, folder: Path, seeds: Sequence[int], description: str = "Painting"
) -> None:
    """
    Pictures of all rows and seeds, as 8-bit safetensors of `SHARD` rows each. What is there is not made again.

    The noise of a picture depends on its seed and on its place in the data set alone, so that two painters start from
    the same noise, whatever the batch size.

    Args:
        painter (`Painter`):
            Who paints.
        dataset (`datasets.Dataset`):
            Rows of the schema, of one size and mode.
        folder (`Path`):
            Where the files go.
        seeds (`Sequence[int]`):
            One picture of each row is made for each.
        description (`str`, *optional*, defaults to `"Painting"`):
            Words before the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = [(seed, start) for seed in seeds for start in range(0, len(dataset), SHARD)]
    with tqdm(total=len(seeds) * len(dataset), desc=description, unit="image") as progress:
        for seed, start in shards:
            indices = range(start, min(start + SHARD, len(dataset)))
            file = _shard(folder, seed, start)
            if not file.exists():
                rows = [dataset[i] for i in indices]
                images = painter(rows, noise_seeds(seed, indices))
                images = (images.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
                with whole_file(file) as partial:
                    save_file({"images": images}, partial)
            progress.update(len(indices))


def _shard(folder: Path, seed: int, start: int) -> Path:
    return folder / f"{seed}-{start:07d}.safetensors"


def read_picture(folder: Path, seed: int, row: int) -> torch.Tensor:
    """One picture of [`paint_all`], `(C, H, W)` in [0, 1]."""
    return read_shard(folder, seed, row // SHARD * SHARD)[row % SHARD]


def read_shard(folder: Path, seed: int, start: int) -> torch.Tensor:
    """Pictures of one file of [`paint_all`], `(B, C, H, W)` in [0, 1]."""
    return load_file(_shard(folder, seed, start))["images"].float() / 255


def measure_all(
    folder: Path,
    dataset: datasets.Dataset,
    seeds: Sequence[int],
    segmenter: Segmenter | None,
    description: str,
    perceptual: Callable | None = None,
) -> Heldout:
    """
    The measures of [`~onereward.evaluation.heldout.measure_images`] of all pictures of a painter, which stay on the
    disk: `images` of the result is empty.
    """
    parts = []
    with tqdm(total=len(seeds) * len(dataset), desc=description, unit="image") as progress:
        for seed in seeds:
            for start in range(0, len(dataset), SHARD):
                rows = dataset.select(range(start, min(start + SHARD, len(dataset))))
                images = read_shard(folder, seed, start)
                judges = {"segmenter": segmenter, "perceptual": perceptual}
                parts.append(measure_images(images, rows, detailed=True, **judges))
                progress.update(len(rows))
    return _join(parts)


def _join(parts: list[Heldout]) -> Heldout:
    """Measures of shards one after the other; a measure that a shard has not does not apply there."""
    measures = {}
    for name in dict.fromkeys(name for part in parts for name in part.measures):
        columns = {"values": [], "real": [], "applies": []}
        for part in parts:
            number = len(part.case_ids)
            measure = part.measures.get(name)
            columns["values"].append(np.full(number, np.nan) if measure is None else measure.values)
            columns["real"].append(np.full(number, np.nan) if measure is None else measure.real)
            columns["applies"].append(np.zeros(number, bool) if measure is None else measure.applies)
        kind = next(part.measures[name] for part in parts if name in part.measures)
        joined = {column: np.concatenate(values) for column, values in columns.items()}
        measures[name] = type(kind)(**joined, higher_is_better=kind.higher_is_better)

    def features(name):
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    return Heldout(
        images=torch.empty(0),
        case_ids=np.concatenate([part.case_ids for part in parts]),
        tasks=np.concatenate([part.tasks for part in parts]),
        measures=measures,
        features=features("features"),
        real_features=features("real_features"),
    )


def sign_flip_p_value(differences: np.ndarray, case_ids: np.ndarray, permutations: int = 4999, seed: int = 0) -> float:
    """
    Probability of a mean difference as large as this one, either way, if the two sides of every case could as well
    have been swapped: the paired permutation test by case (R. Fisher, The Design of Experiments, 1935, section 21).

    Args:
        differences (`np.ndarray` of shape `(N,)`):
            Paired differences; those that are not finite are left out.
        case_ids (`np.ndarray` of shape `(N,)`):
            Case of each of them; a case is swapped as a whole.
        permutations (`int`, *optional*, defaults to 4999):
            Random swaps; the smallest p value is one in as many and one.
        seed (`int`, *optional*, defaults to 0):
            Seed of the swaps.

    Returns:
        `float`: NaN without a difference.
    """
    kept = np.isfinite(differences)
    if not kept.any():
        return float("nan")
    _, case = np.unique(np.asarray(case_ids)[kept], return_inverse=True)
    sums = np.bincount(case, differences[kept])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations, len(sums)))
    # as large up to rounding
    larger = (np.abs(signs @ sums) >= np.abs(sums.sum()) * (1 - 1e-12)).sum()
    return float((1 + larger) / (1 + permutations))


def compare_painters(before: Heldout, after: Heldout, *, resamples: int = 2000, seed: int = 0) -> dict[str, dict]:
    """
    Each measure of one painter against that of another, of the same rows and seeds.

    Args:
        before, after ([`Heldout`]):
            Measures of both.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the intervals.
        seed (`int`, *optional*, defaults to 0):
            Seed of the intervals and the test.

    Returns:
        `dict[str, dict]`: measure -> `difference` ([`Measured`], after - before), `p` of [`sign_flip_p_value`],
        `p_holm`, the same corrected for all measures (S. Holm, 1979), and `verdict`: "better" or "worse" where
        `p_holm` is below 0.05, else "no difference".
    """
    report = {}
    for name, measure in before.measures.items():
        other = after.measures[name]
        rows = (measure.values, other.values, before.case_ids, measure.applies)
        difference = measured_difference(*rows, resamples, seed)
        values = np.where(measure.applies, paired_difference(measure.values, other.values), np.nan)
        report[name] = {"difference": difference, "p": sign_flip_p_value(values, before.case_ids, seed=seed)}
    tested = [name for name, entry in report.items() if np.isfinite(entry["p"])]
    for entry in report.values():
        entry |= {"p_holm": float("nan"), "verdict": "no difference"}
    for name, corrected in zip(tested, holm(np.array([report[name]["p"] for name in tested])), strict=True):
        entry, up = report[name], report[name]["difference"].value > 0
        entry["p_holm"] = float(corrected)
        if corrected < 0.05:
            entry["verdict"] = "better" if up == before.measures[name].higher_is_better else "worse"
    return report


def adherence(of_real: dict[str, Measured]) -> str | None:
    """
    Whether a painter paints what the label maps ask for, from the Dice of each region as a share of that on the real
    pictures: "fails" when the interval of a region ends below `ADHERENCE`, "holds" when all begin above it, else
    "unclear"; `None` without a region.
    """
    if not of_real:
        return None
    # a share without variation has no interval, and needs none
    ends = [(share.low, share.high) if np.isfinite(share.low) else (share.value,) * 2 for share in of_real.values()]
    if any(high < ADHERENCE for _, high in ends):
        return "fails"
    return "holds" if all(low >= ADHERENCE for low, _ in ends) else "unclear"


def evaluate_painters(
    painters: dict[str, Painter],
    dataset: datasets.Dataset,
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    segmenter: Segmenter | None = None,
    perceptual: Callable | None = None,
    was_reward: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """
    Paint, measure and compare. A run that was stopped goes on where it was.

    Args:
        painters (`dict[str, Painter]`):
            Name -> who paints. All others are compared with the first.
        dataset (`datasets.Dataset`):
            Rows of the schema that nobody was tuned on, of one size and mode.
        output_dir (`str` or `Path`):
            Where the pictures and `results.json` go. Pictures are known by the painter's name: another painter of the
            same name needs another folder.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`):
            One picture of each row is painted for each.
        segmenter ([`Segmenter`], *optional*):
            The judge; leave it out for images of another kind or size than it was trained on.
        perceptual (`Callable`, *optional*):
            Distance of pictures to measure, too, such as [`~onereward.evaluation.perceptual.load_lpips`].
        was_reward (`Sequence[str]`, *optional*):
            Measures that were a reward of one of the painters, or how their names begin or end. They are kept apart:
            they are no result.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the intervals.
        seed (`int`, *optional*, defaults to 0):
            Seed of the intervals and tests.

    Returns:
        `dict`: what `results.json` holds: `data`, `painters`, and for each measure its direction, whether it
        `was_reward`, the figure of the truth, of each painter, and each painter's difference from the first.

    Raises:
        `ValueError`: when `output_dir` holds a run on other data or seeds, or painted by others.

    Example:

    ```python
    >>> painters = {"base": pipeline_painter(pipeline), "constant": constant}
    >>> results = evaluate_painters(painters, load_phantom(32, split="test"), "runs/evaluation")
    >>> results["measures"]["fill_ssim"]["painters"]["base"]["value"]
    ```
    """
    data, started = describe(dataset, seeds), time.monotonic()
    found = paint_and_measure(painters, dataset, output_dir, data, segmenter, perceptual)
    results = put_side_by_side(found, data, was_reward, resamples, seed)
    results["seconds"] = round(time.monotonic() - started, 1)
    write_json(Path(output_dir) / "results.json", results)
    return results


def describe(dataset: datasets.Dataset, seeds: Sequence[int]) -> dict:
    """What is evaluated on: how many rows and cases, of which kinds, their [`fingerprint`] and the seeds."""
    return {
        "rows": len(dataset),
        "cases": len(set(dataset["case_id"])),
        "tasks": sorted(set(dataset["task"])),
        "modalities": sorted(set(dataset["modality"])),
        "fingerprint": fingerprint(dataset),
        "seeds": list(seeds),
    }


def paint_and_measure(
    painters: dict[str, Painter],
    dataset: datasets.Dataset,
    output_dir: str | Path,
    data: dict,
    segmenter: Segmenter | None,
    perceptual: Callable | None,
) -> dict[str, Heldout]:
    """The first half of [`evaluate_painters`], with its arguments and `data` from [`describe`]: name -> measures."""
    folder, found, seeds = Path(output_dir), {}, data["seeds"]
    _check_same(folder / "data.json", data)
    for name, painter in painters.items():
        pictures = folder / "images" / name
        paint_all(painter, dataset, pictures, seeds, f"{name}: painting")
        found[name] = measure_all(pictures, dataset, seeds, segmenter, f"{name}: measuring", perceptual)
    return found


def put_side_by_side(
    found: dict[str, Heldout], data: dict, was_reward: Sequence[str], resamples: int, seed: int
) -> dict:
    """The second half of [`evaluate_painters`], with its arguments; `data` from [`describe`]."""
    first = next(iter(found))
    reference = found[first]
    measures = {}
    differences = {
        name: compare_painters(reference, heldout, resamples=resamples, seed=seed)
        for name, heldout in found.items()
        if name != first
    }
    for name, measure in reference.measures.items():
        of_painters = {
            painter: measured_mean(heldout.measures[name].values, heldout.case_ids, measure.applies, resamples, seed)
            for painter, heldout in found.items()
        }
        measures[name] = {
            "higher_is_better": measure.higher_is_better,
            "was_reward": any(name.startswith(word) or name.endswith(word) for word in was_reward),
            "real": measured_mean(measure.real, reference.case_ids, measure.applies, resamples, seed),
            "painters": of_painters,
            "differences": {painter: entries[name] for painter, entries in differences.items()},
        }
    regions = [name for name in measures if name.startswith("fill_dice_")]

    def of_real(heldout):
        found = {name: heldout.measures[name] for name in regions}
        return {
            name: measured_ratio(measure.values, measure.real, heldout.case_ids, measure.applies, resamples, seed)
            for name, measure in found.items()
        }

    shares = {painter: of_real(heldout) for painter, heldout in found.items()}
    results = {
        "data": data,
        "painters": {
            painter: {"adherence": adherence(share), "dice_of_real": share} for painter, share in shares.items()
        },
        "reference": first,
        "measures": measures,
    }
    return plain(results)


def _check_same(path: Path, data: dict) -> None:
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in data if before.get(name) != data[name]]
        if changed:
            raise ValueError(
                f"`output_dir` {str(path.parent)!r} holds an evaluation of other data ({', '.join(changed)} differ). "
                "Name another folder, or delete it."
            )
        return
    write_json(path, data)
