"""Where values lie in memory.

A `Planar` value is a batch of images, channel by channel. Rows are kept apart by zero columns and channels by zero
rows, shared between neighbours, so that a convolution's padding is simply there and a kernel may run over row ends.
Values that one stride-1 kernel reads and writes in step must have equal row lengths: they are `unite`d in a lattice.
A `Flat` value is one contiguous vector per image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LINE = 16  # float32 per cache line


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(eq=False)
class Planar:
    """A batch of C x H x W images (float32). Distances are in floats; `pad_h`, `pad_w` zeros lie around each image."""

    images: int
    C: int
    H: int
    W: int
    width: int  # floats per register
    pad_h: int = 0
    pad_w: int = 0
    buffer: np.ndarray = None
    shared: bool = False  # other values overwrite its zeros: they are written anew in every run

    def __post_init__(self):
        self.lattice = [self]  # all that are united: they share one list, and the distance of rows

    def need(self, pad_h: int, pad_w: int) -> None:
        """Ask for zeros around every image."""
        self.pad_h, self.pad_w = max(self.pad_h, pad_h), max(self.pad_w, pad_w)

    def unite(self, other: Planar) -> None:
        """Give both the same row distance; of equal height and width, also the same padding (so: the same plane)."""
        if self.lattice is not other.lattice:
            self.lattice += other.lattice
            for member in other.lattice:
                member.lattice = self.lattice

    @property
    def pads(self) -> tuple[int, int]:
        """Padding shared by all members of this size, so that a residual lies exactly like what it is added to."""
        same = [m for m in self.lattice if (m.H, m.W) == (self.H, self.W)]
        return max(m.pad_h for m in same), max(m.pad_w for m in same)

    def fix(self) -> None:
        """Settle the distances; after this nothing may be united or needed any more."""
        pad_h, pad_w = self.pads
        self.row = max(member.W + member.pad_w for member in self.lattice)
        # Every kernel writes whole registers: the last one of an image must end before the next channel.
        ends = max((self.H + pad_h) * self.row + pad_w, (self.H - 1) * self.row + round_up(self.W, self.width))
        lines = round_up(ends, LINE) // LINE
        self.plane = LINE * (lines | 1)  # an odd number of lines spreads channels over all cache sets
        self.image = self.C * self.plane
        self.guard = round_up((pad_h + 1) * self.row + pad_w + 4 * self.width + 64, LINE)
        self.vectors = -(-((self.H - 1) * self.row + self.W) // self.width)

    @property
    def key(self) -> tuple:
        """Values with equal keys have their zeros at the same places of their memory."""
        return (self.H, self.W, self.row, self.plane, self.guard)

    @property
    def floats(self) -> int:
        return self.images * self.image + 2 * self.guard

    @property
    def address(self) -> int:
        """Bytes: first pixel of the first channel of the first image."""
        return self.buffer.ctypes.data + 4 * self.guard

    def flat_mask(self) -> np.ndarray:
        """int32 per float of a plane's registers: -1 on pixels, 0 between and behind the rows."""
        position = np.arange(round_up(self.vectors, 4) * self.width)
        inside = (position % self.row < self.W) & (position < self.H * self.row)
        return -inside.astype(np.int32)

    def row_mask(self) -> np.ndarray:
        """The same for kernels that go row by row."""
        return -(np.arange(round_up(self.W, self.width)) < self.W).astype(np.int32)

    def view(self) -> np.ndarray:
        """The images as a NumPy array (N, C, H, W) into the buffer."""
        strides = tuple(4 * s for s in (self.image, self.plane, self.row, 1))
        shape = (self.images, self.C, self.H, self.W)
        return np.lib.stride_tricks.as_strided(self.buffer[self.guard :], shape, strides)


@dataclass(eq=False)
class Flat:
    """`images` vectors of `size` float32, `image` floats apart (a multiple of the linear kernel's lanes)."""

    images: int
    size: int
    buffer: np.ndarray = None
    shared: bool = False

    def fix(self) -> None:
        self.image = self.size if self.images == 1 else round_up(self.size, LINE)

    key = ()

    @property
    def floats(self) -> int:
        return (self.images - 1) * self.image + round_up(self.size, LINE) + LINE

    @property
    def address(self) -> int:
        return self.buffer.ctypes.data

    def view(self) -> np.ndarray:
        """The vectors as a NumPy array (images, size) into the buffer."""
        return np.lib.stride_tricks.as_strided(self.buffer, (self.images, self.size), (4 * self.image, 4))


def aligned(floats: int) -> np.ndarray:
    """Zeroed float32, starting at a cache line."""
    raw = np.zeros(floats + LINE, np.float32)
    skip = -(raw.ctypes.data // 4) % LINE
    return raw[skip : skip + floats]


def place(values: list[Planar | Flat], lives: dict[int, tuple[int, int]]) -> np.ndarray:
    """Give every value its part of one block of memory, the smaller of two greedy arrangements; returns the block.

    `lives` maps id(value) to (first, last) step: values that never meet may lie at the same place.
    """

    def arrange(order: Callable) -> list[tuple[int, int, Planar | Flat]]:
        """(begin, end, value), each as low as it fits beside those before it."""
        placed = []
        for value in sorted(values, key=order):
            (first, last), begin, size = lives[id(value)], 0, round_up(value.floats, LINE)
            for start, end, other in sorted(placed, key=lambda entry: entry[0]):
                if lives[id(other)][0] <= last and first <= lives[id(other)][1]:
                    if begin + size <= start:
                        break
                    begin = max(begin, end)
            placed.append((begin, begin + size, value))
        return placed

    def height(placed: list) -> int:
        return max((end for _, end, _ in placed), default=0)

    by_life = arrange(lambda value: lives[id(value)][0] - lives[id(value)][1])
    placed = min(arrange(lambda value: -value.floats), by_life, key=height)
    block = aligned(height(placed))
    for begin, end, value in placed:
        value.buffer = block[begin : begin + value.floats]
        value.shared = any(
            start < end and begin < stop and (start, other.key) != (begin, value.key) for start, stop, other in placed
        )
    return block
