"""Mapping Fig. 6, drawn from a real run: how search and rule come to a mapping, and how far each search has come."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from nbs_lib.report.claims import FAILS, Claims

_LOOK = {"boxstyle": "round,pad=0.45", "edgecolor": "#555555"}
_FILL = {"given": "#eeeeee", "decides": "#fff6df", "works": "#e6f0f8", "result": "#e4f3e6"}
_ARROW = {"arrowstyle": "-|>", "color": "#555555", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
COLOURS = dict(zip(["rl", "random", "exact", "rule"], ["#1f6fb4", "#999999", "#8a5fb5", "#e08214"], strict=True))


def facts(history: pd.DataFrame, mapping) -> dict[str, str]:
    """What the boxes of a search say: numbers of its `history`, and the schemes of its best mapping."""
    timed = "\n".join(f"{count} x {how}" for how, count in history.timed.value_counts().items())
    beside = history.timed.str.contains("beside").any()
    each, accuracy = history.seconds.median(), 100 * history.accuracy
    return {
        "accuracy": f"pruned at once, retrained\n{accuracy.min():.1f} .. {accuracy.max():.1f} %\n{each:.2f} s each",
        "latency": f"compiled\n{history.ms.min():.3g} .. {history.ms.max():.3g} ms\n{timed}",
        "reward": f"{history.reward.min():.3f} .. {history.reward.max():.3f}",
        "order": "at the same time" if beside else "compiled meanwhile,\ntimed afterwards",
        "evaluations": f"{len(history)}, steps: {history.iteration.nunique()}",
        "best": f"best reward: {history.reward.max():.4f}\n{schemes(mapping)}",
    }


def schemes(mapping) -> str:
    """How many layers of a mapping have which scheme, a line each, most frequent first."""
    counts = pd.Series([str(choice.scheme) for choice in mapping.values()], dtype=object).value_counts()
    lines = [f"{count} x {scheme}" for scheme, count in counts.head(4).items()]
    return "\n".join(lines + ([f"{counts[4:].sum()} x others"] if len(counts) > 4 else []))


def evaluated(rows: pd.DataFrame, names: dict[str, str]) -> str:
    """How many mappings each strategy has evaluated, over its seeds: "search: 10, exact solver: 2..4, rule: 1"."""
    counts = rows.groupby(["strategy", "seed"]).size().groupby("strategy").agg(["min", "max"])
    counts = {name: counts.loc[strategy] for strategy, name in names.items() if strategy in counts.index}
    return ", ".join(f"{name}: {'..'.join(map(str, sorted({c['min'], c['max']})))}" for name, c in counts.items())


def judge_difference(claims: Claims, key: str, mean: float, low: float, high: float, how: str) -> str:
    """Answer a claim that a difference of rewards is at least 0: it holds where its interval lies above 0. Ties, and
    an interval that reaches 0, do not make it hold. Returns the verdict."""
    if low > 0:
        return claims.check(key, mean, how)
    told = "the interval lies below 0" if high < 0 else "no difference found"
    claims.answers[key] = (float(f"{mean:.6g}"), FAILS, f"{told}; {how}")
    return FAILS


def flow(search: dict[str, str], rule: dict[str, str]) -> plt.Figure:
    """Both methods as boxes and arrows, (a) search-based, (b) rule-based.

    search: texts for network, policy, candidates, accuracy, latency, order, reward and best (`facts` gives most of
    them); rule: for network, model, rule, mapping and result."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 7), width_ratios=(1.3, 1))
    for ax, title in ((left, "(a) search-based"), (right, "(b) rule-based, without training")):
        ax.set(xlim=(0, 10), ylim=(0, 10))
        ax.set_title(title, loc="left", fontweight="bold")
        ax.axis("off")
    _box(left, 5.2, 9.3, "network", search["network"], "given")
    _box(left, 5.2, 7.6, "policy", search["policy"], "decides")
    _box(left, 5.2, 6.0, "candidates", search["candidates"], "decides")
    _box(left, 2.7, 3.8, "accuracy", search["accuracy"], "works")
    _box(left, 7.8, 3.8, "latency", search["latency"], "works")
    _box(left, 2.7, 1.2, "reward", search["reward"], "decides")
    _box(left, 7.8, 1.2, "mapping", search["best"], "result")
    _arrows(left, [(5.2, 8.75, 5.2, 8.15), (5.2, 7.05, 5.2, 6.55), (4.2, 5.45, 3.2, 4.7), (6.2, 5.45, 7.3, 4.7)])
    _arrows(left, [(2.7, 2.9, 2.7, 1.75), (6.6, 2.9, 3.6, 1.75), (3.8, 1.2, 5.9, 1.2), (0.3, 7.6, 2.3, 7.6)])
    left.plot([1.6, 0.3, 0.3], [1.2, 1.2, 7.6], color=_ARROW["color"], linewidth=_ARROW["linewidth"])
    left.text(0.2, 5.6, "REINFORCE (Eq. 6)", rotation=90, va="center", ha="right", fontsize="small")
    left.text(5.25, 3.8, search["order"], ha="center", va="center", fontsize="small", style="italic")
    _box(right, 2.6, 9.3, "network", rule["network"], "given")
    _box(right, 7.6, 9.3, "latency model", rule["model"], "given")
    _box(right, 5, 6.8, "rule", rule["rule"], "decides")
    _box(right, 5, 4.0, "mapping", rule["mapping"], "result")
    _box(right, 5, 1.2, "the same evaluation", rule["result"], "works")
    _arrows(right, [(2.9, 8.75, 4.2, 7.5), (7.3, 8.75, 5.8, 7.5), (5, 6.1, 5, 5.05), (5, 2.95, 5, 1.75)])
    return figure


