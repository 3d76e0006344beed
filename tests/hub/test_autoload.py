"""After `import onereward` the plain loaders give the installed classes, and run no code that a repository brings."""

import importlib.metadata
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionInpaintPipeline
from flow_components import tiny_flux_fill_components, tiny_sd3_components
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel

import onereward
from onereward import OneRewardConfig, OneRewardMaskPipeline, OneRewardModel
from onereward.pipelines import OneRewardFluxFillPipeline, OneRewardSD3InpaintPipeline


HOSTILE = "raise SystemExit('code of the repository was run')\n"


@pytest.fixture
def pipeline_repo(tiny_pipeline, tmp_path):
    """A repository whose `pipeline.py` must never be run."""
    folder = tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == [
        "pipeline",
        "OneRewardMaskPipeline",
    ]
    (folder / "pipeline.py").write_text(HOSTILE)
    return folder


@pytest.fixture
def reward_repo(tmp_path):
    """A reward model that also names code of its own, which must never be run."""
    folder = tmp_path / "reward"
    OneRewardModel(OneRewardConfig()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hostile.py").write_text(HOSTILE)
    return folder


ORDERS = {
    "onereward first": "import onereward, diffusers, transformers",
    "onereward last": "from diffusers import DiffusionPipeline; from transformers import AutoModel; import onereward",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_installed_classes_whatever_the_import_order(pipeline_repo, reward_repo, imports):
    code = f"""
{imports}
import sys
from diffusers import DiffusionPipeline
from transformers import AutoModel
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("onereward")]
print(type(DiffusionPipeline.from_pretrained({str(pipeline_repo)!r})).__module__)
print(type(AutoModel.from_pretrained({str(reward_repo)!r})).__module__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == [OneRewardMaskPipeline.__module__, OneRewardModel.__module__], result.stderr


@pytest.mark.parametrize("flags", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
@pytest.mark.parametrize("class_name", [["pipeline", "OneRewardMaskPipeline"], "OneRewardMaskPipeline"], ids=str)
@pytest.mark.parametrize("caller", [DiffusionPipeline, OneRewardMaskPipeline])
def test_pipeline_with_and_without_the_flag(pipeline_repo, caller, class_name, flags):
    index = json.loads((pipeline_repo / "model_index.json").read_text())
    (pipeline_repo / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name}))
    pipeline = caller.from_pretrained(pipeline_repo, **flags)
    assert type(pipeline) is OneRewardMaskPipeline


def test_loaded_pipeline_has_the_weights_and_labels_that_were_saved(tiny_pipeline, tmp_path):
    saved = tiny_pipeline()
    saved.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config.labels == saved.config.labels
    for name in ("unet", "vae", "text_encoder"):
        expected, weights = getattr(saved, name).state_dict(), getattr(loaded, name).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_another_custom_pipeline_still_asks_for_trust(pipeline_repo):
    index = json.loads((pipeline_repo / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "OtherPipeline"]
    (pipeline_repo / "model_index.json").write_text(json.dumps(index))
    (pipeline_repo / "pipeline.py").write_text(
        "from onereward import OneRewardMaskPipeline\n\n\nclass OtherPipeline(OneRewardMaskPipeline):\n    pass\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(pipeline_repo)
    other = DiffusionPipeline.from_pretrained(pipeline_repo, trust_remote_code=True)
    assert type(other).__name__ == "OtherPipeline"


def test_a_stock_pipeline_loads_as_before(tiny_pipeline, tmp_path):
    parts = tiny_pipeline(layout="2c+1", image_channels=3).components
    stock = StableDiffusionInpaintPipeline(
        **{name: parts[name] for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionInpaintPipeline
    assert type(AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")) is AutoencoderKL


def test_reward_model_through_the_auto_classes(reward_repo):
    assert type(AutoConfig.from_pretrained(reward_repo)) is OneRewardConfig
    model = AutoModel.from_pretrained(reward_repo)
    assert type(model) is OneRewardModel
    saved = OneRewardModel.from_pretrained(reward_repo).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_stock_model_and_an_unknown_type_load_as_before(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert AutoConfig.from_pretrained(tmp_path).model_type == "vit"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "onereward-other"}))
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        AutoConfig.from_pretrained(tmp_path)


def test_patching_twice_changes_nothing():
    names = ("_dict_from_json_file", "from_pretrained")
    before = [DiffusionPipeline.__dict__[name].__func__ for name in names]
    onereward.install_import_hook()
    assert [DiffusionPipeline.__dict__[name].__func__ for name in names] == before


def test_a_failed_or_postponed_import_of_the_library_is_patched_later(tmp_path):
    """The hook waits for a module that runs to its end: looking for it, or running into an error, does not count."""
    (tmp_path / "library.py").write_text("import flag\nclass Reader:\n    @classmethod\n    def read(cls): return 1\n")
    code = f"""
import importlib.util, sys, types
sys.path.insert(0, {str(tmp_path)!r})
from onereward.hub.autoload import _PatchAfterImport
seen = []
hook = _PatchAfterImport({{"library": seen.append}})
sys.meta_path.insert(0, hook)
assert importlib.util.find_spec("library") is not None
try:
    import library
except ImportError:
    pass
assert seen == []
sys.modules["flag"] = types.ModuleType("flag")
import library
assert seen == [library] and hook not in sys.meta_path, seen
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_classes_still_pickle_and_package_metadata_is_found():
    for owner in (DiffusionPipeline, OneRewardMaskPipeline, OneRewardConfig):
        assert pickle.loads(pickle.dumps(owner)) is owner
    assert importlib.metadata.version("diffusers")
    code = "import onereward, importlib.metadata; print(importlib.metadata.version('diffusers'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == importlib.metadata.version("diffusers")


# ---------------------------------------------------------------------------------------------------------- on the Hub


FLOW = {
    "OneRewardFluxFillPipeline": (OneRewardFluxFillPipeline, tiny_flux_fill_components),
    "OneRewardSD3InpaintPipeline": (OneRewardSD3InpaintPipeline, tiny_sd3_components),
}


@pytest.mark.parametrize("class_name", FLOW)
def test_a_flow_matching_pipeline_is_known_by_its_name_and_stays_a_checkpoint_of_diffusers(class_name, tmp_path):
    cls, components = FLOW[class_name]
    cls(**components()).save_pretrained(tmp_path)
    module = json.loads((tmp_path / "model_index.json").read_text())["_class_name"][0]
    assert (tmp_path / f"{module}.py").is_file()
    for path in tmp_path.glob("*.py"):
        assert "onereward." not in re.sub(r'"""[\s\S]*?"""', "", path.read_text()), f"{path} needs the package"
        path.write_text(HOSTILE)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is cls
    assert type(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)) is cls
    assert type(cls.__mro__[2].from_pretrained(tmp_path)) is cls.__mro__[2]  # FluxFillPipeline, ...


def test_revision_and_token_choose_what_is_loaded(hub, tiny_pipeline, tmp_path):
    api = HfApi()
    api.create_repo("org/revisions", private=True)
    commits, weights = [], []
    for value in (1.0, 2.0):
        pipeline = tiny_pipeline()
        pipeline.unet.conv_in.bias.data.fill_(value)
        pipeline.save_pretrained(tmp_path)
        (tmp_path / "pipeline.py").write_text(HOSTILE)
        commits.append(api.upload_folder(folder_path=tmp_path, repo_id="org/revisions").oid)
    for caller in (DiffusionPipeline, OneRewardMaskPipeline):
        for revision in (*commits, "main"):
            loaded = caller.from_pretrained("org/revisions", revision=revision, token="hf_alice")
            assert type(loaded) is OneRewardMaskPipeline
            weights.append(loaded.unet.conv_in.bias[0].item())
        with pytest.raises(OSError, match="revision|Revision"):
            caller.from_pretrained("org/revisions", revision="v9")
        with pytest.raises(OSError, match="Cannot load model org/revisions|log in"):
            caller.from_pretrained("org/revisions", token="stranger", cache_dir=tmp_path / caller.__name__)
    assert weights == [1.0, 2.0, 2.0] * 2
    hub.fail = lambda method, path: (503, "down")  # from the cache
    assert DiffusionPipeline.from_pretrained("org/revisions").unet.conv_in.bias[0].item() == 2.0


def test_an_unknown_name_is_reported_as_diffusers_reports_it(hub, tmp_path):
    with pytest.raises(OSError, match="Cannot load model org/nowhere"):
        DiffusionPipeline.from_pretrained("org/nowhere")
    with pytest.raises(OSError, match="no file named model_index.json"):
        DiffusionPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON file"):
        DiffusionPipeline.from_pretrained(tmp_path)
