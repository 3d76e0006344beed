"""`onereward generate`: repaint the masked part of a picture or scan of one's own, and keep all else bit for bit."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from onereward.data.masks import check_mask
from onereward.data.scans import (
    AXES,
    Scan,
    default_window,
    plane,
    plane_affine,
    read_labels,
    read_scan,
    reorient,
    to_unit,
    window,
)
from onereward.data.synthetic import save_dicom, save_nifti, save_png
from onereward.hub.adapters import load_adapter
from onereward.hub.provenance import describe_parent
from onereward.pipelines import OneRewardMaskPipeline


@dataclass
class GenerateSettings:
    """
    What to paint, and how.

    Args:
        pipeline (`str`):
            A folder or Hub id.
        revision (`str`, *optional*):
            Its branch, tag or commit on the Hub.
        adapter (`str`, *optional*):
            LoRA adapter: a folder or Hub id.
        adapter_revision (`str`, *optional*):
            Its branch, tag or commit on the Hub.
        adapter_strength (`float`, *optional*, defaults to `1.0`):
            0 is the pipeline without it, 1 the adapter as it was trained.
        task (`str`, *optional*, defaults to `"fill"`):
            `"fill"`, `"remove"` or `"extend"`.
        prompt (`str`, *optional*):
            What to paint. Defaults to the words of the task.
        slice (`int`, *optional*):
            Slice of a volume to repaint, as of [`~onereward.data.scans.plane`]. Defaults to the one with most mask.
        axis (`str`, *optional*, defaults to `"axial"`):
            Across which a volume is sliced: `"sagittal"`, `"coronal"` or `"axial"`.
        all_slices (`bool`, *optional*, defaults to `False`):
            Whether all slices with a mask are repainted, each by itself.
        window (`tuple[float, float]`, *optional*):
            Centre and width, in the numbers of the file, of what the model sees. Defaults to
            [`~onereward.data.scans.default_window`].
        num_inference_steps (`int`, *optional*, defaults to `20`):
            Denoising steps.
        guidance_scale (`float`, *optional*, defaults to `2.0`):
            Weight of guidance; 1 is off.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise, the same for each slice.
    """

    pipeline: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_strength: float = 1.0
    task: str = "fill"
    prompt: str | None = None
    slice: int | None = None
    axis: str = "axial"
    all_slices: bool = False
    window: tuple[float, float] | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 2.0
    seed: int = 0


def run_generate(
    image: str | os.PathLike,
    mask: str | os.PathLike,
    output: str | os.PathLike,
    settings: GenerateSettings,
    label_map: str | os.PathLike | None = None,
) -> list[str]:
    """
    Repaint a picture or scan and write it, marked as synthetic. Outside the mask every number stays what it was; in it
    the model's grey is mapped back through the window to the numbers of the source. Where the source says that low is
    white (MONOCHROME1), so does a DICOM file; NIfTI cannot say so and gets the numbers turned about, with a note.
    Where a NIfTI source does not say how the patient lies, nor does what is written.

    Args:
        image, mask, label_map (`str` or `os.PathLike`):
            Files as of [`~onereward.data.scans.read_scan`]: all pictures, or a volume with a mask (and a label map) of
            its grid, or a volume with a picture of one slice.
        output (`str` or `os.PathLike`):
            File to write: `.png`, `.nii`, `.nii.gz`, `.dcm` (one slice), or a name without an ending: a new folder of
            DICOM files.
        settings ([`GenerateSettings`]):
            What to paint, and how.

    Returns:
        `list[str]`: what the user should know: what was noticed in the source, and what was painted.

    Raises:
        `ValueError`: when the files do not fit each other or the output.

    Example:

    ```python
    >>> from onereward.generate import GenerateSettings, run_generate

    >>> settings = GenerateSettings("pipelines/onereward-brats", task="remove")
    >>> run_generate("flair.nii.gz", "tumour.nii.gz", "healthy.nii.gz", settings)
    ```
    """
    output = Path(output)
    ending = _ending(output)
    if not ending and output.suffix:
        raise ValueError(
            f"the output is {str(output)!r}, but a name that ends in .png, .nii, .nii.gz or .dcm is wanted, or in "
            "nothing for a folder of DICOM files: these lose no pixel."
        )
    scan = read_scan(image)
    shown = None
    if scan.is_volume or scan.pixels.ndim == 2:
        shown = default_window(scan)
        if settings.window is not None:
            shown = scan.turn(settings.window[0]), settings.window[1]
        to_unit(np.zeros(1), *shown)  # says what is wrong with a window
    elif settings.window is not None:
        raise ValueError("a window is given, but the picture has colours. Leave it out.")
    chosen, inside = _regions(scan, read_labels(mask), settings)
    labels = None if label_map is None else _on_grid(read_labels(label_map), scan, chosen, settings.axis, "label map")
    if shown is None and ending in (".nii", ".nii.gz"):
        raise ValueError("NIfTI holds no colours. Let the output end in .png.")
    if ending in (".png", ".dcm") and len(chosen) > 1:
        raise ValueError(
            f"the output ends in {ending}, which holds one slice, but {len(chosen)} are to be repainted. Let it end "
            "in .nii.gz, or in nothing for a folder of DICOM files."
        )
    if not ending and not scan.is_volume:
        raise ValueError("a folder of DICOM files holds a volume, but the source is one slice. Let it end in .dcm.")
    if not ending and not scan.oriented:
        raise ValueError(
            "the source does not say how the patient lies, but a folder of DICOM files must. Let the output end in "
            ".nii.gz, or correct the header of the source."
        )

    pipe = OneRewardMaskPipeline.from_pretrained(settings.pipeline, revision=settings.revision)
    if settings.adapter is not None:
        load_adapter(pipe, settings.adapter, revision=settings.adapter_revision)
        pipe.set_adapters("default", settings.adapter_strength)
    pipe.set_progress_bar_config(disable=len(chosen) > 1)

    result = scan.pixels.copy()
    for index in tqdm(chosen, desc="Slices", unit="slice", disable=len(chosen) == 1):
        if scan.is_volume:
            picture, where = (plane(array, scan.affine, settings.axis, index) for array in (result, inside))
            put = None if labels is None else plane(labels, scan.affine, settings.axis, index)
            place = plane_affine(result.shape, scan.affine, settings.axis, index)
            spacing = np.linalg.norm(place[:3, [1, 0]], axis=0)
        else:
            picture, where, put, spacing = result, inside, labels, scan.spacing or (1, 1)
        painted = paint_picture(pipe, picture, where, put, shown, spacing, settings)
        picture[where] = scan.storable(painted[where])

    notes = list(scan.warnings)
    if scan.is_volume:
        notes.append(f"Repainted {settings.axis} slice{'s' * (len(chosen) > 1)} {_ranges(chosen)}.")
    return notes + write_painted(result, scan, output, inside, chosen, shown, settings)


def _regions(scan: Scan, mask: Scan, settings: GenerateSettings) -> tuple[list[int], np.ndarray]:
    """The slices to repaint (`[0]` where there is but one), and where: booleans on the grid of `scan.pixels`."""
    if settings.axis not in AXES:
        raise ValueError(f"the axis is {settings.axis!r}, but it must be one of {', '.join(AXES)}.")
    if not scan.is_volume:
        if settings.slice is not None or settings.all_slices:
            raise ValueError("a slice is chosen, but the source is a single picture. Leave that out.")
        return [0], _on_grid(mask, scan, [0], settings.axis, "mask", check_mask)
    if settings.slice is not None and settings.all_slices:
        raise ValueError("a slice and all slices are both asked for. Choose one of them.")
    if not mask.is_volume and settings.slice is None:
        raise ValueError("the mask is one slice, but the source a volume. Say which of its slices is meant.")
    given = [] if settings.slice is None else [settings.slice]
    inside = _on_grid(mask, scan, given, settings.axis, "mask", check_mask)
    canonical, _ = reorient(inside, scan.affine)
    counts = np.moveaxis(canonical, AXES.index(settings.axis), 0).sum((1, 2))
    if settings.all_slices:
        return np.flatnonzero(counts).tolist(), inside
    index = int(counts.argmax()) if settings.slice is None else settings.slice
    only = np.zeros_like(inside)
    plane(only, scan.affine, settings.axis, index)[...] = plane(inside, scan.affine, settings.axis, index)
    if not only.any():
        raise ValueError(f"the mask is empty in {settings.axis} slice {index}. The most is in {int(counts.argmax())}.")
    return [index], only


def _on_grid(given: Scan, scan: Scan, chosen: list[int], axis: str, name: str, check=None) -> np.ndarray:
    """A mask or label map on the grid of the scan."""
    check = check or (lambda values, size, name: values)
    if not scan.is_volume:
        if given.is_volume:
            raise ValueError(f"the {name} is a volume, but the source is one picture. Give a picture of its size.")
        _check_same(given.pixels.shape, scan.pixels.shape[:2], name)
        return check(given.pixels, scan.pixels.shape[:2], name)
    if not given.is_volume:
        whole = np.zeros(scan.pixels.shape, bool if name == "mask" else given.pixels.dtype)
        for index in chosen:
            target = plane(whole, scan.affine, axis, index)
            _check_same(given.pixels.shape, target.shape, name)
            target[...] = check(given.pixels, target.shape, name)
        return whole
    view, affine = reorient(given.pixels, given.affine)
    target, wanted = reorient(scan.pixels, scan.affine)
    _check_same(view.shape, target.shape, name)
    if np.abs(affine - wanted).max() > 0.05 * min(scan.spacing):
        raise ValueError(
            f"the {name} lies elsewhere in space than the source. Resample it to the grid of the source, or correct "
            "the unit of length in its header."
        )
    whole = np.zeros(scan.pixels.shape, bool if name == "mask" else given.pixels.dtype)
    flat = view.reshape(len(view), -1)
    reorient(whole, scan.affine)[0][...] = np.reshape(check(flat, flat.shape, name), view.shape)
    return whole


def _check_same(shape: tuple[int, ...], wanted: tuple[int, ...], name: str) -> None:
    if shape != wanted:
        raise ValueError(
            f"the {name} has {' x '.join(map(str, shape))} pixels, but the source {' x '.join(map(str, wanted))}. "
            "Resize it, with nearest neighbours, to the source."
        )


def paint_picture(
    pipe: OneRewardMaskPipeline,
    picture: np.ndarray,
    inside: np.ndarray,
    labels: np.ndarray | None,
    shown: tuple[float, float] | None,
    spacing: tuple[float, float],
    settings: GenerateSettings,
    callback_on_step_end: Callable | None = None,
) -> np.ndarray:
    """
    Paint one picture or slice in the numbers of its source.

    Args:
        pipe ([`OneRewardMaskPipeline`]):
            The pipeline, with the adapter put on.
        picture (`np.ndarray` of shape `(H, W)` or `(H, W, 3)`):
            The source.
        inside (`np.ndarray` of shape `(H, W)`, bool):
            The mask.
        labels (`np.ndarray` of shape `(H, W)`, *optional*):
            The label map.
        shown (`tuple[float, float]`, *optional*):
            Centre and width of the window of a grey picture.
        spacing (`tuple[float, float]`):
            Distance of rows and of columns.
        settings ([`GenerateSettings`]):
            What to paint, and how.
        callback_on_step_end (`Callable`, *optional*):
            Of the pipeline.

    Returns:
        `np.ndarray` of the shape of `picture`. Only what is `inside` is of use.

    Raises:
        `ValueError`: when the picture is so long and narrow that the square around it would take all memory.
    """
    grey = picture.ndim == 2
    seen = to_unit(picture, *shown) if grey else picture
    # Models learn from squares that were neither cropped nor stretched: black is put around, and taken off again.
    height, width = picture.shape[:2]
    side = max(height * spacing[0], width * spacing[1])
    rows, columns = max(height, round(side / spacing[0])), max(width, round(side / spacing[1]))
    if rows * columns > 16 * max(height * width, 2**20):
        raise ValueError(
            f"the slice is {height * spacing[0]:g} x {width * spacing[1]:g} mm, too long and narrow to be painted. "
            "Correct the spacing in the header of the source, or crop it."
        )
    top, left = (rows - height) // 2, (columns - width) // 2
    around = ((top, rows - height - top), (left, columns - width - left))
    work_size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    painted = pipe(
        settings.prompt,
        np.pad(seen, around if grey else (*around, (0, 0))),
        np.pad(inside, around),
        None if labels is None else np.pad(labels.astype(np.float64), around),
        task=settings.task,
        height=work_size,
        width=work_size,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="np",
        callback_on_step_end=callback_on_step_end,
    ).images[0]
    painted = painted[top : top + height, left : left + width]
    if not grey:
        return painted
    center, width = shown
    return painted.mean(-1, dtype=np.float64) * width + (center - width / 2)


def write_painted(
    result: np.ndarray,
    scan: Scan,
    output: Path,
    inside: np.ndarray,
    chosen: list[int],
    shown: tuple[float, float] | None,
    settings: GenerateSettings,
) -> list[str]:
    """
    Write what was painted, marked as synthetic, in the form that the output's name asks for.

    Args:
        result (`np.ndarray`):
            `scan.pixels` with what was painted in it.
        scan ([`~onereward.data.scans.Scan`]):
            The source.
        output (`Path`):
            As in [`run_generate`].
        inside (`np.ndarray`, bool):
            The mask, of the shape of `result` without colours.
        chosen (`list[int]`):
            The slices of a volume that were painted; of a picture `[0]`.
        shown (`tuple[float, float]`, *optional*):
            Centre and width of the window, in the numbers of `scan.pixels`.
        settings ([`GenerateSettings`]):
            How it was painted.

    Returns:
        `list[str]`: what should be said of it.
    """
    index, ending = chosen[0], _ending(output)
    named = shown and (scan.turn(shown[0]), shown[1])  # in the numbers of the file, which the user knows
    facts = _facts(scan, inside, chosen, named, settings)
    if ending == ".png":
        picture = plane(result, scan.affine, settings.axis, index) if scan.is_volume else result
        facts["mask"] = plane(facts["mask"], scan.affine, settings.axis, index) if scan.is_volume else facts["mask"]
        if picture.dtype == np.uint8 or (scan.kind == "picture" and picture.dtype == np.uint16):
            save_png(picture, output, **facts)
            return []
        save_png(window(picture, *shown), output, **facts)
        return [
            f"The PNG shows the window of centre {named[0]:g} and width {named[1]:g} in 8 bits; the numbers of the "
            "source are kept in .nii.gz and .dcm."
        ]
    if ending in (".nii", ".nii.gz"):
        affine = scan.affine if scan.oriented else None
        if scan.is_volume:
            save_nifti(result, output, affine=affine, spacing=scan.spacing, **facts)
        else:  # the first axis of NIfTI runs along a row
            spacing = None if scan.spacing is None else (scan.spacing[1], scan.spacing[0], 1.0)
            save_nifti(result.T[..., None], output, affine=affine, spacing=spacing, **facts)
        if scan.turned is None:
            return []
        return [
            "Low numbers are white in the source, which NIfTI cannot say: they are turned about, x became "
            f"{scan.turned:g} - x."
        ]
    about = {"modality": scan.modality, "rescale": scan.rescale, "window": named, "burned_in": scan.burned_in, **facts}
    if scan.turned is not None:
        result, about["low_is_white"] = scan.storable(scan.turn(result)), True
    about["is_volume"] = scan.is_volume and not ending
    if not scan.is_volume:
        save_dicom(result, output, affine=scan.affine, spacing=scan.spacing, **about)
    elif ending == ".dcm":
        place = plane_affine(result.shape, scan.affine, settings.axis, index)
        where = {"affine": place} if scan.oriented else {"spacing": np.linalg.norm(place[:3, [1, 0]], axis=0)}
        save_dicom(plane(result, scan.affine, settings.axis, index), output, **where, **about)
    elif scan.kind == "nifti":
        turned, affine = reorient(result, scan.affine, "LPS")  # as slices are stored by scanners
        save_dicom(turned, output, affine=affine, **about)
    else:
        save_dicom(result, output, affine=scan.affine, **about)
    return []


def _facts(scan: Scan, inside, chosen, shown, settings: GenerateSettings) -> dict:
    """What a file tells of its origin."""
    parents = [describe_parent("base_model", settings.pipeline, settings.revision)]
    if settings.adapter is not None:
        parents.append(describe_parent("adapter", settings.adapter, settings.adapter_revision))
    facts = {
        "model": parents[0]["name"],
        "revision": parents[0]["revision"],
        "parents": parents,
        "mask": inside,
        "seed": settings.seed,
        "settings": {
            "task": settings.task,
            "prompt": settings.prompt,
            "window": None if shown is None else list(shown),
            "slices": {"axis": settings.axis, "index": chosen} if scan.is_volume else None,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
        },
    }
    if settings.adapter is not None:
        facts |= {"adapter": parents[1]["name"], "adapter_revision": parents[1]["revision"]}
        facts["settings"]["adapter_strength"] = settings.adapter_strength
    return facts


def _ending(output: Path) -> str:
    return "".join(end for end in (".png", ".nii.gz", ".nii", ".dcm") if output.name.lower().endswith(end))


def _ranges(numbers: list[int]) -> str:
    """`[3, 4, 5, 9]` -> `"3-5, 9"`."""
    parts = np.split(np.array(numbers), np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
