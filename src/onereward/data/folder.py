"""Real images: from a folder of pictures and masks to rows of the schema."""

import csv
import hashlib
import json
from pathlib import Path, PurePath

import datasets
import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from onereward.data.masks import check_label_map, check_mask, dilate
from onereward.data.phantom import to_png
from onereward.data.schema import FEATURES, TASKS


SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
# Column of the metadata, and the sub-folder that stands for it where there is no metadata.
FILE_COLUMNS = {
    "file_name": "images",
    "mask_file_name": "masks",
    "label_map_file_name": "label_maps",
    "target_file_name": "targets",
}
COLUMNS = (*FILE_COLUMNS, "prompt", "task", "modality", "case_id")


def read_metadata(path: str | Path) -> list[dict]:
    """
    Read which pictures of a folder belong together.

    Args:
        path (`str` or `Path`):
            Folder with `metadata.csv` or `metadata.jsonl`; or with sub-folders `images` and `masks` (and, if wanted,
            `label_maps` and `targets`) whose files have the same stem.

    Returns:
        `list[dict]`: one record a row, with file names relative to the folder and without empty values.

    Raises:
        `ValueError`: when the folder is not one of these, or its metadata cannot be read or has other columns.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected one with images and masks.")
    table, lines = path / "metadata.csv", path / "metadata.jsonl"
    if table.is_file():
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                records = list(csv.DictReader(file))
        except UnicodeDecodeError as error:
            raise ValueError(f"{table} is not UTF-8 ({error.reason}). Save it as CSV in UTF-8.") from error
    elif lines.is_file():
        records = []
        for number, line in enumerate(lines.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(json.loads(line or "null"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{lines}, line {number}, is not JSON ({error.msg}); expected one object.") from None
        records = [record for record in records if record is not None]
        if not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{lines} holds something else than objects; expected one object a line.")
    else:
        records = match_by_stem(path)
    if not records:
        raise ValueError(f"{path} lists no images; expected at least one row of metadata.")
    for number, record in enumerate(records, 1):
        if None in record:  # of `csv.DictReader`
            raise ValueError(f"{table}, row {number}, has more fields than the header. Quote texts with commas.")
        # a patient under another name than `case_id` would be split up between training and test
        if unknown := [column for column in record if column not in COLUMNS]:
            raise ValueError(
                f"{path} has the unknown columns {unknown}. Rename or drop them; known are {list(COLUMNS)}."
            )
    return [{key: value for key, value in record.items() if value not in (None, "")} for record in records]


def match_by_stem(path: Path) -> list[dict]:
    """Records of the pictures in the sub-folders of `FILE_COLUMNS` that have one stem."""
    stems = {}
    for column, name in FILE_COLUMNS.items():
        files = sorted(file for file in path.glob(f"{name}/*") if file.suffix.lower() in SUFFIXES)
        stems[column] = {file.stem: f"{name}/{file.name}" for file in files}
        if len(stems[column]) < len(files):
            raise ValueError(f"{path / name} has two pictures of one stem; keep one, or list them in a metadata.csv.")
    if not stems["file_name"]:
        raise ValueError(
            f"{path} has neither metadata.csv, metadata.jsonl nor pictures in images/; put the images into images/ "
            f"and their masks, under the same names, into masks/. Formats: {', '.join(SUFFIXES)}."
        )
    lonely = sorted(stems["file_name"].keys() ^ stems["mask_file_name"].keys())
    if lonely:
        raise ValueError(
            f"{len(lonely)} picture(s) in {path} have no partner of the same name in images/ or masks/, e.g. "
            f"{lonely[0]!r}. Rename or remove them, or list the pairs in a metadata.csv."
        )
    return [{column: names[stem] for column, names in stems.items() if stem in names} for stem in stems["file_name"]]


def read_brisc(path: str | Path, task: str = "fill", tier: str | None = "A") -> list[dict]:
    """
    Metadata for [`load_folder`] of a BRISC 2025 sample that lists its pictures in `index.csv`.

    BRISC ([2506.14318](https://huggingface.co/papers/2506.14318)) holds contrast-enhanced T1 slices with tumour masks
    in three planes. Rows without a mask (no tumour) are left out. It has no patient ids, so each slice is a case.

    Args:
        path (`str` or `Path`):
            Folder with `index.csv` (columns `image`, `mask`, `tumour`, `plane`, `provenance_tier`).
        task (`str`, *optional*, defaults to `"fill"`):
            Task of all rows.
        tier (`str`, *optional*, defaults to `"A"`):
            `"A"` keeps the slices of clear origin only, `None` all.

    Returns:
        `list[dict]`: records for `load_folder(path, metadata=...)`.

    Example:

    ```python
    >>> dataset = load_folder(path, size=64, metadata=read_brisc(path))
    ```
    """
    planes = {"ax": "Axial", "co": "Coronal", "sa": "Sagittal"}
    tumours = {"gl": "glioma", "me": "meningioma", "pi": "pituitary tumour"}
    index = Path(path) / "index.csv"
    if not index.is_file():
        raise ValueError(f"{index} does not exist; expected the folder of a BRISC sample with its index.csv.")
    with index.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["mask"] and tier in (None, row["provenance_tier"])]
    endings = {
        "fill": "{tumour}",
        "remove": "healthy brain tissue, no mass",
        "extend": "field of view enlarged",
    }
    return [
        {
            "file_name": row["image"],
            "mask_file_name": row["mask"],
            "task": task,
            "modality": "t1c",
            "prompt": f"{planes[row['plane']]} contrast-enhanced T1-weighted brain MRI: "
            + endings[task].format(tumour=tumours[row["tumour"]]),
        }
        for row in rows
    ]


def open_picture(file: Path) -> Image.Image:
    """Open a picture, turned upright as its EXIF orientation says."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist; correct its name in the metadata, or add the file.")
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture ({error}); save it again, e.g. as PNG.") from None


def to_8_bit(picture: Image.Image, mode: str, name: str) -> Image.Image:
    """
    Bring a picture to 8 bits: 16-bit and float pictures are scaled from their 0.5th to their 99.5th percentile.
    """
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"`{name}` holds NaN or infinite values; replace them, e.g. by 0.")
        low, high = np.percentile(values, (0.5, 99.5))
        if high <= low:
            low, high = values.min(), max(values.max(), values.min() + 1)
        picture = Image.fromarray(np.round(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8))
    if picture.mode == "P":  # a palette holds colours; its indices mean nothing as grey
        picture = picture.convert("RGB")
    return picture.convert(mode)


