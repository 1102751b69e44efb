"""A figure with handles, for a browser; notebooks draw the same figure once more from their parameters.

The picture is an Image widget. `ipywidgets.interactive` has an Output widget instead, to which nbclient answers from
outside the kernel: headless runs then wait for ever, now and then (seen with ipykernel 7.4, nbclient 0.11).
"""

import io
from collections.abc import Callable

import matplotlib.pyplot as plt
from ipywidgets import Image, VBox, Widget


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
