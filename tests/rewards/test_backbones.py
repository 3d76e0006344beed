"""Pretrained backbones: each sees an image as it did before, and learns what is new to it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessorPil,
)

from onereward.rewards import OneRewardModel


SIZE, OWN = 24, 32  # of our images, and of the backbone's
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOWER = {**TRANSFORMER, "image_size": OWN, "patch_size": 8}
BACKBONES = {
    "vit": TOWER,
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 40, "patch_size": 8},
    "dinov3_vit": {**TOWER, "num_register_tokens": 2},
    "convnextv2": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "dinov3_convnext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "clip": {"vision_config": TOWER, "text_config": {**TRANSFORMER, "vocab_size": 64}},
    "siglip": {"vision_config": TOWER, "text_config": {**TRANSFORMER, "vocab_size": 64}},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(params=BACKBONES)
def repo(request, tmp_path):
    """A folder as it lies on the Hub, and the image side of its model."""
    torch.manual_seed(0)
    name, config = request.param, BACKBONES[request.param]
    if name in ("clip", "siglip"):
        kind = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[name]
        whole = kind[1](kind[0](**config))
        backbone = whole.vision_model
    else:
        whole = backbone = AutoModel.from_config(CONFIG_MAPPING[name](**config))
    whole.save_pretrained(tmp_path)
    size = {"height": OWN, "width": OWN}
    ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    return tmp_path, backbone.eval()


def make_inputs(channels=1):
    generator = torch.Generator().manual_seed(1)
    images, sources = torch.rand(2, 3, channels, SIZE, SIZE, generator=generator)
    masks = torch.zeros(3, 1, SIZE, SIZE)
    masks[..., 6:18, 6:18] = 1
    return {"images": images, "masks": masks, "sources": sources}


def looked(model, inputs):
    channels = model.config.image_channels
    parts = model.prepare_inputs(**inputs)["pixel_values"].split([channels, channels, 1, 0], dim=1)
    return model.look(*parts)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_backbone_sees_the_image_as_it_was_pretrained_to(repo, channels):
    folder, backbone = repo
    model = OneRewardModel.from_backbone(folder, image_size=SIZE, image_channels=channels, tasks=["fill"]).eval()
    inputs = make_inputs(channels)
    seen = torch.nn.functional.interpolate(inputs["images"], (OWN, OWN), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    with torch.no_grad():
        seen = (seen.expand(-1, 3, -1, -1) - mean) / std
        options = {"interpolate_pos_encoding": True} if type(backbone).__name__.startswith("Siglip") else {}
        expected = backbone(seen, **options).last_hidden_state
        found = looked(model, inputs)
    if expected.ndim == 3:
        side = found.shape[-1]
        expected = expected[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(reward.isfinite().all() for reward in model.score(**inputs).values())


def test_it_learns_from_the_channels_that_are_new_to_it(repo):
    folder, _ = repo
    model = OneRewardModel.from_backbone(folder, image_size=SIZE, tasks=["fill"])
    loss = looked(model, make_inputs())[:, :, :2].square().mean()
    loss.backward()
    first = next(m for m in model.vision.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.weight.shape[1] == 7 and (first.weight[:, 3:] == 0).all()
    assert (first.weight.grad[:, 3:].abs().amax(dim=(0, 2, 3)) > 0).all()


def test_it_is_loaded_again_without_the_backbones_repository(repo, tmp_path_factory):
    folder, _ = repo
    model = OneRewardModel.from_backbone(folder, image_size=SIZE, tasks=["fill"]).eval()
    saved = tmp_path_factory.mktemp("reward")
    model.save_pretrained(saved)
    again, inputs = AutoModel.from_pretrained(saved), make_inputs()
    for name, rewards in model.score(**inputs).items():
        torch.testing.assert_close(again.score(**inputs)[name], rewards, atol=1e-7, rtol=1e-6)


def test_all_of_them_take_an_adapter(repo):
    folder, _ = repo
    model = OneRewardModel.from_backbone(folder, image_size=SIZE, tasks=["fill"]).eval()
    before = model.score(**make_inputs())
    model.vision = get_peft_model(model.vision, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    after = model.score(**make_inputs())
    assert all((after[name] != before[name]).any() for name in before)


def test_a_backbone_without_a_processor_takes_its_own_size(tmp_path):
    AutoModel.from_config(CONFIG_MAPPING["vit"](**TOWER)).save_pretrained(tmp_path)
    model = OneRewardModel.from_backbone(tmp_path, image_size=SIZE)
    assert model.config.vision_image_size == OWN and model.config.vision_mean == [0.485, 0.456, 0.406]


def test_a_pickle_is_not_read(tmp_path):
    backbone = AutoModel.from_config(CONFIG_MAPPING["vit"](**TOWER))
    backbone.config.save_pretrained(tmp_path)
    torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        OneRewardModel.from_backbone(tmp_path)
