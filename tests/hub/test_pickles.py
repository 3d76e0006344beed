"""No pickle of a repository is downloaded or read: beside safetensors it is passed over, alone it is refused."""

import os
import re
from hashlib import sha256

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline
from flow_components import tiny_flux_fill_components, tiny_sd3_components
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

from onereward.hub.adapters import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, load_adapter, save_adapter
from onereward.pipelines import OneRewardFluxFillPipeline, OneRewardMaskPipeline, OneRewardSD3InpaintPipeline
from onereward.rewards import OneRewardConfig, OneRewardModel


REFUSED = r"safetensors.*a pickle .*can run code"
PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl)\b")


class MakesAFile:
    """Unpickled, it makes a file: so a test can see that it ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path):
    """`trap(path)` writes a pickle there. None of them may have been run when the test ends."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": MakesAFile(tmp_path / "ran")}, path)

    yield write
    assert not (tmp_path / "ran").exists(), "a pickle was run"


@pytest.fixture
def upload(hub, request):
    """`upload(folder)` -> the name of a new repository with these files."""

    def make(folder):
        repo = f"org/pickles-{sha256(request.node.name.encode()).hexdigest()[:16]}"
        HfApi().create_repo(repo)
        HfApi().upload_folder(folder_path=folder, repo_id=repo)
        hub.calls.clear()
        return repo

    return make


def asked_for(hub):
    """Pickles that the client asked the Hub for."""
    return [call for call in hub.calls if "/resolve/" in call and PICKLE.search(call)]


def mask_pipeline(tiny_pipeline):
    return tiny_pipeline()


def flux_pipeline(_):
    return OneRewardFluxFillPipeline(**tiny_flux_fill_components())


def sd3_pipeline(_):
    return OneRewardSD3InpaintPipeline(**tiny_sd3_components())


PIPELINES = {"mask": mask_pipeline, "flux": flux_pipeline, "sd3": sd3_pipeline}


def into_pickles(folder):
    """Turn the safetensors of a folder into harmless pickles, as old repositories have them."""
    for path in folder.glob("**/*.safetensors"):
        name = {"model": "pytorch_model", DIFFUSERS_WEIGHTS[:-12]: DIFFUSERS_WEIGHTS[:-12]}.get(path.stem, path.stem)
        torch.save(load_file(path), path.with_name(f"{name}.bin"))
        path.unlink()


def test_the_trap_would_have_been_sprung(tmp_path):
    torch.save({"weight": MakesAFile(tmp_path / "ran")}, tmp_path / "weights.bin")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "ran").is_dir()


