"""BCS, Blocked Compressed Storage (mapping 4.3, Fig. 4): a run of rows with identical columns stores them once."""

from dataclasses import dataclass

import numpy as np

from nbs_lib.formats.packed import Packed, alike, as_matrix, prefix


@dataclass(frozen=True, eq=False)
class BCS(Packed):
    """Run r: packed rows occurrence[r:r+2], columns compact_column from column_stride[r:r+2] (start and end).
    Packed row i: row row_order[i] of the weight, its weights from row_offset[i:i+2]."""

    compact_column: np.ndarray
    column_stride: np.ndarray
    occurrence: np.ndarray
    row_offset: np.ndarray
    row_order: np.ndarray

    @classmethod
    def pack(cls, weight: np.ndarray, reorder: bool = True) -> "BCS":
        """Pack a float32 weight (P, Q) or (P, Q, Kh, Kw), the latter seen as P x (Q*Kh*Kw). `reorder` makes rows with
        identical columns neighbours; runs go from most to fewest non-zeros a row, equal ones as they came."""
        kept = (matrix := as_matrix(weight)) != 0
        order = np.arange(len(matrix))
        if reorder:
            order = np.concatenate(sorted(alike(kept), key=lambda rows: -np.count_nonzero(kept[rows[0]])))
        matrix, kept = matrix[order], kept[order]
        starts = np.flatnonzero(np.append(True, (kept[1:] != kept[:-1]).any(axis=1)))
        lists = kept[starts]
        columns = np.nonzero(lists)[1].astype(np.int32)
        runs, offset = np.append(starts, len(matrix)).astype(np.int32), prefix(kept.sum(1))
        return cls(weight.shape, matrix[kept], columns, prefix(lists.sum(1)), runs, offset, order.astype(np.int32))

    def groups(self):
        """Each run as (rows of the weight, the columns they share, float32 block (rows, columns))."""
        rows = np.split(self.row_order, self.occurrence[1:-1])
        columns = np.split(self.compact_column, self.column_stride[1:-1])
        blocks = np.split(self.weights, self.row_offset[self.occurrence[1:-1]])
        return [(r, c, b.reshape(r.size, c.size)) for r, c, b in zip(rows, columns, blocks, strict=True)]

    @property
    def inverse_order(self) -> np.ndarray:
        """Where each row of the weight lies among the packed rows, int32 (P,)."""
        return np.argsort(self.row_order).astype(np.int32)
