"""Data under a data-use agreement are known by their names, marked, and not published without a word."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from onereward.cli import app
from onereward.data.phantom import load_phantom
from onereward.hub.agreements import AGREEMENTS, PATTERNS, check_agreements, describe_agreement, find_agreements
from onereward.hub.provenance import describe_data, describe_parent, write_provenance


# Names as their owners write them: folders of the challenges, file names, ids of mirrors.
NAMES_OF_OWNERS = {
    "mimic": [
        "mimic-cxr-2.0.0-metadata.csv.gz",
        "MIMIC-CXR-JPG",
        "physionet.org/files/mimic-cxr-jpg/2.1.0",
        "MIMIC-III",
    ],
    "adni": ["ADNI_002_S_0295_MR_MPR_I118671.nii", "ADNIMERGE.csv", "adni1", "ADNI"],
    "oai": ["OAI", "OAI-ZIB", "oai_dess", "OAIZIB-CM", "Osteoarthritis Initiative"],
    "oasis": ["OAS1 of OASIS-1", "oasis3", "oasis_cross-sectional.csv"],
    "brats": [
        "BraTS2021_00000_flair.nii.gz",
        "MICCAI_BraTS2020_TrainingData",
        "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData",
        "BraTS-GLI-00000-000-t1n.nii.gz",
        "BRATS_001.nii.gz",
    ],
}
# Names that only look like it, or that are ours.
FREE_NAMES = [
    "phantom",
    "folder",
    "brisc",
    "org/onereward-brats",
    "org/onereward-brats-votes",
    "pipelines/onereward-brats",
    "BRISC2025",
    "openai/images",
    "HAM10000",
    "LIDC-IDRI",
    "Hawaii-oaitems",
]


@pytest.mark.parametrize(
    ("agreement", "name"), [(key, name) for key, names in NAMES_OF_OWNERS.items() for name in names]
)
def test_names_that_owners_give_are_known(agreement, name):
    assert find_agreements(name) == [agreement]


@pytest.mark.parametrize("name", FREE_NAMES)
def test_other_names_are_free(name):
    assert find_agreements(name) == []


def test_a_name_like_our_own_does_not_hide_real_data():
    assert find_agreements("org/onereward-brats2021") == ["brats"]
    assert find_agreements("onereward-brats-2023") == ["brats"]
    assert find_agreements("onereward-brats", "BraTS2021_00000") == ["brats"]


def test_every_agreement_says_what_whose_where_and_why():
    assert AGREEMENTS.keys() == PATTERNS.keys() == NAMES_OF_OWNERS.keys()
    for name, agreement in AGREEMENTS.items():
        assert set(agreement) == {"what", "owner", "url", "reason"} and agreement["url"].startswith("https://")
        assert agreement["reason"] in describe_agreement(name) and agreement["url"] in describe_agreement(name)


@pytest.mark.parametrize("name", [*AGREEMENTS, "Data of St Elsewhere, contract 7, not to be passed on"])
def test_publishing_is_refused_with_the_reason_unless_private_or_permitted(name):
    with pytest.raises(ValueError, match="data-use agreement") as refusal:
        check_agreements([name], private=False, permission=None)
    assert describe_agreement(name) in str(refusal.value) and "--private" in str(refusal.value)
    with pytest.raises(ValueError, match="--permission"):
        check_agreements([name], private=False, permission="  ")
    check_agreements([name], private=True, permission=None)
    check_agreements([name], private=False, permission="Dr Who, letter of 1 May")
    check_agreements([], private=False, permission=None)


def make_folder(path: Path, stem="case"):
    """Three images with masks, as a user has them."""
    for kind in ("images", "masks"):
        (path / kind).mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(pixels.integers(0, 255, (16, 16), np.uint8)).save(path / "images" / f"{stem}{index}.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[4:9, 4:9] = 255
        Image.fromarray(mask).save(path / "masks" / f"{stem}{index}.png")
    return path


def run_data(folder, output, *options):
    arguments = ["data", str(folder), "--output", str(output), "--size", "16", "--test-fraction", "0.34", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads((output / "provenance.json").read_text()), result.output


@pytest.mark.parametrize(
    ("folder", "stem", "options", "agreements", "source"),
    [
        ("mine", "case", (), [], "folder"),
        ("mine", "case", ("--source", "BraTS 2021"), ["brats"], "BraTS 2021"),
        ("MICCAI_BraTS2020_TrainingData/slices", "case", (), ["brats"], "folder (brats)"),
        ("mine", "ADNI_002_S_0295_", (), ["adni"], "folder (adni)"),
        ("mine", "case", ("--agreement", "Ward 7: stays here"), ["Ward 7: stays here"], "folder"),
        (
            "oasis3",
            "case",
            ("--source", "our MIMIC", "--agreement", "x"),
            ["mimic", "oasis", "x"],
            "our MIMIC (oasis)",
        ),
    ],
)
def test_data_command_marks_by_source_folder_file_names_and_word(tmp_path, folder, stem, options, agreements, source):
    record, output = run_data(make_folder(tmp_path / "in" / folder, stem), tmp_path / "rows", *options)
    assert record["agreements"] == agreements and record["kind"] == "dataset"
    assert ("Under agreement" in output) is bool(agreements)
    rows = datasets.load_from_disk(tmp_path / "rows")
    assert {value for part in rows.values() for value in part["source"]} == {source} == set(record["sources"])
    assert record["num_rows"] == sum(len(part) for part in rows.values()) == 3
    text = (tmp_path / "rows" / "provenance.json").read_text()
    assert str(tmp_path) not in text and f"{stem}0" not in text


def test_the_mark_follows_rows_votes_reward_model_and_adapter(tmp_path):
    run_data(make_folder(tmp_path / "mine"), tmp_path / "rows", "--agreement", "Ward 7: stays here")
    train = datasets.load_from_disk(tmp_path / "rows")["train"]
    data = describe_data("train_data", train, tmp_path / "rows")
    votes_file = tmp_path / "votes.parquet"
    votes_file.write_bytes(b"votes")
    write_provenance(votes_file, "votes", parents=[data])
    votes = describe_parent("votes", votes_file, repo_type="dataset")
    write_provenance(tmp_path / "reward", "reward-model", parents=[votes])
    reward = describe_parent("reward_model", tmp_path / "reward")
    phantom = describe_data("train_data", load_phantom(1, contrasts=("t1c",)), "phantom")
    adapter = write_provenance(tmp_path / "adapter", "adapter", parents=[reward, phantom])
    pipeline = write_provenance(
        tmp_path / "pipeline", "pipeline", parents=[describe_parent("adapter", tmp_path / "adapter")]
    )
    assert adapter["agreements"] == pipeline["agreements"] == ["Ward 7: stays here"]


def test_rows_are_known_by_source_and_case_without_any_file(phantom):
    """Rows of somebody else, with nothing beside them; the case ids are looked at and not written down."""

    def change(column, value):
        return phantom.remove_columns(column).add_column(column, [value] * len(phantom))

    by_source = describe_data("train_data", change("source", "BraTS-2021"))
    assert by_source["agreements"] == ["brats"] and by_source["name"] == "BraTS-2021"
    by_case = describe_data("train_data", change("case_id", "OAS1_0001 of OASIS"), "org/rows-of-ours")
    assert by_case["agreements"] == ["oasis"] and "OAS1" not in json.dumps(by_case)


def test_phantom_and_embedded_base_are_free(phantom, tmp_path):
    parents = [
        describe_data("train_data", phantom, "phantom"),
        describe_data("train_data", phantom),
        describe_parent("base_model", "pipelines/onereward-brats"),
        describe_parent("base_model", Path("pipelines/onereward-brats").resolve()),
    ]
    assert write_provenance(tmp_path / "adapter", "adapter", parents=parents)["agreements"] == []
