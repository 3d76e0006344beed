import re
import socket
import time

import nilearn.datasets
import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import euler_number, regionprops
from skimage.metrics import structural_similarity

from onereward.data import phantom
from onereward.data.phantom import (
    CONTRASTS,
    FIELD_OF_VIEW,
    describe,
    draw_surface,
    load_phantom,
    load_template,
    remove_specks,
    render_case,
    smooth_noise,
)
from onereward.data.schema import FEATURES, LABELS, TASKS, validate_row


NCR, ED, ET = LABELS["NCR"], LABELS["ED"], LABELS["ET"]


@pytest.fixture(scope="module")
def rows():
    return list(load_phantom(40, seed=5))


@pytest.fixture(scope="module")
def cases():
    return [render_case(5, "train", index, 64, CONTRASTS, False) for index in range(40)]


def pixels(row, column):
    return np.asarray(row[column])


def raw(dataset):
    """Rows with the encoded bytes of their pictures."""
    return dataset.with_format("arrow")[:].to_pylist()


# ---- what a row depends on


def test_rows_do_not_depend_on_processes_length_or_what_else_is_rendered():
    whole = raw(load_phantom(9, seed=3))  # more than the eight that are rendered in one go
    assert len(whole) == 9 * 4 * 3
    assert raw(load_phantom(9, seed=3, num_proc=2)) == whole
    assert raw(load_phantom(2, seed=3)) == whole[:24]
    some = raw(load_phantom(9, seed=3, contrasts=("t2f", "t1c"), tasks=("remove",)))
    expected = [row for row in whole if row["task"] == "remove" and row["modality"] in ("t2f", "t1c")]
    assert sorted(some, key=str) == sorted(expected, key=str)


def test_splits_and_seeds_share_no_case():
    seen = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1):
            for row in load_phantom(6, split=split, seed=seed, contrasts=("t1n",), tasks=("fill",)):
                for column in ("image", "target", "label_map"):
                    key = pixels(row, column).tobytes()
                    assert key not in seen, f"{split}, {seed} repeats {seen[key]}"
                    seen[key] = (split, seed)
    assert len(seen) == 6 * 6 * 3


def test_rows_are_in_order_and_pass_the_schema(rows):
    keys = [(row["case_id"], row["modality"], row["task"]) for row in rows]
    assert keys == [
        (f"phantom-train-{i:06d}", contrast, task) for i in range(40) for contrast in CONTRASTS for task in TASKS
    ]
    for row in rows:
        validate_row(row, LABELS)
        assert row["image"].size == (64, 64) and row["image"].mode == "L" and row["source"] == "phantom"


def test_the_template_needs_no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the phantom touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_template.cache_clear()
    maps, heights = load_template()
    assert {volume.shape for volume in maps.values()} == {(197, 233, 189)}
    assert len(heights) > 40 and heights.min() >= 54


def test_speed_on_one_core():
    load_phantom(1)
    start = time.process_time()
    load_phantom(12, tasks=("fill",))
    # Only the pictures with a tumour are counted; their twins come on top.
    assert 12 * len(CONTRASTS) / (time.process_time() - start) > 20


# ---- twin and masks


@pytest.mark.parametrize(("size", "mass_effect"), [(64, False), (64, True), (128, False)])
def test_image_and_target_are_equal_outside_the_mask(size, mass_effect):
    for row in load_phantom(6, size=size, seed=1, mass_effect=mass_effect, split="validation"):
        outside = pixels(row, "mask") == 0
        np.testing.assert_array_equal(pixels(row, "image")[outside], pixels(row, "target")[outside])
        if row["task"] != "extend":
            assert (pixels(row, "image") != pixels(row, "target")).any()


@pytest.mark.parametrize("size", [64, 128])
def test_twin_is_bit_equal_away_from_the_tumour(size):
    for index in range(10):
        case = render_case(2, "test", index, size, CONTRASTS, False)
        far = ndimage.distance_transform_edt(case["label_map"] == 0) > 6
        for contrast in CONTRASTS:
            twin, tumour = case["twin"][contrast], case["tumour"][contrast]
            np.testing.assert_array_equal(twin[far], tumour[far])
            assert (twin != tumour)[~far & (case["label_map"] == 0)].any(), "borders are soft"
            assert (twin != tumour)[case["label_map"] > 0].mean() > 0.8


