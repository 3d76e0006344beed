r"""Does a model repeat its training images? A question of privacy, and of whether it has learnt anything.

For each generated image the nearest training image is sought, in pixels and in features, and the same for held-out
real images, which the model cannot have copied. Three figures are compared:

- the distance `d1` to the nearest training image, with the share below `p5`, the 5th percentile of the distances from
  one training image to the nearest of another case. Alone it misleads: smooth pictures are close to everything, and by
  root mean square a constant fill is *closer* to the training set than held-out images are, and copies nothing.
- the nearest-neighbour distance ratio `NNDR = d1 / d2`, with `d2` the distance to the nearest image of any *other*
  training case (slices and contrasts of one case are no second opinion). A copy is near one case and far from the
  next, a smooth picture is equally far from many. Alone it misleads too: seen from far off, in features above all, the
  outermost training image is much nearer than the next. A *suspect* has `d1 < p5` and `NNDR <= 2/3`; the idea, and a
  bound of like size, are those of [Carlini et al.](https://huggingface.co/papers/2301.13188).
- whether suspects are more frequent among generated than among held-out images, by a permutation test that swaps whole
  cases: the three-sample test of [data copying](https://huggingface.co/papers/2004.05675), on suspects instead of
  distances.

**Masks.** Outside the mask a repainted image equals its source by construction. Where masks are given only what lies
inside them counts, for the held-out images within theirs; without masks, images made for a training case are refused.
Best give each held-out image the mask of the generated image of the same case. Pixels are compared in one place (what
does the training image have where this one was repainted?), features wherever the masks are (is this a training
image's lesion, moved with its surroundings?).

No test can show that nothing was memorised: look at the closest pairs. Of few cases, many must be copies to be found:
of 40 on either side eight, if none is exact. A copy that was blurred by two pixels, or that has a tenth of the range
as noise, is mostly above the threshold. For mirrored copies, append the mirrored training images under the same case
ids. Research use only, not for clinical use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onereward.evaluation.bootstrap import Measured, measured_mean, percentile_interval, resample_cases


# Within this share of the distance to the next case, an image is suspected to be a copy. On phantom slices the
# smallest ratio in pixels of held-out images, of constant fills and of blurred ones is 0.7.
SUSPECT_RATIO = 2 / 3

# How often an honest model may be called a copier.
FALSE_ALARMS = 0.01

FEWEST_CASES = 10


@dataclass
class ImageSet:
    """
    Images to compare, generated or real.

    Attributes:
        images (`torch.Tensor`): images `(N, C, H, W)`, floats in [0, 1] or uint8 (a quarter of the memory).
        case_ids (`Sequence[str]`): case of each.
        masks (`torch.Tensor`, *optional*): masks `(N, 1, H, W)`, 1 where the image was repainted, and where to look.
        features (`torch.Tensor`, *optional*): features `(N, d)`, of what lies in the masks where there are masks
            ([`~onereward.evaluation.features.Phantom64`] takes them).
    """

    images: torch.Tensor
    case_ids: Sequence[str]
    masks: torch.Tensor | None = None
    features: torch.Tensor | None = None


@dataclass(frozen=True)
class Nearest:
    """
    Nearest training image of each query.

    Attributes:
        distances (`np.ndarray`): root mean square difference to it `(N,)`, over the mask; NaN for an empty mask.
        next_distances (`np.ndarray`): to the nearest one of any other case.
        indices (`np.ndarray`): its row in the training set.
    """

    distances: np.ndarray
    next_distances: np.ndarray
    indices: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """NNDR `(N,)` in [0, 1]: 0 for an exact copy of one case, 1 where two cases are as near as each other."""
        same = np.isfinite(self.distances) & (self.distances == self.next_distances)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(same, 1.0, self.distances / self.next_distances)


def nearest_training_images(
    queries: torch.Tensor,
    train: torch.Tensor,
    train_case_ids: Sequence[str],
    *,
    masks: torch.Tensor | None = None,
    case_ids: Sequence[str] | None = None,
    batch_size: int = 256,
) -> Nearest:
    r"""
    Finds the nearest training image of each query, and the nearest of another case than that one.

    `$d_{ij}^2 = \frac{1}{|m_i|}\sum_{p \in m_i} (x_{ip} - y_{jp})^2$` takes two matrix products a block,
    `$m_i x_i^2 - 2 (m_i x_i) y_j + m_i y_j^2$`; the four nearest cases are then measured again pixel by pixel in
    float64, because the difference of large sums cannot tell a copy from a near copy.

    Args:
        queries (`torch.Tensor`):
            Images `(N, C, H, W)` in [0, 1] or uint8, or features `(N, d)`.
        train (`torch.Tensor`):
            The same of the training set, `(T, ...)`.
        train_case_ids (`Sequence[str]`):
            Case of each training image.
        masks (`torch.Tensor`, *optional*):
            Masks `(N, 1, H, W)` of the queries, 1 where pixels count. All count when not given.
        case_ids (`Sequence[str]`, *optional*):
            Case of each query. When given, training images of its own case are no neighbours of a query.
        batch_size (`int`, *optional*, defaults to `256`):
            Queries at once. Beside the images, memory grows with `batch_size` times the training images.

    Returns:
        [`Nearest`]

    Raises:
        `ValueError`: when the shapes differ, or there are fewer than two training cases to choose from.
    """
    if queries.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"`queries` are of shape {tuple(queries.shape[1:])}, `train` of {tuple(train.shape[1:])}; bring the "
            "images to one size and number of channels first."
        )
    cases, case = np.unique(np.asarray(train_case_ids, dtype=str), return_inverse=True)
    own = np.full(len(queries), -1)
    if case_ids is not None:
        place = {name: i for i, name in enumerate(cases.tolist())}
        own = np.array([place.get(str(name), -1) for name in case_ids])
    if len(cases) - (own >= 0).any() < 2:
        raise ValueError(
            f"`train_case_ids` holds {len(cases)} case(s); the ratio of the nearest to the next needs two to choose "
            "from. Bring more training cases."
        )
    case, own = torch.from_numpy(case), torch.from_numpy(own)

    def flat(images):
        images = images.flatten(1)
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()

    distances, indices = [], []
    for start in range(0, len(queries), batch_size):
        chunk = queries[start : start + batch_size]
        x = flat(chunk)
        broken = ~x.isfinite().all(1)
        x[broken] = 0
        inside = torch.ones_like(x)
        if masks is not None:
            inside = (masks[start : start + batch_size] > 0.5).expand(chunk.shape).flatten(1).float()
        used = inside.any(0)
        x_used, inside_used = x[:, used], inside[:, used]
        rough = torch.empty(len(x), len(train))
        for first in range(0, len(train), 1024):
            y = flat(train[first : first + 1024])[:, used]
            squares = (y * y).sum(1) if masks is None else inside_used @ (y * y).T
            rough[:, first : first + 1024] = squares - 2 * (inside_used * x_used) @ y.T
        rough += (inside * x * x).sum(1, keepdim=True)
        rough[own[start : start + batch_size, None] == case] = torch.inf
        by_case = torch.full((len(x), len(cases)), torch.inf)
        by_case.scatter_reduce_(1, case.expand(len(x), -1), rough, "amin")
        candidates = by_case.topk(min(4, len(cases)), dim=1, largest=False)
        rows, exact = [], []
        for nearest_case, value in zip(candidates.indices.T, candidates.values.T, strict=True):
            row = torch.where(case == nearest_case[:, None], rough, torch.inf).argmin(1)
            squares = ((flat(train[row]).double() - x.double()) ** 2 * inside).sum(1) / inside.sum(1)
            squares[value == torch.inf] = torch.inf  # its own case, with no other left
            squares[broken] = torch.nan
            rows.append(row)
            exact.append(squares)
        ordered, order = torch.stack(exact, 1).sqrt().sort(1)
        distances.append(ordered[:, :2])
        indices.append(torch.stack(rows, 1).gather(1, order)[:, 0])
    distances = torch.cat(distances).numpy() if distances else np.zeros((0, 2))
    indices = torch.cat(indices).numpy() if indices else np.zeros(0, int)
    return Nearest(distances[:, 0], distances[:, 1], indices)


def probability_closer(
    distances: np.ndarray,
    heldout_distances: np.ndarray,
    case_ids: Sequence[str],
    heldout_case_ids: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
) -> Measured:
    """
    Probability that a generated image is closer to the training set than a held-out one, ties half: the Mann-Whitney
    statistic of [data copying](https://huggingface.co/papers/2004.05675), with its interval by case. 0.5 when the two
    are alike.

    Args:
        distances (`np.ndarray` of shape `(N,)`):
            Distances of the generated images.
        heldout_distances (`np.ndarray` of shape `(M,)`):
            Distances of the held-out images.
        case_ids, heldout_case_ids (`Sequence[str]`):
            Their cases; one that both have is resampled together.
        resamples, seed (`int`, *optional*):
            Of the bootstrap.

    Returns:
        [`Measured`]: `n` counts generated images, `n_failed` distances that are not finite on either side.
    """
    distances, heldout_distances = np.asarray(distances, float), np.asarray(heldout_distances, float)
    kept, heldout_kept = np.isfinite(distances), np.isfinite(heldout_distances)
    n_failed = int((~kept).sum() + (~heldout_kept).sum())
    x, y = distances[kept], heldout_distances[heldout_kept]
    if len(x) == 0 or len(y) == 0:
        return Measured(np.nan, np.nan, np.nan, len(x), n_failed, "there is nothing to measure it on")
    cases = np.concatenate([np.asarray(case_ids, str)[kept], np.asarray(heldout_case_ids, str)[heldout_kept]])
    order = np.argsort(y)
    left, right = (np.searchsorted(y[order], x, side) for side in ("left", "right"))

    def statistic(weights):
        u, v = weights[:, : len(x)], weights[:, len(x) :][:, order]
        below = np.concatenate([np.zeros((len(v), 1)), v.cumsum(1)], axis=1)
        further = below[:, -1:] - (below[:, left] + below[:, right]) / 2
        both = u.sum(1) * below[:, -1]
        return np.divide((u * further).sum(1), both, out=np.full(len(both), np.nan), where=both > 0)

    # A hundred resamples at once: each has a row of weights over all images.
    rounds = [(min(100, resamples - i), np.random.SeedSequence([seed, i])) for i in range(0, resamples, 100)]
    draws = np.concatenate([statistic(resample_cases(cases, size, sequence)) for size, sequence in rounds])
    few = min(len(np.unique(cases[: len(x)])), len(np.unique(cases[len(x) :]))) < 20
    value = float(statistic(np.ones((1, len(cases))))[0])
    return Measured(value, *percentile_interval(draws), len(x), n_failed, "a rough interval: few cases" if few else "")


def copying_p_value(
    ratios: np.ndarray,
    heldout_ratios: np.ndarray,
    case_ids: Sequence[str],
    heldout_case_ids: Sequence[str],
    permutations: int = 2000,
    seed: int = 0,
) -> float:
    """
    One-sided p value of "suspects are as frequent among generated as among held-out images".

    The statistic is the largest difference of the two shares of images with `NNDR <= t`, in standard deviations of its
    permutations, over `t` = the 5th, 25th and 50th percentile of all ratios together, none above 2/3: a tail is
    compared as far down as the data allow, but a general shift towards the training set, of which a smooth model is
    guilty as well, is none. A permutation swaps the two sides of whole cases where both sides have the same cases, and
    draws anew who is generated among all cases otherwise; it is exact when the two are exchangeable.

    Args:
        ratios (`np.ndarray` of shape `(N,)`):
            NNDR of the generated images, 1 for those that are no suspects for another reason. What is not finite is
            left out.
        heldout_ratios (`np.ndarray` of shape `(M,)`):
            The same of the held-out images.
        case_ids, heldout_case_ids (`Sequence[str]`):
            Their cases.
        permutations, seed (`int`, *optional*):
            Of the test.

    Returns:
        `float` in (0, 1], at least `1 / (permutations + 1)`; 1 where there is no suspect.
    """
    values = [np.asarray(side, float) for side in (ratios, heldout_ratios)]
    cases = [np.asarray(side, str) for side in (case_ids, heldout_case_ids)]
    kept = [np.isfinite(side) for side in values]
    values, cases = [v[k] for v, k in zip(values, kept, strict=True)], [c[k] for c, k in zip(cases, kept, strict=True)]
    if min(map(len, values)) == 0:
        return 1.0
    pooled = np.concatenate(values)
    thresholds = np.unique(np.minimum(SUSPECT_RATIO, np.quantile(pooled, [0.05, 0.25, 0.5])))
    rng = np.random.default_rng(seed)

    # One unit a case and side: its suspects at each threshold, and its images.
    def units(values, cases):
        names, unit = np.unique(cases, return_inverse=True)
        below = (values[:, None] <= thresholds).astype(float)
        table = np.zeros((len(names), len(thresholds) + 1))
        np.add.at(table, unit, np.concatenate([below, np.ones((len(values), 1))], axis=1))
        return names, table

    (names, generated), (heldout_names, heldout) = (units(v, c) for v, c in zip(values, cases, strict=True))
    total = generated.sum(0) + heldout.sum(0)
    if np.array_equal(names, heldout_names):
        swapped = rng.random((permutations, len(names))) < 0.5
        swapped = np.concatenate([np.zeros((1, len(names)), bool), swapped])  # first, what was observed
        sums = generated.sum(0) + swapped.astype(float) @ (heldout - generated)
    else:
        everything = np.concatenate([generated, heldout])
        chosen = rng.permuted(np.tile(np.arange(len(everything)) < len(generated), (permutations, 1)), axis=1)
        chosen = np.concatenate([np.arange(len(everything))[None] < len(generated), chosen])
        sums = chosen.astype(float) @ everything
    rest = total - sums
    difference = sums[:, :-1] / sums[:, -1:] - rest[:, :-1] / rest[:, -1:]
    spread = difference[1:].std(0)
    statistic = np.where(spread > 0, difference / np.where(spread > 0, spread, 1), 0).max(1)
    return float((1 + (statistic[1:] >= statistic[0] - 1e-9).sum()) / (permutations + 1))


@dataclass(frozen=True)
class Nearness:
    """
    How near generated and held-out images are to the training set, in one space (pixels or features).

    Attributes:
        distance, heldout_distance ([`Measured`]): mean distance to the nearest training image.
        ratio, heldout_ratio ([`Measured`]): mean NNDR.
        train_p5 (`float`): 5th percentile of the distance of a training image to the nearest one of another case.
        below_p5, heldout_below_p5 ([`Measured`]): share of images nearer than that.
        closer ([`Measured`]): probability that a generated image is nearer than a held-out one.
        suspects, heldout_suspects ([`Measured`]): share with `d1 < p5` and `NNDR <= 2/3`.
        exact, heldout_exact (`int`): images at distance 0 of one case, and of no other.
        p_value (`float`): of the test that suspects are as frequent among generated as among held-out images.
        closest (`list[dict]`): the pairs of the smallest NNDR: `generated` and `train` (rows), `case_id`,
            `train_case_id`, `distance`, `ratio`.
    """

    distance: Measured
    heldout_distance: Measured
    ratio: Measured
    heldout_ratio: Measured
    train_p5: float
    below_p5: Measured
    heldout_below_p5: Measured
    closer: Measured
    suspects: Measured
    heldout_suspects: Measured
    exact: int
    heldout_exact: int
    p_value: float
    closest: list[dict]


@dataclass(frozen=True)
class Memorisation:
    """
    The verdict and what it rests on; `dataclasses.asdict` makes plain JSON values of it.

    Attributes:
        flagged (`bool`): whether the model is called a copier.
        verdict (`str`): `"copies"`, `"no sign of copying"` or `"cannot say"`.
        reason (`str`): one or two sentences for a report.
        spaces (`dict[str, Nearness]`): `pixels` and, where features are given, `features`.
        n_own_case (`int`): generated images whose own case is in the training set.
    """

    flagged: bool
    verdict: str
    reason: str
    spaces: dict[str, Nearness]
    n_own_case: int


def _nearness(
    queries: ImageSet,
    train: ImageSet,
    heldout: ImageSet,
    column: str,
    exclude_own_case: bool,
    pairs: int,
    resamples: int,
    batch_size: int,
    seed: int,
) -> Nearness:
    """Compares one space, `column` of the sets: "images", within the masks, or "features"."""
    settings = {"batch_size": batch_size}
    masks, train_masks, heldout_masks = (
        side.masks if column == "images" and queries.masks is not None else None for side in (queries, train, heldout)
    )
    t = getattr(train, column)
    own = queries.case_ids if exclude_own_case else None
    found = nearest_training_images(getattr(queries, column), t, train.case_ids, masks=masks, case_ids=own, **settings)
    base = nearest_training_images(getattr(heldout, column), t, train.case_ids, masks=heldout_masks, **settings)
    rng = np.random.default_rng(seed)
    some = np.sort(rng.choice(len(t), min(len(t), 2000), replace=False))
    if train_masks is not None:
        train_masks = train_masks[some]
    elif masks is not None:
        train_masks = masks[rng.integers(len(masks), size=len(some))]
    within = nearest_training_images(
        t[some], t, train.case_ids, masks=train_masks, case_ids=np.asarray(train.case_ids)[some], **settings
    )
    p5 = float(np.nanquantile(within.distances, 0.05))
    # NaN stays NaN, for an image that could not be compared.
    near, base_near = (np.where(n.distances >= p5, 1.0, n.ratios) for n in (found, base))
    cases, base_cases = np.asarray(queries.case_ids, str), np.asarray(heldout.case_ids, str)

    def mean(values, ids):
        return measured_mean(np.asarray(values, float), ids, resamples=resamples, seed=seed)

    def share(nearest, below, ids):
        return mean(np.where(np.isfinite(nearest.distances), below, np.nan), ids)

    def exact(nearest):
        return int(((nearest.distances == 0) & (nearest.next_distances > 0)).sum())

    order = np.argsort(np.where(np.isfinite(found.ratios), found.ratios, np.inf), kind="stable")[:pairs]
    closest = [
        {
            "generated": int(i),
            "train": int(found.indices[i]),
            "case_id": str(cases[i]),
            "train_case_id": str(train.case_ids[found.indices[i]]),
            "distance": float(found.distances[i]),
            "ratio": float(found.ratios[i]),
        }
        for i in order
        if np.isfinite(found.ratios[i])
    ]
    return Nearness(
        mean(found.distances, cases),
        mean(base.distances, base_cases),
        mean(found.ratios, cases),
        mean(base.ratios, base_cases),
        p5,
        share(found, found.distances < p5, cases),
        share(base, base.distances < p5, base_cases),
        probability_closer(found.distances, base.distances, cases, base_cases, resamples, seed),
        share(found, near <= SUSPECT_RATIO, cases),
        share(base, base_near <= SUSPECT_RATIO, base_cases),
        exact(found),
        exact(base),
        copying_p_value(near, base_near, cases, base_cases, seed=seed),
        closest,
    )


def check_memorisation(
    generated: ImageSet,
    train: ImageSet,
    heldout: ImageSet,
    *,
    exclude_own_case: bool = False,
    pairs: int = 8,
    resamples: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
) -> Memorisation:
    """
    Looks for training images among generated ones.

    The model is called a copier when suspects are more frequent among generated than among held-out images at a level
    of 1 % over all spaces (the false alarm rate of an honest model), or when a generated image equals a training image
    bit for bit, and that of one case only, while no held-out image does.

    Args:
        generated ([`ImageSet`]):
            Generated images, at best made for held-out cases. Give the masks where images were repainted.
        train ([`ImageSet`]):
            All images the model was trained on, sources and targets alike. Its masks are used for distances within the
            training set alone; without them, masks of generated images are drawn.
        heldout ([`ImageSet`]):
            Real images of cases that the model has not seen, with masks like those of the generated images.
        exclude_own_case (`bool`, *optional*, defaults to `False`):
            Whether training images of its own case are no neighbours of a generated image. Of images that were made
            for a training case, an accurate model's are near that case's own image without having stored it: `False`
            calls that copying, `True` looks for other patients alone.
        pairs (`int`, *optional*, defaults to `8`):
            Closest pairs to return, for the pictures of a report.
        resamples (`int`, *optional*, defaults to `1000`):
            Of the bootstrap by case.
        batch_size (`int`, *optional*, defaults to `256`):
            Images compared with the training set at once.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all draws.

    Returns:
        [`Memorisation`]

    Raises:
        `ValueError`: when a held-out case is in the training set; when masks are missing on one side, or on both while
            generated images were made for training cases; when sizes or lengths do not agree.

    Example:

    ```python
    >>> generated, heldout = ImageSet(images, case_ids, masks), ImageSet(targets, case_ids, masks)
    >>> found = check_memorisation(generated, ImageSet(train_images, train_case_ids), heldout)
    >>> found.flagged, found.reason
    ```
    """
    for argument, side in (("generated", generated), ("train", train), ("heldout", heldout)):
        lengths = {
            name: len(getattr(side, name))
            for name in ("images", "case_ids", "masks", "features")
            if getattr(side, name) is not None
        }
        if len(set(lengths.values())) > 1 or not lengths["images"]:
            raise ValueError(
                f"`{argument}` has {lengths}; expected one of each for every image, and at least one image."
            )
    known = set(map(str, train.case_ids))
    shared = sorted(set(map(str, heldout.case_ids)) & known)
    if shared:
        raise ValueError(
            f"`heldout` shares {len(shared)} case(s) with `train`, e.g. {shared[0]!r}; a baseline needs cases that "
            "the model has never seen. Split by case (`onereward.data.schema.split_by_case`)."
        )
    own = np.isin(np.asarray(generated.case_ids, str), list(known))
    if (generated.masks is None) != (heldout.masks is None):
        given, missing = ("generated", "heldout") if heldout.masks is None else ("heldout", "generated")
        raise ValueError(
            f"`{given}` has masks and `{missing}` has none; a region is compared with regions: give both."
        )
    if generated.masks is None and own.any() and not exclude_own_case:
        raise ValueError(
            f"`generated` has {own.sum()} image(s) of training cases and no masks: what was not repainted equals the "
            "training image by construction. Give the masks, or images made for held-out cases, or "
            "`exclude_own_case=True`."
        )
    sets, columns = [generated, train, heldout], {"pixels": "images"}
    if all(side.features is not None for side in sets):
        scale = train.features.float().std(0).clamp(min=1e-12)  # so that all features weigh alike
        sets = [ImageSet(s.images, s.case_ids, s.masks, s.features.float() / scale) for s in sets]
        columns["features"] = "features"
    spaces = {
        space: _nearness(*sets, column, exclude_own_case, pairs, resamples, batch_size, seed)
        for space, column in columns.items()
    }
    cases = min(len(set(map(str, side.case_ids))) for side in (generated, heldout))
    return Memorisation(*_verdict(spaces, cases, int(own.sum()), exclude_own_case), spaces, int(own.sum()))


def _verdict(spaces: dict[str, Nearness], cases: int, n_own: int, exclude_own_case: bool) -> tuple[bool, str, str]:
    found, alike = [], []
    for name, near in spaces.items():
        if cases >= FEWEST_CASES and near.p_value < FALSE_ALARMS / len(spaces):
            found.append(
                f"in {name}, {near.suspects.value:.1%} of the generated images are suspiciously near one training "
                f"case and no other, {near.heldout_suspects.value:.1%} of the held-out ones (p = {near.p_value:.2g})"
            )
        if name == "pixels" and near.exact and not near.heldout_exact:
            found.append(f"{near.exact} generated image(s) equal a training image in every pixel compared")
        if near.closer.low > 0.5:
            alike.append(name)
    if found:
        reason = "; ".join(found) + "."
        if n_own and not exclude_own_case:
            reason += (
                f" {n_own} images were made for training cases, where an accurate model ends up near the case's own "
                "image: repeat with held-out cases, or with `exclude_own_case=True`."
            )
        return True, "copies", reason[0].upper() + reason[1:]
    if cases < FEWEST_CASES:
        return False, "cannot say", f"{cases} cases are too few for the test; it takes {FEWEST_CASES} on either side."
    near = spaces["pixels"]
    reason = (
        f"Suspected copies are not more frequent among generated than among held-out images "
        f"({near.suspects.value:.1%} against {near.heldout_suspects.value:.1%} in pixels)."
    )
    if alike:
        reason += (
            f" Generated images are closer to the training set than held-out ones (in {' and '.join(alike)}), but to "
            "several of its cases alike, as smooth or average pictures are."
        )
    return False, "no sign of copying", reason
