"""Graph -> operations (NPS 3): batch norm goes into weights, activations and residual adds into the kernel's end."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from nbs_lib.layers import Graph, Node

TINY = 1e-30  # smaller weights are zero: denormals slow every multiply-add down
ACTIVATIONS = ("clamp", "hardswish", "hardsigmoid", "silu", "sigmoid")


@dataclass
class Operation:
    """One fused operation: its first node decides the kind, its last node's name is the value it makes."""

    node: Node
    output: Node
    weight: np.ndarray | None = None  # batch norm folded in, denormals zeroed
    bias: np.ndarray | None = None
    epilogue: tuple[str, ...] = ()
    bounds: list[tuple[float, float]] = field(default_factory=list)
    residual: str | None = None


def fuse(graph: Graph) -> list[Operation]:
    """Operations in an order in which every input is there when it is needed."""
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    uses.update(graph.outputs)
    user = {name: node for node in graph.nodes for name in node.inputs}
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    shapes = {node.name: node.shape for node in graph.nodes}
    absorbed, operations = set(), []
    for node in graph.nodes:
        if node.name in absorbed:
            continue
        operation = _start(graph, node)
        starts = node.op in ("conv2d", "linear") or (node.op not in ACTIVATIONS and is_pointwise(node, shapes))
        while starts and uses[operation.output.name] == 1 and operation.output.name in user:
            follower = user[operation.output.name]
            if follower.name in absorbed or not _absorb(operation, follower, shapes):
                break
            operation.output = follower
            absorbed.add(follower.name)
        operations.append(operation)
    return sorted(operations, key=lambda operation: order[operation.output.name])


def _activate(operation: Operation, node: Node) -> None:
    """Add an activation to the operation's end."""
    bounds = (node.attrs["lo"], node.attrs["hi"]) if node.op == "clamp" else None
    operation.epilogue += ("relu" if bounds == (0, math.inf) else node.op,)
    operation.bounds += [bounds] * (bounds is not None)


def is_pointwise(node: Node, shapes: dict) -> bool:
    """Whether one pass over images computes the node: all 4-D, same shape, or a product with one number per channel."""
    if node.op not in ("affine", "add", "mul", *ACTIVATIONS) or len(node.shape or ()) != 4:
        return False
    given = sorted((tuple(shapes[name] or ()) for name in node.inputs), key=lambda shape: shape != tuple(node.shape))
    per_channel = (*node.shape[:2], 1, 1)
    return given[0] == tuple(node.shape) and all(
        shape == given[0] or (node.op == "mul" and shape == per_channel) for shape in given[1:]
    )


def _start(graph: Graph, node: Node) -> Operation:
    operation = Operation(node, node)
    if node.op in ACTIVATIONS:
        _activate(operation, node)
    elif node.op in ("conv2d", "linear"):
        layer = graph.layers[node.layer]
        operation.weight = _flush(layer.weight)
        operation.bias = np.zeros(layer.P, np.float32) if layer.bias is None else layer.bias.astype(np.float32)
    return operation


def _flush(weight: np.ndarray) -> np.ndarray:
    """float32 with exact zeros for what is smaller than TINY; the array itself where there is nothing to do."""
    tiny = np.abs(weight) < TINY
    return np.where(tiny, np.float32(0), weight) if (weight[tiny] != 0).any() else weight


def _absorb(operation: Operation, follower: Node, shapes: dict) -> bool:
    """Take `follower` into the operation if a kernel's end can do it."""
    if follower.op == "affine" and operation.weight is not None and not operation.epilogue:
        if len(follower.shape) != (4 if operation.node.op == "conv2d" else 2):
            return False
        scale, shift = follower.attrs["scale"], follower.attrs["shift"]
        operation.weight = _flush(operation.weight * scale.reshape(-1, *[1] * (operation.weight.ndim - 1)))
        operation.bias = operation.bias * scale + shift
    elif follower.op in ACTIVATIONS:
        _activate(operation, follower)
    elif (
        follower.op == "add"
        and "add" not in operation.epilogue
        and operation.node.op != "add"
        and follower.attrs.get("scalar") is None
        and len(set(follower.inputs)) == 2
        and all(shapes[name] == operation.output.shape for name in follower.inputs)
    ):
        (operation.residual,) = {*follower.inputs} - {operation.output.name}
        operation.epilogue += ("add",)
    else:
        return False
    return True
