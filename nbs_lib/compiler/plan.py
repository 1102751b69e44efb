"""Operations -> steps: decides where every value lies and which kernel makes it. Memory and addresses come after."""

import math

from nbs_lib.compiler import emit, moves, pooling
from nbs_lib.compiler.fuse import Operation, fuse, is_pointwise
from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.record import Fixed
from nbs_lib.compiler.steps import Step
from nbs_lib.kernels import jit
from nbs_lib.layers import Graph

POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "global_avg")


class Planner:
    """Walks the operations once. A value is an object (PyTorch's or the caller's) until a kernel needs a form of it.

    `forms` maps (value, form) to where it lies; forms are "planar" and ("flat", images).
    """

    def __init__(self, graph: Graph, threads: int, record: Fixed):
        self.graph, self.threads, self.record, self.width = graph, threads, record, jit.width()
        self.shapes = {node.name: node.shape for node in graph.nodes}
        self.forms: dict[tuple, Planar | Flat] = {}
        self.objects = {node.name for node in graph.nodes if node.op in ("input", "constant")}
        self.positive: set[str] = set()  # values known to hold nothing below zero
        self.values: list[Planar | Flat] = []
        self.steps: list[Step] = []
        for operation in fuse(graph):
            if operation.node.op not in ("input", "constant"):
                self._operation(operation)

    def _new(self, name: str, value: Planar | Flat) -> Planar | Flat:
        self.forms[name, "planar" if isinstance(value, Planar) else ("flat", value.images)] = value
        self.values.append(value)
        return value

    def make_planar(self, name: str) -> Planar:
        return self._new(name, Planar(*self.shapes[name], self.width))

    def planar(self, name: str, operation: Operation) -> Planar:
        """The value as images, copied into that form if it is not there yet."""
        if (name, "planar") not in self.forms:
            source = self.forms.get((name, ("flat", self.shapes[name][0])))
            self.copy(operation, name, source, self.make_planar(name))
        return self.forms[name, "planar"]

    def flat(self, name: str, images: int, operation: Operation) -> Flat:
        """The value as `images` vectors."""
        if (name, ("flat", images)) not in self.forms:
            source = self.forms.get((name, "planar")) if images == self.shapes[name][0] else None
            value = self._new(name, Flat(images, math.prod(self.shapes[name]) // images))
            self.copy(operation, name, source, value)
        return self.forms[name, ("flat", images)]

    def copy(self, operation: Operation, name: str, source, target) -> None:
        """A step that brings `name` from `source` (None: from PyTorch's or the caller's memory) to `target`."""
        step = Step(operation, [source] if source else [], [target], kernel="copy", why="change of layout")
        if source is None:
            step.exports = self.export(name)
            step.reads = list(step.exports.values())
        step.emit = lambda: moves.copy(step, self.threads, name, self.shapes[name], source, target)
        self.steps.append(step)

    def export(self, name: str) -> dict[str, Planar | Flat]:
        """Where PyTorch finds a value: {} if it is an object already."""
        if name in self.objects:
            return {}
        return {name: next(value for (key, _), value in self.forms.items() if key == name)}

    def _operation(self, operation: Operation) -> None:
        node = operation.node
        step = Step(operation, [], [], kernel=node.op)
        plans = {"conv2d": self._conv, "linear": self._linear} | dict.fromkeys(POOLS, self._pool)
        plan = plans.get(node.op, self._torch)
        if is_pointwise(node, self.shapes):
            plan = self._pointwise
        elif node.op == "cat" and node.attrs["dim"] == 1 and len(node.shape) == 4:
            plan = self._cat
        elif node.op == "reshape" and self._reshape(operation):
            return
        plan(operation, step)
        self.steps.append(step)
        last = operation.epilogue[-1:]
        passes = node.op in (*POOLS, "cat") and all(name in self.positive for name in node.inputs)
        clamped = last == ("clamp",) and operation.bounds[-1][0] >= 0
        if passes or clamped or last in (("relu",), ("hardsigmoid",), ("sigmoid",)):
            self.positive.add(operation.output.name)

    def _torch(self, operation: Operation, step: Step) -> None:
        for name in operation.node.inputs:
            step.exports |= self.export(name)
        step.reads = list(step.exports.values())
        step.chosen, step.kernel, step.why = "torch", operation.node.op, f"no kernel for {operation.node.op}"
        step.computed_macs = operation.node.macs
        self.objects.add(operation.output.name)

    def _residual(self, operation: Operation, out: Planar) -> list[Planar]:
        if operation.residual is None:
            return []
        residual = self.planar(operation.residual, operation)
        out.unite(residual)
        return [residual]

    def _conv(self, operation: Operation, step: Step) -> None:
        layer = self.graph.layers[operation.node.layer]
        out = self.make_planar(operation.output.name)
        residual = self._residual(operation, out)
        name = operation.node.inputs[0]
        top, bottom, left, right = layer.padding
        if moves.split_by_phase(layer):
            x = self._phases(operation, name, layer, out)
        else:
            x = self.planar(name, operation)
            x.need(max(top, bottom), max(left, right))
        if layer.stride == (1, 1):
            x.unite(out)
        step.reads, step.writes = [x, *residual], [out]
        if layer.kind == "depthwise":
            step.emit = lambda: emit.depthwise(step, self.threads, layer, x, out, residual)
        else:
            step.tiling = self.record.tiling(layer, x.images, self.threads)
            step.emit = lambda: emit.conv(step, layer, x, out, residual)

    def _phases(self, operation: Operation, name: str, layer, out: Planar) -> Planar:
        """A strided layer's input, split so that each tap of all outputs is one image: the kernel runs at stride 1."""
        source = None if name in self.objects else self.planar(name, operation)
        phases = moves.phases(layer)
        axes = zip(layer.shape[2:], layer.dilation, layer.stride, strict=True)
        reach = [(n - 1) * d // s for n, d, s in axes]
        images, channels = self.shapes[name][:2]
        x = Planar(images, channels * len(phases), out.H + reach[0], out.W + reach[1], self.width)
        x.unite(out)
        self.values.append(x)
        step = Step(operation, [source] if source else [], [x], kernel="phases", why=f"stride {layer.stride} split")
        step.emit = lambda: moves.split(step, self.threads, name, self.shapes[name], source, x, layer)
        self.steps.append(step)
        return x

    def _linear(self, operation: Operation, step: Step) -> None:
        layer = self.graph.layers[operation.node.layer]
        shape = self.shapes[operation.node.inputs[0]]
        images = math.prod(shape[:-1])
        x = self.flat(operation.node.inputs[0], images, operation)
        residual = [self.flat(operation.residual, images, operation)] if operation.residual else []
        out = self._new(operation.output.name, Flat(images, layer.P))
        step.reads, step.writes = [x, *residual], [out]
        step.emit = lambda: emit.linear(step, self.threads, x, out, residual)

    def _pool(self, operation: Operation, step: Step) -> None:
        node = operation.node
        name = operation.output.name
        x = self.planar(node.inputs[0], operation)
        step.reads = [x]
        if node.op == "global_avg" or node.op == "adaptive_avg_pool2d" and tuple(node.shape[2:]) == (1, 1):
            out = self._new(name, Flat(node.shape[0], node.shape[1]))
            step.emit = lambda: pooling.mean(step, self.threads, x, out)
        else:
            out = self.make_planar(name)
            zeros = pooling.zeros_around(node, x, out, positive=node.inputs[0] in self.positive)
            if zeros:
                x.need(*zeros)
            step.emit = lambda: pooling.pool(step, self.threads, zeros is not None, x, out)
        step.writes = [out]

    def _pointwise(self, operation: Operation, step: Step) -> None:
        node, factor = operation.node, None
        out_shape = tuple(node.shape)
        names = sorted(node.inputs, key=lambda name: tuple(self.shapes[name]) != out_shape)
        x = self.planar(names[0], operation)
        out = self.make_planar(operation.output.name)
        out.unite(x)
        residual = self._residual(operation, out)
        if len(names) == 2:
            second = self.planar(names[1], operation)
            if node.op == "add":
                residual = [second]
            else:
                factor = second
            if tuple(self.shapes[names[1]]) == out_shape:
                out.unite(second)
        step.reads, step.writes = [x, *residual, *([factor] if factor else [])], [out]
        step.emit = lambda: emit.pointwise(step, self.threads, x, out, residual, factor)

    def _cat(self, operation: Operation, step: Step) -> None:
        parts = [self.planar(name, operation) for name in operation.node.inputs]
        out = self.make_planar(operation.output.name)
        step.reads, step.writes = parts, [out]
        step.emit = lambda: moves.cat(step, self.threads, parts, out)

    def _reshape(self, operation: Operation) -> bool:
        """Images to vectors and back cost a copy or nothing, as long as the batch stays the batch."""
        name, source = operation.output.name, operation.node.inputs[0]
        shape, before = self.shapes[name], self.shapes[source]
        if source in self.objects or not shape or shape[0] != before[0] or math.prod(shape) != math.prod(before):
            return False
        self.forms[name, ("flat", shape[0])] = self.flat(source, shape[0], operation)
        return True
