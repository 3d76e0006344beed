"""The page says what the votes say: its figures are those of the functions behind it, and nothing leaks into it."""

import csv
import html
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onereward.preferences import SimulatedRater, save_votes
from onereward.preferences.agreement import krippendorff_alpha, rating_table
from onereward.preferences.preference_report import preference_report, read_known, summarise_votes


def simulate(pairs=90, seed=0, **raters):
    """Columns of votes of these raters (name -> rater, times) under two criteria; every tenth pair comes twice."""
    rng = np.random.default_rng(seed)
    models, worth = np.array(["base", "tuned", "overtuned"]), np.array([-0.8, 0.8, 0.0])
    i = rng.integers(0, 3, pairs)
    j = (i + rng.integers(1, 3, pairs)) % 3
    gap, left = worth[i] - worth[j] + rng.normal(0, 0.5, pairs), rng.integers(0, 2, pairs)
    toward_left = np.where(left == 0, 1, -1)
    rows = []
    for name, (rater, times) in raters.items():
        for criterion in ("quality", "realism"):
            for number in [*range(pairs), *range(0, pairs, 10)]:
                p = rater.choice_probabilities(np.array([times * gap[number] * toward_left[number]]))[0]
                on_left = 1 - (rng.random() > p.cumsum()[:2]).sum() / 2
                rows.append(
                    {
                        "kind": "pair",
                        "pair_id": f"pair-{number}",
                        "criterion": criterion,
                        "rater": name,
                        "rater_role": "resident",
                        "label_0": on_left if left[number] == 0 else 1 - on_left,
                        "model_0": models[i[number]],
                        "model_1": models[j[number]],
                        "case_id": f"case-{number % 30}",
                        "left": left[number],
                        "seconds": rng.lognormal(2, 0.3),
                        "created_at": f"2025-06-{1 + len(rows) // 3600 % 28:02d}T12:{len(rows) // 60 % 60:02d}:"
                        f"{len(rows) % 60:02d}+00:00",
                        "task": "fill",
                    }
                )
    return {name: [row[name] for row in rows] for name in rows[0]}


FAIR = {f"fair-{n}": (SimulatedRater(f"simulated-{n}", 0.4, 0.3), 1) for n in range(4)}
BAD = {
    "reversed": (SimulatedRater("simulated-r", 0.4, 0.3), -1),
    "leftist": (SimulatedRater("simulated-l", 0.4, 0.3, position_bias=9.0), 1),
}


@pytest.fixture(scope="module")
def columns():
    return simulate(**FAIR, **BAD)


@pytest.fixture(scope="module")
def summary(columns):
    return summarise_votes(columns, resamples=100)


