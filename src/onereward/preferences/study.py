"""A study: who is asked what, in which order, and what was answered. Any user interface can be put before it."""

import hmac
import math
import os
import re
import sqlite3
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from onereward.preferences.active import next_questions
from onereward.preferences.schema import (
    MAX_COMMENT,
    best_worst_votes,
    content_id,
    phi_warning,
    rater_id,
)
from onereward.preferences.store import DurableFile, VoteStore
from onereward.preferences.study_design import (
    REAL,
    STUDY_PICTURES,
    StudySettings,
    Unit,
    read_settings,
    units_of,
)


PAIR_ANSWERS = ("left", "right", "tie", "both_unacceptable")

TURING_ANSWERS = ("real", "synthetic")

NO_DIFFERENCE = "no_difference"

# of a vote, or of the set it belongs to: which rater, unit and criterion, on which occasion, at which attempt
_CODE = re.compile(r"[0-9a-f]{16}-(\d+)-(\d+)")


class StudyError(ValueError):
    """What a person asked of a study and does not get, and why, in one line that can be shown to them."""


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
            `"fill"`, `"remove"` or `"extend"`. Empty with mode `"turing"`, where it would tell that something was
            painted; so is `prompt`.
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
        self._settings = read_settings(self.folder / "study.json")
        settings = self._settings
        self._rows = pq.read_table(self.folder / "candidates.parquet").to_pylist()
        same: dict[bytes, bytes] = {}  # each picture once in memory, although all candidates of a condition have it
        for row in self._rows:
            for column in STUDY_PICTURES:
                if row[column] is not None:
                    content = row[column]["bytes"]
                    row[column] = {"bytes": same.setdefault(content, content), "path": None}
        self.units = units_of(self._rows, settings)
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
            task="" if settings.mode == "turing" else unit.task,
            prompt="" if settings.mode == "turing" else row["prompt"],
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
