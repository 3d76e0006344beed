"""What the command line promises: one clear line and exit code 2 for bad input, nothing half written."""

import json
import re

import datasets
import huggingface_hub
import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from peft import LoraConfig

from onereward import OneRewardMaskPipeline
from onereward.data.scans import plane
from onereward.data.synthetic import is_synthetic
from onereward.hub.adapters import save_adapter
from onereward.hub.provenance import read_provenance


@pytest.fixture
def base(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def pictures(tmp_path):
    """A grey image of 40 x 30 pixels and a mask."""
    image = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    mask = np.zeros((30, 40), np.uint8)
    mask[8:20, 10:25] = 255
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "image.png", tmp_path / "mask.png"


def test_version_says_what_it_is_for(onereward):
    code, out, _ = onereward("--version")
    assert code == 0 and re.match(r"onereward \d+\.\d+\.\d+\. Research use only, not for clinical use\.", out)


def test_generate_keeps_every_pixel_outside_the_mask_and_marks_the_file(onereward, base, pictures, tmp_path):
    image, mask = pictures
    target = tmp_path / "out" / "result.png"
    code, out, err = onereward(
        "generate", image, mask, "--pipeline", base, "--output", target, "--task", "remove", "--steps", 2
    )
    assert code == 0, err
    result = PIL.Image.open(target)
    outside = np.array(PIL.Image.open(mask)) == 0
    assert np.array_equal(np.array(result)[outside], np.array(PIL.Image.open(image))[outside])
    assert not np.array_equal(np.array(result), np.array(PIL.Image.open(image)))
    assert "SYNTHETIC" in result.text["Description"] and "not for clinical use" in result.text["Disclaimer"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["result.png", "result.png.provenance.json"]
    record = read_provenance(target)
    assert record["settings"]["task"] == "remove" and record["parents"][0]["role"] == "base_model"
    for words in (str(result.text), json.dumps(record)):
        assert image.name not in words and mask.name not in words and str(tmp_path) not in words


def test_generate_turns_photographs_upright(onereward, base, pictures, tmp_path):
    image, mask = pictures
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    sideways = PIL.Image.open(image).rotate(90, expand=True)
    sideways.save(tmp_path / "sideways.png", exif=exif)
    code, _, err = onereward(
        "generate", tmp_path / "sideways.png", mask, "--pipeline", base, "--output", tmp_path / "r.png", "--steps", 1
    )
    assert code == 0, err
    outside = np.array(PIL.Image.open(mask)) == 0
    result = np.array(PIL.Image.open(tmp_path / "r.png"))
    assert np.array_equal(result[outside], np.array(PIL.Image.open(image))[outside])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": "missing.png"}, "there is no file"),
        ({"mask": "small.png"}, "Resize it"),
        ({"--window-center": 4}, "belong together"),
        ({"--slice": 4}, "a single picture"),
        ({"--output": "folder"}, "one slice"),
        ({"mask": "empty.png"}, "is empty"),
        ({"mask": "grey.png"}, "not binary"),
        ({"image": "colour.png"}, "coloured"),
        ({"image": "text.png"}, "cannot be identified"),
        ({"--label-map": "unknown.png"}, "unknown labels"),
        ({"--task": "paint"}, "'paint'"),
        ({"--pipeline": "./nowhere"}, "neither a folder nor a Hub id"),
        ({"--output": "result.jpg"}, "ends in .png"),
        ({"--output": "result.tar.gz"}, "ends in .png"),
        ({"--adapter": "empty"}, "adapter"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(onereward, base, pictures, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("L", (8, 8), 255).save("small.png")
    PIL.Image.new("L", (40, 30)).save("empty.png")
    PIL.Image.new("L", (40, 30), 100).save("grey.png")
    PIL.Image.new("RGB", (40, 30), (200, 20, 20)).save("colour.png")
    PIL.Image.new("L", (40, 30), 9).save("unknown.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    arguments = {"image": pictures[0], "mask": pictures[1], "--pipeline": base, "--output": "result.png"} | change
    options = [part for name, value in arguments.items() if name.startswith("--") for part in (name, value)]
    code, _, err = onereward("generate", arguments["image"], arguments["mask"], *options, "--steps", 1)
    assert code == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.glob("result.*"))


def test_generate_paints_what_the_pipeline_paints(onereward, base, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 3:9] = 255
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("--pipeline", base, "--output", tmp_path / "r.png", "--steps", 3, "--guidance", 3, "--seed", 5)
    code, _, err = onereward("generate", tmp_path / "image.png", tmp_path / "mask.png", *arguments)
    assert code == 0, err
    pipe = OneRewardMaskPipeline.from_pretrained(base)
    expected = pipe(
        image=PIL.Image.fromarray(image),
        mask_image=PIL.Image.fromarray(mask),
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(np.array(PIL.Image.open(tmp_path / "r.png")), np.array(expected))


def test_generate_keeps_colours(onereward, tiny_pipeline, tmp_path):
    tiny_pipeline(image_channels=3).save_pretrained(tmp_path / "colour")
    image = np.random.default_rng(0).integers(0, 256, (20, 12, 3), dtype=np.uint8)
    mask = np.zeros((20, 12), np.uint8)
    mask[4:12, 3:9] = 255
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("--pipeline", tmp_path / "colour", "--output", tmp_path / "r.png", "--steps", 1)
    code, _, err = onereward("generate", tmp_path / "image.png", tmp_path / "mask.png", *arguments)
    assert code == 0, err
    result = np.array(PIL.Image.open(tmp_path / "r.png"))
    assert np.array_equal(result[mask == 0], image[mask == 0]) and not np.array_equal(result, image)
    code, _, err = onereward(
        "generate", tmp_path / "image.png", tmp_path / "mask.png", *arguments, "--window-center", 1
    )
    assert code == 2 and "belong together" in err


def test_generate_keeps_16_bits(onereward, base, pictures, tmp_path):
    image = np.random.default_rng(0).integers(0, 65536, (30, 40), dtype=np.uint16)
    PIL.Image.fromarray(image).save(tmp_path / "deep.png")
    arguments = ("--pipeline", base, "--output", tmp_path / "r.png", "--steps", 1)
    window = ("--window-center", 3000, "--window-width", 1000)
    code, _, err = onereward("generate", tmp_path / "deep.png", pictures[1], *arguments, *window)
    assert code == 0, err
    result, mask = np.array(PIL.Image.open(tmp_path / "r.png")), np.array(PIL.Image.open(pictures[1]))
    assert result.dtype == np.uint16 and np.array_equal(result[mask == 0], image[mask == 0])
    inside = result[mask > 0]
    assert inside.min() >= 2500 and inside.max() <= 3500 and len(np.unique(inside)) > 20


@pytest.fixture
def volume(tmp_path):
    """A volume of HU that lies askew in its file, with a mask of three axial slices: most of it in slice 4."""
    affine = np.array([[0, 0, 2.0, -9], [-1.5, 0, 0, 8], [0, 3, 0, -7], [0, 0, 0, 1]])  # axes: P, S, R
    pixels = np.random.default_rng(0).integers(-1024, 3000, (12, 7, 10)).astype(np.int16)
    mask = np.zeros(pixels.shape, np.uint8)
    mask[3:6, 3, 2:7] = mask[2:9, 4, 2:7] = mask[3:6, 6, 2:7] = 1
    nib.save(nib.Nifti1Image(pixels, affine), tmp_path / "ct.nii.gz")
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(mask, affine)), tmp_path / "mask.nii.gz")  # lies otherwise
    return tmp_path, pixels, mask > 0, affine


def test_generate_repaints_the_slice_with_most_mask_and_keeps_all_other_voxels(onereward, base, volume):
    folder, pixels, mask, affine = volume
    arguments = ("--pipeline", base, "--steps", 1, "--window-center", 40, "--window-width", 80)
    code, _, err = onereward(
        "generate", folder / "ct.nii.gz", folder / "mask.nii.gz", *arguments, "--output", folder / "r.nii.gz"
    )
    assert code == 0 and "axial slice 4." in err, err
    found = nib.load(folder / "r.nii.gz")
    result = np.asarray(found.dataobj)
    assert np.array_equal(found.affine, affine) and found.get_data_dtype() == np.int16
    painted = np.zeros_like(mask)
    painted[:, 4] = mask[:, 4]
    assert np.array_equal(result[~painted], pixels[~painted])
    assert result[painted].min() >= 0 and result[painted].max() <= 80 and (result != pixels)[painted].mean() > 0.9
    assert read_provenance(folder / "r.nii.gz")["settings"]["slices"] == {"axis": "axial", "index": [4]}


def test_generate_repaints_all_slices_one_by_one_as_if_alone(onereward, base, volume):
    folder, pixels, mask, _ = volume
    arguments = ("generate", folder / "ct.nii.gz", folder / "mask.nii.gz", "--pipeline", base, "--steps", 1)
    code, _, err = onereward(*arguments, "--all-slices", "--output", folder / "all.nii.gz")
    assert code == 0 and "slices 3-4, 6." in err, err
    result = np.asarray(nib.load(folder / "all.nii.gz").dataobj)
    assert np.array_equal(result[~mask], pixels[~mask]) and (result != pixels)[mask].mean() > 0.9
    for index in (3, 6):
        code, _, err = onereward(*arguments, "--slice", index, "--output", folder / "one.nii.gz")
        assert code == 0, err
        alone = np.asarray(nib.load(folder / "one.nii.gz").dataobj)
        assert np.array_equal(alone[:, index], result[:, index])
    code, _, err = onereward(*arguments, "--all-slices", "--output", folder / "r.png")
    assert code == 2 and "one slice" in err
    code, _, err = onereward(*arguments, "--slice", 5, "--output", folder / "r.png")
    assert code == 2 and "empty in axial slice 5" in err and "in 4" in err
    code, _, err = onereward(*arguments, "--slice", 7, "--output", folder / "r.png")
    assert code == 2 and "slices 0 to 6" in err
    assert not (folder / "r.png").exists()


def test_generate_takes_a_picture_as_the_mask_of_a_slice(onereward, base, volume):
    folder, pixels, mask, affine = volume
    seen = plane(mask, affine, "axial", 4)
    PIL.Image.fromarray(seen * np.uint8(255)).save(folder / "mask.png")
    arguments = ("--pipeline", base, "--steps", 1, "--output", folder / "r.nii.gz")
    code, _, err = onereward("generate", folder / "ct.nii.gz", folder / "mask.png", *arguments)
    assert code == 2 and "which of its slices" in err
    code, _, err = onereward("generate", folder / "ct.nii.gz", folder / "mask.png", *arguments, "--slice", 4)
    assert code == 0, err
    code, _, err = onereward(
        "generate", folder / "ct.nii.gz", folder / "mask.nii.gz", *arguments[:-1], folder / "s.nii"
    )
    assert np.array_equal(nib.load(folder / "r.nii.gz").get_fdata(), nib.load(folder / "s.nii").get_fdata())


def test_generate_refuses_a_mask_that_lies_elsewhere(onereward, base, volume):
    folder, _, mask, affine = volume
    moved = affine.copy()
    moved[0, 3] += 2
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), moved), folder / "moved.nii.gz")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8)[:-1], affine), folder / "small.nii.gz")
    for name, message in (("moved.nii.gz", "lies elsewhere"), ("small.nii.gz", "Resize")):
        code, _, err = onereward("generate", folder / "ct.nii.gz", folder / name, "--pipeline", base)
        assert code == 2 and message in err


