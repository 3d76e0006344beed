"""The Space as others get it: published in one commit with all that it needs, and running where nothing of ours is."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import uuid
import venv
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import HfApi, RepoCard, snapshot_download
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from running_space import RunningSpace, elsewhere

from onereward import cli
from onereward.hub.publish import publish
from onereward.preferences import CANDIDATE_FEATURES, StudySettings, VoteStore, make_study


gradio = pytest.importorskip("gradio", reason="the Space needs onereward[space]")
gradio_client = pytest.importorskip("gradio_client")

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces/onereward-arena"
ENDPOINTS = {"/generate", "/join", "/next", "/vote", "/undo", "/skip", "/progress", "/results", "/export", "/report"}
ENDPOINTS |= {"/close"}

# Runs app.py as `python app.py` does, with nothing to import but what it is given.
START = """
import importlib.util, json, runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

class Given(PathFinder):
    refused = set(json.loads(sys.argv[1]))
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.refused else super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Given]
sys.path.insert(0, str(Path.cwd()))
assert Path(importlib.util.find_spec("onereward").origin).is_relative_to(Path.cwd())
runpy.run_path("app.py", run_name="__main__")
"""


def wanted_of(requirements: list[str]) -> set[str]:
    """Names of the distributions that these requirements bring, of those that are installed here."""
    found, queue = set(), [(Requirement(line), frozenset({""})) for line in requirements]
    while queue:
        requirement, extras = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found or (requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras)):
            continue
        found.add(key)
        needs = importlib.metadata.distribution(requirement.name).requires or []
        queue += [(Requirement(line), frozenset({"", *requirement.extras})) for line in needs]
    return {name for name, _ in found}


def requirements() -> list[str]:
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def not_asked_for() -> list[str]:
    """Modules that are installed here, but would not be on a machine that has what requirements.txt brings."""
    wanted = wanted_of(requirements())
    modules = importlib.metadata.packages_distributions()
    return sorted(
        name
        for name, owners in modules.items()
        if name != "onereward" and not wanted & {canonicalize_name(owner) for owner in owners}
    )


def started(command: list[str], folder: Path) -> RunningSpace:
    """The Space in this folder, with no setting but those that every Space may have."""
    ours = ("ONEREWARD_DATA_DIR", "ONEREWARD_SALT", "GRADIO_TEMP_DIR", "PYTHONPATH")
    settings = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(ours)}
    space = RunningSpace(folder.parent / f"{folder.name}-log", settings, command, folder)
    space.start()
    return space


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The Space as it lies on the Hub, downloaded into an empty folder."""
    repo = f"org/arena-{uuid.uuid4().hex}"
    done = publish("space", SPACE, repo)
    folder = tmp_path_factory.mktemp("space") / "arena"
    snapshot_download(repo, repo_type="space", local_dir=folder)
    shutil.rmtree(folder / ".cache")
    return repo, done, folder


@pytest.fixture(scope="module")
def running(published):
    folder = shutil.copytree(published[2], published[2].parent / "running")
    space = started([sys.executable, "-c", START, json.dumps(not_asked_for())], folder)
    yield space
    space.process.kill()
    space.process.wait()


def client_of(space: RunningSpace) -> gradio_client.Client:
    return gradio_client.Client(space.url, verbose=False, httpx_kwargs={"timeout": 120})  # tests share the cores