def test_the_label_map_explains_all_that_changes(cases):
    for case in cases:
        changed = np.any([case["twin"][contrast] != case["tumour"][contrast] for contrast in CONTRASTS], 0)
        assert ndimage.distance_transform_edt(case["label_map"] == 0)[changed].max() < 3


def test_mass_effect_moves_anatomy_beyond_the_tumour_and_away_from_it():
    moved = []
    for index in range(6):
        still, pushed = (render_case(0, "train", index, 64, ("t1n",), mass_effect) for mass_effect in (False, True))
        np.testing.assert_array_equal(still["twin"]["t1n"], pushed["twin"]["t1n"])
        near = ndimage.distance_transform_edt(pushed["label_map"] == 0)
        ring = (near > 3) & (near < 8)
        moved.append((pushed["twin"]["t1n"] != pushed["tumour"]["t1n"])[ring].mean())
    assert min(moved) > 0 and np.mean(moved) > 0.2


def test_mass_effect_pushes_outwards(monkeypatch):
    # Where each pixel of the pushed picture comes from must lie nearer to the core than the pixel itself.
    sampled = []
    original = phantom.sample_anatomy
    monkeypatch.setattr(phantom, "sample_anatomy", lambda c: (sampled.append(c), original(c))[1])
    case = render_case(0, "train", 3, 64, ("t1n",), True)
    before, after = sampled[0], sampled[-1]
    core = np.isin(case["label_map"], (NCR, ET)).repeat(2, 0).repeat(2, 1)
    centre = before[:2, core].mean(1)[:, None, None]
    shift = after[:2] - before[:2]
    moving = (np.hypot(*shift) > 1) & ~core
    cosine = (shift * (before[:2] - centre)).sum(0) / (np.hypot(*shift) * np.hypot(*(before[:2] - centre)) + 1e-9)
    assert moving.sum() > 50 and cosine[moving].mean() < -0.8


def test_fill_and_remove_masks_cover_the_tumour_with_a_random_margin(rows):
    margins = []
    for row in rows:
        if row["task"] == "fill":
            tumour, mask = pixels(row, "label_map") > 0, pixels(row, "mask") > 0
            assert mask[tumour].all()
            margins.append(ndimage.distance_transform_edt(~tumour)[mask].max())
        if row["task"] == "remove":
            assert not pixels(row, "label_map").any()
    assert 1 <= min(margins) < 2.5 and 3 < max(margins) <= 4.5


def test_extend_strips_start_at_the_edge_and_reach_into_the_brain(rows):
    whole = {row["case_id"]: pixels(row, "label_map") for row in rows if row["task"] == "fill"}
    for row in rows:
        if row["task"] != "extend":
            continue
        mask, image = pixels(row, "mask") > 0, pixels(row, "image")
        assert 0.03 < (mask & (image > 0)).sum() / (image > 0).sum() < 0.95
        pieces, count = ndimage.label(mask)
        border = np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])
        assert set(range(1, count + 1)) <= set(border.tolist())
        np.testing.assert_array_equal(pixels(row, "label_map"), whole[row["case_id"]] * mask)
        np.testing.assert_array_equal(image, pixels(row, "target"))


# ---- anatomy and tumours


def test_display_is_radiological():
    # nilearn's affine says where a voxel is in space: x grows to the patient's right, y to the front.
    affine = nilearn.datasets.load_mni152_template(resolution=1).affine
    coordinates = draw_surface(np.random.default_rng(0), 64)
    world = np.einsum("ij,jhw->ihw", affine[:3, :3], coordinates) + affine[:3, 3, None, None]
    assert world[0][:, :20].mean() > 20, "the patient's right (positive x) must be on the left of the picture"
    assert world[0][:, -20:].mean() < -20
    assert world[1][:20].mean() > 20 > -60 > world[1][-20:].mean(), "anterior must be up"


