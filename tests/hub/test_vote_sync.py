"""
What `VoteSync` promises: every vote that the store has is on the Hub exactly once in the end, whatever breaks.

`on_hub` reads the files of the data set as they are; what must be there is what the tests put into the store.
"""

import errno
import io
import json
import random
import shutil
import threading
import time
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from loopback_hub import Cut, Delay
from tiny_artefacts import make_vote

from onereward.hub import vote_sync
from onereward.hub.provenance import read_provenance
from onereward.hub.vote_sync import VoteSync
from onereward.preferences import CANDIDATE_FEATURES, VoteStore, load_votes, save_votes
from onereward.preferences.schema import VOTE_DEFAULTS, VOTE_FEATURES


api = HfApi()


class Crash(BaseException):
    """The process ends here."""


class Desk:
    """A store, an outbox and the `VoteSync` between them and a repository of their own."""

    def __init__(self, folder, **settings):
        self.folder, self.repo, self.settings = folder, f"org/votes-{uuid.uuid4().hex}", settings
        self.sync = None
        self.open()

    def open(self):
        self.store = VoteStore(self.folder / "votes.sqlite")
        settings = {"undo_seconds": 600, "every": 3600, "patience": 0.2, **self.settings}
        self.sync = VoteSync(self.store, self.repo, self.folder / "outbox", **settings)

    def die(self):
        """What the end of the process does: the system takes its locks back, and nothing else happens."""
        self.store.close()
        self.sync._lock.release()

    def restart(self):
        self.die()
        self.open()

    def add(self, *numbers, **changes):
        for number in numbers:
            self.store.add(make_vote(number, **changes))

    @property
    def files(self):
        return api.list_repo_files(self.repo, repo_type="dataset")

    def on_hub(self):
        """How often each vote is in the data set."""
        ids = Counter()
        for name in self.files:
            if name.endswith(".parquet"):
                path = hf_hub_download(self.repo, name, repo_type="dataset")
                ids.update(pq.read_table(path, columns=["vote_id"])["vote_id"].to_pylist())
        return ids

    def check(self, *numbers):
        assert self.on_hub() == Counter(f"vote-{number}" for number in numbers)
        assert list((self.folder / "outbox").glob("*.parquet")) == []
        assert self.sync.state()["waiting"] == 0


@pytest.fixture
def make_desk(hub, tmp_path, monkeypatch):
    """`make_desk(**settings)` -> a [`Desk`]. The client of the Hub waits but a moment before it tries again."""
    sleep = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(min(seconds, 0.01)))
    desks = []

    def make(**settings):
        desks.append(Desk(tmp_path / f"desk-{len(desks)}", **settings))
        return desks[-1]

    yield make
    for desk in desks:
        desk.die()


@pytest.fixture
def desk(make_desk):
    return make_desk()


# ------------------------------------------------------------------------------------------------------ what is sent


def test_votes_arrive_with_their_pictures_and_a_card_that_counts_them(desk):
    desk.add(0, 1, 2)
    assert desk.sync.push()
    desk.add(3, 4)
    assert desk.sync.push()
    desk.check(0, 1, 2, 3, 4)

    votes = load_votes(desk.repo)
    assert votes["vote_id"][:] and set(votes["vote_id"]) == {f"vote-{number}" for number in range(5)}
    stored = {row["vote_id"]: row for row in desk.store.votes()}
    for row in votes:
        assert row["image_0"].tobytes() == stored[row["vote_id"]]["image_0"].tobytes()
        assert row["label_0"] == make_vote(int(row["vote_id"][5:]))["label_0"]
    assert len(datasets.load_dataset(desk.repo, split="train")) == 5

    card = open(hf_hub_download(desk.repo, "README.md", repo_type="dataset"), encoding="utf-8").read()
    assert "5 answers on 3 pairs" in card and "Research use only, not for clinical use" in card
    record = read_provenance(desk.repo, repo_type="dataset")
    assert (record["kind"], record["num_rows"], record["raters"]) == ("votes", 5, {"simulated": 3})
    assert api.dataset_info(desk.repo).private


def test_young_votes_wait_and_what_was_taken_back_never_leaves(desk):
    now = datetime.now(UTC)
    desk.add(0, created_at=(now - timedelta(seconds=700)).isoformat())
    desk.add(1, 2, created_at=now.isoformat())
    assert desk.sync.push()
    assert desk.on_hub() == {"vote-0": 1} and desk.sync.state()["waiting"] == 2
    with pytest.raises(ValueError, match="vote-0"):
        desk.store.retract("vote-0")
    desk.store.retract("vote-1")
    assert desk.sync.flush()
    desk.check(0, 2)


