"""The BraTS 2023 local-synthesis ("inpainting of healthy tissue") figures, as published and as they should be read.

The challenge (https://huggingface.co/papers/2305.08992) compares the prediction with the real t1n inside the *healthy*
mask, where the truth is known. Its SSIM sets everything outside the mask to zero, runs over 2-D sagittal planes and
takes its range from the two volumes at hand, so that much of what it compares is zeros with zeros.
`brats2023_measures` computes it exactly, to compare with published tables; `composite_measures` is the same comparison
with the region in its real surroundings, a 3-D window and a fixed range. Report both, and say which is which:
`local_synthesis`.
"""

import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from onereward.evaluation.bootstrap import measured_mean
from onereward.evaluation.metrics import (
    check_pair,
    gaussian_window,
    masked_mae,
    masked_psnr,
    masked_rmse,
    masked_ssim,
    ssim_terms,
)
from onereward.evaluation.windows import percentile_bounds, scale_to_bounds


RADIUS = 5  # of the 11 voxel window
PREDICTION = "-t1n-inference.nii.gz"
OFFICIAL = ("ssim", "mse", "rmse", "mae", "msle", "psnr", "psnr_eps", "psnr_01", "psnr_01_eps")


def local_synthesis(
    predictions: torch.Tensor, targets: torch.Tensor, voided: torch.Tensor, masks: torch.Tensor
) -> dict[str, dict[str, torch.Tensor]]:
    """
    Both readings of the local-synthesis figures side by side.

    Args:
        predictions (`torch.Tensor`):
            Inpainted t1n volumes of shape `(B, 1, X, Y, Z)`, in the unit of the targets.
        targets (`torch.Tensor`):
            Real t1n volumes of the same shape.
        voided (`torch.Tensor`):
            The t1n-voided volumes of the same shape: what the model was given, zero inside the healthy *and* the
            unhealthy mask. The intensity bounds come from them.
        masks (`torch.Tensor`):
            The healthy masks of the same shape, 1 where the figures are taken. There is no truth under the unhealthy
            mask.

    Returns:
        `dict`: `"brats2023"` -> the result of [`brats2023_measures`], `"composite"` -> that of [`composite_measures`].

    Raises:
        `ValueError`: when a shape does not fit, there is more than one channel, or the volumes hold integers.

    Example:

    ```python
    >>> figures = local_synthesis(predictions, t1n, t1n_voided, mask_healthy)
    >>> {mode: measured_mean(values["ssim"], case_ids) for mode, values in figures.items()}
    ```
    """
    return {
        "brats2023": brats2023_measures(predictions, targets, voided, masks),
        "composite": composite_measures(predictions, targets, voided, masks),
    }


