"""How right the model is: whole networks with random mappings, none of which it has seen (nn-Meter's measures)."""

import copy
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from nbs_lib.compiler import compile
from nbs_lib.latency.model import LatencyModel
from nbs_lib.latency.structure import dead_share
from nbs_lib.latency.work import NoData
from nbs_lib.layers import Graph, trace
from nbs_lib.measure import measure
from nbs_lib.pruning import prune
from nbs_lib.schemes import Block, BlockPunched, Choice, Pattern, Scheme, Unstructured

CONV = (
    Unstructured(),
    Pattern(8),
    *(BlockPunched(p, q) for p, q in ((4, 4), (4, 16), (8, 4), (8, 16), (16, 16), (16, 32))),
)
LINEAR = (Unstructured(), *(Block(p, q) for p, q in ((4, 4), (8, 4), (8, 16), (16, 16))))
RATES = (1.5, 16.0)  # per layer, log-uniform between
DEAD = 0.25


def random_mapping(graph: Graph, rng: np.random.Generator, rates=RATES, skip=0.15) -> dict[str, Choice]:
    """Every layer but depthwise ones and the stem gets a legal scheme and a rate at random, or (`skip`) none; no choice
    that leaves a quarter of its filters or channels without a weight, after which no network is one."""
    chosen = {}
    for name, layer in graph.layers.items():
        options: tuple[Scheme, ...] = {"conv": CONV, "linear": LINEAR}.get(layer.kind, ())
        options = [scheme for scheme in options if scheme.legal(layer)[0]]
        rate = float(np.exp(rng.uniform(*np.log(rates))))
        drawn = [Choice(scheme, round(max(rate, scheme.min_rate), 2)) for scheme in options]
        sizes = (layer.P, layer.Q, layer.Kh * layer.Kw)
        drawn = [choice for choice in drawn if layer.kind == "linear" or dead_share(choice, *sizes) < DEAD]
        at, skipped = rng.random(), rng.random() < skip
        if drawn and layer.Q * layer.groups >= 4 and not skipped:
            chosen[name] = drawn[int(at * len(drawn))]
    return chosen


def check(
    latency_model: LatencyModel,
    networks: dict[str, tuple[torch.nn.Module, torch.Tensor]],
    mappings: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Predict and measure `mappings` random mappings of every network {name: (model, example inputs)}.

    One row each: network, mapping (its number), predicted_ms (NaN where the model refused; `refusal` says why),
    measured_ms, mad_ms, rate. A copy of the model is pruned, by magnitude."""
    rows = []
    numbers = [(name, number) for name in networks for number in range(mappings)]
    for name, number in tqdm(numbers, "Held-out mappings", disable=not progress):
        model, inputs = networks[name]
        graph = trace(model, inputs)
        mapping = random_mapping(graph, np.random.default_rng((seed, number)))
        row = {"network": name, "mapping": number, "predicted_ms": np.nan, "refusal": ""}
        try:
            row["predicted_ms"] = latency_model.predict(graph, mapping)
        except NoData as error:
            row["refusal"] = str(error)
        pruned = copy.deepcopy(model)
        prune(pruned, mapping)
        net = compile(pruned, inputs, latency_model.threads, tuning=False)
        measured = measure(net, latency_model.device, adaptive=True).iloc[0]
        row |= {"measured_ms": measured.median_ms, "mad_ms": measured.mad_ms, "rate": net.graph.rates().conv}
        rows.append(row)
    return pd.DataFrame(rows)


def score(rows: pd.DataFrame, within: Iterable[float] = (5, 10, 15)) -> pd.DataFrame:
    """Per network and over all: predictions, refusals, the share (%) within 5, 10 and 15 % (a refusal is a miss), RMSPE
    (%), bias (%, median) and Spearman's rank correlation of those predicted. Unmeasured rows do not count."""
    scored, rows = [], rows[rows.measured_ms.notna()]
    for name, part in [*rows.groupby("network", sort=False), ("all", rows)]:
        error = 100 * (part.predicted_ms / part.measured_ms - 1)
        row = {"network": name, "predictions": len(part), "refused": int(error.isna().sum())}
        row |= {f"within_{limit:g}": 100 * (error.abs() <= limit).mean() for limit in within}
        row |= {"rmspe": np.sqrt((error**2).mean()), "bias": error.median()}
        scored.append(row | {"rank": spearmanr(part.predicted_ms, part.measured_ms, nan_policy="omit")[0]})
    return pd.DataFrame(scored).set_index("network")
