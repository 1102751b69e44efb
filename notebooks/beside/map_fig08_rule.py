"""Mapping Fig. 8, drawn from real mappings: the rule's questions, and the layers that pass through them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nbs_lib.mapping.table import Mapping

BRANCHES = ["unpruned", "FC", "1x1 and other CONV", "3x3 CONV"]  # where a layer leaves the questions
COLOURS = dict(zip(BRANCHES, ["#999999", "#8a5fb5", "#1f6fb4", "#e08214"], strict=True))
_TALL = 0.5  # height of a band that carries all MACs of a network, in units of the drawing
_BOX = {"boxstyle": "round,pad=0.4", "facecolor": "#eef3f8", "edgecolor": "#555555"}
_ASK = {"boxstyle": "round4,pad=0.5", "facecolor": "#fff6df", "edgecolor": "#555555"}


def passing(mappings: dict[tuple[str, str], Mapping]) -> pd.DataFrame:
    """One row per layer of every {(network, task): mapping}. Columns: network, task, layer, kind, number (its place in
    the network), branch (of BRANCHES), scheme (text), rate, macs, share (% of the MACs), ratio, beta, reason."""
    rows = []
    for (network, task), mapping in mappings.items():
        facts = pd.DataFrame(mapping.layers).reindex(columns=["layer", "kind", "shape", "ratio", "beta"])
        table = mapping.report()[["layer", "scheme", "rate", "macs", "reason"]].merge(facts, on="layer")
        three = table["shape"].map(lambda shape: tuple(shape[2:]) == (3, 3))
        places = [table["scheme"] == "dense", table["kind"] == "linear", three]
        table["branch"] = np.select(places, ["unpruned", "FC", "3x3 CONV"], "1x1 and other CONV")
        table["share"] = 100 * table["macs"] / table["macs"].sum()
        rows.append(table.assign(network=network, task=task, number=range(1, len(table) + 1)))
    columns = "network task layer kind number branch scheme rate macs share ratio beta reason"
    return pd.concat(rows, ignore_index=True)[columns.split()]


def flow(layers: pd.DataFrame, ax: plt.Axes | None = None) -> plt.Axes:
    """Draw the rule's questions, with a band per network on every branch, as wide as its share of the MACs.

    layers: as from `passing`, of one task: the branches are the same for both, as the last question asks for it."""
    ax = ax or plt.gca()
    networks = list(dict.fromkeys(layers["network"]))
    shades = dict(zip(networks, sns.color_palette("Dark2", len(networks)), strict=True))
    sums = layers.groupby(["network", "branch"])["share"].agg(["size", "sum"])
    sums = sums.reindex(pd.MultiIndex.from_product([networks, BRANCHES]), fill_value=0)

    def band(branches: list[str], x: float, y: float, length: float) -> None:
        """The bands side by side, to the right (length > 0) or down, and their numbers beside them."""
        part = sums.loc[pd.IndexSlice[:, branches], :].groupby(level=0).sum().loc[networks]
        part, across = part[part["size"] > 0], length > 0
        sizes = np.maximum(_TALL * part["sum"] / 100, 0.04)
        starts = np.cumsum(sizes) - sizes - sizes.sum() / 2
        for line, (network, start, size) in enumerate(zip(part.index, starts, sizes, strict=True)):
            corner, sides = ((x, y - start - size), (length, size)) if across else ((x + start, y), (size, length))
            ax.add_patch(plt.Rectangle(corner, *sides, color=shades[network], linewidth=0))
            count, share = part.loc[network]
            told = f"{network}: {count:.0f} layer{'s' * (count != 1)}, {share:.2g} % of MACs"
            up = sizes.sum() / 2 + 0.2 + 0.29 * (len(part) - 1 - line) if across else length / 2 + 0.29 * (1 - line)
            place = (x + length / 2 + 0.5, y + up) if across else (x - 0.9, y + up)
            ax.text(*place, told, {"color": shades[network]}, fontsize=8.5, ha="center" if across else "right")

    def box(x: float, y: float, told: str, look: dict, **font) -> None:
        ax.text(x, y, told, ha="center", va="center", bbox=look, zorder=3, **font)

    asks = ["depthwise, or stem with\nfewer than 4 input channels?", "fully connected?", "3x3 kernel?", "hard task?"]
    leaves = ["unpruned", "block p x q", "block-punched p x q", "pattern (8)", "block-punched p x q"]
    at, out, end, gap = 0.0, 6.6, 11.3, 2.4
    for row, (leaf, leaving) in enumerate(zip(leaves, [*BRANCHES, BRANCHES[-1]], strict=True)):
        y = -gap * row
        if row < len(asks):
            band([branch for branch in BRANCHES if branch not in BRANCHES[: row + 1]] or [leaving], at, y, -gap)
        band([leaving], at, y, out)
        box(at, y, [*asks, "easy task"][row], _ASK, fontsize="small")
        box(out, y, leaf, _BOX)
        if leaf.startswith("block"):
            arrow = {"arrowstyle": "->", "color": "#555555"}
            ax.annotate("", (end - 1.75, -2.6 * gap - (row - 2.6) * 0.3), (out + 1.7, y), arrowprops=arrow)
    beta = layers["beta"].dropna().unique()
    within = f"{100 * beta[0]:.3g} %" if len(beta) == 1 else "the layer's beta"
    box(
        end,
        -2.6 * gap,
        f"smallest block whose ms\nper MAC is within {within} of\nstructured pruning\nat the same rate",
        _ASK,
    )
    for row, (right, down) in enumerate([("yes", "no"), ("yes", "no"), ("no", "yes"), ("yes", "no")]):
        ax.text(at + 2.4, -gap * row - 0.62, right, {"style": "italic"}, fontsize="small")
        ax.text(at + 0.85, -gap * (row + 0.5), down, {"style": "italic"}, va="center", fontsize="small")
    ax.set(xlim=(-4.6, end + 2.0), ylim=(-4 * gap - 0.6, 1.2))
    ax.axis("off")
    return ax


def blocks(layers: pd.DataFrame, ax: plt.Axes | None = None, sizes: list[str] | None = None) -> plt.Axes:
    """Draw what each layer of one network and task got: a mark per layer, larger with its share of the MACs, hollow
    where no block is within beta. layers: as from `passing`; sizes: of blocks on the axis, by default those chosen."""
    ax = ax or plt.gca()
    texts = [text.partition("(")[2].rstrip(")") if text.startswith("block") else text for text in layers["scheme"]]
    found = {text for text in texts if "x" in text} | set(sizes or ())
    by_area = sorted(found, key=lambda text: (np.prod([int(n) for n in text.split("x")]), int(text.split("x")[0])))
    steps = ["dense", *by_area, "pattern(8)"]
    heights = np.array([steps.index(text) for text in texts])
    ax.plot(layers["number"], heights, color="#cccccc", linewidth=0.7, zorder=1)
    hollow = (layers["ratio"] > (1 + layers["beta"]) * (1 + 1e-9)) & layers["scheme"].str.startswith("block")
    for branch, colour in COLOURS.items():
        for outside in (False, True):
            chosen = ((layers["branch"] == branch) & (hollow == outside)).to_numpy()
            look = {"facecolors": "white" if outside else colour, "edgecolors": colour, "zorder": 2}
            size = 14 + 22 * layers["share"][chosen]
            ax.scatter(layers["number"][chosen], heights[chosen], size, label=branch * (not outside), **look)
    ax.set(yticks=range(len(steps)), yticklabels=["unpruned", *steps[1:-1], "pattern"], ylim=(-0.7, len(steps) - 0.3))
    ax.tick_params(labelsize="x-small")
    return ax
