"""How far generated images are from real ones as a distribution, next to how far real ones are from each other.

| measure | better | what it is |
|---|---|---|
| `frechet` | lower | Frechet distance of Gaussians fitted to the features (with Inception's it would be FID) |
| `kid` | lower | kernel distance with KID's cubic kernel |
| `mmd` | lower | squared maximum mean discrepancy with a Gaussian kernel, bandwidth from the real images alone |
| `precision`, `density` | higher | are generated images where real ones are? |
| `recall`, `coverage` | higher | are there generated images where real ones are? |
| `diversity` | as real | mean distance of two images of different cases |
| `vendi` | as real | effective number of different images |

**The floor.** A Frechet distance of 50 of real images of 100 cases to real images of another 100 is quite usual, and a
precision of 1 is out of reach for real images too. Cases are therefore halved at random, many times: half A of the
generated and half B of the real images give `matched`, half A and half B of the real ones the `floor`. Both rest on
as many images, and in neither do the two sides share a case, whose background a repainted image has from its source.
`excess` is their difference with its interval: where it holds 0, generated images are as far from real ones as real
ones are. `value`, of all images, is the figure as papers give it.

**Intervals.** A bootstrap with replacement puts copies of a row at distance 0 of each other: they shrink every k-NN
ball, and a covariance or an entropy loses rank. The interval therefore comes from the same halves of the cases, drawn
without replacement. About the statistic of all cases, a mean over half of them has just the variance that the mean of
all has about the truth, `(2/n - 1/n) s^2` (balanced half-samples: McCarthy 1969, Rev. Int. Stat. Inst. 37(3);
subsampling: Politis & Romano 1994, Ann. Stat. 22(4)), so that the spread of the halves about their own mean needs no
factor. It is an interval for what such a sample gives on average, its bias by size included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from onereward.evaluation.bootstrap import Measured, percentile_interval, resample_cases, weighted_mean
from onereward.evaluation.features import FeatureSet
from onereward.evaluation.metrics import kernel_distance, polynomial_kernel, ssim


# What a measure cannot leave, whatever its interval's arithmetic says.
BOUNDS = {
    "frechet": (0, np.inf),
    "precision": (0, 1),
    "recall": (0, 1),
    "density": (0, np.inf),
    "coverage": (0, 1),
    "diversity": (0, np.inf),
    "vendi": (1, np.inf),
}


def frechet_distance(features: torch.Tensor, references: torch.Tensor) -> float:
    r"""
    Frechet distance of the Gaussians with the means and covariances of two sets of features
    ([FID](https://huggingface.co/papers/1706.08500) on features of your own):

    `$|\mu_x - \mu_y|^2 + \mathrm{tr}(S_x) + \mathrm{tr}(S_y) - 2\,\mathrm{tr}((S_x S_y)^{1/2})$`

    The last trace is the sum of the singular values of `$S_x^{1/2} S_y^{1/2}$`, with the roots by `eigh`: no complex
    numbers, no offset for singular covariances, equal to MONAI's `FIDMetric` where that is well conditioned.

    Args:
        features (`torch.Tensor`):
            Features of shape `(m, d)`.
        references (`torch.Tensor`):
            Features of shape `(n, d)`.

    Returns:
        `float`: at least 0 but for rounding; NaN with fewer than two rows on either side. Its bias is about
        proportional to `d (1/m + 1/n)`: without ten rows a dimension it says little.

    Example:

    ```python
    >>> x = torch.randn(500, 4)
    >>> round(frechet_distance(x, x + 1), 6)
    4.0
    ```
    """
    return _frechet(_gaussian(features.double()), _gaussian(references.double()))


def _gaussian(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean, and a root R of the covariance, `R^T R = S`; any such root gives the same singular values."""
    if len(rows) < 2:
        return None
    centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    if len(rows) < rows.shape[1]:
        return rows.mean(0), centred
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return rows.mean(0), values.clamp(min=0).sqrt()[:, None] * vectors.T


def _frechet(first: tuple | None, second: tuple | None) -> float:
    if first is None or second is None:
        return float("nan")
    (mean, root), (other_mean, other_root) = first, second
    overlap = torch.linalg.svdvals(root @ other_root.T).sum()
    return float(((mean - other_mean) ** 2).sum() + (root**2).sum() + (other_root**2).sum() - 2 * overlap)


def median_distance(features: torch.Tensor, most: int = 1000, seed: int = 0) -> float:
    """
    Median distance of two rows of `(n, d)`, the usual bandwidth of a Gaussian kernel (Gretton et al. 2012, JMLR 13);
    of at most `most` rows, drawn by `seed`. NaN with fewer than two rows, 1 where most rows are the same.
    """
    if len(features) < 2:
        return float("nan")
    if len(features) > most:
        features = features[np.random.default_rng(seed).choice(len(features), most, replace=False)]
    return float(np.median(torch.pdist(features.double()))) or 1.0


def gaussian_kernel(bandwidth: float) -> Callable:
    r"""The kernel `$k(x, y) = \exp(-|x - y|^2 / (2 b^2))$` as a function of `(m, d)` and `(n, d)` features."""

    def kernel(x, y):
        return torch.exp(-(_distances(x, y) ** 2) / (2 * bandwidth**2))

    return kernel


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distances; of many features through a matrix product of rows centred first, far faster."""
    x, y = x.double(), y.double()
    if x.shape[1] <= 64:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    x, y = x - y.mean(0), y - y.mean(0)
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def _radii(within: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row, of distances `(n, n)`."""
    return np.partition(within, k, axis=1)[:, k]


def _coverage_of_balls(between: np.ndarray, radii: np.ndarray, reference_radii: np.ndarray, k: int) -> dict:
    inside = between < reference_radii  # (generated, real): is the generated one within the real one's ball?
    return {
        "precision": inside.any(1).mean(),
        "recall": (between < radii[:, None]).any(0).mean(),
        "density": inside.sum(1).mean() / k,
        "coverage": inside.any(0).mean(),
    }


def precision_recall_density_coverage(
    features: torch.Tensor, references: torch.Tensor, k: int = 5
) -> dict[str, float]:
    r"""
    Fidelity and variety by balls around the images that reach to their k-th nearest neighbour:
    [improved precision and recall](https://huggingface.co/papers/1904.06991) and
    [density and coverage](https://huggingface.co/papers/2002.09797), strict at the border like the `prdc` package.

    - precision: share of generated images in the ball of any real one; an outlier among the real ones has a huge ball
    - recall: share of real images in the ball of any generated one
    - density: mean number of real balls a generated image is in, over k; 1 in expectation for real images, may be more
    - coverage: share of real balls that have a generated image in them

    Args:
        features (`torch.Tensor`):
            Features of shape `(m, d)` of generated images.
        references (`torch.Tensor`):
            Features of shape `(n, d)` of real ones.
        k (`int`, *optional*, defaults to `5`):
            Which neighbour a ball reaches to.

    Returns:
        `dict[str, float]`: `precision`, `recall`, `density`, `coverage`; NaN unless both sides have more than `k`
        rows.
    """
    if min(len(features), len(references)) <= k:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), float("nan"))
    radii, reference_radii = (_radii(_distances(x, x).numpy(), k) for x in (features, references))
    balls = _coverage_of_balls(_distances(features, references).numpy(), radii, reference_radii, k)
    return {name: float(value) for name, value in balls.items()}


