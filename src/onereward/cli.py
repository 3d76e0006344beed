"""The `onereward` command. Research use only, not for clinical use."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from onereward import __version__
from onereward.data.whole_file import write_json


# Heavy imports stay inside the commands, so that `onereward --help` answers at once.
app = typer.Typer(
    help="Preference-tuned, mask-guided medical image generation. Research use only, not for clinical use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

preferences = typer.Typer(help="Votes of raters.", no_args_is_help=True)
app.add_typer(preferences, name="preferences")

study = typer.Typer(help="Studies: what raters are asked.", no_args_is_help=True)
app.add_typer(study, name="study")

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
    source: Annotated[str | None, typer.Option(help="Name of the data set.")] = None,
    agreement: Annotated[
        list[str] | None,
        typer.Option(help="Data-use agreement, in a sentence with whose and where. May be repeated."),
    ] = None,
) -> None:
    """
    Bring a folder of images and masks into the row schema, split by case into train and test.

    What is under a data-use agreement is marked, and so is all that is made from it: MIMIC, ADNI, OAI, OASIS and BraTS
    are known by the names of the folder, its files and --source; for others use --agreement.
    """
    from onereward.data.folder import load_folder, read_brisc
    from onereward.data.schema import split_by_case
    from onereward.hub.agreements import find_agreements
    from onereward.hub.provenance import write_provenance

    if layout not in ("imagefolder", "brisc"):
        raise ValueError(f"--layout is {layout!r}, but it must be imagefolder or brisc.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output is {str(output)!r}, which is not empty. Name another folder, or delete it.")
    source = source or ("brisc" if layout == "brisc" else "folder")
    files = (path.name for path in folder.rglob("*")) if folder.is_dir() else ()
    known = find_agreements(source, str(folder), *files)
    if unsaid := [name for name in known if name not in find_agreements(source)]:
        source += f" ({', '.join(unsaid)})"  # the rows say it themselves, should they be parted from the file
    rows = load_folder(
        folder,
        size=size,
        task=task,
        modality=modality,
        mode="RGB" if color else "L",
        margin=margin,
        mask_threshold=mask_threshold,
        source=source,
        metadata=read_brisc(folder, task) if layout == "brisc" else None,
    )
    parts = split_by_case(rows, {"train": 1 - test_fraction, "test": test_fraction}, seed)
    partial = output.with_name(f"{output.name}.partial")
    parts.save_to_disk(partial)
    sizes = {name: {"num_rows": len(part), "num_cases": len(set(part["case_id"]))} for name, part in parts.items()}
    record = write_provenance(
        partial,
        "dataset",
        parents=[],
        config={"layout": layout, "size": size, "task": task, "modality": modality, "color": color, "margin": margin},
        seed=seed,
        agreements=[*known, *(agreement or ())],
        sources=[source],
        num_rows=len(rows),
        num_cases=len(set(rows["case_id"])),
        splits=sizes,
    )
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    counts = ", ".join(f"{size['num_rows']} rows of {size['num_cases']} cases for {n}" for n, size in sizes.items())
    typer.echo(f"Wrote {output}: {counts}.")
    if record["agreements"]:
        typer.echo(
            f"Under agreement: {'; '.join(record['agreements'])}. What is made from it is published only in private "
            "or with permission."
        )


@app.command()
def provenance(
    name: Annotated[str, typer.Argument(help="Hub id, folder or file of an adapter, a reward model, votes, ...")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    repo_type: Annotated[str, typer.Option(help="model, dataset or space.")] = "model",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what something was made from: back from an adapter to reward model, votes, base and data."""
    import json
    from dataclasses import asdict

    from onereward.hub.provenance import trace

    if repo_type not in ("model", "dataset", "space"):
        raise ValueError(f"--repo-type is {repo_type!r}, but it must be model, dataset or space.")
    tree = trace(name, revision, repo_type)
    typer.echo(json.dumps(asdict(tree), indent=2) if as_json else str(tree))


