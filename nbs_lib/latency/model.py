"""The latency model (mapping 5.2.1): what a layer, or a network, takes under a mapping, from measured test models."""

import contextlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from nbs_lib import __version__
from nbs_lib.latency import building
from nbs_lib.latency.settings import LAYERS, WEIGHTED, TestModel
from nbs_lib.latency.work import SIMPLE, NoData, Work, layer_works, move, network_works, pool
from nbs_lib.layers import Graph, LayerSpec
from nbs_lib.measure import DEVICES, schema
from nbs_lib.paths import reading, write_atomic
from nbs_lib.schemes import Choice

FORMAT = 1
# How far beyond the measured settings a feature may lie: log2, so a factor of 4; of 32 in fully connected layers, whose
# weights come from memory at one speed from some megabytes on, and VGG-16's would take gigabytes ten times over.
REACH = {"conv": 2.0, "depthwise": 2.0, "linear": 5.0}
SIGMAS = 1.96
BEYOND = 0.1  # ours: relative deviation that each doubling beyond the measured settings adds


@dataclass(eq=False)
class Curve:
    """One kind of step: ms = coefficients @ terms, times what a Gaussian process has learnt of the ratio."""

    kind: str
    terms: np.ndarray  # float64 (n, terms)
    features: np.ndarray  # float64 (n, features), log2
    ms: np.ndarray  # float64 (n,): of one step
    theta: list[float] | None = None
    coefficients: np.ndarray = field(init=False)

    def __post_init__(self):
        weights = 1 / self.ms[:, None]  # so that relative errors count
        self.coefficients = nnls(self.terms * weights, np.ones(len(self.ms)))[0]
        base = self.terms @ self.coefficients
        self.low, self.high = self.features.min(axis=0), self.features.max(axis=0)
        self.centre, spread = self.features.mean(axis=0), self.features.std(axis=0)
        self.spread = np.where(spread > 0, spread, 1)
        kernel = ConstantKernel(0.05, (1e-4, 1)) * RBF(np.full(self.features.shape[1], 2.0), (0.3, 50))
        kernel += WhiteKernel(1e-3, (1e-5, 1e-1))
        optimizer = "fmin_l_bfgs_b"
        if self.theta is not None:
            kernel, optimizer = kernel.clone_with_theta(np.array(self.theta)), None
        self.process = GaussianProcessRegressor(kernel, alpha=1e-8, optimizer=optimizer, random_state=0)
        # A length at its bound says that the feature does not matter.
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            self.process.fit((self.features - self.centre) / self.spread, np.log(self.ms / base))
        self.theta = self.process.kernel_.theta.tolist()

    def __call__(self, works: list[Work]) -> tuple[np.ndarray, np.ndarray]:
        """ms and its relative standard deviation, float64 (len(works),). NoData names what lies beyond the settings."""
        terms, features = (np.array([getattr(work, name) for work in works], float) for name in ("terms", "features"))
        far = (features > self.high + REACH[self.kind]).any(axis=1)  # smaller ones hardly take more than the constant
        if far.any():
            rule = f"Expected a layer within the sizes of the measured {self.kind} settings."
            raise NoData(f"{rule} Got {_name(works[far.argmax()])}.")
        inside = (np.clip(features, self.low, self.high) - self.centre) / self.spread
        ratio, deviation = self.process.predict(inside, return_std=True)
        beyond = np.maximum(np.maximum(features - self.high, self.low - features).max(axis=1), 0)
        return terms @ self.coefficients * np.exp(ratio), np.hypot(deviation, BEYOND * beyond)


