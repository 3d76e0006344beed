"""The counterfactual benchmark: how close is a repainted region to what would really have been there?

On the phantom the same slice exists with its tumour and without, so `remove` and `fill` have a known answer in every
pixel, which no real data set offers. The cases are frozen: they have a version and a fingerprint, and a phantom that
has changed since is refused instead of being measured as if nothing had happened.

No shipped training saw them. They are the test split of seed 2026. The base in `pipelines/onereward-brats` was trained
on 1,400 cases and the judge on 1,500 cases of the training split of seed 0, the demo votes and tunes on that split
too, and the figures on all their cards are of the test split of seed 0. Weights that saw the test split of seed 2026
do not belong on the leaderboard.

| measure | task | better | what it is, inside the mask |
|---|---|---|---|
| `mae`, `psnr`, `ssim` | both | lower, higher, higher | error against the truth, and likeness to it |
| `rim_mae` | both | lower | mean absolute error of the masked pixels that touch an unmasked one |
| `error_{NCR,ED,ET}` | both | lower | error of the mean grey where that part of the tumour is, or was |
| `error_margin` | both | lower | the same of the masked pixels where no tumour is |
| `residual_tumour` | remove | lower | share of the mask where the judge finds tumour |
| `dice_{NCR,ED,ET}` | fill | higher | overlap of what the judge finds with what the label map asked for |
| `detail_error` | both | lower | octaves between the fine detail there and the truth's: 1 is half as much, or twice |
| `changed_outside` | both | lower | pixels outside the mask that differ from the source: must be 0 |

The judge is the held-out [`~onereward.evaluation.segmenter.Segmenter`], which is never a reward. MAE, PSNR and SSIM
favour the mean of all answers over any single one of them ([The perception-distortion
tradeoff](https://huggingface.co/papers/1711.06077)): read them with the detail and the judge's findings.
Research use only, not for clinical use.
"""

import dataclasses
import hashlib
import json
import os

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from onereward.data.phantom import CONTRASTS, FIELD_OF_VIEW, load_phantom
from onereward.data.schema import LABELS, rows_to_tensors
from onereward.data.whole_file import whole_file
from onereward.evaluation.bootstrap import measured_difference, measured_mean, plain
from onereward.evaluation.metrics import dice, masked_mae, masked_psnr, masked_ssim
from onereward.evaluation.segmenter import Segmenter


BENCHMARK_VERSION = 1
TASKS = ("remove", "fill")
RECIPE = {
    "size": 64,
    "contrasts": CONTRASTS,
    "tasks": TASKS,
    "seed": 2026,
    "split": "test",
    "mass_effect": False,
}
NUM_CASES = 48

# Fingerprints of the rows of version 1 by the number of cases: all of them, and the first few for a quick try. A
# change of the phantom calls for a new version, new fingerprints and a leaderboard that is run anew.
FROZEN = {
    8: {
        "recipe_sha256": "ac39c8a8da92d94b9514763a6243fbadf8c8eb661d1867b8b0b509b0014469b8",
        "text_sha256": "e0ff7cdda462e996aa17e3ab5dc226c8762abb0fb612bd9e7784379c51a44d9d",
        "sketch": [-114460, 45062, 5298, -55434, 4064, -16414, -84052, -6858],
        "pixels": 1048576,
    },
    48: {
        "recipe_sha256": "9fbe443d3695f7f47810b892e1bcba3e13b05940485810653b6b69163e454261",
        "text_sha256": "01ddb88ee784e6efec96b0432f58f9470bdff6a4ceca1d121be10abae295f57f",
        "sketch": [19323, -6499, 35899, -66759, 190723, -66427, 51291, 33239],
        "pixels": 6291456,
    },
}

# Mean squared difference, in squared grey levels of 255, up to which rows count as the frozen ones. Processors differ
# in the last bit of a sum: with the kernels of a processor without AVX2, 2.5 pixels in a million come out one level
# off. Any change of the recipe moves whole images.
ROUNDING = 1e-4

