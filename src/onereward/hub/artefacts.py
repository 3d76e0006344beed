"""What of an artefact may be published: which of its files, and what each of them must be."""

import ast
import io
import json
import math
import re
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from onereward.data.synthetic import is_synthetic
from onereward.hub.adapters import sort_header
from onereward.hub.provenance import files_of, is_repo_id


WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
COMPONENT = (
    *WEIGHTS,
    "config.json",
    "scheduler_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
ADAPTER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
GALLERY = "images/*.png"
SPACE_SUFFIXES = "py txt md json yaml yml toml csv css js html jinja svg png jpg jpeg dcm parquet safetensors".split()

# kind -> the files that go up. `*` is any part of a name, `**/` any folders or none.
FILES = {
    "pipeline": ("model_index.json", "pipeline*.py", "flow.py", GALLERY, *(f"*/{name}" for name in COMPONENT)),
    "vae": ("config.json", *WEIGHTS, GALLERY),
    "adapter": (*ADAPTER, GALLERY),
    "reward-model": (*COMPONENT, *ADAPTER, "judge_config.json", "*.py", GALLERY),
    "dataset": ("data/*.parquet",),
    "votes": ("data/*.parquet",),
    "space": ("LICENSE", "NOTICE", *(f"**/*.{suffix}" for suffix in SPACE_SUFFIXES)),
}
# kind -> files of which it must have one, else it is something else
NEEDED = {
    "pipeline": ("model_index.json",),
    "vae": ("config.json",),
    "adapter": ADAPTER[:2],
    "reward-model": ("config.json", "adapter_config.json"),
    "space": ("app.py",),
}
CHECKPOINT = "last-checkpoint"  # what a training goes on from; it goes up only where it is asked for

# What belongs to a run and not to what came out of it, wherever it lies, and what publishing writes itself.
NEVER = re.compile(
    r"(^|/)(\.|checkpoint-\d+/|last-checkpoint/|global_step\d+/|(runs|logs|wandb|__pycache__)/"
    r"|(training_args|optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth)$"
    r"|(trainer_state|all_results|train_results|eval_results)\.json$)"
    r"|^(README\.md|CHANGELOG\.md|provenance\.json)$"
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
REMEDY = (
    "Pickles can run code when they are loaded. Save it again as safetensors (`safe_serialization=True`, or "
    "`safetensors.torch.save_file`), or delete it if it is not needed."
)
SHARD_BYTES = 500e6
PNG_START = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"pHYs", b"bKGD"}
TEXT_CHUNKS = {b"tEXt", b"iTXt"}
MARKS = {b"Title", b"Description", b"Software", b"Source", b"Disclaimer", b"Warning", b"Comment", b"XML:com.adobe.xmp"}


def is_published(kind: str, name: str) -> bool:
    """Whether a file of this name, relative to its repository, is one that artefacts of this kind consist of."""
    if kind == "space" and name.startswith("data/"):  # votes, which a Space keeps there when it runs on this disk
        return False
    return NEVER.search(name) is None and any(_pattern(glob).fullmatch(name) for glob in FILES[kind])


def stage_folder(kind: str, folder: Path, target: Path) -> list[str]:
    """
    Copy what may be published of a folder, with its card and provenance, and check every copy.

    Args:
        kind (`str`):
            One of `FILES`.
        folder (`Path`):
            What was saved; it is not changed.
        target (`Path`):
            Where to copy it.

    Returns:
        `list[str]`: the files that were left out.

    Raises:
        `ValueError`: when it is no such artefact, or a file in a place that is published holds a pickle, a patient's
            DICOM file or not what its name says. The message names the file and the remedy.
    """
    names = files_of(folder)
    chosen = [name for name in names if is_published(kind, name)]
    if nowhere := [name for name in chosen if not (folder / name).is_file()]:
        raise ValueError(
            f"`path` holds {nowhere[0]!r}, a link to a file that is not there. Bring it back, or save again."
        )
    refuse_pickles(kind, folder, names)
    if kind in NEEDED and not set(chosen) & set(NEEDED[kind]):
        raise ValueError(
            f"`path` {folder.name!r} holds none of {list(NEEDED[kind])}, so it is no {kind}. Name the folder that was "
            "saved, or another kind."
        )
    if kind == "pipeline":
        check_components(folder, chosen)
    own = [name for name in ("README.md", "provenance.json") if name in names]
    copy_files(folder, [*chosen, *own], target)
    check_files(target, chosen)
    return sorted(set(names) - {*chosen, *own, "CHANGELOG.md"})


def stage_checkpoint(folder: Path, target: Path) -> None:
    """
    Copy a checkpoint as it is, all of it: its seal names every file.

    Raises:
        `ValueError`: when a file is neither safetensors, JSON nor text.
    """
    names = files_of(folder)
    for name in names:
        if not name.endswith((".safetensors", ".json", ".jsonl", ".txt", ".md", ".py", ".jinja", ".png")):
            raise ValueError(f"The checkpoint holds {name!r}, which is neither safetensors nor text. {REMEDY}")
    copy_files(folder, names, target / CHECKPOINT)
    check_files(target / CHECKPOINT, names, strip=False)


def copy_files(folder: Path, names: list[str], target: Path) -> None:
    """Copy files, following links; the bar shows where it takes longer than two seconds."""
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Copying", delay=2, leave=False) as bar:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)
            bar.update((target / name).stat().st_size)


def check_components(folder: Path, names: list[str]) -> None:
    """Refuse a pipeline without the files of a component that its `model_index.json` names: nobody could load it."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for component, made_by in index.items():
        is_component = not component.startswith("_") and isinstance(made_by, list) and made_by[0] is not None
        if is_component and not any(name.startswith(f"{component}/") for name in names):
            raise ValueError(
                f"`path` {folder.name!r} holds no file of {component!r}, which its model_index.json names. Save the "
                "whole pipeline with `save_pretrained`."
            )


def refuse_pickles(kind: str, folder: Path, names: list[str]) -> None:
    """Refuse files that are pickles by their name, where files of this kind are published from."""
    places = {_pattern(glob.rpartition("/")[0]) for glob in FILES[kind]}
    for name in names:
        if NEVER.search(name) or not any(place.fullmatch(name.rpartition("/")[0]) for place in places):
            continue
        if name.endswith(PICKLES):
            raise ValueError(f"`path` holds {name!r}, a pickle. {REMEDY}")
        if name.endswith(".npy"):
            try:
                np.load(folder / name, mmap_mode="r", allow_pickle=False)
            except ValueError as error:
                raise ValueError(f"`path` holds {name!r}, an array of objects: a pickle. {REMEDY}") from error


def check_files(folder: Path, names: list[str], strip: bool = True) -> None:
    """
    Refuse files that are not what their name says, whatever they are, and take out of pictures what is no picture.

    Args:
        folder (`Path`):
            Where they are.
        names (`list[str]`):
            Relative to it.
        strip (`bool`, *optional*, defaults to `True`):
            Whether PNG files lose what they tell beside pixels and the marks of synthetic images.
    """
    for name in tqdm(names, desc="Checking", unit=" files", delay=2, leave=False):
        path = folder / name
        _refuse_content(path, name)
        try:
            if name.endswith(".safetensors"):
                safe_open(path, "np").keys()  # reads the header, and compares it with the length
            elif name.endswith(".json"):
                json.loads(path.read_text(encoding="utf-8"))
            elif name.endswith(".py"):
                ast.parse(path.read_text(encoding="utf-8"))
            elif name.endswith(".parquet"):
                pq.read_schema(path)
            elif name.endswith((".png", ".jpg", ".jpeg")):
                with Image.open(path) as picture:
                    picture.load()
                    details = picture.getexif()
            elif not name.endswith((".model", ".dcm")):
                path.read_text(encoding="utf-8")
        except (SafetensorError, ValueError, SyntaxError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"`path` holds {name!r}, which is not what its name says ({error}). Save it again, or delete it."
            ) from error
        if name.endswith(".png") and strip:
            path.write_bytes(bare_png(path.read_bytes()))
        if name.endswith((".jpg", ".jpeg")) and len(details):
            raise ValueError(
                f"`path` holds {name!r}, a JPEG file with EXIF data, which may tell of a person or a place. Save it "
                "again without them, or as PNG."
            )


def _refuse_content(path: Path, name: str) -> None:
    with open(path, "rb") as file:
        start = file.read(132)
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if start.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):  # what `torch.save` writes
        pickled = any(member.endswith(".pkl") for member in zipfile.ZipFile(path).namelist())
    if pickled:
        raise ValueError(f"`path` holds {name!r}, whose content is a pickle. {REMEDY}")
    if start[128:] == b"DICM" and is_synthetic(path) is None:
        raise ValueError(
            f"`path` holds {name!r}, a DICOM file that is not marked as synthetic (0008,001C): it may be a patient's. "
            "Delete it; what our pipelines paint is marked by `onereward.data.synthetic.save_dicom`."
        )


def bare_png(content: bytes) -> bytes:
    """A PNG file without EXIF, comments and the like, its pixels untouched; a synthetic one keeps its marks."""
    chunks, place = [], len(PNG_START)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : end - 4], content[place:end]))
        place = end
    synthetic = any(kind in TEXT_CHUNKS and b"lgorithmicMedia" in data for kind, data, _ in chunks)
    kept = [
        whole
        for kind, data, whole in chunks
        if kind in PIXEL_CHUNKS or (synthetic and kind in TEXT_CHUNKS and data.partition(b"\0")[0] in MARKS)
    ]
    return PNG_START + b"".join(kept)


# ----------------------------------------------------------------------------------------------------- what is inside


def name_base(folder: Path, base_model: str) -> None:
    """Write down, in both formats of an adapter, which pipeline it is for, in place of a folder of this disk."""
    config = folder / "adapter_config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = folder / "pytorch_lora_weights.safetensors"
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            header = dict(file.metadata() or {})
        about = json.loads(header.get("lora_adapter_metadata", "{}"))
        names = [name for name in about if name.endswith("base_model_name_or_path")]
        if any(about[name] != base_model for name in names):
            header["lora_adapter_metadata"] = json.dumps(about | dict.fromkeys(names, base_model), indent=2)
            save_file(load_file(weights), weights, header)
            sort_header(weights)


def forget_folders(folder: Path) -> None:
    """Take out of configurations where they were loaded from, where that was a folder of this disk."""

    def forget(value):
        if isinstance(value, dict):
            return {
                key: forget(item)
                for key, item in value.items()
                if key != "_name_or_path" or (isinstance(item, str) and is_repo_id(item) and not Path(item).exists())
            }
        return [forget(item) for item in value] if isinstance(value, list) else value

    for path in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        if path.name in ("config.json", "model_index.json"):
            values = json.loads(path.read_text(encoding="utf-8"))
            if forget(values) != values:
                path.write_text(json.dumps(forget(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- rows, votes


def load_parts(path: Path) -> datasets.DatasetDict:
    """
    The splits of a data set that `onereward data` or `save_to_disk` wrote, or of one Parquet file.

    Raises:
        `ValueError`: when it is neither.
    """
    try:
        parts = datasets.load_from_disk(path) if path.is_dir() else datasets.Dataset(pq.read_table(path))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"`path` {path.name!r} is neither a folder that `onereward data` wrote nor a Parquet file ({error})."
        ) from error
    return datasets.DatasetDict(train=parts) if isinstance(parts, datasets.Dataset) else parts


def write_parts(parts: datasets.DatasetDict, folder: Path) -> list[str]:
    """
    Write splits as `data/<split>-0000i-of-0000n.parquet`, as the Hub expects them: column types in the schema,
    pictures inside and bare, no name of a file.

    Args:
        parts (`datasets.DatasetDict`):
            The splits.
        folder (`Path`):
            The repository.

    Returns:
        `list[str]`: the files, relative to `folder`.

    Raises:
        `ValueError`: when a picture is none.
    """
    names = []
    (folder / "data").mkdir(parents=True)
    for split, rows in parts.items():
        size = rows.data.nbytes * len(rows) / max(rows.data.num_rows, 1)
        count = max(1, math.ceil(size / SHARD_BYTES))
        for index in tqdm(range(count), desc=f"Writing {split}", unit=" files", delay=2, leave=False):
            names.append(f"data/{split}-{index:05d}-of-{count:05d}.parquet")
            shard = rows.shard(count, index, contiguous=True)
            pq.write_table(bare_table(shard), folder / names[-1], compression="zstd", row_group_size=1000)
    return names


def bare_table(rows: datasets.Dataset) -> pa.Table:
    """Rows as an Arrow table whose pictures are inside, without names of files, EXIF or comments."""
    table = rows.with_format("arrow")[:].cast(rows.features.arrow_schema)
    if len(rows):  # of no rows there is nothing to embed, and it fails
        table = embed_table_storage(table)
    for column, feature in rows.features.items():
        if not isinstance(feature, datasets.Image):
            continue
        pictures = [
            picture and {"bytes": _bare_picture(picture["bytes"], column, index), "path": None}
            for index, picture in enumerate(table[column].to_pylist())
        ]
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(column), pa.array(pictures, feature.pa_type))
    return table


def _bare_picture(content: bytes, column: str, index: int) -> bytes:
    if content.startswith(PNG_START):
        return bare_png(content)
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    except UnidentifiedImageError as error:
        raise ValueError(
            f"`{column}` of row {index} is no picture that can be read. Bring the rows into the schema with "
            "`onereward data`."
        ) from error
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()


def _pattern(glob: str) -> re.Pattern:
    words = {"**/": r"(?:[^/]+/)*", "**": r"(?:[^/]+(?:/[^/]+)*)?", "*": r"[^/]*"}
    return re.compile("".join(words.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*)", glob)))
