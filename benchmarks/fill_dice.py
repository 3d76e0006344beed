"""Does the held-out judge find the regions of generated tumours as well as those of real ones?

    python benchmarks/fill_dice.py --pipeline pipelines/onereward-brats

The judge saw real phantom slices only. A region passes when its Dice on generated slices is at least 0.85 of its Dice
on the real slices of the same cases, over the contrasts in which the judge sees that region. Prints a table and, last,
JSON. Research use only, not for clinical use.
"""

import argparse
import json

import numpy as np

from onereward import OneRewardMaskPipeline, load_phantom
from onereward.evaluation.bootstrap import percentile_interval, resample_cases, weighted_mean
from onereward.evaluation.heldout import evaluate_pipeline
from onereward.evaluation.segmenter import load_segmenter


WANTED = 0.85


def ratio_of_dice(measure, case_ids: np.ndarray, chosen: np.ndarray) -> dict:
    """Mean Dice on generated and on real slices, their ratio and its 95 % interval by case."""
    rows = np.flatnonzero(chosen)
    weights = resample_cases(case_ids[rows])
    ratios = weighted_mean(measure.values[rows], weights) / weighted_mean(measure.real[rows], weights)
    generated, real = float(measure.values[rows].mean()), float(measure.real[rows].mean())
    return {
        "generated": round(generated, 4),
        "real": round(real, 4),
        "ratio": round(generated / real, 4),
        "ci95": [round(end, 4) for end in percentile_interval(ratios)],
        "n": len(rows),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of the pipeline")
    parser.add_argument("--cases", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the phantom's test split and of the noise")
    options = parser.parse_args()

    segmenter = load_segmenter()
    dataset = load_phantom(options.cases, tasks=("fill",), seed=options.seed, split="test")
    result = evaluate_pipeline(
        OneRewardMaskPipeline.from_pretrained(options.pipeline),
        dataset,
        segmenter=segmenter,
        seeds=(options.seed,),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
    )
    modalities = np.array(dataset["modality"])
    regions = {}
    print(f"{'':10}{'generated':>10}{'real':>8}{'ratio':>8}   95 % interval")
    for region, value in {name: value for name, value in segmenter.labels.items() if value}.items():
        asked = np.array([(np.asarray(label_map) == value).any() for label_map in dataset["label_map"]])
        measure = result.measures[f"fill_dice_{region}"]
        regions[region] = ratio_of_dice(measure, result.case_ids, measure.applies)
        counted = segmenter.counted_contrasts(region)
        regions[region]["contrasts"] = {
            modality: {
                **ratio_of_dice(measure, result.case_ids, asked & (modalities == modality)),
                "counts": modality in counted,
            }
            for modality in segmenter.modalities
        }
        for name, entry in ((region, regions[region]), *regions[region]["contrasts"].items()):
            low, high = entry["ci95"]
            note = "" if entry.get("counts", True) else "   (not counted)"
            print(
                f"{name if name == region else '  ' + name:10}{entry['generated']:10.3f}{entry['real']:8.3f}"
                f"{entry['ratio']:8.3f}   [{low:.3f}, {high:.3f}]{note}"
            )
    passed = all(entry["ratio"] >= WANTED for entry in regions.values())
    print(json.dumps({"benchmark": "fill_dice", **vars(options), "regions": regions, "passed": passed}))


if __name__ == "__main__":
    main()
