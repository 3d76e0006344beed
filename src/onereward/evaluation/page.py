"""The page of an evaluation: one HTML file that needs nothing else, from the results that are JSON."""

import base64
import io
import os
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure as Canvas

from onereward import __version__
from onereward.data.whole_file import whole_file


NOTICE = "Research use only, not for clinical use. All pictures but the sources and truths are synthetic."

# What a measure is, by the end of its name.
DEFINITIONS = {
    "mae": "mean absolute error against the truth inside the mask, for intensities in [0, 1]",
    "psnr": "peak signal-to-noise ratio inside the mask in dB, for intensities in [0, 1]",
    "ssim": "structural similarity to the truth, averaged over the mask, in its real surroundings",
    "lpips": "LPIPS (https://huggingface.co/papers/1801.03924), averaged over the mask, in its real surroundings",
    "hd95": "95th percentile of the distances between the border that the judge finds and that asked for, in pixels",
    "surface_dice": "share of both borders that lie within 1 pixel of each other",
    "dice": "overlap of what the held-out judge finds with what the label map asked for",
    "residual_tumour": "share of the mask where the held-out judge still finds tumour",
    "outside_changed_pixels": "pixels outside the mask that differ from the source; must be 0",
}


def definition(measure: str) -> str:
    """What a measure is, in words."""
    return next((text for ending, text in DEFINITIONS.items() if ending in measure), "")