def test_a_clock_that_was_wrong_does_not_keep_votes_for_years(desk):
    desk.add(0, created_at="2199-01-01T00:00:00+00:00")
    desk.add(1, created_at="1970-01-01T00:00:00+00:00")
    assert desk.sync.push()
    desk.check(0, 1)


def test_nothing_is_asked_of_the_hub_when_there_is_nothing_to_send(desk, hub):
    desk.add(0)
    assert desk.sync.push()
    hub.calls.clear()
    assert desk.sync.push() and desk.sync.push()
    assert hub.calls == []


def test_the_background_sends_by_itself(make_desk):
    desk = make_desk(every=0.05)
    desk.sync.start()
    desk.add(0, 1)
    deadline = time.monotonic() + 20
    while desk.sync.state()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.05)
    desk.sync.stop()
    desk.check(0, 1)
    with pytest.raises(RuntimeError, match="stopped"):
        desk.sync.push()


# ------------------------------------------------------------------------------------------------------------ crashes


CRASHES = (
    "before the shard",
    "after the shard",
    "after freezing",
    "before the commit",
    "after the commit",
    "unlinking",
)


@pytest.mark.parametrize("where", CRASHES)
@pytest.mark.parametrize("disk", ("kept", "lost after"))
def test_a_crash_at_any_point_loses_and_doubles_nothing(desk, monkeypatch, where, disk):
    desk.add(0, 1)
    assert desk.sync.push()
    desk.add(2, 3)

    def crash(*_, **__):
        raise Crash

    def then_crash(function):
        def both(*args, **kwargs):
            function(*args, **kwargs)
            raise Crash

        return both

    with monkeypatch.context() as patch:
        if where == "before the shard":
            patch.setattr(vote_sync, "save_votes", crash)
        elif where == "after the shard":
            patch.setattr(vote_sync, "save_votes", then_crash(save_votes))
        elif where == "after freezing":
            patch.setattr(VoteStore, "freeze", then_crash(VoteStore.freeze))
        elif where == "before the commit":
            patch.setattr(HfApi, "create_commit", crash)
        elif where == "after the commit":
            patch.setattr(HfApi, "create_commit", then_crash(HfApi.create_commit))
        else:
            patch.setattr(type(desk.folder), "unlink", crash)
        with pytest.raises(Crash):
            desk.sync.push()
    desk.restart()
    desk.sync.read_back()
    desk.add(4)
    assert desk.sync.flush()
    desk.check(0, 1, 2, 3, 4)
    if disk == "lost after":
        desk.die()
        shutil.rmtree(desk.folder)
        desk.open()
        assert desk.sync.read_back() == 5
        desk.add(3)  # sent again by a rater whose acknowledgement got lost
        desk.add(5)
        assert desk.sync.flush()
        desk.check(0, 1, 2, 3, 4, 5)


def test_a_vote_taken_back_while_its_shard_is_made_does_not_leave_and_the_others_do(desk, monkeypatch):
    desk.add(0, 1, 2)

    def save(votes, path):
        save_votes(votes, path)
        if len(votes) == 3:
            desk.store.retract("vote-1")

    monkeypatch.setattr(vote_sync, "save_votes", save)
    desk.sync.push()
    assert desk.sync.push()
    desk.check(0, 2)


