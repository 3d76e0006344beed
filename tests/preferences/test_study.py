"""What a study promises: no answer is lost or doubled, nobody answers for another, and nobody sees who made what."""

import io
import itertools
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import binom

from onereward.evaluation.reader_study import turing_test
from onereward.preferences import (
    CANDIDATE_FEATURES,
    VOTE_FEATURES,
    Item,
    Study,
    StudyError,
    StudySettings,
    VoteStore,
    load_votes,
    make_study,
    rater_id,
    study,
    study_units,
)
from onereward.preferences.preference_report import read_known
from onereward.preferences.schema import encoded_rows, to_png


SALT = "a salt of 20 letters"
FAST = {"answers_per_minute": 100_000}


def make_candidates(conditions=3, models=("alpha", "beta", "gamma"), tasks=("fill", "remove"), size=16):
    """Random pictures: nothing in a pixel tells the model, but `model_of` finds it by the file."""
    rows = []
    for number in range(conditions):
        rng = np.random.default_rng(number)
        source = rng.integers(0, 256, (size, size), dtype=np.uint8)
        mask = np.zeros_like(source)
        mask[4:12, 4:12] = 255
        for seed, model in enumerate(models):
            candidate = source.copy()
            candidate[mask > 0] = rng.integers(0, 256, (mask > 0).sum())
            rows.append(
                {
                    "image": to_png(source),
                    "mask": to_png(mask),
                    "label_map": to_png(mask // 255) if number % 2 else None,
                    "target": None,
                    "prompt": f"prompt {number}",
                    "task": tasks[number % len(tasks)],
                    "modality": "t1n",
                    "case_id": f"secret-case-{number}",
                    "source": "phantom",
                    "condition": f"secret-condition-{number}",
                    "candidate": to_png(candidate),
                    "model": f"secret-{model}" if model != "real" else model,
                    "seed": 1_000_000 + seed,
                }
            )
    return datasets.Dataset.from_list(rows, features=CANDIDATE_FEATURES)


@pytest.fixture
def make(tmp_path):
    """`make(conditions=3, models=..., calibration=None, **settings)` -> the folder of a study."""
    names = itertools.count()

    def make(conditions=3, models=("alpha", "beta", "gamma"), calibration=None, tasks=("fill", "remove"), **settings):
        folder = tmp_path / f"study-{next(names)}"
        settings = StudySettings(**{**FAST, **settings})
        make_study(folder, make_candidates(conditions, models, tasks), settings, calibration)
        return folder

    return make


@pytest.fixture
def opened(make):
    return Study(make(), SALT)


def join(study, name="ann", role="resident"):
    return study.join(name, role, consent=True)


def answers_for(mode, images):
    if mode == "pairs":
        return ["left", "right", "tie", "both_unacceptable"]
    if mode == "turing":
        return ["real", "synthetic"]
    return ["no_difference", *({"best": i, "worst": j} for i, j in itertools.permutations(range(images), 2))]


def run_through(study, rater, number, answer="left"):
    """Answer so many items; which unit each was, and on which occasion."""
    seen = []
    for _ in range(number):
        item = study.next_item(rater)
        if item is None:
            break
        for criterion in item.criteria:
            study.answer(rater, item.item_id, criterion, answer)
        seen.append(item)
    return seen


def items_of(study):
    with sqlite3.connect(study.folder / "study.sqlite") as connection:
        return connection.execute("SELECT rater, unit_id, occasion FROM item ORDER BY turn").fetchall()


# ---------------------------------------------------------------------------------------------- what an answer becomes


@pytest.mark.parametrize("answer", ["left", "right", "tie", "both_unacceptable"])
def test_a_pair_becomes_one_vote_on_the_image_that_was_chosen(make, answer):
    opened = Study(make(window_center=40.0, window_width=400.0), SALT)
    rater = join(opened, role="radiologist")
    for _ in range(3):
        item = opened.next_item(rater)
        for criterion in item.criteria:
            receipt = opened.answer(rater, item.item_id, criterion, answer, comment=" why ", seconds=2.5)
            (vote,) = [v for v in encoded_rows(opened.votes.votes()) if v["vote_id"] in receipt.vote_ids]
            # the pictures say which image was where
            shown = [vote[f"image_{side}"]["bytes"] for side in (vote["left"], 1 - vote["left"])]
            assert shown == item.images
            chosen = {"left": item.images[0], "right": item.images[1]}.get(answer)
            won = {1.0: "image_0", 0.0: "image_1"}.get(vote["label_0"])
            assert (vote[won]["bytes"] if won else None) == chosen
            assert vote["label_1"] == 1 - vote["label_0"]
            assert vote["both_unacceptable"] == (answer == "both_unacceptable")
            wanted = {"criterion": criterion, "comment": "why", "seconds": 2.5, "rater": rater, "task": item.task}
            wanted |= {"rater_role": "radiologist", "window_center": 40.0, "window_width": 400.0, "kind": "pair"}
            assert {name: vote[name] for name in wanted} == wanted
            # and the candidates' table says what made each
            rows = {row["candidate"]["bytes"]: row for row in opened._rows}
            for side in (0, 1):
                made = rows[vote[f"image_{side}"]["bytes"]]
                assert (vote[f"model_{side}"], vote[f"seed_{side}"]) == (made["model"], made["seed"])
                assert vote["case_id"] == made["case_id"] and vote["mask"] == made["mask"]
    opened.votes.export(opened.folder / "votes.parquet")
    load_votes(opened.folder / "votes.parquet", criteria=None)


def test_best_and_worst_become_the_pairs_that_they_imply(make):
    opened = Study(make(2, models="abcde", mode="best_worst", images_per_set=4), SALT)
    assert len(opened.units) == 2  # one set of four of five, for each condition
    rater = join(opened)
    item = opened.next_item(rater)
    receipt = opened.answer(rater, item.item_id, "realism", {"best": 2, "worst": 0})
    votes = list(encoded_rows(opened.votes.votes()))
    assert len(votes) == len(receipt.vote_ids) == 5 and receipt.answered == 1
    assert len({vote["set_id"] for vote in votes}) == 1
    beaten = {
        tuple(vote[f"image_{side}"]["bytes"] for side in ((0, 1) if vote["label_0"] == 1 else (1, 0)))
        for vote in votes
    }
    worst, *middle, best = (item.images[i] for i in (0, 1, 3, 2))
    assert beaten == {(best, other) for other in [*middle, worst]} | {(other, worst) for other in middle}
    assert opened.next_item(rater).answered == {"realism": {"best": 2, "worst": 0}}
    criterion = next(name for name in item.criteria if name != "realism")
    receipt = opened.answer(rater, item.item_id, criterion, "no_difference")
    ties = [vote for vote in encoded_rows(opened.votes.votes()) if vote["vote_id"] in receipt.vote_ids]
    assert [vote["label_0"] for vote in ties] == [0.5] * 6


def test_real_and_synthetic_are_ratings_that_the_visual_turing_test_reads(make):
    opened = Study(make(40, models=("real", "alpha"), mode="turing", tasks=("fill",), repeat_share=0.0), SALT)
    rater = join(opened)
    real = {row["candidate"]["bytes"] for row in opened._rows if row["model"] == "real"}
    while (item := opened.next_item(rater)) is not None:
        assert item.source is item.mask is item.label_map is None
        assert item.task == item.prompt == ""  # what was asked for is of those that were painted
        opened.answer(rater, item.item_id, "realism", "real" if item.images[0] in real else "synthetic")
    shown = opened.votes.votes()["prompt"][:]
    assert len(set(shown)) == len(shown) == 40  # each condition once
    kinds = Counter(vote["model_0"] for vote in opened.votes.votes())
    assert kinds["real"] == pytest.approx(20, abs=12)  # 4 standard deviations of 40 coins
    found = turing_test(opened.results(resamples=100)["votes"])
    assert found.accuracy.value == 1.0


def test_the_columns_are_all_those_of_a_vote(opened):
    rater = join(opened)
    run_through(opened, rater, 1)
    assert opened.votes.votes().features == VOTE_FEATURES


# --------------------------------------------------------------------------------------------- sent again, and changed


@pytest.mark.parametrize("mode", ["pairs", "best_worst", "turing"])
def test_the_same_answer_is_acknowledged_again_and_another_is_refused(make, mode):
    folder = make(models=("alpha", "beta", "real"), mode=mode, images_per_set=3, tasks=("fill",))
    opened, other = Study(folder, SALT), Study(folder, SALT)
    rater = join(opened)
    item = opened.next_item(rater)
    choices = answers_for(mode, len(item.images))
    for criterion in item.criteria:
        for answer in choices:
            first = opened.answer(rater, item.item_id, criterion, answer, comment="first")
            number = len(opened.votes)
            for again in (opened, other):
                assert again.answer(rater, item.item_id, criterion, answer, comment="second") == first
                for different in choices:
                    if different != answer:
                        with pytest.raises(StudyError, match="answered this already"):
                            again.answer(rater, item.item_id, criterion, different)
            assert len(opened.votes) == number
            if answer != choices[-1]:
                assert opened.undo(rater) == (item.item_id, criterion)


def test_undo_opens_the_item_again_and_the_old_answer_stays_on_file(opened):
    rater = join(opened)
    first = run_through(opened, rater, 1)[0]
    second = opened.next_item(rater)
    assert second.item_id != first.item_id
    for criterion in reversed(first.criteria):
        assert opened.undo(rater) == (first.item_id, criterion)
    again = opened.next_item(rater)
    assert again == first  # nothing answered, same order
    with pytest.raises(StudyError, match="no answer of yours"):
        opened.undo(rater)
    assert len(opened.votes) == 0 and len(opened.votes.history(rater)) == len(first.criteria)
    run_through(opened, rater, 1, "right")
    assert opened.next_item(rater).item_id == second.item_id


def test_undo_ends_after_its_time_and_when_votes_are_published(make, monkeypatch):
    opened = Study(make(undo_seconds=600), SALT)
    rater = join(opened)
    item = opened.next_item(rater)
    vote = opened.answer(rater, item.item_id, item.criteria[0], "tie").vote_ids[0]
    opened.votes.freeze([vote])
    with pytest.raises(StudyError, match="for good"):
        opened.undo(rater)
    late = opened.answer(rater, item.item_id, item.criteria[1], "tie").vote_ids
    real = study._now
    monkeypatch.setattr(study, "_now", lambda later=0.0: real(later + 599))
    assert opened.undo(rater) == (item.item_id, item.criteria[1])
    monkeypatch.setattr(study, "_now", real)
    assert opened.answer(rater, item.item_id, item.criteria[1], "tie").vote_ids != late
    monkeypatch.setattr(study, "_now", lambda later=0.0: real(later + 601))
    with pytest.raises(StudyError, match="for 10 minutes only"):
        opened.undo(rater)


def test_skipped_items_do_not_come_again(opened):
    rater = join(opened)
    item = opened.next_item(rater)
    opened.answer(rater, item.item_id, item.criteria[0], "left")
    opened.skip(rater, item.item_id, "too dark")
    opened.skip(rater, item.item_id, "too dark")
    with pytest.raises(StudyError, match="skipped"):
        opened.answer(rater, item.item_id, item.criteria[1], "left")
    assert opened.progress(rater) == {"answered": 1, "goal": 100, "skipped": 1}
    assert item.item_id not in {seen.item_id for seen in run_through(opened, rater, 100)}
    assert opened.next_item(rater) is None
    assert opened.results(resamples=100)["skipped"] == [{"reason": "too dark", "items": 1}]
    with pytest.raises(StudyError, match="answered this already"):
        opened.skip(rater, items_by_id(opened, rater)[-1], "why not")
    with pytest.raises(StudyError, match="say why"):
        opened.skip(rater, item.item_id, "  ")


def items_by_id(opened, rater):
    with sqlite3.connect(opened.folder / "study.sqlite") as connection:
        query = "SELECT item_id FROM item WHERE rater = ? AND skipped_at IS NULL ORDER BY turn"
        return [row[0] for row in connection.execute(query, (rater,))]


# ---------------------------------------------------------------------------------------------------- random histories


@pytest.mark.parametrize("mode", ["pairs", "best_worst", "turing"])
@pytest.mark.parametrize("seed", range(3))
def test_any_history_leaves_what_a_dict_would_hold(make, mode, seed):
    """Answers, resends, changes, undos, skips, restarts, and losses of the study's file, at random."""
    chance = random.Random(seed)
    folder = make(4, ("alpha", "beta", "real"), mode=mode, images_per_set=3, repeat_share=0.3)
    opened = Study(folder, SALT)
    raters = [join(opened, name) for name in "ab"]
    model = {rater: {} for rater in raters}  # (item, criterion) -> answer, oldest first
    images = {}
    for _ in range(120):
        rater = chance.choice(raters)
        own = model[rater]
        what = chance.choices(
            ["answer", "resend", "change", "undo", "skip", "restart", "lose"], [9, 2, 1, 2, 1, 1, 1]
        )[0]
        if what == "answer" and (item := opened.next_item(rater)) is not None:
            images[item.item_id] = len(item.images)
            assert item.answered == {c: own[item.item_id, c] for c in item.criteria if (item.item_id, c) in own}
            criterion = chance.choice([c for c in item.criteria if c not in item.answered])
            answer = chance.choice(answers_for(mode, len(item.images)))
            receipt = opened.answer(rater, item.item_id, criterion, answer)
            own[item.item_id, criterion] = answer
            assert receipt.answered == len(own)
            assert receipt.remaining == [c for c in item.criteria if (item.item_id, c) not in own]
        elif what in ("resend", "change") and own:
            (item_id, criterion), answer = chance.choice(list(own.items()))
            if what == "resend":
                opened.answer(rater, item_id, criterion, answer)
            else:
                other = chance.choice([a for a in answers_for(mode, images[item_id]) if a != answer])
                with pytest.raises(StudyError, match="answered this already"):
                    opened.answer(rater, item_id, criterion, other)
        elif what == "undo" and own:
            last = list(own)[-1]
            assert opened.undo(rater) == last
            del own[last]
            assert opened.next_item(rater).item_id == last[0]
        elif what == "skip" and chance.random() < 0.5 and (item := opened.next_item(rater)) is not None:
            opened.skip(rater, item.item_id, "no reason")
        elif what in ("restart", "lose"):
            opened.votes.close()
            opened._file.close()
            if what == "lose":
                (folder / "study.sqlite").unlink()
            opened = Study(folder, SALT)
            for name in "ab":
                join(opened, name)
    for rater in raters:
        assert opened.progress(rater)["answered"] == len(model[rater])
        found = {}
        answers = opened._answers(rater)
        for number, occasion in itertools.product(range(len(opened.units)), (0, 1)):
            item = opened._item(rater, number, occasion, answers, opened.settings)
            found |= {(item.item_id, c): answer for c, answer in item.answered.items()}
        assert found == model[rater]
    counts = Counter(vote["set_id"] or vote["vote_id"] for vote in opened.votes.votes(pictures=False))
    assert len(counts) == sum(map(len, model.values()))


def test_votes_read_back_on_an_empty_disk_are_where_raters_go_on(make, tmp_path):
    folder = make(repeat_share=0.0, tasks=("remove",))  # two criteria
    opened = Study(folder, SALT, state=tmp_path / "first")
    rater = join(opened, role="radiologist")
    done = run_through(opened, rater, 4)
    half = opened.next_item(rater)
    opened.answer(rater, half.item_id, half.criteria[0], "right")
    opened.votes.export(tmp_path / "hub.parquet")

    fresh = Study(folder, SALT, state=tmp_path / "second")
    with pytest.raises(StudyError, match="name, role and consent"):
        fresh.next_item(rater)
    fresh.votes.import_votes(tmp_path / "hub.parquet")
    assert fresh.role_of(rater) == "radiologist" and fresh.rater("ann") == rater
    assert join(fresh, role="resident") == rater and fresh.role_of(rater) == "radiologist"
    # what the browser still shows can be answered, and comes next
    assert fresh.next_item(rater).answered == {half.criteria[0]: "right"}
    assert fresh.answer(rater, half.item_id, half.criteria[1], "tie").answered == len(opened._answers(rater)) + 1
    rest = run_through(fresh, rater, 100)
    seen = [item.item_id for item in [*done, half, *rest]]
    assert len(set(seen)) == len(seen) == len(fresh.units)


# ----------------------------------------------------------------------------------------------- threads and processes


def test_many_threads_lose_and_double_nothing(make):
    opened = Study(make(6, repeat_share=0.0), SALT)
    errors = []

    def work(name):
        try:
            rater = join(opened, name)
            while (item := opened.next_item(rater)) is not None:
                for criterion in item.criteria:
                    for _ in range(2):
                        opened.answer(rater, item.item_id, criterion, "left")
        except BaseException as error:
            errors.append(error)

    # two threads for each rater: two tabs
    threads = [threading.Thread(target=work, args=(f"rater {i // 2}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    criteria = sum(len(opened.settings.criteria[unit.task]) for unit in opened.units)
    votes = opened.votes.votes(pictures=False)
    assert len(votes) == 6 * criteria
    keys = Counter(zip(votes["rater"], votes["pair_id"], votes["criterion"], strict=True))
    assert set(keys.values()) == {1} and len(keys) == 6 * criteria
    assert len(items_of(opened)) == 6 * len(opened.units)


VOTER = """
import sys
from onereward.preferences import Study
study = Study(sys.argv[1], sys.argv[2])
rater = study.join(sys.argv[3], "resident", True)
while (item := study.next_item(rater)) is not None:
    for criterion in item.criteria:
        if criterion not in item.answered:
            study.answer(rater, item.item_id, criterion, "right")
            print(item.item_id, criterion, flush=True)
"""


def test_two_processes_of_one_rater_and_kill_9_lose_and_double_nothing(make):
    folder = make(12, repeat_share=0.0)
    command = [sys.executable, "-c", VOTER, str(folder), SALT, "ann"]
    acknowledged, kills = [], 0
    chance = random.Random(0)
    steady = subprocess.Popen([*command[:-1], "bob"], stdout=subprocess.PIPE, text=True)
    while kills < 2:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if len(lines) == 5:
                time.sleep(chance.uniform(0, 0.02))
                process.kill()
                kills += 1
                break
        # what was written before the kill; a line that was cut is none
        lines += [line.split() for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
        acknowledged += lines
    # two of the same rater at once, to the end; both may print one answer, none may fail
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in [*pair, steady]]
    assert [process.returncode for process in [*pair, steady]] == [0, 0, 0]
    acknowledged += [line.split() for text in outputs[:2] for line in text.splitlines()]
    opened = Study(folder, SALT)
    everything = sum(len(opened.settings.criteria[unit.task]) for unit in opened.units)
    rater = opened.rater("ann")
    stored = {
        (opened._item_id(rater, opened.units[number], occasion), criterion)
        for number, occasion, criterion in opened._answers(rater).votes
    }
    assert {tuple(line) for line in acknowledged} <= stored
    assert len(stored) == everything and len(opened.votes) == 2 * everything
    assert len(outputs[2].splitlines()) == everything


# ------------------------------------------------------------------------------------------------------------ refusals


def test_forged_and_foreign_items_are_refused_alike(opened):
    ann, bob = join(opened, "ann"), join(opened, "bob")
    item = opened.next_item(ann)
    messages = set()
    # of another rater, changed, made with another salt, of no text, an injection, a path
    forged = [opened.next_item(bob).item_id, item.item_id[:-1] + "0g"[item.item_id[-1] == "0"], "0" * 32, "", None, 7]
    forged += [["a"], {"a": 1}, "' OR 1=1 --", "../study.json", item.item_id.upper() + "A", "é" * 32, "\ud800"]
    for item_id in forged:
        for call in (
            lambda i: opened.answer(ann, i, item.criteria[0], "left"),
            lambda i: opened.skip(ann, i, "why"),
        ):
            with pytest.raises(StudyError) as error:
                call(item_id)
            messages.add(str(error.value))
    assert messages == {"This is not a question of yours. Please load the next one."}
    assert len(opened.votes) == 0


@pytest.mark.parametrize("rater", ["", "ann", None, 5, ["x"], {"a": 1}, "0" * 16, "\ud800", "x" * 100_000])
def test_who_has_not_joined_can_do_nothing(opened, rater):
    item = opened.next_item(join(opened, "bob"))
    calls = [
        lambda: opened.next_item(rater),
        lambda: opened.answer(rater, item.item_id, item.criteria[0], "left"),
        lambda: opened.undo(rater),
        lambda: opened.skip(rater, item.item_id, "why"),
        lambda: opened.progress(rater),
    ]
    for call in calls:
        with pytest.raises(StudyError, match="name, role and consent first"):
            call()
    assert len(opened.votes) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "beauty"}, "no such criterion"),
        ({"criterion": ["quality"]}, "no such criterion"),
        ({"answer": "first"}, "answer with one of: left, right, tie"),
        ({"answer": {"best": 0, "worst": 1}}, "answer with one of"),
        ({"answer": None}, "answer with one of"),
        ({"comment": "x" * 501}, "501 characters; please keep to 500"),
        ({"comment": 5}, "plain text"),
        ({"comment": "\ud800"}, "plain text"),
        ({"seconds": -1}, "number of seconds"),
        ({"seconds": float("nan")}, "number of seconds"),
        ({"seconds": True}, "number of seconds"),
        ({"seconds": "fast"}, "number of seconds"),
    ],
)
def test_wrong_answers_are_refused_in_one_line(opened, change, message):
    rater = join(opened)
    item = opened.next_item(rater)
    with pytest.raises(StudyError, match=message) as error:
        opened.answer(rater, item.item_id, **{"criterion": item.criteria[0], "answer": "left", **change})
    assert "\n" not in str(error.value) and len(opened.votes) == 0
    assert opened.next_item(rater) == item


