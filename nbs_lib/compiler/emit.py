"""Steps -> launches: packs weights, writes the structure tables and fills in addresses. Runs once memory is placed."""

from __future__ import annotations

import math

import numpy as np

from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.packing import cut, pack, share
from nbs_lib.compiler.steps import Launch, Step, balanced, whole
from nbs_lib.kernels import conv as conv_kernels
from nbs_lib.kernels import copy as copy_kernels
from nbs_lib.kernels import depthwise as depthwise_kernels
from nbs_lib.kernels import linear as linear_kernels

FAR = 512 * 1024  # bytes: inputs beyond this do not stay in the near caches, so short column lists prefetch


def phases(layer) -> dict[tuple[int, int], int]:
    """Phases (tap position modulo stride) a strided layer reads -> their number."""
    taps = [
        sorted({k * d % s for k in range(n)}) for n, d, s in zip(layer.shape[2:], layer.dilation, layer.stride, strict=True)
    ]
    return {(h, w): i for i, (h, w) in enumerate((h, w) for h in taps[0] for w in taps[1])}


def tap_offsets(layer, x: Planar) -> np.ndarray:
    """Floats from an output pixel to the input of tap (kh, kw) in the first channel: int64 (Kh, Kw)."""
    kh = np.arange(layer.Kh)[:, None] * layer.dilation[0]
    kw = np.arange(layer.Kw)[None, :] * layer.dilation[1]
    if split_by_phase(layer):
        number = phases(layer)
        (sh, sw) = layer.stride
        phase = np.array([[number[int(h % sh), int(w % sw)] for w in kw[0]] for h in kh[:, 0]])
        return phase * x.plane + kh // sh * x.row + kw // sw
    return (kh - layer.padding[0]) * x.row + kw - layer.padding[2]


def split_by_phase(layer) -> bool:
    """Strided layers read phases, but for depthwise layers of stride 2, whose kernel strides by itself."""
    return layer.stride != (1, 1) and not (layer.kind == "depthwise" and layer.stride == (2, 2))


def bounds(step: Step) -> np.ndarray:
    """The clamp bounds of a step's epilogue: float32 (2 * clamps,), at least one pair so that the address is valid."""
    return np.array([limit for pair in step.operation.bounds or [(-math.inf, math.inf)] for limit in pair], np.float32)


def address(step: Step, array: np.ndarray) -> int:
    """The array's address; the step keeps it alive."""
    step.keep.append(array)
    return array.ctypes.data


def int32(values) -> np.ndarray:
    """Byte offsets as int32; images beyond 2 GiB do not fit."""
    values = np.asarray(values)
    if values.size and np.abs(values).max() >= 2**31:
        raise ValueError(f"Expected an activation of less than 2 GiB per image. Got an offset of {np.abs(values).max()} bytes.")
    return np.ascontiguousarray(values, np.int32)


def conv(step: Step, threads: int, layer, x: Planar, out: Planar, residual: list[Planar], reverse: bool) -> list[Launch]:
    operation = step.operation
    matrix = operation.weight.reshape(layer.P, -1)
    per_group = layer.P // layer.groups
    taps = tap_offsets(layer, x).ravel()
    channel = x.plane * (len(phases(layer)) if split_by_phase(layer) else 1)
    segments = []
    for g in range(layer.groups):
        offsets = ((g * layer.Q + np.arange(layer.Q))[:, None] * channel + taps).ravel()
        for segment in pack(matrix[g * per_group : (g + 1) * per_group]):
            segments.append((segment, segment.filters + g * per_group, offsets[segment.columns]))
    common = {
        "x": x.address, "out": out.address, "residual": residual[0].address if residual else 0,
        "mask": address(step, out.flat_mask()), "bounds": address(step, bounds(step)),
        "images": x.images, "x_image": 4 * x.image, "out_image": 4 * out.image,
    }  # fmt: skip
    launches, tiles = [], []
    for rows in sorted({segment.rows for segment, _, _ in segments}, reverse=True):
        same = [item for item in segments if item[0].rows == rows]
        filters = np.concatenate([filters for _, filters, _ in same])
        lengths = np.concatenate([np.diff(segment.begins) for segment, _, _ in same])
        columns = np.concatenate([columns for _, _, columns in same])
        weights = np.concatenate([segment.weights for segment, _, _ in same])
        begins = np.concatenate([[0], np.cumsum(lengths)])
        fields = common | {
            "weights": address(step, weights), "columns": address(step, int32(4 * columns)),
            "begins": address(step, int32(begins)), "planes": address(step, int32(4 * filters * out.plane)),
            "bias": address(step, np.ascontiguousarray(operation.bias[filters], np.float32)),
        }  # fmt: skip
        ahead = 4 * x.image > (FAR if len(columns) <= 32 * len(filters) else 8 * FAR)
        pieces = cut(out.vectors, rows)
        for (vectors, count, first), ranges in zip(pieces, balanced(threads, pieces, lengths), strict=True):
            size = 4 * vectors * out.width
            start = 4 * first * out.width + (size * (count - 1) if reverse else 0)
            kernel = conv_kernels.kernel(rows, vectors, operation.epilogue, ahead)
            launches.append(Launch(kernel, ranges, fields | {"first": start, "step": -size if reverse else size}))
            tiles.append(f"{rows}x{vectors}")
        step.nnz += int(np.count_nonzero(weights))
        step.computed_macs += weights.size * out.images * out.H * out.W
        step.weight_bytes += weights.nbytes
        step.index_bytes += 4 * (len(columns) + len(begins) + filters.size)
    step.kernel, step.tile = launches[0].kernel.name, " ".join(dict.fromkeys(tiles))
    computed = sum(segment.weights.size for segment, _, _ in segments)
    describe(step, matrix, computed)
    return launches[::-1] if reverse else launches


