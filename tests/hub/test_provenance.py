"""Provenance tells truly what was loaded, nothing of the machine, and leads back to the beginning."""

import dataclasses
import getpass
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from transformers import TrainingArguments
from typer.testing import CliRunner

from onereward.cli import app
from onereward.data.load import load_rows
from onereward.hub.provenance import (
    NOTICE,
    PROVENANCE_FILE,
    describe_data,
    describe_parent,
    fingerprint,
    plain_command,
    read_provenance,
    trace,
    write_provenance,
)


KEYS = ["schema_version", "kind", "version", "created_at", "packages", "commit", "command", "seed", "config"]
KEYS += ["parents", "agreements", "notice"]


def put(repo, files, repo_type="model", **options):
    """One commit with these files (path -> bytes) on the loopback Hub; its hash."""
    api = HfApi()
    api.create_repo(repo, repo_type=repo_type, exist_ok=True)
    commit = None
    for path, content in files.items():
        commit = api.upload_file(
            path_or_fileobj=content, path_in_repo=path, repo_id=repo, repo_type=repo_type, **options
        ).oid
    return commit


def put_rows(repo, rows, tmp_path, name="train"):
    rows.to_parquet(tmp_path / "rows.parquet")
    return put(repo, {f"data/{name}-00000-of-00001.parquet": (tmp_path / "rows.parquet").read_bytes()}, "dataset")


def test_file_has_the_promised_form(tmp_path):
    parent = describe_parent("base_model", "pipelines/onereward-brats")
    record = write_provenance(
        tmp_path / "a", "adapter", parents=[parent], config={"beta": 0.1}, seed=3, agreements=["x"], num_images=4
    )
    assert list(record) == [*KEYS, "num_images"]
    assert json.loads((tmp_path / "a" / PROVENANCE_FILE).read_text()) == record == read_provenance(tmp_path / "a")
    assert (record["schema_version"], record["version"], record["seed"]) == (1, None, 3)
    assert record["agreements"] == ["x"] and record["notice"] == NOTICE
    assert {"torch", "diffusers", "python"} <= record["packages"].keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert record["commit"] == head
    assert parent["name"] == "onereward-brats" and parent["revision"] is None
    with pytest.raises(ValueError, match="`extra` holds \\['notice'\\]"):
        write_provenance(tmp_path / "b", "adapter", parents=[], notice="for everything")
    with pytest.raises(ValueError, match="`role` is 'teacher'"):
        describe_parent("teacher", "org/x")


