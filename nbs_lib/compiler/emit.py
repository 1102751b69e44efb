"""Steps that compute: pack weights, write the structure tables, fill in addresses. Runs once memory is placed."""

import numpy as np

from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.moves import channel_distance, locate, split_by_phase, tap_offsets
from nbs_lib.compiler.packing import linear_cost, pack, pack_filters, pack_neighbours, share
from nbs_lib.compiler.steps import Launch, Step, Tiled, whole
from nbs_lib.formats.packed import prefix
from nbs_lib.kernels import copy as copy_kernels
from nbs_lib.kernels import depthwise as depthwise_kernels
from nbs_lib.kernels import jit
from nbs_lib.kernels import linear as linear_kernels
from nbs_lib.kernels.conv import DISTANCE


def int32(values) -> np.ndarray:
    """Byte offsets as int32; images beyond 2 GiB do not fit."""
    values = np.asarray(values)
    if values.size and np.abs(values).max() >= 2**31:
        raise ValueError(f"Expected activations of less than 2 GiB per image. Got an offset of {np.abs(values).max()}.")
    return np.ascontiguousarray(values, np.int32)


def _common(step: Step, x: Planar | Flat, out: Planar | Flat, residual: list) -> dict[str, int]:
    """The fields every computing kernel has."""
    fields = locate("x", x) | locate("out", out) | locate("residual", residual[0] if residual else None)
    bounds = np.array([*step.operation.bounds, (0, 0)], np.float32)
    return fields | {"bounds": step.hold(bounds), "images": x.images}


