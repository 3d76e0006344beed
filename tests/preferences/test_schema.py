import io
import os
from itertools import combinations

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from onereward.preferences import VOTE_FEATURES, load_votes, pairs_for_training, save_votes, validate_votes
from onereward.preferences.schema import (
    VOTE_DEFAULTS,
    best_worst_votes,
    encode_picture,
    encoded_rows,
    phi_warning,
    rater_id,
    read_votes,
    to_png,
    upgrade_votes,
)


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
        ({"schema_version": 7}, "`schema_version` is 7; this version of onereward reads up to 2"),
        ({"image_1": None}, "`image_1` is missing"),
        ({"image_1": {"bytes": b"no picture", "path": None}}, "`image_1` is no readable picture"),
        ({"image_1": to_png(np.zeros((32, 64), np.uint8))}, "differ in mode or size"),
        ({"image_1": to_png(np.zeros((64, 64, 4), np.uint8))}, "`image_1` has mode 'RGBA'"),
        ({"mask": EMPTY}, "`mask` is empty"),
        ({"mask": to_png(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))}, "`mask` is not binary"),
        ({"label_map": GREY}, "outside the mask"),
        ({"kind": "ranking"}, "`kind` is 'ranking'; expected one of"),
        ({"kind": None}, "`kind` is None"),
        ({"both_unacceptable": None}, "`both_unacceptable` is empty"),
        ({"left": 2}, "`left` is 2; expected 0 or 1"),
        ({"left": None}, "`left` is None"),
        ({"comment": "x" * 501}, "`comment` has 501 characters; expected at most 500"),
        ({"seconds": -1.0}, "`seconds` is -1.0"),
        ({"seconds": float("nan")}, "`seconds` is nan"),
        ({"window_center": 40.0}, "expected both, width above 0, or neither"),
        ({"window_center": 40.0, "window_width": 0.0}, "`window_center` and `window_width` are 40.0 and 0.0"),
        ({"window_center": float("inf"), "window_width": 1.0}, "`window_center` and `window_width` are inf and 1.0"),
        ({"rating": 3.0}, "a pair has a `rating`"),
        ({"schema_version": None}, "`schema_version` is None; expected 2"),
        ({"schema_version": 1}, "`schema_version` is 1; expected 2"),
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


RATING = {"kind": "rating", "rating": 4.0, "rating_min": 1.0, "rating_max": 5.0, "label_0": None, "label_1": None}
RATING |= {"image_1": None, "left": -1}


def test_a_rating_is_a_vote_on_one_image(votes):
    rated = changed(votes, 6, **RATING)
    assert validate_votes(rated) == (rated, [])
    for value in (1.0, 5.0):
        validate_votes(changed(votes, 6, **RATING | {"rating": value}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rating": 5.5}, "`rating_min`, `rating` and `rating_max` are [1.0, 5.5, 5.0]"),
        ({"rating": None}, "expected three numbers in this order"),
        ({"rating": float("nan")}, "expected three numbers in this order"),
        ({"rating_max": None}, "expected three numbers in this order"),
        ({"rating": 1.0, "rating_max": 1.0}, "`rating_min` and `rating_max` are both 1.0"),
        ({"label_0": 1.0, "label_1": 0.0}, "a rating has an `image_1`, `label_0` or `label_1`"),
        ({"image_1": to_png(np.zeros((64, 64), np.uint8))}, "a rating has an `image_1`"),
        ({"both_unacceptable": True}, "a rating has `both_unacceptable` or `left`"),
        ({"image_0": None}, "`image_0` is missing"),
        ({"mask": None}, "`mask` is missing"),
    ],
)
def test_a_bad_rating_is_named_with_the_reason(votes, values, reason):
    with pytest.raises(ValueError, match=r"^Vote in row 6: ") as error:
        validate_votes(changed(votes, 6, **RATING | values))
    assert reason in str(error.value)


def test_ratings_are_no_pairs(votes):
    mixed = datasets.concatenate_datasets([votes, changed(votes, 6, **RATING).select([6])])
    assert pairs_for_training(mixed).data.table.equals(pairs_for_training(votes).data.table)


def test_the_whole_vote_survives_the_file(votes, tmp_path):
    rich = {"both_unacceptable": True, "comment": "beide unscharf", "left": 1, "seconds": 0.1 + 0.2, "set_id": "s"}
    rich |= {"window_center": -600.0, "window_width": 1500.0}
    save_votes(changed(votes, 6, **rich), tmp_path / "votes.parquet")
    assert rich.items() <= load_votes(tmp_path / "votes.parquet")[6].items()


# ---------------------------------------------------------------------------------------------- bad rows beside good


