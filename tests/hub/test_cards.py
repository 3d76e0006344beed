"""Cards render without a network, the same each time, with valid metadata and plain words about raters and use."""

import re
import subprocess
import sys

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard

from onereward.hub.cards import (
    TEMPLATES,
    adapter_card,
    current_environment,
    pipeline_card,
    render_card,
    reward_model_card,
    source_commit,
    table,
)


FIELDS = {
    "repo_id": "org/thing",
    "training_data": "1,000 slices of the phantom (Apache-2.0).",
    "eval_dataset": "128 unseen conditions of the phantom",
    "command": "onereward demo --seed 3",
    "seed": 3,
    "commit": "0123abc",
    "limits": ["Slices of 64 x 64 pixels, one at a time."],
}
HELD_OUT = {
    "ssim": {"before": 0.71234, "after": 0.74321, "real": 1.0, "ci95": [0.7201, 0.7654]},
    "region_dice": {"before": 0.61, "after": 0.6, "real": 0.7, "ci95": [0.55, 0.66]},
}


def adapter(**changes):
    fields = {
        **FIELDS,
        "evaluation": HELD_OUT,
        "raters": {"simulated": 5},
        "num_votes": 1200,
        "example_prompt": 'oedema: "left", 3 cm',
        "widget": [{"text": 'oedema: "left"', "output": {"url": "images/0.png"}}],
        "datasets": ["org/votes"],
    }
    return adapter_card("Onereward: brats & co", "org/base", **{**fields, **changes})


def pipeline():
    return pipeline_card(
        "onereward-brats",
        labels={"background": 0, "NCR": 1, "ED": 2, "ET": 3},
        evaluation={"region_dice": {"value": 0.81, "ci95": [0.79, 0.83]}},
        example_prompt="T1c, ring-enhancing tumour",
        **FIELDS,
    )


def reward_model(**changes):
    fields = {
        **FIELDS,
        "evaluation": {"quality": {"pair_accuracy": 0.86, "ceiling": 0.9}},
        "raters": {"simulated": 5},
        "num_votes": 1200,
    }
    return reward_model_card("onereward-reward", ["quality", "realism"], **{**fields, **changes})


@pytest.mark.parametrize("make", [adapter, pipeline, reward_model])
def test_what_every_card_says(make):
    card = make()
    assert "Research use only, not for clinical use." in card.text
    assert "onereward demo --seed 3" in card.text
    assert "Seed 3, commit 0123abc." in card.text
    assert "1,000 slices of the phantom (Apache-2.0)." in card.text
    assert "Slices of 64 x 64 pixels, one at a time." in card.text
    for package, version in current_environment().items():
        assert f"| {package} | {version} |" in card.text
    assert card.data.license == "apache-2.0"
    assert "onereward" in card.data.tags
    assert "{{" not in card.text and "{%" not in card.text
    assert "\n\n\n" not in card.text
    assert re.search(r"[^\n]\n#+ ", card.text) is None  # a heading stands after a blank line


