"""Scans are read as other libraries read them, the right way round, and a bad file costs one clear message."""

import gzip
import io
import itertools
import os
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageDraw

from onereward.data.scans import (
    AXES,
    TECHNICAL,
    BadScan,
    Scan,
    default_window,
    plane,
    plane_affine,
    read_labels,
    read_scan,
    reorient,
    text_like_corners,
    window,
)
from onereward.data.synthetic import save_dicom, save_nifti


pydicom = pytest.importorskip("pydicom")
NIBABEL_FILES = Path(nib.__file__).parent / "tests" / "data"
DICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
RNG = np.random.default_rng(0)


# ---------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp", ".webp"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_pictures_keep_their_8_bits(tmp_path, ending, shape):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    if ending == ".webp":
        pixels = np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels
    Image.fromarray(pixels).save(tmp_path / f"a{ending}", **({"lossless": True} if ending == ".webp" else {}))
    scan = read_scan(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(scan.pixels, pixels)
    assert scan.pixels.dtype == np.uint8 and scan.kind == "picture" and not scan.is_volume and not scan.warnings
    assert default_window(scan) == (127.5, 255)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_grey_pictures_keep_their_16_bits(tmp_path, ending):
    pixels = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"a{ending}")
    scan = read_scan(tmp_path / f"a{ending}")
    assert scan.pixels.dtype == np.uint16 and scan.limits == (0, 65535)
    np.testing.assert_array_equal(scan.pixels, pixels)


def test_tiff_files_of_another_writer_are_read(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for number, dtype in enumerate(("uint16", "float32", ">u2")):
        pixels = RNG.integers(0, 60000, (5, 7)).astype(dtype)
        tifffile.imwrite(tmp_path / f"{number}.tif", pixels, byteorder=">" if dtype == ">u2" else "<")
        scan = read_scan(tmp_path / f"{number}.tif")
        np.testing.assert_array_equal(scan.pixels, pixels)
        assert scan.pixels.dtype.isnative
    tifffile.imwrite(tmp_path / "deep.tif", RNG.integers(0, 60000, (5, 7, 3)).astype("uint16"), photometric="rgb")
    with pytest.raises(BadScan, match="16 bits"):
        read_scan(tmp_path / "deep.tif")
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((3, 5, 7), np.uint8), photometric="minisblack")
    with pytest.raises(BadScan, match="3 pictures"):
        read_scan(tmp_path / "pages.tif")


def png_header(width: int, height: int, depth: int, kind: int, rows: bytes = b"") -> bytes:
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_are_not_cut_in_silence(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(2, 1, 16, 2, b"\0" + bytes(range(12))))
    with pytest.raises(BadScan, match="16 bits"):
        read_scan(tmp_path / "a.png")


def test_palettes_are_colours_in_a_picture_and_labels_in_a_mask(tmp_path):
    indices = RNG.integers(0, 4, (5, 7), dtype=np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png")
    assert read_scan(tmp_path / "a.png").pixels.shape == (5, 7, 3)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png").pixels, indices)


def test_transparency_counts_only_where_there_is_none(tmp_path):
    pixels = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_scan(tmp_path / "opaque.png").pixels, pixels[..., :3])
    pixels[0, 0, 3] = 254
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    with pytest.raises(BadScan, match="transparent"):
        read_scan(tmp_path / "clear.png")


