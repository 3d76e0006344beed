"""Extractors see what they say they see, and a stream of any length leaves a sample of fixed size."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from onereward.evaluation.features import (
    PLANES,
    Monai3D,
    Patches3D,
    Phantom64,
    TransformersFeatures,
    collect_features,
    collect_plane_features,
    crop_to_masks,
    fit_square,
    volume_slices,
)


@pytest.fixture(scope="module")
def phantom64():
    return Phantom64()


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def flat_mean(images, masks=None, modalities=None):
    """The simplest extractor: mean and spread of the pixels."""
    return torch.stack([images.flatten(1).mean(1), images.flatten(1).std(1)], 1)


def test_fit_square_resizes_like_pillow_and_pads_instead_of_stretching():
    images = random_images(2, 1, 96, 80)
    padded = np.zeros((2, 96, 96), np.float32)
    padded[:, :, 8:88] = images[:, 0].numpy()
    for result, picture in zip(fit_square(images, 40), padded, strict=True):
        expected = Image.fromarray(picture).resize((40, 40), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(result[0], np.asarray(expected), atol=1e-5)
    square = random_images(1, 3, 64, 64)
    assert torch.equal(fit_square(square, 64), square)


def test_crop_to_masks_cuts_the_square_around_the_mask():
    images = random_images(3, 2, 20, 30)
    masks = torch.zeros(3, 1, 20, 30)
    masks[0, :, 6:10, 10:18] = 1  # 4 x 8, with a margin of a quarter on each side 12 x 12
    masks[1, :, :8, :8] = 1  # reaches over the edge
    crops = crop_to_masks(images, masks, side=12)
    assert torch.equal(crops[0], images[0, :, 2:14, 8:20])
    assert torch.equal(crops[1, :, 2:, 2:], images[1, :, :10, :10])
    assert (crops[1, :, :2] == 0).all() and (crops[1, :, :, :2] == 0).all()
    assert crops[2].isnan().all()  # an empty mask has no region


def test_phantom64_is_the_judges_features_over_the_image_or_the_mask(phantom64):
    images = random_images(3, 1, 64, 64)
    judge = phantom64.segmenter
    everywhere = judge.region_features(images, torch.ones(3, 1, 64, 64), ["t1c"] * 3)
    assert torch.equal(phantom64(images, modalities=["t1c"] * 3), everywhere)
    masks = torch.zeros(3, 1, 64, 64)
    masks[..., 20:40, 10:30] = 1
    masks[2] = 0
    found = phantom64(images, masks, ["t2f"] * 3)
    assert torch.equal(found[:2], judge.region_features(images, masks, ["t2f"] * 3)[:2])
    assert found[2].isnan().all()
    assert found.shape == (3, 32) and phantom64.name == "phantom64"


def test_phantom64_takes_colour_other_sizes_and_unknown_modalities(phantom64):
    colour = random_images(2, 3, 100, 100)
    grey = colour.mean(1, keepdim=True)
    torch.testing.assert_close(phantom64(colour), phantom64(fit_square(grey, 64)))
    per_modality = [phantom64(grey, modalities=[m] * 2) for m in phantom64.segmenter.modalities]
    mean = torch.stack(per_modality).mean(0)
    torch.testing.assert_close(phantom64(grey, modalities=["t1c", "dermoscopy"]), mean)
    narrow = colour[..., 15:85]  # padded back to the square, whose borders do not count
    mask = torch.zeros(2, 1, 100, 100)
    mask[..., 15:85] = 1
    torch.testing.assert_close(phantom64(narrow), phantom64(colour * mask, mask))
    mask = torch.zeros(2, 1, 100, 100)
    mask[:, :, 50, 35] = 1  # one pixel of the large image is one cell of the small one, not none
    assert phantom64(colour, mask).isfinite().all()


@pytest.mark.parametrize(
    "images", [torch.full((1, 1, 64, 64), 1.5), torch.rand(1, 64, 64), torch.zeros(1, 1, 8, 8).int()]
)
def test_images_that_are_not_in_the_unit_range_are_refused(phantom64, images):
    with pytest.raises(ValueError, match=r"expected .*\[0, 1\]"):
        phantom64(images)


TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def save_backbone(folder, kind):
    """A random backbone as it lies on the Hub, and the model that sees images."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "clip":
        tower = {**TOWER, "image_size": 32, "patch_size": 8}
        text = {**TOWER, "vocab_size": 64}
        whole = t.CLIPModel(t.CLIPConfig(vision_config=tower, text_config=text))
        model = whole.vision_model
    elif kind == "vit":
        whole = model = t.ViTModel(t.ViTConfig(**TOWER, image_size=32, patch_size=8))
    elif kind == "convnextv2":
        whole = model = t.ConvNextV2Model(t.ConvNextV2Config(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]))
    whole.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    t.ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["vit", "clip", "convnextv2"])