def test_good_rows_are_kept_only_if_asked(votes):
    bad = [{"criterion": "beauty"}, {"image_1": None}, {"label_0": 1.5}, {"schema_version": 3}]
    rows = list(encoded_rows(votes.select(range(20))))
    for index, values in zip((3, 4, 11, 15), bad, strict=True):
        rows[index] |= values
    rows[18]["vote_id"] = rows[2]["vote_id"]
    mixed = datasets.Dataset.from_list(rows, features=VOTE_FEATURES)
    with pytest.raises(ValueError, match="^Vote in row 3: `criterion` is 'beauty'"):
        validate_votes(mixed)
    good, refused = validate_votes(mixed, keep_good=True)
    assert [row for row, _ in refused] == [3, 4, 11, 15, 18]
    expected = ("`criterion` is 'beauty'", "`image_1` is missing", "are 1.5", "`schema_version` is 3", "of row 2 too")
    for (_, reason), part in zip(refused, expected, strict=True):
        assert part in reason
    kept = [row for index, row in enumerate(rows) if index not in (3, 4, 11, 15, 18)]
    assert list(encoded_rows(good)) == kept
    assert validate_votes(good) == (good, [])


def test_every_row_with_the_same_bad_picture_is_found(votes):
    rows = list(encoded_rows(votes.select(range(6))))
    for row in rows[1:4]:
        row["mask"] = EMPTY
    mixed = datasets.Dataset.from_list(rows, features=VOTE_FEATURES)
    assert [row for row, _ in validate_votes(mixed, keep_good=True)[1]] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------ old versions


# the columns of version 1, in their order
VERSION_1 = (
    "vote_id pair_id prompt task image mask label_map image_0 image_1 label_0 label_1 criterion rater rater_role "
)
VERSION_1 = (VERSION_1 + "model_0 model_1 seed_0 seed_1 case_id created_at schema_version").split()


@pytest.fixture
def old_file(votes, tmp_path):
    rows = [{column: row[column] for column in VERSION_1} for row in encoded_rows(votes.select(range(12)))]
    features = datasets.Features({column: VOTE_FEATURES[column] for column in VERSION_1})
    old = datasets.Dataset.from_list([{**row, "schema_version": 1} for row in rows], features=features)
    pq.write_table(old.data.table, tmp_path / "old.parquet")
    return tmp_path / "old.parquet"


def test_a_file_of_version_1_is_upgraded(votes, old_file):
    upgraded = load_votes(old_file)
    expected = [{**row, **VOTE_DEFAULTS} for row in encoded_rows(votes.select(range(12)))]
    assert upgraded.features == VOTE_FEATURES and list(encoded_rows(upgraded)) == expected


def test_the_upgrade_is_pure_and_mends_nothing_else(votes, old_file):
    old = datasets.Dataset(pq.read_table(old_file))
    before = old.data.table
    rows = list(old.cast_column("image_0", datasets.Image(decode=False)))
    rows[5]["schema_version"], rows[7]["criterion"] = 7, "beauty"
    spoilt = datasets.Dataset.from_list(rows, features=old.features)
    _, bad = validate_votes(upgrade_votes(spoilt), keep_good=True)
    assert [row for row, _ in bad] == [5, 7] and "`schema_version` is 7" in bad[0][1]
    assert old.data.table.equals(before) and old.column_names == VERSION_1
    assert upgrade_votes(votes) is votes
    with pytest.raises(ValueError, match="first need `upgrade_votes`"):
        validate_votes(old)


def test_a_file_of_a_newer_version_is_refused(votes, tmp_path):
    newer = votes.remove_columns(["schema_version", "left"]).add_column("schema_version", [3] * len(votes))
    pq.write_table(newer.data.table, tmp_path / "newer.parquet")
    for read in (read_votes, load_votes):
        with pytest.raises(
            ValueError, match="`schema_version` is 3; this version of onereward reads up to 2. Upgrade"
        ):
            read(tmp_path / "newer.parquet")


# ---------------------------------------------------------------------------------------------- best and worst of N


def best_worst(images, best, worst, **columns):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    shared = {"set_id": "set-1", "criterion": "realism", "rater": "r", "rater_role": "radiologist", "mask": mask}
    shared |= {"image": np.zeros((8, 8), np.uint8), "task": "fill", "case_id": "c", "created_at": "2025-01-01"}
    return best_worst_votes(images, best, worst, **shared | columns)


def grey_images(number):
    return [np.full((8, 8), 10 * i + 5, np.uint8) for i in range(number)]