def differences_plot(results: dict) -> bytes | None:
    """
    Each painter's difference from the first in each measure, with its interval, in units of the first one's figure and
    so that right is better. PNG, `None` when there is nothing to compare.
    """
    rows = []
    for name, entry in results["measures"].items():
        base = entry["painters"][results["reference"]]["value"]
        for painter, comparison in entry["differences"].items():
            difference = comparison["difference"]
            if painter in results["baselines"]:
                continue  # so much worse that nothing else could be seen
            if base and difference["value"] is not None and difference["low"] is not None:
                sign = (1 if entry["higher_is_better"] else -1) / abs(base)
                value, *ends = (100 * sign * difference[key] for key in ("value", "low", "high"))
                rows.append((name, painter, value, *sorted(ends), comparison["verdict"]))
    if not rows:
        return None
    colours = {"better": "#009E73", "worse": "#D55E00", "no difference": "#777777"}
    canvas = Canvas(figsize=(8, 1 + 0.28 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    for y, (name, painter, value, low, high, verdict) in enumerate(reversed(rows)):
        axes.plot([low, high], [y, y], color=colours[verdict], lw=2)
        axes.plot(value, y, "o", color=colours[verdict], ms=5)
        axes.text(1.01, y, f"{painter}: {verdict}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        rows[len(rows) - 1 - y] = (name, painter, value, low, high, verdict)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)], fontsize=8)
    axes.axvline(0, color="#999999", lw=1, ls=":")
    axes.set_xlabel(f"better by so many % of the figure of {results['reference']}")
    axes.spines[["top", "right"]].set_visible(False)
    return png(canvas)


def png(canvas: Canvas) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def worst_rows(values: np.ndarray, applies: np.ndarray, higher_is_better: bool, number: int = 4) -> np.ndarray:
    """Rows with the worst figures first, those where it is not defined before all."""
    meant = np.flatnonzero(applies)
    badness = np.where(np.isfinite(values[meant]), -values[meant] if higher_is_better else values[meant], np.inf)
    return meant[np.argsort(-badness, kind="stable")[:number]]


def write_page(path: str | os.PathLike, results: dict, pictures: dict[str, bytes]) -> Path:
    """
    Write the page of an evaluation.

    Args:
        path (`str` or `os.PathLike`):
            The file; it appears whole or not at all.
        results (`dict`):
            What [`~onereward.evaluation.painters.evaluate_painters`] returned, and what was added to it: `title`,
            `settings`, `baselines`, `weights`, `environment`, `commit`, `warnings`, `limits`, and where they were
            measured `distributions`, `memorisation`, `clinical_features` and `reader_study`.
        pictures (`dict[str, bytes]`):
            Title -> PNG file, in the order wanted.

    Returns:
        `Path`: the file.
    """
    features = results.get("clinical_features", {})
    differing = {
        painter: [name for name, entry in features.items() if entry["verdicts"][painter] == "differs"]
        for painter in results["painters"]
    }
    encoded = {title: base64.b64encode(content).decode() for title, content in pictures.items()}
    text = _ENVIRONMENT.from_string(_PAGE).render(
        **{
            "distributions": {},
            "memorisation": {},
            "reader_study": {},
            "clinical_features": {},
            "warnings": [],
            "limits": [],
            **results,
        },
        notice=NOTICE,
        onereward_version=__version__,
        pictures=encoded,
        definitions={name: definition(name) for name in results["measures"]},
        names=list(results["painters"]),
        differing=differing,
    )
    path = Path(path)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _interval(figure: dict | None) -> str:
    """A figure with its interval and failures."""
    if figure is None or figure["value"] is None:
        return "–" if figure is None or not figure.get("note") else f"– ({figure['note']})"
    text = f"{figure['value']:.3g}"
    if figure["low"] is not None and figure["low"] < figure["high"]:
        text += f" [{figure['low']:.3g}, {figure['high']:.3g}]"
    return text + (f", {figure['n_failed']} failed" if figure["n_failed"] else "")


def _share(share: dict | None) -> str:
    """A proportion in per cent with its interval."""
    if share is None or share["value"] is None:
        return "–"
    return f"{100 * share['value']:.0f} % [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


_ENVIRONMENT = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
_ENVIRONMENT.filters.update(interval=_interval, share=_share)

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
         padding: 0 1.25rem; }
  h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; }
  .muted { color: #666; } .notice { font-weight: 600; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid #e5e5e5; }
  th { font-weight: 600; border-bottom: 2px solid #ccc; }
  td.figure { white-space: nowrap; }
  .warnings { background: #fff6e0; border-left: 4px solid #E69F00; padding: 0.6rem 1.1rem; overflow-wrap: anywhere; }
  .verdict { color: #fff; border-radius: 0.6rem; padding: 0.05rem 0.55rem; white-space: nowrap; font-size: 0.9em;
             background: #777; }
  .better, .holds, .honest { background: #00795a; } .worse, .fails, .copies { background: #b34700; }
  img { max-width: 100%; height: auto; }
  p, li { overflow-wrap: anywhere; }
  dt { font-weight: 600; } dd { margin: 0 0 0.4rem 1rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
{% macro measures_table(wanted) %}
<div class="scroll"><table>
<tr><th>Measure</th><th>Better</th><th>Truth</th>{% for name in names %}<th>{{ name }}</th>
{% if name != reference %}<th>{{ name }} against {{ reference }}</th>{% endif %}{% endfor %}<th>Pictures</th></tr>
{% for measure, entry in measures.items() if entry.was_reward == wanted %}
<tr><td title="{{ definitions[measure] }}">{{ measure }}</td>
<td>{{ "higher" if entry.higher_is_better else "lower" }}</td>
<td class="figure">{{ entry.real | interval }}</td>
{% for name in names %}
<td class="figure">{{ entry.painters[name] | interval }}</td>
{% if name != reference %}{% set comparison = entry.differences[name] %}
<td class="figure">{{ comparison.difference | interval }}
<span class="verdict {{ comparison.verdict | replace(" ", "-") }}">{{ comparison.verdict }}</span></td>{% endif %}
{% endfor %}
<td>{{ entry.painters[reference].n }}</td></tr>
{% endfor %}
</table></div>
{% endmacro %}
<h1>{{ title }}</h1>
<p class="notice">{{ notice }}</p>
<p class="muted">{{ data.rows }} conditions of {{ data.cases }} cases, {{ data.seeds | length }}
picture{{ "s" if data.seeds | length > 1 }} of each. Written by onereward {{ onereward_version }}. Intervals hold
95 %; they come from draws of whole cases. A verdict needs a p value below 0.05, of a paired permutation test by case,
corrected for all measures of the comparison (Holm).</p>

<h2>In short</h2>
<div class="scroll"><table>
<tr><th></th>{% if names | length > 1 %}<th>Better than {{ reference }}</th><th>Worse</th>{% endif %}
<th>Paints what the label map asks for</th>{% if memorisation %}<th>Copies its training set</th>{% endif %}</tr>
{% for name in names %}
<tr><td>{{ name }}</td>
{% if names | length > 1 %}
{% for verdict in ("better", "worse") %}
<td>{% if name == reference %}–{% else %}
{% for measure, entry in measures.items()
   if not entry.was_reward and entry.differences[name].verdict == verdict -%}
{{ measure }}{{ ", " if not loop.last }}
{%- else %}nothing{% endfor %}{% endif %}</td>
{% endfor %}
{% endif %}
<td>{% if painters[name].adherence %}<span class="verdict {{ painters[name].adherence }}">
{{- painters[name].adherence }}</span>{% else %}not measured{% endif %}</td>
{% if memorisation %}<td>{{ memorisation[name].verdict if name in memorisation else "–" }}</td>{% endif %}</tr>
{% endfor %}
</table></div>
{% if warnings %}
<div class="warnings" role="note">
<ul>
{% for warning in warnings %}
  <li>{{ warning }}</li>
{% endfor %}
</ul>
</div>
{% endif %}

<h2>Measures that were never a reward</h2>
{% if "differences" in pictures %}
<img src="data:image/png;base64,{{ pictures.differences }}" alt="Differences from {{ reference }} with intervals">
{% endif %}
{{ measures_table(false) }}
{% if measures.values() | selectattr("was_reward") | list %}
<h2>What it was tuned for</h2>
<p>These were a reward of one of the painters. That they rise is no result.</p>
{{ measures_table(true) }}
{% endif %}

{% if distributions %}
<h2>Distributions</h2>
<p class="muted">Features of the repainted regions: {{ distributions.extractor }}. Each figure compares pictures of one
half of the cases with real ones of the other half: the mean over random halves, and the range of 95 % of them. The
floor is the same for real pictures against real ones.</p>
<div class="scroll"><table>
<tr><th>Figure</th><th>Floor</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for figure, entry in distributions.figures.items() %}
<tr><td>{{ figure }}</td><td class="figure">{{ entry.floor | interval }}</td>
{% for name in names %}<td class="figure">{{ entry.matched[name] | interval }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}

{% if memorisation %}
<h2>Memorisation</h2>
<p class="muted">How near the pictures come to those trained on, inside the mask, against real pictures that were held
out.</p>
{% for name, entry in memorisation.items() %}
<p><strong>{{ name }}</strong>: {{ entry.verdict }}. {{ entry.reason }}</p>
{% endfor %}
{% endif %}

{% if clinical_features %}
<h2>Clinical features</h2>
<p class="muted">Distance of the distribution of each feature from that of the real pictures, in real standard
deviations (Wasserstein-1). The floor is that of real pictures against real ones, with the range of 95 % of the draws.
A feature differs where Holm's corrected p value of the Kolmogorov-Smirnov test is below 0.05.</p>
<ul>
{% for name in names %}
<li>{{ name }}: {{ differing[name] | length }} of {{ clinical_features | length }} differ
{%- if differing[name] %} ({{ differing[name][:6] | join(", ") }}
{%- if differing[name] | length > 6 %}, ...{% endif %}){% endif %}</li>
{% endfor %}
</ul>
<details><summary>All of them</summary>
<div class="scroll"><table>
<tr><th>Feature</th><th>Floor</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for feature, entry in clinical_features.items() %}
<tr><td>{{ feature }}</td><td class="figure">{{ entry.floor | interval }}</td>
{% for name in names %}<td class="figure">{{ entry.painters[name] | interval }}
{% if entry.verdicts[name] == "differs" %}<span class="verdict worse">differs</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
</details>
{% endif %}

{% if reader_study %}
<h2>What raters said</h2>
{% if reader_study.preferences %}
<div class="scroll"><table>
<tr><th>Preferred</th><th>Criterion</th><th>Win rate, by case</th><th>For other raters, too</th><th>Wins</th>
<th>Ties</th><th>Losses</th><th></th></tr>
{% for study in reader_study.preferences %}
<tr><td>{{ study.after }} over {{ study.before }}</td><td>{{ study.criterion or "all" }}</td>
<td class="figure">{{ study.rate | share }}</td><td class="figure">{{ study.rate_any_rater | share }}</td>
<td>{{ study.wins }}</td><td>{{ study.ties }}</td><td>{{ study.losses }}</td>
<td><span class="verdict {{ study.verdict | replace(" ", "-") }}">{{ study.verdict }}</span></td></tr>
{% endfor %}
</table></div>
{% endif %}
{% for criterion, test in (reader_study.turing_tests or {}).items() %}
<p>Real or painted, by {{ criterion }}: right in {{ test.accuracy | share }}, {{ test.verdict }}.
{% for role, share in test.roles.items() %}{{ role }} {{ share | share }}{{ ", " if not loop.last else "." }}
{% endfor %}</p>
{% endfor %}
{% endif %}

<h2>Pictures</h2>
{% for name, picture in pictures.items() if name != "differences" %}
<p>{{ name }}</p>
<img src="data:image/png;base64,{{ picture }}" alt="{{ name }}">
{% endfor %}

<h2>How it was measured</h2>
<dl>
{% for measure, text in definitions.items() %}<dt>{{ measure }}</dt><dd>{{ text }}</dd>{% endfor %}
{% for name, value in settings.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
<dt>data</dt><dd>{{ data.tasks | join(", ") }}; {{ data.modalities | join(", ") }}; fingerprint {{ data.fingerprint }};
seeds {{ data.seeds | join(", ") }}</dd>
<dt>versions</dt>
<dd>{% for name, version in environment.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}
{% if commit %}; commit {{ commit }}{% endif %}</dd>
<dt>weights</dt>
<dd>{% for name, digest in weights.items() %}{{ name }} {{ digest }}{{ ", " if not loop.last }}{% endfor %}</dd>
</dl>
<h2>Limits</h2>
<ul>
{% for limit in limits %}
  <li>{{ limit }}</li>
{% endfor %}
</ul>
</body>
</html>
"""
