"""An adapter comes back through diffusers and through PEFT as the images it was saved with, or not at all."""

import json
from hashlib import sha256

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flow_components import tiny_flux_fill_components, tiny_sd3_components
from huggingface_hub import HfApi
from load_everything import paint as paint_flow
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from onereward.hub.adapters import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, load_adapter, save_adapter
from onereward.pipelines import OneRewardFluxFillPipeline, OneRewardSD3InpaintPipeline


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {
    "alpha is not the rank": dict(r=4, lora_alpha=16, target_modules=ATTENTION),
    "rank-stabilised": dict(r=4, lora_alpha=16, target_modules=ATTENTION, use_rslora=True),
    "convolutions": dict(r=4, lora_alpha=2, target_modules=[*ATTENTION, "conv_in", "conv1"]),
    "own ranks": dict(
        r=4, lora_alpha=16, target_modules=ATTENTION, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 3}
    ),
    "magnitudes": dict(r=4, lora_alpha=16, target_modules=ATTENTION, use_dora=True),
}


def paint(pipeline):
    image = np.random.default_rng(0).random((1, 16, 16, 1), dtype=np.float32)
    mask = np.zeros((1, 16, 16, 1), dtype=np.float32)
    mask[:, 4:12, 4:12] = 1
    generator = torch.Generator().manual_seed(0)
    output = pipeline("tumour", image, mask, num_inference_steps=2, generator=generator, output_type="np")
    return np.asarray(output.images)


def tuned(pipeline, name="default", **config):
    """`pipeline` with an adapter whose effect is large."""
    pipeline.unet.add_adapter(LoraConfig(**config), adapter_name=name)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in pipeline.unet.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.2, generator=generator)
    return pipeline


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_formats_give_the_image_of_the_saved_adapter(tiny_pipeline, tmp_path, config):
    plain = paint(tiny_pipeline())
    pipeline = tuned(tiny_pipeline(), **config)
    expected = paint(pipeline)
    assert np.abs(expected - plain).max() > 1e-3  # the adapter does something

    save_adapter(pipeline, tmp_path, base_model="org/base")

    ours = tiny_pipeline()
    load_adapter(ours, tmp_path)
    diffusers = tiny_pipeline()
    diffusers.load_lora_weights(str(tmp_path))
    peft = tiny_pipeline()
    peft.unet = PeftModel.from_pretrained(peft.unet, tmp_path)
    for loaded in (ours, diffusers, peft):
        np.testing.assert_allclose(paint(loaded), expected, atol=1e-6, rtol=0)


