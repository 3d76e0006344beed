"""The benchmark is the frozen one or none at all, its figures are what they say, and the page shows nothing else."""

import copy
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage

from onereward.data import phantom
from onereward.evaluation import counterfactual
from onereward.evaluation.baselines import constant_fill, unchanged
from onereward.evaluation.bootstrap import measured_mean
from onereward.evaluation.counterfactual import (
    BENCHMARK_VERSION,
    FROZEN,
    NUM_CASES,
    RECIPE,
    STRATA,
    check_fingerprint,
    compare_results,
    detail_error,
    fingerprint,
    load_benchmark,
    recipe_of,
    region_error,
    render_leaderboard,
    rim_of,
    row_figures,
    score_images,
    write_leaderboard,
)
from onereward.evaluation.segmenter import load_segmenter


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark(8)


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter()


@pytest.fixture(scope="module")
def truth(benchmark, segmenter):
    return score_images("truth", benchmark.tensors["targets"], benchmark, segmenter, resamples=200)


@pytest.fixture(scope="module")
def constant(benchmark, segmenter):
    images = constant_fill(benchmark.tensors["images"], benchmark.tensors["masks"])
    return score_images("base", images, benchmark, segmenter, command="python fill.py", resamples=200)


@pytest.fixture(scope="module")
def nothing(benchmark, segmenter):
    images = unchanged(benchmark.tensors["images"], benchmark.tensors["masks"])
    return score_images("unchanged", images, benchmark, segmenter, resamples=200)


# -------------------------------------------------------------------------------------------------- the frozen cases


def test_no_shipped_training_saw_the_split_and_seed():
    config = yaml.safe_load((ROOT / "trainers/configs/sft_phantom.yaml").read_text(encoding="utf-8"))
    card = json.loads((ROOT / "src/onereward/evaluation/segmenter_phantom64.json").read_text(encoding="utf-8"))
    assert RECIPE["split"] == "test"
    assert "split='train'" in card["training"]["data"]
    seeds = {config["seed"], int(re.search(r"seed=(\d+)", card["training"]["data"])[1])}
    seeds.add(int(re.search(r"seed=(\d+)", card["test_data"])[1]))  # what cards report is no training, but known
    assert RECIPE["seed"] not in seeds


def test_the_frozen_rows_are_accepted_and_know_their_tumours(benchmark):
    assert benchmark.rows_sha256 == benchmark.recipe_sha256 == FROZEN[8]["recipe_sha256"]
    assert len(benchmark.rows) == 64
    for row, tumour, size, side in zip(
        benchmark.rows, benchmark.tumours[:, 0].numpy(), *(benchmark.strata[k] for k in ("size", "side")), strict=True
    ):
        twin, with_tumour = (row["image"], row["target"]) if row["task"] == "fill" else (row["target"], row["image"])
        differs = np.asarray(twin) != np.asarray(with_tumour)
        assert differs[tumour > 0].mean() > 0.8  # the label map of `remove` is empty, the tumour is known all the same
        area = (tumour > 0).sum() * 9 / 100
        assert size == ("small" if area < 9 else "large" if area > 14 else "medium")
        offset = (ndimage.center_of_mass(tumour > 0)[1] - 31.5) * 3
        assert side == ("midline" if abs(offset) <= 8 else "left" if offset > 0 else "right")
        if row["task"] == "fill" and size == "large":
            assert side in row["prompt"] or side == "midline"
    assert all(set(benchmark.strata[kind]) <= set(names) for kind, names in STRATA.items())


def test_the_sketch_estimates_the_squared_difference_of_the_pixels():
    rng = np.random.default_rng(0)

    def rows_of(pixels):
        texts = dict.fromkeys(("prompt", "task", "modality", "case_id", "source"), ["x"])
        blank = [np.zeros((64, 64), np.uint8)]
        return {**texts, "image": [pixels], "target": blank, "mask": blank, "label_map": blank}

    pixels = rng.integers(0, 200, (64, 64))
    for spread in (1, 5, 40):
        other = pixels + rng.integers(-spread, spread + 1, pixels.shape)
        a, b = (np.array(fingerprint(rows_of(p), {}, projections=256)["sketch"], float) for p in (pixels, other))
        # The estimate of the sum from k signs has a relative standard error of sqrt(2 / k), here 0.09; four of them.
        assert ((a - b) ** 2).mean() == pytest.approx(((pixels - other) ** 2).sum(), rel=0.36)


