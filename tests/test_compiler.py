"""Compiled networks against PyTorch: every operator, fused and alone, random graphs, and the Network's own promises."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from naive import Branches, Lambda, agrees, same, scramble
from torch import nn

import nbs_lib as nbs
from nbs_lib.compiler import compile
from nbs_lib.schemes import Block, BlockPunched, Channel, Filter, Pattern, Unstructured

EXPLAIN = [
    "step", "layer", "op", "scheme", "rate", "nnz", "macs", "effective_macs", "removed_macs", "computed_macs",
    "weight_bytes", "activation_bytes", "kernel", "tile", "dense_ms", "sparse_ms", "timed", "chosen", "why",
]  # fmt: skip
PROFILE = [*EXPLAIN, "ms", "share_of_peak", "gbytes_s", "bound"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def conv(*args, **options):
    return nn.Conv2d(*args, **options)


def steps(net, op):
    """The rows of explain() with this operator."""
    return net.explain().query("op == @op")


# -- operators: many side by side in one network, on odd images --------------------------------------------------------

WINDOWS = {
    "k1": dict(kernel_size=1),
    "k3": dict(kernel_size=3),
    "k5": dict(kernel_size=5, padding=2),
    "k7": dict(kernel_size=7, padding=3),
    "wide": dict(kernel_size=(1, 7), padding=(0, 3)),
    "tall": dict(kernel_size=(7, 1)),
    "even": dict(kernel_size=2),
    "even_padded": dict(kernel_size=2, padding=1),
    "same": dict(kernel_size=3, padding="same"),
    "same_even": dict(kernel_size=(4, 2), padding="same"),
    "same_dilated": dict(kernel_size=(3, 4), padding="same", dilation=(2, 1)),
    "far": dict(kernel_size=3, padding=4),
    "point_padded": dict(kernel_size=1, padding=2),
    "dilated": dict(kernel_size=3, dilation=2, padding=1),
    "s2": dict(kernel_size=3, stride=2, padding=1),
    "s3": dict(kernel_size=3, stride=3),
    "s12": dict(kernel_size=3, stride=(1, 2)),
    "s21": dict(kernel_size=(2, 3), stride=(2, 1), padding=(1, 0)),
    "s2_point": dict(kernel_size=1, stride=2),
    "s3_point": dict(kernel_size=1, stride=(3, 2), padding=1),
    "s2_wide": dict(kernel_size=7, stride=2, padding=3),
    "s2_dilated": dict(kernel_size=3, stride=2, dilation=2, padding=2),
    "s4": dict(kernel_size=2, stride=4, padding=1),
}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_convolution_windows(batch):
    layers = {name: conv(3, 8, bias=len(name) % 2 == 0, **window) for name, window in WINDOWS.items()}
    net = agrees(Branches(**layers), torch.randn(batch, 3, 11, 14))
    assert net.fallback_macs == 0 and len(steps(net, "conv2d")) == len(WINDOWS)


@pytest.mark.parametrize("size", [(33, 47), (1, 19), (19, 1), (1, 1), (2, 3)])
def test_odd_images(size):
    windows = ("k5", "even_padded", "far", "s2", "s3_point", "s2_wide")
    layers = {name: conv(2, 8, **WINDOWS[name]) for name in windows}
    layers |= {"depthwise": conv(2, 2, 3, 2, 1, groups=2), "depthwise5": conv(2, 4, 5, 1, 2, groups=2)}
    layers |= {"max": nn.MaxPool2d(3, 2, 1), "average": nn.AvgPool2d(3, 1, 1), "mean": nn.AdaptiveAvgPool2d(1)}
    deep = (conv(2, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    net = agrees(Branches(deep=nn.Sequential(*deep), **layers), torch.randn(2, 2, *size))
    assert net.fallback_macs == 0


def test_grouped_and_depthwise():
    layers = {f"groups{g}": conv(12, 24, 3, padding=1, groups=g) for g in (2, 3, 4, 6)}
    layers |= {"stride": conv(12, 6, 3, 2, groups=2), "point": conv(12, 12, 1, groups=3, bias=False)}
    windows = [(3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 2), (3, 3, 1), (5, 3, 0), (3, (1, 2), 1), (3, (2, 1), 0)]
    windows += [(4, 2, 2), ((1, 7), 1, (0, 3)), (2, 1, 3), (1, 2, 0)]
    for kernel, stride, padding in windows:
        layers[f"depthwise{len(layers)}"] = conv(12, 12, kernel, stride, padding, groups=12)
    layers |= {
        "multiplier": conv(12, 36, 3, 2, 1, groups=12),
        "dilated": conv(12, 12, 3, dilation=2, padding=2, groups=12),
    }
    layers |= {"dilated2": conv(12, 24, 3, 2, dilation=(1, 3), padding=3, groups=12, bias=False)}
    net = agrees(Branches(**layers), torch.randn(2, 12, 13, 18))
    assert net.fallback_macs == 0


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "in_place": nn.ReLU(inplace=True),
    "hardtanh": nn.Hardtanh(-0.7, 0.4),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(inplace=True),
    "sigmoid": nn.Sigmoid(),
    "clamp": Lambda(lambda x: x.clamp(-0.2, 0.3)),
    "at_least": Lambda(lambda x: x.clamp(min=0.1)),
    "at_most": Lambda(lambda x: x.clamp(max=0.1)),
    "twice": nn.Sequential(nn.Hardswish(), nn.ReLU6(), nn.Hardtanh()),
}


def test_activations_end_every_kernel():
    """After a convolution, a depthwise one, batch norm, a linear layer, and alone: steps of their own only there."""
    models = {}
    for name, activation in ACTIVATIONS.items():
        models[f"{name}_conv"] = nn.Sequential(conv(4, 8, 3, padding=1), activation)
        models[f"{name}_batch"] = nn.Sequential(conv(4, 8, 1, bias=False), nn.BatchNorm2d(8), activation)
        models[f"{name}_depthwise"] = nn.Sequential(conv(4, 4, 3, groups=4), nn.BatchNorm2d(4), activation)
        models[f"{name}_linear"] = nn.Sequential(nn.Flatten(), nn.Linear(252, 5), nn.BatchNorm1d(5), activation)
        models[f"{name}_norm"] = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4), activation)
        models[f"{name}_alone"] = nn.Sequential(nn.AvgPool2d(2), activation)
    net = agrees(scramble(Branches(**models)), torch.randn(2, 4, 7, 9))
    alone = net.explain().query("op in ('clamp', 'hardswish', 'hardsigmoid', 'silu', 'sigmoid')")
    assert alone.layer.str.contains("_alone").all()
    assert not net.explain().query("layer in @net.graph.layers").chosen.eq("torch").any()


class Residuals(nn.Module):
    """Every way a sum, a product or a concatenation meets convolutions and their activations."""

    def __init__(self, c: int = 8):
        super().__init__()
        self.a, self.c = conv(c, c, 1), conv(c, c, 1)
        self.b, self.d = conv(c, c, (3, 1), padding=(1, 0)), conv(c, c, (1, 3), padding=(0, 1))
        self.norm, self.down, self.odd = nn.BatchNorm2d(c), conv(c, c, 3, 2, 1), conv(3 * c, 7, 1)

    def forward(self, x):
        y = {"input": self.a(x) + x, "flipped": x + self.b(x), "relu": F.relu(self.norm(self.b(x)) + x)}
        y["relu_before"] = F.relu(self.a(x)) + F.relu6(self.b(x))
        y["around"] = F.hardtanh(F.relu(self.a(x)) + x, -0.5, 0.5)
        y["swish"] = F.hardswish(F.hardswish(self.d(x)) + y["input"])
        y["doubled"] = self.a(x) + self.a(x)
        shared = self.c(x)
        y["x_and_x"], y["times_itself"] = shared + shared, shared * shared
        y["used_twice"] = F.relu(shared) + shared
        pooled = F.max_pool2d(x, 3, 1, 1)
        y["pool"] = self.d(pooled) + pooled
        both = torch.cat([x, self.a(x), pooled], 1)
        y["concat"] = torch.cat([self.odd(both), both], 1) + 1.0
        y["of_concat"] = self.b(x) + both[:, :8]
        y["three"] = self.a(x) + self.b(x) + self.c(x) + x
        y["chain"] = F.relu(self.a(F.relu(self.b(y["relu"]) + y["relu"])) + y["relu"])
        y["down"] = F.relu(self.down(x) + F.avg_pool2d(x, 2, ceil_mode=True))
        y["scaled"] = (self.a(x) * 0.5 + 0.25) * y["input"] + x * 2 - 1
        y["minus"], y["half"], y["rest"] = self.a(x) - self.b(x), self.a(x) / 2, 1 - self.a(x)
        y["mixed"] = self.a(x).mul_(2).add_(x).relu_()
        y["alpha"] = torch.add(self.a(x), x, alpha=2)
        y["norm_of_sum"] = self.norm(self.a(x) + x)
        return y


@pytest.mark.parametrize("batch", [1, 2])
def test_sums_and_products(batch):
    net = agrees(scramble(Residuals()), torch.randn(batch, 8, 9, 13))
    assert net.fallback_macs == 0
    assert (steps(net, "conv2d").why != "").all()


def test_products_per_channel():
    def excite(x, *layers):
        gate = x
        for layer in layers:
            gate = layer(gate)
        return x * gate

    pool = nn.AdaptiveAvgPool2d(1)
    models = {
        "hard": Lambda(excite, pool, conv(6, 2, 1), nn.ReLU(), conv(2, 6, 1), nn.Hardsigmoid()),
        "sigmoid": Lambda(excite, pool, conv(6, 2, 1), nn.ReLU(), conv(2, 6, 1), nn.Sigmoid()),
        "linear": Lambda(
            excite, nn.Sequential(pool, nn.Flatten(), nn.Linear(6, 6), nn.Hardsigmoid(), nn.Unflatten(1, (6, 1, 1)))
        ),
        "mean": Lambda(lambda x: x.mean((2, 3), keepdim=True) * x),
        "then": Lambda(lambda x, c: F.relu(x * x.mean((2, 3), keepdim=True) + c(x)), conv(6, 6, 1)),
        "rows": Lambda(lambda x: x * x.mean(3, keepdim=True)),
        "columns": Lambda(lambda x: x + x.mean(2, keepdim=True)),
        "vector": Lambda(lambda x: x + x.mean((2, 3), keepdim=True)),
        "one": Lambda(lambda x: x * torch.tensor(0.3) + torch.ones(1, 6, 1, 1)),
        "parameter": Lambda(lambda x: x * torch.arange(6.0).view(1, 6, 1, 1) + torch.arange(9.0)),
        "small": nn.Sequential(pool, Lambda(excite, conv(6, 6, 1), nn.Hardsigmoid())),
    }
    for batch in (1, 3):
        net = agrees(Branches(**models), torch.randn(batch, 6, 7, 9))
        assert net.fallback_macs == 0


def test_concatenations():
    a, b = conv(3, 5, 3, padding=1), conv(3, 1, 1)
    models = {
        "odd": Lambda(lambda x, a, b: torch.cat([a(x), b(x), x], 1), a, b),
        "twice": Lambda(lambda x: torch.cat([x, x], 1)),
        "nested": Lambda(lambda x, a, b: torch.cat([torch.cat([b(x), a(x)], 1), x, torch.cat([x], 1)], -3), a, b),
        "read": Lambda(lambda x, a, c: c(torch.cat([a(x).relu(), x], 1)) + a(x).sum(), a, conv(8, 4, 3, 2, 1)),
        "rows": Lambda(lambda x, a: torch.cat([a(x), a(x * 2)], 2), a),
        "images": Lambda(lambda x, a: torch.cat([a(x), a(x * 2)]), a),
        "vectors": Lambda(lambda x, a: torch.cat([a(x).mean((2, 3)), x.amax((2, 3))], 1), a),
        "constant": Lambda(lambda x: torch.cat([x, torch.ones(2, 1, 7, 9)], 1)),
        "flat": nn.Sequential(Lambda(lambda x: torch.cat([x.flatten(1), x.mean((2, 3))], 1)), nn.Linear(192, 4)),
    }
    assert agrees(Branches(**models), torch.randn(2, 3, 7, 9)).fallback_macs == 0


def test_pools():
    models = {}
    for kernel, stride, padding in (
        (2, 2, 0),
        (3, 2, 1),
        (3, 1, 1),
        (5, 1, 2),
        (3, 3, 0),
        ((2, 3), (1, 2), (1, 0)),
        (1, 2, 0),
        (7, 1, 3),
    ):
        for ceil in (False, True):
            models[f"max{len(models)}"] = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
            models[f"relu_max{len(models)}"] = nn.Sequential(
                conv(3, 4, 1), nn.ReLU(), nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
            )
            for count in (False, True):
                models[f"average{len(models)}"] = nn.AvgPool2d(kernel, stride, padding, ceil, count)
    models |= {"dilated": nn.MaxPool2d(3, 1, 1, 2), "dilated_stride": nn.MaxPool2d(2, 2, 1, (2, 3), ceil_mode=True)}
    models |= {
        "divisor": nn.AvgPool2d(3, 2, 1, divisor_override=5),
        "divisor_ceil": nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
    }
    sizes = ((1, 1), (3, 3), (7, 7), (25, 30), (1, 5), (None, 4), (11, 17))
    models |= {f"adaptive{size}": nn.AdaptiveAvgPool2d(size) for size in sizes}
    models |= {"keepdim": Lambda(lambda x: x.mean((-1, -2), keepdim=True)), "mean": Lambda(lambda x: x.mean((2, 3)))}
    models |= {
        "of_pool": nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), conv(3, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1))
    }
    net = agrees(Branches(**models), torch.randn(2, 3, 11, 17))
    assert not net.explain().chosen.eq("torch").any()


def test_images_beyond_the_caches():
    """Large inputs take kernels that prefetch: the next tile with short lists of columns, columns with long ones."""
    short = conv(16, 9, 1)
    long = nn.Sequential(conv(16, 64, 3, 2, bias=False), nn.ReLU(), conv(64, 8, 3, padding=1))
    net = agrees(Branches(short=short, long=long), torch.randn(1, 16, 263, 261), tuning=False)
    kernels = steps(net, "conv2d").set_index("layer").kernel
    assert all(kernel.endswith("_columns" if "long" in layer else "_tile") for layer, kernel in kernels.items())


@pytest.mark.parametrize("batch", [1, 2, 8, 9])
def test_linear(batch):
    models = {
        f"{p}": nn.Sequential(nn.Flatten(), nn.Linear(63, p, bias=p % 2 == 1), nn.Hardswish())
        for p in (1, 7, 8, 9, 15, 17, 33)
    }
    models |= {
        "rows": nn.Linear(7, 5),
        "positions": nn.Sequential(nn.Flatten(2), nn.Linear(21, 4), nn.ReLU(), nn.Linear(4, 3)),
    }
    models |= {"residual": Lambda(lambda x, f: F.relu(f(x.flatten(1)) + x.flatten(1)), nn.Linear(63, 63))}
    models |= {
        "normed": nn.Sequential(
            nn.Flatten(), nn.Linear(63, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU6(), nn.Linear(6, 1)
        )
    }
    models |= {"normed_positions": nn.Sequential(nn.Flatten(2), nn.Linear(21, 4), nn.BatchNorm1d(3), nn.ReLU())}
    models |= {"matmul": Lambda(lambda x, f: x.flatten(1) @ f.weight.t() + f.bias, nn.Linear(63, 5))}
    net = agrees(scramble(Branches(**models)), torch.randn(batch, 3, 3, 7))
    assert net.fallback_macs == 0 and set(steps(net, "linear").chosen) <= {"dense", "sparse"}


def test_changes_of_shape():
    models = {
        "flatten_input": nn.Sequential(nn.Flatten(), nn.Linear(120, 4)),
        "flatten_first": nn.Sequential(conv(4, 3, 1), nn.Flatten(), nn.Linear(90, 3)),
        "flatten_late": nn.Sequential(
            conv(4, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(18, 5)
        ),
        "back": nn.Sequential(conv(4, 6, 1), nn.Flatten(), nn.Unflatten(1, (3, 10, 6)), conv(3, 2, 3)),
        "linear_image": nn.Sequential(
            nn.Flatten(), nn.Linear(120, 72), nn.ReLU(), nn.Unflatten(1, (2, 6, 6)), conv(2, 3, 3, 2)
        ),
        "regroup": Lambda(lambda x, c: c(x).view(2, 2, -1).relu(), conv(4, 6, 1)),
        "across": Lambda(lambda x, c: c(x).reshape(-1, 30) * 2, conv(4, 6, 1)),
        "squeeze": Lambda(lambda x, c: c(x.mean((2, 3), keepdim=True)).squeeze(-1).squeeze(-1), conv(4, 6, 1)),
        "unsqueeze": Lambda(lambda x, c: c(x.mean((2, 3))[:, :, None, None]), conv(4, 6, 1)),
        "last": nn.Sequential(conv(4, 3, 1), Lambda(lambda x: x.flatten(2).transpose(1, 2)), nn.Linear(3, 5)),
    }
    net = agrees(Branches(**models), torch.randn(2, 4, 5, 6))
    assert net.fallback_macs == 0


def test_views_of_images_pytorch_keeps_in_another_order():
    """PyTorch's elementwise results keep the strides of their inputs, so that a later `view` of them is legal there."""
    models = {
        "relu": Lambda(lambda x, c: c(x).permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2).flatten(1), conv(3, 4, 1)),
        "affine": Lambda(
            lambda x, c: (c(x).permute(0, 2, 3, 1) * 2 + 1).permute(0, 3, 1, 2).view(2, -1), conv(3, 4, 1)
        ),
        "swish": Lambda(lambda x, c: F.hardswish(c(x).transpose(2, 3)).transpose(2, 3).flatten(2), conv(3, 4, 1)),
    }
    agrees(Branches(**models), torch.randn(2, 3, 5, 6))


