"""What is published can be read with the commands that people already use: `hf` and `load_dataset`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi

from onereward import load_phantom
from onereward.data.schema import FEATURES
from onereward.hub.publish import publish


ROOT = Path(__file__).parents[2]


def hf(*arguments):
    """Runs the command line of huggingface_hub -> what it prints."""
    beside = Path(sys.executable).with_name("hf")
    command = [str(beside)] if beside.is_file() else [sys.executable, "-m", "huggingface_hub.cli.hf"]
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    publish("pipeline", ROOT / "pipelines" / "onereward-brats", "org/cli-base")
    rows = load_phantom(2, contrasts=("t1c",), split="train")
    rows.save_to_disk(folder / "rows")
    publish("dataset", folder / "rows", "org/cli-rows")
    return rows


def test_hf_downloads_a_pipeline_as_it_is(published, tmp_path):
    hf("download", "org/cli-base", "--local-dir", tmp_path)
    for path in (ROOT / "pipelines" / "onereward-brats").rglob("*"):
        name = path.relative_to(ROOT / "pipelines" / "onereward-brats")
        if path.is_file() and path.suffix in (".safetensors", ".py"):
            assert (tmp_path / name).read_bytes() == path.read_bytes(), name


def test_hf_downloads_a_data_set_and_knows_a_model(published, tmp_path):
    hf("download", "org/cli-rows", "--repo-type", "dataset", "--local-dir", tmp_path)
    parquet = datasets.load_dataset("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train")
    assert parquet["case_id"] == published["case_id"]
    info = json.loads(hf("models", "info", "org/cli-base"))
    assert info["id"] == "org/cli-base" and "onereward" in info["tags"]
    assert info["sha"] == HfApi().model_info("org/cli-base").sha


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_what_was_published(published, streaming):
    rows = list(datasets.load_dataset("org/cli-rows", split="train", streaming=streaming))
    assert len(rows) == len(published)
    for row, expected in zip(rows, published, strict=True):
        assert set(row) == set(FEATURES)
        for name, value in expected.items():
            same = row[name].tobytes() == value.tobytes() if hasattr(value, "tobytes") else row[name] == value
            assert same, name


def test_the_environment_is_the_loopback(hub):
    assert os.environ["HF_ENDPOINT"] == hub.url