def to_values(picture: Image.Image, name: str) -> np.ndarray:
    """The `(H, W)` values of a mask or label map: palette indices as they are, grey stored as colour as grey."""
    values = np.asarray(picture)
    if values.ndim == 3:
        colours = values[..., :3] if picture.mode in ("RGB", "RGBA") else values[..., :1]
        if (colours != colours[..., :1]).any():
            raise ValueError(f"`{name}` is a colour picture; expected one channel. Save it as grey or palette PNG.")
        values = colours[..., 0]
    return values


def letterbox(picture: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """
    Fit a picture into a black square without cropping or stretching it: a lesion at the edge stays in the field.
    """
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new(picture.mode, (size, size))
    square.paste(picture.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
    return square


def letterbox_values(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Fit a label map into a square by majority: each pixel gets the value that covers most of it.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the values, and how much of each pixel is covered by anything but 0.
    """
    kinds = np.unique(np.append(values, 0))
    planes = [Image.fromarray((values == kind).astype(np.float32)) for kind in kinds]
    covered = np.stack([np.asarray(letterbox(plane, size, Image.Resampling.BOX)) for plane in planes])
    covered[0] = 1 - covered[1:].sum(0)  # the border counts as background
    return kinds[covered.argmax(0)], covered[1:].sum(0)


def default_prompt(task: str, modality: str, names: list[str]) -> str:
    """What can truthfully be said of a row that came without a prompt."""
    if task == "fill":
        return f"Fill the marked region of this {modality} image" + (f" with {', '.join(names)}." if names else ".")
    if task == "remove":
        return f"Remove the lesion from this {modality} image and restore healthy tissue."
    return f"Extend this {modality} image beyond its field of view."


def load_folder(
    path: str | Path,
    *,
    size: int | None = None,
    task: str = "fill",
    modality: str = "medical",
    mode: str = "L",
    labels: dict[str, int] | None = None,
    mask_label: str | None = None,
    margin: float = 0.0,
    mask_threshold: int | None = None,
    source: str = "folder",
    salt: str | None = None,
    metadata: list[dict] | None = None,
) -> datasets.Dataset:
    """
    Read a folder of images and masks (and, if wanted, label maps, targets and prompts) into rows of the schema.

    The folder holds either `metadata.csv` or `metadata.jsonl` in the manner of Hugging Face's imagefolder, with the
    columns `file_name` and `mask_file_name` and, each optional, `label_map_file_name`, `target_file_name`, `prompt`,
    `task`, `modality` and `case_id`; or sub-folders `images`, `masks`, `label_maps`, `targets` with files of the same
    stem. White (255 or 1) in a mask means repaint.

    Images are turned upright (EXIF), brought to 8 bits, and letterboxed into a square of `size`: a crop could cut off
    the lesion. A mask pixel counts as masked when at least half of it is, and the best-covered pixel always does, so
    that no small lesion is lost; a label map pixel gets the label that covers most of it.

    A real image has no healthy twin: without a `target_file_name` the target is the image itself for `fill` and
    `extend`, and `None` for `remove`. File names go nowhere: a case is known by a salted hash of its `case_id`, or of
    the file's stem. What is burnt into the pixels stays; check your images for names and faces.

    Args:
        path (`str` or `Path`):
            The folder.
        size (`int`, *optional*):
            Height and width of the rows in pixels. Images keep their own size when not given.
        task (`str`, *optional*, defaults to `"fill"`):
            `"fill"`, `"remove"` or `"extend"`, for rows whose metadata names none.
        modality (`str`, *optional*, defaults to `"medical"`):
            Modality for rows whose metadata names none, e.g. `"t1c"` or `"dermoscopy"`.
        mode (`str`, *optional*, defaults to `"L"`):
            `"L"` for grey or `"RGB"` for colour images.
        labels (`dict[str, int]`, *optional*):
            The labels there are, name to value; a label map with any other is refused.
        mask_label (`str`, *optional*):
            Name of the label that the whole mask stands for in `fill` and `extend` rows without a label map. Such
            rows have an empty label map when not given.
        margin (`float`, *optional*, defaults to 0.0):
            Pixels (of the result) by which masks are grown, e.g. to take in the blurred border of a lesion.
        mask_threshold (`int`, *optional*):
            Masks are white above this grey value, such as 127 where a grey in between means "ignore". Masks of other
            values than black and white are refused when not given.
        source (`str`, *optional*, defaults to `"folder"`):
            Name of the data set.
        salt (`str`, *optional*):
            Secret of the case hash. Defaults to a digest of the images, which nobody without them can guess.
        metadata (`list[dict]`, *optional*):
            Records to use in place of those in the folder, with the columns above; see [`read_brisc`].

    Returns:
        `datasets.Dataset`: rows of `onereward.data.schema.FEATURES`.

    Raises:
        `ValueError`: naming the file, what is wrong with it, and how to mend it.

    Example:

    ```python
    >>> from onereward.data.folder import load_folder

    >>> dataset = load_folder("skin", size=64, mode="RGB", modality="dermoscopy")
    ```
    """
    path = Path(path)
    if mode not in ("L", "RGB"):
        raise ValueError(f"`mode` is {mode!r}; expected 'L' (grey) or 'RGB' (colour).")
    if size is not None and size < 8:
        raise ValueError(f"`size` is {size}; expected at least 8 pixels.")
    if mask_label is not None and mask_label not in (labels or {}):
        raise ValueError(f"`mask_label` is {mask_label!r}; expected one of `labels`, which is {labels}.")
    records = read_metadata(path) if metadata is None else metadata
    for number, record in enumerate(records, 1):
        missing = [column for column in ("file_name", "mask_file_name") if column not in record]
        if missing:
            raise ValueError(f"Row {number} of the metadata of {path} lacks {missing}; known columns are {COLUMNS}.")
        for column in COLUMNS:
            value = record.get(column, "")
            if not isinstance(value, str):
                raise ValueError(f"`{column}` in row {number} of the metadata of {path} is {value!r}; expected text.")
            if column in FILE_COLUMNS and (PurePath(value).is_absolute() or ".." in PurePath(value).parts):
                raise ValueError(f"`{column}` is {value!r}; expected a file inside {path}, named relative to it.")
        if record.get("task", task) not in TASKS:
            raise ValueError(f"`task` in row {number} is {record.get('task', task)!r}; expected one of {TASKS}.")
    if salt is None:
        digest = hashlib.blake2b(digest_size=32)
        for name in sorted({record["file_name"] for record in records}):
            if (path / name).is_file():  # a missing one is reported below, with all others
                digest.update((path / name).read_bytes())
        salt = digest.hexdigest()

    rows = []
    for record in tqdm(records, desc="Reading the images"):
        row = read_row(path, record, size, record.get("task", task), mode, labels, mask_label, margin, mask_threshold)
        case = record.get("case_id", PurePath(record["file_name"]).stem)
        case_hash = hashlib.blake2b(f"{salt}\n{case}".encode(), digest_size=8).hexdigest()
        names = [name for name, value in (labels or {}).items() if value and (row["label_map"] == value).any()]
        row_modality = record.get("modality", modality)
        rows.append(
            {column: None if array is None else to_png(array) for column, array in row.items()}
            | {
                "prompt": record.get("prompt") or default_prompt(record.get("task", task), row_modality, names),
                "task": record.get("task", task),
                "modality": row_modality,
                "case_id": f"{source}-{case_hash}",
                "source": source,
            }
        )
    return datasets.Dataset.from_list(rows, features=FEATURES)


def read_row(
    path: Path,
    record: dict,
    size: int | None,
    task: str,
    mode: str,
    labels: dict[str, int] | None,
    mask_label: str | None,
    margin: float,
    mask_threshold: int | None = None,
) -> dict[str, np.ndarray | None]:
    """The four pictures of one record as arrays, checked and resized."""
    files = {column: path / record[column] for column in FILE_COLUMNS if column in record}
    image_file, mask_file = files["file_name"], files["mask_file_name"]
    image = to_8_bit(open_picture(image_file), mode, str(image_file))
    mask = to_values(open_picture(mask_file), str(mask_file))
    if mask_threshold is not None:
        mask = np.where(mask > mask_threshold, 255, 0).astype(np.uint8)
    mask = check_mask(mask, image.size[::-1], str(mask_file))
    target = None if task == "remove" else image
    if "target_file_name" in files:
        target_file = files["target_file_name"]
        target = to_8_bit(open_picture(target_file), mode, str(target_file))
        if target.size != image.size:
            raise ValueError(f"{target_file} is {target.size} but {image_file} is {image.size} (width, height).")
    label_map = np.zeros(mask.shape, np.uint8)
    if "label_map_file_name" in files:
        label_file = files["label_map_file_name"]
        label_map = to_values(open_picture(label_file), str(label_file))
        label_map = check_label_map(label_map, mask, labels, str(label_file))
    elif mask_label is not None and task != "remove":
        label_map[mask] = labels[mask_label]

    if size is not None:
        image = letterbox(image, size, Image.Resampling.LANCZOS)
        target = None if target is None else letterbox(target, size, Image.Resampling.LANCZOS)
        _, coverage = letterbox_values(mask.astype(np.uint8), size)
        mask = coverage >= min(0.5, coverage.max())
        label_map = letterbox_values(label_map, size)[0] * mask
    return {
        "image": np.asarray(image),
        "mask": np.where(dilate(mask, margin), 255, 0).astype(np.uint8),
        "label_map": label_map.astype(np.uint8),
        "target": None if target is None else np.asarray(target),
    }
