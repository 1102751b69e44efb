"""Cuts convolutions into tiles and shares them among threads (mapping 4.3: load balance)."""

from itertools import accumulate, pairwise

import numpy as np

from nbs_lib.compiler.layout import Planar
from nbs_lib.compiler.moves import clear
from nbs_lib.compiler.packing import cut, share
from nbs_lib.compiler.steps import Launch, Ranges, Step, Tiled


def schedule(step: Step, threads: int, reverse: bool) -> list[Launch]:
    """A step's launches. `reverse` walks backwards, over what the step before has just left in the cache."""
    launches, tiles = [], []
    for part in step.emit() if step.emit else []:
        if not isinstance(part, Tiled):
            launches.append(part)
            continue
        pieces = cut(part.out.vectors, part.rows, part.tiling.vectors)
        shares = balanced(threads, pieces, part.columns, part.tiling.split)
        for (vectors, count, first), ranges in zip(pieces, shares, strict=True):
            if reverse:  # a thread keeps its pixels, which the step before has left in its own core's cache
                ranges = [(count - end, count - begin, *groups) for begin, end, *groups in ranges]
            launches.append(part.launch(vectors, count, first, ranges, reverse))
            tiles.append(f"{part.rows}x{vectors}")
    step.kernels = list(dict.fromkeys(launch.kernel for launch in launches))
    if step.kernels and step.kernel not in ("copy", "phases"):  # moves keep the name of what they are for
        step.kernel = step.kernels[0].name
    step.tile = " ".join(dict.fromkeys(tiles)) or step.tile
    shared = [x for x in step.writes if launches and x.shared and isinstance(x, Planar)]
    return [clear(threads, x, step.fills) for x in shared] + (launches[::-1] if reverse else launches)


def balanced(threads: int, pieces, columns: np.ndarray, split: str | None = None) -> list[Ranges]:
    """One range list per piece (vectors, tiles, first) of a convolution, `split` by "tiles", by "groups" or (None)
    whichever is more even.

    `columns`: kept columns per group, the work of one tile.
    """
    loads, counts = [0] * threads, []
    for vectors, tiles, _ in pieces:
        counts.append([0] * threads)
        for _ in range(tiles):
            lightest = loads.index(min(loads))
            counts[-1][lightest] += 1
            loads[lightest] += vectors
    shares = share(columns + 1.0, threads)
    heaviest = max((columns[begin:end] + 1.0).sum() for begin, end in shares) / (columns + 1.0).sum()
    by_tile = split == "tiles" or split is None and max(loads) / sum(loads) <= 1.02 * heaviest
    if not by_tile:
        return [[(0, tiles, *groups) for groups in shares] for _, tiles, _ in pieces]
    ends = ((0, *accumulate(count)) for count in counts)
    return [[(begin, end, 0, len(columns)) for begin, end in pairwise(tiles)] for tiles in ends]
