"""Tuning (mapping A.2, NPS 3): a genetic algorithm looks for each convolution's fastest `Tiling` on this machine."""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pandas as pd
import pygad
import torch
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from nbs_lib import clock
from nbs_lib.compiler.network import Network, compile
from nbs_lib.compiler.packing import LARGEST, TILES
from nbs_lib.compiler.record import Fixed, Record, layer_key
from nbs_lib.compiler.steps import Tiling
from nbs_lib.kernels import conv
from nbs_lib.layers import Graph, Node

GENES = {
    "rows": tuple(TILES), "vectors": (1, 2, 3, 4, 6, 8, 16), "block": (1, 2, 4, 8, 16, 64), "fetch": conv.FETCHES,
    "unroll": (1, 2, 4), "split": ("tiles", "groups"),
}  # fmt: skip
START = Tiling(rows=LARGEST, vectors=TILES[LARGEST], block=16, fetch="columns", split="tiles")  # about the default
POPULATION, PARENTS, MUTATION, ELITE = 10, 4, 0.3, 2  # ours: the papers name the algorithm only
COLUMNS = ["layer", "method", "evaluation", "ms", "best_ms", "tiling"]  # of what `tune` returns
RUNS = 7  # timed runs of a candidate
WASH = np.zeros(2**20, np.float32)  # written between two runs: what the layer before has not left is far away


def tune(
    model, example_inputs, threads=1, budget_s=60.0, seed=0, method="genetic", evaluations=60, path=None, progress=True
) -> pd.DataFrame:
    """Find the fastest tiling of every convolution of `model`, in at most about `budget_s` seconds.

    Layers get the time in proportion to what they take, at most `evaluations` candidates each. `method`: "genetic"
    (PyGAD, started at the default tiling) or "random". `path`: the record to resume and fill, None: this machine's.
    Killed at any moment, the next call goes on from the last candidate. Returns a row per candidate tried: layer,
    method, evaluation, ms, best_ms so far, tiling. ValueError for an unknown method.
    """
    if method not in SEARCHES:
        raise ValueError(f"Expected a method among {', '.join(SEARCHES)}. Got {method!r}.")
    end, record, history = time.monotonic() + budget_s, Record(path), []
    net = compile(model, example_inputs, threads, tuning=record.path)
    with clock.lock(), clock.pin(threads):
        times = np.median(net.times(*net.example_inputs, runs=3), axis=0)
    work: dict[str, tuple[float, Node]] = {}  # layers that one tiling serves, with what they take together
    for ms, step in zip(times, net.steps, strict=True):
        if step.tiling is not None:
            node = step.operation.node
            key = layer_key(net.planned.layers[node.layer], node.shape[0], threads)
            work[key] = (work.get(key, (0, node))[0] + ms, node)
    left = sum(ms for ms, _ in work.values())
    order = sorted(work.values(), key=lambda entry: -entry[0])
    for ms, node in tqdm(order, "tuning", disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 10):
        deadline = time.monotonic() + max(end - time.monotonic(), 0) * ms / left
        left -= ms
        found = Candidates(net.planned, node, threads, record).search(method, deadline, evaluations, seed)
        tried = pd.DataFrame(found, columns=["tiling", "ms"])
        tried = tried.assign(layer=node.layer, method=method, evaluation=tried.index + 1, best_ms=tried["ms"].cummin())
        history.append(tried[COLUMNS])
    return pd.concat(history, ignore_index=True) if history else pd.DataFrame(columns=COLUMNS)


class Candidates:
    """The tilings of one convolution: timed once each, alone, on cold weights and a warm input, as in a network."""

    def __init__(self, graph: Graph, node: Node, threads: int, record: Record):
        layer, self.threads, self.record = graph.layers[node.layer], threads, record
        source = next(n for n in graph.nodes if n.name == node.inputs[0])
        entrance = Node(source.name, "input", (), {}, source.shape, None, "", 0, source.call)
        spec = pytree.tree_structure(0)
        self.graph = Graph([entrance, node], {node.layer: layer}, (source.name,), (node.name,), spec, {})
        self.x = np.random.default_rng(0).standard_normal(source.shape).astype(np.float32)
        self.key = layer_key(layer, source.shape[0], threads)
        self.trials: dict[str, float] = dict((record.entries.get(self.key) or {}).get("trials", {}))

    def time(self, tiling: Tiling) -> float:
        """Median ms of the convolution itself."""
        name = json.dumps(asdict(tiling))
        if name not in self.trials:
            net = Network(self.graph, (torch.from_numpy(self.x),), self.threads, record=Fixed(tiling))
            with clock.lock(), clock.pin(self.threads):
                times = net.times(self.x, runs=RUNS, between=lambda: np.add(WASH, 1, out=WASH))
            own = [step.tiling is not None for step in net.steps]
            self.trials[name] = float(np.median(times[:, own].sum(axis=1)))
        return self.trials[name]

    def search(self, method: str, deadline: float, evaluations: int, seed: int) -> list[tuple[Tiling, float]]:
        """Every distinct candidate and its ms, in order, the default first; the record is saved on the way."""
        default = Tiling(dense=False)
        tried = {default: self.time(default)}
        dense_ms, turns = self.time(Tiling(dense=True)), itertools.count(1)

        def cost(numbers) -> float:
            chosen = {name: GENES[name][int(n)] for name, n in zip(GENES, numbers, strict=True)}
            chosen["vectors"] = min(chosen["vectors"], TILES[chosen["rows"]])
            tiling = Tiling(**chosen | ({} if self.threads > 1 else {"split": None}), dense=False)
            if tiling not in tried and not over():
                tried[tiling] = self.time(tiling)
                save()
            return tried.get(tiling, math.inf)

        def over() -> bool:
            return len(tried) >= evaluations or time.monotonic() > deadline

        def save() -> None:
            best = min(tried, key=tried.get)
            times = {"ms": tried[best], "default_ms": tried[default], "dense_ms": dense_ms, "trials": self.trials}
            self.record.save(self.key, {"tiling": asdict(best)} | times)

        def turn() -> bool:
            """After a generation, whether to go on; without anything new, not for ever."""
            return not over() and next(turns) < evaluations

        save()
        if turn():
            SEARCHES[method](cost, [len(values) for values in GENES.values()], seed, turn)
        return list(tried.items())


def _genetic(cost: Callable, sizes: list[int], seed: int, turn: Callable[[], bool]) -> None:
    first = np.random.default_rng(seed).integers(sizes, size=(POPULATION, len(sizes)))
    first[0] = [GENES[name].index(getattr(START, name)) for name in GENES]
    pygad.GA(
        num_generations=10**6, num_parents_mating=PARENTS, initial_population=first, gene_type=int, keep_elitism=ELITE,
        gene_space=[list(range(size)) for size in sizes], parent_selection_type="tournament", random_seed=seed,
        mutation_probability=MUTATION, fitness_func=lambda algorithm, genes, number: -cost(genes),
        on_generation=lambda algorithm: None if turn() else "stop", suppress_warnings=True,
    ).run()  # fmt: skip


def _random(cost: Callable, sizes: list[int], seed: int, turn: Callable[[], bool]) -> None:
    random = np.random.default_rng(seed)
    while turn():
        for numbers in random.integers(sizes, size=(POPULATION, len(sizes))):
            cost(numbers)


SEARCHES = {"genetic": _genetic, "random": _random}
