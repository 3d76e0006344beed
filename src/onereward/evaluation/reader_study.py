"""A reader study from the vote store: can readers tell synthetic images from real ones, how do they score them, and
which of two models do they prefer?

The functions take rows of [`onereward.preferences.schema.VOTE_FEATURES`]; what made each image is in `model_0` and
`model_1`, and real images carry a name such as `"real"`. Votes of one reader resemble each other, and so do votes on
one case, so shares come with the interval of [`crossed_proportion`], which allows for both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import datasets
import numpy as np
from scipy.special import betaincinv
from scipy.stats import t as student

from onereward.evaluation.bootstrap import Measured, measured_mean
from onereward.preferences.raters import Proportion, clustered_proportion


COLUMNS = (
    *("kind", "criterion", "rater", "rater_role", "case_id", "model_0", "model_1", "label_0", "both_unacceptable"),
    *("rating", "rating_min", "rating_max"),
)


def _columns(
    votes: datasets.Dataset | Iterable[dict], criterion: str | None, kind: str | None
) -> dict[str, np.ndarray]:
    """The columns that count, of the votes of one criterion and kind."""
    if isinstance(votes, datasets.Dataset):
        missing = [column for column in COLUMNS if column not in votes.column_names]
        rows = {} if missing else {column: list(votes[column]) for column in COLUMNS}
    else:
        votes = list(votes)
        missing = sorted({column for vote in votes for column in COLUMNS if column not in vote})
        rows = {} if missing else {column: [vote[column] for vote in votes] for column in COLUMNS}
    if missing:
        raise ValueError(
            f"`votes` lack the column(s) {missing}; expected rows of `VOTE_FEATURES`, such as those of `load_votes`."
        )
    numeric = ("label_0", "rating", "rating_min", "rating_max")
    columns = {
        name: np.array([np.nan if value is None else value for value in values], dtype=float)
        if name in numeric
        else np.array([str(value) for value in values], dtype=str)
        for name, values in rows.items()
    }
    columns["both_unacceptable"] = columns["both_unacceptable"] == "True"
    kept = np.ones(len(columns["kind"]), bool)
    for name, wanted in (("criterion", criterion), ("kind", kind)):
        if wanted is None:
            continue
        kept &= columns[name] == wanted
        if not kept.any():
            known = sorted(set(columns[name].tolist()))
            raise ValueError(f"`votes` hold none with `{name}` {wanted!r}; there are {known or 'no votes at all'}.")
    return {name: values[kept] for name, values in columns.items()}


# --- shares of votes that two things tie together --------------------------------------------------------------------


def crossed_proportion(
    success: np.ndarray,
    rater: np.ndarray,
    case: np.ndarray,
    strata: np.ndarray | None = None,
    level: float = 0.95,
) -> Proportion:
    r"""
    A share of votes that depend on each other within a rater **and** within a case, with the exact interval of the
    effective number of votes: a statement on other raters and other cases like these.

    The variance adds what raters share and what cases share, and takes off what is counted twice, `$V = V_{rater} +
    V_{case} - V_{both}$`, and is never below any of them; Student's t for the smaller number of raters or cases
    less one makes up for having estimated it; then Clopper and Pearson's interval for `$p (1 - p) / V$` votes, at most
    as many as there are. With a single rater only cases are resampled, and the statement is on that rater.

    Papers: A. C. Cameron, J. Gelbach and D. Miller, Robust Inference with Multiway Clustering, Journal of Business &
    Economic Statistics 29 (2011), https://doi.org/10.1198/jbes.2010.07136; E. Korn and B. Graubard, Survey Methodology
    24 (1998), as in [`onereward.preferences.raters.clustered_proportion`], to which this comes down for one rater.

    Args:
        success (`np.ndarray` of shape `(N,)`):
            1, 0, or 0.5 for a tie, for each vote.
        rater (`np.ndarray` of shape `(N,)`):
            Who voted.
        case (`np.ndarray` of shape `(N,)`):
            On which case.
        strata (`np.ndarray` of shape `(N,)`, *optional*):
            Kinds of votes that count the same however many there are of each: the share is the mean of their shares.
        level (`float`, *optional*, defaults to 0.95):
            Probability of the interval.

    Returns:
        [`Proportion`]

    Raises:
        `ValueError`: when the arrays differ in length.

    Example:

    ```python
    >>> share = crossed_proportion([1, 1, 0, 1, 1, 0], ["a", "a", "a", "b", "b", "b"], [1, 2, 3, 1, 2, 3])
    >>> round(share.value, 3)
    0.667
    ```
    """
    success, rater, case = np.asarray(success, dtype=float), np.asarray(rater), np.asarray(case)
    n = len(success)
    strata = np.zeros(n, int) if strata is None else np.asarray(strata)
    for name, column in (("rater", rater), ("case", case), ("strata", strata)):
        if len(column) != n:
            raise ValueError(f"`{name}` has {len(column)} entries for {n} votes; expected one for each.")
    if n == 0:
        return Proportion(np.nan, 0.0, 1.0, 0, 0.0)
    _, stratum, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    shares = np.bincount(stratum, success) / sizes
    p = float(shares.mean())
    # What each vote adds to the deviation of the share.
    influence = (success - shares[stratum]) / (sizes[stratum] * len(sizes))

    (of_rater, raters), (of_case, cases) = _codes(rater), _codes(case)
    of_both, both = _codes(of_rater * cases + of_case)

    def variance(groups, number):
        squares = float((np.bincount(groups, influence) ** 2).sum())
        return squares if number == n else squares * number / (number - 1) if number > 1 else 0.0

    parts = [variance(of_rater, raters), variance(of_case, cases), variance(of_both, both)]
    total = max(parts[0] + parts[1] - parts[2], *parts)
    numbers = [number for number in (raters, cases) if number > 1] or [1]
    effective = p * (1 - p) / total if total > 0 else float(max(numbers))  # all alike: nothing to estimate it from
    if min(numbers) > 1:
        effective *= (student.ppf((1 + level) / 2, n - 1) / student.ppf((1 + level) / 2, min(numbers) - 1)) ** 2
    effective = float(np.clip(effective, 1, n))
    return Proportion(p, *_clopper_pearson(p, effective, level), n, effective)


def _codes(names: np.ndarray) -> tuple[np.ndarray, int]:
    different, codes = np.unique(names, return_inverse=True)
    return codes.ravel(), len(different)


def _clopper_pearson(p: float, votes: float, level: float) -> tuple[float, float]:
    tail, hits, misses = (1 - level) / 2, p * votes, (1 - p) * votes
    low = float(betaincinv(hits, misses + 1, tail)) if hits > 1e-12 else 0.0
    high = float(betaincinv(hits + 1, misses, 1 - tail)) if misses > 1e-12 else 1.0
    return low, high


def required_votes(
    width: float, share: float = 0.5, level: float = 0.95, votes_per_case: float = 1.0, correlation: float = 0.0
) -> int:
    r"""
    How many votes make the interval of a share no wider than this.

    The smallest number whose Clopper-Pearson interval is narrow enough, close to the textbook's `$4 z^2 p (1 - p) /
    w^2$`, times the design effect `$1 + (m - 1) \rho$` of `m` votes on each case that are alike with the correlation
    `$\rho$` (L. Kish, Survey Sampling, 1965). It plans for the raters at hand: a statement on other raters also needs
    many raters, see [`crossed_proportion`].

    Args:
        width (`float`):
            Wanted width of the whole interval, in (0, 1): 0.1 for plus or minus 5 percentage points.
        share (`float`, *optional*, defaults to 0.5):
            The share expected, in [0, 1]. 0.5 needs the most votes.
        level (`float`, *optional*, defaults to 0.95):
            Probability of the interval.
        votes_per_case (`float`, *optional*, defaults to 1.0):
            `m`, at least 1.
        correlation (`float`, *optional*, defaults to 0.0):
            `$\rho$` in [0, 1]: 1 where a second vote on a case tells nothing new.

    Returns:
        `int`: votes.

    Raises:
        `ValueError`: when an argument is out of its range.

    Example:

    ```python
    >>> required_votes(0.1), required_votes(0.1, votes_per_case=3, correlation=0.2)
    (402, 563)
    ```
    """
    for name, value, fits, wanted in (
        ("width", width, 0 < width < 1, "in (0, 1)"),
        ("share", share, 0 <= share <= 1, "in [0, 1]"),
        ("level", level, 0 < level < 1, "in (0, 1)"),
        ("votes_per_case", votes_per_case, votes_per_case >= 1, "of at least 1"),
        ("correlation", correlation, 0 <= correlation <= 1, "in [0, 1]"),
    ):
        if not fits:
            raise ValueError(f"`{name}` is {value}; expected a number {wanted}.")

    def too_wide(votes):
        low, high = _clopper_pearson(share, votes, level)
        return high - low > width

    enough = 1
    while too_wide(enough):
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (enough + short) // 2
        enough, short = (enough, middle) if too_wide(middle) else (middle, short)
    return int(np.ceil(enough * (1 + (votes_per_case - 1) * correlation) - 1e-9))


# --- visual Turing test ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuringTest:
    """
    How well readers tell synthetic images from real ones. Chance is an accuracy of 0.5.

    Args:
        accuracy (`Proportion`):
            Share of right answers over all raters, allowing for raters and cases ([`crossed_proportion`]). Of single
            images, real and synthetic ones count half each, however many there were, or calling everything real would
            score above chance wherever most images are real.
        p_value (`float`):
            Of an accuracy of 0.5.
        sensitivity (`Proportion`, *optional*):
            Share of synthetic images called synthetic; `None` in a study of pairs, where there is one answer for both.
        specificity (`Proportion`, *optional*):
            Share of real images called real; `None` in a study of pairs.
        raters (`dict[str, Proportion]`):
            Accuracy of each rater, allowing for cases.
        roles (`dict[str, Proportion]`):
            Accuracy of each role, allowing for raters and cases.
        votes (`dict[str, int]`):
            `pairs` and `ratings` counted; `undecided` among them, which count half; `ignored`: pairs of two synthetic
            or of two real images.
        verdict (`str`):
            "told apart", "taken for the other" (below chance), or "not told apart", which is no proof that they
            cannot be: see the upper end of the accuracy's interval.
    """

    accuracy: Proportion
    p_value: float
    sensitivity: Proportion | None
    specificity: Proportion | None
    raters: dict[str, Proportion]
    roles: dict[str, Proportion]
    votes: dict[str, int]
    verdict: str


def turing_test(
    votes: datasets.Dataset | Iterable[dict],
    *,
    criterion: str = "realism",
    real: str = "real",
    models: list[str] | None = None,
    kind: str | None = None,
) -> TuringTest:
    """
    The visual Turing test: single images rated on a criterion of realism, above the middle of the scale being "real"
    (so 0 or 1 will do); or pairs of a real and a synthetic image, where the one that won was taken for real.

    Args:
        votes (`datasets.Dataset` or `Iterable[dict]`):
            Rows of `VOTE_FEATURES`.
        criterion (`str`, *optional*, defaults to `"realism"`):
            The criterion that asked which is real.
        real (`str`, *optional*, defaults to `"real"`):
            The model name of real images.
        models (`list[str]`, *optional*):
            Synthetic images of these models only.
        kind (`str`, *optional*):
            `"pair"` or `"rating"`, where the votes hold both.

    Returns:
        [`TuringTest`]

    Raises:
        `ValueError`: when there are no votes of that criterion and kind, they mix pairs and ratings, or they lack real
            or synthetic images.

    Example:

    ```python
    >>> study = turing_test(load_votes("runs/votes.parquet", criteria=None), criterion="realism")
    >>> study.accuracy.low, study.accuracy.high, study.verdict
    ```
    """
    columns = _columns(votes, criterion, kind)
    kinds = sorted(set(columns["kind"].tolist()))
    if len(kinds) > 1:
        raise ValueError(f"`votes` on {criterion!r} mix {kinds}; pass `kind`, one of them at a time.")
    pairs = kinds == ["pair"]

    def synthetic(name):
        return columns[name] != real if models is None else np.isin(columns[name], models)

    if pairs:
        first, second = columns["model_0"] == real, columns["model_1"] == real
        kept = (first & synthetic("model_1")) | (second & synthetic("model_0"))
        right, truly_real = np.where(first, columns["label_0"], 1 - columns["label_0"]), np.zeros(len(first), bool)
    else:
        truly_real = columns["model_0"] == real
        kept = truly_real | synthetic("model_0")
        middle = (columns["rating_min"] + columns["rating_max"]) / 2
        called_real = (np.sign(columns["rating"] - middle) + 1) / 2
        right = np.where(truly_real, called_real, 1 - called_real)
    if not kept.any() or (not pairs and len(set(truly_real[kept].tolist())) < 2):
        names = sorted({*columns["model_0"].tolist(), *(columns["model_1"].tolist() if pairs else [])})
        raise ValueError(
            f"`votes` on {criterion!r} do not hold both real images, named {real!r}, and synthetic ones"
            f"{'' if models is None else f' of {models}'}; the models are {names}. Name the real ones with `real`."
        )
    right, truly_real, rater, role, case = (
        column[kept] for column in (right, truly_real, columns["rater"], columns["rater_role"], columns["case_id"])
    )

    def share(rows, success=right, strata=truly_real):
        return crossed_proportion(success[rows], rater[rows], case[rows], strata[rows])

    everything = np.ones(len(right), bool)
    accuracy = share(everything)
    p_value = accuracy.p_value(0.5)
    above = accuracy.low > 0.5
    return TuringTest(
        accuracy=accuracy,
        p_value=p_value,
        sensitivity=None if pairs else share(~truly_real),
        specificity=None if pairs else share(truly_real),
        raters={str(name): share(rater == name) for name in np.unique(rater)},
        roles={str(name): share(role == name) for name in np.unique(role)},
        votes={
            "pairs": len(right) if pairs else 0,
            "ratings": 0 if pairs else len(right),
            "undecided": int((right == 0.5).sum()),
            "ignored": int((~kept).sum()),
        },
        verdict="told apart" if above else "taken for the other" if accuracy.high < 0.5 else "not told apart",
    )


# --- scored criteria -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreDifference:
    """
    The second model's scores less the first's, of the same rater and case.

    Args:
        first, second (`str`):
            The models.
        difference ([`Measured`]):
            Mean of second - first, with its interval by case. `n` counts raters and cases with both; `n_failed` those
            with one of the two only.
    """

    first: str
    second: str
    difference: Measured


@dataclass(frozen=True)
class ScoredCriterion:
    """
    The ratings on one criterion.

    Args:
        criterion (`str`):
            The criterion.
        scale (`list[float]`):
            Ends of the scale.
        models (`dict[str, Measured]`):
            Mean rating of each model, on the scale, with its interval by case.
        differences (`list[ScoreDifference]`):
            Each two models, paired.
    """

    criterion: str
    scale: list[float]
    models: dict[str, Measured]
    differences: list[ScoreDifference]


def scored_criteria(
    votes: datasets.Dataset | Iterable[dict],
    *,
    criteria: list[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, ScoredCriterion]:
    """
    Mean ratings of each model, and paired differences between models. The intervals resample cases: they are
    statements on other cases, rated by these raters.

    Args:
        votes (`datasets.Dataset` or `Iterable[dict]`):
            Rows of `VOTE_FEATURES`; votes on pairs are left out.
        criteria (`list[str]`, *optional*):
            Which criteria; all that have ratings when not given.
        resamples (`int`, *optional*, defaults to 2000):
            Resamples of the bootstrap.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        `dict[str, ScoredCriterion]`

    Raises:
        `ValueError`: when there are no ratings (of a criterion asked for), or one criterion was rated on two scales.

    Example:

    ```python
    >>> scores = scored_criteria(load_votes("runs/votes.parquet", criteria=None))
    >>> scores["quality"].differences[0].difference.low > 0
    ```
    """
    votes = votes if isinstance(votes, datasets.Dataset) else list(votes)
    everything = _columns(votes, None, "rating")
    result = {}
    for criterion in sorted(set(everything["criterion"].tolist())) if criteria is None else criteria:
        columns = _columns(votes, criterion, "rating")
        scales = sorted({*zip(columns["rating_min"].tolist(), columns["rating_max"].tolist(), strict=True)})
        if len(scales) > 1:
            raise ValueError(
                f"`votes` rate {criterion!r} on the scales {scales}; bring them to one scale, or pass those of one."
            )
        rating, model, case = columns["rating"], columns["model_0"], columns["case_id"]
        names = sorted(set(model.tolist()))
        means = {
            name: measured_mean(rating[model == name], case[model == name], resamples=resamples, seed=seed)
            for name in names
        }
        # Mean of a model for each rater and case.
        of_cell, cells = _codes(np.unique(columns["rater"], return_inverse=True)[1] * len(case) + _codes(case)[0])
        cell_case = case[np.unique(of_cell, return_index=True)[1]]
        table = np.full((len(names), cells), np.nan)
        for row, name in enumerate(names):
            rows = (model == name) & np.isfinite(rating)
            count = np.bincount(of_cell[rows], minlength=cells)
            total = np.bincount(of_cell[rows], rating[rows], minlength=cells)
            table[row] = np.divide(total, count, out=table[row], where=count > 0)
        differences = []
        for i, j in combinations(range(len(names)), 2):
            either = np.isfinite(table[i]) | np.isfinite(table[j])
            difference = measured_mean(table[j] - table[i], cell_case, either, resamples, seed)
            differences.append(ScoreDifference(names[i], names[j], difference))
        result[criterion] = ScoredCriterion(criterion, list(scales[0]), means, differences)
    return result


# --- preference ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WinRate:
    """
    How often `after` is preferred to `before`; a tie is half a win. No preference is 0.5.

    Args:
        before, after (`str`):
            The models.
        criterion (`str`):
            The criterion, `""` for all together.
        rate (`Proportion`):
            Win rate with its interval by case: a statement on other cases, judged by these raters.
        rate_any_rater (`Proportion`):
            The same with the interval for other raters, too ([`crossed_proportion`]).
        p_value (`float`):
            Of a rate of 0.5, by case.
        wins, ties, losses (`int`):
            Votes for `after`, for neither, for `before`.
        both_unacceptable (`float`):
            Share of votes that found neither image acceptable.
        roles (`dict[str, Proportion]`):
            Win rate for each role, by case.
        verdict (`str`):
            "better", "worse", or "no difference" where the interval of `rate` holds 0.5.
    """

    before: str
    after: str
    criterion: str
    rate: Proportion
    rate_any_rater: Proportion
    p_value: float
    wins: int
    ties: int
    losses: int
    both_unacceptable: float
    roles: dict[str, Proportion]
    verdict: str


def win_rate(
    votes: datasets.Dataset | Iterable[dict], before: str, after: str, *, criterion: str | None = None
) -> WinRate:
    """
    The preference for one model over another, from votes on pairs.

    Args:
        votes (`datasets.Dataset` or `Iterable[dict]`):
            Rows of `VOTE_FEATURES`; only pairs of these two models count.
        before (`str`):
            Model name of the one, say the base.
        after (`str`):
            Model name of the other, say the tuned one.
        criterion (`str`, *optional*):
            One criterion; all together when not given, with the votes on a case counted as one cluster.

    Returns:
        [`WinRate`]

    Raises:
        `ValueError`: when there is no pair of the two.

    Example:

    ```python
    >>> study = win_rate(load_votes("runs/votes.parquet", criteria=None), "base", "tuned", criterion="quality")
    >>> study.rate.value, study.rate.low, study.verdict
    ```
    """
    columns = _columns(votes, criterion, "pair")
    forward = (columns["model_0"] == before) & (columns["model_1"] == after)
    backward = (columns["model_0"] == after) & (columns["model_1"] == before)
    kept = forward | backward
    if before == after or not kept.any():
        known = sorted({*columns["model_0"].tolist(), *columns["model_1"].tolist()})
        raise ValueError(
            f"`votes` hold no pair of {before!r} and {after!r}; the models are {known}. Pass two of them that were "
            "compared."
        )
    won = np.where(backward, columns["label_0"], 1 - columns["label_0"])[kept]
    rater, role, case = (columns[name][kept] for name in ("rater", "rater_role", "case_id"))
    rate = clustered_proportion(won, case)
    return WinRate(
        before=before,
        after=after,
        criterion=criterion or "",
        rate=rate,
        rate_any_rater=crossed_proportion(won, rater, case),
        p_value=rate.p_value(0.5),
        wins=int((won == 1).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won == 0).sum()),
        both_unacceptable=float(columns["both_unacceptable"][kept].mean()),
        roles={str(name): clustered_proportion(won[role == name], case[role == name]) for name in np.unique(role)},
        verdict="better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else "no difference",
    )
