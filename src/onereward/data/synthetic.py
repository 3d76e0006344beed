"""Files that say they are synthetic: PNG, NIfTI and DICOM, in the fields that other programs read."""

import gzip
import hashlib
import io
import json
import os
import re
import struct
import tempfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from onereward import __version__
from onereward.data.whole_file import whole_file, write_json


NOTICE = "Research use only, not for clinical use."
SOFTWARE = f"onereward {__version__}"
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PAINTED = SOURCE_TYPES + "trainedAlgorithmicMedia"
PARTLY_PAINTED = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
DICOM_HINT = "DICOM files need pydicom. Install it with `pip install onereward[dicom]`."
NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
COMMENT = 6  # code of a NIfTI extension that holds text


def save_png(
    image: Image.Image | np.ndarray,
    path: str | os.PathLike,
    *,
    model: str,
    revision: str | None = None,
    parents: Sequence[dict] = (),
    sidecar: bool = True,
    **facts,
) -> None:
    """
    Write a synthetic picture as PNG that says what it is: in the registered text fields (`Title`, `Description`,
    `Software`, `Source`, `Disclaimer`, `Warning`, and `Comment` with all facts as JSON), and in an XMP packet with the
    [digital source type](https://cv.iptc.org/newscodes/digitalsourcetype/) of the IPTC, which other programs read.
    Pixels are written as they are; nothing else of `image` is (no EXIF, no colour profile).

    Args:
        image (`PIL.Image.Image` or `np.ndarray`):
            Picture in mode `"L"`, `"RGB"`, `"RGBA"` or `"I;16"`; or an array, `uint8` of shape `(H, W)`, `(H, W, 3)`
            or `(H, W, 4)`, or `uint16` of shape `(H, W)`.
        path (`str` or `os.PathLike`):
            File to write. It appears whole or not at all.
        model (`str`):
            What made it: a Hub id, or a folder, of which only the last name is written.
        revision (`str`, *optional*):
            Commit of the model.
        parents (`Sequence[dict]`, *optional*, defaults to `()`):
            What it was made with, as of [`~onereward.hub.provenance.describe_parent`], for the sidecar.
        sidecar (`bool`, *optional*, defaults to `True`):
            Whether to write [`sidecar_of`] the file too: the same facts, with the time and the file's SHA-256.
        facts:
            What else is known, as of [`describe`]: `adapter`, `adapter_revision`, `seed`, `mask`, and any JSON values,
            e.g. `settings={"num_inference_steps": 20}`.

    Raises:
        `ValueError`: when PNG cannot hold the pixels as they are.

    Example:

    ```python
    >>> import numpy as np
    >>> from onereward.data.synthetic import is_synthetic, save_png

    >>> save_png(np.zeros((8, 8), np.uint8), "runs/black.png", model="org/onereward-brats", seed=0)
    >>> is_synthetic("runs/black.png")["model"]
    'org/onereward-brats'
    ```
    """
    pixels = np.asarray(image)
    shapes = {"uint8": (2, 3), "uint16": (2,)}
    if pixels.ndim not in shapes.get(pixels.dtype.name, ()) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(
            f"`image` is {pixels.dtype} of shape {pixels.shape}, but a PNG holds uint8 of shape (H, W), (H, W, 3) or "
            "(H, W, 4), or uint16 of shape (H, W). Window it first, or write NIfTI with `save_nifti`."
        )
    if isinstance(image, Image.Image) and image.mode not in ("L", "RGB", "RGBA", "I;16"):
        raise ValueError(f"`image` is in mode {image.mode!r}, but 'L', 'RGB', 'RGBA' or 'I;16' is wanted. Convert it.")
    mark = describe(model, revision, **facts)
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", _xmp(mark))
    text.add_text("Title", "Synthetic image")
    text.add_text("Description", _sentence(mark))
    text.add_text("Software", SOFTWARE)
    text.add_text("Source", _maker(mark))
    text.add_text("Disclaimer", NOTICE)
    text.add_text("Warning", "Synthetic: painted by a model, in whole or in part. It shows no patient as they are.")
    text.add_text("Comment", json.dumps(mark))
    with whole_file(path) as partial:
        Image.fromarray(pixels).save(partial, format="png", pnginfo=text)  # from the array: no EXIF, no profile
    if sidecar:
        _write_sidecar(Path(path), mark, parents)