def test_pictures_show_what_radiology_says(cases):
    mean = {contrast: {value: [] for value in (NCR, ED, ET, "healthy")} for contrast in CONTRASTS}
    for case in cases:
        for contrast in CONTRASTS:
            for value in (NCR, ED, ET):
                region = ndimage.binary_erosion(case["label_map"] == value)
                mean[contrast][value] += case["tumour"][contrast][region].tolist()
            mean[contrast]["healthy"] += case["twin"][contrast][case["brain"]].tolist()
    mean = {contrast: {k: np.mean(v) for k, v in by_region.items()} for contrast, by_region in mean.items()}
    assert mean["t1c"][ET] > 1.3 * mean["t1c"]["healthy"], "contrast agent makes the rim bright"
    assert mean["t1n"][ET] < mean["t1n"]["healthy"], "which it is not without"
    assert mean["t1c"][NCR] < 0.6 * mean["t1c"]["healthy"], "necrosis is dark"
    assert mean["t2w"][NCR] > 1.3 * mean["t2w"]["healthy"], "and bright on T2"
    assert mean["t2f"][ED] > 1.3 * mean["t2f"]["healthy"], "oedema is bright on FLAIR"
    assert mean["t2w"][ED] > 1.2 * mean["t2w"]["healthy"], "and on T2"
    assert mean["t1n"][ED] < mean["t1n"]["healthy"], "and dark on T1"


def test_ventricles_are_dark_on_t1_and_flair_and_bright_on_t2():
    maps, heights = load_template()
    rng = np.random.default_rng(0)
    coordinates = draw_surface(rng, 128)
    coordinates[2] = 90  # the level of the lateral ventricles
    tissue = phantom.sample_anatomy(coordinates)
    nothing = {value: np.zeros((128, 128), np.float32) for value in (NCR, ED, ET)}
    deep = ndimage.distance_transform_edt(tissue["brain"] > 0.5) > 20
    fluid = phantom.area_average((deep & (tissue["csf"] > 0.9)).astype(float)) == 1
    tissue_only = phantom.area_average((tissue["csf"] < 0.1).astype(float) * (tissue["brain"] > 0.9)) == 1
    assert fluid.sum() > 20
    ratio = {}
    for contrast in CONTRASTS:
        twin, _ = phantom.acquire(np.random.default_rng(1), contrast, tissue, tissue, nothing)
        ratio[contrast] = twin[fluid].mean() / twin[tissue_only].mean()
    assert ratio["t2w"] > 1.5 and max(ratio["t1n"], ratio["t1c"], ratio["t2f"]) < 0.6


def test_tumours_can_be_learned_from(cases):
    areas = np.array([(case["label_map"] > 0).sum() for case in cases])
    assert areas.min() >= 25 and (areas >= 40).mean() > 0.9
    assert areas.max() < 700 and areas.max() / areas.min() > 5, "sizes vary, but stay lesions"
    kinds = {tuple(np.unique(case["label_map"])) for case in cases}
    assert (0, NCR, ED, ET) in kinds and (0, ED, ET) in kinds
    for case in cases:
        _, count = ndimage.label(case["label_map"] > 0, np.ones((3, 3)))
        assert count == 1
        for value in (NCR, ED, ET):
            regions, count = ndimage.label(case["label_map"] == value, np.ones((3, 3)))
            assert count == 0 or np.bincount(regions.ravel())[1:].min() >= 4, "no specks"
    rings = sum(euler_number(case["label_map"] == ET, 2) <= 0 for case in cases)
    assert rings >= 10, "closed enhancing rings survive at 64 pixels"


