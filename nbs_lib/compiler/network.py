"""A compiled network: a program of kernels over placed memory, called like the model it came from."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nbs_lib import __version__
from nbs_lib.compiler.explain import explain, profile
from nbs_lib.compiler.layout import place
from nbs_lib.compiler.plan import Planner
from nbs_lib.compiler.record import Fixed, Record
from nbs_lib.compiler.schedule import schedule
from nbs_lib.compiler.shrink import shrink
from nbs_lib.compiler.team import team
from nbs_lib.kernels import driver
from nbs_lib.layers import Graph, trace


@dataclass(eq=False)
class Segment:
    """Compiled steps between two that Python must do; `patches`: (arguments, value whose address is the first)."""

    begin: int
    end: int
    patches: list[tuple[np.ndarray, str]]


class Network:
    """What `compile` returns. Holds its memory: calls from several threads take turns."""

    def __init__(self, graph: Graph, example_inputs: tuple, threads: int, mapping=None, record: Fixed | None = None):
        self.graph, self.example_inputs, self.threads, self.mapping = graph, example_inputs, threads, mapping or {}
        self.record = record or Fixed()
        self.engine = f"prunemap {__version__}"
        self._lock = threading.Lock()
        self.planned = shrink(graph)  # without the filters and channels that change no output
        plan = Planner(self.planned, threads, self.record)
        self.steps, self._values = plan.steps, plan.values
        self._constants = {n.name: torch.from_numpy(n.attrs["value"]) for n in graph.nodes if n.op == "constant"}
        self.nodes = {node.name: node for node in graph.nodes}
        self._shapes = plan.shapes
        self._outputs = {}
        for name in graph.outputs:
            self._outputs |= plan.export(name)
        self._place()
        self._assemble()

    def _place(self) -> None:
        lives: dict[int, list[int]] = {}  # first and last use
        uses = [*([*step.reads, *step.writes] for step in self.steps), self._outputs.values()]
        for number, values in enumerate(uses):
            for value in values:
                lives.setdefault(id(value), [number, number])[1] = number
        for value in self._values:
            value.fix()
        for value in self._values:
            vars(value).pop("lattice", None)  # distances are settled; a cycle of references would keep the memory
        self._memory = place(self._values, lives)

    def _assemble(self) -> None:
        """One table of function and argument addresses; Python takes over where PyTorch is needed."""
        functions, arguments, joins, self._program = [], [], [], []
        segment = None
        for number, step in enumerate(self.steps):
            launches = schedule(step, self.threads, reverse=number % 2 == 1)
            if step.exports or step.chosen == "torch":
                self._program.append(step)
                segment = None
            if segment is None and launches:
                segment = Segment(len(functions), len(functions), [])
                self._program.append(segment)
            for launch in launches:
                table = launch.kernel.arguments(launch.ranges, **launch.fields)
                if launch.patch:
                    segment.patches.append((table, launch.patch))
                functions.append(launch.kernel.address)
                arguments.append(step.hold(table))
                joins.append(launch is launches[-1])
                segment.end = len(functions)
            step.launched = (len(functions) - len(launches), len(functions))
            step.emit = None  # it holds what was only needed to emit: the weights are packed now
            if step.chosen in ("sparse", "dense"):
                step.operation.weight = step.operation.bias = None
        self._functions, self._arguments, self._joins = (np.array(v, np.int64) for v in (functions, arguments, joins))
        self._counter = np.zeros(1, np.int64)
        self._times = None

    def __call__(self, *inputs):
        """The model's output for `inputs` (shapes of `example_inputs`): NumPy in, NumPy out; torch in, torch out."""
        if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
            (inputs,) = inputs
        with self._lock, torch.no_grad():
            values = dict(self._constants)
            values.update(zip(self.graph.inputs, self._take(inputs), strict=True))
            for part in self._program:
                if isinstance(part, Segment):
                    self._run(part, values)
                else:
                    self._export(part.exports, values)
                    if part.chosen == "torch":
                        node = part.operation.node
                        given = [values[name] for name in node.inputs]
                        # a view in PyTorch may need a copy here, as compiled results are always contiguous
                        made = given[0].reshape(node.shape) if node.op == "reshape" else node.call(*given)
                        values[part.operation.output.name] = made
            self._export(self._outputs, values)
            made = [values[n].clone() if n in self._constants else values[n] for n in self.graph.outputs]
        if isinstance(inputs[0], np.ndarray):
            made = [value.numpy() if isinstance(value, torch.Tensor) else value for value in made]
        return self.graph.unflatten(made)

    def _take(self, inputs) -> list[torch.Tensor]:
        if len(inputs) != len(self.example_inputs):
            raise ValueError(f"Expected {len(self.example_inputs)} inputs, as in example_inputs. Got {len(inputs)}.")
        taken = []
        for number, (value, example) in enumerate(zip(inputs, self.example_inputs, strict=True)):
            value = _tensor(value, number)
            if tuple(value.shape) != tuple(example.shape) or value.dtype != example.dtype:
                rule = f"Expected input {number} of shape {tuple(example.shape)}, {example.dtype}, as compiled."
                got = f"Got {tuple(value.shape)}, {value.dtype}. Compile again for another shape."
                raise ValueError(f"{rule} {got}")
            taken.append(value.cpu().contiguous())
        return taken

    def _run(self, segment: Segment, values: dict) -> None:
        held = []
        for table, name in segment.patches:
            held.append(values[name].to(torch.float32).contiguous())
            table[0] = held[-1].data_ptr()
        self._counter[0] = 0
        tables = [table.ctypes.data for table in (self._functions, self._arguments, self._joins)]
        times = self._times  # of another thread's `times`, perhaps: held until the run is over
        clock = times.ctypes.data if times is not None else 0
        order = [*tables, segment.begin, segment.end, self.threads, self._counter.ctypes.data, clock]
        order = np.array(order, np.int64)
        if self.threads == 1:
            driver.run(order.ctypes.data, 0)
        else:
            team(self.threads).run(order)

    def _export(self, where: dict, values: dict) -> None:
        """Copy compiled values out for PyTorch or the caller, who owns them from then on."""
        for name, value in where.items():
            if name not in values:
                # NumPy copies on the calling thread alone; PyTorch would wake its own threads for large values.
                values[name] = torch.from_numpy(np.array(value.view(), order="C").reshape(self._shapes[name]))

    explain, profile = explain, profile  # methods of a module of their own

    def times(self, *inputs, runs: int = 20, between: Callable[[], object] | None = None) -> np.ndarray:
        """Milliseconds of every step in every run, float64 (runs, steps); 0 for a step through PyTorch.

        Compiled code reads the clock after every step, so steps lie in the caches as they do in any run. `between` is
        called before and after each; a first run does not count.
        """
        samples, between = [], between or (lambda: None)
        try:
            for run in range(runs + 1):
                self._times = np.zeros((len(self._functions), 2, 2), np.int64)
                if run:
                    between()
                self(*inputs)
                samples.append(self._times)
            between()
        finally:
            self._times = None
        taken = np.diff(np.array(samples[1:]) @ (1e3, 1e-6), axis=2)[..., 0]
        return np.array([taken[:, slice(*step.launched)].sum(axis=1) for step in self.steps]).reshape(-1, runs).T

    def source(self, layer: str) -> str:
        """The generated source of the kernels that compute `layer`."""
        steps = [step for step in self.steps if step.operation.node.layer == layer]
        kernels = dict.fromkeys(k for step in steps if step.chosen in ("sparse", "dense") for k in step.kernels)
        if not kernels:
            raise KeyError(f"Expected a compiled layer, one of {', '.join(self.graph.layers)}. Got {layer!r}.")
        return "\n\n".join(f"# {kernel.name}\n{kernel.source}" for kernel in kernels)

    @property
    def macs(self) -> int:
        """Dense multiply-adds of one run, whole batch."""
        return sum(node.macs for node in self.graph.nodes)

    @property
    def effective_macs(self) -> int:
        """Multiply-adds with non-zero weights of one run, whole batch."""
        sizes = {name: (layer.nnz, layer.params) for name, layer in self.graph.layers.items()}
        left = [(node.macs, *sizes.get(node.layer, (1, 1))) for node in self.graph.nodes]
        return sum(round(macs * nnz / params) for macs, nnz, params in left)

    @property
    def fallback_macs(self) -> int:
        """Multiply-adds of one run that go through PyTorch."""
        return sum(step.operation.node.macs for step in self.steps if step.chosen == "torch")

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
            "activations": self._memory.nbytes,
        }

    def __repr__(self) -> str:
        size = self.bytes
        return (
            f"Network: {len(self.graph.layers)} layers in {len(self.steps)} steps, {self.functions} kernels, "
            f"{self.threads} thread(s), {self.effective_macs:,} of {self.macs:,} MACs, {self.fallback_macs:,} through "
            f"PyTorch, {(size['packed'] + size['index']) / 1e6:.1f} of {size['dense'] / 1e6:.1f} MB of weights"
        )


