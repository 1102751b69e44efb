"""The papers' test models: ten cascaded layers of one setting (mapping paper 5.2.1), random weights, a ReLU after each.

Where P = Q a layer feeds the next; where they differ they alternate, Q -> P, P -> Q. A stride or a depth multiplier
leaves no way back to the first shape: then ten independent layers run on ten inputs.
"""

import torch
from torch import nn

from nbs_lib.pruning import prune
from nbs_lib.schemes import Choice, Scheme


class Cascade(nn.Module):
    """CONV layers with a ReLU each: one after the other, or (`chained=False`) each on an input of its own."""

    def __init__(self, convs: list[nn.Conv2d], chained: bool):
        super().__init__()
        self.convs, self.chained = nn.ModuleList(convs), chained

    def forward(self, *inputs):
        if not self.chained:
            return tuple(torch.relu(conv(x)) for conv, x in zip(self.convs, inputs, strict=True))
        (x,) = inputs
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x


def cascade(P, Q, H, W, kernel=3, stride=1, groups=1, layers=10, seed=0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A test model in eval mode and its example inputs, float32, batch 1.

    As in a LayerSpec, P: filters; Q: input channels per group; H, W: output feature map. kernel: odd, square, padded
    by half of it. ValueError for an even kernel, or groups that do not divide P."""
    if kernel % 2 == 0 or P % groups:
        raise ValueError(f"Expected an odd kernel, and groups that divide P = {P}. Got {kernel}, groups {groups}.")
    channels = Q * groups
    chained = stride == 1 and (channels == P or Q > 1 or groups == 1)
    ends = [(channels, P), (P, channels)] if chained else [(channels, P)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sides = [ends[number % len(ends)] for number in range(layers)]
        convs = [nn.Conv2d(*side, kernel, stride, kernel // 2, groups=groups) for side in sides]
        inputs = tuple(torch.randn(1, channels, H * stride, W * stride) for _ in range(1 if chained else layers))
    return Cascade(convs, chained).eval(), inputs


def linear_cascade(P, Q, layers=10, seed=0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The same of fully connected layers with P outputs and Q inputs, a ReLU after each; the input is (1, Q)."""
    ends = [(Q, P), (P, Q)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [(nn.Linear(*ends[number % 2]), nn.ReLU()) for number in range(layers)]
        return nn.Sequential(*(module for pair in parts for module in pair)).eval(), (torch.randn(1, Q),)


def prune_evenly(model: nn.Module, scheme: Scheme, rate: float) -> dict[str, Choice]:
    """Prune every CONV layer of `model` in place, by magnitude, at one rate; returns the mapping. Raises as `prune`."""
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    mapping = dict.fromkeys(convs, Choice(scheme, rate))
    prune(model, mapping)
    return mapping
