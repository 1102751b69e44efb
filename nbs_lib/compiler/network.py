"""A compiled network: a program of kernels over placed memory, called like the model it came from."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from nbs_lib.compiler.layout import place
from nbs_lib.compiler.plan import Planner
from nbs_lib.compiler.steps import Launch, Step
from nbs_lib.compiler.team import team
from nbs_lib.kernels import driver
from nbs_lib.layers import Graph, trace

VERSION = "0.1.0"
EXPLAIN = (
    "step layer op scheme rate nnz macs effective_macs computed_macs weight_bytes activation_bytes kernel tile path why"
).split()  # fmt: skip


@dataclass(eq=False)
class Segment:
    """Compiled steps between two operations that Python must do: `patches` are (arguments, value whose address goes in)."""

    begin: int
    end: int
    patches: list[tuple[np.ndarray, str]]


class Network:
    """What `compile` returns. Holds its memory: calls from several threads take turns."""

    def __init__(self, graph: Graph, example_inputs: tuple, threads: int, mapping=None):
        self.graph, self.example_inputs, self.threads, self.mapping = graph, example_inputs, threads, mapping or {}
        self.engine = f"prunemap {VERSION}"
        self._lock = threading.Lock()
        plan = Planner(graph, threads)
        self.steps, self._values, self._objects = plan.steps, plan.values, plan.objects
        self._constants = {n.name: torch.from_numpy(n.attrs["value"]) for n in graph.nodes if n.op == "constant"}
        self._shapes = {node.name: node.shape for node in graph.nodes}
        self._outputs = {}
        for name in graph.outputs:
            self._outputs |= plan.export(name)
        self._place()
        self._assemble()

    # -- building --------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        lives = {id(value): [len(self.steps), -1] for value in self._values}
        for i, step in enumerate(self.steps):
            for value in (*step.reads, *step.writes):
                first, last = lives[id(value)]
                lives[id(value)] = [min(first, i), max(last, i)]
        for value in self._outputs.values():
            lives[id(value)][1] = len(self.steps)
        for value in self._values:
            value.fix()
        self._buffers = place(self._values, lives)

    def _assemble(self) -> None:
        """One table of function and argument addresses; Python takes over where PyTorch is needed."""
        functions, arguments, joins, self._program, self._kernels = [], [], [], [], {}
        segment = None
        for step in self.steps:
            launches = step.emit() if step.emit else []
            if step.exports or step.emit is None:
                self._program.append(step)
                segment = None
            if segment is None and launches:
                segment = Segment(len(functions), len(functions), [])
                self._program.append(segment)
            for launch in launches:
                table = launch.kernel.arguments(launch.ranges, **launch.fields)
                step.keep.append(table)
                if launch.patch:
                    segment.patches.append((table, launch.patch))
                functions.append(launch.kernel.address)
                arguments.append(table.ctypes.data)
                joins.append(launch is launches[-1])
                segment.end = len(functions)
            self._note(step, launches)
        self._functions, self._arguments, self._joins = (np.array(v, np.int64) for v in (functions, arguments, joins))
        self._counter = np.zeros(1, np.int64)

    def _note(self, step: Step, launches: list[Launch]) -> None:
        """Remember readable sources; drop what is only needed to emit (weights are packed now)."""
        for launch in launches:
            self._kernels.setdefault(step.operation.output.name, {})[launch.kernel.name] = launch.kernel
        step.emit = None if step.path == "torch" else list
        if step.path in ("sparse", "dense"):
            step.operation.weight = step.operation.bias = None

    # -- running ---------------------------------------------------------------------------------------------------

    def __call__(self, *inputs):
        """The model's output for `inputs` (shapes of `example_inputs`): NumPy in, NumPy out; torch in, torch out."""
        with self._lock, torch.no_grad():
            values = dict(self._constants)
            values.update(zip(self.graph.inputs, self._take(inputs), strict=True))
            for part in self._program:
                if isinstance(part, Segment):
                    self._run(part, values)
                else:
                    self._export(part.exports, values)
                    if part.path == "torch":
                        arguments = [values[name] for name in part.operation.node.inputs]
                        values[part.operation.output.name] = part.operation.node.call(*arguments)
            self._export(self._outputs, values)
            made = [values[name] for name in self.graph.outputs]
        first = inputs[0][0] if isinstance(inputs[0], tuple | list) else inputs[0]
        if isinstance(first, np.ndarray):
            made = [value.numpy() if isinstance(value, torch.Tensor) else value for value in made]
        return self.graph.unflatten(made)

    def _take(self, inputs) -> list[torch.Tensor]:
        if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
            inputs = tuple(inputs[0])
        if len(inputs) != len(self.example_inputs):
            raise ValueError(f"Expected {len(self.example_inputs)} inputs, as in example_inputs. Got {len(inputs)}.")
        taken = []
        for number, (value, example) in enumerate(zip(inputs, self.example_inputs, strict=True)):
            value = torch.as_tensor(value).detach()
            if tuple(value.shape) != tuple(example.shape) or value.dtype != example.dtype:
                raise ValueError(
                    f"Expected input {number} of shape {tuple(example.shape)}, {example.dtype}, as compiled. "
                    f"Got {tuple(value.shape)}, {value.dtype}. Compile again for another shape."
                )
            taken.append(value.cpu())
        return taken

    def _run(self, segment: Segment, values: dict) -> None:
        held = []
        for table, name in segment.patches:
            held.append(values[name].to(torch.float32).contiguous())
            table[0] = held[-1].data_ptr()
        if segment.begin == segment.end:
            return
        self._counter[0] = 0
        counter, threads = self._counter.ctypes.data, self.threads

        def work(thread: int) -> None:
            driver.run(self._functions, self._arguments, self._joins, segment.begin, segment.end, thread, threads, counter)

        if threads == 1:
            work(0)
        else:
            team(threads).run(work)

    def _export(self, where: dict, values: dict) -> None:
        """Copy compiled values out for PyTorch or the caller, who owns them from then on."""
        for name, value in where.items():
            if name not in values:
                # NumPy copies on the calling thread alone; PyTorch would wake its own threads for large values.
                values[name] = torch.from_numpy(np.array(value.view(), order="C").reshape(self._shapes[name]))

    # -- telling ---------------------------------------------------------------------------------------------------

    def explain(self) -> pd.DataFrame:
        """One row per step: what ran, on which weights, through which kernel, sparse or dense, and why."""
        rows = []
        for number, step in enumerate(self.steps):
            node = step.operation.node
            main = step.path != "copy" or step.kernel not in ("copy", "phases")
            layer = self.graph.layers.get(node.layer) if main and node.layer else None
            choice = self.mapping.get(node.layer)
            batch_macs = node.macs if main else 0
            effective = round(batch_macs * layer.effective_macs / layer.macs) if layer and layer.macs else batch_macs
            rows.append([
                number, node.layer or node.module, node.op if main else step.kernel, str(choice.scheme) if choice and layer else "",
                layer.rate if layer else np.nan, layer.nnz if layer else 0, batch_macs, effective, step.computed_macs,
                step.weight_bytes + step.index_bytes, sum(4 * v.floats for v in (*step.reads, *step.writes)),
                step.kernel, step.tile, step.path, step.why,
            ])  # fmt: skip
        return pd.DataFrame(rows, columns=EXPLAIN)

    def source(self, layer: str) -> str:
        """The generated source of the kernels that compute `layer`."""
        found = {}
        for step in self.steps:
            if step.operation.node.layer == layer:
                found |= self._kernels.get(step.operation.output.name, {})
        if not found:
            raise KeyError(f"Expected a compiled layer, one of {', '.join(self.graph.layers)}. Got {layer!r}.")
        return "\n\n".join(f"# {name}\n{kernel.source}" for name, kernel in found.items())

    @property
    def macs(self) -> int:
        """Dense multiply-adds of one run, whole batch."""
        return sum(node.macs for node in self.graph.nodes)

    @property
    def effective_macs(self) -> int:
        """Multiply-adds with non-zero weights of one run, whole batch."""
        return int(self.explain()["effective_macs"].sum())

    @property
    def fallback_macs(self) -> int:
        """Multiply-adds of one run that go through PyTorch."""
        return sum(step.operation.node.macs for step in self.steps if step.path == "torch")

    @property
    def functions(self) -> int:
        """Distinct compiled kernels."""
        return len(set(self._functions.tolist()))

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the dense weights, the packed ones, their index arrays, and the placed activations."""
        return {
            "dense": 4 * sum(layer.params for layer in self.graph.layers.values()),
            "packed": sum(step.weight_bytes for step in self.steps),
            "index": sum(step.index_bytes for step in self.steps),
            "activations": sum(buffer.nbytes for buffer in self._buffers),
        }

    def __repr__(self) -> str:
        size = self.bytes
        return (
            f"Network: {len(self.graph.layers)} layers in {len(self.steps)} steps, {self.functions} kernels, "
            f"{self.threads} thread(s), {self.effective_macs:,} of {self.macs:,} MACs, {self.fallback_macs:,} through "
            f"PyTorch, {(size['packed'] + size['index']) / 1e6:.1f} of {size['dense'] / 1e6:.1f} MB of weights"
        )


def compile(model: torch.nn.Module, example_inputs, threads: int = 1, mapping=None) -> Network:
    """Compile `model` (dense or pruned, in any mode; eval semantics) for inputs of exactly these shapes.

    `example_inputs`: a tensor or a tuple of them, float32. `threads`: cores a run may use. `mapping` only labels
    `explain()`: structure is read from the zeros, so networks pruned elsewhere are as fast. Convolutions, linear layers,
    pooling and activations become kernels; what else there is runs through PyTorch, and `explain()` says so.
    """
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"Expected threads to be a positive int. Got {threads!r}.")
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    inputs = tuple(torch.as_tensor(value) for value in inputs)
    return Network(trace(model, inputs), inputs, threads, mapping)