def _tensor(value, number: int) -> torch.Tensor:
    """An input as a tensor; NumPy arrays with negative strides are copied, as PyTorch takes none."""
    if not isinstance(value, torch.Tensor | np.ndarray):
        raise TypeError(f"Expected a tensor or a NumPy array as input {number}. Got {type(value).__name__}.")
    if isinstance(value, np.ndarray) and any(stride < 0 for stride in value.strides):
        value = value.copy()
    return torch.as_tensor(value).detach()


def compile(model: torch.nn.Module, example_inputs, threads: int = 1, mapping=None, tuning=True) -> Network:
    """Compile `model` (dense or pruned, in any mode; eval semantics) for inputs of exactly these shapes.

    `example_inputs`: a tensor or a tuple of them, float32 (or integers, for what reads integers). `threads`: cores a
    run may use. `mapping` only labels `explain()`: structure is read from the zeros, so networks pruned elsewhere are
    as fast. `tuning`: what `tune` has found on this machine is used; False: it is not; a path: that of another record.
    What is neither convolution, linear layer, pooling nor activation runs through PyTorch; `explain()` says so.
    """
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(f"Expected threads to be a positive int. Got {threads!r}.")
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    inputs = tuple(_tensor(value, number) for number, value in enumerate(inputs))
    if not isinstance(tuning, bool | str | Path) or tuning == "":
        raise ValueError(f"Expected tuning to be True, False or the path of a record. Got {tuning!r}.")
    record = Fixed() if tuning is False else Record(None if tuning is True else tuning)
    return Network(trace(model, inputs), inputs, threads, mapping, record)