def test_transformers_features_are_the_pooled_output_on_the_processors_pixels(tmp_path, kind):
    from transformers import ViTImageProcessorPil

    model = save_backbone(tmp_path, kind)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    inputs = ViTImageProcessorPil.from_pretrained(tmp_path)([Image.fromarray(p) for p in pixels], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).pooler_output
    extractor = TransformersFeatures(tmp_path)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(extractor(images), expected, atol=1e-5, rtol=1e-5)

    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, 4:12, 4:12] = 1
    found = extractor(images, masks)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_a_pooler_that_is_not_in_the_checkpoint_is_not_drawn_at_random(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**TOWER, image_size=32, patch_size=8)
    classifier = ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    images = random_images(2, 3, 32, 32)
    first, second = TransformersFeatures(tmp_path)(images), TransformersFeatures(tmp_path)(images)
    assert torch.equal(first, second)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        expected = classifier.vit(scaled).last_hidden_state.mean(1)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def test_incomplete_checkpoints_and_pickles_are_refused(tmp_path):
    from safetensors.torch import load_file

    model = save_backbone(tmp_path, "vit")
    weights = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in weights if "layer" in name and "weight" in name)
    save_file(
        {name: w for name, w in weights.items() if name != dropped}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="checkpoint lacks"):
        TransformersFeatures(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError):
        TransformersFeatures(tmp_path)


def test_patches3d_are_statistics_of_the_blocks():
    volumes = random_images(2, 1, 32, 24, 16)
    features = Patches3D()(volumes)
    assert features.shape == (2, 96)
    blocks = volumes.numpy().reshape(2, 2, 16, 2, 12, 2, 8).transpose(0, 1, 3, 5, 2, 4, 6).reshape(2, 8, -1)
    np.testing.assert_allclose(features[:, :8], blocks.mean(-1), rtol=1e-4)
    np.testing.assert_allclose(features[:, 8:16], np.log(blocks.std(-1) + 0.001), rtol=1e-3)
    constant = Patches3D()(torch.full((1, 1, 16, 16, 16), 0.5))
    np.testing.assert_allclose(constant.view(3, 4, 8)[:, 0], 0.5, rtol=1e-6)
    np.testing.assert_allclose(constant.view(3, 4, 8)[:, 2:], np.log(0.001), atol=1e-2)
    masks = torch.zeros(2, 1, 32, 24, 16)
    masks[..., :16, :12, :8] = 1
    masked = Patches3D()(volumes, masks)
    torch.testing.assert_close(masked[:, 0], features[:, 0])
    assert (masked[:, 1:8] == 0).all()
    with pytest.raises(ValueError, match="need 16 along each axis"):
        Patches3D()(random_images(1, 1, 15, 32, 32))


def test_monai3d_is_the_networks_pooled_output_and_reads_safetensors_alone(tmp_path):
    from monai.networks.nets import resnet10

    torch.manual_seed(0)
    settings = {"spatial_dims": 3, "n_input_channels": 1, "widen_factor": 0.125}
    network = resnet10(feed_forward=False, pretrained=False, **settings).eval()
    path = tmp_path / "medical.safetensors"
    weights = {f"module.{name}": w for name, w in network.state_dict().items()}
    save_file({**weights, "module.fc.weight": torch.zeros(2, 2)}, path)
    volumes = random_images(2, 1, 16, 16, 16)
    scaled = (volumes - volumes.mean((2, 3, 4), keepdim=True)) / volumes.flatten(1).std(1).view(2, 1, 1, 1, 1)
    with torch.no_grad():
        expected = network(scaled)
    extractor = Monai3D(path, widen_factor=0.125)
    torch.testing.assert_close(extractor(volumes), expected)
    assert extractor.name == "resnet10:medical.safetensors"
    with pytest.raises(ValueError, match="does not fit 'resnet18'"):
        Monai3D(path, "resnet18", widen_factor=0.125)
    torch.save(weights, tmp_path / "medical.pth")
    with pytest.raises(ValueError, match="expected a local .safetensors file"):
        Monai3D(tmp_path / "medical.pth")


