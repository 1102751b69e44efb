"""One look for every figure, and the generic shapes the notebooks draw: tidy frames in, marks on an `ax` out.

A drawn frame has a column `provenance`, where its numbers come from: it fixes the colour and stands in every legend.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

COLOURS = {"paper": "#444444", "measured here": "#1f6fb4", "cached": "#86b", "simulated": "#e82", "phone": "#2a6"}


def style() -> None:
    """Set the house style for all figures drawn afterwards."""
    sns.set_theme(style="whitegrid", font_scale=0.9)
    plt.rcParams.update({"figure.figsize": (8, 4.5), "figure.constrained_layout.use": True, "svg.hashsalt": "prunemap"})


def label(rows: pd.DataFrame, cached: bool = False) -> pd.DataFrame:
    """Measured rows with their `provenance`, told from `device`; `cached`: host rows that were not taken just now."""
    known = {"host": "cached" if cached else "measured here", "simulated": "simulated"}
    return rows.assign(provenance=[known.get(device.partition(":")[0], "phone") for device in rows["device"]])


def freshness(rows: pd.DataFrame, started: str) -> str:
    """How many measured rows are newer than `started`, a time as in their column `utc`: "all 512 settings cached"."""
    new = int((pd.to_datetime(rows.utc, utc=True) >= pd.Timestamp(started)).sum())
    if not new or new == len(rows):
        return f"all {len(rows)} settings {'measured now' if new else 'cached'}"
    return f"{new} of {len(rows)} settings measured now, the others cached"


def bars(frame: pd.DataFrame, x: str, y: str, by: str | None = None, ax: plt.Axes | None = None) -> plt.Axes:
    """Draw bars of `y` over the categories `x`, a series per provenance (and value of `by`); NaN leaves a gap."""
    ax = _draw(sns.barplot, frame, x, y, by, ax, saturation=1)
    for container in ax.containers:
        ax.bar_label(container, fmt=lambda height: "" if np.isnan(height) else f"{height:.3g}", fontsize="x-small")
    return ax


def lines(frame: pd.DataFrame, x: str, y: str, by: str | None = None, ax: plt.Axes | None = None) -> plt.Axes:
    """Draw `y` over `x` as lines with markers, a series per provenance (and value of `by`)."""
    return _draw(sns.lineplot, frame, x, y, by, ax, style="series", markers=True, dashes=False)


def _draw(plot, frame, x, y, by, ax, **look) -> plt.Axes:
    """Check the columns, then draw with seaborn, each series in a shade of its provenance's colour."""
    if missing := {x, y, by or x, "provenance"} - set(frame.columns):
        raise ValueError(f"Expected the columns {sorted(missing)}. Got {list(frame.columns)}.")
    if unknown := set(frame["provenance"]) - set(COLOURS):
        raise ValueError(f"Expected a provenance of {list(COLOURS)}. Got {sorted(map(str, unknown))}.")
    series = frame["provenance"] if by is None else frame[by].astype(str) + ", " + frame["provenance"]
    palette = {}
    for provenance, names in series.groupby(frame["provenance"], sort=False):
        shades = sns.light_palette(COLOURS[provenance], names.nunique() + 1, reverse=True)
        palette |= dict(zip(names.unique(), shades, strict=False))
    ax = ax or plt.gca()
    if len(frame):
        plot(frame.assign(series=series), x=x, y=y, hue="series", palette=palette, errorbar=None, ax=ax, **look)
    ax.set(xlabel=x, ylabel=y)
    if ax.get_legend() is not None:
        ax.get_legend().set_title(None)
    return ax
