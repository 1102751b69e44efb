"""What a plan consists of: compiled steps, steps through PyTorch, and how work is shared among threads."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nbs_lib.compiler.fuse import Operation
from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.packing import LARGEST, share
from nbs_lib.kernels import conv
from nbs_lib.kernels.jit import Kernel

Ranges = list[tuple[int, int, int, int]]
HALF_L2 = 2**19  # bytes: what a block of tiles reads should stay near while all groups go over it
MOST_TILES = 16  # in a block
SHORT = 64  # kept columns per group up to which prefetching columns ahead comes too late


@dataclass(eq=False)
class Launch:
    """One kernel call per thread. `patch` names a graph value whose memory becomes field `x` at every run."""

    kernel: Kernel
    ranges: Ranges
    fields: dict[str, int]
    patch: str | None = None


@dataclass(frozen=True)
class Tiling:
    """How a convolution is computed; the structure of its weights is not in question. What `tune` looks for.

    `rows`: most filters that share a column list. `vectors`: most registers of pixels in a tile. `block`, `fetch`,
    `unroll`: as in `kernels.conv`; None: what fits the caches, by the constants above. `split` among threads: by
    "tiles", by "groups", or (None) what is more even. `dense`: compute the zeros, too; None: as the cost model says.
    """

    rows: int = LARGEST
    vectors: int = 16
    block: int | None = None
    fetch: str | None = None
    unroll: int = 1
    split: str | None = None
    dense: bool | None = None


@dataclass(eq=False)
class Tiled:
    """A convolution's groups of `rows` filters, not yet cut into tiles of pixels: `schedule` does that."""

    tiling: Tiling
    rows: int
    epilogue: tuple[str, ...]
    fields: dict[str, int]
    columns: np.ndarray  # kept columns per group: the work of one tile
    x: Planar
    out: Planar

    def launch(self, vectors: int, tiles: int, first: int, ranges: Ranges, reverse: bool) -> Launch:
        """`tiles` tiles of `vectors` registers from register `first` on, walked backwards if `reverse`."""
        size = 4 * self.out.width * vectors  # bytes
        start = 4 * self.out.width * first + (size * (tiles - 1) if reverse else 0)
        block = self.tiling.block or min(max(HALF_L2 // (self.x.C * size), 1), MOST_TILES)
        fetch = self.tiling.fetch
        if fetch is None:
            fetch = "columns" if self.columns.mean() > SHORT else "tile" if 4 * self.x.image > HALF_L2 else ""
        fields = self.fields | {"first": start, "step": -size if reverse else size, "block": block}
        kernel = conv.kernel(self.rows, vectors, self.epilogue, fetch, self.tiling.unroll)
        return Launch(kernel, ranges, fields)


@dataclass(eq=False)
class Step:
    """A step of the plan. `emit` is called once memory is placed; a step whose `chosen` is "torch" runs in PyTorch."""

    operation: Operation
    reads: list[Planar | Flat]
    writes: list[Planar | Flat]
    emit: Callable[[], list[Launch] | list[Tiled]] | None = None
    exports: dict[str, Planar | Flat] = field(default_factory=dict)  # values PyTorch reads: name -> where they lie
    tiling: Tiling | None = None  # of a convolution
    fills: bool = False  # writes the zeros between the rows of its result
    kernel: str = ""
    tile: str = ""
    launched: tuple[int, int] = (0, 0)  # its first launch in the program, and the end of them
    kernels: list[Kernel] = field(default_factory=list)  # all that compute it
    chosen: str = "copy"  # "sparse", "dense", "torch", "copy"
    why: str = ""
    cycles: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the dense and the sparse kernel, by the model
    computed_macs: int = 0
    weight_bytes: int = 0
    index_bytes: int = 0
    kept: list = field(default_factory=list)

    def hold(self, array: np.ndarray) -> int:
        """The address of the array's contents; the step keeps them alive."""
        self.kept.append(np.ascontiguousarray(array))
        return self.kept[-1].ctypes.data


def whole(threads: int, tiles: int, groups: int) -> Ranges:
    """Every thread takes a run of groups (channels) of equal work, and all tiles."""
    return [(0, tiles, begin, end) for begin, end in share([1.0] * groups, threads)]
