"""Pictures of a report: the same cases before and after tuning, and the curves of a DDPO run."""

import os
import re
import textwrap

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy import ndimage

from onereward.data.schema import LABELS
from onereward.data.synthetic import save_png
from onereward.data.whole_file import whole_file


NOTICE = "Synthetic images. Research use only, not for clinical use."

# Of the Okabe-Ito palette, which readers with colour-vision deficiency can tell apart.
COLOURS = ("#D55E00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#E69F00")
OUTLINE = "#56B4E9"
INK, MUTED, PAPER = "#1a1a1a", "#666666", "#ffffff"


def _rgb(image: np.ndarray) -> np.ndarray:
    """Picture `(H, W)` or `(H, W, 3)` of 8 bits -> `(H, W, 3)` in [0, 1]."""
    image = np.asarray(image, np.float64) / 255
    return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image


def _enlarge(array: np.ndarray, scale: int) -> np.ndarray:
    return array.repeat(scale, axis=0).repeat(scale, axis=1)


def _outlined(image: np.ndarray, mask: np.ndarray, scale: int) -> np.ndarray:
    """`image` enlarged, with a line just outside the mask, so that no masked pixel is hidden."""
    large, inside = _enlarge(image, scale), _enlarge(mask, scale)
    large[ndimage.binary_dilation(inside, iterations=2) & ~inside] = to_rgb(OUTLINE)
    return large


def _painted(image: np.ndarray, label_map: np.ndarray, mask: np.ndarray, labels: dict[str, int]) -> np.ndarray:
    """The label map in colours over the darkened source; the rest of the mask a shade lighter."""
    picture = 0.35 * image
    picture[mask] = 0.35 * picture[mask] + 0.2
    for colour, value in zip(COLOURS, [value for value in labels.values() if value], strict=False):
        picture[label_map == value] = to_rgb(colour)
    return picture


def before_after_figure(
    rows: list[dict],
    before: torch.Tensor,
    after: torch.Tensor,
    truth: torch.Tensor | None,
    path: str | os.PathLike,
    *,
    labels: dict[str, int] | None = LABELS,
) -> None:
    """
    Draws one line per case: source with the mask's outline, label map, before, after, truth. Arguments as in
    [`picture_grid`]; without `truth` its column is left out.
    """
    columns = {"Before tuning": before, "After tuning": after} | ({} if truth is None else {"Truth": truth})
    picture_grid(rows, columns, path, labels=labels)


def picture_grid(
    rows: list[dict],
    columns: dict[str, torch.Tensor],
    path: str | os.PathLike,
    *,
    captions: list[str] | None = None,
    labels: dict[str, int] | None = LABELS,
) -> None:
    """
    Draws one line per row: source with the mask's outline, label map, and a picture of each column.

    Args:
        rows (`list[dict]`):
            Decoded rows in the schema of [`onereward.data.schema.FEATURES`], all of one size.
        columns (`dict[str, torch.Tensor]`):
            Title -> images of shape `(len(rows), C, H, W)` in [0, 1].
        path (`str` or `os.PathLike`):
            PNG file to write.
        captions (`list[str]`, *optional*):
            Words above each line. Defaults to task, modality and prompt.
        labels (`dict[str, int]`, *optional*, defaults to the phantom's):
            Name and value of each label, for the legend.
    """
    height, width = np.asarray(rows[0]["mask"]).shape
    scale = max(1, round(192 / max(height, width)))  # nearest-neighbour, so that a pixel stays a pixel
    panel_h, panel_w = scale * height, scale * width
    titles = ["Source and mask", "Label map", *columns]
    margin, gap, top, caption, bottom = 16, 8, 34, 22, 44
    total_w = 2 * margin + len(titles) * panel_w + (len(titles) - 1) * gap
    total_h = top + len(rows) * (caption + panel_h + gap) + bottom
    figure = Figure(figsize=(total_w / 100, total_h / 100), dpi=100, facecolor=PAPER)

    def write(x, y, text, **style):
        figure.text(x / total_w, 1 - y / total_h, text, **{"color": INK, "fontsize": 10, "va": "center", **style})

    def column(index):
        return margin + index * (panel_w + gap)

    for i, title in enumerate(titles):
        write(column(i) + panel_w / 2, top / 2 + 2, title, fontsize=11, weight="bold", ha="center")

    characters = int((total_w - 2 * margin) / 6.2)  # of the caption's font
    for i, row in enumerate(rows):
        y = top + i * (caption + panel_h + gap)
        text = f"{row['task']}, {row['modality']}: {row['prompt']}" if captions is None else captions[i]
        text = textwrap.shorten(text, characters, placeholder=" ...")
        write(margin, y + caption / 2, text, fontsize=8.5, color=MUTED)
        mask, label_map = np.asarray(row["mask"]) > 0, np.asarray(row["label_map"])
        source = _rgb(row["image"])
        # What `extend` paints over is not part of the case: the pipeline never sees it.
        seen = np.where(mask[..., None], 0.3 * source, source) if row["task"] == "extend" else source
        panels = [_outlined(seen, mask, scale), _enlarge(_painted(source, label_map, mask, labels or {}), scale)]
        for images in columns.values():
            image = (images[i].detach().cpu().float().clamp(0, 1) * 255).round().numpy().transpose(1, 2, 0)
            panels.append(_enlarge(_rgb(image.squeeze(-1) if image.shape[-1] == 1 else image), scale))
        for j, panel in enumerate(panels):
            left, low = column(j) / total_w, 1 - (y + caption + panel_h) / total_h
            axes = figure.add_axes((left, low, panel_w / total_w, panel_h / total_h))
            axes.imshow(panel, interpolation="nearest", aspect="auto", vmin=0, vmax=1)
            axes.set_axis_off()

    x, y = margin, total_h - bottom / 2
    for colour, name in zip(COLOURS, [name for name, value in (labels or {}).items() if value], strict=False):
        write(x, y, "\u25a0", color=colour, fontsize=14)
        write(x + 18, y, name)
        x += 34 + 9 * len(name)
    write(x, y, "\u25a1", color=OUTLINE, fontsize=14)
    write(x + 18, y, "mask")
    write(total_w - margin, y, NOTICE, ha="right", color=MUTED)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(np.asarray(canvas.buffer_rgba()), path, model="onereward", sidecar=False)


