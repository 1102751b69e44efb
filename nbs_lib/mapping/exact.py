"""The exact solver beside search and rule: least predicted time at a bounded sum of per-layer accuracy drops.

Times come from the latency model, drops from `mapping/drops.py`; both objectives are sums over the layers.
"""

import numpy as np
import pandas as pd

from nbs_lib.mapping.drops import Drops, energy_drops, total_drop
from nbs_lib.mapping.rule import BETA, layer_choices, layer_times, rule_mapping
from nbs_lib.mapping.table import Mapping, candidates, check_layers

POINTS = 10_000  # ours: at 50 layers the budget is then spent to within 0.5 %


def exact_mapping(
    graph, latency_model, drops: Drops, budget: float | None = None, weight: float | None = None, points: int = POINTS
) -> Mapping:
    """The fastest mapping whose drops sum up to at most `budget`; or, for a `weight`, the one of the highest reward.

    The reward is that of the search, accuracy - weight * ms / dense_ms, with the accuracy that the drops predict; it
    falls apart into one choice per layer. For a budget, dynamic programming over the layers keeps the front of (sum of
    drops, ms). Sums are never rounded, so the budget holds. A front of more than `points` is thinned to the fastest of
    each of `points` equal steps of the budget; the result is then no slower than the optimum at a budget smaller by one
    step per layer, and otherwise the optimum itself. Layers not in `drops` stay dense.

    `mapping.layers` has ms and drop as columns. Raises ValueError unless budget or weight is given, both are, the least
    sum of drops is above the budget or a number is none; KeyError for unknown layers; and as `layer_times`."""
    if (budget is None) == (weight is None) or np.isnan(budget or 0.0) or not (weight or 0.0) >= 0 or points < 1:
        raise ValueError(f"Expected a budget, or a weight >= 0, and points >= 1. Got {budget}, {weight} and {points}.")
    check_layers(graph, drops)
    listed = {layer: list(options) for layer, options in drops.items() if options}
    cost = {layer: np.array([drops[layer][choice] for choice in options]) for layer, options in listed.items()}
    if bad := [layer for layer, drop in cost.items() if not np.isfinite(drop).all()]:
        raise ValueError(f"Expected finite drops. Got others in {', '.join(bad)}.")
    times = {layer: layer_times(latency_model, graph[layer], options) for layer, options in listed.items()}
    if weight is None:
        picks, goal = _fastest(list(times.values()), list(cost.values()), budget, points), f"drops <= {budget:.4g}"
    else:
        dense_ms, goal = latency_model.predict(graph, {}), f"reward, weight {weight:.4g}"
        picks = [int((cost[layer] + weight * times[layer] / dense_ms).argmin()) for layer in listed]
    chosen = dict(zip(listed, picks, strict=True))
    _, rows = candidates(graph, None, None, ())
    for row in rows:
        if (pick := chosen.get(row["layer"])) is not None:
            ms, drop = float(times[row["layer"]][pick]), float(cost[row["layer"]][pick])
            told = f"{ms:.3g} ms at a drop of {drop:.4g}, one of {len(listed[row['layer']])} choices"
            row |= {"ms": ms, "drop": drop, "reason": f"exact ({goal}): {told}"}
        else:
            row["reason"] = "no candidate"
    named = {layer: listed[layer][pick] for layer, pick in chosen.items()}
    return Mapping({layer: choice for layer, choice in named.items() if choice is not None}, rows)


def _fastest(times: list[np.ndarray], drops: list[np.ndarray], budget: float, points: int) -> list[int]:
    """Per layer, which choice: least sum of times at a sum of drops <= budget, as `exact_mapping` says."""
    least = np.cumsum([drop.min() for drop in reversed(drops)])[::-1] if drops else np.zeros(1)
    to_come = [*least[1:], 0.0]
    slack = 1e-9 * max(abs(budget), 1e-9) if np.isfinite(budget) else 0.0  # to_come adds up in another order
    step = (budget - least[0]) / points if np.isfinite(budget) else sum(np.ptp(drop) for drop in drops) / points
    sums, ms, trail = np.zeros(1), np.zeros(1), []
    for number, (time, drop) in enumerate(zip(times, drops, strict=True)):
        sums, ms = ((front[:, None] + layer).ravel() for front, layer in ((sums, drop), (ms, time)))
        allowed = sums + to_come[number] <= budget + slack * (number < len(drops) - 1)
        order = np.flatnonzero(allowed)
        order = order[np.lexsort((ms[order], sums[order]))]
        order = order[np.diff(np.minimum.accumulate(ms[order]), prepend=np.inf) < 0]  # slower ones with larger drops go
        if len(order) > points:
            bins = np.floor((sums[order] - sums[order[0]]) / step)
            order = order[np.append(np.diff(bins) > 0, True)]  # times fall along the front: the last is the fastest
        if not len(order):
            raise ValueError(f"Expected a budget >= {least[0]:.6g}, the least sum of drops. Got {budget:.6g}.")
        trail.append((order, len(time)))
        sums, ms = sums[order], ms[order]
    picks, place = [], len(ms) - 1
    for order, width in reversed(trail):
        place, pick = divmod(int(order[place]), width)
        picks.append(pick)
    return picks[::-1]


def rule_against_exact(
    graph, latency_model, beta: float | dict[str, float] = BETA, drops: Drops | None = None, dense=False, **choices
) -> tuple[pd.DataFrame, dict[str, Mapping]]:
    """How near the rule comes to the fastest mapping at its own predicted accuracy, and the mappings by name.

    Both choose for each layer out of the same `layer_choices`, whose arguments (task, rate, ...) are `choices`; the
    exact solver may spend the rule's sum of drops anew. drops: of all these choices, by default `energy_drops`, the
    proxy. dense: the solver may also leave layers dense, which the rule never does; the mapping's rate is then a lower
    one.

    The table's rows: dense, rule, exact, and "fastest", the exact one without a budget. Columns: ms (of the network, as
    predicted), layers_ms (of the layers that have a choice, alone), drop, mapped (layers), and ms and layers_ms over
    those of exact (ratio, layers_ratio)."""
    rule = rule_mapping(graph, latency_model, beta, **choices)
    options, _ = layer_choices(graph, **choices)
    options = {layer: [*listed, None] if dense else listed for layer, listed in options.items()}
    drops = energy_drops(graph, options) if drops is None else drops
    drops = {layer: {choice: drops[layer][choice] for choice in listed} for layer, listed in options.items()}
    found = {"dense": Mapping(), "rule": rule}
    found["exact"] = exact_mapping(graph, latency_model, drops, budget=total_drop(rule, drops))
    found["fastest"] = exact_mapping(graph, latency_model, drops, budget=np.inf)
    rows = []
    for name, mapping in found.items():
        alone = sum(layer_times(latency_model, graph[layer], [mapping.get(layer)])[0] for layer in options)
        facts = {"mapping": name, "ms": latency_model.predict(graph, mapping), "layers_ms": float(alone)}
        rows.append(facts | {"drop": total_drop(mapping, drops), "mapped": len(mapping)})
    table = pd.DataFrame(rows)
    best = table.set_index("mapping").loc["exact"]
    return table.assign(ratio=table["ms"] / best["ms"], layers_ratio=table["layers_ms"] / best["layers_ms"]), found
