"""The papers' claims a notebook touches: rows of `data/paper/claims.csv`, committed before the run that tests them.

A claim that does not hold is reported like one that does; a claim nobody answered is an error.
"""

import math

import pandas as pd
from pandas.io.formats.style import Styler

from nbs_lib import paths

VERDICTS = {"holds": "#1b7f4b", "does not hold": "#c0392b", "cannot be tested here": "#8a6d1d"}  # and their colours
HOLDS, FAILS, CANNOT = VERDICTS
SHOWN = ["claim", "source", "metric", "paper_value", "criterion", "threshold", "unit"]
CRITERIA = {  # does the value hold, by the numbers in `threshold`; 1e-9 so that 44.4 lies within 0.1 of 44.3
    ">=": lambda value, least: value >= least,
    "<=": lambda value, most: value <= most,
    "within_abs": lambda value, target, width: abs(value - target) <= width * (1 + 1e-9),
    "within_rel": lambda value, target, share: abs(value - target) <= share * abs(target) * (1 + 1e-9),
    "true": bool,
}


class Claims:
    """One notebook's claims (it may have none) and the answers so far; "untestable" ones begin answered."""

    def __init__(self, notebook: str):
        rows = pd.read_csv(paths.data_dir() / "paper" / "claims.csv", dtype=str, keep_default_na=False)
        self.notebook = notebook
        self.rows = rows[rows["notebook"] == notebook].set_index("id")
        self.answers = {key: (None, "", "") for key in self.rows.index}  # id -> value, verdict, note
        for key, row in self.rows[self.rows["criterion"] == "untestable"].iterrows():
            self.cannot(key, f"needs {row['scope']}")

    def check(self, key: str, value: float | bool, note: str = "") -> str:
        """Judge a value, in the claim's unit, by its criterion; return the verdict.

        KeyError for an unknown claim; ValueError for an untestable one, or a value that is not a finite number."""
        criterion, threshold = self._find(key)[["criterion", "threshold"]]
        if criterion not in CRITERIA or not math.isfinite(value):
            raise ValueError(f"Expected a testable claim and a finite value, else `cannot`. Got {key}: {value}.")
        holds = CRITERIA[criterion](value, *map(float, threshold.split()))
        self.answers[key] = (float(f"{value:.6g}") if threshold else bool(value), HOLDS if holds else FAILS, note)
        return self.answers[key][1]

    def cannot(self, key: str, why: str) -> None:
        """Say why a claim cannot be tested here."""
        self._find(key)
        self.answers[key] = (None, CANNOT, why)

    def unanswered(self) -> list[str]:
        """The claims that have no answer yet."""
        return [key for key, (_, verdict, _) in self.answers.items() if not verdict]

    def frame(self) -> pd.DataFrame:
        """A row per claim: id, the columns SHOWN, then value (in `unit`), verdict and note."""
        found = pd.DataFrame(list(self.answers.values()), self.rows.index, ["value", "verdict", "note"], dtype=object)
        return self.rows[SHOWN].join(found).reset_index()

    def show(self) -> Styler:
        """The frame with its verdicts coloured."""
        styler = self.frame().style.hide(axis="index").format(na_rep="", precision=3)
        return styler.map(lambda verdict: f"font-weight: 600; color: {VERDICTS.get(verdict)}", subset=["verdict"])

    def _find(self, key: str) -> pd.Series:
        if key not in self.answers:
            raise KeyError(f"Expected a claim of {self.notebook}: {list(self.answers)}. Got {key!r}.")
        return self.rows.loc[key]
