"""Mappings: who is left out and why, the paper's rates with its MACs, JSON."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nbs_lib.layers import LayerSpec
from nbs_lib.mapping import Mapping, paper_mapping, uniform_mapping
from nbs_lib.models.torchvision_ops import ensure_torchvision
from nbs_lib.schemes import Block, BlockPunched, Choice, Filter, Pattern, check_rate


def layer(name, shape, size=7, groups=1, kind="conv"):
    P, Q, Kh, Kw = (*shape, 1, 1)[:4]
    weight = np.broadcast_to(np.float32(1), shape)  # no memory, whatever the network
    return LayerSpec(name, kind, P, Q, Kh, Kw, (1, 1), (0, 0, 0, 0), (1, 1), groups, size, size, 1, weight, None)


def graph_of(*layers):
    return SimpleNamespace(layers={spec.name: spec for spec in layers})


def torchvision_graph(name, size=224):
    """The layers of a torchvision network, its shapes by a forward pass on the meta device."""
    ensure_torchvision()
    import torchvision

    found = []

    def note(name):
        def hook(module, inputs, output):
            shape = tuple(module.weight.shape)
            if isinstance(module, nn.Linear):
                found.append(layer(name, shape, size=1, kind="linear"))
            else:
                kind = "depthwise" if module.groups > 1 and shape[1] == 1 else "conv"
                found.append(layer(name, shape, output.shape[-1], module.groups, kind))

        return hook

    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
        for path, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(note(path))
        model(torch.empty(1, 3, size, size))
    return graph_of(*found)


SMALL = graph_of(
    layer("stem", (16, 3, 3, 3), 32),
    layer("a", (32, 16, 3, 3), 16),
    layer("dw", (32, 1, 3, 3), 16, 32, "depthwise"),
    layer("b", (64, 32, 1, 1), 16),
    layer("grouped", (64, 16, 3, 3), 8, 4),
    layer("fc", (10, 64), 1, kind="linear"),
)


def conv_totals(graph, mapping):
    """CONV rate and remaining CONV MACs of a mapping, by a plain loop."""
    total = kept = macs = 0.0
    for spec in graph.layers.values():
        if spec.kind != "linear":
            rate = mapping[spec.name].rate if spec.name in mapping else 1.0
            total, kept, macs = total + spec.params, kept + spec.params / rate, macs + spec.macs / rate
    return total / kept, macs


def test_uniform_mapping_leaves_out_depthwise_and_stem_and_says_so():
    mapping = uniform_mapping(SMALL, 4)
    conv = Choice(BlockPunched(8, 4), 4)
    assert mapping == {"a": conv, "b": conv, "grouped": conv, "fc": Choice(Block(8, 4), 4)}
    report = mapping.report().set_index("layer")
    assert list(mapping.report().columns) == ["layer", "kind", "shape", "macs", "scheme", "rate", "reason"]
    assert list(report.index) == list(SMALL.layers)
    assert report.scheme["stem"] == report.scheme["dw"] == "dense" and report.rate["stem"] == 1
    assert "stem" in report.reason["stem"] and "depthwise" in report.reason["dw"]
    assert report.scheme["fc"] == "block(8x4)" and report["shape"]["a"] == (32, 16, 3, 3)
    assert report.macs["a"] == 32 * 16 * 9 * 16 * 16


def test_schemes_that_are_not_legal_are_left_out_or_the_next_one_is_taken():
    mapping = uniform_mapping(SMALL, 2, conv=Pattern(8), linear=None)
    assert set(mapping) == {"a", "grouped"}
    report = mapping.report().set_index("layer")
    assert "3x3" in report.reason["b"] and "linear" in report.reason["fc"] and "2.25" in report.reason["a"]
    hybrid = uniform_mapping(SMALL, 4, conv=(Pattern(8), BlockPunched(8, 4)))
    assert (hybrid["a"].scheme, hybrid["b"].scheme) == (Pattern(8), BlockPunched(8, 4))


def test_ignored_layers():
    mapping = uniform_mapping(SMALL, 4, ignored_layers=(name for name in ["a", "fc"]))
    assert set(mapping) == {"b", "grouped"}
    assert "ignored" in mapping.report().set_index("layer").reason["a"]
    with pytest.raises(KeyError, match="grouped.*Got nothere"):
        uniform_mapping(SMALL, 4, ignored_layers=["a", "nothere"])


@pytest.mark.parametrize("rate", [0.5, float("nan"), float("inf"), "4"])
def test_bad_rates(rate):
    for make in (uniform_mapping, lambda graph, rate: paper_mapping(graph, rate, 1e5)):
        with pytest.raises(ValueError, match="rate"):
            make(SMALL, rate)


def test_bad_schemes():
    for conv in ("block_punched(8x4)", BlockPunched, [Filter(), 3]):
        with pytest.raises(TypeError, match="Expected a scheme"):
            uniform_mapping(SMALL, 4, conv=conv)


def test_json_round_trip(tmp_path):
    mapping = uniform_mapping(SMALL, 4, conv=(Pattern(4, (15, 23, 27, 29)), Filter()), ignored_layers=["a"])
    again = Mapping.from_json(json.loads(json.dumps(mapping.to_json())))
    assert again == mapping and again.report().equals(mapping.report())
    mapping.save(tmp_path / "deep" / "mapping.json")
    again = Mapping.load(tmp_path / "deep" / "mapping.json")
    assert again == mapping and again.report().equals(mapping.report())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mapping.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"choices": {}}', '{"choices": {"a": {"rate": 2}}, "layers": []}'])
def test_broken_files_are_named(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match="broken.json"):
        Mapping.load(tmp_path / "broken.json")


def test_a_mapping_made_by_hand_reports_too():
    assert Mapping().report().empty
    report = Mapping({"a": Choice(Filter(), 2)}).report()
    assert report.loc[0, "layer"] == "a" and report.loc[0, "scheme"] == "filter" and report.loc[0, "rate"] == 2


TABLE_4 = [  # network, image, rate, remaining MACs, scheme (mapping paper, Table 4)
    ("vgg16", 224, 8.22, 3.5e9, BlockPunched(8, 4)),
    ("vgg16", 224, 8.22, 3.5e9, Pattern(8)),
    ("vgg16", 224, 8.0, 3.8e9, Pattern(8)),
    ("resnet50", 224, 4.37, 1.6e9, BlockPunched(8, 4)),
    ("resnet50", 224, 4.37, 1.6e9, (Pattern(8), BlockPunched(8, 4))),
    ("mobilenet_v2", 224, 1.76, 177e6, BlockPunched(8, 4)),
    ("mobilenet_v2", 224, 1.82, 165e6, BlockPunched(8, 4)),
]


@pytest.mark.parametrize(("network", "image", "rate", "macs", "conv"), TABLE_4, ids=str)
def test_paper_mapping_meets_rate_and_macs(network, image, rate, macs, conv):
    graph = torchvision_graph(network, image)
    mapping = paper_mapping(graph, rate, macs, conv=conv)
    reached_rate, reached_macs = conv_totals(graph, mapping)
    assert reached_rate == pytest.approx(rate, rel=0.01) and reached_macs == pytest.approx(macs, rel=0.01)
    for choice in mapping.values():
        assert check_rate(choice.rate) >= choice.scheme.min_rate
    kinds = mapping.report().set_index("layer")
    assert (kinds[kinds.kind != "conv"].scheme == "dense").all()
    by_map = {}  # layers with one map size and scheme share one rate
    for name, choice in mapping.items():
        by_map.setdefault((graph.layers[name].H, choice.scheme), set()).add(choice.rate)
    assert all(len(rates) == 1 for rates in by_map.values())


def test_paper_mapping_gives_linear_layers_the_rate_when_asked():
    conv_only = paper_mapping(SMALL, 3, 1e6)
    mapping = paper_mapping(SMALL, 3, 1e6, linear=Block(8, 4))
    assert mapping["fc"] == Choice(Block(8, 4), 3) and "fc" not in conv_only
    assert {name: choice for name, choice in mapping.items() if name != "fc"} == conv_only


def test_paper_mapping_says_what_is_feasible():
    with pytest.raises(ValueError, match=r"macs in .*\.\..* Got 1e\+09"):
        paper_mapping(SMALL, 3, 1e9)
    with pytest.raises(ValueError, match=r"CONV rate in 1\.\..* Got 500"):
        paper_mapping(SMALL, 500, 1e6)
    with pytest.raises(ValueError, match="can prune"):
        paper_mapping(graph_of(layer("stem", (16, 3, 3, 3))), 2, 1e5)
    for macs in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="macs"):
            paper_mapping(SMALL, 3, macs)


def test_paper_mapping_where_all_maps_have_one_size():
    graph = graph_of(layer("a", (32, 16, 3, 3), 8), layer("b", (32, 32, 1, 1), 8))
    dense = sum(spec.macs for spec in graph.layers.values())
    mapping = paper_mapping(graph, 4, dense / 4)
    assert [choice.rate for choice in mapping.values()] == [pytest.approx(4, rel=1e-4)] * 2
    with pytest.raises(ValueError, match="macs"):
        paper_mapping(graph, 4, dense / 2)


def test_paper_mapping_at_rate_one_keeps_everything():
    total = sum(spec.macs for spec in SMALL.layers.values() if spec.kind != "linear")
    assert {choice.rate for choice in paper_mapping(SMALL, 1, total).values()} == {1.0}
