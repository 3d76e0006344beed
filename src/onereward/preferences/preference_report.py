"""One page on a file of votes: what was voted and by whom, how far the raters agree, and what follows from it."""

import base64
import csv
import io
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import jinja2
import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from onereward import __version__
from onereward.data.whole_file import whole_file
from onereward.preferences.aggregation import fit_pairs, fit_ratings, out_of_range, rank_pairs, rank_ratings
from onereward.preferences.agreement import (
    Estimate,
    cohen_kappa,
    fleiss_kappa,
    intra_rater,
    krippendorff_alpha,
    percent_agreement,
    rating_table,
    with_interval,
)
from onereward.preferences.raters import pairs_from_ratings, read_raters
from onereward.preferences.schema import PICTURES, load_votes, phi_warning, read_votes, validate_votes


NOTICE = "Research use only, not for clinical use."
FEW_ITEMS, FEW_CASES, MANY_RATERS = 20, 20, 6
BLAMED = ("careless", "adversarial")

# What a row holds where the file does not say; the other columns must be there.
_REQUIRED = ("pair_id", "criterion", "rater", "rater_role", "label_0", "model_0", "model_1", "case_id")
_OPTIONAL = {
    "kind": "pair",
    "set_id": None,
    "prompt": "",
    "task": "",
    "created_at": "",
    "rating": None,
    "rating_min": None,
    "rating_max": None,
    "both_unacceptable": False,
    "left": -1,
    "seconds": None,
    "comment": None,
}
_NUMBERS = ("label_0", "rating", "rating_min", "rating_max", "seconds")

# Of the Okabe-Ito palette, which readers with colour-vision deficiency can tell apart.
_COLOURS = {
    "fine": "#009E73",
    "careless": "#E69F00",
    "adversarial": "#D55E00",
    "too few votes": "#777777",
    "": "#0072B2",
}


