"""Publishing: everything that the project makes goes to the Hub in one commit, checked before, or not at all."""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import httpx2
import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm.auto import tqdm

from onereward.hub.about import About
from onereward.hub.agreements import check_agreements, find_agreements
from onereward.hub.artefacts import (
    CHECKPOINT,
    FILES,
    bare_table,
    check_files,
    forget_folders,
    is_published,
    load_parts,
    name_base,
    stage_checkpoint,
    stage_folder,
    write_parts,
)
from onereward.hub.cards import with_section
from onereward.hub.provenance import (
    PROVENANCE_FILE,
    describe_data,
    describe_parent,
    is_repo_id,
    provenance_path,
    read_provenance,
    write_provenance,
)
from onereward.hub.published_card import published_card
from onereward.hub.space import agreements_of_space, complete_space
from onereward.preferences.schema import VOTE_FEATURES, content_id, load_votes, save_votes
from onereward.preferences.store import VoteStore


REPO_TYPES = {"dataset": "dataset", "votes": "dataset", "space": "space"}  # all others are models
CARD, CHANGELOG = "README.md", "CHANGELOG.md"
VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
WAITS = (1.0, 3.0, 9.0)  # seconds before another try
FEW = WAITS[:1]  # where the client itself tries most of its calls six times
PASSING = {429, 500, 502, 503, 504}  # statuses that are worth another try
# What differs each time a record is written, though nothing else does.
VOLATILE = ("created_at", "packages", "commit", "command")


@dataclasses.dataclass
class Published:
    """
    What was published, or, after a dry run, what would be.

    Args:
        url (`str`):
            The repository; of a pull request its page.
        commit (`str` or `None`):
            The commit; `None` after a dry run.
        revision (`str` or `None`):
            The branch, where it is not `"main"`.
        version (`str`):
            Semantic version of the release.
        files (`dict[str, int]`):
            The files of the release, with their sizes in bytes.
        left_out (`list[str]`):
            Files of the folder that are not published.
        removed (`list[str]`):
            Files of the last release that this one has not.
        card (`str`):
            The README.md.
        unchanged (`bool`):
            Whether all of it was there already, so that there is no new commit.
    """

    url: str
    commit: str | None
    revision: str | None
    version: str
    files: dict[str, int]
    left_out: list[str]
    removed: list[str]
    card: str
    unchanged: bool = False


