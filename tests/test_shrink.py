"""Shrunk graphs: the outputs of PyTorch, run node by node and compiled, from layers of the sizes one can work out."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import Branches, Lambda, agrees, scramble
from test_compiler import RandomNet
from torch import nn

import nbs_lib as nbs
from nbs_lib.compiler.fuse import TINY
from nbs_lib.compiler.shrink import shrink
from nbs_lib.models import imagenet


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run(graph, *inputs):
    """The graph's outputs, node by node: layers as their LayerSpec says, all else through the nodes' own calls."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        if node.name in values:
            continue
        given = [values[name] for name in node.inputs]
        if node.layer:
            layer = graph[node.layer]
            assert layer.weight.shape[:2] == (layer.P, layer.Q) and layer.weight.flags.c_contiguous
            parameters = [None if v is None else torch.from_numpy(v) for v in (layer.weight, layer.bias)]
            if layer.kind != "linear":
                top, bottom, left, right = layer.padding
                parameters += [layer.stride, 0, layer.dilation, layer.groups]
                given = [F.pad(given[0], (left, right, top, bottom))]
            made = (F.linear if layer.kind == "linear" else F.conv2d)(given[0], *parameters)
            assert node.macs == layer.params // layer.P * made.numel()
        else:
            made = given[0].reshape(node.shape) if node.op == "reshape" else node.call(*given)
        assert node.shape is None or tuple(made.shape) == tuple(node.shape), node
        values[node.name] = made
    return graph.unflatten([values[name] for name in graph.outputs])


def near(got, want):
    got, want = (torch.utils._pytree.tree_leaves(values) for values in (got, want))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def shrunk(model, *inputs):
    """The shrunk graph of the model, which gives PyTorch's outputs; the graph it is made of stays what it was."""
    model.eval()
    graph = nbs.trace(model, inputs)
    weights = {name: layer.weight.copy() for name, layer in graph.layers.items()}
    small = shrink(graph)
    with torch.no_grad():
        for values in (inputs, tuple(x * -2 + 0.25 for x in inputs)):
            near(run(small, *values), model(*values))
    assert all(np.array_equal(graph[name].weight, weight) for name, weight in weights.items())
    assert [node.name for node in small.nodes] == [node.name for node in graph.nodes]
    assert list(small.layers) == list(graph.layers) and shrink(small).macs <= small.macs <= graph.macs
    return small


def sizes(graph):
    """(filters, channels of the input) of every layer, in order."""
    return [(layer.P, layer.Q * layer.groups) for layer in graph.layers.values()]


