"""Makes the study that the Space ships: phantom conditions painted by the embedded base. Research use only.

python benchmarks/demo_study.py --output spaces/onereward-arena/study
"""

import argparse
from pathlib import Path

import datasets
import numpy as np

from onereward import OneRewardMaskPipeline, load_phantom
from onereward.preferences import StudySettings, make_candidates, make_study, study_units
from onereward.preferences.degradations import DEGRADATIONS
from onereward.preferences.schema import to_png
from onereward.preferences.study_design import rows_of_many_cases


INSTRUCTIONS = """
You see two synthetic images side by side. Both were painted into the same region of the same brain slice; outside the
region they are equal. **Say which one is better, by one criterion at a time.**

- **Fill**: a tumour was to be painted where the label map says.
- **Remove**: the tumour was to be replaced by healthy tissue.

| Criterion | Question |
|---|---|
| Quality | Which is the cleaner image: free of blur, noise, seams and other artefacts? |
| Realism | Which looks more like a real scan? |
| Clinical relevance | Which shows the finding that was asked for, in a plausible place and shape? |
| Removal quality | In which is nothing left of the tumour, and nothing invented in its place? |

Choose **tie** if you see no difference, and **both unacceptable** if neither will do. Look at the whole region, zoom
in where in doubt, and take no more than about 20 seconds. Some pairs come twice, and some have a known answer: they
tell how steady answers are. Do not try to find out which model painted what. You can take back your last answer for
ten minutes, skip a pair and say why, pause at any time and go on later.
"""

CONSENT = """
**Research use only, not for clinical use.** All images are synthetic: they are painted on a brain phantom and show no
patient.

- **What is stored**: your answers, the images they are about, the sides they were shown on, the time of each answer
  and how long it took, the role you choose, and your comments.
- **Under what name**: a pseudonym that is computed from your name or account with a secret key. The name itself is not
  stored. Who holds the key could find out whose answers they are.
- **What happens to it**: answers are used to train and compare models, and may be published under the pseudonym as a
  data set. Do not write in comments what could tell who you or a patient is.
- **How to withdraw**: taking part is voluntary. Stop at any time, without giving a reason. To have your answers left
  out, write to the organisers from the account you took part with; what others have downloaded by then cannot be
  called back.

I have read this, and agree that my answers are stored and used in this way.
"""


def spoilt(candidates: datasets.Dataset, seed: int) -> datasets.Dataset:
    """One candidate of each row, with one strong fault inside the mask, the faults by turns."""
    names = ["blur", "noise", "seam", "misplaced", "intensity_shift"]

    def spoil(row, index):
        name = names[index % len(names)]
        image, mask = np.asarray(row["candidate"]) / 255, np.asarray(row["mask"]) > 0
        rng = np.random.default_rng([seed, index])
        faulty = DEGRADATIONS[name](image, mask, np.asarray(row["label_map"]), rng, 1.0)
        picture = to_png(np.round(faulty * 255).astype(np.uint8))
        return {"candidate": picture, "model": f"{row['model']}+{name}"}

    return candidates.map(spoil, with_indices=True, features=candidates.features)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="pipelines/onereward-brats", help="the embedded base")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets the study")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of conditions and of the images")
    options = parser.parse_args()

    pipeline = OneRewardMaskPipeline.from_pretrained(options.pipeline)
    # all rows of twelve cases, and of these 12 of each task
    phantom = load_phantom(12, tasks=("fill", "remove"), split="test", seed=options.seed)
    parts = [phantom.filter(lambda row, task=task: row["task"] == task) for task in ("fill", "remove")]
    chosen = [rows_of_many_cases(part, 12, options.seed + number) for number, part in enumerate(parts)]
    rows = datasets.concatenate_datasets(chosen)
    made = {}
    for model, steps in (("base-20-steps", 20), ("base-3-steps", 3)):
        settings = {"num_inference_steps": (steps, steps), "guidance_scale": (2.0, 2.0), "seed": options.seed}
        made[model] = make_candidates(pipeline, rows, 1, 0, model=model, **settings)
    candidates = datasets.concatenate_datasets([*made.values(), spoilt(made["base-20-steps"], options.seed)])
    # the page shows the source, not what should have come out
    candidates = candidates.map(lambda row: {"target": None}, features=candidates.features)

    study = StudySettings(
        title="OneReward arena: the demo study",
        mode="pairs",
        roles=["radiologist", "resident", "other clinician", "medical physicist", "lay"],
        goal=40,
        instructions=INSTRUCTIONS.strip(),
        consent=CONSENT.strip(),
        seed=options.seed,
    )
    # a strong fault beside the image that it was put into: the answer is known
    known = {}
    for unit in study_units(candidates, study):
        first, second = (candidates[row]["model"] for row in unit.rows)
        if second.startswith(f"{first}+") and second.endswith(("noise", "seam")):
            known[unit.unit_id, "realism"] = 1.0
    make_study(options.output, candidates, study, known)
    sizes = {path.name: path.stat().st_size for path in sorted(options.output.iterdir())}
    print(f"{len(rows)} conditions, {len(candidates)} candidates, {len(known)} with known answers: {sizes}")


if __name__ == "__main__":
    main()
