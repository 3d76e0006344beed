"""Candidates to vote on: samples of a pipeline, and spoilt ones, several for each condition."""

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from onereward.data.schema import FEATURES
from onereward.preferences.degradations import DEGRADATIONS
from onereward.preferences.schema import content_id, to_png


# The row a candidate was made for, and: the row's identity, the picture, what made it, and the seed of its chance.
CANDIDATE_FEATURES = datasets.Features(
    {
        **FEATURES,
        "condition": datasets.Value("string"),
        "candidate": datasets.Image(),
        "model": datasets.Value("string"),
        "seed": datasets.Value("int64"),
    }
)


def make_candidates(
    pipeline,
    rows: datasets.Dataset,
    num_candidates: int = 4,
    num_degraded: int = 4,
    *,
    num_inference_steps: tuple[int, int] = (3, 12),
    guidance_scale: tuple[float, float] = (1.0, 4.0),
    seed: int = 0,
    batch_size: int = 64,
    model: str = "base",
    **pipeline_kwargs,
) -> datasets.Dataset:
    """
    Make candidates for every row: samples with varied steps, guidance and seed, as in OneReward
    (https://huggingface.co/papers/2508.21066, section 3.2), and samples or targets spoilt inside the mask.

    Each batch of samples draws its number of steps (log-uniform) and its guidance (off for every second batch, else
    uniform); rows are dealt to batches anew in each round. A spoilt candidate comes from one of the row's samples or,
    one time in three and where it is known, from the target; one degradation is applied, every fourth time two.

    Args:
        pipeline ([`OneRewardMaskPipeline`]):
            What is to be judged.
        rows (`datasets.Dataset`):
            Conditions, in the row schema.
        num_candidates (`int`, *optional*, defaults to 4):
            Samples per row, at least 1.
        num_degraded (`int`, *optional*, defaults to 4):
            Spoilt candidates per row.
        num_inference_steps (`tuple[int, int]`, *optional*, defaults to `(3, 12)`):
            Fewest and most steps.
        guidance_scale (`tuple[float, float]`, *optional*, defaults to `(1.0, 4.0)`):
            Least and most guidance.
        seed (`int`, *optional*, defaults to 0):
            Seed of everything.
        batch_size (`int`, *optional*, defaults to 64):
            Samples drawn at once.
        model (`str`, *optional*, defaults to `"base"`):
            What votes call the pipeline. Spoilt candidates are called `"base+blur"`, `"target+seam"` and so on.
        pipeline_kwargs (*optional*):
            Passed on to the pipeline, e.g. `height` and `width` for sources larger than it was trained at.

    Returns:
        `datasets.Dataset`: rows of `CANDIDATE_FEATURES`, the samples of a row before its spoilt ones. Outside the mask
        all are equal to the source bit for bit.

    Raises:
        `ValueError`: when there are no rows, or a number is out of its range.
    """
    if len(rows) == 0:
        raise ValueError("`rows` is empty; expected at least one condition.")
    if num_candidates < 1 or num_degraded < 0:
        raise ValueError(
            f"`num_candidates` and `num_degraded` are {num_candidates} and {num_degraded}; expected at least 1 and 0."
        )
    rows = list(rows)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    kinds = [(row["task"], row["image"].size) for row in rows]
    batches = []
    for number in range(num_candidates):
        order = rng.permutation(len(rows))
        for kind in sorted(set(kinds)):
            members = [int(index) for index in order if kinds[index] == kind]
            batches += [(number, members[start : start + batch_size]) for start in range(0, len(members), batch_size)]

    samples = [[None] * num_candidates for _ in rows]
    settings = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        with tqdm(total=len(rows) * num_candidates, desc="Sampling candidates", unit="image") as progress:
            for number, members in batches:
                least, most = guidance_scale
                guidance = least if rng.random() < 0.5 else rng.uniform(least, most)
                steps = round(np.exp(rng.uniform(*np.log(num_inference_steps))))
                seeds = [_spawn_seed(seed, index, number) for index in members]
                pictures = _sample(pipeline, [rows[i] for i in members], seeds, steps, guidance, pipeline_kwargs)
                for index, picture, own_seed in zip(members, pictures, seeds, strict=True):
                    samples[index][number] = (np.asarray(picture), model, own_seed)
                progress.update(len(members))
    finally:
        pipeline.set_progress_bar_config(**{"disable": False, **settings})

    table = {column: [] for column in CANDIDATE_FEATURES}
    for index, row in enumerate(tqdm(rows, desc="Spoiling candidates", unit="condition")):
        condition = {
            column: row[column] if isinstance(row[column], str) or row[column] is None else to_png(row[column])
            for column in FEATURES
        }
        pictures = [condition[column]["bytes"] for column in ("image", "mask", "label_map")]
        identity = content_id(row["case_id"], row["task"], row["prompt"], *pictures)
        spoilt = [
            spoil(row, samples[index], _spawn_seed(seed, index, num_candidates + number))
            for number in range(num_degraded)
        ]
        for picture, maker, own_seed in samples[index] + spoilt:
            candidate = {"condition": identity, "candidate": to_png(picture), "model": maker, "seed": own_seed}
            for column, value in {**condition, **candidate}.items():
                table[column].append(value)
    return datasets.Dataset.from_dict(table, features=CANDIDATE_FEATURES)


def _spawn_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _sample(pipeline, rows, seeds, steps, guidance, pipeline_kwargs):
    return pipeline(
        prompt=None if pipeline.text_encoder is None else [row["prompt"] for row in rows],
        image=[row["image"] for row in rows],
        mask_image=[row["mask"] for row in rows],
        label_map=[row["label_map"] for row in rows] if pipeline.has_label_channels else None,
        task=rows[0]["task"],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **pipeline_kwargs,
    ).images


def spoil(row: dict, samples: list[tuple[np.ndarray, str, int]], seed: int) -> tuple[np.ndarray, str, int]:
    """
    Spoil one of the samples of a row or, one time in three and where it is known, its target.

    Args:
        row (`dict`):
            The condition, pictures decoded.
        samples (`list[tuple[np.ndarray, str, int]]`):
            Pictures, names of what made them, and seeds.
        seed (`int`):
            Seed of what is chosen and done.

    Returns:
        `tuple[np.ndarray, str, int]`: picture (`uint8`, the source outside the mask), name of what made it, seed.
    """
    rng = np.random.default_rng(seed)
    mask, label_map = np.asarray(row["mask"]) > 0, np.asarray(row["label_map"])
    picture, maker, _ = samples[rng.integers(len(samples))]
    if row["target"] is not None and rng.random() < 1 / 3:
        source, target = np.asarray(row["image"]), np.asarray(row["target"])
        picture, maker = np.where(mask if source.ndim == 2 else mask[..., None], target, source), "target"
    image = picture / 255
    for name in rng.choice(list(DEGRADATIONS), size=2 if rng.random() < 0.25 else 1, replace=False):
        image = DEGRADATIONS[name](image, mask, label_map, rng, rng.uniform(0.05, 1))
        maker = f"{maker}+{name}"
    return np.round(image * 255).astype(np.uint8), maker, seed