UNKNOWN = {
    "softplus": F.softplus,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "slice": lambda x: x[:, 1:, ::2, :-1],
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "transpose": lambda x: x.transpose(2, 3),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "split": lambda x: torch.cat([part.relu() for part in x.split([1, 3], 1)], 1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "softmax": lambda x: x.softmax(1),
    "pixels": lambda x: F.pixel_shuffle(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "constant": lambda x: x + torch.linspace(0, 1, 7),
}


def test_unknown_operators_run_through_pytorch():
    """In the middle of compiled layers, and explain() says so."""
    models = {}
    for name, function in UNKNOWN.items():
        channels = function(torch.zeros(2, 4, 5, 7)).shape[1]
        after = nn.Sequential(conv(channels, 2, 3), nn.ReLU())
        models[name] = nn.Sequential(conv(3, 4, 1), Lambda(function), after)
    net = agrees(Branches(**models), torch.randn(2, 3, 5, 7))
    table = net.explain().query("chosen == 'torch'")
    assert {layer.split(".")[1] for layer in table.layer} == set(UNKNOWN)
    assert table.why.str.contains("no kernel").all()
    assert net.fallback_macs == 0 and len(steps(net, "conv2d")) == 2 * len(UNKNOWN)


def test_products_of_values_are_counted_as_fallback():
    model = Lambda(lambda x, a: a(x).flatten(2) @ a(x).flatten(2).transpose(1, 2), conv(3, 4, 1))
    net = agrees(model, torch.randn(2, 3, 5, 6))
    assert net.fallback_macs == 2 * 4 * 4 * 30
    assert net.fallback_macs == net.explain().query("chosen == 'torch'").macs.sum()
    assert agrees(nn.ConvTranspose2d(3, 4, 2), torch.randn(1, 3, 5, 6)).fallback_macs > 0


# -- whole models ------------------------------------------------------------------------------------------------------


def test_outputs_in_any_structure():
    a, b = conv(3, 3, 3, padding=1), conv(3, 5, 1)

    def forward(x, a, b):
        y = F.relu(a(x))
        z = b(y)
        return {
            "tuple": (y, x),
            "list": [z, [z.mean((2, 3)), y + z[:, :3]]],
            "number": 3,
            "none": None,
            "view": z.flatten(1),
        }

    agrees(Lambda(forward, a, b), torch.randn(2, 3, 5, 7))
    agrees(Lambda(lambda x: x), torch.randn(2, 3))
    agrees(Lambda(lambda x: (x * 2, x.argmax(1), x > 0)), torch.randn(2, 3))


def test_intermediate_values_are_outputs_too():
    """A value that goes out must not be fused away, nor overwritten by what comes after."""

    def forward(x, *layers):
        values = [x]
        for layer in layers:
            values.append(layer(values[-1]))
        return values

    layers = [conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, 1), nn.ReLU6()]
    layers += [conv(8, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(160, 9), nn.ReLU()]
    agrees(scramble(Lambda(forward, *layers)), torch.randn(2, 3, 8, 10))


def test_several_inputs_in_any_form():
    layer = conv(3, 4, 3, padding=1)
    model = Lambda(lambda a, b, c, layer: layer(a) + layer(b) * c, layer).eval()
    inputs = (torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(2, 1, 1, 1))
    net = agrees(model, *inputs)
    assert net.graph.layers.popitem()[1].calls == 2
    want = model(*inputs)
    same(net(inputs), want)
    same(net(list(inputs)), want)
    same(net(*(x.numpy() for x in inputs)), want)


def test_integers_and_tables():
    model = Lambda(lambda i, x, table, layer: layer(table(i)) + x, nn.Embedding(10, 6), nn.Linear(6, 4))
    agrees(model, torch.randint(0, 10, (2, 3)), torch.randn(2, 3, 4))


def test_module_called_twice():
    layer = conv(4, 4, 3, padding=1)
    net = agrees(Lambda(lambda x, f: f(f(x).relu()) + f(F.max_pool2d(x, 2)).sum(), layer), torch.randn(1, 4, 6, 8))
    assert net.effective_macs == net.macs == 4 * 4 * 9 * (48 + 48 + 12)


def test_model_stays_as_it_was():
    model = nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Sequential(nn.ReLU(inplace=True)))
    model.train()[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    net = compile(model, x)
    net(x)
    assert [module.training for module in model.modules()] == [True, True, True, True, False, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    same(net(x), model.eval()(x))
    with torch.no_grad():
        want = model(x)
        model[0].weight.zero_()
        same(net(x), want)  # what happens to the model later does not reach the network


# -- zeros -------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A few layers of every kind, no size a multiple of any block."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.point = conv(3, 19, 3, 2, 1, bias=False), conv(19, 21, 3, padding=1), conv(21, 13, 1)
        self.depthwise, self.last = conv(13, 13, 3, padding=1, groups=13), conv(13, 26, 3)
        self.norms, self.head = nn.ModuleList([nn.BatchNorm2d(19), nn.BatchNorm2d(21)]), nn.Linear(26 * 12, 11)

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)))
        x = F.relu6(self.norms[1](self.wide(x)))
        x = self.point(x)
        x = F.max_pool2d(F.relu(self.last(self.depthwise(x) + x)), 2)
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def small():
    """(model, example, network) that several tests only read."""
    torch.manual_seed(0)
    model, x = scramble(Small()), torch.randn(2, 3, 19, 15)
    return model, x, compile(model, x)