# ------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii"])
def test_nifti_files_are_read_as_nibabel_reads_them(name):
    scan, expected = read_scan(NIBABEL_FILES / name), nib.load(NIBABEL_FILES / name)
    np.testing.assert_array_equal(scan.pixels, expected.get_fdata())
    np.testing.assert_array_equal(scan.affine, expected.affine)
    np.testing.assert_array_equal(scan.slice(2, "coronal"), plane(scan.pixels, scan.affine, "coronal", 2))
    np.testing.assert_allclose(scan.spacing, expected.header.get_zooms(), rtol=1e-5)
    assert scan.kind == "nifti" and scan.is_volume


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("slope, intercept", [(1, -1024), (2, 0), (0.1, 3.7), (-1, 0)])
def test_scaled_nifti_gives_the_numbers_that_are_meant(tmp_path, kind, slope, intercept):
    stored = RNG.integers(-3000, 3000, (3, 4, 5)).astype(">i2")
    header = kind.header_class(endianness=">")
    header.set_data_dtype(">i2")
    image = kind(stored, np.diag([-1, 2, 3, 1]), header)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "a.nii.gz")
    raw = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    scan = read_scan(tmp_path / "a.nii.gz")
    expected = nib.load(tmp_path / "a.nii.gz").get_fdata()
    np.testing.assert_array_equal(scan.pixels, expected)
    assert raw and scan.pixels.dtype.isnative
    assert scan.pixels.dtype.kind == ("i" if float(slope).is_integer() else "f")
    np.testing.assert_array_equal(scan.storable(scan.pixels.astype(float) + 0.3 * slope), scan.pixels)


def test_nifti_of_two_or_four_dimensions(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(12, dtype=np.int16).reshape(3, 4), np.eye(4)), tmp_path / "flat.nii")
    assert read_scan(tmp_path / "flat.nii").pixels.shape == (3, 4, 1)
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5, 1), np.int16), np.eye(4)), tmp_path / "one.nii")
    assert read_scan(tmp_path / "one.nii").pixels.shape == (3, 4, 5)
    with pytest.raises(BadScan, match="128 x 96 x 24 x 2"):
        read_scan(NIBABEL_FILES / "example4d.nii.gz")


def test_nifti_without_orientation_is_warned_of(tmp_path):
    save_nifti(np.zeros((3, 4, 5), np.int16), tmp_path / "a.nii", model="m")
    scan = read_scan(tmp_path / "a.nii")
    (warning,) = scan.warnings
    assert "mirrored" in warning and not scan.oriented
    assert read_scan(NIBABEL_FILES / "anatomical.nii").oriented


@pytest.mark.parametrize("unit, millimetres", [("micron", 1e-3), ("mm", 1), ("meter", 1e3), ("unknown", 1)])
@pytest.mark.parametrize("codes", [(2, 0), (0, 1), (0, 0)])
def test_lengths_are_in_mm_whatever_nifti_counts_in(tmp_path, unit, millimetres, codes):
    lengths = np.array([0.5, 0.25, 2.0])
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag(lengths), (5, -7, 11))
    in_file = np.diag([1 / millimetres] * 3 + [1]) @ affine
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), in_file if any(codes) else None)
    image.header.set_zooms(lengths / millimetres)
    image.header.set_xyzt_units(unit)
    if any(codes):
        image.set_sform(in_file, codes[0])
        image.set_qform(in_file, codes[1])
    nib.save(image, tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_allclose(scan.spacing, lengths, rtol=1e-6)
    if not any(codes):  # a file that says no more than sizes is taken to lie around the origin, as nibabel does
        affine = nib.affines.from_matvec(np.diag(lengths * (-1, 1, 1)), (0.5, -0.375, -4))
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    assert scan.oriented == any(codes)


def break_nifti(path, **fields):
    """Write numbers into the header of a small file, past all checks."""
    header = nib.Nifti1Header()
    header.set_data_dtype(fields.pop("dtype", np.int16))
    header.set_data_shape((3, 4, 5))
    header["magic"], header["vox_offset"], header["sform_code"] = b"n+1", 352, 1
    header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + b"\0" * 4 + b"\0" * 960)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "pixels"),
        ({"dim": [3, 0, 4, 5, 1, 1, 1, 1]}, "pixels"),
        ({"dim": [3, -3, 4, 5, 1, 1, 1, 1]}, "pixels"),
        ({"dim": [7, 3, 4, 5, 2, 2, 2, 2]}, "3 x 4 x 5 x 2"),
        ({"dim": [3, 300, 400, 5, 1, 1, 1, 1]}, "ends after"),
        ({"vox_offset": 1e30}, "begin at byte"),
        ({"vox_offset": np.nan}, "begin at byte"),
        ({"pixdim": [1, 0, 1, 1, 1, 1, 1, 1]}, "spacing"),
        ({"pixdim": [1, np.nan, 1, 1, 1, 1, 1, 1]}, "spacing"),
        ({"srow_x": [0, 0, 0, 0]}, "affine"),
        ({"srow_x": [np.inf, 0, 0, 0]}, "affine"),
        ({"scl_slope": 2, "scl_inter": np.inf}, "no number"),
        ({"dtype": np.complex64}, "complex"),
        ({"datatype": 128}, "integers or floats"),  # colours
        ({"datatype": 1536}, "integers or floats"),  # floats of 128 bits
        ({"datatype": 99}, "damaged"),
        ({"magic": b"ni1"}, "one part"),
    ],
)
def test_nifti_headers_that_lie_are_refused(tmp_path, fields, message):
    break_nifti(tmp_path / "good.nii")
    assert read_scan(tmp_path / "good.nii").pixels.shape == (3, 4, 5)
    break_nifti(tmp_path / "a.nii", **fields)
    with pytest.raises(BadScan, match=message):
        read_scan(tmp_path / "a.nii")


