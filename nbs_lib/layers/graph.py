"""`LayerSpec`, `Node`, `Graph`: a network as the compiler sees it. One multiply-add is one MAC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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
    uneven: int = (
        0  # output positions of all calls less H * W * calls: not 0 where the calls see maps of different sizes
    )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def params(self) -> int:
        return self.weight.size

    @property
    def positions(self) -> int:
        return self.H * self.W * self.calls + self.uneven

    @property
    def macs(self) -> int:
        return self.params * self.positions

    @cached_property
    def nnz(self) -> int:
        return int(np.count_nonzero(self.weight))

    @property
    def effective_macs(self) -> int:
        return self.nnz * self.positions

    @property
    def rate(self) -> float:
        return self.params / self.nnz if self.nnz else float("inf")

    @property
    def is_3x3(self) -> bool:
        return (self.Kh, self.Kw) == (3, 3)


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
    call: Callable = field(repr=False)  # call(*tensors): the very operator through PyTorch, all else bound


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
        columns = ["name", "kind", "P", "Q", "Kh", "Kw", "stride", "padding", "dilation", "groups", "H", "W", "calls"]
        columns += ["params", "macs", "effective_macs", "rate"]
        rows = [[getattr(layer, column) for column in columns] for layer in self.layers.values()]
        return pd.DataFrame(rows, columns=["layer", *columns[1:]])

    def __repr__(self) -> str:
        table = self.frame().drop(columns=["padding", "dilation"]).to_string(index=False)
        return f"Graph: {len(self.layers)} layers, {self.macs:,} MACs per image, {len(self.nodes)} nodes\n{table}"
