"""Reading scans: pictures, NIfTI volumes, DICOM files and series. Nothing is read but pixels and technical fields."""

import gzip
import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from onereward.data.folder import to_values
from onereward.data.synthetic import DICOM_HINT


AXES = ("sagittal", "coronal", "axial")
PICTURES = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
MAX_BYTES, MAX_PIXELS = 1 << 30, 1 << 28
# All that is ever read of a DICOM header. Other fields never come into memory as such.
TECHNICAL = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "SliceThickness",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "BurnedInAnnotation",
    "PatientIdentityRemoved",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
)
# Makers of pictures that write names into the pixels: ultrasound, endoscopes, captures of a screen or of paper.
OFTEN_BURNED_IN = ("US", "IVUS", "OT", "SC", "ES", "XC", "GM", "DOC", "XA", "RF", "NM", "PT", "HC")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


class BadScan(ValueError):
    """A file that cannot be read as it stands. The message says what is wrong and how to mend it."""


@dataclass
class Scan:
    """
    What [`read_scan`] found.

    Args:
        pixels (`np.ndarray`):
            A picture or slice `(rows, columns)`, a colour picture `(rows, columns, 3)`, or a volume `(X, Y, Z)`. The
            numbers mean what the file says (HU for CT): integers where they are, else floats. High is white.
        kind (`str`):
            `"picture"`, `"nifti"` (always a volume), `"dicom"` (one slice) or `"dicom-series"` (a volume whose axes
            are columns, rows and slices).
        spacing (`tuple[float, ...]`, *optional*):
            Distance of neighbours along each axis of `pixels` in mm.
        affine (`np.ndarray`, *optional*):
            From indices of a volume, or from (column, row, 0) of a slice, to RAS coordinates in mm, `(4, 4)`.
        oriented (`bool`, *optional*, defaults to `True`):
            Whether the directions of `affine` are those of the file. A NIfTI file may say that they are not known:
            then they are a guess, to show slices by but not to be written.
        modality (`str`, *optional*):
            As DICOM names it, e.g. `"CT"`.
        rescale (`tuple[float, float]`, *optional*):
            Slope and intercept that the file's integers were multiplied by and increased by; `None` where the file
            holds floats.
        limits (`tuple[float, float]`):
            Least and greatest number that `pixels` could hold.
        window (`tuple[float, float]`, *optional*):
            Centre and width that the file recommends for display, in the numbers of `pixels`.
        turned (`float`, *optional*):
            Where low is white in the file (MONOCHROME1), its numbers are turned about in `pixels`: what a number and
            its turned one add up to.
        burned_in (`str`, *optional*):
            `"YES"` or `"NO"`: whether the file says that text stands in the pixels.
        warnings (`list[str]`):
            What a person should know before the pixels are shown to others.
    """

    pixels: np.ndarray
    kind: str
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None
    oriented: bool = True
    modality: str | None = None
    rescale: tuple[float, float] | None = (1, 0)
    limits: tuple[float, float] = (-math.inf, math.inf)
    window: tuple[float, float] | None = None
    turned: float | None = None
    burned_in: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def is_volume(self) -> bool:
        """Whether there are slices to choose from."""
        return self.kind in ("nifti", "dicom-series")

    def slice(self, index: int, axis: str = "axial") -> np.ndarray:
        """One slice of a volume, as of [`plane`]."""
        return plane(self.pixels, self.affine, axis, index)

    def turn(self, numbers: np.ndarray | float) -> np.ndarray | float:
        """Numbers of the file as numbers of `pixels`, and back. They differ where low is white in the file."""
        return numbers if self.turned is None else self.turned - numbers

    def storable(self, values: np.ndarray) -> np.ndarray:
        """The nearest numbers that the file could hold, in the type of `pixels`."""
        if self.rescale is not None:
            slope, intercept = self.rescale
            values = np.rint((np.asarray(values, np.float64) - intercept) / slope) * slope + intercept
        return np.clip(values, *self.limits).astype(self.pixels.dtype)