def test_nan_is_refused(tmp_path):
    save_nifti(np.full((3, 4, 5), np.nan), tmp_path / "a.nii", model="m")
    with pytest.raises(BadScan, match="NaN"):
        read_scan(tmp_path / "a.nii")


# ------------------------------------------------------------------------------------------------------- orientation


def affines():
    """All 48 ways to lay a volume, with one size per axis and a small tilt."""
    tilt = nib.eulerangles.euler2mat(0.1, -0.08, 0.12)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = tilt @ (np.eye(3)[:, order] * signs) @ np.diag([1.0, 2.0, 3.0])
            affine[:3, 3] = 7, -5, 3
            yield affine


@pytest.mark.parametrize("axis", AXES)
def test_slices_look_as_radiologists_see_them_however_the_file_lies(axis):
    volume = RNG.integers(0, 1000, (3, 4, 5))
    for affine in affines():
        canonical = nib.as_closest_canonical(nib.Nifti1Image(volume, affine, dtype=np.int64))
        assert nib.aff2axcodes(canonical.affine) == ("R", "A", "S")
        number = AXES.index(axis)
        for index in range(canonical.shape[number]):
            expected = np.asarray(canonical.dataobj).take(index, number)
            expected = np.rot90(expected)[:, ::-1]  # head or front up; then the patient's right to the left
            found = plane(volume, affine, axis, index)
            np.testing.assert_array_equal(found, expected)
            assert np.shares_memory(found, volume)


def test_slices_know_where_they_lie():
    places = np.stack(np.meshgrid(*map(np.arange, (3, 4, 5)), indexing="ij"), -1)
    for affine in affines():
        world = places @ affine[:3, :3].T + affine[:3, 3]
        for axis, index in zip(AXES, (2, 1, 0), strict=True):
            picture = np.stack([plane(world[..., i], affine, axis, index) for i in range(3)], -1)
            found = plane_affine((3, 4, 5), affine, axis, index)
            for row, column in np.ndindex(picture.shape[:2]):
                np.testing.assert_allclose((found @ (column, row, 0, 1))[:3], picture[row, column], atol=1e-9)


def test_turned_volumes_keep_their_place():
    volume = RNG.integers(0, 1000, (3, 4, 5))
    for affine in affines():
        turned, place = reorient(volume, affine, "LPS")
        assert nib.aff2axcodes(place) == ("L", "P", "S")
        for index in np.ndindex(turned.shape):
            back = np.rint(np.linalg.inv(affine) @ place @ (*index, 1)).astype(int)
            assert volume[tuple(back[:3])] == turned[index]


