"""Synthetic files say what they are to programs that we did not write, and hold the very pixels they were given."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from onereward.data.schema import rows_to_tensors
from onereward.data.synthetic import describe, is_synthetic, save_dicom, save_nifti, save_png, sidecar_of
from onereward.evaluation.figures import before_after_figure
from onereward.hub.provenance import describe_parent, read_provenance, trace


COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
PAINTED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
RNG = np.random.default_rng(0)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """By the PNG specification, section 5.3."""
    chunks, start = [], 8
    while start < len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        body = content[start + 8 : start + 8 + size]
        assert struct.unpack_from(">I", content, start + 8 + size)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        start += 12 + size
    return chunks


def png_pixels(content: bytes) -> np.ndarray:
    """By the PNG specification, section 9 (filtering), without any library of pictures."""
    chunks = png_chunks(content)
    width, height, depth, kind = struct.unpack_from(">IIBB", chunks[0][1])
    samples = {0: 1, 2: 3, 6: 4}[kind]
    step = samples * depth // 8
    data = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    lines, above = [], [0] * (width * step)
    for row in range(height):
        start = row * (width * step + 1)
        line = list(data[start + 1 : start + 1 + width * step])
        for i in range(len(line)):
            a, b, c = (line[i - step], above[i], above[i - step]) if i >= step else (0, above[i], 0)
            nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, nearest)[data[start]]) % 256
        lines.append(bytes(line))
        above = line
    pixels = np.frombuffer(b"".join(lines), ">u2" if depth == 16 else "u1").reshape(height, width, samples)
    return pixels[..., 0] if samples == 1 else pixels


@pytest.mark.parametrize(
    "shape, dtype", [((7, 9), "uint8"), ((7, 9, 3), "uint8"), ((5, 6, 4), "uint8"), ((7, 9), "uint16")]
)
def test_png_holds_the_very_pixels(tmp_path, shape, dtype):
    pixels = RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    save_png(pixels, tmp_path / "a.png", model="org/model")
    found = png_pixels((tmp_path / "a.png").read_bytes())
    assert found.shape == shape and found.dtype.itemsize == np.dtype(dtype).itemsize
    np.testing.assert_array_equal(found, pixels)


def test_png_has_the_registered_fields_and_the_mark_of_the_iptc(tmp_path):
    mask = np.zeros((4, 4))
    mask[1:3] = 1
    save_png(
        np.zeros((4, 4), np.uint8),
        tmp_path / "a.png",
        model="org/m",
        revision=COMMIT,
        adapter="org/a",
        seed=3,
        mask=mask,
    )
    chunks = png_chunks((tmp_path / "a.png").read_bytes())
    text = dict(body.decode("latin-1").split("\0", 1) for kind, body in chunks if kind == b"tEXt")
    # keywords of section 11.3.4.2 of the PNG specification
    assert {"Title", "Description", "Software", "Source", "Disclaimer", "Warning", "Comment"} == set(text)
    assert "SYNTHETIC" in text["Description"] and "not for clinical use" in text["Disclaimer"]
    assert text["Source"] == f"org/m@{COMMIT[:12]} with org/a"
    (xmp,) = [body for kind, body in chunks if kind == b"iTXt"]
    assert xmp.startswith(b"XML:com.adobe.xmp\0\0\0\0\0")
    tree = ET.fromstring(xmp.removeprefix(b"XML:com.adobe.xmp\0\0\0\0\0").decode().replace("\ufeff", ""))
    found = tree.find(".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert found.text == COMPOSITE


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
def test_exiftool_reads_the_mark(tmp_path):
    save_png(np.zeros((4, 4), np.uint8), tmp_path / "a.png", model="org/m", mask=np.ones((4, 4)))
    found = json.loads(subprocess.check_output(["exiftool", "-json", tmp_path / "a.png"]))[0]
    assert found["DigitalSourceType"] == PAINTED
    assert found["UsageTerms"] == found["Disclaimer"] == "Research use only, not for clinical use."
    assert found["AISystemUsed"] == found["Source"] == "org/m"
    assert "Warning" not in found  # what exiftool calls its own complaints


def test_nothing_of_a_source_travels_in_a_png(tmp_path):
    text, exif = PngInfo(), Image.Exif()
    text.add_text("Comment", "Jane Doe")
    exif[0x010E] = "Jane Doe"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (4, 4)).save(tmp_path / "source.png", pnginfo=text, exif=exif, icc_profile=profile)
    save_png(Image.open(tmp_path / "source.png"), tmp_path / "a.png", model="org/m")
    content = (tmp_path / "a.png").read_bytes()
    assert b"Jane" not in content
    assert {kind for kind, _ in png_chunks(content)} == {b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"}


def test_equal_pictures_are_equal_files(tmp_path):
    for name in "ab":
        save_png(np.zeros((4, 4), np.uint8), tmp_path / f"{name}.png", model="org/m", seed=0)
        save_nifti(np.zeros((4, 4, 4), np.int16), tmp_path / f"{name}.nii.gz", model="org/m", seed=0)
    for ending in (".png", ".nii.gz"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_no_path_of_the_user_is_written(tmp_path):
    folder = tmp_path / "patients" / "jane-doe" / "base"
    folder.mkdir(parents=True)
    mask = np.eye(4)
    save_png(np.zeros((4, 4), np.uint8), tmp_path / "jane.png", model=folder, adapter=str(folder), mask=mask)
    save_nifti(np.zeros((4, 4), np.uint8), tmp_path / "jane-2.nii", model=folder, mask=mask)
    save_dicom(np.zeros((4, 4), np.uint8), tmp_path / "jane-3.dcm", model=folder, mask=mask)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 6
    for path in files:
        content = path.read_bytes()
        assert b"jane" not in content and str(tmp_path).encode() not in content, path
        assert b"base" in content


def test_text_of_any_language_and_markup_stay_readable(tmp_path):
    (tmp_path / "a<b>&c").mkdir()
    save_png(np.zeros((4, 4), np.uint8), tmp_path / "a.png", model=tmp_path / "a<b>&c", prompt="腫瘍 <x>")
    mark = is_synthetic(tmp_path / "a.png")
    assert mark["model"] == "a<b>&c" and mark["prompt"] == "腫瘍 <x>"


def test_the_sidecar_is_a_provenance_file(tmp_path):
    base = describe_parent("base_model", "pipelines/onereward-brats")
    pixels = np.zeros((4, 4), np.uint8)
    path = tmp_path / "a.png"
    save_png(pixels, path, model=base["name"], parents=[base], seed=7, settings={"steps": 20}, mask=np.eye(4))
    found = read_provenance(path)
    assert found["kind"] == "synthetic-image" and found["seed"] == 7 and found["settings"] == {"steps": 20}
    assert len(found["mask_sha256"]) == 64 and found["notice"] == "Research use only, not for clinical use."
    assert found["sha256"] == subprocess.check_output(["sha256sum", path], text=True).split()[0]
    assert "onereward-brats" in str(trace(path))
    assert "parents" not in is_synthetic(path)


def test_masks_have_one_digest_whatever_their_type_and_another_for_another_shape():
    mask = np.zeros((4, 6), bool)
    mask[1] = True
    digest = describe("m", mask=mask)["mask_sha256"]
    assert digest == describe("m", mask=mask * np.uint8(255))["mask_sha256"]
    assert digest != describe("m", mask=mask.reshape(6, 4))["mask_sha256"]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_holds_the_very_voxels_and_says_so(tmp_path, dtype, ending):
    volume = (RNG.normal(size=(4, 5, 6)) * 100).astype(dtype)
    affine = np.array([[0, -2, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1.0]])
    path = tmp_path / f"a{ending}"
    save_nifti(volume, path, model="org/a-model" + "-with-a-long-name" * 5, revision=COMMIT, affine=affine, seed=1)
    found = nib.load(path)
    assert found.get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(found.dataobj), volume)
    np.testing.assert_array_equal(found.affine, affine)
    assert found.header.get_xyzt_units()[0] == "mm"
    description = found.header["descrip"].item()
    assert description.startswith(b"SYNTHETIC, not for clinical use: org/a-model") and len(description) < 80
    (extension,) = found.header.extensions
    assert extension.get_code() == 6
    assert json.loads(extension.get_content())["revision"] == COMMIT
    assert is_synthetic(path)["seed"] == 1


def test_nifti_without_orientation_says_so(tmp_path):
    save_nifti(np.zeros((4, 5, 1), np.uint8), tmp_path / "a.nii", model="m", spacing=(0.5, 0.25, 1))
    header = nib.load(tmp_path / "a.nii").header
    assert header["sform_code"] == header["qform_code"] == 0 and header.get_zooms() == (0.5, 0.25, 1)


def test_pixels_that_a_format_cannot_hold_are_refused(tmp_path):
    for pixels in (
        np.zeros((4, 4)),
        np.zeros((4, 4), np.int16),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4), bool),
    ):
        with pytest.raises(ValueError, match="uint8"):
            save_png(pixels, tmp_path / "a.png", model="m")
    with pytest.raises(ValueError, match="mode 'P'"):
        save_png(Image.new("P", (4, 4)), tmp_path / "a.png", model="m")
    with pytest.raises(ValueError, match="integers or floats"):
        save_nifti(np.zeros((4, 4, 4), complex), tmp_path / "a.nii", model="m")
    with pytest.raises(ValueError, match="nii.gz"):
        save_nifti(np.zeros((4, 4, 4)), tmp_path / "a.png", model="m")
    for pixels in (np.full((4, 4), 0.5), np.full((4, 4), 70_000), np.array([[-1, 60_000]])):
        with pytest.raises(ValueError, match="cannot hold"):
            save_dicom(pixels, tmp_path / "a.dcm", model="m")
    with pytest.raises(ValueError, match="affine"):
        save_dicom(np.zeros((4, 4, 4), np.int16), tmp_path / "a", model="m")
    sheared = np.eye(4)
    sheared[0, 1] = 0.5
    with pytest.raises(ValueError, match="sheared"):
        save_dicom(np.zeros((4, 4, 4), np.int16), tmp_path / "a", model="m", affine=sheared)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ DICOM

pydicom = pytest.importorskip("pydicom")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind: name -> (path, pixels)."""
    folder = tmp_path_factory.mktemp("dicom")
    hu = RNG.integers(-1024, 3000, (7, 5, 3)).astype(np.int16)
    affine = np.array([[-0.5, 0, 0, 20], [0, -0.7, 0, 30], [0, 0, 2.5, -40], [0, 0, 0, 1]])
    facts = {"model": "org/m", "revision": COMMIT, "seed": 5}
    save_dicom(hu, folder / "ct", affine=affine, modality="CT", window=(40, 80), **facts)
    save_dicom(hu.clip(0), folder / "mr", affine=affine, modality="MR", **facts)
    colour = RNG.integers(0, 256, (5, 3, 3), dtype=np.uint8)
    save_dicom(colour, folder / "colour.dcm", **facts)
    grey = RNG.integers(0, 65536, (5, 3), dtype=np.uint16)
    save_dicom(grey, folder / "grey.dcm", spacing=(0.1, 0.2), burned_in=None, **facts)
    save_dicom(hu[:, :, 0], folder / "film.dcm", low_is_white=True, window=(40, 80), **facts)
    return {
        "ct": (folder / "ct" / "0002.dcm", hu[:, :, 1].T),
        "mr": (folder / "mr" / "0003.dcm", hu[:, :, 2].T.clip(0)),
        "colour": (folder / "colour.dcm", colour),
        "grey": (folder / "grey.dcm", grey),
        "film": (folder / "film.dcm", hu[:, :, 0]),
    }