def test_fingerprint_is_of_the_content_and_not_of_cards_logs_and_checkpoints(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "w.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_bytes(b"{}")
    lines = [f"{name}\0{hashlib.sha256(data).hexdigest()}\n" for name, data in
             [("config.json", b"{}"), ("unet/w.safetensors", b"weights")]]  # fmt: skip
    wanted = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert fingerprint(folder) == wanted
    (folder / "checkpoint-5").mkdir()
    for name in ("README.md", "checkpoint-5/optimizer.pt", PROVENANCE_FILE, ".gitattributes", "v.provenance.json"):
        (folder / name).write_text("x")
    assert fingerprint(folder) == wanted
    (folder / "unet" / "w.safetensors").write_bytes(b"weighty")
    assert fingerprint(folder) != wanted
    assert fingerprint(folder / "config.json") == hashlib.sha256(b"{}").hexdigest()


def test_hub_parent_has_the_commit_that_was_loaded_and_not_the_newest(hub):
    first = put("org/parent-a", {"config.json": b"1"})
    hf_hub_download("org/parent-a", "config.json")
    second = put("org/parent-a", {"config.json": b"2"})
    assert describe_parent("base_model", "org/parent-a")["revision"] == first
    assert describe_parent("base_model", "org/parent-a", revision=second)["revision"] == second
    HfApi().create_tag("org/parent-a", tag="v1", revision=first)
    assert describe_parent("base_model", "org/parent-a", revision="v1")["revision"] == first
    # even a path into the cache is told by repository and commit
    folder = snapshot_download("org/parent-a", revision=second)
    told = describe_parent("base_model", folder)
    assert (told["name"], told["revision"], told["fingerprint"]) == ("org/parent-a", second, None)


def test_hub_is_asked_where_the_cache_does_not_know(hub):
    commit = put("org/parent-b", {"config.json": b"1"})
    assert describe_parent("backbone", "org/parent-b")["revision"] == commit


# a 5xx is asked for again, for some twenty seconds
@pytest.mark.parametrize("status", [403, pytest.param(503, marks=pytest.mark.slow)])
def test_parent_that_nobody_knows_says_so_and_stops_nothing(hub, tmp_path, status):
    missing = describe_parent("base_model", "org/there-is-none")
    assert missing["revision"] is None and missing["problem"]
    gone = describe_parent("base_model", "/home/ann/models/secret-base")
    assert gone["name"] == "secret-base" and "neither" in gone["problem"]
    put("org/parent-c", {"config.json": b"1"})
    hub.fail = lambda method, path: (status, "not now") if "parent-c" in path else None
    down = describe_parent("base_model", "org/parent-c")
    assert down["revision"] is None and down["problem"]
    assert write_provenance(tmp_path / "a", "adapter", parents=[missing, gone, down])["parents"][2] == down


def test_rows_know_their_commit(hub, phantom, tmp_path):
    first = put_rows("org/prov-rows", phantom.select(range(6)), tmp_path)
    rows = load_rows("org/prov-rows", "train")
    second = put_rows("org/prov-rows", phantom, tmp_path)
    told = describe_data("train_data", rows, "org/prov-rows")
    assert (told["revision"], told["num_rows"], told["sources"]) == (first, 6, ["phantom"])
    assert told["num_cases"] == len(set(phantom.select(range(6))["case_id"]))
    chosen = describe_data("train_data", rows.select([0]).map(lambda row: {"prompt": "x"}), "org/prov-rows")
    assert (chosen["revision"], chosen["num_rows"]) == (first, 1)
    streamed = load_rows("org/prov-rows", "train", streaming=True, max_rows=3)
    told = describe_data("train_data", streamed, "org/prov-rows")
    assert (told["revision"], told["num_rows"]) == (second, 3)


def test_votes_are_counted_by_role_of_rater():
    votes = datasets.Dataset.from_dict(
        {"rater": ["a", "b", "a", "c"], "rater_role": ["lay", "lay", "lay", "resident"], "case_id": list("xxyy")}
    )
    told = describe_data("votes", votes, "phantom")
    assert told["raters"] == {"lay": 2, "resident": 1} and (told["num_rows"], told["num_cases"]) == (4, 2)


def test_no_path_token_or_user_gets_into_the_file(tmp_path):
    home, user = Path.home(), getpass.getuser()
    (tmp_path / "base").mkdir()
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=7, hub_token="hf_abcdefgh", run_name="ann", use_cpu=True,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    record = write_provenance(
        tmp_path / "out",
        "adapter",
        parents=[describe_parent("base_model", tmp_path / "base")],
        config=args,
        command=[
            str(tmp_path / "ddpo.py"), "--output_dir", str(tmp_path / "out"), f"--data={home}/scans/rows",
            "--hub_token", "plainword", "--token=other", "--note", f"see {tmp_path}/x.png or hf_abcdefgh",
            "--json", f'{{"root": "{home}/x"}}', "--dataset_name", "org/rows", "--reward_funcs", "mine.py:smooth",
        ],
        source_file=f"{home}/patient.nii",
        nested={"deep": [f"{home}/patient.nii", Path(home / "patient.nii")]},
    )  # fmt: skip
    text = (tmp_path / "out" / PROVENANCE_FILE).read_text()
    for secret in (str(tmp_path), str(home) + "/", "hf_", "plainword", "other", "ann", f"/{user}"):
        assert secret not in text, secret
    assert record["config"]["max_steps"] == 7 and record["config"]["lr_scheduler_type"] == "cosine"
    assert "learning_rate" not in record["config"]
    for kept in ("ddpo.py --output_dir out --data=rows", "--dataset_name org/rows", "mine.py:smooth", '{"root": "x"}'):
        assert kept in record["command"]
    assert record["nested"] == {"deep": ["patient.nii", "patient.nii"]}


def test_words_with_slashes_that_are_no_paths_stay():
    for command in ("run --repo org/name", "run --url https://hf.co/org/name", "run --text and/or", "run 1/2"):
        assert plain_command(command) == command


def make_chain(tmp_path, phantom):
    """data <- votes <- reward model <- adapter -> base, each on the loopback Hub; the commits by name."""
    commits = {"data": put_rows("org/chain-data", phantom, tmp_path)}

    def upload(name, kind, parents, repo_type="model"):
        write_provenance(tmp_path / name, kind, parents=parents)
        content = (tmp_path / name / PROVENANCE_FILE).read_bytes()
        commits[name] = put(f"org/chain-{name}", {PROVENANCE_FILE: content}, repo_type)

    data = describe_data("train_data", phantom, "org/chain-data")
    upload("votes", "votes", [data | {"agreements": ["Ward 7"]}], "dataset")
    votes = datasets.Dataset.from_dict({"rater": ["a", "b"], "rater_role": ["lay"] * 2, "case_id": ["x"] * 2})
    upload("reward", "reward-model", [describe_data("votes", votes, "org/chain-votes")])
    upload("base", "pipeline", [data])
    base = describe_parent("base_model", "org/chain-base")
    upload("adapter", "adapter", [base, describe_parent("reward_model", "org/chain-reward")])
    return commits


@pytest.fixture(scope="module")
def chain(tmp_path_factory, phantom):
    return make_chain(tmp_path_factory.mktemp("chain"), phantom)


def test_walk_back_from_adapter_to_data(hub, chain):
    # newer commits do not matter: the walk goes by what was used
    put("org/chain-reward", {PROVENANCE_FILE: b"{}"})
    tree = trace("org/chain-adapter")
    base, reward = tree.parents
    (votes,) = reward.parents
    (data,) = votes.parents
    found = {"adapter": tree, "base": base, "reward": reward, "votes": votes, "data": data}
    assert {name: node.revision for name, node in found.items()} == chain
    assert [node.kind for node in found.values()] == ["adapter", "pipeline", "reward-model", "votes", None]
    assert votes.raters == {"lay": 2} and data.num_rows == 12
    assert tree.agreements == reward.agreements == ["Ward 7"] and base.agreements == []
    assert tree.all_agreements() == ["Ward 7"]
    assert base.parents[0].problem and data.problem == "see above"  # the data have no file of their own


def test_command_prints_the_tree_and_json(hub, chain):
    shown = CliRunner().invoke(app, ["provenance", "org/chain-adapter", "--revision", chain["adapter"]])
    assert shown.exit_code == 0, shown.output
    for text in ("org/chain-votes", "2 votes", "2 lay raters", "under agreement: Ward 7", chain["reward"][:12]):
        assert text in shown.output
    as_json = CliRunner().invoke(app, ["provenance", "org/chain-votes", "--repo-type", "dataset", "--json"])
    assert json.loads(as_json.output)["parents"][0]["name"] == "org/chain-data"
    wrong = CliRunner().invoke(app, ["provenance", "org/chain-votes", "--repo-type", "votes"])
    assert isinstance(wrong.exception, ValueError) and "--repo-type" in str(wrong.exception)


def test_walk_works_offline_in_a_fresh_process(hub, chain, tmp_path):
    script = "from onereward.hub.provenance import trace; print(trace('org/chain-adapter'))"
    environment = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    shown = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment | extra, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})
    ]
    assert shown[0] == shown[1] and "2 lay raters" in shown[1]