class LatencyModel:
    """Read-only prediction over the rows of one device, CPU, engine version and thread count.

    What a step takes is a sum of physical terms (multiply-adds by the compiler's own cost model, bytes of weights and
    of activations, a constant), fitted with non-negative coefficients, times a correction that a Gaussian process has
    learnt in the logarithms of sizes; moves, pools and sums have the terms alone. Predicting neither compiles nor
    measures: it plans."""

    def __init__(self, rows: pd.DataFrame, thetas: dict[str, list[float]] | None = None):
        self.rows = rows.reset_index(drop=True)
        if len(self.rows) < 16:
            raise NoData(f"Expected at least 16 measured settings. Got {len(self.rows)}: give the build more time.")
        first = self.rows.iloc[0]
        if not self.rows.ok.all() or len(self.rows[["fingerprint", "threads"]].drop_duplicates()) > 1:
            raise ValueError("Expected rows without errors, of one machine, engine and thread count. Got others.")
        self.device, self.cpu, self.fingerprint = first.device, first.cpu, first.fingerprint
        self.engine = f"{first.engine} {first.engine_version}"
        self.threads = int(first.threads if pd.notna(first.threads) else 1)
        self._fit(thetas or {})

    @staticmethod
    def build(device="host", threads=1, budget_s=600.0, settings=512, cache=None, progress=True) -> "LatencyModel":
        """Measure what is not on record and fit; arguments as for `building.rows`, cache: the file of new rows."""
        return LatencyModel(building.rows(device, threads, budget_s, settings, cache, progress))

    def save(self, path: str | Path) -> Path:
        """Write the model as JSON, atomically: its rows, and what fitting them found."""
        rows = json.loads(self.rows.to_json(orient="records"))
        thetas = {kind: curve.theta for kind, curve in self.curves.items()}
        return write_atomic(path, json.dumps({"format": FORMAT, "thetas": thetas, "rows": rows}))

    @staticmethod
    def load(path: str | Path, any_machine: bool = False) -> "LatencyModel":
        """Read what `save` wrote. ValueError where it holds something else, or comes from another CPU or version of the
        engine; any_machine: take it all the same."""
        with reading(path, "a model written by LatencyModel.save"):
            data = json.loads(Path(path).read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}")
            model = LatencyModel(schema.frame(data["rows"]), data["thetas"])
        here = DEVICES.get(model.device, DEVICES["host"]).provenance(f"prunemap {__version__}")
        if not any_machine and model.fingerprint != here["fingerprint"]:
            ours = f"{here.get('cpu', model.device)}, prunemap {__version__}"
            got = f"Got one of {model.cpu or model.device}, {model.engine}. any_machine=True takes it all the same."
            raise ValueError(f"Expected a latency model of this machine ({ours}). {got}")
        return model

    def predict(self, graph: Graph, mapping: dict[str, Choice]) -> float:
        """ms of a run of the whole network, batch as traced. NoData names what was never measured."""
        return float(self.predict_layers(graph, mapping).ms.sum())

    def predict_layers(self, graph: Graph, mapping: dict[str, Choice]) -> pd.DataFrame:
        """One row per step: layer ("" for none), op, scheme, rate (nominal), ms, and low_ms, high_ms, which 95 % of the
        settings lie between. The sum of ms is what `predict` gives."""
        works = network_works(graph, mapping, self.threads)
        ms, deviation = self._times(works)
        rows = []
        for work, value, sigma in zip(works, ms, deviation, strict=True):
            layer = work.name if work.name in graph.layers else ""
            choice = mapping.get(layer)
            row = {"layer": layer, "op": work.kind if layer else work.name}
            row |= {"scheme": str(choice.scheme) if choice else "dense", "rate": choice.rate if choice else 1.0}
            row |= {"ms": value, "low_ms": value * np.exp(-SIGMAS * sigma), "high_ms": value * np.exp(SIGMAS * sigma)}
            rows.append(row)
        call = {"layer": "", "op": "call", "scheme": "dense", "rate": 1.0}
        return pd.DataFrame([*rows, call | dict.fromkeys(("ms", "low_ms", "high_ms"), self.call_ms)])

    def predict_range(self, graph: Graph, mapping: dict[str, Choice]) -> tuple[float, float]:
        """ms between which `predict` lies with 95 % if all its steps err alike, the worst case."""
        steps = self.predict_layers(graph, mapping)
        return float(steps.low_ms.sum()), float(steps.high_ms.sum())

    def layer_ms(self, layer: LayerSpec, choices: list[Choice | None]) -> np.ndarray:
        """ms of one layer alone under several choices (None: dense), float64 (len(choices),); its structured choices
        leave their neighbours as they are. NoData as in `predict`."""
        steps = [layer_works(layer, choice) for choice in choices]
        ms, _ = self._times([work for works in steps for work in works])
        ends = np.cumsum([len(works) for works in steps])
        return np.array([part.sum() for part in np.split(ms, ends[:-1])])

    def _times(self, works: list[Work]) -> tuple[np.ndarray, np.ndarray]:
        """ms and relative deviation of every step."""
        ms, deviation = np.zeros(len(works)), np.zeros(len(works))
        for kind in {work.kind for work in works}:
            at = [number for number, work in enumerate(works) if work.kind == kind]
            if kind in self.curves:
                ms[at], deviation[at] = self.curves[kind]([works[number] for number in at])
            elif kind in self.parts:
                ms[at], deviation[at] = [self._simple(works[number]) for number in at], self.simple_deviation
            else:
                raise NoData(f"Expected a kind of step that was measured. Got {_name(works[at[0]])}: {kind}.")
        return ms, deviation

    def _fit(self, thetas: dict) -> None:
        """Simple steps first, from rows that hold nothing else; then the curves, from what those leave; then the simple
        ones again, with strided layers, whose convolutions the curves know."""
        settings = [TestModel.of(row) for row in self.rows.itertuples()]
        total, works = self.rows.median_ms.to_numpy(float), [row_works(setting) for setting in settings]
        simple = [n for n, row in enumerate(works) if all(work.kind in SIMPLE for work, _ in row)]
        self.curves = {}
        self.parts = _fit_simple([works[n] for n in simple], total[simple])
        for kind in WEIGHTED:
            has = [any(work.kind == kind for work, _ in row) for row in works]
            terms, features, ms = [], [], []
            for n in [at for at, setting in enumerate(settings) if setting.stride == 1 and has[at]]:
                left = total[n] - sum(count * self._simple(work) for work, count in works[n] if work.kind != kind)
                counts, mine = zip(*((count, work) for work, count in works[n] if work.kind == kind), strict=True)
                shares = np.array(counts) / sum(counts)
                if left > 0.3 * total[n]:
                    terms.append(shares @ np.array([work.terms for work in mine]))
                    features.append(shares @ np.array([work.features for work in mine]))
                    ms.append(left / sum(counts))
            if len(ms) >= 4:
                self.curves[kind] = Curve(kind, *map(np.array, (terms, features, ms)), thetas.get(kind))
        strided, known = [], np.zeros(len(total))
        for n, row in enumerate(works):
            mine = [(work, count) for work, count in row if work.kind not in SIMPLE]
            if settings[n].stride == 1 or not mine:
                continue
            with contextlib.suppress(NoData):
                ms = self._times([work for work, _ in mine])[0]
                known[n] = ms @ [count for _, count in mine]
                if known[n] < 0.8 * total[n]:
                    strided.append(n)
        rows = simple + strided
        left = [[(work, count) for work, count in works[n] if work.kind in SIMPLE] for n in rows]
        self.parts = _fit_simple(left, (total - known)[rows])
        again = np.array([sum(count * self._simple(work) for work, count in row) for row in left])
        self.simple_deviation = float(np.std(again / (total - known)[rows] - 1)) if rows else 0.0
        self.call_ms = float(self.parts.get("call", [0.0])[0])

    def _simple(self, work: Work) -> float:
        return float(np.dot(work.terms, self.parts.get(work.kind, np.zeros(len(work.terms)))))


