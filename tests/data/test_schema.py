import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from onereward.data.schema import FEATURES, LABELS, rows_to_tensors, split_by_case, validate_row


def picture(value, mode="L", size=(10, 8)):
    return Image.new(mode, size, value)


def make_row(**changes):
    mask = np.zeros((8, 10), np.uint8)
    mask[2:5, 3:7] = 255
    row = {
        "image": picture(51),
        "mask": Image.fromarray(mask),
        "label_map": Image.fromarray((mask > 0).astype(np.uint8) * 3),
        "target": picture(102),
        "prompt": "a tumour",
        "task": "fill",
        "modality": "t1c",
        "case_id": "a",
        "source": "test",
    }
    return row | changes


def test_rows_survive_the_features_and_pass_validation():
    dataset = datasets.Dataset.from_list([make_row(), make_row(target=None, task="remove")], features=FEATURES)
    for row in dataset:
        validate_row(row, LABELS)
    assert dataset[1]["target"] is None
    np.testing.assert_array_equal(np.asarray(dataset[0]["label_map"]), np.asarray(make_row()["label_map"]))


def test_tensors_have_the_promised_shapes_ranges_and_values():
    batch = rows_to_tensors([make_row(), make_row(prompt="another", task="extend")])
    assert batch["images"].shape == (2, 1, 8, 10) and batch["images"].dtype == torch.float32
    torch.testing.assert_close(batch["images"], torch.full((2, 1, 8, 10), 0.2))
    torch.testing.assert_close(batch["targets"], torch.full((2, 1, 8, 10), 0.4))
    assert batch["masks"].shape == (2, 1, 8, 10) and batch["masks"].sum() == 2 * 12
    assert batch["masks"].unique().tolist() == [0, 1]
    assert batch["label_maps"].dtype == torch.long and batch["label_maps"].unique().tolist() == [0, 3]
    assert batch["masks"][0, 0, 2, 3] == 1 and batch["masks"][0, 0, 1, 3] == 0
    assert batch["prompts"] == ["a tumour", "another"] and batch["tasks"] == ["fill", "extend"]


def test_colour_comes_channels_first_and_a_missing_target_leaves_none():
    colour = picture((255, 0, 51), "RGB")
    batch = rows_to_tensors([make_row(image=colour, target=None)])
    torch.testing.assert_close(batch["images"][0, :, 4, 4], torch.tensor([1, 0, 0.2]))
    assert batch["targets"] is None


def test_rows_of_different_kind_are_refused():
    with pytest.raises(ValueError, match="one size and mode"):
        rows_to_tensors([make_row(), make_row(image=picture(0, size=(8, 8)))])
    with pytest.raises(ValueError, match="at least one row"):
        rows_to_tensors([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "`prompt` is 3 of type int; expected text"),
        ({"prompt": None}, "`prompt` is None"),
        ({"task": "erase"}, "`task` is 'erase'.*fill.*remove"),
        ({"image": None}, "`image` has mode 'NoneType'"),
        ({"image": picture(0, "RGBA")}, "`image` has mode 'RGBA'.*convert"),
        ({"target": picture(0, size=(8, 8))}, r"`target` is L \(8, 8\) but `image` is L \(10, 8\)"),
        ({"mask": picture(0)}, "`mask` is empty"),
        ({"mask": picture(100)}, "`mask` is not binary"),
        ({"mask": picture(255, size=(8, 8))}, "`mask` is 8x8 but the image is 8x10"),
        ({"label_map": picture(3)}, "68 labelled pixel.*outside the mask"),
        ({"label_map": Image.fromarray(np.asarray(make_row()["mask"]) // 255 * 9)}, "unknown label.*9"),
    ],
)
def test_validation_names_the_column_and_the_remedy(changes, message):
    validate_row(make_row(), LABELS)
    with pytest.raises(ValueError, match=message):
        validate_row(make_row(**changes), LABELS)


def test_validation_names_missing_columns():
    row = make_row()
    del row["case_id"]
    with pytest.raises(ValueError, match="lacks.*case_id"):
        validate_row(row)


def test_split_keeps_cases_whole_and_loses_no_row():
    cases = [f"case-{i % 20}" for i in range(100)]
    dataset = datasets.Dataset.from_dict({"case_id": cases, "row": list(range(100))})
    parts = split_by_case(dataset, {"train": 0.7, "validation": 0.1, "test": 0.2}, seed=1)
    sets = {name: set(part["case_id"]) for name, part in parts.items()}
    assert {name: len(s) for name, s in sets.items()} == {"train": 14, "validation": 2, "test": 4}
    assert set.union(*sets.values()) == set(cases)
    assert sum(len(part) for part in parts.values()) == 100
    # The order of the rows does not matter, the seed does.
    turned = split_by_case(dataset.select(range(99, -1, -1)), {"train": 0.7, "validation": 0.1, "test": 0.2}, seed=1)
    assert set(turned["test"]["case_id"]) == sets["test"]
    other = split_by_case(dataset, {"train": 0.7, "validation": 0.1, "test": 0.2}, seed=2)
    assert set(other["test"]["case_id"]) != sets["test"]


def test_split_refuses_what_it_cannot_do():
    dataset = datasets.Dataset.from_dict({"case_id": ["a", "a", "b"]})
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_case(dataset, {"train": 0.8, "test": 0.1})
    with pytest.raises(ValueError, match="too few"):
        split_by_case(dataset, {"train": 0.8, "validation": 0.1, "test": 0.1})
