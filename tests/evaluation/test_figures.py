"""The pictures have the size they should have and show in each panel what its title says."""

import numpy as np
import pytest
import torch
from PIL import Image

from onereward.data.schema import rows_to_tensors
from onereward.evaluation.figures import before_after_figure, reward_curve_figure


# The layout in pixels: 64 px slices are shown three times as large.
MARGIN, GAP, TOP, CAPTION, BOTTOM, PANEL = 16, 8, 34, 22, 44, 192


def panel(picture, line, column):
    y = TOP + line * (CAPTION + PANEL + GAP) + CAPTION
    x = MARGIN + column * (PANEL + GAP)
    return picture[y : y + PANEL, x : x + PANEL]


@pytest.fixture(scope="module")
def drawn(phantom, tmp_path_factory):
    rows = [phantom[i] for i in (0, 1, 5)]
    tensors = rows_to_tensors(rows)
    before, after = 0.5 * tensors["targets"], tensors["targets"].flip(0)
    path = tmp_path_factory.mktemp("figures") / "new" / "before_after.png"
    before_after_figure(rows, before, after, tensors["targets"], path)
    assert [file.name for file in path.parent.iterdir()] == ["before_after.png"]
    return rows, before, after, tensors, np.asarray(Image.open(path).convert("RGB"))


def test_before_after_has_a_line_per_case_and_a_column_per_picture(drawn):
    rows, _, _, _, picture = drawn
    height = TOP + len(rows) * (CAPTION + PANEL + GAP) + BOTTOM
    assert picture.shape == (height, 2 * MARGIN + 5 * PANEL + 4 * GAP, 3)


def test_before_after_shows_every_pixel_enlarged_three_times(drawn):
    rows, before, after, tensors, picture = drawn
    for line in range(len(rows)):
        for column, images in ((2, before), (3, after), (4, tensors["targets"])):
            grey = (images[line, 0] * 255).round().numpy().astype(np.uint8)
            expected = np.repeat(grey.repeat(3, 0).repeat(3, 1)[..., None], 3, -1)
            np.testing.assert_allclose(panel(picture, line, column), expected, atol=1)


def test_source_is_shown_inside_its_outline_and_labels_in_colour(drawn):
    rows, _, _, tensors, picture = drawn
    for line in range(len(rows)):
        mask = tensors["masks"][line, 0].numpy().repeat(3, 0).repeat(3, 1) > 0
        coloured = np.ptp(panel(picture, line, 0).astype(int), axis=-1) > 20
        assert coloured.any() and not (coloured & mask).any()
        labels = tensors["label_maps"][line, 0].numpy().repeat(3, 0).repeat(3, 1)
        coloured = np.ptp(panel(picture, line, 1).astype(int), axis=-1) > 20
        np.testing.assert_array_equal(coloured, labels > 0)


def test_titles_captions_and_notice_are_written(drawn):
    _, _, _, _, picture = drawn
    dark = (picture.min(-1) < 140).astype(int)
    assert dark[:TOP].sum() > 200
    assert dark[TOP : TOP + CAPTION].sum() > 200
    assert dark[-BOTTOM:, picture.shape[1] // 2 :].sum() > 200


def test_colour_images_without_truth_leave_the_column_out(phantom, tmp_path):
    row = {**phantom[0], "image": phantom[0]["image"].convert("RGB")}
    images = torch.rand(1, 3, 64, 64)
    before_after_figure([row], images, images, None, tmp_path / "colour.png", labels=None)
    picture = np.asarray(Image.open(tmp_path / "colour.png").convert("RGB"))
    assert picture.shape[1] == 2 * MARGIN + 4 * PANEL + 3 * GAP
    expected = (images[0] * 255).round().numpy().transpose(1, 2, 0).repeat(3, 0).repeat(3, 1)
    np.testing.assert_allclose(panel(picture, 0, 3), expected, atol=1)


def test_reward_curves_show_training_unseen_heads_and_kl(tmp_path):
    history = []
    for step in range(1, 9):
        history.append({"step": step, "reward": 0.1 * step, "reward_std": 0.2, "kl": 0.01 * step})
        history[-1] |= {"rewards/quality/mean": 0.2 * step, "rewards/realism/mean": -0.1 * step, "loss": 1.0}
    history.append({"step": 8, "eval_reward": 0.5, "eval_rewards/quality/mean": 1.0})
    history.append({"step": 8, "train_runtime": 3.0})
    reward_curve_figure(history, tmp_path / "curve.png")
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    assert picture.shape == (440, 1320, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
    ink = picture.min(-1) < 200
    for third in np.split(ink[60:380], 3, axis=1):
        assert third.sum() > 500  # no panel is empty
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    for colour in ((86, 180, 233), (213, 94, 0), (0, 114, 178)):  # training, unseen, a head of its own
        assert colour in colours


def test_a_history_without_rewards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no entry with `reward`"):
        reward_curve_figure([{"step": 1, "loss": 2.0}], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
