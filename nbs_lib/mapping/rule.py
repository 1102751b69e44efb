"""Rule-based mapping (mapping 5.2.2-5.2.4, Fig. 8): scheme and block size of every layer, from a latency model.

Depthwise layers and stems stay dense; 3x3 CONV takes patterns on hard tasks; FC takes `Block`, and CONV, the 1x1 layers
too, `BlockPunched` (where `Block` would be legal: one scheme for all CONV layers, as in the paper's Table 4).
"""

from collections.abc import Iterable
from numbers import Real

import numpy as np

from nbs_lib.mapping.table import Mapping, candidates, check_layers, fits
from nbs_lib.schemes import Block, BlockPunched, Channel, Choice, Filter, Pattern, check_rate

BETA = 0.2  # mapping 6.1
TASKS = {"easy": (), "hard": (Pattern(8),)}  # what 3x3 CONV takes before block-punched pruning (Remark 1)
# Ours: both directions grow, from one weight up to where small layers have hardly a block. The paper names three.
BLOCKS = ((1, 1), (2, 2), (4, 4), (8, 4), (4, 16), (8, 16), (16, 32), (32, 64))
REFERENCES = (Filter(), Channel())
# All that a layer's time may depend on, but its values.
SHAPE = ("kind", "P", "Q", "Kh", "Kw", "stride", "padding", "dilation", "groups", "H", "W", "calls", "uneven")


def rule_mapping(
    graph, latency_model, beta: float | dict[str, float] = BETA, task="easy", rate=8.0, ignored_layers=(), blocks=BLOCKS
) -> Mapping:
    """The best-suited scheme and block size of every layer, without training; `rate` is where they are compared.

    A layer takes the smallest valid block, by p * q, then p, whose ms per dense MAC is at most 1 + beta times that of
    the structured reference, the faster of Filter and Channel at the same rate; where no block is, the largest valid
    one. `.report()` gives the reason with its numbers; the dicts in `mapping.layers` have them as ms, ms_per_gmac,
    reference, reference_ms, ratio and beta. Patterns (3x3 CONV on a "hard" task) are not asked to be within beta, as
    latency comes second there (5.2.3); a rate below their least one, 2.25, becomes that.

    latency_model: anything with `layer_ms(layer, choices) -> ms, float (len(choices),)`. beta: >= 0, or {layer: beta},
    then 0.2 for the others. ignored_layers: names of layers that stay
    dense. A block is valid where it fits into the layer (see `layer_choices`). Raises ValueError for
    a rate of 1 or less, an unknown task, a beta below 0 and blocks that are none; KeyError for unknown layers in beta
    or ignored_layers; and what the latency model raises where it has no data, naming the layer."""
    rate, betas = _checked(graph, rate, beta)
    options, rows = layer_choices(graph, rate, task, ignored_layers, blocks)
    times = {}  # layers of equal shapes take equal times: VGG-16 and ResNet-50 have about half as many shapes as layers
    for row in rows:
        if not (listed := options.get(row["layer"])):
            continue
        layer, at = graph[row["layer"]], listed[0].rate
        if (key := tuple(getattr(layer, fact) for fact in SHAPE)) not in times:
            times[key] = layer_times(latency_model, layer, [*(Choice(scheme, at) for scheme in REFERENCES), *listed])
        references, ms = np.split(times[key], [len(REFERENCES)])
        row |= _decision(listed, ms, references, layer.macs, betas[layer.name])
        options[layer.name] = listed[row.pop("chosen")]
    return Mapping(options, rows)


