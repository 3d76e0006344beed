"""What `VoteStore` promises: an acknowledged vote is there, once, whatever happens to whoever wrote it."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import datasets
import numpy as np
import pytest

from onereward.preferences import VOTE_FEATURES, VOTE_SCHEMA_VERSION, load_votes, save_votes
from onereward.preferences.schema import PICTURES, VOTE_DEFAULTS, encoded_rows
from onereward.preferences.store import APPLICATION_ID, VoteStore


sys.path.append(str(Path(__file__).parent))

from vote_writers import make_vote  # noqa: E402


OLD_TYPES = {"string": "TEXT", "bool": "INTEGER", "float32": "REAL", "float64": "REAL"}
OLD_TYPES |= dict.fromkeys(("int8", "int32", "int64"), "INTEGER")


def complete(vote):
    vote = {**VOTE_DEFAULTS, **vote, "schema_version": VOTE_SCHEMA_VERSION}
    return {column: vote[column] for column in VOTE_FEATURES}


def make_votes(numbers, writer=0):
    return [make_vote(writer, number) for number in numbers]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes.sqlite"


@pytest.fixture
def store(path):
    with VoteStore(path) as store:
        yield store


def sql(path, query):
    """What SQLite itself finds in the file."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def sql_write(path, statement):
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(statement)
    finally:
        connection.close()


# ------------------------------------------------------------------------------------------- many writers, and kill -9


