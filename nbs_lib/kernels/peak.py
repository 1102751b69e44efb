"""What one core can do at best: the FMA peak that every "share of peak" is a share of, and bytes from memory."""

import timeit

import numpy as np

from nbs_lib.kernels.jit import build, width

ACCUMULATORS, UNROLL = 16, 4


def peak_gmacs(repeats: int = 5, milliseconds: float = 20.0) -> float:
    """Multiply-adds of one core in GMAC/s (float32): best of `repeats`, full-width vectors, 16 accumulators."""
    text = ["    v = load(x)", *[f"    a{i} = load(x)" for i in range(ACCUMULATORS)], "    for n in range(count):"]
    text += [f"        a{i} = fma(v, v, a{i})" for _ in range(UNROLL) for i in range(ACCUMULATORS)]
    text += [f"    store(x + {4 * width() * (i + 1)}, a{i})" for i in range(ACCUMULATORS)]
    kernel = build("peak", "x count", "\n".join(text), width())
    data = np.zeros((ACCUMULATORS + 1) * width(), np.float32)
    per_count = ACCUMULATORS * UNROLL * width()

    def seconds(count: int, repeats: int = 1) -> float:
        arguments = kernel.arguments([(0, 0, 0, 0)], x=data.ctypes.data, count=count)
        return min(timeit.repeat(lambda: kernel.keep.ctypes(arguments.ctypes.data, 0), number=1, repeat=repeats))

    count = 1000
    while seconds(count) * 1e3 < milliseconds:
        count *= 2
    return count * per_count / seconds(count, repeats) / 1e9


def bandwidth_gbs(repeats: int = 5, megabytes: int = 64) -> float:
    """GB/s at which one core reads an array that no near cache holds: NumPy's vectorised maximum, best of `repeats`."""
    data = np.ones(megabytes << 18, np.float32)
    return data.nbytes / min(timeit.repeat(data.max, number=1, repeat=repeats)) / 1e9
