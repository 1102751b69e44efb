"""Pruned weights -> groups of filters that share one list of kept columns (mapping 4.3: row reordering, BCS runs).

The structure is read from the zeros alone. Filters with identical columns go together wherever they lie; what is left
over is united with its neighbours where that pays: a united list computes some zeros, but loads each input once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from nbs_lib.kernels.vector import HOST_REGISTERS

# Register tile (filters -> vectors of pixels): accumulators + inputs + one weight fit in the registers.
TILES = {8: 3, 4: 6, 2: 8, 1: 16} if HOST_REGISTERS == 32 else {4: 3, 2: 4, 1: 8}
# Cycles per column and pixel vector, two FMAs and two loads a cycle: max(filters / 2, (1.5 + filters / vectors) / 2).
COST = {rows: max(rows / 2, (1.5 + rows / vectors) / 2) for rows, vectors in TILES.items()}
LARGEST = max(TILES)


@dataclass(eq=False)
class Segment:
    """Groups of equally many filters: `filters` (groups, rows), and per group its slice of `columns` and weights."""

    filters: np.ndarray  # int64 (groups, rows)
    begins: np.ndarray  # int32 (groups + 1,): prefix array into columns
    columns: np.ndarray  # int32: column numbers of the filters' own matrix
    weights: np.ndarray  # float32 (len(columns), rows)

    @property
    def rows(self) -> int:
        return self.filters.shape[1]


def group_filters(kept: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(filters, columns) pairs for `kept`, bool (P, columns). Sizes are those of TILES."""
    packed = np.packbits(kept, axis=1)
    _, pattern = np.unique(packed.view(f"V{packed.shape[1]}").ravel(), return_inverse=True)
    order = np.argsort(pattern, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(pattern[order])) + 1)
    groups, single = [], {size: [] for size in TILES}
    for run in runs:
        begin = 0
        for size in TILES:  # largest first
            while len(run) - begin >= size:
                members = run[begin : begin + size]
                (groups if size == LARGEST else single[size]).append((members, kept[members[0]]))
                begin += size
    for size in sorted(TILES)[:-1]:
        units = sorted(single[size], key=lambda unit: unit[0][0])
        while units:
            one = units.pop(0)
            if units:
                union = one[1] | units[0][1]
                apart = COST[size] * (one[1].sum() + units[0][1].sum())
                if COST[2 * size] * union.sum() <= apart:
                    target = single[2 * size] if 2 * size < LARGEST else groups
                    target.append((np.concatenate([one[0], units.pop(0)[0]]), union))
                    continue
            groups.append(one)
    return sorted(((f, np.flatnonzero(c)) for f, c in groups), key=lambda group: group[0][0])


def pack(matrix: np.ndarray) -> list[Segment]:
    """Segments, most filters per group first, that together compute `matrix` (P, columns) float32."""
    kept = matrix != 0
    groups = group_filters(kept)
    dense = COST[LARGEST] / LARGEST * kept.size
    if sum(COST[len(filters)] * len(columns) for filters, columns in groups) > dense:
        groups = group_filters(np.ones_like(kept))
    return [
        _segment(matrix, [group for group in groups if len(group[0]) == size])
        for size in TILES
        if any(len(group[0]) == size for group in groups)
    ]


def _segment(matrix: np.ndarray, groups: list) -> Segment:
    begins = np.cumsum([0] + [len(columns) for _, columns in groups]).astype(np.int32)
    weights = np.concatenate([matrix[np.ix_(filters, columns)].T for filters, columns in groups])
    return Segment(
        np.array([filters for filters, _ in groups]),
        begins,
        np.concatenate([columns for _, columns in groups]).astype(np.int32),
        np.ascontiguousarray(weights, np.float32),
    )


@cache
def cut(vectors: int, rows: int) -> tuple[tuple[int, int, int], ...]:
    """Cut a plane of `vectors` registers into tiles: (vectors per tile, tiles, first vector), cheapest in all."""
    sizes = [size for size in (16, 8, 6, 4, 3, 2, 1) if size <= TILES[rows]]
    price = {size: max(rows * size / 2, (1.5 * size + rows) / 2) + 0.5 for size in sizes}
    best = [(0.0, 0)]
    for total in range(1, vectors + 1):
        best.append(min((best[total - size][0] + price[size], size) for size in sizes if size <= total))
    counts: dict[int, int] = {}
    while vectors:
        size = best[vectors][1]
        counts[size] = counts.get(size, 0) + 1
        vectors -= size
    tiles, first = [], 0
    for size in sorted(counts, reverse=True):
        tiles.append((size, counts[size], first))
        first += size * counts[size]
    return tuple(tiles)


def share(weights: np.ndarray, threads: int) -> list[tuple[int, int]]:
    """Split len(weights) consecutive pieces into `threads` runs of about equal weight: (begin, end) each."""
    total = np.concatenate([[0.0], np.cumsum(weights)])
    ends = [int(np.searchsorted(total, total[-1] * (t + 1) / threads - 1e-9)) for t in range(threads)]
    ends[-1] = len(weights)
    return list(zip([0, *ends[:-1]], ends, strict=True))
