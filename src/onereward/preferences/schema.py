"""One row a vote: what it holds, what is wrong with a row, and the file it is kept in."""

import hmac
import io
import math
import numbers
import os
import re
import unicodedata
from collections.abc import Iterator
from hashlib import sha256
from itertools import combinations

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from PIL import Image

from onereward.data.load import load_from_hub
from onereward.data.masks import check_label_map, check_mask
from onereward.data.schema import TASKS
from onereward.data.whole_file import whole_file


CRITERIA = ("quality", "realism", "clinical_relevance")
VOTE_SCHEMA_VERSION = 2
KINDS = ("pair", "rating")
MAX_COMMENT = 500

# A vote is one rater's answer on one criterion: which of two images is better (`kind` "pair"), or how good one is
# ("rating"). It carries its pictures, so that a file of votes is whole: those of the condition, `image` (the source),
# `mask` (255 = repainted) and `label_map` (what was asked for), and those judged, `image_0` and, of a pair, `image_1`.
#
# - `pair_id`: what was judged; all votes on the same images of the same condition, on the same sides, share it.
# - `set_id`: shared by the pairs that one choice of best and worst of N implies, see `best_worst_votes`; else empty.
# - `label_0`: of a pair, 1 where `image_0` won, 0 where `image_1` won, 0.5 for a tie; `label_1` is 1 - `label_0`.
# - `both_unacceptable`: neither image of the pair will do, whichever is the better one.
# - `rating`, `rating_min`, `rating_max`: of a rating, the answer and its scale.
# - `rater`: a pseudonym, see `rater_id`. `rater_role`: radiologist, resident, lay, simulated, ...
# - `left`: which image of the pair, 0 or 1, was shown on the left (or first); -1 if that is not known.
# - `seconds`: time to answer. `window_center`, `window_width`: intensity window shown; empty if not windowed.
VOTE_FEATURES = datasets.Features(
    {
        "vote_id": datasets.Value("string"),
        "kind": datasets.Value("string"),
        "pair_id": datasets.Value("string"),
        "set_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "task": datasets.Value("string"),
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label_map": datasets.Image(),
        "image_0": datasets.Image(),
        "image_1": datasets.Image(),
        "label_0": datasets.Value("float32"),
        "label_1": datasets.Value("float32"),
        "both_unacceptable": datasets.Value("bool"),
        "rating": datasets.Value("float64"),
        "rating_min": datasets.Value("float64"),
        "rating_max": datasets.Value("float64"),
        "criterion": datasets.Value("string"),
        "comment": datasets.Value("string"),
        "rater": datasets.Value("string"),
        "rater_role": datasets.Value("string"),
        "model_0": datasets.Value("string"),
        "model_1": datasets.Value("string"),
        "seed_0": datasets.Value("int64"),
        "seed_1": datasets.Value("int64"),
        "left": datasets.Value("int8"),
        "seconds": datasets.Value("float64"),
        "window_center": datasets.Value("float64"),
        "window_width": datasets.Value("float64"),
        "case_id": datasets.Value("string"),
        "created_at": datasets.Value("string"),
        "schema_version": datasets.Value("int32"),
    }
)
PICTURES = ("image", "mask", "label_map", "image_0", "image_1")

# What a vote holds where nobody says otherwise. These are the columns that version 1 did not have.
VOTE_DEFAULTS = {
    "kind": "pair",
    "set_id": None,
    "both_unacceptable": False,
    "rating": None,
    "rating_min": None,
    "rating_max": None,
    "comment": None,
    "left": -1,
    "seconds": None,
    "window_center": None,
    "window_width": None,
}


