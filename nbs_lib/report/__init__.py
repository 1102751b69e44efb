"""From rows to what a reader sees: claims, figures, the results folder and its page. Measures and trains nothing."""

from nbs_lib.report.claims import Claims
from nbs_lib.report.figures import bars, label, lines, style
from nbs_lib.report.results import save, write_index

__all__ = ["Claims", "bars", "label", "lines", "save", "style", "write_index"]
