"""One row a vote: what it holds, what is wrong with a row, and the file it is kept in."""

import io
import os
from hashlib import sha256

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from PIL import Image

from onereward.data.masks import check_label_map, check_mask
from onereward.data.schema import TASKS
from onereward.data.whole_file import whole_file


CRITERIA = ("quality", "realism", "clinical_relevance")
VOTE_SCHEMA_VERSION = 1

# A vote is one rater's answer on one pair and one criterion. It carries its pictures, so that a file of votes is
# whole. The pictures of a condition: `image` (the source), `mask` (255 = repainted) and `label_map` (what was asked
# for). `label_0` is 1 where `image_0` won, 0 where `image_1` won, 0.5 for a tie; `label_1` is 1 - `label_0`.
VOTE_FEATURES = datasets.Features(
    {
        "vote_id": datasets.Value("string"),
        "pair_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "task": datasets.Value("string"),
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label_map": datasets.Image(),
        "image_0": datasets.Image(),
        "image_1": datasets.Image(),
        "label_0": datasets.Value("float32"),
        "label_1": datasets.Value("float32"),
        "criterion": datasets.Value("string"),
        "rater": datasets.Value("string"),
        "rater_role": datasets.Value("string"),
        "model_0": datasets.Value("string"),
        "model_1": datasets.Value("string"),
        "seed_0": datasets.Value("int64"),
        "seed_1": datasets.Value("int64"),
        "case_id": datasets.Value("string"),
        "created_at": datasets.Value("string"),
        "schema_version": datasets.Value("int32"),
    }
)
PICTURES = ("image", "mask", "label_map", "image_0", "image_1")


