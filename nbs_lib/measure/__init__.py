"""Measuring: a Network, a peer or any callable becomes a row with its provenance, appended to the cache on request."""

import functools
import platform
import re
import sys
import types
import warnings

import numpy as np
import pandas as pd

from nbs_lib import clock, paths
from nbs_lib.measure import cache as _cache
from nbs_lib.measure import host, schema
from nbs_lib.measure.simulated import ROOFLINES

# A device has provenance(engine) and run(target, inputs, runs, warmup, adaptive); both return columns of a row.
DEVICES = {"host": host, "simulated": ROOFLINES["phone"]} | {f"simulated:{name}": r for name, r in ROOFLINES.items()}


def _arrays(target, x) -> tuple[np.ndarray, ...]:
    x = getattr(target, "example_inputs", None) if x is None else x
    if x is None:
        raise ValueError("Expected x, or a target with example_inputs. Got neither.")
    return tuple(np.asarray(getattr(v, "detach", lambda v=v: v)()) for v in (x if isinstance(x, tuple | list) else [x]))


def _agreed(values):
    """The value all of them have, else None."""
    first, *others = [*values] or [None]
    return first if all(value == first for value in others) else None


def describe(target, inputs: tuple[np.ndarray, ...]) -> dict:
    """Columns that say what runs, as far as the target tells (its `graph`, `mapping`, `threads`, MACs)."""
    row = {name: getattr(target, name, None) for name in ("macs", "effective_macs", "fallback_macs")}
    row |= {"threads": getattr(target, "threads", 1), "dtype": str(inputs[0].dtype), "batch": inputs[0].shape[0]}
    choices = (getattr(target, "mapping", None) or {}).values()
    row |= {"scheme": "+".join(sorted({c.scheme.name for c in choices})), "rate": _agreed(c.rate for c in choices)}
    row |= {f"block_{side}": _agreed(getattr(c.scheme, side, None) for c in choices) for side in "pq"}
    if hasattr(target, "graph"):
        layers = list(target.graph.layers.values())
        names = ("kind", *"PQHW", "Kh", "Kw", "groups")
        row |= {name: _agreed(getattr(layer, name) for layer in layers) for name in names}
        row["stride"] = _agreed(stride for layer in layers for stride in layer.stride)
        row |= {"layer": layers[0].name if len(layers) == 1 else "", "nnz": sum(layer.nnz for layer in layers)}
        row["reached_rate"] = target.graph.rates().conv
    return row


def _attempt(target, device, inputs, runs, warmup, adaptive=False) -> dict:
    """The row of one measurement; what fails leaves its error in it."""
    row = device.provenance(getattr(target, "engine", f"python {platform.python_version()}")) | host.stamp()
    try:
        row |= describe(target, inputs)
        return row | device.run(target, inputs, runs, warmup, adaptive)
    except Exception as error:
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"}


def _finish(rows: list[dict], cache, columns: dict) -> pd.DataFrame:
    """The frame, appended to `cache`; a full disk or a read-only folder costs a warning, not the measurement."""
    frame = schema.frame([row | columns for row in rows])
    if cache is True:
        names = (re.sub(r"[^\w.-]+", "-", name) for name in (frame.device[0], f"{frame.model[0] or 'rows'}.csv"))
        cache = paths.data_dir().joinpath("measured", *names)
    try:
        if cache:
            _cache.append(cache, frame)
    except OSError as error:
        warnings.warn(f"measured, but not cached: {error}", stacklevel=3)
    return frame


def measure(target, device="host", runs=100, warmup=10, cache=None, adaptive=False, x=None, **columns) -> pd.DataFrame:
    """Time `target(*x)` on a device: a DataFrame of one row (`schema.COLUMNS`); a failure is a row with its error.

    `device`: a key of DEVICES. `adaptive`: 20 to `runs` samples, until MAD < 2 %. `x`: array, tensor or
    a tuple of them, else `target.example_inputs`. `cache`: a path, or True for data/measured/<device>/<model>.csv.
    `columns`: other columns, as model="resnet18", seed=0. KeyError for an unknown device or column."""
    if device not in DEVICES:
        raise KeyError(f"Expected a device among {', '.join(DEVICES)}. Got {device!r}.")
    row = _attempt(target, DEVICES[device], _arrays(target, x), runs, warmup, adaptive)
    return _finish([row], cache, {"seed": 0} | columns)


def compare(targets: dict, x=None, rounds=20, warmup=3, settle=1, cache=None, **columns) -> pd.DataFrame:
    """Time {label: target} in alternation on the host, same threads: a row each, failures included.

    All get `x`, else each its own `example_inputs`. Beside the schema's columns: `label`; `ratio` = median of the first
    target / median of this one (above 1: this one is faster), with its 95 % bootstrap interval `ratio_lo`, `ratio_hi`.
    ValueError where thread counts or the inputs' shapes differ."""
    base, threads = next(iter(targets)), {getattr(target, "threads", 1) for target in targets.values()}
    if len(threads) > 1:
        raise ValueError(f"Expected one thread count for all targets. Got {sorted(threads)}.")
    inputs = {label: _arrays(target, x) for label, target in targets.items()}
    shapes = {label: [array.shape for array in arrays] for label, arrays in inputs.items()}
    if any(shape != shapes[base] for shape in shapes.values()):
        raise ValueError(f"Expected targets with example_inputs of the same shapes. Got {shapes}.")
    with clock.lock():
        rows = {label: _attempt(target, host, inputs[label], 1, 0) for label, target in targets.items()}
        good = {label: target for label, target in targets.items() if rows[label].get("ok", True)}
        calls = {label: functools.partial(target, *inputs[label]) for label, target in good.items()}
        with clock.pin(*threads):
            timings = clock.alternate(calls, rounds if calls else 0, warmup, settle=settle)
    taken = [row | (timings.timings[label].row() if label in calls else {}) for label, row in rows.items()]
    frame = _finish(taken, cache, {"warmup": warmup, "seed": 0} | columns)
    paired = [timings.ratio(base, label) if {base, label} <= calls.keys() else (np.nan,) * 3 for label in rows]
    frame[["ratio", "ratio_lo", "ratio_hi"]] = paired
    frame.insert(0, "label", list(rows))
    return frame


class _Room(types.ModuleType):
    """`nbs.measure(net)` holds even where an import of this package has put the module over the function's name."""

    __call__ = staticmethod(measure)


sys.modules[__name__].__class__ = _Room
