"""Search-based mapping (mapping 5.1): reinforcement learning, or random search, over a scheme for every layer."""

import math
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from nbs_lib.mapping.evaluate import Evaluator, Schemes, mapping_id
from nbs_lib.mapping.live import Watch
from nbs_lib.mapping.policy import STRATEGIES, states
from nbs_lib.mapping.rule import BLOCKS
from nbs_lib.mapping.table import Mapping, candidates, fits
from nbs_lib.schemes import Block, BlockPunched, Channel, Filter, Pattern, Scheme

SCHEMES = (Filter(), Channel(), Pattern(8), *(kind(p, q) for kind in (Block, BlockPunched) for p, q in BLOCKS))
COLUMNS = ["evaluation", "iteration", "reward", "accuracy", "ms", "mapping", "seconds", "timed", "best", "error"]
STALE = 300  # batches in a row without a new mapping, after which a search ends


def legal_schemes(graph, schemes: Iterable[Scheme] = SCHEMES, ignored_layers=(), rate=1.0) -> dict[str, list[Scheme]]:
    """Per layer the schemes it can have; none: it stays dense, as stems, depthwise and ignored layers do.

    A block must fit into the layer (of a convolution group), and one of it, at one place of the kernel, be left at the
    rate. Raises as `uniform_mapping` for ignored layers and what is no scheme."""
    schemes = tuple(dict.fromkeys(schemes))
    mapped, _ = candidates(graph, schemes, schemes, ignored_layers)
    return {
        name: [s for s in schemes if name in mapped and s.legal(layer)[0] and fits(s, layer, rate)]
        for name, layer in graph.layers.items()
    }


class Search:
    """One run over the legal schemes {layer: list} of a graph: `run()` gives the best mapping, `history` all of them.

    evaluator: an `Evaluator`, or any function from a list of {layer: scheme} to rows with mapping, accuracy, ms,
    reward, seconds, timed and error. strategy: a key of STRATEGIES. A step draws `samples` mappings (K of Eq. 6); one
    that was drawn before has its reward, costs nothing and is no further evaluation: at most `evaluations` are made.
    history: a row per distinct mapping, COLUMNS, `best` being the largest reward so far. It depends on the seed and the
    rewards alone, so a search whose evaluator remembers goes on, after a kill, by doing the same again.
    Raises KeyError for an unknown strategy, ValueError for samples or evaluations below 1."""

    def __init__(
        self, graph, legal: dict[str, list[Scheme]], evaluator, strategy="rl", samples=4, evaluations=100, seed=0
    ):
        if strategy not in STRATEGIES:
            raise KeyError(f"Expected a strategy out of {', '.join(STRATEGIES)}. Got {strategy!r}.")
        if min(samples, evaluations) < 1:
            raise ValueError(f"Expected samples and evaluations of at least 1. Got {samples} and {evaluations}.")
        self.evaluator, self.strategy, self.samples, self.rows = evaluator, strategy, samples, {}
        self.budget = min(evaluations, math.prod(max(1, len(found)) for found in legal.values()))
        self.layers = list(legal)
        self.schemes = {(scheme.name, _size(scheme)): scheme for found in legal.values() for scheme in found}
        self.names = list(dict.fromkeys(["dense", *(name for name, _ in self.schemes)]))
        self.sizes = list(dict.fromkeys([None, *(size for _, size in self.schemes)]))
        mask = np.zeros((len(legal), len(self.names), len(self.sizes)), bool)
        for number, found in enumerate(legal.values()):
            for name, size in [(scheme.name, _size(scheme)) for scheme in found] or [("dense", None)]:
                mask[number, self.names.index(name), self.sizes.index(size)] = True
        self.proposer = STRATEGIES[strategy](states([graph[name] for name in legal]), mask, seed=seed)

    @property
    def history(self) -> pd.DataFrame:
        """A row per distinct mapping, in the order of evaluation."""
        rows = [row | {"mapping": key} for key, row in self.rows.items()]
        table = pd.DataFrame(rows, columns=COLUMNS)
        return table.assign(best=table.reward.cummax())

    @property
    def best(self) -> dict:
        """The row of the largest reward, the earliest of equal ones, with its Mapping."""
        return max(self.rows.values(), key=lambda row: row["reward"])

    def run(self, callback: Callable[["Search"], object] = lambda search: None) -> Mapping:
        """Search, calling `callback(self)` after every step; the best mapping, with the history as an attribute."""
        iteration = stale = 0
        while len(self.rows) < self.budget and stale < STALE:
            iteration += 1
            actions = self.proposer.propose(self.samples)
            drawn = [self.decode(one) for one in actions]
            keys = [mapping_id(schemes) for schemes in drawn]
            new = {key: schemes for key, schemes in zip(keys, drawn, strict=True) if key not in self.rows}
            new = dict(list(new.items())[: self.budget - len(self.rows)])
            for key, row in zip(new, self.evaluator(list(new.values())) if new else [], strict=True):
                self.rows[key] = row | {"evaluation": len(self.rows) + 1, "iteration": iteration}
            stale = 0 if new else stale + 1
            told = [number for number, key in enumerate(keys) if key in self.rows]
            self.proposer.learn(actions[told], np.array([self.rows[keys[number]]["reward"] for number in told]))
            if new:
                callback(self)
        if len(self.rows) < self.budget:
            found = f"only {len(self.rows)} of {self.budget} mappings found"
            warnings.warn(f"{found}: all others are too rare", stacklevel=2)
        best = self.best
        mapping = Mapping(best["mapping"], [dict(row) for row in best["mapping"].layers])
        won = f"{self.strategy} search, best of {len(self.rows)} mappings: reward {best['reward']:.4f}"
        for row in mapping.layers:
            row["reason"] = f"{won}; {row['reason']}" if row["layer"] in mapping else row["reason"]
        mapping.history = self.history
        return mapping

    def decode(self, actions: np.ndarray) -> Schemes:
        """{layer: scheme} of one drawn mapping, int (N, 2); dense layers are left out."""
        pairs = [(self.names[regularity], self.sizes[block]) for regularity, block in actions]
        return {layer: self.schemes[pair] for layer, pair in zip(self.layers, pairs, strict=True) if pair[0] != "dense"}