def to_png(picture: Image.Image | np.ndarray) -> dict:
    """An 8-bit picture as the encoded value of a `datasets.Image` column, pixels only: no EXIF, no other metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def encode_picture(picture: Image.Image | np.ndarray | dict | bytes | None) -> dict | None:
    """
    A picture as the encoded value of a `datasets.Image` column. What is encoded already, or lies in a file, is encoded
    anew when it carries more than pixels (EXIF, comments, a profile): patients' names have been found there.
    """
    if picture is None:
        return None
    if not isinstance(picture, dict | bytes):
        return to_png(picture)
    content = picture if isinstance(picture, bytes) else picture.get("bytes")
    if content is None and picture.get("path") is not None:
        with open(picture["path"], "rb") as file:
            content = file.read()
    if content is not None and not _is_bare_png(content):
        try:
            opened = Image.open(io.BytesIO(content))
            if opened.mode in ("L", "RGB"):
                return to_png(opened)
            opened.load()
            opened.info = {}  # all but the pixels and their palette
            buffer = io.BytesIO()
            opened.save(buffer, "PNG")
            content = buffer.getvalue()
        except OSError:
            pass  # `wrong_vote` says that it is no picture
    return {"bytes": content, "path": None}


def _is_bare_png(content: bytes) -> bool:
    """Whether a PNG file holds nothing but pixels and their palette."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return False
    place = 8
    while place + 8 <= len(content):
        if content[place + 4 : place + 8] not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            return False
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return place == len(content)


def content_id(*parts: str | bytes) -> str:
    """16 hexadecimal digits that stand for these texts and pictures, in this order, and tell nothing else of them."""
    digests = [sha256(part.encode() if isinstance(part, str) else part).digest() for part in parts]
    return sha256(b"".join(digests)).hexdigest()[:16]


def rater_id(name: str, salt: str | bytes) -> str:
    """
    A rater's pseudonym: the first 16 hexadecimal digits of HMAC-SHA256(salt, name), RFC 2104.

    The same name and salt give the same pseudonym. Who knows the salt can find out who voted by trying names, so the
    salt must never leave the rater's machine: do not publish it, commit it or keep it beside the votes.

    Args:
        name (`str`):
            Name or account of the rater. The spelling counts, blanks around it do not.
        salt (`str` or `bytes`):
            A secret of at least 16 bytes, e.g. from `secrets.token_hex(16)`, kept by the rater.

    Returns:
        `str`: 16 hexadecimal digits.

    Raises:
        `ValueError`: when the name is empty or the salt too short.

    Example:

    ```python
    >>> rater_id("Dr. A. Example", salt=secrets.token_hex(16))
    '5f1d0c3b8a92e746'
    ```
    """
    # one spelling of an accented letter, whichever keyboard it came from
    name = unicodedata.normalize("NFC", name).strip()
    key = salt.encode() if isinstance(salt, str) else salt
    if not name:
        raise ValueError("`name` is empty; expected the name or account of a rater.")
    if len(key) < 16:
        raise ValueError(
            f"`salt` has {len(key)} bytes; expected at least 16, or names can be guessed. Make one with "
            "`secrets.token_hex(16)` and keep it on the rater's machine."
        )
    return hmac.new(key, name.encode(), sha256).hexdigest()[:16]


_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_PERSONAL = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.\w+"),
    "a date": re.compile(
        r"\b(?:\d{1,2}[./-]\d{1,2}[./-](?:\d{4}|\d{2})|\d{4}[./-]\d{1,2}[./-]\d{1,2})\b"
        rf"|\b\d{{1,2}}(?:st|nd|rd|th)?[ -]?(?:of )?{_MONTH}[ ,-]*\d{{2,4}}\b"
        rf"|\b{_MONTH} ?\d{{1,2}}(?:st|nd|rd|th)?,? ?\d{{4}}\b",
        re.IGNORECASE,
    ),
    "a telephone number": re.compile(
        r"\+\d[\d ()/-]{6,}\d|\(?\b\d{3,5}\)?[ /-]\d{3,4}[ -]?\d{3,}\b"
        r"|\b\d{3}\.\d{3}\.\d{4}\b|\b(?:\d\d[ .-]){4}\d\d\b"
    ),
    "a long number": re.compile(r"\d{6,}"),
    "a patient's identifier": re.compile(
        r"\b(?:MRN|DOB|SSN|NHS|patient ?(?:id|name|number|no)|accession|date of birth|born (?:on|in))\b",
        re.IGNORECASE,
    ),
    "a name": re.compile(
        r"\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Professor|Herr|Frau|Mme|Sr|Sra)\b\.? (?:[A-Z]\. ?)*[A-ZÀ-ÖØ-Þ][\w'’-]+"
    ),
}


