"""
A Hugging Face Hub on this machine: the part of its protocol that huggingface_hub, datasets, diffusers, transformers
and the `hf` command line call. It has repositories of all three types, branches, tags, pull requests, private and
gated repositories, large files (LFS), pages of listings, and faults on demand.

    with LoopbackHub("some/folder") as hub:
        subprocess.run(command, env=hub.env(home="scratch"))

It speaks plain HTTP, and a commit is a JSON object, not git. The token `hf_<name>` is that user, whatever the name;
every user is a member of the organisations in `ORGS`. Any other token is invalid. The libraries read `HF_ENDPOINT` and
the rest of [`LoopbackHub.env`] when they are imported.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


ORGS = ["org", "acme"]
PAGE = 1000  # entries of a listing in one answer
LFS_THRESHOLD = 10 * 2**20
LFS_SUFFIXES = (
    ".safetensors .bin .pt .pth .ckpt .parquet .arrow .png .jpg .jpeg .npz .npy .zip .gz .gguf .tar .nii".split()
)
KIND_OF_PREFIX = {"": "models", "datasets": "datasets", "spaces": "spaces"}


class Cut(NamedTuple):
    """
    A connection that breaks. Of a `"request"` the server gets `after` bytes of the body and does nothing; of an
    `"answer"` the client gets `after` bytes of the body (with 0 not even a status), and what was asked for is done.
    """

    where: str
    after: int = 0


class Delay(NamedTuple):
    """An answer that is late by so many seconds."""

    seconds: float


class Refusal(Exception):
    """Ends a request with a status, a message, and the code by which the client tells errors apart."""

    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


def now():
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---------------------------------------------------------------------------------------------------------- the disk


class Store:
    """
    Everything the Hub knows, in a folder: `blobs/<sha256>` are the contents of files, and
    `repos/<kind>/<namespace>/<name>.json` is a repository, `{meta, refs: {name: commit}, commits: {id: commit}}`. Each
    commit lists all its files.
    """

    def __init__(self, root):
        self.root, self.lock = Path(root), threading.RLock()
        self.uploaded = set()  # (repository, sha256) of large files that were sent, whether committed or not
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)

    def path(self, kind, repo):
        return self.root / "repos" / kind / f"{repo}.json"

    def blob(self, sha256):
        return self.root / "blobs" / sha256

    def put(self, content):
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.blob(sha256).exists():
            partial = self.blob(f"{sha256}.{threading.get_ident()}")
            partial.write_bytes(content)
            os.replace(partial, self.blob(sha256))
        return sha256

    def entry(self, content, lfs):
        """What a commit knows of a file."""
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": self.put(content), "size": len(content), "oid": blob_id, "lfs": lfs}

    def load(self, kind, repo):
        path = self.path(kind, repo)
        if not path.exists():
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return json.loads(path.read_text())

    def save(self, kind, repo, state):
        path = self.path(kind, repo)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(state))
        os.replace(partial, path)

    def resolve(self, state, revision):
        """The commit that a branch, a tag or the beginning of a commit's id stands for."""
        refs, name = state["refs"], revision.removeprefix("refs/heads/")
        revision = refs.get(revision) or refs.get(name) or refs.get(f"refs/tags/{name}") or revision
        if revision in state["commits"]:
            return revision
        hits = [commit for commit in state["commits"] if len(revision) >= 7 and commit.startswith(revision)]
        if len(hits) == 1:
            return hits[0]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, state, revision):
        return state["commits"][self.resolve(state, revision)]["files"]

    def commit(self, kind, repo, state, branch, files, title, author):
        parent = state["refs"].get(branch)
        unique = json.dumps([files, title, parent, time.time_ns()])
        commit = hashlib.sha1(unique.encode()).hexdigest()
        state["commits"][commit] = {
            "files": files,
            "title": title,
            "parent": parent,
            "date": now(),
            "author": author,
        }
        state["refs"][branch] = commit
        state["meta"]["lastModified"] = now()
        self.save(kind, repo, state)
        return commit

    def create(self, kind, repo, meta, author):
        state = {"meta": {"createdAt": now(), "creator": author, **meta}, "refs": {}, "commits": {}}
        lines = [f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES]
        attributes = self.entry("".join(lines).encode(), False)
        self.commit(kind, repo, state, "main", {".gitattributes": attributes}, "initial commit", author)