def test_slices_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="slices 0 to 4"):
        plane(np.zeros((3, 4, 5)), np.eye(4), "axial", 5)
    with pytest.raises(ValueError, match="slices 0 to 4"):
        plane(np.zeros((3, 4, 5)), np.eye(4), "axial", -1)
    with pytest.raises(ValueError, match="sagittal, coronal, axial"):
        plane(np.zeros((3, 4, 5)), np.eye(4), "z", 0)


# ------------------------------------------------------------------------------------------------------------ window


@pytest.mark.parametrize("center, width", [(40, 80), (-600, 1500), (0.5, 1)])
def test_windows_are_those_of_the_standard(center, width):
    pixels = RNG.integers(-2000, 2000, (64, 64)).astype(np.int16)
    file = pydicom.Dataset()
    file.WindowCenter, file.WindowWidth, file.VOILUTFunction = center, width, "LINEAR_EXACT"
    file.PhotometricInterpretation, file.BitsStored, file.PixelRepresentation = "MONOCHROME2", 16, 1
    file.RescaleSlope, file.RescaleIntercept = 1, 0
    shown = pydicom.pixels.apply_windowing(pixels.astype(np.float64), file)  # from -32768 to 32767
    expected = (shown + 32768) / 65535 * 255
    assert np.abs(window(pixels, center, width) - expected).max() <= 0.5 + 1e-9
    with pytest.raises(ValueError, match="above 0"):
        window(pixels, 40, 0)


def test_default_windows_are_not_upset_by_single_pixels():
    pixels = RNG.normal(1000, 100, (100, 100)).astype(np.float32)
    clean = default_window(Scan(pixels.copy(), "picture"))
    pixels[0, :5] = 1e6
    np.testing.assert_allclose(default_window(Scan(pixels, "picture")), clean, rtol=0.05)
    assert default_window(Scan(np.full((4, 4), 7, np.int16), "picture")) == (7, 1)
    spot = np.zeros((100, 100), np.int16)
    spot[0, 0] = 10
    assert default_window(Scan(spot, "picture")) == (5, 10)


# ------------------------------------------------------------------------------------------------------------- DICOM

READABLE = [
    "CT_small.dcm",
    "693_J2KI.dcm",
    "MR_small.dcm",
    "MR_small_RLE.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "MR_small_jp2klossless.dcm",
    "examples_overlay.dcm",
    "SC_rgb_small_odd.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "ExplVR_BigEnd.dcm",
]


@pytest.mark.parametrize("name", READABLE)
def test_dicom_files_are_read_as_pydicom_reads_them(name):
    scan, file = read_scan(DICOM_FILES / name), pydicom.dcmread(DICOM_FILES / name)
    expected = pydicom.pixels.apply_rescale(file.pixel_array, file) if file.SamplesPerPixel == 1 else file.pixel_array
    np.testing.assert_array_equal(scan.pixels, expected)
    assert scan.pixels.dtype.isnative and scan.kind == "dicom"
    if "PixelSpacing" in file:
        assert scan.spacing == tuple(map(float, file.PixelSpacing))


def test_palette_colours_are_looked_up():
    scan = read_scan(DICOM_FILES / "examples_palette.dcm")
    file = pydicom.dcmread(DICOM_FILES / "examples_palette.dcm")
    expected = pydicom.pixels.apply_color_lut(file.pixel_array, file)
    assert scan.pixels.dtype == np.uint8 and scan.pixels.shape == (*file.pixel_array.shape, 3)
    np.testing.assert_array_equal(scan.pixels, expected >> 8 if expected.dtype == np.uint16 else expected)


def test_hounsfield_units_are_whole_numbers_where_they_are():
    scan = read_scan(DICOM_FILES / "CT_small.dcm")
    assert scan.modality == "CT" and scan.rescale == (1, -1024) and scan.pixels.dtype.kind == "i"
    assert scan.pixels.min() >= -1024


