"""
What `publish` promises when something fails: one clear message, the repository as it was, the same call works later.

The endpoints are not listed here: they are those that a good publish calls.
"""

import errno
import re
import shutil
import subprocess
import sys
import time
import uuid

import httpx2
import numpy as np
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from loopback_hub import Cut, Delay
from PIL import Image
from tiny_artefacts import make_artefact, make_vote

from onereward import cli
from onereward.hub import artefacts
from onereward.hub.publish import REPO_TYPES, publish
from onereward.preferences import VoteStore


api = HfApi()
BASE = "org/faultless-base"  # its provenance is there, and is read once
KINDS = ("adapter", "votes")  # one of the models, whose releases replace each other, and that of which nothing goes


class Release:
    """A repository of its own and an artefact for it; `change` makes the artefact worth another release."""

    def __init__(self, kind, folder, template, again):
        self.kind, self.repo_type = kind, REPO_TYPES.get(kind, "model")
        self.repo = f"org/fault-{uuid.uuid4().hex}"
        self.path = folder / f"{uuid.uuid4().hex}{template.suffix}"
        (shutil.copytree if template.is_dir() else shutil.copyfile)(template, self.path)
        self.releases = 1
        if again:
            self.publish()
            self.change()
            self.releases = 2

    def publish(self):
        return publish(self.kind, self.path, self.repo)

    def change(self):
        if self.kind == "votes":
            with VoteStore(self.path) as store:
                store.add(make_vote(len(store)))
        else:
            noise = np.random.default_rng().integers(0, 256, (40, 40), dtype=np.uint8)
            Image.fromarray(noise).save(self.path / "images/1.png")

    def commits(self):
        """Ids of the commits on main, newest first; none where there is no repository."""
        if not api.repo_exists(self.repo, repo_type=self.repo_type):
            return []
        return [commit.commit_id for commit in api.list_repo_commits(self.repo, repo_type=self.repo_type)]

    def check_whole(self):
        """One commit and one tag a release, and a second call finds nothing to do."""
        commits = self.commits()
        assert len(commits) == 1 + self.releases
        tags = {tag.target_commit for tag in api.list_repo_refs(self.repo, repo_type=self.repo_type).tags}
        assert tags == set(commits[:-1])
        assert self.publish().unchanged


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefacts")
    if not api.repo_exists(BASE):
        publish("pipeline", make_artefact("pipeline", folder), BASE)
    return {kind: make_artefact(kind, folder, BASE) for kind in KINDS}


@pytest.fixture
def release(templates, tmp_path, hub):
    """`release(kind, again)`: a first release that is still to be made, or a second one."""
    return lambda kind, again=False: Release(kind, tmp_path, templates[kind], again)


@pytest.fixture
def waits(monkeypatch):
    """Nobody waits: the seconds are noted."""
    noted = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


def endpoint(method, path):
    """A call without what differs from one repository to the next."""
    path = path.split("?")[0]
    return method, re.sub(r"[0-9a-f]{64}|[0-9a-f]{40}", "ID", re.sub(r"org/fault-[0-9a-f]{32}", "REPO", path))


def endpoints(hub, release, kind, again):
    """What a good publish calls, each once, in order; the base has been looked at before."""
    release(kind, again).publish()
    good = release(kind, again)
    hub.calls.clear()
    good.publish()
    called = list(dict.fromkeys(endpoint(*call.split()[:2]) for call in hub.calls))
    assert len(called) >= 9
    if kind == "votes":  # all else is what an adapter calls too
        called = [found for found in called if re.search("/data/|/commit/|/_lfs", found[1])]
        assert len(called) >= 4
    return called


def failing(wanted, fault, times):
    """For `hub.fail`: the first `times` calls of an endpoint fail; `fail.count` is how many have."""

    def fail(method, path):
        if endpoint(method, path) != wanted or fail.count == times:
            return None
        fail.count += 1
        return fault

    fail.count = 0
    return fail


RELEASES = [("adapter", False), ("adapter", True), ("votes", True)]


@pytest.mark.parametrize(("kind", "again"), RELEASES)
def test_one_503_of_any_endpoint_is_got_over(kind, again, hub, release, waits):
    for wanted in endpoints(hub, release, kind, again):
        here = release(kind, again)
        hub.fail = failing(wanted, (503, "down"), times=1)
        here.publish()
        assert hub.fail.count == 1, wanted
        hub.fail = None
        here.check_whole()