def test_a_vote_taken_back_before_the_restart_does_not_leave_with_the_shard_of_the_crash(desk, monkeypatch):
    desk.add(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(VoteStore, "freeze", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            desk.sync.push()
    desk.store.retract("vote-0")
    desk.restart()
    assert desk.sync.flush()
    desk.check(1)


def test_a_commit_that_is_acknowledged_late_is_made_once(desk, hub):
    desk.add(0, 1)
    hub.fail = lambda method, path: Cut("answer") if "/commit/" in path else None
    assert not desk.sync.push()
    hub.fail = None
    desk.add(2)
    assert desk.sync.push()
    desk.check(0, 1, 2)
    assert len([name for name in desk.files if name.endswith(".parquet")]) == 2


@pytest.mark.parametrize("seed", (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))))
def test_any_history_of_faults_and_restarts_ends_with_each_vote_once(make_desk, hub, seed, tmp_path):
    chance, desk = random.Random(seed), make_desk(undo_seconds=0)
    must, taken_back, backup, number = set(), set(), None, 0

    def fault(method, path):
        return chance.choice(((503, "down"), Cut("answer"), Cut("request", 10), (429, "slow"))) if flaky else None

    for _ in range(40):
        flaky = chance.random() < 0.5
        hub.fail = fault
        step = chance.choice(("add", "add", "add", "undo", "push", "push", "restart", "lose", "back up", "restore"))
        if step == "add":
            desk.add(number)
            must.add(number)
            number += 1
        elif step == "undo" and (open_ones := sorted(must - taken_back)):
            vote = chance.choice(open_ones)
            if f"vote-{vote}" not in desk.store.frozen():
                desk.store.retract(f"vote-{vote}")
                taken_back.add(vote)
        elif step == "push":
            desk.sync.push()
        elif step == "restart":
            desk.restart()
        elif step == "back up":
            desk.store.close()
            backup = shutil.copytree(desk.folder, tmp_path / f"backup-{uuid.uuid4().hex}")
        elif step in ("lose", "restore"):  # what is not on the Hub by then is gone with the disk
            hub.fail = None
            assert desk.sync.flush()
            desk.die()
            shutil.rmtree(desk.folder)
            if step == "restore" and backup is not None:
                shutil.copytree(backup, desk.folder)
            desk.open()
            desk.sync.read_back()
    hub.fail = None
    desk.sync.read_back()
    assert desk.sync.flush()
    desk.check(*(must - taken_back))
    assert set(desk.store.votes(pictures=False)["vote_id"]) == {f"vote-{vote}" for vote in must - taken_back}


# ---------------------------------------------------------------------------------------------- what the Hub answers


def test_hours_without_the_hub_leave_one_line_in_the_log_and_all_votes(desk, hub, monkeypatch):
    ours = []
    monkeypatch.setattr(vote_sync.logger, "warning", ours.append)
    desk.add(0)
    assert desk.sync.push()
    hub.fail = lambda method, path: (503, f"request {time.time_ns()}")
    for number in range(1, 21):
        desk.add(number)
        assert not desk.sync.push()
        assert "503" in desk.sync.state()["last_error"]
    hub.fail = None
    assert desk.sync.push()
    desk.check(*range(21))
    assert desk.sync.state()["last_error"] is None
    assert len(ours) == 2 and "kept here: the Hub answered 503" in ours[0] and "again" in ours[1]


def test_waits_grow_up_to_ten_minutes_and_end_with_the_fault(make_desk, hub, monkeypatch):
    desk, waits = make_desk(every=60), []
    outcomes = iter([False] * 7 + [True, True])
    monkeypatch.setattr(desk.sync, "push", lambda: next(outcomes))

    def wait(seconds):
        waits.append(seconds)
        return len(waits) > 9

    monkeypatch.setattr(desk.sync._stopping, "wait", wait)
    desk.sync._run()
    assert waits == [0, 60, 120, 240, 480, 600, 600, 600, 60, 60]


def test_the_background_outlives_a_full_disk(make_desk, monkeypatch):
    desk = make_desk(every=0.02)
    full = threading.Event()
    full.set()

    def save(votes, path):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        save_votes(votes, path)

    monkeypatch.setattr(vote_sync, "save_votes", save)
    desk.add(0, 1)
    desk.sync.start()
    deadline = time.monotonic() + 20
    while desk.sync.state()["last_error"] is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "No space left" in desk.sync.state()["last_error"]
    full.clear()
    while desk.sync.state()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.02)
    desk.sync.stop()
    desk.check(0, 1)