def publish(
    kind: str,
    path: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    gated: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    version: str | None = None,
    changes: str | None = None,
    base_model: str | None = None,
    about: About | None = None,
    permission: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> Published:
    """
    Publish an artefact on the Hub: in one commit, all of it or nothing. It is copied, checked and given its card,
    `provenance.json` and `CHANGELOG.md` first; the folder itself is not changed. What is there already is not sent
    again, and where all of it is, there is no new version. A refused or broken publish can be repeated with the same
    call.

    A release replaces the last one: files of this kind that are no longer in the folder are removed. Votes are the
    exception: those that the repository does not have yet are added in a file of their own, and nothing is ever
    removed or overwritten. Those of a store can no longer be taken back from then on.

    Args:
        kind (`str`):
            `"pipeline"`, `"vae"` (the autoencoder alone), `"adapter"`, `"reward-model"` (a judge too), `"dataset"`,
            `"votes"` or `"space"`.
        path (`str` or `os.PathLike`):
            The folder that was saved; of a data set a folder of `save_to_disk` or a Parquet file; of votes a Parquet
            file or the SQLite file of a [`~onereward.preferences.VoteStore`].
        repo_id (`str`):
            `"org/name"`. The repository is made where it is missing.
        private (`bool`, *optional*, defaults to `False`):
            Make it a private repository, before anything is sent. `False` leaves a repository as it is.
        gated (`bool`, *optional*, defaults to `False`):
            Readers must ask, and be let in by hand. Set before anything is sent. `False` leaves it as it is.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead of committing. There is no tag then.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch to commit to, made from `main` where it is missing.
        version (`str`, *optional*):
            Semantic version, greater than all before. Defaults to the next patch number, at first `"0.1.0"`.
        changes (`str`, *optional*):
            What is new, for the changelog.
        base_model (`str`, *optional*):
            Hub id of the pipeline an adapter is for, or a pipeline was made from, where the folder names one on this
            disk; of a Space the pipeline that it loads in place of the embedded base.
        about ([`~onereward.hub.about.About`], *optional*):
            Authors, licence and the like, for the card.
        permission (`str`, *optional*):
            Who permits to publish what was made from data under an agreement, and where that is written.
        checkpoint (`str` or `os.PathLike`, *optional*):
            A sealed checkpoint to publish as `last-checkpoint/`, from which the training can go on.
        dry_run (`bool`, *optional*, defaults to `False`):
            Ask no network; only prepare and check everything.
        token (`str`, *optional*):
            Token of the Hub. Defaults to that of `hf auth login` or `HF_TOKEN`.

    Returns:
        [`Published`].

    Raises:
        `ValueError`: when something is wrong with the artefact or an argument.
        `PermissionError`: when the token is invalid, or may not write there.
        `ConnectionError`: when the Hub cannot be reached, or does not answer after four tries.
        `OSError`: when the repository has changed meanwhile, the disk is full, or the like.

    Each message says whether something was published, and what to do.

    Example:

    ```python
    >>> from onereward.hub.publish import publish

    >>> done = publish("pipeline", "pipelines/onereward-brats", "org/onereward-brats", dry_run=True)
    >>> done.version, sum(done.files.values()) > 10**6
    ('0.1.0', True)
    ```
    """
    _check_arguments(kind, path, repo_id, create_pr, revision, version, base_model)
    path, repo = Path(path), _Repository(repo_id, REPO_TYPES.get(kind, "model"), token)
    head = None if dry_run else repo.read(revision)
    if head is not None and head.record.get("kind", kind) != kind:
        raise ValueError(
            f"`repo_id` {repo_id!r} is of the kind {head.record['kind']}, not {kind}. Choose another name."
        )

    with tempfile.TemporaryDirectory(prefix="onereward-publish-") as scratch:
        stage = Path(scratch, "repository")
        stage.mkdir()
        try:
            left_out, facts, present = _stage(kind, path, stage, repo, head)
            if kind == "space":
                complete_space(stage, base_model)
                facts = {"agreements": agreements_of_space(stage)}
            if checkpoint is not None:
                stage_checkpoint(Path(checkpoint), stage)
            base_model = _base_of(stage, base_model, kind)
            own_record = _stage_record(kind, path, stage, facts, base_model, permission, head)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"The disk is full: {scratch} has no room for a copy of {path.name!r}. Make room there, or set TMPDIR "
                "to another disk. Nothing was published."
            ) from error

        record = json.loads((stage / PROVENANCE_FILE).read_text(encoding="utf-8"))
        if base_model is not None and not dry_run:
            _find_base(repo, record, base_model)
        check_agreements(record["agreements"], private or (head is not None and head.private), permission)

        def texts(version: str, record: dict) -> dict[str, str]:
            """What depends on the version."""
            text = json.dumps(record | {"version": version}, indent=2) + "\n"
            (stage / PROVENANCE_FILE).write_text(text, encoding="utf-8")
            card_kind = "pipeline" if kind == "vae" else kind
            card = published_card(card_kind, stage, repo_id, base_model=base_model, about=about, version=version)
            if permission is not None and permission not in card:
                card = with_section(card, "Permission", f"Published with permission: {permission}")
            return {CARD: card, PROVENANCE_FILE: text}

        payload = {name: stage / name for name in _names(stage) if name not in (CARD, PROVENANCE_FILE)}
        sizes = {name: file.stat().st_size for name, file in payload.items()}
        changed, removed = sorted(payload), []
        if head is not None:
            changed = [name for name in sorted(payload) if not head.has(name, payload[name])]
            removed = [name for name in head.files if name not in payload and _belongs(kind, name)]
        if head is not None and head.version and not changed and not removed and version in (None, head.version):
            same = record if own_record else record | {key: head.record.get(key) for key in VOLATILE}
            now = texts(head.version, same)
            if now[CARD] == head.texts.get(CARD) and _lasting(now[PROVENANCE_FILE]) == _lasting(
                head.texts[PROVENANCE_FILE]
            ):
                if not create_pr:
                    repo.tag(head.version, head.commit, head.tags)
                url = repo.web(revision)
                files = sizes | {name: len(text.encode()) for name, text in head.texts.items()}
                return Published(url, head.commit, revision, head.version, files, left_out, [], now[CARD], True)

        version = _next_version(version, head)
        now = texts(version, record)
        now[CHANGELOG] = _changelog(head, version, changes, changed, removed)
        files = sizes | {name: len(text.encode()) for name, text in now.items()}
        if dry_run:
            return Published(repo.web(revision), None, revision, version, files, left_out, [], now[CARD])

        repo.check_card(now[CARD])
        parent = repo.prepare(private, gated, revision, head, now[CARD])
        if kind == "votes" and _is_store(path):
            _freeze(path, [stage / name for name in payload if head is None or name not in head.files])
        contents = {**payload, **{name: text.encode() for name, text in now.items()}}
        commit, url = repo.commit(contents, removed, version, changes, parent, create_pr, revision)
        if not create_pr:
            repo.tag(version, commit, ())
        return Published(url, commit, revision, version, files, left_out, removed, now[CARD])


