"""Votes as they come in, from many raters at once, kept in one SQLite file: what was acknowledged is not lost."""

import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import datasets
import pyarrow as pa

from onereward.preferences.schema import (
    CRITERIA,
    PICTURES,
    VOTE_DEFAULTS,
    VOTE_FEATURES,
    VOTE_SCHEMA_VERSION,
    encode_picture,
    encoded_rows,
    read_votes,
    save_votes,
    upgrade_votes,
    validate_votes,
    wrong_vote,
)


# "OneR", in the header of the file, so that another program's file is not taken for ours
APPLICATION_ID = 0x4F6E6552

# what `VoteStore.history` tells of a vote
HISTORY = (
    *("vote_id", "set_id", "pair_id", "criterion", "label_0", "both_unacceptable", "rating", "left", "rater_role"),
    "created_at",
)

_SQL_TYPES = {"string": "TEXT", "bool": "INTEGER", "int": "INTEGER", "float": "REAL"}
_KINDS = {
    column: "picture" if column in PICTURES else feature.dtype.rstrip("0123456789")
    for column, feature in VOTE_FEATURES.items()
}
_COLUMNS = ", ".join(f'"{column}"' for column in VOTE_FEATURES)
_TABLES = {
    "picture": "CREATE TABLE IF NOT EXISTS picture (sha256 TEXT PRIMARY KEY NOT NULL, content BLOB NOT NULL)",
    "vote": "CREATE TABLE IF NOT EXISTS vote (number INTEGER PRIMARY KEY, "
    + ", ".join(
        f'"{column}" ' + ("TEXT REFERENCES picture (sha256)" if kind == "picture" else _SQL_TYPES[kind])
        for column, kind in _KINDS.items()
    )
    + ", UNIQUE (vote_id))",
    # older files do not have these three
    "retracted": "CREATE TABLE IF NOT EXISTS retracted "
    "(vote_id TEXT PRIMARY KEY NOT NULL REFERENCES vote (vote_id), retracted_at TEXT NOT NULL)",
    "frozen": "CREATE TABLE IF NOT EXISTS frozen (vote_id TEXT PRIMARY KEY NOT NULL REFERENCES vote (vote_id))",
    "vote_of_rater": "CREATE INDEX IF NOT EXISTS vote_of_rater ON vote (rater, pair_id)",
}
_COUNTS = "vote_id NOT IN (SELECT vote_id FROM retracted)"
_CAST = {"string": str, "bool": bool, "int": int, "float": float}
# Another connection holds the lock, or is mending the log after a crash: it is worth trying again.
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
# The disk is full, or the file may not be written, or the like.
_UNUSABLE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}

# SQLite keeps the locks of all connections of a process in one place, which a fork copies although the system does not
# pass the locks on: the child would believe that it holds them, and spoil the file. So a process works on one file at
# a time, and before a fork all connections are closed; each is opened anew when next used.
_working = threading.Lock()
_files: "weakref.WeakSet[DurableFile]" = weakref.WeakSet()


def _before_fork():
    _working.acquire()
    for file in _files:
        file._disconnect()


def _after_fork_in_child():
    for file in _files:
        file._tasks.clear()  # of threads that the child does not have
    _working.release()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_working.release, after_in_child=_after_fork_in_child)


