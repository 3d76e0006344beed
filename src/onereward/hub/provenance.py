"""Where an artefact comes from: a file that travels with it, and the walk back from it to votes, base and data."""

import dataclasses
import datetime
import enum
import hashlib
import json
import math
import numbers
import os
import re
import shlex
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from onereward.data.load import cached_commit, hub_commit
from onereward.data.whole_file import write_json
from onereward.hub.agreements import find_agreements
from onereward.hub.environment import current_environment, source_commit


PROVENANCE_FILE = "provenance.json"
SCHEMA_VERSION = 1
NOTICE = "Research use only, not for clinical use."
ROLES = ("base_model", "reward_model", "votes", "train_data", "adapter", "backbone")
DATA_ROLES = ("votes", "train_data")  # their names speak of data; those of models may speak of labels
MAX_DEPTH = 50

# What says nothing of the artefact, or too much of whoever made it.
PRIVATE_SETTINGS = re.compile(r"(^|_)(token|secret|password|api_?key|dirs?|path|file|folder|run_name)$", re.I)
PRIVATE_OPTION = re.compile(r"^--?[\w-]*(token|secret|password|api[-_]?key)$", re.I)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{5,}|gh[pousr]_\w+|sk-[\w-]{16,}")
# absolute, home and dotted paths, and those of Windows, wherever they stand in a text
PATH = re.compile(r"""file://\S+|(?<![\w/.])(?:/(?!/)|~[\w-]*/|\.{1,2}/|[A-Za-z]:[\\/])[^\s"'`,;=<>|()\[\]{}]+""")
SNAPSHOT = re.compile(r"(models|datasets|spaces)--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?=[/\\]|$)")


def describe_parent(role, name, revision=None, repo_type="model"):
    """
    What an artefact was made from, so that it can be found again: by repository and commit if it is on the Hub, by a
    fingerprint if it is a folder or file here. The commit is the one that was really loaded, as the local cache knows
    it; the Hub is asked only where the cache does not know.

    Args:
        role (`str`):
            What it was used as: `"base_model"`, `"reward_model"`, `"votes"`, `"train_data"`, `"adapter"` or
            `"backbone"`.
        name (`str` or `os.PathLike`):
            Repository id, folder or file. Of a path on this disk only the last part is written down.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit it was loaded from.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.

    Returns:
        `dict`: `role`, `name`, `repo_type`, `revision` (full commit hash, or `None`), `fingerprint` (SHA-256, or
        `None` for what is not on this disk), `agreements` (from its `provenance.json` and, for data, from its name),
        and for what only this disk has, the `kind` and the `parents` that its own `provenance.json` names. Where
        something could not be found out, `problem` says why.

    Raises:
        ValueError: when `role` is none of these, or a `provenance.json` is not one.

    Example:

    ```python
    >>> from onereward.hub.provenance import describe_parent

    >>> describe_parent("base_model", "pipelines/onereward-brats")["name"]
    'onereward-brats'
    ```
    """
    if role not in ROLES:
        raise ValueError(f"`role` is {role!r}; expected one of {ROLES}.")
    name = os.fspath(name)
    parent = {"role": role, "name": name, "repo_type": repo_type, "revision": None, "fingerprint": None}
    marks = find_agreements(name) if role in DATA_ROLES else []
    record, problem = None, None

    snapshot = SNAPSHOT.search(os.path.abspath(name)) if os.path.exists(name) else None
    if snapshot:  # a download of the Hub, in the cache
        kind, owner, repo, commit = snapshot.groups()
        parent |= {"name": f"{owner}/{repo}", "repo_type": kind.removesuffix("s"), "revision": commit}
        name, repo_type, revision = parent["name"], parent["repo_type"], commit
    if name == "phantom" and role in DATA_ROLES:
        pass  # made by this package, of no folder and no repository
    elif os.path.exists(name) and not snapshot:
        record = read_provenance(name)
        parent |= {"name": Path(os.path.abspath(name)).name, "fingerprint": fingerprint(name)}
        if record is not None:
            parent |= {"kind": record["kind"], "parents": record["parents"]}
    elif is_repo_id(name):
        try:
            record = read_provenance(name, cached_commit(name, revision, repo_type) or revision, repo_type)
        except OSError as error:  # of the Hub and of the cache; training goes on without
            problem = f"its provenance could not be read: {_first_line(error)}"
        parent["revision"] = cached_commit(name, revision, repo_type)
    else:
        parent["name"] = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        problem = "neither a folder or file that is here nor a repository id"
    parent["agreements"] = sorted({*marks, *(record["agreements"] if record else ())})
    return parent | ({"problem": problem} if problem else {})