def phi_warning(comment: str | None) -> str | None:
    """
    Warn when a comment looks as if it held personal data: e-mail addresses, dates, telephone numbers, runs of 6 digits
    or more, words such as "MRN" and "born", and titles followed by a capitalised name.

    This is a heuristic, made to be shown to a rater before the comment is sent. It misses names without a title and
    whatever else it has no pattern for, and it warns of harmless numbers: it neither de-identifies a comment nor shows
    that one is free of personal data. Nothing is refused because of it.

    Args:
        comment (`str`, *optional*):
            The rater's comment.

    Returns:
        `str` or `None`: what the comment seems to hold, without repeating it; `None` where nothing was noticed.

    Example:

    ```python
    >>> phi_warning("Same patient as Mrs. Smith on 12/03/2019")
    'The comment looks as if it held a date and a name. Comments are kept ...'
    ```
    """
    found = [kind for kind, pattern in _PERSONAL.items() if pattern.search(comment or "")]
    if not found:
        return None
    listed = " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
    return (
        f"The comment looks as if it held {listed}. Comments are kept and published with the votes: take out whatever "
        "could tell who a patient or a rater is."
    )


def best_worst_votes(
    images: list, best: int, worst: int, models: list[str] | None = None, seeds: list[int] | None = None, **columns
) -> list[dict]:
    r"""
    The pairs that a choice of the best and the worst of N images implies, as in OneReward
    (https://huggingface.co/papers/2508.21066, section 3.2): the best one beats all others, and all others beat the
    worst one, 2N - 3 pairs in all. What lies between is not known and gives no pair.

    The pairs of one set are one answer: their `seconds` is that of the whole set, and resampling (a bootstrap, say)
    should draw sets, not pairs. Where a rater sees no difference, leave the set out.

    Args:
        images (`list`):
            N pictures, `PIL.Image.Image`, `np.ndarray` or encoded as `{"bytes": ...}`, in the same order for all
            raters, which need not be that on the screen. In each pair the earlier one is `image_0`.
        best, worst (`int`):
            Numbers of two of them, from 0.
        models (`list[str]`, *optional*):
            What made each of them.
        seeds (`list[int]`, *optional*):
            The seed of each of them.
        columns:
            What the votes share, by the names of `VOTE_FEATURES`: at least `set_id` (new for each answer, kept when it
            is sent again), `criterion`, `rater`, `rater_role`, `image`, `mask`, `task`, `case_id` and `created_at`.

    Returns:
        `list[dict]`: 2N - 3 rows of `VOTE_FEATURES`, pictures encoded. The same call gives the same `vote_id`s.

    Raises:
        `ValueError`: when there are fewer than two images, best and worst are not two of them, a column is unknown, or
        one that makes the identifiers is missing.

    Example:

    ```python
    >>> votes = best_worst_votes(
    ...     candidates, best=2, worst=0, set_id="set-17", criterion="realism", rater=rater_id(name, salt),
    ...     rater_role="radiologist", image=source, mask=mask, task="fill", case_id="case-3",
    ...     created_at="2025-06-01T12:00:00+00:00",
    ... )
    >>> len(votes)  # of four candidates
    5
    ```
    """
    number = len(images)
    if number < 2 or best == worst or best not in range(number) or worst not in range(number):
        raise ValueError(
            f"`best` and `worst` are {best} and {worst} of {number} image(s); expected two different numbers from 0 "
            f"to {number - 1}. Where a rater sees no difference, leave the set out."
        )
    for name, values in (("models", models), ("seeds", seeds)):
        if values is not None and len(values) != number:
            raise ValueError(f"`{name}` has {len(values)} entries for {number} images; expected one for each.")
    own = {"vote_id", "pair_id", "kind", "label_0", "label_1", "left", "image_0", "image_1"}
    own |= {"model_0", "model_1", "seed_0", "seed_1"}
    wrong = [name for name in columns if name not in VOTE_FEATURES or name in own]
    missing = [name for name in ("set_id", "criterion", "rater", "task", "case_id") if not columns.get(name)]
    missing += [name for name in ("image", "mask") if columns.get(name) is None]
    if wrong or missing:
        raise ValueError(
            f"`columns` lack {missing} and must not hold {wrong}; expected what all votes of the set share, by names "
            "of `VOTE_FEATURES`."
        )
    shared = {**dict.fromkeys(VOTE_FEATURES), **VOTE_DEFAULTS, "prompt": "", **columns}
    shared |= {"schema_version": VOTE_SCHEMA_VERSION}
    shared |= {name: encode_picture(shared[name]) for name in ("image", "mask", "label_map")}
    encoded = [encode_picture(picture) for picture in images]
    shown = [shared[name]["bytes"] for name in ("image", "mask", "label_map") if shared[name]]
    condition = content_id(shared["case_id"], shared["task"], shared["prompt"], *shown)
    votes = []
    for first, second in combinations(range(number), 2):
        if best not in (first, second) and worst not in (first, second):
            continue
        label = 1.0 if first == best or second == worst else 0.0
        pair = content_id(condition, encoded[first]["bytes"], encoded[second]["bytes"])
        votes.append(
            {
                **shared,
                "vote_id": content_id(shared["set_id"], pair, shared["criterion"], shared["rater"]),
                "pair_id": pair,
                "image_0": encoded[first],
                "image_1": encoded[second],
                "label_0": label,
                "label_1": 1 - label,
                **{f"model_{side}": models[i] for side, i in enumerate((first, second)) if models is not None},
                **{f"seed_{side}": seeds[i] for side, i in enumerate((first, second)) if seeds is not None},
            }
        )
    return votes


