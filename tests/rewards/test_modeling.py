"""What `OneRewardModel` promises: it sees what it should, judges each image alone, and loads everywhere alike."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import f_oneway
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutput

from onereward.rewards import OneRewardConfig, OneRewardModel
from onereward.rewards.features_onereward import (
    NUM_DETAILS,
    NUM_REGIONS,
    correlation_ratio,
    details,
    pull_push,
    region_statistics,
    regions,
    tissue_mask,
)


LABELS = {"background": 0, "NCR": 1, "ED": 2, "ET": 3}
TINY = {"model_type": "bit", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4}
BACKBONES = {
    "bit": TINY,
    "convnextv2": {"model_type": "convnextv2", "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "vit": {
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    "dinov2_with_registers": {
        "model_type": "dinov2_with_registers",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


def make_model(vision="bit", seed=0, **config) -> OneRewardModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = {"labels": LABELS, "image_size": 32, "hidden_size": 16} | config
        model = OneRewardModel(OneRewardConfig(vision_config=BACKBONES[vision], **config))
        with torch.no_grad():  # as if it was trained: no parameter is at a special value
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            model.heads.logit_mean.normal_()
            model.heads.logit_std.uniform_(0.5, 2)
    return model.eval()


def make_inputs(batch=4, channels=1, size=32, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    sources = torch.rand(batch, channels, size, size, generator=generator)
    masks = torch.zeros(batch, 1, size, size)
    masks[..., 8:21, 6:25] = 1
    label_maps = torch.randint(0, 4, (batch, 1, size, size), generator=generator) * masks.long()
    images = torch.where(masks > 0, torch.rand(sources.shape, generator=generator), sources)
    tasks = ["fill", "remove", "extend", "fill"] * (batch // 4 + 1)
    return {
        "images": images,
        "masks": masks,
        "sources": sources,
        "label_maps": label_maps,
        "prompts": [f"tumour of size {i}" for i in range(batch)],
        "tasks": tasks[:batch],
    }


def stacked(rewards: dict) -> torch.Tensor:
    return torch.stack(list(rewards.values()), dim=1)


# ---------------------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize("vision", BACKBONES)
def test_any_backbone_gives_one_finite_reward_per_image_and_criterion(vision):
    rewards = make_model(vision, criteria=["sharp", "plausible"]).score(**make_inputs())
    assert list(rewards) == ["sharp", "plausible"]
    for reward in rewards.values():
        assert reward.shape == (4,) and reward.dtype == torch.float32 and reward.isfinite().all()
        assert reward.std() > 0


def test_the_default_model_is_small():
    model = OneRewardModel(OneRewardConfig(labels=LABELS))
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_500_000
    assert model.config.criteria == ["quality", "realism", "clinical_relevance"]
    kinds = (torch.nn.modules.batchnorm._BatchNorm,)
    batch_statistics = [module for module in model.vision.modules() if isinstance(module, kinds)]
    assert not batch_statistics


@pytest.mark.parametrize("vision", ["bit", "vit"])
def test_scoring_is_deterministic_and_each_image_is_judged_alone(vision):
    model, inputs = make_model(vision, prompt_buckets=64), make_inputs()
    rewards = stacked(model.score(**inputs))
    assert torch.equal(rewards, stacked(model.score(**inputs)))
    for i in range(4):
        alone = stacked(model.score(**{name: value[i : i + 1] for name, value in inputs.items()}))
        torch.testing.assert_close(alone[0], rewards[i], rtol=1e-4, atol=1e-5)


def test_scoring_in_the_midst_of_training_changes_nothing():
    model, inputs = make_model("resnet"), make_inputs()  # batch normalisation would notice the training mode
    rewards = stacked(model.score(**inputs))
    model.train()
    assert torch.equal(stacked(model.score(**inputs)), rewards)
    assert model.training
    with pytest.raises(ValueError, match="tasks"):
        model.score(**{**inputs, "tasks": ["paint"] * 4})
    assert model.training


@pytest.mark.parametrize("what", ["images", "sources", "masks", "label_maps", "tasks", "prompts"])
def test_the_rewards_depend_on_each_input(what):
    model, inputs = make_model(prompt_buckets=64), make_inputs()
    changed = {
        "images": inputs["images"].flip(-1),
        "sources": inputs["sources"].flip(-1),
        "masks": inputs["masks"].roll(3, dims=-1),
        "label_maps": (4 - inputs["label_maps"]) % 4 * inputs["masks"].long(),
        "tasks": ["remove", "extend", "fill", "extend"],
        "prompts": ["healthy"] * 4,
    }[what]
    before = stacked(model.score(**{**inputs, "label_maps": inputs["label_maps"] * inputs["masks"].long()}))
    after = stacked(model.score(**{**inputs, what: changed}))
    assert ((before - after).abs() > 1e-4).all()


def test_the_prompt_is_read_as_a_bag_of_words():
    model, inputs = make_model(prompt_buckets=64), make_inputs(1)
    one = stacked(model.score(**{**inputs, "prompts": ["Large tumour, left"]}))
    same = stacked(model.score(**{**inputs, "prompts": ["left TUMOUR: large"]}))
    other = stacked(model.score(**{**inputs, "prompts": ["Large tumour, right"]}))
    torch.testing.assert_close(one, same)
    assert (one - other).abs().max() > 1e-4


def test_rewards_are_standardized_logits():
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        logits = model(**model.prepare_inputs(**inputs)).logits
    expected = (logits - model.heads.logit_mean) / model.heads.logit_std
    torch.testing.assert_close(stacked(model.score(**inputs)), expected)


@pytest.mark.parametrize("criterion", [0, 1, 2])
def test_no_head_learns_from_the_votes_on_another_criterion(criterion):
    model = make_model().train()
    model(**model.prepare_inputs(**make_inputs())).logits[:, criterion].sum().backward()
    for layers in (model.heads.bodies, model.heads.outputs):
        touched = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers]
        assert touched == [head == criterion for head in range(3)]
    assert all(parameter.grad is not None for parameter in model.vision.parameters())


class Map(torch.nn.Module):
    """A backbone whose features at a cell are the means of its own cell of the input."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, pixel_values):
        features = torch.nn.functional.avg_pool2d(pixel_values, 4)
        if self.tokens:  # three tokens that are no part of the grid come first
            features = features.flatten(2).transpose(1, 2)
            features = torch.cat([torch.full_like(features[:, :3], 9.0), features], dim=1)
        return BaseModelOutput(last_hidden_state=features)


