"""Rows by name, for scripts and the command line."""

import os

import datasets

from onereward.data.phantom import load_phantom
from onereward.data.schema import FEATURES


def load_rows(name: str, split: str, *, revision: str | None = None, **phantom) -> datasets.Dataset:
    r"""
    Loads one split of row-schema data.

    Args:
        name (`str`):
            `"phantom"`, a folder or Parquet file that `onereward data` wrote, or the id of a data set on the Hub.
        split (`str`):
            `"train"`, `"validation"` or `"test"`.
        revision (`str`, *optional*):
            Revision on the Hub.
        **phantom:
            Arguments of [`load_phantom`], such as `num_cases`; used for the phantom only.

    Returns:
        `datasets.Dataset`: rows with the columns of `FEATURES`.

    Raises:
        `ValueError`: if there is no such split or a column is missing.
    """
    if name == "phantom":
        return load_phantom(split=split, **phantom)
    if os.path.isdir(name):
        parts = datasets.load_from_disk(name)
    elif os.path.isfile(name):
        parts = datasets.Dataset.from_parquet(name)
    else:
        parts = datasets.load_dataset(name, revision=revision)
    if isinstance(parts, datasets.Dataset):
        parts = datasets.DatasetDict(train=parts)
    if split not in parts:
        raise ValueError(f"`{name}` has no split {split!r}, only {list(parts)}. Write it with `onereward data`.")
    missing = [column for column in FEATURES if column not in parts[split].column_names]
    if missing:
        raise ValueError(f"`{name}` lacks the columns {missing}. Bring it into the schema with `onereward data`.")
    return parts[split]