def brats2023_measures(
    predictions: torch.Tensor, targets: torch.Tensor, voided: torch.Tensor, masks: torch.Tensor
) -> dict[str, torch.Tensor]:
    r"""
    The official figures, in the order of the challenge's code:

    1. prediction and target become zero outside the mask;
    2. both are clipped to percentiles 0.5 and 99.5 of *all* voxels of the voided volume, the lower one at least 0, and
       mapped to [0, 1];
    3. `ssim`: 2-D windows over the `(Y, Z)` planes, mirrored at the edge without repeating it, with the larger of the
       two volumes' ranges as `R`; mean over the mask;
    4. on the voxels of the mask: `mse`, `rmse`, `mae`, `msle` `$= \overline{(\ln(1+x) - \ln(1+y))^2}$`, and four PSNR:
       `psnr` with `$R = \max(y_m, 0) - \min(y_m, 0)$`, which is the maximum of the target in the mask, `psnr_01` with
       `$R = 1$`, and both with the machine epsilon added to the squared error, `psnr_eps` and `psnr_01_eps`.

    Args:
        predictions, targets, voided, masks (`torch.Tensor`):
            As in [`local_synthesis`].

    Returns:
        `dict[str, torch.Tensor]`: the nine figures above -> `(B,)` in float64. All are NaN for an empty mask or a
        voided volume whose percentiles coincide; `psnr` and `psnr_01` are infinite for identical regions, where the
        `_eps` forms are finite; `ssim` is NaN where prediction and target are black throughout, and `psnr` minus
        infinity where the target is.

    Raises:
        `ValueError`: as [`local_synthesis`], and when Y or Z is shorter than 6 voxels, which the mirroring needs.
    """
    _check(predictions, targets, voided, masks)
    if min(predictions.shape[-2:]) <= RADIUS:
        raise ValueError(
            f"`predictions` have shape {tuple(predictions.shape)}; Y and Z must be at least {RADIUS + 1} voxels."
        )
    inside = masks > 0.5
    bounds, weights, rows = _bounds(voided), gaussian_window(2 * RADIUS + 1), []
    for i in range(len(predictions)):
        m = inside[i, 0]
        if not m.any():
            rows.append(dict.fromkeys(OFFICIAL, torch.tensor(torch.nan, dtype=torch.float64)))
            continue
        # `where`, not a product: what a model left outside the mask may be NaN.
        a, b = (
            scale_to_bounds(torch.where(m, volumes[i], 0).double(), bounds[i : i + 1])[0]
            for volumes in (predictions, targets)
        )
        p, t = a[m], b[m]
        data_range = torch.maximum(a.max() - a.min(), b.max() - b.min())
        planes = m.flatten(1).any(1)  # only these are averaged; each plane is on its own
        padded = [F.pad(volume[planes][:, None], [RADIUS] * 4, mode="reflect") for volume in (a, b)]
        luminance, contrast = ssim_terms(*padded, weights, data_range, 2)
        mse = ((p - t) ** 2).mean()
        width = t.max().clamp(min=0) - t.min().clamp(max=0)
        epsilon = sys.float_info.epsilon
        rows.append(
            {
                "ssim": (luminance * contrast)[:, 0][m[planes]].mean(),
                "mse": mse,
                "rmse": mse.sqrt(),
                "mae": (p - t).abs().mean(),
                "msle": ((p.log1p() - t.log1p()) ** 2).mean(),
                "psnr": 10 * torch.log10(width**2 / mse),
                "psnr_eps": 10 * torch.log10(width**2 / (mse + epsilon)),
                "psnr_01": 10 * torch.log10(1 / mse),
                "psnr_01_eps": 10 * torch.log10(1 / (mse + epsilon)),
            }
        )
    return {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}