@pytest.mark.parametrize(
    "answer",
    ["left", {}, {"best": 0}, {"best": 0, "worst": 0}, {"best": 0, "worst": 3}, {"best": True, "worst": 0}]
    + [{"best": -1, "worst": 0}, {"best": "0", "worst": 1}, {"best": 0, "worst": 1, "more": 2}, [0, 1], None],
)
def test_wrong_choices_of_best_and_worst_are_refused(make, answer):
    opened = Study(make(mode="best_worst", images_per_set=3), SALT)
    rater = join(opened)
    item = opened.next_item(rater)
    with pytest.raises(StudyError, match="best and the worst of the 3 images"):
        opened.answer(rater, item.item_id, item.criteria[0], answer)


def test_joining_needs_name_role_and_consent_once(opened):
    for name, role, consent, message in [
        ("", "resident", True, "give a name"),
        (None, "resident", True, "give a name"),
        ("\ud800", "resident", True, "plain text"),
        ("ann", "boss", True, "choose your role"),
        ("ann", ["resident"], True, "choose your role"),
        ("ann", "resident", False, "consent"),
        ("ann", "resident", "yes", "consent"),
    ]:
        with pytest.raises(StudyError, match=message):
            opened.join(name, role, consent)
    rater = join(opened)
    assert rater == rater_id("ann", SALT) and opened.role_of(rater) == "resident"
    assert opened.join(" ann ", None, False) == rater
    assert opened.join("ann", "radiologist", True) == rater and opened.role_of(rater) == "resident"
    assert b"ann" not in b"".join(path.read_bytes() for path in opened.folder.glob("study.sqlite*"))
    with pytest.raises(StudyError, match="name, role and consent"):
        opened.rater("bob")


