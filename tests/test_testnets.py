"""The papers' test models of ten layers: shapes, multiply-adds, and how the layers hang together."""

import pytest
import torch

import nbs_lib as nbs
from nbs_lib.measure.testnets import cascade, prune_evenly

SETTINGS = {  # name -> (arguments, layers in a chain)
    "chain 1x1": (dict(P=8, Q=8, H=7, W=9, kernel=1), True),
    "chain 3x3": (dict(P=9, Q=9, H=5, W=5), True),
    "alternating": (dict(P=7, Q=12, H=6, W=6), True),
    "alternating, one channel": (dict(P=3, Q=1, H=6, W=6), True),
    "grouped": (dict(P=8, Q=2, H=6, W=6, groups=2), True),
    "depthwise": (dict(P=6, Q=1, H=8, W=8, groups=6, kernel=5), True),
    "depth multiplier": (dict(P=12, Q=1, H=5, W=4, groups=6), False),
    "stride": (dict(P=8, Q=8, H=4, W=3, stride=2), False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_layers_of_the_setting(name):
    given, chained = SETTINGS[name]
    model, inputs = cascade(**given)
    graph = nbs.trace(model, inputs)
    layers = list(graph.layers.values())
    kernel, groups = given.get("kernel", 3), given.get("groups", 1)
    assert len(layers) == 10 and len(inputs) == (1 if chained else 10) and model.chained is chained
    assert {(layer.H, layer.W, layer.Kh, layer.groups) for layer in layers} == {
        (given["H"], given["W"], kernel, groups)
    }
    assert graph.macs == 10 * given["P"] * given["Q"] * kernel**2 * given["H"] * given["W"]
    assert (given["P"], given["Q"]) == (layers[0].P, layers[0].Q)
    assert (layers[1].P, layers[1].Q * groups) in [(given["P"], given["Q"] * groups), (given["Q"] * groups, given["P"])]


@pytest.mark.parametrize("name", ["chain 3x3", "alternating", "stride"])
def test_pruned_evenly_and_compiled_it_still_equals_pytorch(name):
    model, inputs = cascade(**SETTINGS[name][0])
    mapping = prune_evenly(model, nbs.BlockPunched(2, 3), 4.0)
    net = nbs.compile(model, inputs, mapping=mapping)
    assert len(mapping) == 10 and net.fallback_macs == 0
    assert all(3 < layer.rate < 5 for layer in net.graph.layers.values())
    with torch.no_grad():
        torch.testing.assert_close(net(*inputs), model(*inputs), rtol=0, atol=1e-5)  # tensors, or tuples of them


def test_same_seed_same_model_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (cascade(4, 4, 3, 3, seed=seed)[0].convs[9].weight for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals():
    with pytest.raises(ValueError, match="Expected an odd kernel"):
        cascade(4, 4, 3, 3, kernel=2)
    with pytest.raises(ValueError, match="groups that divide P = 4"):
        cascade(4, 1, 3, 3, groups=3)
    with pytest.raises(ValueError, match="pattern"):
        prune_evenly(cascade(4, 4, 3, 3, kernel=1)[0], nbs.Pattern(8), 4.0)