def describe_data(role, dataset, name=None, revision=None):
    """
    [`describe_parent`] of rows or votes as they were loaded, and what can be counted of them. The values of `source`
    and the case ids are searched for data under an agreement; case ids are not written down.

    Args:
        role (`str`):
            `"train_data"` or `"votes"`.
        dataset (`datasets.Dataset`):
            Rows of the row schema, or votes.
        name (`str` or `os.PathLike`, *optional*):
            What they were loaded by: `"phantom"`, repository id, folder or file. The values of `source` when not
            given.
        revision (`str`, *optional*):
            Revision they were loaded from. The commit that the rows themselves know of comes first.

    Returns:
        `dict`: as of `describe_parent`, and `num_rows`, `num_cases`, `datasets_fingerprint`, `sources` (distinct
        values of `source`), and for votes `raters` (role -> number of raters), as far as there are such columns.

    Example:

    ```python
    >>> from onereward import load_phantom
    >>> from onereward.hub.provenance import describe_data

    >>> parent = describe_data("train_data", load_phantom(2, contrasts=("t1c",)), "phantom")
    >>> parent["num_rows"], parent["num_cases"], parent["sources"]
    (6, 2, ['phantom'])
    ```
    """
    columns = [column for column in ("source", "case_id", "rater", "rater_role") if column in dataset.column_names]
    values = dataset.select_columns(columns).to_dict()
    sources = sorted({_plain(source) for source in values.get("source", ()) if source})
    cases = {case for case in values.get("case_id", ()) if case}
    if name is None:
        name = " and ".join(sources) or "unnamed data"
        parent = {"role": role, "name": name, "repo_type": "dataset", "revision": None, "fingerprint": None}
        parent["agreements"] = []
    else:
        parent = describe_parent(role, name, hub_commit(dataset) or revision, "dataset")
    parent |= {"num_rows": len(dataset), "datasets_fingerprint": dataset._fingerprint}
    if "case_id" in values:
        parent["num_cases"] = len(cases)
    if "source" in values:
        parent["sources"] = sources
    if "rater" in values and "rater_role" in values:
        raters = sorted(set(zip(values["rater_role"], values["rater"], strict=True)))
        parent["raters"] = {role: sum(role == other for other, _ in raters) for role, _ in raters}
    parent["agreements"] = sorted({*parent["agreements"], *find_agreements(*sources, *cases)})
    return parent


def write_provenance(folder, kind, *, parents, config=None, seed=None, command=None, agreements=(), **extra):
    """
    Write `provenance.json` into the folder of an artefact, or `{name}.provenance.json` beside an artefact that is one
    file. No path of this disk, no token and no user's name goes into it: paths become their last part.

    Args:
        folder (`str` or `os.PathLike`):
            The artefact. A folder is made where it is missing.
        kind (`str`):
            `"pipeline"`, `"adapter"`, `"reward-model"`, `"dataset"`, `"votes"` or `"space"`.
        parents (`list[dict]`):
            What it was made from, as [`describe_parent`] and [`describe_data`] give it.
        config (`dict` or `TrainingArguments`, *optional*):
            Settings. Of a dataclass only those that are not its defaults are kept.
        seed (`int`, *optional*):
            Seed of everything.
        command (`str` or `list[str]`, *optional*):
            The command that makes it. The one of this process when not given.
        agreements (`list[str]`, *optional*, defaults to `()`):
            Data-use agreements that hold for it beside those of its parents: keys of
            `onereward.hub.agreements.AGREEMENTS`, or words of one's own.
        **extra:
            Further facts, such as `num_rows`.

    Returns:
        `dict`: what was written.

    Example:

    ```python
    >>> from onereward.hub.provenance import describe_parent, write_provenance

    >>> base = describe_parent("base_model", "pipelines/onereward-brats")
    >>> record = write_provenance("runs/adapter", "adapter", parents=[base], config={"max_steps": 100}, seed=0)
    ```
    """
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "version": None,  # until it is published
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": current_environment(),
        "commit": source_commit(),
        "command": plain_command(sys.argv if command is None else command),
        "seed": seed,
        "config": None if config is None else _plain_settings(config),
        "parents": list(parents),
        "agreements": sorted({*agreements, *(mark for parent in parents for mark in parent["agreements"])}),
        "notice": NOTICE,
    }
    if clash := sorted(record.keys() & extra.keys()):
        raise ValueError(f"`extra` holds {clash}, which every provenance.json has already. Choose other names.")
    record |= {name: _plain(value) for name, value in extra.items()}
    write_json(provenance_path(folder), record)
    return record