def save_nifti(
    volume: np.ndarray,
    path: str | os.PathLike,
    *,
    model: str,
    revision: str | None = None,
    parents: Sequence[dict] = (),
    affine: np.ndarray | None = None,
    spacing: tuple[float, ...] | None = None,
    **facts,
) -> None:
    """
    Write a synthetic volume as NIfTI that says what it is, in the header's `descrip` and, with all facts as JSON, in
    an extension of code 6 (comment). Voxels are written as they are, in their own type and without scaling.

    Args:
        volume (`np.ndarray`):
            Integers or floats of shape `(X, Y)` or `(X, Y, Z)`.
        path (`str` or `os.PathLike`):
            File to write, `.nii` or `.nii.gz`.
        model, revision, parents, facts:
            As in [`save_png`]; the sidecar is always written.
        affine (`np.ndarray`, *optional*):
            From voxel indices to RAS coordinates in mm, `(4, 4)`. Without it the file says that the orientation is
            not known.
        spacing (`tuple[float, ...]`, *optional*):
            Size of a voxel in mm, where `affine` is not given. Defaults to 1 mm.

    Raises:
        `ValueError`: when the name or the type of the voxels is none of NIfTI.

    Example:

    ```python
    >>> import numpy as np
    >>> from onereward.data.synthetic import save_nifti

    >>> hu = np.full((4, 4, 4), -1000, np.int16)
    >>> save_nifti(hu, "runs/air.nii.gz", model="org/onereward-brats", affine=np.eye(4))
    ```
    """
    import nibabel as nib

    path, volume = Path(path), np.asarray(volume)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"`path` ends in {path.name[-8:]!r}, but a NIfTI file ends in .nii or .nii.gz.")
    if volume.ndim not in (2, 3) or volume.dtype.kind not in "iuf" or volume.dtype.itemsize > 8:
        raise ValueError(
            f"`volume` is {volume.dtype} of shape {volume.shape}, but integers or floats of shape (X, Y) or (X, Y, Z) "
            "are wanted."
        )
    mark = describe(model, revision, **facts)
    picture = nib.Nifti1Image(volume, affine, dtype=volume.dtype)
    if affine is None:
        picture.header.set_zooms((spacing or (1.0,) * 3)[: volume.ndim])
    picture.header.set_xyzt_units("mm")
    note = f"SYNTHETIC, not for clinical use: {_maker(mark)}"
    picture.header["descrip"] = note.encode("ascii", "replace")[:79]  # 80 bytes, the last one 0
    picture.header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT, json.dumps(mark).encode()))
    with whole_file(path) as partial:
        content = picture.to_bytes()
        if path.suffix == ".gz":
            content = gzip.compress(content, compresslevel=6, mtime=0)
        partial.write_bytes(content)
    _write_sidecar(path, mark, parents)


