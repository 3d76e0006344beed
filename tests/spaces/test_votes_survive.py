"""
What the Space promises raters: an answer that was acknowledged is kept, once, however often the server dies.

What must be there is what the raters noted themselves: each answer carries a remark of its own, and the picture that
was chosen is known by its pixels as they came over the wire.
"""

import hashlib
import random
import shutil
import signal
import threading
import time
import uuid
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, hf_hub_download
from rater import Rater
from running_space import SALT

from onereward.preferences import CANDIDATE_FEATURES, StudySettings, VoteStore, make_study
from onereward.preferences.schema import rater_id, to_png


pytest.importorskip("gradio", reason="the Space needs onereward[space]")


@pytest.fixture(scope="module")
def long_study(tmp_path_factory):
    """A study with questions for everybody: 150 pairs of random pictures, three criteria each."""
    rows = []
    for case in range(50):
        draw = np.random.default_rng(case)
        source, mask = draw.integers(0, 256, (32, 32), dtype=np.uint8), np.zeros((32, 32), np.uint8)
        mask[8:24, 8:24] = 255
        shared = {"image": to_png(source), "mask": to_png(mask), "label_map": None, "target": None, "task": "fill"}
        shared |= {"prompt": "noise", "modality": "none", "case_id": f"noise-{case}", "source": "noise"}
        for seed, model in enumerate("abc"):
            painted = np.where(mask > 0, draw.integers(0, 256, (32, 32), dtype=np.uint8), source)
            own = {"condition": "", "candidate": to_png(painted), "model": model, "seed": seed}
            rows.append({**shared, **own})
    folder = tmp_path_factory.mktemp("study")
    settings = StudySettings(title="Noise", goal=100, answers_per_minute=10_000)
    make_study(folder, datasets.Dataset.from_list(rows, features=CANDIDATE_FEATURES), settings)
    return folder


def digest(picture):
    return hashlib.sha256(picture["bytes"]).hexdigest()


def check(votes, raters):
    """Of the answers that were sent, all that were acknowledged are among the votes, none twice, none foreign."""
    for column in ("image_0", "image_1"):
        votes = votes.cast_column(column, datasets.Image(decode=False))
    sent = {answer.comment: answer for rater in raters for answer in rater.sent}
    counts = Counter(votes["comment"])
    assert all(counts[answer.comment] == 1 for rater in raters for answer in rater.kept)
    assert counts.keys() <= sent.keys() and set(counts.values()) <= {1}
    for vote in votes:
        answer = sent[vote["comment"]]
        assert vote["rater"] == rater_id(f"key:{answer.key}", SALT)
        assert vote["criterion"] == answer.criterion
        shown = {digest(vote[f"image_{vote['left']}"]): "left", digest(vote[f"image_{1 - vote['left']}"]): "right"}
        assert shown == {answer.left: "left", answer.right: "right"}
        label = vote["label_0"] if vote["left"] == 0 else vote["label_1"]
        assert label == {"left": 1.0, "right": 0.0, "tie": 0.5, "both_unacceptable": 0.5}[answer.answer]
        assert vote["both_unacceptable"] == (answer.answer == "both_unacceptable")


def on_hub(repo):
    """All rows of the data set, file by file, as they are."""
    names = HfApi().list_repo_files(repo, repo_type="dataset")
    paths = [hf_hub_download(repo, name, repo_type="dataset") for name in names if name.endswith(".parquet")]
    return datasets.concatenate_datasets([datasets.Dataset(pq.read_table(path)) for path in paths])


def let_them_vote(space, raters, each, ends, chance):
    """All raters vote at once, while the server is ended in these ways, spread over the answers, and started again."""
    failures = []

    def work(rater):
        try:
            rater.join()
            rater.answer(each, pause=(0.0, 0.2))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(rater,), daemon=True) for rater in raters]
    for thread in threads:
        thread.start()
    for number, how in enumerate(ends):
        wanted = (number + chance.uniform(0.3, 0.9)) * each * len(raters) / len(ends)
        while sum(len(rater.kept) for rater in raters) < wanted and not failures:
            time.sleep(0.02)
        space.end(how)
        space.start()
    for thread in threads:
        thread.join(300)
    assert not failures and [len(rater.kept) for rater in raters] == [each] * len(raters)


def run(make_space, study, hub, repo, raters, each, ends):
    chance = random.Random(0)
    settings = {"ONEREWARD_STUDY": study, "HF_HUB_DISABLE_PROGRESS_BARS": 1}
    if repo is not None:
        # every call of the Hub fails one time in three
        hub.fail = lambda method, path: (503, "down") if chance.random() < 1 / 3 else None
        settings["ONEREWARD_VOTES_REPO"] = repo
    space = make_space(**settings)
    space.start()
    people = [Rater(space.url, seed=number) for number in range(raters)]
    begun = time.monotonic()
    let_them_vote(space, people, each, ends, random.Random(1))
    seconds = sorted(second for rater in people for second in rater.seconds)
    resent = sum(len(rater.sent) for rater in people) - len(seconds)
    print(
        f"\n{len(seconds)} votes of {raters} raters, {Counter(how.name for how in ends)}, "
        f"{time.monotonic() - begun:.0f} s; acknowledged after {seconds[len(seconds) // 2] * 1e3:.0f} ms (median), "
        f"{seconds[int(len(seconds) * 0.95)] * 1e3:.0f} ms (95 %); {resent} never acknowledged"
    )
    return space, people


def test_votes_survive_both_ends_of_the_server(make_space, long_study, hub):
    repo = f"org/votes-{uuid.uuid4().hex}"
    space, people = run(make_space, long_study, hub, repo, 5, 40, [signal.SIGKILL, signal.SIGTERM])
    hub.fail = None
    assert space.end(signal.SIGTERM) == 0
    with VoteStore(space.data / "votes.sqlite") as store:
        check(store.votes(), people)
    check(on_hub(repo), people)
    assert list((space.data / "outbox").glob("*.parquet")) == []

    shutil.rmtree(space.data)
    space.start()
    rater = people[0]
    before = rater.call("progress")
    assert before["answered"] == len(rater.kept) == 40
    again = rater.kept[-1]
    rater.answer(3)
    assert rater.call("progress")["answered"] == 43
    assert space.end(signal.SIGTERM) == 0
    check(on_hub(repo), people)
    assert again.comment in on_hub(repo)["comment"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ("this machine", "the Hub"))
def test_2000_votes_of_20_raters_survive_ten_ends_of_the_server(make_space, long_study, hub, where):
    repo = f"org/votes-{uuid.uuid4().hex}" if where == "the Hub" else None
    ends = [signal.SIGKILL, signal.SIGTERM] * 5
    space, people = run(make_space, long_study, hub, repo, 20, 100, ends)
    space.end(signal.SIGTERM)
    with VoteStore(space.data / "votes.sqlite") as store:
        votes = store.votes()
    check(votes, people)
    if repo is None:
        return
    hub.fail = None
    if list((space.data / "outbox").glob("*.parquet")):  # the Hub failed once too often for the time there was
        space.start()
        assert space.end(signal.SIGTERM) == 0
    published = on_hub(repo)
    check(published, people)
    assert Counter(published["vote_id"]) == Counter(votes["vote_id"])
