"""What `load_rows` promises: the same rows by any name, by revision, streamed and offline, and clear refusals."""

import json
import subprocess
import sys

import datasets
import loopback_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets.table import embed_table_storage
from huggingface_hub import HfApi
from PIL import Image

from onereward.data.load import cached_commit, hub_commit, load_rows
from onereward.data.phantom import load_phantom
from onereward.data.schema import FEATURES


@pytest.fixture(scope="module")
def rows():
    return load_phantom(1, contrasts=("t1c",), seed=2)


def test_phantom_by_name(rows):
    loaded = load_rows("phantom", "train", num_cases=1, contrasts=("t1c",), seed=2)
    assert loaded.to_dict() == rows.to_dict()


def test_folder_and_parquet_hold_the_same_rows(rows, tmp_path):
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "folder")
    rows.to_parquet(tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "folder"), "test")["prompt"] == rows["prompt"]
    from_parquet = load_rows(str(tmp_path / "rows.parquet"), "train")
    assert from_parquet[0]["image"].tobytes() == rows[0]["image"].tobytes()


def test_cases_to_validate_on_are_held_out_of_train_and_never_of_test(tmp_path):
    rows = load_phantom(12, contrasts=("t1c",), tasks=("fill", "remove"))
    train, test = rows.select(range(16)), rows.select(range(16, 24))
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")  # as `onereward data` does
    splits = ("train", "validation")
    held = [set(load_rows(str(tmp_path / "two"), split, hold_out=0.1)["case_id"]) for split in splits]
    assert held[0].isdisjoint(held[1]) and held[0] | held[1] == set(train["case_id"]) and len(held[1]) == 1
    datasets.DatasetDict(train=train, validation=test).save_to_disk(tmp_path / "own")
    own = [load_rows(str(tmp_path / "own"), split, hold_out=0.1)["case_id"] for split in splits]
    assert own == [train["case_id"][:], test["case_id"][:]]
    with pytest.raises(ValueError, match="no split 'validation', only"):
        load_rows(str(tmp_path / "two"), "validation")


def test_missing_split_and_missing_column_are_named(rows, tmp_path):
    datasets.DatasetDict(train=rows.remove_columns("target")).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        load_rows(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"lacks the columns \['target'\]"):
        load_rows(str(tmp_path), "train")


def upload(repo, rows, tmp_path, split="train", shards=1):
    """Plain Parquet files with the features in their schema, as a data set is published; the commit."""
    api = HfApi()
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    for index in range(shards):
        table = embed_table_storage(rows.shard(shards, index, contiguous=True).with_format("arrow")[:])
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=20)
        path = f"data/{split}-{index:05}-of-{shards:05}.parquet"
        options = {"path_in_repo": path, "repo_id": repo, "repo_type": "dataset"}
        commit = api.upload_file(path_or_fileobj=(tmp_path / "rows.parquet").read_bytes(), **options)
    return commit.oid


def same_rows(ours, theirs):
    """Equal to the last pixel."""
    for one, other in zip(ours, theirs, strict=True):
        for column in FEATURES:
            picture = hasattr(one[column], "tobytes")
            assert one[column].tobytes() == other[column].tobytes() if picture else one[column] == other[column]


def test_plain_load_dataset_reads_what_is_published_and_load_rows_the_same(hub, rows, tmp_path):
    commit = upload("org/load-plain", rows, tmp_path, "test")
    plain = datasets.load_dataset("org/load-plain", split="test")
    assert plain.features == FEATURES
    same_rows(rows, plain)
    loaded = load_rows("org/load-plain", "test")
    same_rows(rows, loaded)
    assert hub_commit(loaded) == commit == cached_commit("org/load-plain", repo_type="dataset")
    assert hub_commit(rows) is None and cached_commit("org/load-never", repo_type="dataset") is None
    with pytest.raises(ValueError, match="no split 'train'"):
        load_rows("org/load-plain", "train")


def test_revision_is_the_one_asked_for(hub, rows, tmp_path):
    first = upload("org/load-revisions", rows, tmp_path)
    HfApi().create_tag("org/load-revisions", tag="v1", repo_type="dataset")
    second = upload("org/load-revisions", rows.select([0]), tmp_path)
    assert hub_commit(load_rows("org/load-revisions", "train")) == second
    for revision in ("v1", first):
        loaded = load_rows("org/load-revisions", "train", revision=revision)
        assert (hub_commit(loaded), len(loaded)) == (first, len(rows))


@pytest.fixture
def served(monkeypatch):
    """Bytes of files that the Hub has sent, in a list."""
    sizes, reply = [], loopback_hub.Handler.reply

    def counted(self, status, body=b"", headers=None):
        if self.command == "GET" and "/resolve/" in self.path:
            sizes.append(len(body))
        return reply(self, status, body, headers)

    monkeypatch.setattr(loopback_hub.Handler, "reply", counted)
    return sizes


