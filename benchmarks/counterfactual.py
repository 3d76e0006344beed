"""How close do `remove` and `fill` come to the truth, next to simple methods, on cases that nothing was trained on?

    python benchmarks/counterfactual.py --pipeline pipelines/onereward-brats --leaderboard docs/leaderboard.md

Runs every method of the counterfactual benchmark, writes one JSON file each into `--out`, a picture of some cases, and
the leaderboard of all results that lie there, so that `--methods` runs it in pieces. `--adapter FOLDER` adds a tuned
adapter, `--cases 8 --out FOLDER` is a quick try. Without OpenCV (`pip install
opencv-python-headless`) its two methods are left out. Research use only, not for clinical use.
"""

import argparse
import functools
import importlib.util
import inspect
import json
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from onereward import OneRewardMaskPipeline, load_phantom
from onereward.data.whole_file import whole_file
from onereward.evaluation import baselines
from onereward.evaluation.counterfactual import (
    FROZEN,
    NUM_CASES,
    TASKS,
    fingerprint,
    load_benchmark,
    recipe_of,
    render_rows,
    score_images,
    write_leaderboard,
)
from onereward.evaluation.heldout import generate_images
from onereward.evaluation.segmenter import load_segmenter
from onereward.hub.adapters import load_adapter
from onereward.hub.environment import current_environment


REFERENCE_CASES = 200  # of the training split, to copy regions from and to take the greys of the labels from


def run_baselines(benchmark) -> dict:
    """Method -> (how to make its images, tasks it is for, settings)."""
    tensors, modalities = benchmark.tensors, list(benchmark.rows["modality"])
    images, masks, label_maps = (tensors[name] for name in ("images", "masks", "label_maps"))

    @functools.cache
    def told():
        rows = load_phantom(REFERENCE_CASES, tasks=("fill",), split="train", seed=0)
        return images, masks, label_maps, modalities, baselines.reference_slices(rows)

    source = {"training_cases": REFERENCE_CASES}
    methods = {
        "truth": (lambda: tensors["targets"].clone(), TASKS, {}),
        "unchanged": (lambda: baselines.unchanged(images, masks), TASKS, {}),
        "constant fill": (lambda: baselines.constant_fill(images, masks), TASKS, {"surroundings_px": 2}),
        "biharmonic": (lambda: baselines.biharmonic(images, masks), TASKS, {}),
        "nearest patient": (lambda: baselines.nearest_patient(*told()), TASKS, {**source, "surroundings_px": 4}),
        "label means": (lambda: baselines.label_means(*told()), ("fill",), source),
    }
    if importlib.util.find_spec("cv2"):
        methods["Telea"] = (lambda: baselines.telea(images, masks), TASKS, {"radius_px": 3})
        methods["Navier-Stokes"] = (lambda: baselines.navier_stokes(images, masks), TASKS, {"radius_px": 3})
    else:
        print("OpenCV is not installed: Telea and Navier-Stokes are left out.", file=sys.stderr)
    return methods


def run_pipelines(options, benchmark) -> dict:
    """The same for the pipeline as it is called by default, with the settings of its card, and with the adapter."""
    pipeline = OneRewardMaskPipeline.from_pretrained(options.pipeline)
    defaults = inspect.signature(pipeline.__call__).parameters
    default = {name: defaults[name].default for name in ("num_inference_steps", "guidance_scale")}
    recommended = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    if options.adapter:
        load_adapter(pipeline, options.adapter)

    def generate(call, adapter):
        # The switch is for pipelines that have an adapter; without one there is nothing to switch off.
        return lambda: generate_images(
            pipeline, benchmark.rows, seeds=(options.seed,), adapter=adapter or not options.adapter, **call
        )

    def settings(call):
        return {"steps": call["num_inference_steps"], "guidance": call["guidance_scale"], "noise_seed": options.seed}

    methods = {
        "base": (generate(default, False), TASKS, {"model": options.pipeline, **settings(default)}),
        "base, card settings": (
            generate(recommended, False),
            TASKS,
            {"model": options.pipeline, **settings(recommended)},
        ),
    }
    if options.adapter:
        methods["adapter"] = (generate(default, True), TASKS, {"model": options.adapter, **settings(default)})
    return methods


