"""Mappings whose rates are given: one for every layer, or the CONV rate and remaining MACs of mapping Table 4."""

import numpy as np
from scipy.optimize import brentq

from nbs_lib.mapping.table import Mapping, candidates
from nbs_lib.schemes import Block, BlockPunched, Choice, Scheme, check_rate

CONV, LINEAR = BlockPunched(8, 4), Block(8, 4)
MAX_RATE = 100.0  # ours: no layer is pruned harder
STEEPEST = 40.0  # ours: the largest power of the feature map's size that densities may follow
Schemes = Scheme | tuple[Scheme, ...] | list[Scheme] | None


def uniform_mapping(graph, rate, conv: Schemes = CONV, linear: Schemes = LINEAR, ignored_layers=()) -> Mapping:
    """Give every layer of the graph `rate` (>= 1), CONV layers with the scheme `conv`, linear ones with `linear`.

    Of several schemes the first legal one is taken, as in (Pattern(8), BlockPunched(8, 4)); None leaves the layers out.
    Depthwise layers and the stem are left out too: `.report()` says which and why. Raises ValueError for a rate below
    1, KeyError for ignored layers (names) that are not there, TypeError for what is no scheme."""
    rate = check_rate(rate)
    schemes, rows = candidates(graph, conv, linear, ignored_layers)
    for row in rows:
        if scheme := schemes.get(row["layer"]):
            row["reason"] = f"uniform rate, reaches {scheme.min_rate}" if 1 < rate < scheme.min_rate else "uniform rate"
    return Mapping({name: Choice(scheme, rate) for name, scheme in schemes.items()}, rows)


def paper_mapping(graph, rate, macs, conv: Schemes = CONV, linear: Schemes = None, ignored_layers=()) -> Mapping:
    """Per-layer CONV rates: total / kept CONV weights is `rate`, and `macs` CONV multiply-adds per image remain.

    The paper prints both but no layer's rate, so the family is ours: a layer keeps the share a * (H * W) ** b of its
    weights, clipped to 1 / MAX_RATE .. 1 / its scheme's least rate; (a, b) solve the two. CONV layers that are not
    mapped count as kept. Linear layers get `rate` where they get a scheme, and count in neither. Raises ValueError with
    the feasible range where no (a, b) comes within 1 %; otherwise as `uniform_mapping`."""
    schemes, rows = candidates(graph, conv, linear, ignored_layers)
    convs = [layer for layer in graph.layers.values() if layer.kind != "linear"]
    mapped = [layer for layer in convs if layer.name in schemes]
    if not mapped:
        raise ValueError(f"Expected a graph with CONV layers that {conv} can prune. Got none among {len(convs)}.")
    params, work = (np.array([getattr(layer, what) for layer in mapped], float) for what in ("params", "macs"))
    total = sum(layer.params for layer in convs)
    fixed, fixed_macs = total - params.sum(), sum(layer.macs for layer in convs) - work.sum()
    size = np.log(work / params) - np.log(work / params).mean()
    lowest, highest = -np.log(MAX_RATE), -np.log([schemes[layer.name].min_rate for layer in mapped])

    def shares(b: float) -> np.ndarray:
        """Per mapped layer the share of weights kept, with the `a` that meets the rate at this b."""

        def share(log_a: float) -> np.ndarray:
            return np.exp(np.clip(log_a + b * size, lowest, highest))

        reach = abs(b) * np.abs(size).max() - lowest
        return share(brentq(lambda log_a: params @ share(log_a) - kept, -reach, reach))

    low, high = params.sum() / MAX_RATE, params @ np.exp(highest)
    kept = np.clip(total / check_rate(rate) - fixed, low * (1 + 1e-9), high * (1 - 1e-9))
    if abs(total / (kept + fixed) - rate) > 0.01 * rate:
        limits = f"{total / (high + fixed):.4g}..{total / (low + fixed):.4g}"
        raise ValueError(f"Expected a CONV rate in {limits} for these layers. Got {rate:g}.")
    least, most = (fixed_macs + work @ shares(b) for b in (-STEEPEST, STEEPEST))
    goal = np.clip(macs, least, most)
    if not abs(goal - macs) <= 0.01 * macs:
        raise ValueError(f"Expected macs in {least:.4g}..{most:.4g} at a CONV rate of {rate:g}. Got {macs:.4g}.")
    b = brentq(lambda b: fixed_macs + work @ shares(b) - goal, -STEEPEST, STEEPEST) if most > least * 1.000001 else 0.0
    rates = {layer.name: round(1 / share, 6) for layer, share in zip(mapped, shares(b), strict=True)}
    for row in rows:
        if row["layer"] in schemes:
            row["reason"] = f"share kept ~ map size ** {b:.3g}" if row["layer"] in rates else "the CONV layers' rate"
    return Mapping({name: Choice(scheme, rates.get(name, rate)) for name, scheme in schemes.items()}, rows)
