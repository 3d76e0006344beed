"""The official figures are the challenge's to the last digit, and the composite ones see what those hide."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from typer.testing import CliRunner

from onereward.cli import app
from onereward.evaluation.brats2023 import brats2023_measures, composite_measures, local_synthesis, measure_folders
from onereward.evaluation.metrics import masked_ssim
from onereward.evaluation.windows import percentile_bounds, scale_to_bounds


def volumes():
    """Three smooth volumes with air, noisy predictions, and the masks, as `(3, 1, 24, 40, 32)` in float32."""
    rng = np.random.default_rng(0)
    shape = (24, 40, 32)
    target = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(3)])
    target = (target - target.min()) * 3000
    target[:, :6] = 0
    unhealthy, healthy = np.zeros_like(target, bool), np.zeros_like(target, bool)
    unhealthy[:, 15:20, 20:28, 20:28] = True
    healthy[0, 8:14, 10:20, 10:20] = True
    healthy[1, 6:12, :8, 25:] = True  # up to two edges of the volume
    healthy[2, 9, 9, 9] = True
    voided = np.where(healthy | unhealthy, 0, target)
    prediction = target + rng.normal(size=target.shape) * 60
    return [torch.from_numpy(array)[:, None].float() for array in (prediction, target, voided, healthy)]


def official_in_numpy(prediction, target, voided, mask):
    """The challenge's recipe step by step, on `(X, Y, Z)` arrays with SciPy's filters."""
    low, high = np.percentile(voided, [0.5, 99.5])
    low = max(low, 0.0)
    x, y = ((np.clip(volume * mask, low, high) - low) / (high - low) for volume in (prediction, target))
    data_range = max(x.max() - x.min(), y.max() - y.min())
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def blur(a):  # over (Y, Z) alone; "mirror" does not repeat the edge; the window ends at 3.5 sigma
        return ndimage.gaussian_filter(a, 1.5, axes=(1, 2), mode="mirror", truncate=3.5)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    full = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    p, t = x[mask], y[mask]
    mse, width, epsilon = ((p - t) ** 2).mean(), max(t.max(), 0) - min(t.min(), 0), sys.float_info.epsilon
    return {
        "ssim": full[mask].mean(),
        "mse": mse,
        "rmse": mse**0.5,
        "mae": np.abs(p - t).mean(),
        "msle": (np.log((1 + p) / (1 + t)) ** 2).mean(),
        "psnr": 10 * np.log10(width**2 / mse),
        "psnr_eps": 10 * np.log10(width**2 / (mse + epsilon)),
        "psnr_01": -10 * np.log10(mse),
        "psnr_01_eps": -10 * np.log10(mse + epsilon),
    }


def test_official_figures_equal_the_recipe_in_numpy():
    arguments = volumes()
    figures = brats2023_measures(*arguments)
    for i in range(3):
        prediction, target, voided, mask = (volume[i, 0].double().numpy() for volume in arguments)
        expected = official_in_numpy(prediction, target, voided, mask > 0)
        assert list(figures) == ["ssim", "mse", "rmse", "mae", "msle", "psnr", "psnr_eps", "psnr_01", "psnr_01_eps"]
        for name, value in expected.items():
            assert figures[name][i].item() == pytest.approx(value, rel=1e-9), name


def test_official_figures_equal_those_of_the_library_that_the_challenge_used():
    image = pytest.importorskip("torchmetrics.image")
    regression = pytest.importorskip("torchmetrics.regression")
    arguments = volumes()
    figures = brats2023_measures(*arguments)
    for i in range(3):
        prediction, target, voided, mask = (volume[i] for volume in arguments)  # (1, X, Y, Z), as the challenge does
        low, high = np.percentile(voided.numpy(), [0.5, 99.5])
        x, y = ((torch.clip(v * mask, low, high) - low) / (high - low) for v in (prediction, target))
        inside = mask > 0
        full = image.StructuralSimilarityIndexMeasure(return_full_image=True)(preds=x, target=y)[1]
        p, t = x[inside], y[inside]
        expected = {
            "ssim": full[inside].mean(),
            "mse": regression.MeanSquaredError()(p, t),
            "rmse": regression.MeanSquaredError(squared=False)(p, t),
            "mae": regression.MeanAbsoluteError()(p, t),
            "msle": regression.MeanSquaredLogError()(p, t),
            "psnr_01": image.PeakSignalNoiseRatio(data_range=1)(preds=p, target=t),
        }
        try:  # later versions have no default range any more
            expected["psnr"] = image.PeakSignalNoiseRatio()(preds=p, target=t)
        except TypeError:
            pass
        for name, value in expected.items():
            assert figures[name][i].item() == pytest.approx(value.item(), rel=1e-4), name


def test_composite_ssim_is_the_three_dimensional_one_of_the_whole_pasted_volume():
    prediction, target, voided, mask = volumes()
    bounds = percentile_bounds(voided)
    x, y = (scale_to_bounds(volume.double(), bounds) for volume in (prediction, target))
    expected = masked_ssim(x, y, mask, spatial_dims=3)
    np.testing.assert_allclose(composite_measures(prediction, target, voided, mask)["ssim"], expected, rtol=1e-9)


def test_both_readings_share_the_errors_inside_the_mask():
    figures = local_synthesis(*volumes())
    for name in ("mse", "rmse", "mae"):
        np.testing.assert_allclose(figures["composite"][name], figures["brats2023"][name], rtol=1e-9)
    np.testing.assert_allclose(figures["composite"]["psnr"], figures["brats2023"]["psnr_01"], rtol=1e-9)


def test_the_official_ssim_flatters_a_constant_fill_and_the_composite_does_not():
    _, target, voided, mask = (volume[:1] for volume in volumes())
    mask = torch.zeros_like(target)
    mask[..., 8:14, 12:18, 12:18] = 1
    fill = torch.full_like(target, target[mask > 0].mean())
    figures = local_synthesis(fill, target, voided, mask)
    assert figures["brats2023"]["ssim"] > figures["composite"]["ssim"] + 0.1


def test_neither_reading_sees_what_lies_outside_the_mask():
    prediction, target, voided, mask = volumes()
    broken = torch.where(mask > 0, prediction, torch.nan)
    for mode, figures in local_synthesis(broken, target, voided, mask).items():
        for name, values in figures.items():
            np.testing.assert_array_equal(values, local_synthesis(prediction, target, voided, mask)[mode][name])


def test_what_clipping_hides_is_counted():
    prediction, target, voided, mask = volumes()
    assert (composite_measures(target, target, voided, mask)["clipped"] < 0.05).all()
    assert composite_measures(target * 1e6 + 1e6, target, voided, mask)["clipped"].tolist() == [1, 1, 1]


def test_empty_constant_and_identical_cases_are_defined():
    prediction, target, voided, mask = volumes()
    mask[0] = 0
    voided[1] = 5.0  # no range
    for mode, figures in local_synthesis(prediction, target, voided, mask).items():
        for name, values in figures.items():
            assert values.isnan().tolist() == [True, True, False], (mode, name)
    same = local_synthesis(target, target, voided, mask)
    for figures in same.values():
        assert figures["ssim"][2].item() == pytest.approx(1, abs=1e-9)
        assert figures["mse"][2] == 0
        assert figures["psnr"][2] == float("inf")
    assert same["brats2023"]["psnr_01"][2] == float("inf")
    assert same["brats2023"]["psnr_01_eps"][2].item() == pytest.approx(-10 * np.log10(sys.float_info.epsilon))
    black = brats2023_measures(*(0 * volume for volume in (prediction, target)), *volumes()[2:])
    assert black["ssim"].isnan().all()
    assert (black["mse"] == 0).all()


def test_volumes_that_do_not_fit_are_refused():
    prediction, target, voided, mask = volumes()
    with pytest.raises(ValueError, match="axis for the channels"):
        local_synthesis(prediction[:, 0], target[:, 0], voided[:, 0], mask[:, 0])
    with pytest.raises(ValueError, match="has one, t1n"):
        local_synthesis(*(volume.expand(-1, 2, -1, -1, -1) for volume in (prediction, target, voided)), mask)
    with pytest.raises(ValueError, match="at least 6 voxels"):
        brats2023_measures(*(volume[..., :5] for volume in (prediction, target, voided, mask)))
    with pytest.raises(ValueError, match="smaller than the 11 pixel window"):
        composite_measures(*(volume[..., :7] for volume in (prediction, target, voided, mask)))


# ------------------------------------------------------------------------------------------- files of the challenge


@pytest.fixture
def folders(tmp_path):
    """Three cases of two patients on the disk, as the challenge names them."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    cases = ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00007-000"]
    for i, case in enumerate(cases):
        (tmp_path / "data" / case).mkdir(parents=True)
        (tmp_path / "out").mkdir(exist_ok=True)
        places = ["out", f"data/{case}", f"data/{case}", f"data/{case}"]
        names = ["t1n-inference", "t1n", "t1n-voided", "mask-healthy"]
        for place, name, volume in zip(places, names, volumes(), strict=True):
            array = volume[i, 0].numpy().astype(np.float32)
            nib.save(nib.Nifti1Image(array, affine), tmp_path / place / f"{case}-{name}.nii.gz")
    return tmp_path


