"""What a plan consists of: compiled steps, steps through PyTorch, and how work is shared among threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nbs_lib.compiler.fuse import Operation
from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.packing import share
from nbs_lib.kernels.jit import Kernel

Ranges = list[tuple[int, int, int, int]]


@dataclass(eq=False)
class Launch:
    """One kernel call per thread. `patch` names a graph value whose memory becomes field `x` at every run."""

    kernel: Kernel
    ranges: Ranges
    fields: dict[str, int]
    patch: str | None = None


@dataclass(eq=False)
class Step:
    """A step of the plan. `emit` is called once memory is placed; `call` instead runs the operation through PyTorch."""

    operation: Operation
    reads: list[Planar | Flat]
    writes: list[Planar | Flat]
    emit: Callable[[], list[Launch]] | None = None
    exports: dict[str, Planar | Flat] = field(default_factory=dict)  # values PyTorch reads: name -> where they lie
    kernel: str = ""
    tile: str = ""
    path: str = "copy"  # "sparse", "dense", "torch", "copy"
    why: str = ""
    nnz: int = 0
    computed_macs: int = 0
    weight_bytes: int = 0
    index_bytes: int = 0
    keep: list = field(default_factory=list)  # arrays whose addresses the launches hold


def whole(threads: int, tiles: int, groups: int) -> Ranges:
    """Every thread takes a run of groups (channels) of equal work, and all tiles."""
    return [(0, tiles, begin, end) for begin, end in share([1.0] * groups, threads)]


def balanced(threads: int, pieces: tuple[tuple[int, int, int], ...], columns) -> list[Ranges]:
    """One range list per piece (vectors, tiles, first) of a convolution: cut by tiles or by groups, whichever is more even.

    `columns`: kept columns per group, the work of one tile.
    """
    total = sum(vectors * tiles for vectors, tiles, _ in pieces)
    by_tile = [[0] * threads for _ in pieces]
    for n, (_, tiles, _) in enumerate(pieces):
        for extra in range(tiles):
            loads = [sum(p[0] * by_tile[i][t] for i, p in enumerate(pieces)) for t in range(threads)]
            by_tile[n][loads.index(min(loads))] += 1
    worst_tile = max(sum(p[0] * by_tile[i][t] for i, p in enumerate(pieces)) for t in range(threads)) / total
    shares = share(columns + 1.0, threads)
    worst_group = max((columns[b:e] + 1.0).sum() for b, e in shares) / (columns + 1.0).sum()
    ranges = []
    for counts, (_, tiles, _) in zip(by_tile, pieces, strict=True):
        if worst_tile <= worst_group * 1.02:
            ends = [sum(counts[: t + 1]) for t in range(threads)]
            ranges.append([(end - n, end, 0, len(columns)) for end, n in zip(ends, counts, strict=True)])
        else:
            ranges.append([(0, tiles, begin, end) for begin, end in shares])
    return ranges
