"""Oracles: what the kernels must give, in plain loops, and what whole networks must give, by PyTorch.

The loops add up in float64, so that only the kernel's rounding is left.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from nbs_lib.compiler import Network, compile


def conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1):
    """x (N, C, H, W), weight (P, C / groups, Kh, Kw), padding (top, bottom, left, right) -> (N, P, H', W'), float64."""
    (images, _, height, width), (filters, channels, kernel_h, kernel_w) = x.shape, weight.shape
    top, bottom, left, right = padding
    out_h = (height + top + bottom - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_w = (width + left + right - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    out = np.zeros((images, filters, out_h, out_w))
    for n, p, i, j in itertools.product(*map(range, out.shape)):
        total = 0.0 if bias is None else float(bias[p])
        first = p // (filters // groups) * channels
        for q, a, b in itertools.product(range(channels), range(kernel_h), range(kernel_w)):
            h, w = i * stride[0] - top + a * dilation[0], j * stride[1] - left + b * dilation[1]
            if 0 <= h < height and 0 <= w < width:
                total += float(x[n, first + q, h, w]) * float(weight[p, q, a, b])
        out[n, p, i, j] = total
    return out


def linear(x, weight, bias=None):
    """x (N, Q), weight (P, Q) -> (N, P), float64: a product over the weights that are not zero."""
    out = np.zeros((len(x), len(weight)))
    for n, p in itertools.product(*map(range, out.shape)):
        kept = np.flatnonzero(weight[p])
        out[n, p] = math.fsum(float(x[n, q]) * float(weight[p, q]) for q in kept) + (0 if bias is None else bias[p])
    return out


def pool2d(x, kernel, stride, padding=(0, 0), size=None, average=False, count_padding=True):
    """Max or average over windows of x (N, C, H, W); `size` is the output's (H', W'), by default without ceil_mode."""
    height, width = x.shape[2:]
    size = size or [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    out = np.zeros((*x.shape[:2], *size))
    for n, c, i, j in itertools.product(*map(range, out.shape)):
        top, left = i * stride[0] - padding[0], j * stride[1] - padding[1]
        bottom, right = min(top + kernel[0], height + padding[0]), min(left + kernel[1], width + padding[1])
        window = x[n, c, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)].astype(float)
        count = (bottom - top) * (right - left) if count_padding else window.size
        out[n, c, i, j] = window.sum() / count if average else window.max()
    return out


def adaptive_average(x, size):
    """Adaptive average pooling of x (N, C, H, W) to `size`: windows from floor(i H / H') to ceil((i + 1) H / H')."""
    out = np.zeros((*x.shape[:2], *size))
    for i, j in itertools.product(*map(range, size)):
        top, bottom = i * x.shape[2] // size[0], -(-(i + 1) * x.shape[2] // size[0])
        left, right = j * x.shape[3] // size[1], -(-(j + 1) * x.shape[3] // size[1])
        out[:, :, i, j] = x[:, :, top:bottom, left:right].astype(float).mean((2, 3))
    return out


def unpack(segments, shape):
    """The matrix (P, columns) that packed segments compute, and how often each filter is in one."""
    matrix, seen = np.zeros(shape, np.float32), np.zeros(shape[0], int)
    for segment in segments:
        for group, filters in enumerate(segment.filters):
            for at in range(segment.begins[group], segment.begins[group + 1]):
                for row, filter_number in enumerate(filters):
                    matrix[filter_number, segment.columns[at]] += segment.weights[at, row]
            for filter_number in filters:
                seen[filter_number] += 1
    return matrix, seen


class Branches(nn.Module):
    """Many small models on the same inputs: one trace and one network cover all of them. Gives a dict of outputs."""

    def __init__(self, **models: nn.Module):
        super().__init__()
        self.models = nn.ModuleDict(models)

    def forward(self, *inputs):
        return {name: model(*inputs) for name, model in self.models.items()}


class Lambda(nn.Module):
    """A function, and the modules it calls, as a module."""

    def __init__(self, function, *modules: nn.Module):
        super().__init__()
        self.function, self.modules_called = function, nn.ModuleList(modules)

    def forward(self, *inputs):
        return self.function(*inputs, *self.modules_called)


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and weights as if trained, from the ninth channel on some zero gammas; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)[8::5] = 0
                module.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def same(got, want, tolerance: float = 1e-5) -> None:
    """Assert that both hold the same tensors: values within `tolerance` of the largest; NaN and infinity alike."""
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(want)]
    for path, one, other in zip(paths, pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        if not isinstance(other, torch.Tensor):
            assert one == other, path
            continue
        one, other = torch.as_tensor(one), other.detach()
        assert (one.shape, one.dtype, one.requires_grad) == (other.shape, other.dtype, False), path
        if other.dtype == torch.float32 and other.numel():
            finite = torch.isfinite(other)
            largest = float(other[finite].abs().max()) if finite.any() else 0.0
            torch.testing.assert_close(
                one, other, rtol=0, atol=tolerance * largest, equal_nan=True, msg=f"{path}: {{}}".format
            )
        else:
            assert torch.equal(one, other), path


def agrees(model: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5, **options) -> Network:
    """Compile `model`; compare it with PyTorch on `inputs`, on others, and on `inputs` again: runs leave no traces."""
    model.eval()
    net = compile(model, inputs, **options)
    others = tuple(x * -2 + 0.25 if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        for values in (inputs, others, inputs):
            same(net(*(x.clone() for x in values)), model(*(x.clone() for x in values)), tolerance)
    return net