@app.command()
def publish(
    kind: Annotated[str, typer.Argument(help="pipeline, adapter, reward-model, dataset, votes, space or vae.")],
    path: Annotated[Path, typer.Argument(help="What was saved: a folder; of votes a Parquet or SQLite file.")],
    repo: Annotated[str, typer.Argument(help="Where on the Hub: org/name.", metavar="ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository first.")] = False,
    gated: Annotated[bool, typer.Option("--gated", help="Readers must ask first.")] = False,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made where it is missing.")] = None,
    release_version: Annotated[str | None, typer.Option(help="Semantic version; else the next patch number.")] = None,
    changes: Annotated[str | None, typer.Option(help="What is new, for the changelog.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the pipeline that an adapter is for, or a Space loads.")
    ] = None,
    about: Annotated[Path | None, typer.Option(help="YAML file: authors, licence and the like.")] = None,
    permission: Annotated[
        str | None, typer.Option(help="Who permits what a data-use agreement forbids, and where that is written.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask no network: list files, sizes and card.")] = False,
) -> None:
    """Publish on the Hub, in one commit: all of it, checked before, or nothing."""
    from onereward.hub.about import read_about
    from onereward.hub.publish import publish as publish_artefact

    done = publish_artefact(
        kind,
        path,
        repo,
        private=private,
        gated=gated,
        create_pr=pull_request,
        revision=revision,
        version=release_version,
        changes=changes,
        base_model=base_model,
        about=None if about is None else read_about(about),
        permission=permission,
        dry_run=dry_run,
    )
    if dry_run:
        for name, size in sorted(done.files.items()):
            typer.echo(f"{size:>13,}  {name}")
        typer.echo(f"{sum(done.files.values()):>13,}  in all, as version {done.version} of {repo}")
        for name in done.left_out:
            typer.echo(f"    left out:  {name}")
        typer.echo(f"\n{done.card}\nNothing was sent.")
        return
    for name in done.removed:
        typer.echo(f"Removed {name}, which is no longer part of it.")
    if done.unchanged:
        typer.echo(f"All of it was there already, as version {done.version}: nothing was sent.")
    else:
        typer.echo(f"Published version {done.version}. Research use only, not for clinical use.")
    typer.echo(done.url)


