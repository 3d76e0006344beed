"""The shipped judge does what its card says on fresh slices, and refuses what it was not trained on."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onereward.data.phantom import load_phantom
from onereward.data.schema import LABELS
from onereward.evaluation.segmenter import (
    DICE_FLOOR,
    SHIPPED_WEIGHTS,
    Segmenter,
    dice_per_region,
    dice_table,
    load_segmenter,
    save_segmenter,
    train_segmenter,
    tumour_and_twin,
)


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter()


@pytest.fixture(scope="module")
def fresh():
    """24 cases that neither the training nor the card's test has seen."""
    return load_phantom(24, tasks=("fill",), seed=4242, split="test")


def test_shipped_judge_reaches_its_stated_dice_on_fresh_slices(segmenter, fresh):
    table = dice_table(segmenter, fresh)
    for region, row in segmenter.card["dice"].items():
        for modality, stated in row.items():
            found = table[region][modality]
            # Both means carry sampling error; a 95 % interval is 3.92 standard errors wide.
            errors = [(cell["ci95"][1] - cell["ci95"][0]) / 3.92 for cell in (stated, found)]
            assert abs(found["mean"] - stated["mean"]) < 4 * np.hypot(*errors), (region, modality, found, stated)


def test_every_region_is_judged_in_some_contrast_and_the_rim_where_contrast_agent_shows_it(segmenter):
    for region in ("NCR", "ED", "ET"):
        counted = segmenter.counted_contrasts(region)
        assert counted
        for modality in segmenter.modalities:
            assert (segmenter.card["dice"][region][modality]["mean"] >= DICE_FLOOR) == (modality in counted)
    assert "t1c" in segmenter.counted_contrasts("ET")
    assert "t2f" in segmenter.counted_contrasts("ED")


def test_shipped_judge_finds_tumour_in_tumour_slices_and_hardly_any_in_their_twins(segmenter, fresh):
    data = tumour_and_twin(fresh)
    inside = data["masks"][:, 0] > 0
    shares = {}
    for name in ("tumour", "healthy"):
        found = segmenter.segment(data[name].float() / 255, data["modalities"]) > 0
        shares[name] = (found & inside).sum() / inside.sum()
    truth = (data["labels"] > 0).sum() / inside.sum()
    assert shares["tumour"] > 0.7 * truth
    assert shares["healthy"] < 0.05 * truth


def test_shipped_file_is_small_and_says_what_it_is(segmenter):
    assert SHIPPED_WEIGHTS.stat().st_size < 1.5e6
    beside = json.loads(SHIPPED_WEIGHTS.with_suffix(".json").read_text())
    assert beside == segmenter.card
    assert beside["notice"] == "Research use only, not for clinical use."
    assert beside["license"].startswith("Apache-2.0")
    assert {"seed", "steps", "data", "data_sha256"} <= set(beside["training"])


def test_dice_per_region_judges_what_the_segmenter_finds(segmenter, fresh, monkeypatch):
    data = tumour_and_twin(fresh.select(range(8)))
    label_maps = data["labels"][:, None].long()
    images = data["tumour"].float() / 255
    monkeypatch.setattr(segmenter, "segment", lambda images, modalities: label_maps[:, 0])
    values = dice_per_region(segmenter, images, label_maps, data["modalities"])
    for region, value in (("NCR", 1), ("ED", 2), ("ET", 3)):
        present = (label_maps == value).flatten(1).any(1)
        assert torch.equal(values[region][present], torch.ones(int(present.sum()), dtype=torch.float64))
        assert values[region][~present].isnan().all()


def test_region_features_pool_over_the_mask_only(segmenter, fresh):
    data = tumour_and_twin(fresh.select(range(2)))
    images, masks = data["tumour"].float() / 255, data["masks"].float()
    pooled = segmenter.region_features(images, masks, data["modalities"])
    with torch.no_grad():
        planes = segmenter.penultimate(images, data["modalities"])
    for b in range(2):
        inside = planes[b][:, masks[b, 0] > 0].numpy()
        expected = np.concatenate([inside.mean(1), inside.std(1)])
        expected = (expected - segmenter.feature_mean.numpy()) / segmenter.feature_std.numpy()
        np.testing.assert_allclose(pooled[b], expected, rtol=1e-3, atol=1e-4)


def test_one_image_is_judged_as_in_a_batch_and_colour_as_its_grey(segmenter, fresh):
    data = tumour_and_twin(fresh.select(range(6)))
    images = data["tumour"].float() / 255
    with torch.no_grad():
        together = segmenter(images, data["modalities"])
        alone = segmenter(images[3:4], data["modalities"][3:4])
        colour = segmenter(images.expand(-1, 3, -1, -1), data["modalities"])
    torch.testing.assert_close(alone[0], together[3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(colour, together, atol=1e-4, rtol=1e-4)


def test_training_is_reproducible_and_learns(fresh):
    # One training step from the same seed gives the same weights, from another seed others.
    first, again, other = (train_segmenter(fresh, steps=2, batch_size=4, seed=seed) for seed in (5, 5, 6))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    flair = fresh.filter(lambda row: row["modality"] == "t2f")
    trained = train_segmenter(flair, steps=40, batch_size=12, learning_rate=1e-2, seed=0)
    assert dice_table(trained, flair)["ED"]["t2f"]["mean"] > 0.3


def test_a_saved_segmenter_loads_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = Segmenter(LABELS, ["ct"], image_size=16, widths=[4, 6, 8, 10]).eval()
    model.card = {"dice": {}}
    save_segmenter(model, tmp_path / "deep" / "judge.safetensors")
    loaded = load_segmenter(tmp_path / "deep" / "judge.safetensors")
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(loaded(images, ["ct"] * 2), model(images, ["ct"] * 2))
    assert loaded.card["architecture"]["widths"] == [4, 6, 8, 10]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["judge.json", "judge.safetensors"]


def test_what_it_was_not_trained_on_is_refused(segmenter, fresh, tmp_path):
    with pytest.raises(ValueError, match=r"holds \['ct'\]; this segmenter knows"):
        segmenter.segment(torch.rand(1, 1, 64, 64), ["ct"])
    with pytest.raises(ValueError, match="trained at 64 x 64"):
        segmenter.segment(torch.rand(1, 1, 128, 128), ["t1c"])
    with pytest.raises(ValueError, match="no file"):
        load_segmenter(tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no segmenter card"):
        load_segmenter(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no 'fill' rows"):
        tumour_and_twin(load_phantom(1, tasks=("remove",), contrasts=("t1c",)))
    with pytest.raises(ValueError, match="must be 0"):
        Segmenter({"background": 0, "lesion": 4}, ["ct"])
