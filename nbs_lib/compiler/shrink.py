"""Graph -> smaller Graph (mapping 2.1, NPS 2): filters and channels that change no output leave all layers at once."""

from dataclasses import replace
from functools import partial, reduce

import numpy as np
import torch

from nbs_lib.compiler.fuse import ACTIVATIONS, TINY
from nbs_lib.compiler.plan import POOLS
from nbs_lib.layers import Graph, Node


def shrink(graph: Graph) -> Graph:
    """The same nodes and layers with fewer filters and channels, and the same outputs: only constant terms leave a sum.

    A channel goes if nothing reads it, or it is zero everywhere, in all values that must keep the same channels: both
    ends of an activation, a sum, a product, a concatenation, a convolution's group. Graph inputs and outputs, what runs
    through PyTorch and layers called more than once keep all of theirs. The graph itself where nothing goes.
    """
    channels = _Channels(graph)
    if all(kept.all() for kept in channels.kept.values()):
        return graph
    layers = dict(graph.layers)
    return replace(graph, nodes=[channels.rebuild(node, layers) for node in graph.nodes], layers=layers)


class _Channels:
    """What is known of the channels (axis 1) of all values of 2 or 4 dimensions, by the value's name."""

    def __init__(self, graph: Graph):
        self.graph, self.shapes = graph, {node.name: node.shape for node in graph.nodes}
        sizes = {name: s[1] for name, s in self.shapes.items() if len(s or ()) in (2, 4) and 0 not in s}
        self.known = {name: np.full(size, np.nan, np.float32) for name, size in sizes.items()}  # held everywhere
        self.used, self.bias = {}, {}  # by layer's node: kernels that count, bool (groups, filters, channels); the bias
        self.joints = {}  # by node: (value, its channels, value, its channels) that are kept or dropped together
        fixed = {*graph.inputs, *graph.outputs}
        for node in graph.nodes:
            if not all(name in sizes for name in (node.name, *node.inputs)) or not self._follow(node):
                fixed |= {node.name, *node.inputs}
        self.kept = {name: np.full(size, name in fixed) for name, size in sizes.items()}
        self._read()
        for name in sizes.keys() - fixed:
            self.kept[name] &= self.known[name] != 0
        self._settle()
        for kept in self.kept.values():
            kept[:1] |= not kept.any()
        self._settle()

    def _follow(self, node: Node) -> bool:
        """Note where the node's channels come from and what they hold; False for what may mix them in any way."""
        (name, inputs), (images, count, *_) = (node.name, node.inputs), node.shape
        shapes, known, every = [self.shapes[i] for i in inputs], [self.known[i] for i in inputs], np.arange(count)
        if node.op in ("conv2d", "linear"):
            return self._layer(node)
        if node.op == "cat" and node.attrs["dim"] == 1:
            split = np.split(every, np.cumsum([shape[1] for shape in shapes])[:-1])
            parts = [(source, at - at[0], at) for source, at in zip(inputs, split, strict=True)]
            self.known[name] = np.concatenate(known)
        elif node.op == "reshape" and shapes[0][0] == images and count % shapes[0][1] == 0:
            parts = [(inputs[0], every // (count // shapes[0][1]), every)]
            self.known[name] = known[0][parts[0][1]]
        elif node.op in POOLS or (
            node.op in ("affine", "add", "mul", *ACTIVATIONS)
            and all(len(shape) == len(node.shape) and shape[1] == count for shape in shapes)
        ):
            parts = [(source, every, every) for source in inputs]
            self.known[name] = _value(node, known)
        else:
            return False
        self.joints[name] = [(source, theirs, name, ours) for source, theirs, ours in parts]
        return True

    def _layer(self, node: Node) -> bool:
        """Find the kernels that are not zero and read what varies; inputs that hold one number go into the bias.

        Behind zero padding that number must be 0, for at the border a kernel sees less of it.
        """
        layer, (source,) = self.graph.layers[node.layer], node.inputs
        if layer.calls > 1 or len(node.shape) != (2 if layer.kind == "linear" else 4):
            return False
        weight = layer.weight.reshape(layer.groups, -1, layer.Q, layer.Kh * layer.Kw)
        taps = (weight[..., k] for k in range(weight.shape[-1]))
        used = reduce(np.logical_or, (~((tap < TINY) & (tap > -TINY)) for tap in taps))  # so that NaN counts
        known = self.known[source].reshape(layer.groups, layer.Q)
        folded = known == 0 if any(layer.padding) else np.isfinite(known)
        bias = np.zeros(used.shape[:2]) if layer.bias is None else layer.bias.reshape(used.shape[:2]).astype(float)
        if (folded & (known != 0)).any():
            bias += np.einsum("gpqk,gq->gp", weight, np.where(folded, known, 0))
        used &= ~folded[:, None]
        self.used[node.name], self.bias[node.name] = used, bias.ravel().astype(np.float32)
        self.known[node.name] = np.where(used.any(2).ravel(), np.float32(np.nan), self.bias[node.name])
        if layer.groups > 1:  # a group goes as a whole: its inputs and filters follow its first input
            every = [(source, layer.Q, np.arange(known.size)), (node.name, used.shape[1], np.arange(layer.P))]
            self.joints[node.name] = [(source, at // size * layer.Q, name, at) for name, size, at in every]
        return True

    def _read(self) -> None:
        """From the outputs back, mark in `kept` what is read by anything that is read itself and varies.

        What holds one number needs no input: it is made of what does too, of zero times anything, or of a bias.
        """
        for node in reversed([node for node in self.graph.nodes if node.name in self.kept]):
            live = self.kept[node.name] & np.isnan(self.known[node.name])
            if node.name in self.used:
                used = self.used[node.name]
                used &= live.reshape(used.shape[:2])[..., None]
                self.kept[node.inputs[0]] |= used.any(1).ravel()
                continue
            for source, theirs, _, ours in self.joints.get(node.name, ()):
                self.kept[source][theirs[live[ours]]] = True

    def _settle(self) -> None:
        """Where one member of a joint stays, let all stay."""
        joints, total = sum(self.joints.values(), []), -1
        while total != (total := sum(kept.sum() for kept in self.kept.values())):
            for a, i, b, j in joints + joints[::-1]:
                either = self.kept[a][i] | self.kept[b][j]
                self.kept[a][i[either]] = self.kept[b][j[either]] = True

    def rebuild(self, node: Node, layers: dict) -> Node:
        """The node without the channels that go, its layer replaced in `layers`."""
        kept = [self.kept[name] for name in (node.name, *node.inputs) if name in self.kept]
        if node.name not in self.kept or all(mask.all() for mask in kept):
            return node
        P, attrs, call, macs = np.flatnonzero(kept[0]), node.attrs, node.call, node.macs
        if node.op == "affine":  # the only operator that PyTorch may run and that has channels bound in its call
            attrs = {key: attrs[key][P] for key in ("scale", "shift")}
            sizes = (-1, *[1] * (len(node.shape) - 2))
            scale, shift = (torch.from_numpy(value).reshape(sizes) for value in attrs.values())
            call = partial(torch.addcmul, shift, tensor2=scale)
        elif node.name in self.used:
            old = layers[node.layer]
            Q = np.flatnonzero(kept[1]) if old.groups == 1 else np.arange(old.Q)
            groups = 1 if old.groups == 1 else int(kept[1].sum()) // old.Q
            weight, used = (v.take(P, 0).take(Q, 1) for v in (old.weight, self.used[node.name].reshape(old.P, old.Q)))
            np.copyto(weight, 0, where=~used.reshape(*used.shape, *[1] * (weight.ndim - 2)))
            sizes = {"P": len(P), "Q": len(Q), "groups": groups}
            layers[node.layer] = replace(old, **sizes, weight=weight, bias=self.bias[node.name][P])
            macs = macs * weight.size // old.params
        return replace(node, attrs=attrs, call=call, macs=macs, shape=(node.shape[0], len(P), *node.shape[2:]))


def _value(node: Node, known: list[np.ndarray]) -> np.ndarray:
    """What each channel holds everywhere after a node that leaves channels apart; NaN: unknown, or no one number."""
    if node.op in POOLS:  # an average may count padding; a dilated window may see nothing else
        unsure = known[0] != 0 if node.op == "avg_pool2d" else node.attrs.get("dilation", (1, 1)) != (1, 1)
        return np.where(unsure, np.float32(np.nan), known[0])
    sizes = (1, -1, *[1] * (len(node.shape) - 2))
    made = node.call(*(torch.from_numpy(value).reshape(sizes) for value in known)).numpy().ravel()
    if node.op == "affine":
        return np.where(node.attrs["scale"] == 0, node.attrs["shift"], made)
    return np.where(np.any([value == 0 for value in known], axis=0), 0, made) if node.op == "mul" else made