def paint_and_vote(space: RunningSpace) -> None:
    """Generates one image and casts one vote, and looks whether both are right."""
    client = client_of(space)
    source, label_map = SPACE / "examples/0-image.png", SPACE / "examples/0-label_map.png"
    pictures, archive, rewards = client.predict(
        image=gradio_client.handle_file(source),
        mask=gradio_client.handle_file(label_map),
        task="fill",
        prompt="",
        num_inference_steps=4,
        guidance_scale=2.0,
        seed=3,
        num_images=1,
        adapter="base",
        adapter_strength=1.0,
        api_name="/generate",
    )
    (picture,) = [entry["image"] if isinstance(entry, dict) else entry for entry in pictures]
    result, source = np.asarray(Image.open(picture)), np.asarray(Image.open(source))
    inside = np.asarray(Image.open(label_map)) > 0
    assert np.array_equal(result[~inside], source[~inside])
    assert (result[inside] != source[inside]).mean() > 0.5
    assert Path(archive).stat().st_size > 0 and len(rewards) == 1

    key = client.predict(role="lay", consent=True, key="", api_name="/join")["key"]
    item = client.predict(key=key, api_name="/next")
    receipt = client.predict(
        item["item_id"], item["criteria"][0], "left", comment="", seconds=2.0, key=key, api_name="/vote"
    )
    assert receipt["answered"] == 1 and receipt["remaining"] == item["criteria"][1:]


