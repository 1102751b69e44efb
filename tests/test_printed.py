"""Mappings for rows of the papers' tables."""

import pytest
import torch

import nbs_lib as nbs
from nbs_lib.mapping.printed import printed_mapping

BLOCK, PATTERN = nbs.BlockPunched(4, 4), nbs.Pattern(8)


@pytest.fixture(scope="module")
def graph():
    layers = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 32, 3, padding=1, stride=2)]
    layers += [
        torch.nn.Conv2d(32, 32, 3, padding=1, groups=32),
        torch.nn.Conv2d(32, 64, 1, stride=2),
        torch.nn.Flatten(),
    ]
    return nbs.trace(torch.nn.Sequential(*layers, torch.nn.Linear(64 * 16, 10)).eval(), torch.zeros(1, 3, 16, 16))


def kept(graph, mapping, what):
    convs = [layer for layer in graph.layers.values() if layer.kind != "linear"]
    return sum(getattr(layer, what) / (mapping[layer.name].rate if layer.name in mapping else 1) for layer in convs)


def rate_of(graph, mapping):
    return sum(layer.params for layer in graph.layers.values() if layer.kind != "linear") / kept(
        graph, mapping, "params"
    )


def test_rate_and_macs_are_met_with_the_schemes_given(graph):
    schemes = {"1": PATTERN, "3": BLOCK}
    even = printed_mapping(graph, schemes, 3.5)[0]
    goal = 0.98 * kept(graph, even, "macs")
    mapping, told = printed_mapping(graph, schemes, 3.5, goal)
    assert told == "the rate and the MACs" and mapping != even
    assert {name: choice.scheme for name, choice in mapping.items()} == schemes
    assert rate_of(graph, mapping) == pytest.approx(3.5, rel=1e-3)
    assert kept(graph, mapping, "macs") == pytest.approx(goal, rel=1e-3)


def test_macs_out_of_reach_leave_the_rate_alone(graph):
    mapping, told = printed_mapping(graph, {"1": BLOCK, "3": BLOCK}, 3.0, 1e9)
    assert told == "the rate alone" and len({choice.rate for choice in mapping.values()}) == 1
    assert rate_of(graph, mapping) == pytest.approx(3.0)
    assert printed_mapping(graph, {"1": BLOCK, "3": BLOCK}, 3.0)[0] == mapping


def test_the_last_printed_digit_may_be_half_a_unit_off(graph):
    most = kept(graph, printed_mapping(graph, {"1": BLOCK, "3": BLOCK}, 3.0)[0], "macs")
    far = next(macs for macs in (most * (1 + step / 50) for step in range(1, 200)) if "alone" in told_by(graph, macs))
    assert "alone" not in printed_mapping(graph, {"1": BLOCK, "3": BLOCK}, 3.0, far, digit=far / 5)[1]


def told_by(graph, macs):
    return printed_mapping(graph, {"1": BLOCK, "3": BLOCK}, 3.0, macs)[1]


def test_depthwise_layers_take_patterns_at_their_least_rate_at_least(graph):
    mapping, told = printed_mapping(graph, {"2": PATTERN}, 1.01, 1e6)
    assert mapping["2"].rate == 2.25 and told.startswith("the rate alone, ")


def test_what_cannot_be_is_refused(graph):
    with pytest.raises(KeyError, match="Expected CONV layers"):
        printed_mapping(graph, {"5": nbs.Block(4, 4)}, 2.0)
    with pytest.raises(ValueError, match="Expected CONV layers"):
        printed_mapping(graph, {}, 2.0)
    with pytest.raises(ValueError, match="Expected a rate below"):
        printed_mapping(graph, {"3": BLOCK}, 50.0)
