"""
Paint the images of a study on a running Space, from a table of what to paint, and make the study of them.

    python run_study.py cases.csv study --space http://127.0.0.1:7860 --adapters base org/adapter-a org/adapter-b

Columns of the table: `image`, `mask`, `case_id`; and, where wanted, `task` (fill, remove or extend), `prompt`,
`label_map`, `seed`, `modality` and `source` (the data set that the image is from). Files are PNG or JPEG of 8 bits,
relative to the table. Masks are black and white, white is repainted. Who stops halfway starts the same command again:
what has been painted is kept beside the study, in `<output>-painted` (delete it when the Space has another pipeline).
Research use only, not for clinical use.
"""

import argparse
import csv
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import httpx
import numpy as np
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from tqdm.auto import tqdm

from onereward.data.masks import check_label_map, check_mask
from onereward.data.schema import TASKS
from onereward.data.whole_file import whole_file
from onereward.hub.agreements import find_agreements
from onereward.hub.publish import publish
from onereward.preferences import CANDIDATE_FEATURES, StudySettings, make_study
from onereward.preferences.schema import content_id, to_png


HERE = Path(__file__).resolve().parent
NEEDED, OPTIONAL = ("image", "mask", "case_id"), ("task", "prompt", "label_map", "seed", "modality", "source")
WAIT = re.compile(r"try again in (\d+) s")  # what the Space says to whom it asks to slow down


@dataclass
class Case:
    """One line of the table: pictures, read and checked, and what to paint."""

    image: Image.Image
    mask: Image.Image
    label_map: Image.Image | None
    task: str
    prompt: str
    case_id: str
    seed: int
    modality: str
    source: str


