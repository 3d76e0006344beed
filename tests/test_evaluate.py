"""What `onereward evaluate` promises: one command, one page, nothing that was a reward among the results."""

import dataclasses
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard
from peft import LoraConfig
from PIL import Image
from typer.testing import CliRunner

from onereward import OneRewardMaskPipeline, load_phantom
from onereward.cli import app
from onereward.data.schema import rows_to_tensors
from onereward.evaluate import (
    EvaluateSettings,
    check_all_memorisation,
    read_study,
    rewards_of,
    run_evaluate,
    write_model_index,
)
from onereward.evaluation.baselines import nearest_patient, reference_slices
from onereward.evaluation.bootstrap import plain
from onereward.evaluation.features import Phantom64
from onereward.evaluation.page import write_page
from onereward.evaluation.painters import evaluate_painters
from onereward.hub.adapters import save_adapter
from onereward.hub.cards import adapter_card, save_card
from onereward.preferences import VOTE_FEATURES, save_votes
from onereward.preferences.schema import VOTE_DEFAULTS, to_png


BASE = str(Path(__file__).parents[1] / "pipelines" / "onereward-brats")
QUICK = {"num_cases": 2, "num_inference_steps": 2, "resamples": 100}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that paints something else than the base, with a card that says what it was tuned on."""
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    pipeline = OneRewardMaskPipeline.from_pretrained(BASE)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    save_adapter(pipeline, folder, base_model=BASE)
    card = adapter_card(
        "tuned",
        BASE,
        repo_id=str(folder),
        training_data="the phantom",
        evaluation={"rewards/mask_adherence/mean": {"before": 0.5, "after": 0.7}},
        eval_dataset="16 conditions of the phantom",
        command="accelerate launch trainers/ddpo.py",
        seed=0,
        limits=["none"],
        example_prompt="a tumour",
    )
    save_card(card, folder)
    return folder


@pytest.fixture(scope="module")
def run(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    settings = EvaluateSettings(
        pipeline=BASE, adapters=(str(adapter),), train_data="phantom", **QUICK | {"num_cases": 4}
    )
    return folder, settings, run_evaluate(folder, settings)


def test_an_adapter_is_put_beside_the_base_and_a_constant_fill(run):
    folder, _, results = run
    assert list(results["painters"]) == ["base", "tuned", "constant fill"] and results["reference"] == "base"
    entry = results["measures"]["fill_mae"]
    assert entry["painters"]["base"]["value"] != entry["painters"]["tuned"]["value"]
    for figure in (entry["real"], *entry["painters"].values(), entry["differences"]["tuned"]["difference"]):
        assert {"value", "low", "high", "n", "n_failed", "note"} == set(figure)
    assert results["measures"]["outside_changed_pixels"]["painters"]["tuned"]["value"] == 0
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["environment"]["torch"] and results["settings"]["seeds"] == [0] and results["data"]["fingerprint"]
    assert set(results["weights"]) == {"unet", "vae", "text_encoder"}


def test_lpips_is_measured_where_it_is_installed_and_else_the_report_says_so(run, tmp_path, monkeypatch):
    assert any("LPIPS was not measured" in limit for limit in run[2]["limits"])
    calls = []

    def distance(images, targets, masks=None):
        calls.append(len(images))
        return ((images - targets) * masks).abs().flatten(1).sum(1)

    monkeypatch.setattr("onereward.evaluate.has_lpips", lambda: True)
    monkeypatch.setattr("onereward.evaluate.load_lpips", lambda: distance)
    results = run_evaluate(tmp_path, EvaluateSettings(pipeline=BASE, **QUICK))
    assert sum(calls) > 0 and results["measures"]["fill_lpips"]["painters"]["base"]["value"] > 0
    assert results["measures"]["fill_lpips"]["real"]["value"] == 0
    assert not results["measures"]["fill_lpips"]["higher_is_better"]
    assert not any("LPIPS" in limit for limit in results["limits"])


def test_what_its_card_says_was_a_reward_is_no_result(run, adapter):
    folder, _, results = run
    assert rewards_of(str(adapter)) == ["mask_adherence"]
    rewarded = {name for name, entry in results["measures"].items() if entry["was_reward"]}
    assert rewarded == {name for name in results["measures"] if name.startswith("fill_dice")} != set()
    page = (folder / "report.html").read_text()
    results_table, tuned_for = page.split("What it was tuned for")
    assert "fill_dice_ED" in tuned_for.split("</table>")[0]
    assert "<td title=" in results_table and ">fill_dice_ED<" not in results_table.split("Measures that were never")[1]


def test_distributions_clinical_features_and_copies_are_told(run):
    _, _, results = run
    figures = results["distributions"]["figures"]
    assert results["distributions"]["extractor"] == "phantom64" and {"kid", "frechet", "coverage"} <= set(figures)
    assert figures["kid"]["painters"]["constant fill"]["value"] > figures["kid"]["painters"]["base"]["value"]
    features = results["clinical_features"]
    assert {"ED/shape/area", "ED/intensity/mean", "ED/ratio/surroundings"} <= set(features)
    assert features["ED/intensity/mean"]["floor"]["value"] > 0
    assert {entry["verdict"] for entry in results["memorisation"].values()} <= {"no sign of copying", "cannot say"}
    assert not any("Memorisation was not measured" in limit for limit in results["limits"])


def test_a_reader_study_stands_beside_the_measures(run, tmp_path):
    folder, _, results = run
    rng, picture = np.random.default_rng(0), to_png(np.zeros((16, 16), np.uint8))
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 255
    shared = {**dict.fromkeys(VOTE_FEATURES), **VOTE_DEFAULTS, "image": picture, "mask": to_png(mask), "task": "fill"}
    shared |= {"image_0": picture, "image_1": picture, "created_at": "2026-01-01", "schema_version": 2, "prompt": ""}
    votes = []
    for criterion, first, second, share in (("quality", "base", "tuned", 0.9), ("realism", "real", "tuned", 0.5)):
        for case in range(30):
            for rater in range(3):
                label = float(rng.random() > share)
                names = {
                    "vote_id": f"{criterion}{case}{rater}",
                    "pair_id": f"{criterion}{case}",
                    "case_id": f"c{case}",
                }
                sides = {"model_0": first, "model_1": second, "label_0": label, "label_1": 1 - label}
                people = {"rater": f"r{rater}", "rater_role": "radiologist", "criterion": criterion}
                votes.append({**shared, **names, **sides, **people})
    save_votes(datasets.Dataset.from_list(votes, features=VOTE_FEATURES), tmp_path / "votes.parquet")
    study = plain(read_study(tmp_path / "votes.parquet", results))
    (preference,), test = study["preferences"], study["turing_tests"]["realism"]
    assert (preference["after"], preference["verdict"], preference["criterion"]) == ("tuned", "better", "quality")
    assert 0.8 < preference["rate"]["value"] < 1 and test["verdict"] == "not told apart"
    path = write_page(tmp_path / "report.html", results | {"reader_study": study}, {})
    assert "tuned over base" in path.read_text() and "not told apart" in path.read_text()
    with pytest.raises(ValueError, match=r"compare \['base', 'tuned'\]; expected 'other' with one of \['another'\]"):
        save_votes(datasets.Dataset.from_list(votes[:90], features=VOTE_FEATURES), tmp_path / "votes.parquet")
        read_study(tmp_path / "votes.parquet", {"reference": "other", "painters": {"other": {}, "another": {}}})


def test_a_painter_that_copies_its_training_set_is_flagged(tmp_path):
    """It pastes the training slice of the same contrast that fits the surroundings best."""
    train, unseen = load_phantom(16, split="train"), load_phantom(16, split="test")
    train, unseen = (rows.filter(lambda task: task == "fill", input_columns="task") for rows in (train, unseen))
    slices = reference_slices(train)

    def copier(rows, seeds):
        tensors = rows_to_tensors(list(rows))
        modalities = [row["modality"] for row in rows]
        return nearest_patient(tensors["images"], tensors["masks"], tensors["label_maps"], modalities, slices)

    def honest(rows, seeds):
        return rows_to_tensors(list(rows))["targets"]

    painters = {"copier": copier, "honest": honest}
    results = evaluate_painters(painters, unseen, tmp_path, resamples=100)
    found = check_all_memorisation(tmp_path, unseen, train, results, Phantom64())
    assert found["copier"].verdict == "copies" and found["copier"].flagged
    assert not found["honest"].flagged


def test_the_page_needs_nothing_else(run):
    folder, _, _ = run
    page = (folder / "report.html").read_text()
    assert "Research use only, not for clinical use." in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in page and "<script" not in page


def test_a_run_goes_on_and_other_settings_are_refused(run, monkeypatch):
    folder, settings, results = run
    monkeypatch.setattr(OneRewardMaskPipeline, "__call__", None)  # nothing is painted again
    again = run_evaluate(folder, settings)
    assert {**again, "seconds": 0} == {**results, "seconds": 0}
    with pytest.raises(ValueError, match=r"other settings \(num_inference_steps\).*--restart"):
        run_evaluate(folder, dataclasses.replace(settings, num_inference_steps=3))
    with pytest.raises(ValueError, match="names 3; expected at most two"):
        run_evaluate(folder, EvaluateSettings(pipeline=BASE, adapters=("a", "b", "c")))


def test_two_adapters_are_compared_with_each_other_and_restart_begins_anew(adapter, tmp_path):
    settings = EvaluateSettings(pipeline=BASE, adapters=(str(adapter), str(adapter)), **QUICK)
    before = dataclasses.asdict(dataclasses.replace(settings, num_cases=9))
    (tmp_path / "settings.json").write_text(json.dumps(before))
    (tmp_path / "old").write_text("")
    with pytest.raises(ValueError, match=r"other settings \(num_cases\)"):
        run_evaluate(tmp_path, settings)
    results = run_evaluate(tmp_path, settings, restart=True)
    assert not (tmp_path / "old").exists()
    assert list(results["painters"]) == ["tuned", "tuned-2", "constant fill"]
    for entry in results["measures"].values():
        assert entry["differences"]["tuned-2"]["difference"]["value"] == 0
        assert entry["differences"]["tuned-2"]["verdict"] == "no difference"


def test_a_folder_that_holds_something_else_is_neither_deleted_nor_written_to(tmp_path):
    (tmp_path / "settings.json").write_text('{"editor": "vim"}')
    for restart in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
            run_evaluate(tmp_path, EvaluateSettings(pipeline=BASE, **QUICK), restart=restart)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_no_path_gets_out(run, adapter):
    folder, settings, results = run
    assert results["settings"]["pipeline"] == "onereward-brats" and results["settings"]["adapters"] == ["tuned"]
    for file in ("results.json", "report.html"):
        assert str(adapter.parent) not in (folder / file).read_text()


def test_the_figures_go_into_the_card(run, adapter, tmp_path):
    _, _, results = run
    card = ModelCard.load(adapter / "README.md")
    (tmp_path / "README.md").write_text(str(card))
    for _ in range(2):  # the second time in place of the first
        write_model_index(tmp_path, "tuned", results)
    entries = ModelCard.load(tmp_path / "README.md").data.eval_results
    dataset = f"{results['data']['rows']} unseen conditions of phantom"
    new = {entry.metric_type: entry for entry in entries if entry.dataset_name == dataset}
    assert len(entries) == len(new)  # what it was tuned for is no result
    assert new["fill_mae"].metric_value == results["measures"]["fill_mae"]["painters"]["tuned"]["value"]
    assert not any(name.startswith("fill_dice") for name in new)  # was a reward
    assert isinstance(new["fill_mae"], EvalResult)
    before, after = card.text.splitlines(), ModelCard.load(tmp_path / "README.md").text.splitlines()
    rest = iter(after)
    assert all(line in rest for line in before)  # what was there stays, in its order
    figure = results["measures"]["fill_mae"]["painters"]["tuned"]
    rows = [line for line in after if line.startswith("| fill mae |")]
    assert len(rows) == 1 and f"{figure['value']:.4g}" in rows[0] and f"{figure['low']:.4g} to" in rows[0]
    assert not any(line.startswith("| fill dice") for line in after)


def test_images_and_masks_on_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(3):
        mask = np.zeros((40, 50), np.uint8)
        mask[10:30, 10:35], mask[0, 0] = 255, 127
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / "data" / "images" / f"{i}.png"
        )
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{i}.png")
    command = ["evaluate", "--pipeline", BASE, "--data", str(tmp_path / "data"), "--steps", "2", "--resamples", "100"]
    refused = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
    assert "is not binary" in str(refused.exception)
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out"), "--mask-threshold", "127"])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"]["rows"] == 3 and "fill_mae" in results["measures"]
    assert any("held-out judge" in warning for warning in results["warnings"])
    assert results["painters"]["base"]["adherence"] is None


def test_one_adapter_or_two_but_not_both(tmp_path):
    result = CliRunner().invoke(app, ["evaluate", "--adapter", "a", "--compare", "b", "c", "--output", str(tmp_path)])
    assert "--adapter and --compare are both given" in str(result.exception)


REAL = Path(os.environ.get("ONEREWARD_DATA", "/nowhere"))


@pytest.mark.parametrize(
    ("name", "options"),
    [("skin_isic2017", ()), ("brain_brisc2025", ()), ("cxr_hannover_v7lung", ("--mask-threshold", "127"))],
)
def test_real_sets_run_end_to_end(name, options, tmp_path):
    if not (REAL / name).is_dir():
        pytest.skip("the real data are not here")
    command = ["evaluate", "--pipeline", BASE, "--data", str(REAL / name), "--steps", "2", "--resamples", "100"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["data"]["rows"] == len(list((REAL / name / "images").iterdir()))
    assert results["measures"]["outside_changed_pixels"]["painters"]["base"]["value"] == 0
    page = (tmp_path / "report.html").read_text()
    assert not any(file.stem in page for file in (REAL / name / "images").iterdir())  # no file name gets out