@pytest.mark.parametrize(("kind", "again"), RELEASES)
def test_a_503_for_ever_of_any_endpoint_leaves_the_repository_as_it_was(kind, again, hub, release, waits):
    for wanted in endpoints(hub, release, kind, again):
        here = release(kind, again)
        before = here.commits()
        hub.fail = failing(wanted, (503, "down"), times=10**6)
        with pytest.raises(ConnectionError, match=r"503 \(down\).*Run the same command again") as error:
            here.publish()
        hub.fail = None
        assert "\n" not in str(error.value), wanted
        after = here.commits()
        if "/tag/" in wanted[1]:  # comes last: all is published but the tag
            assert "is published; only its tag is missing" in str(error.value)
        else:
            assert "nothing was published" in str(error.value).lower(), wanted
            assert after == before or (not before and len(after) == 1), wanted  # the initial commit
            assert ("only its initial commit" in str(error.value)) == (not before and len(after) == 1), wanted
        here.publish()
        here.check_whole()


@pytest.mark.parametrize("fault", [Cut("request", 20), Cut("answer", 0), Cut("answer", 10)])
@pytest.mark.parametrize("again", [False, True])
def test_a_connection_that_breaks_once_is_got_over(again, fault, hub, release, waits):
    for wanted in endpoints(hub, release, "adapter", again):
        here = release("adapter", again)
        hub.fail = failing(wanted, fault, times=1)
        here.publish()
        assert hub.fail.count == 1, wanted
        hub.fail = None
        here.check_whole()


@pytest.mark.parametrize("part", ["/_lfs/ID", "/commit/"])
def test_a_connection_that_always_breaks_in_mid_upload_publishes_nothing(part, hub, release, waits):
    (wanted,) = [found for found in endpoints(hub, release, "adapter", False) if part in found[1]]
    here = release("adapter")
    hub.fail = failing(wanted, Cut("request", 500), times=10**6)
    with pytest.raises(ConnectionError, match="connection to the Hub broke.*Run the same command again"):
        here.publish()
    hub.fail = None
    assert len(here.commits()) == 1
    here.publish()
    here.check_whole()


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, release, waits):
    here = release("adapter")
    api.create_repo(here.repo)
    hub.fail = failing(("POST", "/api/models/REPO/commit/main"), Cut("answer", 0), times=1)
    done = publish("adapter", here.path, here.repo, create_pr=True)
    requests = api.list_repo_refs(here.repo, include_pull_requests=True).pull_requests
    assert done.url.endswith("/discussions/1") and [request.ref for request in requests] == ["refs/pr/1"]


def test_a_base_whose_provenance_cannot_be_read_is_not_taken_for_one_without_agreements(hub, release, waits, tmp_path):
    base = f"org/base-{uuid.uuid4().hex}"
    publish("pipeline", make_artefact("pipeline", tmp_path), base)
    here = release("adapter")
    hub.fail = lambda method, path: (503, "down") if f"{base}/resolve" in path else None
    with pytest.raises(ConnectionError, match="Reading the provenance"):
        publish("adapter", here.path, here.repo, base_model=base)
    assert here.commits() == []


def test_waits_grow_and_are_few(hub, release, waits):
    here = release("adapter")
    hub.fail = failing(("POST", "/api/models/REPO/commit/main"), (503, "down"), times=10**6)
    with pytest.raises(ConnectionError):
        here.publish()
    assert waits == sorted(waits) and len(set(waits)) == len(waits) == 3 and sum(waits) < 30


def test_a_late_answer_is_waited_for(hub, release):
    here = release("adapter")
    hub.fail = failing(("POST", "/api/models/REPO/commit/main"), Delay(1.0), times=1)
    here.publish()
    hub.fail = None
    here.check_whole()


@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_of_somebody_else_in_between_is_refused_and_then_built_on(kind, hub, release):
    here, busy = release(kind, again=True), []

    def somebody_else(method, path):
        if "/preupload/" in path and not busy:
            busy.append(True)
            theirs = {"path_or_fileobj": b"theirs", "path_in_repo": "theirs.txt"}
            api.upload_file(repo_id=here.repo, repo_type=here.repo_type, **theirs)

    hub.fail = somebody_else
    with pytest.raises(OSError, match="somebody else has changed.*Nothing was published.*same command again"):
        here.publish()
    hub.fail = None
    assert len(here.commits()) == 3  # initial, first release, theirs
    done = here.publish()
    assert "theirs.txt" in api.list_repo_files(here.repo, repo_type=here.repo_type)
    assert here.commits()[0] == done.commit and here.publish().unchanged