def test_answers_have_a_speed_limit_and_resends_do_not(make, monkeypatch):
    opened = Study(make(answers_per_minute=4), SALT)
    ann, bob = join(opened, "ann"), join(opened, "bob")
    item = opened.next_item(ann)
    opened.answer(ann, item.item_id, item.criteria[0], "left")
    opened.undo(ann)  # does not give the answer back
    for criterion in item.criteria[:2]:
        opened.answer(ann, item.item_id, criterion, "left")
    while opened.progress(ann)["answered"] < 3:
        following = opened.next_item(ann)
        opened.answer(
            ann, following.item_id, [c for c in following.criteria if c not in following.answered][0], "left"
        )
    following = opened.next_item(ann)
    criterion = [c for c in following.criteria if c not in following.answered][0]
    for call in (
        lambda: opened.answer(ann, following.item_id, criterion, "left"),
        lambda: opened.skip(ann, following.item_id, "why"),
    ):
        with pytest.raises(StudyError, match="faster than 4 answers a minute"):
            call()
    opened.answer(ann, item.item_id, item.criteria[0], "left")
    other = opened.next_item(bob)
    opened.answer(bob, other.item_id, other.criteria[0], "left")
    real = study._now
    monkeypatch.setattr(study, "_now", lambda later=0.0: real(later + 61))
    opened.answer(ann, following.item_id, criterion, "left")