def layer_choices(
    graph, rate=8.0, task="easy", ignored_layers=(), blocks: Iterable[tuple[int, int]] = BLOCKS
) -> tuple[dict[str, list[Choice]], list[dict]]:
    """What the rule chooses from: {layer: its Choices, smallest block first}, and every layer's row for the report.

    A block p x q is valid where p and q are no larger than the layer (of a convolution group) and, block-punched, at
    least one of its groups is left at the rate: p * q <= weights / rate. A layer for which none is stays dense."""
    if task not in TASKS:
        raise ValueError(f"Expected a task out of {', '.join(TASKS)}. Got {task!r}.")
    sizes = sorted(map(_size, blocks), key=lambda size: (size[0] * size[1], size[0]))
    if not sizes:
        raise ValueError("Expected block sizes (p, q). Got none.")
    schemes, rows = candidates(graph, (*TASKS[task], BlockPunched(*sizes[0])), Block(*sizes[0]), ignored_layers)
    options = {}
    for row in rows:
        if not (scheme := schemes.get(row["layer"])):
            continue
        layer = graph.layers[row["layer"]]
        if isinstance(scheme, Pattern):
            options[layer.name] = [Choice(scheme, max(rate, scheme.min_rate))]
            continue
        least = rate if isinstance(scheme, BlockPunched) else 1.0
        listed = [Choice(type(scheme)(p, q), rate) for p, q in sizes if fits(type(scheme)(p, q), layer, least)]
        if listed:
            options[layer.name] = listed
        else:
            shapes = ", ".join(f"{p}x{q}" for p, q in sizes)
            row["reason"] = f"no block out of {shapes} fits {layer.P} x {layer.Q} at {rate:g}x"
    return options, rows


def layer_times(latency_model, layer, listed: list[Choice | None]) -> np.ndarray:
    """The model's ms of one layer, float64 (len(listed),). ValueError, naming the layer, unless all are positive."""
    ms = np.asarray(latency_model.layer_ms(layer, listed), dtype=np.float64)
    if ms.shape != (len(listed),) or not (np.isfinite(ms) & (ms > 0)).all():
        raise ValueError(f"Expected {len(listed)} times > 0 ms for layer {layer.name!r}. Got {ms.tolist()}.")
    return ms


def _decision(listed: list[Choice], ms: np.ndarray, references: np.ndarray, macs: int, beta: float) -> dict:
    """Which of the listed choices, sorted by block size, the rule takes, its numbers and the reason."""
    gmacs, rate = macs / 1e9, listed[0].rate
    best = int(references.argmin())
    reference, name = references[best] / gmacs, REFERENCES[best].name
    within = np.flatnonzero(ms / gmacs <= (1 + beta) * reference)
    chosen = int(within[0]) if len(within) else len(listed) - 1
    scheme, ratio = listed[chosen].scheme, ms[chosen] / gmacs / reference
    told = f"{ms[chosen]:.3g} ms is {ratio:.3f} x {name}'s {references[best]:.3g} ms at {rate:g}x"
    if isinstance(scheme, Pattern):
        least = ", a pattern's least" if rate == scheme.min_rate else ""
        reason = f"3x3 CONV, hard task: pattern; {told}{least}"
    elif len(within):
        reason = f"smallest block within beta {beta:.4g}: {told}"
    else:
        reason = f"no block within beta {beta:.4g}, so the largest: {told}"
    numbers = {"ms": ms[chosen], "ms_per_gmac": ms[chosen] / gmacs, "reference_ms": references[best], "ratio": ratio}
    numbers = {key: float(value) for key, value in numbers.items()}
    return numbers | {"chosen": chosen, "reason": reason, "reference": name, "beta": beta}


def _checked(graph, rate: float, beta: float | dict[str, float]) -> tuple[float, dict[str, float]]:
    """The rate, and the beta of every layer."""
    if check_rate(rate) == 1:
        raise ValueError("Expected a rate above 1, at which block sizes are compared. Got 1.")
    given = beta if isinstance(beta, dict) else dict.fromkeys(graph.layers, beta)
    check_layers(graph, given, "beta's layers")
    for layer, value in given.items():
        if not isinstance(value, Real) or not value >= 0:
            raise ValueError(f"Expected beta >= 0 for layer {layer!r}, 0.2 for 20 %. Got {value!r}.")
    return float(rate), dict.fromkeys(graph.layers, BETA) | {layer: float(value) for layer, value in given.items()}


def _size(block) -> tuple[int, int]:
    try:
        scheme = BlockPunched(*block)  # refuses what is no size, by name
    except TypeError:
        raise ValueError(f"Expected a block size (p, q) of two integers. Got {block!r}.") from None
    return scheme.p, scheme.q
