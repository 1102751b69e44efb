"""Pooling steps: which windows the vectorised kernel can take, and the tables of those it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbs_lib.compiler.emit import int32
from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.steps import Launch, Step, whole
from nbs_lib.kernels import pool as kernels


@dataclass(frozen=True)
class Window:
    """A pooling window, per axis. `output` is set for adaptive pooling, whose windows come from it alone."""

    operation: str  # "max" or "average"
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    output: tuple[int, int] | None = None
    count_padding: bool = True
    divisor: int | None = None

    @classmethod
    def of(cls, node) -> Window:
        attrs = node.attrs
        if node.op == "adaptive_avg_pool2d":
            return cls("average", output=tuple(node.shape[2:]))
        common = {name: attrs[name] for name in ("kernel", "stride", "padding")}
        if node.op == "max_pool2d":
            return cls("max", dilation=attrs["dilation"], **common)
        return cls("average", count_padding=attrs["count_include_pad"], divisor=attrs["divisor"], **common)

    @property
    def regular(self) -> bool:
        return self.output is None and self.stride[1] in (1, 2) and np.prod(self.kernel) <= 25

    def overhang(self, size, out) -> tuple[int, int]:
        """Rows and columns of zeros the windows of all outputs need around the image."""
        if self.output is not None:
            return 0, 0
        last = [
            (out[a] - 1) * self.stride[a] + (self.kernel[a] - 1) * self.dilation[a] - self.padding[a] for a in (0, 1)
        ]
        return tuple(max(self.padding[a], last[a] - (size[a] - 1)) for a in (0, 1))

    def limits(self, axis: int, size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
        """First input and end (exclusive, inside the image) of every output position along an axis."""
        at = np.arange(out)
        if self.output is not None:
            return at * size // out, -(-(at + 1) * size // out)
        d = self.dilation[axis]
        begin = at * self.stride[axis] - self.padding[axis]
        end = np.minimum(begin + (self.kernel[axis] - 1) * d + 1, size)
        return np.where(begin < 0, begin + -(begin // d) * d, begin), end

    def counts(self, axis: int, size: int, out: int) -> np.ndarray:
        """How many inputs an average divides by along an axis."""
        if self.output is not None or not self.count_padding:
            begin, end = self.limits(axis, size, out)
            return end - begin
        begin = np.arange(out) * self.stride[axis] - self.padding[axis]
        return np.minimum(begin + self.kernel[axis], size + self.padding[axis]) - begin

    def scale(self, size, out) -> np.ndarray:
        """Reciprocal window sizes, float32 (H, W) of the output."""
        counts = np.outer(*(self.counts(axis, size[axis], out[axis]) for axis in (0, 1)))
        return (1.0 / (np.full_like(counts, self.divisor) if self.divisor else counts)).astype(np.float32)


def pool(step: Step, threads: int, window: Window, fast: bool, x: Planar, out: Planar) -> list[Launch]:
    size, made = (x.H, x.W), (out.H, out.W)
    fields = {
        "x": x.address, "out": out.address, "images": x.images, "x_image": 4 * x.image, "out_image": 4 * out.image,
        "x_plane": 4 * x.plane, "out_plane": 4 * out.plane, "rows": out.H, "out_row": 4 * out.row,
    }  # fmt: skip
    tiles = -(-out.W // out.width)
    scale = window.scale(size, made) if window.operation == "average" else np.zeros((1, 1), np.float32)
    if fast:
        kh, kw = np.arange(window.kernel[0]) * window.dilation[0], np.arange(window.kernel[1]) * window.dilation[1]
        taps = (kh[:, None] - window.padding[0]) * x.row + kw - window.padding[1]
        scale = (
            np.pad(scale, ((0, 0), (0, tiles * out.width - scale.shape[1]))) if window.operation == "average" else scale
        )
        kernel = kernels.rows_kernel(window.operation, *window.kernel, window.stride[1])
        fields |= {
            "taps": step.hold(int32(4 * taps.ravel())), "mask": step.hold(out.row_mask()),
            "x_row": 4 * window.stride[0] * x.row,
        }  # fmt: skip
    else:
        kernel = kernels.window_kernel(window.operation)
        rows, columns = window.limits(0, x.H, out.H), window.limits(1, x.W, out.W)
        names = ("h_begin", "h_end", "w_begin", "w_end")
        fields |= {n: step.hold(int32(v)) for n, v in zip(names, (*rows, *columns), strict=True)}
        fields |= {"dilation_h": window.dilation[0], "dilation_w": window.dilation[1]}
        fields |= {"columns": out.W, "x_row": 4 * x.row}
    scale = np.ascontiguousarray(scale, np.float32)
    fields |= {"scale": step.hold(scale), "scale_row": 4 * scale.shape[1]}
    return [Launch(kernel, whole(threads, tiles, x.C), fields)]


def mean(step: Step, threads: int, x: Planar, out: Flat) -> list[Launch]:
    kernel = kernels.mean_kernel()
    fields = {
        "x": x.address, "out": out.address, "factor": step.hold(np.array([1 / (x.H * x.W)], np.float32)),
        "images": x.images, "x_image": 4 * x.image, "out_image": 4 * out.image, "x_plane": 4 * x.plane, "out_plane": 4,
    }  # fmt: skip
    return [Launch(kernel, whole(threads, x.vectors, x.C), fields)]
