"""What every step of a network has to do, in numbers the latency model knows: a plan of it, never compiled."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from nbs_lib.compiler.layout import Flat
from nbs_lib.compiler.moves import phases, split_by_phase
from nbs_lib.compiler.packing import cut, tile_cycles
from nbs_lib.compiler.plan import Planner
from nbs_lib.compiler.record import Fixed
from nbs_lib.compiler.shrink import shrink
from nbs_lib.kernels import jit
from nbs_lib.latency import structure
from nbs_lib.latency.structure import dead_share
from nbs_lib.layers import Graph, LayerSpec
from nbs_lib.schemes import Choice

NEAR_BYTES = 2**20  # of weights that stay in a core's own cache from run to run


class NoData(LookupError):
    """Asked for what was never measured; the message names it."""


@dataclass(frozen=True)
class Work:
    """One step. `terms`: what its time is a sum of, in the same order for all of a kind; `features`: what the
    correction knows, log2. kind: "conv", "depthwise", "linear", whose rows teach a correction, or one of `SIMPLE`."""

    kind: str
    name: str  # the layer's, or the operator's
    terms: tuple[float, ...]
    features: tuple[float, ...] = ()
    choice: Choice | None = None


def conv(layer: LayerSpec, choice: Choice | None, vectors: int, row: int, extra: int = 0, images: int = 1) -> Work:
    """A convolution over `vectors` registers of pixels per filter, whose rows are `row` floats apart; `extra`: images
    of P channels that its end reads (residuals)."""
    P, Q, scheme, rate = structure.shrunk(layer, choice)
    kernel, groups = (layer.Kh, layer.Kw), layer.groups
    found = structure.conv(scheme, rate, P // groups, Q, kernel)
    weights, plane = P * Q * kernel[0] * kernel[1], layer.H * row * 4
    per_weight = sum(share * _plane_cycles(vectors, rows) for rows, share in found.lists)
    compute = images * (weights * per_weight + vectors * P)
    weight_bytes = weights * found.computed * 4 * (1 + 1 / found.rows)
    in_bytes, out_bytes = plane * Q * groups * images, plane * P * images * (1 + extra)
    columns = max(found.columns * Q * kernel[0] * kernel[1], 0.5)
    features = (columns, found.rows, vectors, P // groups, in_bytes, weight_bytes + 1, kernel[0] * kernel[1])
    return Work("conv", layer.name, (compute, weight_bytes, in_bytes + out_bytes, 1.0), _logs(features), choice)


def depthwise(layer: LayerSpec, vectors: int, row: int, extra: int = 0, images: int = 1) -> Work:
    """A depthwise convolution, always dense: over `vectors` registers as `conv`, or, where it strides by itself, row by
    row. What has been split into phases runs at stride 1."""
    taps, stride = layer.Kh * layer.Kw, 1 if split_by_phase(layer) else layer.stride[0]
    if stride > 1:
        vectors = layer.H * -(-layer.W // jit.width())
    plane = layer.H * row * 4
    moved = plane * layer.P * images * (1 + extra + stride**2)
    features = (layer.P, vectors, plane, taps)
    terms = (vectors * layer.P * images * taps, vectors * layer.P * images, moved, float(layer.P), 1.0)
    return Work("depthwise" if stride == 1 else "strided depthwise", layer.name, terms, _logs(features))


def linear(layer: LayerSpec, choice: Choice | None, images: int = 1, chain: int = 0) -> Work:
    """A fully connected layer of one image. Its weights come from far memory, as other layers have passed through the
    near cache since the last run; in a chain of that many alike, only what does not fit."""
    if images > 1:
        raise NoData(f"Expected fully connected layers on one vector, as measured. Got {images} in {layer.name}.")
    P, Q, scheme, rate = structure.shrunk(layer, choice)
    share, read, own = structure.linear(scheme, rate, P, Q)
    weights, far = share * P * Q, max(1 - NEAR_BYTES / (chain * read + 1), 0.0) if chain else 1.0
    features = (weights, read, P, 2.0 if own else 1.0, 1 + far)
    terms = (weights * (not own), weights * own, read, read * far, float(P), 1.0)
    return Work("linear", layer.name, terms, _logs(features), choice)


# What PyTorch only moves, and the kinds of steps that have their terms alone: how many.
MOVES = {
    "slice", "select", "pad", "constant_pad_nd", "permute", "transpose", "unsqueeze", "squeeze", "expand", "reshape"
}  # fmt: skip
SIMPLE = {"pytorch": 2, "call": 1, "copy": 2, "phases": 2, "pool": 3, "pointwise": 2, "strided depthwise": 5}


def move(kind: str, size: float, launches: int = 1, name: str = "") -> Work:
    """`size` bytes read and written: from one layout to another ("copy"), into a stride's phases."""
    return Work(kind, name or kind, (size, float(launches)))


def pool(name: str, outputs: float, window: float, image: float) -> Work:
    """A pooling: outputs (numbers) from windows of so many inputs; image: bytes that a mean over whole images reads."""
    return Work("pool", name, (outputs * window, image, 1.0))