def test_streaming_reads_as_few_bytes_as_it_needs(hub, tmp_path, served):
    """Noise, which PNG cannot make small: 240 rows in one file of 16 MB and 12 row groups."""
    noise = np.random.default_rng(0)
    blank = Image.new("L", (256, 256))
    many = datasets.Dataset.from_list(
        [
            {
                "image": Image.fromarray(noise.integers(0, 256, (256, 256), np.uint8)),
                **dict.fromkeys(("mask", "label_map", "target"), blank),
                **dict.fromkeys(("prompt", "modality", "source"), "noise"),
                "task": "fill",
                "case_id": str(index),
            }
            for index in range(240)
        ],
        features=FEATURES,
    )
    upload("org/load-many", many, tmp_path)
    files = HfApi().dataset_info("org/load-many", files_metadata=True).siblings
    size = sum(file.size for file in files if file.rfilename.endswith(".parquet"))
    served.clear()
    rows = load_rows("org/load-many", "train", streaming=True, max_rows=20, seed=3)
    # two times 20 rows to choose from lie in two or three groups of 20; the end of the file says where
    assert sum(served) < 3.5 / 12 * size, (sum(served), size)
    assert isinstance(rows, datasets.Dataset) and rows.features == FEATURES
    numbers = [int(case) for case in rows["case_id"]]
    assert len(set(numbers)) == 20 and len({number // 20 for number in numbers}) > 1
    same_rows(rows, many.select(numbers))
    served.clear()
    assert rows[:]["case_id"] == rows[:]["case_id"] and not served  # read more than once, from memory
    again = load_rows("org/load-many", "train", streaming=True, max_rows=20, seed=3)
    other = load_rows("org/load-many", "train", streaming=True, max_rows=20, seed=4)
    assert list(again["case_id"]) == list(rows["case_id"]) != list(other["case_id"])


def test_streaming_takes_what_there_is_and_checks_it(hub, rows, tmp_path):
    upload("org/load-few", rows, tmp_path)
    assert len(load_rows("org/load-few", "train", streaming=True, max_rows=50)) == len(rows)
    with pytest.raises(ValueError, match="no split 'test'"):
        load_rows("org/load-few", "test", streaming=True, max_rows=5)
    upload("org/load-lacking", rows.remove_columns("target"), tmp_path)
    with pytest.raises(ValueError, match=r"lacks the columns \['target'\]"):
        load_rows("org/load-lacking", "train", streaming=True, max_rows=5)


def test_max_rows_are_drawn_from_all_with_the_seed(rows, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    drawn = [load_rows(str(tmp_path / "rows.parquet"), "train", max_rows=2, seed=seed) for seed in range(6)]
    assert all(len(part) == 2 for part in drawn)
    assert len({(*part["prompt"], *part["task"]) for part in drawn}) > 1
    same_rows(drawn[0], load_rows(str(tmp_path / "rows.parquet"), "train", max_rows=2, seed=0))
    assert len(load_rows("phantom", "train", num_cases=1, contrasts=("t1c",), max_rows=2)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "phantom", "streaming": True, "max_rows": 2}, "`streaming` is for data sets on the Hub"),
        ({"name": "org/x", "streaming": True}, "say how many"),
        ({"name": "phantom", "max_rows": 0}, "at least 1"),
        ({"name": "phantom", "revision": "v1"}, "not on the Hub"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_rows(**arguments, split="train")


OFFLINE = """
import json, sys
from onereward.data.load import hub_commit, load_rows
try:
    rows = load_rows("org/load-offline", "train", revision=sys.argv[1] if sys.argv[1:] else None)
    print(json.dumps([len(rows), hub_commit(rows), rows[0]["image"].size]))
except ConnectionError as error:
    print(json.dumps(str(error)))
"""


def test_offline_after_a_first_load_in_fresh_processes(hub, rows, tmp_path):
    """Offline `datasets` gives its newest version whatever was asked for; we say so instead."""
    first = upload("org/load-offline", rows, tmp_path)
    home = hub.env(tmp_path / "home")

    def run(*arguments, **extra):
        command = [sys.executable, "-c", OFFLINE, *arguments]
        done = subprocess.run(command, env={**home, **extra}, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run(HF_HUB_OFFLINE="0") == [len(rows), first, [64, 64]]
    assert run(**offline) == run(first, **offline) == run("main", **offline) == [len(rows), first, [64, 64]]
    upload("org/load-offline", rows.select([0]), tmp_path)
    assert run("0" * 40, **offline).startswith("The Hub does not answer")