def to_png(picture: Image.Image | np.ndarray) -> dict:
    """An 8-bit picture as the encoded value of a `datasets.Image` column, pixels only: no EXIF, no other metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def content_id(*parts: str | bytes) -> str:
    """16 hexadecimal digits that stand for these texts and pictures, in this order, and tell nothing else of them."""
    digests = [sha256(part.encode() if isinstance(part, str) else part).digest() for part in parts]
    return sha256(b"".join(digests)).hexdigest()[:16]


def validate_votes(votes: datasets.Dataset, criteria: tuple[str, ...] = CRITERIA) -> None:
    """
    Check votes against the schema.

    Args:
        votes (`datasets.Dataset`):
            Rows of `VOTE_FEATURES`, in any order of columns. `label_map` may be empty.
        criteria (`tuple[str, ...]`, *optional*, defaults to `CRITERIA`):
            The criteria there are.

    Raises:
        `ValueError`: naming the columns that are missing or of a wrong type, or the first bad row, counted from 0, and
        the reason.
    """
    missing = [column for column in VOTE_FEATURES if column not in votes.column_names]
    if missing:
        raise ValueError(f"The votes lack the column(s) {missing}; expected {list(VOTE_FEATURES)}.")
    for column, feature in VOTE_FEATURES.items():
        given = votes.features[column]
        same = isinstance(given, datasets.Image) if column in PICTURES else given == feature
        if not same:
            raise ValueError(
                f"The column `{column}` is {given} but {feature} is wanted. Convert it, e.g. with "
                f"`votes.cast_column({column!r}, VOTE_FEATURES[{column!r}])`."
            )

    plain = votes.select_columns([column for column in VOTE_FEATURES if column not in PICTURES]).to_dict()
    encoded = votes.select_columns(list(PICTURES))
    for column in PICTURES:
        encoded = encoded.cast_column(column, datasets.Image(decode=False))
    seen: dict[str, int] = {}
    good_pictures: set[tuple] = set()  # a pair has many votes: its pictures are looked at once
    for index, pictures in enumerate(encoded):
        vote = {column: values[index] for column, values in plain.items()}
        key = tuple(
            hash(picture and (picture["bytes"] or picture["path"])) for picture in (pictures[c] for c in PICTURES)
        )
        reason = _wrong_value(vote, criteria)
        if reason is None and vote["vote_id"] in seen:
            reason = (
                f"`vote_id` {vote['vote_id']!r} is that of row {seen[vote['vote_id']]} too; each vote needs its own"
            )
        if reason is None and key not in good_pictures:
            reason = _wrong_picture(pictures)
            good_pictures.add(key)
        if reason is not None:
            raise ValueError(f"Vote in row {index}: {reason}.")
        seen[vote["vote_id"]] = index


def save_votes(votes: datasets.Dataset, path: str | os.PathLike) -> None:
    """
    Check votes and write them, pictures included, to one Parquet file that `datasets.load_dataset("parquet", ...)` and
    the Hub's viewer read. The file appears whole or not at all.

    Args:
        votes (`datasets.Dataset`):
            Rows of `VOTE_FEATURES`.
        path (`str` or `os.PathLike`):
            The file, replaced if it exists.

    Raises:
        `ValueError`: when a vote is not valid.
    """
    votes = votes.select_columns(list(VOTE_FEATURES))
    validate_votes(votes, tuple(dict.fromkeys(votes["criterion"])))
    table = embed_table_storage(votes.with_format("arrow")[:])
    with whole_file(path) as partial:
        # Votes on a pair repeat its pictures: stored once a column chunk as a dictionary, they cost next to nothing.
        pq.write_table(table, partial, compression="zstd", dictionary_pagesize_limit=2**26, row_group_size=4096)


def load_votes(path: str | os.PathLike, criteria: tuple[str, ...] = CRITERIA) -> datasets.Dataset:
    """
    Read and check the votes of one Parquet file.

    Args:
        path (`str` or `os.PathLike`):
            The file, as written by [`save_votes`].
        criteria (`tuple[str, ...]`, *optional*, defaults to `CRITERIA`):
            The criteria there are.

    Returns:
        `datasets.Dataset`: rows of `VOTE_FEATURES`, in memory.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when the file is no Parquet file, or a vote in it is not valid.
    """
    try:
        table = pq.read_table(path)
    except ValueError as error:  # what pyarrow raises for a file it cannot read
        raise ValueError(f"`path` {os.fspath(path)!r} is not a readable Parquet file: {error}") from error
    votes = datasets.Dataset(table)
    validate_votes(votes, criteria)
    return votes.select_columns(list(VOTE_FEATURES))


def _wrong_value(vote: dict, criteria: tuple[str, ...]) -> str | None:
    for column in ("vote_id", "pair_id", "task", "criterion", "rater", "rater_role", "case_id", "created_at"):
        if not vote[column]:
            return f"`{column}` is empty"
    if vote["schema_version"] != VOTE_SCHEMA_VERSION:
        return f"`schema_version` is {vote['schema_version']}; this version of onereward reads {VOTE_SCHEMA_VERSION}"
    if vote["task"] not in TASKS:
        return f"`task` is {vote['task']!r}; expected one of {TASKS}"
    if vote["criterion"] not in criteria:
        return f"`criterion` is {vote['criterion']!r}; expected one of {tuple(criteria)}"
    if vote["label_0"] not in (0, 0.5, 1) or vote["label_1"] != 1 - vote["label_0"]:
        return (
            f"`label_0` and `label_1` are {vote['label_0']} and {vote['label_1']}; expected 1 and 0 (the first wins), "
            "0 and 1 (the second wins) or 0.5 and 0.5 (tie)"
        )
    return None


def _wrong_picture(pictures: dict) -> str | None:
    decoded = {}
    for column in PICTURES:
        if pictures[column] is None:
            if column == "label_map":
                continue
            return f"`{column}` is missing"
        try:
            content = pictures[column]["bytes"]
            opened = Image.open(io.BytesIO(content) if content else pictures[column]["path"])
            opened.load()
        except OSError as error:
            return f"`{column}` is no readable picture ({error})"
        decoded[column] = opened
    for column in ("image", "image_0", "image_1"):
        if decoded[column].mode not in ("L", "RGB"):
            return f"`{column}` has mode {decoded[column].mode!r}; expected 8-bit grey ('L') or colour ('RGB')"
    kinds = {column: (decoded[column].mode, decoded[column].size) for column in ("image", "image_0", "image_1")}
    if len(set(kinds.values())) > 1:
        return f"the pictures differ in mode or size: {kinds}"
    try:
        mask = check_mask(np.asarray(decoded["mask"]), size=decoded["image"].size[::-1])
        if "label_map" in decoded:
            check_label_map(np.asarray(decoded["label_map"]), mask)
    except ValueError as error:
        return str(error).rstrip(".")
    return None