def _box(ax: plt.Axes, x: float, y: float, name: str, told: str, kind: str) -> None:
    look = {"ha": "center", "va": "center", "linespacing": 1.35, "zorder": 3, "fontsize": 9}
    bold = name.replace(" ", r"\ ")
    ax.text(x, y, rf"$\bf{{{bold}}}$" + f"\n{told}", bbox=_LOOK | {"facecolor": _FILL[kind]}, **look)


def _arrows(ax: plt.Axes, ways: list[tuple[float, float, float, float]]) -> None:
    for x, y, to_x, to_y in ways:
        ax.annotate("", (to_x, to_y), (x, y), arrowprops=_ARROW)


def best_so_far(rows: pd.DataFrame, evaluations: int) -> pd.DataFrame:
    """From rows with strategy, seed, evaluation and reward: the largest reward after each of 1 .. `evaluations`, a
    column `best`; where a search ended earlier, its last one holds on."""
    found = []
    for (strategy, seed), run in rows.groupby(["strategy", "seed"], sort=False):
        best = run.sort_values("evaluation").set_index("evaluation").reward.cummax()
        best = best.reindex(range(1, evaluations + 1)).ffill()
        found.append(pd.DataFrame({"strategy": strategy, "seed": seed, "evaluation": best.index, "best": best.array}))
    return pd.concat(found, ignore_index=True)


def curves(rows: pd.DataFrame, ax: plt.Axes, names: dict[str, str]) -> plt.Axes:
    """Draw what `best_so_far` gives, strategies as called in `names`: the mean over seeds, and each seed thinly."""
    for strategy, name in names.items():
        runs = rows[rows.strategy == strategy].pivot(index="evaluation", columns="seed", values="best")
        look = {"color": COLOURS[strategy], "linestyle": "--" if strategy == "rule" else "-"}
        ax.plot(runs.index, runs.to_numpy(), drawstyle="steps-post", linewidth=0.7, alpha=0.35, **look)
        ax.plot(runs.index, runs.mean(axis=1), drawstyle="steps-post", linewidth=2.5, label=name, **look)
    ax.set(xlabel="distinct evaluations", ylabel="best reward so far")
    ax.locator_params(axis="x", integer=True)
    ax.legend(fontsize="small")
    return ax


def differences(table: pd.DataFrame, ax: plt.Axes) -> plt.Axes:
    """Draw paired differences: rows with pair, mean, low, high and each (a list, one difference per seed)."""
    places = np.arange(len(table))[::-1]
    for place, row in zip(places, table.itertuples(), strict=True):
        ax.plot(row.each, [place + 0.15] * len(row.each), "o", markersize=4, color="#999999", alpha=0.8)
        ax.plot([row.low, row.high], [place, place], color="#1f6fb4", linewidth=3)
        ax.plot(row.mean, place, "D", color="#1f6fb4", markersize=6)
    ax.axvline(0, color="#444444", linewidth=1)
    ax.set_yticks(places, table["pair"])
    ax.set(xlabel="difference of the best rewards", ylim=(-0.6, len(table) - 0.4))
    sns.despine(ax=ax, left=True)
    return ax
