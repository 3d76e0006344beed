"""`pipeline("image-reward")` gives the rewards of the model, with and without the package."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from onereward.rewards import ImageRewardPipeline, OneRewardConfig, OneRewardModel


SIZE = 32


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = OneRewardConfig(
            labels={"background": 0, "lesion": 1},
            image_size=SIZE,
            hidden_size=16,
            prompt_buckets=16,
            criteria=["quality", "removal_quality"],
            task_criteria={"remove": ["removal_quality"], "fill": ["quality"]},
        )
        model = OneRewardModel(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def rows():
    rng, rows = np.random.default_rng(0), []
    for index in range(5):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[8:20, 6:25] = 255
        source, image = rng.integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
        row = {"image": np.where(mask, image, source), "mask": mask, "source": source, "label_map": mask // 255}
        row = {name: Image.fromarray(value) for name, value in row.items()}
        rows.append({**row, "prompt": f"lesion {index}", "task": ["fill", "remove", "extend"][index % 3]})
    return rows


def scored(model, row):
    to = {name: torch.from_numpy(np.array(row[name]))[None, None] for name in ("image", "mask", "source", "label_map")}
    image, mask, source = (to[name].float() / 255 for name in ("image", "mask", "source"))
    rewards = model.score(image, mask, source, to["label_map"].long(), [row["prompt"]], [row["task"]])
    return {
        name: None if reward.isnan() else pytest.approx(reward.item(), abs=1e-5) for name, reward in rewards.items()
    }


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_pictures_in_rewards_out(model, rows, batch_size):
    judge = pipeline("image-reward", model=model)
    assert type(judge) is ImageRewardPipeline
    found = judge(rows, batch_size=batch_size)
    assert found == [scored(model, row) for row in rows]
    assert judge(rows[1]) == scored(model, rows[1])
    assert found[1]["quality"] is None and found[2]["quality"] is not None


def test_files_will_do_and_so_does_a_row_without_a_label_map(model, rows, tmp_path):
    row = {**rows[0], "label_map": Image.new("L", (SIZE, SIZE))}
    expected = scored(model, row)
    for name in ("image", "mask", "source"):
        row[name].save(tmp_path / f"{name}.png")
        row[name] = str(tmp_path / f"{name}.png")
    judge = pipeline("image-reward", model=model)
    without = {name: value for name, value in row.items() if name != "label_map"}
    for batch in ([row], [row, rows[1]], [without, rows[1]], [without]):
        assert judge(batch, batch_size=2)[0] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"\['image', 'label_map', 'prompt', 'source', 'task'\]; expected a dict with"),
        ({"criterion": "quality"}, "'criterion'.*expected a dict"),
        ({"mask": Image.new("L", (SIZE, SIZE), 7)}, "`mask` holds values other than 0 and 255"),
        ({"image": Image.new("L", (8, 8))}, "`images` has shape"),
        ({"prompt": None}, "`prompts` is missing"),
    ],
)
def test_what_is_wrong_is_named(model, rows, change, message):
    row = {name: value for name, value in {**rows[0], **change}.items() if name == "prompt" or value is not None}
    with pytest.raises(ValueError, match=message):
        pipeline("image-reward", model=model)(row)


STRANGER = """
import json, sys
sys.modules["onereward"] = None  # as if it was not installed
from transformers import pipeline
folder, again, row = sys.argv[1:]
try:
    pipeline("image-reward", model=folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("the repository's code was run without the flag")
judge = pipeline("image-reward", model=folder, trust_remote_code=True)
assert type(judge).__module__.startswith("transformers_modules"), type(judge).__module__
judge.save_pretrained(again)
print(json.dumps(judge(json.loads(row))))
"""


def test_with_the_package_no_code_of_the_repository_is_run_and_without_it_the_rewards_are_the_same(
    model, rows, tmp_path
):
    model.save_pretrained(tmp_path / "model")
    row = rows[0]
    for name in ("image", "mask", "source", "label_map"):
        row[name].save(tmp_path / f"{name}.png")
        row[name] = str(tmp_path / f"{name}.png")
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, tmp_path / "model", tmp_path / "again", json.dumps(row)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for folder in ("model", "again"):
        (tmp_path / folder / "image_reward_pipeline.py").write_text("raise RuntimeError('never run me')")
        judge = pipeline("image-reward", model=str(tmp_path / folder))
        assert type(judge) is ImageRewardPipeline
        own = judge(row)
        assert own["removal_quality"] is None is found["removal_quality"]
        assert own["quality"] == pytest.approx(found["quality"], abs=1e-5)