def test_generate_writes_dicom_with_the_numbers_of_the_source(onereward, base, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    source = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    source.PatientName, source.PatientComments = "Doe^Jane", "JANE"
    source.save_as(tmp_path / "ct.dcm")
    mask = np.zeros((128, 128), np.uint8)
    mask[40:60, 50:90] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("--pipeline", base, "--steps", 1, "--output", tmp_path / "r.dcm")
    code, _, err = onereward("generate", tmp_path / "ct.dcm", tmp_path / "mask.png", *arguments)
    assert code == 0 and "identity" in err, err
    result = pydicom.dcmread(tmp_path / "r.dcm")
    hu, before = (pydicom.pixels.apply_rescale(file.pixel_array, file) for file in (result, source))
    assert np.array_equal(hu[mask == 0], before[mask == 0]) and not np.array_equal(hu, before)
    assert result.SyntheticData == "YES" and result.Modality == "CT" and result.PixelSpacing == source.PixelSpacing
    assert result.ImagePositionPatient == source.ImagePositionPatient
    assert result.SOPInstanceUID != source.SOPInstanceUID and result.StudyInstanceUID != source.StudyInstanceUID
    content = (tmp_path / "r.dcm").read_bytes().lower()
    for words in ("jane", "mask.png", str(source.InstitutionName), str(source.StudyInstanceUID), str(tmp_path)):
        assert words.lower().encode() not in content


def test_generate_takes_and_writes_dicom_series(onereward, base, volume):
    pytest.importorskip("pydicom")
    folder, pixels, mask, affine = volume
    arguments = ("--pipeline", base, "--steps", 1, "--all-slices", "--output")
    code, _, err = onereward("generate", folder / "ct.nii.gz", folder / "mask.nii.gz", *arguments, folder / "series")
    assert code == 0, err
    assert sorted(path.name for path in (folder / "series").iterdir())[-2:] == ["0007.dcm", "provenance.json"]
    code, _, err = onereward("generate", folder / "series", folder / "mask.nii.gz", *arguments, folder / "back.nii.gz")
    assert code == 0, err
    back = nib.as_closest_canonical(nib.load(folder / "back.nii.gz"))
    wanted, outside = (
        nib.as_closest_canonical(nib.Nifti1Image(array, affine)) for array in (pixels, (~mask).astype(np.uint8))
    )
    np.testing.assert_allclose(back.affine, wanted.affine, atol=1e-4)
    outside = np.asarray(outside.dataobj) > 0
    assert np.array_equal(np.asarray(back.dataobj)[outside], np.asarray(wanted.dataobj)[outside])
    code, _, err = onereward("generate", folder / "series", folder / "mask.nii.gz", *arguments, folder / "series")
    assert code == 2 and "exists already" in err


def test_generate_with_an_adapter_of_no_strength_is_the_pipeline(onereward, base, tiny_pipeline, pictures, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    save_adapter(pipeline, tmp_path / "adapter", base_model=None)
    results = {}
    for name, options in {
        "none": (),
        "off": ("--adapter", tmp_path / "adapter", "--adapter-strength", 0),
        "half": ("--adapter", tmp_path / "adapter", "--adapter-strength", 0.5),
        "whole": ("--adapter", tmp_path / "adapter"),
    }.items():
        target = tmp_path / f"{name}.png"
        code, _, err = onereward("generate", *pictures, "--pipeline", base, "--output", target, "--steps", 2, *options)
        assert code == 0, err
        results[name] = np.array(PIL.Image.open(target)).astype(int)
    assert np.array_equal(results["none"], results["off"])
    half, whole = (np.abs(results[name] - results["none"]).sum() for name in ("half", "whole"))
    assert 0 < half < whole
    record = read_provenance(tmp_path / "half.png")
    assert record["adapter"] == "adapter" and record["settings"]["adapter_strength"] == 0.5
    assert [parent["role"] for parent in record["parents"]] == ["base_model", "adapter"]


def test_generate_writes_which_commit_of_the_hub_painted(onereward, base, pictures, hub, tmp_path):
    api = huggingface_hub.HfApi()
    name = api.create_repo("alice/generate-base").repo_id
    first = api.upload_folder(repo_id=name, folder_path=base).oid
    api.upload_file(repo_id=name, path_or_fileobj=b"later", path_in_repo="later.txt")
    arguments = ("--pipeline", name, "--revision", first, "--output", tmp_path / "r.png", "--steps", 1)
    code, _, err = onereward("generate", *pictures, *arguments)
    assert code == 0, err
    mark = is_synthetic(tmp_path / "r.png")
    assert mark["model"] == name and mark["revision"] == first


@pytest.fixture
def folder(tmp_path):
    """Six cases in the layout of `images/` and `masks/`."""
    rng = np.random.default_rng(1)
    for name in ("images", "masks"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    for case in range(6):
        mask = np.zeros((48, 48), np.uint8)
        mask[10 + case : 25, 10:30] = 255
        PIL.Image.fromarray(rng.integers(0, 256, (48, 48), dtype=np.uint8)).save(tmp_path / f"mine/images/{case}.png")
        PIL.Image.fromarray(mask).save(tmp_path / f"mine/masks/{case}.png")
    return tmp_path / "mine"


def test_data_writes_rows_split_by_case(onereward, folder, tmp_path):
    target = tmp_path / "rows"
    code, out, err = onereward("data", folder, "--output", target, "--size", 32, "--test-fraction", 0.34)
    assert code == 0, err
    parts = datasets.load_from_disk(target)
    assert {name: len(part) for name, part in parts.items()} == {"train": 4, "test": 2}
    assert not set(parts["train"]["case_id"]) & set(parts["test"]["case_id"])
    assert parts["train"][0]["image"].size == (32, 32)
    assert "4 rows of 4 cases for train" in out
    assert not list(tmp_path.glob("*.partial"))


def test_data_refuses_to_write_over_something_and_names_what_is_missing(onereward, folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "votes.txt").write_text("precious")
    code, _, err = onereward("data", folder, "--output", tmp_path / "full")
    assert code == 2 and "not empty" in err
    assert (tmp_path / "full" / "votes.txt").read_text() == "precious"
    (folder / "masks" / "3.png").unlink()
    code, _, err = onereward("data", folder, "--output", tmp_path / "rows")
    assert code == 2 and "3" in err and not (tmp_path / "rows").exists()


def test_demo_names_a_missing_folder(onereward, base, tmp_path):
    code, _, err = onereward("demo", "--pipeline", base, "--data", tmp_path / "nowhere", "--output", tmp_path / "run")
    assert code == 2 and "is no folder" in err and not (tmp_path / "run").exists()