# ------------------------------------------------------------------------------------------------------- preparations


def _check_arguments(kind, path, repo_id, create_pr, revision, version, base_model):
    if kind not in FILES:
        raise ValueError(f"`kind` is {kind!r}; expected one of {list(FILES)}.")
    if not Path(path).exists():
        raise ValueError(f"`path` is {str(path)!r}, but there is nothing there. Correct it.")
    if kind not in ("dataset", "votes") and not Path(path).is_dir():
        raise ValueError(f"`path` is {str(path)!r}, a file; a {kind} is a folder. Name the folder that was saved.")
    if kind == "votes" and not Path(path).is_file():
        raise ValueError(f"`path` is {str(path)!r}; votes are a Parquet file or the SQLite file of a `VoteStore`.")
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo_id` is {repo_id!r}, but a name on the Hub is wanted: 'org/name' or 'user/name'.")
    if create_pr and revision is not None:
        raise ValueError("`create_pr` and `revision` are both given, but a pull request is against main. Drop one.")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}|refs/.*|", revision):
        raise ValueError(f"`revision` is {revision!r}, but the name of a branch is wanted, since a commit is added.")
    if version is not None and not VERSION.fullmatch(version):
        raise ValueError(f"`version` is {version!r}, but a semantic version such as '1.2.0' is wanted.")
    if base_model is not None and not is_repo_id(base_model):
        raise ValueError(f"`base_model` is {base_model!r}, but a name on the Hub is wanted: 'org/name'.")


def _stage(kind, path, stage, repo, head):
    """
    Copy what is to be published. Which files were left out, what is known of rows or votes, and the names of the files
    that the repository has already (of votes).
    """
    if kind == "votes":
        return [], *_stage_votes(path, stage, repo, head)
    if kind == "dataset":
        parts = load_parts(path)
        check_files(stage, write_parts(parts, stage))
        if path.is_dir() and (path / CARD).is_file():
            (stage / CARD).write_bytes((path / CARD).read_bytes())
        return [], _facts(datasets.concatenate_datasets(list(parts.values())), path, repo), []
    left_out = stage_folder(kind, path, stage)
    forget_folders(stage)
    return left_out, {}, []


def _stage_votes(path, stage, repo, head):
    """Put the files of votes that the repository has beside a new one with those that it has not."""
    if _is_store(path):
        with VoteStore(path) as store:
            votes = store.votes()
    else:
        votes = load_votes(path, criteria=None)
    if not len(votes):
        raise ValueError(f"`path` {path.name!r} holds no vote. Publish it when there is one.")
    votes = datasets.Dataset(bare_table(votes))
    present = [] if head is None else [name for name in head.files if is_published("votes", name)]
    (stage / "data").mkdir()
    known = {}
    for name in tqdm(present, desc="Reading the votes that are there", unit=" files", delay=2, leave=False):
        (stage / name).write_bytes(repo.download(name, head.commit))
        known |= _by_id(datasets.Dataset(bare_table(load_votes(stage / name, criteria=None))))
    mine = _by_id(votes)
    conflicts = [vote_id for vote_id, content in mine.items() if known.get(vote_id, content) != content]
    if conflicts:
        raise ValueError(
            f"{len(conflicts)} vote(s), {conflicts[0]!r} among them, are in {repo.repo_id} with another content. A "
            "published vote is never overwritten: find out which is right, and give the other another `vote_id`."
        )
    new = votes.select([index for index, vote_id in enumerate(votes["vote_id"]) if vote_id not in known])
    if len(new):
        save_votes(new, stage / "data/new.parquet")
        shard = f"data/votes-{content_id((stage / 'data/new.parquet').read_bytes())}.parquet"
        (stage / "data/new.parquet").rename(stage / shard)
    everything = [load_votes(file, criteria=None) for file in sorted((stage / "data").iterdir())]
    return _facts(datasets.concatenate_datasets(everything), path, repo), present


def _is_store(path: Path) -> bool:
    """Whether a file of votes is that of a `VoteStore`."""
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _freeze(path, shards):
    """What is published can no longer be taken back, or a rater would be there with both answers."""
    for shard in shards:
        votes = pq.read_table(shard, columns=["vote_id"])["vote_id"].to_pylist()
        try:
            with VoteStore(path) as store:
                store.freeze(votes)
        except ValueError as error:
            raise OSError(
                f"A vote in {path.name} was taken back meanwhile. Nothing was published; do it again."
            ) from error


def _by_id(votes: datasets.Dataset) -> dict[str, str]:
    """Of each vote a digest of all that it says."""
    rows = votes.select_columns(list(VOTE_FEATURES)).with_format("arrow")[:].to_pylist()
    return {row["vote_id"]: hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest() for row in rows}


def _facts(rows, path, repo) -> dict:
    """What can be counted of rows or votes, and the agreements that their names speak of."""
    found = describe_data("votes" if "vote_id" in rows.column_names else "train_data", rows)
    facts = {key: found[key] for key in ("num_rows", "num_cases", "sources", "raters") if key in found}
    return facts | {"agreements": sorted({*found["agreements"], *find_agreements(path.stem, repo.repo_id)})}


def _base_of(stage, base_model, kind) -> str | None:
    """The Hub id of the model that an adapter is for, written into its files."""
    config = stage / "adapter_config.json"
    if kind != "adapter" and not config.is_file():
        return base_model
    if base_model is None:
        named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        base_model = named.get("base_model_name_or_path")
        if base_model is None or not is_repo_id(base_model) or Path(base_model).exists():
            raise ValueError(
                f"The adapter's base model is {base_model!r}, which nobody else can load. Publish that pipeline "
                "first, and name it with `base_model` (`--base-model org/name`)."
            )
    name_base(stage, base_model)
    return base_model


def _find_base(repo, record, base_model):
    """Make sure that the base is on the Hub, and name its commit as a parent."""
    commit = None
    try:
        commit = repo.ask(f"Looking for the base {base_model}", repo.api.repo_info, base_model).sha
        # by itself `describe_parent` goes on without the agreements of a base that cannot be read
        repo.ask(f"Reading the provenance of {base_model}", read_provenance, base_model, commit, waits=FEW)
    except GatedRepoError:
        pass  # it is there, which is enough
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"`base_model` is {base_model!r}, which is not on the Hub, or not for you. Publish it first with "
            "`onereward publish pipeline`, or name another with `base_model` (`--base-model org/name`). Nothing was "
            "published."
        ) from error
    role = "backbone" if record["kind"] == "reward-model" else "base_model"
    old = next((parent for parent in record["parents"] if parent["role"] == role), {})
    if old.get("name") != base_model or not old.get("revision"):
        new = describe_parent(role, base_model, commit)
        if old.get("fingerprint"):  # of what it was trained on, which is that base only by the word of the caller
            trained_on = f"{old['name']} (fingerprint {old['fingerprint'][:12]})"
            new["problem"] = f"said to be {trained_on}, which it was trained on"
        new["agreements"] = sorted({*new["agreements"], *old.get("agreements", ())})
        record["parents"] = [new, *(parent for parent in record["parents"] if parent is not old)]
        record["agreements"] = sorted({*record["agreements"], *new["agreements"]})


def _stage_record(kind, path, stage, facts, base_model, permission, head) -> bool:
    """Write what is known of the origin. Whether the artefact had such a file."""
    source = provenance_path(path)
    if own := source.is_file():
        (stage / PROVENANCE_FILE).write_bytes(source.read_bytes())
    else:
        write_provenance(stage, kind, parents=[], command="")
    record = read_provenance(stage) | {"kind": kind} | {k: v for k, v in facts.items() if k != "agreements"}
    marks = {*record["agreements"], *facts.get("agreements", ())}
    for parent in record["parents"]:
        marks.update(parent["agreements"])
    if kind == "votes" and head is not None:  # the file on the Hub speaks of all votes, not of the new ones alone
        marks.update(head.record.get("agreements", ()))
        record["parents"] += [parent for parent in head.record.get("parents", ()) if parent not in record["parents"]]
    if (stage / CARD).is_file():
        names = RepoCard((stage / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("datasets")
        marks.update(find_agreements(*([names] if isinstance(names, str) else names or ())))
    record["agreements"] = sorted(marks)
    if permission is not None:
        record["permission"] = permission
    (stage / PROVENANCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return own


def _lasting(text: str | bytes) -> dict:
    return {key: value for key, value in json.loads(text).items() if key not in VOLATILE}


def _names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _belongs(kind: str, name: str) -> bool:
    """Whether a file on the Hub is of a release, and goes when a new one has it no more. Votes never go."""
    return kind != "votes" and (is_published(kind, name) or name.startswith(f"{CHECKPOINT}/"))


def _next_version(version: str | None, head: "_Head | None") -> str:
    known = [] if head is None else [tag.removeprefix("v") for tag in head.tags] + [head.version or ""]
    numbers = sorted(tuple(map(int, found.groups())) for found in map(VERSION.fullmatch, known) if found)
    if version is None:
        major, minor, patch = numbers[-1] if numbers else (0, 1, -1)
        return f"{major}.{minor}.{patch + 1}"
    if numbers and tuple(map(int, version.split("."))) <= numbers[-1]:
        last = ".".join(map(str, numbers[-1]))
        raise ValueError(f"`version` is {version}, but {last} is published already. Give a greater one, or none.")
    return version


def _changelog(head, version, changes, changed, removed) -> str:
    if changes is None and head is None:
        changes = "First release."
    if changes is None:
        words = [f"changed {', '.join(changed)}"] if changed else []
        words += [f"removed {', '.join(removed)}"] if removed else []
        changes = "; ".join(words).capitalize() + "." if words else "New card."
    entry = f"## {version} - {datetime.now(UTC):%Y-%m-%d}\n\n{changes}\n"
    title, old = "# Changelog\n", "" if head is None else head.texts.get(CHANGELOG, "")
    return f"{title}\n{entry}" + (f"\n{old.removeprefix(title).lstrip()}" if old else "")


# ------------------------------------------------------------------------------------------------------------ the Hub


@dataclasses.dataclass
class _Head:
    """What a repository holds: the head of the branch, and all tags."""

    commit: str
    private: bool
    gated: bool
    branch_exists: bool
    files: dict[str, Any]
    texts: dict[str, str]
    tags: dict[str, str]

    @property
    def record(self) -> dict:
        return json.loads(self.texts.get(PROVENANCE_FILE, "{}"))

    @property
    def version(self) -> str | None:
        return self.record.get("version")

    def has(self, name: str, path: Path) -> bool:
        """Whether the repository has this very file."""
        there = self.files.get(name)
        if there is None or there.size != path.stat().st_size:
            return False
        if there.lfs is not None:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id


class _Repository:
    """A repository on the Hub, which is asked again when it fails; errors say what was done to it so far."""

    def __init__(self, repo_id: str, repo_type: str, token: str | None):
        self.api = HfApi(token=token)
        self.repo_id, self.repo_type = repo_id, repo_type
        self.state = "Nothing was published."

    def call(self, doing: str, method: Callable, *arguments, waits: tuple[float, ...] = WAITS, **named):
        """Call a method of the API on this repository, see [`ask`]."""
        return self.ask(doing, method, self.repo_id, *arguments, waits=waits, repo_type=self.repo_type, **named)

    def ask(self, doing: str, method: Callable, *arguments, waits: tuple[float, ...] = WAITS, **named):
        """Call a method of the API, and again if it fails in a way that may pass."""
        for wait in (*waits, None):
            try:
                return method(*arguments, **named)
            except (RepositoryNotFoundError, ValueError):
                raise
            except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError, RuntimeError) as error:
                cause = _http_error(error)
                if cause is None:
                    raise
                if wait is None or not _passes(cause):
                    raise self.explain(doing, cause) from error
                tqdm.write(f"{doing}: {_what(cause)}. Trying again in {wait:g} s.", file=sys.stderr)
                time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def explain(self, doing: str, cause: Exception) -> Exception:
        """The error that the user sees: what failed, why, what is published, what to do."""
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status == 401:
            return PermissionError(
                f"{doing} failed: the Hub does not know the token. Log in with `hf auth login`, or set HF_TOKEN to a "
                f"token that may write. {self.state}"
            )
        if status == 403:
            return PermissionError(
                f"{doing} failed: you may not write to {self.repo_id} ({_what(cause)}). Publish under your own name "
                f"or an organisation that you may write in, or open a pull request (`--pr`). {self.state}"
            )
        if status == 412:
            return OSError(
                f"{doing} failed: somebody else has changed {self.repo_id} in the meantime. {self.state} Run the same "
                "command again: it then builds on their change."
            )
        if _passes(cause):
            return ConnectionError(
                f"{doing} failed: {_what(cause)}. {self.state} Run the same command again later; what has arrived is "
                "not sent twice."
            )
        return OSError(f"{doing} failed: {_what(cause)}. {self.state}")

    def web(self, revision: str | None) -> str:
        prefix = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self.api.endpoint}/{prefix}{self.repo_id}" + (f"/tree/{revision}" if revision else "")

    def read(self, revision: str | None) -> _Head | None:
        """What the repository holds, or `None` where there is none (that we may see)."""
        doing = f"Reading {self.repo_id}"
        try:
            info = self.call(doing, self.api.repo_info)
        except GatedRepoError as error:
            raise PermissionError(
                f"{doing} failed: it is gated and you were not let in. Ask for access at {self.web(None)}. Nothing "
                "was published."
            ) from error
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise self.explain(doing, error) from error
            return None
        refs = self.call(doing, self.api.list_repo_refs)
        branches = {branch.name: branch.target_commit for branch in refs.branches}
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        if revision in tags and revision not in branches:
            raise ValueError(f"`revision` is {revision!r}, a tag of {self.repo_id}. Name a branch.")
        branch = revision or "main"
        commit = branches.get(branch, branches["main"])
        entries = self.call(
            doing, lambda *a, **k: list(self.api.list_repo_tree(*a, **k)), recursive=True, revision=commit
        )
        files = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
        texts = {
            name: self.download(name, commit).decode() for name in (CARD, CHANGELOG, PROVENANCE_FILE) if name in files
        }
        return _Head(commit, info.private, bool(info.gated), branch in branches, files, texts, tags)

    def download(self, name: str, commit: str) -> bytes:
        named = {"filename": name, "revision": commit, "waits": FEW}
        return Path(self.call(f"Reading {self.repo_id}", self.api.hf_hub_download, **named)).read_bytes()

    def check_card(self, card: str) -> None:
        """Let the Hub say what is wrong with the metadata while there is still nothing to undo."""
        try:
            self.ask("Checking the card", RepoCard(card).validate, self.repo_type)
        except ValueError as error:
            raise ValueError(
                f"The Hub refuses the metadata of the card: {error} Correct README.md or the file of `about`. Nothing "
                "was published."
            ) from error

    def prepare(self, private: bool, gated: bool, revision: str | None, head: _Head | None, card: str) -> str:
        """Make the repository and the branch where they are missing, close them where that is wanted: the parent."""
        doing = f"Preparing {self.repo_id}"
        if head is None:
            sdk = {"space_sdk": RepoCard(card).data.get("sdk") or "gradio"} if self.repo_type == "space" else {}
            self.call(doing, self.api.create_repo, private=private or None, exist_ok=True, **sdk)
            self.state = f"{self.repo_id} was made and holds only its initial commit: nothing was published."
        try:
            info = self.call(doing, self.api.repo_info)
        except RepositoryNotFoundError as error:  # it is there, as `create_repo` knows, but not for us
            raise self.explain(doing, error) from error
        if private and not info.private:
            self.call(f"Making {self.repo_id} private", self.api.update_repo_settings, private=True)
        if gated and not info.gated:
            self.call(f"Gating {self.repo_id}", self.api.update_repo_settings, gated="manual")
        if revision is not None and (head is None or not head.branch_exists):
            self.call(f"Making the branch {revision}", self.api.create_branch, branch=revision, exist_ok=True)
        return info.sha if head is None else head.commit

    def commit(self, contents, removed, version, changes, parent, create_pr, revision) -> tuple[str, str]:
        """Send everything, then make the one commit. Its id and where to look at it."""
        added = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        where = {"revision": revision, "create_pr": create_pr}
        # no waits of our own: the client tries each of these calls six times
        self.call("Sending the files", self.api.preupload_lfs_files, added, free_memory=False, waits=(), **where)
        digest = hashlib.sha256(
            json.dumps([(file.path_in_repo, file.upload_info.sha256.hex()) for file in added]).encode()
        )
        title = f"Release {version} ({digest.hexdigest()[:16]})"
        send = functools.partial(
            self.api.create_commit,
            operations=[*added, *map(CommitOperationDelete, removed)],
            commit_message=title,
            commit_description=changes,
            parent_commit=parent,
            **where,
        )
        tried = False

        def once(*arguments, **named):
            """Commit, unless an earlier try did and only its answer was lost."""
            nonlocal tried
            if tried and (landed := self.landed(title, create_pr, revision)):
                return landed
            tried = True
            done = send(*arguments, **named)
            return done.oid, done.pr_url or self.web(revision)

        return self.call("Committing", once)

    def landed(self, title: str, create_pr: bool, revision: str | None) -> tuple[str, str] | None:
        """The commit of this title, where it is the last one of the branch, or of the last pull request."""
        here = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        url = self.web(revision)
        if create_pr:
            requests = self.api.list_repo_refs(**here, include_pull_requests=True).pull_requests
            if not requests:
                return None
            revision = max((request.ref for request in requests), key=lambda ref: int(ref.split("/")[-1]))
            url = f"{self.web(None)}/discussions/{revision.split('/')[-1]}"
        last = self.api.list_repo_commits(**here, revision=revision)[0]
        return (last.commit_id, url) if last.title == title else None

    def tag(self, version: str, commit: str, tags) -> None:
        """Tag a release, unless it has its tag."""
        if f"v{version}" not in tags:
            self.state = f"Version {version} is published; only its tag is missing, and the same command adds it."
            doing = f"Tagging version {version}"
            self.call(doing, self.api.create_tag, tag=f"v{version}", revision=commit, exist_ok=True)


def _http_error(error: BaseException | None) -> Exception | None:
    """The answer of the Hub, or the broken connection, behind an error of the client."""
    while error is not None and not isinstance(error, HfHubHTTPError | httpx2.TransportError):
        error = error.__cause__
    return error


def _passes(cause: Exception) -> bool:
    return isinstance(cause, httpx2.TransportError) or cause.response.status_code in PASSING


def _what(cause: Exception) -> str:
    """An answer or a broken connection in a few words."""
    if isinstance(cause, httpx2.TransportError):
        return f"the connection to the Hub broke ({str(cause) or type(cause).__name__})"
    said = cause.server_message or cause.response.reason_phrase
    return f"the Hub answered {cause.response.status_code} ({said})"
