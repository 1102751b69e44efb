"""What a candidate of the search is worth (mapping 5.1): one threshold's rates, one-shot pruning, retraining, latency.

An `Evaluator` remembers what it has evaluated, in a file where one is named, and sends the training to any executor."""

import copy
import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, as_completed
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
import torch

from nbs_lib import __version__
from nbs_lib.compiler import compile
from nbs_lib.data import Data
from nbs_lib.mapping.table import Mapping, candidates
from nbs_lib.measure import DEVICES, measure
from nbs_lib.paths import read_checkpoint, write_atomic
from nbs_lib.pruning import prune
from nbs_lib.pruning.cut import over_all
from nbs_lib.pruning.targets import Target, find_weight, fitted
from nbs_lib.schemes import Choice, Scheme, check_rate
from nbs_lib.train import evaluate

Schemes = dict[str, Scheme]


def global_rates(graph, schemes: Schemes, rate: float) -> Mapping:
    """The mapping whose CONV rates fall out of one threshold on the energy per weight of the graph's weights.

    rate: total / kept CONV weights of the whole model, met as nearly as groups allow; CONV layers without a scheme stay
    dense and count. Linear layers get `rate` itself. Patterns are fitted over all their layers. Each layer keeps at
    least its strongest group. Raises KeyError for unknown layers, ValueError for a rate that the dense layers leave no
    room for, and as `Scheme.checked`."""
    targets = fitted({n: Target(graph[n].weight, Choice(s, 1.0), graph[n].groups) for n, s in schemes.items()})
    convs = {name for name, layer in graph.layers.items() if layer.kind != "linear"}
    total, dense = (sum(graph[name].params for name in names) for names in (convs, convs - schemes.keys()))
    kept = total / check_rate(rate) - dense
    if (pruned := convs & schemes.keys()) and kept <= 0:
        raise ValueError(f"Expected a CONV rate below {total / dense:.4g}, as some layers stay dense. Got {rate:g}.")
    cut = {name: target for name, target in targets.items() if name in pruned}
    choices = {name: Choice(target.choice.scheme, rate) for name, target in targets.items()}
    choices |= over_all(cut, max(1.0, (total - dense) / kept)).choices if pruned else {}
    rows = candidates(graph, None, None, ())[1]
    for row in rows:
        if row["layer"] in schemes:
            row["reason"] = "one threshold for all CONV layers" if row["layer"] in pruned else "the CONV layers' rate"
    return Mapping(choices, rows)


def mapping_id(schemes: Schemes | Mapping) -> str:
    """12 hex digits that change with the schemes of the layers; rates do not count, as they follow from these."""
    text = {name: str(getattr(scheme, "scheme", scheme)) for name, scheme in schemes.items()}
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:12]


def hold_out(data: Data, share: float, seed: int = 0) -> Data:
    """Data whose `test` is `share` of the training images, as many of each class, and whose `train` is the others."""
    if not 0 < share < 1:
        raise ValueError(f"Expected to hold out a share in (0, 1) of the training images. Got {share!r}.")
    images, labels = data.train.images, data.train.labels.cpu().numpy()
    rng, held = np.random.default_rng(seed), torch.zeros(len(labels), dtype=torch.bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: max(1, round(share * len(members)))]] = True
    train = replace(data.train, images=images[~held], labels=data.train.labels[~held])
    test = replace(data.test, images=images[held], labels=data.train.labels[held])
    return replace(data, name=f"{data.name}, {share:g} held out by {seed}", train=train, test=test)


@lru_cache(maxsize=1)
def _loaded(payload: bytes) -> tuple[torch.nn.Module, Data]:
    """The dense model and the data, once per process; the images lie on the GPU, where there is one."""
    model, data, share, seed = pickle.loads(payload)
    data = hold_out(data() if callable(data) else data, share, seed)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = (replace(b, images=b.images.to(where), labels=b.labels.to(where)) for b in (data.train, data.test))
    return model, replace(data, train=train, test=test)


