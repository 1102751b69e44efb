"""The latency model's settings (mapping 5.2.1): test models of ten layers, spread over what networks consist of.

Layers of stride 2 follow each other on falling maps, as many as fit. Ten of them side by side (`testnets.cascade`)
spend most of their time on ten inputs from far memory and ten results to hand out, as layers of a network never do.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import qmc
from torch import nn
from torch.utils import _pytree as pytree

from nbs_lib.compiler import Network
from nbs_lib.latency.structure import dead_share
from nbs_lib.layers import Graph, LayerSpec, Node, trace
from nbs_lib.schemes import Choice, Scheme, parse

LAYERS = 10
WEIGHTED = ("conv", "depthwise", "linear")  # kinds of layers; all else only moves, pools or scales
CHANNELS = (16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 576, 768, 960, 1024, 1280, 2048)
MAPS = (2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112)
RATES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
BLOCKS = ("2x4", "4x4", "4x16", "8x4", "8x16", "16x16", "16x32", "32x64")
# Kind -> share of the settings, kernel, stride, channel range, map range, schemes by weight. All ours: the paper names
# layer types and what a setting consists of, but no values.
_PUNCHED = [f"block_punched({block})" for block in BLOCKS]
_CONV1 = ["dense", "dense", "unstructured", *_PUNCHED, *_PUNCHED[1:5]]
_CONV3 = [*_CONV1, "pattern(8)", "pattern(8)"]
_LINEAR = ["dense", "dense", "unstructured", *(f"block({block})" for block in ("4x4", "8x4", "8x16", "16x16", "32x64"))]
FAMILIES = {
    "1x1": (0.28, 1, 1, (16, 2048), (2, 112), _CONV1),
    "3x3": (0.34, 3, 1, (16, 512), (2, 224), _CONV3),
    "1x1, stride 2": (0.03, 1, 2, (32, 1024), (7, 56), ["dense", *_PUNCHED[1:4]]),
    "3x3, stride 2": (0.03, 3, 2, (16, 512), (7, 56), ["dense", *_PUNCHED[1:4]]),
    "5x5": (0.03, 5, 1, (16, 128), (4, 28), _CONV1),
    "stem 3x3": (0.02, 3, 1, (16, 64), (28, 224), ["dense"]),
    "stem 7x7": (0.015, 7, 1, (16, 64), (14, 112), ["dense"]),
    "depthwise 3x3": (0.05, 3, 1, (16, 1024), (4, 112), ["dense"]),
    "depthwise 3x3, stride 2": (0.03, 3, 2, (16, 1024), (4, 56), ["dense"]),
    "depthwise 5x5": (0.02, 5, 1, (16, 1024), (4, 56), ["dense"]),
    "depthwise 5x5, stride 2": (0.015, 5, 2, (16, 768), (4, 56), ["dense"]),
    "linear": (0.08, 0, 1, (16, 4096), (1, 1), _LINEAR),
    "pointwise": (0.015, 1, 1, (16, 512), (7, 112), ["dense"]),
    "max_pool2d": (0.015, 2, 2, (16, 256), (7, 112), ["dense"]),
    "global_avg": (0.01, 0, 1, (64, 2048), (2, 14), ["dense"]),
    "pytorch": (0.01, 0, 1, (16, 256), (4, 56), ["dense"]),
}
MOST_GMACS = 1.0  # 1e9 multiply-adds of the ten layers in one run, those of non-zero weights: what keeps runs short
SMALL_MACS = 4e6  # dense, of one layer: most settings have more
MOST_WEIGHTS = 2**25  # of the ten layers


@dataclass(frozen=True)
class TestModel:
    """One setting: a family, a layer's sizes as in a LayerSpec (H x H outputs), scheme and rate."""

    __test__ = False  # no test case, whatever pytest thinks of its name
    family: str
    P: int
    Q: int
    H: int
    scheme: str = "dense"
    rate: float = 1.0

    kernel = property(lambda self: FAMILIES[self.family][1])
    stride = property(lambda self: FAMILIES[self.family][2])
    choice = property(lambda self: None if self.scheme == "dense" else Choice(parse(self.scheme), self.rate))

    @property
    def maps(self) -> tuple[int, ...]:
        """Output maps of the model's layers, each half of the one before with a stride of 2."""
        if self.stride == 1:
            return (self.H,) * LAYERS
        return tuple(self.H >> n for n in range(LAYERS) if self.H >> n >= 2 and not self.H % (1 << n))

    @property
    def kind(self) -> str:
        """One of WEIGHTED, or the family's own name."""
        return self.family.split(" ")[0] if not self.family[0].isdigit() and "stem" not in self.family else "conv"

    def layer(self, P: int, Q: int, H: int) -> LayerSpec:
        """One of its layers as a LayerSpec, its weights zeros that take no memory."""
        k, s, groups = self.kernel, self.stride, P if self.kind == "depthwise" else 1
        shape = (P, Q) if self.kind == "linear" else (P, 1 if groups > 1 else Q, k, k)
        weight, taps, pad = np.broadcast_to(np.float32(0), shape), (max(k, 1),) * 2, (k // 2,) * 4
        sizes = (P, shape[1], *taps, (s, s), pad, (1, 1), groups, H, H, 1)
        return LayerSpec(self.family, self.kind, *sizes, weight, None)

    def layers(self) -> list[LayerSpec]:
        """All of them, in order; [] for a model without weights."""
        if self.kind not in WEIGHTED:
            return []
        there = (self.P, self.Q)
        ends = [there, there if self.kind == "depthwise" else there[::-1]]
        return [self.layer(*ends[number % 2], H) for number, H in enumerate(self.maps)]

    def columns(self) -> dict:
        """The columns of a measured row that name the setting."""
        scheme: Scheme | None = None if self.choice is None else self.choice.scheme
        values = {"layer": self.family, "kind": self.kind, "P": self.P, "Q": self.Q, "H": self.H, "W": self.H}
        values |= {"Kh": self.kernel, "Kw": self.kernel, "stride": self.stride, "rate": self.rate}
        values |= {"groups": self.P if self.kind == "depthwise" else 1, "scheme": scheme.name if scheme else "dense"}
        return values | {f"block_{side}": getattr(scheme, side, None) for side in "pq"}

    @staticmethod
    def of(row) -> "TestModel":
        """The setting of a measured row. ValueError where it is none of these families or schemes."""
        if row.layer not in FAMILIES:
            raise ValueError(f"Expected a family among {', '.join(FAMILIES)}. Got {row.layer!r}.")
        texts = {"dense": "dense", "unstructured": "unstructured", "pattern": "pattern(8)"}
        text = texts.get(row.scheme) or f"{row.scheme}({int(row.block_p)}x{int(row.block_q)})"
        return TestModel(row.layer, int(row.P), int(row.Q), int(row.H), text, float(row.rate))

    def network(self, threads: int = 1, seed: int = 0) -> Network:
        """The pruned test model, compiled: layers as in `testnets.cascade`, a ReLU after each, random weights.

        Its graph is written down: tracing each setting would take most of the time of a build."""
        if self.kind not in WEIGHTED:
            model, inputs = _apart(self, seed)
            return Network(trace(model, inputs), inputs, threads)
        rng, layers, specs = np.random.default_rng(seed), {}, self.layers()
        op, sides = ("linear", 0) if self.kind == "linear" else ("conv2d", 2)
        entrance = (1, specs[0].Q * specs[0].groups, *[self.H * self.stride] * sides)
        nodes = [Node("input", "input", (), {}, entrance, None, "", 0, None)]  # nothing of it runs through PyTorch
        for number, spec in enumerate(specs):
            fan_in, name, shape = spec.Q * spec.Kh * spec.Kw, f"layer{number}", (1, spec.P, *[spec.H] * sides)
            weight = rng.standard_normal(spec.shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
            if self.choice:
                weight *= self.choice.scheme.project(weight, self.choice.rate)
            bias = rng.standard_normal(spec.P, np.float32) * np.float32(0.1)
            layers[name] = layer = replace(spec, name=name, weight=weight, bias=bias)
            nodes.append(Node(name, op, (nodes[-1].name,), {}, shape, name, name, layer.macs, None))
            limits = {"lo": 0.0, "hi": np.inf}
            nodes.append(Node(f"relu{number}", "clamp", (name,), limits, shape, None, "", 0, torch.relu))
        graph = Graph(nodes, layers, ("input",), (nodes[-1].name,), pytree.tree_structure(0), {})
        return Network(graph, (torch.from_numpy(rng.standard_normal(entrance, np.float32)),), threads)


def _apart(setting: TestModel, seed: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Steps without weights: pools of stride 2 on falling maps, and ten of what keeps the map's size."""
    P, generator = setting.P, torch.Generator().manual_seed(seed)
    x = torch.randn(1, P, *[setting.H * setting.stride] * 2, generator=generator)
    if setting.kind == "pointwise":
        return nn.Sequential(*(nn.BatchNorm2d(P) for _ in range(LAYERS))).eval(), (x,)
    if setting.kind == "global_avg":
        return _Means().eval(), tuple(x + n for n in range(LAYERS))
    if setting.kind == "pytorch":
        return nn.Sequential(*(_Shift() for _ in range(LAYERS // 2))).eval(), (x,)
    return nn.Sequential(*(nn.MaxPool2d(2) for _ in setting.maps)).eval(), (x,)


class _Shift(nn.Module):
    """Two steps that only move values and run through PyTorch: a slice and padding, here by a channel each."""

    def forward(self, x):
        return nn.functional.pad(x[:, 1:], (0, 0, 0, 0, 0, 1))


class _Means(nn.Module):
    """The means of many inputs, each on its own."""

    def forward(self, *inputs):
        return tuple(nn.functional.adaptive_avg_pool2d(x, 1) for x in inputs)


def spread(count: int = 512) -> list[TestModel]:
    """`count` settings, all families among any first part of them: Halton points in the logarithms of the sizes."""
    shares = np.array([family[0] for family in FAMILIES.values()])
    counts = np.maximum(np.round(shares / shares.sum() * max(count, 64)).astype(int), 1)
    counts[0] += max(max(count, 64) - counts.sum(), 0)
    drawn = {name: _draw(name, n) for name, n in zip(FAMILIES, counts, strict=True)}
    order = sorted((((i + 0.5) / len(models), name, i) for name, models in drawn.items() for i in range(len(models))))
    return [drawn[name][i] for _, name, i in order][:count]


def _draw(family: str, count: int) -> list[TestModel]:
    """Distinct settings of one family."""
    _, kernel, stride, channels, maps, schemes = FAMILIES[family]
    points, found = qmc.Halton(4, seed=len(family)).random(64 * count + 64), {}
    for turn, (p, q, h, r) in enumerate(points):
        scheme = schemes[len(found) % len(schemes)]
        p, q = (at ** (0.6 if kernel == 3 else 0.9) for at in (p, q))  # wide layers hold most of a network's work
        P, Q = (_near(CHANNELS if kernel else (*CHANNELS, 3072, 4096), *channels, at) for at in (p, q))
        if turn % 3 or stride > 1:  # most layers feed their likes
            Q = P
        if family.startswith(("stem", "depthwise")):
            Q = 3 if family.startswith("stem") else 1
        h = min(max(1.1 - p + 0.9 * (h - 0.5), 0.0), 1.0)  # as in networks, the more channels the smaller the map
        H = 1 if family == "linear" else _near((*MAPS, 224), *maps, h)
        rate = 1.0 if scheme == "dense" else RATES[int(r * len(RATES))]
        rate = max(rate, 2.25) if scheme == "pattern(8)" else rate
        model = TestModel(family, P, Q, H, scheme, rate)
        weights = LAYERS * P * Q * max(kernel, 1) ** 2
        if weights / rate * H * H > MOST_GMACS * 1e9 or weights > MOST_WEIGHTS * (4 if family == "linear" else 1):
            continue
        least = SMALL_MACS if turn % 5 else SMALL_MACS / 20  # layers that matter, and some small ones
        if (kernel > 1 or family.startswith("1x1")) and weights / LAYERS * H * H < least:
            continue
        if model.choice and model.kind == "conv" and dead_share(model.choice, P, Q, kernel**2) > 0.02:
            continue  # what runs would be another layer
        found[model] = None
        if len(found) == count:
            break
    return list(found)


def _near(values: tuple[int, ...], low: int, high: int, at: float) -> int:
    """The value of the list nearest, in logarithms, to the place `at` in [0, 1] between low and high."""
    inside = [value for value in values if low <= value <= high]
    wanted = np.log(low) + at * (np.log(high) - np.log(low))
    return inside[int(np.argmin([abs(np.log(value) - wanted) for value in inside]))]
