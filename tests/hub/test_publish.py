"""What `publish` promises: the right files, all or none, checked; one version a release; no vote lost or doubled."""

import ast
import io
import json
import pickletools
import shutil
import uuid
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi, RepoCard, hf_hub_download
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.numpy import load as load_safetensors
from tiny_artefacts import KINDS, make_artefact, make_rows, make_vote

from onereward.hub.about import About
from onereward.hub.provenance import describe_parent, write_provenance
from onereward.hub.publish import REPO_TYPES, _Repository, publish
from onereward.preferences import VoteStore, load_votes, save_votes


api = HfApi()
NOTICE = "Research use only, not for clinical use"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(kind)` -> a tiny artefact; nobody writes to it."""
    folder, paths = tmp_path_factory.mktemp("artefacts"), {}

    def get(kind):
        if kind not in paths:
            paths[kind] = make_artefact(kind, folder)
        return paths[kind]

    if not api.repo_exists("org/tiny-base"):
        api.create_repo("org/tiny-base")
        api.upload_folder(repo_id="org/tiny-base", folder_path=get("pipeline"))
    return get


@pytest.fixture
def repo():
    """A name of a repository that no other test has."""
    return f"org/repo-{uuid.uuid4().hex}"


@pytest.fixture
def adapter(made, tmp_path):
    """A copy of the adapter, to change."""
    return shutil.copytree(made("adapter"), tmp_path / "adapter")


def contents(path):
    paths = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in paths}


def on_hub(repo, kind="model", revision=None):
    """Name -> content of every file there is."""
    repo_type = REPO_TYPES.get(kind, "model")
    names = api.list_repo_files(repo, repo_type=repo_type, revision=revision)
    where = {"repo_type": repo_type, "revision": revision}
    return {name: open(hf_hub_download(repo, name, **where), "rb").read() for name in names}


def titles(repo, kind="model", revision=None):
    commits = api.list_repo_commits(repo, repo_type=REPO_TYPES.get(kind, "model"), revision=revision)
    return [commit.title for commit in commits]


# -------------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_one_commit_with_card_version_and_tag(kind, made, repo, hub):
    before = contents(made(kind))
    done = publish(kind, made(kind), repo)
    assert kind == "votes" or contents(made(kind)) == before  # a store notes which votes are out
    there = on_hub(repo, kind)
    assert {name: len(content) for name, content in there.items() if name != ".gitattributes"} == done.files
    assert len(titles(repo, kind)) == 2 and titles(repo, kind)[1] == "initial commit"

    card = RepoCard(there["README.md"].decode())
    assert card.data.license and NOTICE in card.text and there["README.md"].decode() == done.card
    record = json.loads(there["provenance.json"])
    assert (record["version"], record["kind"]) == ("0.1.0", kind) and NOTICE in record["notice"]
    assert "## 0.1.0 - " in there["CHANGELOG.md"].decode()
    tags = api.list_repo_refs(repo, repo_type=REPO_TYPES.get(kind)).tags
    assert [(tag.name, tag.target_commit) for tag in tags] == [("v0.1.0", done.commit)]
    assert not any(str(made(kind).parent).encode() in content for content in there.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_published_file_needs_a_pickle(kind, made, repo, hub):
    publish(kind, made(kind), repo)
    for name, content in on_hub(repo, kind).items():
        with pytest.raises(ValueError):
            list(pickletools.genops(content))
        assert not zipfile.is_zipfile(io.BytesIO(content)) and not content.startswith(b"\x93NUMPY")
        if name.endswith(".safetensors"):
            assert load_safetensors(content)
        elif name.endswith(".parquet"):
            types = map(str, pq.read_schema(io.BytesIO(content)).types)
            assert not any("extension" in found for found in types)
        elif name.endswith(".png"):
            Image.open(io.BytesIO(content)).load()
        elif name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".py"):
            ast.parse(content)
        else:
            content.decode()


@pytest.mark.parametrize("kind", KINDS)
def test_publishing_the_same_again_is_no_new_commit_and_no_new_version(kind, made, repo, hub):
    first = publish(kind, made(kind), repo)
    hub.calls.clear()
    again = publish(kind, made(kind), repo)
    assert again.unchanged and (again.version, again.commit, again.files) == ("0.1.0", first.commit, first.files)
    assert len(titles(repo, kind)) == 2
    assert not [call for call in hub.calls if call.startswith(("POST", "PUT"))]


def test_the_hub_lists_in_pages(made, repo, hub, monkeypatch):
    monkeypatch.setattr(hub, "page", 2)
    publish("pipeline", made("pipeline"), repo)
    assert publish("pipeline", made("pipeline"), repo).unchanged
    assert sum("cursor=" in call for call in hub.calls) > 2


def test_a_dry_run_asks_no_network(made, repo, hub):
    done = publish("adapter", made("adapter"), repo, base_model="org/tiny-base", dry_run=True)
    assert hub.calls == [] and done.commit is None and not api.repo_exists(repo)
    assert done.files["pytorch_lora_weights.safetensors"] > 0 and done.card.startswith("---")


def test_a_pull_request_leaves_main_alone(made, adapter, repo, hub):
    publish("adapter", made("adapter"), repo)
    main = on_hub(repo)
    (adapter / "images/0.png").unlink()
    done = publish("adapter", adapter, repo, create_pr=True)
    assert done.url == f"{hub.url}/{repo}/discussions/1" and on_hub(repo) == main
    assert "images/0.png" not in on_hub(repo, revision="refs/pr/1")
    assert [tag.name for tag in api.list_repo_refs(repo).tags] == ["v0.1.0"]


def test_whoever_may_not_write_may_open_a_pull_request(made, hub, repo):
    theirs = repo.replace("org/", "bob/")
    HfApi(token="hf_bob").create_repo(theirs)
    done = publish("adapter", made("adapter"), theirs, create_pr=True)
    assert done.url.endswith("/discussions/1") and titles(theirs) == ["initial commit"]


def test_a_branch_is_made_and_leaves_main_alone(made, adapter, repo, hub):
    publish("adapter", made("adapter"), repo)
    main = on_hub(repo)
    (adapter / "images/0.png").unlink()
    done = publish("adapter", adapter, repo, revision="smaller")
    assert on_hub(repo) == main and done.url == f"{hub.url}/{repo}/tree/smaller"
    assert "images/0.png" not in on_hub(repo, revision="smaller") and done.version == "0.1.1"
    assert publish("adapter", adapter, repo, revision="smaller").unchanged


def test_a_new_repository_may_start_on_a_branch(made, repo, hub):
    publish("adapter", made("adapter"), repo, revision="first")
    assert set(on_hub(repo)) == {".gitattributes"} and "README.md" in on_hub(repo, revision="first")


# ------------------------------------------------------------------------------------------------------ private, gated


def test_a_private_repository_is_private_before_anything_is_sent(made, repo, hub):
    seen = []

    def watch(method, path):
        if "/preupload/" in path or "/_lfs/" in path or "/commit/" in path:
            seen.append(hub.store.load("models", repo)["meta"]["private"])

    hub.fail = watch
    publish("adapter", made("adapter"), repo, private=True)
    assert len(seen) > 3 and all(seen) and api.repo_info(repo).private


@pytest.mark.parametrize("exists", [False, True])
def test_a_gate_is_shut_before_anything_is_sent(exists, made, repo, hub):
    if exists:
        api.create_repo(repo)
    hub.calls.clear()
    publish("adapter", made("adapter"), repo, gated=True)
    order = [call.split()[1].split("?")[0].split("/")[-1] for call in hub.calls if call[:3] in ("PUT", "POS")]
    assert order.index("settings") < next(i for i, call in enumerate(hub.calls) if "/preupload/" in call)
    assert api.repo_info(repo).gated == "manual"


def test_private_shuts_a_public_repository_first(made, adapter, repo, hub):
    publish("adapter", made("adapter"), repo)
    (adapter / "images/0.png").unlink()
    publish("adapter", adapter, repo, private=True)
    assert api.repo_info(repo).private


# -------------------------------------------------------------------------------------------- what goes up, what not


def test_what_belongs_to_the_run_stays_at_home(adapter, repo, hub):
    torch.save({}, adapter / "training_args.bin")
    torch.save({}, adapter / "optimizer.pt")
    for name in ("checkpoint-10/model.safetensors", "runs/events.out", "logs/a.json", ".git/config", "notes.txt"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("{}")
    done = publish("adapter", adapter, repo)
    assert set(on_hub(repo)) - {".gitattributes", "README.md", "CHANGELOG.md", "provenance.json"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "images/0.png",
    }
    assert {"training_args.bin", "optimizer.pt", "checkpoint-10/model.safetensors", "notes.txt"} <= set(done.left_out)


def write_torch(path):
    torch.save({"weight": torch.zeros(2)}, path)


def write_old_torch(path):
    torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def write_objects(path):
    with open(path, "wb") as file:
        np.save(file, np.array([{}], dtype=object))


@pytest.mark.parametrize(
    ("kind", "name", "write"),
    [
        ("adapter", "adapter_model.bin", write_torch),
        ("adapter", "pytorch_lora_weights.pt", write_torch),
        ("adapter", "images/0.npy", write_objects),
        ("pipeline", "unet/diffusion_pytorch_model.bin", write_torch),
        ("pipeline", "vae/old.ckpt", write_old_torch),
        ("pipeline", "unet/other.safetensors", write_torch),
        ("pipeline", "unet/config.json", write_old_torch),
        ("reward-model", "pytorch_model.bin", write_torch),
        ("reward-model", "rater.joblib", write_old_torch),
        ("reward-model", "other.safetensors", write_old_torch),
        ("space", "model.pkl", write_old_torch),
        ("space", "examples/thing.pth", write_torch),
        ("space", "words.txt", write_old_torch),
    ],
)
def test_a_pickle_is_refused_by_name_whatever_it_calls_itself(kind, name, write, made, tmp_path, repo, hub):
    folder = shutil.copytree(made(kind), tmp_path / "copy")
    (folder / name).parent.mkdir(exist_ok=True)
    write(folder / name)
    hub.calls.clear()
    with pytest.raises(ValueError, match=f"{name}.*(pickle).*safetensors"):
        publish(kind, folder, repo)
    assert not [call for call in hub.calls if call.startswith(("POST", "PUT"))]
    assert not api.repo_exists(repo, repo_type=REPO_TYPES.get(kind))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter_model.safetensors", lambda content: content[:-8]),
        ("adapter_config.json", lambda content: content[:-8]),
        ("images/0.png", lambda content: content[:60]),
    ],
)
def test_a_damaged_file_is_refused_by_name(name, damage, adapter, repo, hub):
    (adapter / name).write_bytes(damage((adapter / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}.*not what its name says"):
        publish("adapter", adapter, repo)
    assert not api.repo_exists(repo)


@pytest.mark.parametrize("name", ["images/1.png", "0001.dcm"])
def test_a_patients_dicom_file_is_refused(name, made, tmp_path, repo, hub):
    pydicom = pytest.importorskip("pydicom")
    kind = "adapter" if name.startswith("images") else "space"
    folder = shutil.copytree(made(kind), tmp_path / "copy")
    shutil.copyfile(pydicom.data.get_testdata_file("CT_small.dcm"), folder / name)
    with pytest.raises(ValueError, match=f"{name}.*DICOM.*synthetic"):
        publish(kind, folder, repo)


def test_a_synthetic_dicom_file_may_lie_in_a_space(made, tmp_path, repo, hub):
    pydicom = pytest.importorskip("pydicom")
    folder = shutil.copytree(made("space"), tmp_path / "copy")
    marked = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    marked.SyntheticData = "YES"
    marked.save_as(folder / "example.dcm")
    assert "example.dcm" in publish("space", folder, repo).files


def test_pictures_lose_what_they_tell_of_people_and_keep_that_they_are_synthetic(adapter, repo, hub):
    told = PngInfo()
    told.add_text("Comment", "Jane Doe, 1950-01-01")
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(adapter / "images/before_after.png", pnginfo=told, exif=exif)
    marked = Image.open(adapter / "images/0.png")
    marked.load()
    publish("adapter", adapter, repo)
    there = on_hub(repo)
    assert b"Jane" not in there["images/before_after.png"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(there["images/before_after.png"]))), pixels)
    kept = Image.open(io.BytesIO(there["images/0.png"]))
    kept.load()
    assert "DigitalSourceType" in str(marked.info) and kept.info == marked.info


def test_a_jpeg_that_tells_of_people_is_refused(made, tmp_path, repo, hub):
    folder = shutil.copytree(made("space"), tmp_path / "copy")
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    Image.new("L", (8, 8)).save(folder / "me.jpg", exif=exif)
    with pytest.raises(ValueError, match="me.jpg.*EXIF"):
        publish("space", folder, repo)


def test_a_checkpoint_goes_up_whole_and_only_when_asked_for(made, tmp_path, repo, hub):
    checkpoint = shutil.copytree(made("adapter"), tmp_path / "checkpoint-5")
    (checkpoint / "checkpoint.json").write_text("{}")
    publish("adapter", made("adapter"), repo, checkpoint=checkpoint)
    there = on_hub(repo)
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        assert there[f"last-checkpoint/{path.relative_to(checkpoint)}"] == path.read_bytes()
    done = publish("adapter", made("adapter"), repo)
    assert "last-checkpoint/checkpoint.json" in done.removed
    assert not [name for name in on_hub(repo) if name.startswith("last-checkpoint")]


def test_a_checkpoint_with_a_pickle_is_refused(made, tmp_path, repo, hub):
    checkpoint = shutil.copytree(made("adapter"), tmp_path / "checkpoint-5")
    write_torch(checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer.pt"):
        publish("adapter", made("adapter"), repo, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "message"),
    [
        ("model", "adapter", {}, "`kind` is 'model'"),
        ("adapter", "nowhere", {}, "`path`.*nothing there"),
        ("pipeline", "adapter", {}, "model_index.json.*no pipeline"),
        ("votes", "adapter", {}, "votes are a Parquet file"),
        ("dataset", "adapter", {}, "neither a folder that `onereward data` wrote"),
        ("adapter", "adapter", {"repo_id": "thing"}, "`repo_id`"),
        ("adapter", "adapter", {"version": "1.0"}, "`version`.*1.2.0"),
        ("adapter", "adapter", {"revision": "b", "create_pr": True}, "`create_pr` and `revision`"),
        ("adapter", "adapter", {"revision": "0" * 40}, "name of a branch"),
        ("adapter", "adapter", {"base_model": "/home/ann/base"}, "`base_model`"),
    ],
)
def test_a_wrong_argument_is_named_before_the_hub_is_asked(kind, name, arguments, message, made, hub):
    path = made("adapter").parent / name
    hub.calls.clear()
    with pytest.raises(ValueError, match=message):
        publish(kind, path, **{"repo_id": "org/wrong", "dry_run": True, **arguments})
    assert hub.calls == []


def test_metadata_that_the_hub_refuses_is_said_before_there_is_a_repository(made, tmp_path, repo, hub):
    folder = shutil.copytree(made("space"), tmp_path / "copy")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("sdk: gradio", "sdk: gradio\ncolorFrom: crimson"))
    with pytest.raises(ValueError, match="metadata.*colorFrom"):
        publish("space", folder, repo)
    assert not api.repo_exists(repo, repo_type="space")


def test_one_kind_does_not_replace_another(made, repo, hub):
    publish("adapter", made("adapter"), repo)
    with pytest.raises(ValueError, match="of the kind adapter, not pipeline"):
        publish("pipeline", made("pipeline"), repo)


# ------------------------------------------------------------------------------------------------- base, version, log


def local_adapter(folder):
    return make_artefact("adapter", folder, base=str(folder / "base"))


def test_an_adapter_of_a_pipeline_on_this_disk_is_refused_with_the_remedy(tmp_path, repo, hub):
    with pytest.raises(ValueError, match=r"nobody else can load.*--base-model org/name"):
        publish("adapter", local_adapter(tmp_path), repo)
    with pytest.raises(ValueError, match="not on the Hub.*onereward publish pipeline"):
        publish("adapter", local_adapter(tmp_path), repo, base_model="org/no-such-base")
    assert not api.repo_exists(repo)


def test_the_base_model_is_named_in_both_formats_and_as_a_parent(made, tmp_path, repo, hub):
    path, trained_on = local_adapter(tmp_path), describe_parent("base_model", made("pipeline"))
    write_provenance(path, "adapter", parents=[trained_on])
    publish("adapter", path, repo, base_model="org/tiny-base")
    there = on_hub(repo)
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "org/tiny-base"
    with safe_open(hf_hub_download(repo, "pytorch_lora_weights.safetensors"), "np") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert about["unet.base_model_name_or_path"] == "org/tiny-base" and about["unet.lora_alpha"] == 8
    before = load_safetensors((path / "pytorch_lora_weights.safetensors").read_bytes())
    after = load_safetensors(there["pytorch_lora_weights.safetensors"])
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)
    parents = json.loads(there["provenance.json"])["parents"]
    found = [(parent["role"], parent["name"], parent["revision"]) for parent in parents]
    assert found == [("base_model", "org/tiny-base", api.repo_info("org/tiny-base").sha)]
    assert parents[0]["fingerprint"] is None  # the name of one and the content of another would be no origin
    assert f"{trained_on['name']} (fingerprint {trained_on['fingerprint'][:12]})" in parents[0]["problem"]
    assert RepoCard(there["README.md"].decode()).data.base_model == "org/tiny-base"
    assert not any(str(tmp_path).encode() in content for content in there.values())


def test_versions_go_up_and_the_changelog_has_each(made, adapter, repo, hub):
    publish("adapter", made("adapter"), repo)
    for expected, given in (("0.1.1", None), ("1.2.0", "1.2.0"), ("1.2.1", None)):
        Image.new("L", (8, 8), len(expected) + int(expected[-1])).save(adapter / f"images/{expected}.png")
        assert publish("adapter", adapter, repo, version=given, changes=f"About {expected}.").version == expected
    with pytest.raises(ValueError, match="1.2.1 is published already"):
        publish("adapter", made("adapter"), repo, version="1.2.0")
    log = on_hub(repo)["CHANGELOG.md"].decode()
    heads = [line.split()[1] for line in log.splitlines() if line.startswith("## ")]
    assert heads == ["1.2.1", "1.2.0", "0.1.1", "0.1.0"] and log.count("# Changelog") == 1 and "About 1.2.0." in log
    assert {tag.name for tag in api.list_repo_refs(repo).tags} == {"v1.2.1", "v1.2.0", "v0.1.1", "v0.1.0"}


def test_files_that_a_release_no_longer_has_are_removed_and_others_stay(made, adapter, repo, hub):
    publish("adapter", made("adapter"), repo)
    api.upload_file(repo_id=repo, path_or_fileobj=b"mine", path_in_repo="paper/notes.txt")
    (adapter / "images/0.png").unlink()
    assert publish("adapter", adapter, repo).removed == ["images/0.png"]
    there = on_hub(repo)
    assert "images/0.png" not in there and there["paper/notes.txt"] == b"mine"


def test_a_new_card_alone_is_a_new_version(made, repo, hub):
    publish("adapter", made("adapter"), repo)
    done = publish("adapter", made("adapter"), repo, about=About(authors=("Ann Author",), license="mit"))
    assert done.version == "0.1.1" and not done.unchanged
    assert RepoCard(done.card).data.license == "mit" and "Ann Author" in done.card


# --------------------------------------------------------------------------------------------------------- agreements


@pytest.fixture
def under_agreement(tmp_path):
    rows = make_rows(2, source="MICCAI_BraTS2020_TrainingData")
    rows.save_to_disk(tmp_path / "rows")
    return tmp_path / "rows"


def test_data_under_an_agreement_are_refused_with_the_reason(under_agreement, repo, hub):
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="data-use agreement.*BraTS.*--private.*--permission"):
            publish("dataset", under_agreement, repo, dry_run=dry_run)
    assert not api.repo_exists(repo, repo_type="dataset")


def test_data_under_an_agreement_may_be_private(under_agreement, repo, hub):
    publish("dataset", under_agreement, repo, private=True)
    record = json.loads(on_hub(repo, "dataset")["provenance.json"])
    assert record["agreements"] == ["brats"]
    assert publish("dataset", under_agreement, repo).unchanged, "the repository is private already"


def test_a_permission_is_written_down(under_agreement, repo, hub):
    permission = "CC BY 4.0, https://doi.org/10.7937/jc8x-9874"
    done = publish("dataset", under_agreement, repo, permission=permission)
    assert permission in done.card
    assert json.loads(on_hub(repo, "dataset")["provenance.json"])["permission"] == permission


# -------------------------------------------------------------------------------------------------------- rows, votes


def test_rows_come_back_as_they_were_without_names_and_exif(repo, hub, tmp_path):
    rows = make_rows(3)
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    rows[0]["image"].save(tmp_path / "jane_doe.png", exif=exif)
    plain = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    plain[0]["image"] = {"bytes": None, "path": str(tmp_path / "jane_doe.png")}
    rows = datasets.Dataset.from_list(plain, features=rows.features)
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "rows")
    publish("dataset", tmp_path / "rows", repo)
    assert not any(b"jane" in content.lower() for content in on_hub(repo, "dataset").values())
    there = datasets.load_dataset(repo)
    assert {split: len(part) for split, part in there.items()} == {"train": len(rows), "test": 1}
    assert there["train"].features == rows.features
    for before, after in zip(rows, there["train"], strict=True):
        assert all(
            np.array_equal(np.asarray(before[column]), np.asarray(after[column]))
            if isinstance(before[column], Image.Image)
            else before[column] == after[column]
            for column in rows.column_names
        )


def test_a_parquet_file_of_rows_is_published_too(repo, hub, tmp_path):
    rows = make_rows(3)
    rows.to_parquet(tmp_path / "rows.parquet")
    publish("dataset", tmp_path / "rows.parquet", repo)
    there = datasets.load_dataset(repo, split="train")
    assert there["case_id"][:] == rows["case_id"][:] and there.features == rows.features


def numbers(repo):
    return sorted(datasets.load_dataset(repo, split="train")["vote_id"][:])


def test_no_vote_is_lost_doubled_or_overwritten(repo, hub, tmp_path):
    votes = tmp_path / "votes.sqlite"
    with VoteStore(votes) as store:
        store.add_many(map(make_vote, range(4)))
        publish("votes", votes, repo)
        first = {name: content for name, content in on_hub(repo, "votes").items() if name.endswith(".parquet")}
        store.add_many(map(make_vote, range(4, 7)))
        publish("votes", votes, repo)
    with VoteStore(tmp_path / "other.sqlite") as other:  # of which two are there already
        other.add_many(map(make_vote, range(5, 9)))
        other.export(tmp_path / "other.parquet")
    done = publish("votes", tmp_path / "other.parquet", repo)
    there = on_hub(repo, "votes")
    assert numbers(repo) == [f"vote-{number}" for number in range(9)] and done.version == "0.1.2"
    assert len([name for name in there if name.endswith(".parquet")]) == 3
    assert all(there[name] == content for name, content in first.items())
    assert json.loads(there["provenance.json"])["num_rows"] == 9


def test_a_published_vote_is_not_overwritten_by_another_of_its_name(made, repo, hub, tmp_path):
    publish("votes", made("votes"), repo)
    before = on_hub(repo, "votes")
    with VoteStore(tmp_path / "other.sqlite") as other:
        other.add_many([make_vote(2, label_0=0.5, label_1=0.5), make_vote(20)])
    with pytest.raises(ValueError, match="1 vote.*'vote-2'.*never overwritten"):
        publish("votes", tmp_path / "other.sqlite", repo)
    assert on_hub(repo, "votes") == before


def test_votes_read_back_by_our_own_reader_are_those_of_the_store(made, repo, hub):
    publish("votes", made("votes"), repo)
    with VoteStore(made("votes")) as store:
        votes = store.votes()
    assert load_votes(repo).with_format("arrow")[:].equals(votes.with_format("arrow")[:])


def test_a_published_vote_cannot_be_taken_back_and_answered_anew(repo, hub, tmp_path):
    with VoteStore(tmp_path / "votes.sqlite") as store:
        store.add_many(map(make_vote, range(3)))
        publish("votes", store.path, repo, dry_run=True)
        assert store.frozen() == set()
        store.retract("vote-2")
        publish("votes", store.path, repo)
        assert store.frozen() == {"vote-0", "vote-1"}
        with pytest.raises(ValueError, match="published already"):
            store.retract("vote-0")


def test_a_vote_that_is_taken_back_while_it_is_published_stays_at_home(repo, hub, tmp_path, monkeypatch):
    with VoteStore(tmp_path / "votes.sqlite") as store:
        store.add_many(map(make_vote, range(3)))
        prepare = _Repository.prepare

        def slowly(*arguments):
            store.retract("vote-1")
            return prepare(*arguments)

        monkeypatch.setattr(_Repository, "prepare", slowly)
        with pytest.raises(OSError, match="taken back meanwhile. Nothing was published"):
            publish("votes", store.path, repo)
        assert not any(name.endswith(".parquet") for name in on_hub(repo, "votes"))
        monkeypatch.undo()
        publish("votes", store.path, repo)
    assert numbers(repo) == ["vote-0", "vote-2"]


def test_of_no_votes_nothing_is_published(repo, hub, tmp_path):
    with VoteStore(tmp_path / "votes.sqlite") as store, pytest.raises(ValueError, match="holds no vote"):
        publish("votes", store.path, repo)
    assert not api.repo_exists(repo, repo_type="dataset")


def test_votes_that_went_up_with_more_than_pixels_are_still_the_same(repo, hub, tmp_path):
    named = io.BytesIO()
    note = PngInfo()
    note.add_text("PatientName", "Doe^Jane")
    Image.open(io.BytesIO(make_vote(0)["mask"]["bytes"])).save(named, "PNG", pnginfo=note)
    votes = tmp_path / "votes.parquet"
    with VoteStore(tmp_path / "votes.sqlite") as store:
        store.add(make_vote(0))
        store.export(votes)
    table = pq.read_table(votes)
    place = table.schema.get_field_index("mask")
    masks = pa.array([{"bytes": named.getvalue(), "path": None}], table.schema.field("mask").type)
    pq.write_table(table.set_column(place, table.schema.field("mask"), masks), tmp_path / "older.parquet")
    api.create_repo(repo, repo_type="dataset")
    api.upload_file(
        path_or_fileobj=tmp_path / "older.parquet",
        path_in_repo="data/votes-0.parquet",
        repo_id=repo,
        repo_type="dataset",
    )
    publish("votes", votes, repo)
    assert numbers(repo) == ["vote-0"]


def test_a_folder_that_is_linked_to_is_published_like_any_other(made, tmp_path):
    pipeline = shutil.copytree(made("pipeline"), tmp_path / "pipeline")
    whole = publish("pipeline", pipeline, "org/linked", dry_run=True).files
    (pipeline / "unet").rename(tmp_path / "shared")
    (pipeline / "unet").symlink_to(tmp_path / "shared", target_is_directory=True)
    assert publish("pipeline", pipeline, "org/linked", dry_run=True).files == whole
    (pipeline / "vae/up").symlink_to(pipeline, target_is_directory=True)
    with pytest.raises(ValueError, match="'up', a link to a folder that it lies in"):
        publish("pipeline", pipeline, "org/linked", dry_run=True)


def test_a_pipeline_that_lacks_a_part_is_refused(made, tmp_path):
    pipeline = shutil.copytree(made("pipeline"), tmp_path / "pipeline")
    shutil.rmtree(pipeline / "unet")
    with pytest.raises(ValueError, match="no file of 'unet'"):
        publish("pipeline", pipeline, "org/broken", dry_run=True)
    (pipeline / "unet").mkdir()
    (pipeline / "unet/config.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="'unet/config.json', a link to a file that is not there"):
        publish("pipeline", pipeline, "org/broken", dry_run=True)


def test_votes_with_a_bad_one_are_refused(repo, hub, tmp_path, made):
    with VoteStore(made("votes")) as store:
        votes = store.votes()
    save_votes(votes, tmp_path / "votes.parquet")
    table = pq.read_table(tmp_path / "votes.parquet")
    column = table.schema.get_field_index("label_0")
    wrong = pa.array([0.7] * len(table), pa.float32())
    table = table.set_column(column, table.schema.field(column), wrong)
    pq.write_table(table, tmp_path / "votes.parquet")
    with pytest.raises(ValueError, match="row 0.*label_0"):
        publish("votes", tmp_path / "votes.parquet", repo)
    assert not api.repo_exists(repo, repo_type="dataset")


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_prints_the_address(onereward, made, repo, hub):
    code, out, err = onereward("publish", "adapter", made("adapter"), repo, "--release-version", "2.0.0")
    assert code == 0 and out.splitlines()[-1] == f"{hub.url}/{repo}" and "2.0.0" in out, err
    code, out, _ = onereward("publish", "adapter", made("adapter"), repo)
    assert code == 0 and "there already" in out and out.splitlines()[-1] == f"{hub.url}/{repo}"


def test_a_dry_run_of_the_command_lists_files_sizes_and_card(onereward, made, repo, hub):
    code, out, err = onereward("publish", "adapter", made("adapter"), repo, "--dry-run")
    assert code == 0 and hub.calls == [], err
    size = (made("adapter") / "adapter_model.safetensors").stat().st_size
    assert f"{size:,}  adapter_model.safetensors" in out and "base_model: org/tiny-base" in out


def test_what_is_wrong_is_one_line_and_exit_code_2(onereward, made, tmp_path, repo, hub):
    about = tmp_path / "about.yaml"
    about.write_text("autors: [Ann]\n")
    for arguments in (["--about", about], ["--release-version", "one"], ["--base-model", "org/no-such-base"]):
        code, _, err = onereward("publish", "adapter", made("adapter"), repo, *arguments)
        assert code == 2 and err.startswith("Error: ") and "Traceback" not in err
