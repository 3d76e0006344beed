"""Do generated tumours help a segmenter, and do they help where real cases are few?

    python benchmarks/downstream.py --pipeline pipelines/onereward-brats --out runs/downstream

Phantom cases, subgroups by tumour size. Two kinds of synthetic rows: one or more pictures for each real row
(`synthetic`), and pictures for the under-represented sizes only, until all sizes are as frequent (`balanced`). Writes
`result.json` and `result.png`, keeps finished trainings in `trainings.json`, and prints the comparisons. The pipeline
has learnt from phantom cases that no small fraction holds: this asks whether it hands on what it knows. Research use
only, not for clinical use.
"""

import argparse
from pathlib import Path

from onereward import OneRewardMaskPipeline, load_phantom
from onereward.evaluation.downstream import POOLED, downstream_utility, plot_downstream, synthetic_rows, tumour_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of the pipeline")
    parser.add_argument("--out", type=Path, default=Path("runs/downstream"))
    parser.add_argument("--train-cases", type=int, default=80)
    parser.add_argument("--test-cases", type=int, default=96)
    parser.add_argument("--contrast", default="t2f")
    parser.add_argument("--per-row", type=int, default=2, help="pictures for each real row")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="optimisation steps of each training")
    parser.add_argument("--inference-steps", type=int, default=20)
    options = parser.parse_args()

    pipeline = OneRewardMaskPipeline.from_pretrained(options.pipeline)
    phantom = {"tasks": ("fill",), "contrasts": (options.contrast,)}
    train = load_phantom(options.train_cases, split="train", **phantom)
    test = load_phantom(options.test_cases, split="test", **phantom)
    settings = {"num_inference_steps": options.inference_steps}
    result = downstream_utility(
        train,
        test,
        {
            "synthetic": synthetic_rows(pipeline, train, per_row=options.per_row, **settings),
            "balanced": synthetic_rows(pipeline, train, balance=tumour_size, **settings),
        },
        subgroup=tumour_size,
        fractions=options.fractions,
        shares=(POOLED, 1.0),
        seeds=range(options.seeds),
        steps=options.steps,
        batch_size=8,
        widths=(8, 16, 16),
        runs=options.out / "trainings.json",
    )
    result.save(options.out / "result.json")
    plot_downstream(result, options.out / "result.png")
    print(f"under-represented: {result.under_represented}, {result.groups}")
    for c in result.comparisons:
        d = c.difference
        print(
            f"{c.group:10} {str(c.arm):32} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] n {d.n}"
            f"  p {c.p_value:.4f}  Holm {c.p_holm:.4f}  {c.verdict}"
        )
    for score in result.arms:
        print(f"{str(score.arm):40} {score.scores['all cases']}  gap {score.gap}")


if __name__ == "__main__":
    main()