def test_a_closed_study_takes_nothing_in_any_process(make):
    folder = make()
    opened, other = Study(folder, SALT), Study(folder, SALT)
    rater = join(opened)
    item = opened.next_item(rater)
    opened.answer(rater, item.item_id, item.criteria[0], "left")
    other.close()
    assert opened.settings.closed
    for call in (
        lambda: opened.next_item(rater),
        lambda: opened.answer(rater, item.item_id, item.criteria[1], "left"),
        lambda: opened.undo(rater),
        lambda: opened.skip(rater, item.item_id, "why"),
        lambda: join(opened, "bob"),
    ):
        with pytest.raises(StudyError, match="closed"):
            call()
    opened.answer(rater, item.item_id, item.criteria[0], "left")  # it had been acknowledged
    assert Study(folder, SALT).settings.closed and len(opened.votes) == 1
    other.reopen()
    opened.answer(rater, item.item_id, item.criteria[1], "left")


def test_organisers_are_known_by_name(make):
    opened = Study(make(organisers=["Zoë"]), SALT)
    assert opened.is_organiser("Zoe\u0308 ") and not opened.is_organiser("Zoe") and not opened.is_organiser(None)


# ------------------------------------------------------------------------------------------------- blind and by chance


def test_nothing_that_a_rater_gets_tells_the_model(tmp_path):
    """The candidates arrive with text chunks, other compressions and names; items hold none of it."""
    table = []
    for number, row in enumerate(make_candidates(4)):
        chunks = PngInfo()
        chunks.add_text("Software", row["model"])
        buffer = io.BytesIO()
        row["candidate"].save(buffer, "PNG", pnginfo=chunks, compress_level=number % 3 * 4)
        encoded = {name: value if not isinstance(value, Image.Image) else to_png(value) for name, value in row.items()}
        table.append({**encoded, "candidate": {"bytes": buffer.getvalue(), "path": None}})
    candidates = datasets.Dataset.from_list(table, features=CANDIDATE_FEATURES)
    for mode in ("pairs", "best_worst"):
        make_study(tmp_path / mode, candidates, StudySettings(mode=mode, images_per_set=3, **FAST))
        opened = Study(tmp_path / mode, SALT)
        rater = join(opened)
        item = opened.next_item(rater)
        assert {field.name for field in fields(Item)} == {
            *("item_id", "mode", "task", "prompt", "images", "source", "mask", "label_map", "criteria", "answered"),
            "window",
        }
        text = repr(asdict(item))
        assert "secret" not in text and "1000000" not in text
        receipt = opened.answer(rater, item.item_id, item.criteria[0], answers_for(mode, 3)[0])
        assert "secret" not in repr(receipt)
        for picture in [*item.images, item.source, item.mask]:
            opened_png = Image.open(io.BytesIO(picture))
            opened_png.load()
            assert opened_png.info == {} and re.findall(rb"(?:tEXt|iTXt|zTXt|eXIf|tIME|pHYs)", picture) == []
            # the file depends on the pixels alone
            assert picture == to_png(opened_png)["bytes"]