def test_folders_of_the_challenge_are_measured_case_by_case(folders):
    found = measure_folders(folders / "out", folders / "data", resamples=200)
    assert found["cases"] == ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00007-000"]
    for mode, figures in local_synthesis(*volumes()).items():
        for name, values in figures.items():
            entry, defined = found[mode][name], values[values.isfinite()]
            assert entry.value == pytest.approx(defined.mean().item(), rel=1e-5)
            assert entry.n + entry.n_failed == 3
    assert "few cases" in found["brats2023"]["ssim"].note  # two patients


def test_the_command_prints_both_readings_and_writes_json(folders):
    command = ["brats2023", str(folders / "out"), str(folders / "data"), "--output", str(folders / "figures.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "brats2023" in result.output and "composite" in result.output and "not for clinical use" in result.output
    written = json.loads((folders / "figures.json").read_text())
    assert written["composite"]["ssim"]["n"] == 3 and len(written["brats2023"]) == 9


def test_a_missing_file_and_a_volume_elsewhere_are_named(folders):
    case = "BraTS-GLI-00007-000"
    moved = folders / "out" / f"{case}-t1n-inference.nii.gz"
    image = nib.load(moved)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.eye(4)), moved)
    with pytest.raises(ValueError, match=f"{case}-t1n-inference.nii.gz is .* lies elsewhere than {case}-t1n.nii.gz"):
        measure_folders(folders / "out", folders / "data")
    (folders / "data" / case / f"{case}-mask-healthy.nii.gz").unlink()
    with pytest.raises(ValueError, match="lacks .*mask-healthy"):
        measure_folders(folders / "out", folders / "data")
    with pytest.raises(ValueError, match="holds no file named"):
        measure_folders(folders / "data", folders / "data")