def test_noise_is_there_but_low():
    # A head of nothing but the sequence's brightest tissue: all that is left above smooth shading is noise.
    ones, zeros = np.ones((128, 128), np.float32), np.zeros((128, 128), np.float32)
    nothing = {value: zeros for value in (NCR, ED, ET)}
    for contrast, brightest in (("t1n", "wm"), ("t1c", "wm"), ("t2w", "csf"), ("t2f", "gm")):
        flat = {"brain": ones, "wm": zeros, "gm": zeros, "csf": zeros, "detail": zeros} | {brightest: ones}
        for seed in range(5):
            twin, tumour = phantom.acquire(np.random.default_rng(seed), contrast, flat, flat, nothing)
            np.testing.assert_array_equal(twin, tumour)
            grain = (twin - ndimage.gaussian_filter(twin.astype(float), 2)).std()
            assert 0.2 < grain < 3, "in grey levels of 255"


def test_anatomies_differ(cases):
    twins = [case["twin"]["t1n"] for case in cases[:12]]
    similarity = [
        structural_similarity(a, b, data_range=255, gaussian_weights=True, use_sample_covariance=False)
        for i, a in enumerate(twins)
        for b in twins[:i]
    ]
    assert np.mean(similarity) < 0.5 and np.max(similarity) < 0.8


def test_the_same_case_has_the_same_anatomy_at_every_size():
    small, large = (render_case(0, "train", 1, size, ("t1n",), False)["twin"]["t1n"] for size in (64, 128))
    assert np.corrcoef(small.ravel(), phantom.area_average(large.astype(float)).ravel())[0, 1] > 0.99


def test_smooth_noise_has_the_asked_spread():
    fields = np.stack([smooth_noise(np.random.default_rng(seed), 64, 24, 2.0) for seed in range(400)])
    assert abs(fields.mean()) < 0.1
    assert abs(np.sqrt((fields**2).mean()) - 2.0) < 0.08


def test_remove_specks_on_a_made_up_map():
    labels = np.zeros((12, 12), int)
    labels[2:9, 2:9] = ED
    labels[4, 4] = ET  # a speck inside: goes to its neighbours
    labels[6:8, 6:8] = NCR  # four pixels: stays
    labels[11, 11] = ET  # a piece of its own: goes
    expected = labels.copy()
    expected[4, 4], expected[11, 11] = ED, 0
    np.testing.assert_array_equal(remove_specks(labels, 4), expected)


# ---- prompts


def read_prompt(prompt):
    """What a reader takes from a prompt about a lesion."""
    text = prompt.lower()
    millimetres = re.search(r"(\d+) mm", text)
    return {
        "ring": bool(re.search(r"\b(ring|rim)\b", text)),
        "necrosis": "necro" in text,
        "enhancing": bool(re.search(r"(?<!non-)enhanc", text.replace("contrast-enhanced", "")))
        and "without enhancement" not in text,
        "oedema": "oedema" in text and "no oedema" not in text and "without oedema" not in text,
        "side": next((side for side in ("left", "right", "midline") if side in text), None),
        "mm": int(millimetres[1]) if millimetres else None,
        "size": next((word for word in ("small", "large ", "sized") if word in text), None),
    }


def test_prompts_of_lesions_are_true(rows):
    checked = 0
    for row in rows:
        label_map = pixels(row, "label_map")
        if not label_map.any():
            continue
        checked += 1
        said = read_prompt(row["prompt"])
        has = {value: (label_map == value).any() for value in (NCR, ED, ET)}
        assert said["oedema"] == has[ED], row["prompt"]
        assert said["enhancing"] == has[ET], row["prompt"]
        assert said["necrosis"] == said["ring"], row["prompt"]
        if has[NCR] and has[ET]:
            # A ring is most of what touches the necrosis, side by side.
            touching = ndimage.grey_dilation(label_map == NCR, footprint=ndimage.generate_binary_structure(2, 1))
            share = (label_map[touching & (label_map != NCR)] == ET).mean()
            assert said["ring"] == (share >= 0.6), (row["prompt"], share)
        else:
            assert not said["ring"], row["prompt"]
        column = ndimage.center_of_mass(label_map > 0)[1] - 31.5
        true_side = "midline" if abs(column * 3) <= 8 else "left" if column > 0 else "right"
        assert said["side"] == true_side, row["prompt"]
        feret = regionprops((label_map > 0).astype(int))[0].feret_diameter_max * FIELD_OF_VIEW / 64
        assert abs(said["mm"] - feret) <= 3.0, (row["prompt"], feret)  # a pixel: the two round corners differently
        assert said["size"] == ("small" if said["mm"] < 25 else "large " if said["mm"] > 50 else "sized")
    assert checked > 160


