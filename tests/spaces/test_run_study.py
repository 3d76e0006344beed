"""A study from a table: every line painted by every adapter as asked, nothing painted twice, and bad lines named."""

import csv
import io
import os
import runpy
import subprocess
import sys
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, snapshot_download
from peft import LoraConfig
from PIL import Image

from onereward import OneRewardMaskPipeline
from onereward.generate import GenerateSettings, run_generate
from onereward.hub.adapters import save_adapter
from onereward.preferences import Study, study_units


pytest.importorskip("gradio", reason="the Space needs onereward[space]")

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces/onereward-arena"
EXAMPLES = SPACE / "examples"
script = runpy.run_path(str(SPACE / "run_study.py"))
SECRET = "a salt of more than sixteen characters"
HEADER = "image,mask,label_map,task,prompt,case_id,seed"
LINES = [
    f'{EXAMPLES}/0-image.png,{EXAMPLES}/0-mask.png,{EXAMPLES}/0-label_map.png,fill,"a tumour, with a ring",case-0,7',
    f"{EXAMPLES}/3-image.png,{EXAMPLES}/3-mask.png,,remove,,case-3,8",
]


@pytest.fixture(scope="module")
def space(running_space, tmp_path_factory):
    """Address of a Space with the embedded base and an adapter of random weights."""
    adapters = tmp_path_factory.mktemp("adapters")
    make_adapter(adapters / "tuned")
    with running_space(ONEREWARD_ADAPTERS=str(adapters), OMP_NUM_THREADS="1") as space:
        yield space.url


def make_adapter(folder: Path) -> None:
    """An adapter of the embedded base that changes what it paints."""
    pipeline = OneRewardMaskPipeline.from_pretrained(ROOT / "pipelines/onereward-brats")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    save_adapter(pipeline, folder, base_model="org/onereward-brats")


@pytest.fixture
def table(tmp_path):
    """`table(*lines)` -> a CSV file."""

    def write(*lines, header=HEADER):
        path = tmp_path / "cases.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return path

    return write


def run(*arguments):
    script["run"](script["parser"]().parse_args([*map(str, arguments)]))


def test_two_lines_become_a_study(space, table, tmp_path, capsys):
    output = tmp_path / "study"
    run(table(*LINES), output, "--space", space, "--adapters", "base", "tuned", "--steps", 4, "--goal", 6)
    said = capsys.readouterr()
    assert "4/4" in said.err and f"ONEREWARD_STUDY={output}" in said.out

    rows = datasets.Dataset.from_parquet(str(output / "candidates.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["model"] == ["base", "tuned"] * 2 and rows["case_id"] == ["case-0"] * 2 + ["case-3"] * 2
    assert rows["task"] == ["fill"] * 2 + ["remove"] * 2 and rows["seed"] == [7, 7, 8, 8]
    assert rows["prompt"] == ["a tumour, with a ring"] * 2 + [""] * 2
    for row, number in zip(rows, (0, 0, 3, 3), strict=True):
        source = np.asarray(Image.open(EXAMPLES / f"{number}-image.png"))
        inside = np.asarray(Image.open(EXAMPLES / f"{number}-mask.png")) > 0
        candidate = np.asarray(row["candidate"])
        assert np.array_equal(np.asarray(row["image"]), source)
        assert np.array_equal(np.asarray(row["mask"]) > 0, inside)
        assert np.array_equal(candidate[~inside], source[~inside]) and (candidate != source)[inside].any()
    assert np.array_equal(np.asarray(rows[0]["label_map"]), np.asarray(Image.open(EXAMPLES / "0-label_map.png")))

    study = Study(output, SECRET)
    assert len(study_units(rows, study.settings)) == 2 and study.settings.goal == 6
    rater = study.join("ann", study.settings.roles[0], True)
    item = study.next_item(rater)
    assert study.answer(rater, item.item_id, item.criteria[0], "left").answered == 1


def test_what_is_painted_is_what_the_pipeline_paints(space, table, tmp_path):
    """The other way to paint, `onereward generate`, gives the same pixels."""
    run(table(LINES[0]), tmp_path / "study", "--space", space, "--adapters", "base", "tuned", "--steps", 3)
    rows = pq.read_table(tmp_path / "study/candidates.parquet").to_pylist()
    settings = GenerateSettings(
        str(ROOT / "pipelines/onereward-brats"), prompt="a tumour, with a ring", num_inference_steps=3, seed=7
    )
    mask, label_map = tmp_path / "mask.png", EXAMPLES / "0-label_map.png"
    Image.open(EXAMPLES / "0-mask.png").save(mask)
    run_generate(EXAMPLES / "0-image.png", mask, tmp_path / "own.png", settings, label_map)
    own, painted = Image.open(tmp_path / "own.png"), Image.open(io.BytesIO(rows[0]["candidate"]["bytes"]))
    assert np.array_equal(np.asarray(own), np.asarray(painted))


def test_who_was_interrupted_goes_on(space, table, tmp_path):
    """The second run, of another goal and with one line more, paints that line alone; the files show which."""
    options = ("--space", space, "--adapters", "base", "tuned", "--steps", 2)
    run(table(LINES[0]), tmp_path / "first", *options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "first-painted").iterdir()}
    assert len(kept) == 2
    (tmp_path / "first-painted").rename(tmp_path / "study-painted")
    run(table(*LINES), tmp_path / "study", *options)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "study-painted").iterdir()}
    assert len(now) == 4 and {path.name: time for path, time in kept.items()}.items() <= now.items()

    with pytest.raises(ValueError, match="holds a study already"):
        run(table(*LINES), tmp_path / "study", *options)