# --------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_pickles_beside_a_pipelines_safetensors_are_not_fetched(make, tiny_pipeline, trap, upload, hub, tmp_path):
    made = make(tiny_pipeline)
    made.save_pretrained(tmp_path / "saved")
    denoiser = "unet" if "unet" in made.components else "transformer"
    for name in (f"{denoiser}/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "pytorch_model.bin"):
        trap(tmp_path / "saved" / name)
    for name in ("text_encoder/pytorch_model.bin", "pytorch_lora_weights.bin", "training_args.bin", "model.ckpt"):
        trap(tmp_path / "saved" / name)
    repo = upload(tmp_path / "saved")
    for loaded in (DiffusionPipeline.from_pretrained(repo), DiffusionPipeline.from_pretrained(tmp_path / "saved")):
        assert type(loaded) is type(made)
        weights = getattr(loaded, denoiser).state_dict()
        assert all(torch.equal(weights[k], v) for k, v in getattr(made, denoiser).state_dict().items())
    assert asked_for(hub) == []


@pytest.mark.parametrize(
    "alone",
    ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"],
)
@pytest.mark.parametrize("flags", [{}, {"trust_remote_code": True}], ids=["plain", "trusted"])
@pytest.mark.parametrize("caller", [DiffusionPipeline, OneRewardMaskPipeline])
def test_a_pipeline_with_a_pickle_alone_is_refused(caller, flags, alone, tiny_pipeline, trap, upload, hub, tmp_path):
    folder = tmp_path / "saved"
    tiny_pipeline().save_pretrained(folder)
    (folder / f"{alone}.safetensors").unlink()
    trap(folder / f"{alone.replace('/model', '/pytorch_model')}.bin")
    repo = upload(folder)
    for name in (repo, folder):
        with pytest.raises(OSError, match=REFUSED):
            caller.from_pretrained(name, **flags)
    assert asked_for(hub) == []


@pytest.mark.parametrize("make", [flux_pipeline, sd3_pipeline])
def test_a_flow_matching_pipeline_with_a_pickle_alone_is_refused(make, trap, upload, hub, tmp_path):
    make(None).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors").unlink()
    trap(tmp_path / "saved/transformer/diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match=REFUSED):
        DiffusionPipeline.from_pretrained(upload(tmp_path / "saved"))
    assert asked_for(hub) == []


def test_who_asks_for_pickles_gets_them(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    into_pickles(tmp_path)
    with pytest.raises(OSError, match=REFUSED):
        DiffusionPipeline.from_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(loaded.unet.conv_in.weight, tiny_pipeline().unet.conv_in.weight)


def test_other_peoples_pickles_load_as_before(tiny_pipeline, upload, hub, tmp_path):
    parts = tiny_pipeline(layout="2c+1", image_channels=3).components
    stock = StableDiffusionInpaintPipeline(
        **{name: parts[name] for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.save_pretrained(tmp_path)
    into_pickles(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(upload(tmp_path))
    assert type(loaded) is StableDiffusionInpaintPipeline
    assert torch.equal(loaded.unet.conv_in.weight, stock.unet.conv_in.weight)
    assert asked_for(hub)


# ------------------------------------------------------------------------------------------------------ reward models


@pytest.fixture
def reward_folder(tmp_path):
    OneRewardModel(OneRewardConfig()).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


LOADERS = {
    "AutoModel": AutoModel.from_pretrained,
    "OneRewardModel": OneRewardModel.from_pretrained,
    "pipeline": lambda name: pipeline("image-reward", model=str(name)).model,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_pickles_beside_a_reward_models_safetensors_are_not_fetched(load, reward_folder, trap, upload, hub):
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        trap(reward_folder / name)
    expected = load_file(reward_folder / "model.safetensors")
    for name in (upload(reward_folder), reward_folder):
        weights = load(name).state_dict()
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    assert asked_for(hub) == []


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_reward_model_with_a_pickle_alone_is_refused(load, reward_folder, trap, upload, hub):
    (reward_folder / "model.safetensors").unlink()
    trap(reward_folder / "pytorch_model.bin")
    for name in (upload(reward_folder), reward_folder):
        with pytest.raises((OSError, ValueError), match=REFUSED):  # `pipeline` makes a ValueError of it
            load(name)
    assert asked_for(hub) == []


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_an_adapter_in_a_pickle_is_refused_on_a_reward_model_in_safetensors(load, reward_folder, trap, upload, hub):
    layer = next(name for name, module in OneRewardModel(OneRewardConfig()).named_modules() if "conv" in name)
    LoraConfig(r=2, target_modules=[layer], base_model_name_or_path=str(reward_folder)).save_pretrained(reward_folder)
    trap(reward_folder / "adapter_model.bin")
    with pytest.raises((OSError, ValueError), match=REFUSED):
        load(reward_folder)
    config = reward_folder / PEFT_CONFIG
    repo = upload(reward_folder)
    config.write_text(config.read_text().replace(str(reward_folder), repo))
    HfApi().upload_file(path_or_fileobj=config, path_in_repo=PEFT_CONFIG, repo_id=repo)
    with pytest.raises((OSError, ValueError), match=REFUSED):
        load(repo)
    assert asked_for(hub) == []


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter_folder(tiny_pipeline, tmp_path):
    made = tiny_pipeline()
    made.unet.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"]))
    save_adapter(made, tmp_path / "adapter", base_model="org/base")
    return tmp_path / "adapter"


def by_diffusers(made, name):
    made.load_lora_weights(str(name))
    return made.unet


def by_us(made, name):
    load_adapter(made, name)
    return made.unet


def by_peft(made, name):
    return PeftModel.from_pretrained(made.unet, str(name)).base_model.model


ADAPTER_PICKLES = ("pytorch_lora_weights.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt")


@pytest.mark.parametrize("load", [by_diffusers, by_us, by_peft])
def test_pickles_beside_an_adapters_safetensors_are_not_fetched(
    load, adapter_folder, tiny_pipeline, trap, upload, hub
):
    for name in ADAPTER_PICKLES:
        trap(adapter_folder / name)
    expected = load_file(adapter_folder / PEFT_WEIGHTS)
    for name in (upload(adapter_folder), adapter_folder):
        weights = [w for key, w in sorted(load(tiny_pipeline(), name).state_dict().items()) if "lora_" in key]
        assert len(weights) == len(expected)
        assert all(torch.equal(weight, expected[key]) for weight, key in zip(weights, sorted(expected), strict=True))
    assert asked_for(hub) == []


@pytest.mark.parametrize("load", [by_diffusers, by_us])
def test_an_adapter_in_a_pickle_alone_is_refused(load, adapter_folder, tiny_pipeline, trap, upload, hub):
    for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS):
        (adapter_folder / name).unlink()
    for name in ADAPTER_PICKLES:
        trap(adapter_folder / name)
    made = tiny_pipeline()
    for name in (upload(adapter_folder), adapter_folder):
        with pytest.raises((OSError, ValueError), match="safetensors"):
            load(made, name)
    assert asked_for(hub) == []
    assert not getattr(made.unet, "peft_config", {})


def test_peft_itself_fetches_a_pickle_that_is_alone_and_torch_refuses_to_run_it(
    adapter_folder, tiny_pipeline, trap, upload, hub
):
    """Not our code: that it is not run is what torch's `weights_only` promises."""
    (adapter_folder / PEFT_WEIGHTS).unlink()
    trap(adapter_folder / "adapter_model.bin")
    with pytest.raises(Exception, match="weights_only"):
        by_peft(tiny_pipeline(), upload(adapter_folder))
    assert any("adapter_model.bin -> 200" in call for call in asked_for(hub))


def test_a_pickle_that_is_named_outright_is_refused(adapter_folder, tiny_pipeline, trap, upload, hub):
    trap(adapter_folder / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="no safetensors file.*a pickle can run code"):
        tiny_pipeline().load_lora_weights(upload(adapter_folder), weight_name="pytorch_lora_weights.bin")
    assert asked_for(hub) == []
