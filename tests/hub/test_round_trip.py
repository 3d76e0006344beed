"""What was published comes back: in fresh processes, with the package and without it, online and from the cache."""

import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from flow_components import tiny_flux_fill_components, tiny_sd3_components
from huggingface_hub import HfApi, snapshot_download
from load_everything import PIPELINES, digest, paint, score
from peft import LoraConfig
from tiny_components import tiny_components

from onereward.data.phantom import load_phantom
from onereward.hub.adapters import denoiser_of, save_adapter
from onereward.hub.publish import publish
from onereward.pipelines import OneRewardFluxFillPipeline, OneRewardMaskPipeline, OneRewardSD3InpaintPipeline
from onereward.preferences import CANDIDATE_FEATURES, simulate_votes
from onereward.preferences.candidates import spoil
from onereward.preferences.schema import save_votes, to_png
from onereward.rewards import OneRewardConfig, OneRewardModel


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "load_everything.py"


def pipelines():
    yield "mask", OneRewardMaskPipeline(**tiny_components())
    yield "flux", OneRewardFluxFillPipeline(**tiny_flux_fill_components())
    yield "sd3", OneRewardSD3InpaintPipeline(**tiny_sd3_components())


def publish_pipeline(name, pipeline, folder):
    """Publishes the pipeline and an adapter for it -> their images."""
    pipeline.save_pretrained(folder / name)
    publish("pipeline", folder / name, f"org/{name}")
    expected = {name: paint(pipeline)}
    # alpha is not the rank: who does not read the configuration in the header gets another image
    denoiser_of(pipeline).add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k", "to_v"]))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in denoiser_of(pipeline).named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.3, generator=generator)
    save_adapter(pipeline, folder / f"{name}-adapter", base_model=f"org/{name}")
    publish("adapter", folder / f"{name}-adapter", f"org/{name}-adapter", base_model=f"org/{name}")
    expected[f"{name}-adapter"] = paint(pipeline)
    assert np.abs(expected[f"{name}-adapter"] - expected[name]).max() > 1e-3  # the adapter does something
    return expected


def some_votes(rows):
    candidates = []
    for index, row in enumerate(rows):
        target = (np.asarray(row["target"]), "target", 0)
        pictures = {name: value if isinstance(value, str) else to_png(value) for name, value in row.items()}
        for picture, model, seed in (target, spoil(row, [target], seed=index)):
            own = {"condition": f"condition-{index}", "candidate": to_png(picture), "model": model, "seed": seed}
            candidates.append({**pictures, **own})
    rows = type(rows).from_list(candidates, features=CANDIDATE_FEATURES)
    return simulate_votes(rows, pairs_per_condition=1, seed=0)[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Everything, published on the Hub of the tests -> what it gave before."""
    folder, expected = tmp_path_factory.mktemp("published"), {}
    for name, pipeline in pipelines():
        expected |= publish_pipeline(name, pipeline, folder)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OneRewardModel(OneRewardConfig(image_size=32, hidden_size=16)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(folder / "reward")
    publish("reward-model", folder / "reward", "org/reward")
    expected["reward"] = score(model)

    rows = load_phantom(2, contrasts=("t1c",), split="train")
    DatasetDict(train=rows).save_to_disk(folder / "rows")
    publish("dataset", folder / "rows", "org/rows")
    expected["rows"] = digest(rows)
    votes = some_votes(rows)
    save_votes(votes, folder / "votes.parquet")
    publish("votes", folder / "votes.parquet", "org/votes")
    expected["votes"] = digest(votes)

    shutil.copytree(ROOT / "spaces" / "onereward-arena", folder / "space")
    publish("space", folder / "space", "org/space")
    return expected | {"folder": folder}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The caches of those with the package and those without; filled by the first process, read by the second."""
    return {"with": tmp_path_factory.mktemp("with"), "without": tmp_path_factory.mktemp("without")}


def load_everything(home, out, *options, **environment):
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": "" if "--without-package" in options else str(ROOT / "src"),
        **environment,
    }
    command = [sys.executable, str(SCRIPT), str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=out.parent)
    assert result.returncode == 0, result.stderr
    with np.load(out) as results:
        return dict(results)