@pytest.mark.parametrize("number", [2, 3, 4, 6])
def test_best_and_worst_imply_what_every_ranking_that_agrees_with_them_says(number):
    images = grey_images(number)
    for best, worst in [(0, number - 1), (number - 1, 0), (1, 0)]:
        votes = best_worst(images, best, worst)
        validate_votes(datasets.Dataset.from_list(votes, features=VOTE_FEATURES))
        found = {}
        for vote in votes:
            first, second = (
                int(np.asarray(Image.open(io.BytesIO(vote[side]["bytes"])))[0, 0]) // 10
                for side in ("image_0", "image_1")
            )
            found[first, second] = vote["label_0"]
        assert len(found) == len(votes) == 2 * number - 3
        # by brute force over the orders with this best and this worst one: the pairs they all agree on
        middle = [i for i in range(number) if i not in (best, worst)]
        orders = [[best, *rest, worst] for rest in (middle, middle[::-1])]
        agreed = {}
        for first, second in combinations(range(number), 2):
            said = {order.index(first) < order.index(second) for order in orders}
            if len(said) == 1 and len({first, second} & {best, worst}):
                agreed[first, second] = float(said.pop())
        assert found == agreed


def test_votes_of_a_set_are_told_apart_and_belong_together():
    images = grey_images(4)
    votes = best_worst(images, 1, 3, models=["a", "b", "c", "d"], seeds=[1, 2, 3, 4], seconds=12.0)
    assert {vote["set_id"] for vote in votes} == {"set-1"} and {vote["seconds"] for vote in votes} == {12.0}
    assert [(vote["model_0"], vote["seed_1"]) for vote in votes] == [("a", 2), ("a", 4), ("b", 3), ("b", 4), ("c", 4)]
    assert best_worst(images, 1, 3, models=["a", "b", "c", "d"], seeds=[1, 2, 3, 4], seconds=12.0) == votes
    # another rater, criterion or set: other votes on the same pairs
    ids = {vote["vote_id"] for vote in votes}
    for change in ({"rater": "s"}, {"criterion": "quality"}, {"set_id": "set-2"}):
        others = best_worst(images, 0, 2, **change)
        assert ids.isdisjoint(vote["vote_id"] for vote in others)
        assert {vote["pair_id"] for vote in votes} & {vote["pair_id"] for vote in others}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"best": 1, "worst": 1}, "expected two different numbers from 0 to 3"),
        ({"best": 4, "worst": 1}, "`best` and `worst` are 4 and 1 of 4"),
        ({"set_id": ""}, r"lack \['set_id'\]"),
        ({"mask": None}, r"lack \['mask'\]"),
        ({"label_0": 1.0}, r"must not hold \['label_0'\]"),
        ({"colour": "red"}, r"must not hold \['colour'\]"),
        ({"models": ["a"]}, "`models` has 1 entries for 4 images"),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        best_worst(grey_images(4), **{"best": 0, "worst": 1} | arguments)


# ------------------------------------------------------------------------------------------------------- who and what


def test_a_pseudonym_is_a_keyed_hash():
    # RFC 4231, test case 1
    assert (
        rater_id("Hi There", b"\x0b" * 20) == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"[:16]
    )
    salt, other = "0123456789abcdef", "0123456789abcdeg"
    assert rater_id("Zo\u00eb", salt) == rater_id(" Zoe\u0308 ", salt) == rater_id("Zo\u00eb", salt.encode())
    assert len({rater_id("Zoe", salt), rater_id("Zoe", other), rater_id("Zo\u00eb", salt)}) == 3
    with pytest.raises(ValueError, match="`salt` has 5 bytes; expected at least 16"):
        rater_id("Zoe", "short")
    with pytest.raises(ValueError, match="`name` is empty"):
        rater_id("  ", salt)


@pytest.mark.parametrize(
    ("comment", "kind"),
    [
        ("as in the scan of 12/03/2019", "a date"),
        ("2019-03-12, same patient", "a date"),
        ("seen on 12 March 2019", "a date"),
        ("March 12th, 2019", "a date"),
        ("3.4.19 war es besser", "a date"),
        ("ask jane.doe@clinic.example", "an e-mail address"),
        ("call +49 30 901820", "a telephone number"),
        ("call (555) 123-4567", "a telephone number"),
        ("call 555.123.4567", "a telephone number"),
        ("appelez 06 12 34 56 78", "a telephone number"),
        ("MRN on the film", "a patient's identifier"),
        ("patient id burnt in", "a patient's identifier"),
        ("case 20731904 again", "a long number"),
        ("Mr. Smith has a shunt", "a name"),
        ("Mrs O'Brien, known case", "a name"),
        ("Dr. J. Doe would disagree", "a name"),
        ("Frau \u00d6zt\u00fcrk", "a name"),
    ],
)
def test_what_looks_like_personal_data_is_warned_of(comment, kind):
    warning = phi_warning(comment)
    assert kind in warning
    # the warning may be logged: it repeats nothing
    assert not any(word in warning for word in comment.split() if any(c.isdigit() or c.isupper() for c in word))