def changed(benchmark, row_edits, number=1):
    """Fingerprint of the first 8 cases with an edit of the decoded columns of some rows."""
    rows = {column: list(benchmark.rows[column]) for column in benchmark.rows.column_names}
    for column in ("image", "target", "mask", "label_map"):
        rows[column] = [np.array(picture) for picture in rows[column]]
    for i in range(number):
        row_edits({column: values[i] for column, values in rows.items()})
    return fingerprint(rows, recipe_of(8))


def test_pixels_one_level_off_are_a_rounding_and_nothing_more_is(benchmark):
    def one_level(row):
        row["image"][30, 30:33] += 1

    found = changed(benchmark, one_level, number=4)
    assert found["recipe_sha256"] != FROZEN[8]["recipe_sha256"]
    check_fingerprint(found, FROZEN[8])

    def whole_image(row):
        row["target"] += 1

    def one_mask_pixel(row):
        row["mask"][0, 0] = 255

    def one_label(row):
        row["label_map"][0, 0] = 1

    for edit in (whole_image, one_mask_pixel, one_label):
        with pytest.raises(ValueError, match="no longer makes the cases of version 1"):
            check_fingerprint(changed(benchmark, edit), FROZEN[8])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SIGNAL", {**phantom.SIGNAL, "t2w": {**phantom.SIGNAL["t2w"], "gm": 0.565}}),
        ("PROMPTS", {**phantom.PROMPTS, "fill": phantom.PROMPTS["fill"][::-1]}),
        ("DETAIL", {**phantom.DETAIL, "t2f": -0.31}),
    ],
)
def test_a_changed_phantom_is_refused(monkeypatch, name, value):
    monkeypatch.setattr(phantom, name, value)
    with pytest.raises(ValueError, match="raise BENCHMARK_VERSION"):
        load_benchmark(8)


def test_other_numbers_of_cases_are_refused():
    with pytest.raises(ValueError, match=rf"\[8, {NUM_CASES}\] cases"):
        load_benchmark(9)


# ------------------------------------------------------------------------------------------------------ the figures


def test_the_rim_is_what_an_erosion_takes_away(benchmark):
    rims = rim_of(benchmark.tensors["masks"])[:, 0].numpy() > 0
    for rim, mask in zip(rims, benchmark.tensors["masks"][:, 0].numpy() > 0, strict=True):
        inner = ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=1)
        np.testing.assert_array_equal(rim, mask & ~inner)
        assert rim.any()


def test_region_errors_and_detail_are_those_of_numpy_and_scipy(benchmark):
    images = constant_fill(benchmark.tensors["images"], benchmark.tensors["masks"])
    targets, masks = benchmark.tensors["targets"], benchmark.tensors["masks"]
    regions = benchmark.tumours == 2
    errors, details = region_error(images, targets, regions), detail_error(images, targets, masks)
    for i in range(len(images)):
        x, y, region, mask = (a[i, 0].double().numpy() for a in (images, targets, regions, masks))
        expected = abs(x[region > 0].mean() - y[region > 0].mean())
        assert errors[i] == pytest.approx(expected, rel=1e-9)
        sums = [np.abs(ndimage.laplace(a, mode="nearest"))[mask > 0].sum() for a in (x, y)]
        assert details[i] == pytest.approx(abs(np.log2(sums[0] / sums[1])), rel=1e-9)
    assert region_error(images, targets, torch.zeros_like(regions)).isnan().all()