def test_folder_names_its_base_and_carries_alpha_in_the_header(tiny_pipeline, tmp_path):
    pipeline = tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"])
    save_adapter(pipeline, tmp_path / "new" / "adapter", base_model="org/base")
    folder = tmp_path / "new" / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == sorted([DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG])
    assert json.loads((folder / PEFT_CONFIG).read_text())["base_model_name_or_path"] == "org/base"
    with safe_open(folder / DIFFUSERS_WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (header["unet.r"], header["unet.lora_alpha"]) == (4, 16)
    assert pipeline.unet.peft_config["default"].base_model_name_or_path != "org/base"  # the live pipeline is as it was


def test_saving_again_gives_the_same_peft_bytes(tiny_pipeline, tmp_path):
    pipeline = tuned(tiny_pipeline(), **CONFIGS["convolutions"])
    for folder in ("first", "second"):
        save_adapter(pipeline, tmp_path / folder, base_model="org/base")
    for name in (PEFT_WEIGHTS, PEFT_CONFIG):  # safetensors writes the two keys of the diffusers header in any order
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    modules = json.loads((tmp_path / "first" / PEFT_CONFIG).read_text())["target_modules"]
    assert modules == sorted(modules)


def test_a_failed_save_leaves_the_old_adapter(tiny_pipeline, tmp_path, monkeypatch):
    pipeline = tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"])
    save_adapter(pipeline, tmp_path, base_model="org/base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_is_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(LoraConfig, "save_pretrained", disk_is_full)
    for parameter in pipeline.unet.parameters():
        parameter.data.add_(1)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(pipeline, tmp_path, base_model="org/other")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_gathered_state_dict_is_what_is_written(tiny_pipeline, tmp_path):
    pipeline = tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"])
    gathered = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    expected = paint(pipeline)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()  # a shard that holds nothing
    save_adapter(pipeline, tmp_path, base_model="org/base", state_dict=gathered)
    loaded = tiny_pipeline()
    load_adapter(loaded, tmp_path)
    np.testing.assert_allclose(paint(loaded), expected, atol=1e-6, rtol=0)


def test_the_named_one_of_two_adapters_is_saved(tiny_pipeline, tmp_path):
    pipeline = tuned(tiny_pipeline(), name="second", **CONFIGS["alpha is not the rank"])
    expected = paint(pipeline)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="first")
    save_adapter(pipeline, tmp_path, base_model="org/base", adapter_name="second")
    loaded = tiny_pipeline()
    load_adapter(loaded, tmp_path, adapter_name="any")
    assert loaded.get_active_adapters() == ["any"]
    np.testing.assert_allclose(paint(loaded), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_only_a_trainable_adapter_gets_gradients(tiny_pipeline, tmp_path, trainable):
    save_adapter(tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"]), tmp_path, base_model="org/base")
    pipeline = tiny_pipeline()
    load_adapter(pipeline, tmp_path, trainable=trainable)
    with_gradient = {name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad}
    adapter = {name for name, _ in pipeline.unet.named_parameters() if "lora_" in name}
    assert len(adapter) == len(load_file(tmp_path / PEFT_WEIGHTS))
    assert with_gradient == (adapter if trainable else set())


def test_saving_names_the_adapters_there_are(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"`adapter_name` is 'default'.*adapters \[\]"):
        save_adapter(tiny_pipeline(), tmp_path, base_model="org/base")
    pipeline = tuned(tiny_pipeline(), r=4, target_modules=["to_q"], modules_to_save=["conv_in"])
    with pytest.raises(ValueError, match="modules_to_save=.*conv_in.*target_modules"):
        save_adapter(pipeline, tmp_path, base_model="org/base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no pytorch_lora_weights.safetensors, only \[\]"),
        (["model.safetensors"], r"only \['model.safetensors'\]"),
        (["pytorch_lora_weights.bin"], "pickle files can run code"),
        (["adapter.pt", "adapter.ckpt"], "pickle files can run code"),
        ([PEFT_WEIGHTS, PEFT_CONFIG], "PEFT format only"),
    ],
)
def test_a_folder_without_an_adapter_is_refused(tiny_pipeline, tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        load_adapter(pipeline, tmp_path)
    assert not getattr(pipeline.unet, "peft_config", {})


def test_a_missing_folder_and_a_taken_name_are_refused(tiny_pipeline, tmp_path):
    pipeline = tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"])
    with pytest.raises(ValueError, match="no folder here"):
        load_adapter(pipeline, tmp_path / "nowhere")
    save_adapter(pipeline, tmp_path, base_model="org/base")
    with pytest.raises(ValueError, match="'default', and the denoiser has an adapter of that name"):
        load_adapter(pipeline, tmp_path)


def test_weights_that_diffusers_would_pass_over_are_refused(tiny_pipeline, tmp_path):
    pipeline = tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"])
    pipeline.unet.save_lora_adapter(tmp_path)  # the same file name, no "unet." in the names of the tensors
    with pytest.raises(ValueError, match="begins with 'unet.'.*nothing would be loaded"):
        load_adapter(tiny_pipeline(), tmp_path)
    (tmp_path / DIFFUSERS_WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_adapter(tiny_pipeline(), tmp_path)


def test_a_second_adapter_lies_beside_the_first(tiny_pipeline, tmp_path):
    save_adapter(tuned(tiny_pipeline(), **CONFIGS["convolutions"]), tmp_path, base_model="org/base")
    pipeline = tiny_pipeline()
    load_adapter(pipeline, tmp_path, "first")
    expected = paint(pipeline)
    load_adapter(pipeline, tmp_path, "second")
    assert pipeline.get_list_adapters() == {"unet": ["first", "second"]}
    assert pipeline.get_active_adapters() == ["second"]
    np.testing.assert_allclose(paint(pipeline), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("widths", [(8, 32), (8,)], ids=["wider", "without attention"])
def test_an_adapter_of_another_base_is_refused_and_leaves_no_trace(tiny_pipeline, tmp_path, widths):
    save_adapter(tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"]), tmp_path, base_model="org/base")
    pipeline = tiny_pipeline()
    config = dict(pipeline.unet.config, block_out_channels=widths)
    if len(widths) == 1:
        config.update(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None)
    pipeline.unet = UNet2DConditionModel.from_config(config).eval()
    before = pipeline.unet.state_dict()
    with pytest.raises(ValueError, match="does not fit this denoiser.*It was made for 'org/base'"):
        load_adapter(pipeline, tmp_path)
    assert not getattr(pipeline.unet, "peft_config", {})
    assert pipeline.unet.state_dict().keys() == before.keys()


# ---------------------------------------------------------------------------------------------------------- on the Hub


@pytest.fixture
def repo(hub, tiny_pipeline, tmp_path, request):
    """An adapter on the Hub: on `main` nothing that loads, on the tag `v1` what was saved."""
    save_adapter(tuned(tiny_pipeline(), **CONFIGS["alpha is not the rank"]), tmp_path / "up", base_model="org/base")
    name = f"org/adapters-{sha256(request.node.name.encode()).hexdigest()[:12]}"
    HfApi().create_repo(name)
    HfApi().upload_folder(folder_path=tmp_path / "up", repo_id=name)
    HfApi().create_tag(name, tag="v1")
    hub.calls.clear()
    return name


def test_an_adapter_on_the_hub_is_the_one_that_was_saved(repo, hub, tiny_pipeline, tmp_path):
    local = tiny_pipeline()
    load_adapter(local, tmp_path / "up")
    expected = paint(local)
    HfApi().delete_file(DIFFUSERS_WEIGHTS, repo)
    loaded = tiny_pipeline()
    with pytest.raises(ValueError, match="PEFT format only"):
        load_adapter(loaded, repo)
    load_adapter(loaded, repo, adapter_name="tuned", trainable=True, revision="v1")
    assert loaded.get_active_adapters() == ["tuned"]
    assert {name for name, p in loaded.unet.named_parameters() if p.requires_grad} == {
        name for name, _ in loaded.unet.named_parameters() if "lora_" in name
    }
    np.testing.assert_allclose(paint(loaded), expected, atol=1e-6, rtol=0)

    by_diffusers = tiny_pipeline()
    by_diffusers.load_lora_weights(repo, revision="v1")
    np.testing.assert_allclose(paint(by_diffusers), expected, atol=1e-6, rtol=0)
    hub.fail = lambda method, path: (503, "down")  # now from the cache
    again = tiny_pipeline()
    load_adapter(again, repo, revision="v1")
    np.testing.assert_allclose(paint(again), expected, atol=1e-6, rtol=0)


def test_what_the_hub_refuses_is_said_in_one_message(repo, hub, tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    with pytest.raises(OSError, match=f"'{repo}' has no revision 'v9'. Pass one of its branches"):
        load_adapter(pipeline, repo, revision="v9")
    with pytest.raises(OSError, match="'org/nowhere' is no folder here, and the Hub shows no such repository.*log in"):
        load_adapter(pipeline, "org/nowhere")
    with pytest.raises(ValueError, match="'not a name' is no folder here|'not a name', which is no folder here"):
        load_adapter(pipeline, "not a name")
    with pytest.raises(ValueError, match="`revision` is 'v1', but .* is a folder"):
        load_adapter(pipeline, tmp_path, revision="v1")
    hub.fail = lambda method, path: (503, "down") if "/resolve/" in path else None
    with pytest.raises(OSError, match="not in the cache, and the Hub cannot be reached"):
        load_adapter(pipeline, repo)
    assert not getattr(pipeline.unet, "peft_config", {})


@pytest.mark.parametrize(("setting", "message"), [("private", "shows no such repository"), ("gated", "is gated")])
def test_private_and_gated_adapters_are_for_those_who_may_read_them(
    repo, tiny_pipeline, monkeypatch, setting, message
):
    settings = {"visibility": "private"} if setting == "private" else {"gated": "manual"}
    HfApi().update_repo_settings(repo, **settings)
    load_adapter(tiny_pipeline(), repo)  # its owner
    tiny_pipeline().load_lora_weights(repo, token="hf_alice")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(OSError, match=message):
        load_adapter(tiny_pipeline(), repo, revision="v1")


def test_a_misfit_on_the_hub_says_what_it_was_made_for(repo, tiny_pipeline):
    pipeline = tiny_pipeline()
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config, block_out_channels=(8, 32))).eval()
    with pytest.raises(ValueError, match="does not fit this denoiser.*It was made for 'org/base'"):
        load_adapter(pipeline, repo)


def test_load_lora_weights_does_not_pass_over_what_peft_wrote(repo, tiny_pipeline):
    HfApi().delete_file(DIFFUSERS_WEIGHTS, repo)
    with pytest.raises(ValueError, match="Nothing in .* was made for this pipeline.*PeftModel.from_pretrained"):
        tiny_pipeline().load_lora_weights(repo)


@pytest.mark.parametrize("make", ["flux", "sd3"])
def test_adapters_of_flow_matching_denoisers_come_back_through_both_loaders(make, hub, tmp_path):
    def pipeline():
        if make == "flux":
            return OneRewardFluxFillPipeline(**tiny_flux_fill_components())
        return OneRewardSD3InpaintPipeline(**tiny_sd3_components())

    saved = pipeline()
    saved.transformer.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in saved.transformer.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.2, generator=generator)
    save_adapter(saved, tmp_path, base_model="org/base")
    HfApi().create_repo(f"org/both-{make}")
    HfApi().upload_folder(folder_path=tmp_path, repo_id=f"org/both-{make}")
    ours, diffusers, peft = pipeline(), pipeline(), pipeline()
    load_adapter(ours, f"org/both-{make}")
    diffusers.load_lora_weights(f"org/both-{make}")
    peft.transformer = PeftModel.from_pretrained(peft.transformer, f"org/both-{make}").base_model.model
    for loaded in (ours, diffusers, peft):
        np.testing.assert_allclose(paint_flow(loaded), paint_flow(saved), atol=1e-6, rtol=0)


def test_the_same_adapter_is_the_same_bytes_each_time(tiny_pipeline, tmp_path):
    """safetensors writes its metadata in an order that chance decides: of 8 saves two would differ, nearly always."""
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]))
    for number in range(8):
        save_adapter(pipeline, tmp_path / str(number), base_model="org/base")
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(8)}) == 1, name
