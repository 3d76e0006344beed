"""Do synthetic images help? Train on real, on real + synthetic and on synthetic images, and test on unseen real cases.

A segmenter or a classifier is trained from scratch in each **arm**: real images only, real + synthetic at several
shares of each batch, synthetic only, each at several fractions of the real cases and with several seeds. All arms of
one fraction and seed draw the same real cases, start from the same weights and take the same number of steps, so that
more data is never more training. Each is compared with real only at its fraction, in every subgroup, those that have
few training cases first: that synthetic images help them is the claim of RL4Med
(https://huggingface.co/papers/2503.15784), of which no protocol was published.

What keeps the answer honest:

- Synthetic images made from a test case are refused, and those made from a training case are used only where that case
  is in the fraction: their surroundings are real. Train the generator without the test cases too; that cannot be seen
  from here.
- Seeds count as what they are, a random choice. A test over cases alone asks whether *these* trained models differ,
  and any two sets of trainings do: it calls up to two in three null comparisons different. See [`crossed_interval`].
- All comparisons of a result are one family of Holm's correction.

Research use only, not for clinical use.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from torch import nn
from tqdm import tqdm

from onereward.data.schema import LABELS
from onereward.data.whole_file import whole_file, write_json
from onereward.evaluation.bootstrap import Measured, measured_mean, percentile_interval
from onereward.evaluation.figures import COLOURS, INK, MUTED, NOTICE, PAPER
from onereward.evaluation.heldout import generate_images
from onereward.evaluation.metrics import dice
from onereward.evaluation.segmenter import Segmenter, dice_loss
from onereward.preferences.raters import holm


ALL = "all cases"
POOLED = "pooled"

# With fewer cases no signed-rank test can reach p < 0.05.
FEWEST_CASES = 6

# A subgroup is under-represented when it has less than this share of the training cases of the largest one.
UNDER_REPRESENTED = 0.5


# What a row shows, for use as `outcome` or `subgroup`.


def tumour_present(row: dict) -> str:
    """`"yes"` or `"no"`: whether the label map of a row holds any region."""
    return "yes" if (np.asarray(row["label_map"]) > 0).any() else "no"


def largest_region(row: dict) -> str:
    """The label value with the most pixels, as text; `"0"` without any region."""
    counts = np.bincount(np.asarray(row["label_map"]).ravel(), minlength=1)[1:]
    return str(int(counts.argmax()) + 1 if counts.any() else 0)


def tumour_side(row: dict) -> str:
    """`"left"` or `"right"` half of the picture, as displayed, where the centre of all regions lies; `"none"`."""
    columns = np.argwhere(np.asarray(row["label_map"]) > 0)[:, 1]
    if len(columns) == 0:
        return "none"
    return "left" if columns.mean() < (np.asarray(row["label_map"]).shape[1] - 1) / 2 else "right"


def tumour_size(row: dict) -> str:
    """`"small"` (all regions cover less than 2 % of the picture), `"medium"` or `"large"` (5 % or more); `"none"`."""
    share = (np.asarray(row["label_map"]) > 0).mean()
    return "none" if share == 0 else "small" if share < 0.02 else "medium" if share < 0.05 else "large"


def column_values(dataset, column: str | Callable) -> list[str]:
    """The column of a data set, or what a function says of each row, as text."""
    if callable(column):
        return [str(column(row)) for row in dataset]
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column {column!r}, only {dataset.column_names}; add it to real and synthetic rows "
            "alike, or pass a function of a row."
        )
    return [str(value) for value in dataset[column]]


def synthetic_rows(
    pipeline,
    rows: datasets.Dataset,
    *,
    per_row: int = 1,
    balance: str | Callable | None = None,
    seed: int = 0,
    batch_size: int = 32,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    adapter: bool = True,
) -> datasets.Dataset:
    """
    Makes synthetic rows: those given, with a generated picture as target. The case stays, so that
    [`downstream_utility`] knows what each was made from.

    Args:
        pipeline ([`OneRewardMaskPipeline`]):
            The pipeline.
        rows (`datasets.Dataset`):
            Rows in the schema of [`onereward.data.schema.FEATURES`] to generate for. Leave the test cases out.
        per_row (`int`, *optional*, defaults to 1):
            Pictures for each row, where `balance` is not given.
        balance (`str` or `Callable`, *optional*):
            A column, or a function of a row, that names subgroups: pictures are generated only for those that have
            fewer rows than the largest one, until they have as many.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise.
        batch_size (`int`, *optional*, defaults to 32):
            Images per call of the pipeline.
        num_inference_steps (`int`, *optional*, defaults to 20):
            Denoising steps.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Weight of classifier-free guidance.
        adapter (`bool`, *optional*, defaults to `True`):
            `False` switches the LoRA adapters of the pipeline off.

    Returns:
        `datasets.Dataset`: rows with all columns of `rows`; `target` is the generated picture, `source` is
        `"synthetic"`.

    Raises:
        `ValueError`: when `balance` finds nothing to balance.

    Example:

    ```python
    >>> from onereward.evaluation.downstream import synthetic_rows, tumour_size

    >>> more = synthetic_rows(pipeline, train, balance=tumour_size)
    ```
    """
    indices = np.tile(np.arange(len(rows)), per_row)
    if balance is not None:
        groups = np.array(column_values(rows, balance))
        names, counts = np.unique(groups, return_counts=True)
        wanted = [
            np.resize(np.flatnonzero(groups == name), counts.max() - count)
            for name, count in zip(names, counts, strict=True)
        ]
        indices = np.concatenate(wanted).astype(int)
        if len(indices) == 0:
            raise ValueError(
                f"`balance` finds {counts.max()} rows in each of {names.tolist()}: nothing is under-represented. Pass "
                "`per_row` instead."
            )
    chosen = rows.select(indices)
    images = generate_images(
        pipeline,
        chosen,
        seeds=(seed,),
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        adapter=adapter,
    )
    pictures = (images * 255).round().to(torch.uint8).numpy().transpose(0, 2, 3, 1)
    targets = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
        targets.append({"bytes": buffer.getvalue(), "path": None})
    made = chosen.remove_columns(["target", "source"])
    made = made.add_column("target", targets, feature=datasets.Image())
    made = made.add_column("source", ["synthetic"] * len(made))
    return made.select_columns(rows.column_names)


# From rows to tensors.


@dataclasses.dataclass
class Examples:
    """
    Labelled pictures.

    Attributes:
        pictures (`torch.Tensor`): `(N, C, H, W)`, uint8.
        label_maps (`torch.Tensor`): `(N, H, W)`, uint8.
        modalities, case_ids (`np.ndarray`): one of each picture.
        classes (`np.ndarray`): what a classifier shall say of it; empty texts for a segmenter.
        groups (`np.ndarray`): its subgroup; empty texts without subgroups.
    """

    pictures: torch.Tensor
    label_maps: torch.Tensor
    modalities: np.ndarray
    case_ids: np.ndarray
    classes: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.case_ids)

    def take(self, rows: np.ndarray) -> "Examples":
        return Examples(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def join(parts: list[Examples]) -> Examples:
    """Several examples as one."""
    columns = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(Examples)]
    return Examples(*(torch.cat(c) if torch.is_tensor(c[0]) else np.concatenate(c) for c in columns))


def read_examples(dataset, name: str, outcome: str | Callable | None, subgroup: str | Callable | None) -> Examples:
    """
    Reads the targets of a data set with what is known of them.

    Args:
        dataset (`datasets.Dataset`):
            Rows in the schema of [`onereward.data.schema.FEATURES`], all of one size and mode, each with a target.
        name (`str`):
            What to call it in errors.
        outcome, subgroup (`str` or `Callable`, *optional*):
            Column or function of a row.

    Returns:
        [`Examples`]

    Raises:
        `ValueError`: without rows; for rows without a target, of the task `extend`, or of several sizes.
    """
    if len(dataset) == 0:
        raise ValueError(f"`{name}` has no rows; pass at least one.")
    if "extend" in dataset["task"]:
        raise ValueError(
            f"`{name}` has 'extend' rows, whose label map covers the strip only; keep 'fill' and 'remove' rows."
        )
    pictures, label_maps = [], []
    for row in tqdm(dataset, desc=f"Reading {name}", disable=len(dataset) < 2048):
        if row["target"] is None:
            raise ValueError(
                f"`{name}` has a row of case {row['case_id']!r} without a target, the picture that its label map "
                "describes; drop such rows."
            )
        pictures.append(np.atleast_3d(np.asarray(row["target"])))
        label_maps.append(np.asarray(row["label_map"]))
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"`{name}` mixes pictures of {sorted({p.shape for p in pictures})}; bring them to one size.")
    nothing = [""] * len(dataset)
    return Examples(
        torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(np.stack(label_maps).astype(np.uint8)),
        np.array(dataset["modality"]),
        np.array(dataset["case_id"]),
        np.array(column_values(dataset, outcome) if outcome else nothing),
        np.array(column_values(dataset, subgroup) if subgroup else nothing),
    )


def _digests(examples: Examples) -> list[bytes]:
    return [hashlib.sha256(picture.tobytes()).digest() for picture in examples.pictures.numpy()]


def check_no_leakage(examples: Examples, test: Examples, name: str) -> None:
    """
    Refuses examples that share a case, or a picture bit for bit, with the test cases.

    Args:
        examples, test ([`Examples`]):
            What is trained on, and what is tested on.
        name (`str`):
            What to call `examples` in errors.

    Raises:
        `ValueError`: naming the cases.
    """
    shared = sorted(set(examples.case_ids) & set(test.case_ids))
    if shared:
        raise ValueError(
            f"`{name}` has rows of {len(shared)} test case(s), such as {shared[:3]}: the test would be of what was "
            "trained on. Split by case first (onereward.data.schema.split_by_case), and generate from training cases."
        )
    seen = set(_digests(test))
    same = [case for case, digest in zip(examples.case_ids, _digests(examples), strict=True) if digest in seen]
    if same:
        raise ValueError(
            f"`{name}` has {len(same)} picture(s) equal to a test picture under other case ids, such as "
            f"{sorted(set(same))[:3]}; remove the duplicates."
        )


# Training.


class Classifier(nn.Module):
    """
    A small convolutional network over `(B, channels, H, W)` in [0, 1]: blocks of convolution, batch norm, SiLU and
    pooling, then mean and maximum over the picture, then one linear layer.

    Args:
        channels (`int`): Channels of the pictures.
        classes (`int`): Number of classes.
        widths (`Sequence[int]`, *optional*, defaults to `(16, 32, 64)`): Channels of each block.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int] = (16, 32, 64)):
        super().__init__()
        layers = []
        for inputs, outputs in zip([channels, *widths], widths, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
            layers += [nn.MaxPool2d(2)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(2 * widths[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))


def train_and_score(
    real: Examples,
    synthetic: Examples | None,
    share: float,
    test: Examples,
    *,
    classes: Sequence[str] | None,
    labels: dict[str, int],
    modalities: Sequence[str],
    steps: int,
    batch_size: int,
    learning_rate: float,
    widths: Sequence[int],
    seed: int,
    device: str,
) -> np.ndarray:
    """
    Trains one model from scratch and scores each test picture. Weights and draws depend on the seed alone, so that
    arms of one seed differ in their data only. AdamW with a one-cycle learning rate; a segmenter learns by
    cross-entropy plus soft Dice with half of the batch mirrored, a classifier by cross-entropy.

    Args:
        real ([`Examples`]):
            Real pictures.
        synthetic ([`Examples`], *optional*):
            Synthetic ones; may be left out where `share` is 0.
        share (`float`):
            Probability that a picture of a batch is synthetic, in [0, 1].
        test ([`Examples`]):
            Pictures to score.
        classes (`Sequence[str]`, *optional*):
            The classes of a classifier; a segmenter is trained when not given.
        labels, modalities, steps, batch_size, learning_rate, widths, seed, device:
            As in [`downstream_utility`].

    Returns:
        `np.ndarray` of shape `(len(test),)`: for a segmenter the mean Dice of the regions, by the convention of BraTS
        (1 where neither truth nor finding has the region, 0 where one has), for a classifier 1 where it is right, else
        0. All NaN when the training diverged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if classes is None:
            model = Segmenter(labels, list(modalities), image_size=test.pictures.shape[-1], widths=tuple(widths))
        else:
            model = Classifier(test.pictures.shape[1], len(classes), widths)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)

    def answer(images, part):
        return model(images, part.modalities.tolist()) if classes is None else model(images)

    def truth(part):
        if classes is None:
            return part.label_maps.long().to(device)
        return torch.tensor([classes.index(value) for value in part.classes], device=device)

    model.train()
    for _ in range(steps):
        which, where = torch.rand(2, batch_size, generator=generator)
        pools = [(real, which >= share), (synthetic, which < share)]
        batch = join([pool.take((where[k] * len(pool)).long().numpy()) for pool, k in pools if k.any()])
        images, wanted = batch.pictures.to(device).float() / 255, truth(batch)
        if classes is None:
            images[::2], wanted[::2] = images[::2].flip(-1), wanted[::2].flip(-1)
        logits = answer(images, batch)
        loss = F.cross_entropy(logits, wanted) + (dice_loss(logits, wanted) if classes is None else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not loss.isfinite():
        return np.full(len(test), np.nan)

    model.eval()
    scores = []
    with torch.no_grad():
        for start in range(0, len(test), 128):
            part = test.take(np.arange(start, min(start + 128, len(test))))
            found = answer(part.pictures.to(device).float() / 255, part).argmax(1)
            if classes is None:
                regions = [value for value in labels.values() if value]
                scores.append(dice(found, truth(part), regions).nan_to_num(nan=1.0).mean(1).cpu())
            else:
                scores.append((found == truth(part)).double().cpu())
    return torch.cat(scores).double().numpy()


# Statistics.


def crossed_interval(table: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    r"""
    Interval and p-value of a mean over cases and seeds when both are random: every training scores every case, as
    every reader reads every case in a reader study, so the trainings are treated as its readers. With the mean squares
    of a two-way table without replication,

    `$\widehat{\mathrm{Var}}(\bar d) = \frac{V}{SC},\quad V = MS_S + \max(MS_C - MS_{SC}, 0),\quad
    \mathrm{df} = \frac{V^2}{MS_S^2/(S-1)}$`

    Reference: S. Hillis, A comparison of denominator degrees of freedom methods for multiple observer ROC analysis,
    Statistics in Medicine 26 (2007), https://doi.org/10.1002/sim.2532; the table of differences of two arms gives its
    test of two modalities. Where cases do not differ, it is Student's t over seeds.

    Args:
        table (`np.ndarray` of shape `(S, C)`):
            Finite figures of at least two seeds and two cases.
        level (`float`, *optional*, defaults to 0.95):
            Probability of the interval.

    Returns:
        `tuple[float, float, float]`: the ends of the interval, and the two-sided p-value of a mean of 0.

    Raises:
        `ValueError`: for a table with fewer than two seeds or cases.

    Example:

    ```python
    >>> low, high, p = crossed_interval(after - before)  # of the same seeds and cases
    ```
    """
    table = np.asarray(table, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"`table` is of shape {table.shape}; expected (seeds, cases), at least two of each.")
    seeds, cases = table.shape
    mean, of_seed, of_case = table.mean(), table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    ms_seed, ms_case = cases * of_seed.var(ddof=1), seeds * of_case.var(ddof=1)
    ms_both = ((table - of_seed - of_case + mean) ** 2).sum() / ((seeds - 1) * (cases - 1))
    v = ms_seed + max(ms_case - ms_both, 0.0)
    if v == 0:  # all alike
        return float(mean), float(mean), float(mean == 0)
    error = math.sqrt(v / table.size)
    degrees = v**2 / (ms_seed**2 / (seeds - 1)) if ms_seed else np.inf
    half = stats.t.ppf((1 + level) / 2, degrees) * error
    return float(mean - half), float(mean + half), float(2 * stats.t.sf(abs(mean) / error, degrees))


def wilcoxon_p(differences: np.ndarray) -> float:
    """
    Two-sided p-value of the signed-rank test (Wilcoxon 1945, Biometrics Bulletin 1(6)) of one difference a case; 1
    where all are 0.
    """
    return float(stats.wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def case_table(scores: np.ndarray, case_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean score of each seed on each case `(S, C)`, over the `rows` `(N,)` of `scores` `(S, N)`; a case without any
    of those rows is NaN."""
    cases, case = np.unique(case_ids, return_inverse=True)
    weights = np.zeros((len(case_ids), len(cases)))
    weights[np.arange(len(case_ids)), case] = rows
    counts = weights.sum(0)
    return np.divide(scores @ weights, counts, out=np.full((len(scores), len(cases)), np.nan), where=counts > 0)


def gap_of_means(tables: list[np.ndarray], seed_weights: np.ndarray, case_weights: np.ndarray) -> np.ndarray:
    """Largest minus smallest subgroup mean, for weights `(R, S)` of the seeds and `(R, C)` of the cases; NaN where
    fewer than two subgroups are left."""
    means = []
    for table in tables:
        there = np.isfinite(table).all(0)
        total = seed_weights.sum(1) * case_weights[:, there].sum(1)
        sums = ((seed_weights @ table[:, there]) * case_weights[:, there]).sum(1)
        means.append(np.divide(sums, total, out=np.full(len(sums), np.nan), where=total > 0))
    means = np.stack(means)
    enough = np.isfinite(means).sum(0) > 1
    low, high = np.where(np.isfinite(means), means, np.inf), np.where(np.isfinite(means), means, -np.inf)
    return np.where(enough, high.max(0) - low.min(0), np.nan)


def measured_gap(
    tables: list[np.ndarray], baseline: list[np.ndarray] | None = None, resamples: int = 2000, seed: int = 0
) -> Measured:
    """
    The gap between the best and the worst subgroup, or its change from a baseline, with an interval that resamples
    seeds and cases (A. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007),
    https://doi.org/10.1214/07-AOAS122). Which subgroups are best and worst is found anew in each resample. The gap of
    small subgroups is too large by chance, and that of a resample more so, so that a small gap may lie below its own
    interval; in a change most of this cancels.

    Args:
        tables, baseline (`list[np.ndarray]` of shape `(S, C)`):
            One [`case_table`] a subgroup, of the arm and, *optional*, of the baseline.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the bootstrap.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        [`Measured`]: `n` is the number of cases.
    """
    seeds, cases = tables[0].shape
    rng = np.random.default_rng(seed)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(float)
    by_case = rng.multinomial(cases, np.full(cases, 1 / cases), size=resamples).astype(float)

    def gap(*weights):
        return gap_of_means(tables, *weights) - (gap_of_means(baseline, *weights) if baseline else 0)

    value = gap(np.ones((1, seeds)), np.ones((1, cases)))[0]
    low, high = percentile_interval(gap(by_seed, by_case)) if seeds > 1 else (np.nan, np.nan)
    note = "" if baseline else "larger by chance the smaller the subgroups, and more so in its interval"
    return Measured(float(value), low, high, cases, 0, note if seeds > 1 else "no interval: a single training")


# The protocol.


@dataclasses.dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        fraction (`float`):
            Fraction of the real training cases.
        source (`str`):
            Name of the synthetic data; empty for real only.
        share (`float` or `str`):
            Probability that a picture of a batch is synthetic: 0 for real only, 1 for synthetic only; `"pooled"`: as
            many as the synthetic rows make up of all.
    """

    fraction: float
    source: str = ""
    share: float | str = 0.0

    def __str__(self) -> str:
        if not self.source:
            return f"real, {self.fraction:g}"
        if self.share == 1:
            return f"{self.source} only, {self.fraction:g}"
        return f"real + {self.source} ({self.share if self.share == POOLED else f'{self.share:g}'}), {self.fraction:g}"


@dataclasses.dataclass(frozen=True)
class ArmScore:
    """
    What an arm reached.

    Args:
        arm ([`Arm`]):
            The arm.
        scores (`dict[str, Measured]`):
            Subgroup, and `"all cases"`, to its score: mean over the trainings of each case, then over cases, with a
            bootstrap interval by case. The interval is of these trained models; that of a [`Comparison`] is not.
        gap ([`Measured`], *optional*):
            Best minus worst subgroup.
        gap_change ([`Measured`], *optional*):
            The same, minus that of real only at this fraction.
        real_rows, synthetic_rows (`float`):
            Rows it could draw from, mean over the seeds.
        seeds, failed_seeds (`int`):
            Trainings, and those of them that diverged.
    """

    arm: Arm
    scores: dict[str, Measured]
    gap: Measured | None
    gap_change: Measured | None
    real_rows: float
    synthetic_rows: float
    seeds: int
    failed_seeds: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """
    An arm against real only at the same fraction, in one subgroup.

    Args:
        arm ([`Arm`]):
            The arm with synthetic images.
        group (`str`):
            Subgroup, or `"all cases"`.
        under_represented (`bool`):
            Whether the subgroup is.
        difference ([`Measured`]):
            Score with minus score without, of the same seeds and cases; interval for other trainings and other cases,
            see [`crossed_interval`]. `n` is the number of cases.
        p_crossed (`float`):
            p-value of [`crossed_interval`].
        p_wilcoxon (`float`):
            p-value of the signed-rank test over cases, of the mean over seeds.
        p_value (`float`):
            The larger of the two: a difference must hold for other trainings, and for more than a few cases.
        p_holm (`float`):
            `p_value` corrected for all comparisons of the result.
        verdict (`str`):
            `"helps"`, `"harms"`, `"no difference"` or `"too few"` (cases or trainings to tell).
    """

    arm: Arm
    group: str
    under_represented: bool
    difference: Measured
    p_crossed: float
    p_wilcoxon: float
    p_value: float
    p_holm: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class Downstream:
    """
    The result of [`downstream_utility`].

    Args:
        metric (`str`):
            What the scores are.
        settings (`dict`):
            How it was trained and tested.
        groups (`dict[str, dict[str, int]]`):
            Subgroup -> `train_cases` and `test_cases`.
        under_represented (`list[str]`):
            Subgroups that are, in the training cases.
        comparisons (`list[Comparison]`):
            Under-represented subgroups first, then all cases, then the other subgroups.
        arms (`list[ArmScore]`):
            All arms.
    """

    metric: str
    settings: dict
    groups: dict[str, dict[str, int]]
    under_represented: list[str]
    comparisons: list[Comparison]
    arms: list[ArmScore]

    def to_dict(self) -> dict:
        """All of it as plain JSON values, `None` where a figure is not defined."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | os.PathLike) -> None:
        """Writes [`~Downstream.to_dict`] as JSON."""
        write_json(path, self.to_dict())


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_arms(
    scores: dict[Arm, np.ndarray],
    case_ids: np.ndarray,
    groups: np.ndarray,
    under_represented: Sequence[str] = (),
    alpha: float = 0.05,
) -> list[Comparison]:
    """
    Compares each arm with real only at the same fraction, on all cases and in every subgroup.

    Args:
        scores (`dict[Arm, np.ndarray]`):
            Arm to scores of shape `(seeds, N)`: the same seeds and pictures in the same order in all arms. Seeds with
            a NaN (a training that diverged) are left out of both sides, and counted in the note.
        case_ids (`np.ndarray` of shape `(N,)`):
            Case of each picture; a case counts once, whatever the number of its pictures.
        groups (`np.ndarray` of shape `(N,)`):
            Subgroup of each picture; empty texts for none.
        under_represented (`Sequence[str]`, *optional*):
            Subgroups to list first.
        alpha (`float`, *optional*, defaults to 0.05):
            Probability of any wrong verdict in the whole result.

    Returns:
        `list[Comparison]`

    Raises:
        `ValueError`: when an arm has no real-only arm at its fraction to be compared with.

    Example:

    ```python
    >>> compare_arms({Arm(0.1): real, Arm(0.1, "synthetic", 0.5): mixed}, case_ids, groups)
    ```
    """
    names = sorted(set(groups.tolist()) - {""})
    order = [*[name for name in names if name in under_represented], ALL]
    order += [name for name in names if name not in order]
    found = []
    for group in order:
        rows = np.ones(len(case_ids), bool) if group == ALL else groups == group
        for arm in [arm for arm in scores if arm.source]:
            if Arm(arm.fraction) not in scores:
                raise ValueError(f"`scores` has {arm} but not {Arm(arm.fraction)}, which it is compared with; add it.")
            table = case_table(scores[arm] - scores[Arm(arm.fraction)], case_ids, rows)
            table = table[:, np.isfinite(table).any(0)] if np.isfinite(table).any() else table[:, :0]
            failed = ~np.isfinite(table).all(1)
            difference = table[~failed]
            seeds, cases = difference.shape
            note = f"{failed.sum()} of {len(table)} pairs of trainings failed" if failed.any() else ""
            if seeds > 1 and cases >= FEWEST_CASES:
                low, high, crossed = crossed_interval(difference)
                p = crossed, wilcoxon_p(difference.mean(0))
            else:
                low, high, p = np.nan, np.nan, (np.nan, np.nan)
                note = "; ".join(filter(None, [note, f"not tested: {cases} case(s), {seeds} training(s)"]))
            value = float(difference.mean()) if difference.size else np.nan
            measured = Measured(value, low, high, cases, 0, note)
            found.append([arm, group, group in under_represented, measured, *p, float(max(p))])
    p_values = np.array([comparison[-1] for comparison in found])
    tested, corrected = np.isfinite(p_values), np.full(len(found), np.nan)
    corrected[tested] = holm(p_values[tested])
    comparisons = []
    for comparison, p in zip(found, corrected, strict=True):
        if not np.isfinite(p):
            verdict = "too few"
        elif p >= alpha:
            verdict = "no difference"
        else:
            verdict = "helps" if comparison[3].value > 0 else "harms"
        comparisons.append(Comparison(*comparison, float(p), verdict))
    return comparisons


def _score_arms(scores, case_ids, groups, rows_drawn) -> list[ArmScore]:
    cases = np.unique(case_ids)
    everything = np.ones(len(case_ids), bool)
    names = sorted(set(groups.tolist()) - {""})
    # A gap of subgroups with a handful of cases is a gap of chance.
    large = [name for name in names if len(set(case_ids[groups == name])) >= FEWEST_CASES]
    ok = {arm: np.isfinite(table).all(1) for arm, table in scores.items()}

    def tables(arm, seeds):
        return [case_table(scores[arm][seeds], case_ids, groups == name) for name in large]

    found = []
    for arm, table in scores.items():
        trained, real = table[ok[arm]], Arm(arm.fraction)
        measured, gap, change = {}, None, None
        for name in [ALL, *names]:
            rows = everything if name == ALL else groups == name
            there = np.isin(cases, case_ids[rows])
            of_case = case_table(trained, case_ids, rows).mean(0) if len(trained) else np.full(len(cases), np.nan)
            measured[name] = measured_mean(of_case, cases, there)
        if len(large) > 1 and len(trained):
            gap = measured_gap(tables(arm, ok[arm]))
            both = ok[arm] & ok[real]
            change = measured_gap(tables(arm, both), tables(real, both)) if arm.source and both.any() else None
        real_rows, synthetic = np.mean(rows_drawn[arm], axis=0).tolist()
        found.append(ArmScore(arm, measured, gap, change, real_rows, synthetic, len(table), int((~ok[arm]).sum())))
    return found


class _Runs:
    """Scores of finished trainings, in a file that is always whole, so that a run that was cut off goes on."""

    def __init__(self, path: str | os.PathLike | None, fingerprint: str):
        self.path = None if path is None else Path(path)
        self.fingerprint, self.finished = fingerprint, {}
        if self.path is not None and self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored.get("fingerprint") != fingerprint:
                raise ValueError(
                    f"`runs` is {str(path)!r}, which holds trainings on other data or with other settings; name "
                    "another file, or delete it."
                )
            self.finished = stored["finished"]

    def add(self, key: str, scores: np.ndarray, rows: tuple[int, int]) -> None:
        self.finished[key] = {"scores": _plain(scores.tolist()), "rows": list(rows)}
        if self.path is not None:
            with whole_file(self.path) as partial:
                text = json.dumps({"fingerprint": self.fingerprint, "finished": self.finished})
                partial.write_text(text, encoding="utf-8")


def _name(value) -> str:
    return getattr(value, "__name__", str(value))


def _check_settings(fractions, shares, seeds, steps, batch_size, labels, outcome):
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"`fractions` is {fractions!r}; expected fractions of the real cases in (0, 1].")
    if not all(share == POOLED or (not isinstance(share, str) and 0 < share <= 1) for share in shares) or not shares:
        raise ValueError(
            f"`shares` is {shares!r}; expected shares in (0, 1], where 1 is synthetic only, or {POOLED!r}."
        )
    for name, values in (("fractions", fractions), ("shares", shares), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"`{name}` is {values!r}, with the same value twice; name each once.")
    if len(seeds) < 2:
        raise ValueError(f"`seeds` is {seeds!r}; a comparison needs at least two trainings, and better five.")
    if steps < 2 or batch_size < 2:
        raise ValueError(f"`steps` is {steps} and `batch_size` {batch_size}; both must be at least 2.")
    if outcome is None and sorted(labels.values()) != list(range(len(labels))):
        raise ValueError(f"`labels` has the values {sorted(labels.values())}; they must be 0 ... {len(labels) - 1}.")


def downstream_utility(
    train: datasets.Dataset,
    test: datasets.Dataset,
    synthetic: datasets.Dataset | Callable | dict[str, datasets.Dataset | Callable],
    *,
    outcome: str | Callable | None = None,
    labels: dict[str, int] = LABELS,
    subgroup: str | Callable | None = None,
    under_represented: Sequence[str] | None = None,
    fractions: Sequence[float] = (0.1, 0.3, 1.0),
    shares: Sequence[float | str] = (0.25, 0.5, 1.0),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    steps: int = 500,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    widths: Sequence[int] = (16, 32, 64),
    alpha: float = 0.05,
    runs: str | os.PathLike | None = None,
    device: str = "cpu",
) -> Downstream:
    """
    Trains in all arms and compares each with real only.

    A fraction is of the cases, drawn anew with each seed; smaller fractions of a seed are part of its larger ones. An
    arm with synthetic images draws from those rows whose case is in the fraction, and from those whose case is in none
    of the real data.

    Args:
        train, test (`datasets.Dataset`):
            Real rows in the schema of [`onereward.data.schema.FEATURES`], of one size (for a segmenter square, of a
            side that can be halved between its levels), with targets: `target` is the picture that is trained and
            tested on. Without `extend` rows.
        synthetic (`datasets.Dataset`, `Callable`, or `dict` of name to either):
            Synthetic rows, as [`synthetic_rows`] makes them; or a function of the real rows of a fraction and a seed
            that returns such rows. A function knows how rare a subgroup is in the fraction; use it with `balance`.
        outcome (`str` or `Callable`, *optional*):
            What a classifier shall tell from the picture: a column, or a function of a row such as
            [`tumour_present`] or [`largest_region`]. A segmenter of the label maps is trained when not given, on the
            grey picture.
        labels (`dict[str, int]`, *optional*, defaults to the phantom's):
            Name and value of each label, for the segmenter.
        subgroup (`str` or `Callable`, *optional*):
            Column, or function of a row such as [`tumour_size`], that names the subgroup of a picture.
        under_represented (`Sequence[str]`, *optional*):
            Subgroups the question is about. Defaults to those with fewer than half as many training cases as the
            largest one.
        fractions (`Sequence[float]`, *optional*, defaults to `(0.1, 0.3, 1.0)`):
            Fractions of the training cases, in (0, 1].
        shares (`Sequence[float | str]`, *optional*, defaults to `(0.25, 0.5, 1.0)`):
            Probabilities that a picture of a batch is synthetic, in (0, 1]; 1 is synthetic only, and `"pooled"` draws
            from real and synthetic rows alike, as is right for balanced ones.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2, 3, 4)`):
            One training for each in every arm, at least two. More seeds find smaller effects.
        steps (`int`, *optional*, defaults to 500):
            Optimisation steps, the same in all arms.
        batch_size (`int`, *optional*, defaults to 16):
            Pictures a step.
        learning_rate (`float`, *optional*, defaults to 3e-3):
            Peak learning rate.
        widths (`Sequence[int]`, *optional*, defaults to `(16, 32, 64)`):
            Channels of each level of the network, each level at half the resolution of the one before.
        alpha (`float`, *optional*, defaults to 0.05):
            Probability of any wrong verdict in the whole result.
        runs (`str` or `os.PathLike`, *optional*):
            File to keep finished trainings in. A call with the same data and training settings goes on from it, also
            with more seeds, fractions or shares, or with other subgroups. It does not know what a function in
            `synthetic` returns: delete it when that changes.
        device (`str`, *optional*, defaults to `"cpu"`):
            Device to train on.

    Returns:
        [`Downstream`]

    Raises:
        `ValueError`: when real or synthetic rows share a case or a picture with the test rows; when a fraction has no
            synthetic rows of its own cases; when a class or a modality is unknown; when a setting is out of its range;
            when `runs` holds trainings on other data or with other settings.

    Example:

    ```python
    >>> from onereward.evaluation.downstream import downstream_utility, plot_downstream, synthetic_rows, tumour_size

    >>> more = synthetic_rows(pipeline, train, per_row=2)
    >>> result = downstream_utility(train, test, more, subgroup=tumour_size, runs="runs/downstream.json")
    >>> [(str(c.arm), c.group, c.difference, c.verdict) for c in result.comparisons if c.under_represented]
    >>> plot_downstream(result, "downstream.png")
    ```
    """
    fractions, shares, seeds = list(fractions), list(shares), [int(seed) for seed in seeds]
    _check_settings(fractions, shares, seeds, steps, batch_size, labels, outcome)
    sources = synthetic if isinstance(synthetic, dict) else {"synthetic": synthetic}
    if not all(sources) or not sources:
        raise ValueError(f"`synthetic` has the names {list(sources)}; name each of at least one source.")
    real = read_examples(train, "train", outcome, subgroup)
    unseen = read_examples(test, "test", outcome, subgroup)
    made = {k: v if callable(v) else read_examples(v, k, outcome, subgroup) for k, v in sources.items()}
    ready = {name: source for name, source in made.items() if isinstance(source, Examples)}
    classes = None if outcome is None else sorted({*real.classes.tolist(), *unseen.classes.tolist()})
    modalities = sorted({*real.modalities.tolist(), *unseen.modalities.tolist()})
    height, width = unseen.pictures.shape[-2:]
    if classes is None and (height != width or height % 2 ** (len(widths) - 1)):
        raise ValueError(
            f"`test` has pictures of {height} x {width} pixels; a segmenter of {len(widths)} levels needs squares of "
            f"a side that {2 ** (len(widths) - 1)} divides. Resize them, or pass fewer `widths`."
        )
    if ALL in set(unseen.groups):
        raise ValueError(f"`subgroup` names a subgroup {ALL!r}, which stands for all of them here; rename it.")

    def check_labels(examples, name):
        if classes is None and int(examples.label_maps.max()) >= len(labels):
            raise ValueError(
                f"`{name}` has the label {int(examples.label_maps.max())}, but `labels` is {labels}; name it there."
            )

    def check(examples, name):
        if examples.pictures.shape[1:] != unseen.pictures.shape[1:]:
            raise ValueError(
                f"`{name}` has pictures of shape {tuple(examples.pictures.shape[1:])} but `test` of "
                f"{tuple(unseen.pictures.shape[1:])}; bring them to one size and mode."
            )
        check_no_leakage(examples, unseen, name)
        for what, known in (("classes", classes or [""]), ("modalities", modalities)):
            unknown = sorted(set(getattr(examples, what)) - set(known))
            if unknown:
                raise ValueError(f"`{name}` has the {what} {unknown}, which no real row has; those have {known}.")
        check_labels(examples, name)
        return examples

    check_labels(unseen, "test")
    for name, examples in {"train": real, **ready}.items():
        check(examples, name)

    names = sorted({*real.groups.tolist(), *unseen.groups.tolist()} - {""})
    groups = {
        name: {
            "train_cases": len(set(real.case_ids[real.groups == name])),
            "test_cases": len(set(unseen.case_ids[unseen.groups == name])),
        }
        for name in names
    }
    if under_represented is None:
        largest = max([entry["train_cases"] for entry in groups.values()], default=0)
        under_represented = [n for n, entry in groups.items() if entry["train_cases"] < UNDER_REPRESENTED * largest]
    unknown = sorted(set(under_represented) - set(groups))
    if unknown:
        raise ValueError(f"`under_represented` holds {unknown}; the subgroups are {list(groups)}.")

    training = {  # what each single training depends on; more seeds, fractions and shares can be added to a file
        "outcome": "segmentation" if outcome is None else _name(outcome),
        "classes": classes,
        "labels": labels if outcome is None else None,
        "modalities": modalities,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "widths": list(widths),
        "torch": torch.__version__,
    }
    store = _Runs(runs, _fingerprint(training, {"train": real, "test": unseen, **ready}))
    settings = training | {
        "subgroup": None if subgroup is None else _name(subgroup),
        "sources": list(sources),
        "fractions": fractions,
        "shares": shares,
        "seeds": seeds,
        "alpha": alpha,
        "train_cases": len(set(real.case_ids)),
        "train_rows": len(real),
        "test_cases": len(set(unseen.case_ids)),
        "test_rows": len(unseen),
    }

    arms = [
        arm
        for fraction in fractions
        for arm in [Arm(fraction), *(Arm(fraction, name, share) for name in sources for share in shares)]
    ]
    cases = np.unique(real.case_ids)
    order = {seed: np.random.default_rng(seed).permutation(cases) for seed in seeds}

    def chosen_cases(fraction, seed):
        return order[seed][: max(1, round(fraction * len(cases)))]

    def synthetic_part(name, fraction, seed):
        chosen = chosen_cases(fraction, seed)
        if name in ready:
            others = ready[name]
        else:
            rows = train.select(np.flatnonzero(np.isin(real.case_ids, chosen)))
            others = check(read_examples(made[name](rows, seed), name, outcome, subgroup), name)
        mine = np.isin(others.case_ids, chosen) | ~np.isin(others.case_ids, cases)
        if not mine.any():
            raise ValueError(
                f"`{name}` has no rows of the {len(chosen)} case(s) that make up the fraction {fraction} with seed "
                f"{seed}. Make some from more cases, leave the fraction out, or pass a function that makes them from "
                "the rows of the fraction."
            )
        return others.take(np.flatnonzero(mine))

    for name in ready:  # before hours are spent
        for fraction in fractions:
            for seed in seeds:
                synthetic_part(name, fraction, seed)

    with tqdm(total=len(arms) * len(seeds), desc="Downstream", unit="training") as progress:
        for fraction in fractions:
            for seed in seeds:
                mine = real.take(np.flatnonzero(np.isin(real.case_ids, chosen_cases(fraction, seed))))
                parts = {}
                for arm in [arm for arm in arms if arm.fraction == fraction]:
                    key = f"{arm}; seed {seed}"
                    progress.set_postfix_str(key)
                    if key not in store.finished:
                        if arm.source and arm.source not in parts:
                            parts[arm.source] = synthetic_part(arm.source, fraction, seed)
                        part = parts.get(arm.source)
                        share = len(part) / (len(part) + len(mine)) if arm.share == POOLED else arm.share
                        scores = train_and_score(
                            mine,
                            part,
                            share,
                            unseen,
                            classes=classes,
                            labels=labels,
                            modalities=modalities,
                            steps=steps,
                            batch_size=batch_size,
                            learning_rate=learning_rate,
                            widths=widths,
                            seed=seed,
                            device=device,
                        )
                        rows = (0 if arm.share == 1 else len(mine), len(part) if arm.source else 0)
                        store.add(key, scores, rows)
                    progress.update()

    finished = {arm: [store.finished[f"{arm}; seed {seed}"] for seed in seeds] for arm in arms}
    scores = {arm: np.array([run["scores"] for run in of_arm], dtype=float) for arm, of_arm in finished.items()}
    rows = {arm: [run["rows"] for run in of_arm] for arm, of_arm in finished.items()}
    return Downstream(
        metric="mean Dice of the regions" if outcome is None else "accuracy",
        settings=settings,
        groups=groups,
        under_represented=list(under_represented),
        comparisons=compare_arms(scores, unseen.case_ids, unseen.groups, under_represented, alpha),
        arms=_score_arms(scores, unseen.case_ids, unseen.groups, rows),
    )


def _fingerprint(training: dict, parts: dict[str, Examples]) -> str:
    digest = hashlib.sha256(json.dumps(training, sort_keys=True).encode())
    for name, examples in parts.items():
        digest.update(name.encode() + examples.pictures.numpy().tobytes() + examples.label_maps.numpy().tobytes())
        for column in (examples.modalities, examples.case_ids, examples.classes):
            digest.update("\n".join(column).encode())
    return digest.hexdigest()


def plot_downstream(result: Downstream, path: str | os.PathLike) -> None:
    """
    Draws every comparison with its interval, under-represented subgroups first, and every arm's score by the fraction
    of real cases.

    Args:
        result ([`Downstream`]):
            The result.
        path (`str` or `os.PathLike`):
            PNG file to write.

    Example:

    ```python
    >>> plot_downstream(result, "downstream.png")
    ```
    """
    rows = result.comparisons
    figure = Figure(figsize=(13, max(4.0, 1.6 + 0.26 * len(rows))), dpi=110, facecolor=PAPER, layout="constrained")
    effects, curves = figure.subplots(1, 2, width_ratios=(1.6, 1))
    colours = {"helps": COLOURS[1], "harms": COLOURS[0]}
    for y, comparison in enumerate(rows):
        measured, colour = comparison.difference, colours.get(comparison.verdict, MUTED)
        effects.plot([measured.low, measured.high], [y, y], color=colour, linewidth=2)
        effects.plot(measured.value, y, "o", color=colour, markersize=5)
    texts = [f"{c.group}{' (rare)' if c.under_represented else ''}: {c.arm}" for c in rows]
    effects.set_yticks(range(len(rows)), texts, fontsize=8)
    effects.set_ylim(len(rows) - 0.5, -0.5)
    effects.axvline(0, color=INK, linewidth=0.8)
    effects.set_title(f"Change of {result.metric} from real only", loc="left", fontsize=11, weight="bold")
    effects.set_xlabel("green helps, red harms, grey no difference or too few", color=MUTED, fontsize=9)

    lines = {}
    for score in result.arms:
        name = str(score.arm).rsplit(", ", 1)[0]
        lines.setdefault(name, []).append((score.arm.fraction, score.scores[ALL]))
    styles = [INK, COLOURS[4], COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[5]]
    for i, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point[0])
        x, y = [x for x, _ in points], [measured.value for _, measured in points]
        curves.plot(x, y, "o-", color=styles[i % len(styles)], label=name, linewidth=1.6, markersize=4)
        low, high = [m.low for _, m in points], [m.high for _, m in points]
        curves.fill_between(x, low, high, color=styles[i % len(styles)], alpha=0.1, linewidth=0)
    curves.set_title(f"{result.metric}, {ALL}", loc="left", fontsize=11, weight="bold")
    curves.set_xlabel("fraction of the real cases", color=MUTED)
    curves.legend(frameon=False, fontsize=8)
    for axes in (effects, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED)
        axes.grid(axis="x" if axes is effects else "y", color="#e6e6e6")
        axes.set_axisbelow(True)
    figure.supxlabel(NOTICE, fontsize=8, color=MUTED, x=0.995, ha="right")
    with whole_file(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