@pytest.mark.parametrize("make", [adapter, pipeline, reward_model])
def test_tables_are_tables(make):
    """A Markdown table needs a blank line before it and as many cells in each row as in its head."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", make().text, flags=re.MULTILINE)
    assert len(blocks) >= 2
    for block in blocks:
        rows = block.strip().splitlines()
        assert re.fullmatch(r"\|( -+:? \|| -+ \|)+", rows[1])
        assert len({row.count("|") for row in rows}) == 1
        assert f"\n\n{block.strip()}" in make().text


@pytest.mark.parametrize("make", [adapter, pipeline, reward_model])
def test_code_of_the_card_compiles(make):
    blocks = re.findall(r"```python\n(.*?)```", make().text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "card", "exec")


@pytest.mark.parametrize("make", [adapter, pipeline, reward_model])
def test_the_same_bytes_each_time_and_after_a_round_trip(make, tmp_path):
    card = make()
    assert str(make()) == str(card)
    card.save(tmp_path / "README.md")
    assert str(ModelCard.load(tmp_path / "README.md")) == str(card)


def test_metadata_of_an_adapter():
    data = adapter().data
    front_matter = yaml.safe_load(str(adapter()).split("---")[1])
    assert front_matter["base_model"] == "org/base" and front_matter["base_model_relation"] == "adapter"
    assert front_matter["library_name"] == "diffusers" and front_matter["pipeline_tag"] == "image-to-image"
    assert {"lora", "template:diffusion-lora", "ddpo"} <= set(front_matter["tags"])
    assert front_matter["widget"] == [{"text": 'oedema: "left"', "output": {"url": "images/0.png"}}]
    assert front_matter["datasets"] == ["org/votes"]
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"ssim": 0.74321, "region_dice": 0.6}  # what the adapter reaches, not what it started from


def test_metadata_of_a_pipeline_and_of_a_reward_model():
    base, reward = pipeline().data, reward_model().data
    assert base.base_model is None and base.get("base_model_relation") is None
    assert (base.library_name, base.pipeline_tag) == ("diffusers", "image-to-image")
    assert base.eval_results[0].metric_value == 0.81
    assert (reward.library_name, reward.pipeline_tag) == ("transformers", "image-classification")
    assert reward.eval_results[0].metric_value == 0.86
    assert "| 2 | ED |" in pipeline().text


@pytest.mark.parametrize("make", [adapter, reward_model])
def test_simulated_raters_are_never_taken_for_people(make):
    text = " ".join(make(raters={"simulated": 5}).text.split())
    assert "1200 votes by 5 **simulated** raters. **No human being has rated these images.**" in text

    text = " ".join(make(raters={"radiologist": 2, "neurosurgeon": 1}).text.split())
    assert "1200 votes by 3 human raters (neurosurgeon, radiologist)." in text
    assert "simulated" not in text.lower()

    text = " ".join(make(raters={"radiologist": 1, "simulated": 2}).text.split())
    assert "1200 votes by 1 human rater (radiologist) and 2 **simulated** raters." in text
    assert "No human being" not in text


def test_a_card_without_votes_says_so():
    text = " ".join(adapter(raters=None, num_votes=None).text.split())
    assert "This card records no votes" in text
    assert "None" not in text and "simulated" not in text.lower()
    for raters in (None, {}):
        with pytest.raises(ValueError, match="`raters` is .* must say whose preferences it learned"):
            reward_model(raters=raters)


def test_table_rounds_and_leaves_gaps():
    assert table({"pair_accuracy": {"n": 12, "value": 0.123456}, "kl": {"ci95": (0.1, 0.2)}}).splitlines() == [
        "| measure | n | value | ci95 |",
        "| --- | ---: | ---: | ---: |",
        "| pair accuracy | 12 | 0.1235 | – |",
        "| kl | – | – | 0.1 to 0.2 |",
    ]


def test_a_missing_field_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="criteria"):
        render_card("reward_model", metadata="license: mit", name="x")


def test_templates_are_found_and_no_network_is_asked():
    assert sorted(path.name for path in TEMPLATES.glob("*.md.jinja")) == [
        "adapter.md.jinja",
        "evaluation.md.jinja",
        "intended_use.md.jinja",
        "pipeline.md.jinja",
        "provenance.md.jinja",
        "raters.md.jinja",
        "reward_model.md.jinja",
    ]
    code = """
import socket
def refuse(*args): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from onereward.hub.cards import pipeline_card
card = pipeline_card("x", repo_id="a/b", training_data="d", eval_dataset="e", evaluation={}, command="c", seed=0,
                     limits=[], example_prompt="p")
print(card.data.license)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "apache-2.0"


def test_commit_is_that_of_git():
    expected = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=TEMPLATES, check=False)
    assert source_commit() == (expected.stdout.strip() or None)
