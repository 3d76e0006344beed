"""The comparison finds what is there and no more; generation is reproducible and leaves the pipeline as it was."""

import json

import datasets
import numpy as np
import pytest
import torch
from scipy import ndimage

from onereward.data.phantom import load_phantom
from onereward.data.schema import rows_to_tensors
from onereward.evaluation.heldout import Heldout, Measure, compare, evaluate_pipeline, generate_images, measure_images
from onereward.evaluation.metrics import kernel_distance
from onereward.evaluation.segmenter import dice_per_region, load_segmenter


@pytest.fixture(scope="module")
def rows():
    return load_phantom(8, split="validation", seed=3)


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter()


def tensors_of(rows):
    return rows_to_tensors(list(rows))


def test_the_truth_scores_perfectly_and_equals_its_own_reference(rows, segmenter):
    truth = measure_images(tensors_of(rows)["targets"], rows, segmenter=segmenter)
    report = compare(truth, truth)
    for task in ("fill", "remove", "extend"):
        assert report[f"{task}_mae"]["before"] == 0
        assert report[f"{task}_ssim"]["before"] == pytest.approx(1)
        assert report[f"{task}_mae"]["n"] == 32
    for name, entry in report.items():
        assert entry["difference"] == 0, name
        assert entry["ci95"] == [0, 0], name
        assert entry["verdict"] == "no difference", name
        if not name.endswith("kernel_distance"):
            assert entry["before"] == entry["after"] == entry["real"], name
    assert json.loads(json.dumps(report)) == report


def test_a_degraded_region_is_found_worse_by_every_measure_of_its_kind(rows, segmenter):
    tensors = tensors_of(rows)
    blurred = torch.from_numpy(ndimage.gaussian_filter(tensors["targets"].numpy(), (0, 0, 2.5, 2.5)))
    blurred = torch.where(tensors["masks"] > 0, blurred, tensors["images"])
    real, bad = (measure_images(images, rows, segmenter=segmenter) for images in (tensors["targets"], blurred))
    report = compare(real, bad)
    for name in ("fill_mae", "fill_ssim", "remove_mae", "remove_ssim", "extend_mae", "extend_ssim"):
        assert report[name]["verdict"] == "worse", (name, report[name])
        assert compare(bad, real)[name]["verdict"] == "better"
    for name in ("fill_dice_ED", "fill_dice_ET", "fill_kernel_distance"):
        assert report[name]["verdict"] == "worse", (name, report[name])
    assert report["outside_changed_pixels"]["after"] == 0


def test_tumour_left_in_place_is_found_and_regions_left_out_are_missed(rows, segmenter):
    tensors = tensors_of(rows)
    untouched = measure_images(tensors["images"], rows, segmenter=segmenter)
    truth = measure_images(tensors["targets"], rows, segmenter=segmenter)
    report = compare(truth, untouched)
    assert report["remove_residual_tumour"]["after"] > 10 * report["remove_residual_tumour"]["before"]
    assert report["remove_residual_tumour"]["verdict"] == "worse"
    for region in ("NCR", "ED", "ET"):
        assert report[f"fill_dice_{region}"]["after"] < 0.1
        assert report[f"fill_dice_{region}"]["verdict"] == "worse"


def test_dice_is_of_the_regions_asked_for_where_the_judge_can_see_them(rows, segmenter):
    tensors = tensors_of(rows)
    measures = measure_images(tensors["targets"], rows, segmenter=segmenter).measures
    values = dice_per_region(segmenter, tensors["targets"], tensors["label_maps"], list(rows["modality"]))
    for region, value in (("NCR", 1), ("ED", 2), ("ET", 3)):
        expected = [
            row["task"] == "fill"
            and row["modality"] in segmenter.counted_contrasts(region)
            and bool((np.asarray(row["label_map"]) == value).any())
            for row in rows
        ]
        assert measures[f"fill_dice_{region}"].applies.tolist() == expected
        assert 0 < sum(expected) <= 8 * len(segmenter.counted_contrasts(region))
        np.testing.assert_array_equal(measures[f"fill_dice_{region}"].values[expected], values[region][expected])


