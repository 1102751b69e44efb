"""The tour's last figure: layers under the roofline of this machine."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nbs_lib.report.figures import COLOURS


def roofline(points: pd.DataFrame, peak_gmacs: float, bandwidth_gbs: float, ax=None) -> plt.Axes:
    """Draw points (columns label, macs, bytes, ms, provenance) under the roof min(peak, bandwidth x MACs per byte)."""
    ax, intensity, speed = ax or plt.gca(), points["macs"] / points["bytes"], points["macs"] / points["ms"] / 1e6
    roof = np.sort([*intensity * 2, peak_gmacs / bandwidth_gbs, peak_gmacs / bandwidth_gbs / 2])
    told = f"roof: {peak_gmacs:.0f} GMAC/s, {bandwidth_gbs:.0f} GB/s"
    ax.loglog(roof, np.minimum(peak_gmacs, bandwidth_gbs * roof), color="#444444", base=2, label=told)
    for marker, x, y, row in zip("osD^vPX*" * len(points), intensity, speed, points.itertuples(), strict=False):
        ax.scatter(x, y, s=60, marker=marker, color=COLOURS[row.provenance], label=f"{row.label}, {row.provenance}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.set(xlabel="MACs per byte", ylabel="GMAC/s", ylim=(None, 1.5 * max(peak_gmacs, speed.max())))
    ax.legend(loc="lower right")
    return ax