def _fit_simple(rows: list[list[tuple[Work, float]]], ms: np.ndarray) -> dict[str, np.ndarray]:
    """Non-negative coefficients per kind of simple step, by least squares of the relative errors."""
    starts = dict(zip(SIMPLE, np.cumsum([0, *SIMPLE.values()]).tolist(), strict=False))
    table = np.zeros((len(rows), sum(SIMPLE.values())))
    for line, row in enumerate(rows):
        for work, count in row:
            begin = starts[work.kind]
            table[line, begin : begin + len(work.terms)] += count * np.array(work.terms)
    scale = np.maximum(np.abs(table).max(axis=0, initial=0), 1e-30)  # bytes beside ones
    found = nnls(table / scale / ms[:, None], np.ones(len(ms)))[0] / scale if len(rows) else np.zeros(len(scale))
    seen = {work.kind for row in rows for work, _ in row}
    return {kind: found[starts[kind] : starts[kind] + size] for kind, size in SIMPLE.items() if kind in seen}


def row_works(setting: TestModel) -> list[tuple[Work, float]]:
    """What a run of a test model consists of: (step, how often)."""
    P, layers, call = setting.P, setting.layers(), (Work("call", "call", (1.0,)), 1)
    into, last = (layers[0].Q * layers[0].groups, layers[-1].P) if layers else (P, P)
    image = 4.0 * into * (setting.H * setting.stride) ** 2  # bytes
    start, end = (move("copy", 2 * image), 1), (move("copy", 8.0 * last * setting.maps[-1] ** 2), 1)
    if setting.kind == "pointwise":
        return [call, start, (Work("pointwise", "affine", (2 * image, 1.0)), LAYERS), end]
    if setting.kind == "pytorch":
        return [call, (Work("pytorch", "move", (image, 1.0)), LAYERS)]
    if setting.kind == "global_avg":
        return [call, *((step, LAYERS) for step in (start[0], pool("mean", P, 0.0, image), move("copy", 8.0 * P)))]
    if setting.kind == "max_pool2d":
        pools = [(pool("max_pool2d", float(P * size**2), 4.0, 0.0), 1) for size in setting.maps]
        return [call, start, *pools, end]
    counts = Counter((layer.P, layer.Q, layer.H) for layer in layers)
    first = {(layer.P, layer.Q, layer.H): layer for layer in layers}
    works = [(work, count) for key, count in counts.items() for work in layer_works(first[key], setting.choice, LAYERS)]
    copied = [] if works[0][0].kind == "phases" else [start]  # phases are cut from the input
    return [call, *copied, *works, end]


def _name(work: Work) -> str:
    choice = f" under {work.choice.scheme} at {work.choice.rate:g}x" if work.choice else ""
    return f"{work.name}{choice}"