def test_a_region_that_vanishes_or_appears_counts_against_the_image(rows, segmenter, monkeypatch):
    tensors = tensors_of(rows)
    truth = measure_images(tensors["targets"], rows, segmenter=segmenter)
    monkeypatch.setattr(segmenter, "segment", lambda images, modalities: torch.zeros(len(images), 64, 64).long())
    blind = measure_images(tensors["targets"], rows, segmenter=segmenter)
    for region in ("NCR", "ED", "ET"):
        entry = compare(truth, blind)[f"fill_dice_{region}"]
        assert (entry["after"], entry["n_failed"]) == (0, 0)


def test_a_changed_pixel_outside_the_mask_is_counted(rows):
    tensors = tensors_of(rows.select(range(3)))
    images = tensors["images"].clone()
    outside = (tensors["masks"][1, 0] == 0).nonzero()[:2]
    images[1, 0, outside[:, 0], outside[:, 1]] += 1 / 255
    result = measure_images(images, rows.select(range(3)))
    assert result.measures["outside_changed_pixels"].values.tolist() == [0, 2, 0]


def test_rows_without_a_target_are_left_out_and_nothing_else_is(rows, segmenter):
    some = [dict(row) for row in rows.select(range(24))]
    for row in some[:12]:
        row["target"] = None
    partly = datasets.Dataset.from_list(some, features=rows.features)
    images = tensors_of(rows.select(range(24)))["targets"]
    report = compare(*[measure_images(images, partly, segmenter=segmenter)] * 2)
    assert report["remove_mae"]["n"] == 4
    assert report["remove_mae"]["n_failed"] == 0
    assert report["remove_residual_tumour"]["n"] == 8
    assert report["outside_changed_pixels"]["n"] == 24
    assert report["fill_kernel_distance"]["n"] == 4


def test_two_seeds_are_two_images_of_each_row(rows, segmenter):
    targets = tensors_of(rows)["targets"]
    once = measure_images(targets, rows, segmenter=segmenter)
    twice = measure_images(torch.cat([targets, targets]), rows, segmenter=segmenter)
    assert twice.case_ids.tolist() == 2 * list(rows["case_id"])
    a, b = compare(once, once), compare(twice, twice)
    for name in a:
        assert b[name]["n"] == 2 * a[name]["n"]
        if not name.endswith("kernel_distance"):
            assert b[name]["before"] == pytest.approx(a[name]["before"])
    with pytest.raises(ValueError, match="one image per row and seed"):
        measure_images(targets[:-1], rows)
    with pytest.raises(ValueError, match="different rows or seeds"):
        compare(once, twice)


def gaussian_result(values, cases):
    measure = Measure(values, np.zeros_like(values), np.ones(len(values), bool), True)
    return Heldout(
        torch.zeros(len(values), 1, 1, 1), np.array(cases), np.array(["fill"] * len(values)), {"m": measure}
    )


def test_the_interval_of_a_difference_covers_a_known_gaussian_difference():
    rng = np.random.default_rng(0)
    cases = [f"case-{i}" for i in range(50) for _ in range(3)]
    covered = called = 0
    for i in range(300):
        before = rng.normal(size=150)
        effect = np.repeat(rng.normal(0.0, 1, 50), 3) + 0.2 * rng.normal(size=150)  # mean 0: no true difference
        entry = compare(gaussian_result(before, cases), gaussian_result(before + effect, cases), resamples=400, seed=i)
        low, high = entry["m"]["ci95"]
        covered += low <= 0 <= high
        called += entry["m"]["verdict"] != "no difference"
    assert covered + called == 300
    assert 0.90 <= covered / 300 <= 0.985
    entry = compare(gaussian_result(before, cases), gaussian_result(before - 0.1, cases))["m"]
    assert entry["verdict"] == "worse"
    np.testing.assert_allclose(entry["ci95"], [-0.1, -0.1], atol=1e-6)


