# Copyright 2026 The OneReward authors. Licensed under the Apache License, Version 2.0.
# Research use only, not for clinical use.
"""`transformers.pipeline("image-reward")`: pictures in, rewards out."""

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline


NEEDED, OPTIONAL = ("image", "mask", "source"), ("label_map", "prompt", "task")


class ImageRewardPipeline(Pipeline):
    """
    Rewards of pictures, for [`~transformers.pipeline`].

    Each input is a `dict` with the singular names of the arguments of [`~OneRewardModel.score`]: `image`, `mask` and
    `source`, each a `PIL.Image.Image` or the path of one, of the size that the model was trained on; and, for models
    that want them, `label_map`, `prompt` and `task`. In `mask`, white is what was repainted. The result is a `dict` of
    criterion -> reward, higher is better; `None` where the model does not judge the task by the criterion. A list of
    inputs gives a list; `batch_size` of them are judged at once.

    Example:

    ```python
    >>> import onereward
    >>> from transformers import pipeline

    >>> judge = pipeline("image-reward", model="my-name/tumour-rewards")
    >>> judge({"image": "repainted.png", "source": "before.png", "mask": "mask.png", "task": "fill"})
    {'quality': 0.31, 'realism': -0.84, 'clinical_relevance': 0.12}
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, inputs, batch_size: int = 1):
        # transformers makes batches of what has a tokenizer or an image processor; here a batch is one input
        rows = [inputs] if isinstance(inputs, dict) else list(inputs)
        rewards = []
        for start in range(0, len(rows), batch_size):
            rewards += self.run_single(rows[start : start + batch_size], {}, {}, {})
        return rewards[0] if isinstance(inputs, dict) else rewards

    def _sanitize_parameters(self):
        return {}, {}, {}

    def preprocess(self, rows):
        for row in rows:
            if not isinstance(row, dict) or not set(NEEDED) <= set(row) <= {*NEEDED, *OPTIONAL}:
                raise ValueError(
                    f"An input of the pipeline is {sorted(row) if isinstance(row, dict) else row!r}; expected a dict "
                    f"with {NEEDED}, and where the model wants them {OPTIONAL}."
                )
        mode = "L" if self.model.config.image_channels == 1 else "RGB"
        masks = np.stack([_pixels(row["mask"], "L") for row in rows])
        if not np.isin(masks, (0, 255)).all():
            raise ValueError("`mask` holds values other than 0 and 255; expected black and white, white = repainted.")
        arguments = {
            "images": np.stack([_pixels(row["image"], mode) for row in rows]) / 255,
            "masks": masks / 255,
            "sources": np.stack([_pixels(row["source"], mode) for row in rows]) / 255,
        }
        arguments = {name: torch.from_numpy(array).float() for name, array in arguments.items()}
        if any(row.get("label_map") is not None for row in rows):
            maps = [row.get("label_map") for row in rows]
            maps = [np.zeros_like(masks[0]) if labels is None else _pixels(labels, None) for labels in maps]
            arguments["label_maps"] = torch.from_numpy(np.stack(maps)).long()
        for name in ("prompt", "task"):
            if all(row.get(name) is not None for row in rows):
                arguments[f"{name}s"] = [row[name] for row in rows]
        return {"inputs": self.model.prepare_inputs(**arguments), "tasks": arguments.get("tasks")}

    def _forward(self, batch):
        return {"rewards": self.model(**batch["inputs"]).rewards, "tasks": batch["tasks"]}

    def postprocess(self, outputs):
        config, rewards = self.model.config, outputs["rewards"].tolist()
        tasks = outputs["tasks"] or config.tasks[:1] * len(rewards)
        return [
            {
                criterion: reward if criterion in config.judged_by(task) else None
                for criterion, reward in zip(config.criteria, of_image, strict=True)
            }
            for of_image, task in zip(rewards, tasks, strict=True)
        ]


def _pixels(picture, mode: str | None) -> np.ndarray:
    """A picture as an array of shape `(C, H, W)`."""
    opened = picture if isinstance(picture, Image.Image) else Image.open(picture)
    pixels = np.asarray(opened.convert(mode) if mode else opened)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