def summarise_votes(
    votes: datasets.Dataset | dict,
    *,
    known: dict[tuple[str, str], float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """
    Everything that the report shows, as numbers.

    Args:
        votes (`datasets.Dataset` or `dict`):
            Rows of `VOTE_FEATURES`, of any version, or columns by these names as lists; pictures are not looked at.
            Needed are `pair_id`, `criterion`, `rater`, `rater_role`, `label_0`, `model_0`, `model_1` and `case_id`.
            A rating rates `image_0`, made by `model_0`; a higher rating is better.
        known (`dict[tuple[str, str], float]`, *optional*):
            Calibration items: (`pair_id`, criterion) to the right `label_0`, 1 or 0.
        resamples (`int`, *optional*, defaults to 1000):
            Draws of each bootstrap interval; rankings take half as many. Cases are drawn.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `dict`: `votes` (their number), `warnings` (texts), `criteria` (counts by criterion), `roles`, `agreement` (a
        list of rows, each figure an [`~onereward.preferences.agreement.Estimate`]), `kappas` (Cohen's, by pair of
        raters), `raters` (a list of rows with a [`~onereward.preferences.raters.RaterReading`] each), `blamed` (raters
        found careless or adversarial, whom the rankings leave out) and `rankings` (a list of rows with a
        [`~onereward.preferences.aggregation.Ranking`] each).

    Raises:
        `ValueError`: when a column is missing or there is no vote.

    Example:

    ```python
    >>> summary = summarise_votes(load_votes("votes.parquet"))
    >>> [(row["criterion"], row["alpha"].value) for row in summary["agreement"]]
    ```
    """
    columns = _columns(votes)
    if not len(columns["rater"]):
        raise ValueError("`votes` is empty; expected at least one vote.")
    warnings = []
    names = _shown_names(columns["rater"], warnings)
    columns["rater"] = np.array([names[name] for name in columns["rater"]])
    _leave_out_slips(columns, warnings)

    is_rating = columns["kind"] == "rating"
    # what is judged on one source image; ratings of one condition are compared with each other
    columns["condition"] = _joined(columns["case_id"], columns["task"], columns["prompt"])
    columns["answer"] = np.where(is_rating, columns["rating"], columns["label_0"])
    blocks = [
        {"criterion": criterion, "kind": kind, "rows": rows}
        for criterion in sorted(set(columns["criterion"]))
        for kind in ("pair", "rating")
        if (rows := np.flatnonzero((columns["criterion"] == criterion) & (is_rating == (kind == "rating")))).size
    ]

    readings = _read(columns, blocks, known or {}, resamples, seed)
    blamed = [row["rater"] for row in readings if row["reading"] and row["reading"].verdict in BLAMED]
    columns["trusted"] = ~np.isin(columns["rater"], blamed)
    counts, agreement, kappas = [], [], []
    raters_of = [len(set(columns["rater"][block["rows"]])) for block in blocks]
    figures = sum(7 + (n * (n - 1) if n <= MANY_RATERS else 0) for n in raters_of)
    bar = tqdm(total=figures, desc="Bootstrap", unit="figure", disable=not progress, leave=False)
    for block in blocks:
        counts.append(_count(columns, **block))
        row, pairs_of_raters = _agreement(columns, **block, resamples=resamples, seed=seed, bar=bar)
        agreement.append(row)
        kappas += pairs_of_raters
        label = f"{block['criterion']} ({block['kind']}s)"
        if row["items"] < FEW_ITEMS:
            warnings.append(
                f"{label}: only {row['items']} item(s) were judged by two raters or more. Agreement cannot be told "
                f"from so few; have at least {FEW_ITEMS}, better 100, judged twice."
            )
    rankings = [
        _rank(columns, **block, resamples=resamples // 2, seed=seed, warnings=warnings, bar=bar) for block in blocks
    ]
    bar.close()
    _warn_of_raters(readings, columns, warnings)
    roles = Counter(dict(zip(columns["rater"], columns["rater_role"], strict=True)).values())
    if set(roles) == {"simulated"}:
        warnings.append("All raters are simulated. No human being has judged these images.")
    return {
        "votes": len(columns["rater"]),
        "pairs": len(set(columns["pair_id"])),
        "cases": len(set(columns["case_id"])),
        "first": min(columns["created_at"])[:10],
        "last": max(columns["created_at"])[:10],
        "comments": int(sum(bool(comment) for comment in columns["comment"])),
        "warnings": warnings,
        "criteria": counts,
        "roles": [
            {"role": role, "raters": number, "votes": int((columns["rater_role"] == role).sum())}
            for role, number in sorted(roles.items())
        ],
        "tasks": sorted(Counter(columns["task"]).items()),
        "agreement": agreement,
        "kappas": kappas,
        "raters": readings,
        "blamed": blamed,
        "rankings": [ranking for ranking in rankings if ranking is not None],
        "resamples": resamples,
    }


def preference_report(
    votes: datasets.Dataset | dict,
    output: str | os.PathLike,
    *,
    title: str = "Votes",
    refused: list[tuple[int, str]] | None = None,
    known: dict[tuple[str, str], float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """
    Write one page on votes that any browser shows without a network: plots are inside, comments and images are not.

    Args:
        votes (`datasets.Dataset` or `dict`):
            As in [`summarise_votes`].
        output (`str` or `os.PathLike`):
            The folder that gets `report.html`. The file appears whole or not at all.
        title (`str`, *optional*, defaults to `"Votes"`):
            Heading of the page.
        refused (`list[tuple[int, str]]`, *optional*):
            Rows that were left out before, and why, from
            [`~onereward.preferences.schema.validate_votes`]; listed among the warnings.
        known (`dict[tuple[str, str], float]`, *optional*):
            As in [`summarise_votes`].
        resamples (`int`, *optional*, defaults to 1000):
            As in [`summarise_votes`].
        seed (`int`, *optional*, defaults to 0):
            As in [`summarise_votes`].
        progress (`bool`, *optional*, defaults to `True`):
            As in [`summarise_votes`].

    Returns:
        `Path`: the page.

    Raises:
        `ValueError`: as in [`summarise_votes`].

    Example:

    ```python
    >>> preference_report(load_votes("votes.parquet"), "runs/votes")
    PosixPath('runs/votes/report.html')
    ```
    """
    summary = summarise_votes(votes, known=known, resamples=resamples, seed=seed, progress=progress)
    if refused:
        listed = "; ".join(f"row {row}: {reason}" for row, reason in refused[:10])
        more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
        summary["warnings"].insert(0, f"{len(refused)} row(s) of the file were left out. {listed}{more}.")
    page = _ENVIRONMENT.from_string(_PAGE).render(
        **summary, title=title, notice=NOTICE, version=__version__, plots=_plots(summary), colours=_COLOURS
    )
    path = Path(output) / "report.html"
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def read_rows(path: str | os.PathLike, keep_good: bool = False) -> tuple[datasets.Dataset, list[tuple[int, str]]]:
    """
    Read votes of any version and any criteria for a report.

    Args:
        path (`str` or `os.PathLike`):
            A Parquet file as written by [`~onereward.preferences.schema.save_votes`].
        keep_good (`bool`, *optional*, defaults to `False`):
            Whether bad rows are left out instead of refused.

    Returns:
        `tuple[datasets.Dataset, list[tuple[int, str]]]`: the votes, and number and reason of each row left out.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when the file is no Parquet file; or, without `keep_good`, when a vote in it is not valid.
    """
    votes = read_votes(path)
    criteria = (
        tuple(dict.fromkeys(name for name in votes["criterion"] if name)) if "criterion" in votes.features else ()
    )
    if keep_good:
        return validate_votes(votes, criteria, keep_good=True)
    try:
        return load_votes(path, criteria), []
    except ValueError as error:
        raise ValueError(f"{error} Mend the file, or leave such rows out with `--keep-good`.") from error


def read_known(path: str | os.PathLike) -> dict[tuple[str, str], float]:
    """
    Read calibration items.

    Args:
        path (`str` or `os.PathLike`):
            A CSV file with the columns `pair_id`, `criterion` and `label_0`, 1 or 0.

    Returns:
        `dict[tuple[str, str], float]`: as [`summarise_votes`] takes it.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when a column is missing, or a label is not 1 or 0; names the row.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = {}
    for number, row in enumerate(rows):
        if not {"pair_id", "criterion", "label_0"} <= set(row) or row["label_0"] not in ("0", "1", "0.0", "1.0"):
            raise ValueError(
                f"Row {number} of {os.fspath(path)!r} is {row}; expected `pair_id`, `criterion` and `label_0`, which "
                "is 1 where the first image is known to be the better one and 0 where the second is."
            )
        known[row["pair_id"], row["criterion"]] = float(row["label_0"])
    return known


def _columns(votes: datasets.Dataset | dict) -> dict[str, np.ndarray]:
    if isinstance(votes, datasets.Dataset):
        votes = votes.select_columns([name for name in votes.column_names if name not in PICTURES]).to_dict()
    missing = [name for name in _REQUIRED if name not in votes]
    if missing:
        raise ValueError(f"The votes lack the column(s) {missing}; expected {list(_REQUIRED)} at least.")
    number = len(votes["rater"])
    columns = {}
    for name in (*_REQUIRED, *_OPTIONAL):
        values = votes.get(name, [_OPTIONAL.get(name)] * number)
        default = _OPTIONAL.get(name)
        values = [default if value is None else value for value in values]
        if len(values) != number:
            raise ValueError(f"`{name}` has {len(values)} entries for {number} votes; expected one for each.")
        if name in _NUMBERS:
            columns[name] = np.array([np.nan if value is None else value for value in values], dtype=float)
        elif name in ("left", "both_unacceptable"):
            columns[name] = np.array(values, dtype=int)
        else:
            columns[name] = np.array(["" if value is None else str(value) for value in values], dtype=object)
    return columns


def _shown_names(raters: np.ndarray, warnings: list[str]) -> dict[str, str]:
    """Pseudonyms are shown; what looks like a name or an address is not."""
    personal = [name for name in sorted(set(raters)) if re.search(r"[@\s]", name)]
    if personal:
        warnings.append(
            f"{len(personal)} rater id(s) look like names or addresses and are not shown here. Replace them in the "
            "file by pseudonyms, with `rater_id`, before anybody else gets it."
        )
    return {name: f"hidden-{personal.index(name) + 1}" if name in personal else name for name in set(raters)}


def _leave_out_slips(columns: dict, warnings: list[str]) -> None:
    """Ratings beyond their scale count as missing; their rows are named."""
    for criterion in sorted(set(columns["criterion"])):
        here = (columns["criterion"] == criterion) & (columns["kind"] == "rating")
        slips = here & out_of_range(columns["rating"], columns["rating_min"], columns["rating_max"])
        if slips.any():
            rows = np.flatnonzero(slips)
            beyond, low, high = (columns[name][rows] for name in ("rating", "rating_min", "rating_max"))
            raters = ", ".join(f"{name} ({n})" for name, n in sorted(Counter(columns["rater"][rows]).items()))
            listed = ", ".join(map(str, rows[:15])) + (" ..." if len(rows) > 15 else "")
            warnings.append(
                f"{criterion}: {len(rows)} of {here.sum()} ratings are outside their scale and are left out: "
                f"{beyond.min():g} to {beyond.max():g} where {low.min():g} to {high.max():g} was asked for. Raters: "
                f"{raters}. Rows, counted from 0: {listed}. Ask what was meant."
            )
            columns["rating"][rows] = np.nan


def _joined(*columns: np.ndarray) -> np.ndarray:
    return np.array(["\x1f".join(parts) for parts in zip(*columns, strict=True)], dtype=object)


def _count(columns: dict, criterion: str, kind: str, rows: np.ndarray) -> dict:
    label = columns["label_0"][rows]
    pair = kind == "pair"
    return {
        "criterion": criterion,
        "kind": kind,
        "votes": len(rows),
        "items": len(set(columns["pair_id"][rows])),
        "cases": len(set(columns["case_id"][rows])),
        "raters": len(set(columns["rater"][rows])),
        "ties": float((label == 0.5).mean()) if pair else np.nan,
        "unacceptable": float(columns["both_unacceptable"][rows].mean()) if pair else np.nan,
        "scale": None
        if pair or not np.isfinite(columns["rating_min"][rows]).any()
        else (np.nanmin(columns["rating_min"][rows]), np.nanmax(columns["rating_max"][rows])),
    }


def _agreement(
    columns: dict, criterion: str, kind: str, rows: np.ndarray, resamples: int, seed: int, bar: tqdm
) -> tuple[dict, list[dict]]:
    item, rater = columns["pair_id"][rows], columns["rater"][rows]
    table, items, raters = rating_table(item, rater, columns["answer"][rows], columns["created_at"][rows])
    case_of = dict(zip(item, columns["case_id"][rows], strict=True))
    cases = np.array([case_of[name] for name in items], dtype=object)
    values = np.unique(table[np.isfinite(table)])
    trusted = np.unique(rater[columns["trusted"][rows]])

    def figure(statistic, table=table, cases=cases):
        bar.update()
        return with_interval(statistic, table, clusters=cases, resamples=resamples, seed=seed)

    full = np.isfinite(table).all(axis=1)
    row = {
        "criterion": criterion,
        "kind": kind,
        "raters": len(raters),
        "items": int((np.isfinite(table).sum(axis=1) >= 2).sum()),
        "percent": figure(percent_agreement),
        "alpha": figure(krippendorff_alpha),
        "ordinal": figure(lambda t: krippendorff_alpha(t, "ordinal")),
        "interval": figure(lambda t: krippendorff_alpha(t, "interval")),
        "fleiss": figure(fleiss_kappa, table[full], cases[full])
        if full.any()
        else Estimate(np.nan, np.nan, np.nan, 0, "no item was judged by every rater"),
        "trusted": figure(lambda t: krippendorff_alpha(t, "ordinal"), table[:, np.isin(raters, trusted)]),
    }
    pairs = []
    if len(raters) <= MANY_RATERS:
        for i in range(len(raters)):
            for j in range(i + 1, len(raters)):
                both = table[:, [i, j]]
                pairs.append(
                    {
                        "criterion": criterion,
                        "kind": kind,
                        "raters": (raters[i], raters[j]),
                        "plain": figure(lambda t: cohen_kappa(*t.T), both),
                        "quadratic": figure(lambda t: cohen_kappa(*t.T, "quadratic", values), both),
                    }
                )
    return row, pairs


def _read(columns: dict, blocks: list[dict], known: dict, resamples: int, seed: int) -> list[dict]:
    """A row for each rater, from votes on pairs and from the pairs that ratings imply."""
    parts = []
    for block in blocks:
        rows, criterion = block["rows"], block["criterion"]
        if block["kind"] == "pair":
            sets = columns["set_id"][rows]
            parts.append(
                {
                    "item": _joined(columns["pair_id"][rows], columns["criterion"][rows]),
                    "rater": columns["rater"][rows],
                    "label": columns["label_0"][rows],
                    "left": columns["left"][rows],
                    "seconds": columns["seconds"][rows],
                    "order": columns["created_at"][rows],
                    "known": np.array([known.get((pair, criterion), np.nan) for pair in columns["pair_id"][rows]]),
                    "cluster": np.where(sets != "", sets, columns["pair_id"][rows]),
                    "item_0": _joined(columns["criterion"][rows], columns["model_0"][rows]),
                    "item_1": _joined(columns["criterion"][rows], columns["model_1"][rows]),
                }
            )
            continue
        found = pairs_from_ratings(
            columns["pair_id"][rows],
            columns["rater"][rows],
            columns["rating"][rows],
            columns["condition"][rows],
            columns["created_at"][rows],
        )
        number = len(found["pair"])
        model_of = dict(zip(columns["pair_id"][rows], columns["model_0"][rows], strict=True))
        parts.append(
            {
                "item": np.array([f"{criterion}\x1frating\x1f{pair}" for pair in found["pair"]], dtype=object),
                "rater": found["rater"],
                "label": found["label_0"],
                "left": np.full(number, -1),
                "seconds": np.full(number, np.nan),
                "order": found["order"],
                "known": np.full(number, np.nan),
                "cluster": found["case"],
                "item_0": np.array([f"{criterion}\x1f{model_of[item]}" for item in found["item_0"]], dtype=object),
                "item_1": np.array([f"{criterion}\x1f{model_of[item]}" for item in found["item_1"]], dtype=object),
            }
        )
    votes = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    readings = read_raters(
        votes["item"],
        votes["rater"],
        votes["label"],
        left=votes["left"],
        seconds=votes["seconds"],
        order=votes["order"],
        known=votes["known"],
        clusters=votes["cluster"],
    )
    discrimination = {}
    if len(readings) > 1 and ((votes["item_0"] != votes["item_1"]) & np.isfinite(votes["label"])).any():
        model = fit_pairs(votes["item_0"], votes["item_1"], votes["label"], votes["rater"], votes["left"])
        discrimination = {
            name: (value, error)
            for name, value, error in zip(model.raters, model.discrimination, model.discrimination_se, strict=True)
        }
    again = intra_rater(
        _joined(columns["pair_id"], columns["criterion"], columns["kind"]),
        columns["rater"],
        columns["answer"],
        columns["created_at"],
        clusters=columns["case_id"],
        resamples=resamples,
        seed=seed,
    )
    severity = _severity(columns, blocks)
    role_of = dict(zip(columns["rater"], columns["rater_role"], strict=True))
    answers = Counter(columns["rater"])
    return [
        {
            "rater": name,
            "role": role_of[name],
            "votes": answers[name],
            "reading": readings.get(name),
            "again": again.get(name),
            "discrimination": discrimination.get(name),
            "severity": severity.get(name, {}),
        }
        for name in sorted(role_of)
    ]


def _severity(columns: dict, blocks: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each rater and criterion with ratings: how far below the mean rater, and the noise."""
    found: dict[str, dict] = {}
    for block in blocks:
        rows = block["rows"]
        if block["kind"] != "rating" or not np.isfinite(columns["rating"][rows]).any():
            continue
        # one item, and each image a case: what all raters saw in an image is taken out
        fit = fit_ratings(
            np.zeros(len(rows)), columns["rater"][rows], columns["rating"][rows], columns["pair_id"][rows]
        )
        for name, low, noise in zip(fit.raters, fit.severity, fit.noise, strict=True):
            found.setdefault(name, {})[block["criterion"]] = float(low), float(noise)
    return found


def _rank(
    columns: dict,
    criterion: str,
    kind: str,
    rows: np.ndarray,
    resamples: int,
    seed: int,
    warnings: list[str],
    bar: tqdm,
) -> dict | None:
    bar.update()
    rows = rows[columns["trusted"][rows]]
    rater, cases = columns["rater"][rows], columns["case_id"][rows]
    if kind == "rating":
        rated = np.isfinite(columns["rating"][rows])
        models = columns["model_0"][rows]
        if len(set(models[rated])) < 2:
            return None
        rating, conditions = columns["rating"][rows], columns["condition"][rows]
        if fit_ratings(models, rater, rating, conditions).groups > 1:
            warnings.append(
                f"{criterion} (ratings): not all models were rated on conditions that join them, so that their means "
                "are compared: whose cases were easier looks better. Have all models rated on the same conditions."
            )
            conditions = None
        ranking = rank_ratings(models, rater, rating, conditions, cases, resamples=resamples, seed=seed)
        votes, groups = Counter(models[rated]), fit_ratings(models, rater, rating, conditions).groups
    else:
        first, second, label = columns["model_0"][rows], columns["model_1"][rows], columns["label_0"][rows]
        if not ((first != second) & np.isfinite(label)).any():
            return None
        # raters with few votes share their habits: one of their own could not be told from chance
        number = Counter(rater)
        rater = np.array([name if number[name] >= FEW_ITEMS else "\x1ffew" for name in rater], dtype=object)
        left = columns["left"][rows]
        ranking = rank_pairs(first, second, label, rater, left, cases, resamples=resamples, seed=seed)
        votes = Counter(first[first != second]) + Counter(second[first != second])
        groups = fit_pairs(first, second, label, rater, left).groups
    label = f"{criterion} ({kind}s)"
    if groups > 1:
        warnings.append(
            f"{label}: the models fall into {groups} groups without a vote between them. Ranks across groups mean "
            "nothing; collect votes on pairs that join them."
        )
    if ranking.clusters < FEW_CASES:
        warnings.append(
            f"{label}: the ranking rests on {ranking.clusters} case(s). Intervals from so few are too narrow."
        )
    return {"criterion": criterion, "kind": kind, "ranking": ranking, "votes": [votes[m] for m in ranking.items]}


def _warn_of_raters(readings: list[dict], columns: dict, warnings: list[str]) -> None:
    for row in readings:
        reading = row["reading"]
        if reading is not None and reading.verdict in BLAMED:
            warnings.append(f"Rater {row['rater']} looks {reading.verdict}: {reading.reason}.")
        for note in reading.notes if reading is not None else ():
            if note.startswith("leans"):
                warnings.append(f"Rater {row['rater']} {note}.")
    few = [row["rater"] for row in readings if row["reading"] is None or row["reading"].verdict == "too few votes"]
    if few:
        warnings.append(f"Too few votes to judge {len(few)} of {len(readings)} rater(s): {', '.join(few)}.")
    pairs = columns["kind"] != "rating"
    if pairs.any() and not (columns["left"][pairs] >= 0).any():
        warnings.append("It is not recorded which image was on the left, so nobody's pull to one side can be seen.")
    personal = sum(phi_warning(comment) is not None for comment in columns["comment"] if comment)
    if personal:
        warnings.append(
            f"{personal} comment(s) look as if they held personal data. Read them before the file goes anywhere."
        )


def _forest(panels: list[dict], alt: str) -> dict:
    """Points with intervals, a line each; panels side by side share the lines. Returns a picture for `<img>`."""
    labels = panels[0]["labels"]
    width, height = 2.2 + 3.6 * len(panels), 0.75 + 0.29 * len(labels)
    with matplotlib.rc_context({"svg.hashsalt": alt, "font.size": 9, "svg.fonttype": "path"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, panel in zip(axes, panels, strict=True):
            value, low, high = (np.asarray(panel[name], dtype=float) for name in ("value", "low", "high"))
            colours = panel.get("colours") or [_COLOURS[""]] * len(labels)
            for y in range(len(labels)):
                if np.isfinite(value[y]):
                    if np.isfinite(low[y]) and np.isfinite(high[y]):
                        ax.plot([low[y], high[y]], [y, y], color=colours[y], linewidth=2, solid_capstyle="round")
                    ax.plot(value[y], y, "o", color=colours[y], markersize=5)
            for at in panel.get("lines", ()):
                ax.axvline(at, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
            ax.set_xlabel(panel["xlabel"])
            ax.set_yticks(range(len(labels)))
            ax.set_yticklabels([str(label)[:28] for label in labels], parse_math=False)
            ax.set_ylim(len(labels) - 0.5, -0.5)
            ax.grid(axis="x", color="#eeeeee")
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.tick_params(axis="y", length=0)
            if "xlim" in panel:
                ax.set_xlim(*panel["xlim"])
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"source": source, "alt": alt, "width": round(96 * width)}


def _plots(summary: dict) -> dict:
    def panel(labels, estimates, xlabel, **more):
        ends = {end: [getattr(e, end, np.nan) for e in estimates] for end in ("value", "low", "high")}
        return {"labels": labels, **ends, "xlabel": xlabel, **more}

    plots = {}
    rows = summary["agreement"]
    labels, marks = [f"{row['criterion']} ({row['kind']}s)" for row in rows], (0, 0.667, 0.8)
    panels = [panel(labels, [row["ordinal"] for row in rows], "alpha, ordinal, all raters", lines=marks)]
    if summary["blamed"]:
        trusted = [row["trusted"] for row in rows]
        panels.append(panel(labels, trusted, "alpha, ordinal, trusted raters", lines=marks))
    plots["agreement"] = _forest(panels, "Agreement of the raters by criterion")
    raters = [row for row in summary["raters"] if row["reading"] is not None]
    if raters:
        labels = [row["rater"] for row in raters]
        colours = [_COLOURS[row["reading"].verdict] for row in raters]
        shown = {"colours": colours, "lines": (0.5,), "xlim": (-0.02, 1.02)}
        panels = [panel(labels, [row["reading"].agreement for row in raters], "agrees with the others", **shown)]
        if any(row["reading"].left.votes for row in raters):
            panels.append(panel(labels, [row["reading"].left for row in raters], "the left image wins", **shown))
        plots["raters"] = _forest(panels, "Each rater's agreement with the others and pull to the left")
    for number, row in enumerate(summary["rankings"]):
        ranking = row["ranking"]
        low, high = ranking.score_interval.T
        xlabel = "utility (log-odds)" if row["kind"] == "pair" else "mean rating"
        plots[f"ranking-{number}"] = _forest(
            [{"labels": ranking.items, "value": ranking.score, "low": low, "high": high, "xlabel": xlabel}],
            f"Models by {row['criterion']}",
        )
    return plots


def _figure(estimate: Estimate | None) -> str:
    """`0.61 [0.48, 0.72]`, rough where few cases bear it, or why there is no figure."""
    if estimate is None:
        return ""
    if not np.isfinite(estimate.value):
        return f"not defined: {estimate.note}"
    interval = f" [{estimate.low:.2f}, {estimate.high:.2f}]" if np.isfinite(estimate.low) else ""
    return f"{estimate.value:.2f}{interval}{' (rough)' if interval and estimate.note else ''}"


def _share(share) -> str:
    """`83% [75, 90] of 96`"""
    if share is None or not share.votes:
        return ""
    return f"{100 * share.value:.0f}% [{100 * share.low:.0f}, {100 * share.high:.0f}] of {share.votes}"


_ENVIRONMENT = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
_ENVIRONMENT.filters.update(figure=_figure, share=_share, percent=lambda x: "" if x != x else f"{100 * x:.0f}%")

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
         padding: 0 1.25rem; }
  h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; }
  h3 { font-size: 1.05rem; margin-bottom: 0.3rem; }
  .muted { color: #666; } .notice { font-weight: 600; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid #e5e5e5; }
  th { font-weight: 600; border-bottom: 2px solid #ccc; }
  td.number, th.number { text-align: right; }
  td.name { overflow-wrap: anywhere; min-width: 7rem; }
  td.reason { min-width: 18rem; }
  table.figures td { white-space: nowrap; }
  .warnings { background: #fff6e0; border-left: 4px solid #E69F00; padding: 0.6rem 1.1rem; overflow-wrap: anywhere; }
  .warnings ul { margin: 0.3rem 0; padding-left: 1.1rem; }
  .verdict { color: #fff; border-radius: 0.6rem; padding: 0.05rem 0.55rem; white-space: nowrap; font-size: 0.9em; }
  img { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="notice">{{ notice }}</p>
<p class="muted">{{ votes }} votes on {{ pairs }} items of {{ cases }} cases by {{ raters | length }} raters
{%- if first %}, {{ first }}{% if last != first %} to {{ last }}{% endif %}{% endif %}. Written by onereward
{{ version }}. Intervals hold 95%; they come from {{ resamples }} draws of whole cases, shares of votes excepted.</p>

{% if warnings %}
<div class="warnings" role="note">
<strong>{{ warnings | length }} warning{{ "s" if warnings | length > 1 }}</strong>
<ul>
{% for warning in warnings %}
  <li>{{ warning }}</li>
{% endfor %}
</ul>
</div>
{% endif %}

<h2>What was voted</h2>
<div class="scroll"><table>
<tr><th>Criterion</th><th>Kind</th><th class="number">Votes</th><th class="number">Items</th>
<th class="number">Cases</th><th class="number">Raters</th><th class="number">Ties</th>
<th class="number">Both unacceptable</th><th>Scale</th></tr>
{% for row in criteria %}
<tr><td>{{ row.criterion }}</td><td>{{ row.kind }}</td><td class="number">{{ row.votes }}</td>
<td class="number">{{ row["items"] }}</td><td class="number">{{ row.cases }}</td>
<td class="number">{{ row.raters }}</td><td class="number">{{ row.ties | percent }}</td>
<td class="number">{{ row.unacceptable | percent }}</td>
<td>{% if row.scale %}{{ "%g to %g" | format(*row.scale) }}{% endif %}</td></tr>
{% endfor %}
</table></div>
<p class="muted">Tasks: {% for task, number in tasks %}{{ task or "not named" }} ({{ number }})
{{- ", " if not loop.last }}{% endfor %}. {{ comments }} comment{{ "s" if comments != 1 }}, not shown here because
they may name people.</p>

<h2>By whom</h2>
<table>
<tr><th>Role</th><th class="number">Raters</th><th class="number">Votes</th></tr>
{% for row in roles %}
<tr><td>{{ row.role }}</td><td class="number">{{ row.raters }}</td><td class="number">{{ row.votes }}</td></tr>
{% endfor %}
</table>

<h2>How far the raters agree</h2>
<img src="{{ plots.agreement.source }}" alt="{{ plots.agreement.alt }}" width="{{ plots.agreement.width }}">
<div class="scroll"><table class="figures">
<tr><th>Criterion</th><th>Kind</th><th class="number">Judged twice</th><th>Equal answers</th><th>Alpha, nominal</th>
<th>Alpha, ordinal</th>{% if blamed %}<th>Ordinal, trusted</th>{% endif %}<th>Alpha, interval</th>
<th>Fleiss' kappa</th></tr>
{% for row in agreement %}
<tr><td>{{ row.criterion }}</td><td>{{ row.kind }}</td><td class="number">{{ row["items"] }}</td>
<td>{{ row.percent | figure }}</td><td>{{ row.alpha | figure }}</td><td>{{ row.ordinal | figure }}</td>
{% if blamed %}<td>{{ row.trusted | figure }}</td>{% endif %}<td>{{ row.interval | figure }}</td>
<td>{{ row.fleiss | figure }}</td></tr>
{% endfor %}
</table></div>
<p class="muted">0 is what chance gives, 1 is full agreement. Krippendorff asks for 0.8, and 0.667 for tentative
conclusions. Equal answers count what chance gives too. Fleiss' kappa is of the items that every rater judged.
Rough: fewer than 20 cases.
{% if blamed %}Trusted: without {{ blamed | join(", ") }}, see below.{% endif %}</p>
{% if kappas %}
<div class="scroll"><table class="figures">
<tr><th>Criterion</th><th>Kind</th><th>Raters</th><th class="number">Both judged</th><th>Cohen's kappa</th>
<th>Quadratic</th></tr>
{% for row in kappas %}
<tr><td>{{ row.criterion }}</td><td>{{ row.kind }}</td><td class="name">{{ row.raters | join(" and ") }}</td>
<td class="number">{{ row.plain["items"] }}</td><td>{{ row.plain | figure }}</td>
<td>{{ row.quadratic | figure }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

<h2>The raters</h2>
{% if plots.raters is defined %}
<img src="{{ plots.raters.source }}" alt="{{ plots.raters.alt }}" width="{{ plots.raters.width }}">
{% endif %}
<div class="scroll"><table>
<tr><th>Rater</th><th>Role</th><th class="number">Votes</th><th>Verdict</th><th>Why</th></tr>
{% for row in raters %}
{% set verdict = row.reading.verdict if row.reading else "too few votes" %}
<tr><td class="name">{{ row.rater }}</td><td>{{ row.role }}</td><td class="number">{{ row.votes }}</td>
<td><span class="verdict" style="background: {{ colours[verdict] }}">{{ verdict }}</span></td>
<td class="reason">
{%- if row.reading %}{{ row.reading.reason }}{% for note in row.reading.notes %}; {{ note }}{% endfor %}
{%- else %}no two ratings of one case to compare{% endif %}</td></tr>
{% endfor %}
</table></div>
<p class="muted">Verdicts are corrected for all the tests made: a rater is blamed only where chance is a poor
explanation. A note that a rater leans to one side, is fast or drifts is no verdict.</p>
<div class="scroll"><table class="figures">
{% set has_known = raters | selectattr("reading") | selectattr("reading.known.votes") | list %}
{% set has_severity = raters | selectattr("severity") | list %}
<tr><th>Rater</th><th>Agrees with the others</th><th>With themselves</th>{% if has_known %}<th>Known answers</th>
{% endif %}<th>Left wins</th><th class="number">Longest run</th><th class="number">Ties</th>
<th class="number">Seconds</th><th>Discrimination</th>{% if has_severity %}<th>Severity, noise</th>{% endif %}</tr>
{% for row in raters %}
{% set reading = row.reading %}
<tr><td>{{ row.rater }}</td><td>{{ reading.agreement | share if reading }}</td>
<td>{% if row.again %}{{ row.again | figure }} on {{ row.again["items"] }}{% endif %}</td>
{% if has_known %}<td>{{ reading.known | share if reading }}</td>{% endif %}
<td>{{ reading.left | share if reading }}</td>
<td class="number">{{ reading.run if reading and reading.run }}</td>
<td class="number">{{ reading.ties | percent if reading }}</td>
<td class="number">{{ "%.1f" | format(reading.seconds) if reading and reading.seconds == reading.seconds }}</td>
<td>{% if row.discrimination %}{{ "%.2f ± %.2f" | format(*row.discrimination) }}{% endif %}</td>
{% if has_severity %}<td>{% for criterion, values in row.severity.items() %}{{ criterion }}:
{{ "%+.2f, %.2f" | format(*values) }}{% if not loop.last %}<br>{% endif %}{% endfor %}</td>{% endif %}</tr>
{% endfor %}
</table></div>
<p class="muted">Shares are of decided votes, with exact intervals in which a rater's votes on one pair do not count as
independent. Ratings are read as the pairs that they imply. Known answers: of calibration items, those got right.
Longest run: of votes for the same side in a row. Discrimination, with its standard error: how closely the votes follow
the order of the models, 1 is the mean rater, 0 a coin, below 0 reversed;
the error takes votes for independent. Severity: how far the ratings lie below the
mean rater's. Noise: their spread around what others and severity explain, in steps of the scale.</p>

<h2>The models</h2>
{% if not rankings %}
<p>No criterion has votes that compare two models.</p>
{% endif %}
{% for row in rankings %}
{% set plot = plots["ranking-" ~ loop.index0] %}
<h3>{{ row.criterion }} ({{ row.kind }}s)</h3>
<img src="{{ plot.source }}" alt="{{ plot.alt }}" width="{{ plot.width }}">
<div class="scroll"><table>
<tr><th class="number">Rank</th><th>Model</th><th>{{ "Utility" if row.kind == "pair" else "Mean rating" }}</th>
<th>Rank may be</th><th class="number">First in</th><th class="number">Votes</th></tr>
{% for k in range(row.ranking["items"] | length) %}
<tr><td class="number">{{ "%g" | format(row.ranking.rank[k]) }}</td><td class="name">{{ row.ranking["items"][k] }}</td>
<td>{{ "%.2f [%.2f, %.2f]" | format(row.ranking.score[k], *row.ranking.score_interval[k]) }}</td>
{% set ends = row.ranking.rank_interval[k] %}
<td>{{ "%g to %g" | format(*ends) if ends[0] != ends[1] else "%g" | format(ends[0]) }}</td>
<td class="number">{{ row.ranking.best[k] | percent }}</td><td class="number">{{ row.votes[k] }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
<p class="muted">Pairs: Bradley-Terry with ties after Davidson, each rater with their own discrimination, ties and pull
to the left; a difference of 1 in utility means that the mean rater prefers the better one 2.7 times as often as the
other. Ratings: means free of the raters' severities, higher is better. Ranks whose ranges overlap are not settled.
{% if blamed %}Left out here: the votes of {{ blamed | join(", ") }}, see above.{% endif %}</p>
<p class="notice">{{ notice }}</p>
</body>
</html>
"""