def test_undefined_figures_are_counted_not_averaged():
    cases = [f"case-{i}" for i in range(6)]
    before, after = np.array([1, 2, np.nan, 4, 5, 6.0]), np.array([2, np.nan, 4, 5, 6, 7.0])
    entry = compare(gaussian_result(before, cases), gaussian_result(after, cases))["m"]
    assert (entry["n"], entry["n_failed"]) == (4, 2)
    assert entry["before"] == pytest.approx(4)
    assert entry["after"] == pytest.approx(5)
    nothing = compare(gaussian_result(before * np.nan, cases), gaussian_result(after, cases))["m"]
    assert (nothing["n"], nothing["n_failed"], nothing["before"], nothing["ci95"]) == (0, 6, None, [None, None])
    json.dumps(nothing, allow_nan=False)


def test_kernel_distance_in_the_report_is_that_of_the_features(rows, segmenter):
    tensors = tensors_of(rows)
    result = measure_images(tensors["images"], rows, segmenter=segmenter)
    fill = np.flatnonzero([task == "fill" for task in rows["task"]])
    generated, real = (
        segmenter.region_features(tensors[name][fill], tensors["masks"][fill], [rows["modality"][i] for i in fill])
        for name in ("images", "targets")
    )
    entry = compare(result, result)["fill_kernel_distance"]
    assert entry["before"] == pytest.approx(float(kernel_distance(generated, real)), rel=1e-4)
    assert abs(entry["real"]) < entry["before"]


def test_generation_depends_on_the_seed_and_not_on_the_batch(tiny_pipeline, rows):
    pipeline = tiny_pipeline()
    some = rows.select(range(7))
    settings = {"num_inference_steps": 2, "seeds": (0, 1)}
    images = generate_images(pipeline, some, batch_size=3, **settings)
    assert images.shape == (14, 1, 64, 64)
    torch.testing.assert_close(images, generate_images(pipeline, some, batch_size=1, **settings), atol=1e-4, rtol=0)
    torch.testing.assert_close(images[7:], generate_images(pipeline, some, num_inference_steps=2, seeds=(1,)))
    assert not torch.equal(images[:7], images[7:])
    sources, masks = tensors_of(some)["images"].repeat(2, 1, 1, 1), tensors_of(some)["masks"].repeat(2, 1, 1, 1)
    assert torch.equal(images[masks == 0], sources[masks == 0])


def test_the_adapter_is_switched_off_for_the_call_and_on_again_after_it(tiny_pipeline, rows):
    from peft import LoraConfig

    some = rows.select(range(3))
    pipeline = tiny_pipeline()
    base = generate_images(pipeline, some, num_inference_steps=2)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    pipeline.unet.train()
    tuned = generate_images(pipeline, some, num_inference_steps=2)
    assert not torch.equal(tuned, base)
    off = generate_images(pipeline, some, num_inference_steps=2, adapter=False)
    torch.testing.assert_close(off, base, atol=1e-6, rtol=0)
    assert torch.equal(generate_images(pipeline, some, num_inference_steps=2), tuned)
    assert pipeline.unet.training


@pytest.mark.parametrize(("layout", "image_channels"), [("c", 1), ("2c+1", 3)])
def test_pipelines_without_label_channels_and_in_colour_are_evaluated_too(
    tiny_pipeline, rows, segmenter, layout, image_channels
):
    pipeline = tiny_pipeline(layout=layout, image_channels=image_channels)
    some = rows.select(range(6))
    settings = {"num_inference_steps": 1, "segmenter": segmenter}
    result = evaluate_pipeline(pipeline, some, **settings)
    report = compare(result, evaluate_pipeline(pipeline, some, **settings))
    assert result.images.shape == (6, image_channels, 64, 64)
    assert report["outside_changed_pixels"]["before"] == 0
    assert report["remove_mae"]["verdict"] == "no difference"
    assert report["remove_mae"]["before"] > 0
