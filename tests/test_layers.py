import math
import os
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from nbs_lib.layers import LayerSpec, trace
from nbs_lib.models import build, imagenet

VOCABULARY = {
    *(
        "input",
        "constant",
        "conv2d",
        "linear",
        "affine",
        "clamp",
        "hardswish",
        "hardsigmoid",
        "silu",
        "sigmoid",
        "add",
        "mul",
        "max_pool2d",
    ),
    *("avg_pool2d", "adaptive_avg_pool2d", "global_avg", "reshape", "cat"),
}


def by_call(graph, *inputs):
    """Run every node through its own `call`."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        if node.op != "input":
            values[node.name] = node.call(*(values[name] for name in node.inputs))
        if node.shape is not None:
            assert tuple(values[node.name].shape) == node.shape, node
    return graph.unflatten([values[name] for name in graph.outputs])


def by_words(graph, *inputs):
    """Run every node from `op`, `attrs` and `layers` alone; only "torch:" nodes use their `call`."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        x = [values[name] for name in node.inputs]
        if node.op.startswith("torch:"):
            values[node.name] = node.call(*x)
        elif node.op != "input":
            assert node.op in VOCABULARY
            values[node.name] = word(node, graph.layers.get(node.layer), *x)
    return graph.unflatten([values[name] for name in graph.outputs])


def word(node, layer, x=None, y=None, *more):
    a = node.attrs
    if node.op in ("conv2d", "linear"):
        weight, bias = torch.from_numpy(layer.weight), None if layer.bias is None else torch.from_numpy(layer.bias)
        if node.op == "linear":
            return F.linear(x, weight, bias)
        top, bottom, left, right = layer.padding
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, weight, bias, layer.stride, 0, layer.dilation, layer.groups)
    if node.op == "affine":
        wide = (1, -1) + (1,) * (x.dim() - 2)
        return x * torch.from_numpy(a["scale"]).view(wide) + torch.from_numpy(a["shift"]).view(wide)
    if node.op in ("add", "mul"):
        y = a["scalar"] if a["scalar"] is not None else y
        return x + y if node.op == "add" else x * y
    if node.op == "max_pool2d":
        return F.max_pool2d(x, a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])
    if node.op == "avg_pool2d":
        rest = a["ceil_mode"], a["count_include_pad"], a["divisor"]
        return F.avg_pool2d(x, a["kernel"], a["stride"], a["padding"], *rest)
    return {
        "constant": lambda: torch.from_numpy(a["value"]),
        "clamp": lambda: x.clamp(a["lo"], a["hi"]),
        "hardswish": lambda: x * ((x + 3).clamp(0, 6) / 6),
        "hardsigmoid": lambda: (x + 3).clamp(0, 6) / 6,
        "silu": lambda: x / (1 + (-x).exp()),
        "sigmoid": lambda: 1 / (1 + (-x).exp()),
        "adaptive_avg_pool2d": lambda: F.adaptive_avg_pool2d(x, a["output"]),
        "global_avg": lambda: x.mean((2, 3), keepdim=a["keepdim"]),
        "reshape": lambda: x.reshape(node.shape),
        "cat": lambda: torch.cat([x, *([] if y is None else [y]), *more], a["dim"]),
    }[node.op]()