def test_a_full_disk_does_not_keep_back_what_is_in_the_outbox(desk, hub, monkeypatch):
    desk.add(0)
    hub.fail = lambda method, path: (503, "down") if "/commit/" in path else None
    desk.sync.push()
    hub.fail = None
    desk.add(1)
    monkeypatch.setattr(vote_sync, "save_votes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    assert not desk.sync.push()
    assert desk.on_hub() == {"vote-0": 1}


def test_flush_keeps_to_its_time(desk, hub):
    desk.add(0)
    hub.fail = lambda method, path: Delay(3)
    begun = time.monotonic()
    assert not desk.sync.flush(timeout=0.5)
    assert time.monotonic() - begun < 1.5
    hub.fail = None
    assert desk.sync.flush()
    desk.check(0)


@pytest.mark.parametrize(("repo", "token"), (("someone/votes", None), ("org/votes-of-nobody", "wrong")))
def test_a_token_without_the_right_is_said_in_words(tmp_path, hub, repo, token):
    store = VoteStore(tmp_path / "votes.sqlite")
    store.add(make_vote(0))
    sync = VoteSync(store, repo, tmp_path / "outbox", token=token)
    assert not sync.push()
    error = sync.state()["last_error"]
    assert f"the token may not read and write {repo}" in error and "HF_TOKEN" in error and "\n" not in error
    assert sync.read_back(patience=0) == 0  # the store has votes: raters can go on
    assert len(store) == 1
    sync.stop()


def test_an_empty_store_does_not_start_without_the_hub(tmp_path, hub):
    sync = VoteSync(VoteStore(tmp_path / "votes.sqlite"), "org/unreachable", tmp_path / "outbox")
    hub.fail = lambda method, path: (503, "down")
    with pytest.raises(ConnectionError, match="org/unreachable could not be read"):
        sync.read_back(patience=0)
    hub.fail = None
    assert sync.read_back() == 0
    sync.stop()


def test_a_repository_that_was_deleted_is_not_made_again_behind_the_back_of_who_did_it(desk):
    desk.add(0, 1)
    assert desk.sync.push()
    api.delete_repo(desk.repo, repo_type="dataset")
    desk.add(2)
    assert not desk.sync.push()
    assert "is gone" in desk.sync.state()["last_error"]
    assert not api.repo_exists(desk.repo, repo_type="dataset")
    desk.restart()
    desk.sync.read_back()
    assert desk.sync.flush()
    desk.check(0, 1, 2)


def test_a_data_set_of_something_else_is_left_alone(desk):
    api.create_repo(desk.repo, repo_type="dataset")
    api.upload_file(
        path_or_fileobj=b"a,b", path_in_repo="data/train.csv", repo_id=desk.repo, repo_type="dataset"
    )  # fmt: skip
    before = desk.files
    desk.add(0)
    assert not desk.sync.push()
    assert "holds something else than votes, data/train.csv" in desk.sync.state()["last_error"]
    assert desk.files == before and len(desk.store) == 1


def test_one_outbox_is_for_one_process(desk):
    with pytest.raises(TimeoutError, match="in use by another process"):
        VoteSync(desk.store, desk.repo, desk.folder / "outbox", patience=0.1)
    desk.sync.stop()
    desk.open()


def test_two_spaces_share_a_data_set(make_desk):
    first, second = make_desk(), make_desk()
    second.sync.repo_id = second.repo = first.repo
    first.add(0, 1)
    assert first.sync.push()
    second.add(2)
    assert second.sync.push()
    first.add(3)
    assert first.sync.push()
    first.check(0, 1, 2, 3)
    assert read_provenance(first.repo, repo_type="dataset")["num_rows"] == 4


# ---------------------------------------------------------------------------------------------------------- read back


def put(repo, name, votes):
    """A file of votes in a data set, as somebody else may have put it there."""
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    if not isinstance(votes, bytes):
        content = io.BytesIO()
        datasets.Dataset.from_list(votes, features=VOTE_FEATURES).to_parquet(content)
        votes = content.getvalue()
    api.create_commit(
        repo, [CommitOperationAdd(f"data/{name}", votes)], repo_type="dataset", commit_message="By somebody else"
    )


def whole(number, **changes):
    return {**dict.fromkeys(VOTE_FEATURES), **VOTE_DEFAULTS, "schema_version": 2, **make_vote(number, **changes)}


def test_votes_that_the_store_refuses_are_reported_and_the_others_come(desk):
    put(desk.repo, "votes-1.parquet", [whole(0), whole(1, criterion="beauty"), whole(2)])
    put(desk.repo, "votes-2.parquet", b"no parquet at all")
    assert desk.sync.read_back() == 2
    refused = desk.sync.state()["refused"]
    assert len(refused) == 2
    assert "votes-1.parquet" in refused[0] and "1 vote(s)" in refused[0] and "'beauty'" in refused[0]
    assert "votes-2.parquet" in refused[1]
    desk.add(3)
    assert desk.sync.flush()
    assert "data/votes-2.parquet" in desk.files


def test_of_two_votes_of_one_id_that_of_the_hub_stays_alone(desk):
    put(desk.repo, "votes-1.parquet", [whole(0)])
    desk.add(0, label_0=1.0, label_1=0.0)
    desk.add(1)
    desk.sync.read_back()
    assert "'vote-0'" in desk.sync.state()["refused"][0]
    assert desk.sync.flush()
    desk.check(0, 1)


def test_votes_of_an_older_schema_are_upgraded(desk):
    old = datasets.Dataset.from_list([whole(0), whole(1)], features=VOTE_FEATURES).remove_columns(list(VOTE_DEFAULTS))
    old = old.remove_columns("schema_version").add_column("schema_version", [1, 1])
    content = io.BytesIO()
    old.to_parquet(content)
    put(desk.repo, "votes-old.parquet", content.getvalue())
    assert desk.sync.read_back() == 2
    assert set(desk.store.votes()["schema_version"]) == {2}
    assert desk.sync.state()["refused"] == []


def test_a_shard_whose_store_was_lost_is_not_dropped(desk, hub):
    desk.add(0, 1)
    hub.fail = lambda method, path: (503, "down") if "/commit/" in path else None
    assert not desk.sync.push()
    desk.die()
    for file in desk.folder.glob("votes.sqlite*"):
        file.unlink()
    hub.fail = None
    desk.open()
    assert len(desk.store) == 2
    assert desk.sync.flush()
    desk.check(0, 1)


def test_a_damaged_shard_is_set_aside_and_its_votes_sent_from_the_store(desk, hub):
    desk.add(0, 1)
    hub.fail = lambda method, path: (503, "down") if "/commit/" in path else None
    assert not desk.sync.push()
    hub.fail = None
    desk.die()
    (shard,) = (desk.folder / "outbox").glob("votes-*.parquet")
    shard.write_bytes(shard.read_bytes()[:100])
    desk.open()
    assert shard.name in desk.sync.state()["refused"][0]
    assert desk.sync.flush()
    assert desk.on_hub() == {"vote-0": 1, "vote-1": 1}
    assert (shard.parent / f"refused-{shard.name}").stat().st_size == 100


# ----------------------------------------------------------------------------------------------- card and agreements


def test_what_people_wrote_into_the_card_stays(desk):
    desk.add(0, 1)
    assert desk.sync.push()
    card = open(hf_hub_download(desk.repo, "README.md", repo_type="dataset"), encoding="utf-8").read()
    card = card.replace("## How to use", "Ask ann@example.org.\n\n## How to use")
    api.upload_file(
        path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=desk.repo, repo_type="dataset"
    )  # fmt: skip
    for number in (2, 3):
        desk.restart()
        desk.add(number)
        assert desk.sync.push()
        now = open(hf_hub_download(desk.repo, "README.md", repo_type="dataset"), encoding="utf-8").read()
        assert "Ask ann@example.org." in now and f"{number + 1} votes by 3 raters" in now
        assert now.count("## Votes so far") == 1


def test_the_card_counts_again_after_a_restart(desk):
    desk.add(0, 1)
    assert desk.sync.push()
    desk.restart()
    desk.add(2)
    assert desk.sync.push()
    card = open(hf_hub_download(desk.repo, "README.md", repo_type="dataset"), encoding="utf-8").read()
    assert "3 answers on 2 pairs" in card and "Votes so far" not in card


@pytest.fixture
def candidates_under_agreement(tmp_path):
    vote = make_vote(0)
    row = {name: vote[name] for name in ("image", "mask", "label_map", "prompt", "task")}
    row |= {"target": None, "modality": "t1c", "case_id": "case-0", "source": "MICCAI_BraTS2020", "condition": "c"}
    row |= {"candidate": vote["image_0"], "model": "a", "seed": 0}
    path = tmp_path / "candidates.parquet"
    datasets.Dataset.from_list([row], features=CANDIDATE_FEATURES).to_parquet(path)
    return path


def test_votes_on_data_under_an_agreement_stay_private_and_say_so(make_desk, candidates_under_agreement):
    desk = make_desk(candidates=candidates_under_agreement, private=False)
    desk.add(0)
    assert desk.sync.push()
    assert api.dataset_info(desk.repo).private
    record = read_provenance(desk.repo, repo_type="dataset")
    assert record["agreements"] == ["brats"]
    assert [parent["sources"] for parent in record["parents"]] == [["MICCAI_BraTS2020"]]
    card = open(hf_hub_download(desk.repo, "README.md", repo_type="dataset"), encoding="utf-8").read()
    assert "## Data-use agreements" in card

    api.update_repo_settings(desk.repo, repo_type="dataset", private=False)
    desk.add(1)
    assert not desk.sync.push()
    assert "is public" in desk.sync.state()["last_error"] and "brats" in desk.sync.state()["last_error"]
    assert desk.on_hub() == {"vote-0": 1}
    api.update_repo_settings(desk.repo, repo_type="dataset", private=True)
    assert desk.sync.push()
    desk.check(0, 1)


def test_cases_under_an_agreement_are_not_sent_to_a_public_data_set(make_desk):
    desk = make_desk(private=False)
    desk.add(0, case_id="BraTS-GLI-00001-000")
    assert not desk.sync.push()
    assert "brats" in desk.sync.state()["last_error"]
    assert desk.on_hub() == {}
    assert json.dumps(desk.sync.state())