def file_json(path, entry):
    found = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    if entry["lfs"]:
        found["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
    return found


def folder_json(path):
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def last_commit_json(state, commit):
    return {"id": commit, "title": state["commits"][commit]["title"], "date": state["commits"][commit]["date"]}


def listing(files, base, recursive):
    """The folders and files below `base`, or right in it."""
    base, found_files, found_folders = base.strip("/"), {}, {}
    for path, entry in sorted(files.items()):
        if base and not path.startswith(f"{base}/"):
            continue
        parts = path.removeprefix(f"{base}/").split("/")
        for depth in range(1, len(parts)):
            if recursive or depth == 1:
                folder = "/".join(([base] if base else []) + parts[:depth])
                found_folders[folder] = folder_json(folder)
        if recursive or len(parts) == 1:
            found_files[path] = file_json(path, entry)
    if base and not found_files and not found_folders:
        raise Refusal(404, f"{base} does not exist", "EntryNotFound")
    return list(found_folders.values()) + list(found_files.values())


# ---------------------------------------------------------------------------------------------------------- metadata

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other""".split()
)
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SDKS = ("gradio", "docker", "static", "streamlit")
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
TYPES = {
    "tags": list,
    "widget": list,
    "model-index": list,
    "configs": (list, dict),
    "metrics": list,
    "task_categories": list,
    "size_categories": (list, str),
    "library_name": str,
    "pipeline_tag": str,
    "pretty_name": str,
    "title": str,
    "emoji": str,
    "sdk_version": (str, int, float),
    "app_file": str,
    "pinned": bool,
    "hf_oauth": bool,
    "short_description": str,
}


def front_matter(text):
    """The metadata of a README.md as text, or `None`."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    return found and found[1]


def wrong_metadata(text, repo_type):
    """What the Hub says of the metadata of a README.md: the errors, for which it is refused, and the warnings."""
    block = front_matter(text)
    if block is None:
        missing = "empty or missing yaml metadata in repo card"
        return ([f"Missing configuration in README: {missing}"], []) if repo_type == "space" else ([], [missing])
    try:
        data = yaml.safe_load(block) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["The metadata must be a mapping."], []

    errors, warnings = [], []
    for key, wanted in TYPES.items():
        if key in data and not isinstance(data[key], wanted):
            errors.append(f'"{key}" is {data[key]!r}, a {type(data[key]).__name__}')
    licenses = data.get("license", [])
    for license in licenses if isinstance(licenses, list) else [licenses]:
        if license not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}, not {license!r}')
    if not licenses:
        warnings.append('"license" is missing')
    for key, what in (("base_model", "model"), ("datasets", "dataset"), ("models", "model")):
        ids = data.get(key) or []
        for name in ids if isinstance(ids, list) else [ids]:
            if not re.fullmatch(rf"{HUB_ID}|[\w-][\w.-]*", str(name)):
                errors.append(f'"{key}" with value {name!r} is not valid. Use a {what} id from https://hf.co/{what}s')
    for entry in data.get("model-index") or []:
        if not isinstance(entry, dict) or not {"name", "results"} <= entry.keys():
            errors.append('"model-index" must be a list of {name, results}')
    if repo_type == "space":
        if data.get("sdk") not in SDKS:
            errors.append(f'"sdk" must be one of {SDKS}, not {data.get("sdk")!r}')
        for key in ("colorFrom", "colorTo"):
            if key in data and data[key] not in COLOURS:
                errors.append(f'"{key}" must be one of {COLOURS}, not {data[key]!r}')
        if len(str(data.get("short_description", ""))) > 60:
            errors.append('"short_description" must be at most 60 characters long')
    return errors, warnings


