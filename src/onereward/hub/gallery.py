"""Pictures for a card: unseen cases before and after tuning."""

from pathlib import Path

import numpy as np
from PIL import Image

from onereward.data.schema import LABELS, rows_to_tensors
from onereward.data.synthetic import save_png
from onereward.evaluation.figures import before_after_figure


PICTURE = "images/before_after.png"


def write_gallery(folder, rows, before, after, *, labels=LABELS, model=None):
    """
    Pictures for the card of an adapter: `images/before_after.png`, up to four of the cases before and after tuning,
    and `images/0.png` and so on, what was painted after it. All files say that they are synthetic.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the adapter.
        rows (`list[dict]`):
            B decoded rows of the schema, all of one size.
        before (`torch.Tensor` of shape `(B, C, H, W)`):
            What the pipeline painted without the adapter, in [0, 1].
        after (`torch.Tensor` of shape `(B, C, H, W)`):
            What it painted with it, from the same noise.
        labels (`dict[str, int]`, *optional*, defaults to the phantom's):
            Name and value of each label.
        model (`str`, *optional*):
            What painted them. The name of `folder` when not given.

    Returns:
        `list[dict]`: the `widget` of the card's metadata.

    Example:

    ```python
    >>> widget = write_gallery("runs/adapter", rows, before, after)
    >>> widget[0]["output"]
    {'url': 'images/0.png'}
    ```
    """
    images, model = Path(folder, "images"), model or Path(folder).resolve().name
    images.mkdir(parents=True, exist_ok=True)
    shown = np.linspace(0, len(rows) - 1, min(4, len(rows))).round().astype(int).tolist()  # a grid that a screen holds
    truth, shown_rows = None, [rows[i] for i in shown]
    if all(row["target"] is not None for row in shown_rows):
        truth = rows_to_tensors(shown_rows)["targets"]
    before_after_figure(shown_rows, before[shown], after[shown], truth, Path(folder, PICTURE), labels=labels)
    with Image.open(Path(folder, PICTURE)) as picture:
        save_png(picture.convert("RGB"), Path(folder, PICTURE), model=model, sidecar=False)
    widget = []
    for number, (row, image) in enumerate(zip(rows, after, strict=True)):
        pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy().squeeze()
        scale = max(1, 256 // pixels.shape[0])  # whole pixels, since a gallery would blur small pictures
        save_png(pixels.repeat(scale, 0).repeat(scale, 1), images / f"{number}.png", model=model, sidecar=False)
        widget.append({"text": row["prompt"] or row["task"], "output": {"url": f"images/{number}.png"}})
    return widget
