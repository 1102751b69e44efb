"""Pooling steps: which windows the vectorised kernel can take, and the tables of those it cannot."""

import math

import numpy as np

from nbs_lib.compiler.emit import int32
from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.moves import locate
from nbs_lib.compiler.steps import Launch, Step, whole
from nbs_lib.kernels import pool as kernels
from nbs_lib.layers import Node


def _window(node: Node) -> list[tuple[int, int]]:
    """Kernel, stride, padding and dilation, per axis."""
    return [*(node.attrs[name] for name in ("kernel", "stride", "padding")), node.attrs.get("dilation", (1, 1))]


def zeros_around(node: Node, x: Planar, out: Planar, positive: bool) -> tuple[int, int] | None:
    """Rows and columns of zeros that the vectorised kernel needs around the image; None where it cannot be used.

    Zeros stand for nothing at all in an average, and in a maximum of what is never negative (`positive`), if every
    window sees a pixel too (a dilated one may not).
    """
    if node.op == "adaptive_avg_pool2d":
        return None
    kernel, stride, _, dilation = window = _window(node)
    axes = zip(*window, (x.H, x.W), (out.H, out.W), strict=True)
    zeros = tuple(max(p, (made - 1) * s + (k - 1) * d - p - (size - 1)) for k, s, p, d, size, made in axes)
    harmless = node.op != "max_pool2d" or not any(zeros) or (positive and dilation == (1, 1))
    return zeros if harmless and stride[1] in (1, 2) and math.prod(kernel) <= 25 else None


def _ranges(node: Node, axis: int, size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every output position along an axis: first input, end (inside the image), what an average divides by."""
    at = np.arange(out)
    if node.op == "adaptive_avg_pool2d":
        begin, end = at * size // out, -(-(at + 1) * size // out)
        return begin, end, end - begin
    kernel, stride, padding, dilation = (pair[axis] for pair in _window(node))
    first = at * stride - padding
    begin, end = np.where(first < 0, first % dilation, first), np.minimum(first + (kernel - 1) * dilation + 1, size)
    padded = np.minimum(first + kernel, size + padding) - first
    return begin, end, padded if node.attrs.get("count_include_pad") else end - begin


def pool(step: Step, threads: int, fast: bool, x: Planar, out: Planar) -> list[Launch]:
    """Any window; `fast`: by the vectorised kernel, around whose image there are zeros enough."""
    node = step.operation.node
    kind, tiles, scale = "max" if node.op == "max_pool2d" else "average", -(-out.W // out.width), np.zeros((1, 1))
    rows, columns = _ranges(node, 0, x.H, out.H), _ranges(node, 1, x.W, out.W)
    if kind == "average":
        sizes = np.outer(rows[2], columns[2])
        sizes = np.full_like(sizes, node.attrs.get("divisor") or sizes)
        scale = np.pad(1.0 / sizes, ((0, 0), (0, tiles * out.width - out.W)))
    fields = locate("x", x) | locate("out", out) | {"images": x.images, "rows": out.H, "columns": out.W}
    fields |= {"scale": step.hold(scale.astype(np.float32)), "scale_row": 4 * scale.shape[1]}
    if fast:
        size, stride, padding, dilation = _window(node)
        kh, kw = (np.arange(size[axis]) * dilation[axis] - padding[axis] for axis in (0, 1))
        kernel = kernels.rows_kernel(kind, *size, stride[1])
        fields |= {"taps": step.hold(int32(4 * np.add.outer(kh * x.row, kw).ravel()))}
        fields |= {"mask": step.hold(out.row_mask()), "x_row": 4 * stride[0] * x.row}
    else:
        kernel, dilation = kernels.window_kernel(kind), node.attrs.get("dilation", (1, 1))
        names = ("h_begin", "h_end", "w_begin", "w_end")
        fields |= {n: step.hold(int32(v)) for n, v in zip(names, (*rows[:2], *columns[:2]), strict=True)}
        fields |= {"dilation_h": dilation[0], "dilation_w": dilation[1]}
    return [Launch(kernel, whole(threads, tiles, x.C), fields)]


def mean(step: Step, threads: int, x: Planar, out: Flat) -> list[Launch]:
    """Of whole images."""
    factor = step.hold(np.array([1 / (x.H * x.W)], np.float32))
    fields = locate("x", x) | locate("out", out) | {"images": x.images, "factor": factor}
    return [Launch(kernels.mean_kernel(), whole(threads, x.vectors, x.C), fields)]
