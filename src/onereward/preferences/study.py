"""A study: who is asked what, in which order, and what was answered. Any user interface can be put before it."""

import hmac
import io
import json
import math
import os
import re
import sqlite3
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from onereward.data.whole_file import whole_file, write_json
from onereward.preferences.active import next_questions
from onereward.preferences.candidates import CANDIDATE_FEATURES
from onereward.preferences.schema import (
    CRITERIA,
    MAX_COMMENT,
    VOTE_DEFAULTS,
    VOTE_FEATURES,
    VOTE_SCHEMA_VERSION,
    best_worst_votes,
    content_id,
    phi_warning,
    rater_id,
    to_png,
    wrong_vote,
)
from onereward.preferences.store import DurableFile, VoteStore


MODES = ("pairs", "best_worst", "turing")
PAIR_ANSWERS = ("left", "right", "tie", "both_unacceptable")
TURING_ANSWERS = ("real", "synthetic")
NO_DIFFERENCE = "no_difference"
REAL = "real"  # the model of images that nobody made

_PICTURES = ("image", "mask", "label_map", "target", "candidate")
# of a vote, or of the set it belongs to: which rater, unit and criterion, on which occasion, at which attempt
_CODE = re.compile(r"[0-9a-f]{16}-(\d+)-(\d+)")


class StudyError(ValueError):
    """What a person asked of a study and does not get, and why, in one line that can be shown to them."""


