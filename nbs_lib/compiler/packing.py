"""Pruned weights -> groups of filters that share one list of kept columns (mapping 4.3: row reordering, BCS runs).

The structure is read from the zeros alone. Filters with identical columns go together wherever they lie; what is left
over is united with its neighbours where that pays: a united list computes some zeros, but loads each input once.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby

import numpy as np

from nbs_lib.formats.packed import alike, prefix
from nbs_lib.kernels.vector import HOST_REGISTERS

# Register tile (filters -> vectors of pixels): accumulators + inputs + one weight fit in the registers.
TILES = {8: 3, 4: 6, 2: 8, 1: 16} if HOST_REGISTERS == 32 else {4: 3, 2: 4, 1: 8}
# Cycles per column and pixel vector, fitted to measurements: two FMAs a cycle, but the load they share comes from the
# second cache, often straddles two lines and takes more than a cycle.
COST = {rows: max(rows / 2, 1.3 + rows / 10) for rows in TILES}
LARGEST = max(TILES)
# Fully connected layers: cycles to gather one input, bytes a near cache holds, bytes a cycle brings from memory.
GATHER, NEAR, BYTES_PER_CYCLE = 0.9, 1 << 20, 6.0


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


def group_filters(kept: np.ndarray, largest: int = LARGEST) -> list[tuple[np.ndarray, np.ndarray]]:
    """(filters, columns) pairs for `kept`, bool (P, columns). Sizes are those of TILES, up to `largest`."""
    units, groups = {size: [] for size in TILES if size <= largest}, []
    for run in alike(kept):
        begin = 0
        for size in units:  # largest first
            while len(run) - begin >= size:
                members = run[begin : begin + size]
                units[size].append((members, kept[members[0]]))
                begin += size
    for size in sorted(units)[:-1]:
        left = sorted(units[size], key=lambda unit: unit[0][0])
        while left:
            filters, columns = left.pop(0)
            if left:
                union = columns | left[0][1]
                apart = COST[size] * (columns.sum() + left[0][1].sum())
                if COST[2 * size] * union.sum() <= apart:
                    units[2 * size].append((np.concatenate([filters, left.pop(0)[0]]), union))
                    continue
            groups.append((filters, columns))
    groups += units[max(units)]
    return sorted(((f, np.flatnonzero(c)) for f, c in groups), key=lambda group: group[0][0])


def pack(matrix: np.ndarray, largest: int = LARGEST, dense: bool | None = None) -> tuple[list[Segment], np.ndarray]:
    """Segments, most filters per group first, that together compute `matrix` (P, columns) float32.

    `dense`: compute all zeros (None: if the cost model finds that faster). Also gives the model's cycles per pixel
    register, float64 (dense, sparse).
    """
    kept = matrix != 0
    sparse, full = group_filters(kept, largest), group_filters(np.ones_like(kept), LARGEST)
    costs = np.array([cost(full), cost(sparse)])
    groups = full if dense or (dense is None and costs[1] > costs[0]) else sparse
    segments = []
    for _, equal in groupby(sorted(groups, key=lambda group: -len(group[0])), lambda group: len(group[0])):
        filters, columns = zip(*equal, strict=True)
        weights = np.concatenate([matrix[np.ix_(f, c)].T for f, c in zip(filters, columns, strict=True)])
        lists, begins = np.concatenate(columns).astype(np.int32), prefix([len(c) for c in columns])
        segments.append(Segment(np.array(filters), begins, lists, np.ascontiguousarray(weights, np.float32)))
    return segments, costs


def cost(groups: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Cycles per pixel register of (filters, columns) pairs, on a machine of two FMAs and two loads a cycle; storing
    the result of a filter takes one more."""
    return sum(COST[len(filters)] * len(columns) + len(filters) for filters, columns in groups)


def pack_neighbours(matrix: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(begins, columns, weights) of groups of `lanes` neighbouring filters that share a column list.

    `begins`: prefix array into `columns`, int64; `weights`: float32 (len(columns), lanes).
    """
    blocks = np.pad(matrix, ((0, -len(matrix) % lanes), (0, 0))).reshape(-1, lanes, matrix.shape[1])
    kept = (blocks != 0).any(axis=1)
    by_column = blocks.transpose(0, 2, 1)
    weights = np.ascontiguousarray(by_column if kept.all() else by_column[kept])
    return prefix(kept.sum(axis=1)), np.nonzero(kept)[1], weights.reshape(-1, lanes)


def pack_filters(matrix: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(begins, columns, weights) of filters with a column list each, `lanes` of them side by side.

    None for too many columns, or hardly any zeros. `columns`: uint16, `weights`: float32, both (registers, lanes
    filters, lanes); `begins`: prefix array into registers. A group is as long as its longest filter; zeros of column 0
    fill the others up.
    """
    if matrix.shape[1] > 2**16 or np.count_nonzero(matrix) > 0.7 * matrix.size:
        return None
    rows, kept = np.nonzero(matrix)
    counts = np.bincount(rows, minlength=len(matrix) + -len(matrix) % lanes)
    begins = prefix(-(-counts.reshape(-1, lanes).max(axis=1) // lanes))
    place = np.arange(len(rows)) - prefix(counts)[rows]  # of a weight in its filter
    where = (begins[rows // lanes] + place // lanes, rows % lanes, place % lanes)
    columns, weights = (np.zeros((begins[-1], lanes, lanes), dtype) for dtype in (np.uint16, np.float32))
    columns[where], weights[where] = kept, matrix[rows, kept]
    return begins, columns, weights


def linear_cost(weights: int, index_bytes: int, lanes: int | None) -> float:
    """Cycles of one image: those of the multiply-adds (`lanes` filters share a list; None: each gathers by its own), or
    of reading from memory what no near cache holds."""
    size = 4 * weights + index_bytes
    return max(weights * (1.3 / lanes if lanes else GATHER), (size > NEAR) * size / BYTES_PER_CYCLE)


def tile_cycles(vectors: int, rows: int) -> float:
    """Cycles of a column of a tile: two FMAs or two loads each, and something to begin with."""
    return max(rows * vectors / 2, (1.5 * vectors + rows) / 2) + 0.5


@cache
def cut(vectors: int, rows: int, widest: int = 16) -> tuple[tuple[int, int, int], ...]:
    """Cut a plane of `vectors` registers into tiles: (vectors per tile, tiles, first vector), cheapest in all."""
    sizes = [size for size in (16, 8, 6, 4, 3, 2, 1) if size <= min(TILES[rows], widest)]
    price = {size: tile_cycles(size, rows) for size in sizes}
    best = [(0.0, 0)]
    for total in range(1, vectors + 1):
        best.append(min((best[total - size][0] + price[size], size) for size in sizes if size <= total))
    counts: Counter[int] = Counter()
    while vectors:
        size = best[vectors][1]
        counts[size] += 1
        vectors -= size
    tiles = sorted(counts.items(), reverse=True)
    firsts = accumulate((size * count for size, count in tiles), initial=0)
    return tuple((*tile, first) for tile, first in zip(tiles, firsts, strict=False))


def share(weights: np.ndarray, threads: int) -> list[tuple[int, int]]:
    """Split len(weights) consecutive pieces into `threads` runs of about equal weight: (begin, end) each."""
    total = np.concatenate([[0.0], np.cumsum(weights)])
    ends = [int(np.searchsorted(total, total[-1] * (t + 1) / threads - 1e-9)) for t in range(threads)]
    ends[-1] = len(weights)
    return list(zip([0, *ends[:-1]], ends, strict=True))
