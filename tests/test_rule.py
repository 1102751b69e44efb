"""The rule, against its own words: families by kind and task, the smallest block within beta, reasons, refusals."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nbs_lib as nbs
from nbs_lib.mapping.rule import BLOCKS, REFERENCES, layer_choices, rule_mapping
from nbs_lib.mapping.table import Mapping
from nbs_lib.models import build
from nbs_lib.schemes import Block, BlockPunched, Choice, Pattern
from notebooks.beside import map_fig08_rule as rule_flow


class Small(nn.Module):
    """One layer of every kind the rule tells apart."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.three = nn.Conv2d(16, 48, 3, padding=1)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.wide_depthwise = nn.Conv2d(48, 48, 5, padding=2, groups=48)
        self.one = nn.Conv2d(48, 64, 1)
        self.five = nn.Conv2d(64, 32, 5, padding=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.twin = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        for module in list(self.children())[:-1]:
            x = torch.relu(module(x))
        return self.fc(x.mean((2, 3)))


class Model:
    """A latency model by formula: `cost(scheme)` ms per effective GMAC; it notes what it was asked."""

    def __init__(self, cost=None):
        self.cost = cost or (lambda scheme: 1.1 - 0.1 * min(getattr(scheme, "p", 64), 8) / 8)
        self.asked = []

    def layer_ms(self, layer, choices):
        self.asked.append((layer.name, list(choices)))
        return np.array([layer.macs / 1e9 * (self.cost(c.scheme) / c.rate if c else 1) for c in choices])

    def predict(self, graph, mapping):
        return sum(float(self.layer_ms(layer, [mapping.get(name)])[0]) for name, layer in graph.layers.items())


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return nbs.trace(Small().eval(), torch.zeros(1, 3, 8, 8))


def by_area(p_times_q):
    """A model whose blocks take 1 + 1 / (p * q) times the reference, at equal MACs."""
    return Model(lambda scheme: 1 + 1 / p_times_q(scheme) if hasattr(scheme, "p") else 1.0)


def test_every_kind_gets_its_scheme_on_easy_and_hard_tasks(graph):
    easy, hard = (rule_mapping(graph, Model(), task=task) for task in ("easy", "hard"))
    kinds = {"three": BlockPunched, "one": BlockPunched, "five": BlockPunched, "grouped": BlockPunched}
    kinds |= {"twin": BlockPunched, "fc": Block}
    assert {name: type(choice.scheme) for name, choice in easy.items()} == kinds
    assert all(choice.rate == 8 for choice in easy.values())
    patterns = dict.fromkeys(["three", "grouped", "twin"], Choice(Pattern(8), 8))
    assert hard == easy | patterns
    report = easy.report().set_index("layer")
    assert list(report.index) == list(graph.layers)
    assert report["reason"]["stem"] == "stem: fewer than 4 input channels"
    assert report["reason"]["depthwise"] == report["reason"]["wide_depthwise"] == "depthwise layers are left dense"


@pytest.mark.parametrize("beta", [0.0, 0.03, 0.07, 0.2, math.inf])
def test_the_smallest_valid_block_within_beta_is_taken(graph, beta):
    """Against a plain loop over the definition."""
    model = by_area(lambda scheme: scheme.p * scheme.q)
    mapping = rule_mapping(graph, model, beta=beta)
    for name in ("three", "one", "five", "grouped", "fc"):
        layer, found = graph[name], None
        valid = [(p, q) for p, q in BLOCKS if p <= layer.P // layer.groups and q <= layer.Q]
        valid = [(p, q) for p, q in valid if name == "fc" or p * q * 8 <= layer.params]
        scheme = Block if name == "fc" else BlockPunched
        reference = min(model.layer_ms(layer, [Choice(each, 8) for each in REFERENCES]))
        for p, q in sorted(valid, key=lambda size: (size[0] * size[1], size[0])):
            ms = model.layer_ms(layer, [Choice(scheme(p, q), 8)])[0]
            if found is None and ms <= (1 + beta) * reference:
                found = scheme(p, q)
        assert mapping[name].scheme == (found or scheme(*valid[-1]))


def test_candidates_go_by_area_then_by_filters(graph):
    blocks = [(4, 4), (2, 8), (16, 1), (8, 2), (1, 1)]
    options, _ = layer_choices(graph, blocks=blocks)
    sizes = [(choice.scheme.p, choice.scheme.q) for choice in options["one"]]
    assert sizes == [(1, 1), (2, 8), (4, 4), (8, 2), (16, 1)]
    same = Model(lambda scheme: 1.0)  # all as fast as the reference: the smallest wins
    assert rule_mapping(graph, same, beta=0, blocks=blocks[:-1])["one"].scheme == BlockPunched(2, 8)


def test_a_block_is_valid_where_it_fits_and_leaves_a_group_at_the_rate(graph):
    options, rows = layer_choices(graph, rate=8)
    assert [str(choice.scheme) for choice in options["fc"]][-1] == "block(8x16)"  # 10 x 32
    assert [str(choice.scheme) for choice in options["grouped"]][-1] == "block_punched(8x4)"  # 8 x 8 a group
    assert str(layer_choices(graph, rate=6)[0]["one"][-1].scheme) == "block_punched(16x32)"  # 48 x 64 / 512 = 6
    assert str(layer_choices(graph, rate=7)[0]["one"][-1].scheme) == "block_punched(8x16)"
    assert {row["layer"] for row in rows} == set(graph.layers)
    none = rule_mapping(graph, Model(), blocks=[(16, 16)])
    assert "fc" not in none
    assert none.report().set_index("layer")["reason"]["fc"] == "no block out of 16x16 fits 10 x 32 at 8x"


def test_the_reason_holds_the_numbers(graph):
    model = by_area(lambda scheme: scheme.p * scheme.q)
    mapping = rule_mapping(graph, model, beta=0.07)
    rows = pd.DataFrame(mapping.layers).set_index("layer")
    one, layer = rows.loc["one"], graph["one"]
    assert mapping["one"].scheme == BlockPunched(4, 4)
    assert one["ratio"] == pytest.approx(1 + 1 / 16) and one["reference"] == "filter" and one["beta"] == 0.07
    assert one["ms"] == pytest.approx(layer.macs / 8e9 * (1 + 1 / 16))
    assert one["ms_per_gmac"] == pytest.approx((1 + 1 / 16) / 8)
    ms, reference = one["ms"], one["reference_ms"]
    wanted = f"smallest block within beta 0.07: {ms:.3g} ms is 1.062 x filter's {reference:.3g} ms at 8x"
    assert mapping.report().set_index("layer")["reason"]["one"] == wanted
    assert rows.loc["stem"].isna()["ms"]
    again = Mapping.from_json(mapping.to_json())
    assert again == mapping and again.report().equals(mapping.report())


def test_where_no_block_is_within_beta_the_largest_is_taken_and_says_so(graph):
    slow = Model(lambda scheme: 2.0 if hasattr(scheme, "p") else 1.0)
    mapping = rule_mapping(graph, slow)
    assert mapping["three"].scheme == BlockPunched(8, 16)
    reason = mapping.report().set_index("layer")["reason"]["three"]
    assert reason.startswith("no block within beta 0.2, so the largest: ") and "2.000 x" in reason


def test_the_reference_is_the_faster_of_filter_and_channel(graph):
    cost = {"filter": 1.0, "channel": 0.5}
    mapping = rule_mapping(graph, Model(lambda scheme: cost.get(scheme.name, 0.55)), beta=0.2)
    rows = pd.DataFrame(mapping.layers).set_index("layer")
    assert rows["reference"]["one"] == "channel" and rows["ratio"]["one"] == pytest.approx(1.1)


def test_beta_of_one_layer(graph):
    model = by_area(lambda scheme: scheme.p * scheme.q)
    mapping = rule_mapping(graph, model, beta={"one": 0.01})
    assert mapping["one"].scheme == BlockPunched(8, 16)
    assert mapping["five"].scheme == BlockPunched(4, 4)  # the paper's 20 % for the others


def test_rates_below_a_patterns_least(graph):
    mapping = rule_mapping(graph, Model(), task="hard", rate=2.0)
    assert mapping["three"] == Choice(Pattern(8), 2.25) and mapping["one"].rate == 2
    reasons = mapping.report().set_index("layer")["reason"]
    assert reasons["three"].startswith("3x3 CONV, hard task: pattern; ")
    assert reasons["three"].endswith("at 2.25x, a pattern's least")


def test_layers_of_equal_shapes_are_asked_once_and_all_candidates_at_once(graph):
    model = Model()
    rule_mapping(graph, model)
    assert [name for name, _ in model.asked] == ["three", "one", "five", "grouped", "fc"]
    assert [choice.scheme for choice in model.asked[0][1]][:2] == list(REFERENCES)


def test_ignored_layers(graph):
    mapping = rule_mapping(graph, Model(), ignored_layers=["one"])
    assert "one" not in mapping
    assert mapping.report().set_index("layer")["reason"]["one"] == "ignored on request"


def test_what_the_model_has_no_data_for_is_an_error_that_names_the_layer(graph):
    class Poor(Model):
        def layer_ms(self, layer, choices):
            if layer.name == "five":
                raise LookupError(f"Expected a measured layer. Got {layer.name}.")
            return super().layer_ms(layer, choices)

    with pytest.raises(LookupError, match="five"):
        rule_mapping(graph, Poor())
    for bad in (np.nan, 0.0, np.inf):
        with pytest.raises(ValueError, match="times > 0 ms for layer 'three'"):
            rule_mapping(graph, Model(lambda scheme, bad=bad: bad))


@pytest.mark.parametrize(
    "wrong, error, said",
    [
        ({"task": "middling"}, ValueError, "task out of easy, hard. Got 'middling'"),
        ({"beta": -0.1}, ValueError, "beta >= 0"),
        ({"beta": math.nan}, ValueError, "beta >= 0"),
        ({"beta": "0.2"}, ValueError, "beta >= 0"),
        ({"beta": {"one": -1}}, ValueError, "beta >= 0 for layer 'one'"),
        ({"beta": {"nope": 0.2}}, KeyError, "nope"),
        ({"ignored_layers": ["nope"]}, KeyError, "nope"),
        ({"rate": 0.5}, ValueError, "rate"),
        ({"rate": math.nan}, ValueError, "rate"),
        ({"rate": 1}, ValueError, "rate above 1"),
        ({"blocks": []}, ValueError, "block sizes"),
        ({"blocks": [8]}, ValueError, r"block size \(p, q\)"),
        ({"blocks": [(0, 4)]}, ValueError, "block_punched's p"),
    ],
)
def test_wrong_arguments_are_refused_by_name(graph, wrong, error, said):
    with pytest.raises(error, match=said):
        rule_mapping(graph, Model(), **wrong)


def test_a_deep_network_takes_one_question_per_shape():
    torch.manual_seed(0)
    graph = nbs.trace(build("resnet50_cifar", width=0.125).eval(), torch.zeros(1, 3, 32, 32))
    mapping = rule_mapping(graph, model := Model())
    assert len(mapping) == 53 and len(model.asked) < 30


def test_the_drawings_hold_every_layer(graph):
    mappings = {("small", task): rule_mapping(graph, Model(), task=task) for task in ("easy", "hard")}
    layers = rule_flow.passing(mappings)
    assert len(layers) == 2 * len(graph.layers)
    assert layers.groupby("task")["share"].sum().tolist() == pytest.approx([100, 100])
    easy = layers[layers.task == "easy"]
    branches = easy.groupby("branch")["layer"].apply(set).to_dict()
    assert branches["unpruned"] == {"stem", "depthwise", "wide_depthwise"} and branches["FC"] == {"fc"}
    assert branches["3x3 CONV"] == {"three", "grouped", "twin"} and branches["1x1 and other CONV"] == {"one", "five"}
    figure, (left, right) = plt.subplots(1, 2)
    texts = [text.get_text() for text in rule_flow.flow(easy, left).texts]
    assert "small: 3 layers, " in " ".join(texts) and "unpruned" in texts
    rule_flow.blocks(layers[layers.task == "hard"], right, ["1x1", "8x16"])
    assert sum(len(drawn.get_offsets()) for drawn in right.collections) == len(graph.layers)
    rule_flow.flow(easy[easy.branch == "FC"], left)  # nothing takes the other ways
    plt.close(figure)
