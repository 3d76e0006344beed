"""`onereward study`: what it writes opens, compares what was asked for, and comes out again as votes."""

import pytest
from peft import LoraConfig

from onereward.hub.adapters import save_adapter
from onereward.preferences import Study, load_votes


SALT = "a salt of 20 letters"


@pytest.fixture
def base(tiny_pipeline, tmp_path):
    """A pipeline, and beside it an adapter that changes what it paints."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    pipeline.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    save_adapter(pipeline, tmp_path / "tuned", base_model="base")
    return tmp_path / "base"


def test_a_study_compares_base_and_adapter_and_its_votes_are_exported(onereward, base, tmp_path):
    (tmp_path / "consent.md").write_text("Research use only.")
    arguments = ["--pipeline", base, "--adapter", tmp_path / "tuned", "--num-conditions", 3, "--steps", 1]
    arguments += [
        "--output",
        tmp_path / "study",
        "--goal",
        7,
        "--role",
        "reader",
        "--consent",
        tmp_path / "consent.md",
    ]
    code, out, err = onereward("study", "make", *arguments)
    assert code == 0 and "3 conditions" in out, err
    study = Study(tmp_path / "study", SALT)
    assert study.settings.goal == 7 and study.settings.roles == ["reader"]
    assert study.settings.consent == "Research use only."
    assert len(study.units) == 3
    for unit in study.units:
        assert [study._rows[row]["model"] for row in unit.rows] == ["base", "tuned"]
        assert len({study._rows[row]["seed"] for row in unit.rows}) == 1  # the same noise
    assert len({row["case_id"] for row in study._rows}) == 3
    rater = study.join("ann", "reader", True)
    item = study.next_item(rater)
    study.answer(rater, item.item_id, item.criteria[0], "left")
    code, _, err = onereward("study", "export", tmp_path / "study", "--output", tmp_path / "votes.parquet")
    assert code == 0, err
    votes = load_votes(tmp_path / "votes.parquet", criteria=None)
    assert votes["rater"] == [rater] and {votes[0]["model_0"], votes[0]["model_1"]} == {"base", "tuned"}
    # and nothing is written over
    code, _, err = onereward("study", "make", *arguments)
    assert code == 2 and "holds a study" in err


def test_a_turing_study_has_as_many_real_images_as_synthetic_ones(onereward, base, tmp_path):
    arguments = [
        "--pipeline",
        base,
        "--num-conditions",
        2,
        "--steps",
        1,
        "--mode",
        "turing",
        "--output",
        tmp_path / "s",
    ]
    code, _, err = onereward("study", "make", *arguments)
    assert code == 0, err
    study = Study(tmp_path / "s", SALT)
    assert sorted(row["model"] for row in study._rows) == ["base", "base", "real", "real"]
    for row in study._rows:
        if row["model"] == "real":
            assert row["candidate"] == row["target"]  # of the phantom both are equal outside the mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "--mode", "stars"], "`mode` is 'stars'"),
        (["make", "--adapter", "a/x", "--adapter", "b/x"], "names must differ"),
        (["make", "--adapter", "a/base"], "neither base nor real"),
        (["export", "nowhere"], "there is no file"),
    ],
)
def test_bad_input_is_one_line(onereward, base, tmp_path, arguments, message):
    more = ["--pipeline", base] if arguments[0] == "make" else []
    code, _, err = onereward("study", *arguments, *more, "--output", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