@pytest.mark.parametrize("kind", ["ct", "mr", "colour", "grey", "film"])
def test_dicom_is_marked_in_the_standard_fields_and_holds_the_very_pixels(files, kind):
    path, pixels = files[kind]
    file = pydicom.dcmread(path)
    np.testing.assert_array_equal(file.pixel_array, pixels)
    assert file[0x0008, 0x001C].value == "YES"  # Synthetic Data
    assert list(file.ImageType[:2]) == ["DERIVED", "SECONDARY"]
    assert file.QualityControlSubject == "YES" and file.PatientName == "SYNTHETIC^ONEREWARD"
    assert file.PatientID == "synthetic" and "SYNTHETIC" in file.DerivationDescription
    (equipment,) = file.ContributingEquipmentSequence
    assert equipment.ManufacturerModelName == file.ManufacturerModelName == "org/m"
    assert f"revision {COMMIT}" in file.SoftwareVersions
    assert file.get("BurnedInAnnotation") == (None if kind == "grey" else "NO")
    assert file.get("PatientIdentityRemoved") == (None if kind == "grey" else "YES")
    assert file.PhotometricInterpretation == {"colour": "RGB", "film": "MONOCHROME1"}.get(kind, "MONOCHROME2")
    assert is_synthetic(path)["model"] == "org/m"