def upgrade_votes(votes: datasets.Dataset) -> datasets.Dataset:
    """
    Votes of an older version of the schema as votes of this one. Version 1 knew pairs only, and not which image was on
    the left: its rows get `VOTE_DEFAULTS`. Votes of this version are returned as they are.

    Args:
        votes (`datasets.Dataset`):
            Rows of any version of the schema, checked or not.

    Returns:
        `datasets.Dataset`: the same rows in the same order. What was wrong with a row is still wrong with it.

    Raises:
        `ValueError`: when columns are lacking and the votes are of a newer version.
    """
    lacking = [column for column in VOTE_FEATURES if column not in votes.column_names]
    if not lacking or "schema_version" not in votes.column_names:
        return votes
    versions = votes["schema_version"]
    if set(lacking) != set(VOTE_DEFAULTS):
        newest = max((version for version in versions if version is not None), default=0)
        if newest > VOTE_SCHEMA_VERSION:
            raise ValueError(f"{_newer(newest)}.")
        return votes  # no version that was; `validate_votes` says which columns are missing
    # a row that says it is of another version goes on saying so, and is refused by `validate_votes`
    versions = [VOTE_SCHEMA_VERSION if version == 1 else version for version in versions]
    table = {column: [value] * len(votes) for column, value in VOTE_DEFAULTS.items()} | {"schema_version": versions}
    new = datasets.Dataset.from_dict(table, features=datasets.Features({name: VOTE_FEATURES[name] for name in table}))
    return datasets.concatenate_datasets([votes.remove_columns("schema_version"), new], axis=1)


def _newer(version: int) -> str:
    return (
        f"`schema_version` is {version}; this version of onereward reads up to {VOTE_SCHEMA_VERSION}. Upgrade "
        "onereward to read these votes"
    )