@pytest.mark.parametrize("dtype, high", [("uint8", 255), ("uint16", 4095), ("int16", -1)])
def test_monochrome1_is_turned_about(tmp_path, dtype, high):
    stored = RNG.integers(0, 100, (6, 4)).astype(dtype)
    save_dicom(stored, tmp_path / "a.dcm", model="m")
    file = pydicom.dcmread(tmp_path / "a.dcm")
    file.PhotometricInterpretation = "MONOCHROME1"
    if high == 4095:
        file.BitsStored, file.HighBit = 12, 11
    file.save_as(tmp_path / "a.dcm")
    scan = read_scan(tmp_path / "a.dcm")
    np.testing.assert_array_equal(scan.pixels, high - stored.astype(int))
    np.testing.assert_array_equal(scan.turn(scan.pixels), stored)


@pytest.mark.parametrize("dtype, bits", [("uint16", 12), ("uint16", 16), ("int16", 12)])
@pytest.mark.parametrize("rescale", [(1, 0), (2, -100), (-1, 5), (0.37, -3.5)])
def test_monochrome1_is_shown_as_its_twin_in_monochrome2(tmp_path, dtype, bits, rescale):
    stored = RNG.integers(0, 1 << bits - 1, (6, 4)).astype(dtype)
    negative = ((-1 if dtype == "int16" else (1 << bits) - 1) - stored.astype(int)).astype(dtype)
    center, width = 700, 1000  # of the stored numbers
    for name, pixels, middle in (("MONOCHROME2", stored, center), ("MONOCHROME1", negative, None)):
        middle = center if middle else float(stored[0, 0]) + float(negative[0, 0]) - center
        save_dicom(pixels, tmp_path / f"{name}.dcm", model="m")
        file = pydicom.dcmread(tmp_path / f"{name}.dcm")
        file.PhotometricInterpretation, file.BitsStored, file.HighBit = name, bits, bits - 1
        file.RescaleSlope, file.RescaleIntercept = rescale
        file.WindowCenter, file.WindowWidth = middle * rescale[0] + rescale[1], width * abs(rescale[0])
        file.save_as(tmp_path / f"{name}.dcm")
    film, twin = (read_scan(tmp_path / f"MONOCHROME{number}.dcm") for number in (1, 2))
    np.testing.assert_allclose(film.pixels, twin.pixels)
    np.testing.assert_allclose(default_window(film), default_window(twin))
    np.testing.assert_allclose(film.turn(film.pixels), pydicom.pixels.apply_rescale(negative, file))
    assert default_window(film)[0] == film.turn(float(file.WindowCenter))


@pytest.fixture
def series(tmp_path):
    """A tilted CT series whose file names are in no order, and its volume and affine."""
    volume = RNG.integers(-1000, 2000, (6, 5, 4)).astype(np.int16)
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(0.2, 0.1, -0.1) @ np.diag([-0.5, -0.7, 2.5])
    affine[:3, 3] = 10, 20, 30
    save_dicom(volume, tmp_path / "ct", model="m", affine=affine, modality="CT", rescale=(1, -1024))
    for new, old in enumerate((3, 1, 4, 2)):
        (tmp_path / "ct" / f"{old:04d}.dcm").rename(tmp_path / "ct" / f"z{new}")
    return tmp_path / "ct", volume, affine


def test_series_are_put_in_order(series):
    highdicom = pytest.importorskip("highdicom")
    folder, volume, affine = series
    scan = read_scan(folder)
    assert scan.kind == "dicom-series" and scan.modality == "CT" and scan.rescale == (1, -1024)
    np.testing.assert_array_equal(scan.pixels, volume)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-6)
    np.testing.assert_allclose(scan.spacing, (0.5, 0.7, 2.5), atol=1e-6)
    expected = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in folder.glob("z*")])
    expected = nib.Nifti1Image(expected.array, np.diag([-1, -1, 1, 1]) @ expected.affine, dtype=np.int64)
    canonical, place = reorient(scan.pixels, scan.affine)
    wanted = nib.as_closest_canonical(expected)
    stored = 1024 if np.asarray(wanted.dataobj).min() >= 0 else 0
    np.testing.assert_array_equal(canonical, np.asarray(wanted.dataobj) - stored)
    np.testing.assert_allclose(place, wanted.affine, atol=1e-6)