def read_scan(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Scan:
    """
    Read a picture or scan. What it is, is told from its content. Of a DICOM header only a short list of technical
    fields is read; names, dates and identifiers are not. A header that promises more than the file holds, or than is
    allowed, is refused before memory is taken for it.

    Args:
        path (`str` or `os.PathLike`):
            PNG, JPEG, TIFF, WebP or BMP of 8 bits, grey also of 16 or 32; NIfTI (`.nii`, `.nii.gz`); a DICOM file of
            one frame; or a folder with the files of one DICOM series (these need the extra `dicom`).
        max_bytes (`int`, *optional*, defaults to 1 GiB):
            Largest size of the file, or of all files of a series together.
        max_pixels (`int`, *optional*, defaults to 2**28):
            Largest number of pixels or voxels.

    Returns:
        [`Scan`].

    Raises:
        `ImportError`: when it is a DICOM file and pydicom is missing.
        `BadScan`: a `ValueError`, when it cannot be read as it stands: damaged, too large, more than three dimensions,
            no numbers, NaN, spacing of 0 or below, several series, gaps between slices, ...

    Example:

    ```python
    >>> import numpy as np
    >>> from onereward.data.scans import plane, read_scan, window
    >>> from onereward.data.synthetic import save_nifti

    >>> save_nifti(np.arange(24, dtype=np.int16).reshape(2, 3, 4), "runs/v.nii.gz", model="demo", affine=np.eye(4))
    >>> scan = read_scan("runs/v.nii.gz")
    >>> picture = window(plane(scan.pixels, scan.affine, "axial", 0), center=12, width=24)
    >>> picture.shape, scan.spacing
    ((3, 2), (1.0, 1.0, 1.0))
    ```
    """
    with _damage_named(path):
        path = Path(path)
        if path.is_dir():
            return _read_series(path, max_bytes, max_pixels)
        start = _check_file(path, max_bytes)
        if start[128:132] == b"DICM":
            return _read_dicom([path], max_pixels)
        if start[:2] == b"\x1f\x8b" or path.suffix == ".nii":
            return _read_nifti(path, max_pixels)
        pixels = _picture_pixels(_open_picture(path, max_pixels))
        _check_numbers(pixels)
        if pixels.dtype.kind == "f":
            scan = Scan(pixels, "picture", rescale=None)
        else:
            scan = Scan(pixels, "picture", limits=(np.iinfo(pixels.dtype).min, np.iinfo(pixels.dtype).max))
        scan.warnings += _text_warning(pixels)
        return scan


def read_labels(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Scan:
    """
    Read a mask or label map: as [`read_scan`], but a picture with a palette gives its indices, grey saved as colour is
    grey again, and nobody looks for text.
    """
    with _damage_named(path):
        path = Path(path)
        if not path.is_dir():
            start = _check_file(path, max_bytes)
            if not (start[128:132] == b"DICM" or start[:2] == b"\x1f\x8b" or path.suffix == ".nii"):
                return Scan(to_values(_open_picture(path, max_pixels), path.name), "picture")
    return read_scan(path, max_bytes=max_bytes, max_pixels=max_pixels)


def window(pixels: np.ndarray, center: float, width: float) -> np.ndarray:
    """
    Show numbers as grey, linearly: black at `center - width / 2` and below, white at `center + width / 2` and above
    (DICOM's `LINEAR_EXACT`, PS3.3 C.11.2.1.3.2).

    Args:
        pixels (`np.ndarray`):
            Numbers of any shape, e.g. HU.
        center (`float`):
            Number that becomes middle grey.
        width (`float`):
            Distance of black and white, above 0, in the unit of `pixels`.

    Returns:
        `np.ndarray` of the same shape, `uint8`.

    Raises:
        `ValueError`: when `width` is not above 0.
    """
    return np.rint(to_unit(pixels, center, width) * 255).astype(np.uint8)


def to_unit(pixels: np.ndarray, center: float, width: float) -> np.ndarray:
    """As [`window`], but as `float64` in [0, 1], which keeps more than 256 grey levels."""
    if not (width > 0 and math.isfinite(width) and math.isfinite(center)):
        raise ValueError(f"the window has centre {center} and width {width}, but a width above 0 is wanted.")
    return np.clip((np.asarray(pixels, np.float64) - (center - width / 2)) / width, 0, 1)


def default_window(scan: Scan) -> tuple[float, float]:
    """
    The window to show a scan with: what its file recommends; for 8 bits all of them; else from the 0.5th to the
    99.5th percentile, so that a few bright pixels do not darken the rest.

    Args:
        scan ([`Scan`]):
            The scan.

    Returns:
        `tuple[float, float]`: centre and width in the numbers of `scan.pixels`.
    """
    if scan.pixels.dtype == np.uint8:
        return 127.5, 255.0
    if scan.window is not None:
        return scan.window
    step = -(-scan.pixels.size // (1 << 22))  # four million voxels tell the percentiles well enough
    low, high = np.percentile(scan.pixels.reshape(-1)[::step].astype(np.float64), (0.5, 99.5))
    if high <= low:  # almost everything is background
        low, high = float(scan.pixels.min()), float(scan.pixels.max())
    return (float(low + high) / 2, float(high - low)) if high > low else (float(low), 1.0)


def reorient(volume: np.ndarray, affine: np.ndarray, codes: str = "RAS") -> tuple[np.ndarray, np.ndarray]:
    """
    Turn the axes of a volume, by flips and swaps alone, to those that come nearest to the body's.

    Args:
        volume (`np.ndarray`):
            Voxels `(X, Y, Z)`.
        affine (`np.ndarray`):
            From its indices to RAS coordinates, `(4, 4)`.
        codes (`str`, *optional*, defaults to `"RAS"`):
            Where each axis leads: towards Right or Left, Anterior or Posterior, Superior or Inferior.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: a view of the volume, through which it can be written, and its affine.
    """
    from nibabel import orientations

    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(tuple(codes)))
    view = orientations.apply_orientation(volume, turn)
    return view, np.asarray(affine) @ orientations.inv_ornt_aff(turn, volume.shape)


def plane(volume: np.ndarray, affine: np.ndarray, axis: str, index: int) -> np.ndarray:
    """
    One slice as a radiologist looks at it: the patient's right is on the left of axial and coronal slices, the front
    is at the top of axial and at the left of sagittal slices, the head is at the top of the others.

    Args:
        volume (`np.ndarray`):
            Voxels `(X, Y, Z)`.
        affine (`np.ndarray`):
            From its indices to RAS coordinates, `(4, 4)`.
        axis (`str`):
            `"sagittal"`, `"coronal"` or `"axial"`.
        index (`int`):
            Which slice, from 0, counted from the patient's left to right, back to front, or feet to head.

    Returns:
        `np.ndarray` of shape `(rows, columns)`: a view, through which the volume can be written.

    Raises:
        `ValueError`: when there is no such axis or slice.
    """
    if axis not in AXES:
        raise ValueError(f"`axis` is {axis!r}, but it must be one of {', '.join(AXES)}.")
    canonical, _ = reorient(volume, affine)
    number = AXES.index(axis)
    if not 0 <= index < canonical.shape[number]:
        raise ValueError(
            f"there is no {axis} slice {index}: this volume has slices 0 to {canonical.shape[number] - 1}."
        )
    return np.moveaxis(canonical, number, 0)[index].T[::-1, ::-1]


def plane_affine(shape: tuple[int, int, int], affine: np.ndarray, axis: str, index: int) -> np.ndarray:
    """
    Where a [`plane`] lies.

    Args:
        shape, affine, axis, index:
            Of the volume and the slice, as there.

    Returns:
        `np.ndarray`: from (column, row, 0) of the slice to RAS coordinates in mm, `(4, 4)`; the third column leads to
        the next slice.
    """
    canonical, affine = reorient(np.broadcast_to(np.uint8(0), shape), affine)
    number = AXES.index(axis)
    across, down = [other for other in range(3) if other != number]
    corner = np.zeros(4)
    corner[[across, down, number, 3]] = canonical.shape[across] - 1, canonical.shape[down] - 1, index, 1
    return np.stack([-affine[:, across], -affine[:, down], affine[:, number], affine @ corner], axis=1)


# ------------------------------------------------------------------------------------------------------------ checks


@contextmanager
def _damage_named(path: str | os.PathLike) -> Iterator[None]:
    """
    Readers raise whatever a damaged file leads them to, in words that may quote it. [`BadScan`] of it.
    """
    try:
        yield
    except (BadScan, ImportError):
        raise
    except Exception as error:
        name = Path(path).name
        raise BadScan(
            f"{name} cannot be read: it is damaged or not whole ({type(error).__name__}). Save or download it anew."
        ) from error


def _check_file(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise BadScan(f"there is no file {str(path)!r}.")
    if path.stat().st_size > max_bytes:
        raise BadScan(f"{path.name} has {path.stat().st_size:,} bytes, but at most {max_bytes:,} are read.")
    with open(path, "rb") as file:
        return file.read(132)


def _check_size(shape: tuple[int, ...], max_pixels: int, name: str) -> None:
    if min(shape, default=0) < 1 or math.prod(shape) > max_pixels:
        raise BadScan(
            f"{name} says that it has {' x '.join(map(str, shape))} pixels, but 1 to {max_pixels:,} in all are read. "
            "Crop it or save it smaller."
        )


def _check_numbers(pixels: np.ndarray) -> None:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadScan("the image holds NaN or infinite values. Replace them, e.g. by 0.")


def _check_spacing(spacing) -> tuple[float, ...]:
    spacing = tuple(float(value) for value in spacing)
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise BadScan(f"the file gives the spacing {spacing} mm, but numbers above 0 are wanted. Correct its header.")
    return spacing


# ---------------------------------------------------------------------------------------------------------- pictures


def _open_picture(path: Path, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked just below
            picture = Image.open(path, formats=PICTURES)
        with picture:
            _check_size(picture.size, max_pixels, path.name)
            _check_depth(picture, path)
            if getattr(picture, "n_frames", 1) > 1:
                raise BadScan(f"{path.name} holds {picture.n_frames} pictures. Save the one you want by itself.")
            return ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError:
        raise BadScan(f"{path.name} says that it has more pixels than are read. Save it smaller.") from None
    except Image.UnidentifiedImageError:
        raise BadScan(
            f"{path.name} cannot be identified: PNG, JPEG, TIFF, WebP, BMP, NIfTI (.nii, .nii.gz) and DICOM files "
            "that begin with a preamble are read."
        ) from None


def _check_depth(picture: Image.Image, path: Path) -> None:
    """Pillow cuts colours of 16 bits to 8 without a word."""
    if picture.format == "PNG":
        with open(path, "rb") as file:
            depth, kind = file.read(26)[24:]
        deep = depth == 16 and kind != 0
    elif picture.format == "TIFF":
        depths = picture.tag_v2.get(258, (1,))
        deep = len(depths) > 1 and max(depths) > 8
    else:
        return
    if deep:
        raise BadScan(f"{path.name} has colours or transparency of 16 bits. Save it with 8 bits, or as grey.")


def _picture_pixels(picture: Image.Image) -> np.ndarray:
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("LA", "RGBA"):
        if picture.getchannel("A").getextrema()[0] < 255:
            raise BadScan("the image is transparent in places. Put it on a background, and save it without alpha.")
        picture = picture.convert(picture.mode[:-1])
    if picture.mode not in ("L", "RGB", "I", "F") and not picture.mode.startswith("I;16"):
        raise BadScan(f"the image has colours in mode {picture.mode!r}. Save it as grey or RGB.")
    pixels = np.array(picture)
    return pixels.astype(pixels.dtype.newbyteorder("="))


# ------------------------------------------------------------------------------------------------------------- NIfTI


def _read_nifti(path: Path, max_pixels: int) -> Scan:
    import nibabel as nib

    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else open(path, "rb") as file:
        start = file.read(540)
        kind = nib.Nifti2Header if start[4:8] == b"n+2\0" else nib.Nifti1Header
        if start[344:348] != b"n+1\0" and start[4:8] != b"n+2\0":
            raise BadScan(f"{path.name} is no NIfTI file of one part. Save it as .nii or .nii.gz.")
        header = kind(start[: kind.template_dtype.itemsize], check=False)
        shape, data_type = header.get_data_shape(), header.get_data_dtype()
        offset = int(header["vox_offset"]) if np.isfinite(header["vox_offset"]) else -1
        shape = tuple(shape[:3]) + tuple(size for size in shape[3:] if size != 1)  # (x, y, z, 1) is a volume
        if not 2 <= len(shape) <= 3:
            raise BadScan(
                f"{path.name} has the dimensions {' x '.join(map(str, shape))}, but one volume of 2 or 3 is "
                "wanted. Save one of its volumes by itself."
            )
        shape += (1,) * (3 - len(shape))
        _check_size(shape, max_pixels, path.name)
        if data_type.kind not in "iuf" or data_type.itemsize > 8:
            raise BadScan(f"{path.name} holds {data_type} at each voxel, but integers or floats are wanted.")
        if not 0 <= offset <= 1 << 24:
            raise BadScan(f"{path.name} says that its voxels begin at byte {offset:,}. Its header is damaged.")
        file.seek(offset)
        wanted = math.prod(shape) * data_type.itemsize
        content = bytearray()  # memory is taken for what comes, not for what is promised, and once
        while len(content) < wanted and (chunk := file.read(min(wanted - len(content), 1 << 24))):
            content += chunk
    if len(content) < wanted:
        raise BadScan(f"{path.name} ends after {len(content):,} of {wanted:,} bytes of voxels. Download it anew.")
    stored = np.frombuffer(content, data_type).reshape(shape, order="F")
    stored = stored.astype(data_type.newbyteorder("="), copy=False)
    _check_numbers(stored)
    try:
        slope, intercept = header.get_slope_inter()
    except nib.spatialimages.HeaderDataError as error:
        raise BadScan(f"{path.name} scales its voxels by what is no number ({error}). Correct its header.") from error
    rescale = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    pixels, limits = _rescaled(stored, rescale)

    # 1 is metres, 3 micrometres; where the unit is not said, as nibabel does not, mm are meant
    unit = {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)
    spacing = _check_spacing(abs(float(size)) * unit for size in header["pixdim"][1:4])
    affine, notes = header.get_best_affine(), []
    oriented = bool(header["sform_code"] or header["qform_code"])
    if not oriented:
        notes.append("The file does not say how the patient lies in it: slices may be turned or mirrored.")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-9 * sizes.prod():
        raise BadScan(f"{path.name} has an affine that is no affine ({affine[:3, :3].tolist()}). Correct its header.")
    affine[:3] *= unit
    if header["sform_code"]:
        spacing = _check_spacing(sizes * unit)
    return Scan(
        pixels,
        "nifti",
        spacing=spacing,
        affine=affine,
        oriented=oriented,
        rescale=rescale if stored.dtype.kind in "iu" else None,
        limits=limits,
        warnings=notes,
    )


def _rescaled(stored: np.ndarray, rescale: tuple[float, float], bits: int | None = None):
    """What the stored numbers mean, and the least and greatest that could be stored."""
    slope, intercept = rescale
    if stored.dtype.kind == "f":
        return stored if rescale == (1, 0) else _times(stored, slope, intercept), (-math.inf, math.inf)
    bits = bits or 8 * stored.dtype.itemsize
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if stored.dtype.kind == "i" else (0, 2**bits - 1)
    low, high = sorted(end * slope + intercept for end in ends)
    if rescale == (1, 0):
        return stored, ends
    pixels = _times(stored, slope, intercept)
    if slope.is_integer() and intercept.is_integer():
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return pixels.astype(kind), (low, high)
        if np.iinfo(np.int32).min <= pixels.min() and pixels.max() <= np.iinfo(np.int32).max:
            return pixels.astype(np.int32), (max(low, np.iinfo(np.int32).min), min(high, np.iinfo(np.int32).max))
    return pixels, (low, high)


def _times(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """In place, as a volume fills memory: `stored` is not to be used again."""
    pixels = stored.astype(np.float64, copy=False)
    pixels *= slope
    pixels += intercept
    return pixels


# ------------------------------------------------------------------------------------------------------------- DICOM


def _read_series(folder: Path, max_bytes: int, max_pixels: int) -> Scan:
    files, size = [], 0
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.upper() != "DICOMDIR":
            size += path.stat().st_size
            if size > max_bytes:
                raise BadScan(f"the files of the folder have more than {max_bytes:,} bytes, the most that are read.")
            if _check_file(path, max_bytes)[128:132] == b"DICM":
                files.append(path)
    if not files:
        raise BadScan("the folder holds no DICOM file. Name a folder with the files of one series.")
    return _read_dicom(files, max_pixels)


def _load(path: Path):
    """The technical fields of a DICOM file and its pixel data, still encoded."""
    import pydicom

    content = path.read_bytes()  # all of it, so that no length in a header can ask for more
    meta = pydicom.filereader.read_file_meta_info(path)
    syntax = meta.get("TransferSyntaxUID")
    if syntax is None or syntax.is_deflated:  # deflated data has no limit to what it grows to
        raise BadScan(f"{path.name} is a DICOM file in no transfer syntax that is read. Save it uncompressed.")
    return pydicom.dcmread(io.BytesIO(content), specific_tags=list(TECHNICAL))


def _read_dicom(paths: list[Path], max_pixels: int) -> Scan:
    try:
        from pydicom.config import disable_value_validation
    except ImportError as error:
        raise ImportError(DICOM_HINT) from error
    slices, seen = [], 0
    for path in paths:
        with disable_value_validation():  # whose warnings quote the header
            scan, series = _read_slice(path, max_pixels - seen)
        slices.append((scan, series))
        seen += scan.pixels.size
    if len(slices) == 1:
        return slices[0][0]
    if len({series for _, series in slices}) > 1:
        raise BadScan(
            f"the folder holds {len({series for _, series in slices})} series. Put the files of one into a folder."
        )
    return _stack([scan for scan, _ in slices])


def _read_slice(path: Path, max_pixels: int) -> tuple[Scan, str]:
    file = _load(path)
    if "Rows" not in file or "Columns" not in file:
        raise BadScan(f"{path.name} is a DICOM file without an image.")
    frames = int(file.get("NumberOfFrames") or 1)
    if frames != 1:
        raise BadScan(f"{path.name} holds {frames} frames. Save the one you want, or the series as one file a slice.")
    _check_size((int(file.Columns), int(file.Rows)), max_pixels, path.name)
    pixels, rescale, limits, turned = _decode(file, path.name)
    _check_numbers(pixels)

    notes = []
    affine, position = None, file.get("ImagePositionPatient")
    thickness = file.get("SliceThickness")
    spacing = file.get("PixelSpacing")
    if spacing is None and (file.get("ImagerPixelSpacing") or file.get("NominalScannedPixelSpacing")) is not None:
        spacing = file.get("ImagerPixelSpacing") or file.get("NominalScannedPixelSpacing")
        notes.append("The spacing is that at the detector or on paper, not in the patient.")
    if spacing is not None:
        spacing = _check_spacing(spacing)
        if len(spacing) != 2:
            raise BadScan(f"{path.name} gives {len(spacing)} numbers as the spacing of pixels, but 2 are wanted.")
    directions = file.get("ImageOrientationPatient")
    if spacing is not None and position is not None and directions is not None:
        directions = np.array([float(value) for value in directions])
        if len(position) != 3 or directions.shape != (6,) or not np.isfinite(directions).all():
            raise BadScan(f"{path.name} has a position or orientation that is none. Correct its header.")
        along_row, along_column = directions.reshape(2, 3)
        if abs(np.linalg.norm(along_row) - 1) > 1e-2 or abs(np.linalg.norm(along_column) - 1) > 1e-2:
            raise BadScan(f"{path.name} has directions that are no unit vectors. Correct its header.")
        depth = float(thickness) if thickness is not None and float(thickness) > 0 else 1.0
        lps = np.eye(4)
        lps[:3, 0], lps[:3, 1] = along_row * spacing[1], along_column * spacing[0]
        lps[:3, 2] = np.cross(along_row, along_column) * depth
        lps[:3, 3] = [float(value) for value in position]
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
        if not np.isfinite(affine).all():
            raise BadScan(f"{path.name} has a position or orientation that is none. Correct its header.")

    modality = str(file.get("Modality") or "") or None
    burned_in = file.get("BurnedInAnnotation")
    capture = str(file.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)
    if burned_in == "YES":
        notes.append("The file says that text is burned into its pixels, which may name the patient.")
    elif burned_in != "NO" and (capture or pixels.ndim == 3 or modality in (None, *OFTEN_BURNED_IN)):
        notes.append("The file does not say whether text is burned into its pixels, as it often is in such images.")
    if file.get("PatientIdentityRemoved") != "YES":
        notes.append("The file does not say that the patient's identity was removed from it.")
    notes += _text_warning(pixels)
    center, width = (_first(file.get(name)) for name in ("WindowCenter", "WindowWidth"))
    scan = Scan(
        pixels,
        "dicom",
        spacing=spacing,
        affine=affine,
        modality=modality,
        rescale=rescale,
        limits=limits,
        turned=turned,
        burned_in=burned_in if burned_in in ("YES", "NO") else None,
        warnings=notes,
    )
    if center is not None and width is not None and width > 0:
        scan.window = scan.turn(center), width
    return scan, str(file.get("SeriesInstanceUID", ""))


def _first(value) -> float | None:
    """A number, or the first of several."""
    value = value[0] if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else value
    return None if value in (None, "") or not math.isfinite(float(value)) else float(value)


def _decode(file, name: str) -> tuple[np.ndarray, tuple[float, float] | None, tuple[float, float], float | None]:
    """`pixels`, `rescale`, `limits` and `turned` of a DICOM image, which is turned about where low is white."""
    from pydicom.pixels import apply_color_lut, get_decoder

    syntax = file.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise BadScan(f"{name} is compressed as {syntax.name}, which is not read. Save it uncompressed.")
    if syntax.is_encapsulated:
        _check_frame(file, name)
    photometric = str(file.PhotometricInterpretation)
    if "ModalityLUTSequence" in file:
        raise BadScan(f"{name} gives meaning to its numbers by a table. Save it with slope and intercept.")
    try:
        pixels = file.pixel_array  # colours are RGB, whatever they were stored as
    except RuntimeError as error:
        raise BadScan(
            f"{name} is compressed as {syntax.name} in a way that cannot be read. Save it uncompressed."
        ) from error
    pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, file)
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    if pixels.ndim == 3:
        if pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise BadScan(f"{name} has colours of {pixels.dtype} and shape {pixels.shape}, but 8 bits are wanted.")
        return pixels, (1, 0), (0, 255), None
    if pixels.ndim != 2 or pixels.dtype.kind not in "iuf":
        raise BadScan(f"{name} holds {pixels.dtype} of shape {pixels.shape}, but one slice of numbers is wanted.")
    bits = int(file.get("BitsStored") or 8 * pixels.itemsize)
    rescale = (float(file.get("RescaleSlope") or 1), float(file.get("RescaleIntercept") or 0))
    if not (math.isfinite(rescale[0]) and math.isfinite(rescale[1]) and rescale[0]):
        raise BadScan(f"{name} has the rescale slope {rescale[0]}. Correct its header.")
    turned = None
    if photometric == "MONOCHROME1":
        if pixels.dtype.kind == "f":
            raise BadScan(f"{name} holds floats in MONOCHROME1. Save it as MONOCHROME2.")
        both_ends = -1 if pixels.dtype.kind == "i" else 2**bits - 1
        pixels = (both_ends - pixels.astype(np.int64)).astype(pixels.dtype)
        turned = both_ends * rescale[0] + 2 * rescale[1]
    numbers, limits = _rescaled(pixels, rescale, bits if pixels.dtype.kind in "iu" else None)
    return numbers, rescale if pixels.dtype.kind in "iu" else None, limits, turned


def _check_frame(file, name: str) -> None:
    """A compressed frame has a header of its own, whose size the decoder would believe."""
    from pydicom.encaps import generate_frames

    frame = next(generate_frames(file.PixelData, number_of_frames=1), b"")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as picture:
                size = picture.size
    except Image.UnidentifiedImageError:
        return  # RLE has no such header
    except Image.DecompressionBombError:
        size = "more"
    if size != (file.Columns, file.Rows):
        raise BadScan(f"{name} says one size in its header and another ({size}) in its pixel data. It is damaged.")


def _stack(slices: list[Scan]) -> Scan:
    """The slices of a series, in order along their normal, as a volume of (columns, rows, slices)."""
    first = slices[0]
    if any(scan.affine is None for scan in slices):
        raise BadScan("a file of the series does not say where its slice lies. Name one file instead of the folder.")
    if any(scan.pixels.ndim != 2 for scan in slices):
        raise BadScan("the series is coloured. Name one file instead of the folder.")
    for scan in slices:
        if scan.pixels.shape != first.pixels.shape or not np.allclose(
            scan.affine[:3, :2], first.affine[:3, :2], atol=1e-3
        ):
            raise BadScan("the slices of the series differ in size, spacing or direction. Name one that is straight.")
        if scan.turned != first.turned:
            raise BadScan("the slices of the series differ in which numbers are white. Name one file instead.")
    normal = first.affine[:3, 2] / np.linalg.norm(first.affine[:3, 2])
    slices = sorted(slices, key=lambda scan: float(normal @ scan.affine[:3, 3]))
    positions = np.stack([scan.affine[:3, 3] for scan in slices])
    steps = np.diff(positions, axis=0)
    step = steps.mean(0)
    gap = float(normal @ step)
    if gap < 1e-3 or np.abs(steps - step).max() > 0.05 * gap:
        raise BadScan(
            "the slices of the series are not evenly spaced: some are missing, doubled, or of another phase. Sort "
            "them out, or name one file."
        )
    affine = slices[0].affine.copy()
    affine[:3, 2] = step
    kind = np.result_type(*(scan.pixels for scan in slices))
    rescales = {scan.rescale for scan in slices}
    return Scan(
        np.stack([scan.pixels.T for scan in slices], axis=-1).astype(kind),
        "dicom-series",
        spacing=_check_spacing(np.linalg.norm(affine[:3, :3], axis=0)),
        affine=affine,
        modality=first.modality,
        rescale=first.rescale if len(rescales) == 1 else None,
        limits=(max(scan.limits[0] for scan in slices), min(scan.limits[1] for scan in slices)),
        window=first.window,
        turned=first.turned,
        burned_in=first.burned_in if len({scan.burned_in for scan in slices}) == 1 else None,
        warnings=list(dict.fromkeys(note for scan in slices for note in scan.warnings)),
    )


# ------------------------------------------------------------------------------------------------- burned-in text


def _text_warning(pixels: np.ndarray) -> list[str]:
    where = text_like_corners(pixels)
    if not where:
        return []
    return [f"Something like text stands in the pixels ({', '.join(where)}): look whether it names the patient."]


def text_like_corners(pixels: np.ndarray) -> list[str]:
    """
    Look for writing in the corners of a slice: four or more bright pieces of about one height, side by side on one
    line. It is a hint and no proof: faint, dark or handwritten text is missed.

    Args:
        pixels (`np.ndarray`):
            Slice `(rows, columns)` or `(rows, columns, 3)`.

    Returns:
        `list[str]`: names of the corners with something like text, e.g. `["top left"]`.
    """
    grey = pixels.astype(np.float32).max(-1) if pixels.ndim == 3 else pixels.astype(np.float32)
    rows, columns = grey.shape
    low, high = float(grey.min()), float(grey.max())
    if min(rows, columns) < 48 or high <= low:
        return []
    bright = grey > low + 0.7 * (high - low)
    found = []
    height, width = rows // 4, 2 * columns // 5
    for name, part in {
        "top left": bright[:height, :width],
        "top right": bright[:height, -width:],
        "bottom left": bright[-height:, :width],
        "bottom right": bright[-height:, -width:],
    }.items():
        if part.mean() > 0.15:
            continue  # writing is mostly gaps
        labelled, _ = ndimage.label(part, np.ones((3, 3)))
        pieces = [
            (y.start, y.stop, x.start, x.stop)
            for y, x in ndimage.find_objects(labelled)
            if 5 <= y.stop - y.start <= rows // 8 and 1 <= x.stop - x.start <= 1.6 * (y.stop - y.start)
        ]
        for top, bottom, *_ in pieces:
            size = bottom - top
            line = [
                piece
                for piece in pieces
                if abs(piece[0] - top) <= 0.35 * size and abs(piece[1] - bottom) <= 0.35 * size
            ]
            line.sort(key=lambda piece: piece[2])
            run = best = 1
            for left, right in zip(line[:-1], line[1:], strict=True):
                run = run + 1 if 0 <= right[2] - left[3] <= size else 1
                best = max(best, run)
            if best >= 4:
                found.append(name)
                break
    return found