def composite_measures(
    predictions: torch.Tensor, targets: torch.Tensor, voided: torch.Tensor, masks: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    The same comparison with the region in its real surroundings: the predicted region is pasted into the real volume,
    the SSIM window is three-dimensional, and the range is 1 whatever the volumes hold. The intensities are mapped to
    [0, 1] by the challenge's bounds, so that the two readings differ in nothing else.

    Args:
        predictions, targets, voided, masks (`torch.Tensor`):
            As in [`local_synthesis`].

    Returns:
        `dict[str, torch.Tensor]`: `ssim`, `mse`, `rmse`, `mae`, `psnr` (dB), and `clipped`, the share of the region
        that the prediction had outside the bounds, which no other figure sees -> `(B,)` in float64. All are NaN for an
        empty mask or a voided volume whose percentiles coincide; `psnr` is infinite for identical regions.

    Raises:
        `ValueError`: as [`local_synthesis`], and when an axis is shorter than the window of 11 voxels.
    """
    _check(predictions, targets, voided, masks)
    bounds = _bounds(voided)
    rows = []
    for i in range(len(predictions)):
        inside = masks[i : i + 1] > 0.5
        box = _box(inside[0, 0])
        low, high = bounds[i].tolist()
        raw = predictions[i : i + 1][box].double()
        x, y = (
            scale_to_bounds(volumes[i : i + 1][box].double(), bounds[i : i + 1]) for volumes in (predictions, targets)
        )
        inside = inside[box]
        mse = masked_rmse(x, y, inside, spatial_dims=3) ** 2
        rows.append(
            {
                "ssim": masked_ssim(x, y, inside, spatial_dims=3),
                "mse": mse,
                "rmse": mse.sqrt(),
                "mae": masked_mae(x, y, inside, spatial_dims=3),
                "psnr": masked_psnr(x, y, inside, spatial_dims=3),
                # NaN where the bounds are no range, as all others.
                "clipped": masked_mae(((raw < low) | (raw > high)).double() + 0 * x, 0 * x, inside, spatial_dims=3),
            }
        )
    return {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}


def _check(predictions: torch.Tensor, targets: torch.Tensor, voided: torch.Tensor, masks: torch.Tensor) -> None:
    check_pair(predictions, targets, masks, spatial_dims=3)
    check_pair(predictions, voided, spatial_dims=3)
    if predictions.shape[1] != 1:
        raise ValueError(
            f"`predictions` have {predictions.shape[1]} channels; the challenge has one, t1n. Measure each contrast "
            "by itself."
        )


def _bounds(voided: torch.Tensor) -> torch.Tensor:
    """The challenge's bounds: percentiles 0.5 and 99.5 of all voxels, the lower one at least 0."""
    bounds = percentile_bounds(voided, 0.5, 99.5)
    bounds[:, 0].clamp_(min=0)
    return bounds


def _box(inside: torch.Tensor) -> tuple[slice, ...]:
    """
    Slices `(batch, channel, x, y, z)` around the mask, with a margin that no window of its voxels sees the end of. A
    margin of the window's full width leaves room for one window even around a corner voxel.
    """
    if not inside.any():
        return (slice(None),) * 5
    ends = [(axis.min().item(), axis.max().item() + 1) for axis in inside.nonzero().unbind(1)]
    return (slice(None), slice(None), *(slice(max(a - 2 * RADIUS, 0), b + 2 * RADIUS) for a, b in ends))


def measure_folders(predictions: str | os.PathLike, data: str | os.PathLike, resamples: int = 2000) -> dict:
    """
    The figures of a folder of predictions, case by case, as the challenge names its files.

    Args:
        predictions (`str` or `os.PathLike`):
            Folder with `{case}-t1n-inference.nii.gz`, anywhere below it.
        data (`str` or `os.PathLike`):
            The challenge's training data: for each case a folder `{case}` with `{case}-t1n.nii.gz`,
            `{case}-t1n-voided.nii.gz` and `{case}-mask-healthy.nii.gz`.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the intervals by patient; the time points of one patient, `BraTS-GLI-00000-000` and `-001`,
            are drawn together.

    Returns:
        `dict`: `cases`, their names; and `brats2023` and `composite`, each measure -> [`Measured`].

    Raises:
        `ValueError`: when there is no prediction, a file of a case is missing, or a volume does not lie where the
            case's `t1n` does.
    """
    files = sorted(Path(predictions).rglob(f"*{PREDICTION}"))
    if not files:
        raise ValueError(f"`predictions` {str(predictions)!r} holds no file named `{{case}}{PREDICTION}`.")
    cases, rows = [], {"brats2023": [], "composite": []}
    for file in tqdm(files, desc="Measuring", unit="case"):
        case = file.name.removesuffix(PREDICTION)
        paths = {name: Path(data, case, f"{case}-{name}.nii.gz") for name in ("t1n", "t1n-voided", "mask-healthy")}
        missing = [str(path) for path in paths.values() if not path.is_file()]
        if missing:
            raise ValueError(f"`data` lacks {missing} for the prediction {file.name}.")
        real = nib.load(paths["t1n"])
        volumes = []
        for path in (file, paths["t1n"], paths["t1n-voided"], paths["mask-healthy"]):
            image = nib.load(path)
            if image.shape != real.shape or not np.allclose(image.affine, real.affine, atol=1e-3):
                raise ValueError(
                    f"{path.name} is {image.shape} and lies elsewhere than {paths['t1n'].name}, {real.shape}; bring "
                    "it to the case's own grid first."
                )
            volumes.append(torch.from_numpy(image.get_fdata(dtype=np.float32))[None, None])
        for mode, figures in local_synthesis(*volumes).items():
            rows[mode].append({name: value.item() for name, value in figures.items()})
        cases.append(case)
    patients = [case.rpartition("-")[0] or case for case in cases]
    measured = {
        mode: {
            name: measured_mean(np.array([figures[name] for figures in of_mode]), patients, resamples=resamples)
            for name in of_mode[0]
        }
        for mode, of_mode in rows.items()
    }
    return {"cases": cases, **measured}