def test_no_acknowledged_vote_is_lost_or_doubled_when_a_writer_is_killed(tmp_path, number=10_000):
    """8 processes write 10,000 votes while one of them is killed with SIGKILL again and again."""
    store, notes = tmp_path / "votes.sqlite", tmp_path / "acknowledged"
    notes.mkdir()
    script = Path(__file__).with_name("vote_writers.py")
    command = [sys.executable, str(script), str(store), str(notes), "8", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5  # kills
    acknowledged = [line for file in notes.iterdir() for line in file.read_text().splitlines()]
    stored = [row[0] for row in sql(store, "SELECT vote_id FROM vote")]
    wanted = {f"{writer}-{n}" for writer in range(8) for n in range(number // 8)}
    assert len(acknowledged) == number and set(acknowledged) == wanted  # nobody stopped before the end
    assert len(stored) == number and set(stored) == wanted
    assert sql(store, "PRAGMA integrity_check") == [("ok",)]
    # and each is what was sent; three pictures for ten votes, and one mask
    with VoteStore(store) as opened:
        votes = opened.votes().to_dict()
    for index in range(0, number, 101):
        sent = complete(make_vote(*map(int, votes["vote_id"][index].split("-"))))
        assert {column: values[index] for column, values in votes.items()} == sent
    assert sql(store, "SELECT count(*) FROM picture") == [(3 * number // 10 + 1,)]


def test_a_vote_that_was_not_committed_is_not_there_and_one_that_was_is(path):
    """A process dies in the middle of a transaction, right after the rows were written and right after the commit."""
    script = """
import os, sys
sys.path.append(sys.argv[2])
from vote_writers import make_vote
import onereward.preferences.store as store
real = store._transaction
def dying(connection, work, write):
    def die_after(connection):
        work(connection)
        os.kill(os.getpid(), 9)
    return real(connection, die_after, write)
votes = store.VoteStore(sys.argv[1])
votes.add(make_vote(0, 0))
store._transaction = dying
votes.add(make_vote(0, 1))
"""
    command = [sys.executable, "-c", script, str(path), str(Path(__file__).parent)]
    assert subprocess.run(command, timeout=120).returncode == -9
    assert sql(path, "SELECT vote_id FROM vote") == [("0-0",)]
    with VoteStore(path) as store:
        assert store.add(make_vote(0, 1)) is True and len(store) == 2


def test_what_is_committed_is_on_the_disk(store, path):
    # 2 is FULL: SQLite's documentation promises durability across a loss of power for it in WAL mode, not for NORMAL
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.add(make_vote(0, 0))
    # a copy of the files as they are now, with the store still open: what a crash would leave behind
    crashed = path.with_name("crashed.sqlite")
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{crashed}{suffix}")
    assert sql(crashed, "SELECT vote_id FROM vote") == [("0-0",)]


def test_threads_write_at_once(store, path):
    other = VoteStore(path)  # a second connection in the same process
    errors = []

    def write(writer):
        try:
            for number in range(25):
                assert (store if writer % 2 else other).add(make_vote(writer, number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert errors == [] and len(store) == 8 * 25
    assert sql(path, "SELECT count(DISTINCT vote_id) FROM vote") == [(200,)]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_fork_carries_no_connection_into_the_child(store, path):
    # a connection that two processes share is how SQLite files are spoilt: https://sqlite.org/howtocorrupt.html, 2.6
    store.add(make_vote(0, 0))
    child = os.fork()
    if child == 0:
        carried = any(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))
        added = store.add(make_vote(0, 1)) and len(store) >= 2
        os._exit(0 if added and not carried and store._connection is not None else 1)
    store.add(make_vote(0, 2))
    assert os.waitpid(child, 0)[1] == 0
    assert len(store) == 3


def test_waiting_for_another_writer_ends_with_a_clear_error(path):
    with VoteStore(path, timeout=0.2) as store:
        store.add(make_vote(0, 0))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="was held by other writers for 0.2 s; nothing was stored"):
            store.add(make_vote(0, 1))
        assert 0.2 <= time.monotonic() - started < 5
        assert len(store) == 1  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert store.add(make_vote(0, 1))


def test_a_writer_that_waits_gets_its_turn(store, path):
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    release.start()
    assert store.add(make_vote(0, 0))
    release.join()
    other.close()


# -------------------------------------------------------------------------------------------------- what is in a store


def test_a_vote_that_is_sent_again_is_acknowledged_and_stored_once(store, path):
    assert store.add(make_vote(0, 0)) is True
    assert store.add(make_vote(0, 0)) is False
    assert store.add_many(make_votes([0, 1, 2])) == 2
    assert len(store) == 3
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):  # nor does the file take it from anyone else
        sql_write(path, "INSERT INTO vote (vote_id) VALUES ('0-0')")


@pytest.mark.parametrize("change", [{"label_0": 0.5, "label_1": 0.5}, {"rater": "someone"}, {"seconds": 1.0}])
def test_the_same_id_with_another_content_is_refused(store, change):
    store.add(make_vote(0, 0))
    (first, *_) = change
    with pytest.raises(ValueError, match=f"'0-0' is in the store with another content of .*'{first}'"):
        store.add({**make_vote(0, 0), **change})
    other_picture = {**make_vote(0, 0), "image_1": make_vote(1, 0)["image_1"]}
    with pytest.raises(ValueError, match=r"with another content of \['image_1'\]"):
        store.add(other_picture)
    assert store.votes()["label_0"] == [make_vote(0, 0)["label_0"]]


def test_of_several_votes_all_are_stored_or_none(store, path):
    store.add(make_vote(0, 3))
    changed = {**make_vote(0, 3), "rater": "someone"}
    with pytest.raises(ValueError, match=r"Vote 2 \('0-3'\): `vote_id` '0-3' is in the store"):
        store.add_many([*make_votes([0, 20]), changed])
    with pytest.raises(ValueError, match=r"Vote 1 \('0-1'\): `criterion` is 'beauty'"):
        store.add_many([make_vote(0, 0), {**make_vote(0, 1), "criterion": "beauty"}])
    assert len(store) == 1 and sql(path, "SELECT count(*) FROM picture") == [(4,)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"criterion": "beauty"}, "`criterion` is 'beauty'"),
        ({"image_1": None}, "`image_1` is missing"),
        ({"image_1": {"bytes": None, "path": None}}, "`image_1` is no readable picture"),
        ({"image_1": b"GIF89a"}, "`image_1` is no readable picture"),
        ({"label_0": 2.0}, "`label_0` and `label_1` are 2.0"),
        ({"label_0": "1"}, "`label_0` is '1' of type str; expected float32"),
        ({"rater": 5}, "`rater` is 5 of type int; expected string"),
        ({"seed_0": 2**63}, "`seed_0` is 9223372036854775808; expected int64"),
        ({"prompt": "\ud800"}, "`prompt` is .* which holds half characters"),
        ({"schema_version": 3}, "`schema_version` is 3; this version of onereward reads up to 2"),
        ({"colour": "red"}, r"has the unknown \['colour'\]"),
    ],
)
def test_a_bad_vote_is_refused_with_the_reason(store, change, reason):
    with pytest.raises(ValueError, match=f"^Vote 0 .*{reason}"):
        store.add({**make_vote(0, 0), **change})
    without = make_vote(0, 0)
    del without["rater"]
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['rater'\]"):
        store.add(without)
    assert len(store) == 0


def test_criteria_are_those_of_the_store(path):
    with VoteStore(path, criteria=("beauty",)) as store:
        assert store.add({**make_vote(0, 0), "criterion": "beauty"})
        with pytest.raises(ValueError, match="`criterion` is 'quality'; expected one of"):
            store.add(make_vote(0, 0))


def test_pictures_and_arrays_are_encoded(store):
    vote = make_vote(0, 0)
    row = datasets.Dataset.from_list([complete(vote)], features=VOTE_FEATURES)[0]
    store.add({**row, "mask": np.asarray(row["mask"])})
    assert next(encoded_rows(store.votes())) == complete(vote)


# ------------------------------------------------------------------------------------------------------- to and from


def test_votes_come_out_as_they_went_in(store):
    sent = make_votes(range(0, 60, 3))
    rich = {
        "both_unacceptable": True,
        "comment": "Zu unscharf, \x00 \u00fc \U0001f9e0",
        "left": 1,
        "seconds": 0.1 + 0.2,
    }
    rich |= {"set_id": "set", "window_center": -600.0, "window_width": 1500.0, "seed_0": 2**63 - 1, "model_1": None}
    sent[3] |= rich
    rating = {"kind": "rating", "rating": 3.3, "rating_min": 0, "rating_max": 10, "image_1": None}
    sent[4] |= {**rating, "label_0": None, "label_1": None}
    for vote in sent:
        store.add(vote)
    votes = store.votes()
    assert votes.features == VOTE_FEATURES
    assert votes.data.table.equals(
        datasets.Dataset.from_list([complete(vote) for vote in sent], features=VOTE_FEATURES).data.table
    )


def test_a_store_goes_through_parquet_and_back(store, tmp_path):
    store.add_many(make_votes(range(25)))
    assert store.export(tmp_path / "votes.parquet") == 25
    votes = load_votes(tmp_path / "votes.parquet")
    assert votes.data.table.equals(store.votes().data.table)
    for number, source in enumerate((tmp_path / "votes.parquet", str(tmp_path / "votes.parquet"), votes)):
        with VoteStore(tmp_path / f"other-{number}.sqlite") as other:
            assert other.import_votes(source) == (25, [])
            assert other.import_votes(source) == (0, [])  # again: nothing new
            assert other.votes().data.table.equals(votes.data.table)


def test_an_empty_store_is_an_empty_file(store, tmp_path):
    assert len(store) == 0 and store.votes().features == VOTE_FEATURES
    assert store.export(tmp_path / "votes.parquet") == 0
    assert len(load_votes(tmp_path / "votes.parquet")) == 0
    assert store.import_votes(tmp_path / "votes.parquet") == (0, [])


def test_more_votes_than_are_read_at_once(store):
    store.add_many(make_votes(range(2500)))
    votes = store.votes()
    assert votes["vote_id"] == [f"0-{number}" for number in range(2500)]
    assert list(encoded_rows(votes.select([1999])))[0] == complete(make_vote(0, 1999))


def test_bad_rows_of_an_import_are_refused_and_good_ones_kept_only_if_asked(store):
    rows = [complete(vote) for vote in make_votes(range(6))]
    rows[1]["criterion"] = "beauty"
    rows[2]["image_0"] = None
    rows[4]["vote_id"] = "0-3"
    store.add({**make_vote(0, 5), "rater": "someone"})
    votes = datasets.Dataset.from_list(rows, features=VOTE_FEATURES)
    with pytest.raises(ValueError, match="Vote in row 1: `criterion` is 'beauty'"):
        store.import_votes(votes)
    with pytest.raises(ValueError, match=r"Vote in row 1 \('0-5'\): .*with another content of \['rater'\]"):
        store.import_votes(votes.select([0, 5]))
    assert len(store) == 1
    new, bad = store.import_votes(votes, keep_good=True)
    assert new == 2 and store.votes()["vote_id"] == ["0-5", "0-0", "0-3"]
    assert [row for row, _ in bad] == [1, 2, 4, 5]
    for (_, reason), wanted in zip(bad, ("criterion", "`image_0` is missing", "row 3 too", "'rater'"), strict=True):
        assert wanted in reason


def test_votes_of_version_1_are_upgraded_by_an_import(store, tmp_path):
    votes = datasets.Dataset.from_list([complete(vote) for vote in make_votes(range(3))], features=VOTE_FEATURES)
    save_votes(votes, tmp_path / "new.parquet")
    old = votes.remove_columns(list(VOTE_DEFAULTS)).map(lambda vote: {"schema_version": 1}, features=None)
    old.to_parquet(tmp_path / "old.parquet")
    assert store.import_votes(tmp_path / "old.parquet") == (3, [])
    assert store.import_votes(tmp_path / "new.parquet") == (0, [])


# ----------------------------------------------------------------------------------------------- taken back, published


def test_a_vote_that_was_taken_back_is_left_out_and_stays_on_file(store, path, tmp_path):
    store.add_many(make_votes(range(4)))
    store.retract("0-1")
    store.retract(["0-1", "0-3"])
    assert store.votes()["vote_id"] == ["0-0", "0-2"] and len(store) == 2
    assert store.export(tmp_path / "votes.parquet") == 2
    assert load_votes(tmp_path / "votes.parquet")["vote_id"] == ["0-0", "0-2"]
    assert sql(path, "SELECT vote_id FROM vote ORDER BY number") == [(f"0-{n}",) for n in range(4)]
    assert [vote["retracted"] for vote in store.history("rater-0")] == [0, 1, 0, 1]
    assert store.judged() == [("rater-0", "0-0")]
    store.close()
    assert store.votes()["vote_id"] == ["0-0", "0-2"]


def test_what_was_taken_back_is_not_acknowledged_when_it_comes_again(store):
    store.add_many(make_votes(range(2)))
    store.retract("0-1")
    with pytest.raises(ValueError, match="'0-1' was taken back; give the new answer an id of its own"):
        store.add(make_vote(0, 1))
    votes = datasets.Dataset.from_list([complete(vote) for vote in make_votes(range(3))], features=VOTE_FEATURES)
    new, conflicts = store.import_votes(votes, keep_good=True)
    assert new == 1 and [row for row, _ in conflicts] == [1]
    assert store.votes()["vote_id"] == ["0-0", "0-2"]


def test_what_is_frozen_is_not_taken_back_and_what_was_taken_back_is_not_frozen(store):
    store.add_many(make_votes(range(4)))
    store.freeze(["0-0", "0-1"])
    store.freeze(["0-0"])
    assert store.frozen() == {"0-0", "0-1"}
    with pytest.raises(ValueError, match="'0-1' is published already"):
        store.retract(["0-2", "0-1"])
    assert len(store) == 4  # all or none
    store.retract("0-2")
    with pytest.raises(ValueError, match="'0-2' was taken back"):
        store.freeze(["0-3", "0-2"])
    assert store.frozen() == {"0-0", "0-1"}
    for call in (store.retract, lambda vote: store.freeze([vote])):
        with pytest.raises(ValueError, match="'9-9' is not in the store"):
            call("9-9")


def test_unfrozen_are_the_votes_that_are_old_enough_to_leave(store):
    now = datetime.now(UTC)
    ages = {0: 601, 1: 599, 2: 10_000, 3: -60}  # the last one by a clock that was put back since
    for number, age in ages.items():
        # any way of writing a time, as other programs have
        zone = timezone(timedelta(hours=number - 1))
        created = (
            (now - timedelta(seconds=age)).astimezone(zone).isoformat(timespec=("seconds", "microseconds")[number % 2])
        )
        store.add({**make_vote(0, number), "created_at": created})
    store.add({**make_vote(0, 4), "created_at": "yesterday"})
    assert store.unfrozen(600)["vote_id"] == ["0-0", "0-2", "0-4"]
    assert store.unfrozen()["vote_id"] == [f"0-{n}" for n in range(5)]
    store.freeze(["0-0"])
    store.retract("0-4")
    assert store.unfrozen(600)["vote_id"] == ["0-2"]
    assert next(encoded_rows(store.unfrozen(600))) == next(encoded_rows(store.votes().select([2])))


def test_votes_without_pictures_are_the_same_votes(store):
    store.add_many(make_votes(range(4)))
    assert store.votes(pictures=False).to_dict() == store.votes().remove_columns(list(PICTURES)).to_dict()


def test_a_file_of_the_first_release_is_brought_up_to_date_without_loss(path):
    """The tables as version 0.1 made them, and a vote that its code wrote."""
    columns = ", ".join(
        f'"{name}" ' + ("TEXT REFERENCES picture (sha256)" if name in PICTURES else OLD_TYPES[feature.dtype])
        for name, feature in VOTE_FEATURES.items()
    )
    old = sqlite3.connect(path, isolation_level=None)
    old.execute("PRAGMA journal_mode = WAL")
    old.execute("CREATE TABLE picture (sha256 TEXT PRIMARY KEY NOT NULL, content BLOB NOT NULL)")
    old.execute(f"CREATE TABLE vote (number INTEGER PRIMARY KEY, {columns}, UNIQUE (vote_id))")
    old.execute(f"PRAGMA application_id = {0x4F6E6552}")
    old.execute("PRAGMA user_version = 2")
    for number in range(3):
        vote = complete(make_vote(0, number))
        values = []
        for name, value in vote.items():
            if name in PICTURES and value is not None:
                content = value["bytes"]
                value = hashlib.sha256(content).hexdigest()
                old.execute("INSERT OR IGNORE INTO picture VALUES (?, ?)", (value, content))
            values.append(value)
        names = ", ".join(f'"{name}"' for name in vote)
        old.execute(f"INSERT INTO vote ({names}) VALUES ({', '.join('?' * len(values))})", values)
    old.close()
    with VoteStore(path) as store:
        assert list(encoded_rows(store.votes())) == [complete(vote) for vote in make_votes(range(3))]
        assert store.add_many(make_votes(range(5))) == 2
        store.freeze(["0-0"])
        store.retract("0-4")
        assert store.unfrozen()["vote_id"] == ["0-1", "0-2", "0-3"]
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def test_one_bad_vote_does_not_spoil_those_that_share_its_transaction(store):
    """Threads that wait for the disk are written together; each gets its own outcome."""
    store.add(make_vote(0, 0))
    outcomes = {}

    def write(number):
        vote = {**make_vote(0, 0), "rater": "somebody else"} if number % 3 == 0 else make_vote(0, number)
        try:
            outcomes[number] = store.add(vote)
        except ValueError as error:
            outcomes[number] = str(error)

    together = []
    real = store._write
    store._write = lambda tasks: (together.append(len(tasks)), time.sleep(0.01), real(tasks))
    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 31)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(together) > 1 and sum(together) == 30
    for number, outcome in outcomes.items():
        assert outcome is True if number % 3 else "is in the store with another content" in outcome
    assert set(store.votes()["vote_id"]) == {"0-0", *(f"0-{n}" for n in range(1, 31) if n % 3)}