@pytest.mark.parametrize("kind", ["ct", "mr", "colour", "grey", "film"])
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy of dicom3tools")
def test_dciodvfy_finds_no_error_but_the_field_that_it_is_too_old_for(files, kind):
    found = subprocess.run(["dciodvfy", files[kind][0]], capture_output=True, text=True)
    lines = (found.stdout + found.stderr).splitlines()
    assert {"ct": "CTImage", "mr": "MRImage"}.get(kind, "SCImage") in lines
    errors = [line for line in lines if line.startswith("Error")]
    assert len(errors) == 1 and "(0x0008,0x001c)" in errors[0], errors


def test_dicom_slices_lie_where_their_voxels_lay(files):
    highdicom = pytest.importorskip("highdicom")
    folder = files["ct"][0].parent
    datasets = [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]
    assert len({file.SOPInstanceUID for file in datasets}) == 3
    assert len({file.SeriesInstanceUID for file in datasets}) == 1
    volume = highdicom.get_volume_from_series(datasets)
    affine = np.array([[-0.5, 0, 0, 20], [0, -0.7, 0, 30], [0, 0, 2.5, -40], [0, 0, 0, 1]])
    for index in np.ndindex(volume.array.shape):
        place = np.diag([-1, -1, 1, 1]) @ volume.affine @ (*index, 1)  # LPS to RAS
        column, row, number = np.rint(np.linalg.inv(affine) @ place)[:3].astype(int)
        np.testing.assert_allclose(affine @ (column, row, number, 1), place, atol=1e-6)
        assert volume.array[index] == pydicom.dcmread(folder / f"{number + 1:04d}.dcm").pixel_array[row, column]