class Page(HTMLParser):
    """The text of a page, and everything that a browser would fetch or run."""

    def __init__(self, source):
        super().__init__()
        self.text, self.links, self.scripts, self.open = "", [], 0, []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attributes)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " * (tag in ("td", "th", "li", "p"))

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def read(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return re.sub(r"\s+", " ", page.text), page


def test_the_figures_are_those_of_the_votes(columns, summary):
    assert summary["votes"] == len(columns["rater"]) == 2 * 6 * 99
    assert summary["pairs"] == 90 and summary["cases"] == 30
    row = summary["agreement"][0]
    here = np.array(columns["criterion"]) == row["criterion"]
    table, *_ = rating_table(
        *(np.array(columns[name])[here] for name in ("pair_id", "rater", "label_0", "created_at"))
    )
    assert row["ordinal"].value == krippendorff_alpha(table, "ordinal") and row["items"] == 90
    assert row["ordinal"].low < row["ordinal"].value < row["ordinal"].high
    assert len(summary["kappas"]) == 2 * 6 * 5 / 2
    again = {rater["rater"]: rater["again"] for rater in summary["raters"]}
    assert {estimate.items for estimate in again.values()} == {2 * 9}
    assert again["leftist"].value == 1 or again["leftist"].value > 0.8


def test_each_rater_has_a_row_and_the_bad_ones_are_named(summary):
    verdicts = {row["rater"]: row["reading"].verdict for row in summary["raters"]}
    assert verdicts == {**dict.fromkeys(FAIR, "fine"), "reversed": "adversarial", "leftist": "careless"}
    named = [warning for warning in summary["warnings"] if "looks" in warning]
    assert len(named) == 2 and "Rater leftist looks careless: always the same side" in named[0]
    discrimination = {row["rater"]: row["discrimination"] for row in summary["raters"]}
    assert discrimination["reversed"][0] + 3 * discrimination["reversed"][1] < 0


def test_the_models_are_in_the_order_of_their_worth(summary):
    for row in summary["rankings"]:
        assert list(row["ranking"].items) == ["tuned", "overtuned", "base"]
        # without the votes of the two who are blamed
        assert row["ranking"].clusters == 30 and sum(row["votes"]) == 2 * 4 * 99
    assert summary["blamed"] == ["leftist", "reversed"]
    for row in summary["agreement"]:
        assert row["trusted"].low > row["ordinal"].high


def test_the_page_is_whole_and_says_what_it_is_for(columns, summary, tmp_path):
    path = preference_report(columns, tmp_path / "new", title="My votes", resamples=100, progress=False)
    assert os.listdir(tmp_path / "new") == ["report.html"] and path.name == "report.html"
    text, page = read(path)
    assert text.count("Research use only, not for clinical use.") == 2 and "My votes" in text
    # self-contained: nothing to fetch, nothing to run
    assert page.scripts == 0 and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert len(page.links) == 2 + len(summary["rankings"])
    for row in summary["agreement"]:
        ordinal = row["ordinal"]
        assert f"{ordinal.value:.2f} [{ordinal.low:.2f}, {ordinal.high:.2f}]" in text
    for warning in summary["warnings"]:
        assert warning in text
    for row in summary["raters"]:
        assert row["reading"].reason in text
    # the same votes give the same page
    again = preference_report(columns, tmp_path / "again", title="My votes", resamples=100, progress=False)
    assert again.read_bytes() == path.read_bytes()


def test_nothing_in_the_votes_becomes_markup_and_no_comment_is_shown(columns, tmp_path):
    nasty = "<script>alert(1)</script>"
    changed = {name: list(values) for name, values in columns.items()}
    changed["model_0"] = [f"{model} $x^{nasty}" for model in changed["model_0"]]
    changed["rater_role"] = [nasty] * len(changed["rater"])
    changed["rater"] = ["jane.doe@example.org" if name == "fair-0" else name for name in changed["rater"]]
    changed["comment"] = ["seen Mr. Smith on 12/03/2019"] + [None] * (len(changed["rater"]) - 1)
    path = preference_report(changed, tmp_path, resamples=100, progress=False)
    text, page = read(path)
    assert page.scripts == 0 and html.escape(nasty) in path.read_text(encoding="utf-8")
    assert "Smith" not in path.read_text(encoding="utf-8") and "1 comment(s) look as if" in text
    assert "jane" not in path.read_text(encoding="utf-8") and "hidden-1" in text
    assert "1 rater id(s) look like names or addresses" in text


def rate(cases):
    """Ratings of two models by a strict and a mild rater; `cases` are those of each model."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "pair_id": f"{model}-{case}",
            "model_0": model,
            "case_id": f"case-{case}",
            "rater": rater,
            "rating": np.clip(round(level + rng.normal(0, 0.5) - (rater == "strict")), 1, 5),
        }
        for model, level in (("good", 4), ("bad", 2))
        for case in cases[model]
        for rater in ("strict", "mild")
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    number = len(rows)
    columns |= {"kind": ["rating"] * number, "criterion": ["structure"] * number, "rater_role": ["lay"] * number}
    columns |= {"label_0": [None] * number, "model_1": [None] * number}
    return columns | {"rating_min": [1] * number, "rating_max": [5] * number}


def test_models_rated_on_other_cases_are_compared_by_their_means_and_it_is_said():
    columns = rate({"good": range(20), "bad": range(20, 40)})
    summary = summarise_votes(columns, resamples=100)
    ranking = summary["rankings"][0]["ranking"]
    rating, model = np.array(columns["rating"], float), np.array(columns["model_0"])
    assert list(ranking.items) == ["good", "bad"] and ranking.best.tolist() == [1, 0]
    assert np.allclose(ranking.score, [rating[model == name].mean() for name in ("good", "bad")])
    assert (np.ptp(ranking.score_interval, axis=1) > 0.05).all()
    assert any("not all models were rated on conditions that join them" in line for line in summary["warnings"])
    assert not any("join" in line for line in summarise_votes(rate({"good": range(20), "bad": range(20)}))["warnings"])


def test_ratings_beyond_their_scale_are_named_and_left_out():
    columns = rate({"good": range(25), "bad": range(25)})
    columns["rating"][7], columns["rating"][90] = 13, 0
    summary = summarise_votes(columns, resamples=100)
    warning = next(warning for warning in summary["warnings"] if "outside their scale" in warning)
    assert "2 of 100 ratings" in warning and "0 to 13 where 1 to 5 was asked for" in warning
    assert "Rows, counted from 0: 7, 90." in warning and "mild (1), strict (1)" in warning
    assert summary["agreement"][0]["items"] == 48
    ranking = summary["rankings"][0]["ranking"]
    assert list(ranking.items) == ["good", "bad"] and ranking.score_interval.max() < 5
    severity = {row["rater"]: row["severity"]["structure"][0] for row in summary["raters"]}
    rating = np.array(columns["rating"], dtype=float).reshape(50, 2)  # an image a row: strict, mild
    kept = ((rating >= 1) & (rating <= 5)).all(axis=1)
    half = (rating[kept, 1] - rating[kept, 0]).mean() / 2
    assert severity["strict"] == pytest.approx(half) and severity["mild"] == pytest.approx(-half)


def test_few_votes_are_said_to_be_few(columns):
    few = {name: values[:6] for name, values in columns.items()}
    summary = summarise_votes(few, resamples=100)
    text = " ".join(summary["warnings"])
    assert "only 0 item(s) were judged by two raters" in text
    assert "Too few votes to judge 1 of 1 rater(s): fair-0" in text
    assert "rests on 6 case(s)" in text
    with pytest.raises(ValueError, match="`votes` is empty"):
        summarise_votes({name: [] for name in columns})
    with pytest.raises(ValueError, match=r"lack the column\(s\) \['rater_role'\]"):
        summarise_votes({name: values for name, values in columns.items() if name != "rater_role"})


def test_models_that_never_met_are_said_to_be_apart(columns):
    apart = {name: list(values) for name, values in columns.items()}
    apart["model_0"] = [f"{model}-{k % 2}" for k, model in enumerate(apart["model_0"])]
    apart["model_1"] = [f"{model}-{k % 2}" for k, model in enumerate(apart["model_1"])]
    text = " ".join(summarise_votes(apart, resamples=100)["warnings"])
    assert "the models fall into 2 groups without a vote between them" in text


def test_votes_of_one_model_have_no_ranking_and_still_a_page(columns, tmp_path):
    single = {**columns, "model_0": ["base"] * len(columns["rater"]), "model_1": ["base"] * len(columns["rater"])}
    text, _ = read(preference_report(single, tmp_path, resamples=100, progress=False))
    assert "No criterion has votes that compare two models." in text


def test_the_command_reads_what_is_saved(onereward, simulated, tmp_path):
    votes = simulated[0]
    save_votes(votes, tmp_path / "votes.parquet")
    code, out, err = onereward(
        "preferences", "report", tmp_path / "votes.parquet", "--output", tmp_path / "out", "--resamples", 100
    )
    assert code == 0, err
    assert "Research use only, not for clinical use." in out
    text, _ = read(tmp_path / "out" / "report.html")
    assert f"{len(votes)} votes on {len(set(votes['pair_id']))} items" in text
    assert "All raters are simulated. No human being has judged these images." in text
    assert all(name in text for name in set(votes["rater"]))


VERSION_1 = (
    "vote_id pair_id prompt task image mask label_map image_0 image_1 label_0 label_1 criterion rater rater_role "
    "model_0 model_1 seed_0 seed_1 case_id created_at schema_version"
).split()


def test_the_command_reads_version_1(onereward, simulated, tmp_path):
    old = simulated[0].select_columns(VERSION_1)
    table = old.data.table.set_column(
        VERSION_1.index("schema_version"), "schema_version", pa.array([1] * len(old), pa.int32())
    )
    pq.write_table(table, tmp_path / "old.parquet")
    code, _, err = onereward(
        "preferences", "report", tmp_path / "old.parquet", "--output", tmp_path, "--resamples", 100
    )
    assert code == 0, err
    text, _ = read(tmp_path / "report.html")
    assert "It is not recorded which image was on the left" in text


def test_bad_rows_are_refused_or_listed_as_asked(onereward, simulated, tmp_path):
    table = simulated[0].data.table
    labels = table["label_0"].to_pylist()
    labels[5] = 0.7
    at = table.column_names.index("label_0")
    pq.write_table(table.set_column(at, "label_0", pa.array(labels, pa.float32())), tmp_path / "bad.parquet")
    arguments = ["preferences", "report", tmp_path / "bad.parquet", "--output", tmp_path / "out", "--resamples", 100]
    code, _, err = onereward(*arguments)
    assert code == 2 and "row 5" in err and "--keep-good" in err and not (tmp_path / "out").exists()
    code, _, err = onereward(*arguments, "--keep-good")
    assert code == 0, err
    text, _ = read(tmp_path / "out" / "report.html")
    assert "1 row(s) of the file were left out. row 5: `label_0` and `label_1` are 0.69" in text


def test_known_answers_are_read_and_used(columns, tmp_path):
    (tmp_path / "known.csv").write_text("pair_id,criterion,label_0\npair-3,quality,1\npair-4,realism,0\n")
    known = read_known(tmp_path / "known.csv")
    assert known == {("pair-3", "quality"): 1.0, ("pair-4", "realism"): 0.0}
    rows = {row["rater"]: row for row in summarise_votes(columns, known=known, resamples=100)["raters"]}
    expected = [
        label == known[pair, criterion]
        for pair, criterion, rater, label in zip(
            *(columns[name] for name in ("pair_id", "criterion", "rater", "label_0")), strict=True
        )
        if (pair, criterion) in known and rater == "fair-1" and label != 0.5
    ]
    assert rows["fair-1"]["reading"].known.votes == len(expected)
    (tmp_path / "known.csv").write_text("pair_id,criterion,label_0\npair-3,quality,left\n")
    with pytest.raises(ValueError, match="Row 0 of .* expected `pair_id`, `criterion` and `label_0`"):
        read_known(tmp_path / "known.csv")


@pytest.mark.skipif("ONEREWARD_DATA" not in os.environ, reason="ONEREWARD_DATA is not set")
def test_three_radiologists_on_denoisers(tmp_path):
    path = Path(os.environ["ONEREWARD_DATA"]) / "ratings_mtdgan_readers" / "ratings_tidy.csv"
    if not path.is_file():
        pytest.skip("the ratings of the denoisers are not there")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [] for name in ("pair_id", "criterion", "rater", "model_0", "case_id", "rating")}
    for criterion in ("contrast", "structure"):
        for row in rows:
            case = f"{row['region']}-{row['set']}"
            values = (
                f"{case}-{row['method']}",
                criterion,
                f"reader-{row['reader']}",
                row["method"],
                case,
                float(row[f"{criterion}_1to5"]),
            )
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    number = len(columns["rater"])
    same = {"kind": "rating", "rater_role": "radiologist", "label_0": None, "model_1": None}
    columns |= {name: [value] * number for name, value in {**same, "rating_min": 1, "rating_max": 5}.items()}
    slips = sum(row["out_of_range"] == "structure" for row in rows)
    text, _ = read(preference_report(columns, tmp_path, resamples=100, progress=False))
    assert (
        f"structure: {slips} of {len(rows)} ratings are outside their scale" in text and "contrast: " not in text[:900]
    )
    assert text.count("1 NDCT ") == 2 and text.count("14 LDCT ") == 2
    assert text.count(f"radiologist {2 * len(rows) // 3} fine") == 3