# ---------------------------------------------------------------------------------------------------------- the file


def test_a_store_is_marked_as_ours(store, path):
    assert sql(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert sql(path, "PRAGMA user_version") == [(VOTE_SCHEMA_VERSION,)]


def test_a_store_of_another_version_is_refused_and_left_alone(path):
    VoteStore(path).close()
    for version in (VOTE_SCHEMA_VERSION + 1, VOTE_SCHEMA_VERSION - 1):
        sql(path, f"PRAGMA user_version = {version}")
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"is a store of version {version}; this version of onereward uses"):
            VoteStore(path)
        assert path.read_bytes() == before


def test_the_file_of_another_program_is_refused_and_left_alone(path):
    sql(path, "CREATE TABLE vote (what TEXT)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the SQLite file of another program"):
        VoteStore(path)
    assert path.read_bytes() == before
    path.write_text("vote_id,rater\n" * 100)
    with pytest.raises(ValueError, match="is not a sound SQLite file: file is not a database"):
        VoteStore(path)
    with pytest.raises(OSError, match="cannot be used: unable to open database file"):
        VoteStore(path.parent)


def test_a_damaged_file_is_found_when_it_is_opened(path):
    with VoteStore(path) as store:
        store.add_many(make_votes(range(300)))
    page = sql(path, "PRAGMA page_size")[0][0]
    content = bytearray(path.read_bytes())
    assert len(content) > 20 * page
    content[8 * page : 12 * page] = os.urandom(4 * page)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a sound SQLite file: .*last exported Parquet file"):
        VoteStore(path)


