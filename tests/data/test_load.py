"""What `load_rows` promises: the same rows by any name, and clear refusals."""

import datasets
import pytest

from onereward.data.load import load_rows
from onereward.data.phantom import load_phantom


@pytest.fixture(scope="module")
def rows():
    return load_phantom(1, contrasts=("t1c",), seed=2)


def test_phantom_by_name(rows):
    loaded = load_rows("phantom", "train", num_cases=1, contrasts=("t1c",), seed=2)
    assert loaded.to_dict() == rows.to_dict()


def test_folder_and_parquet_hold_the_same_rows(rows, tmp_path):
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "folder")
    rows.to_parquet(tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "folder"), "test")["prompt"] == rows["prompt"]
    from_parquet = load_rows(str(tmp_path / "rows.parquet"), "train")
    assert from_parquet[0]["image"].tobytes() == rows[0]["image"].tobytes()


def test_missing_split_and_missing_column_are_named(rows, tmp_path):
    datasets.DatasetDict(train=rows.remove_columns("target")).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        load_rows(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"lacks the columns \['target'\]"):
        load_rows(str(tmp_path), "train")
