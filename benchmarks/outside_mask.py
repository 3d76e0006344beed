"""Does a pixel outside the mask ever change? 1,000 random calls over layouts, dtypes, tasks, inputs and outputs.

    python benchmarks/outside_mask.py

Tiny random pipelines are made for every layout, grey and in colour; `--pipeline` runs the calls on that checkpoint
instead. Arrays and tensors must come back as they went in, uint8 or the equal floats. Prints JSON; `changed_pixels`
must be 0.
"""

import argparse
import collections
import json

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tqdm import tqdm

from onereward import OneRewardMaskPipeline
from onereward.data.masks import random_mask
from onereward.data.schema import LABELS, TASKS
from onereward.pipelines.small import small_pipeline


LAYOUTS = ("c", "2c+1", "2c+1+K")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INPUTS = ("pil", "np_uint8", "np_float32", "np_float64", "pt_uint8", "pt_float32")


def tiny_pipeline(layout: str, image_channels: int) -> OneRewardMaskPipeline:
    """Random weights; the VAE is so small that its reconstructions are far from its inputs."""
    pipeline = small_pipeline(
        ["brain MRI"],
        LABELS if layout == "2c+1+K" else None,
        image_channels=image_channels,
        vae_channels=(8, 16),
        unet_channels=(16, 32),
        text_channels=16,
    )
    if layout == "c":
        unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 4})
        pipeline = OneRewardMaskPipeline(**{**pipeline.components, "unet": unet})
    return pipeline


def random_call(rng: np.random.Generator, pipeline: OneRewardMaskPipeline) -> tuple[dict, np.ndarray, np.ndarray, str]:
    """Arguments of a call, and the source `(B, H, W, C)`, the mask `(B, H, W)` and the kind of source behind them."""
    batch, channels = int(rng.integers(1, 4)), pipeline.vae.config.in_channels
    height, width = (int(n) for n in rng.choice([16, 24, 32, 48, 50, 33], 2))
    kind = str(rng.choice(INPUTS))
    dtype = kind.split("_")[-1]
    source = rng.integers(0, 256, (batch, height, width, channels), dtype=np.uint8)
    if dtype.startswith("float"):
        source = rng.random(source.shape).astype(dtype)
    mask = np.stack([random_mask(rng, (height, width)) for _ in range(batch)])
    task = [str(name) for name in rng.choice(TASKS, batch)]  # one call mixes tasks
    if kind == "pil":
        image = [Image.fromarray(picture.squeeze(-1) if channels == 1 else picture) for picture in source]
        mask_image = [Image.fromarray(m.astype(np.uint8) * 255) for m in mask]
    elif kind.startswith("np"):
        image, mask_image = source, mask.astype(np.float32)[..., None]
    else:
        image, mask_image = torch.from_numpy(source).movedim(-1, 1), torch.from_numpy(mask)[:, None].float()
    arguments = {
        "prompt": ["brain MRI"] * batch,
        "image": image,
        "mask_image": mask_image,
        "task": task,
        "num_inference_steps": int(rng.integers(1, 4)),
        "guidance_scale": float(rng.choice([1.0, 3.0])),
        "eta": float(rng.choice([0.0, 1.0])),
        "num_images_per_prompt": int(rng.integers(1, 3)),
        "generator": torch.Generator().manual_seed(int(rng.integers(2**31))),
        "output_type": str(rng.choice(["pil", "np", "pt"])),
    }
    if height % 8 or width % 8 or rng.random() < 0.2:  # work at another size and paste into the source
        arguments |= {"height": 32, "width": 24}
    if pipeline.has_label_channels and rng.random() < 0.7:
        labels = rng.integers(0, len(LABELS), mask.shape) * mask
        labels[[name == "remove" for name in task]] = 0
        arguments["label_map"] = torch.from_numpy(labels)[:, None] if kind.startswith("pt") else labels[..., None]
    return arguments, source, mask, kind


def as_array(images, output_type: str) -> np.ndarray:
    """Whatever the pipeline returned, as `(B, H, W, C)` in the type it came in."""
    if output_type == "pil":
        images = np.stack([np.asarray(image) for image in images])
        return images[..., None] if images.ndim == 3 else images
    return images.movedim(1, -1).numpy() if output_type == "pt" else images


def changed_pixels(output: np.ndarray, source: np.ndarray, mask: np.ndarray) -> int:
    """Pixels outside the mask that differ, compared in the type of the output where PIL images change type."""
    if output.dtype == np.uint8 and source.dtype != np.uint8:
        source = (source * 255).round().astype(np.uint8)
    elif output.dtype != np.uint8 and source.dtype == np.uint8:
        source = source.astype(np.float32) / 255
    repeats = len(output) // len(source)
    source, mask = source.repeat(repeats, axis=0), mask.repeat(repeats, axis=0)
    return int(((output != source).any(-1) & ~mask).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="folder or Hub id; without it, tiny random pipelines of every layout")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    if options.pipeline:
        pipelines = {"given": OneRewardMaskPipeline.from_pretrained(options.pipeline)}
    else:
        pipelines = {f"{layout}, {c} channel": tiny_pipeline(layout, c) for layout in LAYOUTS for c in (1, 3)}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)

    changed = repainted = 0
    counts = collections.Counter()
    for _ in tqdm(range(options.calls), desc="Calls"):
        name, dtype = str(rng.choice(list(pipelines))), str(rng.choice(list(DTYPES)))
        pipeline = pipelines[name].to(dtype=DTYPES[dtype])
        arguments, source, mask, kind = random_call(rng, pipeline)
        output = as_array(pipeline(**arguments).images, arguments["output_type"])
        wrong = changed_pixels(output, source, mask)
        if wrong:
            print(
                f"{wrong} pixels: {name}, {dtype}, {kind}, {'/'.join(arguments['task'])} -> {arguments['output_type']}"
            )
        changed += wrong
        repainted += changed_pixels(output, source, ~mask)
        counts.update([name, dtype, kind, *arguments["task"], "to " + arguments["output_type"]])
    result = {"benchmark": "outside_mask", **vars(options), "changed_pixels": changed}
    # Without a change inside the masks the calls did nothing, and their success would mean nothing.
    result |= {"repainted_pixels": repainted, "calls_by_kind": dict(sorted(counts.items()))}
    result["passed"] = changed == 0 and repainted > 0
    print(json.dumps(result))


if __name__ == "__main__":
    main()