def read_provenance(name, revision=None, repo_type="model"):
    """
    The provenance of an artefact.

    Args:
        name (`str` or `os.PathLike`):
            Folder, file (votes, rows) or repository id.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit on the Hub.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.

    Returns:
        `dict` or `None`: as [`write_provenance`] wrote it; `None` where there is no such file.

    Raises:
        OSError: when the Hub cannot be asked, or has no such repository or revision, or does not let us in.
        ValueError: when the file is not a provenance file, or `name` is neither here nor a repository id.
    """
    name = os.fspath(name)
    if os.path.exists(name):
        path = provenance_path(name)
        return _checked(path.read_bytes(), path.name) if path.is_file() else None
    if not is_repo_id(name):
        raise ValueError(
            f"`name` is {name!r}, which is neither a folder or file here nor a Hub id such as 'org/name'."
        )
    try:
        path = hf_hub_download(name, PROVENANCE_FILE, revision=revision, repo_type=repo_type)
    except LocalEntryNotFoundError:  # offline; the cache may know that there is none
        known = try_to_load_from_cache(name, PROVENANCE_FILE, revision=revision, repo_type=repo_type)
        if known is None or isinstance(known, str):
            raise
        return None
    except EntryNotFoundError:
        return None
    return _checked(Path(path).read_bytes(), f"{PROVENANCE_FILE} of {name}")


@dataclasses.dataclass
class Node:
    """
    One artefact in the tree that [`trace`] gives.

    Args:
        role (`str` or `None`):
            What it was used as; `None` at the root.
        name (`str`):
            Repository id, or the last part of a path.
        repo_type (`str`):
            `"model"`, `"dataset"` or `"space"`.
        revision, fingerprint, kind, version, created_at (`str` or `None`):
            As its provenance has them.
        num_rows, num_cases (`int` or `None`):
            Size, of data.
        raters (`dict[str, int]` or `None`):
            Role -> number of raters, of votes.
        agreements (`list[str]`):
            Data-use agreements that it is under.
        problem (`str` or `None`):
            Why the walk ends here, where it ends too early.
        parents (`list[Node]`):
            What it was made from.
    """

    role: str | None
    name: str
    repo_type: str = "model"
    revision: str | None = None
    fingerprint: str | None = None
    kind: str | None = None
    version: str | None = None
    created_at: str | None = None
    num_rows: int | None = None
    num_cases: int | None = None
    raters: dict[str, int] | None = None
    agreements: list[str] = dataclasses.field(default_factory=list)
    problem: str | None = None
    parents: list["Node"] = dataclasses.field(default_factory=list)

    def __str__(self):
        return "\n".join(self._lines())

    def _lines(self):
        lines = [_printable(self._line())]
        for parent in self.parents:
            last = parent is self.parents[-1]
            first, *others = parent._lines()
            lines.append(("└── " if last else "├── ") + first)
            lines += [("    " if last else "│   ") + line for line in others]
        return lines

    def _line(self):
        facts = [self.kind] if self.kind else []
        if self.version:
            facts.append(f"version {self.version}")
        if self.revision:
            facts.append(f"revision {self.revision[:12]}")
        if self.fingerprint:
            facts.append(f"fingerprint {self.fingerprint[:12]}")
        if self.num_rows is not None:
            facts.append(f"{self.num_rows} {'votes' if self.role == 'votes' or self.raters else 'rows'}")
        if self.num_cases is not None:
            facts.append(f"{self.num_cases} cases")
        facts += [f"{count} {role} raters" for role, count in (self.raters or {}).items()]
        if self.agreements:
            facts.append(f"under agreement: {'; '.join(self.agreements)}")
        if self.problem:
            facts.append(f"[{self.problem}]")
        label = f"{self.role.replace('_', ' ')}: " if self.role else ""
        return f"{label}{self.name}" + (f" ({', '.join(facts)})" if facts else "")

    def all_agreements(self):
        """Data-use agreements of this artefact and of everything it was made from, `list[str]`."""
        return sorted({*self.agreements, *(mark for parent in self.parents for mark in parent.all_agreements())})


