"""What is painted on a scan goes back into the numbers, colours and place of its source, and claims no more."""

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from onereward.data.scans import read_scan
from onereward.data.synthetic import save_dicom
from onereward.generate import GenerateSettings, run_generate


pydicom = pytest.importorskip("pydicom")
RNG = np.random.default_rng(0)


@pytest.fixture
def settings(tiny_pipeline, tmp_path):
    """`settings(window=...)` -> how the tiny pipeline paints in one step."""

    def make(image_channels: int = 1, **kwargs) -> GenerateSettings:
        tiny_pipeline(image_channels=image_channels).save_pretrained(tmp_path / "base")
        return GenerateSettings(str(tmp_path / "base"), task="remove", num_inference_steps=1, **kwargs)

    return make


@pytest.mark.parametrize("width_of_user", [None, 900])
def test_a_film_whose_low_numbers_are_white_is_painted_as_its_positive(settings, tmp_path, width_of_user):
    bright = 2 * RNG.integers(300, 800, (24, 20)) - 100
    mask = np.zeros(bright.shape, np.uint8)
    mask[6:18, 5:15] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    total = 2 * 65535 - 200  # of a number in 16 bits with this rescale, and of its negative
    results = {}
    for name, pixels, center in (("positive", bright, 1000), ("film", total - bright, total - 1000)):
        source = tmp_path / f"{name}.dcm"
        about = {"rescale": (2, -100), "window": (center, 1200), "low_is_white": name == "film"}
        save_dicom(pixels, source, model="m", **about)
        window = width_of_user and (center, width_of_user)
        run_generate(source, tmp_path / "mask.png", tmp_path / f"{name}-out.dcm", settings(window=window))
        file = pydicom.dcmread(tmp_path / f"{name}-out.dcm")
        results[name] = pydicom.pixels.apply_rescale(file.pixel_array, file)
        np.testing.assert_array_equal(results[name][mask == 0], pixels[mask == 0])
        assert (file.WindowCenter, file.WindowWidth) == (center, width_of_user or 1200)
        facts = json.loads((tmp_path / f"{name}-out.dcm.provenance.json").read_text())
        assert facts["settings"]["window"] == [center, width_of_user or 1200]
    assert file.PhotometricInterpretation == "MONOCHROME1"
    np.testing.assert_array_equal(total - results["film"], results["positive"])
    assert np.ptp(results["positive"][mask > 0]) > 100  # something was seen and painted
    notes = run_generate(source, tmp_path / "mask.png", tmp_path / "film.nii", settings())
    assert f"{total} - x" in notes[-1]
    voxels = np.asarray(nib.load(tmp_path / "film.nii").dataobj)[..., 0].T
    np.testing.assert_array_equal(voxels[mask == 0], bright[mask == 0])


def test_a_colour_slice_with_a_place_comes_back_as_one_slice(settings, tmp_path):
    pixels = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    mask = np.zeros(pixels.shape[:2], np.uint8)
    mask[6:18, 5:15] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    place = np.diag([2.0, 3.0, 4.0, 1.0])
    save_dicom(pixels, tmp_path / "source.dcm", model="m", affine=place, is_volume=False)
    run_generate(tmp_path / "source.dcm", tmp_path / "mask.png", tmp_path / "r.dcm", settings(image_channels=3))
    file = pydicom.dcmread(tmp_path / "r.dcm")
    assert (file.Rows, file.Columns, file.PhotometricInterpretation) == (24, 20, "RGB")
    found = read_scan(tmp_path / "r.dcm")
    np.testing.assert_array_equal(found.pixels[mask == 0], pixels[mask == 0])
    assert not np.array_equal(found.pixels, pixels)
    np.testing.assert_allclose(found.affine, place)


def test_nobody_is_told_how_a_patient_lies_where_the_source_does_not_say(settings, tmp_path):
    voxels = RNG.integers(0, 1000, (20, 24, 3)).astype(np.int16)
    mask = np.zeros(voxels.shape, np.uint8)
    mask[5:15, 6:18, 1] = 1
    for name, values in (("image", voxels), ("mask", mask)):
        image = nib.Nifti1Image(values, None)
        image.header.set_zooms((500, 250, 2000))
        image.header.set_xyzt_units("micron")
        nib.save(image, tmp_path / f"{name}.nii")
    about = tmp_path / "image.nii", tmp_path / "mask.nii"
    run_generate(*about, tmp_path / "r.nii.gz", settings())
    result = nib.load(tmp_path / "r.nii.gz")
    assert result.header["sform_code"] == result.header["qform_code"] == 0
    np.testing.assert_allclose(result.header.get_zooms(), (0.5, 0.25, 2))
    assert result.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(result.dataobj)[mask == 0], voxels[mask == 0])
    run_generate(*about, tmp_path / "r.dcm", settings())
    slice = pydicom.dcmread(tmp_path / "r.dcm")
    assert list(slice.PixelSpacing) == [0.25, 0.5] and (slice.Rows, slice.Columns) == (24, 20)
    assert "ImageOrientationPatient" not in slice and "ImagePositionPatient" not in slice
    with pytest.raises(ValueError, match="does not say how the patient lies"):
        run_generate(*about, tmp_path / "series", settings())


def test_a_wrong_spacing_does_not_take_all_memory(settings, tmp_path):
    scan, mask = RNG.integers(0, 900, (16, 12, 2)).astype(np.int16), np.ones((16, 12, 2), np.uint8)
    for name, content in (("scan", scan), ("mask", mask)):
        nib.save(nib.Nifti1Image(content, np.diag([1e-6, 1, 1, 1])), tmp_path / f"{name}.nii.gz")
    with pytest.raises(ValueError, match="too long and narrow to be painted. Correct the spacing"):
        run_generate(tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz", tmp_path / "out.nii.gz", settings())