REGIONS = {name: value for name, value in LABELS.items() if value}
SIZE_BOUNDS = (9.0, 14.0)  # cm2; about a third of the frozen cases lies below, between and above
STRATA = {
    "contrast": CONTRASTS,
    "size": ("small", "medium", "large"),
    "side": ("left", "midline", "right"),
}

# Heading in the tables, digits after the point, whether more is better.
MEASURES = {
    "mae": ("MAE", 3, False),
    "ssim": ("SSIM", 3, True),
    "psnr": ("PSNR, dB", 1, True),
    "rim_mae": ("MAE of the rim", 3, False),
    "residual_tumour": ("residual tumour", 3, False),
    **{f"dice_{region}": (f"Dice {region}", 3, True) for region in REGIONS},
    "detail_error": ("detail, octaves", 2, False),
    "changed_outside": ("changed outside", 0, False),
    **{f"error_{region}": (f"grey error {region}", 3, False) for region in (*REGIONS, "margin")},
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """
    The frozen rows, and what is known of them.

    Args:
        rows (`datasets.Dataset`): N rows of [`onereward.data.schema.FEATURES`].
        tensors (`dict`): the same as [`~onereward.data.schema.rows_to_tensors`] gives them.
        tumours (`torch.Tensor`): label map of the tumour of each row's case `(N, 1, H, W)`, for `remove` too.
        strata (`dict[str, np.ndarray]`): `contrast`, `size` and `side` of each row, as text.
        recipe (`dict`): what made the rows.
        recipe_sha256 (`str`): fingerprint of the frozen rows.
        rows_sha256 (`str`): fingerprint of these rows; another where this processor rounds otherwise.
    """

    rows: datasets.Dataset
    tensors: dict
    tumours: torch.Tensor
    strata: dict[str, np.ndarray]
    recipe: dict
    recipe_sha256: str
    rows_sha256: str


def fingerprint(rows: datasets.Dataset, recipe: dict, projections: int = 8) -> dict:
    r"""
    Fingerprint of rows and of the recipe that made them: exact, and one that tells a rounding from a change.

    The sketch is `$s_k = \sum_i \sigma_{ki} x_i$` over all pixels of all pictures with random signs `$\sigma$`. The
    mean over k of the squared difference of two sketches estimates the summed squared difference of the pixels (Alon,
    Matias & Szegedy 1996, The space complexity of approximating the frequency moments, STOC), without the pixels.

    Args:
        rows (`datasets.Dataset`):
            Rows in the schema of [`onereward.data.schema.FEATURES`].
        recipe (`dict`):
            What made them, as JSON values.
        projections (`int`, *optional*, defaults to 8):
            Length of the sketch.

    Returns:
        `dict`: `recipe_sha256` of recipe, texts and pixels; `text_sha256` of recipe and texts alone; `sketch`, a list
        of whole numbers; `pixels`, how many there are.
    """
    texts = {column: list(rows[column]) for column in ("prompt", "task", "modality", "case_id", "source")}
    text_sha256 = hashlib.sha256(json.dumps([recipe, texts], sort_keys=True).encode())
    # A grey level may round otherwise, a pixel of a mask (0 or 255) or of a label map may not: labels weigh alike.
    weights = {"image": 1, "target": 1, "mask": 1, "label_map": 64}
    pixels = np.concatenate([weights[c] * np.asarray(p, np.int64).ravel() for c in weights for p in rows[c]])
    rng = np.random.default_rng(0)
    signs = (rng.integers(0, 2, len(pixels), dtype=np.int8) * 2 - 1 for _ in range(projections))
    exact = hashlib.sha256(text_sha256.digest() + pixels.astype("<i8").tobytes())
    return {
        "recipe_sha256": exact.hexdigest(),
        "text_sha256": text_sha256.hexdigest(),
        "sketch": [int(pixels @ sign) for sign in signs],
        "pixels": len(pixels),
    }


def check_fingerprint(found: dict, frozen: dict) -> None:
    """
    Refuse rows that are not the frozen ones.

    Args:
        found (`dict`):
            [`fingerprint`] of the rows.
        frozen (`dict`):
            The one they must have.

    Raises:
        `ValueError`: when texts, recipe, number of pixels or more than the rounding of pixels differ.
    """
    if found["recipe_sha256"] == frozen["recipe_sha256"]:
        return
    same_text = (found["text_sha256"], found["pixels"]) == (frozen["text_sha256"], frozen["pixels"])
    change = np.subtract(found["sketch"], frozen["sketch"], dtype=float)
    change = float((change**2).mean()) / frozen["pixels"]
    if not same_text or change > ROUNDING:
        what = f"by {change:.3g} squared grey levels a pixel" if same_text else "in recipe, prompts or size"
        raise ValueError(
            f"The phantom no longer makes the cases of version {BENCHMARK_VERSION} of the counterfactual benchmark: "
            f"they differ {what} (fingerprint {found['recipe_sha256'][:12]}, expected "
            f"{frozen['recipe_sha256'][:12]}). Figures of the two would not be comparable. Go back to the phantom of "
            "that version, or raise BENCHMARK_VERSION, freeze the new fingerprints (`python "
            "benchmarks/counterfactual.py --print-fingerprints`) and run the whole leaderboard again."
        )


def render_rows(num_cases: int) -> datasets.Dataset:
    """The rows of the first `num_cases` cases, not checked against the fingerprint: use [`load_benchmark`]."""
    return load_phantom(num_cases, **RECIPE)


def recipe_of(num_cases: int) -> dict:
    """What makes the rows of the first `num_cases` cases, as JSON values."""
    return json.loads(json.dumps({"version": BENCHMARK_VERSION, "num_cases": num_cases, **RECIPE}))


def load_benchmark(num_cases: int = NUM_CASES) -> Benchmark:
    """
    Make the frozen rows: each case in four contrasts, with its tumour to remove and without it to fill.

    Args:
        num_cases (`int`, *optional*, defaults to 48):
            All 48 cases, or the first 8 for a quick try, which has a fingerprint of its own and goes on no leaderboard
            with the full run.

    Returns:
        [`Benchmark`]

    Raises:
        `ValueError`: for another number of cases, or when the phantom makes other rows than it did.

    Example:

    ```python
    >>> from onereward.evaluation.counterfactual import load_benchmark

    >>> benchmark = load_benchmark(8)
    >>> len(benchmark.rows), benchmark.rows[0]["task"]
    (64, 'remove')
    ```
    """
    if num_cases not in FROZEN:
        raise ValueError(f"`num_cases` is {num_cases}; the frozen sets have {sorted(FROZEN)} cases.")
    rows, recipe = render_rows(num_cases), recipe_of(num_cases)
    found = fingerprint(rows, recipe)
    check_fingerprint(found, FROZEN[num_cases])
    tensors = rows_to_tensors(list(rows))
    tumour_of = {
        (case, contrast): label_map
        for case, contrast, task, label_map in zip(
            rows["case_id"], rows["modality"], rows["task"], tensors["label_maps"], strict=True
        )
        if task == "fill"
    }
    tumours = torch.stack([tumour_of[key] for key in zip(rows["case_id"], rows["modality"], strict=True)])
    return Benchmark(
        rows,
        tensors,
        tumours,
        {"contrast": np.array(rows["modality"]), **_strata_of_tumours(tumours)},
        recipe,
        FROZEN[num_cases]["recipe_sha256"],
        found["recipe_sha256"],
    )


def _strata_of_tumours(tumours: torch.Tensor) -> dict[str, np.ndarray]:
    """Size by area, and side by where the centre lies, as in the phantom's prompts: left is right in the picture."""
    inside = (tumours[:, 0] > 0).double()
    mm = FIELD_OF_VIEW / inside.shape[-1]
    area = inside.sum((1, 2)).numpy() * mm**2 / 100
    columns = torch.arange(inside.shape[-1]) - (inside.shape[-1] - 1) / 2
    offset = ((inside * columns).sum((1, 2)) / inside.sum((1, 2))).numpy() * mm
    low, high = SIZE_BOUNDS
    return {
        "size": np.select([area < low, area <= high], ["small", "medium"], "large"),
        "side": np.select([abs(offset) <= 8, offset > 0], ["midline", "left"], "right"),
    }


def rim_of(masks: torch.Tensor) -> torch.Tensor:
    """Masked pixels that touch an unmasked one, along the diagonals too: `(B, 1, H, W)` float of 0 and 1."""
    inside = (masks > 0.5).float()
    return inside * F.max_pool2d(1 - inside, 3, stride=1, padding=1)


def region_error(images: torch.Tensor, targets: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    r"""
    How far the mean grey of a region is from the truth's, `$|\bar x_R - \bar y_R|$`.

    Args:
        images, targets (`torch.Tensor`):
            Images and truth of shape `(B, C, H, W)`.
        regions (`torch.Tensor`):
            The region of shape `(B, 1, H, W)`, bool.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64, in the unit of the images; NaN where the region is empty.
    """
    difference = torch.where(regions, (images.double() - targets.double()).mean(1, keepdim=True), 0)
    return (difference.flatten(1).sum(1) / regions.flatten(1).sum(1)).abs()


def detail_error(images: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    r"""
    How many octaves the fine detail in the mask is from the truth's, `$|\log_2 (d(x) / d(y))|$` with
    `$d(x) = \sum_{i \in m} |\Delta x_i|$`, the Laplacian over the four neighbours.

    A blurred region has too little and a noisy one too much, whatever its distance to the truth pixel by pixel.

    Args:
        images, targets (`torch.Tensor`):
            Images and truth of shape `(B, C, H, W)`.
        masks (`torch.Tensor`):
            Masks of shape `(B, 1, H, W)`, 1 where to look.

    Returns:
        `torch.Tensor` of shape `(B,)` in float64; not finite where one of the two has no detail at all.
    """

    def detail(x):
        padded = F.pad(x.double(), (1, 1, 1, 1), mode="replicate")
        neighbours = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
        return torch.where(masks > 0.5, (neighbours - 4 * x.double()).abs(), 0).flatten(1).sum(1)

    return (detail(images) / detail(targets)).log2().abs()


@torch.no_grad()
def row_figures(images: torch.Tensor, benchmark: Benchmark, segmenter: Segmenter) -> dict:
    """
    Every figure of every image.

    Args:
        images (`torch.Tensor`):
            One image for each row, `(N, C, H, W)` in [0, 1].
        benchmark ([`Benchmark`]):
            The rows.
        segmenter ([`Segmenter`]):
            The judge.

    Returns:
        `dict`: measure -> `(values, applies)`, two arrays of shape `(N,)`; a value that applies and is not finite has
        failed.
    """
    sources, targets, masks = (benchmark.tensors[name] for name in ("images", "targets", "masks"))
    modalities, tasks = benchmark.rows["modality"], np.array(benchmark.rows["task"])
    inside, everywhere = masks > 0.5, np.ones(len(images), bool)
    figures = {
        "mae": (masked_mae(images, targets, masks), everywhere),
        "ssim": (masked_ssim(images, targets, masks), everywhere),
        "psnr": (masked_psnr(images, targets, masks), everywhere),
        "rim_mae": (masked_mae(images, targets, rim_of(masks)), everywhere),
        "detail_error": (detail_error(images, targets, masks), everywhere),
        "changed_outside": (((images != sources).any(1) & ~inside[:, 0]).flatten(1).sum(1), everywhere),
    }
    regions = {name: benchmark.tumours == value for name, value in REGIONS.items()}
    for name, region in {**regions, "margin": benchmark.tumours == 0}.items():
        region = region & inside
        figures[f"error_{name}"] = (region_error(images, targets, region), region.flatten(1).any(1).numpy())

    found = segmenter.segment(images, modalities)
    residual = ((found > 0) & inside[:, 0]).flatten(1).sum(1) / inside.flatten(1).sum(1)
    figures["residual_tumour"] = (residual, tasks == "remove")
    overlaps = dice(found, benchmark.tensors["label_maps"][:, 0], list(REGIONS.values()))
    for name, overlap in zip(REGIONS, overlaps.unbind(1), strict=True):
        # Only in the contrasts where the judge finds the region on real slices, and where it was asked for.
        seen = np.isin(modalities, segmenter.counted_contrasts(name))
        asked = (benchmark.tensors["label_maps"] == REGIONS[name]).flatten(1).any(1).numpy()
        figures[f"dice_{name}"] = (overlap, seen & asked & (tasks == "fill"))
    return {name: (values.double().numpy(), applies) for name, (values, applies) in figures.items()}


def score_images(
    method: str,
    images: torch.Tensor,
    benchmark: Benchmark,
    segmenter: Segmenter,
    *,
    tasks: tuple[str, ...] = TASKS,
    settings: dict | None = None,
    command: str = "",
    resamples: int = 2000,
) -> dict:
    """
    Score the images of one method.

    Args:
        method (`str`):
            What to call it on the leaderboard.
        images (`torch.Tensor`):
            One image for each row of the benchmark, `(N, C, H, W)` in [0, 1].
        benchmark ([`Benchmark`]):
            From [`load_benchmark`].
        segmenter ([`Segmenter`]):
            The judge, from [`~onereward.evaluation.segmenter.load_segmenter`]. It must not have been a reward.
        tasks (`tuple[str, ...]`, *optional*, defaults to `("remove", "fill")`):
            What the method is for. Its images of other rows are not counted.
        settings (`dict`, *optional*):
            JSON values that say how the images were made: model, steps, seed, seconds.
        command (`str`, *optional*):
            The command that made them.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the bootstrap by case.

    Returns:
        `dict` of JSON values: benchmark, version, recipe and its fingerprint, method, settings, command; `rows` (case,
        task and strata of each row); `figures` (measure -> `rows` where it applies and their `values`, `None` where
        it failed); `measured` (task -> stratum -> measure -> [`~onereward.evaluation.bootstrap.Measured`] as a dict).

    Raises:
        `ValueError`: when the images do not fit the rows, or leave [0, 1].

    Example:

    ```python
    >>> from onereward.evaluation.baselines import constant_fill
    >>> from onereward.evaluation.counterfactual import load_benchmark, score_images
    >>> from onereward.evaluation.segmenter import load_segmenter

    >>> benchmark = load_benchmark(8)
    >>> images = constant_fill(benchmark.tensors["images"], benchmark.tensors["masks"])
    >>> result = score_images("constant fill", images, benchmark, load_segmenter())
    >>> result["measured"]["remove"]["all"]["mae"]["n"]
    32
    ```
    """
    expected = benchmark.tensors["images"].shape
    if images.shape != expected:
        raise ValueError(
            f"`images` has shape {tuple(images.shape)}; expected {tuple(expected)}, one grey image for each row of "
            "the benchmark in its order."
        )
    if not (images >= 0).all() or not (images <= 1).all():
        raise ValueError("`images` holds values outside of [0, 1], or NaN; clip them, or map them to [0, 1] first.")
    if not tasks or not set(tasks) <= set(TASKS):
        raise ValueError(f"`tasks` is {tasks!r}; expected one or more of {TASKS}, as a tuple.")
    figures = row_figures(images, benchmark, segmenter)
    case_ids, row_tasks = np.array(benchmark.rows["case_id"]), np.array(benchmark.rows["task"])

    measured = {}
    for task in tasks:
        chosen = {"all": row_tasks == task}
        for kind, names in STRATA.items():
            chosen |= {f"{kind}={name}": chosen["all"] & (benchmark.strata[kind] == name) for name in names}
        measured[task] = {
            stratum: {
                name: measured_mean(values, case_ids, applies & rows, resamples)
                for name, (values, applies) in figures.items()
                if (applies & rows).any()
            }
            for stratum, rows in chosen.items()
            if rows.any()
        }
    shown = np.isin(row_tasks, tasks)
    return {
        "benchmark": "counterfactual",
        "version": BENCHMARK_VERSION,
        "recipe": benchmark.recipe,
        "recipe_sha256": benchmark.recipe_sha256,
        "rows_sha256": benchmark.rows_sha256,
        "judge": segmenter.card.get("name", "unnamed"),
        "method": method,
        "tasks": list(tasks),
        "settings": settings or {},
        "command": command,
        "rows": {
            "case_id": case_ids.tolist(),
            "task": row_tasks.tolist(),
            **{kind: values.tolist() for kind, values in benchmark.strata.items()},
        },
        "figures": {
            name: {
                "rows": np.flatnonzero(applies & shown).tolist(),
                "values": [plain(value) for value in values[applies & shown]],
            }
            for name, (values, applies) in figures.items()
        },
        "measured": {
            task: {stratum: {name: plain(m) for name, m in table.items()} for stratum, table in strata.items()}
            for task, strata in measured.items()
        },
    }


def compare_results(base: dict, result: dict, resamples: int = 2000) -> dict:
    """
    Compare two methods image by image.

    Args:
        base, result (`dict`):
            From [`score_images`], of the same rows.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the bootstrap by case.

    Returns:
        `dict`: task -> measure -> [`~onereward.evaluation.bootstrap.Measured`] as a dict, of result - base over the
        images where both have the figure, with `verdict`: "better" or "worse" where the interval leaves out 0, else
        "no difference".

    Raises:
        `ValueError`: when the two are of different rows.
    """
    _check_comparable([base, result])
    case_ids, row_tasks = np.array(base["rows"]["case_id"]), np.array(base["rows"]["task"])

    def column(figures):
        values, applies = np.full(len(case_ids), np.nan), np.zeros(len(case_ids), bool)
        values[figures["rows"]] = [np.nan if value is None else value for value in figures["values"]]
        applies[figures["rows"]] = True
        return values, applies

    report = {}
    for task in [task for task in base["tasks"] if task in result["tasks"]]:
        report[task] = {}
        for name in base["figures"]:
            (before, in_base), (after, in_result) = (column(r["figures"][name]) for r in (base, result))
            applies = in_base & in_result & (row_tasks == task)
            if not applies.any():
                continue
            difference = measured_difference(before, after, case_ids, applies, resamples)
            sign = 1 if MEASURES[name][2] else -1
            ends = (sign * difference.low, sign * difference.high)
            verdict = "better" if min(ends) > 0 else "worse" if max(ends) < 0 else "no difference"
            report[task][name] = {**plain(difference), "verdict": verdict}
    return report


def _check_comparable(results: list[dict]) -> None:
    for result in results:
        if result.get("benchmark") != "counterfactual":
            raise ValueError(f"`results` holds {result.get('benchmark')!r}; expected results of score_images.")
        known = [frozen["recipe_sha256"] for frozen in FROZEN.values()]
        if result["version"] != BENCHMARK_VERSION or result["recipe_sha256"] not in known:
            raise ValueError(
                f"The result of {result['method']!r} is of version {result['version']}, fingerprint "
                f"{result['recipe_sha256'][:12]}; this is version {BENCHMARK_VERSION} with the fingerprints "
                f"{', '.join(sha256[:12] for sha256 in known)}. Run it again."
            )
        if result.get("judge") != results[0].get("judge"):
            raise ValueError(
                f"{result['method']!r} was judged by {result.get('judge')!r} and {results[0]['method']!r} by "
                f"{results[0].get('judge')!r}; score both with one judge."
            )
        if result["recipe_sha256"] != results[0]["recipe_sha256"]:
            raise ValueError(
                f"{result['method']!r} has {result['recipe']['num_cases']} cases and {results[0]['method']!r} "
                f"{results[0]['recipe']['num_cases']}; run both on the same number."
            )


def _cell(entry: dict | None, measure: str, signed: bool = False) -> str:
    """`0.081 [0.077, 0.085]`, with a mark where cases are few, the verdict and the failures if there are any."""
    if entry is None:
        return ""
    digits = MEASURES[measure][1]
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    failed = f" ({entry['n_failed']} failed)" if entry["n_failed"] else ""
    if entry["value"] is None:
        return f"undefined{failed}"
    low, high = entry["low"], entry["high"]
    # Without a spread, as in a column of zeros, the interval says nothing that the value does not.
    interval = "" if low is None or low == high else f" [{form.format(low)}, {form.format(high)}]"
    rough = "†" if entry["note"] and (interval or low is None) else ""
    verdict = f" {entry['verdict']}" if "verdict" in entry else ""
    return f"{form.format(entry['value'])}{interval}{rough}{verdict}{failed}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measure_table(results: list[dict], task: str, measures: list[str], stratum: str = "all") -> str:
    """One line a method; the first line says on how many images each column rests."""

    def entry(result, name):
        return result["measured"][task][stratum].get(name)

    measures = [name for name in measures if any(entry(result, name) for result in results)]
    counts = [max(e["n"] + e["n_failed"] for r in results if (e := entry(r, name))) for name in measures]
    header = ["method", *(f"{MEASURES[name][0]} {'↑' if MEASURES[name][2] else '↓'}" for name in measures)]
    lines = [[r["method"], *(_cell(entry(r, name), name) for name in measures)] for r in results]
    return _table(header, [["*images*", *(f"*{count}*" for count in counts)], *lines])


def _strata_table(results: list[dict], task: str, measure: str) -> str:
    strata = [stratum for stratum in results[0]["measured"][task] if stratum != "all"]
    counts = [results[0]["measured"][task][stratum][measure]["n"] for stratum in strata]
    lines = [
        [r["method"], *(_cell(r["measured"][task][stratum].get(measure), measure) for stratum in strata)]
        for r in results
    ]
    header = ["method", *(stratum.replace("=", " ") for stratum in strata)]
    return _table(header, [["*images*", *(f"*{count}*" for count in counts)], *lines])


def render_leaderboard(results: list[dict], base: str = "base") -> str:
    """
    The leaderboard as Markdown. Arguments and errors as in [`write_leaderboard`].

    Returns:
        `str`
    """
    if not results:
        raise ValueError("`results` is empty; pass at least one result of score_images.")
    _check_comparable(results)
    first = results[0]
    bases = [result for result in results if result["method"] == base]
    if base and not bases:
        raise ValueError(
            f"`base` is {base!r}, which is not among the methods {[r['method'] for r in results]}; pass one of them, "
            "or an empty name for no comparison."
        )
    recipe = first["recipe"]
    arguments = {**{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.items() if k != "version"}}
    call = ", ".join(
        [str(arguments.pop("num_cases")), *(f"{k}={v!r}".replace("'", '"') for k, v in arguments.items())]
    )
    versions = first.get("environment")
    differently = sorted({r["method"] for r in results if r["rows_sha256"] != r["recipe_sha256"]})
    parts = [
        "# Counterfactual leaderboard",
        "<!-- Written by onereward.evaluation.counterfactual.write_leaderboard; do not edit. -->",
        "On the phantom the same slice exists with its tumour and without, so what should have been painted is known "
        "in every pixel. `remove` starts from the tumour image and its truth is the healthy twin; `fill` starts from "
        "the twin, gets a label map, and its truth is the tumour image. Research use only, not for clinical use: a "
        "place on this list says nothing about images of patients.",
        f"Version {first['version']}, fingerprint `{first['recipe_sha256']}`, {recipe['num_cases']} cases, "
        f"{len(first['rows']['case_id'])} rows: `load_phantom({call})`. A phantom that makes other rows is refused."
        + (f" Made on a processor that rounds otherwise: {', '.join(differently)}." if differently else ""),
        "No shipped training saw these cases: the base, the judge and the demo's adapter were trained on the training "
        "split of seed 0, and the figures on their cards are of the test split of seed 0.",
        "Brackets hold 95 % intervals of a bootstrap by case. The line *images* says how many each column rests on; "
        "images where a figure is not defined are left out of it and counted as failed (PSNR is infinite "
        "where nothing differs). Where no failure is shown, there was none. † marks fewer than "
        "20 cases: a rough interval, and none of a single case.",
        "<!-- not run: minutes -->\n```bash\n" + "\n".join(dict.fromkeys(r["command"] for r in results)) + "\n```",
        "`--adapter FOLDER` scores an adapter of yours beside them, `--cases 8` is a quick try."
        + (f" Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}." if versions else ""),
        _settings_table(results),
    ]
    for task in TASKS:
        shown = [result for result in results if task in result["tasks"]]
        if not shown:
            continue
        # The truth first, as the bound that the judge sets; then by error.
        shown.sort(key=lambda r: r["measured"][task]["all"]["mae"]["value"])
        main = ["mae", "ssim", "psnr", "rim_mae", "residual_tumour", *(f"dice_{r}" for r in REGIONS)]
        parts += [f"## {task}", _measure_table(shown, task, [*main, "detail_error", "changed_outside"])]
        parts += [
            "Distance of the mean grey to the truth's, in each region of the tumour"
            + (" that was there" if task == "remove" else "")
            + " and in the masked margin around it:",
            _measure_table(shown, task, [f"error_{region}" for region in (*REGIONS, "margin")]),
            f"MAE by contrast, area of the tumour (small below {SIZE_BOUNDS[0]:g} cm², large above "
            f"{SIZE_BOUNDS[1]:g} cm²) and side of the patient:",
            _strata_table(shown, task, "mae"),
        ]
        if bases and task in bases[0]["tasks"]:
            others = [result for result in shown if result["method"] != base]
            compared = {r["method"]: compare_results(bases[0], r)[task] for r in others}
            names = [
                n for n in (*main, "detail_error") if n != "psnr" and any(n in table for table in compared.values())
            ]
            header = ["method", *(MEASURES[name][0] for name in names)]
            lines = [
                [m, *(_cell(table.get(name), name, signed=True) for name in names)] for m, table in compared.items()
            ]
            if lines:
                parts += [f"Difference to {base}, image by image:", _table(header, lines)]
    parts += [
        "## How to read it",
        "- MAE, PSNR and SSIM favour the mean of all possible answers over any one of them, so that a smooth region "
        "can win. The detail, in octaves from the truth's, tells: at 1 a region has half the fine detail, or twice.\n"
        "- The judge was trained on real slices. What it finds in the **truth** is its own error. Flat labels are "
        "easier to find than real regions, so that a Dice above the truth's is no merit; and what is neither healthy "
        "nor tumour, such as a smooth hole, it may call tumour, which counts as residual.\n"
        "- **unchanged** returns the source and is the only one that sees what lies under the mask. Its margin is "
        "therefore right for free; its other figures are the cost of doing nothing.\n"
        "- **nearest patient** pastes from training cases, **label means** paints each label in one grey. Both are "
        "told the labels, as the model is; the other classical methods are not, and for `fill` they show what it "
        "costs not to know.\n"
        "- `changed outside` counts pixels outside the mask that differ from the source, and must be 0.\n"
        "- The Dice of a region counts in the contrasts where the judge finds it on real slices.\n"
        "- One image a row: another noise seed gives a model other figures. The intervals are over cases, not seeds.",
    ]
    return "\n\n".join(parts) + "\n"


def _settings_table(results: list[dict]) -> str:
    lines = [
        [r["method"], ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in r["settings"].items())]
        for r in results
    ]
    return _table(["method", "settings"], lines).replace("---:", "---")


def write_leaderboard(results: list[dict], path: str | os.PathLike, base: str = "base") -> None:
    """
    Write the leaderboard as a Markdown page.

    Args:
        results (`list[dict]`):
            One result of [`score_images`] for each method.
        path (`str` or `os.PathLike`):
            The page, replaced if it exists.
        base (`str`, *optional*, defaults to `"base"`):
            The method that all others are compared with; an empty name for no comparison.

    Raises:
        `ValueError`: when there is no result, one is of another version, fingerprint or number of cases, or the base
            is not among them.
    """
    page = render_leaderboard(results, base)
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
