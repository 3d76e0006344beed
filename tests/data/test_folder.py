import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onereward.data.folder import load_folder, read_brisc
from onereward.data.schema import FEATURES, LABELS, split_by_case, validate_row


REAL = os.environ.get("ONEREWARD_DATA")
real_data = pytest.mark.skipif(not REAL, reason="ONEREWARD_DATA does not name the real sets")


def smooth(rng, height, width):
    noise = rng.random((max(2, height // 8), max(2, width // 8)))
    return np.asarray(
        Image.fromarray((noise * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    )


def box(height, width, top, bottom, left, right, value=255):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = value
    return mask


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Three landscape images, their masks and label maps, matched by stem."""
    rng = np.random.default_rng(0)
    for i in range(3):
        save(tmp_path / "images" / f"patient_{i}.png", smooth(rng, 96, 128))
        save(tmp_path / "masks" / f"patient_{i}.png", box(96, 128, 20, 60, 40, 80))
        save(tmp_path / "label_maps" / f"patient_{i}.png", box(96, 128, 24, 56, 44, 76, value=3))
    return tmp_path


def write_metadata(folder, records, kind="csv"):
    columns = list(dict.fromkeys(key for record in records for key in record))
    if kind == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(records)
    else:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def arrays(row):
    return {key: np.asarray(row[key]) for key in ("image", "mask", "label_map", "target") if row[key] is not None}


def test_subfolders_are_matched_by_stem_and_kept_as_they_are_without_a_size(folder):
    dataset = load_folder(folder, labels=LABELS)
    assert dataset.features == FEATURES and len(dataset) == 3
    for i, row in enumerate(dataset):
        validate_row(row, LABELS)
        got = arrays(row)
        original = np.asarray(Image.open(folder / "images" / f"patient_{i}.png"))
        np.testing.assert_array_equal(got["image"], original)
        np.testing.assert_array_equal(got["target"], original)
        np.testing.assert_array_equal(got["mask"], box(96, 128, 20, 60, 40, 80))
        np.testing.assert_array_equal(got["label_map"], box(96, 128, 24, 56, 44, 76, value=3))
        assert row["prompt"] == "Fill the marked region of this medical image with ET."


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_says_what_belongs_together(folder, kind):
    save(folder / "twin.png", np.full((96, 128), 7, np.uint8))
    first = {"file_name": "images/patient_0.png", "mask_file_name": "masks/patient_1.png"}
    write_metadata(
        folder,
        [
            first | {"prompt": "a lesion", "modality": "t1c", "case_id": "x", "task": "fill"},
            first | {"task": "remove", "case_id": "x", "target_file_name": "twin.png"},
            first | {"task": "remove", "file_name": "images/patient_2.png"},
        ],
        kind,
    )
    rows = list(load_folder(folder, size=64, modality="MRI"))
    assert [row["task"] for row in rows] == ["fill", "remove", "remove"]
    assert rows[0]["prompt"] == "a lesion" and rows[0]["modality"] == "t1c"
    assert rows[1]["prompt"] == "Remove the lesion from this MRI image and restore healthy tissue."
    assert rows[0]["case_id"] == rows[1]["case_id"] != rows[2]["case_id"]
    assert set(np.unique(np.asarray(rows[1]["target"])).tolist()) == {0, 7}, "the twin, letterboxed"
    assert rows[2]["target"] is None and rows[0]["target"] is not None
    for row in rows:
        validate_row(row)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_patient_under_another_name_is_refused_and_not_split_up(folder, kind):
    record = {"file_name": "images/patient_0.png", "mask_file_name": "masks/patient_0.png", "patient_id": "p"}
    write_metadata(folder, [record], kind)
    with pytest.raises(ValueError, match=r"unknown columns \['patient_id'\]. Rename .*'case_id'"):
        load_folder(folder, size=64)


def test_a_table_that_was_not_saved_as_it_should_is_refused_in_words(folder):
    head = "file_name,mask_file_name,prompt,case_id\nimages/patient_0.png,masks/patient_0.png,"
    for content, reason in (
        (f"{head}a bright, round lesion,p1\n".encode(), "row 1, has more fields than the header. Quote"),
        (f"{head}Gewebe für hell,p1\n".encode("latin-1"), "metadata.csv is not UTF-8"),
    ):
        (folder / "metadata.csv").write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            load_folder(folder, size=64)
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("[{}]\n")
    with pytest.raises(ValueError, match="one object a line"):
        load_folder(folder, size=64)


def test_no_file_name_reaches_the_rows(folder):
    dataset = load_folder(folder, size=64)
    buffer = io.BytesIO()
    dataset.to_parquet(buffer)
    assert b"patient_" not in buffer.getvalue()
    assert "patient_" not in str([{key: row[key] for key in ("prompt", "case_id", "source")} for row in dataset])


def test_case_hash_is_stable_and_salted_by_the_images(folder):
    ids = load_folder(folder)["case_id"][:]
    assert len(set(ids)) == 3 and load_folder(folder, size=64)["case_id"][:] == ids
    assert load_folder(folder, salt="secret")["case_id"][:] != ids
    save(folder / "images" / "patient_0.png", np.zeros((96, 128), np.uint8))
    assert not set(load_folder(folder)["case_id"][:]) & set(ids), "names alone do not give the hash"


def test_letterbox_keeps_all_of_image_mask_and_labels_aligned(tmp_path):
    # A white box on black, masked exactly, in every corner of a wide picture.
    for i, (top, left) in enumerate([(0, 0), (0, 96), (64, 0), (64, 96), (32, 48)]):
        shape = box(96, 128, top, top + 32, left, left + 32)
        save(tmp_path / "images" / f"{i}.png", shape)
        save(tmp_path / "masks" / f"{i}.png", shape)
        save(tmp_path / "label_maps" / f"{i}.png", shape // 255 * 2)
    for row in load_folder(tmp_path, size=64):
        got = arrays(row)
        assert got["image"].shape == (64, 64)
        mask = got["mask"] > 0
        assert mask.sum() == 16 * 16
        np.testing.assert_array_equal(got["label_map"], mask * 2)
        assert got["image"][mask].min() > 120 and got["image"][~mask].max() < 120
        assert not mask[:8].any() and not mask[-8:].any(), "the border above and below"


def test_small_lesions_survive_and_majority_decides(tmp_path):
    tiny = box(256, 256, 101, 102, 77, 78)
    save(tmp_path / "images" / "a.png", np.full((256, 256), 90, np.uint8))
    save(tmp_path / "masks" / "a.png", tiny)
    row = load_folder(tmp_path, size=32)[0]
    assert np.argwhere(np.asarray(row["mask"])).tolist() == [[101 // 8, 77 // 8]]

    save(tmp_path / "masks" / "a.png", box(256, 256, 64, 128, 64, 128))
    label_map = box(256, 256, 64, 128, 64, 128, value=1)
    label_map[64:69, 64:128] = 2  # five of eight lines of the first row of pixels
    label_map[126:128, 64:128] = 3  # two of eight of the last
    save(tmp_path / "label_maps" / "a.png", label_map)
    small = np.asarray(load_folder(tmp_path, size=32)[0]["label_map"])
    assert (small[8, 8:16] == 2).all() and (small[9:16, 8:16] == 1).all() and (small > 0).sum() == 64


def test_margin_and_mask_label(folder):
    (folder / "label_maps" / "patient_0.png").unlink()
    row = load_folder(folder, size=64, labels=LABELS, mask_label="ET", margin=3)[0]
    label_map, mask = np.asarray(row["label_map"]), np.asarray(row["mask"]) > 0
    assert (label_map == LABELS["ET"]).sum() == 20 * 20 and mask.sum() > 26 * 20 and mask[label_map > 0].all()
    assert row["prompt"].endswith("with ET.")
    removed = load_folder(folder, size=64, task="remove", labels=LABELS, mask_label="ET")[0]
    assert not np.asarray(removed["label_map"]).any() and removed["target"] is None
    with pytest.raises(ValueError, match="`mask_label` is 'lesion'"):
        load_folder(folder, labels=LABELS, mask_label="lesion")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # The eight orientations of the EXIF standard, undone by hand.
    upright = box(24, 32, 2, 8, 4, 20, value=200)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "images" / "a.jpg", np.ascontiguousarray(stored), exif=exif, quality=100)
    save(tmp_path / "masks" / "a.png", (upright > 0).astype(np.uint8) * 255)
    row = load_folder(tmp_path)[0]
    assert row["image"].size == (32, 24) and not row["image"].getexif()
    assert np.abs(np.asarray(row["image"]).astype(int) - upright).max() < 12


def test_16_bit_images_are_scaled_robustly(tmp_path):
    ramp = np.tile(np.linspace(1000, 3000, 200).astype(np.uint16), (200, 1))
    ramp[0, 0] = 65535  # one hot pixel must not darken the rest
    save(tmp_path / "images" / "a.png", ramp)
    save(tmp_path / "masks" / "a.png", box(200, 200, 5, 10, 5, 10))
    image = np.asarray(load_folder(tmp_path)[0]["image"]).astype(int)
    assert image.min() == 0 and image.max() == 255 and image[0, 0] == 255
    expected = np.clip((ramp.astype(float) - 1010) / 1980, 0, 1) * 255
    assert np.abs(image - expected)[1:].max() <= 2


def test_colour_is_kept_or_turned_grey(tmp_path):
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[..., 0] = 100
    save(tmp_path / "images" / "a.png", colour)
    save(tmp_path / "masks" / "a.png", np.repeat(box(16, 16, 2, 5, 2, 5)[..., None], 3, -1))  # grey stored as colour
    assert np.asarray(load_folder(tmp_path, mode="RGB")[0]["image"])[3, 3].tolist() == [100, 0, 0]
    assert abs(int(np.asarray(load_folder(tmp_path)[0]["image"])[3, 3]) - 29.9) <= 1
    with pytest.raises(ValueError, match="`mode` is 'RGBA'"):
        load_folder(tmp_path, mode="RGBA")


def test_palette_label_maps_give_their_indices(folder):
    label_map = Image.fromarray(box(96, 128, 24, 56, 44, 76, value=2)).convert("P")
    label_map.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    label_map.save(folder / "label_maps" / "patient_0.png")
    got = np.asarray(load_folder(folder, labels=LABELS)[0]["label_map"])
    np.testing.assert_array_equal(got, box(96, 128, 24, 56, 44, 76, value=2))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: save(f / "masks/patient_1.png", np.zeros((96, 128), np.uint8)), "masks/patient_1.png` is empty"),
        (lambda f: save(f / "masks/patient_1.png", box(96, 96, 1, 9, 1, 9)), "is 96x96 but the image is 96x128"),
        (lambda f: save(f / "masks/patient_1.png", box(96, 128, 1, 9, 1, 9) // 2), "not binary.*127"),
        (lambda f: (f / "masks/patient_1.png").unlink(), "no partner.*patient_1"),
        (lambda f: (f / "images/patient_1.png").write_bytes(b"text"), "patient_1.png cannot be read as a picture"),
        (
            lambda f: (f / "images/patient_1.png").write_bytes((f / "images/patient_1.png").read_bytes()[:200]),
            "patient_1.png cannot be read as a picture",
        ),
        (lambda f: save(f / "images/patient_1.jpg", box(96, 128, 1, 9, 1, 9)), "two pictures of one stem"),
        (
            lambda f: save(f / "label_maps/patient_1.png", box(96, 128, 24, 56, 44, 76, value=9)),
            r"label_maps/patient_1.png` holds the unknown label\(s\) \[9\]",
        ),
        (
            lambda f: save(f / "label_maps/patient_1.png", box(96, 128, 0, 5, 0, 5, value=1)),
            r"25 labelled pixel\(s\) outside the mask",
        ),
        (
            lambda f: save(
                f / "label_maps/patient_1.png", np.random.default_rng(0).integers(0, 9, (96, 128, 3), np.uint8)
            ),
            "colour picture; expected one channel",
        ),
        (lambda f: save(f / "targets/patient_1.png", box(96, 96, 1, 9, 1, 9)), r"targets/patient_1.png is \(96, 96\)"),
        (
            lambda f: (
                Image.fromarray(np.full((96, 128), np.nan, np.float32)).save(f / "images/patient_1.tiff")
                or (f / "images/patient_1.png").unlink()
            ),
            "patient_1.tiff` holds NaN",
        ),
    ],
)
def test_broken_folders_are_refused_by_name(folder, break_it, message):
    load_folder(folder, size=64, labels=LABELS)
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        load_folder(folder, size=64, labels=LABELS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"file_name": "images/patient_9.png"}, "patient_9.png does not exist; correct its name"),
        ({"file_name": ""}, r"Row 1.*lacks \['file_name'\]"),
        ({"mask_file_name": "../elsewhere.png"}, "`mask_file_name` is '../elsewhere.png'; expected a file inside"),
        ({"mask_file_name": "/etc/hostname"}, "expected a file inside"),
        ({"task": "erase"}, "`task` in row 1 is 'erase'.*extend"),
        ({"prompt": 5}, "`prompt` in row 1.*is 5; expected text"),
    ],
)
def test_wrong_metadata_is_refused(folder, record, message):
    write_metadata(
        folder, [{"file_name": "images/patient_0.png", "mask_file_name": "masks/patient_0.png"} | record], "jsonl"
    )
    with pytest.raises(ValueError, match=message):
        load_folder(folder)


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither metadata.csv, metadata.jsonl nor pictures in images/"):
        load_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match="line 1, is not JSON"):
        load_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,mask_file_name\n")
    with pytest.raises(ValueError, match="lists no images"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="index.csv does not exist"):
        read_brisc(tmp_path)


@real_data
def test_real_brain_slices():
    path = Path(REAL) / "brain_brisc2025"
    records = read_brisc(path, tier=None)
    dataset = load_folder(path, size=64, labels=LABELS, mask_label="ET", metadata=records)
    with (path / "index.csv").open() as file:
        index = {row["image"]: row for row in csv.DictReader(file)}
    assert len(dataset) == len(records) == sum(bool(row["mask"]) for row in index.values())
    for row, record in zip(dataset, records, strict=True):
        validate_row(row, LABELS)
        facts = index[record["file_name"]]
        share = float(facts["tumour_px"]) / max(int(facts["w"]), int(facts["h"])) ** 2 * 64**2
        masked = (np.asarray(row["mask"]) > 0).sum()
        assert abs(masked - share) < max(4, 0.2 * share), "the masked area is that of the original"
        assert "brain MRI" in row["prompt"] and "brisc" not in str(row)
    parts = split_by_case(dataset, {"train": 0.75, "test": 0.25})
    assert not set(parts["train"]["case_id"]) & set(parts["test"]["case_id"])


@real_data
def test_real_skin_photos_in_colour():
    dataset = load_folder(Path(REAL) / "skin_isic2017", size=64, mode="RGB", modality="dermoscopy")
    darker = []
    for row in dataset:
        validate_row(row)
        image, mask = np.asarray(row["image"]).mean(-1), np.asarray(row["mask"]) > 0
        assert row["image"].mode == "RGB" and row["prompt"] == "Fill the marked region of this dermoscopy image."
        darker.append(image[mask].mean() < image[~mask & (image > 0)].mean())
    assert np.mean(darker) > 0.8, "lesions are darker than the skin around: masks lie on them"