SCHEMES = [
    (Unstructured(), Unstructured()),
    (Filter(), Filter()),
    (Channel(), Channel()),
    (Pattern(), None),
    (BlockPunched(8, 4), Block(8, 4)),
    (BlockPunched(5, 3), Block(3, 7)),
]


@pytest.mark.parametrize(("scheme", "linear"), SCHEMES, ids=str)
def test_every_scheme(scheme, linear, small):
    """At rates 2 and 5, both in one network; `mapping` labels the rows."""
    graph, x = small[2].graph, small[1]
    models, mapping = {"r2": scramble(Small()), "r5": scramble(Small())}, {}
    for name, model in models.items():
        choices = nbs.uniform_mapping(graph, int(name[1:]), conv=(scheme, BlockPunched(4, 2)), linear=linear)
        nbs.prune(model, choices)
        mapping |= {f"models.{name}.{layer}": choice for layer, choice in choices.items()}
    net = agrees(Branches(**models), x, mapping=mapping)
    assert net.fallback_macs == 0 and len(mapping) == 2 * (4 if linear else 3)
    rows = net.explain().query("op in ('conv2d', 'linear')").set_index("layer")
    for name, choice in mapping.items():
        spec, row = net.graph[name], rows.loc[name]
        assert row.scheme == str(choice.scheme) and row.nnz == np.count_nonzero(spec.weight)
        assert row.rate == pytest.approx(spec.rate) and row.effective_macs == spec.effective_macs * len(x)
    assert (rows.effective_macs <= rows.macs).all() and rows.loc["models.r2.stem", "scheme"] == ""