def test_detail_is_an_octave_off_at_half_and_at_twice_the_contrast(benchmark):
    targets, masks = benchmark.tensors["targets"], benchmark.tensors["masks"]
    for factor in (0.5, 2):
        torch.testing.assert_close(detail_error(factor * targets, targets, masks), torch.ones(64).double())
    flat = torch.zeros_like(targets)
    assert not detail_error(flat, targets, masks).isfinite().any()
    assert not detail_error(flat, flat, masks).isfinite().any()


def test_the_truth_is_perfect_and_its_infinite_psnr_counts_as_failed(truth):
    for task in ("remove", "fill"):
        table = truth["measured"][task]["all"]
        for name in ("mae", "rim_mae", "detail_error", "changed_outside", "error_ED", "error_margin"):
            assert (table[name]["value"], table[name]["n"], table[name]["n_failed"]) == (0, 32, 0), name
        assert table["ssim"]["value"] == pytest.approx(1)
        assert (table["psnr"]["value"], table["psnr"]["n"], table["psnr"]["n_failed"]) == (None, 0, 32)
    assert truth["measured"]["remove"]["all"]["residual_tumour"]["value"] < 0.02
    assert truth["measured"]["fill"]["all"]["dice_NCR"]["value"] > 0.8


def test_doing_nothing_leaves_all_of_the_tumour_and_paints_none(nothing, benchmark):
    assert nothing["measured"]["remove"]["all"]["residual_tumour"]["value"] > 0.4
    for region in ("NCR", "ED", "ET"):
        assert nothing["measured"]["fill"]["all"][f"dice_{region}"]["value"] < 0.02
    # The same pixels differ both ways, so that the errors are the same but for the two masks' margins.
    image, target = (benchmark.tensors[name].double().numpy() for name in ("images", "targets"))
    inside = benchmark.tensors["masks"].numpy() > 0
    task = np.array(benchmark.rows["task"])
    for name in ("remove", "fill"):
        per_image = [np.abs(image[i] - target[i])[inside[i]].mean() for i in np.flatnonzero(task == name)]
        assert nothing["measured"][name]["all"]["mae"]["value"] == pytest.approx(np.mean(per_image), rel=1e-5)
        mse = [((image[i] - target[i]) ** 2)[inside[i]].mean() for i in np.flatnonzero(task == name)]
        assert nothing["measured"][name]["all"]["psnr"]["value"] == pytest.approx(
            np.mean(-10 * np.log10(mse)), rel=1e-5
        )


def test_each_figure_counts_where_it_is_meant_for(constant, benchmark, segmenter):
    tasks, contrasts = np.array(benchmark.rows["task"]), benchmark.strata["contrast"]
    for region, value in (("NCR", 1), ("ED", 2), ("ET", 3)):
        there = (benchmark.tumours == value).flatten(1).any(1).numpy()
        seen = np.isin(contrasts, segmenter.counted_contrasts(region))
        assert (
            constant["figures"][f"dice_{region}"]["rows"] == np.flatnonzero(there & seen & (tasks == "fill")).tolist()
        )
        assert constant["figures"][f"error_{region}"]["rows"] == np.flatnonzero(there).tolist()
    assert constant["figures"]["residual_tumour"]["rows"] == np.flatnonzero(tasks == "remove").tolist()
    assert constant["figures"]["mae"]["rows"] == list(range(64))


def test_every_stratum_is_the_mean_of_its_own_images(constant):
    case_ids, tasks = np.array(constant["rows"]["case_id"]), np.array(constant["rows"]["task"])
    checked = 0
    for task, strata in constant["measured"].items():
        for stratum, table in strata.items():
            kind, _, name = stratum.partition("=")
            chosen = (tasks == task) & (np.array(constant["rows"][kind]) == name if name else True)
            for measure, entry in table.items():
                values = np.full(64, np.nan)
                values[constant["figures"][measure]["rows"]] = constant["figures"][measure]["values"]
                applies = chosen & np.isin(np.arange(64), constant["figures"][measure]["rows"])
                expected = measured_mean(values, case_ids, applies, 200)
                assert (entry["n"], entry["n_failed"]) == (expected.n, expected.n_failed)
                assert entry["value"] == pytest.approx(expected.value, rel=1e-4, abs=1e-9)
                checked += 1
    assert checked > 150


