"""The methods a model has to beat: each agrees with its own library or closed form, and none looks under the mask."""

import builtins

import numpy as np
import pytest
import torch
from scipy import ndimage

from onereward.data.phantom import load_phantom
from onereward.data.schema import rows_to_tensors
from onereward.evaluation.baselines import (
    ReferenceSlices,
    biharmonic,
    constant_fill,
    label_means,
    navier_stokes,
    nearest_patient,
    reference_slices,
    surroundings,
    telea,
    unchanged,
)


@pytest.fixture(scope="module")
def rows():
    return load_phantom(3, tasks=("fill", "remove"), contrasts=("t1c", "t2f"), split="validation", seed=5)


@pytest.fixture(scope="module")
def reference():
    return reference_slices(load_phantom(12, tasks=("fill",), contrasts=("t1c", "t2f"), split="train"))


@pytest.fixture
def told(rows, reference):
    tensors = rows_to_tensors(list(rows))
    return tensors["images"], tensors["masks"], tensors["label_maps"], list(rows["modality"]), reference


def fills(images, masks, label_maps, modalities, reference):
    """Every baseline that can run here, but for the unchanged source."""
    made = {
        "constant_fill": constant_fill(images, masks),
        "nearest_patient": nearest_patient(images, masks, label_maps, modalities, reference),
    }
    try:
        made["biharmonic"] = biharmonic(images, masks)
        made["label_means"] = label_means(images, masks, label_maps, modalities, reference)
    except ImportError:
        pass
    try:
        made["telea"], made["navier_stokes"] = telea(images, masks), navier_stokes(images, masks)
    except ImportError:
        pass
    return made


def test_every_pixel_outside_the_mask_is_returned_as_it_was(told):
    images, masks = told[:2]
    images = images + 1e-4 * torch.rand(
        images.shape, generator=torch.Generator().manual_seed(1)
    )  # between the 8-bit levels too
    images = images.clamp(0, 1)
    for name, filled in fills(images, *told[1:]).items():
        keep = (masks == 0).expand_as(images)
        assert torch.equal(filled[keep], images[keep]), name
        assert filled.shape == images.shape, name
        assert filled.dtype == images.dtype, name
        assert 0 <= filled.min() <= filled.max() <= 1, name
        assert not torch.equal(filled, images), name


def test_no_baseline_looks_under_the_mask(told):
    images, masks = told[:2]
    scrambled = torch.where(masks > 0, torch.rand(images.shape, generator=torch.Generator().manual_seed(0)), images)
    before, after = fills(*told), fills(scrambled, *told[1:])
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(unchanged(scrambled, masks), scrambled)


def test_the_images_it_is_given_stay_as_they_are(told):
    images = told[0].clone()
    fills(*told)
    unchanged(*told[:2]).zero_()
    assert torch.equal(told[0], images)


def test_the_surroundings_are_those_of_scipy(rows):
    masks = rows_to_tensors(list(rows))["masks"]
    for width in (1, 3):
        for mask, found in zip(masks[:, 0].numpy() > 0, surroundings(masks, width)[:, 0], strict=True):
            grown = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=width)
            np.testing.assert_array_equal(found.numpy(), grown & ~mask)


def test_constant_fill_is_the_mean_of_the_surroundings_channel_by_channel(rows):
    tensors = rows_to_tensors(list(rows))
    images = torch.cat([tensors["images"], 1 - tensors["images"]], 1)
    filled = constant_fill(images, tensors["masks"], width=2)
    for image, mask, result in zip(images.numpy(), tensors["masks"][:, 0].numpy() > 0, filled.numpy(), strict=True):
        ring = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=2) & ~mask
        for channel in range(2):
            np.testing.assert_allclose(result[channel][mask], image[channel][ring].mean(), rtol=1e-5)


def test_biharmonic_continues_a_plane_exactly():
    pytest.importorskip("skimage")
    y, x = torch.meshgrid(torch.linspace(0.2, 0.6, 24), torch.linspace(0, 0.3, 24), indexing="ij")
    plane = (x + y)[None, None]  # its biharmonic is zero, and it is the only such surface with this rim
    masks = torch.zeros(1, 1, 24, 24)
    masks[..., 8:15, 9:17] = 1
    filled = biharmonic(torch.where(masks > 0, 0, plane), masks)
    torch.testing.assert_close(filled, plane, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ours", "flag"), [(telea, "INPAINT_TELEA"), (navier_stokes, "INPAINT_NS")])
def test_opencv_gets_each_channel_in_8_bits(rows, ours, flag):
    cv2 = pytest.importorskip("cv2")
    tensors = rows_to_tensors(list(rows))
    images = torch.cat([tensors["images"], 1 - tensors["images"]], 1)
    filled = ours(images, tensors["masks"])
    for b, mask in enumerate(tensors["masks"][:, 0].numpy().astype(np.uint8)):
        for channel in range(2):
            source = np.round(images[b, channel].numpy() * 255).astype(np.uint8)
            expected = cv2.inpaint(source, mask * 255, 3, getattr(cv2, flag))
            np.testing.assert_array_equal(np.round(filled[b, channel].numpy() * 255), expected)


@pytest.mark.parametrize(
    ("fill", "missing"), [(telea, "cv2"), (navier_stokes, "cv2"), (biharmonic, "skimage.restoration")]
)
def test_a_missing_library_is_named_with_the_way_to_install_it(monkeypatch, fill, missing):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == missing:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    masks = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ImportError, match="pip install"):
        fill(torch.zeros(1, 1, 8, 8), masks)