@dataclass
class StudySettings:
    """
    How a study is run.

    Args:
        title (`str`, *optional*, defaults to `"Which image is better?"`):
            Heading.
        mode (`str`, *optional*, defaults to `"pairs"`):
            `"pairs"` (which of two), `"best_worst"` (best and worst of N) or `"turing"` (real or synthetic).
        criteria (`dict[str, list[str]]`, *optional*):
            Criteria of each task, asked one after the other. By default quality, realism and clinical relevance, of
            `remove` removal quality and realism, and with mode `"turing"` only realism, as it must be.
        roles (`list[str]`, *optional*, defaults to `["radiologist", "resident", "other"]`):
            What raters may be. Each is asked once.
        goal (`int`, *optional*, defaults to 100):
            Answers wanted of each rater. They may go on beyond it.
        instructions (`str`, *optional*):
            What raters are told, in Markdown.
        consent (`str`, *optional*):
            What raters agree to, in Markdown.
        organisers (`list[str]`, *optional*):
            Names or accounts of those who see results while the study is open.
        images_per_set (`int`, *optional*, defaults to 4):
            Images to choose the best and the worst of, from 2.
        repeat_share (`float`, *optional*, defaults to `0.07`):
            Share of the questions that a rater has answered before, from 0 up to below 1.
        calibration_share (`float`, *optional*, defaults to `0.05`):
            Share of the questions whose answer is known, from 0 up to below 1, as long as there are any.
        random_share (`float`, *optional*, defaults to `0.5`):
            Share of the questions that are drawn at random, not because they tell most; see [`next_questions`].
        undo_seconds (`float`, *optional*, defaults to `600`):
            How long an answer can be taken back.
        answers_per_minute (`int`, *optional*, defaults to 60):
            Most answers of one rater in a minute, skipped questions included.
        window_center, window_width (`float`, *optional*):
            Intensity window that the images were made with: shown, and kept with the votes.
        closed (`bool`, *optional*, defaults to `False`):
            Whether no more answers are taken.
        reward_model (`str`, *optional*):
            Reward model, a folder or Hub id, for whoever asks first what tells most.
        seed (`int`, *optional*, defaults to 0):
            Seed of what is drawn. Raters do not learn from it what they will be shown, since a salt goes in, too.

    Raises:
        `ValueError`: when a setting is out of its range.
    """

    title: str = "Which image is better?"
    mode: str = "pairs"
    criteria: dict[str, list[str]] | None = None
    roles: list[str] | tuple[str, ...] = ("radiologist", "resident", "other")
    goal: int = 100
    instructions: str = ""
    consent: str = ""
    organisers: list[str] | tuple[str, ...] = ()
    images_per_set: int = 4
    repeat_share: float = 0.07
    calibration_share: float = 0.05
    random_share: float = 0.5
    undo_seconds: float = 600
    answers_per_minute: int = 60
    window_center: float | None = None
    window_width: float | None = None
    closed: bool = False
    reward_model: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` is {self.mode!r}; expected one of {MODES}.")
        if self.criteria is None:
            usual, removal = list(CRITERIA), ["removal_quality", "realism"]
            self.criteria = {"fill": usual, "remove": removal, "extend": usual}
            if self.mode == "turing":
                self.criteria = {task: ["realism"] for task in self.criteria}
        if not self.criteria or any(len(set(names)) != len(names) or not names for names in self.criteria.values()):
            raise ValueError(f"`criteria` is {self.criteria}; expected for each task a list of different criteria.")
        if self.mode == "turing" and any(list(names) != ["realism"] for names in self.criteria.values()):
            raise ValueError(f"`criteria` is {self.criteria}; expected ['realism'] for each task with mode 'turing'.")
        if not self.roles:
            raise ValueError("`roles` is empty; expected at least one, such as 'radiologist'.")
        for name in ("repeat_share", "calibration_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected from 0 up to below 1.")
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"`random_share` is {self.random_share}; expected from 0 to 1.")
        for name, least in (("goal", 1), ("images_per_set", 2), ("undo_seconds", 0), ("answers_per_minute", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected at least {least}.")
        center, width = self.window_center, self.window_width
        if (center is None) != (width is None) or (width is not None and not width > 0):
            raise ValueError(
                f"`window_center` and `window_width` are {center} and {width}; expected both, with a width above 0, "
                "or neither."
            )

    @property
    def window(self) -> tuple[float, float] | None:
        """Centre and width, if the images are windowed."""
        return None if self.window_width is None else (float(self.window_center), float(self.window_width))


@dataclass(frozen=True)
class Unit:
    """
    What one question is about.

    Args:
        unit_id (`str`):
            Stands for its condition and images. That of a pair is the `pair_id` of its votes.
        condition (`str`):
            Stands for source, mask, label map, prompt, task and case.
        task (`str`):
            `"fill"`, `"remove"` or `"extend"`.
        rows (`tuple[int, ...]`):
            Its images, as row numbers of the candidates: two for a pair, N for a set, one for real or synthetic.
    """

    unit_id: str
    condition: str
    task: str
    rows: tuple[int, ...]


@dataclass
class Item:
    """
    A question as a rater sees it. Nothing in it tells which model made which image.

    Args:
        item_id (`str`):
            Stands for this question to this rater. Nobody else's answer to it is taken.
        mode (`str`):
            As in [`StudySettings`].
        task (`str`):
            `"fill"`, `"remove"` or `"extend"`.
        prompt (`str`):
            What was to be painted.
        images (`list[bytes]`):
            PNG files in the order shown, of a pair the left one first.
        source, mask, label_map (`bytes`, *optional*):
            PNG files of the condition. None with mode `"turing"`, and no `label_map` where there is none.
        criteria (`list[str]`):
            What to judge by, in this order.
        answered (`dict[str, str | dict]`):
            Criterion to answer, for those that are answered already.
        window (`tuple[float, float]`, *optional*):
            Centre and width of the intensity window.
    """

    item_id: str
    mode: str
    task: str
    prompt: str
    images: list[bytes]
    source: bytes | None
    mask: bytes | None
    label_map: bytes | None
    criteria: list[str]
    answered: dict[str, str | dict]
    window: tuple[float, float] | None


@dataclass
class Receipt:
    """
    What a rater gets for an answer, which is on the disk by then.

    Args:
        vote_ids (`list[str]`):
            The votes that the answer became: one, or with mode `"best_worst"` those of all pairs that it implies.
        remaining (`list[str]`):
            Criteria of this item that are not answered yet.
        answered (`int`):
            Answers of this rater in all.
        goal (`int`):
            Answers wanted.
        comment_warning (`str`, *optional*):
            What personal data the comment seems to hold, see [`phi_warning`].
    """

    vote_ids: list[str]
    remaining: list[str]
    answered: int
    goal: int
    comment_warning: str | None


def study_units(candidates: datasets.Dataset, settings: StudySettings) -> list[Unit]:
    """
    What a study of these candidates asks about: pairs of images of one condition that different models made (where
    there is one model only, any two), sets of `images_per_set` images of one condition, or single images. Equal images
    of one condition count once.

    Args:
        candidates (`datasets.Dataset`):
            Rows of `CANDIDATE_FEATURES`.
        settings ([`StudySettings`]):
            The mode and the seed count.

    Returns:
        `list[Unit]`: in the order of the candidates.

    Raises:
        `ValueError`: when the candidates lack columns, or nothing can be asked about them.

    Example:

    ```python
    >>> settings = StudySettings()
    >>> units = study_units(candidates, settings)
    >>> known = {
    ...     (unit.unit_id, "quality"): 1.0  # the first is the better one
    ...     for unit in units
    ...     if [candidates[row]["model"] for row in unit.rows] == ["target", "target+blur"]
    ... }
    ```
    """
    return _units(_clean(candidates), settings)


def make_study(
    folder: str | os.PathLike,
    candidates: datasets.Dataset,
    settings: StudySettings,
    calibration: dict[tuple[str, str], float] | None = None,
) -> None:
    """
    Write a study to a folder: `study.json` (the settings), `candidates.parquet` and, where there are questions with
    known answers, `calibration.csv`. The files of all images are written anew from their pixels, so that none tells
    by its metadata or its size on the disk what made it.

    Args:
        folder (`str` or `os.PathLike`):
            Where to, made where it is missing.
        candidates (`datasets.Dataset`):
            Rows of `CANDIDATE_FEATURES`, such as [`make_candidates`] makes. Real images, for mode `"turing"`, have the
            model `"real"`.
        settings ([`StudySettings`]):
            How the study is run.
        calibration (`dict[tuple[str, str], float]`, *optional*):
            (`pair_id`, criterion) to `label_0`: 1 where the first image of the pair is known to be the better one, 0
            where the second is. Of mode `"pairs"` only; [`study_units`] tells the ids.

    Raises:
        `ValueError`: when the folder holds a study, a candidate is not fit to be voted on, nothing can be asked, or a
            calibration item is not in the study.

    Example:

    ```python
    >>> make_study("runs/study", make_candidates(pipeline, rows, 2, 2), StudySettings(title="Fill", goal=50))
    ```
    """
    folder = Path(folder)
    if (folder / "study.json").exists():
        raise ValueError(f"`folder` is {str(folder)!r}, which holds a study. Name another one.")
    rows = _clean(candidates)
    checked: dict = {}
    for number, row in enumerate(rows):
        criteria = settings.criteria.get(row["task"])
        if not criteria:
            raise ValueError(f"Candidate {number} has the task {row['task']!r}, which `criteria` does not have.")
        reason = wrong_vote(_trial_vote(row, criteria[0]), tuple(criteria), checked)
        if reason is not None:
            raise ValueError(f"Candidate {number} cannot be voted on: {reason.replace('image_0', 'candidate')}.")
    units = _units(rows, settings)
    known = _checked_calibration(calibration or {}, units, settings)

    table = datasets.Dataset.from_list(rows, features=CANDIDATE_FEATURES).with_format("arrow")[:]
    with whole_file(folder / "candidates.parquet") as partial:
        # pictures of a condition are those of all its candidates; a dictionary stores them once
        pq.write_table(table, partial, compression="zstd", dictionary_pagesize_limit=2**26)
    if known:
        with whole_file(folder / "calibration.csv") as partial:
            lines = ["pair_id,criterion,label_0", *(f"{pair},{name},{label}" for (pair, name), label in known.items())]
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "study.json", asdict(settings))


def rows_of_many_cases(rows: datasets.Dataset, number: int, seed: int = 0) -> datasets.Dataset:
    """
    Rows for a study, by chance, but of as many cases as there are: answers on one case resemble each other.

    Args:
        rows (`datasets.Dataset`):
            Rows in the row schema.
        number (`int`):
            Rows wanted.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw.

    Returns:
        `datasets.Dataset`: `number` of them, in their order.

    Raises:
        `ValueError`: when there are not so many.
    """
    if not 1 <= number <= len(rows):
        raise ValueError(f"`number` is {number}; expected 1 to {len(rows)}, which is how many rows there are.")
    cases, taken, round_of = rows["case_id"], Counter(), {}
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        round_of[index] = taken[cases[index]]
        taken[cases[index]] += 1
    # all first rows of a case, by chance, then all second ones
    return rows.select(sorted(sorted(round_of, key=round_of.get)[:number]))


def real_candidates(rows: datasets.Dataset) -> datasets.Dataset:
    """
    The targets of rows as candidates of the model `"real"`.

    Args:
        rows (`datasets.Dataset`):
            Rows in the row schema, each with a `target`.

    Returns:
        `datasets.Dataset`: rows of `CANDIDATE_FEATURES`. Outside the mask they are equal to the source.

    Raises:
        `ValueError`: when a row has no target.
    """
    table = []
    for number, row in enumerate(rows):
        if row["target"] is None:
            raise ValueError(f"Row {number} has no `target`, the real image; expected one with mode 'turing'.")
        source, target, mask = (np.asarray(row[name]) for name in ("image", "target", "mask"))
        inside = (mask > 0) if source.ndim == 2 else (mask > 0)[..., None]
        encoded = {name: to_png(row[name]) if row[name] is not None else None for name in _PICTURES[:4]}
        own = {"condition": "", "candidate": to_png(np.where(inside, target, source)), "model": REAL, "seed": 0}
        table.append({**row, **encoded, **own})
    return datasets.Dataset.from_list(table, features=CANDIDATE_FEATURES)


def _checked_calibration(calibration, units, settings) -> dict[tuple[str, str], int]:
    task_of = {unit.unit_id: unit.task for unit in units}
    known = {}
    for (pair, criterion), label in calibration.items():
        fits = settings.mode == "pairs" and pair in task_of and criterion in settings.criteria[task_of[pair]]
        if not fits or label not in (0, 1):
            raise ValueError(
                f"`calibration` holds ({pair!r}, {criterion!r}): {label}; expected a pair of this study, which must "
                "be of mode 'pairs', a criterion of its task, and 1 or 0. `study_units` tells the pairs."
            )
        known[pair, criterion] = int(label)
    return known


def _clean(candidates: datasets.Dataset) -> list[dict]:
    """Encoded rows whose pictures are written anew, so that equal pixels are equal files; conditions likewise."""
    missing = [column for column in CANDIDATE_FEATURES if column not in candidates.column_names]
    if missing or len(candidates) == 0:
        raise ValueError(
            f"`candidates` has {len(candidates)} rows and lacks the column(s) {missing}; expected at least one row of "
            "`CANDIDATE_FEATURES`."
        )
    candidates = candidates.select_columns(list(CANDIDATE_FEATURES))
    for column in _PICTURES:
        candidates = candidates.cast_column(column, datasets.Image(decode=False))
    bare: dict[bytes, dict] = {}
    rows = []
    for row in candidates:
        for column in _PICTURES:
            if row[column] is None:
                continue
            content = row[column]["bytes"] or Path(row[column]["path"]).read_bytes()
            if content not in bare:
                bare[content] = to_png(Image.open(io.BytesIO(content)))
            row[column] = bare[content]
        shown = [row[column]["bytes"] for column in ("image", "mask", "label_map") if row[column]]
        row["condition"] = content_id(row["case_id"], row["task"], row["prompt"], *shown)
        rows.append(row)
    return rows


def _units(rows: list[dict], settings: StudySettings) -> list[Unit]:
    one_model = len({row["model"] for row in rows}) == 1
    conditions: dict[str, dict[bytes, int]] = {}
    for number, row in enumerate(rows):
        conditions.setdefault(row["condition"], {}).setdefault(row["candidate"]["bytes"], number)
    units = []
    for condition, different in conditions.items():
        images = list(different.values())
        if settings.mode == "pairs":
            models = [rows[number]["model"] for number in images]
            pairs = combinations(range(len(images)), 2)
            groups = [(images[i], images[j]) for i, j in pairs if one_model or models[i] != models[j]]
        elif settings.mode == "best_worst":
            size = settings.images_per_set
            # by chance, and the same with every version of every library
            chance = {n: content_id(str(settings.seed), rows[n]["candidate"]["bytes"]) for n in images}
            mixed = sorted(images, key=chance.get)
            groups = [sorted(mixed[start : start + size]) for start in range(0, len(mixed) - size + 1, size)]
        else:
            groups = [(number,) for number in images]
        for group in groups:
            unit_id = content_id(condition, *(rows[number]["candidate"]["bytes"] for number in group))
            units.append(Unit(unit_id, condition, rows[group[0]]["task"], tuple(group)))
    if not units:
        raise ValueError(
            f"There is nothing to ask about the {len(rows)} candidates with mode {settings.mode!r}. Expected for a "
            f"condition two different images of different models, or {settings.images_per_set} (`images_per_set`) "
            "images with mode 'best_worst'."
        )
    return units


def _trial_vote(row: dict, criterion: str) -> dict:
    own = {name: row[name] for name in ("prompt", "task", "image", "mask", "label_map", "case_id")}
    fixed = {"kind": "rating", "rating": 0.0, "rating_min": 0.0, "rating_max": 1.0, "image_0": row["candidate"]}
    fixed |= dict.fromkeys(("vote_id", "pair_id", "rater", "rater_role", "created_at"), "trial")
    return {
        **dict.fromkeys(VOTE_FEATURES),
        **VOTE_DEFAULTS,
        **own,
        **fixed,
        "criterion": criterion,
        "model_0": row["model"],
        "seed_0": row["seed"],
        "schema_version": VOTE_SCHEMA_VERSION,
    }


class _StudyFile(DurableFile):
    """Who takes part, and which questions were put. What was answered is told by the votes alone."""

    application_id = 0x4F6E5374  # "OnSt"
    version = 1
    kind = "file of a study"
    remedy = "Delete it and its companions `-wal` and `-shm`: what was answered is told by the votes."
    tables = {
        "rater": "CREATE TABLE IF NOT EXISTS rater (rater TEXT PRIMARY KEY NOT NULL, role TEXT NOT NULL, "
        "consent_at TEXT NOT NULL)",
        # `turn`: of the open items of a rater, the one with the highest is on
        "item": "CREATE TABLE IF NOT EXISTS item (item_id TEXT PRIMARY KEY NOT NULL, rater TEXT NOT NULL, "
        "unit_id TEXT NOT NULL, occasion INTEGER NOT NULL, turn INTEGER NOT NULL, created_at TEXT NOT NULL, "
        "skipped_at TEXT, skip_reason TEXT, UNIQUE (rater, unit_id, occasion))",
        # the last row counts; without one, the settings do
        "closing": "CREATE TABLE IF NOT EXISTS closing (number INTEGER PRIMARY KEY, closed INTEGER NOT NULL, "
        "set_at TEXT NOT NULL)",
    }

    def query(self, query: str, *values) -> list[tuple]:
        return self._run(lambda connection: connection.execute(query, values).fetchall(), write=False)

    def write(self, work):
        return self._run(work, write=True)


class _Answers:
    """The answers of one rater: their votes by (number of the unit, occasion, criterion), oldest first."""

    def __init__(self, votes: list[dict], number_of: dict[str, int]):
        self.votes: dict[tuple[int, int, str], list[dict]] = {}
        self.attempts: dict[tuple[int, int, str], int] = {}
        self.times: dict[str, str] = {}
        for vote in votes:
            if vote["pair_id"] not in number_of:  # of another study
                continue
            code = vote["set_id"] or vote["vote_id"]
            match = _CODE.fullmatch(code)
            occasion, attempt = map(int, match.groups()) if match else (0, 0)
            key = (number_of[vote["pair_id"]], occasion, vote["criterion"])
            self.times[code] = vote["created_at"]
            self.attempts[key] = max(self.attempts.get(key, 0), attempt + 1)
            if not vote["retracted"]:
                self.votes.setdefault(key, []).append(vote)

    def __len__(self) -> int:
        return len(self.votes)


class Study:
    r"""
    A study that many raters answer at once, from threads and processes.

    An answer is on the disk, as votes in a [`VoteStore`], before [`~Study.answer`] returns. Which questions were put
    is kept in `study.sqlite`; if that file is lost, raters go on where their votes say they are. The folder of the
    study itself is only read.

    Args:
        folder (`str` or `os.PathLike`):
            Folder that [`make_study`] wrote.
        salt (`str` or `bytes`):
            Secret of at least 16 bytes that pseudonyms, sides, order and item ids depend on; see [`rater_id`]. The
            same one for all processes and restarts, kept apart from the votes.
        state (`str` or `os.PathLike`, *optional*):
            Folder for what comes in, on a local disk. By default that of the study.
        votes (`str` or `os.PathLike`, *optional*):
            File of the [`VoteStore`], which is `study.votes`. By default `votes.sqlite` in the folder `state`.
        information (`np.ndarray` of shape `(units,)`, *optional*):
            What an answer to each of `study.units` tells, see [`vote_information`]. Random when not given.

    Raises:
        `ValueError`: when the folder holds no study, the salt is too short, `information` has another shape, or a file
            is damaged.

    Example:

    ```python
    >>> study = Study("runs/study", salt=os.environ["STUDY_SALT"])
    >>> rater = study.join("Dr. A. Example", "radiologist", consent=True)
    >>> item = study.next_item(rater)
    >>> study.answer(rater, item.item_id, item.criteria[0], "left").remaining
    ['realism', 'clinical_relevance']
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        salt: str | bytes,
        *,
        state: str | os.PathLike | None = None,
        votes: str | os.PathLike | None = None,
        information: np.ndarray | None = None,
    ):
        self.folder = Path(folder)
        if not (self.folder / "study.json").is_file():
            raise ValueError(f"`folder` is {str(folder)!r}, which holds no study.json. Make it with `make_study`.")
        rater_id("anybody", salt)  # says what is wrong with the salt
        self._salt = salt.encode() if isinstance(salt, str) else salt
        self._state = self.folder if state is None else Path(state)
        self._settings = _read_settings(self.folder / "study.json")
        settings = self._settings
        self._rows = pq.read_table(self.folder / "candidates.parquet").to_pylist()
        same: dict[bytes, bytes] = {}  # each picture once in memory, although all candidates of a condition have it
        for row in self._rows:
            for column in _PICTURES:
                if row[column] is not None:
                    content = row[column]["bytes"]
                    row[column] = {"bytes": same.setdefault(content, content), "path": None}
        self.units = _units(self._rows, settings)
        self._unit_number = {unit.unit_id: number for number, unit in enumerate(self.units)}
        self._places: list[dict[str, tuple[int, ...]]] = []  # of each unit, `pair_id` to places of its images
        for unit in self.units:
            groups = [(0,)] if settings.mode == "turing" else list(combinations(range(len(unit.rows)), 2))
            self._places.append({self._pair_id(unit, group): group for group in groups})
        self._number_of = {pair: number for number, pairs in enumerate(self._places) for pair in pairs}
        self._information = None if information is None else np.asarray(information, dtype=float)
        if self._information is not None and self._information.shape != (len(self.units),):
            raise ValueError(
                f"`information` has shape {self._information.shape}; expected ({len(self.units)},), one number for "
                "each of `study.units`."
            )
        self._known = {}
        if (self.folder / "calibration.csv").is_file():
            from onereward.preferences.preference_report import read_known  # it brings matplotlib

            self._known = read_known(self.folder / "calibration.csv")
        self._calibration = {self._number_of[pair] for pair, _ in self._known if pair in self._number_of}
        criteria = tuple(dict.fromkeys(name for names in settings.criteria.values() for name in names))
        self.votes = VoteStore(self._state / "votes.sqlite" if votes is None else votes, criteria)
        self._file = _StudyFile(self._state / "study.sqlite")
        self._answering: dict[str, threading.Lock] = defaultdict(threading.Lock)  # one for each rater

    # ------------------------------------------------------------------------------------------------- who takes part

    def join(self, name: str, role: str, consent: bool) -> str:
        """
        Take part. Role and consent are asked for once: of who took part before, they are kept as they were.

        Args:
            name (`str`):
                Name or account. It is not stored.
            role (`str`):
                One of the roles in the settings.
            consent (`bool`):
                Whether the rater agreed to the consent text.

        Returns:
            `str`: the rater's pseudonym, which the other methods take.

        Raises:
            `StudyError`: without a name, consent or role; or when the study is closed to who is new.
        """
        rater = self._pseudonym(name)
        if self._file.query("SELECT 1 FROM rater WHERE rater = ?", rater):
            return rater
        votes = self.votes.history(rater)
        if votes:  # the file of the study was lost
            role, consent_at = votes[0]["rater_role"], votes[0]["created_at"]
        else:
            settings, consent_at = self._open_settings(), _now()
            if consent is not True:
                raise StudyError("Please read the consent text and agree to it first.")
            if not isinstance(role, str) or role not in settings.roles:
                raise StudyError(f"Please choose your role: {', '.join(settings.roles)}.")
        values = (rater, role, consent_at)
        self._file.write(lambda connection: connection.execute("INSERT OR IGNORE INTO rater VALUES (?, ?, ?)", values))
        return rater

    def rater(self, name: str) -> str:
        """The pseudonym of who has joined under this name; a [`StudyError`] where nobody has."""
        rater = self._pseudonym(name)
        self._role(rater)
        return rater

    def role_of(self, rater: str) -> str | None:
        """The role of a rater; `None` for who has not joined."""
        if not isinstance(rater, str) or not re.fullmatch("[0-9a-f]{16}", rater):
            return None
        found = self._file.query("SELECT role FROM rater WHERE rater = ?", rater)
        if found:
            return found[0][0]
        votes = self.votes.history(rater)
        return votes[0]["rater_role"] if votes else None

    def is_organiser(self, name: str) -> bool:
        """Whether the name or account is that of an organiser."""
        return isinstance(name, str) and _spelt(name) in {_spelt(other) for other in self.settings.organisers}

    # --------------------------------------------------------------------------------------------- questions, answers

    def next_item(self, rater: str) -> Item | None:
        """
        The question that this rater is at: the one that is open, else a new one.

        Args:
            rater (`str`):
                The pseudonym.

        Returns:
            `Item` or `None`: `None` when all is answered.

        Raises:
            `StudyError`: when the study is closed or the rater has not joined.
        """
        settings = self._open_settings()
        self._role(rater)
        while True:
            answers = self._answers(rater)
            items = self._file.query(
                "SELECT unit_id, occasion, skipped_at FROM item WHERE rater = ? ORDER BY turn DESC", rater
            )
            put = {(self._unit_number.get(unit), occasion): skipped for unit, occasion, skipped in items}
            begun = dict.fromkeys((number, occasion) for number, occasion, _ in answers.votes)
            lost = [place for place in begun if place not in put]
            waiting = [place for place, skipped in put.items() if place[0] is not None and not skipped] + lost
            opened = next((place for place in waiting if self._remaining(*place, answers)), None)
            if opened is None:
                opened = self._draw(rater, settings, answers, put)
                if opened is None:
                    return None
                new = opened
            else:
                new = opened if opened in lost else None
            if new is None or self._put(rater, *new, len(items)):
                return self._item(rater, *opened, answers, settings)

    def answer(
        self,
        rater: str,
        item_id: str,
        criterion: str,
        answer: str | dict,
        *,
        comment: str | None = None,
        seconds: float | None = None,
    ) -> Receipt:
        """
        Answer one criterion of an item. When this returns, the answer is on the disk. The same call again, as after a
        lost reply, is acknowledged again and stored once.

        Args:
            rater (`str`):
                The pseudonym.
            item_id (`str`):
                The item.
            criterion (`str`):
                One of its criteria.
            answer (`str` or `dict`):
                With mode `"pairs"` one of `"left"`, `"right"`, `"tie"` and `"both_unacceptable"`; with `"turing"` one
                of `"real"` and `"synthetic"`; with `"best_worst"` `{"best": i, "worst": j}`, numbers of images in the
                order shown, from 0, or `"no_difference"`, which is kept as a tie of all pairs.
            comment (`str`, *optional*):
                Remark of the rater, of at most 500 characters.
            seconds (`float`, *optional*):
                Time to answer.

        Returns:
            `Receipt`: what was stored, and what remains.

        Raises:
            `StudyError`: when the item is not this rater's, was skipped, or has another answer already; the study is
                closed; the rater is too fast; or an argument is not as it should be. Nothing is stored.
            `TimeoutError`, `OSError`: as [`VoteStore.add`]. Nothing is stored.
        """
        role = self._role(rater)
        settings = self.settings
        number, occasion, skipped = self._find(rater, item_id)
        unit = self.units[number]
        criteria = settings.criteria[unit.task]
        if not isinstance(criterion, str) or criterion not in criteria:
            raise StudyError(f"This image is judged by {', '.join(criteria)}; there is no such criterion.")
        order = self._order(rater, unit, occasion)
        answer = _checked_answer(answer, settings.mode, len(order))
        comment, seconds = _checked_comment(comment), _checked_seconds(seconds)
        key = (number, occasion, criterion)
        with self._answering[rater]:
            answers = self._answers(rater)
            if key not in answers.votes:
                if settings.closed:
                    raise StudyError("The study is closed. Thank you for taking part.")
                if skipped:
                    raise StudyError("You have skipped this one. Please load the next.")
                self._must_not_hurry(rater, answers, settings)
                about = {"rater": rater, "rater_role": role, "comment": comment, "seconds": seconds}
                attempt = answers.attempts.get(key, 0)
                votes = self._votes(number, occasion, criterion, answer, order, attempt, about, settings)
                try:
                    self.votes.add_many(votes)
                    answers.votes[key] = votes
                except ValueError:
                    answers = self._answers(rater)
                    if key not in answers.votes:  # else another process was faster
                        raise
        stored = answers.votes[key]
        if self._answer_of(number, order, stored, settings.mode) != answer:
            raise StudyError("You have answered this already. Undo your last answer first to change it.")
        return Receipt(
            vote_ids=[vote["vote_id"] for vote in stored],
            remaining=self._remaining(number, occasion, answers),
            answered=len(answers),
            goal=settings.goal,
            comment_warning=phi_warning(comment),
        )

    def undo(self, rater: str) -> tuple[str, str]:
        """
        Take back the last answer of a rater. Its item is open again, and comes next.

        Args:
            rater (`str`):
                The pseudonym.

        Returns:
            `tuple[str, str]`: the item and the criterion.

        Raises:
            `StudyError`: when there is none, it is too old, its votes have been published, or the study is closed.
        """
        settings = self._open_settings()
        self._role(rater)
        with self._answering[rater]:
            answers = self._answers(rater)
            if not answers.votes:
                raise StudyError("There is no answer of yours to undo.")
            key, votes = list(answers.votes.items())[-1]
            oldest = _now(-settings.undo_seconds)
            if votes[0]["created_at"] < oldest:
                raise StudyError(f"Answers can be taken back for {settings.undo_seconds / 60:g} minutes only.")
            try:
                self.votes.retract([vote["vote_id"] for vote in votes])
            except ValueError as error:
                raise StudyError("Your last answer has been stored for good and cannot be undone.") from error
            number, occasion, criterion = key
            item_id = self._item_id(rater, self.units[number], occasion)

            def reopen(connection):
                self._insert(connection, rater, number, occasion)
                connection.execute(
                    "UPDATE item SET skipped_at = NULL, skip_reason = NULL, turn = "
                    "(SELECT max(turn) + 1 FROM item WHERE rater = ?) WHERE item_id = ?",
                    (rater, item_id),
                )

            self._file.write(reopen)
        return item_id, criterion

    def skip(self, rater: str, item_id: str, reason: str) -> None:
        """
        Leave an item out. It does not come again; what was answered of it stays.

        Args:
            rater (`str`):
                The pseudonym.
            item_id (`str`):
                The item.
            reason (`str`):
                Why, in at most 500 characters.

        Raises:
            `StudyError`: when the item is not this rater's or is answered, there is no reason, the rater is too fast,
                or the study is closed.
        """
        settings = self._open_settings()
        self._role(rater)
        number, occasion, skipped = self._find(rater, item_id)
        reason = _checked_comment(reason)
        if not reason:
            raise StudyError("Please say why you skip this one.")
        with self._answering[rater]:
            answers = self._answers(rater)
            if skipped:
                return
            if not self._remaining(number, occasion, answers):
                raise StudyError("You have answered this already.")
            self._must_not_hurry(rater, answers, settings)

            def mark(connection):
                self._insert(connection, rater, number, occasion)
                connection.execute(
                    "UPDATE item SET skipped_at = ?, skip_reason = ? WHERE item_id = ?", (_now(), reason, item_id)
                )

            self._file.write(mark)

    def progress(self, rater: str) -> dict[str, int]:
        """
        How far a rater is.

        Args:
            rater (`str`):
                The pseudonym.

        Returns:
            `dict[str, int]`: `answered` (answers given), `goal` (answers wanted) and `skipped` (items left out).

        Raises:
            `StudyError`: when the rater has not joined.
        """
        self._role(rater)
        skipped = self._file.query("SELECT count(*) FROM item WHERE rater = ? AND skipped_at IS NOT NULL", rater)
        return {"answered": len(self._answers(rater)), "goal": self.settings.goal, "skipped": skipped[0][0]}

    # -------------------------------------------------------------------------------------------------- for organisers

    @property
    def settings(self) -> StudySettings:
        """The settings, with `closed` as it is now: another process may have closed the study."""
        closing = self._file.query("SELECT closed FROM closing ORDER BY number DESC LIMIT 1")
        return replace(self._settings, closed=bool(closing[0][0])) if closing else self._settings

    def close(self) -> None:
        """Take no more answers. What was answered before is still acknowledged when it is sent again."""
        self._set_closed(True)

    def reopen(self) -> None:
        """Take answers again."""
        self._set_closed(False)

    def _set_closed(self, closed: bool) -> None:
        values = (closed, _now())
        self._file.write(
            lambda connection: connection.execute("INSERT INTO closing (closed, set_at) VALUES (?, ?)", values)
        )

    def results(self, resamples: int = 1000) -> dict:
        """
        What was answered so far.

        Args:
            resamples (`int`, *optional*, defaults to 1000):
                Draws of each bootstrap interval.

        Returns:
            `dict`: fit for JSON. `votes` (rows without pictures, for the functions of
            [`~onereward.evaluation.reader_study`]), `summary` (what
            [`~onereward.preferences.preference_report.summarise_votes`] tells of them: agreement by criterion,
            readings of the raters, rankings with intervals; `None` before the first vote), `over_time` (a row for each
            day, with `day`, `votes` and `raters`) and `skipped` (a row for each reason, with `reason` and `items`).
        """
        from onereward.preferences.preference_report import summarise_votes  # it brings matplotlib

        votes = self.votes.votes(pictures=False)
        days: dict[str, list[str]] = {}
        for time, rater in zip(votes["created_at"], votes["rater"], strict=True):
            days.setdefault(time[:10], []).append(rater)
        reasons = self._file.query(
            "SELECT skip_reason, count(*) FROM item WHERE skipped_at IS NOT NULL GROUP BY skip_reason "
            "ORDER BY count(*) DESC, skip_reason"
        )
        return {
            "votes": votes.to_list(),
            "summary": _plain(summarise_votes(votes, known=self._known, resamples=resamples)) if len(votes) else None,
            "over_time": [
                {"day": day, "votes": len(raters), "raters": len(set(raters))} for day, raters in sorted(days.items())
            ],
            "skipped": [{"reason": reason, "items": number} for reason, number in reasons],
        }

    # ------------------------------------------------------------------------------------------------------ the inside

    def _open_settings(self) -> StudySettings:
        settings = self.settings
        if settings.closed:
            raise StudyError("The study is closed. Thank you for taking part.")
        return settings

    def _role(self, rater: str) -> str:
        role = self.role_of(rater)
        if role is None:
            raise StudyError("Please give your name, role and consent first.")
        return role

    def _pseudonym(self, name: str) -> str:
        if not isinstance(name, str) or not name.strip():
            raise StudyError("Please give a name.")
        try:
            return rater_id(name, self._salt)
        except ValueError as error:  # half characters
            raise StudyError("Please give a name in plain text.") from error

    def _secret(self, *parts: str | int) -> bytes:
        """Chance that nobody without the salt can foretell, and that is the same at all times and in all processes."""
        text = "\x1f".join(map(str, parts))
        return hmac.digest(self._salt, text.encode(errors="surrogatepass"), "sha256")

    def _item_id(self, rater: str, unit: Unit, occasion: int) -> str:
        return self._secret("item", rater, unit.unit_id, occasion).hex()[:32]

    def _order(self, rater: str, unit: Unit, occasion: int) -> list[int]:
        """Places of the images of a unit in the order in which they are shown."""
        places = range(len(unit.rows))
        return sorted(places, key=lambda place: self._secret("order", rater, unit.unit_id, occasion, place))

    def _pair_id(self, unit: Unit, places: Iterable[int]) -> str:
        return content_id(unit.condition, *(self._rows[unit.rows[place]]["candidate"]["bytes"] for place in places))

    def _answers(self, rater: str) -> _Answers:
        return _Answers(self.votes.history(rater), self._number_of)

    def _remaining(self, number: int, occasion: int, answers: _Answers) -> list[str]:
        criteria = self._settings.criteria[self.units[number].task]
        return [criterion for criterion in criteria if (number, occasion, criterion) not in answers.votes]

    def _find(self, rater: str, item_id: str) -> tuple[int, int, str | None]:
        """Number of the unit, occasion and time of skipping of an item of this rater."""
        found = []
        if isinstance(item_id, str) and re.fullmatch("[0-9a-f]{32}", item_id):
            found = self._file.query(
                "SELECT unit_id, occasion, skipped_at FROM item WHERE item_id = ? AND rater = ?", item_id, rater
            )
            found = [(self._unit_number.get(unit), *rest) for unit, *rest in found]
            if not found:  # only we can make such an id; the file in which it was noted may have been lost
                places = ((number, occasion) for number in range(len(self.units)) for occasion in (0, 1))
                found = [(*p, None) for p in places if self._item_id(rater, self.units[p[0]], p[1]) == item_id]
        if not found or found[0][0] is None:
            raise StudyError("This is not a question of yours. Please load the next one.")
        return found[0]

    def _must_not_hurry(self, rater: str, answers: _Answers, settings: StudySettings) -> None:
        since = _now(-60)
        recent = sum(time > since for time in answers.times.values())
        recent += self._file.query("SELECT count(*) FROM item WHERE rater = ? AND skipped_at > ?", rater, since)[0][0]
        if recent >= settings.answers_per_minute:
            raise StudyError(
                f"That was faster than {settings.answers_per_minute} answers a minute. Please wait a moment, then "
                "send it again."
            )

    def _insert(self, connection: sqlite3.Connection, rater: str, number: int, occasion: int) -> None:
        unit = self.units[number]
        (turn,) = connection.execute(
            "SELECT coalesce(max(turn), 0) + 1 FROM item WHERE rater = ?", (rater,)
        ).fetchone()
        connection.execute(
            "INSERT OR IGNORE INTO item VALUES (?, ?, ?, ?, ?, ?, NULL, NULL)",
            (self._item_id(rater, unit, occasion), rater, unit.unit_id, occasion, turn, _now()),
        )

    def _put(self, rater: str, number: int, occasion: int, seen: int) -> bool:
        """Note a new item, unless another call put one to this rater since `seen` items were there."""

        def put(connection):
            (items,) = connection.execute("SELECT count(*) FROM item WHERE rater = ?", (rater,)).fetchone()
            if items == seen:
                self._insert(connection, rater, number, occasion)
            return items == seen

        return self._file.write(put)

    def _draw(self, rater: str, settings: StudySettings, answers: _Answers, put: dict) -> tuple[int, int] | None:
        """Number of the unit and occasion of the next question of a rater."""
        # the same for all processes, and nothing that a rater could know
        rng = np.random.default_rng(int.from_bytes(self._secret("draw", settings.seed, rater, len(put))[:16]))
        asked = Counter(number for number, _ in put.keys() | {key[:2] for key in answers.votes} if number is not None)
        finished = dict.fromkeys(
            number
            for number, occasion, _ in answers.votes
            if occasion == 0 and asked[number] == 1 and not self._remaining(number, 0, answers)
        )
        repeatable = [number for number in finished if not put.get((number, 0)) and number not in self._calibration]
        known = [number for number in sorted(self._calibration) if number not in asked]
        if known and rng.random() < settings.calibration_share:
            return known[rng.integers(len(known))], 0

        closed = (asked.keys() - set(repeatable)) | self._calibration | self._not_for(rater, settings)
        information = rng.random(len(self.units)) if self._information is None else self._information
        questions = next_questions(
            information[:, None],
            criteria=("",),
            tasks=[unit.task for unit in self.units],
            images=[unit.rows for unit in self.units],
            # what is given twice has been repeated, and does not come again
            answered=[(number, "") for number in repeatable] + 2 * [(number, "") for number in sorted(closed)],
            count=1,
            rng=rng,
            all_votes=[(number, "") for _, number in self._judged()],
            repeat_share=settings.repeat_share,
            random_share=settings.random_share,
        )
        if questions:
            return questions[0].pair, int(questions[0].is_repeat)
        return (known[rng.integers(len(known))], 0) if known else None

    def _judged(self) -> set[tuple[str, int]]:
        numbers = ((rater, self._number_of.get(pair)) for rater, pair in self.votes.judged())
        return {(rater, number) for rater, number in numbers if number is not None}

    def _not_for(self, rater: str, settings: StudySettings) -> set[int]:
        """Asked whether an image is real, a rater sees one of each condition; a coin says of which kind."""
        if settings.mode != "turing":
            return set()
        conditions: dict[str, tuple[list[int], list[int]]] = {}
        for number, unit in enumerate(self.units):
            real = self._rows[unit.rows[0]]["model"] == REAL
            conditions.setdefault(unit.condition, ([], []))[real].append(number)
        shown = set()
        for condition, kinds in conditions.items():
            chance = self._secret("real", rater, condition)
            kind = kinds[chance[0] % 2] or kinds[1 - chance[0] % 2]
            shown.add(kind[int.from_bytes(chance[1:9]) % len(kind)])
        return set(range(len(self.units))) - shown

    def _item(self, rater: str, number: int, occasion: int, answers: _Answers, settings: StudySettings) -> Item:
        unit = self.units[number]
        order = self._order(rater, unit, occasion)
        row = self._rows[unit.rows[0]]
        shown = {
            column: None if settings.mode == "turing" or row[column] is None else row[column]["bytes"]
            for column in ("image", "mask", "label_map")
        }
        criteria = list(settings.criteria[unit.task])
        return Item(
            item_id=self._item_id(rater, unit, occasion),
            mode=settings.mode,
            task=unit.task,
            prompt=row["prompt"],
            images=[self._rows[unit.rows[place]]["candidate"]["bytes"] for place in order],
            source=shown["image"],
            mask=shown["mask"],
            label_map=shown["label_map"],
            criteria=criteria,
            answered={
                criterion: self._answer_of(number, order, answers.votes[number, occasion, criterion], settings.mode)
                for criterion in criteria
                if (number, occasion, criterion) in answers.votes
            },
            window=settings.window,
        )

    def _votes(self, number, occasion, criterion, answer, order, attempt, about, settings) -> list[dict]:
        """An answer as rows of `VOTE_FEATURES`."""
        unit = self.units[number]
        images = [self._rows[row] for row in unit.rows]
        code = f"{content_id(about['rater'], unit.unit_id, criterion)}-{occasion}-{attempt}"
        shared = {name: images[0][name] for name in ("prompt", "task", "image", "mask", "label_map", "case_id")}
        shared |= {**about, "criterion": criterion, "created_at": _now()}
        shared |= dict(zip(("window_center", "window_width"), settings.window or (None, None), strict=True))
        if isinstance(answer, dict):
            return best_worst_votes(
                [image["candidate"] for image in images],
                best=order[answer["best"]],
                worst=order[answer["worst"]],
                models=[image["model"] for image in images],
                seeds=[image["seed"] for image in images],
                set_id=code,
                **shared,
            )
        empty = dict.fromkeys(("image_1", "model_1", "seed_1", "label_0", "label_1"))
        votes = []
        for pair_id, places in self._places[number].items():
            vote = {**shared, **empty, "vote_id": code, "pair_id": pair_id}
            for side, place in enumerate(places):
                image = images[place]
                own = {"image": image["candidate"], "model": image["model"], "seed": image["seed"]}
                vote |= {f"{name}_{side}": value for name, value in own.items()}
            if settings.mode == "turing":
                vote |= {"kind": "rating", "rating": float(answer == REAL), "rating_min": 0.0, "rating_max": 1.0}
            elif settings.mode == "best_worst":  # no difference
                vote |= {"vote_id": content_id(code, pair_id, criterion, about["rater"]), "set_id": code}
                vote |= {"label_0": 0.5, "label_1": 0.5}
            else:
                won = {"left": order[0], "right": order[1]}.get(answer)
                label = 0.5 if won is None else 1.0 - won
                vote |= {"label_0": label, "label_1": 1 - label, "left": order[0]}
                vote |= {"both_unacceptable": answer == "both_unacceptable"}
            votes.append(vote)
        return votes

    def _answer_of(self, number: int, order: list[int], votes: list[dict], mode: str) -> str | dict:
        """The answer that became these votes."""
        first = votes[0]
        if mode == "turing":
            return TURING_ANSWERS[0 if first["rating"] == 1 else 1]
        if mode == "pairs":
            if first["both_unacceptable"] or first["label_0"] == 0.5:
                return "both_unacceptable" if first["both_unacceptable"] else "tie"
            won = 0 if first["label_0"] == 1 else 1
            return "left" if won == first["left"] else "right"
        wins: Counter = Counter()
        for vote in votes:
            if vote["label_0"] != 0.5:
                places = self._places[number][vote["pair_id"]]
                wins[places[0 if vote["label_0"] == 1 else 1]] += 1
                wins[places[1 if vote["label_0"] == 1 else 0]] += 0
        if not wins:
            return NO_DIFFERENCE
        # the best one wins against all others; the worst one wins never
        best, worst = max(wins, key=wins.get), min(wins, key=wins.get)
        return {"best": order.index(best), "worst": order.index(worst)}


