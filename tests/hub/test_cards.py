"""Cards render without a network, the same each time, with valid metadata and plain words about raters and use."""

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import jinja2
import numpy as np
import pytest
import torch
import yaml
from handmade_votes import make_votes
from huggingface_hub import DatasetCard, ModelCard, SpaceCard
from peft import LoraConfig
from PIL import Image

from onereward import OneRewardConfig, OneRewardModel
from onereward.data.schema import LABELS
from onereward.data.synthetic import is_synthetic
from onereward.evaluation.bootstrap import measured_mean
from onereward.hub.about import About, read_about
from onereward.hub.adapters import save_adapter
from onereward.hub.cards import (
    TEMPLATES,
    adapter_card,
    pipeline_card,
    render_card,
    reward_model_card,
    save_card,
    table,
    with_section,
)
from onereward.hub.data_cards import vote_agreement
from onereward.hub.environment import current_environment, source_commit
from onereward.hub.gallery import write_gallery
from onereward.hub.provenance import describe_data, write_provenance
from onereward.hub.published_card import published_card
from onereward.preferences import load_votes, save_votes


NOTICE = "Research use only, not for clinical use."


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
    prose = re.sub(r"```.*?```", "code", card.text, flags=re.DOTALL)
    assert re.search(r"[^\n]\n#+ ", prose) is None  # a heading stands after a blank line
    assert "## Intended use" in card.text and "**Out of scope:** diagnosis" in card.text
    assert "## Synthetic data" in card.text and "## Citation" in card.text


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
    assert "0 background, 1 NCR, 2 ED, 3 ET" in pipeline().text
    assert reward.eval_results[0].metric_type == "pair_accuracy" and reward.eval_results[0].metric_name == "quality"


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
    names = {path.name.removesuffix(".md.jinja") for path in TEMPLATES.glob("*.md.jinja")}
    assert {"adapter", "pipeline", "reward_model", "dataset", "votes", "space"} <= names
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


# ----------------------------------------------------------------------------------------------------------- figures


def test_what_it_was_tuned_for_is_kept_apart_and_is_no_result():
    card = adapter(
        evaluation={**HELD_OUT, "reward": {"before": 0.1, "after": 0.9}, "rewards/ssim/mean": {"after": 0.8}}
    )
    results, signal = card.text.split("### Training signal")
    assert "0.7432" in results and "0.9" not in results.split("## Evaluation")[1]
    assert "| rewards/ssim/mean | – | 0.8 |" in signal and "no result" in signal
    assert {entry.metric_type for entry in card.data.eval_results} == {"ssim", "region_dice"}
    assert card.data.to_dict()["rewards"] == ["ssim"]
    only = adapter(evaluation={"reward": {"before": 0.1, "after": 0.9}})
    assert not only.data.eval_results and "nothing was measured" in only.text


def test_a_figure_without_a_number_of_images_is_refused():
    with pytest.raises(ValueError, match="figures of 'ssim' without `n`"):
        adapter(evaluation={"ssim": {"after": 0.7}}, eval_dataset="unseen conditions")
    adapter(evaluation={"ssim": {"after": 0.7, "n": 12}}, eval_dataset="unseen conditions")


def test_measured_figures_have_their_interval_and_number_and_nan_is_no_figure():
    values, cases = np.array([0.2, 0.4, 0.9, 0.5]), ["a", "a", "b", "c"]
    found = measured_mean(values, cases)
    nothing = measured_mean(values * np.nan, cases)
    card = pipeline_card("x", evaluation={"ssim": found, "dice": nothing}, example_prompt="p", **FIELDS)
    row = f"| ssim | {found.value:.4g} | {found.low:.4g} to {found.high:.4g} | 4 |"
    assert row in card.text and "| dice | – | – | 0 |" in card.text
    (entry,) = card.data.eval_results
    assert entry.metric_value == found.value and entry.metric_args["95 % interval"] == [found.low, found.high]


def test_a_card_names_no_file_of_this_disk(tmp_path):
    secret = tmp_path / "mrs_smith.nii.gz"
    secret.touch()
    command = f"trainers/ddpo.py --dataset_name {secret} --output_dir={tmp_path} --adapter org/a --max_steps 3"
    text = adapter(command=command).text
    assert "ddpo.py" in text
    assert "--dataset_name PATH --output_dir=PATH --adapter org/a --max_steps 3" in text
    assert "smith" not in text and str(tmp_path) not in text
    assert "onereward demo --seed 3" in adapter().text


