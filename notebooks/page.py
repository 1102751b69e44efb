"""`index.html`, the page over all of a profile's results folders. Reads nothing but the folders.

Its links are relative: the whole can be moved.
"""

import json
from pathlib import Path

import jinja2
import pandas as pd

from nbs_lib import paths
from nbs_lib.report.claims import VERDICTS

ROWS = 20  # rows of a table on the page; the CSV behind its link has all
PAGES = jinja2.FileSystemLoader(Path(__file__).parent)
PAGE = jinja2.Environment(loader=PAGES, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template("page.html")


def write_index(folder: str | Path) -> Path:
    """Write `index.html` into a folder of results from the `run.json`s one level below; return its path."""
    folder = Path(folder)
    runs = [_load(file.parent) for file in sorted(folder.glob("*/run.json"))]
    return paths.write_atomic(folder / "index.html", PAGE.render(profile=folder.name, runs=runs, colours=VERDICTS))


def count_verdicts(folder: Path) -> dict[str, int]:
    """How many claims in one notebook's results folder got each verdict."""
    found = [claim["verdict"] for claim in _claims(folder)]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def _load(folder: Path) -> dict:
    """One `run.json` with what lies beside it; what a failed run lacks, or somebody removed, is left empty."""
    try:
        run = json.loads((folder / "run.json").read_text())
    except ValueError as error:
        run = {"status": "unreadable", "error": f"{folder / 'run.json'}: {error}"}
    run = {"figures": {}, "tables": {}} | run | {"notebook": folder.name}
    settings = {key: run.get(key) for key in ("notebook", "device", "cpu", "commit", "utc")}
    settings |= run.get("parameters", {}) | run.get("versions", {})
    run["facts"] = [f"{key} {value}" for key, value in settings.items() if value not in (None, "")]
    run["claims"], run["counts"] = _claims(folder), count_verdicts(folder)
    run["executed"] = (folder / "executed.ipynb").exists()
    run["heads"] = {name: _head(folder / f"{stem}.csv") for name, stem in run["tables"].items()}
    return run


def _head(file: Path) -> str:
    table = pd.read_csv(file, nrows=ROWS) if file.exists() and file.stat().st_size > 1 else pd.DataFrame()
    return table.to_html(index=False, na_rep="", float_format="{:.4g}".format)


def _claims(folder: Path) -> list[dict[str, str]]:
    file = folder / "claims.csv"
    return pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records") if file.exists() else []