BAD = {
    "no file": (f"{EXAMPLES}/none.png,{EXAMPLES}/0-mask.png,,,,c,", "line 3: `image` is .*none.png.*no file"),
    "no case": (f"{EXAMPLES}/0-image.png,{EXAMPLES}/0-mask.png,,,,,", "line 3: `case_id` is empty"),
    "task": (f"{EXAMPLES}/0-image.png,{EXAMPLES}/0-mask.png,,paint,,c,", "line 3: `task` is 'paint'; expected one of"),
    "seed": (f"{EXAMPLES}/0-image.png,{EXAMPLES}/0-mask.png,,,,c,-1", "line 3: `seed` is '-1'; expected a whole"),
    "mask is a picture": (f"{EXAMPLES}/0-image.png,{EXAMPLES}/0-image.png,,,,c,", "line 3: `mask` .*expected"),
    "labels outside": (
        f"{EXAMPLES}/0-image.png,{EXAMPLES}/0-mask.png,{EXAMPLES}/3-mask.png,,,c,",
        "line 3: `label_map`",
    ),
    "a comma too many": (f"{EXAMPLES}/0-image.png,{EXAMPLES}/0-mask.png,,,a, b,c,1", "line 3: it has more or fewer"),
    "not a picture": (f"{SPACE}/app.py,{EXAMPLES}/0-mask.png,,,,c,", "line 3: .*cannot identify image file"),
    "open quote": (f'{EXAMPLES}/0-image.png,"{EXAMPLES}/0-mask.png,,,,c,', "unexpected end of data"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_before_anything_is_painted(line, message, table):
    with pytest.raises((ValueError, csv.Error), match=message):
        script["read_cases"](table(LINES[0], line))


def test_columns_are_checked(table):
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['case_id'\] or has unknown ones, \['Seed'\]"):
        script["read_cases"](table(header="image,mask,Seed"))
    with pytest.raises(ValueError, match="a header and no lines"):
        script["read_cases"](table())


def test_a_data_set_under_an_agreement_is_named_even_if_only_its_files_are(table, tmp_path):
    for name in ("image", "mask"):
        Image.open(EXAMPLES / f"0-{name}.png").save(tmp_path / f"BraTS-GLI-0001-{name}.png")
    line = "BraTS-GLI-0001-image.png,BraTS-GLI-0001-mask.png,,,,case-1,"
    (case,) = script["read_cases"](table(line))
    assert case.source == "brats"


def test_errors_are_one_line(table, tmp_path):
    words = [table(*LINES), tmp_path / "study", "--space", "http://127.0.0.1:9", "--adapters", "base", "tuned"]
    command = [sys.executable, SPACE / "run_study.py", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: No Space answers at http://127.0.0.1:9")


@pytest.mark.parametrize("adapters", [["base"], ["org/a", "other/a"]])
def test_adapters_must_be_told_apart(adapters, table, tmp_path):
    with pytest.raises(ValueError, match="two or more are wanted, with different last names"):
        run(table(*LINES), tmp_path / "study", "--adapters", *adapters)


def test_an_adapter_that_is_not_there_is_named(space, table, tmp_path):
    with pytest.raises(ValueError, match="^The Space refuses: The adapter 'nobody' is neither "):
        run(table(*LINES), tmp_path / "study", "--space", space, "--adapters", "base", "nobody", "--steps", 1)


def test_the_study_goes_to_the_hub_with_its_space(space, table, tmp_path, hub):
    repo = f"org/arena-{uuid.uuid4().hex}"
    options = ("--space", space, "--adapters", "base", "tuned", "--steps", 2, "--title", "Two cases")
    run(table(*LINES), tmp_path / "study", *options, "--publish", repo, "--private")
    assert HfApi().repo_info(repo, repo_type="space").private
    folder = tmp_path / "downloaded"
    snapshot_download(repo, repo_type="space", local_dir=folder)
    for name in ("study.json", "candidates.parquet"):
        assert (folder / "study" / name).read_bytes() == (tmp_path / "study" / name).read_bytes()
    assert (folder / "app.py").is_file() and (folder / "onereward/__init__.py").is_file()
    assert not list(folder.rglob("*painted*"))