def test_sides_are_by_chance_and_drawn_anew_for_each_rater_and_occasion(make):
    opened = Study(make(20), SALT)
    raters = [rater_id(f"rater {i}", SALT) for i in range(20)]
    sides = np.array(
        [
            [[opened._order(rater, unit, occasion)[0] for occasion in (0, 1)] for unit in opened.units]
            for rater in raters
        ]
    )
    low, high = binom.interval(1 - 1e-6, sides[..., 0].size, 0.5)
    assert low <= sides[..., 0].sum() <= high
    assert low <= (sides[..., 0] == sides[..., 1]).sum() <= high
    for other in (sides[1:, :, 0] == sides[:-1, :, 0], sides[:, 1:, 0] == sides[:, :-1, 0]):
        low, high = binom.interval(1 - 1e-6, other.size, 0.5)
        assert low <= other.sum() <= high
    another = Study(opened.folder, SALT.upper())
    moved = [another._order(raters[0], unit, 0) != opened._order(raters[0], unit, 0) for unit in opened.units]
    low, high = binom.interval(1 - 1e-6, len(moved), 0.5)
    assert low <= sum(moved) <= high


def test_repeats_and_calibration_have_their_shares(make, tmp_path):
    settings = StudySettings(repeat_share=0.2, calibration_share=0.1, **FAST)
    candidates = make_candidates(50)
    units = study_units(candidates, settings)
    known = {(unit.unit_id, "realism"): i % 2 for i, unit in enumerate(units[:50])}
    make_study(tmp_path / "study", candidates, settings, known)
    assert read_known(tmp_path / "study" / "calibration.csv") == known
    opened = Study(tmp_path / "study", SALT)
    assert opened._known == known and [unit.unit_id for unit in opened.units] == [unit.unit_id for unit in units]
    for name in "abc":
        run_through(opened, join(opened, name), 100)
    items = items_of(opened)
    calibration = {pair for pair, _ in known}
    share = sum(unit in calibration for _, unit, _ in items)
    low, high = binom.interval(1 - 1e-6, len(items), 0.1)
    assert low <= share <= high
    ordinary = [occasion for _, unit, occasion in items if unit not in calibration]
    low, high = binom.interval(1 - 1e-6, len(ordinary), 0.2)
    assert low <= sum(ordinary) <= high
    assert all(occasion == 0 for _, unit, occasion in items if unit in calibration)
    assert max(Counter(items).values()) == 1


