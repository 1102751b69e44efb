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

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain contiguous arrays by name, `shape` (int64) among them: what safetensors or `np.savez` take."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"shape": np.array(self.shape, np.int64)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Packed":
        """The inverse of `to_arrays`. ValueError naming the first array that is missing or does not fit the others."""
        for name in (names := [f.name for f in fields(cls)]):
            array, dtype = arrays.get(name), {"shape": np.int64, "weights": np.float32}.get(name, np.int32)
            if array is None or array.ndim != 1 or array.dtype != dtype:
                raise ValueError(f"Expected {name} to be 1-D {dtype.__name__}. Got {array!r}.")
        packed = cls(tuple(arrays["shape"].tolist()), *(arrays[name] for name in names[1:]))
        packed.expect("shape", "to be 2 or 4 positive sizes", len(packed.shape) in (2, 4) and min(packed.shape) > 0)
        packed.check()
        packed.expect("weights", "to be non-zeros", packed.nnz == packed.row_offset[-1] and packed.weights.all())
        return packed

    def expect(self, name: str, rule: str, holds) -> None:
        if not holds:
            raise ValueError(f"Expected {name} {rule}. Got {getattr(self, name)!r}.")

    def expect_lists(self, starts: str, columns: str, count: int) -> None:
        start, column, width = getattr(self, starts), getattr(self, columns), math.prod(self.shape[1:])
        ends = start.size == count + 1 and start[0] == 0 and start[-1] == column.size
        self.expect(starts, f"to go 0 to {column.size} in {count} steps", ends and (start[1:] >= start[:-1]).all())
        rises = np.diff(column, prepend=-1) > 0
        rises[start[start < column.size]] = True
        rises &= (column >= 0) & (column < width)
        self.expect(columns, f"to rise within each row and to lie in 0..{width - 1}", rises.all())


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