def test_tokens_are_laid_out_like_a_feature_map():
    inputs = make_inputs()
    rewards = []
    for tokens in (False, True):
        model = make_model()
        model.vision = Map(tokens)
        seen = NUM_DETAILS * model.config.image_channels + model.config.vision_config.num_channels
        statistics = NUM_DETAILS * model.config.image_channels + 2 * (NUM_REGIONS + len(LABELS)) * seen
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.heads.norm = torch.nn.LayerNorm(statistics)
            model.heads.project = torch.nn.Linear(statistics, 16)
        rewards.append(stacked(model.score(**inputs)))
    torch.testing.assert_close(*rewards)


def test_what_is_not_known_continues_what_is():
    known = torch.ones(1, 1, 32, 32)
    known[..., 10:20, 12:24] = 0
    rows = torch.arange(32.0)[:, None].expand(1, 1, 32, 32) / 32
    filled = pull_push(torch.where(known > 0, rows, 9.0), known)
    assert torch.equal(filled[known > 0], rows[known > 0])
    torch.testing.assert_close(filled, rows, atol=0.08, rtol=0)  # an average over squares is no ramp
    torch.testing.assert_close(pull_push(torch.where(known > 0, 0.3, 9.0), known), torch.full_like(rows, 0.3))
    assert not pull_push(rows, torch.zeros_like(known)).any()