def _now(later: float = 0.0) -> str:
    """The time, so many seconds later, as text that sorts as times do."""
    return (datetime.now(UTC) + timedelta(seconds=later)).isoformat(timespec="microseconds")


def _spelt(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _plain(value):
    """A value as JSON has them: no dataclass, array or tuple, and nothing in the place of what is not a number."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_settings(path: Path) -> StudySettings:
    known = {field.name for field in fields(StudySettings)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a readable JSON file: {error}.") from error
    unknown = sorted(set(values) - known) if isinstance(values, dict) else [values]
    if unknown:
        raise ValueError(f"{str(path)!r} has the unknown setting(s) {unknown}; expected some of {sorted(known)}.")
    return StudySettings(**values)


def _checked_answer(answer, mode: str, images: int) -> str | dict:
    if mode == "best_worst":
        if answer == NO_DIFFERENCE:
            return answer
        places = [answer.get("best"), answer.get("worst")] if isinstance(answer, dict) and len(answer) == 2 else []
        whole = all(isinstance(place, int) and not isinstance(place, bool) for place in places)
        if not places or not whole or len(set(places)) < 2 or not all(0 <= place < images for place in places):
            raise StudyError(f"Please choose the best and the worst of the {images} images, or no difference.")
        return {"best": places[0], "worst": places[1]}
    wanted = PAIR_ANSWERS if mode == "pairs" else TURING_ANSWERS
    if not isinstance(answer, str) or answer not in wanted:
        raise StudyError(f"Please answer with one of: {', '.join(wanted)}.")
    return answer


def _checked_comment(comment) -> str | None:
    if comment is None:
        return None
    if not isinstance(comment, str) or comment.encode(errors="ignore").decode() != comment:
        raise StudyError("Please write plain text.")
    comment = comment.strip()
    if len(comment) > MAX_COMMENT:
        raise StudyError(f"The text has {len(comment)} characters; please keep to {MAX_COMMENT}.")
    return comment or None


def _checked_seconds(seconds) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise StudyError("The time to answer must be a number of seconds.")
    return float(seconds)