def test_real_slices_of_a_series_are_stacked(tmp_path):
    names = ("0.dcm", "1.dcm")
    for name in names:
        shutil.copy(NIBABEL_FILES / name, tmp_path)
    first, second = sorted((pydicom.dcmread(NIBABEL_FILES / name) for name in names), key=lambda f: f.InstanceNumber)
    scan = read_scan(tmp_path)
    for file in (first, second):
        # by PS3.3 C.7.6.2.1.1: the centre of the first pixel is at the position of the image
        place = np.linalg.inv(scan.affine) @ (*(np.array(file.ImagePositionPatient, float) * (-1, -1, 1)), 1)
        np.testing.assert_allclose(place[:2], 0, atol=1e-4)
        np.testing.assert_array_equal(scan.pixels[:, :, round(place[2])], file.pixel_array.T)


def test_series_with_gaps_doubles_or_strangers_are_refused(series, tmp_path):
    folder, _, _ = series
    shutil.copy(folder / "z0", folder / "twice")
    with pytest.raises(BadScan, match="evenly"):
        read_scan(folder)
    (folder / "twice").unlink()
    file = pydicom.dcmread(folder / "z0")
    file.SeriesInstanceUID = pydicom.uid.generate_uid()
    file.save_as(folder / "stranger")
    with pytest.raises(BadScan, match="2 series"):
        read_scan(folder)
    (folder / "stranger").unlink()
    (folder / "z1").unlink()  # the first of four: what is left is even
    assert read_scan(folder).pixels.shape == (6, 5, 3)
    (folder / "z0").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(BadScan, match="no DICOM file"):
        read_scan(tmp_path / "empty")


def test_nothing_but_technical_fields_is_read(tmp_path):
    file = pydicom.dcmread(DICOM_FILES / "CT_small.dcm")
    for element in list(file.iterall()):
        if element.VR in ("LO", "SH", "PN", "LT", "ST", "UT") and element.keyword not in TECHNICAL:
            element.value = "JANE DOE"
    file.PatientComments = file.ImageComments = "JANE DOE"
    file.save_as(tmp_path / "a.dcm")
    assert b"JANE DOE" in (tmp_path / "a.dcm").read_bytes()
    scan = read_scan(tmp_path / "a.dcm")
    assert "JANE" not in repr(vars(scan))
    identifying = ("Patient", "Name", "Date", "Time", "Institution", "Physician", "Accession", "Address", "Comment")
    allowed = {"PatientIdentityRemoved", "ImagePositionPatient", "ImageOrientationPatient"}
    assert not [name for name in TECHNICAL if name not in allowed and any(word in name for word in identifying)]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ["identity"]),
        ({"PatientIdentityRemoved": "YES"}, []),
        ({"BurnedInAnnotation": "YES", "PatientIdentityRemoved": "YES"}, ["burned into"]),
        ({"BurnedInAnnotation": "NO", "PatientIdentityRemoved": "YES", "Modality": "US"}, []),
        ({"PatientIdentityRemoved": "YES", "Modality": "US"}, ["does not say whether text"]),
        ({"PatientIdentityRemoved": "YES", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, ["does not say whether text"]),
    ],
)
def test_files_that_may_name_a_patient_are_warned_of(tmp_path, changes, expected):
    file = pydicom.dcmread(DICOM_FILES / "CT_small.dcm")
    for name, value in changes.items():
        setattr(file, name, value)
    file.save_as(tmp_path / "a.dcm")
    warnings = read_scan(tmp_path / "a.dcm").warnings
    assert len(warnings) == len(expected) and all(
        word in note for word, note in zip(expected, warnings, strict=True)
    ), warnings


