"""What every packed format is: plain arrays that give the weight back and count their own bytes."""

import math
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, eq=False)
class Packed:
    """`shape` of the dense weight, `weights` float32 (nnz,) row by row; the index arrays, int32, are a subclass's.
    What is not `w == 0` is kept bit for bit, NaN too; -0.0 comes back as +0.0."""

    shape: tuple[int, ...]
    weights: np.ndarray

    nnz = property(lambda self: self.weights.size)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes: `dense`, `weights`, each index array (0 for a row order that moves nothing), `index`, `total`."""
        index = {f.name: getattr(self, f.name).nbytes for f in fields(self)[2:]}
        if "row_order" in index and (np.diff(self.row_order) == 1).all():
            index["row_order"] = 0
        values, extra = self.weights.nbytes, sum(index.values())
        return {"dense": 4 * math.prod(self.shape), "weights": values, **index, "index": extra, "total": values + extra}

    def unpack(self) -> np.ndarray:
        """The dense float32 weight in its own shape and row order, bit-exact but for -0.0."""
        weight = np.zeros(self.shape, np.float32)
        for rows, columns, block in self.groups():
            weight.reshape(len(weight), -1)[np.ix_(rows, columns)] = block
        return weight


def as_matrix(weight: np.ndarray) -> np.ndarray:
    """A float32 weight (P, Q) or (P, Q, Kh, Kw) as (P, Q*Kh*Kw). ValueError for anything else, empty or above 2^31."""
    if weight.dtype != np.float32 or weight.ndim not in (2, 4) or not 0 < weight.size < 2**31:
        raise ValueError(f"Expected a float32 weight (P, Q) or (P, Q, Kh, Kw). Got {weight.dtype} {weight.shape}.")
    return weight.reshape(len(weight), -1)


def alike(kept: np.ndarray) -> list[np.ndarray]:
    """The rows of `kept`, bool (P, columns), grouped where identical: rising row numbers, int64. By first row."""
    groups: dict[bytes, list[int]] = {}
    for row, bits in enumerate(np.packbits(kept, axis=1)):
        groups.setdefault(bits.tobytes(), []).append(row)
    return [np.array(rows) for rows in groups.values()]


def prefix(counts: np.ndarray) -> np.ndarray:
    """Counts -> int32 prefix array that starts at 0 and ends at their sum."""
    return np.append(0, np.cumsum(counts)).astype(np.int32)
