import os

import datasets
import numpy as np
import pytest
from PIL import Image

from onereward.preferences import VOTE_FEATURES, load_votes, save_votes, validate_votes
from onereward.preferences.schema import to_png


@pytest.fixture
def votes(simulated):
    return simulated[0]


def changed(votes, row, **values):
    """The first ten votes with one row changed, as the file of someone else may hold it."""
    plain = votes.select(range(10))
    for column in ("image", "mask", "label_map", "image_0", "image_1"):
        plain = plain.cast_column(column, datasets.Image(decode=False))
    rows = list(plain)
    rows[row] = {**rows[row], **values}
    return datasets.Dataset.from_list(rows, features=VOTE_FEATURES)


def test_votes_survive_the_file_bit_for_bit(votes, tmp_path):
    path = tmp_path / "runs" / "votes.parquet"
    save_votes(votes, path)
    loaded = load_votes(path)
    assert loaded.features == VOTE_FEATURES
    assert loaded.data.table.equals(votes.data.table)
    assert os.listdir(path.parent) == ["votes.parquet"]


def test_the_file_is_read_by_datasets_alone(votes, tmp_path):
    save_votes(votes, tmp_path / "votes.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "votes.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded.features == VOTE_FEATURES
    np.testing.assert_array_equal(np.asarray(loaded[3]["image_0"]), np.asarray(votes[3]["image_0"]))


def test_pictures_that_votes_share_are_stored_once(votes, tmp_path):
    save_votes(votes, tmp_path / "votes.parquet")
    save_votes(votes.select(range(0, len(votes), 9)), tmp_path / "one_vote_a_pair.parquet")
    sizes = [(tmp_path / name).stat().st_size for name in ("votes.parquet", "one_vote_a_pair.parquet")]
    assert sizes[0] < 1.5 * sizes[1]


def test_pictures_on_disk_are_embedded(votes, tmp_path):
    votes[0]["image_0"].save(tmp_path / "left.png")
    outside = changed(votes, 0, image_0={"bytes": None, "path": str(tmp_path / "left.png")})
    save_votes(outside, tmp_path / "votes.parquet")
    (tmp_path / "left.png").unlink()
    loaded = load_votes(tmp_path / "votes.parquet")
    np.testing.assert_array_equal(np.asarray(loaded[0]["image_0"]), np.asarray(votes[0]["image_0"]))


def test_a_bad_vote_leaves_the_old_file_alone(votes, tmp_path):
    path = tmp_path / "votes.parquet"
    save_votes(votes.select(range(10)), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="row 4"):
        save_votes(changed(votes, 4, label_0=0.7), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["votes.parquet"]


EMPTY, GREY = (to_png(np.full((64, 64), value, np.uint8)) for value in (0, 128))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"criterion": "beauty"}, "`criterion` is 'beauty'; expected one of"),
        ({"label_0": 1.5}, "`label_0` and `label_1` are 1.5"),
        ({"label_0": 1.0, "label_1": 1.0}, "expected 1 and 0"),
        ({"label_0": None}, "`label_0` and `label_1` are None"),
        ({"label_0": float("nan")}, "`label_0` and `label_1` are nan"),
        ({"rater": ""}, "`rater` is empty"),
        ({"case_id": None}, "`case_id` is empty"),
        ({"task": "repair"}, "`task` is 'repair'; expected one of"),
        ({"schema_version": 7}, "`schema_version` is 7; this version of onereward reads 1"),
        ({"image_1": None}, "`image_1` is missing"),
        ({"image_1": {"bytes": b"no picture", "path": None}}, "`image_1` is no readable picture"),
        ({"image_1": to_png(np.zeros((32, 64), np.uint8))}, "differ in mode or size"),
        ({"image_1": to_png(np.zeros((64, 64, 4), np.uint8))}, "`image_1` has mode 'RGBA'"),
        ({"mask": EMPTY}, "`mask` is empty"),
        ({"mask": to_png(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))}, "`mask` is not binary"),
        ({"label_map": GREY}, "outside the mask"),
    ],
)
def test_a_bad_row_is_named_with_the_reason(votes, values, reason):
    with pytest.raises(ValueError, match=r"^Vote in row 6: ") as error:
        validate_votes(changed(votes, 6, **values))
    assert reason in str(error.value)


def test_a_vote_counts_once(votes):
    with pytest.raises(ValueError, match="row 6: `vote_id` .* is that of row 2 too"):
        validate_votes(changed(votes, 6, vote_id=votes[2]["vote_id"]))


def test_a_vote_without_a_label_map_is_a_vote(votes):
    validate_votes(changed(votes, 6, label_map=None))


def test_missing_and_wrong_columns_are_named(votes):
    with pytest.raises(ValueError, match=r"lack the column\(s\) \['rater', 'seed_1'\]"):
        validate_votes(votes.remove_columns(["rater", "seed_1"]))
    with pytest.raises(ValueError, match="The column `seed_0` is .*string.* but .*int64.* is wanted"):
        validate_votes(votes.cast_column("seed_0", datasets.Value("string")))


def test_a_file_that_is_no_parquet_is_a_value_error(tmp_path):
    (tmp_path / "votes.parquet").write_text("vote_id,rater\n1,me\n")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        load_votes(tmp_path / "votes.parquet")
    with pytest.raises(FileNotFoundError):
        load_votes(tmp_path / "none.parquet")


def test_pictures_lose_their_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x013B] = "Jane Doe, MRN 1234"  # Artist
    Image.new("L", (8, 8), 7).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as photo:
        assert b"Jane Doe" in photo.info["exif"]
        assert b"Jane Doe" not in to_png(photo)["bytes"]