def test_real_ultrasound_with_writing_is_warned_of():
    for name in ("examples_jpeg2k.dcm", "examples_palette.dcm", "examples_rgb_color.dcm"):
        assert any("like text" in note for note in read_scan(DICOM_FILES / name).warnings), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"Rows": 65535, "Columns": 65535}, "pixels"),
        ({"Rows": 0}, "pixels"),
        ({"Rows": 4000}, "cannot be read"),
        ({"NumberOfFrames": 30}, "30 frames"),
        ({"PixelSpacing": [0, 1]}, "spacing"),
        ({"PixelSpacing": [-1, 1]}, "spacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 9, 0]}, "unit vectors"),
        ({"ImagePositionPatient": [1, 2]}, "position"),
        ({"RescaleSlope": "nan"}, "slope"),
        ({"SamplesPerPixel": 200}, "cannot be read"),
    ],
)
def test_dicom_headers_that_lie_are_refused(tmp_path, changes, message):
    file = pydicom.dcmread(DICOM_FILES / "CT_small.dcm")
    with pydicom.config.disable_value_validation():
        for name, value in changes.items():
            setattr(file, name, value)
        file.save_as(tmp_path / "a.dcm")
    with pytest.raises(BadScan, match=message):
        read_scan(tmp_path / "a.dcm")


def test_dicom_files_that_cannot_be_read_say_why(tmp_path):
    for name, message in {
        "image_dfl.dcm": "transfer syntax",
        "SC_rgb_jpeg_gdcm.dcm": "JPEG Lossless",
        "examples_ybr_color.dcm": "30 frames",
        "rtplan.dcm": "without an image",
        "MR_truncated.dcm": "cannot be read",
        "SC_rgb_rle_16bit.dcm": "8 bits",
        "no_meta.dcm": "preamble",
    }.items():
        with pytest.raises(BadScan, match=message):
            read_scan(DICOM_FILES / name)


def test_a_compressed_frame_of_another_size_is_refused(tmp_path):
    file = pydicom.dcmread(DICOM_FILES / "MR_small_jp2klossless.dcm")
    frame = io.BytesIO()
    Image.new("L", (3000, 3000)).save(frame, "JPEG2000", no_jp2=True)
    file.PixelData = pydicom.encaps.encapsulate([frame.getvalue()])
    file.save_as(tmp_path / "a.dcm")
    with pytest.raises(BadScan, match="one size in its header"):
        read_scan(tmp_path / "a.dcm")


# --------------------------------------------------------------------------------------------------- bombs and damage


