"""From rows to what a reader sees: claims, figures, the results folder. Measures and trains nothing."""

from nbs_lib.report.claims import Claims
from nbs_lib.report.figures import bars, freshness, label, lines, style
from nbs_lib.report.results import save

__all__ = ["Claims", "bars", "freshness", "label", "lines", "save", "style"]
