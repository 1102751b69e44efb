"""What a pruned layer's structure costs, without its weights: a scheme's own projection of a small random sample.

Which columns filters share decides the speed, and that follows from scheme, rate and shape alone. The sample goes
through the compiler's packing; sizes are scaled to the layer. Nothing is compiled and nothing is timed.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nbs_lib.compiler.packing import COST, group_filters, linear_cost, pack_filters, pack_neighbours
from nbs_lib.kernels import jit
from nbs_lib.kernels import linear as linear_kernels
from nbs_lib.layers import LayerSpec
from nbs_lib.schemes import Choice, Scheme

SIDE = 64  # filters and channels of a sample, at least, where the layer has as many


@dataclass(frozen=True)
class Structure:
    """Shares of the layer's P * Q * Kh * Kw weights, and how they hang together."""

    computed: float  # weights that the kernels multiply, zeros they cannot skip included
    lists: tuple[tuple[int, float], ...]  # (filters that share one, columns of all such lists per weight of the layer)
    rows: float  # filters per column list
    columns: float  # kept columns per list, of all Q * Kh * Kw


def dead_share(choice: Choice, P: int, Q: int, taps: int) -> float:
    """The share of filters, or channels, that are likely to go as a whole since no group of theirs is left; 1 where the
    scheme itself removes whole ones."""
    scheme, rate = choice.scheme, choice.rate
    if scheme.name in ("filter", "channel"):
        return 1.0
    if scheme.name == "pattern":
        rate, taps = max(rate / scheme.min_rate, 1.0), 1
    groups = taps * min(-(-Q // getattr(scheme, "q", 1)), -(-P // getattr(scheme, "p", 1)))
    return (1 - 1 / rate) ** groups


def _mask(scheme: Scheme, rate: float, P: int, Q: int, kernel: tuple[int, ...] = ()) -> tuple[np.ndarray, float]:
    """The mask of a random weight cut down to a sample (P', Q', *kernel), and what its kept share is to be scaled by to
    meet the rate: a sample of few groups may miss it."""
    p, q = getattr(scheme, "p", 1), getattr(scheme, "q", 1)
    wide = SIDE if kernel else 8 * SIDE  # rows of a fully connected layer are cut into registers
    shape = (min(P, max(SIDE, 2 * p)), min(Q, max(wide, 8 * q)), *kernel)
    seed = zlib.crc32(f"{scheme} {rate} {shape}".encode())
    weight = np.random.default_rng(seed).standard_normal(shape, np.float32)
    mask = scheme.project(weight, rate)
    return mask, mask.size / max(mask.sum(), 1) / max(rate, scheme.min_rate)


@lru_cache(maxsize=4096)
def conv(scheme: Scheme | None, rate: float, P: int, Q: int, kernel: tuple[int, int]) -> Structure:
    """Of a convolution of P filters and Q channels per group; scheme None: dense."""
    taps, largest = kernel[0] * kernel[1], max(COST)
    rows = min(largest, P)
    dense = Structure(1.0, ((largest, 1 / largest),), rows, 1.0)
    if scheme is None or rate == 1:
        return dense
    mask, scale = _mask(scheme, rate, P, Q, kernel)
    groups = group_filters(mask.reshape(len(mask), -1))
    width = mask.shape[1] * taps
    sizes = np.array([(len(filters), len(columns)) for filters, columns in groups], float)
    work = (np.array([COST[int(size)] for size in sizes[:, 0]]) * sizes[:, 1]).sum() / mask.size * scale
    if work >= COST[largest] / largest:
        return dense
    computed = min((sizes[:, 0] * sizes[:, 1]).sum() / mask.size * scale, 1.0)
    lists = [(int(size), sizes[sizes[:, 0] == size, 1].sum() / mask.size * scale) for size in np.unique(sizes[:, 0])]
    return Structure(computed, tuple(lists), len(mask) / len(sizes), min(sizes[:, 1].mean() / width * scale, 1.0))


@lru_cache(maxsize=4096)
def linear(scheme: Scheme | None, rate: float, P: int, Q: int) -> tuple[float, float, bool]:
    """Of a fully connected layer: (weights computed, as a share; bytes of weights and index; whether every filter has
    its own list), whichever way the compiler finds faster."""
    lanes, width, size = linear_kernels.lanes(), jit.width(), P * Q
    ways = [(linear_cost(size, 4 * size // lanes, lanes), 1.0, 4 * size + 4 * size / lanes, False)]
    if scheme is not None and rate > 1:
        mask, scale = _mask(scheme, rate, P, Q)
        matrix = mask.astype(np.float32)
        share = min(pack_neighbours(matrix, lanes)[2].size / mask.size * scale, 1.0)
        read = 4 * share * size * (1 + 1 / lanes)
        ways = [(linear_cost(int(share * size), int(4 * share * size / lanes), lanes), share, read, False)]
        if Q <= 2**16 and (own := pack_filters(matrix, width)):
            share = own[2].size / mask.size * scale
            ways.append((linear_cost(int(share * size), int(2 * share * size), None), share, 6 * share * size, True))
    return min(ways, key=lambda way: way[0])[1:]


def shrunk(layer: LayerSpec, choice: Choice | None) -> tuple[int, int, Scheme | None, float]:
    """(P, Q, scheme, rate) of what is left: whole filters and channels leave a layer and what remains of it is dense,
    (None, 1). Rates are rounded so that samples are shared."""
    P, Q = layer.P, layer.Q
    if choice and choice.scheme.name == "filter":
        return max(round(P / choice.rate), 1), Q, None, 1.0
    if choice and choice.scheme.name == "channel":
        return P, max(round(Q / choice.rate), 1), None, 1.0
    return (P, Q, choice.scheme, round(choice.rate, 2)) if choice else (P, Q, None, 1.0)
