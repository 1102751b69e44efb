"""`LayerSpec`, `Node`, `Graph`: a network as the compiler sees it. One multiply-add is one MAC."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One convolution or linear layer, with its weights as traced. MACs are per image, of all calls together."""

    name: str  # the module's name; the parameter's path where there is no module; the node's where that is taken
    kind: str  # "conv", "depthwise", "linear"
    P: int  # filters
    Q: int  # input channels per group
    Kh: int
    Kw: int
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    groups: int
    H: int  # output feature map (of the first call); linear: positions per image
    W: int
    calls: int  # runs in one forward
    weight: np.ndarray = field(repr=False)  # float32 (P, Q, Kh, Kw); linear: (P, Q)
    bias: np.ndarray | None = field(repr=False)  # float32 (P,)
    uneven: int = field(default=0, repr=False)  # output positions of all calls less H * W * calls

    shape = property(lambda self: self.weight.shape)
    params = property(lambda self: self.weight.size)
    nnz = cached_property(lambda self: int(np.count_nonzero(self.weight)))
    rate = property(lambda self: _rate([self]))
    positions = property(lambda self: self.H * self.W * self.calls + self.uneven)
    macs = property(lambda self: self.params * self.positions)
    effective_macs = property(lambda self: self.nnz * self.positions)
    is_3x3 = property(lambda self: (self.Kh, self.Kw) == (3, 3))


def _rate(layers: list[LayerSpec], total: str = "params", left: str = "nnz") -> float:
    whole, rest = (sum(getattr(layer, count) for layer in layers) for count in (total, left))
    return whole / rest if rest else math.inf


class Rates(NamedTuple):
    """A model's reached rates: total / left of its CONV weights (what the papers mean), all weights, and MACs."""

    conv: float
    weights: float
    macs: float


@dataclass(frozen=True, eq=False)
class Node:
    """One operator; the values it reads and gives are named after the nodes that give them."""

    name: str
    op: str  # of the vocabulary in `operators`, or "input", "constant", "torch:<operator>"
    inputs: tuple[str, ...]
    attrs: dict[str, Any]
    shape: tuple[int, ...] | None  # None: several tensors
    layer: str | None
    module: str
    macs: int  # of the whole batch
    call: Callable | None = field(repr=False)  # call(*tensors): the very operator through PyTorch, all else bound


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """Nodes in running order, layers by name; `inputs` and `outputs` are names of nodes."""

    nodes: list[Node]
    layers: dict[str, LayerSpec]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_spec: pytree.TreeSpec
    output_constants: dict[int, Any]  # what the model returns beside tensors, by position

    def __getitem__(self, name: str) -> LayerSpec:
        if name not in self.layers:
            raise KeyError(f"Expected a layer's name, one of {', '.join(self.layers)}. Got {name!r}.")
        return self.layers[name]

    @property
    def macs(self) -> int:
        """Dense multiply-adds per image of the named layers."""
        return sum(layer.macs for layer in self.layers.values())

    def rates(self) -> Rates:
        """The rates the zeros amount to, infinite where all is pruned; `conv` is `weights` without CONV layers."""
        layers = list(self.layers.values())
        conv = [layer for layer in layers if layer.kind != "linear"] or layers
        return Rates(_rate(conv), _rate(layers), _rate(layers, "macs", "effective_macs"))

    def unflatten(self, values: list[Any]) -> Any:
        """Rebuild what the model returns (tensor, tuple, dict, ...) from one value per name in `outputs`."""
        if len(values) != len(self.outputs):
            raise ValueError(f"Expected {len(self.outputs)} values, one per output. Got {len(values)}.")
        leaves = list(values)
        for position, constant in sorted(self.output_constants.items()):
            leaves.insert(position, constant)
        return pytree.tree_unflatten(leaves, self.output_spec)

    def frame(self) -> pd.DataFrame:
        """One row per layer."""
        columns = ["kind", "P", "Q", "Kh", "Kw", "stride", "padding", "dilation", "groups", "H", "W", "calls"]
        columns += ["params", "macs", "effective_macs", "rate"]
        rows = [[name, *(getattr(layer, column) for column in columns)] for name, layer in self.layers.items()]
        return pd.DataFrame(rows, columns=["layer", *columns])

    def __repr__(self) -> str:
        table = self.frame().drop(columns=["padding", "dilation"]).to_string(index=False)
        return f"Graph: {len(self.layers)} layers, {self.macs:,} MACs per image, {len(self.nodes)} nodes\n{table}"
