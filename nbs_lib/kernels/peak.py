"""What one core can do at best: the FMA peak that every "share of peak" is a share of, and bytes from memory."""

from __future__ import annotations

import time

import numpy as np

from nbs_lib.kernels.jit import build, header, width

FIELDS = ("x", "count")
ACCUMULATORS, UNROLL = 16, 4


def _source(lanes: int) -> str:
    text = [*header(FIELDS), "    v = load(x)"]
    text += [f"    a{i} = load(x)" for i in range(ACCUMULATORS)]
    text += ["    for n in range(count):"]
    text += [f"        a{i} = fma(v, v, a{i})" for _ in range(UNROLL) for i in range(ACCUMULATORS)]
    return "\n".join(text + [f"    store(x + {lanes * (i + 1)}, a{i})" for i in range(ACCUMULATORS)])


def peak_gmacs(repeats: int = 5, milliseconds: float = 20.0) -> float:
    """Multiply-adds of one core in GMAC/s (float32): best of `repeats`, full-width vectors, 16 accumulators."""
    lanes = 4 * width()
    kernel = build("peak", _source(lanes), FIELDS, width())
    data = np.zeros((ACCUMULATORS + 1) * width(), np.float32)
    per_count = ACCUMULATORS * UNROLL * width()
    count, best = 1000, 0.0
    while True:
        arguments = kernel.arguments([(0, 0, 0, 0)], x=data.ctypes.data, count=count)
        start = time.perf_counter()
        kernel.keep.ctypes(arguments.ctypes.data, 0)
        seconds = time.perf_counter() - start
        if seconds * 1e3 < milliseconds:
            count *= 2
            continue
        best, repeats = max(best, count * per_count / seconds / 1e9), repeats - 1
        if repeats <= 0:
            return best


def bandwidth_gbs(repeats: int = 5, megabytes: int = 64) -> float:
    """GB/s at which one core reads an array that no near cache holds: NumPy's vectorised maximum, best of `repeats`."""
    data, times = np.ones(megabytes << 18, np.float32), []
    for _ in range(repeats):
        start = time.perf_counter()
        data.max()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times) / 1e9