def stream(images, size, **columns):
    for i in range(0, len(images), size):
        part = {name: column[i : i + size] for name, column in columns.items()}
        yield {
            "images": images[i : i + size],
            "case_ids": [f"c{j}" for j in range(i, min(i + size, len(images)))],
            **part,
        }


def test_collected_features_do_not_depend_on_the_batches():
    images = random_images(50, 1, 8, 8)
    whole = collect_features(flat_mean, stream(images, 50))
    assert torch.equal(whole.features, flat_mean(images))
    assert whole.case_ids.tolist() == [f"c{i}" for i in range(50)] and whole.extractor == "flat_mean"
    sampled = [collect_features(flat_mean, stream(images, size), keep=20, seed=3) for size in (7, 50)]
    assert torch.equal(sampled[0].features, sampled[1].features)
    for row, case_id in zip(sampled[0].features, sampled[0].case_ids, strict=True):
        assert torch.equal(row, whole.features[int(case_id[1:])])
    assert sampled[0].n_seen == 50 and len(sampled[0].features) == 20
    bytes_8 = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(collect_features(flat_mean, stream(bytes_8, 9)).features, flat_mean(bytes_8 / 255))


def test_a_long_stream_leaves_a_uniform_sample_of_fixed_size():
    from scipy.stats import kstest

    def numbers():
        for start in range(0, 20000, 500):
            yield {
                "images": torch.arange(start, start + 500).view(-1, 1, 1, 1) / 20000,
                "case_ids": range(start, start + 500),
            }

    def value(images):
        return images.flatten(1)

    found = collect_features(value, numbers(), keep=400)
    assert found.features.shape == (400, 1) and found.n_seen == 20000
    assert kstest(found.features[:, 0].numpy(), "uniform").pvalue > 0.01


def test_images_that_cannot_be_described_are_counted_not_averaged():
    images = random_images(6, 1, 64, 64)
    images[1, 0, 3, 3] = torch.nan
    images[4] = torch.inf
    masks = torch.ones(6, 1, 64, 64)
    masks[5] = 0
    found = collect_features(Phantom64(), stream(images, 4, masks=masks, modalities=["t1c"] * 6))
    assert found.n_failed == 3 and found.case_ids.tolist() == ["c0", "c2", "c3"]
    assert found.features.isfinite().all()
    nothing = collect_features(flat_mean, stream(torch.full((3, 1, 4, 4), torch.nan), 2))
    assert nothing.n_failed == 3 and len(nothing.features) == 0


def test_slices_of_a_plane_are_perpendicular_to_its_axis():
    x, y, z = torch.meshgrid(*(torch.arange(n) for n in (4, 5, 6)), indexing="ij")
    for plane, coordinate, count in (("sagittal", x, 4), ("coronal", y, 5), ("axial", z, 6)):
        slices = volume_slices(coordinate[None, None], plane)
        assert slices.shape[1] == count
        for i in range(count):
            assert (slices[0, i] == i).all()
    assert volume_slices(z[None, None], "axial", centre=0.5)[0, :, 0, 0, 0].tolist() == [1, 2, 3]
    assert volume_slices(z[None, None], "axial", step=2)[0, :, 0, 0, 0].tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="`plane` is 'oblique'"):
        volume_slices(z[None, None], "oblique")
    with pytest.raises(ValueError, match="`centre` is 0"):
        volume_slices(z[None, None], "axial", centre=0)


def test_plane_features_are_those_of_the_slices_with_the_case_of_the_volume():
    volumes = random_images(3, 1, 4, 5, 6)
    found = collect_plane_features(flat_mean, [{"images": volumes, "case_ids": ["a", "b", "c"]}], batch_size=2)
    assert set(found) == set(PLANES)
    for plane, count in (("sagittal", 4), ("coronal", 5), ("axial", 6)):
        expected = flat_mean(volume_slices(volumes, plane).flatten(0, 1))
        torch.testing.assert_close(found[plane].features, expected)
        assert found[plane].case_ids.tolist() == [c for c in "abc" for _ in range(count)]