def test_bombs_are_refused_before_memory_is_taken(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(100_000, 100_000, 8, 0))
    (tmp_path / "b.png").write_bytes(png_header(20_000, 20_000, 8, 0))
    break_nifti(tmp_path / "header.nii")
    header = bytearray((tmp_path / "header.nii").read_bytes()[:352])
    struct.pack_into("<4h", header, 40, 3, 20_000, 20_000, 1)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(bytes(header) + bytes(1 << 26)))
    struct.pack_into("<4h", header, 40, 3, 600, 600, 600)  # within the limit, but little of it is there
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(bytes(header) + bytes(1000)))
    struct.pack_into("<4h", header, 40, 3, 3, 4, 5)  # more than is promised
    (tmp_path / "e.nii.gz").write_bytes(gzip.compress(bytes(header) + bytes(1 << 28)))
    (tmp_path / "large.nii").write_bytes(bytes(2000))
    tracemalloc.start()
    for name in ("a.png", "b.png", "c.nii.gz", "d.nii.gz"):
        with pytest.raises(BadScan):
            read_scan(tmp_path / name)
    assert read_scan(tmp_path / "e.nii.gz").pixels.shape == (3, 4, 5)
    with pytest.raises(BadScan, match="2,000 bytes"):
        read_scan(tmp_path / "large.nii", max_bytes=1999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20
    with pytest.raises(BadScan, match="in all are read"):
        read_scan(NIBABEL_FILES / "anatomical.nii", max_pixels=1000)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One small good file of each form."""
    folder = tmp_path_factory.mktemp("good")
    pixels = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
    for ending in (".png", ".jpg", ".tif", ".webp", ".bmp"):
        Image.fromarray(pixels).save(folder / f"a{ending}")
    save_nifti(RNG.integers(0, 9, (6, 6, 6)).astype(np.int16), folder / "a.nii", model="m", affine=np.eye(4))
    save_nifti(RNG.integers(0, 9, (6, 6, 6)).astype(np.int16), folder / "a.nii.gz", model="m", affine=np.eye(4))
    save_dicom(pixels, folder / "a.dcm", model="m")
    shutil.copy(DICOM_FILES / "MR_small_jp2klossless.dcm", folder / "j2k.dcm")
    shutil.copy(DICOM_FILES / "MR_small_RLE.dcm", folder / "rle.dcm")
    return sorted(path for path in folder.iterdir() if path.suffix != ".json")


def test_files_cut_short_are_refused_with_a_clear_message(good, tmp_path):
    for path in good:
        content = path.read_bytes()
        target = tmp_path / path.name
        for end in {0, 1, 10, 100, 200, 350, 360, len(content) // 4, len(content) // 2, len(content) * 3 // 4}:
            target.write_bytes(content[:end])
            if end < len(content):
                with pytest.raises(BadScan):
                    read_scan(target)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_damaged_files_give_pixels_or_a_clear_message(good, tmp_path):
    rng = np.random.default_rng(1)
    refused = 0
    for path in good:
        content = np.frombuffer(path.read_bytes(), np.uint8)
        target = tmp_path / path.name
        for _ in range(60):
            broken = content.copy()
            where = rng.integers(0, min(len(broken), rng.choice([400, len(broken)])), 4)
            broken[where] = rng.integers(0, 256, 4)
            target.write_bytes(broken.tobytes())
            try:
                assert read_scan(target, max_pixels=1 << 22).pixels.size > 0
            except BadScan as error:
                refused += 1
                assert len(str(error)) < 400
    assert refused > 100


def test_other_files_are_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.gif").write_bytes(b"GIF89a\1\0\1\0\0\0\0;")
    for name in ("a.txt", "a.gif"):
        with pytest.raises(BadScan, match="cannot be identified"):
            read_scan(tmp_path / name)
    with pytest.raises(BadScan, match="no file"):
        read_scan(tmp_path / "nowhere.png")


# -------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("corner, place", [("top left", (6, 6)), ("bottom right", (150, 230))])
def test_writing_in_a_corner_is_noticed(corner, place):
    picture = Image.fromarray(RNG.integers(0, 120, (256, 256), dtype=np.uint8))
    assert text_like_corners(np.asarray(picture)) == []
    ImageDraw.Draw(picture).text(place, "DOE, JANE 1950", fill=255, font_size=13)
    assert text_like_corners(np.asarray(picture)) == [corner]
    assert text_like_corners(np.asarray(picture.convert("RGB"))) == [corner]
    assert text_like_corners(np.asarray(picture).astype(np.int16) * 10 - 1000) == [corner]


def test_slices_of_the_phantom_have_no_writing(phantom):
    assert not any(text_like_corners(np.asarray(row["image"].resize((256, 256)))) for row in phantom)


@pytest.mark.skipif("ONEREWARD_DATA" not in os.environ, reason="needs the real sets")
def test_writing_on_real_chest_films_is_noticed_and_brain_slices_are_not_suspected():
    real = Path(os.environ["ONEREWARD_DATA"])
    for name in ("a4318ac9", "b343e657", "bd3ceeb6"):  # "Bettaufnahme", "liegend", "Auf Station"
        (path,) = real.glob(f"cxr_hannover_v7lung/**/images/{name}.png")
        assert text_like_corners(read_scan(path).pixels), name
    slices = sorted(real.glob("brain_brisc2025/images/*.jpg"))
    assert len(slices) > 40 and not any(text_like_corners(np.asarray(Image.open(path))) for path in slices)