def test_the_correlation_ratio_is_that_of_an_analysis_of_variance():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 1, 16, 16, generator=generator) < 0.6).float()
    labels = torch.randint(0, 3, (16, 16), generator=generator)
    one_hot = (labels == torch.arange(3)[:, None, None]) * mask
    image = torch.randn(1, 1, 16, 16, generator=generator) + labels
    groups = [image[one_hot[:, k : k + 1] > 0].numpy() for k in range(3)]
    between, within = 2 * f_oneway(*groups).statistic, mask.sum() - 3
    expected = between / (between + within)
    torch.testing.assert_close(correlation_ratio(image, mask, one_hot)[0, 0], expected, atol=1e-3, rtol=0)
    assert correlation_ratio(image, mask, one_hot[:, :0]).item() == 0


def test_region_statistics_are_mean_and_spread_and_nothing_for_an_empty_region():
    generator = torch.Generator().manual_seed(0)
    features, weights = torch.randn(2, 3, 8, 8, generator=generator), torch.zeros(2, 2, 8, 8)
    weights[:, 0, 2:5, 1:7] = 1
    mean, spread = region_statistics(features, weights).unflatten(1, (2, 2, 3)).unbind(dim=2)
    inside = features[..., 2:5, 1:7].flatten(2)
    torch.testing.assert_close(mean[:, 0], inside.mean(dim=2))
    torch.testing.assert_close(spread[:, 0].exp(), (inside.var(dim=2, correction=0) / 0.03**2 + 1).sqrt())
    assert not mean[:, 1].any() and not spread[:, 1].any()


def test_a_healthy_symmetric_slice_stands_out_against_neither_side_nor_surroundings():
    source, mask = torch.full((1, 1, 32, 32), 0.2), torch.zeros(1, 1, 32, 32)
    source[..., 12:20, 8:14] = 0.9  # a lesion, masked
    mask[..., 10:22, 6:16] = 1
    healthy, kept = torch.full_like(source, 0.2), source
    for image, differs in ((healthy, False), (kept, True)):
        _, *_, surroundings, other_side, _ = details(image, source, mask, tissue_mask(source))[0]
        assert (surroundings[mask[0, 0] > 0].abs().max() > 0.1) == differs
        assert (other_side[mask[0, 0] > 0].abs().max() > 0.1) == differs


def test_empty_background_is_not_part_of_the_surroundings():
    mask, one_hot, tissue = torch.zeros(1, 1, 32, 32), torch.zeros(1, 0, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 12:18, 12:18], tissue[..., 8:24, 8:24] = 1, 1
    _, outside, around, *_ = regions(mask, one_hot, tissue)[0]
    assert outside.sum() == around.sum() == 16 * 16 - 6 * 6


def test_gradients_reach_the_image():
    model, inputs = make_model(), make_inputs()
    images = inputs["images"].requires_grad_()
    model(**model.prepare_inputs(**inputs)).rewards.sum().backward()
    assert images.grad.abs().sum() > 0