def test_one_commit_holds_all_that_the_space_needs(published):
    repo, done, folder = published
    messages = [commit.title for commit in HfApi().list_repo_commits(repo, repo_type="space")]
    assert len(messages) == 2 and messages[0].startswith("Release 0.1.0")  # the other one made the repository
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    own = {path.relative_to(SPACE).as_posix() for path in SPACE.rglob("*") if path.is_file()}
    own = {name for name in own if not name.startswith("data/") and "__pycache__" not in name}
    assert own <= names and set(done.files) <= names
    assert {"LICENSE", "NOTICE", "onereward/__init__.py", "pipelines/onereward-brats/model_index.json"} <= names
    for name in ("LICENSE", "NOTICE"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_package_in_it_is_the_one_of_a_wheel(published):
    """setup.py says what a wheel holds; the card templates move into the package, as there."""
    there = published[2] / "onereward"
    copied = {path.relative_to(there): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    source = ROOT / "src/onereward"
    wanted = {path for ending in ("py", "json", "safetensors") for path in source.rglob(f"*.{ending}")}
    expected = {path.relative_to(source): path.read_bytes() for path in wanted}
    templates = sorted((ROOT / "model_cards").glob("*.md.jinja"))
    assert templates
    expected |= {Path("model_cards", path.name): path.read_bytes() for path in templates}
    assert copied == expected


def test_votes_and_the_salt_of_a_space_that_ran_here_stay_here(tmp_path):
    space = shutil.copytree(SPACE, tmp_path / "arena", ignore=shutil.ignore_patterns("data", "__pycache__"))
    (space / "data/outbox").mkdir(parents=True)
    shutil.copy(space / "study/candidates.parquet", space / "data/outbox/votes-1.parquet")
    (space / "data/salt").write_text("a secret of 32 characters, or so")
    (space / "data/votes.sqlite").write_bytes(b"SQLite format 3\0")
    (space / "data/state.json").write_text("{}")
    done = publish("space", space, "org/arena-dry", dry_run=True)
    assert not [name for name in done.files if name.startswith("data/")]
    assert {"data/outbox/votes-1.parquet", "data/salt", "data/votes.sqlite"} <= set(done.left_out)


def test_it_runs_with_nothing_but_its_requirements(running):
    assert not {"nilearn", "monai", "trl"} - set(not_asked_for())
    paint_and_vote(running)


def test_every_action_has_a_name_and_says_what_it_does(running):
    api = client_of(running).view_api(return_format="dict", print_info=False)
    assert set(api["named_endpoints"]) == ENDPOINTS and not api["unnamed_endpoints"]
    for name, endpoint in api["named_endpoints"].items():
        assert len(endpoint["description"]) > 20, name
        parameters = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
        assert not [parameter for parameter in parameters if parameter.startswith("param_")], name


def test_a_vote_outlives_the_end_of_the_space(running):
    """The last test on this Space: it ends it, as the Hub does."""
    assert running.end() == 0
    (path,) = running.where.rglob("votes.sqlite")
    with VoteStore(path) as store:
        votes = store.votes()
    assert len(votes) == 1 and votes[0]["label_0"] == (1.0 if votes[0]["left"] == 0 else 0.0)
    assert "Traceback" not in running.log.read_text()


def test_with_a_pipeline_of_the_hub_it_goes_without_weights(tmp_path):
    base, repo = f"org/base-{uuid.uuid4().hex}", f"org/arena-{uuid.uuid4().hex}"
    publish("pipeline", ROOT / "pipelines/onereward-brats", base)
    done = publish("space", SPACE, repo, base_model=base)
    assert not [name for name in done.files if name.startswith("pipelines/")]
    card = RepoCard(done.card).data
    assert card["models"] == card["preload_from_hub"] == [base]
    folder = tmp_path / "arena"
    snapshot_download(repo, repo_type="space", local_dir=folder)
    named = subprocess.run(
        [sys.executable, "-c", "import app; print(app.pipeline())"],
        cwd=folder,
        env=elsewhere(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert named.stdout.splitlines()[-1:] == [base], named.stderr


def test_a_pipeline_that_is_not_there_is_refused(capsys, monkeypatch):
    arguments = ["onereward", "publish", "space", str(SPACE), "org/arena-none", "--base-model", "org/nowhere"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        cli.main()
    assert "org/nowhere" in capsys.readouterr().err
    assert not HfApi().repo_exists("org/arena-none", repo_type="space")


def test_pictures_under_an_agreement_are_not_shown_to_all(tmp_path):
    space = shutil.copytree(SPACE, tmp_path / "arena", ignore=shutil.ignore_patterns("study", "data"))
    rows = pq.read_table(SPACE / "study/candidates.parquet").to_pylist()
    candidates = datasets.Dataset.from_list([row | {"source": "BraTS2020"} for row in rows], CANDIDATE_FEATURES)
    make_study(space / "study", candidates, StudySettings())
    with pytest.raises((PermissionError, ValueError), match="[Bb]ra[Tt][Ss]"):
        publish("space", space, "org/arena-brats", dry_run=True)
    assert publish("space", space, "org/arena-brats", private=True, dry_run=True).files


def test_the_card_starts_the_space(published):
    """What the Hub reads: the docs of Spaces call these keys, and check_card has asked the Hub itself."""
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", (published[2] / "README.md").read_text("utf-8"), re.S)[1])
    assert data["sdk"] == "gradio" and (published[2] / data["app_file"]).is_file()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert data["sdk_version"] == pins["gradio"] == gradio.__version__
    assert data["hf_oauth"] is True and data["license"] == "apache-2.0"
    assert data["python_version"] in re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    assert len(data["short_description"]) <= 60
    assert "not for clinical use" in (published[2] / "README.md").read_text("utf-8")


def test_requirements_are_those_of_the_package_and_no_others():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in setup.body if isinstance(node, ast.Assign)}
    known = ast.literal_eval(values["INSTALL_REQUIRES"]) + ast.literal_eval(values["EXTRAS_REQUIRE"])["space"]
    assert set(requirements()) <= set(known)
    assert requirements()[0].startswith("torch")  # else a later build is pulled by another


@pytest.mark.slow
def test_it_runs_in_a_fresh_environment_of_its_own(published, tmp_path):
    folder = shutil.copytree(published[2], tmp_path / "arena")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "-r", "requirements.txt"]
    subprocess.run(install, cwd=folder, env=elsewhere(), check=True)
    listing = [python, "-m", "pip", "list"]
    packages = subprocess.run(listing, cwd=folder, env=elsewhere(), capture_output=True, text=True, check=True).stdout
    assert not re.search(r"^(onereward|nilearn|monai|trl|torchvision) ", packages, re.M)
    space = started([str(python), "app.py"], folder)
    try:
        paint_and_vote(space)
        assert space.end() == 0
    finally:
        space.process.kill()
