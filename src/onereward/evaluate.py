"""`onereward evaluate`: from the names of a pipeline, adapters and data to one page that a reviewer would accept."""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard, snapshot_download
from tqdm.auto import tqdm

from onereward.data.folder import load_folder
from onereward.data.load import load_rows
from onereward.data.schema import rows_to_tensors
from onereward.data.whole_file import write_json
from onereward.evaluation.baselines import constant_fill
from onereward.evaluation.bootstrap import plain
from onereward.evaluation.clinical_features import compare_features, feature_figure, feature_table, label_regions
from onereward.evaluation.distributions import compare_distributions
from onereward.evaluation.features import Phantom64, TransformersFeatures, collect_features
from onereward.evaluation.figures import picture_grid
from onereward.evaluation.memorisation import ImageSet, check_memorisation
from onereward.evaluation.page import differences_plot, worst_rows, write_page
from onereward.evaluation.painters import (
    SHARD,
    Painter,
    describe,
    paint_and_measure,
    pipeline_painter,
    put_side_by_side,
    read_picture,
    read_shard,
)
from onereward.evaluation.perceptual import load_lpips
from onereward.evaluation.reader_study import turing_test, win_rate
from onereward.evaluation.segmenter import load_segmenter
from onereward.hub.adapters import denoiser_of, load_adapter
from onereward.hub.cards import save_card, table, with_section
from onereward.hub.environment import current_environment, source_commit
from onereward.pipelines import OneRewardMaskPipeline
from onereward.preferences import load_votes


# Rewards that measure what an evaluation measures too: name -> how such measures begin, or end.
MEASURED_TOO = {
    "mask_adherence": ("fill_dice",),
    "background_preservation": ("outside_changed_pixels",),
    "negative_mae": ("_mae",),
    "ssim": ("_ssim",),
}


BASELINE = "constant fill"  # what nobody should be worse than


@dataclass(frozen=True)
class EvaluateSettings:
    r"""
    What [`run_evaluate`] does.

    Args:
        pipeline (`str`):
            Folder or Hub id of the pipeline.
        adapters (`tuple[str, ...]`, *optional*, defaults to `()`):
            Folders or Hub ids of adapters. One is compared with the pipeline without it, two with each other.
        data (`str`, *optional*, defaults to `"phantom"`):
            `"phantom"`; a folder of images and masks; rows that `onereward data` wrote; or a data set on the Hub.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the rows, where they have any.
        train_data (`str`, *optional*):
            What the pipeline or adapter was trained on, as `data`; its split `"train"`. Needed to tell memorisation.
        votes (`str`, *optional*):
            Votes of a reader study, a Parquet file or a data set on the Hub, whose models have the names of the
            painters: `base` and the adapters' folders. With a model `real`, it is a visual Turing test, too.
        extractor (`str`, *optional*):
            Folder or Hub id of an image model of transformers whose features tell distributions apart. The built-in
            `phantom64` when not given.
        num_cases (`int`, *optional*, defaults to 48):
            Cases of the phantom.
        task, modality (`str`, *optional*):
            Those of a folder whose metadata does not say.
        mask_threshold (`int`, *optional*):
            Grey value above which the masks of a folder are white, see [`~onereward.data.folder.load_folder`].
        seeds (`tuple[int, ...]`, *optional*, defaults to `(0,)`):
            A picture of each row is painted for each.
        num_inference_steps (`int`, *optional*, defaults to 20):
            Denoising steps.
        guidance_scale (`float`, *optional*, defaults to 2.0):
            Weight of classifier-free guidance, as `onereward generate` has it.
        rewards (`tuple[str, ...]`, *optional*, defaults to `()`):
            What the adapters were tuned on, beside what their cards say. Measures of the same kind are no result.
        resamples (`int`, *optional*, defaults to 2000):
            Draws of each interval.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
    """

    pipeline: str
    adapters: tuple[str, ...] = ()
    data: str = "phantom"
    split: str = "test"
    train_data: str | None = None
    votes: str | None = None
    extractor: str | None = None
    num_cases: int = 48
    task: str = "fill"
    modality: str = "medical"
    mask_threshold: int | None = None
    seeds: tuple[int, ...] = (0,)
    num_inference_steps: int = 20
    guidance_scale: float = 2.0
    rewards: tuple[str, ...] = ()
    resamples: int = 2000
    seed: int = 0