def read_cases(path: Path) -> list[Case]:
    """
    Read the table.

    Args:
        path (`Path`):
            CSV file with a header.

    Returns:
        `list[Case]`: one for each line.

    Raises:
        `ValueError`: when a column is missing or unknown, or a line cannot be painted. The message names the line.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        names = table.fieldnames or []
        missing = [name for name in NEEDED if name not in names]
        unknown = [name for name in names if name not in NEEDED + OPTIONAL]
        if missing or unknown:
            raise ValueError(
                f"{path.name} lacks the column(s) {missing} or has unknown ones, {unknown}; it must have {NEEDED} and "
                f"may have {OPTIONAL}, separated by commas."
            )
        cases = []
        for line in table:
            try:
                cases.append(_read_case(line, path.parent))
            except (ValueError, OSError) as error:
                raise ValueError(f"{path.name}, line {table.line_num}: {error}") from error
    if not cases:
        raise ValueError(f"{path.name} has a header and no lines; expected one line for each source to paint on.")
    return cases


def _read_case(line: dict, folder: Path) -> Case:
    if None in line or None in line.values():
        raise ValueError("it has more or fewer fields than the header. Put text that holds a comma in quotes.")
    line = {name: value.strip() for name, value in line.items()}
    for name in NEEDED:
        if not line[name]:
            raise ValueError(f"`{name}` is empty.")
    task = line.get("task") or "fill"
    if task not in TASKS:
        raise ValueError(f"`task` is {task!r}; expected one of {TASKS}.")
    seed = line.get("seed") or "0"
    if not re.fullmatch(r"\d{1,9}", seed):
        raise ValueError(f"`seed` is {seed!r}; expected a whole number from 0 to 999999999.")
    image = _open(folder / line["image"], "image")
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"`image` has mode {image.mode!r}; expected grey or colour of 8 bits. Save it as such a PNG.")
    size = image.size[::-1]
    inside = check_mask(np.asarray(_open(folder / line["mask"], "mask")), size)
    label_map = None
    if line.get("label_map"):
        label_map = check_label_map(np.asarray(_open(folder / line["label_map"], "label_map")), inside)
        label_map = Image.fromarray(label_map)
    mask = Image.fromarray(inside.astype(np.uint8) * 255)
    # a data-use agreement that the name of a file speaks of holds, also where nobody wrote it down
    source = line.get("source") or "+".join(find_agreements(line["image"])) or "own"
    texts = (task, line.get("prompt") or "", line["case_id"], int(seed), line.get("modality") or "medical", source)
    return Case(image, mask, label_map, *texts)


def _open(path: Path, name: str) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"`{name}` is {str(path)!r}, where there is no file. Paths are relative to the table.")
    with Image.open(path) as picture:
        picture.load()
        return picture


def paint(client: Client, case: Case, adapter: str, steps: int, guidance: float, folder: Path) -> Image.Image:
    """The picture that an adapter makes of a case: from an earlier run, or from the Space."""
    pictures = {name: getattr(case, name) for name in ("image", "mask", "label_map")}
    contents = [b"" if picture is None else to_png(picture)["bytes"] for picture in pictures.values()]
    wishes = (case.task, case.prompt, str(case.seed), adapter, str(steps), str(guidance))
    kept = folder / f"{content_id(*wishes, *contents)}.png"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in zip(pictures, contents, strict=True):
                Path(scratch, f"{name}.png").write_bytes(content)
            files = {
                name: None if picture is None else handle_file(str(Path(scratch, f"{name}.png")))
                for name, picture in pictures.items()
            }
            made = _patient(
                client,
                **files,
                task=case.task,
                prompt=case.prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=case.seed,
                num_images=1,
                adapter=adapter,
                adapter_strength=1.0,
            )
        (entry,) = made[0]
        with whole_file(kept) as partial:
            shutil.copyfile(entry["image"] if isinstance(entry, dict) else entry, partial)
    return _open(kept, "candidate")


def _patient(client: Client, **arguments):
    """Ask the Space to paint, as often as it lets us."""
    while True:
        try:
            return client.predict(api_name="/generate", **arguments)
        except httpx.HTTPError as error:
            raise ValueError(
                f"The Space does not answer any more ({error}). Run the same command again: what is painted is kept."
            ) from error
        except AppError as error:
            if (wait := WAIT.search(str(error))) is None:
                raise ValueError(f"The Space refuses: {error}") from error
            time.sleep(int(wait[1]) + 1)


def candidates_of(client, cases: list[Case], adapters: list[str], steps: int, guidance: float, folder: Path):
    """
    Let the Space paint every case by every adapter.

    Returns:
        `datasets.Dataset`: rows of `CANDIDATE_FEATURES`.
    """
    rows = []
    with tqdm(total=len(cases) * len(adapters), desc="Painting", unit="image") as bar:
        for case in cases:
            nothing = Image.new("L", case.image.size)
            for adapter in adapters:
                picture = paint(client, case, adapter, steps, guidance, folder)
                row = {"image": case.image, "mask": case.mask, "label_map": case.label_map or nothing, "target": None}
                row |= {"prompt": case.prompt, "task": case.task, "modality": case.modality, "case_id": case.case_id}
                row |= {"source": case.source, "condition": "", "candidate": picture, "model": model_name(adapter)}
                rows.append(row | {"seed": case.seed})
                bar.update()
    return datasets.Dataset.from_list(rows, features=CANDIDATE_FEATURES)


def model_name(adapter: str) -> str:
    """What votes call an adapter."""
    return Path(adapter).name


def run(arguments: argparse.Namespace) -> None:
    """Read, paint, make the study, and say how it goes on."""
    output = arguments.output
    names = [model_name(adapter) for adapter in arguments.adapters]
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"--adapters is {arguments.adapters}; two or more are wanted, with different last names.")
    if (output / "study.json").exists():
        raise ValueError(f"{output} holds a study already. Name another folder.")
    settings = StudySettings(
        title=arguments.title,
        mode=arguments.mode,
        goal=arguments.goal,
        images_per_set=min(4, len(names)),
        organisers=arguments.organiser,
        seed=arguments.seed,
        **{
            name: getattr(arguments, name).read_text(encoding="utf-8")
            for name in ("instructions", "consent")
            if getattr(arguments, name) is not None
        },
    )
    cases = read_cases(arguments.table)
    painted = output.with_name(f"{output.name}-painted")
    try:
        client = Client(arguments.space, verbose=False, httpx_kwargs={"timeout": 120})
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise ValueError(f"No Space answers at {arguments.space}: {error}. Start one, or correct --space.") from error
    candidates = candidates_of(client, cases, arguments.adapters, arguments.steps, arguments.guidance, painted)
    make_study(output, candidates, settings)
    print(f"Wrote {output}: {len(cases)} cases, {len(candidates)} images. Research use only, not for clinical use.")
    if arguments.publish is None:
        print(f"Start it with\n\n    ONEREWARD_STUDY={output.resolve()} python {HERE / 'app.py'}\n")
        return
    with tempfile.TemporaryDirectory() as scratch:
        space = Path(scratch, "space")
        shutil.copytree(HERE, space, ignore=shutil.ignore_patterns("data", "study", "__pycache__"))
        shutil.copytree(output, space / "study")
        done = publish("space", space, arguments.publish, private=arguments.private)
    print(f"Published version {done.version}: {done.url}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("table", type=Path, help="CSV file")
    options.add_argument("output", type=Path, help="folder that gets the study")
    options.add_argument("--space", default="http://127.0.0.1:7860", help="address or Hub id of a running Space")
    options.add_argument("--adapters", nargs="+", required=True, help="base, names of the Space, or Hub ids")
    options.add_argument("--steps", type=int, default=20, help="denoising steps")
    options.add_argument("--guidance", type=float, default=2.0, help="weight of guidance; 1 is off")
    options.add_argument("--mode", choices=("pairs", "best_worst"), default="pairs", help="what raters are asked")
    options.add_argument("--title", default=StudySettings().title, help="heading")
    options.add_argument("--goal", type=int, default=StudySettings().goal, help="answers wanted of each rater")
    options.add_argument("--organiser", nargs="*", default=(), help="accounts that see results")
    options.add_argument("--instructions", type=Path, help="Markdown file that raters read")
    options.add_argument("--consent", type=Path, help="Markdown file that raters agree to")
    options.add_argument("--seed", type=int, default=0, help="seed of what is asked when")
    options.add_argument("--publish", metavar="ORG/SPACE", help="publish this Space with the study")
    options.add_argument("--private", action="store_true", help="as a private one")
    return options


if __name__ == "__main__":
    try:
        run(parser().parse_args())
    except (ValueError, OSError, csv.Error) as problem:
        sys.exit(f"Error: {problem}")