def conv(filters, channels, kernel=1, gone=(), unread=(), **options):
    """A convolution with whole filters (bias too) and channels pruned."""
    layer = nn.Conv2d(channels, filters, kernel, **{"padding": kernel // 2} | options)
    with torch.no_grad():
        layer.weight[list(gone)] = 0
        layer.weight[:, list(unread)] = 0
        if layer.bias is not None:
            layer.bias[list(gone)] = 0
    return layer


def norm(channels, shift=()):
    """Batch norm without a mean; `shift`: of the first channels, zero in the others."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.running_var.uniform_(0.5, 2)
        layer.weight.uniform_(0.5, 1.5)
        layer.bias[: len(shift)] = torch.tensor(shift)
    return layer.eval()


X = (2, 3, 7, 9)
ALWAYS = {"resnet18": "filter", "squeezenet1_1": "channel", "mobilenet_v3_small": "channel"}  # in every run


# -- chains ------------------------------------------------------------------------------------------------------------


def test_a_chain_loses_what_is_zero_and_what_is_not_read():
    model = nn.Sequential(
        conv(8, 3, 3, gone=[0, 5]), nn.ReLU(), nn.MaxPool2d(2), conv(6, 8, 3, [1], [5, 7]), conv(4, 6)
    )
    assert sizes(shrunk(model, torch.randn(X))) == [(5, 3), (5, 5), (4, 5)]


def test_nothing_to_drop_is_the_same_graph():
    model = nn.Sequential(conv(8, 3, 3), nn.ReLU(), conv(4, 8, gone=[1], unread=[]), nn.Sigmoid())
    graph = nbs.trace(model, torch.randn(X))
    assert shrink(graph) is graph


def test_weights_below_the_smallest_are_zeros():
    model = nn.Sequential(conv(8, 3), conv(4, 8))
    model[1].weight.data[:, 2] = TINY / 2
    assert sizes(shrunk(model, torch.randn(X))) == [(7, 3), (4, 7)]


def test_weights_that_are_not_numbers_stay():
    model = nn.Sequential(conv(3, 3), conv(4, 3, unread=[1, 2]))
    model[1].weight.data[0, 2, 0, 0] = np.nan
    assert sizes(shrink(nbs.trace(model, torch.randn(X)))) == [(2, 3), (4, 2)]


@pytest.mark.parametrize(
    ("activation", "left"),
    [(nn.ReLU(), 6), (nn.ReLU6(), 6), (nn.Hardswish(), 6), (nn.Hardsigmoid(), 7), (nn.Hardtanh(0.1, 1), 8)],
)
def test_shifts_and_activations_decide_whether_a_filter_is_zero(activation, left):
    """Filters 0 and 1 are lost before a shift to 1 and to -4; filter 2 has none. Padding hides no constant."""
    model = nn.Sequential(conv(8, 3, gone=[0, 1, 2]), norm(8, [1.0, -4.0]), activation, conv(4, 8, 3))
    small = shrunk(model, torch.randn(X))
    assert sizes(small) == [(left, 3), (4, left)]
    assert next(node for node in small.nodes if node.op == "affine").attrs["scale"].shape == (left,)


def test_constants_go_into_the_bias_where_there_is_no_padding():
    """Whether they come from a bias, from a shift, or from a scale of zero."""
    lost, scaled = conv(8, 3, gone=[0, 1]), norm(8, [0.5])
    lost.bias.data[1], scaled.weight.data[7] = 0.7, 0
    scaled.bias.data[7] = 0.3
    tail = (nn.Hardswish(), conv(5, 8, bias=False), conv(4, 5, 3, padding=0))
    model = nn.Sequential(lost, scaled, *tail)
    small = shrunk(model, torch.randn(X))
    assert sizes(small) == [(5, 3), (5, 5), (4, 5)] and small["3"].bias.any()
    model[3].padding = 1
    assert sizes(shrunk(model, torch.randn(X))) == [(8, 3), (5, 8), (4, 5)]
    model[0].weight.data[:] = 0
    model[3].padding = 0
    assert sizes(shrunk(model, torch.randn(X))) == [(1, 3), (1, 1), (4, 1)]


@pytest.mark.parametrize("last", [nn.AdaptiveAvgPool2d((2, 3)), nn.AdaptiveAvgPool2d(1), nn.Identity()])
def test_flattened_images(last):
    """A channel goes with all its columns; one column in use keeps it."""
    features = last(torch.zeros(2, 6, 7, 9))[0].numel()
    head = nn.Linear(features, 5)
    columns = head.weight.data.view(5, 6, -1)
    columns[:, [2, 5]] = 0
    columns[1, 5, -1] = 1
    model = nn.Sequential(conv(6, 3, 3), nn.ReLU(), last, nn.Flatten(), nn.Dropout(), head, nn.ReLU(), nn.Linear(5, 4))
    model[-1].weight.data[:, [0, 3]] = 0
    assert sizes(shrunk(model, torch.randn(X))) == [(5, 3), (3, 5 * features // 6), (4, 3)]


def test_vectors():
    """Batch norm of vectors runs through PyTorch, with what is left of its scale and shift."""
    head = [nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    head[3].weight.data[:, 4:6] = 0
    model = scramble(Lambda(lambda x, c, *head: nn.Sequential(*head)(c(x).mean((2, 3))), conv(6, 3, gone=[4]), *head))
    assert sizes(shrunk(model, torch.randn(X))) == [(5, 3), (6, 5), (4, 6)]
    agrees(model, torch.randn(X))


def test_lost_layers_keep_one_channel():
    model = scramble(nn.Sequential(conv(8, 3, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(6, 8, 3), nn.ReLU(), conv(4, 6)))
    for lost in (3, 0, 5):
        model[lost].weight.data[:] = 0
        assert sizes(shrunk(model, torch.randn(X)))[0] == (1, 3)
        agrees(model, torch.randn(X))
    for parameter in model.parameters():
        parameter.data[:] = 0
    assert sizes(shrunk(model, torch.randn(X))) == [(1, 3), (1, 1), (4, 1)]


# -- joints ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Stem, a block around which the values go as they are or through a convolution, and what reads the sum."""

    def __init__(self, around=None, unread=(3,)):
        super().__init__()
        self.stem, self.around = conv(8, 3), around or nn.Identity()
        self.a, self.b = conv(6, 8, 3, gone=[0, 1]), conv(8, 6, 3, gone=[2, 3, 4], unread=[5])
        self.last = conv(4, 8, 3, unread=unread)

    def forward(self, x):
        x = self.stem(x)
        return self.last(F.relu(self.b(F.relu(self.a(x))) + self.around(x)))


def test_residuals():
    """The sum's channels leave both branches at once: unread ones, or those that are zero in both."""
    block = Residual()
    assert sizes(shrunk(block, torch.randn(X))) == [(8, 3), (3, 8), (8, 3), (4, 8)]  # `a` still reads channel 3
    block.a.weight.data[:, 3] = 0
    assert sizes(shrunk(block, torch.randn(X))) == [(7, 3), (3, 7), (7, 3), (4, 7)]
    block = Residual(conv(8, 8, gone=[2, 4, 5]))
    assert sizes(shrunk(block, torch.randn(X))) == [(8, 3), (3, 8), (5, 3), (5, 8), (4, 5)]
    block = Residual(nn.Sequential(conv(8, 8, gone=[2, 4, 5]), norm(8, [0, 0, 0.5])), unread=())
    assert sizes(shrunk(block, torch.randn(X))) == [(8, 3), (3, 8), (7, 3), (7, 8), (4, 7)]


def test_concatenations():
    """As in a dense net: every piece is read by several layers, each behind a norm of its own."""

    def forward(x, stem, a, b, last, n1, n2, n3):
        x = stem(x)
        x = torch.cat([x, a(F.relu(n1(x)))], 1)
        x = torch.cat([x, b(F.relu(n2(x)))], 1)
        return last(F.relu(n3(x)))

    a, b, last = conv(4, 6, 3, unread=[0, 1, 2]), conv(4, 10, 3, unread=[1, 2, 6, 7]), conv(5, 14, unread=[2, 7, 13])
    model = Lambda(forward, conv(6, 3), a, b, last, norm(6), norm(10), norm(14))
    assert sizes(shrunk(model, torch.randn(X))) == [(5, 3), (3, 5), (3, 8), (5, 11)]
    twice = Lambda(lambda x, a, b: b(torch.cat([a(x), x, a(x)][::2], 1)), conv(4, 3), conv(5, 8, unread=[0, 1, 4, 6]))
    assert sizes(shrunk(twice, torch.randn(X))) == [(4, 3), (5, 8)]  # a layer called twice is left alone
    same = Lambda(lambda x, a, b: b(torch.cat([a(x)] * 2, 1)), conv(4, 3), conv(5, 8, unread=[0, 1, 4, 6]))
    assert sizes(shrunk(same, torch.randn(X))) == [(3, 3), (5, 6)]


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_depthwise_separable(multiplier, padding):
    """A channel goes with its kernels: one that is zero, one whose filter is, and what the last layer does not read."""
    wide = 8 * multiplier
    depthwise = conv(wide, 8, 3, gone=[6 * multiplier], groups=8, padding=padding)
    tail = (norm(wide), nn.ReLU6(), conv(4, wide, unread=[2 * multiplier, 3 * multiplier]))
    model = nn.Sequential(conv(8, 3, gone=[1]), norm(8), nn.ReLU6(), depthwise, *tail)
    small, left = shrunk(model, torch.randn(X)), {1: 4, 2: 7}[multiplier]
    assert sizes(small) == [(left, 3), (left * multiplier, left), (4, left * multiplier)]
    assert small["3"].kind == "depthwise" and small["3"].groups == left
    agrees(model, torch.randn(X))


def test_groups_go_as_a_whole():
    grouped = conv(6, 12, 3, gone=[2, 3], groups=3)
    model = nn.Sequential(conv(12, 3, gone=[0]), grouped, nn.ReLU(), conv(4, 6))
    small = shrunk(model, torch.randn(X))
    assert sizes(small) == [(8, 3), (4, 8), (4, 4)] and small["1"].groups == 2
    model[3].weight.data[:, [4, 5]] = 0
    small = shrunk(model, torch.randn(X))
    assert sizes(small) == [(4, 3), (2, 4), (4, 2)] and small["1"].groups == 1
    agrees(model, torch.randn(X))


@pytest.mark.parametrize("gate", [nn.Hardsigmoid(), nn.Sigmoid(), nn.Softplus()])
def test_squeeze_and_excite(gate):
    """The gate's channels go with those it scales, unless PyTorch computes it."""

    def forward(x, stem, down, up, gate, last):
        x = stem(x)
        return last(x * gate(up(F.relu(down(F.adaptive_avg_pool2d(x, 1))))))

    layers = conv(8, 3, 3, gone=[1]), conv(3, 8, unread=[5, 6]), conv(8, 3), gate, conv(4, 8, unread=[6, 7])
    wide = 8 if isinstance(gate, nn.Softplus) else 6
    model = Lambda(forward, *layers)
    assert sizes(shrunk(model, torch.randn(X))) == [(wide, 3), (3, wide), (wide, 3), (4, wide)]
    agrees(model, torch.randn(X))


def test_products_and_sums_with_itself_and_with_numbers():
    def forward(x, a, b, c):
        y = a(x)
        return b(F.relu(y + y) * y * 2), c(y * 0.5 + 1)

    model = Lambda(forward, conv(8, 3, gone=[1, 2]), conv(4, 8, 3, unread=[5]), conv(4, 8, 3, unread=[1, 5]))
    assert sizes(shrunk(model, torch.randn(X))) == [(6, 3), (4, 6), (4, 6)]


def test_a_product_with_nothing_is_nothing():
    model = Lambda(lambda x, a, b, c: c(a(x) * b(x)), conv(6, 3, gone=[1]), conv(6, 3, gone=[4]), conv(4, 6, 3))
    assert sizes(shrunk(model, torch.randn(X))) == [(4, 3), (4, 3), (4, 4)]


# -- what must stay ----------------------------------------------------------------------------------------------------


def test_outputs_stay_whole():
    model = Lambda(lambda x, a, b: ((y := a(x)), b(y.relu())), conv(8, 3, gone=[1]), conv(4, 8, gone=[3], unread=[2]))
    graph = nbs.trace(model, torch.randn(X))
    assert shrink(graph) is graph
    model = Lambda(lambda x, a, b: (x, b(a(x).relu())), conv(3, 3, gone=[1]), conv(4, 3, gone=[3], unread=[2]))
    assert sizes(shrunk(model, torch.randn(X))) == [(1, 3), (4, 1)]


@pytest.mark.parametrize(
    "function",
    [
        torch.sin,
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: x.flip(1),
        lambda x: x + x.sum(1, keepdim=True),
        lambda x: x + torch.linspace(0, 1, 9),
        lambda x: x * torch.linspace(0, 1, 8).view(1, 8, 1, 1),
        lambda x: x.unflatten(1, (2, 4)).flatten(1, 2),
        lambda x: torch.cat([x, x], 2)[:, :, :7],
    ],
)
def test_values_for_pytorch_stay_whole(function):
    last = conv(4, 8, 3, unread=[2])
    model = nn.Sequential(conv(8, 3, gone=[1]), Lambda(function), last, nn.ReLU(), conv(3, 4, unread=[3]))
    assert sizes(shrunk(model, torch.randn(X))) == [(8, 3), (3, 8), (3, 3)]
    agrees(model, torch.randn(X))


def test_layers_called_twice_stay_whole():
    layer = conv(8, 8, 3, gone=[1], unread=[2])
    model = Lambda(lambda x, a, b, c: c(b(b(a(x)).relu())), conv(8, 3, gone=[0]), layer, conv(6, 8, unread=[3]))
    assert sizes(shrunk(model, torch.randn(X))) == [(8, 3), (8, 8), (6, 8)]


def test_linear_layers_over_positions_stay_whole():
    def forward(x, a, f, b):
        return b(f(a(x)))

    model = Lambda(forward, conv(8, 3, gone=[0]), nn.Linear(9, 9), conv(4, 8, unread=[3]))
    model.modules_called[1].weight.data[:, :4] = 0
    assert sizes(shrunk(model, torch.randn(X))) == [(8, 3), (9, 9), (4, 8)]
    tokens = Lambda(
        lambda x, a, f, b: b(f(a(x).flatten(2).transpose(1, 2))), conv(8, 3), nn.Linear(8, 5), nn.Linear(5, 2)
    )
    tokens.modules_called[2].weight.data[:, :2] = 0
    assert sizes(shrunk(tokens, torch.randn(X))) == [(8, 3), (5, 8), (2, 5)]


def test_dilated_pools_may_see_padding_alone():
    model = nn.Sequential(conv(4, 3, gone=[1]), nn.MaxPool2d(2, 1, 1, (7, 9)), nn.Hardtanh(-1, 1), conv(4, 4, 3))
    assert sizes(shrunk(model, torch.randn(2, 3, 6, 8))) == [(4, 3), (4, 4)]


# -- whole networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [nbs.Channel(), nbs.Filter()], ids=str)
@pytest.mark.parametrize("name", [*ALWAYS, "densenet121", "resnext50_32x4d", "vgg11_bn"])
def test_families(name, scheme):
    """Uniformly pruned, whole channels or filters: clearly fewer multiply-adds than the zeros alone leave."""
    if ALWAYS.get(name) != scheme.name and not os.environ.get("NBS_TEST_ALL"):
        pytest.skip("only with NBS_TEST_ALL=1")
    model = scramble(getattr(imagenet, name)(weights=None, num_classes=7))
    x = torch.randn(1, 3, 33, 47)
    nbs.prune(model, nbs.uniform_mapping(nbs.trace(model, x), 4.4, conv=scheme, linear=None))
    graph, small = nbs.trace(model, x), shrunk(model, x)
    before, after = (sum(layer.effective_macs for layer in g.layers.values()) for g in (graph, small))
    assert after < 0.75 * before and small.macs < 0.65 * graph.macs


@settings(max_examples=250 if os.environ.get("NBS_TEST_ALL") else 15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_random_networks(seed):
    model = RandomNet(seed)
    shrunk(model, model.example)


def test_compiled_networks():
    """What `explain` says of shrunk layers is what the layers were, what went, and what is left."""
    chain = nn.Sequential(
        conv(24, 3, 3), norm(24), nn.ReLU(), conv(32, 24, 3, range(8), range(12)), nn.ReLU(), conv(8, 32)
    )
    models = {"chain": chain, "residual": Residual(), "whole": nn.Sequential(conv(8, 3, 3), nn.ReLU(), conv(4, 8))}
    net = agrees(Branches(**models), torch.randn(X))
    table = net.explain().query("op == 'conv2d'").set_index("layer")
    assert table.removed_macs.ge(0).all() and net.explain().query("op != 'conv2d'").removed_macs.eq(0).all()
    spec, row = net.graph["models.chain.3"], table.loc["models.chain.3"]
    assert (spec.P, spec.Q) == (32, 24) and row.nnz == spec.nnz == 24 * 12 * 9 and row.rate == spec.rate
    assert row.macs == 32 * 24 * 9 * 63 * 2 and row.effective_macs == row.computed_macs == 24 * 12 * 9 * 63 * 2
    assert (row.removed_macs, row.why) == (0, "24 of 32 filters, 12 of 24 channels; no zeros")
    assert table.loc["models.chain.0", "removed_macs"] == 12 * 3 * 9 * 63 * 2
    assert table.loc["models.chain.5", "removed_macs"] == 8 * 8 * 63 * 2
    assert table[table.index.str.contains("whole")].removed_macs.eq(0).all()
    assert net.effective_macs == table.effective_macs.sum() and net.macs == table.macs.sum()
    assert net.bytes["packed"] < net.bytes["dense"] and "fma(" in net.source("models.chain.3")
    frame = net.profile(torch.randn(X), runs=2)
    assert frame.removed_macs.sum() == net.explain().removed_macs.sum() > 0 and (frame.ms >= 0).all()