def conv(step: Step, layer, x: Planar, out: Planar, residual: list[Planar]) -> list[Tiled]:
    """Groups of filters that share a column list, one part per group size."""
    operation, tiling, step.fills = step.operation, step.tiling, True
    matrix = operation.weight.reshape(layer.P, -1)
    per_group = layer.P // layer.groups
    taps, channel = tap_offsets(layer, x).ravel(), channel_distance(layer, x)
    segments: dict[int, list] = {}
    for g in range(layer.groups):
        offsets = ((g * layer.Q + np.arange(layer.Q))[:, None] * channel + taps).ravel()
        packed, costs = pack(matrix[g * per_group : (g + 1) * per_group], tiling.rows, tiling.dense)
        step.cycles += costs * out.vectors * out.images
        for s in packed:
            entry = (s.filters + g * per_group, np.diff(s.begins), offsets[s.columns], s.weights)
            segments.setdefault(s.rows, []).append(entry)
    common = _common(step, x, out, residual) | {"mask": step.hold(out.flat_mask())}
    parts = []
    for rows, entries in sorted(segments.items(), reverse=True):
        filters, lengths, columns, weights = (np.concatenate(piece) for piece in zip(*entries, strict=True))
        begins = prefix(lengths)
        fields = common | {
            "weights": step.hold(weights), "columns": step.hold(int32(4 * np.pad(columns, (0, DISTANCE)))),
            "begins": step.hold(begins), "planes": step.hold(int32(4 * filters * out.plane)),
            "bias": step.hold(operation.bias[filters]),
        }  # fmt: skip
        parts.append(Tiled(tiling, rows, operation.epilogue, fields, lengths, x, out))
        _count(step, weights, len(columns) + len(begins) + filters.size, out.images * out.H * out.W)
    _describe(step, matrix, step.weight_bytes // 4)
    return parts


def _count(step: Step, weights: np.ndarray, indices: int, positions: int) -> None:
    step.computed_macs += weights.size * positions
    step.weight_bytes += weights.nbytes
    step.index_bytes += 4 * indices


def _describe(step: Step, matrix: np.ndarray, computed: int) -> None:
    """Say whether zeros are skipped, and why (not)."""
    kept = np.count_nonzero(matrix)
    step.chosen = "sparse" if computed < matrix.size else "dense"
    if step.chosen == "sparse":
        step.why = f"computes {computed / matrix.size:.1%} of the weights, {kept / matrix.size:.1%} are not zero"
    elif kept == matrix.size:
        step.why = "no zeros"
    elif step.tiling and step.tiling.dense:
        step.why = "computing the zeros was faster when timed"
    else:
        step.why = f"the zeros ({1 - kept / matrix.size:.0%}) share no structure that pays"


def depthwise(step: Step, threads: int, layer, x: Planar, out: Planar, residual: list[Planar]) -> list[Launch]:
    """Stride 1 (and phases): along whole planes, several registers at a time. Stride 2: row by row."""
    if layer.stride == (1, 1) or split_by_phase(layer):
        # More registers per tile pay as long as the last tile hardly overshoots and ends before the next plane.
        ends = {n: -(-out.vectors // n) * n for n in (4, 2, 1)}
        vectors = next(n for n, e in ends.items() if e <= max(1.1 * out.vectors, n == 1) and e * out.width <= out.plane)
        stride, tiles, rows, mask = 1, ends[vectors] // vectors, 1, out.flat_mask()
    else:
        stride, vectors, tiles, rows, mask = 2, 1, -(-out.W // out.width), out.H, out.row_mask()
    step.fills = stride == 1
    source = np.arange(layer.P) // (layer.P // layer.groups)
    fields = _common(step, x, out, residual) | {
        "weights": step.hold(step.operation.weight), "bias": step.hold(step.operation.bias), "mask": step.hold(mask),
        "taps": step.hold(int32(4 * tap_offsets(layer, x).ravel())),
        "sources": step.hold(int32(4 * source * channel_distance(layer, x))),
        "planes": step.hold(int32(4 * np.arange(layer.P) * out.plane)),
        "rows": rows, "x_row": 8 * x.row,
    }  # fmt: skip
    apart = 0 if split_by_phase(layer) else layer.dilation[1]
    kernel = depthwise_kernels.kernel(layer.Kh, layer.Kw, apart, stride, vectors, step.operation.epilogue)
    _count(step, step.operation.weight, 0, out.images * out.H * out.W)
    step.tile, step.chosen, step.why = f"1x{vectors}", "dense", "depthwise: few weights"
    return [Launch(kernel, whole(threads, tiles, layer.P), fields)]


def linear(step: Step, threads: int, x: Flat, out: Flat, residual: list[Flat]) -> list[Launch]:
    """Neighbouring filters share a column list, or each has its own, whichever is read faster."""
    operation, lanes = step.operation, linear_kernels.lanes()
    filters = pack_filters(operation.weight, jit.width())
    shared = pack_neighbours(operation.weight, lanes)
    costs = [linear_cost(operation.weight.size, 4 * operation.weight.size // lanes, lanes)]  # dense, shared, own
    costs += [linear_cost(shared[2].size, 4 * shared[1].size, lanes)]
    costs += [linear_cost(filters[2].size, filters[1].nbytes, None) if filters else np.inf]
    own, step.cycles = costs[2] < costs[1], np.array([costs[0], min(costs[1:])]) * x.images
    begins, columns, weights = filters if own else shared
    lanes = jit.width() if own else lanes
    kernel = (linear_kernels.gathered if own else linear_kernels.kernel)(operation.epilogue)
    groups = len(begins) - 1
    fields = _common(step, x, out, residual) | {
        "weights": step.hold(weights), "columns": step.hold(columns if own else int32(4 * columns)),
        "begins": step.hold(begins), "planes": step.hold(int32(4 * lanes * np.arange(groups))),
        "bias": step.hold(np.pad(operation.bias, (0, lanes * groups - len(operation.bias)))),
    }  # fmt: skip
    ranges = [(0, 0, begin, end) for begin, end in share(np.diff(begins) + 1.0, threads)]
    _count(step, weights, columns.nbytes // 4 + len(begins), x.images)
    _describe(step, operation.weight, min(weights.size, operation.weight.size))
    step.tile = f"{lanes}x1"
    return [Launch(kernel, ranges, fields)]


def pointwise(step: Step, threads: int, x: Planar, out: Planar, other: list[Planar], factor) -> list[Launch]:
    """One pass over images: what no convolution could take over. `other` is added, `factor` multiplied."""
    node, operation, step.fills = step.operation.node, step.operation, True
    words, scalar = operation.epilogue, node.attrs.get("scalar")
    scale, shift = np.ones(x.C, np.float32), np.zeros(x.C, np.float32)
    if node.op == "affine":
        scale, shift = node.attrs["scale"], node.attrs["shift"]
    elif node.op == "add" and scalar is None:
        words = ("add", *words)
    elif node.op in ("add", "mul") and scalar is not None:
        (scale if node.op == "mul" else shift)[:] = scalar
    kind = "" if factor is None else "image" if (factor.H, factor.W) == (out.H, out.W) else "channel"
    kernel = copy_kernels.pointwise_kernel(node.op == "affine" or scalar is not None, kind, words)
    fields = _common(step, x, out, other) | locate("factor", factor or x)
    fields |= {"scale": step.hold(scale), "shift": step.hold(shift), "mask": step.hold(out.flat_mask())}
    return [Launch(kernel, whole(threads, out.vectors, x.C), fields)]