def test_block_punched_zeros_are_skipped_whoever_made_them():
    """Zeros from elsewhere, in rows that lie anywhere, are found; nothing but them is skipped."""
    layer, rng = conv(16, 32, 3, padding=1, bias=False), np.random.default_rng(0)
    kept = (rng.random((4, 16, 3, 3)) < 0.25)[rng.permutation(np.repeat(np.arange(4), 8))]
    layer.weight.data *= torch.from_numpy(kept)
    net = agrees(layer, torch.randn(1, 16, 7, 7))
    (row,) = steps(net, "conv2d").itertuples()
    assert row.chosen == "sparse" and row.scheme == ""
    assert row.nnz * 49 == row.effective_macs == row.computed_macs == kept.sum() * 49
    assert agrees(conv(16, 32, 3, bias=False), torch.randn(1, 16, 7, 7)).explain().chosen.tolist()[-1] == "dense"


def test_random_zeros_and_empty_layers():
    model = scramble(Small())
    model.wide.weight.data *= torch.rand_like(model.wide.weight) < 0.05
    model.head.weight.data *= torch.rand_like(model.head.weight) < 0.05
    agrees(model, torch.randn(2, 3, 19, 15))
    model.wide.weight.data.zero_()
    model.depthwise.weight.data.zero_()
    model.head.weight.data.zero_()
    net = agrees(model, torch.randn(2, 3, 19, 15))
    row = net.explain().query("layer == 'wide' and op == 'conv2d'").iloc[0]
    assert (row.nnz, row.computed_macs, row.chosen) == (0, 0, "sparse")
    for parameter in model.parameters():
        parameter.data.zero_()
    agrees(model, torch.randn(2, 3, 19, 15))