def _series(log_history: list[dict], key: str) -> tuple[list, list]:
    points = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def reward_curve_figure(log_history: list[dict], path: str | os.PathLike) -> None:
    """
    Draws a DDPO run: the mean reward with its points on unseen conditions, each head, and the KL to the base.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history` of a [`DDPOTrainer`]: entries with `step` and any of `reward`, `reward_std`,
            `rewards/{head}/mean`, `kl` and their `eval_` forms.
        path (`str` or `os.PathLike`):
            PNG file to write.

    Raises:
        `ValueError`: when no entry holds a `reward` or `eval_reward`.
    """
    steps, reward = _series(log_history, "reward")
    eval_steps, eval_reward = _series(log_history, "eval_reward")
    if not steps and not eval_steps:
        raise ValueError(
            "`log_history` has no entry with `reward` or `eval_reward`; pass `trainer.state.log_history` after "
            "training."
        )
    keys = {key.removeprefix("eval_") for entry in log_history for key in entry}
    heads = sorted(key.split("/")[1] for key in keys if re.fullmatch("rewards/[^/]+/mean", key))

    figure = Figure(figsize=(12, 4), dpi=110, facecolor=PAPER, layout="constrained")
    whole, parts, distance = figure.subplots(1, 3)
    if steps:
        whole.plot(steps, reward, color=OUTLINE, linewidth=1.8, label="training conditions")
        spread_steps, spread = _series(log_history, "reward_std")
        if spread_steps == steps:
            low, high = np.subtract(reward, spread), np.add(reward, spread)
            whole.fill_between(steps, low, high, color=OUTLINE, alpha=0.18, linewidth=0, label="\u00b1 1 std")
    if eval_steps:
        whole.plot(eval_steps, eval_reward, "o-", color=COLOURS[0], linewidth=1.2, label="unseen conditions")
    whole.set_title("Mean reward", loc="left", fontsize=11, weight="bold")
    for colour, head in zip((COLOURS[4], COLOURS[0], COLOURS[1], COLOURS[3]), heads, strict=False):
        parts.plot(*_series(log_history, f"rewards/{head}/mean"), color=colour, linewidth=1.6, label=head)
        points = _series(log_history, f"eval_rewards/{head}/mean")
        parts.plot(*points, "o", color=colour, markersize=4)
    parts.set_title("Reward of each head (dots: unseen)", loc="left", fontsize=11, weight="bold")
    distance.plot(*_series(log_history, "kl"), color=INK, linewidth=1.6)
    distance.set_title("KL to the base", loc="left", fontsize=11, weight="bold")
    for axes in (whole, parts, distance):
        axes.set_xlabel("optimiser step", color=MUTED)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED, labelsize=9)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.supxlabel(NOTICE, fontsize=8, color=MUTED, x=0.995, ha="right")
    with whole_file(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
