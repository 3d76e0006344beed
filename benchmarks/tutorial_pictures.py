"""The pictures of docs/tutorials: the code of each tutorial, and a grid of what came out.

    python benchmarks/tutorial_pictures.py --output docs/images

Runs the Python blocks of fill.md, remove.md and extend.md as they stand and draws what they made, so that a picture
shows what its page tells. The files are marked as synthetic. Under a minute on two CPU cores. Research use only, not
for clinical use.
"""

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from onereward.data.synthetic import save_png
from onereward.evaluation.figures import picture_grid


ROOT = Path(__file__).resolve().parents[1]
BASE = "pipelines/onereward-brats"


def run(page: str) -> dict:
    """The variables that the Python blocks of a tutorial leave behind."""
    text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
    variables = {}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(code, page, "exec"), variables)
    return variables


def tensor(picture) -> torch.Tensor:
    """Grey picture -> `(1, 1, H, W)` in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None, None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    grids = {}
    progress = tqdm(total=3, desc="Tutorials")
    fill = run("fill")
    row = {"image": fill["source"], "mask": fill["mask"], "label_map": fill["label_map"], "task": "fill"}
    columns = {f"Synthetic {number}": tensor(image) for number, image in enumerate(fill["images"], 1)}
    grids["fill"] = (row, columns, "One label map, four draws", fill["LABELS"])
    progress.update()

    remove = run("remove")
    columns = {
        "One guess": remove["guesses"][:1],
        "Mean of eight": remove["mean"][None],
        "Change": 0.5 + remove["change"][None] / 2,
        "Truth": remove["tensors"]["targets"],
    }
    grids["remove"] = (remove["row"], columns, "The lesion in FLAIR, and what it changed (grey: nothing)", {})
    progress.update()

    extend = run("extend")
    image, mask = Image.fromarray(extend["image"]), Image.fromarray(extend["mask"])
    row = {"image": image, "mask": mask, "label_map": Image.new("L", image.size), "task": "extend"}
    columns = {"Synthetic": tensor(extend["extended"]), "Truth": tensor(extend["whole"])}
    grids["extend"] = (row, columns, "Fourteen columns were missing", {})
    progress.update()

    with tempfile.TemporaryDirectory() as folder:
        for name, (row, columns, caption, labels) in grids.items():
            picture_grid([row], columns, Path(folder, "grid.png"), captions=[caption], labels=labels)
            with Image.open(Path(folder, "grid.png")) as grid:
                save_png(grid.convert("RGB"), options.output / f"{name}.png", model=BASE, sidecar=False, task=name)


if __name__ == "__main__":
    main()