def test_the_nearest_patient_is_the_patient_himself_where_he_is_there(told, reference):
    # The one slice in the collection whose surroundings and labels are exactly right is found among all others.
    some = range(0, len(reference.modalities), 5)
    images, label_maps = reference.images[some], reference.label_maps[some]
    masks = torch.zeros(len(images), 1, 64, 64)
    masks[..., 20:40, 24:44] = 1
    hidden = torch.where(masks > 0, 0.5, images)
    filled = nearest_patient(hidden, masks, label_maps, [reference.modalities[i] for i in some], reference)
    assert torch.equal(filled, images)


def test_the_nearest_patient_is_of_the_same_modality_and_of_the_least_misfit():
    # Three slices of one grey each: the two of the modality differ by 0.1 and 0.3 from the source.
    slices = torch.tensor([0.5, 0.6, 0.8]).view(3, 1, 1, 1).expand(3, 1, 16, 16).clone()
    labels = torch.zeros(3, 1, 16, 16, dtype=torch.long)
    reference = ReferenceSlices(slices, labels, ["t2f", "t1c", "t1c"])
    image, mask = torch.full((1, 1, 16, 16), 0.5), torch.zeros(1, 1, 16, 16)
    mask[..., 6:10, 6:10] = 1
    asked = torch.zeros(1, 1, 16, 16, dtype=torch.long)
    inside = mask > 0
    assert (nearest_patient(image, mask, asked, ["t1c"], reference)[inside] == slices[1, 0, 0, 0]).all()
    assert (nearest_patient(image, mask, asked, ["t2f"], reference)[inside] == slices[0, 0, 0, 0]).all()
    # With labels asked for, the other one: 16 wrong labels cost more than 128 pixels of 0.3^2 - 0.1^2 = 0.08.
    labels[2, 0, 6:10, 6:10] = asked[..., 6:10, 6:10] = 3
    assert (nearest_patient(image, mask, asked, ["t1c"], reference)[inside] == slices[2, 0, 0, 0]).all()
    with pytest.raises(ValueError, match="no slice of modality 't2w'"):
        nearest_patient(image, mask, asked, ["t2w"], reference)
    with pytest.raises(ValueError, match="of one size|at one size"):
        nearest_patient(image[..., :8, :8], mask[..., :8, :8], asked[..., :8, :8], ["t1c"], reference)


def test_label_means_are_the_means_of_the_training_pixels(told, reference):
    pytest.importorskip("skimage")
    images, masks, label_maps, modalities, _ = told
    filled = label_means(*told)
    names = np.array(reference.modalities)
    pixels, known = reference.images[:, 0].double().numpy(), reference.label_maps[:, 0].numpy()
    checked = 0
    for b, modality in enumerate(modalities):
        for value in (1, 2, 3):
            asked = label_maps[b, 0] == value
            if asked.any():
                expected = pixels[names == modality][known[names == modality] == value].mean()
                np.testing.assert_allclose(filled[b, 0][asked].double().numpy(), expected, rtol=1e-5)
                checked += 1
    assert checked > 8
    margin = (masks > 0) & (label_maps == 0)
    assert torch.equal(filled[margin], biharmonic(images, masks)[margin])
    unknown = torch.where(label_maps == 2, 7, label_maps)
    with pytest.raises(ValueError, match="no pixel of label 7"):
        label_means(images, masks, unknown, modalities, reference)


def test_reference_slices_hold_each_slice_healthy_and_with_its_labels(reference):
    half = len(reference.modalities) // 2
    assert reference.images.shape == (48, 1, 64, 64)
    assert reference.modalities[:half] == reference.modalities[half:]
    assert not reference.label_maps[:half].any()
    assert (reference.label_maps[half:] > 0).flatten(1).any(1).all()
    different = (reference.images[:half] != reference.images[half:]).float()
    assert different[reference.label_maps[half:] > 0].mean() > 0.9


@pytest.mark.parametrize("fill", [unchanged, constant_fill])
def test_masks_that_leave_nothing_or_do_not_fit_are_refused(fill):
    images = torch.zeros(2, 1, 8, 8)
    masks = torch.zeros(2, 1, 8, 8)
    assert torch.equal(fill(images, masks), images)  # an empty mask asks for nothing
    masks[1] = 1
    with pytest.raises(ValueError, match=r"the whole of image\(s\) \[1\]"):
        fill(images, masks)
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\)"):
        fill(images, masks[:1])