def test_a_changed_pixel_outside_the_mask_is_counted(benchmark, segmenter):
    images = benchmark.tensors["targets"].clone()
    row, column = (benchmark.tensors["masks"][3, 0] == 0).nonzero()[0]
    images[3, 0, row, column] += 1 / 255
    values, applies = row_figures(images, benchmark, segmenter)["changed_outside"]
    assert values.sum() == values[3] == 1
    assert applies.all()


def test_a_method_for_one_task_is_not_scored_on_the_other(benchmark, segmenter, truth):
    images = benchmark.tensors["targets"]
    result = score_images("label means", images, benchmark, segmenter, tasks=("fill",), resamples=50)
    assert list(result["measured"]) == ["fill"]
    tasks = np.array(result["rows"]["task"])
    assert all((tasks[figures["rows"]] == "fill").all() for figures in result["figures"].values())
    assert list(compare_results(truth, result)) == ["fill"]


def test_images_that_do_not_fit_are_refused(benchmark, segmenter):
    images = benchmark.tensors["targets"]
    for bad, message in (
        (images[:-1], "one grey image for each row"),
        (images.expand(-1, 3, -1, -1), "one grey image for each row"),
        (images * 255, r"outside of \[0, 1\]"),
        (torch.full_like(images, torch.nan), "or NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            score_images("x", bad, benchmark, segmenter)
    with pytest.raises(ValueError, match="expected one or more of"):
        score_images("x", images, benchmark, segmenter, tasks=("extend",))


# -------------------------------------------------------------------------------------------------- the comparison


def test_a_known_degradation_is_found_and_no_difference_is_none(truth, constant):
    report = compare_results(truth, constant)
    for task in ("remove", "fill"):
        for name in ("mae", "ssim", "rim_mae", "detail_error"):
            assert report[task][name]["verdict"] == "worse", (task, name)
            assert compare_results(constant, truth)[task][name]["verdict"] == "better", (task, name)
        assert report[task]["changed_outside"]["verdict"] == "no difference"
        assert report[task]["psnr"]["n_failed"] == 32  # the truth has none, so that no pair has one
    assert report["remove"]["residual_tumour"]["verdict"] == "worse"
    assert report["fill"]["dice_ED"]["verdict"] == "worse"
    mean = report["remove"]["mae"]["value"]
    assert mean == pytest.approx(constant["measured"]["remove"]["all"]["mae"]["value"], rel=1e-5)
    for task, table in compare_results(constant, constant).items():
        for name, entry in table.items():
            assert (entry["value"], entry["low"], entry["high"]) == (0, 0, 0), (task, name)
            assert entry["verdict"] == "no difference"


def test_the_same_method_with_other_noise_is_no_difference():
    rng = np.random.default_rng(0)
    cases = [f"case-{i}" for i in range(NUM_CASES) for _ in range(4)]
    level = np.repeat(rng.normal(size=NUM_CASES), 4)

    def result():
        # Figures of one case are alike, and another noise moves them together and one by one.
        values = level + np.repeat(rng.normal(size=NUM_CASES), 4) + rng.normal(size=len(cases))
        return {
            "benchmark": "counterfactual",
            "version": BENCHMARK_VERSION,
            "recipe": {"num_cases": NUM_CASES},
            "recipe_sha256": FROZEN[NUM_CASES]["recipe_sha256"],
            "method": "noise",
            "tasks": ["remove"],
            "rows": {"case_id": cases, "task": ["remove"] * len(cases)},
            "figures": {"mae": {"rows": list(range(len(cases))), "values": values.tolist()}},
        }

    verdicts = [compare_results(result(), result(), 400)["remove"]["mae"]["verdict"] for _ in range(400)]
    # Four standard errors of a proportion of 0.95 in 400 repeats are 0.044, as in test_bootstrap.py.
    assert 0.90 <= verdicts.count("no difference") / 400 <= 0.985


# ------------------------------------------------------------------------------------------------------- the page


def test_a_result_goes_through_json_and_the_page_is_the_same(truth, constant, nothing, tmp_path):
    results = [truth, constant, nothing]
    again = [json.loads(json.dumps(result, allow_nan=False)) for result in results]
    assert again == results
    write_leaderboard(again, tmp_path / "leaderboard.md")
    page = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    assert page == render_leaderboard(results)
    assert "python fill.py" in page
    assert FROZEN[8]["recipe_sha256"] in page


def lines_of(page, heading):
    """Cells of the first table under a heading, by method."""
    section = page.split(f"\n## {heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return rows[0], {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_page_shows_the_figures_of_the_results_in_order(truth, constant, nothing):
    page = render_leaderboard([nothing, constant, truth])
    for task in ("remove", "fill"):
        header, rows = lines_of(page, task)
        maes = {r["method"]: r["measured"][task]["all"]["mae"] for r in (truth, constant, nothing)}
        assert list(rows) == ["*images*", *sorted(maes, key=lambda method: maes[method]["value"])]
        entry = maes["base"]
        cell = rows["base"]["MAE ↓"]
        assert cell == f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]†"  # of 8 cases
        assert rows["*images*"]["MAE ↓"] == "*32*"
        assert rows["truth"]["PSNR, dB ↑"] == "undefined (32 failed)"
        assert rows["unchanged"]["changed outside ↓"] == "0"
        assert ("residual tumour ↓" in header) == (task == "remove")
        assert ("Dice ET ↑" in header) == (task == "fill")
    assert page.count("Difference to base") == 2
    assert "Difference to" not in render_leaderboard([nothing, truth], base="")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(version=0), "is of version 0"),
        (lambda r: r.update(recipe_sha256="0" * 64), "fingerprint 000000000000"),
        (lambda r: r.update(judge="another"), "with one judge"),
        (lambda r: r.update(benchmark="fill_dice"), "expected results of score_images"),
        (
            lambda r: (
                r.update(recipe_sha256=FROZEN[NUM_CASES]["recipe_sha256"]),
                r["recipe"].update(num_cases=NUM_CASES),
            ),
            "on the same number",
        ),
    ],
)
def test_results_of_another_benchmark_are_refused(truth, constant, edit, message):
    other = copy.deepcopy(truth)
    edit(other)
    for refuse in (lambda: render_leaderboard([constant, other]), lambda: compare_results(constant, other)):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_an_empty_page_and_a_base_that_is_not_there_are_refused(truth):
    with pytest.raises(ValueError, match="is empty"):
        render_leaderboard([])
    with pytest.raises(ValueError, match="`base` is 'base', which is not among"):
        render_leaderboard([truth])