# -------------------------------------------------------------------------------------------------------- the server


class Handler(BaseHTTPRequestHandler):
    """Answers requests: finds the route and calls its method with the query, the body and the parts of the path."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer leave together: apart, each answer takes 40 ms more
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    @property
    def store(self):
        return self.server.store

    def handle_any(self):
        url = urlsplit(self.path)
        fault = self.server.fail and self.server.fail(self.command, url.path)
        self.cut_answer = fault if isinstance(fault, Cut) and fault.where == "answer" else None
        if isinstance(fault, Cut) and fault.where == "request":
            chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "")
            length = fault.after if chunked else int(self.headers.get("Content-Length") or 0)
            self.rfile.read(min(fault.after, length))
            return self.hang_up()
        if isinstance(fault, Delay):
            threading.Event().wait(fault.seconds)
        body = self.read_body()
        try:
            if fault and not isinstance(fault, Cut | Delay):
                raise Refusal(*fault)
            self.user = self.read_user()
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            for method, pattern, answer in ROUTES:
                if method == self.command or (method == "GET" and self.command == "HEAD"):
                    if found := re.fullmatch(pattern, url.path):
                        parts = {name: unquote(part or "") for name, part in found.groupdict().items()}
                        return answer(self, query, body, **parts)
            raise Refusal(404, f"no route {self.command} {url.path}", "NotImplementedByLoopback")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.reply(refusal.status, {"error": refusal.message}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def read_body(self):
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        body = b""
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):  # httpx sends the bodies of PUT so
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def read_user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and not token.startswith("hf_"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token.removeprefix("hf_") or None

    def reply(self, status, body=b"", headers=None):
        headers = dict(headers or {})
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.server.record(f"{self.command} {self.path} -> {status}")
        if self.cut_answer and not self.cut_answer.after:
            return self.hang_up()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.cut_answer:
            self.wfile.write(body[: self.cut_answer.after])
            return self.hang_up()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------------------------------------------------- rights

    def need_user(self):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def need_read(self, state, repo):
        namespace, meta = repo.split("/")[0], state["meta"]
        if meta.get("private") and namespace not in ([self.user, *ORGS] if self.user else []):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if meta.get("gated") and self.user not in [namespace, meta.get("creator"), *meta.get("granted", [])]:
            raise Refusal(
                403, "Access to this repo is restricted and you are not in the authorized list.", "GatedRepo"
            )

    def need_write(self, repo):
        if repo.split("/")[0] not in [self.need_user(), *ORGS]:
            raise Refusal(403, "You don't have the rights to write in this namespace")

    def load(self, kind, repo):
        """The repository, for those who may read it."""
        state = self.store.load(kind, repo)
        self.need_read(state, repo)
        return state

    def web(self, kind, repo):
        return f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{repo}"

    # ----------------------------------------------------------------------------------------------- account, repos

    def whoami(self, query, body):
        user = self.need_user()
        orgs = [{"type": "org", "name": org, "id": org, "fullname": org, "roleInOrg": "admin"} for org in ORGS]
        answer = {"type": "user", "id": user, "name": user, "fullname": user, "email": f"{user}@localhost"}
        answer |= {"isPro": False, "avatarUrl": f"{self.server.url}/avatar.png", "orgs": orgs}
        answer["auth"] = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        self.reply(200, answer)

    def create_repo(self, query, body):
        asked = json.loads(body)
        kind = f"{asked.get('type', 'model')}s"
        repo = f"{asked.get('organization') or self.need_user()}/{asked['name']}"
        self.need_write(repo)
        with self.store.lock:
            if self.store.path(kind, repo).exists():
                answer = {"error": "You already created this repo", "url": self.web(kind, repo)}
                return self.reply(409, answer)
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            meta = {"private": private, "gated": False, "sdk": asked.get("sdk")}
            self.store.create(kind, repo, meta, self.user)
        self.reply(200, {"url": self.web(kind, repo), "name": repo, "id": repo})

    def delete_repo(self, query, body):
        asked = json.loads(body)
        kind = f"{asked.get('type', 'model')}s"
        repo = f"{asked.get('organization') or self.need_user()}/{asked['name']}"
        self.need_write(repo)
        self.store.load(kind, repo)
        self.store.path(kind, repo).unlink()
        self.reply(200, {})

    def list_repos(self, query, body, kind):
        found = []
        for path in sorted((self.store.root / "repos" / kind).glob("*/*.json")):
            repo = f"{path.parent.name}/{path.stem}"
            if query.get("author") in (None, path.parent.name) and query.get("search", "").lower() in repo.lower():
                meta = json.loads(path.read_text())["meta"]
                entry = {"_id": repo, "id": repo, "modelId": repo, "likes": 0, "downloads": 0, "tags": []}
                found.append({**entry, "private": meta["private"], "createdAt": meta["createdAt"]})
        self.reply(200, found)

    def settings(self, query, body, kind, repo):
        self.need_write(repo)
        with self.store.lock:
            state, asked = self.store.load(kind, repo), json.loads(body)
            if "visibility" in asked:
                asked["private"] = asked["visibility"] == "private"
            state["meta"].update(asked)
            self.store.save(kind, repo, state)
        self.reply(200, {})

    def validate_yaml(self, query, body):
        asked = json.loads(body)
        errors, warnings = wrong_metadata(asked["content"], asked.get("repoType"))
        answer = {"errors": [{"message": text} for text in errors]}
        answer["warnings"] = [{"message": text} for text in warnings]
        self.reply(400 if errors else 200, answer)

    def harnesses(self, query, body):
        self.reply(200, {})

    # ------------------------------------------------------------------------------------------------------ uploads

    def need_commit(self, repo, query):
        """A pull request may be opened by anybody who is logged in."""
        self.need_user() if query.get("create_pr") else self.need_write(repo)

    def preupload(self, query, body, kind, repo, revision):
        self.need_commit(repo, query)
        files = self.store.files(self.store.load(kind, repo), revision)
        answers = []
        for asked in json.loads(body)["files"]:
            lfs = asked["size"] >= LFS_THRESHOLD or any(fnmatch.fnmatch(asked["path"], f"*{s}") for s in LFS_SUFFIXES)
            present = files.get(asked["path"])
            # by this id of the file that is there the client sees that it need not send it again
            oid = present and (present["sha256"] if present["lfs"] else present["oid"])
            mode = "lfs" if lfs else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": answers})

    def lfs_batch(self, query, body, prefix, repo):
        self.need_user()
        asked, answers, place = json.loads(body), [], f"{KIND_OF_PREFIX[prefix]}/{repo}"
        for wanted in asked["objects"]:
            oid = wanted["oid"]
            answer = {"oid": oid, "size": wanted["size"]}
            href = f"{self.server.url}/_lfs/{oid}?repo={place}"
            if asked["operation"] == "download":
                answer["actions"] = {"download": {"href": href}}
            elif (place, oid) not in self.store.uploaded:  # no actions: it is there already
                verify = {"href": f"{self.server.url}/_lfs/verify"}
                answer["actions"] = {"upload": {"href": href}, "verify": verify}
            answers.append(answer)
        self.reply(200, {"transfer": "basic", "objects": answers})

    def lfs_put(self, query, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "sha256 mismatch")
        self.store.put(body)
        self.store.uploaded.add((query.get("repo"), oid))
        self.reply(200)

    def lfs_get(self, query, body, oid):
        self.reply(200, self.store.blob(oid).read_bytes())

    def lfs_verify(self, query, body):
        self.reply(200 if self.store.blob(json.loads(body)["oid"]).exists() else 404, {})

    def commit(self, query, body, kind, repo, revision):
        self.need_commit(repo, query)
        with self.store.lock:
            state = self.store.load(kind, repo)
            parent = self.store.resolve(state, revision)
            files, title = dict(state["commits"][parent]["files"]), ""
            for line in body.decode().splitlines():
                item = json.loads(line)
                value, change = item["value"], item["key"]
                if change == "header":
                    title = value["summary"]
                    if value.get("parentCommit") and not parent.startswith(value["parentCommit"]):
                        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                elif change == "file":
                    files[value["path"]] = self.store.entry(base64.b64decode(value["content"]), False)
                elif change == "lfsFile":
                    blob = self.store.blob(value["oid"])
                    if not blob.exists():
                        message = f"LFS pointer pointed to a file that does not exist: {value['path']}"
                        raise Refusal(400, message)
                    files[value["path"]] = self.store.entry(blob.read_bytes(), True)
                elif change == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refusal(404, f"{value['path']} does not exist", "EntryNotFound")
                elif change == "deletedFolder":
                    folder = value["path"].strip("/")
                    files = {path: entry for path, entry in files.items() if not path.startswith(f"{folder}/")}
            branch, pull_request = revision.removeprefix("refs/heads/"), None
            if query.get("create_pr"):
                number = 1 + sum(name.startswith("refs/pr/") for name in state["refs"])
                branch, pull_request = f"refs/pr/{number}", f"{self.web(kind, repo)}/discussions/{number}"
                state["refs"][branch] = parent
            commit = self.store.commit(kind, repo, state, branch, files, title, self.user)
        answer = {"success": True, "commitOid": commit, "pullRequestUrl": pull_request, "hookOutput": ""}
        self.reply(200, {**answer, "commitUrl": f"{self.web(kind, repo)}/commit/{commit}"})

    def squash(self, query, body, kind, repo, revision):
        self.need_write(repo)
        with self.store.lock:
            state = self.store.load(kind, repo)
            files = self.store.files(state, revision)
            state["refs"].pop(revision)
            title = json.loads(body).get("message") or "Super-squash"
            commit = self.store.commit(kind, repo, state, revision, files, title, self.user)
        self.reply(200, {"commitId": commit})

    # ----------------------------------------------------------------------------------------- branches, tags, log

    def refs(self, query, body, kind, repo):
        state = self.load(kind, repo)

        def those(chosen):
            return [
                {
                    "name": name.split("/")[-1],
                    "ref": name if name.startswith("refs/") else f"refs/heads/{name}",
                    "targetCommit": commit,
                }
                for name, commit in state["refs"].items()
                if chosen(name)
            ]

        answer = {"branches": those(lambda name: not name.startswith("refs/")), "converts": []}
        answer["tags"] = those(lambda name: name.startswith("refs/tags/"))
        answer["pullRequests"] = those(lambda name: name.startswith("refs/pr/"))
        self.reply(200, answer)

    def commits(self, query, body, kind, repo, revision):
        state = self.load(kind, repo)
        commit, found = self.store.resolve(state, revision), []
        while commit:
            facts = state["commits"][commit]
            entry = {"id": commit, "title": facts["title"], "message": "", "date": facts["date"]}
            found.append({**entry, "authors": [{"user": facts["author"]}]})
            commit = facts["parent"]
        self.reply(200, found)

    def branch(self, query, body, kind, repo, name):
        """Make or delete a branch."""
        self.need_write(repo)
        with self.store.lock:
            state, asked = self.store.load(kind, repo), json.loads(body or b"{}")
            if self.command == "DELETE":
                state["refs"].pop(name, None)
            elif name in state["refs"]:
                return self.reply(409, {"error": "Reference already exists"})
            else:
                state["refs"][name] = self.store.resolve(state, asked.get("startingPoint") or "main")
            self.store.save(kind, repo, state)
        self.reply(200, {})

    def tag(self, query, body, kind, repo, name):
        """Tag the revision `name`, or delete the tag `name`."""
        self.need_write(repo)
        with self.store.lock:
            state, asked = self.store.load(kind, repo), json.loads(body or b"{}")
            if self.command == "DELETE":
                state["refs"].pop(f"refs/tags/{name}", None)
            elif f"refs/tags/{asked['tag']}" in state["refs"]:
                return self.reply(409, {"error": "Reference already exists"})
            else:
                state["refs"][f"refs/tags/{asked['tag']}"] = self.store.resolve(state, name)
            self.store.save(kind, repo, state)
        self.reply(200, {})

    # ---------------------------------------------------------------------------------------------------- downloads

    def info(self, query, body, kind, repo, revision):
        state = self.load(kind, repo)
        commit, meta = self.store.resolve(state, revision or "main"), state["meta"]
        files = state["commits"][commit]["files"]
        card = self.card_data(files)
        tags = list(card.get("tags") or [])
        for key in ("base_model", "license"):
            values = card.get(key) or []
            tags += [f"{key}:{value}" for value in (values if isinstance(values, list) else [values])]
        siblings = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in query:
            for sibling in siblings:
                facts = file_json(sibling["rfilename"], files[sibling["rfilename"]])
                sibling |= {"size": facts["size"], "blobId": facts["oid"]}
                if "lfs" in facts:
                    sibling["lfs"] = {"sha256": facts["lfs"]["oid"], "size": facts["size"], "pointerSize": 134}
        answer = {"_id": repo, "id": repo, "author": repo.split("/")[0], "sha": commit, "private": meta["private"]}
        answer |= {"gated": meta.get("gated") or False, "disabled": False, "downloads": 0, "likes": 0, "tags": tags}
        answer |= {"cardData": card, "siblings": siblings, "createdAt": meta["createdAt"]}
        answer["lastModified"] = meta["lastModified"]
        if kind == "models":
            answer |= {"modelId": repo, "library_name": card.get("library_name"), "spaces": [], "config": {}}
            answer["pipeline_tag"] = card.get("pipeline_tag")
        if kind == "spaces":
            hardware = {"current": "cpu-basic", "requested": "cpu-basic"}
            answer |= {"sdk": meta.get("sdk"), "runtime": {"stage": "RUNNING", "hardware": hardware}}
        self.reply(200, answer)

    def card_data(self, files):
        if "README.md" not in files:
            return {}
        block = front_matter(self.store.blob(files["README.md"]["sha256"]).read_text(errors="replace"))
        try:
            data = yaml.safe_load(block or "")
        except yaml.YAMLError:  # a card that was put there without asking whether it is valid
            return {}
        return data if isinstance(data, dict) else {}

    def tree(self, query, body, kind, repo, revision, path):
        state = self.load(kind, repo)
        commit = self.store.resolve(state, revision)
        recursive = query.get("recursive", "").lower() == "true"
        entries = listing(state["commits"][commit]["files"], path, recursive)
        if query.get("expand", "").lower() == "true":
            for entry in entries:
                entry["lastCommit"] = last_commit_json(state, commit)
        start, headers = int(query.get("cursor", 0)), {}
        end = start + self.server.page
        if end < len(entries):
            rest = "&".join(f"{name}={value}" for name, value in query.items() if name != "cursor")
            url = f"{self.server.url}{urlsplit(self.path).path}?{rest}&cursor={end}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.reply(200, entries[start:end], headers)

    def paths_info(self, query, body, kind, repo, revision):
        state = self.load(kind, repo)
        commit = self.store.resolve(state, revision)
        files = state["commits"][commit]["files"]
        asked = json.loads(body) if body.strip().startswith(b"{") else parse_qs(body.decode())
        found = []
        for path in (path.strip("/") for path in asked.get("paths", [])):
            if path in files:
                entry = file_json(path, files[path])
                if "true" in str(asked.get("expand", "")).lower():
                    safe = {"status": "safe", "avScan": None, "pickleImportScan": None}
                    entry |= {"lastCommit": last_commit_json(state, commit), "securityFileStatus": safe}
                found.append(entry)
            elif any(name.startswith(f"{path}/") for name in files):
                found.append(folder_json(path))
        self.reply(200, found)

    def resolve(self, query, body, prefix, repo, revision, path):
        """One file, or a part of it."""
        state = self.load(KIND_OF_PREFIX[prefix], repo)
        commit = self.store.resolve(state, revision)
        entry = state["commits"][commit]["files"].get(path)
        if entry is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            return self.reply(404, {"error": "Entry not found"}, headers)
        headers = {
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'inline; filename="{quote(path.split("/")[-1])}"',
            "ETag": f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"',
        }
        if entry["lfs"]:  # of the file itself, which the Hub says before it redirects to where the file lies
            headers |= {"X-Linked-Etag": f'"{entry["sha256"]}"', "X-Linked-Size": str(entry["size"])}
        if self.command == "HEAD":
            return self.reply(200, b"", {**headers, "Content-Length": str(entry["size"])})
        content = self.store.blob(entry["sha256"]).read_bytes()
        part = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.reply(200, content, headers)
        first, last = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
        if first >= len(content):
            raise Refusal(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.reply(206, content[first : last + 1], headers)


REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
FILES = rf"/(?:(?P<prefix>datasets|spaces)/)?{REPO}"
REVISION = r"(?P<revision>[^/]+)"
OID = r"(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("DELETE", r"/api/repos/delete", Handler.delete_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", r"/api/agent-harnesses", Handler.harnesses),
    ("GET", r"/api/(?P<kind>models|datasets|spaces)", Handler.list_repos),
    ("POST", rf"{API}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"{API}/commit/{REVISION}", Handler.commit),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.*))?", Handler.tree),
    ("POST", rf"{API}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", rf"{API}/refs", Handler.refs),
    ("GET", rf"{API}/commits/{REVISION}", Handler.commits),
    ("POST", rf"{API}/super-squash/{REVISION}", Handler.squash),
    ("PUT", rf"{API}/settings", Handler.settings),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", Handler.branch),
    ("DELETE", rf"{API}/branch/(?P<name>[^/]+)", Handler.branch),
    ("POST", rf"{API}/tag/(?P<name>[^/]+)", Handler.tag),
    ("DELETE", rf"{API}/tag/(?P<name>[^/]+)", Handler.tag),
    ("GET", rf"{API}(?:/revision/{REVISION})?", Handler.info),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", r"/_lfs/verify", Handler.lfs_verify),
    ("PUT", rf"/_lfs/{OID}", Handler.lfs_put),
    ("GET", rf"/_lfs/{OID}", Handler.lfs_get),
    ("GET", rf"{FILES}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


class LoopbackHub(ThreadingHTTPServer):
    """
    The server; a context manager that serves while it is open.

    Args:
        root (`str` or `os.PathLike`):
            Folder for all that is uploaded. A server that is started on it again knows it all.
        port (`int`, *optional*, defaults to 0):
            Port on 127.0.0.1; 0 for a free one.

    Attributes:
        url (`str`):
            Where it listens.
        calls (`list[str]`):
            Every request that was answered, as in `"GET /api/models/org/x -> 200"`.
        fail (`Callable`, *optional*):
            `fail(method, path)` is asked before each request and returns `None`, a status and a message such as
            `(503, "down")`, a [`Cut`] or a [`Delay`].
        page (`int`):
            How many entries of a listing come in one answer.
    """

    daemon_threads = True

    def __init__(self, root, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.store, self.calls, self.fail, self.page = Store(root), [], None, PAGE
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def record(self, line):
        self.calls.append(line)

    def handle_error(self, request, client_address):
        """A client that hangs up is none of our errors; all others are shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def env(self, home, user="alice"):
        """The environment of a process that takes this for the Hub, is logged in, and keeps its cache in `home`."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": f"hf_{user}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # the protocol of the Hub's newer storage is not spoken here
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