# -- random networks ---------------------------------------------------------------------------------------------------


class RandomNet(nn.Module):
    """A random graph of CNN operators: chains, residuals, products, concatenations, odd sizes, zeros of every kind.

    `example` is its input. It gives the last value, through a head if there is one, and two values from anywhere.
    """

    KINDS = (
        *["conv"] * 4, *["depthwise"] * 2, "norm", *["activation"] * 2, *["sum"] * 2, "product", "excite",
        *["concat"] * 2, *["pool"] * 2, "mean", "scalar", "torch",
    )  # fmt: skip
    ACTIVATIONS = (
        nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid(),
        nn.Hardtanh(-0.5, 0.7), nn.SiLU(), nn.Identity(),
    )  # fmt: skip
    SCALARS = (lambda x: x * -1.5, lambda x: x + 0.5, lambda x: 1 - x, lambda x: x / 3)
    UNKNOWN = (
        lambda x: F.pad(x, (1, 2, 0, 1)),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x.softmax(1),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x: F.interpolate(x, scale_factor=2),
    )

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.rng, self.layers, self.program = np.random.default_rng(seed), nn.ModuleList(), []
        sides = [self.pick(1, 2, 5, 7, 9, 13, 16, 17, 20, 33) for _ in range(2)]
        self.example = torch.randn(self.pick(1, 1, 2, 3), self.pick(1, 2, 3, 5, 8), *sides)
        values, length = [self.example], self.pick(*range(2, 12))
        with torch.no_grad():
            for _ in range(100):
                if len(self.program) < length:
                    self.grow(values)
        features = values[-1].shape[1]
        deep = nn.Sequential(nn.Linear(features, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 3))
        self.head = self.pick(None, nn.Linear(features, 9), deep)
        self.ends = [self.pick(*range(len(values))) for _ in range(2)]
        scramble(self, seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.prune(module.weight.data)

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def prune(self, weight: torch.Tensor) -> None:
        """Zeros in any place, in whole filters or channels, in blocks of 8 filters, everywhere, or none."""
        kind = self.pick("none", "none", "any", "filters", "channels", "blocks", "all" if len(weight) < 4 else "none")
        filters = (len(weight), *[1] * (weight.ndim - 1))
        shape = {"any": weight.shape, "filters": filters, "channels": weight.shape[1:]}
        if kind == "all":
            weight.zero_()
        elif kind == "blocks":
            kept = torch.rand(-(-len(weight) // 8), *weight.shape[1:]) < 0.4
            weight *= kept.repeat_interleave(8, 0)[: len(weight)]
        elif kind != "none":
            weight *= torch.rand(shape[kind]) < self.pick(0.1, 0.4, 0.7)

    def grow(self, values: list[torch.Tensor]) -> None:
        """Try one more operator on the last value, or on an earlier one."""
        at = len(values) - 1 if self.rng.random() < 0.7 else self.pick(*range(len(values)))
        x, kind = values[at], self.pick(*self.KINDS)
        alike = [i for i, value in enumerate(values) if value.shape == x.shape]
        fitting = [i for i, value in enumerate(values) if (len(value), value.shape[2:]) == (len(x), x.shape[2:])]
        more = {"sum": [alike], "product": [alike], "concat": [fitting, fitting]}.get(kind, [])
        inputs = [at, *(self.pick(*options) for options in more)]
        layer = self.layer(kind, x.shape[1]).eval()
        try:
            y = layer(*(values[i].clone() for i in inputs))
        except (RuntimeError, ValueError):  # the image is too small for the window
            return
        if y.dim() == 4 and 0 < y.numel() < 40_000 and y.shape[1] < 60 and torch.isfinite(y).all():
            self.layers.append(layer)
            self.program.append(inputs)
            values.append(y)

    def layer(self, kind: str, channels: int) -> nn.Module:
        pick = self.pick
        if kind in ("conv", "depthwise"):
            kernel = pick((1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 7), (2, 2), (4, 3))
            stride = pick((1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (1, 2), (3, 2))
            dilation = pick((1, 1), (1, 1), (2, 2), (1, 3))
            around = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
            padding = pick(around, around, (0, 0), (pick(0, 1, 2, 4), pick(0, 1, 3)))
            groups = pick(1, 1, 1, *(g for g in (2, 3, 4) if channels % g == 0))
            filters = groups * pick(*range(1, 20))
            if kind == "depthwise":
                groups, filters = channels, channels * pick(1, 1, 2, 3)
            return conv(channels, filters, kernel, stride, padding, dilation, groups, bias=pick(True, False))
        if kind == "pool":
            kernel = pick((2, 2), (3, 3), (1, 1), (3, 2), (5, 5), (6, 6), (1, 3))
            window = (kernel, pick((1, 1), (2, 2), (3, 3), (2, 1), (1, 2)), tuple(pick(0, k // 2) for k in kernel))
            average = nn.AvgPool2d(*window, pick(True, False), pick(True, False), pick(None, None, 3))
            maximum = nn.MaxPool2d(*window, pick(1, 1, 2), ceil_mode=pick(True, False))
            return pick(maximum, average, nn.AdaptiveAvgPool2d(pick(1, (1, 1), (3, 3), (7, 2))))
        if kind == "excite":
            gate = [nn.AdaptiveAvgPool2d(1), conv(channels, 3, 1), nn.ReLU(), conv(3, channels, 1)]
            return Lambda(lambda x, gate: x * gate(x), nn.Sequential(*gate, pick(nn.Hardsigmoid(), nn.Sigmoid())))
        if kind in ("norm", "activation"):
            return nn.BatchNorm2d(channels) if kind == "norm" else pick(*self.ACTIVATIONS)
        functions = {
            "sum": torch.add,
            "product": torch.mul,
            "concat": lambda *x: torch.cat(x, 1),
            "mean": lambda x: x.mean((2, 3), keepdim=True),
            "scalar": pick(*self.SCALARS),
            "torch": pick(*self.UNKNOWN),
        }
        return Lambda(functions[kind])

    def forward(self, x):
        values = [x]
        for layer, inputs in zip(self.layers, self.program, strict=True):
            values.append(layer(*(values[i] for i in inputs)))
        last = values[-1] if self.head is None else self.head(values[-1].mean((2, 3)))
        return last, *(values[i] for i in self.ends)


@pytest.mark.parametrize("first", range(0, 40, 5))
def test_random_networks(first):
    """Forty of them, five to a network."""
    models = [RandomNet(seed) for seed in range(first, first + 5)]
    together = Lambda(lambda *values: [model(x) for model, x in zip(values[5:], values[:5], strict=True)], *models)
    net = agrees(together, *(model.example for model in models), threads=1 + first % 2)
    assert net.fallback_macs == 0


# -- the network itself ------------------------------------------------------------------------------------------------


def test_same_kind_out_as_in(small):
    model, x, net = small
    assert isinstance(net(x.numpy()), np.ndarray) and net(x.numpy()).dtype == np.float32
    out = net(x.clone().requires_grad_())
    assert isinstance(out, torch.Tensor) and not out.requires_grad and out.grad_fn is None
    same(torch.from_numpy(net(x.numpy())), out)
    same(compile(model, x.numpy())(x), out)


@pytest.mark.parametrize("arrange", ["channels_last", "transposed", "strided", "offset"])
def test_inputs_in_any_layout(small, arrange):
    model, x, net = small
    views = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": x.repeat_interleave(2, 3)[:, :, :, ::2],
        "offset": torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
    }
    same(net(views[arrange]), net(x))
    same(torch.from_numpy(net(views[arrange].numpy())), net(x))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(855, 3))
    same(compile(flat, x)(views[arrange]), flat(x))


def test_numpy_arrays_torch_cannot_wrap(small):
    """Reversed and read-only arrays are arrays too."""
    _, x, net = small
    reversed_array = x.numpy()[:, :, ::-1]
    same(torch.from_numpy(net(reversed_array)), net(x.flip(2)))


def test_scalar_inputs():
    """NumPy's arrays without dimensions are taken as such."""
    model = Lambda(lambda x, factor, layer: layer(x) * factor, conv(3, 4, 1))
    x, factor = torch.randn(1, 3, 4, 4), torch.tensor(2.0)
    net = agrees(model, x, factor)
    same(torch.from_numpy(net(x.numpy(), factor.numpy())), net(x, factor))


def test_caller_owns_the_result(small):
    _, x, net = small
    first = net(x)
    kept = first.clone()
    net(x * -3)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(net(x), kept)
    array = net(x.numpy())
    array[...] = 0
    assert torch.equal(net(x), kept)


def test_callers_changes_to_constants_do_not_reach_the_network():
    layer = conv(3, 4, 1)
    net = compile(Lambda(lambda x, layer: (layer(x), layer.bias), layer), torch.randn(1, 3, 4, 4))
    _, bias = net(torch.randn(1, 3, 4, 4))
    bias.zero_()
    same(net(torch.randn(1, 3, 4, 4))[1], layer.bias)


def test_wrong_calls(small):
    _, x, net = small
    for wrong, message in (
        ((), "Expected 1 inputs.*Got 0"),
        ((x, x), "Expected 1 inputs.*Got 2"),
        ((x[:1],), r"Expected input 0 of shape \(2, 3, 19, 15\).*Got \(1, 3, 19, 15\)"),
        ((x[0],), r"Got \(3, 19, 15\)"),
        ((x.double(),), "float32.*Got.*float64"),
        ((x.numpy().astype(np.float64),), "float32.*Got.*float64"),
        ((x.int(),), "float32.*Got.*int32"),
    ):
        with pytest.raises(ValueError, match=message):
            net(*wrong)
    same(net(x), net(x))  # still fit for use


@pytest.mark.parametrize("wrong", [None, "a", {}], ids=str)
def test_inputs_that_are_no_arrays(small, wrong):
    """Expected what, got what: also for what is neither an array nor a tensor."""
    model, _, net = small
    with pytest.raises((TypeError, ValueError), match="Expected.*Got"):
        net(wrong)
    with pytest.raises((TypeError, ValueError), match="Expected.*Got"):
        compile(model, wrong)


def test_wrong_compilations():
    model, x = conv(3, 4, 1), torch.randn(1, 3, 4, 4)
    for threads in (0, -1, 1.5, "2", None):
        with pytest.raises(ValueError, match="Expected threads to be a positive int"):
            compile(model, x, threads=threads)
    with pytest.raises(TypeError, match="Expected a torch.nn.Module"):
        compile(F.relu, x)
    with pytest.raises(ValueError, match="Expected float32"):
        compile(model, x.double())
    with pytest.raises(ValueError, match="3 channels"):
        compile(model, torch.randn(1, 2, 4, 4))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same(small, threads):
    model, x, net = small
    parallel = compile(model, x, threads=threads)
    assert parallel.threads == threads
    for values in (x, x * 2, x):
        same(parallel(values), net(values), 1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_many_threads_at_once(small, threads):
    model, x, net = small
    shared = compile(model, x, threads=threads)
    wants, wrong = [net(x * n) for n in range(4)], []

    def work(n):
        for _ in range(30):
            if not torch.allclose(shared(x * n), wants[n], atol=1e-5):
                wrong.append(n)

    callers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong and not any(caller.is_alive() for caller in callers)


def test_explain(small):
    model, x, net = small
    table = net.explain()
    assert table.columns.tolist() == EXPLAIN
    assert set(table.chosen) <= {"sparse", "dense", "torch", "copy"} and table.step.tolist() == list(range(len(table)))
    layers = table[table.op.isin(["conv2d", "linear"])].set_index("layer")
    assert set(layers.index) == set(net.graph.layers) == {"stem", "wide", "point", "depthwise", "last", "head"}
    for name, spec in net.graph.layers.items():
        row = layers.loc[name]
        assert row.macs == spec.macs * len(x) and row.effective_macs == spec.nnz * spec.H * spec.W * len(x)
        assert row.nnz == spec.nnz and row.kernel and row.tile and row.why and row.weight_bytes
    assert net.macs == layers.macs.sum() == net.graph.macs * len(x)
    assert net.effective_macs == table.effective_macs.sum() and net.fallback_macs == 0


def test_explain_says_what_both_kernels_would_take():
    """The cost model's ms where convolutions have a choice: the chosen one is the faster, in proportion to its work."""
    pruned = conv(16, 24, 3, padding=1)
    nbs.prune(pruned, nbs.uniform_mapping(nbs.trace(pruned, torch.randn(1, 16, 9, 9)), 8))
    models = {"pruned": pruned, "dense": conv(16, 24, 3, padding=1), "depthwise": conv(16, 16, 3, groups=16)}
    models |= {"pool": nn.MaxPool2d(2), "unknown": nn.Sigmoid()}
    table = compile(Branches(**models), torch.randn(2, 16, 9, 9), tuning=False).explain()
    choices = table[table.tile.ne("") & table.op.eq("conv2d") & ~table.layer.str.contains("depthwise")]
    assert choices.chosen.tolist() == ["sparse", "dense"] and not table.timed.any() and table.timed.dtype == bool
    assert (choices[["dense_ms", "sparse_ms"]] > 0).all(axis=None)
    assert np.isfinite(choices[["dense_ms", "sparse_ms"]]).all(axis=None)
    (sparse, dense), ratio = choices.itertuples(), choices.dense_ms / choices.sparse_ms
    assert sparse.sparse_ms < sparse.dense_ms == dense.dense_ms and ratio.iloc[1] == pytest.approx(1)
    assert 2 < ratio.iloc[0] <= 9  # a ninth of the weights, and the same stores
    rest = table.drop(choices.index)
    assert len(rest) and rest[["dense_ms", "sparse_ms"]].isna().all(axis=None)


def test_profile(small):
    """One time per compiled step beside what explain() says; measuring changes nothing."""
    _, x, net = small
    before, table = net(x), net.profile(x, runs=2)
    assert table.columns.tolist() == PROFILE and torch.equal(net(x), before)
    measured = table.iloc[:-1]
    pandas.testing.assert_frame_equal(measured[EXPLAIN], net.explain())
    assert (measured.ms > 0).all() and (measured.gbytes_s > 0).all()
    assert measured.share_of_peak.between(0, 1.5).all() and set(measured.bound) <= {"multiply-adds", "memory", "caches"}
    assert (measured.share_of_peak > 0).eq(measured.effective_macs > 0).all()


def test_profile_of_a_call_beside_its_steps(small):
    """The last row: what Python takes. It has no layer, no kernel, no work."""
    *_, net = small
    call = net.profile(*net.example_inputs, runs=3).iloc[-1]
    assert (call.step, call.op, call.chosen) == (len(net.steps), "call", "python") and call.ms > 0
    assert [call[name] for name in ("layer", "scheme", "kernel", "tile", "why", "bound")] == [""] * 6
    assert call.nnz == call.macs == call.computed_macs == call.weight_bytes == call.timed == 0


@pytest.mark.parametrize("runs", [1, 2, 9])
def test_profile_adds_up(runs, monkeypatch):
    """The rows add up to what whole calls took, by the same clock; a first call, however slow, does not count."""
    model = Lambda(lambda x, a, b: b(torch.erf(a(x))), conv(16, 48, 3, padding=1), conv(48, 24, 3, padding=1))
    x, took, called = torch.randn(2, 16, 56, 57), [], nbs.Network.__call__
    net = compile(model, x)

    def call(net, *inputs):
        begin = time.perf_counter()
        if not took:
            time.sleep(0.3)
        out = called(net, *inputs)
        took.append(1e3 * (time.perf_counter() - begin))
        return out

    monkeypatch.setattr(nbs.Network, "__call__", call)
    frame = net.profile(x, runs=runs)
    assert len(took) == runs + 1 and frame.ms.sum() == pytest.approx(np.median(took[1:]), rel=0.2)


def test_bytes(small):
    model, _, net = small
    assert set(net.bytes) == {"dense", "packed", "index", "activations"}
    dense = 4 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    assert net.bytes["dense"] == dense and 0 < net.bytes["index"] < dense
    assert net.bytes["packed"] >= 0.9 * dense and net.bytes["activations"] > 0
    pruned = scramble(Small())
    nbs.prune(pruned, nbs.uniform_mapping(net.graph, 8))
    assert compile(pruned, net.example_inputs).bytes["packed"] < 0.6 * dense


PACKED = {  # fully connected ones that no near cache holds: they are bound by their bytes
    "conv3x3": (conv(64, 128, 3, padding=1, bias=False), BlockPunched(8, 4), 1.1),
    "conv1x1": (conv(96, 61, 1, bias=False), BlockPunched(8, 4), 1.1),
    "linear": (nn.Linear(1024, 1000, bias=False), Block(8, 4), 1.3),
    "linear odd": (nn.Linear(2048, 515, bias=False), Block(8, 4), 1.3),
}


@pytest.mark.parametrize(("layer", "scheme", "bound"), PACKED.values(), ids=PACKED)
def test_packed_bytes_are_those_of_the_kept_weights(layer, scheme, bound):
    """At 8x; the zeros that are stored beside them are few, and index arrays are counted apart."""
    layer.weight.data.normal_()
    layer.weight.data *= torch.from_numpy(scheme.project(layer.weight.data.numpy(), 8))
    kept = torch.count_nonzero(layer.weight).item()
    assert kept == pytest.approx(layer.weight.numel() / 8, rel=0.03)
    x = torch.randn(1, layer.weight.shape[1], *((9, 7) if layer.weight.ndim == 4 else ()))
    size = agrees(layer, x, tuning=False).bytes
    assert 4 * kept <= size["packed"] <= bound * 4 * kept and 0 < size["index"] <= size["packed"]


def test_source(small):
    *_, net = small
    for layer in net.graph.layers:
        text = net.source(layer)
        assert "def kernel(args, thread):" in text and "fma(" in text
    row = net.explain().query("layer == 'wide' and op == 'conv2d'").iloc[0]
    assert row.kernel in net.source("wide")
    with pytest.raises(KeyError, match="Expected a compiled layer, one of stem.*Got 'nowhere'"):
        net.source("nowhere")


def test_description(small):
    *_, net = small
    assert net.engine.startswith("prunemap ") and "6 layers" in repr(net) and net.graph["stem"].P == 19
    assert nbs.compile is compile


@pytest.mark.parametrize("threads", [1, 2])
def test_deleted_networks_free_their_memory(small, threads):
    """At once: activations are large, and nobody waits for the garbage collector."""
    model, x, _ = small
    net = compile(model, x, threads=threads)
    net(x)
    held = [weakref.ref(net), weakref.ref(net._memory.base)]
    gc.collect()
    gc.disable()
    try:
        del net
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()


def test_profile_gives_pytorch_no_time_of_ours():
    """A slow operator between two convolutions is not charged to the first: steps are timed from start to end."""
    model = Lambda(lambda x, a, b: b(torch.erf(torch.erf(a(x)))), conv(3, 4, 1), conv(4, 5, 1))
    net = compile(model, torch.randn(1, 3, 8, 8))
    frame = net.profile(torch.randn(1, 3, 8, 8), runs=5)
    through_torch = frame["chosen"] == "torch"
    assert frame.loc[through_torch, "ms"].isna().all() and (frame.loc[through_torch, "bound"] == "PyTorch").all()
    assert through_torch.sum() == 2 and (frame.loc[~through_torch, "ms"] > 0).all()


def test_a_forked_child_has_threads_of_its_own():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    net, x = compile(conv(3, 4, 1), torch.randn(1, 3, 8, 8), threads=2), torch.randn(1, 3, 8, 8)
    net(x)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for ever is killed, and its status says so
        net(x.numpy())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_sigmoid_and_silu_are_close_to_float64_everywhere():
    x = torch.cat(
        [torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, 200.0, -200.0, 1e30, float("inf")])]
    )
    for module in (nn.Sigmoid(), nn.SiLU()):
        got = nbs.compile(nn.Sequential(nn.AvgPool2d(1), module), x.view(1, 1, 1, -1))(x.view(1, 1, 1, -1)).ravel()
        wanted = module(x.double())
        assert (
            ((got - wanted).abs() <= 3e-7 * wanted.abs() + 1e-37 * x.abs().clamp(1))
            .where(wanted.isfinite(), got == wanted)
            .all()
        )
    nan = torch.full((1, 1, 2, 9), float("nan"))
    assert nbs.compile(nn.Sequential(nn.AvgPool2d(1), nn.SiLU()), nan)(nan).isnan().all()