def test_the_published_page_is_of_this_version():
    page = (ROOT / "docs/leaderboard.md").read_text(encoding="utf-8")
    assert f"Version {BENCHMARK_VERSION}, fingerprint `{FROZEN[NUM_CASES]['recipe_sha256']}`" in page
    for task in ("remove", "fill"):
        _, rows = lines_of(page, task)
        assert {"truth", "base", "unchanged", "constant fill", "biharmonic", "nearest patient"} <= set(rows)
        assert all(row["changed outside ↓"] == "0" for method, row in rows.items() if method != "*images*")


def test_the_command_writes_results_picture_and_page(tmp_path, monkeypatch, capsys):
    arguments = ["--pipeline", str(ROOT / "pipelines/onereward-brats"), "--cases", "8", "--out", str(tmp_path / "out")]
    arguments += ["--leaderboard", str(tmp_path / "page.md"), "--methods", "truth", "constant fill"]
    monkeypatch.setattr(sys, "argv", ["counterfactual.py", *arguments])
    runpy.run_path(str(ROOT / "benchmarks/counterfactual.py"), run_name="__main__")
    assert "constant fill" in capsys.readouterr().out
    results = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("constant-fill", "truth")]
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == render_leaderboard(results, base="")
    assert (tmp_path / "out" / "grid.png").stat().st_size > 10_000
    assert results[0]["recipe_sha256"] == counterfactual.FROZEN[8]["recipe_sha256"]