def trace(name, revision=None, repo_type="model"):
    """
    Walk back from an artefact to everything it was made from: each parent's `provenance.json` is read at the commit
    that was used. What cannot be reached is named with the reason.

    Args:
        name (`str` or `os.PathLike`):
            Folder, file or repository id.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit on the Hub.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.

    Returns:
        [`Node`]: the artefact with its parents; `str()` of it is a tree to read, `dataclasses.asdict` one for JSON.

    Raises:
        OSError: when the artefact itself cannot be reached.
        ValueError: when its file is not a provenance file, or `name` is neither here nor a repository id.

    Example:

    ```python
    >>> from onereward.hub.provenance import describe_parent, trace, write_provenance

    >>> base = describe_parent("base_model", "pipelines/onereward-brats")
    >>> record = write_provenance("runs/adapter", "adapter", parents=[base])
    >>> print(trace("runs/adapter"))  # doctest: +SKIP
    adapter (adapter, fingerprint 9f2c...)
    └── base model: onereward-brats (fingerprint 51d0...)
    ```
    """
    name = os.fspath(name)
    record = read_provenance(name, revision, repo_type)
    root = Node(role=None, name=name, repo_type=repo_type)
    if os.path.exists(name):
        root.name, root.fingerprint = Path(os.path.abspath(name)).name, fingerprint(name)
    else:
        root.revision = cached_commit(name, revision, repo_type)
    _grow(root, record, {_identity(root)}, depth=0)
    return root


def _grow(node, record, seen, depth):
    """Fill a node from its own record, and walk on from there."""
    if record is None:
        node.problem = f"it has no {PROVENANCE_FILE}: what it was made from is not known"
        return
    for field in ("kind", "version", "created_at", "num_rows", "num_cases", "raters"):
        if getattr(node, field) is None:
            setattr(node, field, record.get(field))
    node.agreements = sorted({*node.agreements, *record.get("agreements", ())})
    node.parents = [_walk(parent, seen, depth + 1) for parent in record["parents"]]


def _walk(parent, seen, depth):
    names = {field.name for field in dataclasses.fields(Node)} - {"parents"}
    node = Node(**{key: value for key, value in parent.items() if key in names})
    identity = _identity(node)
    if depth > MAX_DEPTH:
        node.problem = f"more than {MAX_DEPTH} steps back; the walk ends here"
    elif (node.revision or node.fingerprint) and identity in seen:
        node.problem = "see above"
    elif "parents" in parent:  # a folder that nobody else has: what it knew was written down with it
        seen.add(identity)
        _grow(node, parent, seen, depth)
    elif node.revision:
        seen.add(identity)
        try:
            record = read_provenance(node.name, node.revision, node.repo_type)
        except (OSError, ValueError) as error:
            node.problem = f"cannot be reached: {_first_line(error)}"
        else:
            _grow(node, record, seen, depth)
    elif node.fingerprint and node.problem is None:
        node.problem = "on the disk of whoever made this, without a provenance.json"
    return node


def _identity(node):
    return node.repo_type, node.name, node.revision or node.fingerprint


def provenance_path(artefact):
    """
    Where the provenance of an artefact lies: in its folder, or beside it where it is one file. Of an image the name is
    whole, since `healthy.png` and `healthy.dcm` may lie side by side (`Path`).
    """
    path = Path(artefact)
    if path.is_file() or path.suffix == ".parquet":
        of_image = path.with_name(f"{path.name}.{PROVENANCE_FILE}")
        return of_image if of_image.is_file() else path.with_suffix(f".{PROVENANCE_FILE}")
    return path / PROVENANCE_FILE