def test_a_picture_that_was_lost_or_changed_is_found(path):
    with VoteStore(path) as store:
        store.add(make_vote(0, 0))
    sql_write(path, "UPDATE picture SET content = zeroblob(100) WHERE sha256 = (SELECT image_0 FROM vote)")
    with VoteStore(path) as store, pytest.raises(ValueError, match="the picture .* is not what was stored"):
        store.votes()
    sql_write(path, "DELETE FROM picture WHERE sha256 = (SELECT image_0 FROM vote)")
    with pytest.raises(ValueError, match=r"1 picture\(s\) are missing"):
        VoteStore(path)


def test_a_store_is_made_by_many_at_once(path):
    errors = []

    def open_one():
        try:
            VoteStore(path).close()
        except BaseException as error:
            errors.append(error)

    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            open_one()
            os._exit(len(errors))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    with VoteStore(path) as store:
        assert store.add(make_vote(0, 0))


def test_a_closed_store_opens_again(path):
    store = VoteStore(path)
    store.add(make_vote(0, 0))
    store.close()
    assert not path.with_name("votes.sqlite-wal").exists()  # all is in the one file
    assert len(store) == 1
    store.close()


def test_a_store_that_was_stopped_takes_no_new_votes_and_still_gives_and_imports(tmp_path):
    store, other = VoteStore(tmp_path / "votes.sqlite"), VoteStore(tmp_path / "other.sqlite")
    store.add(make_vote(0, 0))
    other.add(make_vote(0, 1))
    store.stop()
    with pytest.raises(OSError, match="takes no more votes"):
        store.add(make_vote(0, 2))
    assert store.import_votes(other.votes()) == (1, [])
    assert len(store) == len(store.votes()) == 2
    assert VoteStore(tmp_path / "votes.sqlite").add(make_vote(0, 2))
