"""The border from PyTorch to NumPy: a module becomes a graph of named layers (the layer-wise representation)."""

from nbs_lib.layers.graph import Graph, LayerSpec, Node
from nbs_lib.layers.tracing import trace

__all__ = ["Graph", "LayerSpec", "Node", "trace"]