@app.command()
def generate(
    pipeline: Pipeline,
    image: Annotated[Path, typer.Argument(help="The source: PNG, JPEG, NIfTI, DICOM, or a folder of a DICOM series.")],
    mask: Annotated[Path, typer.Argument(help="The mask on the grid of the source: white or 1 = repaint.")],
    output: Annotated[
        Path, typer.Option(help=".png, .nii.gz or .dcm; without an ending a new folder of DICOM files.")
    ] = Path("synthetic.png"),
    task: Annotated[str, typer.Option(help="fill, remove or extend.")] = "fill",
    prompt: Annotated[str | None, typer.Option(help="What to paint.")] = None,
    label_map: Annotated[
        Path | None, typer.Option(help="What to put where: PNG or NIfTI whose values are labels.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the pipeline on the Hub.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter: a folder or a Hub id.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter.")] = None,
    adapter_strength: Annotated[float, typer.Option(help="0 is without the adapter, 1 as it was trained.")] = 1.0,
    slice: Annotated[
        int | None, typer.Option(help="Slice of a volume, from 0 at the feet, back or left; that with most mask.")
    ] = None,
    axis: Annotated[str, typer.Option(help="Slices of a volume: axial, coronal or sagittal.")] = "axial",
    all_slices: Annotated[bool, typer.Option("--all-slices", help="Repaint every slice that has a mask.")] = False,
    window_center: Annotated[
        float | None,
        typer.Option(help="Number (HU in CT) that the model sees as middle grey; by the file or its values."),
    ] = None,
    window_width: Annotated[float | None, typer.Option(help="Distance of black and white in these numbers.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance: Annotated[float, typer.Option(help="Weight of guidance; 1 is off.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    """
    Repaint the masked part of an image or scan. Outside the mask every number stays as it was.

    The file says that it is synthetic, and by which model; all settings are in NAME.provenance.json beside it.
    """
    from onereward.generate import GenerateSettings, run_generate

    if (window_center is None) != (window_width is None):
        raise ValueError("--window-center and --window-width belong together; give both or neither.")
    settings = GenerateSettings(
        pipeline=_pipeline_name(pipeline),
        revision=revision,
        adapter=adapter,
        adapter_revision=adapter_revision,
        adapter_strength=adapter_strength,
        task=task,
        prompt=prompt,
        slice=slice,
        axis=axis,
        all_slices=all_slices,
        window=None if window_center is None else (window_center, window_width),
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=seed,
    )
    for note in run_generate(image, mask, output, settings, label_map):
        typer.echo(f"Note: {note}", err=True)
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


@study.command("make")
def study_make(
    pipeline: Pipeline,
    output: Annotated[Path, typer.Option(help="Folder that gets the study.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter to compare with the pipeline: a folder or a Hub id. Repeatable.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="phantom; a folder of images and masks; rows of `onereward data`; or a Hub id.")
    ] = "phantom",
    split: Annotated[str, typer.Option(help="Split of the rows, where they have any.")] = "test",
    task: Annotated[str, typer.Option(help="fill, remove or extend, where a folder does not say.")] = "fill",
    modality: Annotated[str, typer.Option(help="Modality, where a folder does not say.")] = "medical",
    mask_threshold: MaskThreshold = None,
    num_conditions: Annotated[int, typer.Option(help="Sources to paint on, of many cases.", min=1)] = 50,
    num_images: Annotated[int, typer.Option(help="Images of each source by each model.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance: Annotated[float, typer.Option(help="Weight of guidance; 1 is off.")] = 2.0,
    mode: Annotated[str, typer.Option(help="pairs, best_worst or turing (with the real images).")] = "pairs",
    images_per_set: Annotated[int, typer.Option(help="Images to choose best and worst of.", min=2)] = 4,
    title: Annotated[str, typer.Option(help="Heading.")] = "Which image is better?",
    goal: Annotated[int, typer.Option(help="Answers wanted of each rater.", min=1)] = 100,
    role: Annotated[list[str] | None, typer.Option(help="What raters may be. Repeatable.")] = None,
    organiser: Annotated[list[str] | None, typer.Option(help="Name of who sees results. Repeatable.")] = None,
    instructions: Annotated[Path | None, typer.Option(help="Markdown file that raters read.")] = None,
    consent: Annotated[Path | None, typer.Option(help="Markdown file that raters agree to.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Paint the candidates of a study, by the pipeline and each adapter, and write it to a folder."""
    import datasets
    from huggingface_hub import snapshot_download

    from onereward.evaluate import EvaluateSettings, read_rows
    from onereward.hub.adapters import load_adapter
    from onereward.pipelines import OneRewardMaskPipeline
    from onereward.preferences import StudySettings, make_candidates, make_study
    from onereward.preferences.study_design import REAL, real_candidates, rows_of_many_cases

    if (output / "study.json").exists():
        raise ValueError(f"--output is {str(output)!r}, which holds a study. Name another folder.")
    texts = {"instructions": instructions, "consent": consent}
    settings = StudySettings(
        title=title,
        mode=mode,
        goal=goal,
        images_per_set=images_per_set,
        organisers=organiser or (),
        **({"roles": role} if role else {}),
        **{name: path.read_text(encoding="utf-8") for name, path in texts.items() if path is not None},
        seed=seed,
    )
    models = {}
    for name in adapter or ():
        models[Path(name).name] = name
    if len(models) != len(adapter or ()) or {"base", REAL} & models.keys():
        raise ValueError(f"--adapter is given as {adapter}; names must differ, and be neither base nor {REAL}.")
    pipe = OneRewardMaskPipeline.from_pretrained(_pipeline_name(pipeline))
    wanted = EvaluateSettings(
        pipeline, num_cases=num_conditions, task=task, modality=modality, mask_threshold=mask_threshold
    )
    rows = rows_of_many_cases(read_rows(data, split, wanted, pipe), num_conditions, seed)
    candidates = [real_candidates(rows)] if mode == "turing" else []
    for model, name in {"base": None, **models}.items():
        if name is not None:
            typer.echo(f"Adapter {model}")
            patterns = ["*.safetensors", "*.json"]
            folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=patterns)
            load_adapter(pipe, folder, adapter_name=f"adapter_{len(candidates)}")
        candidates.append(
            make_candidates(
                pipe,
                rows,
                num_images,
                0,
                num_inference_steps=(steps, steps),
                guidance_scale=(guidance, guidance),
                seed=seed,
                model=model,
            )
        )
    make_study(output, datasets.concatenate_datasets(candidates), settings)
    typer.echo(f"Wrote {output}: {len(rows)} conditions, {mode}. Research use only, not for clinical use.")


@study.command("export")
def study_export(
    folder: Annotated[Path, typer.Argument(help="Folder of the study, or of what came in.")],
    output: Annotated[Path, typer.Option(help="Parquet file to write.")],
    votes: Annotated[Path | None, typer.Option(help="File of the votes, if it is another one.")] = None,
) -> None:
    """Write the votes of a study to one Parquet file. It may go on meanwhile."""
    from onereward.preferences import VoteStore

    path = folder / "votes.sqlite" if votes is None else votes
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; give the folder in which votes.sqlite lies, or --votes.")
    with VoteStore(path) as store:
        number = store.export(output)
    typer.echo(f"Wrote {output}: {number} votes. Research use only, not for clinical use.")


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
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