def check(results, expected):
    for name, result in results.items():
        kind, _, how = name.partition(" ")
        if how in ("diffusers", "peft", "load_adapter"):
            np.testing.assert_allclose(result, expected[f"{kind}-adapter"], atol=1e-6, rtol=0, err_msg=name)
        else:  # to the last bit
            np.testing.assert_array_equal(result, expected[kind], err_msg=name)
    assert {name.partition(" ")[0] for name in results} == {*PIPELINES, "reward", "rows", "votes"}


def test_with_the_package_everything_comes_back_and_no_remote_code_is_run(expected, homes, tmp_path):
    results = load_everything(homes["with"], tmp_path / "out.npz", DIFFUSERS_DISABLE_REMOTE_CODE="1")
    check(results, expected)
    assert {"mask own class", "flux load_adapter", "sd3 peft", "rows streaming"} <= set(results)


@pytest.mark.slow
def test_with_the_package_everything_comes_back_from_the_cache(expected, homes, tmp_path):
    load_everything(homes["with"], tmp_path / "first.npz")
    dead = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    check(load_everything(homes["with"], tmp_path / "out.npz", "--offline", **dead), expected)


def test_without_the_package_everything_comes_back(expected, homes, tmp_path):
    check(load_everything(homes["without"], tmp_path / "out.npz", "--without-package"), expected)


@pytest.mark.slow
def test_without_the_package_everything_comes_back_from_the_cache(expected, homes, tmp_path):
    load_everything(homes["without"], tmp_path / "first.npz", "--without-package")
    dead = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    options = ("--without-package", "--offline")
    check(load_everything(homes["without"], tmp_path / "out.npz", *options, **dead), expected)


def is_pickle(path):
    """Whether it can be read as one, whatever it is called; `torch.save` writes one into a zip file."""
    if zipfile.is_zipfile(path):
        return True
    try:
        return len(list(pickletools.genops(path.read_bytes()))) > 1
    except (ValueError, UnicodeDecodeError):
        return False


def test_a_pickle_is_known_by_its_content(tmp_path):
    (tmp_path / "plain").write_bytes(pickle.dumps({"weight": [1.0]}))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "torch")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert all(is_pickle(tmp_path / name) for name in ("plain", "torch", "old"))


KINDS = {
    **{f"org/{name}{suffix}": "model" for name in PIPELINES for suffix in ("", "-adapter")},
    "org/reward": "model",
    "org/rows": "dataset",
    "org/votes": "dataset",
    "org/space": "space",
}


@pytest.mark.parametrize("repo", KINDS)
def test_no_published_file_is_a_pickle_and_each_says_what_it_is_for(expected, repo, tmp_path):
    folder = Path(snapshot_download(repo, repo_type=KINDS[repo], local_dir=tmp_path))
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert len(files) > 2
    assert [path.name for path in files if is_pickle(path)] == []
    card = (folder / "README.md").read_text()
    assert "not for clinical use" in card.lower() and "\nlicense:" in card


def test_the_space_is_the_folder(expected, tmp_path):
    folder = Path(snapshot_download("org/space", repo_type="space", local_dir=tmp_path))
    names = [path.name for path in (expected["folder"] / "space").glob("*.py")]
    assert "app.py" in names
    for name in (*names, "requirements.txt"):
        assert (folder / name).read_bytes() == (expected["folder"] / "space" / name).read_bytes()
    assert HfApi().space_info("org/space").sdk == "gradio"


def test_nothing_published_names_this_disk(expected, tmp_path):
    for repo in ("org/mask", "org/mask-adapter", "org/reward"):
        folder = Path(snapshot_download(repo, local_dir=tmp_path / repo))
        for path in folder.rglob("*.json"):
            assert "/tmp/" not in path.read_text(), path
    index = json.loads((tmp_path / "org/mask/model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "OneRewardMaskPipeline"]