class _Task:
    """Work on a connection, and what came of it. An error of SQLite's own is one of the file, not of the task."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any]):
        self.work, self.result, self.error, self.done = work, None, None, False

    def run(self, connection: sqlite3.Connection) -> None:
        self.result = self.error = None
        try:
            self.result = self.work(connection)
        except sqlite3.Error:
            raise
        except Exception as error:
            self.error = error

    def outcome(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


class DurableFile:
    """
    An SQLite file for many writers at once, threads and processes, in which what was written is on the disk.

    A subclass says what the file holds: `application_id` (a number in its header), `version`, `tables` (name to the
    statement that makes it if it is not there), `kind` and `remedy` (what to do about a damaged file), for messages.
    """

    application_id: int
    version: int
    tables: dict[str, str]
    kind: str
    remedy: str

    def __init__(self, path: str | os.PathLike, timeout: float = 30.0):
        self.path = Path(path)
        self.timeout = timeout
        self._connection: sqlite3.Connection | None = None
        self._tasks: list[_Task] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _files.add(self)
        self._run(self._check_integrity, write=False)

    def close(self) -> None:
        """Let go of the file, which is opened again when it is next used."""
        with _working:
            self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _run(self, work: Callable[[sqlite3.Connection], Any], write: bool) -> Any:
        """Do the work in one transaction, which is on the disk when this returns, or leaves nothing behind."""
        task = _Task(work)
        if not write:
            with _working:
                self._attempt(lambda: _transaction(self._connection, task.run, write=False))
            return task.outcome()
        # Threads that wait while another one writes are served together by the next: their work goes into one
        # transaction, and the disk, which takes most of the time, is waited for once.
        self._tasks.append(task)
        try:
            with _working:
                if not task.done:
                    self._attempt(lambda: self._write(list(self._tasks)), lambda: self._write([task]))
        finally:
            if task in self._tasks:
                self._tasks.remove(task)
        return task.outcome()

    def _write(self, tasks: list["_Task"]) -> None:
        def run_all(connection):
            for task in tasks:
                connection.execute("SAVEPOINT task")
                task.run(connection)
                if task.error is not None:
                    connection.execute("ROLLBACK TO task")
                connection.execute("RELEASE task")

        _transaction(self._connection, run_all, write=True)
        for task in tasks:
            task.done = True
            self._tasks.remove(task)

    def _attempt(self, work: Callable[[], None], alone: Callable[[], None] | None = None) -> None:
        """Try until the file is free. What fails for another reason is tried once more `alone`, if that is given."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                return work()
            except sqlite3.DatabaseError as error:
                code = error.sqlite_errorcode & 0xFF if hasattr(error, "sqlite_errorcode") else None
                if code not in _PASSING and alone is not None:
                    work, alone = alone, None
                    continue
                if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                    raise ValueError(self._damaged(str(error))) from error
                if code in _UNUSABLE:
                    raise OSError(
                        f"`path` {str(self.path)!r} cannot be used: {error}. Nothing was acknowledged; mend the "
                        "cause and send the votes again."
                    ) from error
                if code not in _PASSING:
                    raise
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"`path` {str(self.path)!r} was held by other writers for {self.timeout} s; nothing was "
                        "stored. Try again, or give a longer `timeout`."
                    ) from error
            time.sleep(random.uniform(0.001, 0.02))

    def _connect(self) -> sqlite3.Connection:
        # `timeout`: `_run` does the waiting, in short random steps. SQLite waits up to 100 ms at a time, and 8 writers
        # are then 1.5 to 3 times slower and the unlucky one waits for seconds. `check_same_thread`: one connection
        # serves all threads, one after the other, see `_working`.
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            complete = self._is_complete(connection)
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise ValueError(
                    f"`path` {str(self.path)!r} lies where a write-ahead log does not work (it is {mode!r} instead); "
                    "put it on a local disk."
                )
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")  # macOS: through the disk's own cache; nothing elsewhere
            connection.execute("PRAGMA foreign_keys = ON")
            if not complete:
                _transaction(connection, self._create, write=True)
        except BaseException:
            connection.close()
            raise
        return connection

    def _is_complete(self, connection: sqlite3.Connection) -> bool:
        """Whether the file has all our tables. It may be empty, or older, but not what we cannot use."""
        (application,), (version,) = (
            connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if not found:
            return False
        if application != self.application_id:
            raise ValueError(
                f"`path` {str(self.path)!r} is the SQLite file of another program, not a {self.kind}; give another."
            )
        if version != self.version:
            raise ValueError(
                f"`path` {str(self.path)!r} is a {self.kind.split()[0]} of version {version}; this version of "
                f"onereward uses {self.version}. Upgrade onereward, or export the votes with the version that made it."
            )
        return found >= set(self.tables)

    def _create(self, connection: sqlite3.Connection) -> None:
        if self._is_complete(connection):  # another process was faster
            return
        for statement in self.tables.values():
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {self.application_id}")
        connection.execute(f"PRAGMA user_version = {self.version}")

    def _check_integrity(self, connection: sqlite3.Connection) -> None:
        faults = [row[0] for row in connection.execute("PRAGMA integrity_check(3)") if row[0] != "ok"]
        missing = connection.execute("PRAGMA foreign_key_check").fetchall()
        if missing:
            faults.append(f"{len(missing)} picture(s) are missing")
        if faults:
            raise ValueError(self._damaged("; ".join(faults)))

    def _damaged(self, fault: str) -> str:
        return f"`path` {str(self.path)!r} is not a sound SQLite file: {fault}. {self.remedy}"

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class VoteStore(DurableFile):
    r"""
    A store of votes in one SQLite file, for many writers at once: threads, processes, and both.

    - A vote is on the disk before [`~VoteStore.add`] returns (write-ahead log, `synchronous=FULL`): a process that is
      killed, or a machine that loses power, loses no vote that was acknowledged.
    - A vote may be sent again, for instance when the answer got lost: it is acknowledged again and stored once. The
      same `vote_id` with another content is refused.
    - Pictures are stored once, by the SHA-256 of their file.
    - No row is ever changed or removed. A vote that was taken back is noted in a table of its own.

    The file has two companions while it is open, `...-wal` and `...-shm`: copy all three, or [`~VoteStore.export`]. It
    must lie on a local disk, since a write-ahead log does not work over a network.

    Args:
        path (`str` or `os.PathLike`):
            The file, made where it is missing, with its folder.
        criteria (`tuple[str, ...]`, *optional*, defaults to `CRITERIA`):
            The criteria there are. Votes on others are refused.
        timeout (`float`, *optional*, defaults to `30.0`):
            How long to wait for other writers, in seconds.

    Raises:
        `ValueError`: when the file is damaged, is not a store of votes, or was made by a newer version of onereward.
        `TimeoutError`: when other writers do not let go of the file in time.
        `OSError`: when the file cannot be opened.

    Example:

    ```python
    >>> from onereward.preferences.store import VoteStore

    >>> with VoteStore("votes.sqlite") as store:
    ...     store.add(vote)
    ...     store.export("votes.parquet")
    ```
    """

    application_id = APPLICATION_ID
    version = VOTE_SCHEMA_VERSION
    tables = _TABLES
    kind = "store of votes"
    remedy = (
        "Set it aside, put a copy of the last good file in its place or import the last exported Parquet file into a "
        "new store; `sqlite3 FILE .recover` may save more."
    )

    def __init__(self, path: str | os.PathLike, criteria: tuple[str, ...] = CRITERIA, timeout: float = 30.0):
        self.criteria = tuple(criteria)
        self._checked: dict[tuple, str | None] = {}
        self._stopped = False
        super().__init__(path, timeout)

    def add(self, vote: dict) -> bool:
        """
        Store one vote. When this returns, the vote is on the disk.

        Args:
            vote (`dict`):
                The columns of `VOTE_FEATURES`. Those in `VOTE_DEFAULTS` and `schema_version` may be left out. Pictures
                are `PIL.Image.Image`, `np.ndarray`, or `{"bytes": ...}` with an encoded file; of one that tells more
                than its pixels, the pixels are stored.

        Returns:
            `bool`: `True` when the vote is new, `False` when it was in the store already.

        Raises:
            `ValueError`: when the vote is not valid, or its `vote_id` is that of another vote in the store.
            `TimeoutError`: when other writers do not let go of the file in time. The vote is not stored.
            `OSError`: when the file cannot be written.
        """
        return self.add_many([vote]) == 1

    def add_many(self, votes: Iterable[dict]) -> int:
        """
        Store several votes, all of them or, after an error, none.

        Args:
            votes (`Iterable[dict]`):
                Each as in [`~VoteStore.add`].

        Returns:
            `int`: how many of them are new.

        Raises:
            `ValueError`, `OSError`: as [`~VoteStore.add`], with the number of the vote, counted from 0.
        """
        complete = []
        for index, vote in enumerate(votes):
            unknown = [column for column in vote if column not in VOTE_FEATURES]
            vote = {**VOTE_DEFAULTS, "schema_version": VOTE_SCHEMA_VERSION, **vote}
            missing = [column for column in VOTE_FEATURES if column not in vote]
            if unknown or missing:
                raise ValueError(
                    f"Vote {index} lacks the column(s) {missing} and has the unknown {unknown}; expected those of "
                    f"`VOTE_FEATURES`, {list(VOTE_FEATURES)}."
                )
            vote |= {column: encode_picture(vote[column]) for column in PICTURES}
            reason = wrong_vote(vote, self.criteria, self._checked)
            if reason is not None:
                raise ValueError(f"Vote {index} ({vote['vote_id']!r}): {reason}.")
            complete.append((index, vote))
        return self._insert(complete, "Vote {} ({!r})", is_new=True)[0]

    def stop(self) -> None:
        """
        Take no more new votes: [`~VoteStore.add`] raises an `OSError` from now on, in this process. For its end, so
        that nothing is acknowledged any more once the votes are sent elsewhere.
        """
        with _working:
            self._stopped = True

    def import_votes(
        self, votes: str | os.PathLike | datasets.Dataset, keep_good: bool = False
    ) -> tuple[int, list[tuple[int, str]]]:
        """
        Store the votes of a Parquet file or a data set, all of them or, after an error, none. Votes of an older
        version of the schema are upgraded; those that are in the store already are not stored again.

        Args:
            votes (`str`, `os.PathLike` or `datasets.Dataset`):
                A file as written by [`~onereward.preferences.save_votes`], or rows of `VOTE_FEATURES`.
            keep_good (`bool`, *optional*, defaults to `False`):
                Whether bad rows are left out and reported instead of refused with all others.

        Returns:
            `tuple[int, list[tuple[int, str]]]`: how many votes are new; and of each row that was left out its number,
            counted from 0, and the reason.

        Raises:
            `ValueError`: when the file or its columns are not those of votes; or, without `keep_good`, when a row is
            not valid or has the `vote_id` of another vote in the store.
            `OSError`: as [`~VoteStore.add`].
        """
        votes = upgrade_votes(votes) if isinstance(votes, datasets.Dataset) else read_votes(votes)
        good, bad = validate_votes(votes, self.criteria, keep_good)
        refused = {index for index, _ in bad}
        numbers = (index for index in range(len(votes)) if index not in refused)
        rows = ((n, {**row, **_embedded(row)}) for n, row in zip(numbers, encoded_rows(good), strict=True))
        new, conflicts = self._insert(list(rows), "Vote in row {} ({!r})", keep_good)
        return new, sorted(bad + conflicts)

    def __len__(self) -> int:
        """How many votes there are."""
        return self._query(f"SELECT count(*) FROM vote WHERE {_COUNTS}")[0][0]

    def votes(self, pictures: bool = True) -> datasets.Dataset:
        """
        All votes, in the order in which they were stored, but for those that were taken back.

        Args:
            pictures (`bool`, *optional*, defaults to `True`):
                Whether the pictures are wanted. Without them it takes little time and memory.

        Returns:
            `datasets.Dataset`: rows of `VOTE_FEATURES`, in memory, without the columns of the pictures if not wanted.

        Raises:
            `ValueError`: when a picture in the file is damaged.
        """
        return datasets.Dataset(self._run(lambda connection: self._read(connection, _COUNTS, (), pictures), False))

    def retract(self, vote_ids: str | Iterable[str]) -> None:
        """
        Take votes back, all of them or, after an error, none. The rows stay in the file, but [`~VoteStore.votes`],
        [`~VoteStore.export`] and `len` leave them out, and they can never be added again: who answers anew needs a new
        `vote_id`. To take back what was taken back changes nothing.

        Args:
            vote_ids (`str` or `Iterable[str]`):
                The votes.

        Raises:
            `ValueError`: when there is no such vote, or it is frozen.
            `TimeoutError`, `OSError`: as [`~VoteStore.add`]. Nothing is taken back.
        """
        vote_ids = [vote_ids] if isinstance(vote_ids, str) else list(vote_ids)
        now = datetime.now(UTC).isoformat()

        def retract(connection):
            for vote_id in vote_ids:
                self._must_be(connection, vote_id, "frozen", "is published already and cannot be taken back")
                connection.execute("INSERT OR IGNORE INTO retracted VALUES (?, ?)", (vote_id, now))

        self._run(retract, write=True)

    def freeze(self, vote_ids: Iterable[str]) -> None:
        """
        Mark votes as frozen, all of them or, after an error, none: what is published elsewhere is not taken back here.
        To freeze what is frozen changes nothing.

        Args:
            vote_ids (`Iterable[str]`):
                The votes.

        Raises:
            `ValueError`: when there is no such vote, or it was taken back in the meantime.
            `TimeoutError`, `OSError`: as [`~VoteStore.add`]. Nothing is frozen.
        """
        vote_ids = list(vote_ids)

        def freeze(connection):
            for vote_id in vote_ids:
                self._must_be(connection, vote_id, "retracted", "was taken back; leave it out")
                connection.execute("INSERT OR IGNORE INTO frozen VALUES (?)", (vote_id,))

        self._run(freeze, write=True)

    def frozen(self) -> set[str]:
        """The `vote_id`s of the frozen votes."""
        return {vote_id for (vote_id,) in self._query("SELECT vote_id FROM frozen")}

    def unfrozen(self, older_than_seconds: float = 0.0) -> datasets.Dataset:
        """
        The votes that are neither frozen nor taken back, in the order in which they were stored.

        Args:
            older_than_seconds (`float`, *optional*, defaults to `0.0`):
                Only those whose `created_at` is at least so long ago; at 0 all. A `created_at` that is no time counts
                as long ago, and so does one that lies as far ahead: the clock was wrong.

        Returns:
            `datasets.Dataset`: rows of `VOTE_FEATURES`, in memory.

        Raises:
            `ValueError`: when a picture in the file is damaged.
        """
        where, values = f"{_COUNTS} AND vote_id NOT IN (SELECT vote_id FROM frozen)", ()
        if older_than_seconds > 0:  # at 0 the clock does not matter, which may have been put back
            where += " AND coalesce(julianday(created_at), 0) NOT BETWEEN julianday(?) AND julianday(?)"
            now, ago = datetime.now(UTC), timedelta(seconds=older_than_seconds)
            values = tuple(time.isoformat(timespec="milliseconds") for time in (now - ago, now + ago))
        return datasets.Dataset(self._run(lambda connection: self._read(connection, where, values), write=False))

    def history(self, rater: str) -> list[dict]:
        """
        What one rater has voted, oldest first, what was taken back included.

        Args:
            rater (`str`):
                The pseudonym.

        Returns:
            `list[dict]`: the columns `HISTORY` of each vote, and `retracted`.
        """
        columns = ", ".join(HISTORY)
        rows = self._query(
            f"SELECT {columns}, vote_id IN (SELECT vote_id FROM retracted) FROM vote WHERE rater = ? ORDER BY number",
            rater,
        )
        return [dict(zip((*HISTORY, "retracted"), row, strict=True)) for row in rows]

    def judged(self) -> list[tuple[str, str]]:
        """Rater and `pair_id` of all votes, each once, but for those that were taken back."""
        return self._query(f"SELECT DISTINCT rater, pair_id FROM vote WHERE {_COUNTS}")

    def export(self, path: str | os.PathLike) -> int:
        """
        Write all votes, but for those that were taken back, to a Parquet file with
        [`~onereward.preferences.save_votes`].

        Args:
            path (`str` or `os.PathLike`):
                The file, replaced if it exists.

        Returns:
            `int`: how many votes were written.
        """
        votes = self.votes()
        save_votes(votes, path)
        return len(votes)

    def _insert(self, votes: list[tuple[int, dict]], named: str, keep_good: bool = False, is_new: bool = False):
        """Votes that were checked, each with its number. How many are new, and of each conflict the reason."""
        rows = [(number, *_record(vote)) for number, vote in votes]

        def insert(connection):
            if is_new and self._stopped:  # looked at here, where nobody else writes
                raise OSError("The store takes no more votes, since the process ends. Send them to the next one.")
            new, conflicts = 0, []
            for number, values, pictures in rows:
                stored = connection.execute(f"SELECT {_COLUMNS} FROM vote WHERE vote_id = ?", (values[0],)).fetchone()
                if stored is None:
                    connection.executemany("INSERT OR IGNORE INTO picture VALUES (?, ?)", pictures.items())
                    places = ", ".join("?" * len(values))
                    connection.execute(f"INSERT INTO vote ({_COLUMNS}) VALUES ({places})", values)
                    new += 1
                    continue
                reason = None
                if connection.execute("SELECT 1 FROM retracted WHERE vote_id = ?", values[:1]).fetchone():
                    reason = f"`vote_id` {values[0]!r} was taken back; give the new answer an id of its own"
                elif stored != values:
                    differ = [c for c, old, now in zip(VOTE_FEATURES, stored, values, strict=True) if old != now]
                    reason = (
                        f"`vote_id` {values[0]!r} is in the store with another content of {differ}; give another vote "
                        "another id, and send the same vote again as it was"
                    )
                if reason is not None:
                    if not keep_good:
                        raise ValueError(f"{named.format(number, values[0])}: {reason}.")
                    conflicts.append((number, reason))
            return new, conflicts

        return self._run(insert, write=True)

    def _query(self, query: str, *values) -> list[tuple]:
        return self._run(lambda connection: connection.execute(query, values).fetchall(), write=False)

    @staticmethod
    def _must_be(connection: sqlite3.Connection, vote_id: str, table: str, fault: str) -> None:
        """In the store, and not in this table."""
        if not connection.execute("SELECT 1 FROM vote WHERE vote_id = ?", (vote_id,)).fetchone():
            raise ValueError(f"`vote_id` {vote_id!r} is not in the store; give the id of a vote that is.")
        if connection.execute(f"SELECT 1 FROM {table} WHERE vote_id = ?", (vote_id,)).fetchone():
            raise ValueError(f"`vote_id` {vote_id!r} {fault}.")

    def _read(self, connection: sqlite3.Connection, where: str, values: tuple, with_pictures: bool = True) -> pa.Table:
        features = datasets.Features(
            {c: VOTE_FEATURES[c] for c in VOTE_FEATURES if with_pictures or c not in PICTURES}
        )
        schema, names = features.arrow_schema, ", ".join(f'"{column}"' for column in features)
        cursor = connection.execute(f"SELECT {names} FROM vote WHERE {where} ORDER BY number", values)
        tables = []
        while rows := cursor.fetchmany(1000):  # in pieces, since an Arrow array holds 2 GB of pictures at most
            pictures: dict[str | None, dict | None] = {None: None}
            columns = dict(zip(features, map(list, zip(*rows, strict=True)), strict=True))
            for column in features:
                kind = _KINDS[column]
                if kind == "bool":
                    columns[column] = list(map(bool, columns[column]))
                elif kind == "picture":
                    for digest in set(columns[column]) - pictures.keys():
                        pictures[digest] = {"bytes": self._picture(connection, digest), "path": None}
                    columns[column] = [pictures[digest] for digest in columns[column]]
            tables.append(pa.Table.from_pydict(columns, schema=schema))
        return pa.concat_tables(tables) if tables else pa.Table.from_pylist([], schema=schema)

    def _picture(self, connection: sqlite3.Connection, digest: str) -> bytes:
        (content,) = connection.execute("SELECT content FROM picture WHERE sha256 = ?", (digest,)).fetchone()
        if sha256(content).hexdigest() != digest:  # SQLite has no checksums of its own
            raise ValueError(self._damaged(f"the picture {digest} is not what was stored"))
        return content


def _transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], Any], write: bool) -> Any:
    # IMMEDIATE takes the lock at once and waits for it; a reader that turns writer later may not wait and fails
    connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        result = work(connection)
        connection.execute("COMMIT")
        return result
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _embedded(row: dict) -> dict:
    return {column: encode_picture(row[column]) for column in PICTURES}


def _record(vote: dict) -> tuple[tuple, dict[str, bytes]]:
    """A vote as a row of the table, pictures as digests; and the pictures."""
    values, pictures = [], {}
    for column, kind in _KINDS.items():
        value = vote[column]
        if value is None:
            values.append(None)
        elif kind == "picture":
            digest = sha256(value["bytes"]).hexdigest()
            pictures[digest] = value["bytes"]
            values.append(digest)
        else:
            values.append(_CAST[kind](value))
    return tuple(values), pictures