def test_what_tells_most_is_asked_first_where_that_is_wanted(make):
    folder = make(10, random_share=0.0, repeat_share=0.0, tasks=("fill",))
    information = np.random.default_rng(0).random(len(Study(folder, SALT).units))
    opened = Study(folder, SALT, information=information)
    run_through(opened, join(opened), 8)
    asked = [opened._unit_number[unit] for _, unit, _ in items_of(opened)]
    assert asked == np.argsort(-information)[:8].tolist()
    with pytest.raises(ValueError, match=r"`information` has shape \(3,\); expected \(30,\)"):
        Study(folder, SALT, information=np.zeros(3))


# ---------------------------------------------------------------------------------------------------- the study itself


def test_pairs_are_of_two_models_of_one_condition():
    candidates = make_candidates(2, models=("alpha", "alpha", "beta"))
    models, conditions = candidates["model"], candidates["condition"]
    units = study_units(candidates, StudySettings())
    assert len(units) == 4
    for unit in units:
        assert len({models[row] for row in unit.rows}) == 2 and len({conditions[row] for row in unit.rows}) == 1
    assert len(study_units(make_candidates(2, models=("alpha",) * 3), StudySettings())) == 6  # any two
    doubled = datasets.concatenate_datasets([candidates, candidates])
    assert study_units(doubled, StudySettings()) == units