# ------------------------------------------------------------------------------------------------------------- rights


@pytest.mark.parametrize("exists", [False, True])
def test_without_the_right_to_write_it_says_so(exists, hub, release):
    here = release("adapter")
    theirs = here.repo.replace("org/", "bob/")
    if exists:
        HfApi(token="hf_bob").create_repo(theirs)
    with pytest.raises(PermissionError, match=f"may not write to {theirs}.*--pr.*othing was published"):
        publish("adapter", here.path, theirs)
    assert api.repo_exists(theirs) == exists
    if exists:
        assert api.list_repo_files(theirs) == [".gitattributes"]


@pytest.mark.parametrize("exists", [False, True])
def test_an_invalid_token_is_named(exists, hub, release):
    here = release("adapter", again=exists)
    before = here.commits()
    with pytest.raises(PermissionError, match="does not know the token.*hf auth login.*othing was published"):
        publish("adapter", here.path, here.repo, token="secret-that-is-wrong")
    assert here.commits() == before


def test_a_stranger_reads_nothing_that_is_private_or_gated(hub, release):
    for setting in ("private", "gated"):
        here = release("adapter")
        mine = here.repo.replace("org/", "alice/")
        publish("adapter", here.path, mine, **{setting: True})
        refusal = {"private": RepositoryNotFoundError, "gated": GatedRepoError}[setting]
        with pytest.raises(refusal):
            hf_hub_download(mine, "adapter_config.json", token="hf_eve")
        assert hf_hub_download(mine, "adapter_config.json", token="hf_alice")
        with pytest.raises(PermissionError, match="othing was published"):
            publish("adapter", here.path, mine, token="hf_eve")


def test_a_missing_revision_is_the_readers_error_and_the_publishers_branch(hub, release):
    here = release("adapter", again=True)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(here.repo, "README.md", revision="nightly")
    publish("adapter", here.path, here.repo, revision="nightly")
    assert hf_hub_download(here.repo, "README.md", revision="nightly")


def test_a_tag_is_no_branch(hub, release):
    here = release("adapter", again=True)
    with pytest.raises(ValueError, match="'v0.1.0', a tag.*Name a branch"):
        publish("adapter", here.path, here.repo, revision="v0.1.0")
    assert len(here.commits()) == 2


# ----------------------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A real disk of 256 KiB for temporary files; without the right to mount one, a copy that finds the disk full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    if mounted:
        monkeypatch.setattr("tempfile.tempdir", str(folder))
    else:

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(artefacts.shutil, "copyfile", full)
    yield folder
    monkeypatch.undo()
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_before_anything_is_sent(small_disk, release, hub):
    here = release("adapter")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)).save(
        here.path / "images/1.png"
    )
    with pytest.raises(OSError, match="disk is full.*TMPDIR.*Nothing was published"):
        here.publish()
    assert here.commits() == [] and list(small_disk.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("fault", ["503", "cut", "token", "rights", "stale"])
def test_the_command_ends_with_one_line_and_no_traceback(fault, hub, release, waits, monkeypatch, capsys):
    here = release("adapter", again=True)
    repo = here.repo
    if fault == "503":
        hub.fail = lambda method, path: (503, "down")
    elif fault == "cut":
        hub.fail = lambda method, path: Cut("request") if "/commit/" in path else None
    elif fault == "stale":
        hub.fail = lambda method, path: (
            (412, "A commit has happened since") if method == "POST" and "/commit/" in path else None
        )
    elif fault == "rights":
        repo = repo.replace("org/", "bob/")
    elif fault == "token":
        hub.fail = lambda method, path: (401, "Invalid credentials in Authorization header")
    monkeypatch.setattr(sys, "argv", ["onereward", "publish", "adapter", str(here.path), repo])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    said = capsys.readouterr().err
    hub.fail = None
    assert exit.value.code == 2 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("Error: ") and "othing was published" in said
    assert len(here.commits()) == 2


def test_the_client_breaks_with_the_errors_that_publish_knows(hub):
    """The errors of broken connections come from a library below the client: a change of it would pass unnoticed."""
    hub.fail = lambda method, path: Cut("answer")
    with pytest.raises(httpx2.TransportError):
        api.repo_info("org/any")