def vendi_score(features: torch.Tensor) -> float:
    r"""
    Effective number of different images, `$\exp(-\sum_i \lambda_i \log \lambda_i)$` with the eigenvalues of
    `$K / n$`, K the matrix of cosines ([the Vendi score](https://huggingface.co/papers/2210.02410)).

    Args:
        features (`torch.Tensor`):
            Features of shape `(n, d)`, as they are; of features of one sign all cosines, and the score, are near 1.

    Returns:
        `float`: from 1 (all alike) to `min(n, d)`; NaN without rows.
    """
    if len(features) == 0:
        return float("nan")
    rows = torch.nn.functional.normalize(features.double(), dim=1) / len(features) ** 0.5
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    return float(torch.special.entr(eigenvalues).sum().exp())


def mean_pairwise_distance(
    features: torch.Tensor, case_ids: np.ndarray, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Mean distance of two images of different cases; those of one case are alike for another reason.

    Args:
        features (`torch.Tensor`):
            Features of shape `(n, d)`.
        case_ids (`np.ndarray`):
            Case of each row.
        weights (`torch.Tensor`, *optional*):
            How often each row counts, `(..., n)`. Defaults to once each.

    Returns:
        `torch.Tensor` in float64 of the leading shape of the weights (a scalar without them); NaN with a single case.
    """
    weights = torch.ones(len(features)) if weights is None else weights
    weights = weights.double()
    _, case = np.unique(case_ids, return_inverse=True)
    apart = torch.from_numpy(case[:, None] != case[None, :]).double()
    distances = _distances(features, features) * apart
    return ((weights @ distances) * weights).sum(-1) / ((weights @ apart) * weights).sum(-1)


@dataclass(frozen=True)
class Compared:
    """
    A measure of generated against real images, and what to hold it against.

    Attributes:
        value ([`Measured`]):
            Of all images, with its 95 % interval by case.
        matched ([`Measured`]):
            Generated images of half of the cases against real images of the other half: mean over the random halves,
            and the range of the central 95 % of them.
        floor ([`Measured`]):
            The same of real images against real images; for `diversity` and `vendi`, of half of the real images.
        excess ([`Measured`]):
            `matched` less `floor`, half by half, with its 95 % interval by case.
    """

    value: Measured
    matched: Measured
    floor: Measured
    excess: Measured


@dataclass
class _Draws:
    """One measure: of all images, of generated A against real A, of generated A against real B, of real A and B."""

    whole: float
    halves: np.ndarray
    matched: np.ndarray
    floor: np.ndarray


def _halve_cases(case_ids: np.ndarray, reference_case_ids: np.ndarray, times: int, seed: int) -> tuple:
    """
    Which rows fall into half A, `(times, m)` and `(times, n)`. Cases that both sides have, and those of one side
    alone, are halved separately, so that the halves do not differ in size.
    """
    rng = np.random.default_rng(seed)
    cases = np.unique(np.concatenate([case_ids, reference_case_ids]))
    kind = np.isin(cases, case_ids) + 2 * np.isin(cases, reference_case_ids)
    in_a = np.zeros((times, len(cases)), bool)
    for members in (np.flatnonzero(kind == k) for k in (1, 2, 3)):
        for row in in_a:
            size = (len(members) + rng.integers(2)) // 2
            row[rng.permutation(members)[:size]] = True
    return in_a[:, np.searchsorted(cases, case_ids)], in_a[:, np.searchsorted(cases, reference_case_ids)]


def _draw(generated: FeatureSet, references: FeatureSet, k: int, resamples: int, seed: int) -> dict[str, _Draws]:
    x, y = generated.features.double(), references.features.double()
    a_x, a_y = _halve_cases(generated.case_ids, references.case_ids, resamples, seed)
    b_y = ~a_y
    draws = {}

    # Row weights and one matrix product serve the kernels; a row is never paired with itself.
    u, v, w = (torch.from_numpy(rows).double() for rows in (a_x, a_y, b_y))
    for name, kernel in (("kid", polynomial_kernel), ("mmd", gaussian_kernel(median_distance(y)))):
        pairs = [(x, u, v), (x, u, w), (y, v, w)]
        halves = [kernel_distance(z, y, weights=p, reference_weights=q, kernel=kernel) for z, p, q in pairs]
        draws[name] = _Draws(float(kernel_distance(x, y, kernel=kernel)), *(half.numpy() for half in halves))
    real = mean_pairwise_distance(y, references.case_ids, v).numpy()
    own = mean_pairwise_distance(x, generated.case_ids, u).numpy()
    draws["diversity"] = _Draws(float(mean_pairwise_distance(x, generated.case_ids)), own, own, real)

    # Eigenvalues of many dimensions take seconds a half: fewer halves then.
    few = resamples if min(x.shape[1], len(x)) <= 256 else min(resamples, 40)
    halves = []
    for a, b, c in zip(a_x[:few], a_y, b_y, strict=False):
        own, real, other = _gaussian(x[a]), _gaussian(y[b]), _gaussian(y[c])
        halves.append([_frechet(own, real), _frechet(own, other), _frechet(real, other)])
    draws["frechet"] = _Draws(frechet_distance(x, y), *np.array(halves).T)

    own, real = (np.array([vendi_score(z[a]) for a in half[:few]]) for z, half in ((x, a_x), (y, a_y)))
    draws["vendi"] = _Draws(vendi_score(x), own, own, real)

    d_xx, d_xy, d_yy = (_distances(p, q).float().numpy() for p, q in ((x, x), (x, y), (y, y)))
    balls = []
    for a, b, c in zip(a_x, a_y, b_y, strict=True):
        if min(a.sum(), b.sum(), c.sum()) <= k:
            balls.append([dict.fromkeys(("precision", "recall", "density", "coverage"), np.nan)] * 3)
            continue
        r_a, r_b, r_c = _radii(d_xx[a][:, a], k), _radii(d_yy[b][:, b], k), _radii(d_yy[c][:, c], k)
        balls.append(
            [
                _coverage_of_balls(d_xy[a][:, b], r_a, r_b, k),
                _coverage_of_balls(d_xy[a][:, c], r_a, r_c, k),
                _coverage_of_balls(d_yy[b][:, c], r_b, r_c, k),
            ]
        )
    for name, whole in precision_recall_density_coverage(x, y, k).items():
        draws[name] = _Draws(whole, *np.array([[ball[name] for ball in row] for row in balls]).T)
    return draws


def _compared(name: str, draws: _Draws, n: int, n_failed: int, cases: int, notes: list[str]) -> Compared:
    def mean(values):
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else float("nan")

    low, high = percentile_interval(draws.halves - mean(draws.halves))
    if cases < 4:
        low = high = float("nan")
    note = "; ".join(
        notes + ["no interval: fewer than 4 cases"] * (cases < 4) + ["a rough interval: few cases"] * (4 <= cases < 20)
    )
    bounds = BOUNDS.get(name, (-np.inf, np.inf))
    low, high = (float(np.clip(draws.whole + end, *bounds)) for end in (low, high))
    value = Measured(draws.whole, low, high, n, n_failed, note)
    halves = "mean and range over random halves of the cases"
    matched, floor, excess = (
        Measured(mean(values), *percentile_interval(values), n // 2, 0, halves)
        for values in (draws.matched, draws.floor, draws.matched - draws.floor)
    )
    return Compared(value, matched, floor, excess)


def _check(generated: FeatureSet, references: FeatureSet) -> None:
    for argument, side in (("generated", generated), ("references", references)):
        if len(side.features) < 2:
            raise ValueError(
                f"`{argument}` has {len(side.features)} described image(s), {side.n_failed} failed; expected at least "
                "2. Look for images that are not finite, and for empty masks."
            )
    if generated.extractor != references.extractor or generated.features.shape[1] != references.features.shape[1]:
        raise ValueError(
            f"`generated` has {generated.features.shape[1]} features of {generated.extractor!r}, `references` "
            f"{references.features.shape[1]} of {references.extractor!r}; describe both with the same extractor."
        )


def _notes(generated: FeatureSet, references: FeatureSet) -> tuple[list[str], list[str]]:
    """What to say of every measure, and of the Frechet distance in particular."""
    common = []
    for words, side in (("generated", generated), ("real", references)):
        if side.n_seen > len(side.features):
            common.append(f"a random {len(side.features)} of {side.n_seen} {words} images")
    if references.n_failed:
        common.append(f"{references.n_failed} real images failed")
    d, n = generated.features.shape[1], min(len(generated.features), len(references.features))
    short = [f"mostly bias by size: {n} images are under 10 x {d} features, read it against the floor"] * (n < 10 * d)
    return common, short + common


def compare_distributions(
    generated: FeatureSet, references: FeatureSet, *, k: int = 5, resamples: int = 200, seed: int = 0
) -> dict[str, Compared]:
    """
    All measures of generated against real images, each with its interval by case and the real-against-real floor; the
    top of this file says what they are and how the two are made.

    Args:
        generated ([`FeatureSet`]):
            Features of the generated images, from [`~onereward.evaluation.features.collect_features`].
        references ([`FeatureSet`]):
            Features of real images, of the same extractor. Where both sides have a case, they are resampled together.
        k (`int`, *optional*, defaults to `5`):
            Neighbour that the balls of precision, recall, density and coverage reach to.
        resamples (`int`, *optional*, defaults to `200`):
            Random halves of the cases. The Frechet distance and the Vendi score of more than 256 features take 40 at
            most.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the halves.

    Returns:
        `dict[str, Compared]`: `kid`, `mmd`, `diversity`, `frechet`, `vendi`, `precision`, `recall`, `density`,
        `coverage`. `n` counts generated images, `n_failed` those without features.

    Raises:
        `ValueError`: when a side has fewer than two images, or the extractors differ.

    Example:

    ```python
    >>> compared = compare_distributions(generated, references)
    >>> compared["kid"].value, compared["kid"].floor
    ```
    """
    _check(generated, references)
    common, frechet = _notes(generated, references)
    draws = _draw(generated, references, k, resamples, seed)
    cases = min(len(np.unique(generated.case_ids)), len(np.unique(references.case_ids)))
    n, n_failed = len(generated.features), generated.n_failed
    return {
        name: _compared(name, draw, n, n_failed, cases, frechet if name == "frechet" else common)
        for name, draw in draws.items()
    }


def compare_planes(
    generated: dict[str, FeatureSet],
    references: dict[str, FeatureSet],
    *,
    k: int = 5,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, dict[str, Compared]]:
    """
    2.5-D measures: each plane by itself and, as in [MAISI](https://huggingface.co/papers/2409.11169), the mean of the
    planes' figures. A slice is a sample, a volume is a case.

    Args:
        generated, references (`dict[str, FeatureSet]`):
            Plane -> features of the slices, from [`~onereward.evaluation.features.collect_plane_features`].
        k, resamples, seed:
            As in [`compare_distributions`].

    Returns:
        `dict[str, dict[str, Compared]]`: `"mean"` and each plane -> what [`compare_distributions`] returns. In the
        mean, the planes of a case are resampled together; `n` counts slices of all planes.

    Raises:
        `ValueError`: as in [`compare_distributions`], or when the planes differ.
    """
    if set(generated) != set(references) or not generated:
        raise ValueError(
            f"`generated` has the planes {list(generated)}, `references` {list(references)}; expected the same."
        )
    drawn, result = {}, {"mean": {}}
    for plane in generated:
        _check(generated[plane], references[plane])
        drawn[plane] = _draw(generated[plane], references[plane], k, resamples, seed)
    sets = {plane: (generated[plane], references[plane]) for plane in generated}
    cases = {plane: min(len(np.unique(side.case_ids)) for side in pair) for plane, pair in sets.items()}
    for plane, (x, y) in sets.items():
        common, frechet = _notes(x, y)
        result[plane] = {
            name: _compared(
                name, draw, len(x.features), x.n_failed, cases[plane], frechet if name == "frechet" else common
            )
            for name, draw in drawn[plane].items()
        }
    n, n_failed = (
        sum(count) for count in zip(*((len(x.features), x.n_failed) for x, _ in sets.values()), strict=True)
    )
    for name in next(iter(drawn.values())):
        parts = [draws[name] for draws in drawn.values()]
        averaged = _Draws(
            *(np.mean([getattr(part, field) for part in parts], axis=0) for field in _Draws.__annotations__)
        )
        notes = list(dict.fromkeys(note for plane in sets for note in [result[plane][name].value.note] if note))
        averaged.whole = float(averaged.whole)
        notes = [note for note in notes if "interval" not in note]
        result["mean"][name] = _compared(name, averaged, n, n_failed, min(cases.values()), notes)
    return result


def pair_similarity(
    images: torch.Tensor,
    case_ids: list[str],
    *,
    similarity: Callable = ssim,
    same_case: bool = False,
    pairs: int = 1000,
    batch_size: int = 128,
    resamples: int = 2000,
    seed: int = 0,
) -> Measured:
    """
    How alike two generated images are, lower being more varied. With MS-SSIM it is the diversity of
    [CXRL](https://huggingface.co/papers/2403.06516); mode collapse shows in it. Hold it against the same figure of
    real images.

    Args:
        images (`torch.Tensor`):
            Images of shape `(N, C, H, W)` in [0, 1].
        case_ids (`list[str]`):
            Case of each image.
        similarity (`Callable`, *optional*, defaults to [`~onereward.evaluation.metrics.ssim`]):
            Maps two batches of images to `(B,)` similarities.
        same_case (`bool`, *optional*, defaults to `False`):
            Whether to pair images of one case (samples of one condition, drawn with several seeds) instead of images
            of different cases.
        pairs (`int`, *optional*, defaults to `1000`):
            Pairs to draw, without replacement; all of them where there are no more.
        batch_size (`int`, *optional*, defaults to `128`):
            Pairs at once.
        resamples, seed (`int`, *optional*):
            Of the bootstrap by case, in which a pair counts as often as both its cases do. The seed also draws the
            pairs.

    Returns:
        [`Measured`] over the pairs; those whose similarity is not finite count as failed.
    """
    case_ids = np.asarray(case_ids)
    _, case = np.unique(case_ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    chosen, number = set(), len(case_ids)
    if number * (number - 1) // 2 <= 20 * pairs or same_case:
        by_case = (
            [np.flatnonzero(case == c) for c in range(case.max(initial=-1) + 1)] if same_case else [np.arange(number)]
        )
        every = [(i, j) for rows in by_case for n, i in enumerate(rows) for j in rows[n + 1 :]]
        every = [(i, j) for i, j in every if (case[i] == case[j]) == same_case]
        chosen = [every[i] for i in rng.permutation(len(every))[:pairs]]
    else:
        for _ in range(20 * pairs):  # duplicates and pairs of one case are rare
            i, j = sorted(rng.choice(number, 2, replace=False).tolist())
            if case[i] != case[j]:
                chosen.add((i, j))
            if len(chosen) == pairs:
                break
        chosen = sorted(chosen)
    if not chosen:
        return Measured(np.nan, np.nan, np.nan, 0, 0, "there are no such pairs")
    first, second = np.array(chosen).T
    values = [
        similarity(images[first[i : i + batch_size]], images[second[i : i + batch_size]]).double().cpu()
        for i in range(0, len(first), batch_size)
    ]
    values = torch.cat(values).numpy()
    kept = np.isfinite(values)
    first, second, values = first[kept], second[kept], values[kept]
    if len(values) == 0:
        return Measured(np.nan, np.nan, np.nan, 0, int((~kept).sum()), "there is nothing to measure it on")
    counts = resample_cases(case_ids, resamples, seed)
    weights = counts[:, first] if same_case else counts[:, first] * counts[:, second]
    cases = len(np.unique(case_ids))
    low, high = percentile_interval(weighted_mean(values, weights)) if cases > 1 else (np.nan, np.nan)
    note = "no interval: a single case" if cases == 1 else "a rough interval: few cases" if cases < 20 else ""
    return Measured(float(values.mean()), low, high, len(values), int((~kept).sum()), note)