def test_what_cannot_be_voted_on_is_refused_with_its_number(tmp_path):
    good = make_candidates()
    settings = StudySettings()

    def changed(**change):
        rows = list(good.cast_column("candidate", datasets.Image(decode=False)))
        rows[2] |= change
        return datasets.Dataset.from_list(rows, features=CANDIDATE_FEATURES)

    small = to_png(np.zeros((8, 8), np.uint8))
    for candidates, message in [
        (changed(candidate=small), "Candidate 2 cannot be voted on: the pictures differ in mode or size"),
        (changed(task="beautify"), "Candidate 2 has the task 'beautify'"),
        (changed(mask=to_png(np.zeros((16, 16), np.uint8))), "Candidate 2 cannot be voted on: .*mask"),
        (good.remove_columns("model"), r"lacks the column\(s\) \['model'\]"),
        (good.select([]), "has 0 rows"),
        (good.select([0]), "nothing to ask"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_study(tmp_path / "bad", candidates, settings)
        assert not (tmp_path / "bad" / "study.json").exists()
    with pytest.raises(ValueError, match="expected a pair of this study"):
        make_study(tmp_path / "bad", good, settings, {("nothing", "realism"): 1})
    make_study(tmp_path / "good", good, settings)
    with pytest.raises(ValueError, match="holds a study"):
        make_study(tmp_path / "good", good, settings)


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "stars"},
        {"criteria": {}},
        {"criteria": {"fill": []}},
        {"criteria": {"fill": ["quality", "quality"]}},
        {"mode": "turing", "criteria": {"fill": ["quality"]}},
        {"roles": []},
        {"goal": 0},
        {"images_per_set": 1},
        {"repeat_share": 1.0},
        {"calibration_share": -0.1},
        {"random_share": 1.1},
        {"undo_seconds": -1},
        {"answers_per_minute": 0},
        {"window_center": 1.0},
        {"window_center": 1.0, "window_width": 0.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(change):
    with pytest.raises(ValueError, match=f"`{list(change)[-1]}`|`window_center` and `window_width`"):
        StudySettings(**change)


def test_a_folder_without_a_sound_study_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="holds no study.json"):
        Study(tmp_path, SALT)
    folder = make()
    with pytest.raises(ValueError, match="`salt` has 5 bytes"):
        Study(folder, "short")
    settings = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**settings, "colour": "red"}))
    with pytest.raises(ValueError, match=r"unknown setting\(s\) \['colour'\]"):
        Study(folder, SALT)


