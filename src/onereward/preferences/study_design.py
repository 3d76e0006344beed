"""What a study is made of: its settings, the images that are judged, and what is asked about them."""

import io
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from onereward.data.whole_file import whole_file, write_json
from onereward.preferences.candidates import CANDIDATE_FEATURES
from onereward.preferences.schema import (
    CRITERIA,
    VOTE_DEFAULTS,
    VOTE_FEATURES,
    VOTE_SCHEMA_VERSION,
    content_id,
    to_png,
    wrong_vote,
)


MODES = ("pairs", "best_worst", "turing")

REAL = "real"  # the model of images that nobody made

STUDY_PICTURES = ("image", "mask", "label_map", "target", "candidate")


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
    return units_of(_clean(candidates), settings)


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
    units = units_of(rows, settings)
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
        encoded = {name: to_png(row[name]) if row[name] is not None else None for name in STUDY_PICTURES[:4]}
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
    for column in STUDY_PICTURES:
        candidates = candidates.cast_column(column, datasets.Image(decode=False))
    bare: dict[bytes, dict] = {}
    rows = []
    for row in candidates:
        for column in STUDY_PICTURES:
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


def units_of(rows: list[dict], settings: StudySettings) -> list[Unit]:
    """[`study_units`] of encoded rows whose equal pictures are equal files."""
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


def read_settings(path: Path) -> StudySettings:
    """The settings in a `study.json`; a `ValueError` says what is wrong with it."""
    known = {field.name for field in fields(StudySettings)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a readable JSON file: {error}.") from error
    unknown = sorted(set(values) - known) if isinstance(values, dict) else [values]
    if unknown:
        raise ValueError(f"{str(path)!r} has the unknown setting(s) {unknown}; expected some of {sorted(known)}.")
    return StudySettings(**values)
