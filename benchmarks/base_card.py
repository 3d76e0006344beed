"""Writes the card of the embedded base from what the benchmarks measured. Research use only, not for clinical use.

python benchmarks/fill_dice.py --pipeline runs/base | tail -n 1 > fill.json
python benchmarks/remove_vs_biharmonic.py --pipeline runs/base | tail -n 1 > remove.json
python benchmarks/base_card.py --pipeline runs/base --fill fill.json --remove remove.json --training training.md
"""

import argparse
import json
from pathlib import Path

from onereward import LABELS
from onereward.hub.cards import pipeline_card, save_card
from onereward.hub.environment import source_commit


EXAMPLES = "images/examples.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline; README.md goes there")
    parser.add_argument("--fill", type=Path, required=True, help="last line of benchmarks/fill_dice.py")
    parser.add_argument("--remove", type=Path, required=True, help="last line of benchmarks/remove_vs_biharmonic.py")
    parser.add_argument("--training", type=Path, required=True, help="Markdown: how the weights were trained")
    parser.add_argument("--commit", default=source_commit(), help="of the code that the weights were measured with")
    options = parser.parse_args()

    fill, remove = json.loads(options.fill.read_text()), json.loads(options.remove.read_text())
    evaluation = {
        f"fill: Dice of {region}": {
            "value": entry["generated"],
            "reference": entry["real"],
            "against the reference, 95 % interval": f"{entry['ratio']:.3f} times ({_range(entry['ci95'])})",
            "n": entry["n"],
        }
        for region, entry in fill["regions"].items()
    } | {
        name.replace("_", ": "): {
            "value": entry["pipeline"],
            "reference": entry["biharmonic"],
            "against the reference, 95 % interval": f"{entry['difference']:+.3f} ({_range(entry['ci95'])})",
            "n": entry["n"],
        }
        for name, entry in remove["measures"].items()
    }
    card = pipeline_card(
        "OneReward base for brain MRI",
        labels=LABELS,
        repo_id="pipelines/onereward-brats",
        training_data=options.training.read_text(),
        evaluation=evaluation,
        eval_dataset=(
            f"{fill['cases']} unseen cases of the phantom in four contrasts, {fill['steps']} steps, guidance "
            f"{fill['guidance_scale']:g}"
        ),
        evaluation_note=(
            "Dice: what the held-out judge finds in the picture, against what was asked for; its reference is that of "
            "the same judge on the real slices. The reference of `remove` is biharmonic inpainting. Intervals are by "
            "case."
        ),
        command="make base",
        seed=0,
        limits=[
            "It has seen a phantom alone: one average brain, warped, at 64 pixels, with grown tumours.",
            "It cannot do what no slice of the phantom shows: no skull, no treatment effects, no other disease.",
        ],
        example_prompt="Axial T1-weighted post-contrast MRI of the head with a ring-enhancing tumour",
        picture=EXAMPLES if (options.pipeline / EXAMPLES).is_file() else None,
        commit=options.commit,
    )
    save_card(card, options.pipeline)


def _range(ends: list[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


if __name__ == "__main__":
    main()