# ------------------------------------------------------------------------------------------------------------- about


def about_file(tmp_path, text):
    (tmp_path / "about.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "about.yaml"


def test_about_is_read(tmp_path):
    about = read_about(
        about_file(
            tmp_path,
            "authors: [A. Example, B. Ésample]\naffiliations: [University]\npublished: 2026-11-22\nversion: 1.2.0\n"
            "license: cc-by-4.0\nfunding: [Grant 1]\ndoi: 10.1000/182\nrepository: https://github.com/org/x\n",
        )
    )
    assert about == About(
        authors=("A. Example", "B. Ésample"),
        affiliations=("University",),
        published="2026-11-22",
        version="1.2.0",
        license="cc-by-4.0",
        funding=("Grant 1",),
        doi="10.1000/182",
        repository="https://github.com/org/x",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("author: A", r"unknown key\(s\) \['author'\]"),
        ("authors: A. Example", "`authors` in about.yaml is 'A. Example'; expected a list"),
        ("authors: [1]", "`authors` .* expected a list"),
        ("version: 1.0", "`version` in about.yaml is 1.0; expected a version in quotes"),
        ("version: '1.0'", "expected a version"),
        ("license: my own", "expected a licence of the Hub"),
        ("published: soon", "expected a date as YYYY-MM-DD"),
        ("doi: https://doi.org/10.1000/182", "expected a DOI without its address"),
        ("repository: github.com/x", "expected an address"),
        ("- a", r"expected lines `key: value`"),
        ("a: [", "is no YAML file"),
    ],
)
def test_a_wrong_about_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_about(about_file(tmp_path, text))


# ------------------------------------------------------------------------------------------------ what gets published

ABOUT = About(
    authors=("A. Example", "B. Example"),
    affiliations=("University of Examples",),
    published="2026-11-22",
    license="cc-by-4.0",
    funding=("Grant 1",),
    doi="10.1000/182",
    repository="https://github.com/org/x",
)


@pytest.fixture
def artefacts(tmp_path, tiny_pipeline, phantom):
    """A folder of each kind as its maker leaves it, without a card: kind -> path."""
    folder, made = tmp_path / "artefacts", tiny_pipeline()
    made.save_pretrained(folder / "pipeline")
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    save_adapter(made, folder / "adapter", base_model=str(folder / "pipeline"))
    votes = make_votes()
    save_votes(votes, folder / "votes.parquet")
    parents = [describe_data("votes", votes, folder / "votes.parquet")]
    OneRewardModel(OneRewardConfig(labels=LABELS)).save_pretrained(folder / "reward-model")
    write_provenance(folder / "reward-model", "reward-model", parents=parents, seed=3, command="reward.py --seed 3")
    write_provenance(folder / "adapter", "adapter", parents=parents, seed=3, command="ddpo.py --seed 3")
    parts = datasets.DatasetDict(train=phantom.select(range(6)), test=phantom.select(range(6, 12)))
    parts.save_to_disk(folder / "dataset")
    (folder / "space").mkdir()
    (folder / "space" / "app.py").write_text("import gradio as gr\ngr.LoginButton()\n")
    (folder / "space" / "requirements.txt").write_text("gradio[oauth]==6.31.0\n")
    return {path.stem: path for path in folder.iterdir() if not path.name.endswith("provenance.json")}


KINDS = ("pipeline", "adapter", "reward-model", "dataset", "votes", "space")
LOADERS = dict.fromkeys(KINDS, ModelCard) | {"dataset": DatasetCard, "votes": DatasetCard, "space": SpaceCard}


def publish_card(artefacts, kind, **fields):
    base = {"base_model": "org/base"} if kind == "adapter" else {}
    return published_card(kind, artefacts[kind], f"org/{kind}-x", **{**base, **fields})


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_card_is_whole(artefacts, kind, tmp_path, hub):
    text = publish_card(artefacts, kind, about=ABOUT, version="0.2.0")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    card = LOADERS[kind].load(tmp_path / "README.md")
    assert str(card) == text
    card.validate()  # by the Hub
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["version"] == "0.2.0" and data["doi"] == "10.1000/182"
    assert data["authors"] == ["A. Example", "B. Example"] and data["funding"] == ["Grant 1"]
    assert "onereward" in data["tags"] and {"medical-imaging"} <= set(data["tags"])
    for said in (NOTICE, "University of Examples", "Grant 1", "https://doi.org/10.1000/182", "0.2.0", "2026-11-22"):
        assert said in card.text
    assert card.text.index("## About") < card.text.index("## Citation")
    assert "author = {A. Example and B. Example}" in card.text
    assert str(artefacts[kind].parent) not in text and "None" not in text.replace("criteria=None", "")
    assert "\n\n\n" not in card.text and "{{" not in text
    assert publish_card(artefacts, kind, about=ABOUT, version="0.2.0") == text