def test_dicom_keeps_a_rescale_and_its_numbers(tmp_path):
    slope, intercept = 0.25, -3.5
    stored = RNG.integers(0, 4096, (6, 4))
    save_dicom(stored * slope + intercept, tmp_path / "a.dcm", model="m", rescale=(slope, intercept))
    file = pydicom.dcmread(tmp_path / "a.dcm")
    np.testing.assert_array_equal(file.pixel_array, stored)
    np.testing.assert_array_equal(pydicom.pixels.apply_rescale(file.pixel_array, file), stored * slope + intercept)


def test_a_colour_slice_that_has_a_place_is_no_volume_of_three_slices(tmp_path):
    pixels, affine = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8), np.diag([2.0, 3.0, 4.0, 1.0])
    save_dicom(pixels, tmp_path / "colour.dcm", model="m", affine=affine, is_volume=False)
    file = pydicom.dcmread(tmp_path / "colour.dcm")
    np.testing.assert_array_equal(file.pixel_array, pixels)
    assert list(file.PixelSpacing) == [3, 2] and "ImagePositionPatient" in file
    save_dicom(pixels, tmp_path / "volume", model="m", affine=affine, is_volume=True)
    for number in range(3):
        slice = pydicom.dcmread(tmp_path / "volume" / f"000{number + 1}.dcm")
        np.testing.assert_array_equal(slice.pixel_array, pixels[:, :, number].T)
    for shape, is_volume in (((5, 7), True), ((5, 7, 4), False)):
        with pytest.raises(ValueError, match="is_volume"):
            save_dicom(np.zeros(shape, np.uint8), tmp_path / "a", model="m", affine=affine, is_volume=is_volume)