def test_unreachable_parent_is_named_with_the_reason(hub, chain):
    record = read_provenance("org/chain-adapter")
    record["parents"][1] |= {"name": "org/chain-gone"}
    put("org/chain-orphan", {PROVENANCE_FILE: json.dumps(record).encode()})
    tree = trace("org/chain-orphan")
    assert "cannot be reached" in tree.parents[1].problem and not tree.parents[0].problem
    with pytest.raises(OSError, match="org/chain-gone"):
        trace("org/chain-gone")
    with pytest.raises(ValueError, match="neither a folder or file here nor a Hub id"):
        trace("no/such/folder")


def test_local_parents_carry_their_own_past(tmp_path, phantom):
    write_provenance(
        tmp_path / "votes", "votes", parents=[describe_data("train_data", phantom, "phantom")], agreements=["Ward 7"]
    )
    write_provenance(tmp_path / "reward", "reward-model", parents=[describe_parent("votes", tmp_path / "votes")])
    write_provenance(tmp_path / "a", "adapter", parents=[describe_parent("reward_model", tmp_path / "reward")])
    for name in ("votes", "reward"):  # whoever gets the adapter has not got these
        os.remove(tmp_path / name / PROVENANCE_FILE)
    tree = trace(tmp_path / "a")
    assert tree.parents[0].parents[0].parents[0].name == "phantom" and tree.agreements == ["Ward 7"]