def test_metadata_of_data_sets_and_of_a_space(artefacts):
    votes = DatasetCard(publish_card(artefacts, "votes"))
    rows = DatasetCard(publish_card(artefacts, "dataset"))
    space = SpaceCard(publish_card(artefacts, "space")).data.to_dict()
    files = votes.data.to_dict()["configs"][0]["data_files"]
    assert files == [{"split": "train", "path": "data/votes-*.parquet"}]
    assert [entry["split"] for entry in rows.data.to_dict()["configs"][0]["data_files"]] == ["train", "test"]
    for card in (votes, rows):
        assert card.data.task_categories == ["image-to-image"] and card.data.size_categories == ["n<1K"]
        assert card.data.license == "apache-2.0"  # of the phantom
    assert space["sdk"] == "gradio" and space["sdk_version"] == "6.31.0" and space["app_file"] == "app.py"
    assert space["hf_oauth"] is True and len(space["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # what the Hub knows
    assert {space["colorFrom"], space["colorTo"]} <= colours and space["title"] and len(space["emoji"]) == 1
    assert re.fullmatch(r"3\.\d+", space["python_version"])


def test_the_numbers_of_votes_and_rows_are_counted_from_them(artefacts):
    text = publish_card(artefacts, "votes")
    votes = load_votes(artefacts["votes"])
    assert f"{len(votes)} answers on {len(set(votes['pair_id']))} pairs" in text
    assert "36 votes by 3 **simulated** raters" in " ".join(text.split())
    found = vote_agreement(votes)["realism"]
    assert f"| realism | {found.value:.4g} | {found.low:.4g} to {found.high:.4g} | 12 |" in text
    # Krippendorff 2011 by hand: two raters of one mind, the third against them on 3 of 12 pairs
    labels = np.array(votes["label_0"]).reshape(12, 3)
    observed = np.mean([(a != b) for row in labels for i, a in enumerate(row) for j, b in enumerate(row) if i != j])
    total, ones = labels.size, labels.sum()
    assert found.value == pytest.approx(1 - observed * total * (total - 1) / (2 * ones * (total - ones)))
    rows = publish_card(artefacts, "dataset")
    assert "12 conditions of 2 cases" in rows and "64 x 64 pixels, grey" in rows and "for all rows" in rows


def test_people_who_voted_are_not_called_simulated(tmp_path):
    save_votes(make_votes(case="brain-{}", roles=("radiologist", "radiologist", "lay")), tmp_path / "votes.parquet")
    text = " ".join(published_card("votes", tmp_path / "votes.parquet", "org/v").split())
    assert "36 votes by 3 human raters (lay, radiologist)." in text
    assert "license: other" in text and "Sources: not recorded" in text and "MNI152" not in text


def test_raters_and_their_votes_follow_from_the_provenance(artefacts):
    for kind in ("reward-model", "adapter"):
        text = " ".join(publish_card(artefacts, kind).split())
        assert "36 votes by 3 **simulated** raters. **No human being has rated these images.**" in text
        assert f"{'reward' if kind == 'reward-model' else 'ddpo'}.py --seed 3" in text and "Seed 3, commit" in text


def test_names_of_this_disk_become_those_of_the_hub(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    card = adapter_card(
        "mine", str(base), example_prompt="p", evaluation=HELD_OUT, **{**FIELDS, "repo_id": str(folder)}
    )
    save_card(card, folder)
    assert f'from_pretrained("{base}")' in (folder / "README.md").read_text()  # of use here
    text = published_card("adapter", folder, "org/mine", base_model="org/base")
    assert 'from_pretrained("org/base")' in text and 'load_lora_weights("org/mine"' in text
    assert '"org/mine")\n```' in text and "[org/base](https://huggingface.co/org/base)" in text
    assert "onereward provenance org/mine" in text and str(tmp_path) not in text
    assert ModelCard(text).data.base_model == "org/base"
    assert ModelCard(text).text.count("| ssim | 0.7123 | 0.7432 |") == 1  # the rest stays
    unnamed = ModelCard(published_card("adapter", folder, "org/mine")).data
    assert unnamed.base_model is None and str(tmp_path) not in str(unnamed)


def test_what_a_person_wrote_stays_and_what_lacks_is_added(tmp_path):
    written = (
        "---\ntags:\n- mine\n---\n\n# My adapter\n\nWords.\n\n```bash\n## no heading\n```\n\n## More\n\nOf them.\n"
    )
    (tmp_path / "README.md").write_text(written)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "before_after.png").touch()
    card = ModelCard(published_card("adapter", tmp_path, "org/mine", about=About(authors=("A",))))
    assert card.data.tags == ["mine"] and card.data.license == "apache-2.0"
    body = card.text.strip()
    assert body.startswith(f"# My adapter\n\n**{NOTICE}**\n\n![The same unseen cases before and after tuning]")
    assert "Words.\n\n```bash\n## no heading\n```\n\n## More\n\nOf them.\n" in card.text
    (tmp_path / "README.md").write_text(str(card))
    again = published_card("adapter", tmp_path, "org/mine", about=About(authors=("A",)))
    assert again == str(card)  # nothing twice


def test_code_that_loads_somebody_elses_model_stays(tmp_path):
    (tmp_path / "README.md").write_text('# Mine\n\n```python\nAutoModel.from_pretrained("other/model")\n```\n')
    assert 'from_pretrained("other/model")' in published_card("pipeline", tmp_path, "org/mine")


def test_agreements_and_the_permission_are_told(artefacts, tmp_path):
    save_votes(make_votes(case="x-{}"), tmp_path / "votes.parquet")
    path = tmp_path / "votes.provenance.json"
    record = write_provenance(tmp_path / "votes.parquet", "votes", parents=[], agreements=["mimic", "our own"])
    path.write_text(json.dumps(record | {"permission": "The owner, by letter"}))
    text = published_card("votes", tmp_path / "votes.parquet", "org/v")
    section = text.split("## Data-use agreements")[1].split("\n## ")[0]
    assert "MIMIC" in section and "physionet.org" in section and "- our own" in section
    assert "The owner, by letter" in section


def test_an_unknown_kind_and_an_adapter_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`kind` is 'model'"):
        published_card("model", tmp_path, "org/x")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="--base-model"):
        published_card("adapter", tmp_path, "org/x")


def test_the_card_of_the_embedded_base_has_its_figures_and_a_picture():
    folder = Path(__file__).parents[2] / "pipelines" / "onereward-brats"
    card = ModelCard(published_card("pipeline", folder, "org/onereward-brats"))
    assert "images/examples.png" in card.text and (folder / "images" / "examples.png").is_file()
    assert "pipelines/onereward-brats" not in card.text.replace("pipelines/onereward-brats/vae", "")
    for entry in card.data.eval_results:
        assert f"{entry.metric_value:.4g}" in card.text and entry.metric_args["n"] > 0


# ----------------------------------------------------------------------------------------------------------- gallery


def test_the_gallery_shows_before_and_after_and_says_that_it_is_synthetic(phantom, tmp_path):
    rows = [phantom[i] for i in range(3)]
    after = torch.linspace(0, 1, 3 * 64 * 64).reshape(3, 1, 64, 64)
    widget = write_gallery(tmp_path, rows, torch.zeros(3, 1, 64, 64), after, model="org/mine")
    assert [entry["output"]["url"] for entry in widget] == [f"images/{i}.png" for i in range(3)]
    assert [entry["text"] for entry in widget] == [row["prompt"] for row in rows]
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert files == ["0.png", "1.png", "2.png", "before_after.png"]
    for name in files:
        assert is_synthetic(tmp_path / "images" / name)["model"] == "org/mine"
    shown = np.asarray(Image.open(tmp_path / "images" / "1.png"))
    assert shown.shape == (256, 256)
    np.testing.assert_array_equal(shown[::4, ::4], (after[1, 0] * 255).round().byte().numpy())
    text = adapter(widget=widget).text
    assert "(images/before_after.png)" in text and "<Gallery />" in text


def test_a_section_is_put_in_its_place():
    text = "# T\n\n## A\n\none\n\n```\n## B\n```\n\n## Citation\n\nc\n"
    assert (
        with_section(text, "B", "two") == "# T\n\n## A\n\none\n\n```\n## B\n```\n\n## B\n\ntwo\n\n## Citation\n\nc\n"
    )
    assert with_section(text, "A", "new") == "# T\n\n## A\n\nnew\n\n## Citation\n\nc\n"
    assert with_section("words", "A", "new") == "words\n\n## A\n\nnew\n"
