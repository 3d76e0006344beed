"""Votes on their way from a store on this machine to the Hub: none lost, none twice, none overwritten."""

import hashlib
import json
import os
import tempfile
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import datasets
import httpx2
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers.utils import logging

from onereward.hub.agreements import describe_agreement
from onereward.hub.cards import with_section
from onereward.hub.provenance import PROVENANCE_FILE, describe_data, write_provenance
from onereward.hub.published_card import published_card
from onereward.preferences import VoteStore, save_votes


logger = logging.get_logger(__name__)

SHARD = "votes-{}.parquet"
LONGEST_WAIT = 600.0  # seconds between two tries while the Hub cannot be reached
SILENT = 300.0  # seconds without an answer after which that is said
PASSING = {408, 429, 500, 502, 503, 504}  # statuses that are worth another try


class VoteSync:
    r"""
    Sends the votes of a [`~onereward.preferences.VoteStore`] to a data set on the Hub, in the background.

    A vote is safe once the store has it; this makes a second home for it. Votes go in shards, each a file of its own:
    `data/votes-<uuid>.parquet`. A shard is first written into the outbox, a folder beside the store, and its votes are
    frozen, which means that they cannot be taken back any more; it is deleted from there when the Hub is known to
    have it. Whatever is cut short is sent again under the same name. No vote on the Hub is overwritten or deleted.

    What the Hub has is read before anything is sent, so that a store that was lost, or is an old copy, neither loses
    nor doubles a vote. To remove votes for good, remove them from the store and from the Hub while nothing runs: what
    is in one of them alone comes back from there.

    The card and `provenance.json` of the data set are brought up to date with each shard. In a card that people have
    written or changed, only the section "Votes so far" is.

    Args:
        store ([`~onereward.preferences.VoteStore`]):
            The votes. Only one `VoteSync` may send them.
        repo_id (`str`):
            The data set, made where it is missing.
        outbox (`str` or `os.PathLike`):
            Folder of shards that have not been sent, on the disk of the store. One process uses it at a time: a
            second one waits for `patience` seconds.
        undo_seconds (`float`, *optional*, defaults to 600):
            Age at which votes are sent. Until then raters can take them back.
        every (`float`, *optional*, defaults to 60):
            Seconds between two rounds. After a failure the wait doubles, up to 10 minutes.
        private (`bool`, *optional*, defaults to `True`):
            Whether a data set that is made is private.
        token (`str`, *optional*):
            Token with the right to write. Defaults to that of the machine.
        candidates (`str` or `os.PathLike`, *optional*):
            `candidates.parquet` of the study. Where its material is under a data-use agreement, the data set says so,
            is made private in any case, and a public one gets nothing.
        patience (`float`, *optional*, defaults to 30):
            Seconds to wait for another process.

    Raises:
        `TimeoutError`: when another process uses the outbox.

    Example:

    ```python
    >>> from onereward.hub.vote_sync import VoteSync
    >>> from onereward.preferences import VoteStore

    >>> store = VoteStore("study/votes.sqlite")
    >>> sync = VoteSync(store, "org/votes", "study/outbox", candidates="study/candidates.parquet")
    >>> sync.read_back()  # after a restart on an empty disk
    >>> sync.start()
    >>> sync.flush(timeout=25)  # before the process ends
    ```
    """

    def __init__(
        self,
        store: VoteStore,
        repo_id: str,
        outbox: str | os.PathLike,
        *,
        undo_seconds: float = 600,
        every: float = 60,
        private: bool = True,
        token: str | None = None,
        candidates: str | os.PathLike | None = None,
        patience: float = 30.0,
    ):
        self.store, self.repo_id, self.outbox = store, repo_id, Path(outbox)
        self.undo_seconds, self.every = undo_seconds, every
        self.api = HfApi(token=token)
        self.last_push: float | None = None
        self.last_error: str | None = None
        self.refused: list[str] = []
        self._material = []
        if candidates is not None:
            rows = datasets.Dataset(pq.read_table(candidates, columns=["source", "case_id"]))
            self._material = [describe_data("train_data", rows)]
        self._agreements = sorted({mark for parent in self._material for mark in parent["agreements"]})
        self.private = private or bool(self._agreements)
        self._head: str | None = None  # the commit that was looked at
        self._is_private = True
        self._on_hub: dict[str, set[str]] = {}  # shard to its votes, of those that were read or sent
        self._written: dict[str, str] = {}  # what we last wrote into the card and the provenance file, by its digest
        self._has_looked = False
        self._frozen: set[str] = set()  # shards whose votes are known to be frozen
        self._working = threading.Lock()
        self._round_began: float | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

        self.outbox.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.outbox / ".lock", thread_local=False)
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise TimeoutError(
                f"`outbox` {str(self.outbox)!r} is in use by another process, which sends the votes. End that one, or "
                "give this one a store and an outbox of its own."
            ) from None
        for cut_short in self.outbox.glob(".votes-*.partial"):
            cut_short.unlink()
        for shard in self._waiting():
            self._adopt(shard)

    # ------------------------------------------------------------------------------------------------- background

    def start(self) -> None:
        """Send votes in the background until [`~VoteSync.stop`]."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="vote-sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the background work and let go of the outbox. Nothing is sent: use [`~VoteSync.flush`] before."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._lock.release()

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            wait = self.every if self.push() else min(max(2 * wait, self.every), max(LONGEST_WAIT, self.every))

    # ----------------------------------------------------------------------------------------------------- sending

    def push(self, undo_seconds: float | None = None) -> bool:
        """
        Send what is old enough now.

        Args:
            undo_seconds (`float`, *optional*):
                Age at which votes are sent. Defaults to that of the object.

        Returns:
            `bool`: whether nothing is left to send. If not, `state()` says why, and the next round tries again.

        Raises:
            `RuntimeError`: after [`~VoteSync.stop`].
        """
        with self._working:
            if not self._lock.is_locked:
                raise RuntimeError("This `VoteSync` was stopped, and its outbox may be another's. Make a new one.")
            self._round_began = time.monotonic()
            errors = []
            # what is in the outbox is sent even when the disk is full, which makes room
            for step in (lambda: self._seal(self.undo_seconds if undo_seconds is None else undo_seconds), self._send):
                try:
                    if not self._has_looked:
                        self._look()
                    step()
                except Exception as error:  # the disk, the network, or what the Hub says: the next round tries again
                    if (said := self._in_words(error)) not in errors:
                        errors.append(said)
            self._round_began = None
            self._report("; ".join(errors) or None)
            return not errors

    def flush(self, timeout: float = 25.0) -> bool:
        """
        Send everything, also votes that might still be taken back: the process is about to end. Take no more votes
        before you call this.

        Args:
            timeout (`float`, *optional*, defaults to 25):
                Seconds after which this returns.

        Returns:
            `bool`: whether everything has been sent. What has not is in the store and the outbox, and is sent after a
            restart on the same disk.
        """
        sent, out_of_time = threading.Event(), threading.Event()

        def push_all():
            wait = 0.5
            while not self.push(undo_seconds=0):
                if out_of_time.wait(wait):
                    return
                wait = min(2 * wait, 4.0)
            sent.set()

        # in a thread of its own, since the Hub may let us wait for longer than there is time
        threading.Thread(target=push_all, name="vote-sync-flush", daemon=True).start()
        sent.wait(timeout)
        out_of_time.set()
        return sent.is_set()

    def state(self) -> dict:
        """
        How it stands.

        Returns:
            `dict`: `repo_id`; `waiting` (votes that the Hub has not got); `last_push` (a time, or `None`);
            `last_error` (what went wrong in the last round, in one line, or `None`); `refused` (a line for each file
            on the Hub or in the outbox with votes that this store does not take).
        """
        sent = set().union(*list(self._on_hub.values()))
        began, error = self._round_began, self.last_error
        if began is not None and time.monotonic() - began > SILENT:
            error = f"the Hub has not answered for {(time.monotonic() - began) / 60:.0f} minutes; votes are kept here"
        return {
            "repo_id": self.repo_id,
            "waiting": len(self.store) - len(self.store.frozen() & sent),
            "last_push": self.last_push,
            "last_error": error,
            "refused": list(self.refused),
        }

    def _report(self, error: str | None) -> None:
        """Note what became of a round; one line in the log for each change, however long the Hub is away."""
        if error and error != self.last_error:
            logger.warning(f"Votes could not be sent to {self.repo_id} and are kept here: {error}")
        elif self.last_error and not error:
            logger.warning(f"Votes are sent to {self.repo_id} again.")
        self.last_error = error

    def _refuse(self, what: str) -> None:
        if what not in self.refused:
            self.refused.append(what)
            logger.warning(what)

    def _seal(self, undo_seconds: float) -> None:
        """Put the votes that are old enough into a shard of the outbox."""
        for shard in self._waiting():
            if shard.name not in self._frozen:  # that failed when it was written
                self._freeze(shard)
        votes = self.store.unfrozen(older_than_seconds=undo_seconds)
        if len(votes):
            self._freeze(self._new_shard(votes))

    def _new_shard(self, votes: datasets.Dataset) -> Path:
        shard = self.outbox / SHARD.format(uuid.uuid4().hex)
        save_votes(votes, shard)
        return shard

    def _freeze(self, shard: Path) -> None:
        try:
            self.store.freeze(_vote_ids(shard))
        except ValueError:  # one of them was taken back meanwhile: the others go with the next shard
            shard.unlink()
        else:
            self._frozen.add(shard.name)

    def _adopt(self, shard: Path) -> None:
        """A shard that an earlier process left, which may have died at any point, and whose store may be lost."""
        try:
            _, bad = self.store.import_votes(shard, keep_good=True)
            bad = [reason for _, reason in bad if "was taken back" not in reason]
        except ValueError as error:
            bad = [str(error)]
        if bad:  # its good votes are in the store now
            aside = shard.rename(shard.with_name(f"refused-{shard.name}"))
            self._refuse(f"{aside.name} of the outbox has {len(bad)} vote(s) that the store refuses: {bad[0]}")
        else:
            self._freeze(shard)

    def _waiting(self) -> list[Path]:
        return sorted(self.outbox.glob(SHARD.format("*")))

    def _send(self) -> None:
        """Commit what is in the outbox, all in one, and then remove it from there."""
        shards = [shard for shard in self._waiting() if shard.name in self._frozen]
        if not shards:
            return
        files = self._look()
        new = {shard: set(_vote_ids(shard)) for shard in shards if f"data/{shard.name}" not in files}
        if new:  # else a commit was acknowledged late
            votes = set().union(*new.values())
            operations = [CommitOperationAdd(f"data/{shard.name}", shard) for shard in new]
            texts = self._texts(files, votes.union(*self._on_hub.values()))
            operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
            message = f"Add {len(votes)} vote{'s' if len(votes) > 1 else ''}"
            self.api.create_commit(
                self.repo_id, operations, repo_type="dataset", commit_message=message, parent_commit=self._head
            )
            self._written |= {name: _blob_id(text) for name, text in texts.items()}
        self._on_hub |= {f"data/{shard.name}": votes for shard, votes in new.items()}
        for shard in shards:
            shard.unlink()
        self.last_push = time.time()

    # ------------------------------------------------------------------------------------------- card and provenance

    def _texts(self, files: dict[str, str], vote_ids: set[str]) -> dict[str, str]:
        """`README.md` and `provenance.json` for the time when the Hub has these votes, and `files` beside them."""
        votes = self.store.votes(pictures=False)
        votes = votes.select([place for place, vote in enumerate(votes["vote_id"]) if vote in vote_ids])
        old = {}
        if PROVENANCE_FILE in files:
            old = json.loads(Path(self._download(PROVENANCE_FILE)).read_text(encoding="utf-8"))
        facts = describe_data("votes", votes)
        with tempfile.TemporaryDirectory(prefix="onereward-votes-") as folder:
            parents = self._material + [p for p in old.get("parents", ()) if p not in self._material]
            marks = {*facts["agreements"], *old.get("agreements", ())}
            counts = {name: facts[name] for name in ("num_rows", "num_cases", "raters")}
            record = write_provenance(folder, "votes", parents=parents, command="", agreements=marks, **counts)
            (Path(folder) / "data").mkdir()
            pq.write_table(votes.with_format("arrow")[:], Path(folder, "data", "votes-all.parquet"))
            card = published_card("votes", folder, self.repo_id)
        self._check_private(record["agreements"])
        if "README.md" in files and files["README.md"] not in (self._written.get("README.md"), old.get("card_id")):
            theirs = Path(self._download("README.md")).read_text(encoding="utf-8")
            so_far = f"{len(votes)} votes by {sum(facts['raters'].values())} raters, {datetime.now(UTC):%Y-%m-%d}."
            card = with_section(theirs, "Votes so far", so_far)
            record |= {"card_id": old.get("card_id")}
        else:
            record |= {"card_id": _blob_id(card)}  # by which we know it again after a restart
        record |= {name: value for name, value in old.items() if name not in record or name == "version"}
        return {"README.md": card, PROVENANCE_FILE: json.dumps(record, indent=2) + "\n"}

    # ---------------------------------------------------------------------------------------------------- read back

    def read_back(self, patience: float = 120.0) -> int:
        """
        Bring the votes that the Hub has into the store, for a start on an empty disk. And the other way round: votes
        that were frozen but are neither on the Hub nor in the outbox are put into the outbox again.

        Args:
            patience (`float`, *optional*, defaults to 120):
                Seconds to go on trying while the Hub cannot be reached.

        Returns:
            `int`: how many votes are new to the store.

        Raises:
            `ConnectionError`: when the Hub cannot be reached and the store is empty: better no start than raters who
            begin anew. With votes in the store this is made up for in the background.
            `OSError`, `ValueError`: when the store is empty and the Hub refuses, for instance for want of a right.
        """
        deadline, wait, before = time.monotonic() + patience, 1.0, len(self.store)
        while True:
            try:
                with self._working:
                    self._look()
                self._report(None)
                return len(self.store) - before
            except Exception as error:
                self._report(self._in_words(error))
                if _passes(error) and time.monotonic() + wait < deadline:
                    time.sleep(wait)
                    wait = min(2 * wait, 15.0)
                elif before:
                    return len(self.store) - before
                elif _passes(error):
                    raise ConnectionError(f"{self.repo_id} could not be read: {self.last_error}.") from error
                else:
                    raise

    def _look(self) -> dict[str, str]:
        """What the data set holds, name to digest. Votes in it that are new to us come into the store."""
        files = self._files()
        for name in sorted(files):
            if name.startswith("data/") and name.endswith(".parquet") and name not in self._on_hub:
                self._read(name)
        if self._has_looked:
            return files
        known = set().union(*self._on_hub.values())
        for shard in self._waiting():
            ids = set(_vote_ids(shard))
            if ids & known and f"data/{shard.name}" not in files:  # the store is an old copy; the rest goes out anew
                shard.unlink()
            else:
                known |= ids
        if nowhere := self.store.frozen() - known:
            votes = self.store.votes()
            places = [place for place, vote in enumerate(votes["vote_id"]) if vote in nowhere]
            self._freeze(self._new_shard(votes.select(places)))
        self._has_looked = True
        return files

    def _files(self) -> dict[str, str]:
        try:
            info = self.api.dataset_info(self.repo_id, files_metadata=True, timeout=60)
        except RepositoryNotFoundError:
            if self._on_hub:
                raise OSError(
                    f"{self.repo_id} is gone: deleted, renamed, or the token may no longer read it. Votes are kept "
                    "here. Restart, and all of them are sent to a new one"
                ) from None
            self.api.create_repo(self.repo_id, repo_type="dataset", private=self.private, exist_ok=True)
            info = self.api.dataset_info(self.repo_id, files_metadata=True, timeout=60)
        self._head, self._is_private = info.sha, info.private
        self._check_private(self._agreements)
        files = {file.rfilename: file.blob_id for file in info.siblings}
        content = sorted(files.keys() - {".gitattributes", "README.md"})
        if content and PROVENANCE_FILE not in content and not any(name.startswith("data/votes-") for name in content):
            raise ValueError(
                f"{self.repo_id} holds something else than votes, {content[0]} for one. Nothing is put there: name "
                "another data set"
            )
        return files

    def _check_private(self, agreements: list[str]) -> None:
        if agreements and not self._is_private:
            raise ValueError(
                f"{self.repo_id} is public, but the images of the study are under a data-use agreement: "
                f"{'; '.join(map(describe_agreement, agreements))}. Make it private in its settings, or send the "
                "votes to another"
            )

    def _read(self, name: str) -> None:
        """Bring the votes of one file of the Hub into the store, where they stay: they are published."""
        path = self._download(name)
        try:
            ids = _vote_ids(path)
            _, bad = self.store.import_votes(path, keep_good=True)
        except (ValueError, KeyError) as error:
            self._on_hub[name] = set()
            return self._refuse(f"{name} of {self.repo_id} cannot be read: {error}")
        if bad:
            self._refuse(f"{name} of {self.repo_id} has {len(bad)} vote(s) that the store refuses: {bad[0][1]}")
            # of those that contradict the store, its own version must not follow under the same id
            ids = sorted(set(ids).intersection(self.store.votes(pictures=False)["vote_id"]))
        self.store.freeze(ids)
        self._on_hub[name] = set(ids)

    def _download(self, name: str) -> str:
        # by commit: of a branch, an old copy in the cache would do where the Hub does not answer
        return hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self._head, token=self.api.token)

    def _in_words(self, error: Exception) -> str:
        """One line for people, the same for the same cause."""
        cause = _network_error(error)
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status in (401, 403, 404):
                return (
                    f"the token may not read and write {self.repo_id} (the Hub answered {status}); give one with that "
                    "right, as the secret HF_TOKEN"
                )
            if status == 412:
                return "somebody else changed the data set at the same time"
            return f"the Hub answered {status}"
        if cause is not None:
            return f"the connection to the Hub broke ({type(cause).__name__})"
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def _network_error(error: BaseException | None) -> BaseException | None:
    """The answer of the Hub, or the broken connection, behind an error."""
    while error is not None and not isinstance(error, HfHubHTTPError | httpx2.TransportError):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def _passes(error: Exception) -> bool:
    cause = _network_error(error)
    return cause is not None and (not isinstance(cause, HfHubHTTPError) or cause.response.status_code in PASSING)


def _vote_ids(path: str | os.PathLike) -> list[str]:
    return pq.read_table(path, columns=["vote_id"])["vote_id"].to_pylist()


def _blob_id(text: str) -> str:
    """How the Hub names this content of a file."""
    content = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
