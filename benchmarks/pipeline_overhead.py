"""How long does OneRewardMaskPipeline take, against StableDiffusionInpaintPipeline on the same weights?

    python benchmarks/pipeline_overhead.py

Both run the same 9-channel denoiser, 3-channel VAE, text encoder and scheduler; random weights of the embedded base's
size unless `--pipeline` names a checkpoint in that layout. Calls alternate, so that both meet the same load of the
machine, and the figure is the median over pairs of calls of our time divided by theirs. Prints JSON.
"""

import argparse
import json
import time

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from tqdm import tqdm

from onereward import OneRewardMaskPipeline
from onereward.pipelines.small import small_pipeline


WANTED = 1.05


def timed(pipeline, arguments: dict) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    pipeline(**arguments, generator=torch.Generator().manual_seed(0))
    return time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="folder or Hub id of a checkpoint in the layout of 2c + 1 channels")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    if options.pipeline:
        ours = OneRewardMaskPipeline.from_pretrained(options.pipeline)
    else:
        torch.manual_seed(0)
        ours = small_pipeline(["brain MRI"], labels=None, image_channels=3)
    parts = {name: getattr(ours, name) for name in ("vae", "unet", "scheduler", "text_encoder", "tokenizer")}
    theirs = StableDiffusionInpaintPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(options.batch_size, 1, options.size, options.size)
    mask[..., options.size // 4 : options.size // 2, options.size // 4 : options.size // 2] = 1
    arguments = {
        "prompt": ["brain MRI"] * options.batch_size,
        "image": torch.rand(options.batch_size, 3, options.size, options.size, generator=generator),
        "mask_image": mask,
        "height": options.size,
        "width": options.size,
        "num_inference_steps": options.steps,
        "output_type": "np",
    }
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)

    result = {"benchmark": "pipeline_overhead", **vars(options), "ratios": {}}
    for name, guidance_scale in (("unguided", 1.0), ("guided", 7.5)):
        call = {**arguments, "guidance_scale": guidance_scale}
        times = []
        for i in tqdm(range(options.repeats + 1), desc=name):
            # Whoever comes second finds warm caches: take turns.
            first, second = (ours, theirs) if i % 2 else (theirs, ours)
            pair = {first: timed(first, call), second: timed(second, call)} if i else {}
            if not i:  # warm-up
                timed(first, call), timed(second, call)
                continue
            times.append([*pair[ours], *pair[theirs]])
        wall, cpu, wall_theirs, cpu_theirs = np.array(times).T
        result["ratios"][name] = {
            "wall": round(float(np.median(wall / wall_theirs)), 4),
            "cpu": round(float(np.median(cpu / cpu_theirs)), 4),
            "seconds": round(float(np.median(wall)), 4),
            "seconds_stable_diffusion": round(float(np.median(wall_theirs)), 4),
        }
        print(name, result["ratios"][name])
    result["passed"] = all(entry["wall"] <= WANTED for entry in result["ratios"].values())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
