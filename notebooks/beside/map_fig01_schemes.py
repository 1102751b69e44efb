"""Mapping Fig. 1 with handles, for a browser; the notebook draws the same figure once more from its parameters.

The picture is an Image widget. `ipywidgets.interactive` has an Output widget instead, to which nbclient answers from
outside the kernel: headless runs then wait for ever, now and then (seen with ipykernel 7.4, nbclient 0.11).
"""

import io
from collections.abc import Callable

import matplotlib.pyplot as plt
from ipywidgets import Image, VBox, Widget

from nbs_lib.report.drawings import pruned
from nbs_lib.schemes import parse


def explore(weight, scheme: str, p=4, q=4, rate=4.0) -> plt.Figure:
    """`pruned` as tensor and as matrix. scheme: a name of SCHEMES; p, q: its block, where it has one."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(1, 2))
    for ax, matrix in zip(axes, (False, True), strict=True):
        pruned(weight, parse(f"{scheme}({p}x{q})" if scheme.startswith("block") else scheme), rate, ax, matrix)
    return figure


def handles(draw: Callable[..., plt.Figure], **controls: Widget) -> VBox:
    """The controls above what `draw(name=value, ...)` gives for their values, drawn anew whenever one changes.

    What `draw` raises is shown by the kernel, and the picture stays. The figures are closed after use."""
    picture = Image(format="png")

    def redraw(_=None) -> None:
        figure, png = draw(**{name: control.value for name, control in controls.items()}), io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        picture.value = png.getvalue()

    for name, control in controls.items():
        control.description = name
        if control.has_trait("continuous_update"):
            control.continuous_update = False  # a drawing at the end of a drag, not hundreds on the way
        control.observe(redraw, "value")
    redraw()
    return VBox([*controls.values(), picture])