def save_dicom(
    pixels: np.ndarray,
    path: str | os.PathLike,
    *,
    model: str,
    revision: str | None = None,
    parents: Sequence[dict] = (),
    affine: np.ndarray | None = None,
    spacing: tuple[float, ...] | None = None,
    modality: str | None = None,
    rescale: tuple[float, float] | None = None,
    window: tuple[float, float] | None = None,
    burned_in: str | None = "NO",
    low_is_white: bool = False,
    is_volume: bool | None = None,
    **facts,
) -> None:
    """
    Write a synthetic slice as a DICOM file, or a volume as a folder of one file a slice. The header is made anew, with
    new UIDs and the patient `SYNTHETIC^ONEREWARD`, and says what the image is: `SyntheticData` YES, `ImageType`
    DERIVED, `QualityControlSubject` YES, `DerivationDescription` and `ContributingEquipmentSequence`.

    CT and MR with an `affine` become CT and MR images, all else Secondary Captures. Needs the extra `dicom`.

    Args:
        pixels (`np.ndarray`):
            A slice `(rows, columns)` or, in colour, `(rows, columns, 3)` of `uint8`; or a volume `(columns, rows,
            slices)`. Numbers that fit into 16 bits, after `rescale` has been taken off.
        path (`str` or `os.PathLike`):
            File to write, or for a volume the folder, which must not exist.
        model, revision, parents, facts:
            As in [`save_png`]; the sidecar is always written, for a volume beside the folder.
        affine (`np.ndarray`, *optional*):
            From (column, row, slice) to RAS coordinates in mm, `(4, 4)`. A volume needs it.
        spacing (`tuple[float, ...]`, *optional*):
            Of a slice without `affine`: distance of rows and of columns in mm.
        modality (`str`, *optional*):
            E.g. `"CT"`. Defaults to `"OT"`, other.
        rescale (`tuple[float, float]`, *optional*):
            Slope and intercept to store the numbers with. Defaults to 1 and 0.
        window (`tuple[float, float]`, *optional*):
            Centre and width that a viewer begins with.
        burned_in (`str`, *optional*, defaults to `"NO"`):
            `"YES"`, `"NO"` or, where it is not known, `None`: whether text stands in the pixels. What was not painted
            comes from a source that may have had some.
        low_is_white (`bool`, *optional*, defaults to `False`):
            Whether grey `pixels` are to be shown as a negative (MONOCHROME1).
        is_volume (`bool`, *optional*):
            Whether three dimensions are a volume, or a slice in colour. Defaults to a slice where the last one is 3
            and there is no `affine`.

    Raises:
        `ImportError`: when pydicom is missing.
        `ValueError`: when DICOM cannot hold the pixels as they are, or the volume has no place in space.

    Example:

    ```python
    >>> import numpy as np
    >>> from onereward.data.synthetic import save_dicom

    >>> save_dicom(np.zeros((8, 8), np.uint8), "runs/black.dcm", model="org/onereward-brats")
    ```
    """
    try:
        from pydicom.uid import generate_uid
    except ImportError as error:
        raise ImportError(DICOM_HINT) from error

    path, pixels = Path(path), np.asarray(pixels)
    mark = describe(model, revision, **facts)
    stored = _stored(pixels, rescale)
    affine = None if affine is None else np.asarray(affine, float)
    common = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    about = {"modality": modality, "rescale": rescale, "window": window, "burned_in": burned_in}
    about |= {"low_is_white": low_is_white, "uids": common}
    is_slice = stored.ndim == 2 or (stored.ndim == 3 and stored.shape[2] == 3)
    if is_volume is None:
        is_volume = not is_slice or (stored.ndim == 3 and affine is not None)
    if not (stored.ndim == 3 and affine is not None if is_volume else is_slice):
        raise ValueError(
            f"`pixels` have shape {pixels.shape} and `is_volume` is {is_volume}, but a slice is (rows, columns) or "
            "(rows, columns, 3), and a volume is (columns, rows, slices) and needs an `affine` that says where its "
            "slices lie."
        )
    if not is_volume:
        _write_slice(stored, path, mark, affine=affine, spacing=spacing, **about)
    else:
        if path.exists():
            raise ValueError("`path` exists already, and a volume is written as a new folder. Name another one.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".series-") as scratch:
            for index in range(stored.shape[2]):
                place = affine.copy()
                place[:, 3] = affine @ [0, 0, index, 1]
                target = Path(scratch, "series", f"{index + 1:04d}.dcm")
                _write_slice(
                    stored[:, :, index].T, target, mark, affine=place, spacing=None, number=index + 1, **about
                )
            os.replace(Path(scratch, "series"), path)
    _write_sidecar(path, mark, parents)


def is_synthetic(path: str | os.PathLike) -> dict | None:
    """
    What a file says about being synthetic, whoever wrote it. Only its header is read.

    Args:
        path (`str` or `os.PathLike`):
            Any file. PNG, JPEG, TIFF, WebP, NIfTI and DICOM files (these need the extra `dicom`) can hold a mark.

    Returns:
        `dict` or `None`: the facts of [`describe`] where our software wrote them, else what is known of them, with
        `synthetic` always `True`; `None` where the file says nothing.

    Raises:
        `ValueError`: when there is no such file, or it is a damaged DICOM file.
        `ImportError`: when it is a DICOM file and pydicom is missing.

    Example:

    ```python
    >>> is_synthetic("README.md") is None
    True
    ```
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("`path` is no file. Name a picture, a NIfTI or a DICOM file.")
    with open(path, "rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return _dicom_mark(path)
    if path.name.endswith((".nii", ".nii.gz")):
        return _nifti_mark(path)
    try:
        with Image.open(path) as picture:
            info = picture.info
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # no picture that holds a mark
    xmp = info.get("xmp", info.get("XML:com.adobe.xmp", b""))
    return _own_mark(info.get("Comment")) or _foreign_mark(xmp.encode() if isinstance(xmp, str) else xmp)


def describe(
    model: str,
    revision: str | None = None,
    *,
    adapter: str | None = None,
    mask: np.ndarray | None = None,
    **facts,
) -> dict:
    """
    The facts that a synthetic file carries, none of which is a path or the name of a file of the user.

    Args:
        model (`str`):
            Hub id, or a folder, of which only the last name is kept.
        revision (`str`, *optional*):
            Commit of the model.
        adapter (`str`, *optional*):
            Adapter of the model, as `model`.
        mask (`np.ndarray`, *optional*):
            Where it was painted. Its SHA-256 is kept; and where it covers everything, the digital source type is
            `trainedAlgorithmicMedia`, else `compositeWithTrainedAlgorithmicMedia`, which the IPTC asks for inpainting.
        facts:
            Other values that JSON can hold, e.g. `seed` and `settings`.

    Returns:
        `dict`: what is written into the file.
    """
    mark = {
        "synthetic": True,
        "digital_source_type": PARTLY_PAINTED if mask is None or not np.all(mask) else PAINTED,
        "model": public_name(model),
        "revision": revision,
    }
    if adapter is not None:
        mark["adapter"] = public_name(adapter)
    if mask is not None:
        inside = np.asarray(mask) != 0
        mark["mask_sha256"] = hashlib.sha256(str(inside.shape).encode() + np.packbits(inside).tobytes()).hexdigest()
    return mark | facts | {"software": SOFTWARE, "notice": NOTICE}


def public_name(name: str | os.PathLike) -> str:
    """A Hub id as it is; of a local folder the last name alone, since a path tells who keeps what where."""
    name = str(name)
    if os.path.isdir(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        name = Path(name).resolve().name
    return "".join(character for character in name if character.isprintable())


def sidecar_of(path: str | os.PathLike) -> Path:
    """
    Where the facts on a synthetic file lie: `healthy.png` has `healthy.png.provenance.json` beside it, a folder of
    DICOM files `provenance.json` in it, as `onereward provenance` expects.
    """
    path = Path(path)
    return path / "provenance.json" if path.is_dir() else path.with_name(f"{path.name}.provenance.json")


# ------------------------------------------------------------------------------------------------------------ words


def _write_sidecar(path: Path, mark: dict, parents: Sequence[dict]) -> None:
    record = {
        "schema_version": 1,
        "kind": "synthetic-image",
        "created_at": datetime.now(UTC).isoformat("T", "seconds"),
    }
    if path.is_file():
        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    agreements = sorted({agreement for parent in parents for agreement in parent["agreements"]})
    write_json(sidecar_of(path), record | mark | {"parents": list(parents), "agreements": agreements})


def _maker(mark: dict) -> str:
    maker = mark["model"] + (f"@{mark['revision'][:12]}" if mark["revision"] else "")
    return maker + (f" with {mark['adapter']}" if "adapter" in mark else "")


def _sentence(mark: dict) -> str:
    part = "The whole" if mark["digital_source_type"] == PAINTED else "A part"
    seed = f", seed {mark['seed']}" if "seed" in mark else ""
    return f"SYNTHETIC. {part} of this image was painted by {_maker(mark)} ({SOFTWARE}{seed}). {NOTICE}"


def _own_mark(text: str | bytes | None) -> dict | None:
    """The facts that we wrote as JSON; `None` for any other text."""
    try:
        mark = json.loads(text or "null")
    except ValueError:
        return None  # some other program's comment
    return mark if isinstance(mark, dict) and mark.get("synthetic") is True else None


def _foreign_mark(xmp: bytes) -> dict | None:
    """The digital source type in an XMP packet, where it is one of those that a model or a program has painted."""
    found = re.search(rb"digitalsourcetype/(\w*([tT]rainedA|a)lgorithmicMedia)\b", xmp)
    return None if found is None else {"synthetic": True, "digital_source_type": SOURCE_TYPES + found[1].decode()}


def _xmp(mark: dict) -> str:
    """The XMP packet of a picture: https://iptc.org/std/photometadata/specification/."""
    for prefix, uri in NAMESPACES.items():
        ET.register_namespace(prefix, uri)

    def tag(name: str) -> str:
        prefix, _, local = name.partition(":")
        return f"{{{NAMESPACES[prefix]}}}{local}"

    root = ET.Element(tag("x:xmpmeta"))
    about = ET.SubElement(ET.SubElement(root, tag("rdf:RDF")), tag("rdf:Description"), {tag("rdf:about"): ""})
    for name, value in {
        "Iptc4xmpExt:DigitalSourceType": mark["digital_source_type"],
        "Iptc4xmpExt:AISystemUsed": mark["model"],
        "Iptc4xmpExt:AISystemVersionUsed": mark["revision"] or "unknown",
        "xmp:CreatorTool": SOFTWARE,
    }.items():
        ET.SubElement(about, tag(name)).text = value
    for name, value in {
        "dc:title": "Synthetic image",
        "dc:description": _sentence(mark),
        "xmpRights:UsageTerms": NOTICE,
    }.items():
        choices = ET.SubElement(ET.SubElement(about, tag(name)), tag("rdf:Alt"))
        item = ET.SubElement(choices, tag("rdf:li"), {"{http://www.w3.org/XML/1998/namespace}lang": "x-default"})
        item.text = value
    packet = ET.tostring(root, encoding="unicode")
    return f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{packet}<?xpacket end="r"?>'


def _nifti_mark(path: Path) -> dict | None:
    """The JSON extension of a NIfTI file, or its `descrip`. At most a megabyte is read."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            content = file.read(1 << 20)
    except (OSError, EOFError, zlib.error):
        return None  # not whole: nothing can be read of it
    for order in "<>":
        if len(content) >= 352 and content[:4] == struct.pack(f"{order}i", 348):
            start, description = 352, content[148:228]
        elif len(content) >= 544 and content[:4] == struct.pack(f"{order}i", 540):
            start, description = 544, content[240:320]
        else:
            continue
        while start + 8 <= len(content) and content[348 if start < 544 else 540]:
            size, code = struct.unpack_from(f"{order}ii", content, start)
            if size < 16:
                break
            if code == COMMENT:
                mark = _own_mark(content[start + 8 : start + size].rstrip(b"\0").decode("utf-8", "replace"))
                if mark is not None:
                    return mark
            start += size
        if description.startswith(b"SYNTHETIC"):
            return {"synthetic": True}
    return None


# ------------------------------------------------------------------------------------------------------------ DICOM


def _stored(pixels: np.ndarray, rescale: tuple[float, float] | None) -> np.ndarray:
    """The integers of 8 or 16 bits that DICOM holds."""
    if pixels.dtype in (np.uint8, np.uint16, np.int16) and rescale in (None, (1, 0)):
        return pixels
    slope, intercept = rescale or (1, 0)
    whole = np.rint((pixels.astype(np.float64) - intercept) / slope)
    exact = np.array_equal(whole * slope + intercept, pixels.astype(np.float64))
    for kind in (np.int16, np.uint16):
        if exact and whole.min() >= np.iinfo(kind).min and whole.max() <= np.iinfo(kind).max:
            return whole.astype(kind)
    raise ValueError(
        f"`pixels` are {pixels.dtype} from {pixels.min():g} to {pixels.max():g}, which DICOM's 16-bit integers with "
        f"slope {slope:g} and intercept {intercept:g} cannot hold as they are. Write NIfTI with `save_nifti`."
    )


def _write_slice(
    stored: np.ndarray,
    path: Path,
    mark: dict,
    *,
    affine: np.ndarray | None,
    spacing: tuple[float, ...] | None,
    modality: str | None,
    rescale: tuple[float, float] | None,
    window: tuple[float, float] | None,
    burned_in: str | None,
    low_is_white: bool,
    uids: dict[str, str],
    number: int = 1,
) -> None:
    """One DICOM file. The IODs are in PS3.3, A.3 (CT), A.4 (MR) and A.8.1 (Secondary Capture)."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    from pydicom.valuerep import format_number_as_ds

    def numbers(values) -> list[str]:
        return [format_number_as_ds(float(value)) for value in values]

    kind = modality if modality in ("CT", "MR") and affine is not None and stored.ndim == 2 else "SC"
    if kind != "SC" and stored.dtype == np.uint8:
        stored = stored.astype(np.uint16)  # CT and MR images have 16 bits
    now = datetime.now(UTC)
    maker = mark["model"][:64]

    file = Dataset()
    file.SpecificCharacterSet = "ISO_IR 192"
    file.SOPClassUID = {
        "CT": "1.2.840.10008.5.1.4.1.1.2",
        "MR": "1.2.840.10008.5.1.4.1.1.4",
        "SC": "1.2.840.10008.5.1.4.1.1.7",
    }[kind]
    file.SOPInstanceUID = generate_uid()
    file.SyntheticData = "YES"
    file.ImageType = ["DERIVED", "SECONDARY", {"CT": "AXIAL", "MR": "OTHER", "SC": "OTHER"}[kind], "SYNTHETIC"]
    file.InstanceCreationDate = file.StudyDate = file.SeriesDate = file.ContentDate = now.strftime("%Y%m%d")
    file.InstanceCreationTime = file.StudyTime = file.SeriesTime = file.ContentTime = now.strftime("%H%M%S")
    file.TimezoneOffsetFromUTC = "+0000"

    file.PatientName, file.PatientID = "SYNTHETIC^ONEREWARD", "synthetic"
    file.PatientBirthDate = file.PatientSex = ""
    file.QualityControlSubject = "YES"
    if burned_in == "NO":  # else the pixels may still name someone
        file.PatientIdentityRemoved = "YES"
        file.DeidentificationMethod = "Header made anew for a synthetic image"
    file.AccessionNumber = file.ReferringPhysicianName = ""
    file.StudyID = "SYNTHETIC"
    file.StudyDescription = file.SeriesDescription = "SYNTHETIC, not for clinical use"
    file.update(uids)
    file.Modality = modality or "OT"
    file.SeriesNumber, file.InstanceNumber = 1, number
    file.Laterality = ""
    file.ImageComments = _sentence(mark)

    file.Manufacturer, file.ManufacturerModelName = "OneReward", maker
    file.SoftwareVersions = [SOFTWARE, f"revision {mark['revision'] or 'unknown'}"[:64]]
    file.DerivationDescription = _sentence(mark)[:1024]
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = "109102", "DCM", "Processing Equipment"
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [purpose]
    equipment.Manufacturer, equipment.ManufacturerModelName = "OneReward", maker
    equipment.SoftwareVersions = file.SoftwareVersions
    equipment.ContributionDateTime = now.strftime("%Y%m%d%H%M%S+0000")
    equipment.ContributionDescription = _sentence(mark)[:1024]
    file.ContributingEquipmentSequence = [equipment]

    if kind != "SC":
        file.PatientPosition = ""
    if kind == "CT":
        file.KVP = file.AcquisitionNumber = None
    elif kind == "MR":
        file.ScanningSequence, file.SequenceVariant = "RM", "NONE"  # research mode: no scanner made it
        file.ScanOptions = file.MRAcquisitionType = ""
        file.EchoTime = file.EchoTrainLength = file.RepetitionTime = None
    else:
        file.ConversionType = "SYN"  # synthetic image
        file.PatientOrientation = ""
    file.PositionReferenceIndicator = ""
    if affine is None:
        del file.FrameOfReferenceUID, file.PositionReferenceIndicator
        if spacing is not None:
            file.PixelSpacing = numbers(spacing[:2])
    else:
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        sizes = np.linalg.norm(lps[:3, :3], axis=0)
        directions = lps[:3, :3] / sizes
        if np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3:
            raise ValueError("`affine` is sheared, which DICOM cannot say. Resample the volume to a straight grid.")
        file.PixelSpacing = numbers((sizes[1], sizes[0]))
        file.ImageOrientationPatient = numbers((*directions[:, 0], *directions[:, 1]))
        file.ImagePositionPatient = numbers(lps[:3, 3])
        file.SliceThickness = file.SpacingBetweenSlices = numbers(sizes[2:])[0]

    colour = stored.ndim == 3
    grey = "MONOCHROME1" if low_is_white else "MONOCHROME2"
    file.SamplesPerPixel, file.PhotometricInterpretation = (3, "RGB") if colour else (1, grey)
    if colour:
        file.PlanarConfiguration = 0
    file.Rows, file.Columns = stored.shape[:2]
    file.BitsAllocated = file.BitsStored = 8 * stored.itemsize
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    if burned_in is not None:
        file.BurnedInAnnotation = burned_in
    if kind == "CT" or rescale not in (None, (1, 0)):
        file.RescaleSlope, file.RescaleIntercept = numbers(rescale or (1, 0))
        file.RescaleType = "HU" if modality == "CT" else "US"
    if window is not None and not colour:
        file.WindowCenter, file.WindowWidth = numbers(window)
    content = np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")).tobytes()
    file.add_new("PixelData", "OB" if stored.itemsize == 1 else "OW", content + b"\0" * (len(content) % 2))

    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, enforce_file_format=True)
    with whole_file(path) as partial:
        partial.write_bytes(buffer.getvalue())


def _dicom_mark(path: Path) -> dict | None:
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(DICOM_HINT) from error
    names = ["SyntheticData", "ManufacturerModelName", "DerivationDescription"]
    try:
        syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
        if syntax is None or syntax.is_deflated:  # deflated data has no limit to what it grows to
            raise ValueError("it is in no transfer syntax that is read")
        file = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=names)
    except Exception as error:  # pydicom raises whatever a damaged file leads it to
        raise ValueError(
            f"{path.name} cannot be read as DICOM ({type(error).__name__}). Save it uncompressed."
        ) from error
    if file.get("SyntheticData") != "YES":
        return None
    return {
        "synthetic": True,
        "model": str(file.get("ManufacturerModelName", "")) or None,
        "description": str(file.get("DerivationDescription", "")) or None,
    }