def test_prompts_without_a_lesion_speak_of_healthy_tissue(rows):
    for row in rows:
        if not pixels(row, "label_map").any():
            said = read_prompt(row["prompt"])
            assert said["mm"] is None and said["side"] is None and not said["oedema"] and not said["ring"]
            assert re.search("healthy|normal|unremarkable", row["prompt"].lower()), row["prompt"]


def test_prompts_name_the_sequence(rows):
    for row in rows:
        text = row["prompt"]
        flair = "FLAIR" in text or "fluid-attenuated" in text
        agent = bool(re.search("contrast-enhanced|post-contrast|gadolinium", text))
        assert flair == (row["modality"] == "t2f"), text
        assert agent == (row["modality"] == "t1c"), text
        assert ("T1" in text) == row["modality"].startswith("t1"), text


def test_prompts_vary(rows):
    for task in TASKS:
        starts = {" ".join(row["prompt"].split()[:2]) for row in rows if row["task"] == task}
        assert len(starts) >= 6
    assert len({row["prompt"] for row in rows}) > 0.75 * len(rows)


def made_up(*boxes):
    label_map = np.zeros((64, 64), np.uint8)
    for value, top, bottom, left, right in boxes:
        label_map[top:bottom, left:right] = value
    return label_map


@pytest.mark.parametrize(
    ("label_map", "words", "not_words"),
    [
        (
            made_up((ED, 10, 30, 10, 28), (ET, 14, 24, 14, 24), (NCR, 17, 21, 17, 21)),
            "right.*(necrotic core|central necrosis|necrotic tumour)",
            "left|partly|heterogen",
        ),
        (made_up((ET, 30, 34, 50, 54)), "left.*(solid|homogen).*(no|without) oedema", "necro|ring"),
        (made_up((NCR, 20, 32, 28, 36)), "midline.*(non-enhancing|without enhancement)", "necro|ring"),
        (made_up((ED, 20, 32, 40, 60)), "left.*oedema", "tumour|mass|enhanc"),
        (made_up((NCR, 20, 32, 40, 50), (ET, 20, 32, 50, 56)), "partly|heterogen", "ring|rim-|necro"),
        (made_up(), "healthy|normal|unremarkable", "mm|oedema"),
    ],
)
def test_descriptions_of_made_up_lesions(label_map, words, not_words):
    for seed in range(30):
        text = describe(label_map, "t2w", "fill", 3.0, np.random.default_rng(seed))
        assert re.search(words, text), text
        assert not re.search(not_words, text.replace("T2", "")), text


def test_measure_scales_with_the_pixel_and_unknown_modalities_keep_their_name():
    label_map = made_up((ET, 20, 21, 10, 20))  # ten pixels in a row
    for mm in (1.0, 2.5):
        text = describe(label_map, "PET", "extend", mm, np.random.default_rng(0))
        assert f"{round(10 * mm)} mm" in text and "PET" in text


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_cases": 0}, "`num_cases` is 0"),
        ({"size": 60}, "`size` is 60.*multiple of 8 from 64 to 128"),
        ({"size": 256}, "`size` is 256"),
        ({"seed": -1}, "`seed` is -1"),
        ({"split": "dev"}, "`split` is 'dev'.*validation"),
        ({"contrasts": "t1n"}, "`contrasts` is 't1n'.*tuple"),
        ({"contrasts": ("t1n", "pd")}, "`contrasts`.*t2f"),
        ({"tasks": ()}, r"`tasks` is \(\).*remove"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_phantom(**{"num_cases": 1} | arguments)


def test_features_are_the_schema():
    assert load_phantom(1, contrasts=("t1n",), tasks=("fill",)).features == FEATURES
