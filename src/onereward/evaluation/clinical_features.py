"""Clinical features of a region, and how far those of synthetic images lie from those of real ones.

Size, shape, intensity, ratios to the surroundings and texture follow the Image Biomarker Standardisation Initiative
(IBSI, https://huggingface.co/papers/1612.07003); where it leaves a choice, or the usual libraries differ, the
docstring says what is done. A feature that is not defined for an image (an empty region, one grey level) is NaN, and
is counted.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist
from scipy.special import comb
from scipy.stats import kstwo
from tqdm import tqdm

from onereward.data.whole_file import whole_file
from onereward.evaluation.bootstrap import Measured, percentile_interval, resample_cases, weighted_mean
from onereward.evaluation.figures import COLOURS, INK, MUTED, PAPER
from onereward.preferences.raters import holm


MAX_LEVELS = 1024
KINDS = ("ecdf", "violin")


# --- grey levels -----------------------------------------------------------------------------------------------------


def discretise(values: np.ndarray, *, bin_width: float | None = None, bin_number: int | None = None) -> np.ndarray:
    r"""
    Intensities as grey levels 1, 2, ... of a fixed bin width or a fixed bin number (IBSI 2.7).

    - Width `w`: `$\lfloor x / w \rfloor - \lfloor \min x / w \rfloor + 1$`. The edges lie at multiples of `w`, as in
      pyradiomics, so that one intensity has the same edges in every image. For intensities with a meaning: HU, or
      images that were all mapped to [0, 1] with declared bounds.
    - Number `N`: `$\lfloor N (x - \min x) / (\max x - \min x) \rfloor + 1$`, the maximum in level `N`. For arbitrary
      units; contrast and brightness of the whole region drop out.

    Args:
        values (`np.ndarray` of shape `(N,)`):
            Finite intensities of one region.
        bin_width (`float`, *optional*):
            Width of a level, in the unit of the intensities.
        bin_number (`int`, *optional*):
            Number of levels. Give one of the two.

    Returns:
        `np.ndarray` of shape `(N,)` in int64, the lowest level being 1.

    Raises:
        `ValueError`: when not exactly one of the two is given, when it is not positive, or when a width makes more
        than `MAX_LEVELS` levels.

    Example:

    ```python
    >>> discretise(np.array([0.0, 0.1, 0.4, 1.0]), bin_width=0.25)
    array([1, 1, 2, 5])
    >>> discretise(np.array([0.0, 0.1, 0.4, 1.0]), bin_number=4)
    array([1, 1, 2, 4])
    ```
    """
    if (bin_width is None) == (bin_number is None):
        raise ValueError(
            f"`bin_width` is {bin_width} and `bin_number` is {bin_number}; give exactly one of them, and `None` for "
            "the other."
        )
    given, value = ("bin_width", bin_width) if bin_number is None else ("bin_number", bin_number)
    if not value > 0:
        raise ValueError(f"`{given}` is {value}; expected a positive number.")
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return np.zeros(0, np.int64)
    low, high = values.min(), values.max()
    if bin_width is None:
        if high == low:
            return np.ones(len(values), np.int64)
        return np.minimum(np.floor(bin_number * (values - low) / (high - low)) + 1, bin_number).astype(np.int64)
    if (high - low) / bin_width > MAX_LEVELS:
        raise ValueError(
            f"`bin_width` {bin_width} makes {(high - low) / bin_width:.0f} grey levels of intensities from {low:g} to "
            f"{high:g}; at most {MAX_LEVELS} are counted. Take a wider one, such as {(high - low) / 32:.3g}."
        )
    return (np.floor(values / bin_width) - np.floor(low / bin_width) + 1).astype(np.int64)


# --- intensity -------------------------------------------------------------------------------------------------------


def first_order_features(
    values: np.ndarray, *, bin_width: float | None = 1 / 32, bin_number: int | None = None
) -> dict[str, float]:
    r"""
    Statistics of the intensities of one region (IBSI 3.3 and, for entropy and uniformity, 3.4).

    `standard_deviation` and the moments divide by the number of pixels; `kurtosis` is the excess over a Gaussian
    (pyradiomics adds 3); `mean_absolute_deviation` is about the mean; percentiles interpolate linearly. Of the shares
    `$p_i$` of the grey levels, `entropy` is `$-\sum p_i \log_2 p_i$` and `uniformity` `$\sum p_i^2$`.

    Args:
        values (`np.ndarray` of shape `(N,)`):
            Intensities of the region.
        bin_width (`float`, *optional*, defaults to 1/32):
            Width of a grey level, see [`discretise`]. The default is for images in [0, 1].
        bin_number (`int`, *optional*):
            Number of grey levels instead; needs `bin_width=None`.

    Returns:
        `dict[str, float]`: all NaN for an empty region or one with intensities that are not finite; skewness and
        kurtosis NaN for a constant one.

    Example:

    ```python
    >>> first_order_features(np.array([0.0, 0.0, 1.0]), bin_width=0.5)["entropy"]
    0.918...
    ```
    """
    names = (
        "mean standard_deviation skewness kurtosis median percentile_10 percentile_90 interquartile_range minimum "
        "maximum mean_absolute_deviation entropy uniformity"
    ).split()
    x = np.asarray(values, dtype=np.float64).ravel()
    if len(x) == 0 or not np.isfinite(x).all():
        return dict.fromkeys(names, np.nan)
    deviation = x - x.mean()
    variance = np.mean(deviation**2)
    moments = [np.mean(deviation**k) / variance ** (k / 2) if np.ptp(x) > 0 else np.nan for k in (3, 4)]
    p10, p25, median, p75, p90 = np.percentile(x, [10, 25, 50, 75, 90])
    p = np.bincount(discretise(x, bin_width=bin_width, bin_number=bin_number)) / len(x)
    p = p[p > 0]
    figures = (
        *(x.mean(), np.sqrt(variance), moments[0], moments[1] - 3, median, p10, p90, p75 - p25, x.min(), x.max()),
        *(np.abs(deviation).mean(), abs(np.sum(p * np.log2(p))), np.sum(p**2)),
    )
    return dict(zip(names, map(float, figures), strict=True))


def _surroundings(mask: np.ndarray, others: np.ndarray, tissue: np.ndarray, ring: float, spacing) -> np.ndarray:
    """Pixels of tissue outside of every region, no further than `ring` from this one."""
    return (ndimage.distance_transform_edt(~mask, sampling=spacing) <= ring) & tissue & ~others


# --- shape -----------------------------------------------------------------------------------------------------------


def shape_features(mask: np.ndarray, spacing: float | tuple[float, ...] = 1.0) -> dict[str, float]:
    r"""
    Size and shape of one region, which may be in several pieces (IBSI 3.1; in 2-D as pyradiomics' shape2D).

    Its outline is a mesh through the midpoints between pixels inside and outside (marching squares, marching cubes),
    with length or surface `A`. The size is that of the pixels counted, as clinics do, and for small regions a little
    more than that of the mesh, `V`, which `sphericity` uses: `$\sqrt{4 \pi V} / A$` in 2-D and
    `$\sqrt[3]{36 \pi V^2} / A$` in 3-D; IBSI's compactness 2 is its third power. `elongation` is
    `$\sqrt{\lambda_2 / \lambda_1}$` and `flatness` `$\sqrt{\lambda_3 / \lambda_1}$` of the principal axes of the
    pixels' centres: 1 is round, 0 a line or plane. `largest_diameter` is the distance of the two farthest points of
    the outline.

    Args:
        mask (`np.ndarray` of shape `(H, W)` or `(D, H, W)`):
            Nonzero inside the region.
        spacing (`float` or `tuple` of floats, *optional*, defaults to 1.0):
            Size of a pixel along each axis, in mm. Without it lengths are in pixels.

    Returns:
        `dict[str, float]`: in 2-D `area` (mm²), `perimeter` (mm), `sphericity`, `elongation`, `largest_diameter` (mm);
        in 3-D `volume` (mm³), `surface_area` (mm²), `sphericity`, `elongation`, `flatness`, `largest_diameter`. Of an
        empty region the size is 0 and all else NaN; of a single pixel elongation and flatness are NaN.

    Raises:
        `ValueError`: when the mask is not 2-D or 3-D, or the spacing is not positive or has another number of axes.

    Example:

    ```python
    >>> disc = np.hypot(*np.mgrid[-20:21, -20:21]) <= 15
    >>> shape_features(disc, spacing=0.5)["largest_diameter"]
    15.5...
    ```
    """
    mask = np.asarray(mask) != 0
    spacing = _spacing(spacing, mask.ndim)
    flat = mask.ndim == 2
    names = (
        ["area", "perimeter", "sphericity", "elongation", "largest_diameter"]
        if flat
        else ["volume", "surface_area", "sphericity", "elongation", "flatness", "largest_diameter"]
    )
    if not mask.any():
        return dict.fromkeys(names, np.nan) | {names[0]: 0.0}
    mask = np.pad(mask[_box(mask)], 1)
    outline, inside = _marching_squares(mask, spacing) if flat else _marching_cubes(mask, spacing)
    sphericity = np.sqrt(4 * np.pi * inside) / outline if flat else np.cbrt(36 * np.pi * inside**2) / outline
    centres = np.argwhere(mask) * spacing
    axes = np.clip(np.linalg.eigvalsh(np.atleast_2d(np.cov(centres.T, bias=True)))[::-1], 0, None)
    ratios = np.sqrt(axes[1:] / axes[0]) if axes[0] > 0 else np.full(mask.ndim - 1, np.nan)
    figures = (mask.sum() * spacing.prod(), outline, sphericity, *ratios, _largest_diameter(mask, spacing))
    return dict(zip(names, map(float, figures), strict=True))


def _spacing(spacing, ndim: int) -> np.ndarray:
    if ndim not in (2, 3):
        raise ValueError(f"The mask has {ndim} axes; expected (H, W) or (D, H, W). Take one channel of one image.")
    sizes = np.broadcast_to(spacing, ndim).astype(float) if np.size(spacing) in (1, ndim) else np.zeros(0)
    if len(sizes) != ndim or not (sizes > 0).all():
        raise ValueError(f"`spacing` is {spacing}; expected one positive number, or {ndim}, one for each axis.")
    return sizes


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all of a mask that is not empty."""
    return ndimage.find_objects(mask.astype(np.int8))[0]


def _largest_diameter(mask: np.ndarray, spacing: np.ndarray) -> float:
    points = []
    for axis in range(mask.ndim):
        midpoints = np.argwhere(np.diff(mask, axis=axis)).astype(float)
        midpoints[:, axis] += 0.5
        points.append(midpoints)
    points = np.concatenate(points) * spacing
    try:
        points = points[ConvexHull(points).vertices]
    except QhullError:  # too few or too flat for a hull; then they are few
        pass
    return float(pdist(points).max())


def _marching_squares(mask: np.ndarray, spacing: np.ndarray) -> tuple[float, float]:
    """Length and area of the outline; corners that touch by a diagonal only are kept apart."""
    top_left, top_right, bottom_left, bottom_right = mask[:-1, :-1], mask[:-1, 1:], mask[1:, :-1], mask[1:, 1:]
    corners = top_left.astype(int) + top_right + bottom_left + bottom_right
    diagonal = (corners == 2) & (top_left == bottom_right)
    cuts = np.isin(corners, (1, 3)).sum() + 2 * diagonal.sum()
    across = ((corners == 2) & (top_left == top_right)).sum()
    down = ((corners == 2) & (top_left == bottom_left)).sum()
    length = cuts * np.hypot(*spacing) / 2 + across * spacing[1] + down * spacing[0]
    area = np.array([0, 1 / 8, 1 / 2, 7 / 8, 1])[corners].sum() - diagonal.sum() / 4
    return float(length), float(area * spacing.prod())


@cache
def _cube_triangles() -> list[np.ndarray]:
    """
    The triangles `(T, 3, 3)` of the surface in a cube, for each of the 256 ways in which its corners lie inside.

    Lorensen and Cline, Marching Cubes, SIGGRAPH 1987 (https://doi.org/10.1145/37401.37422), derived instead of tabled:
    on each face, lines between midpoints of edges cut off each run of corners that are inside; the lines of the six
    faces close to loops, which are filled with triangles. Where a loop is not flat, the filling bulges away from the
    rarer kind of corner, as in the original table. Corners that touch by a diagonal are kept apart on both sides of a
    face, so that the surface has no holes.
    """
    corners = list(product((0, 1), repeat=3))
    faces = []
    for axis, side in product(range(3), (0, 1)):
        cycle = [np.roll((side, *other), axis) for other in ((0, 0), (1, 0), (1, 1), (0, 1))]
        faces.append([corners.index(tuple(corner)) for corner in (cycle if side else cycle[::-1])])
    table = []
    for case in range(256):
        inside = [case >> corner & 1 for corner in range(8)]
        following = {}
        for face in faces:
            for k in range(4):
                if inside[face[k]] and not inside[face[k - 1]]:
                    end = next(n for n in range(k, k + 4) if not inside[face[(n + 1) % 4]])
                    start = frozenset((face[k - 1], face[k]))
                    following[start] = frozenset((face[end % 4], face[(end + 1) % 4]))
        triangles = []
        while following:
            edge, loop = next(iter(following)), []
            while edge in following:
                loop.append(np.mean([corners[corner] for corner in edge], axis=0))
                edge = following.pop(edge)
            fillings = [np.array(loop)[filling] for filling in _fillings(0, len(loop) - 1)]
            volumes = [np.linalg.det(filling).sum() for filling in fillings]
            outward = sum(inside) <= 4
            triangles.append(fillings[int(np.argmax(volumes) if outward else np.argmin(volumes))])
        table.append(np.concatenate(triangles) if triangles else np.zeros((0, 3, 3)))
    return table


def _fillings(first: int, last: int) -> list[list[tuple[int, int, int]]]:
    """All ways to cut the polygon of the corners `first` to `last` into triangles."""
    if last - first < 2:
        return [[]]
    return [
        [*left, *right, (first, middle, last)]
        for middle in range(first + 1, last)
        for left in _fillings(first, middle)
        for right in _fillings(middle, last)
    ]


def _marching_cubes(mask: np.ndarray, spacing: np.ndarray) -> tuple[float, float]:
    """Surface and volume of the mesh; the volume by the divergence theorem."""
    codes = np.zeros(np.subtract(mask.shape, 1), np.int64)
    for bit, corner in enumerate(product((0, 1), repeat=3)):
        codes |= (
            mask[tuple(slice(c, c + size) for c, size in zip(corner, codes.shape, strict=True))].astype(int) << bit
        )
    surface, volume, triangles = 0.0, 0.0, _cube_triangles()
    for code in np.setdiff1d(codes, (0, 255)):
        a, b, c = np.moveaxis((np.argwhere(codes == code)[:, None, None] + triangles[code]) * spacing, 2, 0)
        normals = np.cross(b - a, c - a)
        surface += np.linalg.norm(normals, axis=-1).sum() / 2
        volume += (a * normals).sum() / 6
    return float(surface), float(abs(volume))


# --- texture ---------------------------------------------------------------------------------------------------------


def co_occurrences(levels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    How often two grey levels are neighbours inside a region, in each direction (Haralick et al. 1973, IEEE
    Transactions on Systems, Man, and Cybernetics 3(6); IBSI 3.6): Chebyshev distance 1, counted both ways.

    Args:
        levels (`np.ndarray` of shape `(H, W)` or `(D, H, W)`):
            Grey levels from 1, see [`discretise`].
        mask (`np.ndarray` of the same shape):
            True inside the region; a pair counts when both lie inside.

    Returns:
        `np.ndarray` of shape `(4 or 13, G, G)` in float64: counts, symmetric, for `G` levels.

    Example:

    ```python
    >>> co_occurrences(np.array([[1, 2], [1, 2]]), np.ones((2, 2), bool)).sum(0)
    array([[2., 4.],
           [4., 2.]])
    ```
    """
    levels, mask = np.asarray(levels), np.asarray(mask, dtype=bool)
    size = int(levels[mask].max()) if mask.any() else 0
    matrices = []
    for offset in product((-1, 0, 1), repeat=mask.ndim):
        if offset <= (0,) * mask.ndim:  # the way back is the transpose
            continue
        here = tuple(slice(max(0, -step), n - max(0, step)) for step, n in zip(offset, mask.shape, strict=True))
        there = tuple(slice(max(0, step), n - max(0, -step)) for step, n in zip(offset, mask.shape, strict=True))
        both = mask[here] & mask[there]
        pairs = (levels[here][both] - 1) * size + levels[there][both] - 1
        counts = np.bincount(pairs, minlength=size * size).reshape(size, size).astype(np.float64)
        matrices.append(counts + counts.T)
    return np.stack(matrices)


def co_occurrence_features(counts: np.ndarray) -> dict[str, float]:
    r"""
    Texture from one co-occurrence matrix (IBSI 3.6), with `$p_{ij}$` the share of each pair of levels:

    | name | formula | IBSI's name |
    |---|---|---|
    | `contrast` | `$\sum (i-j)^2 p_{ij}$` | contrast |
    | `dissimilarity` | `$\sum \lvert i-j \rvert p_{ij}$` | dissimilarity |
    | `homogeneity` | `$\sum p_{ij} / (1 + (i-j)^2)$` | inverse difference moment |
    | `energy` | `$\sum p_{ij}^2$` | angular second moment (scikit-image's energy is its root) |
    | `correlation` | `$\sum (i-\mu)(j-\mu) p_{ij} / \sigma^2$` | correlation |
    | `entropy` | `$-\sum p_{ij} \log_2 p_{ij}$` | joint entropy |

    Args:
        counts (`np.ndarray` of shape `(G, G)`):
            A symmetric matrix of counts.

    Returns:
        `dict[str, float]`: all NaN without a pair; `correlation` NaN for one grey level, where scikit-image and
        pyradiomics say 1.
    """
    names = ["contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy"]
    if not counts.sum() > 0:
        return dict.fromkeys(names, np.nan)
    p = counts / counts.sum()
    level = np.arange(1, len(p) + 1)
    gap, marginal = np.abs(np.subtract.outer(level, level)), p.sum(1)
    deviation = level - marginal @ level
    variance = marginal @ deviation**2
    correlation = deviation @ p @ deviation / variance if np.count_nonzero(marginal) > 1 else np.nan
    positive = p[p > 0]
    entropy = abs(np.sum(positive * np.log2(positive)))
    figures = (p * gap**2).sum(), (p * gap).sum(), (p / (1 + gap**2)).sum(), (p**2).sum(), correlation, entropy
    return dict(zip(names, map(float, figures), strict=True))


def texture_features(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    bin_width: float | None = 1 / 32,
    bin_number: int | None = None,
    merge: bool = True,
) -> dict[str, float]:
    """
    Grey-level co-occurrence texture of one region: [`discretise`], [`co_occurrences`], [`co_occurrence_features`].

    Args:
        image (`np.ndarray` of shape `(H, W)` or `(D, H, W)`):
            Intensities. The neighbours of a volume are those of the grid, whatever its spacing: resample thick slices
            first, as IBSI asks.
        mask (`np.ndarray` of the same shape):
            True inside the region.
        bin_width (`float`, *optional*, defaults to 1/32):
            Width of a grey level, for images in [0, 1].
        bin_number (`int`, *optional*):
            Number of grey levels instead; needs `bin_width=None`.
        merge (`bool`, *optional*, defaults to `True`):
            Whether the directions are counted together (IBSI's "merged", which also small regions can fill) or their
            features averaged ("averaged", as in pyradiomics).

    Returns:
        `dict[str, float]`, see [`co_occurrence_features`].

    Example:

    ```python
    >>> texture_features(np.eye(4), np.ones((4, 4), bool), bin_width=None, bin_number=2)["energy"]
    0.377...
    ```
    """
    image, mask = np.asarray(image, dtype=np.float64), np.asarray(mask) != 0
    if not mask.any() or not np.isfinite(image[mask]).all():
        return co_occurrence_features(np.zeros((1, 1)))
    box = _box(mask)
    image, mask = image[box], mask[box]
    levels = np.zeros(mask.shape, np.int64)
    levels[mask] = discretise(image[mask], bin_width=bin_width, bin_number=bin_number)
    counts = co_occurrences(levels, mask)
    if merge:
        return co_occurrence_features(counts.sum(0))
    directions = [co_occurrence_features(matrix) for matrix in counts if matrix.sum() > 0]
    if not directions:
        return co_occurrence_features(counts.sum(0))
    return {name: float(np.mean([features[name] for features in directions])) for name in directions[0]}


# --- one image, many images ------------------------------------------------------------------------------------------


def label_regions(label_map: np.ndarray, labels: dict[str, int]) -> dict[str, np.ndarray]:
    """
    The region of each label but the background.

    Args:
        label_map (`np.ndarray` of shape `(H, W)` or `(D, H, W)`):
            Integer label map: what a segmenter found, or what was asked for.
        labels (`dict[str, int]`):
            Name and value of each label; value 0 is background.

    Returns:
        `dict[str, np.ndarray]` of bool, as [`region_features`] wants it.

    Example:

    ```python
    >>> label_regions(np.array([[0, 2]]), {"background": 0, "ED": 2})
    {'ED': array([[False,  True]])}
    ```
    """
    return {name: np.asarray(label_map) == value for name, value in labels.items() if value}


def region_features(
    image: np.ndarray,
    regions: dict[str, np.ndarray],
    *,
    spacing: float | tuple[float, ...] = 1.0,
    tissue: np.ndarray | None = None,
    ring: float = 5.0,
    bin_width: float | None = 1 / 32,
    bin_number: int | None = None,
) -> dict[str, float]:
    """
    All clinical features of the regions of one image.

    Args:
        image (`np.ndarray` of shape `(H, W)` or `(D, H, W)`):
            Grey intensities, all images on one scale (a colour image: its luminance, or one channel).
        regions (`dict[str, np.ndarray]`):
            Name and mask of each region, of the image's shape: `{"lesion": mask}`, or [`label_regions`].
        spacing (`float` or `tuple` of floats, *optional*, defaults to 1.0):
            Size of a pixel along each axis in mm.
        tissue (`np.ndarray`, *optional*):
            Where there is tissue. Defaults to intensities above 0, which is right for skull-stripped heads.
        ring (`float`, *optional*, defaults to 5.0):
            Width in mm of the surroundings a region is compared with: tissue that belongs to no region.
        bin_width (`float`, *optional*, defaults to 1/32):
            Width of a grey level, for images in [0, 1]; see [`discretise`].
        bin_number (`int`, *optional*):
            Number of grey levels instead; needs `bin_width=None`.

    Returns:
        `dict[str, float]`: `{region}/shape/...` ([`shape_features`]), `{region}/intensity/...`
        ([`first_order_features`]), `{region}/texture/...` ([`texture_features`], directions merged),
        `{region}/ratio/surroundings` and `{region}/ratio/{other region}`: quotients of mean intensities, NaN where
        either is missing or the second is 0.

    Raises:
        `ValueError`: when there is no region, or one has another shape than the image.

    Example:

    ```python
    >>> image = np.full((32, 32), 0.5)
    >>> lesion = np.zeros((32, 32), bool)
    >>> lesion[10:20, 10:20] = True
    >>> region_features(image + 0.25 * lesion, {"lesion": lesion})["lesion/ratio/surroundings"]
    1.5
    ```
    """
    image = np.asarray(image, dtype=np.float64)
    masks = {name: np.asarray(mask) != 0 for name, mask in regions.items()}
    if not masks:
        raise ValueError("`regions` is empty; expected the name and mask of at least one region.")
    for name, mask in masks.items():
        if mask.shape != image.shape:
            raise ValueError(
                f"The region {name!r} is {mask.shape} but `image` is {image.shape}; expected one shape, (H, W) or "
                "(D, H, W). Turn a colour image grey first."
            )
    sizes = _spacing(spacing, image.ndim)
    tissue = image > 0 if tissue is None else np.asarray(tissue) != 0
    anywhere = np.any(list(masks.values()), axis=0)
    bins = {"bin_width": bin_width, "bin_number": bin_number}

    def ratio(mask, to):
        below = image[to].mean() if to.any() else 0.0
        return float(image[mask].mean() / below) if mask.any() and below != 0 else np.nan

    features = {}
    for name, mask in masks.items():
        families = {
            "shape": shape_features(mask, sizes),
            "intensity": first_order_features(image[mask], **bins),
            "texture": texture_features(image, mask, **bins),
        }
        for family, figures in families.items():
            features |= {f"{name}/{family}/{key}": value for key, value in figures.items()}
        features[f"{name}/ratio/surroundings"] = np.nan
        if mask.any():
            reach = np.ceil(ring / sizes).astype(int)
            box = tuple(
                slice(max(0, part.start - r), part.stop + r) for part, r in zip(_box(mask), reach, strict=True)
            )
            around = np.zeros(mask.shape, bool)
            around[box] = _surroundings(mask[box], anywhere[box], tissue[box], ring, sizes)
            features[f"{name}/ratio/surroundings"] = ratio(mask, around)
    for a, b in combinations(masks, 2):
        features[f"{a}/ratio/{b}"] = ratio(masks[a], masks[b])
    return features


def feature_table(
    images: Iterable[np.ndarray],
    regions: Iterable[dict[str, np.ndarray]],
    *,
    description: str = "Clinical features",
    **settings,
) -> dict[str, np.ndarray]:
    """
    [`region_features`] of many images, read one after the other.

    Args:
        images (`Iterable[np.ndarray]`):
            Grey images.
        regions (`Iterable[dict[str, np.ndarray]]`):
            Regions of each, the same names in every image; a mask may be empty.
        description (`str`, *optional*, defaults to `"Clinical features"`):
            Label of the progress bar.
        settings:
            Passed to [`region_features`]; the same for real and synthetic images.

    Returns:
        `dict[str, np.ndarray]` of shape `(N,)`: each feature, NaN where it is not defined.

    Raises:
        `ValueError`: when there is no image, or the images differ in the names of their regions.
    """
    rows = [
        region_features(image, region, **settings)
        for image, region in zip(tqdm(images, desc=description, leave=False), regions, strict=True)
    ]
    if not rows:
        raise ValueError("`images` is empty; expected at least one image.")
    odd = next((i for i, row in enumerate(rows) if row.keys() != rows[0].keys()), None)
    if odd is not None:
        raise ValueError(
            f"Image {odd} has other regions than image 0 ({sorted(rows[odd].keys() ^ rows[0].keys())[0]!r} is in one "
            "only); name the same regions for every image, with an empty mask where one is absent."
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


# --- real against synthetic ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureComparison:
    """
    One feature of real against synthetic images.

    Args:
        real, synthetic ([`Measured`]):
            Mean of each, in the unit of the feature.
        distance ([`Measured`]):
            Wasserstein-1 distance of the two distributions in real standard deviations.
        floor ([`Measured`]):
            The same distance between two draws of real cases, as many as were compared: its mean, and the range of 95
            in 100 draws. A distance within the range is what real images score against real ones.
        ks ([`Measured`]):
            Kolmogorov-Smirnov distance: the largest gap between the two cumulative distributions, in [0, 1].
        p_value (`float`):
            Of the Kolmogorov-Smirnov test, each case counted once.
        p_holm (`float`):
            The same after Holm's correction for all features compared.
        undefined_real, undefined_synthetic (`int`):
            Images where the feature is not defined, and which are left out of all of the above.
        verdict (`str`):
            "differs" where `p_holm` is below 0.05, else "no difference found", or "not measured".
    """

    real: Measured
    synthetic: Measured
    distance: Measured
    floor: Measured
    ks: Measured
    p_value: float
    p_holm: float
    undefined_real: int
    undefined_synthetic: int
    verdict: str


def cdf_distances(
    real: np.ndarray,
    synthetic: np.ndarray,
    real_weights: np.ndarray | None = None,
    synthetic_weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Two distances between samples, from their cumulative distributions: Wasserstein-1,
    `$\int \lvert F(x) - G(x) \rvert dx$` (Vallender 1974, https://doi.org/10.1137/1118101), and Kolmogorov-Smirnov,
    `$\max \lvert F(x) - G(x) \rvert$`.

    Args:
        real (`np.ndarray` of shape `(n,)`):
            Finite values.
        synthetic (`np.ndarray` of shape `(m,)`):
            Finite values.
        real_weights (`np.ndarray` of shape `(..., n)`, *optional*):
            How often each counts: resamples of a bootstrap. Defaults to once.
        synthetic_weights (`np.ndarray` of shape `(..., m)`, *optional*):
            The same of the others.

    Returns:
        `tuple[np.ndarray, np.ndarray]` of the weights' leading shape: Wasserstein-1 in the unit of the values, and
        Kolmogorov-Smirnov; NaN where all weights of one side are zero.

    Example:

    ```python
    >>> cdf_distances(np.array([0.0, 1.0]), np.array([3.0, 4.0]))
    (np.float64(3.0), np.float64(1.0))
    ```
    """
    u = np.ones(len(real)) if real_weights is None else np.asarray(real_weights, dtype=np.float64)
    v = np.ones(len(synthetic)) if synthetic_weights is None else np.asarray(synthetic_weights, dtype=np.float64)
    values = np.concatenate([real, synthetic])
    order = np.argsort(values, kind="stable")
    widths = np.diff(values[order])
    total_u, total_v = u.sum(-1, keepdims=True), v.sum(-1, keepdims=True)
    # Over a common denominator counts stay whole numbers, and the gap of equal samples is 0, not 1e-17.
    steps = np.concatenate([u * total_v, -v * total_u], axis=-1)[..., order[:-1]]
    gap = np.abs(np.cumsum(steps, axis=-1, out=steps), out=steps)
    with np.errstate(invalid="ignore"):
        scale = total_u[..., 0] * total_v[..., 0]
        return gap @ widths / scale, gap[..., widths > 0].max(-1, initial=0.0) / scale


def kolmogorov_smirnov_p_value(distance: float, n: int, m: int) -> float:
    r"""
    How often two samples of one continuous distribution lie at least this far apart: up to 1,000 values together by
    counting the paths of a grid that stay within the distance (J. L. Hodges, The Significance Probability of the
    Smirnov Two-Sample Test, Arkiv för Matematik 3, 1958, https://doi.org/10.1007/BF02589501), with more by the
    one-sample distribution for `$nm / (n + m)$` values. With ties it is too high, never too low.

    Args:
        distance (`float`):
            The Kolmogorov-Smirnov distance, in [0, 1].
        n, m (`int`):
            Independent values in each sample, at least 1.

    Returns:
        `float`: the p-value.

    Example:

    ```python
    >>> kolmogorov_smirnov_p_value(1.0, 5, 5)
    0.0079...
    ```
    """
    if n + m > 1000:
        return float(np.clip(kstwo.sf(distance, round(n * m / (n + m))), 0, 1))
    share = np.arange(m + 1) / m
    paths = np.cumprod(share < distance - 1e-9).astype(float)
    for i in range(1, n + 1):
        near = np.abs(share - i / n) < distance - 1e-9
        paths = np.where(near, np.cumsum(np.where(near, paths, 0)), 0)
    return float(np.clip(1 - paths[-1] / comb(n + m, n), 0, 1))


def compare_features(
    real: dict[str, np.ndarray],
    synthetic: dict[str, np.ndarray],
    real_cases: list[str],
    synthetic_cases: list[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, FeatureComparison]:
    """
    Compares the distribution of every feature.

    Intervals resample cases; a case that has real and synthetic images is drawn with both. Those of the distances are
    moved by the bootstrap's own estimate of their bias, because resamples lie further apart than samples, and cut off
    at 0. The test takes the gap of all images with the number of cases, not of images: the usual test for one image
    a case, and else a cautious one; cautious, too, where real and synthetic images are of the same cases.

    Args:
        real (`dict[str, np.ndarray]`):
            [`feature_table`] of the real images.
        synthetic (`dict[str, np.ndarray]`):
            That of the synthetic images, with the same settings.
        real_cases (`list[str]`):
            Case of each real image.
        synthetic_cases (`list[str]`):
            Case of each synthetic image: of the one its condition came from, if any; else one of its own.
        resamples (`int`, *optional*, defaults to 1000):
            Resamples of the bootstrap, and draws of the floor.
        seed (`int`, *optional*, defaults to 0):
            Seed of both.

    Returns:
        `dict[str, FeatureComparison]` in the order of `real`.

    Raises:
        `ValueError`: when the two have other features, or the cases another number than the images.

    Example:

    ```python
    >>> rng = np.random.default_rng(0)
    >>> real, brighter = ({"lesion/intensity/mean": rng.normal(m, 0.1, 100)} for m in (0.5, 0.6))
    >>> cases = [str(i) for i in range(100)]
    >>> compare_features(real, brighter, cases, cases)["lesion/intensity/mean"].verdict
    'differs'
    ```
    """
    if real.keys() != synthetic.keys():
        raise ValueError(
            f"`real` and `synthetic` differ in features such as {sorted(real.keys() ^ synthetic.keys())[0]!r}; "
            "measure both with the same regions and settings."
        )
    for side, table, cases in (("real", real, real_cases), ("synthetic", synthetic, synthetic_cases)):
        for name, values in table.items():
            if len(values) != len(cases):
                raise ValueError(
                    f"`{side}_cases` has {len(cases)} entries but `{side}[{name!r}]` {len(values)}; expected one case "
                    "for each image."
                )
    real_cases, synthetic_cases = np.asarray(real_cases, dtype=str), np.asarray(synthetic_cases, dtype=str)
    together = resample_cases([*real_cases, *synthetic_cases], resamples, seed)
    draws = (
        together[:, : len(real_cases)],
        together[:, len(real_cases) :],
        _draw_cases(real_cases, len(np.unique(real_cases)), resamples, seed + 1),
        _draw_cases(real_cases, len(np.unique(synthetic_cases)), resamples, seed + 2),
    )
    measured = {}
    for name in real:
        a, b = np.asarray(real[name], dtype=float), np.asarray(synthetic[name], dtype=float)
        measured[name] = _compare(a, b, real_cases, synthetic_cases, draws)
    p_values = np.array([comparison["p_value"] for comparison in measured.values()])
    adjusted = np.full(len(p_values), np.nan)
    adjusted[np.isfinite(p_values)] = holm(p_values[np.isfinite(p_values)])
    return {
        name: FeatureComparison(
            **comparison,
            p_holm=float(p),
            verdict="not measured" if np.isnan(p) else "differs" if p < 0.05 else "no difference found",
        )
        for (name, comparison), p in zip(measured.items(), adjusted, strict=True)
    }


def _compare(a, b, a_cases, b_cases, draws) -> dict:
    """All of a [`FeatureComparison`] but what needs the other features. `draws` of cases: real and synthetic together,
    and twice real ones for the floor."""
    in_a, in_b = np.isfinite(a), np.isfinite(b)
    x, y, n = a[in_a], b[in_b], int(in_a.sum() + in_b.sum())
    u, v, first, second = (d[:, kept] for d, kept in zip(draws, (in_a, in_b, in_a, in_a), strict=True))
    cases_a, cases_b = len(np.unique(a_cases[in_a])), len(np.unique(b_cases[in_b]))
    undefined_a, undefined_b = int((~in_a).sum()), int((~in_b).sum())
    result = {
        "real": _mean(x, u, cases_a, undefined_a),
        "synthetic": _mean(y, v, cases_b, undefined_b),
        "undefined_real": undefined_a,
        "undefined_synthetic": undefined_b,
    }

    def not_measured(why):
        return Measured(np.nan, np.nan, np.nan, n, undefined_a + undefined_b, why)

    if min(cases_a, cases_b) < 2:
        nothing = not_measured("fewer than two cases on one side")
        return result | {"distance": nothing, "floor": nothing, "ks": nothing, "p_value": np.nan}

    note = "" if min(cases_a, cases_b) >= 20 else "a rough interval: few cases"
    w1, ks = (float(distance) for distance in cdf_distances(x, y))
    distances, gaps = _in_parts(x, y, u, v)
    result["ks"] = Measured(ks, *_shifted_interval(ks, gaps, 1.0), n, undefined_a + undefined_b, note)
    result["p_value"] = kolmogorov_smirnov_p_value(ks, cases_a, cases_b)
    scale = float(x.std())
    if scale <= 1e-12 * np.abs(x).max():
        constant = not_measured("the real values do not vary")
        return result | {"distance": constant, "floor": constant}
    with np.errstate(invalid="ignore", divide="ignore"):
        distances = distances / _weighted_std(x, u)
    floors = _in_parts(x, x, first, second)[0] / scale
    interval = _shifted_interval(w1 / scale, distances, np.inf)
    result["distance"] = Measured(w1 / scale, *interval, n, undefined_a + undefined_b, note)
    floors = floors[np.isfinite(floors)]
    floor = float(floors.mean()) if len(floors) else np.nan
    note = f"between two draws of real cases, {cases_a} and {cases_b}"
    result["floor"] = Measured(floor, *percentile_interval(floors), len(x), undefined_a, note)
    return result


def _mean(values: np.ndarray, weights: np.ndarray, cases: int, failed: int) -> Measured:
    """[`measured_mean`] with draws that are at hand."""
    if len(values) == 0:
        return Measured(np.nan, np.nan, np.nan, 0, failed, "there is nothing to measure it on")
    low, high = percentile_interval(weighted_mean(values, weights)) if cases > 1 else (np.nan, np.nan)
    note = "no interval: a single case" if cases == 1 else "a rough interval: few cases" if cases < 20 else ""
    return Measured(float(values.mean()), low, high, len(values), failed, note)


def _in_parts(x, y, u, v, rows: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """[`cdf_distances`] of many resamples without many copies of them in memory."""
    parts = [cdf_distances(x, y, u[i : i + rows], v[i : i + rows]) for i in range(0, len(u), rows)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _draw_cases(cases: np.ndarray, number: int, resamples: int, seed: int) -> np.ndarray:
    """Like [`resample_cases`], but `number` cases."""
    names, case_of_row = np.unique(cases, return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(number, np.full(len(names), 1 / len(names)), size=resamples)[:, case_of_row].astype(float)


def _weighted_std(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    centred = x - x.mean()
    return np.sqrt(np.maximum(weighted_mean(centred**2, weights) - weighted_mean(centred, weights) ** 2, 0))


def _shifted_interval(value: float, samples: np.ndarray, highest: float) -> tuple[float, float]:
    samples = samples[np.isfinite(samples)]
    if len(samples) == 0:
        return float("nan"), float("nan")
    low, high = np.clip(np.array(percentile_interval(samples)) - (np.median(samples) - value), 0, highest)
    return float(min(low, value)), float(max(high, value))


# --- picture ---------------------------------------------------------------------------------------------------------


def feature_figure(
    real: dict[str, np.ndarray],
    synthetic: dict[str, np.ndarray],
    path: str | os.PathLike,
    *,
    comparisons: dict[str, FeatureComparison] | None = None,
    features: list[str] | None = None,
    kind: str = "ecdf",
    columns: int = 4,
) -> None:
    """
    Draws the distribution of each feature, real and synthetic, in a grid.

    Args:
        real (`dict[str, np.ndarray]`):
            [`feature_table`] of the real images.
        synthetic (`dict[str, np.ndarray]`):
            That of the synthetic images.
        path (`str` or `os.PathLike`):
            PNG file to write.
        comparisons (`dict[str, FeatureComparison]`, *optional*):
            Result of [`compare_features`], whose distance, floor and verdict are written above each panel.
        features (`list[str]`, *optional*):
            Which features, in this order; all when not given.
        kind (`str`, *optional*, defaults to `"ecdf"`):
            `"ecdf"`: cumulative shares, nothing smoothed; `"violin"`: smoothed densities with medians.
        columns (`int`, *optional*, defaults to 4):
            Panels in a line.

    Raises:
        `ValueError`: when the kind or a feature is not known, or there is no feature.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}; expected one of {KINDS}.")
    features = list(real) if features is None else list(features)
    unknown = [name for name in features if name not in real or name not in synthetic]
    if unknown or not features:
        raise ValueError(f"`features` is {unknown or features}; expected some of {list(real)}.")
    columns = min(columns, len(features))
    lines = -(-len(features) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * lines + 0.5), dpi=100, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    colours = {"real": COLOURS[4], "synthetic": COLOURS[0]}
    for axes, name in zip(panels, features, strict=False):
        for place, (side, table) in enumerate((("real", real), ("synthetic", synthetic))):
            values = np.sort(np.asarray(table[name], dtype=float))
            values = values[np.isfinite(values)]
            if len(values) == 0:
                continue
            if kind == "ecdf":
                shares = np.arange(len(values) + 1) / len(values)
                line = {"color": colours[side], "linewidth": 1.6, "label": side}
                axes.step(np.concatenate([values[:1], values]), shares, where="post", **line)
            else:
                parts = axes.violinplot([values], positions=[place], widths=0.8, showextrema=False, showmedians=True)
                for part in (*parts["bodies"], parts["cmedians"]):
                    part.set_color(colours[side])
        if kind == "violin":
            axes.set_xticks([0, 1], ["real", "synthetic"])
            axes.set_xlim(-0.6, 1.6)
        else:
            axes.set_ylim(0, 1)
        title = name.replace("_", " ")
        axes.set_title(title, loc="left", fontsize=9, weight="bold", color=INK, pad=6 if comparisons is None else 16)
        if comparisons is not None:
            found = comparisons[name]
            text = f"W1 {found.distance.value:.2f} (floor {found.floor.value:.2f}); {found.verdict}"
            place = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 5), "textcoords": "offset points"}
            axes.annotate(text, **place, fontsize=7.5, color=MUTED)
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(features) :]:
        axes.set_axis_off()
    if kind == "ecdf":
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("Research use only, not for clinical use.", fontsize=8, color=MUTED, x=0.995, ha="right")
    with whole_file(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
