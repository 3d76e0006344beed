"""Rows by name, for scripts and the command line."""

import os
import re

import datasets
import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from tqdm.auto import tqdm

from onereward.data.phantom import load_phantom
from onereward.data.schema import FEATURES, split_by_case


COMMIT = re.compile(r"[0-9a-f]{40}")


def load_rows(
    name: str,
    split: str,
    *,
    revision: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
    hold_out: float = 0.0,
    **phantom,
) -> datasets.Dataset:
    r"""
    Loads one split of row-schema data.

    Args:
        name (`str`):
            `"phantom"`, a folder or Parquet file that `onereward data` wrote, or the id of a data set on the Hub.
        split (`str`):
            `"train"`, `"validation"` or `"test"`.
        revision (`str`, *optional*):
            Revision on the Hub: branch, tag or commit.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read `max_rows` rows of a data set on the Hub without downloading the others. Blocks of rows
            (row groups of Parquet files) are read in random order, until there are twice as many rows as wanted to
            choose from; neighbours in a file are thus chosen together.
        max_rows (`int`, *optional*):
            Number of rows, at random. All when not given.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice of rows.
        hold_out (`float`, *optional*, defaults to 0.0):
            Where there is no split `"validation"`, the share of the cases of `"train"`, one at least, that make it.
            To be given for both. Not for what is streamed, nor for the phantom, which has all splits.
        **phantom:
            Arguments of [`load_phantom`], such as `num_cases`; used for the phantom only. Its seed is `seed`.

    Returns:
        `datasets.Dataset`: rows with the columns of `FEATURES`. Streamed rows too, in memory: trainers read rows more
        than once.

    Raises:
        `ValueError`: if there is no such split, a column is missing, or rows are to be streamed that cannot be.
        `ConnectionError`: if the Hub does not answer and the cache holds another revision than the wanted one.

    Example:

    ```python
    >>> from onereward.data.load import load_rows

    >>> rows = load_rows("phantom", "train", num_cases=2, max_rows=8)
    ```
    """
    on_hub = name != "phantom" and not os.path.exists(name)
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"`max_rows` is {max_rows}, but at least 1 is wanted; leave it out for all rows.")
    if streaming and not on_hub:
        raise ValueError(f"`streaming` is for data sets on the Hub, but `name` is {name!r}. Leave `streaming` out.")
    if streaming and max_rows is None:
        raise ValueError("`streaming` without `max_rows` would read all rows: say how many, or leave `streaming` out.")
    if revision is not None and not on_hub:
        raise ValueError(f"`revision` is {revision!r}, but {name!r} is not on the Hub. Leave `revision` out.")

    if name == "phantom":
        rows = load_phantom(split=split, seed=seed, **phantom)
    elif streaming:
        rows = _stream(name, split, revision, max_rows, seed)
    else:
        if os.path.isdir(name):
            parts = datasets.load_from_disk(name)
        elif os.path.isfile(name):
            parts = datasets.Dataset.from_parquet(name)
        else:
            parts = load_from_hub(name, revision)
        if isinstance(parts, datasets.Dataset):
            parts = datasets.DatasetDict(train=parts)
        if hold_out > 0 and "validation" not in parts and "train" in parts:
            share = max(hold_out, 1 / len(set(parts["train"]["case_id"])))
            parts |= split_by_case(parts["train"], {"train": 1 - share, "validation": share})
        _check_split(name, split, parts)
        rows = parts[split]
        _check_columns(name, rows.column_names)
    if max_rows is not None and len(rows) > max_rows:
        rows = rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), max_rows, replace=False)))
    return rows


def _stream(name, split, revision, max_rows, seed):
    # the commit that stands there now, so that all of the rows are of one version and it is known which
    commit = HfApi().dataset_info(name, revision=revision).sha
    # blocks of 64 KiB: by default each read of a file goes 5 MiB further than asked
    small_reads = {"hf": {"block_size": 2**16}}
    parts = datasets.load_dataset(name, revision=commit, streaming=True, storage_options=small_reads)
    _check_split(name, split, parts)
    _check_columns(name, (parts[split].features or FEATURES).keys())
    # one row group at a time, drawn from all of them
    stream = parts[split].reshard().shuffle(seed=seed, buffer_size=max_rows, max_buffer_input_shards=1).take(max_rows)
    columns = {column: datasets.Image(decode=False) for column, kind in FEATURES.items() if kind == datasets.Image()}
    for column, feature in columns.items():  # pictures stay the files that they are
        stream = stream.cast_column(column, feature)
    rows = list(tqdm(stream, desc=f"Streaming {name}", total=max_rows, unit=" rows", delay=2))
    _check_columns(name, rows[0] if rows else FEATURES)
    rows = [{column: row[column] for column in FEATURES} for row in rows]
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    dataset.info.download_checksums = {f"hf://datasets/{name}@{commit}": {"num_bytes": None, "checksum": None}}
    return dataset


def _check_split(name, split, parts):
    if split not in parts:
        raise ValueError(f"`{name}` has no split {split!r}, only {list(parts)}. Name another data set, or add it.")


def _check_columns(name, columns):
    missing = [column for column in FEATURES if column not in columns]
    if missing:
        raise ValueError(f"`{name}` lacks the columns {missing}. Bring it into the schema with `onereward data`.")


def load_from_hub(
    name: str, revision: str | None = None, split: str | None = None
) -> datasets.Dataset | datasets.DatasetDict:
    """
    `datasets.load_dataset` of a data set on the Hub, sure to be of the wanted revision: when the Hub does not answer,
    `datasets` takes the newest version in its cache, whichever was asked for.

    Args:
        name (`str`):
            Id of the data set.
        revision (`str`, *optional*):
            Branch, tag or commit.
        split (`str`, *optional*):
            Split to load; all of them when not given.

    Returns:
        `datasets.Dataset` or `datasets.DatasetDict`.

    Raises:
        `ConnectionError`: when the Hub does not answer and the cache holds another revision than `revision`.
    """
    loaded = datasets.load_dataset(name, split=split, revision=revision)
    commit = hub_commit(loaded if split else next(iter(loaded.values())))
    if revision is not None and commit != cached_commit(name, revision, "dataset"):
        raise ConnectionError(
            f"The Hub does not answer, and of {name!r} the cache gives {commit}, which is not the revision "
            f"{revision!r}. Load that revision once while online, or leave `revision` out."
        )
    return loaded


def hub_commit(dataset: datasets.Dataset) -> str | None:
    """
    The commit on the Hub that rows really come from, known offline too.

    Args:
        dataset (`datasets.Dataset`):
            Rows as `datasets.load_dataset` or [`load_rows`] gave them, or chosen from these.

    Returns:
        `str` or `None`: the full hash, or `None` for rows that do not come from the Hub.
    """
    for file in dataset.cache_files:  # .../org___name/default/0.0.0/<commit>/name-train.arrow
        folder = os.path.basename(os.path.dirname(file["filename"]))
        if COMMIT.fullmatch(folder):
            return folder
    for url in dataset.info.download_checksums or ():
        if found := re.search(r"@([0-9a-f]{40})(/|$)", url):
            return found[1]
    return None


def cached_commit(name: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """
    The commit that a revision stood for when something of it was last loaded, from the cache of `huggingface_hub`.

    Args:
        name (`str`):
            Id of the repository.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.

    Returns:
        `str` or `None`: the full hash, or `None` when nothing of that revision was loaded here.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    reference = os.path.join(
        HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type), "refs", revision or "main"
    )
    if not os.path.isfile(reference):
        return None
    with open(reference, encoding="utf-8") as file:
        return file.read().strip()