def test_each_dicom_file_is_new_and_a_folder_is_never_written_over(tmp_path):
    for name in "ab":
        save_dicom(np.zeros((4, 4), np.uint8), tmp_path / f"{name}.dcm", model="m")
    a, b = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in "ab")
    for field in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert a[field].value != b[field].value
    (tmp_path / "full").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        save_dicom(np.zeros((4, 4, 2), np.int16), tmp_path / "full", model="m", affine=np.eye(4))


def test_dicom_without_pydicom_names_the_extra(files, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "pydicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install onereward\[dicom\]"):
        save_dicom(np.zeros((4, 4), np.uint8), tmp_path / "a.dcm", model="m")
    with pytest.raises(ImportError, match=r"pip install onereward\[dicom\]"):
        is_synthetic(files["ct"][0])


# ----------------------------------------------------------------------------------------------------- is_synthetic


def test_files_without_a_mark_have_none(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png", comment="{")
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    (tmp_path / "a.txt").write_text("digitalsourcetype/trainedAlgorithmicMedia")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    (tmp_path / "b.nii.gz").write_bytes(b"\x1f\x8bno gzip")
    for path in tmp_path.iterdir():
        assert is_synthetic(path) is None, path
    assert is_synthetic(pydicom.data.get_testdata_file("CT_small.dcm", download=False)) is None
    with pytest.raises(ValueError, match="no file"):
        is_synthetic(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="cannot be read as DICOM"):
        is_synthetic(pydicom.data.get_testdata_file("image_dfl.dcm", download=False))
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(20))
    with pytest.raises(ValueError, match="cannot be read as DICOM"):
        is_synthetic(tmp_path / "a.dcm")


def test_pictures_of_a_report_are_marked_too(phantom, tmp_path):
    images = rows_to_tensors([phantom[0]])["targets"]
    before_after_figure([phantom[0]], images, images, None, tmp_path / "a.png")
    assert is_synthetic(tmp_path / "a.png")["digital_source_type"] == COMPOSITE


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
def test_marks_of_other_programs_count(tmp_path, ending):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a Iptc4xmpExt:DigitalSourceType="{PAINTED}"/></x:xmpmeta>'
    if ending == ".png":
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp)
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    elif ending == ".tif":
        Image.new("RGB", (4, 4)).save(tmp_path / "a.tif", tiffinfo={700: xmp.encode()})
    else:
        Image.new("RGB", (4, 4)).save(tmp_path / f"a{ending}", xmp=xmp.encode())
    assert is_synthetic(tmp_path / f"a{ending}") == {"synthetic": True, "digital_source_type": PAINTED}


def test_files_of_one_name_in_two_forms_have_a_record_each(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    save_png(pixels, tmp_path / "healthy.png", model="m", seed=1)
    save_dicom(pixels, tmp_path / "healthy.dcm", model="m", seed=2)
    for name, seed in (("healthy.png", 1), ("healthy.dcm", 2)):
        record = read_provenance(tmp_path / name)
        assert record["seed"] == seed
        assert record["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_sidecars_lie_beside_files_and_inside_folders(files):
    path = files["ct"][0].parent
    assert sidecar_of(path) == path / "provenance.json" and sidecar_of(path).is_file()
    assert sidecar_of(files["grey"][0]).name == "grey.dcm.provenance.json" and sidecar_of(files["grey"][0]).is_file()