def test_results_are_fit_for_json_and_count_what_was_answered(opened):
    assert opened.results()["summary"] is None
    for name in "abc":
        run_through(opened, join(opened, name), 6)
    results = json.loads(json.dumps(opened.results(resamples=100), allow_nan=False))
    assert len(results["votes"]) == results["summary"]["votes"] == len(opened.votes)
    assert sum(day["votes"] for day in results["over_time"]) == len(opened.votes)
    assert {row["criterion"] for row in results["summary"]["agreement"]} == set(opened.votes.criteria)
    assert "image" not in results["votes"][0]


def test_the_demo_study_opens_and_can_be_answered(tmp_path):
    folder = Path(__file__).parents[2] / "spaces" / "onereward-arena" / "study"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    assert {path.name for path in folder.iterdir()} == {"study.json", "candidates.parquet", "calibration.csv"}
    opened = Study(folder, SALT, state=tmp_path)
    assert len({unit.condition for unit in opened.units}) == 24
    assert {unit.task for unit in opened.units} == {"fill", "remove"}
    assert {pair for pair, _ in opened._known} <= {unit.unit_id for unit in opened.units}
    for phrase in ("not for clinical use", "pseudonym", "stored", "withdraw"):
        assert phrase in opened.settings.consent.lower()
    rater = join(opened, role=opened.settings.roles[0])
    run_through(opened, rater, 5)
    assert set(os.listdir(tmp_path)) >= {"study.sqlite", "votes.sqlite"}
    assert VoteStore(tmp_path / "votes.sqlite").export(tmp_path / "votes.parquet") == len(opened.votes)


# --------------------------------------------------------------------------------------------------------------- speed


def test_answers_and_questions_are_quick_in_a_large_study(make):
    """2,000 pairs and 5,000 votes; the bounds are those of the specification."""
    opened = Study(make(667), SALT)
    assert len(opened.units) >= 2000
    for name in range(20):
        rater = join(opened, f"rater {name}")
        votes = []
        for number in range(101):
            unit = opened.units[number * 17 % 2000]
            about = {"rater": rater, "rater_role": "resident", "comment": None, "seconds": None}
            for criterion in opened.settings.criteria[unit.task]:
                where = opened._unit_number[unit.unit_id], 0, criterion
                order = opened._order(rater, unit, 0)
                votes += opened._votes(*where, "left", order, 0, about, opened.settings)
        opened.votes.add_many(votes)
    assert len(opened.votes) >= 5000
    rater, asked, answered = join(opened, "rater 0"), [], []
    for _ in range(15):
        start = time.perf_counter()
        item = opened.next_item(rater)
        asked.append(time.perf_counter() - start)
        for criterion in item.criteria:
            start = time.perf_counter()
            opened.answer(rater, item.item_id, criterion, "right")
            answered.append(time.perf_counter() - start)
    assert np.median(asked) < 0.05 and np.median(answered) < 0.02
