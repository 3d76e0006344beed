"""Pictures as HTML: side by side, zoomed and moved in step, with no file of their own."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image


def to_url(picture) -> str:
    """A picture (array, `PIL.Image.Image` or PNG file as bytes) as a URL that carries it."""
    if not isinstance(picture, bytes):
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def outline(mask: np.ndarray, color=(255, 176, 59), scale: int = 4) -> np.ndarray:
    """The border of a mask as an RGBA picture of `scale` times its size, so that it stays thin when zoomed."""
    scale = max(1, min(scale, 2048 // max(mask.shape)))  # of a large mask it is thin in any case
    large = np.kron(np.asarray(mask) > 0, np.ones((scale, scale), bool))
    inner = large.copy()
    inner[1:] &= large[:-1]
    inner[:-1] &= large[1:]
    inner[:, 1:] &= large[:, :-1]
    inner[:, :-1] &= large[:, 1:]
    edge = large & ~inner
    return np.dstack([np.where(edge, channel, 0) for channel in (*color, 255)]).astype(np.uint8)


def difference(image: np.ndarray, source: np.ndarray) -> np.ndarray:
    """How far two 8-bit pictures differ: black where they agree, over red to yellow where they differ most."""
    gap = np.abs(image.astype(float) - source.astype(float))
    gap = gap if gap.ndim == 2 else gap.max(axis=2)
    share = gap / max(gap.max(), 1)
    return np.dstack([np.minimum(1, 2 * share), np.maximum(0, 2 * share - 1), 0 * share] * np.array(255)).astype(
        np.uint8
    )


def figure(caption: str, layers: list[tuple[str, object]], name: str = "") -> str:
    """One picture: layers `(class, picture)` on top of each other, the first one lowest, and a caption."""
    images = "".join(
        f'<img class="{escape(kind)}" alt="{escape(caption) if number == 0 else ""}" src="{to_url(picture)}">'
        for number, (kind, picture) in enumerate(layers)
    )
    return (
        f'<figure id="{escape(name)}"><div class="view zoomable">{images}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def side_by_side(figures: list[str], tools: list[str], text: dict, ratio: float = 1.0) -> str:
    """Figures in one row that are zoomed and moved together, with their tools below."""
    zoom = "".join(
        f'<button type="button" data-zoom-by="{factor}" aria-label="{escape(label)}">{sign}</button>'
        for factor, sign, label in (
            (1.4, "+", text["zoom_in"]),
            (1 / 1.4, "−", text["zoom_out"]),
            (0, "1:1", text["reset"]),
        )
    )
    return (
        f'<div class="synchronised" style="--ratio:{ratio:.4f}"><div class="views">{"".join(figures)}</div>'
        f'<div class="tools" role="group" aria-label="{escape(text["tools"])}">{zoom}{"".join(tools)}</div></div>'
    )


def slider(label: str, sets: str, value: int = 100) -> str:
    """A slider in percent that sets a variable of the pictures beside it."""
    return (
        f'<label>{escape(label)}<input type="range" min="0" max="100" value="{value}" data-sets="{sets}" '
        f'aria-label="{escape(label)}"></label>'
    )


def checkbox(label: str, sets: str) -> str:
    """A checkbox that sets a variable of the pictures beside it to 1 or 0."""
    return f'<label><input type="checkbox" checked data-sets="{sets}">{escape(label)}</label>'


def reward_bars(rewards: dict[str, float], names: dict[str, str], text: dict) -> str:
    """A bar for each criterion, from -3 to 3 standard deviations of the images the reward model learned from."""
    rows = []
    for criterion, value in rewards.items():
        width = min(abs(value), 3) / 6 * 100
        place = f"left:{50 if value >= 0 else 50 - width:.1f}%;width:{width:.1f}%"
        name = escape(names.get(criterion, criterion.replace("_", " ")))
        rows.append(
            f'<span>{name}</span><span class="bar" role="img" aria-label="{name}: {value:+.2f}">'
            f'<span class="{"low" if value < 0 else ""}" style="{place}"></span></span><span>{value:+.2f}</span>'
        )
    return f'<p>{escape(text["rewards"])}</p><div class="rewards">{"".join(rows)}</div>' if rows else ""