def describe(step: Step, matrix: np.ndarray, computed: int) -> None:
    """Say whether zeros are skipped, and why (not)."""
    kept = np.count_nonzero(matrix)
    step.path = "sparse" if computed < matrix.size else "dense"
    if step.path == "sparse":
        step.why = f"computes {computed / matrix.size:.1%} of the weights, {kept / matrix.size:.1%} are not zero"
    elif kept == matrix.size:
        step.why = "no zeros"
    else:
        step.why = f"the zeros ({1 - kept / matrix.size:.0%}) share no structure that pays"


def depthwise(step: Step, threads: int, layer, x: Planar, out: Planar, residual: list[Planar], reverse: bool) -> list[Launch]:
    stride = 1 if split_by_phase(layer) else layer.stride[0]
    channel = x.plane * (len(phases(layer)) if split_by_phase(layer) else 1)
    if stride == 1:
        fits = [n for n in (4, 2, 1) if -(-out.vectors // n) * n * out.width <= out.plane]
        vectors = next(n for n in fits if -(-out.vectors // n) * n <= 1.1 * out.vectors or n == 1)
        tiles, rows, mask = -(-out.vectors // vectors), 1, out.flat_mask()
    else:
        vectors, tiles, rows, mask = 1, -(-out.W // out.width), out.H, out.row_mask()
    source = np.arange(layer.P) // (layer.P // layer.groups)
    fields = {
        "x": x.address, "out": out.address, "residual": residual[0].address if residual else 0,
        "weights": address(step, np.ascontiguousarray(step.operation.weight, np.float32)),
        "taps": address(step, int32(4 * tap_offsets(layer, x).ravel())), "sources": address(step, int32(4 * source * channel)),
        "planes": address(step, int32(4 * np.arange(layer.P) * out.plane)),
        "bias": address(step, np.ascontiguousarray(step.operation.bias, np.float32)), "mask": address(step, mask),
        "bounds": address(step, bounds(step)), "images": x.images, "x_image": 4 * x.image, "out_image": 4 * out.image,
        "rows": rows, "out_row": 4 * out.row, "x_row": 8 * x.row,
    }  # fmt: skip
    kernel = depthwise_kernels.kernel(layer.Kh, layer.Kw, stride, vectors, step.operation.epilogue)
    step.nnz, step.weight_bytes = int(np.count_nonzero(step.operation.weight)), step.operation.weight.nbytes
    step.computed_macs = step.operation.weight.size * out.images * out.H * out.W
    step.kernel, step.tile, step.path, step.why = kernel.name, f"1x{vectors}", "dense", "depthwise: few weights"
    return [Launch(kernel, whole(threads, tiles, layer.P), fields)]


def linear(step: Step, threads: int, x: Flat, out: Flat, residual: list[Flat]) -> list[Launch]:
    operation, lanes = step.operation, linear_kernels.lanes()
    matrix = operation.weight
    filters = len(matrix)
    padded = np.zeros((-(-filters // lanes) * lanes, matrix.shape[1]), np.float32)
    padded[:filters] = matrix
    blocks = padded.reshape(-1, lanes, matrix.shape[1])
    group, columns = np.nonzero((blocks != 0).any(axis=1))
    begins = np.searchsorted(group, np.arange(len(blocks) + 1))
    weights = np.ascontiguousarray(blocks.transpose(0, 2, 1)[group, columns])
    bias = np.zeros(len(padded), np.float32)
    bias[:filters] = operation.bias
    fields = {
        "x": x.address, "out": out.address, "residual": residual[0].address if residual else 0,
        "weights": address(step, weights), "columns": address(step, int32(4 * columns)), "begins": address(step, int32(begins)),
        "planes": address(step, int32(4 * lanes * np.arange(len(blocks)))), "bias": address(step, bias),
        "bounds": address(step, bounds(step)), "images": x.images, "x_image": 4 * x.image, "out_image": 4 * out.image,
    }  # fmt: skip
    kernel = linear_kernels.kernel(operation.epilogue)
    ranges = [(0, 0, begin, end) for begin, end in share(np.diff(begins) + 1.0, threads)]
    step.nnz, step.computed_macs = int(np.count_nonzero(matrix)), weights.size * x.images
    step.weight_bytes, step.index_bytes = weights.nbytes, 4 * (len(columns) + len(begins))
    step.kernel, step.tile = kernel.name, f"{lanes}x1"
    describe(step, matrix, min(weights.size, matrix.size))
    return [Launch(kernel, ranges, fields)]


def _image_strides(value, shape) -> dict[str, int]:
    """Byte distances of images, channels and rows of a planar value, a flat one, or (None) contiguous memory."""
    if isinstance(value, Planar):
        return {"image": 4 * value.image, "plane": 4 * value.plane, "row": 4 * value.row}
    h, w = shape[2:] if len(shape) == 4 else (1, math.prod(shape[1:]))
    channels = shape[1] if len(shape) == 4 else 1
    image = value.image if isinstance(value, Flat) else channels * h * w
    return {"image": 4 * image, "plane": 4 * h * w, "row": 4 * w}


def _copy_fields(x: int, out: int, source: dict, target: dict, images: int, rows: int, columns: int, **window) -> dict:
    fields = {"x": x, "out": out, "images": images, "rows": rows, "columns": columns}
    fields |= {f"x_{k}": v for k, v in source.items()} | {f"out_{k}": v for k, v in target.items()}
    whole_image = {"h_first": 0, "w_first": 0, "h_step": 1, "height": rows, "width": columns}
    return fields | whole_image | window


def copy(step: Step, threads: int, name: str, shape, source, target) -> list[Launch]:
    """Bring a value of `shape` from `source` (None: the caller's or PyTorch's contiguous array) to `target`."""
    if len(shape) != 4 or target.images != shape[0]:
        shape = (target.images, 1, 1, math.prod(shape) // target.images)
    x = source.address if source is not None else 0
    strides = _image_strides(source, shape), _image_strides(target, shape)
    fields = _copy_fields(x, target.address, *strides, shape[0], shape[2], shape[3])
    return [Launch(copy_kernels.kernel(1), whole(threads, 0, shape[1]), fields, name if source is None else None)]


def split(step: Step, threads: int, name: str, shape, source, x: Planar, layer) -> list[Launch]:
    """Copy a strided layer's input into its phases, padding included."""
    number = phases(layer)
    launches = []
    target = {"image": 4 * x.image, "plane": 4 * x.plane * len(number), "row": 4 * x.row}
    for (h, w), phase in number.items():
        fields = _copy_fields(
            source.address if source is not None else 0, x.address + 4 * phase * x.plane, _image_strides(source, shape), target,
            shape[0], x.H, x.W, h_first=h - layer.padding[0], w_first=w - layer.padding[2],
            h_step=layer.stride[0], height=shape[2], width=shape[3],
        )  # fmt: skip
        kernel = copy_kernels.kernel(layer.stride[1])
        launches.append(Launch(kernel, whole(threads, 0, shape[1]), fields, name if source is None else None))
    return launches


def cat(step: Step, threads: int, parts: list[Planar], out: Planar) -> list[Launch]:
    launches, channel = [], 0
    for part in parts:
        target = out.address + 4 * channel * out.plane
        strides = _image_strides(part, None), _image_strides(out, None)
        fields = _copy_fields(part.address, target, *strides, out.images, out.H, out.W)
        launches.append(Launch(copy_kernels.kernel(1), whole(threads, 0, part.C), fields))
        channel += part.C
    step.kernel = launches[0].kernel.name
    return launches


def pointwise(step: Step, threads: int, x: Planar, out: Planar, residual: list[Planar], factor) -> list[Launch]:
    node, operation = step.operation.node, step.operation
    words = operation.epilogue
    if node.op not in ("affine", "add", "mul"):  # an activation that no kernel took over
        words = (node.op,)
        operation.bounds = [(node.attrs["lo"], node.attrs["hi"])] if node.op == "clamp" else []
    scalar = node.attrs.get("scalar") if node.op in ("add", "mul") else None
    if node.op == "add" and scalar is None:
        words = ("add", *words)
    affine = node.op == "affine" or scalar is not None
    scale, shift = np.ones(x.C, np.float32), np.zeros(x.C, np.float32)
    if node.op == "affine":
        scale, shift = node.attrs["scale"], node.attrs["shift"]
    elif scalar is not None:
        (scale if node.op == "mul" else shift)[:] = scalar
    other = residual[0] if residual else None
    kind = "" if factor is None else "image" if (factor.H, factor.W) == (out.H, out.W) else "channel"
    kernel = copy_kernels.pointwise_kernel(affine, kind, words)
    step.kernel = kernel.name
    fields = {
        "x": x.address, "out": out.address, "residual": other.address if other else 0, "factor": factor.address if factor else 0,
        "scale": address(step, np.ascontiguousarray(scale, np.float32)),
        "shift": address(step, np.ascontiguousarray(shift, np.float32)),
        "mask": address(step, out.flat_mask()), "bounds": address(step, bounds(step)), "images": x.images,
        "x_image": 4 * x.image, "out_image": 4 * out.image, "x_plane": 4 * x.plane, "out_plane": 4 * out.plane,
        "residual_image": 4 * other.image if other else 0, "residual_plane": 4 * other.plane if other else 0,
        "factor_image": 4 * factor.image if factor else 0, "factor_plane": 4 * factor.plane if factor else 0,
    }  # fmt: skip
    return [Launch(kernel, whole(threads, out.vectors, x.C), fields)]
