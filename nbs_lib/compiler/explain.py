"""What a compiled network tells of itself: what every step runs and why, and where the time goes."""

import time
from functools import cache

import numpy as np
import pandas as pd

from nbs_lib.kernels.jit import width
from nbs_lib.kernels.peak import bandwidth_gbs, peak_gmacs

COLUMNS = [
    "step", "layer", "op", "scheme", "rate", "nnz", "macs", "effective_macs", "removed_macs", "computed_macs",
    "weight_bytes", "activation_bytes", "kernel", "tile", "dense_ms", "sparse_ms", "timed", "chosen", "why",
]  # fmt: skip
FAR = 2**20  # bytes: larger arrays come from memory or a cache that is shared
_peak, _bandwidth = cache(peak_gmacs), cache(bandwidth_gbs)  # once per process


def explain(net) -> pd.DataFrame:
    """One row per step: what ran, on which weights, through which kernel, sparse or dense, and why.

    Rates, non-zeros and MACs are those of the layers as given; `removed_macs` is what of `effective_macs` went with
    whole filters and channels that change no output. `dense_ms`, `sparse_ms`: of a convolution's two kernels, `timed`
    by tuning on this machine or else the cost model's (two FMAs a cycle); NaN where there is no choice.
    """
    rows = []
    for number, step in enumerate(net.steps):
        node = net.nodes[step.operation.node.name]
        moves = step.chosen == "copy" and step.kernel in ("copy", "phases")
        layer = None if moves else net.graph.layers.get(node.layer)
        choice = net.mapping.get(node.layer) if layer else None
        macs, removed, why = 0 if moves else node.macs, 0, step.why
        left = net.planned.layers.get(node.layer, layer)
        if layer and left is not layer:
            removed = round(macs * (layer.nnz - left.nnz) / layer.params)
            channels = f"{left.Q * left.groups} of {layer.Q * layer.groups} channels"
            why = f"{left.P} of {layer.P} filters, {channels}; {why}"
        entry = net.record.entry(left, node.shape[0], net.threads) if step.tiling else None
        modelled = np.where(step.cycles, step.cycles * 2 * width() / _peak() / 1e6 / net.threads, np.nan)
        dense_ms, sparse_ms = (entry["dense_ms"], entry["ms"]) if entry else modelled
        values = {
            "step": number, "layer": node.layer or node.module, "op": step.kernel if moves else node.op,
            "scheme": str(choice.scheme) if choice else "", "rate": layer.rate if layer else np.nan,
            "nnz": layer.nnz if layer else 0, "macs": macs,
            "effective_macs": round(macs * layer.nnz / layer.params) if layer else macs, "removed_macs": removed,
            "weight_bytes": step.weight_bytes + step.index_bytes, "dense_ms": dense_ms, "sparse_ms": sparse_ms,
            "activation_bytes": sum(4 * value.floats for value in (*step.reads, *step.writes)),
            "timed": entry is not None, "why": why,
        }  # fmt: skip
        rows.append(values | {name: getattr(step, name) for name in ("computed_macs", "kernel", "tile", "chosen")})
    return pd.DataFrame(rows, columns=COLUMNS)


def profile(net, *inputs, runs: int = 20) -> pd.DataFrame:
    """`explain` with the median of `runs` runs: `ms` per step (NaN through PyTorch), `share_of_peak` (effective MACs
    over the FMA peak), `gbytes_s` (weights, inputs and outputs, once each) and `bound`, what limits the step:
    "multiply-adds" or "memory", if that alone explains half of its time, else "caches" (near ones, stores, tails).

    The last row, "call", is what a call takes beside the steps: Python, checks, the copy of the result, and PyTorch.
    """
    laps: list[int] = []
    times = net.times(*inputs, runs=runs, between=lambda: laps.append(time.perf_counter_ns()))
    walls = np.diff(laps) / 1e6
    frame = explain(net)
    through_torch = frame["chosen"] == "torch"
    frame["ms"] = np.where(through_torch, np.nan, np.median(times, axis=0))
    peak, weights = _peak() * net.threads, frame["weight_bytes"]
    values = [[4 * value.floats for value in (*step.reads, *step.writes)] for step in net.steps]
    far = weights.where(weights > FAR, 0) + [sum(size for size in sizes if size > FAR) for sizes in values]
    frame["share_of_peak"] = (frame["effective_macs"] - frame["removed_macs"]) / frame["ms"] / 1e6 / peak
    frame["gbytes_s"] = (weights + frame["activation_bytes"]) / frame["ms"] / 1e6
    compute_ms, memory_ms = frame["computed_macs"] / 1e6 / peak, far / 1e6 / _bandwidth()
    limit = np.where(memory_ms > compute_ms, "memory", "multiply-adds")
    frame["bound"] = np.where(np.maximum(memory_ms, compute_ms) > 0.5 * frame["ms"], limit, "caches")
    frame.loc[through_torch, "bound"] = "PyTorch"
    beside = max(np.median(walls) - np.median(times.sum(axis=1)), 0)
    call = {"step": len(frame), "op": "call", "chosen": "python", "ms": beside}
    numbers = frame.select_dtypes(["number", "bool"])
    blank = {name: frame[name].dtype.type() if name in numbers else "" for name in frame}
    return pd.concat([frame, pd.DataFrame([blank | call])], ignore_index=True)
