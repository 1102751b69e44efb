"""Accuracies: a `Setting` says what is trained and pruned and how; running it gives a row of `data/trained/`.

Every notebook that shows accuracy asks `accuracies` for its settings' rows: those on record come from there, others are
trained where that is allowed. The dense network of a setting is trained once and kept in the cache folder.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from tqdm.auto import tqdm

from nbs_lib import paths
from nbs_lib.data import Data, load_data
from nbs_lib.layers import Graph, trace
from nbs_lib.mapping import Mapping, uniform_mapping
from nbs_lib.measure import cache as rows_on_disk
from nbs_lib.measure import host
from nbs_lib.measure.schema import Schema
from nbs_lib.models import build, load_checkpoint
from nbs_lib.pruning import Masks, prune
from nbs_lib.pruning.targets import find_weight
from nbs_lib.schemes import Choice, parse
from nbs_lib.train import evaluate, fit

DENSE_NAMES = ("dataset", "size", "train_images", "network", "width", "start", "dense_epochs", "dense_lr")


@dataclass(frozen=True)
class Setting:
    """What decides an accuracy: data, network, its dense training, then scheme, rate, algorithm, epochs and seed.

    dataset: as for `load_data`; folders relative to NBS_DATA, so that a row means the same elsewhere. train_images: of
    a subset, 0 for all. start: weights the dense training starts from, a file in NBS_DATA, or "". algorithm: "dense"
    for none. conv, linear: schemes as text, "" for none; rate: of every mapped layer. rates: JSON {layer: [scheme,
    rate]} instead. options: JSON of further arguments of `prune`."""

    dataset: str = "digits"
    size: int = 0
    train_images: int = 0
    network: str = "resnet20"
    width: float = 1.0
    start: str = ""
    dense_epochs: int = 15
    dense_lr: float = 0.1
    algorithm: str = "dense"
    conv: str = "block_punched(8x4)"
    linear: str = ""
    rate: float = 4.0
    rates: str = ""
    epochs: int = 0
    retrain_epochs: int = 0
    lr: float = 0.02
    options: str = "{}"
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):  # one form, one key
            value = field.type(getattr(self, field.name))
            if field.name in ("rates", "options") and value:
                value = json.dumps(json.loads(value), sort_keys=True)
            object.__setattr__(self, field.name, value)

    def data(self) -> Data:
        """The data set, loaded once per process."""
        return _data(self.dataset, self.size, self.train_images)

    def model(self, start: bool = True) -> torch.nn.Module:
        """A new network with its first weights: those of `start`, or random ones (seed 0)."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(self.network, num_classes=len(self.data().classes), width=self.width)
        if self.start and start:
            load_checkpoint(model, Path(os.environ.get("NBS_DATA", "")).expanduser() / self.start)
        return model

    def key(self, names: Iterable[str] = DENSE_NAMES) -> str:
        """16 hex digits that change with these fields' values; by default what decides the dense network."""
        facts = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def dense(self, progress: bool = False) -> torch.nn.Module:
        """The trained dense network, from `data/trained/weights` or the cache folder; else trained by the first who
        asks, resumed where that was killed."""
        if (kept := paths.data_dir() / "trained" / "weights" / f"{self.key()}.safetensors").exists():
            model = self.model(start=False)
            model.load_state_dict(safetensors.torch.load_file(kept))
            return model
        model, file = self.model(), paths.cache_dir() / "trained" / f"{self.key()}.pt"
        options = dict(lr=self.dense_lr, schedule="cosine" if self.start else "one_cycle", test_every=0)
        fit(model, self.data(), self.dense_epochs, checkpoint=file, progress=progress, **options)
        return model

    def graph(self, model: torch.nn.Module) -> Graph:
        """The model's graph, for one image of the data set."""
        return trace(model, torch.zeros(1, *self.data().input_shape))

    def mapping(self, graph: Graph) -> Mapping:
        """{layer: Choice}, of `rates` where given, else the uniform one."""
        schemes = [parse(text) if text else None for text in (self.conv, self.linear)]
        mapping = uniform_mapping(graph, self.rate, *schemes)
        if not self.rates:
            return mapping
        chosen = {layer: Choice(parse(scheme), rate) for layer, (scheme, rate) in json.loads(self.rates).items()}
        return Mapping(chosen, mapping.layers)

    def prune(self, progress: bool = False) -> tuple[torch.nn.Module, Masks]:
        """The pruned network and its masks, from the dense one; a killed call goes on where it was when it is made
        again. Not for the algorithm "dense"."""
        model = self.dense(progress)
        return model, self._prune(model, self.graph(model), progress)

    def _prune(self, model: torch.nn.Module, graph: Graph, progress: bool) -> Masks:
        phases = paths.cache_dir() / "trained" / self.key(SETTINGS)  # a checkpoint for each
        options = dict(epochs=self.epochs, retrain_epochs=self.retrain_epochs, lr=self.lr, seed=self.seed, test_every=0)
        options |= dict(data=self.data(), progress=progress, checkpoint=phases) | json.loads(self.options)
        masks = prune(model, self.mapping(graph), algorithm=self.algorithm, **options)
        shutil.rmtree(phases, ignore_errors=True)
        return masks

    def run(self, progress: bool = False) -> dict:
        """The row: this setting, what came out, on which machine; a failure is a row with its error."""
        began = time.perf_counter()
        hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else host.cpu_model()
        row = asdict(self) | host.stamp() | {"hardware": hardware, "threads": torch.get_num_threads()}
        row |= {"torch": torch.__version__}
        try:
            data = self.data()
            row |= {"test_images": len(data.test.labels), "classes": len(data.classes)}
            model = self.dense(progress)
            row["dense_accuracy"] = row["accuracy"] = evaluate(model, data, progress=False)
            if self.algorithm != "dense":
                row |= self._pruned(model, progress)
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        return row | {"seconds": time.perf_counter() - began}

    def _pruned(self, model: torch.nn.Module, progress: bool) -> dict:
        graph = self.graph(model)
        masks = self._prune(model, graph, progress)
        weights = {name: find_weight(model, name)[0].detach().cpu().numpy() for name in graph.layers}
        layers = {name: replace(layer, weight=weights[name]) for name, layer in graph.layers.items()}
        rates = replace(graph, layers=layers).rates()
        summary, history = masks.summary(), masks.history
        found = {"accuracy": evaluate(model, self.data(), progress=False), "reached_rate": masks.rate}
        found |= {"conv_rate": rates.conv, "weight_rate": rates.weights, "mac_rate": rates.macs}
        shown = {row.layer: [row.scheme, row.rate] for row in summary.itertuples()}
        found |= {"layer_rates": json.dumps(shown, separators=(",", ":")), "total_epochs": len(history)}
        for name in ("lam", "primal_residual"):
            if name in history:
                found[name] = history[name].dropna().iloc[-1]
        around = masks.tau_rates.values()
        return found | {"tau_rate_low": min(around, default=None), "tau_rate_high": max(around, default=None)}


