"""
From many answers to one: the label of an item, and the order of models.

Majority and Dawid-Skene give each item a label. Bradley-Terry and Davidson give each item a utility from pairs, and
the additive model from ratings; both take the raters' own habits out. `rank_pairs` and `rank_ratings` put intervals on
the order.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import logsumexp
from scipy.stats import rankdata
from tqdm.auto import tqdm

from onereward.preferences.agreement import resample_clusters


def majority(ratings: np.ndarray) -> np.ndarray:
    """
    The most frequent answer on each item.

    Args:
        ratings (`np.ndarray` of shape `(items, raters)`):
            A table as from [`~onereward.preferences.agreement.rating_table`], NaN where missing.

    Returns:
        `np.ndarray` of shape `(items,)`: NaN where nobody answered, or two answers are equally frequent.

    Example:

    ```python
    >>> majority([[1, 1, 0], [1, 0, np.nan]])
    array([ 1., nan])
    ```
    """
    ratings = np.asarray(ratings, dtype=float)
    values = np.unique(ratings[np.isfinite(ratings)])
    if len(values) == 0:
        return np.full(len(ratings), np.nan)
    counts = np.stack([(ratings == value).sum(axis=1) for value in values], axis=1)
    alone = (counts == counts.max(axis=1, keepdims=True)).sum(axis=1) == 1
    return np.where(alone & (counts.max(axis=1) > 0), values[counts.argmax(axis=1)], np.nan)


@dataclass(frozen=True)
class DawidSkene:
    """
    What [`dawid_skene`] found.

    Args:
        items (`np.ndarray` of shape `(I,)`):
            The items, sorted.
        raters (`np.ndarray` of shape `(R,)`):
            The raters, sorted.
        values (`np.ndarray` of shape `(K,)`):
            The answers, sorted.
        posterior (`np.ndarray` of shape `(I, K)`):
            Probability of each true answer to each item.
        prior (`np.ndarray` of shape `(K,)`):
            How frequent each true answer is.
        confusion (`np.ndarray` of shape `(R, K, K)`):
            Probability, for each rater and true answer, of each answer given.
        log_likelihood (`float`):
            Of the answers, the true ones summed over.
        iterations (`int`):
            Steps of EM it took.
    """

    items: np.ndarray
    raters: np.ndarray
    values: np.ndarray
    posterior: np.ndarray
    prior: np.ndarray
    confusion: np.ndarray
    log_likelihood: float
    iterations: int

    @property
    def labels(self) -> np.ndarray:
        """The most probable answer to each item, of shape `(I,)`."""
        return self.values[self.posterior.argmax(axis=1)]


def dawid_skene(
    item: np.ndarray,
    rater: np.ndarray,
    value: np.ndarray,
    *,
    smoothing: float = 0.01,
    tolerance: float = 1e-8,
    max_iterations: int = 2000,
) -> DawidSkene:
    r"""
    True labels and each rater's confusions, by EM from the majority. With n_irl answers l of rater r on item i,

        P(true i = k) is proportional to prior_k prod_{r, l} confusion_rkl^n_irl

    Paper: A. Dawid and A. Skene, Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm, Applied
    Statistics 28 (1979), https://doi.org/10.2307/2346806

    Args:
        item (`np.ndarray` of shape `(N,)`):
            What was judged. A rater may answer an item more than once.
        rater (`np.ndarray` of shape `(N,)`):
            Who judged it.
        value (`np.ndarray` of shape `(N,)`):
            The answers, unordered; NaN is no answer.
        smoothing (`float`, *optional*, defaults to 0.01):
            Answers of each kind that every rater is given beforehand, so that what somebody never did is not taken for
            impossible; 0 is the paper's maximum likelihood.
        tolerance (`float`, *optional*, defaults to 1e-8):
            Stop when no posterior moves further than this.
        max_iterations (`int`, *optional*, defaults to 2000):
            Stop at the latest after as many steps, with a warning.

    Returns:
        [`DawidSkene`]

    Raises:
        `ValueError`: when there is no answer.

    Example:

    ```python
    >>> found = dawid_skene(votes["pair_id"], votes["rater"], votes["label_0"])
    >>> dict(zip(found.items, found.labels))
    ```
    """
    item, rater, value = np.asarray(item), np.asarray(rater), np.asarray(value, dtype=float)
    given = np.isfinite(value)
    if not given.any():
        raise ValueError("`value` holds no answer; expected at least one number that is not NaN.")
    items, i = np.unique(item[given], return_inverse=True)
    raters, r = np.unique(rater[given], return_inverse=True)
    values, k = np.unique(value[given], return_inverse=True)
    counts = np.zeros((len(raters), len(items), len(values)))
    np.add.at(counts, (r, i, k), 1)

    posterior = counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, None]  # the paper's start, equation 3.1
    moved, iterations = np.inf, 0
    while moved >= tolerance and iterations < max_iterations:
        iterations += 1
        prior = posterior.mean(axis=0)
        confusion = np.einsum("ril,ik->rkl", counts, posterior) + smoothing
        total = confusion.sum(axis=-1, keepdims=True)
        # where no answer bears on a row of confusions, any will do
        confusion = np.divide(confusion, total, out=np.full_like(confusion, 1 / len(values)), where=total > 0)
        tiny = np.finfo(float).tiny  # its logarithm is finite, so that 0 answers times it is 0
        joint = np.log(np.maximum(prior, tiny)) + np.einsum("ril,rkl->ik", counts, np.log(np.maximum(confusion, tiny)))
        likelihood = logsumexp(joint, axis=1)
        before, posterior = posterior, np.exp(joint - likelihood[:, None])
        moved = np.abs(posterior - before).max()
    if moved >= tolerance:
        warnings.warn(
            f"Dawid-Skene has not settled after {iterations} steps: posteriors still move by {moved:.1g}. Raise "
            "`max_iterations`, or `tolerance`.",
            stacklevel=2,
        )
    return DawidSkene(items, raters, values, posterior, prior, confusion, float(likelihood.sum()), iterations)


@dataclass(frozen=True)
class Utilities:
    """
    What [`fit_pairs`] found. Standard errors are from the observed information.

    Args:
        items (`np.ndarray` of shape `(I,)`):
            The items, sorted.
        utility (`np.ndarray` of shape `(I,)`):
            Utility of each item in log-odds of the mean rater; the sum is 0.
        covariance (`np.ndarray` of shape `(I, I)`):
            Of the utilities. A difference has the variance `c[i, i] + c[j, j] - 2 * c[i, j]`.
        raters (`np.ndarray` of shape `(R,)`):
            The raters, sorted; `[""]` when none were named.
        discrimination (`np.ndarray` of shape `(R,)`):
            How strongly each rater's votes follow the utilities: the mean is 1, 0 is a coin, below 0 is reversed.
        discrimination_se (`np.ndarray` of shape `(R,)`):
            Its standard errors; NaN for a single rater, whose 1 is a convention.
        log_tie (`np.ndarray` of shape `(R,)`):
            Logarithm of each rater's nu of ties; `-inf` where there is no tie in the data.
        log_tie_se (`np.ndarray` of shape `(R,)`):
            Its standard errors.
        position (`np.ndarray` of shape `(R,)`):
            Log-odds that each rater gives away to the image on the left; NaN where sides are not known.
        position_se (`np.ndarray` of shape `(R,)`):
            Its standard errors.
        log_likelihood (`float`):
            Of the votes, without the penalty.
        groups (`int`):
            Number of groups of items that no chain of votes connects. Utilities compare within a group only.
    """

    items: np.ndarray
    utility: np.ndarray
    covariance: np.ndarray
    raters: np.ndarray
    discrimination: np.ndarray
    discrimination_se: np.ndarray
    log_tie: np.ndarray
    log_tie_se: np.ndarray
    position: np.ndarray
    position_se: np.ndarray
    log_likelihood: float
    groups: int

    @property
    def utility_se(self) -> np.ndarray:
        """Standard errors of the utilities, of shape `(I,)`."""
        return np.sqrt(np.diag(self.covariance))


def fit_pairs(
    item_0: np.ndarray,
    item_1: np.ndarray,
    label_0: np.ndarray,
    rater: np.ndarray | None = None,
    left: np.ndarray | None = None,
    *,
    ridge: float = 0.01,
) -> Utilities:
    r"""
    Utilities of items from votes on pairs: Bradley-Terry, with ties after Davidson, and with raters who differ. With
    utilities u, rater r's discrimination a_r, pull to the left b_r and ties nu_r, and s = 1 where item 0 was on the
    left, -1 where it was on the right and 0 where that is not known,

        d = a_r (u_0 - u_1) + b_r s,   P(0 wins) : P(tie) : P(1 wins) = exp(d/2) : nu_r : exp(-d/2)

    Ties are in the model where the votes hold any, b where `left` is given. The penalised likelihood
    log L - ridge (|u|^2 + |a - 1|^2 + |log nu|^2 + |b|^2) is largest at the result.

    Papers: R. Bradley and M. Terry, Rank Analysis of Incomplete Block Designs, Biometrika 39 (1952),
    https://doi.org/10.2307/2334029; R. Davidson, JASA 65 (1970), https://doi.org/10.1080/01621459.1970.10481082;
    discriminations: X. Chen et al., Pairwise Ranking Aggregation in a Crowdsourced Setting, WSDM 2013,
    https://doi.org/10.1145/2433396.2433420, here on the scale of the logits.

    Args:
        item_0 (`np.ndarray` of shape `(N,)`):
            The first item of each pair, such as `model_0`. Pairs of an item with itself are left out.
        item_1 (`np.ndarray` of shape `(N,)`):
            The second item.
        label_0 (`np.ndarray` of shape `(N,)`):
            1 where item 0 won, 0 where item 1 won, 0.5 for a tie; NaN is no vote.
        rater (`np.ndarray` of shape `(N,)`, *optional*):
            Who voted. All votes are taken as of one rater when not given.
        left (`np.ndarray` of shape `(N,)`, *optional*):
            Which item, 0 or 1, was on the left; -1 where that is not known.
        ridge (`float`, *optional*, defaults to 0.01):
            Weight of the penalty, as `alpha` in `choix`. It keeps items that always won finite; 0 is maximum
            likelihood.

    Returns:
        [`Utilities`]

    Raises:
        `ValueError`: when there is no vote, a label is not 0, 0.5 or 1, or `ridge` is 0 and the maximum is not finite.

    Example:

    ```python
    >>> found = fit_pairs(votes["model_0"], votes["model_1"], votes["label_0"], votes["rater"], votes["left"])
    >>> dict(zip(found.items, found.utility.round(2)))
    {'base': -0.61, 'tuned': 0.61}
    ```
    """
    design = _PairDesign(item_0, item_1, label_0, rater, left)
    if ridge == 0:
        design.check_finite()
    return design.fit(ridge)


class _PairDesign:
    """Votes counted by pair, rater and side, so that a bootstrap draw costs a count and a few Newton steps."""

    def __init__(self, item_0, item_1, label_0, rater, left):
        label = np.asarray(label_0, dtype=float)
        item_0, item_1 = np.asarray(item_0), np.asarray(item_1)
        rater = np.full(len(label), "") if rater is None else np.asarray(rater)
        side = np.full(len(label), -1) if left is None else np.asarray(left)
        lengths = {len(column) for column in (item_0, item_1, label, rater, side)}
        if len(lengths) > 1:
            raise ValueError(
                f"The columns have different lengths, {sorted(lengths)}; expected one entry a vote in each."
            )
        wrong = np.isfinite(label) & ~np.isin(label, (0, 0.5, 1))
        if wrong.any():
            raise ValueError(
                f"`label_0` is {label[wrong][0]} in row {np.flatnonzero(wrong)[0]}; expected 1 (item 0 won), 0 (item "
                "1 won), 0.5 (tie) or NaN."
            )
        self.used = np.isfinite(label) & (item_0 != item_1)
        if not self.used.any():
            raise ValueError("There is no vote on a pair of different items; expected at least one.")
        items, both = np.unique(np.concatenate([item_0[self.used], item_1[self.used]]), return_inverse=True)
        raters, r = np.unique(rater[self.used], return_inverse=True)
        i, j = np.split(both, 2)
        s = np.array([0, 1, -1])[side[self.used].astype(int) + 1]
        self.items, self.raters, self.has_sides = items, raters, bool(s.any())
        self.outcome = np.round(2 - 2 * label[self.used]).astype(int)  # 0 won, 1 tie, 2 lost
        self.has_ties = bool((self.outcome == 1).any())
        cells, self.cell = np.unique(np.stack([i, j, r, s]), axis=1, return_inverse=True)
        self.i, self.j, self.r, self.s = cells
        # orthonormal bases: utilities sum to 0, discriminations to the number of raters
        self.basis_u, self.basis_a = _sum_zero_basis(len(items)), _sum_zero_basis(len(raters))
        sizes = [len(items) - 1, len(raters) - 1, len(raters) * self.has_ties, len(raters) * self.has_sides]
        ends = np.cumsum([0, *sizes])
        self.part = dict(zip("uanb", map(slice, ends[:-1], ends[1:]), strict=True))  # n: log nu
        self.size = int(ends[-1])
        self.contrast = self.basis_u[self.i] - self.basis_u[self.j]
        one_hot = np.eye(len(raters))[self.r]
        self.d_tie = np.zeros((len(self.i), self.size))
        self.d_position = np.zeros((len(self.i), self.size))
        if self.has_ties:
            self.d_tie[:, self.part["n"]] = one_hot
        if self.has_sides:
            self.d_position[:, self.part["b"]] = one_hot * self.s[:, None]

    def count(self, times: np.ndarray | None = None) -> np.ndarray:
        """Votes (won, tie, lost) of each cell, each row of the votes counted `times`."""
        weight = None if times is None else times[self.used]
        flat = np.bincount(self.cell.ravel() * 3 + self.outcome, weight, minlength=3 * len(self.i))
        return flat.reshape(-1, 3).astype(float)

    def seen(self, counts: np.ndarray) -> np.ndarray:
        """Which items have votes."""
        votes = counts.sum(axis=1)
        return np.bincount(self.i, votes, len(self.items)) + np.bincount(self.j, votes, len(self.items)) > 0

    def check_finite(self) -> None:
        """Ford's condition (1957): from each item a chain of wins and ties must lead to each other one."""
        counts = self.count()
        beats = np.concatenate([np.stack([self.i, self.j]), np.stack([self.j, self.i])], axis=1)
        often = np.concatenate([counts[:, :2].sum(axis=1), counts[:, 1:].sum(axis=1)])
        graph = coo_array((often, beats), shape=(len(self.items),) * 2).tocsr()
        graph.eliminate_zeros()
        if connected_components(graph, directed=True, connection="strong")[0] > 1:
            raise ValueError(
                "With `ridge` 0 the utilities are not finite: some items never lost to, or were never compared with, "
                "the others. Set `ridge` above 0, e.g. 0.01, or collect more votes."
            )

    def groups(self) -> int:
        graph = coo_array((np.ones(len(self.i)), (self.i, self.j)), shape=(len(self.items),) * 2)
        return int(connected_components(graph, directed=False)[0])

    def loss(self, x: np.ndarray, counts: np.ndarray, ridge: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Penalised negative log-likelihood, gradient and Hessian."""
        part, total = self.part, counts.sum(axis=1)
        discrimination = 1 + self.basis_a @ x[part["a"]]
        gap = self.contrast @ x[part["u"]]  # u_0 - u_1
        d_delta = self.d_position.copy()
        d_delta[:, part["u"]] = discrimination[self.r, None] * self.contrast
        d_delta[:, part["a"]] = gap[:, None] * self.basis_a[self.r]
        delta = discrimination[self.r] * gap + self.d_position @ x
        log_nu = self.d_tie @ x if self.has_ties else np.full(len(gap), -np.inf)
        logits = np.stack([delta / 2, log_nu, -delta / 2], axis=1)
        log_z = logsumexp(logits, axis=1)
        p = np.exp(logits - log_z[:, None])
        mean = (p[:, 0] - p[:, 2]) / 2
        slope = (counts[:, 0] - counts[:, 2]) / 2 - total * mean  # of log L by delta

        value = -((counts[:, 0] - counts[:, 2]) * delta / 2 - total * log_z).sum()
        if self.has_ties:
            value -= (counts[:, 1] * log_nu).sum()
        gradient = -d_delta.T @ slope - self.d_tie.T @ (counts[:, 1] - total * p[:, 1])
        hessian = d_delta.T @ ((total * ((p[:, 0] + p[:, 2]) / 4 - mean**2))[:, None] * d_delta)
        cross = d_delta.T @ ((total * mean * p[:, 1])[:, None] * self.d_tie)
        hessian -= cross + cross.T
        hessian += self.d_tie.T @ ((total * p[:, 1] * (1 - p[:, 1]))[:, None] * self.d_tie)
        bend = self.contrast.T @ (slope[:, None] * self.basis_a[self.r])  # delta is a product of u and a
        hessian[part["u"], part["a"]] -= bend
        hessian[part["a"], part["u"]] -= bend.T
        return (
            value + ridge * x @ x,
            gradient + 2 * ridge * x,
            hessian + 2 * ridge * np.eye(self.size),
        )

    def solve(self, counts: np.ndarray, ridge: float, start: np.ndarray | None = None) -> np.ndarray:
        """The minimum of the loss."""
        last: dict[bytes, tuple] = {}

        def at(x):
            if x.tobytes() not in last:
                last.clear()
                last[x.tobytes()] = self.loss(x, counts, ridge)
            return last[x.tobytes()]

        found = minimize(
            lambda x: at(x)[0],
            np.zeros(self.size) if start is None else start,
            jac=lambda x: at(x)[1],
            hess=lambda x: at(x)[2],
            method="trust-exact",
            options={"gtol": 1e-9 * max(1.0, counts.sum()), "initial_trust_radius": 1.0, "max_trust_radius": 100.0},
        )
        return found.x

    def fit(self, ridge: float) -> Utilities:
        counts = self.count()
        x = self.solve(counts, ridge)
        value, _, hessian = self.loss(x, counts, ridge)
        covariance = np.linalg.pinv(hessian, hermitian=True)
        part, nothing = self.part, np.full(len(self.raters), np.nan)

        def spread(name, basis=None):
            block = covariance[part[name], part[name]]
            return block if basis is None else basis @ block @ basis.T

        several = len(self.raters) > 1
        return Utilities(
            items=self.items,
            utility=self.basis_u @ x[part["u"]],
            covariance=spread("u", self.basis_u),
            raters=self.raters,
            discrimination=1 + self.basis_a @ x[part["a"]],
            discrimination_se=np.sqrt(np.diag(spread("a", self.basis_a))) if several else nothing,
            log_tie=x[part["n"]] if self.has_ties else np.full(len(self.raters), -np.inf),
            log_tie_se=np.sqrt(np.diag(spread("n"))) if self.has_ties else nothing,
            position=x[part["b"]] if self.has_sides else nothing,
            position_se=np.sqrt(np.diag(spread("b"))) if self.has_sides else nothing,
            log_likelihood=float(ridge * x @ x - value),
            groups=self.groups(),
        )


def _sum_zero_basis(size: int) -> np.ndarray:
    """Orthonormal columns, `(size, size - 1)`, of the vectors whose entries sum to 0."""
    return np.linalg.qr(np.eye(size)[:, : size - 1] - 1 / size)[0] if size > 1 else np.zeros((1, 0))


@dataclass(frozen=True)
class Ranking:
    """
    Items in order, with percentile bootstrap intervals.

    Args:
        items (`np.ndarray` of shape `(I,)`):
            The items, best first.
        score (`np.ndarray` of shape `(I,)`):
            Utility, or mean rating free of the raters' severities.
        score_interval (`np.ndarray` of shape `(I, 2)`):
            Lower and upper end.
        rank (`np.ndarray` of shape `(I,)`):
            1 is the best; equal scores share their mean rank.
        rank_interval (`np.ndarray` of shape `(I, 2)`):
            Lower and upper end.
        best (`np.ndarray` of shape `(I,)`):
            Share of the draws in which the item was first, alone or among equals.
        clusters (`int`):
            Number of cases that were drawn from. Below 20 the intervals are rough.
    """

    items: np.ndarray
    score: np.ndarray
    score_interval: np.ndarray
    rank: np.ndarray
    rank_interval: np.ndarray
    best: np.ndarray
    clusters: int


def rank_pairs(
    item_0: np.ndarray,
    item_1: np.ndarray,
    label_0: np.ndarray,
    rater: np.ndarray | None = None,
    left: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
    *,
    ridge: float = 0.01,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
    progress: str | None = None,
) -> Ranking:
    """
    Rank items by votes on pairs, with intervals from drawing cases with replacement.

    Args:
        item_0, item_1, label_0, rater, left, ridge:
            As in [`fit_pairs`].
        clusters (`np.ndarray` of shape `(N,)`, *optional*):
            What votes are drawn together by: the case, or at least the pair, because votes on one are not
            independent. Each vote by itself when not given.
        resamples (`int`, *optional*, defaults to 500):
            Number of draws.
        level (`float`, *optional*, defaults to 0.95):
            Probability of the intervals.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        progress (`str`, *optional*):
            Words before a progress bar; no bar when not given.

    Returns:
        [`Ranking`]

    Raises:
        `ValueError`: as in [`fit_pairs`].

    Example:

    ```python
    >>> ranking = rank_pairs(votes["model_0"], votes["model_1"], votes["label_0"], clusters=votes["case_id"])
    >>> list(zip(ranking.items, ranking.rank_interval.tolist()))
    [('tuned', [1.0, 1.0]), ('base', [2.0, 2.0])]
    ```
    """
    design = _PairDesign(item_0, item_1, label_0, rater, left)
    if ridge == 0:
        design.check_finite()
    whole = design.solve(design.count(), ridge)

    def score(times):
        counts = design.count(times)
        utility = design.basis_u @ design.solve(counts, ridge, start=whole)[design.part["u"]]
        return np.where(design.seen(counts), utility, np.nan)  # an item that was not drawn has no place in this draw

    clusters = np.arange(len(design.used)) if clusters is None else np.asarray(clusters)
    return _ranking(
        design.items, design.basis_u @ whole[design.part["u"]], score, clusters, resamples, level, seed, progress
    )


@dataclass(frozen=True)
class AdditiveRatings:
    """
    What [`fit_ratings`] found.

    Args:
        items (`np.ndarray` of shape `(I,)`):
            The items, sorted.
        score (`np.ndarray` of shape `(I,)`):
            Mean rating of each item by the mean rater.
        raters (`np.ndarray` of shape `(R,)`):
            The raters, sorted.
        severity (`np.ndarray` of shape `(R,)`):
            How far each rater's ratings lie **below** the mean rater's; the sum is 0.
        noise (`np.ndarray` of shape `(R,)`):
            Standard deviation of each rater's ratings around the model, in units of the scale.
        groups (`int`):
            Number of groups of items that no chain of raters and cases connects. Scores compare within a group only.
    """

    items: np.ndarray
    score: np.ndarray
    raters: np.ndarray
    severity: np.ndarray
    noise: np.ndarray
    groups: int


def fit_ratings(
    item: np.ndarray, rater: np.ndarray, rating: np.ndarray, case: np.ndarray | None = None
) -> AdditiveRatings:
    r"""
    Scores of items from ratings, free of the raters' severities and of how hard the cases were, by least squares:

        rating = score_item - severity_rater + case effect + noise

    Reference: H. Scheffe, The Analysis of Variance (1959), chapter 4.

    Args:
        item (`np.ndarray` of shape `(N,)`):
            What was rated, such as the model.
        rater (`np.ndarray` of shape `(N,)`):
            Who rated it.
        rating (`np.ndarray` of shape `(N,)`):
            The ratings, higher is better; NaN is no rating.
        case (`np.ndarray` of shape `(N,)`, *optional*):
            The case it was rated on. Without it there are no case effects.

    Returns:
        [`AdditiveRatings`]

    Raises:
        `ValueError`: when there is no rating.

    Example:

    ```python
    >>> fit_ratings(["a", "b", "a", "b"], ["x", "x", "y", "y"], [3, 4, 1, 2]).severity
    array([-1.,  1.])
    ```
    """
    design = _RatingDesign(item, rater, rating, case)
    return design.fit()


class _RatingDesign:
    """The design of the additive model with the case means taken out (Frisch-Waugh)."""

    def __init__(self, item, rater, rating, case):
        y = np.asarray(rating, dtype=float)
        self.used = np.isfinite(y)
        if not self.used.any():
            raise ValueError("`rating` holds no rating; expected at least one number that is not NaN.")
        self.y = y[self.used]
        self.items, self.i = np.unique(np.asarray(item)[self.used], return_inverse=True)
        self.raters, self.r = np.unique(np.asarray(rater)[self.used], return_inverse=True)
        one_hot = np.concatenate([np.eye(len(self.items))[self.i], np.eye(len(self.raters))[self.r]], axis=1)
        case = np.zeros(len(y)) if case is None else np.asarray(case)
        _, self.c = np.unique(case[self.used], return_inverse=True)
        number = np.bincount(self.c)

        def centred(column):
            return column - (np.bincount(self.c, column) / number)[self.c]

        self.x = np.apply_along_axis(centred, 0, one_hot)
        self.centred_y = centred(self.y)

    def solve(self, times: np.ndarray | None = None) -> np.ndarray:
        """Effects of items and raters. The smallest solution is the one in which either sum to 0."""
        weight = np.ones(len(self.y)) if times is None else times[self.used].astype(float)
        gram = self.x.T @ (weight[:, None] * self.x)
        return np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ (self.x.T @ (weight * self.centred_y))

    def fit(self) -> AdditiveRatings:
        effects = self.solve()
        score, severity = self.score(effects), -effects[len(self.items) :]
        residual = self.centred_y - self.x @ effects
        count = np.bincount(self.r)
        noise = np.sqrt(np.bincount(self.r, residual**2) / count)
        return AdditiveRatings(self.items, score, self.raters, severity, noise, self.groups())

    def groups(self) -> int:
        """Two items compare if whatever the ratings leave open, the null space, moves both alike."""
        values, vectors = np.linalg.eigh(self.x.T @ self.x)
        left_open = vectors[: len(self.items), values <= 1e-10 * max(values[-1], 1)]
        alike = np.isclose(left_open[:, None], left_open[None], atol=1e-6).all(axis=2)
        return int(connected_components(alike, directed=False)[0])

    def score(self, effects: np.ndarray) -> np.ndarray:
        """The items' effects, lifted to the scale: the mean case, each counted once, has the effect 0."""
        item_effect, rater_effect = np.split(effects, [len(self.items)])
        rest = self.y - item_effect[self.i] - rater_effect[self.r]
        return item_effect + (np.bincount(self.c, rest) / np.bincount(self.c)).mean()


def rank_ratings(
    item: np.ndarray,
    rater: np.ndarray,
    rating: np.ndarray,
    case: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
    *,
    scale: tuple[float, float] | None = None,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
    progress: str | None = None,
) -> Ranking:
    """
    Rank items by ratings, with intervals from drawing cases with replacement.

    Args:
        item, rater, rating, case:
            As in [`fit_ratings`].
        clusters (`np.ndarray` of shape `(N,)`, *optional*):
            What ratings are drawn together by, where that is more than `case`: the patient, say, of several cases.
            `case` when not given, and without that each rating by itself.
        scale (`tuple[float, float]`, *optional*):
            Smallest and largest rating that can be meant. Ratings beyond are slips: they are left out with a warning
            that names their rows, not cut off at the end of the scale.
        resamples (`int`, *optional*, defaults to 500):
            Number of draws.
        level (`float`, *optional*, defaults to 0.95):
            Probability of the intervals.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        progress (`str`, *optional*):
            Words before a progress bar; no bar when not given.

    Returns:
        [`Ranking`]

    Raises:
        `ValueError`: when there is no rating.

    Example:

    ```python
    >>> rank_ratings(rows["method"], rows["reader"], rows["contrast"], rows["set"], scale=(1, 5)).items[0]
    'NDCT'
    ```
    """
    rating = np.asarray(rating, dtype=float)
    if scale is not None:
        beyond = out_of_range(rating, *scale)
        if beyond.any():
            rows = np.flatnonzero(beyond)
            listed = ", ".join(map(str, rows[:10])) + (" ..." if len(rows) > 10 else "")
            warnings.warn(
                f"{len(rows)} of {len(rating)} ratings are outside the scale {scale[0]:g} to {scale[1]:g} and are "
                f"left out: rows {listed}, counted from 0. Ask the raters what they meant, and mend the rows.",
                stacklevel=2,
            )
        rating = np.where(beyond, np.nan, rating)
    design = _RatingDesign(item, rater, rating, case)
    number = len(design.items)
    whole = design.solve()
    # the level of the whole data in every draw: what is uncertain is how items differ, not how hard the cases were
    level_of_scale = design.score(whole) - whole[:number]

    def score(times):
        drawn = np.bincount(design.i, times[design.used], number) > 0
        return np.where(drawn, level_of_scale + design.solve(times)[:number], np.nan)

    if clusters is None:
        clusters = np.arange(len(rating)) if case is None else case
    return _ranking(
        design.items,
        design.score(whole),
        score,
        np.asarray(clusters),
        resamples,
        level,
        seed,
        progress,
    )


def out_of_range(rating: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """
    Which ratings are outside their scale.

    Args:
        rating (`np.ndarray` of shape `(N,)`):
            The ratings; NaN, no rating, is not outside.
        low (`float` or `np.ndarray` of shape `(N,)`):
            The smallest rating there is.
        high (`float` or `np.ndarray` of shape `(N,)`):
            The largest rating there is.

    Returns:
        `np.ndarray` of shape `(N,)`: booleans.

    Example:

    ```python
    >>> out_of_range([1, 5, 13], 1, 5)
    array([False, False,  True])
    ```
    """
    rating = np.asarray(rating, dtype=float)
    return (rating < np.asarray(low, dtype=float)) | (rating > np.asarray(high, dtype=float))


def _ranking(
    items: np.ndarray,
    score: np.ndarray,
    resampled_score: Callable[[np.ndarray], np.ndarray],
    clusters: np.ndarray,
    resamples: int,
    level: float,
    seed: int,
    progress: str | None,
) -> Ranking:
    draws = resample_clusters(clusters, resamples, seed)
    bar = tqdm(draws, total=resamples, desc=progress, disable=progress is None, leave=False)
    scores = np.stack([resampled_score(times) for times in bar])
    absent = np.isnan(scores)
    # rounded: what is equal but for the last bit is equal
    ranks = np.where(absent, np.nan, rankdata(-np.where(absent, -np.inf, scores).round(9), axis=1))
    ends = [(1 - level) / 2, (1 + level) / 2]
    order = np.argsort(-score, kind="stable")
    return Ranking(
        items=items[order],
        score=score[order],
        score_interval=np.nanquantile(scores, ends, axis=0).T[order],
        rank=rankdata(-score.round(9))[order],
        # ranks are counted, not measured: no rank between two draws
        rank_interval=np.nanquantile(ranks, ends, axis=0, method="closest_observation").T[order],
        best=(ranks == np.nanmin(ranks, axis=1, keepdims=True)).mean(axis=0)[order],
        clusters=len(np.unique(clusters)),
    )
