"""The row schema of every data set in the project, its checks, and the way from rows to tensors."""

import datasets
import numpy as np
import torch

from onereward.data.masks import check_label_map, check_mask


TASKS = ("fill", "remove", "extend")

# The phantom's labels, with the values of BraTS 2023: necrotic and non-enhancing core, oedema, enhancing tumour.
LABELS = {"background": 0, "NCR": 1, "ED": 2, "ET": 3}

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label_map": datasets.Image(),
        "target": datasets.Image(),
        "prompt": datasets.Value("string"),
        "task": datasets.Value("string"),
        "modality": datasets.Value("string"),
        "case_id": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
)


def validate_row(row: dict, labels: dict[str, int] | None = None) -> None:
    """
    Check one decoded row against the schema.

    Args:
        row (`dict`):
            A row with the columns of `FEATURES`, pictures decoded to `PIL.Image.Image`.
        labels (`dict[str, int]`, *optional*):
            The labels there are, name to value. Any 8-bit value goes when not given.

    Raises:
        `ValueError`: naming the column, what it holds, what is wanted and how to mend it.
    """
    missing = [column for column in FEATURES if column not in row]
    if missing:
        raise ValueError(f"The row lacks the column(s) {missing}; expected {list(FEATURES)}.")
    for column in ("prompt", "task", "modality", "case_id", "source"):
        if not isinstance(row[column], str):
            raise ValueError(f"`{column}` is {row[column]!r} of type {type(row[column]).__name__}; expected text.")
    if row["task"] not in TASKS:
        raise ValueError(f"`task` is {row['task']!r}; expected one of {TASKS}.")
    for column in ("image", "target"):
        picture = row[column]
        if picture is None and column == "target":
            continue
        if getattr(picture, "mode", None) not in ("L", "RGB"):
            raise ValueError(
                f"`{column}` has mode {getattr(picture, 'mode', type(picture).__name__)!r}; expected an 8-bit grey "
                "('L') or colour ('RGB') picture. Convert it with `picture.convert('L')`."
            )
        if picture.size != row["image"].size or picture.mode != row["image"].mode:
            raise ValueError(
                f"`{column}` is {picture.mode} {picture.size} but `image` is {row['image'].mode} "
                f"{row['image'].size}; both must agree in mode and size."
            )
    mask = check_mask(np.asarray(row["mask"]), size=row["image"].size[::-1])
    check_label_map(np.asarray(row["label_map"]), mask, labels)


def rows_to_tensors(rows: list[dict]) -> dict:
    """
    Stack decoded rows into tensors.

    Args:
        rows (`list[dict]`):
            B rows of the schema with pictures decoded to `PIL.Image.Image`, all of one size and mode.

    Returns:
        `dict`: `images` of shape `(B, C, H, W)`, float32 in [0, 1]; `masks` of shape `(B, 1, H, W)`, float32, 1 =
        repaint; `label_maps` of shape `(B, 1, H, W)`, int64; `targets` like `images`, or `None` where any row has no
        target; `prompts` and `tasks`, lists of B strings.

    Raises:
        `ValueError`: when there are no rows, or they differ in size or mode.
    """
    if not rows:
        raise ValueError("`rows` is empty; expected at least one row.")
    kinds = {(row["image"].mode, row["image"].size) for row in rows}
    if len(kinds) > 1:
        raise ValueError(
            f"`rows` mix pictures of (mode, size) {sorted(kinds)}; bring them to one size and mode first."
        )

    def stack(column):
        arrays = np.stack([np.asarray(row[column]) for row in rows])
        return torch.from_numpy(arrays[:, None] if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2).copy())

    return {
        "images": stack("image").float() / 255,
        "masks": (stack("mask") > 0).float(),
        "label_maps": stack("label_map").long(),
        "targets": None if any(row["target"] is None for row in rows) else stack("target").float() / 255,
        "prompts": [row["prompt"] for row in rows],
        "tasks": [row["task"] for row in rows],
    }


def split_by_case(dataset: datasets.Dataset, fractions: dict[str, float], seed: int = 0) -> datasets.DatasetDict:
    """
    Split a data set so that all rows of one case fall into one part.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a `case_id` column.
        fractions (`dict[str, float]`):
            Part name to share of the cases, summing to 1.
        seed (`int`, *optional*, defaults to 0):
            Seed of the shuffle of the cases.

    Returns:
        `datasets.DatasetDict`: one data set a part, rows in their old order.

    Raises:
        `ValueError`: when the fractions do not sum to 1, or a part would get no case.

    Example:

    ```python
    >>> parts = split_by_case(dataset, {"train": 0.8, "test": 0.2}, seed=0)
    ```
    """
    if any(fraction <= 0 for fraction in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"`fractions` is {fractions}; expected positive shares that sum to 1.")
    case_ids = np.array(dataset["case_id"])
    # Sorted before the shuffle, so that the order of the rows does not decide who goes where.
    cases = np.random.default_rng(seed).permutation(np.unique(case_ids))
    ends = np.round(np.cumsum(list(fractions.values())) * len(cases)).astype(int)
    starts = [0, *ends[:-1]]
    if any(start == end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(
            f"{len(cases)} case(s) are too few for the parts {fractions}; bring more, or ask fewer parts."
        )
    return datasets.DatasetDict(
        {
            name: dataset.select(np.flatnonzero(np.isin(case_ids, cases[start:end])))
            for name, start, end in zip(fractions, starts, ends, strict=True)
        }
    )