RESULTS = (
    "test_images classes dense_accuracy accuracy reached_rate conv_rate weight_rate mac_rate tau_rate_low "
    "tau_rate_high lam primal_residual total_epochs layer_rates seconds hardware threads torch commit utc"
)
_TYPES = dict.fromkeys(("layer_rates", "hardware", "torch", "commit", "utc"), "str")
_TYPES |= dict.fromkeys(("test_images", "classes", "total_epochs", "threads"), "Int64")
_TYPES |= {field.name: {str: "str", int: "Int64", float: "float64"}[field.type] for field in fields(Setting)}
SETTINGS = [field.name for field in fields(Setting)]
COLUMNS = {"schema": "Int64"} | {name: _TYPES.get(name, "float64") for name in SETTINGS + RESULTS.split(" ")}


def _rules(row: dict) -> dict[str, bool]:
    ok, accuracies = row["ok"], (row["accuracy"], row["dense_accuracy"])
    return {
        "a data set, a network and an algorithm": all(row[name] for name in ("dataset", "network", "algorithm")),
        "accuracies in [0, 1], or an error": all(0 <= a <= 1 for a in accuracies) if ok else row["error"] != "",
    }


TRAINED = Schema(COLUMNS | {"ok": "bool", "error": "str"}, _rules)


@cache
def _data(dataset: str, size: int, train_images: int) -> Data:
    data = load_data(dataset, size=size or None)
    return data.subset(train_images) if train_images else data


def accuracies(settings: list[Setting], live=False, record=False, jobs=1, cache=None, progress=True) -> pd.DataFrame:
    """A row for every setting, in their order: of `data/trained/`, or else trained now where `live`.

    A setting that is neither on record nor trained is a row that is not ok and says so. record: append what is trained,
    each row as it comes, so that a killed call goes on where it was. jobs: processes that train, sharing the CPUs'
    threads. cache: another folder than `data/trained`."""
    folder = Path(cache or paths.data_dir() / "trained")
    known = rows_on_disk.read(folder, TRAINED) if folder.exists() else TRAINED.frame([])
    known = {_setting(row): row for row in known[known.ok].to_dict("records")}
    missing = [setting for setting in dict.fromkeys(settings) if setting not in known]
    if live and missing:
        threads = max(1, torch.get_num_threads() // jobs)
        spawn = multiprocessing.get_context("spawn")  # forks of a process with running threads hang
        with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            first = {setting.key(): setting for setting in missing}
            wait([pool.submit(setting.dense) for setting in first.values()])  # each once, before several want the same
            futures = [pool.submit(setting.run) for setting in missing]
            for future in tqdm(as_completed(futures), "Training", len(futures), disable=not progress):
                row = TRAINED.frame([future.result()])
                known[_setting(row.iloc[0])] = row.iloc[0].to_dict()
                slug = re.sub(r"[^\w.-]+", "-", row.dataset[0])
                if record:
                    _keep_dense(_setting(row.iloc[0]), folder)
                    rows_on_disk.append(folder / f"{slug}.csv", row, TRAINED)
    none = {"ok": False, "error": "not on record: train it with live=True"}
    return TRAINED.frame([known.get(setting, asdict(setting) | none) for setting in settings])


def _keep_dense(setting: Setting, folder: Path) -> None:
    """Put the dense weights on record, beside the rows that start from them."""
    file = folder / "weights" / f"{setting.key()}.safetensors"
    if not file.exists() and (paths.cache_dir() / "trained" / f"{setting.key()}.pt").exists():
        state = {name: tensor.contiguous() for name, tensor in setting.dense().state_dict().items()}
        paths.write_atomic(file, safetensors.torch.save(state))


def _setting(row) -> Setting:
    """The setting of a row."""
    return Setting(**{name: row[name] for name in SETTINGS})
