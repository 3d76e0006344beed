"""LPIPS goes through its package in the package's own terms, its absence is said clearly, any network can stand in."""

import sys
import types

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessorPil, ViTModel

from onereward.evaluation.perceptual import FeatureDistance, feature_distance_maps, load_lpips


def pair(seed=0, shape=(3, 1, 32, 40)):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    mask = torch.zeros(shape[0], 1, *shape[2:])
    mask[..., 8:20, 10:30] = 1
    return x, y, mask


class FakeLPIPS(torch.nn.Module):
    """Squared pixel distance behind the interface of `lpips.LPIPS`."""

    def __init__(self, net, verbose):
        super().__init__()
        self.net, self.spatial = net, False

    def forward(self, first, second):
        assert first.shape[1] == 3
        assert first.min() >= -1 and first.min() < 0 and first.max() <= 1
        values = ((first - second) ** 2).sum(1, keepdim=True)
        return values if self.spatial else values.mean((2, 3), keepdim=True)


def test_lpips_gets_colour_in_minus_one_to_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    distance = load_lpips("vgg")
    x, y, mask = pair()
    mask[2] = 0
    error = 3 * (2 * x.double() - 2 * y.double()) ** 2
    assert distance.name == "lpips_vgg"
    np.testing.assert_allclose(distance(x, y), error.mean((1, 2, 3)), rtol=1e-5)
    inside = distance(x, y, mask)
    np.testing.assert_allclose(inside[:2], [error[i][mask[i] > 0].mean() for i in range(2)], rtol=1e-5)
    assert inside[2].isnan()
    assert torch.equal(distance(x, y), distance(x, y))  # a call with masks leaves nothing behind
    np.testing.assert_allclose(distance(x, y), error.mean((1, 2, 3)), rtol=1e-5)


def test_without_lpips_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install onereward\[lpips\].*FeatureDistance"):
        load_lpips()


def test_feature_distance_is_two_minus_two_cosines():
    x, y = torch.randn(2, 2, 7, 5, 4, generator=torch.Generator().manual_seed(1))
    expected = 2 - 2 * torch.nn.functional.cosine_similarity(x, y, dim=1)
    np.testing.assert_allclose(feature_distance_maps(x, y), expected, atol=1e-6)


@pytest.fixture
def resnet(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()
    model.save_pretrained(tmp_path / "my-resnet")
    return model, tmp_path / "my-resnet"


def test_a_network_from_a_folder_measures_in_all_its_hidden_layers(resnet):
    model, path = resnet
    distance = FeatureDistance(path)
    x, y, _ = pair()
    with torch.no_grad():
        layers = [model(2 * a.expand(-1, 3, -1, -1) - 1, output_hidden_states=True).hidden_states for a in (x, y)]
    cosines = [
        torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1) for a, b in zip(*layers, strict=True)
    ]
    expected = sum(2 - 2 * cosine.flatten(1).mean(1) for cosine in cosines) / len(cosines)
    np.testing.assert_allclose(distance(x, y), expected, rtol=1e-5)
    assert distance.name == "features:my-resnet"


def test_masks_identity_and_empty_masks(resnet):
    distance = FeatureDistance(resnet[1])
    x, y, mask = pair()
    mask[2] = 0
    values = distance(x, y, mask)
    assert (values[:2] > 0).all()
    assert values[2].isnan()
    vandalised = torch.where(mask > 0, x, 1 - x)
    assert torch.equal(distance(vandalised, y, mask)[:2], values[:2])
    assert distance(x, x).abs().max() == 0


def test_a_vision_transformer_has_its_tokens_laid_out_again(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path)
    distance = FeatureDistance(tmp_path)
    assert distance.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    x = y.clone()
    x[..., :8, :8] = 1 - x[..., :8, :8]  # the first patch alone
    near, far = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    near[..., :8, :8], far[..., 24:, 24:] = 1, 1
    layers = [distance.model(pixel_values=(a - 0.4) / 0.2, output_hidden_states=True).hidden_states for a in (x, y)]
    embedded = feature_distance_maps(*(layer[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for layer in layers))
    assert (embedded[0] > 1e-6).nonzero().tolist() == [[0, 0]]
    values = distance(x, y)
    tokens = [
        2 - 2 * torch.nn.functional.cosine_similarity(a[:, 1:].double(), b[:, 1:].double(), dim=2).mean(1)
        for a, b in zip(*layers, strict=True)
    ]
    np.testing.assert_allclose(values, sum(tokens) / len(tokens), rtol=1e-4)
    assert distance(x, y, near) > distance(x, y, far)


def test_what_the_network_cannot_take_is_refused(resnet, tmp_path):
    distance = FeatureDistance(resnet[1])
    with pytest.raises(ValueError, match="31 x 40 pixels"):
        distance(*[torch.rand(1, 1, 31, 40)] * 2)
    with pytest.raises(ValueError, match="2 channels but the network takes 1 or 3"):
        distance(*[torch.rand(1, 2, 32, 32)] * 2)
    with pytest.raises(ValueError, match="no image backbone loads"):
        FeatureDistance(tmp_path / "nothing")
