"""The `onereward` command. Research use only, not for clinical use."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from onereward import __version__
from onereward.data.whole_file import whole_file, write_json


# Heavy imports stay inside the commands, so that `onereward --help` answers at once.
app = typer.Typer(
    help="Preference-tuned, mask-guided medical image generation. Research use only, not for clinical use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

preferences = typer.Typer(help="Votes of raters.", no_args_is_help=True)
app.add_typer(preferences, name="preferences")

BASE = Path("pipelines/onereward-brats")


def default_pipeline() -> str:
    """The base that comes with the sources: here, or beside the package."""
    beside = Path(__file__).resolve().parents[2] / BASE
    return str(beside if beside.is_dir() and not BASE.is_dir() else BASE)


Pipeline = Annotated[
    str, typer.Option(help="Pipeline to use: a folder or a Hub id.", default_factory=default_pipeline)
]


MaskThreshold = Annotated[
    int | None, typer.Option(help="Masks are white above this grey value; else they must be black and white.")
]


def version(value: bool) -> None:
    """Shows the version, and ends."""
    if value:
        typer.echo(f"onereward {__version__}. Research use only, not for clinical use.")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options that stand before the name of a command."""


@app.command()
def demo(
    pipeline: Pipeline,
    data: Annotated[
        Path | None, typer.Option(help="Rows that `onereward data` wrote; the built-in phantom if left out.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    restart: Annotated[bool, typer.Option(help="Delete what an earlier run left there.")] = False,
) -> None:
    """Run the whole loop: votes, reward model, DDPO, evaluation on unseen cases, report. About 8 minutes."""
    from onereward.demo import DemoSettings, run_demo

    if data is not None and not data.is_dir():
        raise ValueError(f"--data is {str(data)!r}, which is no folder. Write one with `onereward data`.")
    settings = DemoSettings(pipeline=_pipeline_name(pipeline), data=None if data is None else str(data), seed=seed)
    try:
        run_demo(output, settings, restart)
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What is finished is kept in {output}: run the same command again to go on.", err=True)
        raise typer.Exit(130) from None


@app.command()
def data(
    folder: Annotated[Path, typer.Argument(help="Folder of images and masks.")],
    output: Annotated[Path, typer.Option(help="Folder to write the rows to.")],
    layout: Annotated[str, typer.Option(help="imagefolder, or brisc for a BRISC 2025 sample.")] = "imagefolder",
    size: Annotated[int, typer.Option(help="Height and width of the rows in pixels.")] = 64,
    task: Annotated[str, typer.Option(help="fill, remove or extend, where the metadata does not say.")] = "fill",
    modality: Annotated[str, typer.Option(help="Modality, where the metadata does not say.")] = "medical",
    color: Annotated[bool, typer.Option(help="Keep colours.")] = False,
    margin: Annotated[float, typer.Option(help="Pixels that masks are grown by.")] = 0.0,
    mask_threshold: MaskThreshold = None,
    test_fraction: Annotated[float, typer.Option(help="Share of the cases that are kept unseen.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Bring a folder of images and masks into the row schema, split by case into train and test."""
    from onereward.data.folder import load_folder, read_brisc
    from onereward.data.schema import split_by_case

    if layout not in ("imagefolder", "brisc"):
        raise ValueError(f"--layout is {layout!r}, but it must be imagefolder or brisc.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output is {str(output)!r}, which is not empty. Name another folder, or delete it.")
    rows = load_folder(
        folder,
        size=size,
        task=task,
        modality=modality,
        mode="RGB" if color else "L",
        margin=margin,
        mask_threshold=mask_threshold,
        metadata=read_brisc(folder, task) if layout == "brisc" else None,
    )
    parts = split_by_case(rows, {"train": 1 - test_fraction, "test": test_fraction}, seed)
    partial = output.with_name(f"{output.name}.partial")
    parts.save_to_disk(partial)
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    counts = ", ".join(f"{len(part)} rows of {len(set(part['case_id']))} cases for {n}" for n, part in parts.items())
    typer.echo(f"Wrote {output}: {counts}.")


@app.command()
def generate(
    pipeline: Pipeline,
    image: Annotated[Path, typer.Argument(help="The source, PNG or JPEG.")],
    mask: Annotated[Path, typer.Argument(help="The mask, of the same size: white = repaint.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("synthetic.png"),
    task: Annotated[str, typer.Option(help="fill, remove or extend.")] = "fill",
    prompt: Annotated[str | None, typer.Option(help="What to paint.")] = None,
    label_map: Annotated[Path | None, typer.Option(help="PNG whose grey values are labels.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter: a folder or a Hub id.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Weight of guidance; 1 is off.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    """Repaint the masked part of one image. Every pixel outside the mask stays as it was."""
    import torch
    from PIL import Image, ImageOps
    from PIL.PngImagePlugin import PngInfo

    from onereward.hub.adapters import load_adapter
    from onereward.pipelines import OneRewardMaskPipeline

    def read(path: Path):
        if not path.is_file():
            raise ValueError(f"there is no file {str(path)!r}.")
        return ImageOps.exif_transpose(Image.open(path))

    if output.suffix.lower() != ".png":
        raise ValueError(f"--output is {str(output)!r}, but a name that ends in .png is wanted: it loses no pixel.")
    source, mask_image = read(image), read(mask)
    labels = None if label_map is None else read(label_map)
    pipe = OneRewardMaskPipeline.from_pretrained(_pipeline_name(pipeline))
    if adapter is not None:
        if os.path.isdir(adapter):
            load_adapter(pipe, adapter)
        else:
            pipe.load_lora_weights(adapter)
    work_size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    result = pipe(
        prompt,
        source,
        mask_image,
        labels,
        task=task,
        height=work_size,
        width=work_size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    marks = PngInfo()
    marks.add_text("Software", f"onereward {__version__}")
    marks.add_text("Comment", f"SYNTHETIC: {task} by {Path(pipeline).name}, seed {seed}. Not for clinical use.")
    with whole_file(output) as partial:
        result.save(partial, format="png", pnginfo=marks)
    typer.echo(f"Wrote {output}. Synthetic, research use only, not for clinical use.")


@app.command()
def evaluate(
    pipeline: Pipeline,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter to compare with the pipeline: a folder or a Hub id.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Two adapters to compare with each other.", metavar="A B")
    ] = None,
    data: Annotated[
        str, typer.Option(help="phantom; a folder of images and masks; rows of `onereward data`; or a Hub id.")
    ] = "phantom",
    split: Annotated[str, typer.Option(help="Split of the rows, where they have any.")] = "test",
    train_data: Annotated[
        str | None, typer.Option(help="What it was trained on, as --data: to tell whether it was memorised.")
    ] = None,
    votes: Annotated[
        str | None, typer.Option(help="Votes of a reader study whose models have the names of base and adapters.")
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(help="Image model whose features tell distributions apart; the built-in phantom64.")
    ] = None,
    num_cases: Annotated[int, typer.Option(help="Cases of the phantom.", min=2)] = 48,
    task: Annotated[str, typer.Option(help="fill, remove or extend, where a folder does not say.")] = "fill",
    modality: Annotated[str, typer.Option(help="Modality, where a folder does not say.")] = "medical",
    mask_threshold: MaskThreshold = None,
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/evaluation"),
    num_seeds: Annotated[int, typer.Option(help="Pictures of each row.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance: Annotated[float, typer.Option(help="Weight of guidance; 1 is off.")] = 2.0,
    reward: Annotated[
        list[str] | None, typer.Option(help="What it was tuned on, beside what its card says. May be repeated.")
    ] = None,
    resamples: Annotated[int, typer.Option(help="Draws of each interval.", min=100)] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the pictures and the draws.")] = 0,
    card: Annotated[bool, typer.Option(help="Write the figures into the adapters' cards.")] = False,
    restart: Annotated[bool, typer.Option(help="Delete what an earlier run left there.")] = False,
) -> None:
    """Say how good a pipeline or adapter is on unseen cases, with intervals: one page, and JSON."""
    from onereward.evaluate import EvaluateSettings, run_evaluate

    if adapter is not None and compare is not None:
        raise ValueError("--adapter and --compare are both given; name one adapter, or two to compare.")
    settings = EvaluateSettings(
        pipeline=_pipeline_name(pipeline),
        adapters=compare or ((adapter,) if adapter else ()),
        data=data,
        split=split,
        train_data=train_data,
        votes=votes,
        extractor=extractor,
        num_cases=num_cases,
        task=task,
        modality=modality,
        mask_threshold=mask_threshold,
        seeds=tuple(range(seed, seed + num_seeds)),
        num_inference_steps=steps,
        guidance_scale=guidance,
        rewards=tuple(reward or ()),
        resamples=resamples,
        seed=seed,
    )
    try:
        run_evaluate(output, settings, restart, card)
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What is painted is kept in {output}: run the same command again to go on.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"Wrote {output / 'report.html'}. Research use only, not for clinical use.")


@app.command()
def brats2023(
    predictions: Annotated[Path, typer.Argument(help="Folder with {case}-t1n-inference.nii.gz.")],
    data: Annotated[Path, typer.Argument(help="Training data of the challenge, a folder a case.")],
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure BraTS local synthesis: the official figures of 2023, and an honest reading beside them."""
    from onereward.evaluation.bootstrap import plain
    from onereward.evaluation.brats2023 import measure_folders

    found = plain(measure_folders(predictions, data))
    for mode in ("brats2023", "composite"):
        typer.echo(f"{mode}: {len(found['cases'])} cases, 95 % intervals by patient")
        for name, figure in found[mode].items():
            interval = "" if figure["low"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"
            value = "undefined" if figure["value"] is None else f"{figure['value']:.4g}"
            typer.echo(f"  {name:12} {value}{interval}, {figure['n_failed']} failed")
    if output is not None:
        write_json(output, found)
    typer.echo("Research use only, not for clinical use.")


@preferences.command()
def report(
    votes: Annotated[Path, typer.Argument(help="Parquet file of votes.")],
    output: Annotated[Path, typer.Option(help="Folder that gets report.html.")],
    known: Annotated[
        Path | None,
        typer.Option(help="CSV file of calibration items with the columns pair_id, criterion and label_0."),
    ] = None,
    keep_good: Annotated[bool, typer.Option(help="Leave bad rows out, and list them, instead of refusing.")] = False,
    resamples: Annotated[int, typer.Option(help="Draws of each bootstrap interval.", min=100)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Write one page on votes: who agrees, what each rater's votes are worth, and which model is better."""
    from onereward.preferences.preference_report import preference_report, read_known, read_rows

    rows, refused = read_rows(votes, keep_good)
    answers = None if known is None else read_known(known)
    page = preference_report(
        rows, output, title=f"Votes: {votes.name}", refused=refused, known=answers, resamples=resamples, seed=seed
    )
    typer.echo(f"Wrote {page}. Research use only, not for clinical use.")


def _pipeline_name(name: str) -> str:
    """A folder that exists, or what may be a Hub id; a path that leads nowhere is refused before the Hub is asked."""
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") != 1 or name == str(BASE)):
        raise ValueError(f"--pipeline is {name!r}, which is neither a folder nor a Hub id such as 'org/name'.")
    return name


def main() -> None:
    """Runs the command; what is wrong with its input is said in one line, with exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
