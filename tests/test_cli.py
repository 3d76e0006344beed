"""What the command line promises: one clear line and exit code 2 for bad input, nothing half written."""

import re
import sys

import datasets
import numpy as np
import PIL.Image
import pytest

from onereward import cli


@pytest.fixture
def onereward(monkeypatch, capsys):
    """`onereward("generate", ...)` -> (exit code, output, errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["onereward", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


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
    assert "SYNTHETIC" in result.text["Comment"] and "Not for clinical use" in result.text["Comment"]
    assert str(image.name) not in str(result.text)
    assert [path.name for path in target.parent.iterdir()] == ["result.png"]


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
        ({"mask": "empty.png"}, "is empty"),
        ({"mask": "grey.png"}, "not binary"),
        ({"image": "colour.png"}, "coloured"),
        ({"image": "text.png"}, "cannot identify image file"),
        ({"--label-map": "unknown.png"}, "unknown labels"),
        ({"--task": "paint"}, "'paint'"),
        ({"--pipeline": "./nowhere"}, "neither a folder nor a Hub id"),
        ({"--output": "result.jpg"}, "ends in .png"),
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