@pytest.mark.parametrize(
    "comment",
    [
        None,
        "",
        "T2 hyperintense rim at 3 o'clock, 12 mm, seam visible",
        "window 40/400, slice 128 of 155",
        "3.5 x 2.1 cm, grade 4, 1.5 T",
        "labels 1/2/3 mixed up",
        "60-70 % of the enhancing part is missing; PSNR 31.25",
        "the newborn's ventricles look wrong",
        "dr a sharper border",
        "both unacceptable, may be noise",
    ],
)
def test_plain_comments_are_not_warned_of(comment):
    assert phi_warning(comment) is None


def test_a_comment_is_warned_of_and_not_refused(votes):
    comment = "Mr. Smith, born 12/03/1950"
    assert phi_warning(comment) is not None
    validate_votes(changed(votes, 6, comment=comment))


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


def test_pictures_are_kept_without_what_a_file_tells_beside_its_pixels():
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    note = PngInfo()
    note.add_text("PatientName", "Doe^Jane")
    named, photo, bare = io.BytesIO(), io.BytesIO(), io.BytesIO()
    picture.save(named, "PNG", pnginfo=note)
    exif = Image.Exif()
    exif[0x010E] = "Doe^Jane"
    picture.save(photo, "JPEG", exif=exif)
    picture.save(bare, "PNG")
    for file in (named, photo):
        kept = encode_picture({"bytes": file.getvalue()})["bytes"]
        assert b"Doe" in file.getvalue() and b"Doe" not in kept
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept))), np.asarray(Image.open(file)))
    assert encode_picture(bare.getvalue())["bytes"] == bare.getvalue()
    assert encode_picture(b"no picture")["bytes"] == b"no picture"


@pytest.mark.parametrize("mode", ["1", "P", "L"])
def test_masks_and_label_maps_too_are_kept_as_pixels_alone(mode, votes, tmp_path):
    mask = Image.new(mode, votes[0]["mask"].size, 0)
    mask.paste(1, (2, 2, 5, 5))
    if mode == "P":
        mask.putpalette([0, 0, 0, 255, 80, 50])
    note = PngInfo()
    note.add_text("PatientName", "Doe^Jane")
    mask.save(tmp_path / "Doe^Jane.png", pnginfo=note)
    kept = encode_picture({"path": str(tmp_path / "Doe^Jane.png")})["bytes"]
    assert b"Jane" not in kept and encode_picture(kept)["bytes"] == kept
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept))), np.asarray(mask))

    row = {**next(encoded_rows(votes)), "label_map": None, "mask": {"bytes": None, "path": f"{tmp_path}/Doe^Jane.png"}}
    save_votes(datasets.Dataset.from_list([row], features=VOTE_FEATURES), tmp_path / "votes.parquet")
    assert next(encoded_rows(load_votes(tmp_path / "votes.parquet")))["mask"] == {"bytes": kept, "path": None}


def test_a_file_of_no_votes_does_not_keep_others_from_being_read(votes, tmp_path):
    save_votes(votes.select([]), tmp_path / "none.parquet")
    save_votes(votes, tmp_path / "some.parquet")
    files = [str(tmp_path / name) for name in ("none.parquet", "some.parquet")]
    there = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")
    assert there["vote_id"][:] == votes["vote_id"][:]


def test_votes_on_the_hub_and_of_any_criteria(hub, votes, tmp_path):
    save_votes(votes, tmp_path / "votes.parquet")
    api = HfApi()
    api.create_repo("org/schema-votes", repo_type="dataset")
    path = "data/validation-00000-of-00001.parquet"
    commits = []
    for content in (votes, votes.select([0])):
        save_votes(content, tmp_path / "votes.parquet")
        options = {"path_in_repo": path, "repo_id": "org/schema-votes", "repo_type": "dataset"}
        commits.append(api.upload_file(path_or_fileobj=(tmp_path / "votes.parquet").read_bytes(), **options).oid)
    first = load_votes("org/schema-votes", criteria=None, split="validation", revision=commits[0])
    assert first["vote_id"] == votes["vote_id"]
    assert np.array_equal(np.asarray(first[0]["image_0"]), np.asarray(votes[0]["image_0"]))
    assert len(load_votes("org/schema-votes", criteria=None, split="validation")) == 1
    with pytest.raises(ValueError, match="`criterion` is .* expected one of \\('beauty',\\)"):
        load_votes("org/schema-votes", criteria=("beauty",), split="validation")
