"""Writes the examples of the Space: slices of the phantom with what is to be repainted.

python benchmarks/space_examples.py --output spaces/onereward-arena/examples
"""

import argparse
from pathlib import Path

from onereward import load_phantom
from onereward.data.whole_file import write_json


# contrast, task, and what the button is called
EXAMPLES = (
    ("t1c", "fill", "Tumour, T1 with contrast"),
    ("t2f", "fill", "Tumour, FLAIR"),
    ("t2w", "fill", "Tumour, T2"),
    ("t1c", "remove", "Take the tumour away"),
    ("t2f", "remove", "Take the tumour away, FLAIR"),
    ("t1n", "extend", "Go on beyond the border"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, (contrast, task, caption) in enumerate(EXAMPLES):
        row = load_phantom(number + 1, contrasts=(contrast,), tasks=(task,), split="test", seed=7)[number]
        names = {column: f"{number}-{column}.png" for column in ("image", "mask", "label_map")}
        for column, name in names.items():
            row[column].save(output / name)
        examples.append({**names, "task": task, "prompt": row["prompt"], "caption": caption})
    write_json(output / "examples.json", examples)


if __name__ == "__main__":
    main()