def layer_works(layer: LayerSpec, choice: Choice | None, chain: int = 0) -> list[Work]:
    """The steps of one layer alone: its padding keeps rows apart; a stride adds phases. chain: of that many alike."""
    if layer.kind == "linear":
        return [linear(layer, choice, max(layer.positions, 1), chain)]
    row, works = layer.W + (max(layer.padding[2:]) if layer.stride == (1, 1) else 0), []
    if split_by_phase(layer):
        row = layer.W + (layer.Kw - 1) * layer.dilation[1] // layer.stride[1]
        height = layer.H + (layer.Kh - 1) * layer.dilation[0] // layer.stride[0]
        parts = len(phases(layer))
        works.append(move("phases", 8.0 * height * row * layer.Q * layer.groups * parts, parts))
    vectors = -(-((layer.H - 1) * row + layer.W) // jit.width())  # as Planar.fix
    computed = depthwise(layer, vectors, row) if layer.kind == "depthwise" else conv(layer, choice, vectors, row)
    return [*works, computed]


def network_works(graph: Graph, mapping: dict[str, Choice], threads: int = 1) -> list[Work]:
    """The steps of a whole network under a mapping: shrunk, fused and laid out as it will be compiled. NoData names a
    layer or an operator that nothing was measured for."""
    if unknown := set(mapping) - set(graph.layers):
        raise KeyError(f"Expected layers among {', '.join(graph.layers)}. Got {', '.join(sorted(unknown))}.")
    graph, mapping = _without_dead(graph, mapping)
    plan = Planner(graph, threads, Fixed())
    for value in plan.values:
        value.fix()
    works, nodes = [_step(step, graph, mapping) for step in plan.steps], {node.name: node for node in graph.nodes}
    for name in graph.outputs:
        if name not in plan.objects:
            works.append(move("copy", 8.0 * float(np.prod(nodes[name].shape)), name="result"))
    return works


def _step(step, graph: Graph, mapping: dict[str, Choice]) -> Work:
    operation, reads, writes = step.operation, step.reads, step.writes
    node, name = operation.node, operation.node.layer or operation.node.op
    sizes = [4.0 * value.floats for value in (*reads, *writes)]
    if step.chosen == "torch" and node.op.removeprefix("torch:") in MOVES:
        exported = sum(4.0 * value.floats for value in step.exports.values())
        return Work("pytorch", node.op, (exported + 4.0 * np.prod(node.shape), 1.0))
    if step.chosen == "torch":
        raise NoData(f"Expected operators of compiled steps. Got {node.op} at {node.module or node.name}: PyTorch's.")
    if step.kernel in ("copy", "phases"):
        launches = len(phases(graph.layers[node.layer])) if step.kernel == "phases" else 1
        return move(step.kernel, 2 * sizes[-1], launches)
    if node.op == "cat":
        return move("copy", sum(sizes), len(reads), "cat")
    if node.op == "linear":
        return linear(graph.layers[node.layer], mapping.get(node.layer), reads[0].images)
    out = writes[0]
    if node.op == "conv2d":
        layer, extra = graph.layers[node.layer], len(reads) - 1
        place = (out.vectors, out.row, extra, out.images)
        return depthwise(layer, *place) if layer.kind == "depthwise" else conv(layer, mapping.get(name), *place)
    if isinstance(out, Flat) or "pool" in node.op or node.op == "global_avg":
        outputs = float(np.prod(node.shape))
        if isinstance(out, Flat):
            return pool(node.op, outputs, 0.0, sizes[0])
        window = node.attrs.get("kernel") or (reads[0].H / out.H, reads[0].W / out.W)
        return pool(node.op, outputs, float(np.prod(window)), 0.0)
    return Work("pointwise", node.op, (sum(sizes), 1.0))


def _without_dead(graph: Graph, mapping: dict[str, Choice]) -> tuple[Graph, dict[str, Choice]]:
    """The graph without the filters and channels that the mapping removes as a whole, and the choices of what is left.
    Only layers where that is likely are projected, all others count as dense."""
    layers, cut = {}, set()
    for name, layer in graph.layers.items():
        choice, weight = mapping.get(name), np.ones((), np.float32)
        sizes = (layer.P, layer.Q, layer.Kh * layer.Kw)
        if choice and layer.kind != "linear" and dead_share(choice, *sizes) * max(sizes[:2]) > 0.1:
            weight = choice.scheme.project(layer.weight, choice.rate, layer.groups)
            cut.add(name)
        layers[name] = replace(layer, weight=np.broadcast_to(np.asarray(weight, np.float32), layer.shape))
    graph, left = replace(graph, layers=layers), dict(mapping)
    if not cut:
        return graph, left
    graph = shrink(graph)
    for name in cut:
        rest = graph.layers[name]
        left[name] = Choice(mapping[name].scheme, max(rest.params / max(rest.nnz, 1), 1.0))
        if mapping[name].scheme.name in ("filter", "channel") or left[name].rate == 1:
            del left[name]
    return graph, left


@cache
def _plane_cycles(vectors: int, rows: int) -> float:
    """Cycles of one column of `rows` filters over a plane, as the schedule cuts it into tiles."""
    return sum(count * tile_cycles(size, rows) for size, count, _ in cut(vectors, rows))


def _logs(values: tuple) -> tuple[float, ...]:
    return tuple(np.log2(np.asarray(values, float)).tolist())
