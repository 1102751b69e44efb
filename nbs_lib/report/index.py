"""`index.html`: every figure, table and claim of a results folder with its provenance, on one page.

Reads the folders below only, so the page can be made anew at any time. Links are relative: the whole can be moved.
"""

import json
from pathlib import Path

import jinja2
import pandas as pd

from nbs_lib import paths
from nbs_lib.report.claims import VERDICTS

ROWS = 20  # rows of a table on the page; the CSV behind its link has all

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PruneMap: {{ profile }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: auto; padding: 1.5rem; }
h1 { margin: 0; } h2 { margin: 3rem 0 0; border-top: 1px solid #ddd; padding-top: 1rem; } a { color: #1f6fb4; }
p { color: #666; font-size: .85rem; margin: .3rem 0; } div { overflow-x: auto; margin: .8rem 0; }
table { border: 0; border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border: 0; border-bottom: 1px solid #e4e4e4; text-align: left; }
th { background: #f4f5f7; } img { max-width: 100%; zoom: .7; } .bad { color: #c0392b; }
pre { background: #fdf0ef; border-left: 4px solid #c0392b; padding: .7rem; white-space: pre-wrap; }
</style></head><body>
<h1>PruneMap: {{ profile }}</h1>
<p>Every figure, table and claim with what made it. A figure links to its SVG, a table to its CSV.</p>
<div><table><tr><th>notebook</th><th>title</th><th>status</th><th>seconds</th>
{% for verdict in colours %}<th>{{ verdict }}</th>{% endfor %}</tr>
{% for run in runs %}
<tr><td><a href="#{{ run.notebook }}">{{ run.notebook }}</a></td><td>{{ run.title }}</td>
<td{% if run.error %} class="bad"{% endif %}>{{ run.status }}</td><td>{{ run.seconds }}</td>
{% for count in run.counts.values() %}<td>{{ count or "" }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for run in runs %}
<h2 id="{{ run.notebook }}">{{ run.title or run.notebook }}</h2><p>{{ run.facts | join(" · ") }}
{% if run.executed %}· <a href="{{ run.notebook }}/executed.ipynb">executed notebook</a>{% endif %}</p>
{% if run.error %}<pre>{{ run.error }}</pre>{% endif %}
{% for name, stem in run.figures.items() %}
{% set path = run.notebook ~ "/" ~ stem %}
<div><a href="{{ path }}.svg"><img src="{{ path }}.png" alt="{{ name }}"></a></div>
{% endfor %}{% if run.claims %}
<div><table><tr>{% for key in run.claims[0] if key != "id" %}<th>{{ key }}</th>{% endfor %}</tr>
{% for claim in run.claims %}<tr>{% for key, text in claim.items() if key != "id" %}
<td>{% if text in colours %}<b style="color: {{ colours[text] }}">{{ text }}</b>{% else %}{{ text }}{% endif %}</td>
{% endfor %}</tr>{% endfor %}
</table></div>{% endif %}
{% for name, stem in run.tables.items() %}
<p><a href="{{ run.notebook }}/{{ stem }}.csv">{{ name }}</a></p><div>{{ run.heads[name] | safe }}</div>
{% endfor %}{% endfor %}
</body></html>
""")


def write_index(folder: str | Path) -> Path:
    """Write `index.html` into a folder of results from the `run.json`s one level below; return its path."""
    folder = Path(folder)
    runs = [_load(file) for file in sorted(folder.glob("*/run.json"))]
    return paths.write_atomic(folder / "index.html", PAGE.render(profile=folder.name, runs=runs, colours=VERDICTS))


def count_verdicts(folder: Path) -> dict[str, int]:
    """How many claims in one notebook's results folder got each verdict."""
    found = [claim["verdict"] for claim in _claims(folder)]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def _load(file: Path) -> dict:
    """One `run.json` with what lies beside it; what a failed run lacks, or somebody removed, is left empty."""
    try:
        run = json.loads(file.read_text())
    except ValueError as error:
        run = {"status": "unreadable", "error": f"{file}: {error}"}
    run = {"figures": {}, "tables": {}} | run | {"notebook": file.parent.name}
    settings = {key: run.get(key) for key in ("notebook", "device", "cpu", "commit", "utc")}
    settings |= run.get("parameters", {}) | run.get("versions", {})
    run["facts"] = [f"{key} {value}" for key, value in settings.items() if value not in (None, "")]
    run["claims"], run["counts"] = _claims(file.parent), count_verdicts(file.parent)
    run["executed"] = (file.parent / "executed.ipynb").exists()
    run["heads"] = {name: _head(file.parent / f"{stem}.csv") for name, stem in run["tables"].items()}
    return run


def _head(file: Path) -> str:
    table = pd.read_csv(file, nrows=ROWS) if file.exists() and file.stat().st_size > 1 else pd.DataFrame()
    return table.to_html(index=False, na_rep="", float_format="{:.4g}".format)


def _claims(folder: Path) -> list[dict[str, str]]:
    file = folder / "claims.csv"
    return pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records") if file.exists() else []
