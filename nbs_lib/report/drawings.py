"""Drawings of one layer: its weights (0: pruned), its BCS arrays, its place under the roofline; and stacked shares."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nbs_lib.formats.bcs import BCS
from nbs_lib.schemes import Scheme, reached

PRUNED, BORDER, ARROW = (0.93, 0.93, 0.93), "#c0392b", {"arrowstyle": "->", "color": "#888888"}
PALETTE = np.array(sns.color_palette("Set2"))


def weights(weight, ax=None, matrix=False, blocks=None, kinds=None, title="") -> plt.Axes:
    """Draw a layer's weights, pruned ones pale: (P, Q), or (P, Q, Kh, Kw) as a grid of P x Q kernels.

    matrix: the latter as P x (Q Kh Kw). blocks: int array of the weight's shape, red lines stand where it changes.
    kinds: int, broadcast to it, a colour for each; without them darker is larger. A small (P, Q) shows its values."""
    ax, shape = ax or plt.gca(), (*weight.shape, 1, 1)[:4]
    p, q, kh, kw = (*shape[:2], 1, shape[2] * shape[3]) if matrix else shape
    numbers = np.broadcast_to(weight if kinds is None else kinds, weight.shape)
    spread = [np.reshape(array, (p, q, kh, kw)).swapaxes(1, 2) for array in (weight, numbers)]
    values, numbers = (array.reshape(p * kh, q * kw) for array in spread)
    shades = plt.cm.Blues(0.3 + 0.7 * np.abs(values) / (np.abs(values).max() or 1))[..., :3]
    colours = shades if kinds is None else PALETTE[numbers % len(PALETTE)]
    ax.imshow(np.where(values[..., None] == 0, PRUNED, colours), aspect="auto", interpolation="nearest")
    edges, gap = np.zeros(shape, int) if blocks is None else np.reshape(blocks, shape), 1.5 if kh * kw > 1 else 0.3
    sides = [(ax.hlines, edges[:, 0, 0, 0], kh, q * kw), (ax.vlines, edges[0, :, 0, 0], kw, p * kh)]
    for draw, edge, size, length in sides:
        draw(np.arange(1, edge.size * size) - 0.5, -0.5, length - 0.5, "white", linewidth=0.3)
        draw(np.arange(1, edge.size) * size - 0.5, -0.5, length - 0.5, "white", linewidth=gap)
        draw((np.flatnonzero(np.diff(edge)) + 1) * size - 0.5, -0.5, length - 0.5, BORDER, linewidth=1, zorder=3)
    for (row, column), value in np.ndenumerate(weight if weight.ndim == 2 and weight.size <= 100 else np.empty((0, 0))):
        ax.text(column, row, f"{value:.2g}" if value else "", ha="center", va="center", fontsize="small")
    inputs = f"{q} x {kw} columns" if matrix else f"{q} input channels" + (f" of {kh}x{kw}" if kh * kw > 1 else "")
    ax.set(title=title, xlabel=inputs, ylabel=f"{p} filters", xticks=[], yticks=[])
    ax.grid(False)
    return ax


def pruned(weight, scheme: Scheme, rate: float, ax=None, matrix=False, crop=(12, 12)) -> plt.Axes:
    """Prune a layer, draw its first `crop` filters and channels; patterns in colours; or say why it is not legal."""
    ax, kinds, part = ax or plt.gca(), None, np.s_[: crop[0], : crop[1]]
    if reason := scheme.refuses(weight.shape).replace("; ", ";\n"):
        ax.text(0.5, 0.5, reason, ha="center", va="center", fontsize="small", transform=ax.transAxes)
        ax.set(title=scheme.name, xticks=[], yticks=[])
        return ax
    mask = scheme.project(weight, rate)
    if scheme.name == "pattern":  # a kernel's kind: its place among the sorted different masks of kernels
        kinds = np.unique(mask.reshape(-1, 9), axis=0, return_inverse=True)[1].reshape(*mask.shape[:2], 1, 1)[part]
    title = f"{scheme}, reaches {reached(mask):.4g}x"
    return weights((weight * mask)[part], ax, matrix, scheme.blocks(weight.shape)[part], kinds, title)


def arrays(packed: BCS, ax=None, most=24) -> plt.Axes:
    """Draw the arrays of a BCS weight, a colour per run of rows, `most` entries of each; arrows are their pointers."""
    ax, runs = ax or plt.gca(), np.arange(packed.occurrence.size - 1)
    rows, stride = np.repeat(runs, np.diff(packed.occurrence)), packed.column_stride
    drawn = {"compact_column": np.repeat(runs, np.diff(stride)), "column_stride": runs, "occurrence": runs}
    drawn |= {"row_offset": rows, "weights": np.repeat(rows, np.diff(packed.row_offset)), "row_order": rows}
    for line, (name, run) in enumerate(drawn.items()):  # run: that of each entry; an end belongs to none
        values = getattr(packed, name)
        ax.text(-0.3, -2 * line, f"{name.replace('_', ' ')} ({values.size})", ha="right", va="center")
        ax.text(most + 0.2, -2 * line, "..." if values.size > most else "", va="center")
        for x, value in enumerate(values[:most]):
            colour = PALETTE[run[x] % len(PALETTE)] if x < len(run) else "white"
            ax.add_patch(plt.Rectangle((x, -2 * line - 0.5), 1, 1, facecolor=colour, edgecolor="#cccccc"))
            text = f"{value:.2g}".replace("0.", ".") if name == "weights" else value
            ax.text(x + 0.5, -2 * line, text, ha="center", va="center", fontsize="small")
    for targets, start, end in ((stride, -1.5, -0.5), (packed.occurrence, -4.5, -5.5), (packed.row_offset, -6.5, -7.5)):
        for x in np.flatnonzero(targets[:-1][:most] < most):
            ax.annotate("", (targets[x] + 0.5, end), (x + 0.5, start), arrowprops=ARROW)
    ax.set(xlim=(-4, min(most, max(len(getattr(packed, name)) for name in drawn)) + 1), ylim=(-10.6, 0.6))
    ax.axis("off")
    return ax


def stacked(shares: pd.DataFrame, ax=None) -> plt.Axes:
    """Draw shares in %, a bar per row and a piece per column; pieces of 4 % and more carry their number."""
    ax = shares.plot.barh(stacked=True, ax=ax or plt.gca(), width=0.75, color=PALETTE[: shares.shape[1]])
    for container in ax.containers:
        ax.bar_label(container, fmt=lambda share: f"{share:.1f}" if share >= 4 else "", label_type="center")
    ax.set(ylabel="", ylim=(len(shares) - 0.4, -0.6))
    ax.grid(visible=False, axis="y")
    return ax