def test_colour_images():
    model, inputs = make_model(image_channels=3), make_inputs(channels=3)
    gray = {**inputs, "images": inputs["images"].mean(1, keepdim=True).expand(-1, 3, -1, -1)}
    assert (stacked(model.score(**inputs)) - stacked(model.score(**gray))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(4, 1, 16, 16)}, r"`images` has shape \(4, 1, 16, 16\).*\(4, 1, 32, 32\)"),
        ({"images": torch.rand(4, 3, 32, 32)}, "`images` has shape .* 1 channel"),
        ({"images": torch.rand(32, 32)}, "`images` has shape"),
        ({"sources": torch.rand(3, 1, 32, 32)}, "`sources` has shape"),
        ({"masks": torch.ones(4, 32, 32)}, "`masks` has shape"),
        ({"label_maps": torch.zeros(4, 4, 32, 32).long()}, "`label_maps` has shape"),
        ({"images": torch.full((4, 1, 32, 32), torch.nan)}, r"`images` .* nan.*\[0, 1\]"),
        ({"images": torch.rand(4, 1, 32, 32) * 255}, r"`images` has values .*\[0, 1\]"),
        ({"sources": torch.rand(4, 1, 32, 32) - 0.5}, r"`sources` has values .*\[0, 1\]"),
        ({"masks": torch.full((4, 1, 32, 32), 0.5)}, "`masks` holds values other than 0 and 1"),
        ({"masks": torch.zeros(4, 1, 32, 32)}, r"`masks\[0\]` is empty"),
        ({"label_maps": torch.full((4, 1, 32, 32), 7)}, r"`label_maps` holds the values \[7\].*NCR"),
        ({"tasks": None}, "`tasks` is missing"),
        ({"tasks": ["fill"]}, "`tasks` is .* 4 strings"),
        ({"tasks": ["fill", "paint", "fill", "fill"]}, r"`tasks` holds \['paint'\].*extend"),
        ({"prompts": None}, "`prompts` is missing"),
        ({"prompts": "tumour"}, "`prompts` is 'tumour'.* 4 strings"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_model(prompt_buckets=64).score(**{**make_inputs(), **change})


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def saved(tmp_path):
    model = make_model(prompt_buckets=64)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_save_and_load_change_no_reward(saved):
    model, folder = saved
    inputs = make_inputs()
    rewards = stacked(model.score(**inputs))
    for loaded in (OneRewardModel.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert type(loaded) is OneRewardModel
        assert torch.equal(stacked(loaded.score(**inputs)), rewards)
    assert type(AutoConfig.from_pretrained(folder)) is OneRewardConfig


def test_the_folder_is_whole(saved):
    _, folder = saved
    code = {"configuration_onereward", "modeling_onereward", "features_onereward", "losses", "image_reward_pipeline"}
    files = {"config.json", "model.safetensors", "README.md", *(f"{name}.py" for name in code)}
    assert {path.name for path in folder.iterdir()} == files
    assert "Research use only, not for clinical use." in (folder / "README.md").read_text()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_onereward.OneRewardModel"


def test_a_pickle_is_not_read_unless_asked_for(saved, tmp_path):
    model, folder = saved
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for loader in (OneRewardModel, AutoModel):
        with pytest.raises(OSError, match="safetensors"):
            loader.from_pretrained(tmp_path)


def test_a_card_that_is_there_stays(saved):
    model, folder = saved
    (folder / "README.md").write_text("written by a person")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "written by a person"


def test_the_order_of_label_names_does_not_matter():
    """JSON files are written with sorted keys, so a config comes back with its labels in another order."""
    inputs = make_inputs()
    one, other = make_model(labels=LABELS), make_model(labels=dict(sorted(LABELS.items())))
    assert list(one.config.labels) != list(other.config.labels)
    assert torch.equal(stacked(one.score(**inputs)), stacked(other.score(**inputs)))


STRANGER = """
import sys
sys.modules["onereward"] = None  # as if it was not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
folder, inputs, again = sys.argv[1:]
tensors = load_file(inputs)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
rewards = model.score(**tensors, prompts=["tumour"] * 4, tasks=["fill", "remove", "extend", "fill"])
model.save_pretrained(again)
save_file({criterion: reward.clone() for criterion, reward in rewards.items()}, again + "/rewards.safetensors")
"""


def test_people_without_the_package_get_the_same_rewards(saved, tmp_path):
    model, folder = saved
    inputs = {k: v for k, v in make_inputs().items() if torch.is_tensor(v)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    again = tmp_path / "again"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, folder, tmp_path / "inputs.safetensors", again],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    texts = {"prompts": ["tumour"] * 4, "tasks": ["fill", "remove", "extend", "fill"]}
    rewards = model.score(**inputs, **texts)
    found = load_file(again / "rewards.safetensors")
    for criterion, reward in rewards.items():
        torch.testing.assert_close(found[criterion], reward, rtol=1e-5, atol=1e-6)
    reloaded = OneRewardModel.from_pretrained(again)  # what a stranger saves is whole again
    assert torch.equal(stacked(reloaded.score(**inputs, **texts)), stacked(rewards))
    assert (again / "modeling_onereward.py").exists()