def validate_votes(
    votes: datasets.Dataset, criteria: tuple[str, ...] = CRITERIA, keep_good: bool = False
) -> tuple[datasets.Dataset, list[tuple[int, str]]]:
    """
    Check votes against the schema.

    Args:
        votes (`datasets.Dataset`):
            Rows of `VOTE_FEATURES`, in any order of columns. `label_map` may be empty.
        criteria (`tuple[str, ...]`, *optional*, defaults to `CRITERIA`):
            The criteria there are.
        keep_good (`bool`, *optional*, defaults to `False`):
            Whether bad rows are left out and reported instead of refused.

    Returns:
        `tuple[datasets.Dataset, list[tuple[int, str]]]`: the good rows, all columns kept; and of each bad row its
        number, counted from 0, and the reason. Without `keep_good` these are all the votes, and none.

    Raises:
        `ValueError`: naming the columns that are missing or of a wrong type; or, without `keep_good`, the first bad
        row and the reason.

    Example:

    ```python
    >>> good, bad = validate_votes(votes, keep_good=True)
    >>> bad
    [(17, "`criterion` is 'beauty'; expected one of ('quality', 'realism', 'clinical_relevance')")]
    ```
    """
    missing = [column for column in VOTE_FEATURES if column not in votes.column_names]
    if missing:
        hint = " Votes of version 1 first need `upgrade_votes`." if set(missing) == set(VOTE_DEFAULTS) else ""
        raise ValueError(f"The votes lack the column(s) {missing}; expected {list(VOTE_FEATURES)}.{hint}")
    for column, feature in VOTE_FEATURES.items():
        given = votes.features[column]
        same = isinstance(given, datasets.Image) if column in PICTURES else given == feature
        if not same:
            raise ValueError(
                f"The column `{column}` is {given} but {feature} is wanted. Convert it, e.g. with "
                f"`votes.cast_column({column!r}, VOTE_FEATURES[{column!r}])`."
            )

    seen: dict[str, int] = {}
    checked: dict[tuple, str | None] = {}
    bad: list[tuple[int, str]] = []
    for index, vote in enumerate(encoded_rows(votes)):
        reason = wrong_vote(vote, criteria, checked)
        if reason is None and vote["vote_id"] in seen:
            reason = (
                f"`vote_id` {vote['vote_id']!r} is that of row {seen[vote['vote_id']]} too; each vote needs its own"
            )
        if reason is None:
            seen[vote["vote_id"]] = index
        elif keep_good:
            bad.append((index, reason))
        else:
            raise ValueError(f"Vote in row {index}: {reason}.")
    refused = {index for index, _ in bad}
    return (votes.select([i for i in range(len(votes)) if i not in refused]) if bad else votes), bad


def encoded_rows(votes: datasets.Dataset) -> Iterator[dict]:
    """The votes one by one, columns of `VOTE_FEATURES` only, pictures left encoded."""
    plain = votes.select_columns([column for column in VOTE_FEATURES if column not in PICTURES]).to_dict()
    encoded = votes.select_columns(list(PICTURES))
    for column in PICTURES:
        encoded = encoded.cast_column(column, datasets.Image(decode=False))
    for index, pictures in enumerate(encoded):
        yield {**{column: values[index] for column, values in plain.items()}, **pictures}


