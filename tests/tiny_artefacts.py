"""One tiny artefact of each kind, as it lies on a user's disk before it is published."""

from pathlib import Path

import datasets
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from tiny_components import tiny_components

from onereward.data.schema import FEATURES
from onereward.data.synthetic import save_png
from onereward.hub.adapters import save_adapter
from onereward.pipelines import OneRewardMaskPipeline
from onereward.preferences import VoteStore
from onereward.preferences.schema import to_png
from onereward.rewards import OneRewardConfig, OneRewardModel


KINDS = ("pipeline", "adapter", "reward-model", "dataset", "votes", "space")


def make_artefact(kind: str, folder: Path, base: str = "org/tiny-base") -> Path:
    """Write it below `folder`, with what lies about after a run; `base` is the adapter's. Where it is."""
    path = folder / (f"{kind}.sqlite" if kind == "votes" else kind)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "votes":
        with VoteStore(path) as store:
            store.add_many([make_vote(number) for number in range(6)])
    elif kind == "dataset":
        datasets.DatasetDict(train=make_rows(4), test=make_rows(2)).save_to_disk(path)
    elif kind == "reward-model":
        OneRewardModel(OneRewardConfig(image_size=16, hidden_size=8, prompt_buckets=16)).save_pretrained(path)
    elif kind == "space":
        make_space(path)
    else:
        pipeline = OneRewardMaskPipeline(**tiny_components())
        if kind == "pipeline":
            pipeline.save_pretrained(path)
        else:
            make_adapter(pipeline, path, base)
    return path


def make_rows(count: int, **changes) -> datasets.Dataset:
    """Rows of the schema with random pictures, the same each time."""
    random, rows = np.random.default_rng(count), []
    for number in range(count):
        mask = np.zeros((16, 16), np.uint8)
        mask[4:12, 4:12] = 255
        pictures = {"image": random.integers(0, 256, (16, 16), dtype=np.uint8), "mask": mask, "label_map": mask // 255}
        row = {name: to_png(picture) for name, picture in pictures.items()} | {"target": None, "prompt": "a lesion"}
        row |= {"task": "fill", "modality": "t1c", "case_id": f"case-{number}", "source": "phantom"}
        rows.append(row | changes)
    return datasets.Dataset.from_list(rows, features=FEATURES)


def make_adapter(pipeline, path: Path, base: str) -> None:
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"]))
    torch.manual_seed(1)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    save_adapter(pipeline, path, base_model=base)
    save_png(np.full((16, 16), 7, np.uint8), path / "images/0.png", model="org/tiny-base", seed=0, sidecar=False)


def make_space(path: Path) -> None:
    path.mkdir()
    (path / "app.py").write_text("import gradio as gr\n\ngr.Blocks().launch()\n")
    (path / "requirements.txt").write_text("onereward\n")
    (path / "arena.css").write_text("body { margin: 0 }\n")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path / "logo.png")
    front_matter = "title: Arena\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\nlicense: apache-2.0"
    (path / "README.md").write_text(f"---\n{front_matter}\n---\n\n# Arena\n")


def make_vote(number: int, **changes) -> dict:
    """Vote `number` of a rater on a pair of random pictures, the same each time."""
    source, first, second = np.random.default_rng(number // 2).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    vote = {
        "vote_id": f"vote-{number}",
        "pair_id": f"pair-{number // 2}",
        "prompt": "",
        "task": "fill",
        "image": to_png(source),
        "mask": to_png(mask),
        "label_map": None,
        "image_0": to_png(first),
        "image_1": to_png(second),
        "label_0": float(number % 2),
        "label_1": 1 - float(number % 2),
        "criterion": ("quality", "realism")[number % 2],
        "rater": f"rater-{number % 3}",
        "rater_role": "simulated",
        "model_0": "a",
        "model_1": "b",
        "seed_0": 0,
        "seed_1": 1,
        "case_id": f"case-{number // 2}",
        "created_at": "2025-01-01T00:00:00+00:00",
    }
    return vote | changes