def run_evaluate(
    output_dir: str | os.PathLike, settings: EvaluateSettings, restart: bool = False, write_cards: bool = False
) -> dict:
    """
    Paints unseen rows, measures and compares, and writes `report.html`, `results.json` and the pictures. A run that
    was stopped goes on where it was.

    Args:
        output_dir (`str` or `os.PathLike`):
            Where everything goes.
        settings ([`EvaluateSettings`]):
            What to do.
        restart (`bool`, *optional*, defaults to `False`):
            Whether to delete what an earlier run left in `output_dir`.
        write_cards (`bool`, *optional*, defaults to `False`):
            Whether to write the figures into the cards of the adapters that are local folders, as `model-index`.

    Returns:
        `dict`: what `results.json` holds.

    Raises:
        `ValueError`: when `output_dir` holds a run with other settings, there are more than two adapters, or the data
            does not fit the pipeline.
    """
    folder = Path(output_dir)
    if restart and _settings_in(folder):
        shutil.rmtree(folder)
    if len(settings.adapters) > 2:
        raise ValueError(f"`adapters` names {len(settings.adapters)}; expected at most two, which are compared.")
    _check_settings(folder, settings)

    pipeline = OneRewardMaskPipeline.from_pretrained(settings.pipeline)
    rows = read_rows(settings.data, settings.split, settings, pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", plain(asdict(settings)))
    painters, names = make_painters(pipeline, settings)
    segmenter, warnings = judge_for(rows), []
    if segmenter is None:
        warnings.append(
            "These pictures are not of the kind that the held-out judge knows: whether label maps are followed and "
            "lesions removed was not measured."
        )
    tuned_on = sorted({*settings.rewards, *(reward for name in names.values() for reward in rewards_of(name))})
    was_reward = [measure for reward in tuned_on for measure in MEASURED_TOO.get(reward, (reward,))]

    perceptual = load_lpips() if has_lpips() else None
    data, started = describe(rows, settings.seeds), time.monotonic()
    found = paint_and_measure(painters, rows, folder, data, segmenter, perceptual)
    results = put_side_by_side(found, data, was_reward, settings.resamples, settings.seed)
    results["seconds"] = round(time.monotonic() - started, 1)
    beaten = [name for name, entry in results["measures"].items() if _verdict(entry, BASELINE) == "better"]
    if beaten:
        warnings.append(
            f"A constant fill is better than {results['reference']} by {', '.join(beaten)}: for such pictures it was "
            "not made, or not trained enough."
        )
    labels = pipeline.config.labels
    extractor = Phantom64() if settings.extractor is None else TransformersFeatures(settings.extractor)
    results["distributions"] = compare_all_distributions(folder, rows, results, extractor)
    results["clinical_features"], tables = compare_clinical_features(folder, rows, results, segmenter)
    if settings.votes is not None:
        results["reader_study"] = read_study(settings.votes, results)
    train_rows = None
    if settings.train_data is not None:
        train_rows = read_rows(settings.train_data, "train", settings, pipeline)
        results["memorisation"] = check_all_memorisation(folder, rows, train_rows, results, extractor)
    results |= {
        "title": f"Evaluation: {', '.join(painters)}",
        "settings": _without_paths(settings) | {"tuned on": tuned_on or "nothing that is known"},
        "baselines": [BASELINE],
        "weights": weights_of(pipeline),
        "environment": current_environment(),
        "commit": source_commit(),
        "warnings": warnings,
        "limits": limits_of(settings, results),
    }
    results = plain(results)
    write_json(folder / "results.json", results)
    pictures = make_pictures(folder, rows, results, found, labels, tables, train_rows)
    write_page(folder / "report.html", results, pictures)
    if write_cards:
        for painter, adapter in names.items():
            if Path(adapter).is_dir():
                write_model_index(adapter, painter, results)
    return results


def _verdict(entry: dict, painter: str) -> str:
    return entry["differences"][painter]["verdict"]


def read_rows(data: str, split: str, settings: EvaluateSettings, pipeline) -> datasets.Dataset:
    """Rows of a data set by its name; a plain folder of images and masks is brought to the pipeline's size."""
    path = Path(data)
    if data == "phantom":
        return load_rows(data, split, num_cases=settings.num_cases)
    if any((path / name).exists() for name in ("images", "metadata.csv", "metadata.jsonl")):
        return load_folder(
            path,
            size=pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
            task=settings.task,
            modality=settings.modality,
            mode="L" if pipeline.vae.config.in_channels == 1 else "RGB",
            mask_threshold=settings.mask_threshold,
        )
    return load_rows(data, split)


def make_painters(pipeline, settings: EvaluateSettings) -> tuple[dict[str, Painter], dict[str, str]]:
    """The painters by name, the first of which is the reference, and which of them is which adapter."""
    names = {}
    for adapter in settings.adapters:
        name = Path(adapter).name
        names[name if name not in names else f"{name}-2"] = adapter
    for number, adapter in enumerate(names.values()):
        folder = adapter
        if not Path(adapter).is_dir():
            folder = snapshot_download(adapter, allow_patterns=["*.safetensors", "*.json", "*.md"])
        load_adapter(pipeline, folder, adapter_name=f"adapter_{number}")
    paint = pipeline_painter(
        pipeline, num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale
    )

    def with_adapter(adapter_name):
        def painter(rows, seeds):
            denoiser_of(pipeline).eval()
            if names:
                pipeline.enable_lora() if adapter_name else pipeline.disable_lora()
            if adapter_name:
                pipeline.set_adapters(adapter_name)
            return paint(rows, seeds)

        return painter

    painters = {name: with_adapter(f"adapter_{number}") for number, name in enumerate(names)}
    if len(painters) < 2:
        painters = {"base": with_adapter(None)} | painters

    def constant(rows, seeds):
        tensors = rows_to_tensors([{**row, "target": None} for row in rows])
        return constant_fill(tensors["images"], tensors["masks"])

    return painters | {BASELINE: constant}, names


def judge_for(rows: datasets.Dataset):
    """The held-out judge, or `None` for pictures of another kind than it was trained on."""
    segmenter = load_segmenter()
    size, known = rows[0]["image"].size, set(segmenter.modalities)
    return segmenter if set(rows["modality"]) <= known and size == (segmenter.image_size,) * 2 else None


def rewards_of(adapter: str) -> list[str]:
    """What an adapter was tuned on, as far as its card says: `rewards` of its metadata."""
    card = Path(adapter, "README.md")
    return sorted(ModelCard.load(card).data.to_dict().get("rewards", [])) if card.is_file() else []


def has_lpips() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("lpips") is not None


def weights_of(pipeline) -> dict[str, str]:
    """16 hexadecimal digits for the weights of each component, those of the adapters among the denoiser's."""
    digests = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            digest = hashlib.sha256()
            for key, value in sorted(component.state_dict().items()):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            digests[name] = digest.hexdigest()[:16]
    return digests


def limits_of(settings: EvaluateSettings, results: dict) -> list[str]:
    """What the figures do not say."""
    limits = [
        "A figure against the truth asks for that one picture; others may be as likely. A sharp picture lies further "
        "from it, pixel by pixel, than a smooth one (https://huggingface.co/papers/1711.06077).",
        "Nothing here was looked at by a radiologist.",
    ]
    if not has_lpips():
        limits.append("LPIPS was not measured: it needs the extra `onereward[lpips]`, which brings torchvision.")
    if results["data"]["cases"] < 20:
        limits.append(f"{results['data']['cases']} cases are few: the intervals are rough.")
    if settings.data == "phantom":
        limits.append("The phantom is one average brain, warped; the judge was trained on it.")
    if settings.train_data is None:
        limits.append("Memorisation was not measured: name the training data with --train-data.")
    return limits


def with_target(rows: datasets.Dataset) -> np.ndarray:
    """Numbers of the rows whose truth is known."""
    targets = rows.select_columns("target").cast_column("target", datasets.Image(decode=False))
    return np.flatnonzero([row["target"] is not None for row in targets])


def held_out(rows: datasets.Dataset, train_rows: datasets.Dataset) -> np.ndarray:
    """Numbers of the rows whose truth is known and whose case was not trained on."""
    known, cases = set(train_rows["case_id"]), rows["case_id"]
    return np.array([i for i in with_target(rows) if cases[int(i)] not in known], dtype=int)


def batches_of(folder: Path, rows: datasets.Dataset, painter: str | None, seed: int, chosen: np.ndarray):
    """Shard by shard the pictures of a painter, or the truths, of the chosen rows, with what they were made for."""
    for start in range(0, len(rows), SHARD):
        inside = [i for i in chosen if start <= i < start + SHARD]
        if not inside:
            continue
        tensors = rows_to_tensors([rows[int(i)] for i in inside])
        images = tensors["targets"]
        if painter is not None:
            images = read_shard(folder / "images" / painter, seed, start)[[i - start for i in inside]]
        yield {
            "images": images,
            "masks": tensors["masks"],
            "label_maps": tensors["label_maps"],
            "case_ids": [rows[int(i)]["case_id"] for i in inside],
            "modalities": [rows[int(i)]["modality"] for i in inside],
        }


def compare_all_distributions(folder: Path, rows: datasets.Dataset, results: dict, extractor) -> dict:
    """How far the repainted regions of each painter are from real ones, as distributions of features."""
    chosen, seed = with_target(rows), results["data"]["seeds"][0]
    if len(set(rows.select(chosen)["case_id"])) < 4:
        return {}
    real = collect_features(extractor, batches_of(folder, rows, None, seed, chosen), description="Real features")
    figures = {}
    for painter in results["painters"]:
        batches = batches_of(folder, rows, painter, seed, chosen)
        generated = collect_features(extractor, batches, description=f"{painter}: features")
        for name, compared in compare_distributions(generated, real, seed=results["data"]["seeds"][0]).items():
            entry = figures.setdefault(name, {"floor": compared.floor, "painters": {}, "matched": {}})
            entry["painters"][painter], entry["matched"][painter] = compared.value, compared.matched
    return {"extractor": real.extractor, "figures": figures}


def compare_clinical_features(
    folder: Path, rows: datasets.Dataset, results: dict, segmenter, most: int = 200
) -> tuple[dict, dict]:
    """
    What a radiologist would measure, of real against repainted regions: sizes, shapes and intensities of the lesions
    that the judge finds, or without a judge the intensities inside the mask. Also the tables, for the plots.
    """
    task = "fill" if "fill" in results["data"]["tasks"] else results["data"]["tasks"][0]
    tasks = rows["task"]
    chosen = np.array([i for i in with_target(rows) if tasks[int(i)] == task][:most])
    if len(set(rows.select(chosen)["case_id"])) < 4:
        return {}, {}
    seed = results["data"]["seeds"][0]

    def table(painter):
        images, regions, cases = [], [], []
        for batch in batches_of(folder, rows, painter, seed, chosen):
            grey = batch["images"].mean(1).numpy()
            inside = batch["masks"][:, 0].numpy() > 0
            if segmenter is None:
                found = [{"mask": mask} for mask in inside]
            else:
                label_maps = segmenter.segment(batch["images"], batch["modalities"]).numpy() * inside
                found = [label_regions(label_map, segmenter.labels) for label_map in label_maps]
            images, regions, cases = [*images, *grey], [*regions, *found], [*cases, *batch["case_ids"]]
        features = feature_table(images, regions, description=f"{painter or 'Real'}: clinical features")
        if segmenter is None:  # the shape is that of the mask, whoever paints
            features = {name: values for name, values in features.items() if "/shape/" not in name}
        return features, cases

    real, cases = table(None)
    features, tables = {}, {"real": real}
    for painter in results["painters"]:
        tables[painter], _ = table(painter)
        for name, comparison in compare_features(real, tables[painter], cases, cases, seed=seed).items():
            entry = features.setdefault(name, {"floor": comparison.floor, "painters": {}, "verdicts": {}})
            entry["painters"][painter], entry["verdicts"][painter] = comparison.distance, comparison.verdict
    return features, tables


def read_study(votes: str, results: dict) -> dict:
    """What raters said of the painters: preferences over the first, and whether they tell real from painted."""
    votes = load_votes(votes, criteria=None)
    criteria = dict.fromkeys(votes["criterion"])
    models = list(zip(votes["criterion"], votes["model_0"], votes["model_1"], strict=True))
    voted_on = {(criterion, frozenset((one, other))) for criterion, one, other in models}
    reference = results["reference"]
    reference, others = results["reference"], [name for name in results["painters"] if name != results["reference"]]
    study = {
        "preferences": [
            win_rate(votes, reference, painter, criterion=criterion)
            for painter in others
            for criterion in criteria
            if (criterion, frozenset((reference, painter))) in voted_on
        ],
        "turing_tests": {
            criterion: turing_test(votes, criterion=criterion)
            for criterion in criteria
            if any("real" in pair for name, pair in voted_on if name == criterion)
        },
    }
    if not any(study.values()):
        found = sorted({name for _, pair in voted_on for name in pair if name})
        raise ValueError(
            f"`votes` compare {found}; expected {reference!r} with one of {others}, or 'real' pictures with others."
        )
    return study


def check_all_memorisation(
    folder: Path, rows: datasets.Dataset, train_rows: datasets.Dataset, results: dict, extractor, most: int = 2000
) -> dict:
    """Whether a painter copies what it was trained on, from its first `most` pictures."""
    chosen, seed = held_out(rows, train_rows)[:most], results["data"]["seeds"][0]
    if len(chosen) == 0:
        raise ValueError("All cases of `data` are in `train_data`; nothing is held out to compare with.")

    def image_set(batches):
        images, masks, cases, features = [], [], [], []
        for batch in batches:
            conditions = {name: batch[name] for name in ("masks", "modalities")}
            features.append(extractor(batch["images"], **conditions))
            images.append((batch["images"] * 255).round().to(torch.uint8))
            masks.append(batch["masks"])
            cases += batch["case_ids"]
        return ImageSet(torch.cat(images), cases, torch.cat(masks), torch.cat(features))

    train = image_set(batches_of(folder, train_rows, None, seed, with_target(train_rows)))
    heldout = image_set(batches_of(folder, rows, None, seed, chosen))
    return {
        painter: check_memorisation(image_set(batches_of(folder, rows, painter, seed, chosen)), train, heldout)
        for painter in tqdm(results["painters"], desc="Looking for copies")
        if painter != BASELINE
    }


def make_pictures(
    folder: Path, rows: datasets.Dataset, results: dict, found: dict, labels, tables: dict, train_rows
) -> dict[str, bytes]:
    """The plots and grids of the page: title -> PNG."""
    pictures = {}
    plot = differences_plot(results)
    if plot is not None:
        pictures["differences"] = plot
    by_task = [np.flatnonzero(np.array(rows["task"]) == task)[:3] for task in results["data"]["tasks"]]
    first, seeds = np.concatenate(by_task), results["data"]["seeds"]
    chosen = [(seeds[0], int(i)) for i in first]
    pictures["The first rows of each task"] = grid(folder, rows, results, chosen, labels)
    for painter in (name for name in results["painters"] if name != BASELINE):
        for name, measure in found[painter].measures.items():
            if name.endswith("_ssim") or "dice" in name:
                worst = worst_rows(measure.values, measure.applies, measure.higher_is_better)
                chosen = [(seeds[i // len(rows)], int(i % len(rows))) for i in worst]
                captions = [f"{name} {measure.values[i]:.3f}" for i in worst]
                title = f"{painter}: the worst by {name}"
                pictures[title] = grid(folder, rows, results, chosen, labels, captions)
        if tables:
            differing = [
                name for name, entry in results["clinical_features"].items() if entry["verdicts"][painter] == "differs"
            ]
            shown = (differing + [name for name in tables["real"] if name not in differing])[:8]
            with tempfile.TemporaryDirectory() as scratch:
                feature_figure(tables["real"], tables[painter], Path(scratch, "features.png"), features=shown)
                pictures[f"{painter}: clinical features"] = Path(scratch, "features.png").read_bytes()
        if train_rows is not None:
            title = f"{painter}: the nearest to the training set"
            pictures[title] = nearest_pairs(folder, rows, train_rows, results, painter, labels)
    return pictures


def nearest_pairs(folder: Path, rows, train_rows, results: dict, painter: str, labels) -> bytes:
    """The pictures of a painter that come nearest to a training picture, beside it."""
    chosen = held_out(rows, train_rows)
    train = with_target(train_rows)
    pairs = results["memorisation"][painter]["spaces"]["pixels"]["closest"][:4]
    shown, seed = [int(chosen[pair["generated"]]) for pair in pairs], results["data"]["seeds"][0]
    images = [read_picture(folder / "images" / painter, seed, i) for i in shown]
    nearest = rows_to_tensors([train_rows[int(train[pair["train"]])] for pair in pairs])["targets"]
    captions = [f"distance {pair['distance']:.3f}, {pair['ratio']:.2f} of that to the next case" for pair in pairs]
    columns = {painter: torch.stack(images), "Nearest in training": nearest}
    return _grid_png([rows[i] for i in shown], columns, labels, captions)


def grid(folder: Path, rows, results: dict, chosen: list[tuple[int, int]], labels, captions=None) -> bytes:
    """Pictures of some rows and seeds by all painters, as PNG."""
    shown = [rows[i] for _, i in chosen]
    columns = {}
    for painter in results["painters"]:
        images = [read_picture(folder / "images" / painter, seed, i) for seed, i in chosen]
        columns[painter] = torch.stack(images)
    if all(row["target"] is not None for row in shown):
        columns["Truth"] = rows_to_tensors(shown)["targets"]
    return _grid_png(shown, columns, labels, captions)


def _grid_png(shown: list[dict], columns: dict, labels, captions) -> bytes:
    asked = any(row["label_map"].getextrema()[1] for row in shown)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "grid.png")
        picture_grid(shown, columns, path, captions=captions, labels=labels if asked else None)
        return path.read_bytes()


def write_model_index(adapter: str | os.PathLike, painter: str, results: dict) -> None:
    """Write the figures of an adapter that were never a reward into its card: as `model-index`, and as a table."""
    card = ModelCard.load(Path(adapter, "README.md"))
    dataset = f"{results['data']['rows']} unseen conditions of {results['settings']['data']}"
    config = f"onereward-evaluate-{results['data']['fingerprint']}"  # results of one type and config are one entry
    kept = [entry for entry in card.data.eval_results or [] if entry.dataset_config != config]
    figures = {
        measure: entry["painters"][painter]
        for measure, entry in results["measures"].items()
        if not entry["was_reward"] and entry["painters"][painter]["value"] is not None
    }
    new = [
        EvalResult(
            task_type="image-to-image",
            task_name="Image-to-Image",
            dataset_type="phantom" if results["settings"]["data"] == "phantom" else "custom",
            dataset_name=dataset,
            dataset_config=config,
            metric_type=measure,
            metric_name=measure.replace("_", " "),
            metric_value=figure["value"],
            metric_args={"95 % interval": [figure["low"], figure["high"]], "n": figure["n"]},
        )
        for measure, figure in figures.items()
    ]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or Path(adapter).name
    rows = {
        measure: {
            "value": figure["value"],
            "95 % interval": None if figure["low"] is None else (figure["low"], figure["high"]),
            "n": figure["n"],
        }
        for measure, figure in figures.items()
    }
    text = f"By `onereward evaluate`, on {dataset}; intervals are by case.\n\n{table(rows)}"
    card.text = with_section(card.text, "Measures that were never a reward", text)
    save_card(card, adapter)


def _without_paths(settings: EvaluateSettings) -> dict:
    """The settings, of local files and folders the last name alone: the rest of a path may tell of people."""

    def last_name(value):
        if isinstance(value, (list, tuple)):
            return [last_name(entry) for entry in value]
        return Path(value).name if isinstance(value, str) and Path(value).exists() else value

    return {name: last_name(value) for name, value in plain(asdict(settings)).items()}


def _settings_in(folder: Path) -> dict | None:
    """The settings of the evaluation that a folder holds, `None` where it holds none."""
    path = folder / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    ours = isinstance(found, dict) and set(found) == {field.name for field in fields(EvaluateSettings)}
    return found if ours else None


def _check_settings(folder: Path, settings: EvaluateSettings) -> None:
    before, wanted = _settings_in(folder), plain(asdict(settings))
    changed = [name for name in wanted if before is not None and before[name] != wanted[name]]
    if changed:
        raise ValueError(
            f"{str(folder)!r} holds an evaluation with other settings ({', '.join(changed)}). Start over with "
            "--restart, which deletes it, or write elsewhere with --output."
        )
    if before is None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no evaluation. Name another folder with --output.")