def save_grid(
    pictures: dict[str, tuple[torch.Tensor, tuple[str, ...]]], benchmark, path: Path, per_task: int = 5
) -> None:
    """Some rows of each task, one line each: the source with its mask, then every method."""
    tasks, contrasts = np.array(benchmark.rows["task"]), benchmark.strata["contrast"]
    rows = []
    for task in TASKS:
        chosen = np.flatnonzero(tasks == task)
        # A case has four rows: one more than a whole number of cases apart, they differ in contrast too.
        step = len(chosen) // per_task // 4 * 4 + 1 if len(chosen) > 8 * per_task else 5
        rows += [int(i) for i in chosen[::step][:per_task]]
    figure = Figure(figsize=(1.5 * (len(pictures) + 1), 1.55 * len(rows)), layout="constrained")
    for line, row in enumerate(rows):
        cells = {"source": (benchmark.tensors["images"], TASKS), **pictures}
        for column, (name, (images, for_tasks)) in enumerate(cells.items()):
            axis = figure.add_subplot(len(rows), len(cells), line * len(cells) + column + 1)
            axis.set(xticks=[], yticks=[])
            if tasks[row] in for_tasks:
                axis.imshow(images[row, 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.contour(benchmark.tensors["masks"][row, 0].numpy(), [0.5], colors="#56B4E9", linewidths=0.4)
            if line == 0:
                axis.set_title(name, fontsize=7)
            if column == 0:
                axis.set_ylabel(f"{tasks[row]} {contrasts[row]}", fontsize=7)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="folder or Hub id of the pipeline")
    parser.add_argument("--adapter", help="folder of an adapter of that pipeline, scored beside it")
    parser.add_argument("--cases", type=int, default=NUM_CASES, choices=sorted(FROZEN))
    parser.add_argument("--steps", type=int, default=20, help="of `base, card settings`")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of `base, card settings`")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the cases are frozen")
    parser.add_argument("--methods", nargs="+", help="only these; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/counterfactual"))
    parser.add_argument("--leaderboard", type=Path, help="page to write, e.g. docs/leaderboard.md")
    parser.add_argument(
        "--print-fingerprints", action="store_true", help="print those of the rows that the phantom makes now, and end"
    )
    options = parser.parse_args()
    if options.print_fingerprints:
        print(json.dumps({n: fingerprint(render_rows(n), recipe_of(n)) for n in (8, NUM_CASES)}, indent=4))
        return
    if not options.pipeline:
        parser.error("--pipeline is missing")

    benchmark, segmenter = load_benchmark(options.cases), load_segmenter()
    methods = {**run_pipelines(options, benchmark), **run_baselines(benchmark)}
    if options.methods:
        if unknown := sorted(set(options.methods) - set(methods)):
            parser.error(f"--methods {unknown}: expected some of {list(methods)}")
        methods = {name: methods[name] for name in options.methods}
    command = shlex.join(["python", "benchmarks/counterfactual.py", *sys.argv[1:]])
    pictures = {}
    for name, (make, tasks, settings) in methods.items():
        started = time.perf_counter()
        images = make()
        seconds = round(time.perf_counter() - started, 1)
        result = score_images(
            name,
            images,
            benchmark,
            segmenter,
            tasks=tasks,
            settings=settings,
            command=command,
        )
        result |= {"environment": current_environment(), "seconds": seconds}
        with whole_file(options.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json") as partial:
            partial.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
        pictures[name] = (images, tasks)
        for task in tasks:
            mae = result["measured"][task]["all"]["mae"]
            print(f"{name:24}{task:8} MAE {mae['value']:.4f} [{mae['low']:.4f}, {mae['high']:.4f}]   {seconds} s")
    save_grid(pictures, benchmark, options.out / "grid.png")
    if options.leaderboard:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob("*.json"))]
        base = "base" if any(result["method"] == "base" for result in results) else ""
        write_leaderboard(results, options.leaderboard, base)


if __name__ == "__main__":
    main()
