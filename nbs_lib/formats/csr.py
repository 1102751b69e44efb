"""CSR, the baseline BCS is compared with: every non-zero carries its own column index."""

from dataclasses import dataclass

import numpy as np

from nbs_lib.formats.packed import Packed, as_matrix, prefix


@dataclass(frozen=True, eq=False)
class CSR(Packed):
    """Row p: weights and columns row_offset[p] up to row_offset[p+1]."""

    column_index: np.ndarray
    row_offset: np.ndarray

    @classmethod
    def pack(cls, weight: np.ndarray) -> "CSR":
        """Pack a float32 weight (P, Q) or (P, Q, Kh, Kw), the latter seen as P x (Q*Kh*Kw)."""
        kept = (matrix := as_matrix(weight)) != 0
        return cls(weight.shape, matrix[kept], np.nonzero(kept)[1].astype(np.int32), prefix(kept.sum(1)))

    def groups(self):
        """Each row as (its number (1,), its columns, float32 block (1, columns))."""
        for row, (a, b) in enumerate(zip(self.row_offset[:-1], self.row_offset[1:], strict=True)):
            yield np.array([row]), self.column_index[a:b], self.weights[None, a:b]
