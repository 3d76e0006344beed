"""What the demo promises: every file of the report, true figures, stages that are not run twice."""

import json
from unittest.mock import Mock

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from onereward import demo
from onereward.data.phantom import load_phantom
from onereward.demo import DemoSettings, one_condition_per_case, run_demo
from onereward.hub.provenance import read_provenance, trace, write_provenance
from onereward.preferences import CRITERIA, load_votes


SMALL = {
    "num_vote_cases": 12,
    "num_train_cases": 16,
    "num_unseen_cases": 12,
    "sft_max_steps": 2,
    "reward_epochs": 1,
    "ddpo_max_steps": 2,
    "num_inference_steps": 6,
}


@pytest.fixture
def base(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def check_report(folder, report):
    assert json.loads((folder / "report.json").read_text()) == report
    assert set(report["reward_model"]["pair_accuracy"]) == set(report["reward_model"]["ceiling"]) == set(CRITERIA)
    assert all(0.5 < ceiling <= 1 for ceiling in report["reward_model"]["ceiling"].values())
    ddpo = report["ddpo"]
    heads = sum(head["before"] for head in ddpo["per_head"].values())
    assert ddpo["reward_before"] == pytest.approx(heads, abs=1e-4)
    rise = (ddpo["reward_after"] - ddpo["reward_before"]) / ddpo["reward_std_within_group"]
    assert ddpo["gain"] == pytest.approx(rise, rel=1e-3, abs=1e-6)
    assert ddpo["kl"] >= 0
    for entry in report["heldout"].values():
        assert {"before", "after", "real", "ci95", "n", "n_failed"} <= set(entry)
    assert report["heldout"]["outside_changed_pixels"]["after"] == 0
    assert "not for clinical use" in report["disclaimer"]
    text = (folder / "report.md").read_text()
    assert "Research use only, not for clinical use." in text and "simulated" in text
    for name in ("before_after.png", "reward_curve.png"):
        assert np.asarray(PIL.Image.open(folder / name).convert("L")).std() > 1
    assert not list(folder.rglob("*.partial")) and not list(folder.glob("**/*.bin"))


@pytest.mark.slow
def test_whole_loop_leaves_a_true_report_and_artefacts_that_load(base, tiny_pipeline, tmp_path, capsys):
    folder = tmp_path / "run"
    report = run_demo(folder, DemoSettings(pipeline=base, **SMALL))
    check_report(folder, report)
    assert set(report["seconds"]) == {"data", "votes", "reward", "ddpo", "evaluation"}
    assert set(load_votes(folder / "votes.parquet")["rater_role"]) == {"simulated"}
    assert AutoModel.from_pretrained(folder / "reward_model").config.criteria == list(CRITERIA)
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(str(folder / "adapter"))
    assert pipeline.get_active_adapters()
    assert PeftModel.from_pretrained(tiny_pipeline().unet, str(folder / "adapter")).active_adapter == "default"
    card = (folder / "adapter" / "README.md").read_text()
    assert "Research use only, not for clinical use" in card and "base_model" in card

    # A second call runs nothing again; other settings are refused; --restart begins anew.
    stamp = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run_demo(folder, DemoSettings(pipeline=base, **SMALL)) == report
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"other settings \(seed\).*--restart"):
        run_demo(folder, DemoSettings(pipeline=base, seed=1, **SMALL))


@pytest.mark.slow
def test_a_stopped_run_ends_where_a_run_in_one_piece_does(base, tmp_path, monkeypatch):
    settings = DemoSettings(pipeline=base, **SMALL)
    whole = run_demo(tmp_path / "whole", settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "tune", Mock(side_effect=KeyboardInterrupt))
        run_demo(tmp_path / "stopped", settings)
    torch.rand(7)  # another process would have other random numbers
    stopped = run_demo(tmp_path / "stopped", settings)
    for part in ("reward_model", "ddpo", "heldout"):
        assert stopped[part] == whole[part]


@pytest.mark.slow
def test_whole_loop_runs_on_images_from_a_folder(base, tmp_path):
    rows = load_phantom(12, contrasts=("t1c",), tasks=("fill",), seed=3)
    rows = rows.map(lambda row: {"modality": "mri", "label_map": PIL.Image.new("L", (64, 64))})
    parts = datasets.DatasetDict(train=rows.select(range(9)), test=rows.select(range(9, 12)))
    parts.save_to_disk(tmp_path / "rows")
    write_provenance(tmp_path / "rows", "dataset", parents=[], agreements=["Ward 7: stays here"])
    report = run_demo(tmp_path / "run", DemoSettings(pipeline=base, data=str(tmp_path / "rows"), **SMALL))
    check_report(tmp_path / "run", report)
    # the mark of the data has come to everything that was made from them
    for name in ("votes.parquet", "pipeline", "reward_model", "adapter"):
        record = read_provenance(tmp_path / "run" / name)
        assert record["agreements"] == ["Ward 7: stays here"], name
        assert str(tmp_path) not in json.dumps(record), name
    assert "simulated raters" in str(trace(tmp_path / "run" / "adapter"))
    assert "sft" in report["seconds"] and not any(name.startswith("fill_dice") for name in report["heldout"])


@pytest.mark.parametrize("stopped", ["votes", "ddpo"])
def test_a_stopped_run_goes_on_with_the_stage_it_was_in(base, tmp_path, monkeypatch, stopped):
    calls = []

    def stand_in(name, result=None, stop=False):
        def run(folder, settings, *args):
            calls.append(name)
            if stop and calls.count(name) == 1:
                raise KeyboardInterrupt
            return result

        return run

    names = {"data": "prepare_data", "votes": "collect_votes", "reward": "train_reward_model", "ddpo": "tune"}
    for name, function in (names | {"evaluation": "evaluate"}).items():
        monkeypatch.setattr(demo, function, stand_in(name, stop=name == stopped))
    monkeypatch.setattr(demo, "write_report", stand_in("report"))
    settings = DemoSettings(pipeline=base)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "run", settings)
    (tmp_path / "run" / "report.json").write_text(
        json.dumps({"ddpo": {"reward_before": 0.0, "reward_after": 0.0, "gain": 0.0}})
    )
    run_demo(tmp_path / "run", settings)
    order = ["data", "votes", "reward", "ddpo", "evaluation", "report"]
    at = order.index(stopped)
    assert calls == order[: at + 1] + order[at:]


def test_each_case_gives_one_condition_and_all_kinds_occur():
    rows = one_condition_per_case(load_phantom(12, seed=0))
    assert len(set(rows["case_id"])) == len(rows) == 12
    assert len(set(zip(rows["modality"], rows["task"], strict=True))) == 12