def test_circles_and_towers_come_to_an_end(hub, tmp_path):
    record = write_provenance(tmp_path, "adapter", parents=[])
    parent = describe_parent("adapter", tmp_path) | {"name": "org/circle", "revision": None, "fingerprint": None}
    commit = put("org/circle", {"config.json": b"1"})
    # a commit cannot hold its own hash: the circle is closed by the name of a branch
    record["parents"] = [parent | {"revision": "main"}]
    del record["parents"][0]["parents"]
    put("org/circle", {PROVENANCE_FILE: json.dumps(record).encode()})
    tree = trace("org/circle", revision="main")
    assert len(str(tree).splitlines()) <= 4 and commit
    tower = {"role": "adapter", "name": "x", "agreements": [], "parents": []}
    for _ in range(200):
        tower = {"role": "adapter", "name": "x", "agreements": [], "parents": [tower]}
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps(record | {"parents": [tower]}))
    assert "the walk ends here" in str(trace(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04pickle", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a provenance file"),
        (b'{"schema_version": 9, "parents": [], "agreements": []}', "Upgrade"),
        (b'{"schema_version": 1, "parents": {}, "agreements": []}', "`parents`"),
        (b'{"schema_version": 1, "parents": [], "agreements": "none"}', "`agreements`"),
        (b'{"schema_version": 1, "parents": [{"name": 1, "agreements": []}], "agreements": []}', "`name`"),
    ],
)
def test_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / PROVENANCE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_provenance(tmp_path)


def test_strangers_cannot_write_on_the_terminal(tmp_path):
    parent = {"role": "base_model", "name": "org/\x1b[2Jx\nINJECTED", "agreements": []}
    write_provenance(tmp_path, "adapter", parents=[parent])
    shown = str(trace(tmp_path))
    assert "\x1b" not in shown and len(shown.splitlines()) == 2


def test_settings_of_a_dataclass_are_those_that_were_set(tmp_path):
    @dataclasses.dataclass
    class Settings:
        beta: float = 0.1
        names: list = dataclasses.field(default_factory=list)
        data_dir: str = "here"
        note: str = ""

    record = write_provenance(tmp_path, "adapter", parents=[], config=Settings(beta=0.2, data_dir="/secret"))
    assert record["config"] == {"beta": 0.2}