def search_mapping(
    model,
    data,
    graph,
    rate: float,
    samples: int = 4,
    evaluations: int = 100,
    seed: int = 0,
    strategy: str = "rl",
    schemes: Iterable[Scheme] = SCHEMES,
    ignored_layers: Iterable[str] = (),
    progress: bool = True,
    callback: Callable[[Search], object] | None = None,
    **options,
) -> Mapping:
    """The mapping of the largest reward, accuracy - weight * ms / dense_ms, that the search finds; `.history` has all.

    rate: total / kept CONV weights of the model; rates per layer fall out of one threshold (`global_rates`). The other
    arguments are those of `Search` and, as options, of `Evaluator` (latency="measured", weight=0.2, epochs=2, held_out,
    executor, checkpoint, overlap, threads, device, and what `fit` takes), where also stands what a latency may be and
    how it is taken. progress: a bar, and the best reward so far as a curve (in a notebook) or as lines. callback:
    called with the Search after every step. checkpoint: a file; a killed search goes on from it, when it is called
    again with the same arguments, to the same history. The model is not changed, and the test images of `data` are not
    looked at. Raises as `Search`, `Evaluator` and `legal_schemes`."""
    legal = legal_schemes(graph, schemes, ignored_layers, rate)
    evaluator = Evaluator(model, data, graph, rate, seed=seed, **options)
    search = Search(graph, legal, evaluator, strategy, samples, evaluations, seed)
    with Watch(search, progress) as watch:
        return search.run(lambda search: [told(search) for told in (watch, callback) if told])


def paired_bootstrap(ours, others, confidence=0.95, resamples=10_000, seed=0) -> tuple[float, float, float]:
    """Mean of ours - others, pairs such as the rewards of two searches by seed, and its percentile bootstrap interval.

    Pairs are drawn with replacement. Up to 5 pairs, all ways of drawing are counted instead, so nothing is random.
    Raises ValueError unless both are as long, at least one, and finite."""
    alike = np.shape(ours) == np.shape(others)
    difference = np.asarray(ours, float) - np.asarray(others, float) if alike else np.empty(0)
    if difference.ndim != 1 or not difference.size or not np.isfinite(difference).all():
        raise ValueError(f"Expected finite pairs. Got {ours!r} and {others!r}.")
    if (count := difference.size) <= 5:
        drawn = np.indices((count,) * count).reshape(count, -1).T
    else:
        drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    lo, hi = np.quantile(difference[drawn].mean(axis=1), ((1 - confidence) / 2, (1 + confidence) / 2)).tolist()
    return float(difference.mean()), lo, hi


def _size(scheme: Scheme) -> tuple[int, int] | None:
    return (scheme.p, scheme.q) if hasattr(scheme, "p") else None