def fingerprint(artefact):
    """
    SHA-256 over the digests of the files that make an artefact what it is. Cards, provenance files, checkpoints, logs
    and hidden files do not count, so that writing a card does not make it another artefact.

    Args:
        artefact (`str` or `os.PathLike`):
            Folder or file.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    artefact = Path(artefact)
    if artefact.is_file():
        return _digest(artefact)
    files = [(name, artefact / name) for name in files_of(artefact) if not NOT_THE_ARTEFACT.search(name)]
    files = [(name, path) for name, path in files if path.is_file()]
    total = hashlib.sha256()
    for name, path in tqdm(files, desc=f"Fingerprint of {artefact.name}", unit=" files", delay=2, leave=False):
        total.update(f"{name}\0{_digest(path)}\n".encode())
    return total.hexdigest()


NOT_THE_ARTEFACT = re.compile(
    r"(^|/)\.|(^|/)(checkpoint-\d+|last-checkpoint|runs|logs|__pycache__)/|\.md$|(^|[/.])provenance\.json$"
)


def files_of(folder):
    """
    The files of a folder, in those that it links to as well, as whoever loads it finds them.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `list[str]`: names relative to it, sorted. A link to nothing is among them.

    Raises:
        `ValueError`: when a link leads back to a folder that it lies in.
    """
    names = []
    for place, folders, files in os.walk(folder, followlinks=True):
        for inner in folders:
            if Path(place).resolve().is_relative_to(Path(place, inner).resolve()):
                raise ValueError(f"`path` holds {inner!r}, a link to a folder that it lies in. Delete the link.")
        names += [Path(place, name).relative_to(folder).as_posix() for name in files]
    return sorted(names)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_repo_id(name):
    """Whether a name can be that of a repository: `"org/name"`."""
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None and not name.startswith((".", "-"))


def plain_command(command):
    """
    A command line without what belongs to one machine or one person: paths become their last part, tokens `***`.

    Args:
        command (`str` or `list[str]`):
            As typed, or as `sys.argv` has it.

    Returns:
        `str`.

    Example:

    ```python
    >>> from onereward.hub.provenance import plain_command

    >>> plain_command("ddpo.py --output_dir /home/ann/runs/x --hub_token hf_secret --seed=1")
    "ddpo.py --output_dir x --hub_token '***' --seed=1"
    ```
    """
    words, plain, secret = shlex.split(command) if isinstance(command, str) else command, [], False
    for word in words:
        option, equals, value = word.partition("=")
        if secret:
            plain.append("***")
        elif equals and PRIVATE_OPTION.match(option):
            plain.append(f"{option}=***")
        else:
            plain.append(f"{option}={_plain(value)}" if equals else _plain(word))
        secret = not secret and not equals and PRIVATE_OPTION.match(word) is not None
    return shlex.join(plain)


def _plain_settings(config):
    """Settings as JSON values; of a dataclass those that are not its defaults."""
    if dataclasses.is_dataclass(config):
        given, config = config, {}
        for field in dataclasses.fields(given):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = getattr(given, field.name)
            # what is empty either way was tidied by the class, not set by anybody
            if field.init and (value or default) and _plain(value) != _plain(default):
                config[field.name] = value
    return {name: _plain(value) for name, value in config.items() if not PRIVATE_SETTINGS.search(name)}


def _plain(value):
    """A value as JSON has it, without paths and tokens; functions by name, other objects not at all."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not PRIVATE_SETTINGS.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return Path(value).name
    if not isinstance(value, str):
        return getattr(value, "__qualname__", None)
    if re.fullmatch(r"[\w./@+:-]*", value) and "://" not in value:
        # "a/b" may be a path or a repository; "a/b/c" is no repository
        if value.count("/") > 1 or ("/" in value and os.path.exists(value.partition(":")[0])):
            value = value.rstrip("/").rpartition("/")[2]
    value = PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], value)
    return TOKEN.sub("***", value)


def _checked(content, where):
    """The record in a provenance file, or an error that says what is wrong with it: it may come from anybody."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}). Write it anew, or get it from whoever made it.") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema_version"), int):
        raise ValueError(f"{where} is not a provenance file of onereward: it has no `schema_version`.")
    if record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(
            f"{where} is of version {record['schema_version']}; this onereward reads up to {SCHEMA_VERSION}. Upgrade "
            "onereward to read it."
        )
    _check_parents(record, where)
    return {"kind": None, **record}


def _check_parents(record, where):
    parents = record.get("parents")
    if not isinstance(parents, list) or not all(isinstance(parent, dict) for parent in parents):
        raise ValueError(f"{where} is damaged: `parents` is not a list of objects.")
    for parent in (record, *parents):
        if not _is_texts(parent.get("agreements", None)):
            raise ValueError(f"{where} is damaged: `agreements` is not a list of texts.")
    for parent in parents:
        for key, value in parent.items():
            wanted = PARENT_TYPES.get(key)
            if wanted is not None and value is not None and not isinstance(value, wanted):
                raise ValueError(f"{where} is damaged: the `{key}` of a parent is {value!r}.")
        if not isinstance(parent.get("role"), str) or not isinstance(parent.get("name"), str):
            raise ValueError(f"{where} is damaged: a parent has no `role` or no `name`.")
        if "parents" in parent:
            _check_parents(parent, where)


PARENT_TYPES = {
    **dict.fromkeys(("role", "name", "repo_type", "revision", "fingerprint", "kind", "version", "problem"), str),
    "created_at": str,
    "num_rows": int,
    "num_cases": int,
    "raters": dict,
}


def _is_texts(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return _plain(lines[0].strip() if lines else type(error).__name__)


def _printable(text):
    """No control characters: they could rewrite the reader's terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