def retrained(payload: bytes, mapping: Mapping, epochs: int, seed: int, threads: int, options: dict) -> dict:
    """What the executor runs: accuracy on the held-out images after one-shot pruning and `epochs` of retraining, and
    seconds. A loss that is not finite gives accuracy 0 and the error."""
    began, before = time.perf_counter(), torch.get_num_threads()
    model, data = _loaded(payload)
    model, error = copy.deepcopy(model), ""
    options = {"test_every": 0, "progress": False, "data": data, "retrain_epochs": epochs} | options
    torch.set_num_threads(threads)  # the same for every executor: sums depend on it
    try:
        prune(model, mapping, seed=seed, **options)
        accuracy = evaluate(model.to(data.test.images.device), data, progress=False)
    except FloatingPointError as failure:
        accuracy, error = 0.0, str(failure)
    finally:
        torch.set_num_threads(before)
    return {"accuracy": accuracy, "seconds": time.perf_counter() - began, "error": error}


def _data_id(data: Data | Callable[[], Data]) -> str:
    if isinstance(data, Data):
        return f"{data.name}, {len(data.train.labels)} images in batches of {data.train.batch_size}"
    return hashlib.sha256(pickle.dumps(data)).hexdigest()[:16]


class Inline(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Evaluator:
    """Evaluates lists of {layer: scheme}: reward = accuracy in [0, 1] - weight * ms / dense_ms. Remembers them all.

    The accuracy is that of `held_out` of the training images, after `epochs` of retraining on the others (which image
    is where follows from `seed`). The dense network may have seen them: it ranks candidates, and the test images, which
    take no part, have the last word. latency: "measured" (compiled code on `device`, `threads` threads, 20 to `runs`
    samples), an object with `predict(graph, mapping)` -> ms such as a LatencyModel, or a function (pruned model,
    mapping) -> ms. executor: any `concurrent.futures.Executor`; default: this process, one after the other. data may be
    a function without arguments that loads it, called once per process, where a set is too large to be sent along.
    overlap: whether to measure while others train, True where they do so elsewhere; default: where cores are left for
    it, otherwise only compilation overlaps. checkpoint: a JSON file, from which an evaluator of the same settings goes
    on. options: of `fit`, such as lr. Raises ValueError for a graph of other weights and another's checkpoint."""

    def __init__(
        self,
        model: torch.nn.Module,
        data: Data | Callable[[], Data],
        graph,
        rate: float,
        latency="measured",
        weight: float = 0.2,
        epochs: int = 2,
        held_out: float = 0.1,
        seed: int = 0,
        executor: Executor | None = None,
        checkpoint: str | Path | None = None,
        overlap: bool | None = None,
        threads: int = 1,
        device: str = "host",
        runs: int = 100,
        train_threads: int = 1,
        **options,
    ):
        if latency != "measured" and not callable(getattr(latency, "predict", latency)):
            raise TypeError(f"Expected latency 'measured', a LatencyModel or a function. Got {latency!r}.")
        if not isinstance(data, Data) and not callable(data):
            raise TypeError(f"Expected Data, or a function that loads it. Got {data!r}.")
        # Where the latencies come from: "measured", "predicted" or "function".
        self.how = "measured" if latency == "measured" else "predicted" if hasattr(latency, "predict") else "function"
        self.graph, self.rate, self.latency, self.weight = graph, check_rate(rate), latency, weight
        self.epochs, self.seed, self.executor, self.overlap = epochs, seed, executor or Inline(), overlap
        self.threads, self.device, self.runs, self.train_threads = threads, device, runs, train_threads
        self.options, self.checkpoint = options, checkpoint and Path(checkpoint)
        self.model = copy.deepcopy(model).cpu()
        self.payload = pickle.dumps((self.model, data, held_out, seed))
        for name, layer in graph.layers.items():
            if not np.array_equal(find_weight(self.model, name)[0].detach().float().numpy(), layer.weight):
                raise ValueError(f"Expected the graph of this model as it is now. Got other weights in {name!r}.")
        shapes = [node.shape for node in graph.nodes if node.name in graph.inputs]
        self.inputs = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
        weights = hashlib.sha256(b"".join(layer.weight.tobytes() for layer in graph.layers.values())).hexdigest()[:16]
        settings = {"weights": weights, "data": _data_id(data), "held_out": held_out, "seed": seed}
        settings |= {"rate": self.rate, "epochs": epochs, "options": json.dumps(options, sort_keys=True, default=str)}
        settings |= {"latency": self.how, "train_threads": train_threads}
        dense_ms = None
        if self.how == "measured":
            seal = DEVICES[device].provenance(f"prunemap {__version__}")["fingerprint"]
            settings |= {"device": device, "threads": threads, "fingerprint": seal}
        elif self.how == "predicted":  # tells one latency model from another, or from itself with more rows
            dense_ms = self._ms(Mapping(), self._compiled(Mapping()))
            settings["dense_ms_of_the_latency_model"] = dense_ms
        self.known = {"settings": settings, "dense_ms": dense_ms, "candidates": {}}
        self.known |= read_checkpoint(self.checkpoint, "a checkpoint of a search", settings)
        if self.known["dense_ms"] is None:
            self.known["dense_ms"] = self._ms(Mapping(), self._compiled(Mapping()))
        self.dense_ms: float = self.known["dense_ms"]  # of the dense network, from the same source as the candidates'

    def __call__(self, batch: list[Schemes]) -> list[dict]:
        """A row per candidate, in their order: mapping, id, accuracy, ms, reward, seconds (of the training), timed (how
        the latency was taken, and beside what) and error."""
        mappings = {mapping_id(schemes): global_rates(self.graph, schemes, self.rate) for schemes in batch}
        found = self.known["candidates"]
        for key, schemes in mappings.items():
            found.setdefault(key, {"schemes": {name: str(choice.scheme) for name, choice in schemes.items()}})
        untrained, untimed = ([key for key in mappings if piece not in found[key]] for piece in ("accuracy", "ms"))
        training: dict[Future, str] = {}
        try:
            for key in untrained:
                seed = int.from_bytes(hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:4]) >> 1
                work = (self.payload, mappings[key], self.epochs, seed, self.train_threads, self.options)
                training[self.executor.submit(retrained, *work)] = key
                self._gather(training, wait=False)
            ready = []
            for key in untimed:
                ready.append((key, mappings[key], self._compiled(mappings[key])))
                self._gather(training, wait=False)
            works = [lambda: self._measure(ready, training), lambda: self._gather(training)]
            for work in works if self._beside(len(training)) else reversed(works):
                work()
        finally:
            for future in training:
                future.cancel()
        rows = [{"mapping": mappings[key], "id": key} | found[key] for key in map(mapping_id, batch)]
        return [row | {"reward": row["accuracy"] - self.weight * row["ms"] / self.dense_ms} for row in rows]

    def _gather(self, training: dict[Future, str], wait: bool = True) -> None:
        """Keep what is done, one by one, so that a kill costs what runs; and, with `wait`, all that is to come."""
        for future in as_completed(training) if wait else [future for future in training if future.done()]:
            if "accuracy" not in self.known["candidates"][training[future]]:
                self._keep(training[future], future.result())

    def _measure(self, ready: list[tuple], training: dict[Future, str]) -> None:
        for key, *candidate in ready:
            beside = any(not future.done() for future in training)
            ms = self._ms(*candidate)
            words = f"measured {'beside training' if beside else 'alone'}" if self.how == "measured" else self.how
            self._keep(key, {"ms": ms, "timed": words})

    def _beside(self, jobs: int) -> bool:
        if self.overlap is not None or self.how != "measured" or self.device != "host":
            return self.overlap is not False
        workers = getattr(self.executor, "_max_workers", None)  # of pools on this machine; unknown elsewhere
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = min(psutil.cpu_count(logical=False) or 1, allowed)
        return workers is not None and cores >= self.threads + min(workers, jobs) * self.train_threads

    def _compiled(self, mapping: Mapping):
        """What the latency is taken of: the model pruned at once, compiled if it is to be measured (no weight's value
        matters for that); None where it is predicted."""
        if self.how == "predicted":
            return None
        prune(model := copy.deepcopy(self.model), mapping)
        if self.how == "function":
            return model
        return compile(model, self.inputs, threads=self.threads, mapping=mapping)

    def _ms(self, mapping: Mapping, network) -> float:
        if self.how == "measured":
            (row,) = measure(network, self.device, runs=self.runs, adaptive=True, seed=self.seed).to_dict("records")
            if not row["ok"]:
                raise RuntimeError(f"Expected a latency of {mapping_id(mapping)} on {self.device}. Got: {row['error']}")
            return row["median_ms"]
        if self.how == "predicted":
            return float(self.latency.predict(self.graph, mapping))
        return float(self.latency(network, mapping))

    def _keep(self, key: str, facts: dict) -> None:
        self.known["candidates"][key] |= facts
        if self.checkpoint:
            write_atomic(self.checkpoint, json.dumps(self.known))
