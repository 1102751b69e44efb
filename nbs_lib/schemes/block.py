"""Block-punched pruning for CONV and block-based pruning for FC (mapping paper 4.1, Fig. 1 f, g)."""

from dataclasses import dataclass

import numpy as np

from nbs_lib.schemes.base import Scheme, Units, tiles

_CHUNK = 1 << 18  # weights whose greedy orders are computed together: about what a cache holds


@dataclass(frozen=True)
class _Blocked(Scheme):
    p: int
    q: int

    def __post_init__(self):
        self._check_sizes("p", "q")

    def blocks(self, shape, groups=1):
        return tiles(shape, self.p, self.q, groups)


class BlockPunched(_Blocked):
    """CONV: the p x q weights of a block at one (kh, kw) are a group; on a 1x1 layer that is a whole block."""

    name = "block_punched"

    def groups(self, shape, groups=1):
        place = np.arange(shape[2] * shape[3]).reshape(shape[2:])
        return self.blocks(shape, groups) * place.size + place

    def refuses(self, shape):
        return "" if len(shape) == 4 else "block_punched prunes CONV kernels; a matrix takes block"


class Block(_Blocked):
    """FC and 1x1 CONV: row segments and column segments of each p x q block are pruned independently.

    Projection is greedy over the whole layer: again and again the live row or column segment with the least remaining
    energy per remaining weight goes; of equal ones the earlier block's, rows before columns."""

    name = "block"

    def groups(self, shape, groups=1):
        """Both families, int (2, *shape): the row segment and the column segment of every weight."""
        ids = self.blocks(shape[:2], groups)
        row, column = np.divmod(ids, columns := ids[0, -1] + 1)
        families = np.arange(shape[0])[:, None] * columns + column, row * shape[1] + np.arange(shape[1])
        return np.stack(families).reshape(2, *shape)

    def refuses(self, shape):
        flat = len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))
        return "" if flat else "block prunes matrices and 1x1 CONV; other kernels take block_punched"

    def units(self, weight, groups=1):
        # A unit is one step of one block's own greedy order. Scores never fall along that order, so cutting all of them
        # at one score is exactly the layer-wide greedy, whose next step is always some block's next.
        weight = self.checked(weight, groups)
        P, Q = weight.shape[0] // groups, weight.shape[1]
        p, q = min(self.p, P), min(self.q, Q)
        rows, columns = -(-P // p), -(-Q // q)
        grid = weight.reshape(groups, P, Q).astype(np.result_type(weight, np.float32), copy=False)
        grid = np.pad(grid, ((0, 0), (0, rows * p - P), (0, columns * q - Q)), constant_values=np.nan)
        blocks = grid.reshape(groups, rows, p, columns, q).swapaxes(2, 3).reshape(-1, p, q)
        chunk = -(-_CHUNK // (p * q))
        orders = [_greedy_order(blocks[start : start + chunk]) for start in range(0, len(blocks), chunk)]
        score, size, gone = (np.concatenate(parts) for parts in zip(*orders, strict=True))

        def mask(keep: np.ndarray) -> np.ndarray:
            live = gone >= np.count_nonzero(~keep.reshape(score.shape), axis=1)[:, None]
            kept = (live[:, :p, None] & live[:, None, p:]).reshape(groups, rows, columns, p, q).swapaxes(2, 3)
            return kept.reshape(groups, rows * p, columns * q)[:, :P, :Q].reshape(weight.shape)

        return Units(score.ravel(), size.ravel(), mask)


def _greedy_order(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order inside each of B blocks, all at once. blocks: (B, p, q), NaN beyond the weight's edge.

    Returns, each (B, p + q): per step the score (running maximum of energy per weight; infinite when nothing is left)
    and the weights that go; per segment (rows, then columns) the step at which it goes."""
    B, p, q = blocks.shape
    inside = ~np.isnan(np.hstack([blocks[:, :, 0], blocks[:, 0]]))
    square = np.nan_to_num(np.square(blocks, dtype=np.float64), copy=False)
    energy = np.hstack([np.einsum("bpq->bp", square), np.einsum("bpq->bq", square)])
    energy[~inside] = np.inf
    height, width = inside[:, :p].sum(axis=1, dtype=np.int32), inside[:, p:].sum(axis=1, dtype=np.int32)
    count = np.hstack([inside[:, :p] * width[:, None], inside[:, p:] * height[:, None]])
    score, size, gone = np.empty((B, p + q)), np.empty((B, p + q), np.int32), np.full((B, p + q), p + q, np.int32)
    every, worst = np.arange(B), np.zeros(B)
    for step in range(p + q):
        mean = energy / np.maximum(count, 1)
        pick = mean.argmin(axis=1)
        worst = np.maximum(worst, mean[every, pick])
        score[:, step], size[:, step] = worst, np.maximum(count[every, pick], 0)
        gone[every, pick] = np.minimum(gone[every, pick], step)  # once all are gone, argmin picks the first again
        row, column = np.flatnonzero(pick < p), np.flatnonzero(pick >= p)
        energy[row, p:] -= square[row, pick[row]]
        count[row, p:] -= 1
        energy[column, :p] -= square[column, :, pick[column] - p]
        count[column, :p] -= 1
        energy[every, pick] = np.inf
    return np.where(size, score, np.inf), size, gone