def save_votes(votes: datasets.Dataset, path: str | os.PathLike) -> None:
    """
    Check votes and write them, pictures included, to one Parquet file that `datasets.load_dataset("parquet", ...)` and
    the Hub's viewer read. The pictures carry nothing but pixels. The file appears whole or not at all.

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
    table = votes.with_format("arrow")[:]
    if len(votes):  # of no votes there is nothing to embed, and it fails
        table = embed_table_storage(table)
    for place, (column, feature) in enumerate(VOTE_FEATURES.items()):
        if column in PICTURES:
            chunks = [pa.array(_bare(chunk.to_pylist()), feature.pa_type) for chunk in table[column].chunks]
            pictures = pa.chunked_array(chunks, feature.pa_type)
            table = table.set_column(place, table.schema.field(column), pictures)
    # Votes on a pair repeat its pictures: stored once a column chunk as a dictionary, they cost next to nothing.
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**26}
    with whole_file(path) as partial, pq.ParquetWriter(partial, table.schema, **options) as writer:
        if len(table):  # `datasets` stops at a group of no rows, also where another file has some
            writer.write_table(table, row_group_size=4096)


def _bare(pictures: list[dict | None]) -> list[dict | None]:
    """Pictures encoded anew, each that comes several times once."""
    encoded: dict[bytes | None, dict | None] = {None: None}
    for picture in pictures:
        if picture is not None and picture["bytes"] not in encoded:
            encoded[picture["bytes"]] = encode_picture(picture)
    return [encoded[picture and picture["bytes"]] for picture in pictures]


def load_votes(
    path: str | os.PathLike,
    criteria: tuple[str, ...] | None = CRITERIA,
    split: str = "train",
    revision: str | None = None,
) -> datasets.Dataset:
    """
    Read and check votes. Those of an older version of the schema are upgraded.

    To keep the good rows of a file with bad ones: `validate_votes(read_votes(path), keep_good=True)`.

    Args:
        path (`str` or `os.PathLike`):
            A Parquet file, as written by [`save_votes`], or the id of a data set of votes on the Hub.
        criteria (`tuple[str, ...]`, *optional*, defaults to `CRITERIA`):
            The criteria there are; `None` for whichever were voted on.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set on the Hub.
        revision (`str`, *optional*):
            Revision of a data set on the Hub: branch, tag or commit.

    Returns:
        `datasets.Dataset`: rows of `VOTE_FEATURES`.

    Raises:
        `ConnectionError`: when the Hub does not answer and the cache holds another revision than the wanted one.
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when the file is no Parquet file, or a vote in it is not valid.
    """
    name = os.fspath(path)
    if os.path.exists(name) or name.endswith(".parquet"):
        votes = read_votes(name)
    else:
        votes = upgrade_votes(load_from_hub(name, revision, split))
    if criteria is None and "criterion" in votes.column_names:
        criteria = tuple(dict.fromkeys(votes["criterion"]))
    validate_votes(votes, criteria)
    return votes.select_columns(list(VOTE_FEATURES))


def read_votes(path: str | os.PathLike) -> datasets.Dataset:
    """
    Read the votes of one Parquet file without looking at the rows. Votes of an older version are upgraded.

    Args:
        path (`str` or `os.PathLike`):
            The file, as written by [`save_votes`].

    Returns:
        `datasets.Dataset`: what the file holds, in memory.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when the file is no Parquet file, or made by a newer version of onereward.
    """
    try:
        table = pq.read_table(path)
    except ValueError as error:  # what pyarrow raises for a file it cannot read
        raise ValueError(f"`path` {os.fspath(path)!r} is not a readable Parquet file: {error}") from error
    return upgrade_votes(datasets.Dataset(table))


def wrong_vote(vote: dict, criteria: tuple[str, ...], checked: dict[tuple, str | None]) -> str | None:
    """
    What is wrong with one vote.

    Args:
        vote (`dict`):
            The columns of `VOTE_FEATURES`, pictures encoded.
        criteria (`tuple[str, ...]`):
            The criteria there are.
        checked (`dict`):
            What is known of pictures seen before; added to. A pair has many votes: its pictures are looked at once.

    Returns:
        `str` or `None`: the reason, or `None` for a good vote.
    """
    reason = _wrong_type(vote) or _wrong_value(vote, criteria) or _wrong_answer(vote)
    if reason is not None:
        return reason
    pictures = (vote[column] and (vote[column]["bytes"] or vote[column]["path"]) for column in PICTURES)
    key = (vote["kind"], *map(hash, pictures))
    if key not in checked:
        checked[key] = _wrong_picture(vote)
    return checked[key]


_TYPES = {"string": str, "bool": bool, "int": numbers.Integral, "float": numbers.Real}


def _wrong_type(vote: dict) -> str | None:
    for column, feature in VOTE_FEATURES.items():
        value = vote[column]
        if value is None or column in PICTURES:
            continue
        if not isinstance(value, _TYPES[feature.dtype.rstrip("0123456789")]):
            return f"`{column}` is {value!r} of type {type(value).__name__}; expected {feature.dtype}"
        if isinstance(value, numbers.Integral) and not -(2**63) <= value < 2**63:
            return f"`{column}` is {value}; expected {feature.dtype}"
        if isinstance(value, str) and not value.isascii() and value.encode(errors="ignore").decode() != value:
            return f"`{column}` is {value!r}, which holds half characters (surrogates); expected text"
    return None


def _wrong_value(vote: dict, criteria: tuple[str, ...]) -> str | None:
    version = vote["schema_version"]
    if version is not None and version > VOTE_SCHEMA_VERSION:
        return _newer(version)
    if version != VOTE_SCHEMA_VERSION:
        return f"`schema_version` is {version}; expected {VOTE_SCHEMA_VERSION}"
    for column in ("vote_id", "pair_id", "task", "criterion", "rater", "rater_role", "case_id", "created_at"):
        if not vote[column]:
            return f"`{column}` is empty"
    if vote["task"] not in TASKS:
        return f"`task` is {vote['task']!r}; expected one of {TASKS}"
    if vote["criterion"] not in criteria:
        return f"`criterion` is {vote['criterion']!r}; expected one of {tuple(criteria)}"
    if vote["comment"] and len(vote["comment"]) > MAX_COMMENT:
        return f"`comment` has {len(vote['comment'])} characters; expected at most {MAX_COMMENT}"
    if vote["seconds"] is not None and not 0 <= vote["seconds"] < math.inf:
        return f"`seconds` is {vote['seconds']}; expected a time of at least 0, or nothing"
    center, width = vote["window_center"], vote["window_width"]
    windowed = center is not None and width is not None and math.isfinite(center) and 0 < width < math.inf
    if not windowed and (center is not None or width is not None):
        return f"`window_center` and `window_width` are {center} and {width}; expected both, width above 0, or neither"
    return None


def _wrong_answer(vote: dict) -> str | None:
    """Of a pair, its label; of a rating, its value; and neither with what belongs to the other."""
    if vote["kind"] not in KINDS:
        return f"`kind` is {vote['kind']!r}; expected one of {KINDS}"
    if vote["both_unacceptable"] is None:
        return "`both_unacceptable` is empty; expected true or false"
    if vote["left"] not in (-1, 0, 1):
        return f"`left` is {vote['left']}; expected 0 or 1, the image shown on the left, or -1 if that is not known"
    labels = vote["label_0"], vote["label_1"]
    scale = [vote[column] for column in ("rating_min", "rating", "rating_max")]
    if vote["kind"] == "pair":
        if labels[0] not in (0, 0.5, 1) or labels[1] != 1 - labels[0]:
            return (
                f"`label_0` and `label_1` are {labels[0]} and {labels[1]}; expected 1 and 0 (the first wins), 0 and 1 "
                "(the second wins) or 0.5 and 0.5 (tie)"
            )
        if scale != [None] * 3:
            return "a pair has a `rating`, `rating_min` or `rating_max`; expected none, or `kind` 'rating'"
        return None
    if any(value is None or not math.isfinite(value) for value in scale) or not scale[0] <= scale[1] <= scale[2]:
        return f"`rating_min`, `rating` and `rating_max` are {scale}; expected three numbers in this order"
    if scale[0] == scale[2]:
        return f"`rating_min` and `rating_max` are both {scale[0]}; expected the two ends of the scale"
    if labels != (None, None) or vote["image_1"] is not None:
        return "a rating has an `image_1`, `label_0` or `label_1`; expected none, or `kind` 'pair'"
    if vote["both_unacceptable"] or vote["left"] != -1:
        return "a rating has `both_unacceptable` or `left`; expected false and -1, or `kind` 'pair'"
    return None


def _wrong_picture(vote: dict) -> str | None:
    decoded = {}
    for column in PICTURES:
        if vote[column] is None:
            if column == "label_map" or (column == "image_1" and vote["kind"] == "rating"):
                continue
            return f"`{column}` is missing"
        try:
            content = vote[column]["bytes"]
            opened = Image.open(io.BytesIO(content) if content else vote[column]["path"])
            opened.load()
        except Exception as error:  # a damaged file makes Pillow raise almost anything
            return f"`{column}` is no readable picture ({error})"
        decoded[column] = opened
        if opened.mode == "F":
            return f"`{column}` holds fractions; expected whole numbers"
    shown = [column for column in ("image", "image_0", "image_1") if column in decoded]
    for column in shown:
        if decoded[column].mode not in ("L", "RGB"):
            return f"`{column}` has mode {decoded[column].mode!r}; expected 8-bit grey ('L') or colour ('RGB')"
    kinds = {column: (decoded[column].mode, decoded[column].size) for column in shown}
    if len(set(kinds.values())) > 1:
        return f"the pictures differ in mode or size: {kinds}"
    try:
        mask = check_mask(np.asarray(decoded["mask"]), size=decoded["image"].size[::-1])
        if "label_map" in decoded:
            check_label_map(np.asarray(decoded["label_map"]), mask)
    except ValueError as error:
        return str(error).rstrip(".")
    return None