def scramble(model):
    """Batch norm as after training: no mean, variance, scale or shift is 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.7, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.2)
                nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def check(model, *inputs):
    """Trace, and compare both ways of running the graph with the model."""
    graph = trace(model.eval(), inputs)
    with torch.no_grad():
        expected = model(*(x.clone() for x in inputs))
        actual, words = by_call(graph, *inputs), by_words(graph, *inputs)
    expected, spec = torch.utils._pytree.tree_flatten(expected)
    for run in (actual, words):
        run, run_spec = torch.utils._pytree.tree_flatten(run)
        assert run_spec == spec
        for got, wanted in zip(run, expected, strict=True):
            if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
                close(got, wanted)
            else:
                assert np.array_equal(got, wanted)
    return graph


def ops(graph):
    return [node.op for node in graph.nodes]


# Whole networks ------------------------------------------------------------------------------------------------------

PLAIN = ["mobilenet_v3_small", "squeezenet1_0", "googlenet", *["densenet121"] * bool(os.environ.get("NBS_TEST_ALL"))]


@pytest.mark.parametrize("name", [*PLAIN, "shufflenet_v2_x1_0", "efficientnet_b0"])
def test_torchvision_networks(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet's, about its initialisation
        model = scramble(getattr(imagenet, name)(weights=None))
    graph = check(model, torch.randn(2, 3, 65, 70))
    if name in PLAIN:
        assert set(ops(graph)) <= VOCABULARY
    modules = dict(model.named_modules())
    for layer in graph.layers.values():
        assert np.array_equal(layer.weight, modules[layer.name].weight.detach())
    layers = [name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(graph.layers) == sorted(name for name in layers if "aux" not in name)  # googlenet's train only
    assert sum(node.macs for node in graph.nodes) == 2 * graph.macs


@pytest.mark.parametrize("name", ["vgg16_cifar", "resnet20"])
def test_cifar_networks(name):
    torch.manual_seed(0)
    check(scramble(build(name, width=0.25)), torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "macs"), [("resnet18", 1_814_073_344), ("resnet50", 4_089_184_256), ("mobilenet_v2", 300_774_272)]
)
def test_known_macs(name, macs):
    torch.manual_seed(0)
    graph = check(scramble(build(name)), torch.randn(1, 3, 224, 224))
    assert set(ops(graph)) <= VOCABULARY
    assert graph.macs == macs == graph.frame()["macs"].sum() == sum(node.macs for node in graph.nodes)


def test_a_transformer_runs_and_counts():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    graph = check(model, torch.randn(3, 5, 16))
    assert graph["layers.0.self_attn.in_proj_weight"].H == 5  # also where the layer sees the sequence first
    assert graph["layers.1.self_attn.out_proj"].macs == 5 * 16 * 16
    assert graph["layers.1.linear1"].macs == 5 * 16 * 24
    attention = [node.macs for node in graph.nodes if node.op == "torch:scaled_dot_product_attention"]
    assert attention == [3 * 2 * (5 * 5 * 16)] * 2


# Names and calls -----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
        self.act = nn.ReLU()
        self.alias = self.head

    def forward(self, x):
        x = self.act(self.head(x))
        return self.act(self.alias(x)), self.head(x[:, :, ::2, ::2])


def test_a_module_used_again_is_one_layer():
    graph = check(Shared(), torch.randn(2, 3, 7, 9))
    (layer,) = graph.layers.values()
    assert (layer.name, layer.calls, layer.H, layer.W) == ("head.0", 3, 7, 9)
    assert layer.positions == 7 * 9 * 2 + 4 * 5
    assert layer.macs == 81 * layer.positions == sum(node.macs for node in graph.nodes) / 2
    assert [node.layer for node in graph.nodes if node.op == "conv2d"] == ["head.0"] * 3


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernels = nn.ParameterList([nn.Parameter(torch.randn(4, 3, 3, 3))])
        self.block = nn.Module()
        self.block.weight = nn.Parameter(torch.randn(5, 4, 1, 1))
        self.weight = nn.Parameter(torch.randn(2, 5))
        self.register_buffer("basis", torch.randn(4, 4, 2, 2))
        self.plain = torch.randn(4, 4, 1, 1)

    def forward(self, x):
        x = F.conv2d(x, self.kernels[0], stride=2)
        x = F.conv2d(F.conv2d(x, self.basis), self.plain)
        x = F.conv2d(x, self.block.weight).mean((-1, -2))
        return F.linear(x, self.weight)


def test_names_without_a_module_are_parameter_paths():
    graph = check(Bare(), torch.randn(2, 3, 9, 8))
    assert list(graph.layers) == ["kernels.0", "basis", "plain", "block", "weight"]


def test_a_parameter_used_with_two_windows_is_two_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(F.conv2d(F.conv2d(x, self.k), self.k, stride=2), self.k)

    graph = check(Twice(), torch.randn(1, 3, 17, 13))
    first, second = graph.layers.values()
    assert (first.name, first.stride, first.calls) == ("k", (1, 1), 2)
    assert (second.stride, second.calls) == ((2, 2), 1)
    assert graph.macs == sum(node.macs for node in graph.nodes)


def test_a_model_that_is_a_layer_is_named_by_its_parameter():
    assert list(check(nn.Conv2d(3, 2, 1), torch.randn(1, 3, 5, 5)).layers) == ["weight"]


def test_tied_weights_are_two_layers_of_one_memory():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    graph = check(nn.Sequential(first, nn.ReLU(), second), torch.randn(2, 5))
    assert list(graph.layers) == ["0", "2"]
    assert np.shares_memory(graph["0"].weight, graph["2"].weight)
    assert not np.array_equal(graph["0"].bias, graph["2"].bias)


def test_modules_of_nodes():
    graph = trace(nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.SiLU()), nn.Identity()), torch.zeros(1, 1, 2, 2))
    assert [(node.op, node.module) for node in graph.nodes[1:]] == [("conv2d", "0.0"), ("silu", "0.1")]


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"),
    [
        *((1, "same", 1), (2, "same", 1), (3, "same", (2, 3)), (4, "same", 1), ((5, 2), "same", (2, 3))),
        *((2, "valid", 1), ((5, 2), "valid", 2), (3, 2, 1), ((4, 1), (1, 2), (1, 3))),
    ],
)
def test_padding_is_explicit(kernel, padding, dilation):
    model = nn.Conv2d(3, 4, kernel, padding=padding, dilation=dilation)
    graph = check(model, torch.randn(2, 3, 17, 13))
    (layer,) = graph.layers.values()
    assert graph.nodes[-1].shape == (2, 4, layer.H, layer.W)
    if padding == "same":
        top, bottom, left, right = layer.padding
        assert 0 <= bottom - top <= 1 and 0 <= right - left <= 1 and (layer.H, layer.W) == (17, 13)


@pytest.mark.parametrize(
    ("channels", "filters", "groups", "kind"),
    [(6, 8, 2, "conv"), (6, 6, 6, "depthwise"), (6, 12, 6, "depthwise"), (1, 4, 1, "conv"), (6, 4, 1, "conv")],
)
def test_kinds_of_convolutions(channels, filters, groups, kind):
    model = nn.Conv2d(channels, filters, (3, 2), stride=(2, 1), padding=1, groups=groups, bias=False)
    (layer,) = check(model, torch.randn(2, channels, 8, 9)).layers.values()
    assert (layer.kind, layer.P, layer.Q, layer.groups, layer.bias) == (kind, filters, channels // groups, groups, None)
    assert (layer.Kh, layer.Kw, layer.stride, layer.H, layer.W) == (3, 2, (2, 1), 4, 10)
    assert layer.macs == filters * (channels // groups) * 6 * 40
    assert layer.weight.dtype == np.float32 and layer.weight.flags.c_contiguous


def test_linear_layers_on_sequences():
    graph = check(nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)), torch.randn(2, 5, 3, 7))
    assert [(layer.P, layer.Q, layer.H, layer.W, layer.macs) for layer in graph.layers.values()] == [
        (9, 7, 15, 1, 15 * 63),
        (4, 9, 15, 1, 15 * 36),
    ]
    assert [node.macs for node in graph.nodes if node.op == "linear"] == [2 * 15 * 63, 2 * 15 * 36]


def test_frames_folded_into_the_batch_count_per_image():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x.flatten(0, 1))

    layer = check(Video(), torch.randn(2, 5, 3, 4, 6))["conv"]
    assert (layer.H, layer.W, layer.macs) == (4, 6, 5 * 24 * 12)


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 4))
        self.b, self.c = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        linear = torch.addmm(self.b, x, self.w.t()), x @ self.w.t(), torch.mm(x, self.w.T), x.view(1, 2, 3) @ self.w.T
        other = x @ self.v, torch.addmm(self.b, x, self.v), torch.addmm(self.c, x, self.w.t())
        return *linear, *other, torch.addmm(self.b, x, self.w.t(), beta=2), self.w @ x.t(), x @ x[0]


def test_products_with_a_transposed_parameter_are_linear_layers():
    graph = check(Products(), torch.randn(2, 3))
    assert [op for op in ops(graph) if op == "linear"] == ["linear"] * 4
    assert {layer.shape for layer in graph.layers.values()} == {(4, 3)} and "w" in graph.layers
    other = {node.name: node.macs for node in graph.nodes if re.match("torch:(add|mat)?mm|torch:matmul", node.op)}
    assert sorted(other.values())[-4:] == [24] * 4


def test_other_layers_run_through_pytorch_and_count():
    def macs(model, *shape):
        (node,) = (node for node in check(model, torch.randn(*shape)).nodes if "conv" in node.op or node.op == "linear")
        assert node.op.startswith("torch:")
        return node.macs

    assert macs(nn.Conv1d(3, 4, 3), 2, 3, 9) == 2 * 7 * 36
    assert macs(nn.Conv3d(3, 4, 2), 2, 3, 4, 5, 6) == 2 * 60 * 96
    assert macs(nn.ConvTranspose2d(3, 4, 2), 2, 3, 5, 5) == 2 * 25 * 48
    assert macs(nn.Conv2d(3, 4, 3), 3, 7, 8) == 30 * 108  # no batch

    class Correlation(nn.Module):
        def forward(self, x):
            return F.conv2d(x, x[:2])

    assert macs(Correlation(), 3, 2, 5, 5) == 3 * 2 * 2 * 25


def test_a_vector_into_a_linear_layer_is_no_batch():
    assert "torch:linear" in ops(check(nn.Linear(3, 4), torch.randn(3)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (2, 6, 5, 7)])
def test_batch_norm_is_affine(affine, shape):
    model = scramble((nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6, affine=affine, eps=1e-3))
    node = check(model, torch.randn(*shape)).nodes[-1]
    assert node.op == "affine" and node.attrs["scale"].dtype == np.float32
    gain = model.weight.double() if affine else 1
    expected = (gain / (model.running_var.double() + 1e-3).sqrt()).float()
    assert np.array_equal(node.attrs["scale"], expected.detach().numpy()) or np.allclose(
        node.attrs["scale"], expected.detach(), rtol=2e-7
    )


def test_batch_norm_of_the_batch_is_not():
    graph = check(nn.BatchNorm2d(3, track_running_stats=False), torch.randn(2, 3, 4, 5))
    assert "affine" not in ops(graph)


# Weights computed in the forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm", "hook"])
def test_weights_that_modules_compute_are_folded(how):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    if how == "prune":
        prune.random_unstructured(conv, "weight", 0.5)
    elif how == "hook":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(conv)
    else:
        getattr(parametrizations, how)(conv)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(6, 4, 1), conv).eval()
    graph = check(model, torch.randn(2, 4, 7, 9))
    assert ops(graph) == ["input", "conv2d", "clamp", "conv2d", "conv2d"]
    assert list(graph.layers) == ["0", "2"] and graph["0"].calls == 2
    if how == "prune":
        assert graph["0"].nnz == 108 and graph["0"].rate == 2.0 and type(conv.weight) is torch.Tensor
        assert graph["0"].effective_macs == graph["0"].macs / 2
    with torch.no_grad():
        model(torch.randn(1, 4, 5, 5))  # nothing of the tracing is left behind


def test_what_depends_on_no_input_is_computed_once():
    class Positions(nn.Module):
        def forward(self, x):
            steps = torch.arange(x.shape[1], dtype=torch.float32)
            return x + torch.sin(steps / 10) * torch.ones(3, 1)

    graph = check(Positions(), torch.randn(3, 5))
    assert ops(graph) == ["input", "constant", "add"]
    assert graph.nodes[1].attrs["value"].shape == (3, 5) and graph.nodes[2].attrs == {"scalar": None}


def test_chance_is_not_folded():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand(1000) + F.dropout(torch.ones(1000), training=True)

    graph = trace(Noise(), torch.zeros(1000))
    assert not torch.equal(by_call(graph, torch.zeros(1000)), by_call(graph, torch.zeros(1000)))


# Operators -----------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def forward(self, x):
        a = F.relu(x), F.relu6(x), F.hardtanh(x, -0.5, 2), x.clamp(0), x.clamp(max=1.0), x.clip(-1, 1)
        b = (
            F.hardswish(x),
            F.hardsigmoid(x),
            F.silu(x),
            torch.sigmoid(x),
            x + 2,
            3 * x,
            x + x,
            x * x[:, :1],
            x.add(x, alpha=2),
            torch.add(x, 1.5),
        )
        c = F.max_pool2d(x, 2), F.max_pool2d(x, 3, 2, 1, 1, ceil_mode=True), F.avg_pool2d(x, (2, 3), ceil_mode=True)
        d = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), F.avg_pool2d(x, 2, divisor_override=3)
        e = F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (3, 2)), F.adaptive_avg_pool2d(x, (7, None))
        f = x.mean((2, 3)), x.mean((-1, -2), keepdim=True), x.mean(1), x.mean(), x.mean((1, 2, 3))
        g = x.flatten(1), x.view(2, 3, -1), x.unsqueeze(1), x[:, :1].squeeze(1), x.flatten(1).unflatten(1, (3, 63))
        h = torch.cat([x, x, x[:1]]), torch.cat([x, 2 * x], -3), torch.stack([x, x])
        return *a, *b, *c, *d, *e, *f, *g, *h, F.max_pool2d(x[0], 2), F.avg_pool2d(x[0], 2)


def test_the_vocabulary():
    x = torch.randn(2, 3, 7, 9) * 2
    graph = check(Words(), x)
    assert set(ops(graph)) >= VOCABULARY - {"constant", "conv2d", "linear", "affine"}
    assert {op for op in ops(graph) if op not in VOCABULARY} <= {
        *("torch:mean", "torch:slice", "torch:select", "torch:stack", "torch:add"),
        *("torch:max_pool2d", "torch:avg_pool2d"),  # without a batch
    }
    limits = [(node.attrs["lo"], node.attrs["hi"]) for node in graph.nodes if node.op == "clamp"]
    assert limits == [(0, math.inf), (0, 6), (-0.5, 2), (0, math.inf), (-math.inf, 1), (-1, 1)]
    means = [node.attrs["keepdim"] for node in graph.nodes if node.op == "global_avg"]
    assert means == [False, True]
    for node in graph.nodes:
        assert not any(isinstance(value, torch.Tensor) for value in node.attrs.values())


def test_identities_vanish():
    class Nothing(nn.Module):
        def forward(self, x):
            x = F.dropout(x.contiguous().clone().detach().to(torch.float32).float(), training=self.training)
            return F.adaptive_avg_pool2d(x[:, :].view_as(x).expand_as(x), x.shape[2:])

    model = nn.Sequential(nn.Identity(), nn.Dropout(), nn.Dropout2d(), Nothing(), nn.Flatten(1, 1), nn.ReLU())
    assert ops(check(model, torch.randn(2, 3, 5, 7))) == ["input", "clamp"]


def test_memory_layouts_are_kept():
    class Shuffle(nn.Module):
        def forward(self, x):
            y = x.view(2, 2, 3, 5, 7).transpose(1, 2).contiguous().view(2, 6, 5, 7)
            return y + x.permute(0, 3, 1, 2).contiguous().view(2, 6, 5, 7), y.permute(0, 2, 3, 1).reshape(2, -1)

    check(Shuffle(), torch.randn(2, 6, 5, 7))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    check(model.to(memory_format=torch.channels_last), torch.randn(2, 3, 7, 9))


def test_pools_with_indices_and_other_types_run_through_pytorch():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).double()

        def forward(self, x):
            y, indices = F.max_pool2d(x, 2, return_indices=True)
            return y, indices + 1, self.conv(x.double()).float(), torch.split(x, 2, 1)[1]

    graph = check(Mixed(), torch.randn(2, 3, 7, 9))
    assert not graph.layers and "torch:conv2d" in ops(graph)
    assert [node.shape for node in graph.nodes if node.op == "torch:max_pool2d_with_indices"] == [None]


# Inputs and outputs --------------------------------------------------------------------------------------------------


def test_structured_inputs_and_outputs():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.embed = nn.Parameter(torch.randn(3)), nn.Embedding(5, 3)

        def forward(self, x, unused, index):
            y = x + self.embed(index)
            return {"sum": y, "none": None, "pair": (y, [x, 3]), "scale": self.scale, "name": "y"}

    graph = trace(Both(), (torch.randn(2, 3), torch.zeros(1), torch.tensor([1, 4])))
    assert len(graph.inputs) == 3 and len(graph.outputs) == 4
    result = graph.unflatten(list("abcd"))
    assert result == {"sum": "a", "none": None, "pair": ("b", ["c", 3]), "scale": "d", "name": "y"}
    assert graph.outputs[2] == graph.inputs[0] and graph.outputs[0] == graph.outputs[1]
    with pytest.raises(ValueError, match="Expected 4 values, one per output. Got 3."):
        graph.unflatten([1, 2, 3])
    check(Both(), torch.randn(2, 3), torch.zeros(1), torch.tensor([1, 4]))


def test_an_input_changed_in_place_stays_the_callers():
    x = torch.randn(2, 3)
    kept = x.clone()
    graph = trace(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), x)
    assert torch.equal(x, kept) and ops(graph) == ["input", "clamp", "linear"] and len(graph.outputs) == 1


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), TypeError, "Expected example_inputs to be a tensor or a tuple of tensors"),
        ((torch.zeros(1, 3, 8, 8), None), TypeError, "Expected example_inputs to be a tensor or a tuple of tensors"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), ValueError, "Expected float32 .* Got torch.float64."),
        (torch.zeros(1, 3, 8, 8).half(), ValueError, "Expected float32 .* Got torch.float16."),
        (torch.zeros(1, 4, 8, 8), ValueError, r"shape \[\(1, 4, 8, 8\)\].*\(in module '1.0' \(Conv2d\), operator conv"),
        ((torch.zeros(1, 3, 8, 8),) * 2, ValueError, "too many positional arguments"),
    ],
)
def test_wrong_inputs_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        trace(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(3, 4, 3))), inputs)


def test_only_modules_are_traced():
    with pytest.raises(TypeError, match="Expected a torch.nn.Module. Got function."):
        trace(F.relu, torch.zeros(1))


# Refusals ------------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Crop(nn.Module):
    def forward(self, x):
        return x[:, : int(x.max().item())]


class Numpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() + 1)


class Pick(nn.Module):
    def forward(self, x):
        return x.nonzero()


class Cond(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return x * self.steps


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branch(), r"'1' \(Branch\), operator __bool__"),
        (Crop(), r"'1' \(Crop\)"),
        (Numpy(), r"'1' \(Numpy\), operator numpy"),
        (Pick(), "depend on the input's values. Got operator nonzero in module '1'"),
        (Cond(), "depend on the input's values. Got operator cond in module '1'"),
        (Count(), "changes no buffers in eval mode. Got changes of .*1.steps"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(model, message, capfd):
    with pytest.raises(ValueError, match=message) as caught:
        trace(nn.Sequential(nn.Identity(), model), torch.randn(2, 3))
    assert (caught.value.__cause__ is None) == ("Got" in message)  # torch's own error, where it is one
    assert capfd.readouterr() == ("", "")


# The model stays as it was -------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    def __init__(self, fails=False):
        super().__init__()
        self.conv, self.norm, self.fails, self.last, self.runs = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), fails, None, 0

    def forward(self, x):
        self.last, self.runs = self.norm(self.conv(x)), self.runs + 1
        return Branch()(self.last) if self.fails else self.last


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_attributes_are_restored(fails):
    model = nn.Sequential(Remembers(fails), nn.Dropout())
    model.train()
    model[0].norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if fails:
        with pytest.raises(ValueError, match=r"'0' \(Remembers\)|unknown|Branch"):
            trace(model, torch.randn(2, 3, 5, 5))
    else:
        assert ops(trace(model, torch.randn(2, 3, 5, 5))) == ["input", "conv2d", "affine"]
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert model[0].last is None and model[0].runs == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and torch.is_grad_enabled()


def test_the_graph_is_a_snapshot():
    model = nn.Linear(3, 4)
    graph = trace(model, torch.zeros(2, 3))
    weight, y = graph["weight"].weight.copy(), by_call(graph, torch.ones(2, 3))
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    assert np.array_equal(graph["weight"].weight, weight) and torch.equal(by_call(graph, torch.ones(2, 3)), y)
    assert y.grad_fn is None


def test_tracing_is_silent(recwarn, capfd):
    trace(Shared(), torch.zeros(1, 3, 8, 8))
    trace(Remembers(), torch.zeros(1, 3, 8, 8))
    assert not recwarn.list and capfd.readouterr() == ("", "")


# What people read ----------------------------------------------------------------------------------------------------


def test_graph_as_text_and_frame():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 35, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[2].weight[:] = 0
    graph = trace(model, torch.zeros(5, 3, 7, 9))
    frame = graph.frame().set_index("layer")
    assert list(frame.index) == ["0", "2"]
    assert frame.loc["0", ["kind", "P", "Q", "Kh", "H", "W", "calls", "params"]].tolist() == [
        "conv",
        4,
        3,
        3,
        5,
        7,
        1,
        108,
    ]
    assert frame["macs"].tolist() == [108 * 35, 280] and frame["effective_macs"].tolist() == [54 * 35, 0]
    assert frame["rate"].tolist() == [2.0, math.inf]
    text = repr(graph)
    assert text.startswith("Graph: 2 layers, 4,060 MACs per image, 4 nodes\n") and "linear" in text
    assert "weight" not in repr(graph["0"]) and graph["0"].is_3x3 and not graph["2"].is_3x3
    assert graph.rates() == (2.0, (108 + 280) / 54, 4060 / (54 * 35)) and graph.rates().conv == 2.0
    assert "uneven" not in repr(graph["0"])
    with pytest.raises(KeyError, match="Expected a layer's name, one of 0, 2. Got 'conv'."):
        graph["conv"]


def test_rates_without_convolutions_and_without_weights_left():
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight[0] = 0
        assert trace(model, torch.zeros(3, 4)).rates() == (2, 2, 2)
        model.weight[1] = 0
    assert trace(model, torch.zeros(3, 4)).rates() == (math.inf,) * 3


def test_layer_specs_can_be_made_by_hand():
    window = dict(stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, H=5, W=4, calls=2)
    layer = LayerSpec("a", "conv", 2, 3, 1, 1, **window, weight=np.ones((2, 3, 1, 1), np.float32), bias=None)
    assert (layer.shape, layer.params, layer.macs, layer.rate) == ((2, 3, 1, 1), 6, 240, 1.0)
