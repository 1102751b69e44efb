"""The exact solver against brute force; accuracy drops, measured and by proxy, and what a killed measurement leaves."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import nbs_lib as nbs
from nbs_lib.data import Batches, Data
from nbs_lib.mapping import drops as drops_module
from nbs_lib.mapping.drops import energy_drops, layer_drops, total_drop
from nbs_lib.mapping.evaluate import hold_out
from nbs_lib.mapping.exact import exact_mapping, rule_against_exact
from nbs_lib.mapping.rule import layer_choices, rule_mapping
from nbs_lib.mapping.table import Mapping
from nbs_lib.models import build
from nbs_lib.schemes import BlockPunched, Choice, Filter, Pattern, Unstructured

OPTIONS = [Choice(BlockPunched(p, 4), 4) for p in (1, 2, 4, 8, 16, 32)]


class Listed:
    """A latency model that looks its times up: {layer: {choice: ms}}."""

    def __init__(self, times):
        self.times = times

    def layer_ms(self, layer, choices):
        return np.array([self.times[layer.name][choice] for choice in choices])

    def predict(self, graph, mapping):
        return sum(self.times[name][mapping.get(name)] for name in graph.layers)


class Formula:
    """A latency model by formula: larger blocks are faster, all else as fast as the largest."""

    def layer_ms(self, layer, choices):
        area = [min(c.scheme.p * c.scheme.q, 512) if c and hasattr(c.scheme, "p") else 512 for c in choices]
        speed = np.array([c.rate if c else 1 for c in choices]) / (1 + 0.4 / np.sqrt(area))
        return layer.macs / 1e6 / speed + 1e-3

    def predict(self, graph, mapping):
        return sum(float(self.layer_ms(layer, [mapping.get(name)])[0]) for name, layer in graph.layers.items())


def case(rng, layers=5, choices=4, gains=False):
    """A graph of 1x1 layers, random times and drops (with some gains), and the latency model."""
    model = nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(layers)]).eval()
    graph = nbs.trace(model, torch.zeros(1, 8, 4, 4))
    drops = {name: dict(zip(OPTIONS[:choices], rng.random(choices), strict=True)) for name in graph.layers}
    if gains:
        drops = {name: {c: drop - 0.3 for c, drop in each.items()} for name, each in drops.items()}
    times = {name: {c: float(rng.uniform(0.1, 1)) for c in [*each, None]} for name, each in drops.items()}
    return graph, Listed(times), drops


def every_mapping(drops):
    """All ways to take one choice per layer."""
    return [dict(zip(drops, picks, strict=True)) for picks in itertools.product(*drops.values())]


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_fastest_mapping_within_a_budget_is_that_of_brute_force(seed, gains):
    rng = np.random.default_rng(seed)
    graph, model, drops = case(rng, gains=gains)
    for name in list(drops)[::2]:
        drops[name][None] = 0.0  # may stay dense
    every = every_mapping(drops)
    sums = np.array([sum(drops[k][c] for k, c in mapping.items()) for mapping in every])
    times = np.array([sum(model.times[k][c] for k, c in mapping.items()) for mapping in every])
    for budget in np.quantile(sums, [0.0, 0.02, 0.3, 0.9, 1.0]):
        found = exact_mapping(graph, model, drops, budget=budget + 1e-12)
        assert total_drop(found, drops) <= budget + 2e-12
        assert model.predict(graph, found) == pytest.approx(times[sums <= budget + 1e-12].min())


@pytest.mark.parametrize("seed", range(4))
def test_a_thinned_front_keeps_the_budget_and_its_promise(seed):
    graph, model, drops = case(np.random.default_rng(seed), layers=6, choices=6)
    every, points = every_mapping(drops), 40
    sums = np.array([sum(drops[k][c] for k, c in mapping.items()) for mapping in every])
    times = np.array([sum(model.times[k][c] for k, c in mapping.items()) for mapping in every])
    for budget in np.quantile(sums, [0.05, 0.5]):
        found = exact_mapping(graph, model, drops, budget=budget, points=points)
        step = (budget - sums.min()) / points
        assert total_drop(found, drops) <= budget
        assert times[sums <= budget].min() <= model.predict(graph, found) + 1e-12
        assert model.predict(graph, found) <= times[sums <= budget - len(drops) * step].min() + 1e-12


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0, 10.0])
def test_the_highest_reward_is_that_of_brute_force(rng, weight):
    graph, model, drops = case(rng)
    dense = model.predict(graph, {})
    rewards = [-total_drop(m, drops) - weight * model.predict(graph, m) / dense for m in every_mapping(drops)]
    found = exact_mapping(graph, model, drops, weight=weight)
    assert -total_drop(found, drops) - weight * model.predict(graph, found) / dense == pytest.approx(max(rewards))


def test_a_mapping_says_what_it_cost_and_leaves_the_rest_dense(rng):
    graph, model, drops = case(rng)
    first, *_, last = list(drops)
    del drops[last]
    drops[first] = {None: 0.0}
    found = exact_mapping(graph, model, drops, budget=4.0)
    assert set(found) == set(drops) - {first} and isinstance(found, Mapping)
    rows = {row["layer"]: row for row in found.layers}
    assert rows[last]["reason"] == "no candidate"
    assert sum(row.get("drop", 0) for row in rows.values()) == pytest.approx(total_drop(found, drops))
    assert rows["1"]["reason"].startswith("exact (drops <= 4): ") and "one of 4 choices" in rows["1"]["reason"]
    assert Mapping.from_json(found.to_json()).report().equals(found.report())


def test_the_exact_mappings_own_drop_is_a_budget_that_gives_it_again(rng):
    graph, model, drops = case(rng, layers=6)
    once = exact_mapping(graph, model, drops, budget=2.0)
    assert exact_mapping(graph, model, drops, budget=total_drop(once, drops)) == once


def test_what_is_no_problem_is_refused(rng):
    graph, model, drops = case(rng)
    for wrong in ({}, {"budget": 1, "weight": 1}, {"budget": np.nan}, {"weight": -1.0}, {"budget": 1, "points": 0}):
        with pytest.raises(ValueError, match="Expected a budget, or a weight >= 0"):
            exact_mapping(graph, model, drops, **wrong)
    least = sum(min(each.values()) for each in drops.values())
    with pytest.raises(ValueError, match=f"budget >= {least:.6g}"):
        exact_mapping(graph, model, drops, budget=least - 0.01)
    with pytest.raises(KeyError, match="nope"):
        exact_mapping(graph, model, {"nope": {}}, budget=1)
    with pytest.raises(ValueError, match="finite drops. Got others in 0"):
        exact_mapping(graph, model, drops | {"0": {OPTIONS[0]: np.nan}}, budget=1)
    with pytest.raises(KeyError, match="layer '0'"):
        total_drop({"0": Choice(Filter(), 2)}, drops)
    with pytest.raises(KeyError, match="nope"):
        total_drop({"nope": OPTIONS[0]}, drops)


def test_the_proxy_is_the_energy_that_pruning_removes(rng):
    graph = nbs.trace(build("resnet20", width=0.5).eval(), torch.zeros(1, 3, 32, 32))
    name = "layer2.0.conv2"
    choices = [Choice(Unstructured(), 8), *(Choice(BlockPunched(n, n), 8) for n in (1, 2, 4)), Choice(Pattern(8), 8)]
    drops = energy_drops(graph, {name: [None, *choices]})[name]
    weight = graph[name].weight.astype(float)
    for choice in choices:
        left = np.square(weight[choice.scheme.project(graph[name].weight, 8)]).sum()
        assert drops[choice] == pytest.approx(1 - left / np.square(weight).sum())
    assert drops[None] == 0 and drops[choices[0]] == pytest.approx(drops[choices[1]])
    assert drops[choices[1]] < drops[choices[2]] < drops[choices[3]] < 7 / 8 + 0.05
    large = nbs.trace(nn.Linear(512, 512), torch.zeros(1, 512))
    (layer,) = large.layers
    whole, part = (energy_drops(large, {layer: [Choice(Unstructured(), 8)]}, n)[layer] for n in (1 << 20, 1 << 14))
    assert list(part.values()) == pytest.approx(list(whole.values()), abs=0.02)
    with pytest.raises(KeyError, match="nope"):
        energy_drops(graph, {"nope": []})


@pytest.fixture
def trained():
    """A small network on random images of three brightnesses, which it tells apart, its graph and the data."""
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    images = (labels[:, None, None, None] * 90 + torch.randint(0, 60, (120, 3, 8, 8))).to(torch.uint8)
    data = Data("bright", Batches(images, labels, 30, True, crop=1), Batches(images[:9], labels[:9]), ("a", "b", "c"))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    model.extend([nn.Linear(8 * 36, 3)])
    nbs.fit(model, data, 4, lr=0.02, device="cpu", progress=False)
    return model.eval(), data, nbs.trace(model, torch.zeros(1, 3, 8, 8))


def test_drops_are_measured_one_layer_at_a_time_and_the_model_comes_back(trained):
    model, data, graph = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"2": [None, Choice(Pattern(8), 8), Choice(Filter(), 8)], "5": [Choice(Unstructured(), 20)]}
    drops = layer_drops(model, data, graph, options, share=0.3, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    held = hold_out(data, 0.3)
    assert len(held.test.labels) == 36 and not held.test.crop
    dense = nbs.evaluate(model, held, progress=False)
    nbs.prune(model, {"5": options["5"][0]})
    assert drops["5"] == {options["5"][0]: dense - nbs.evaluate(model, held, progress=False)}
    assert drops["2"][None] == 0 and all(-1 <= drop <= 1 for drop in drops["2"].values())
    with pytest.raises(KeyError, match="nope"):
        layer_drops(model, data, graph, {"nope": []})


def test_a_killed_measurement_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    model, data, graph = trained
    before = model[2].weight.detach().clone()
    options = {"2": [Choice(BlockPunched(n, n), 4) for n in (1, 2, 4)], "5": [Choice(Unstructured(), 4)]}
    whole = layer_drops(model, data, graph, options, progress=False)
    calls, evaluate = [], drops_module.evaluate

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(drops_module, "evaluate", dying)
    file = tmp_path / "drops.json"
    with pytest.raises(KeyboardInterrupt):
        layer_drops(model, data, graph, options, checkpoint=file, progress=False)
    assert torch.equal(model[2].weight, before)
    assert len(json.loads(file.read_text())["drops"]) == 2
    assert layer_drops(model, data, graph, options, checkpoint=file, progress=False) == whole
    assert len(calls) == 4 + 1 + 2  # the dense accuracy again, and what was left
    layer_drops(model, data, graph, options, checkpoint=file, progress=False)
    assert len(calls) == 7
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(ValueError, match="delete it to start anew"):
        layer_drops(model, data, graph, options, checkpoint=file, progress=False)
    file.write_text("{")
    with pytest.raises(ValueError, match="checkpoint written by layer_drops"):
        layer_drops(model, data, graph, options, checkpoint=file, progress=False)


@pytest.mark.parametrize("task", ["easy", "hard"])
def test_the_rule_beside_the_exact_solver(task):
    torch.manual_seed(0)
    graph = nbs.trace(build("resnet20", width=1.0).eval(), torch.zeros(1, 3, 32, 32))
    table, found = rule_against_exact(graph, Formula(), task=task)
    rows = table.set_index("mapping")
    assert list(rows.index) == ["dense", "rule", "exact", "fastest"] == list(found)
    assert found["rule"] == rule_mapping(graph, Formula(), task=task)
    assert rows["drop"]["exact"] <= rows["drop"]["rule"] and rows["ratio"]["exact"] == 1
    assert rows["layers_ms"]["fastest"] <= rows["layers_ms"]["exact"] <= rows["layers_ms"]["rule"]
    assert rows["ms"]["rule"] == pytest.approx(Formula().predict(graph, found["rule"]))
    assert rows["mapped"]["exact"] == rows["mapped"]["rule"] == len(found["rule"])
    free, loose = rule_against_exact(graph, Formula(), task=task, dense=True)
    assert free.set_index("mapping")["layers_ms"]["exact"] <= rows["layers_ms"]["exact"] * 1.01
    options, _ = layer_choices(graph, task=task)
    ours = {name: {choice: 0.0 for choice in listed} for name, listed in options.items()}
    table, _ = rule_against_exact(graph, Formula(), task=task, drops=ours)
    assert table.set_index("mapping")["layers_ms"]["exact"] == table.set_index("mapping")["layers_ms"]["fastest"]


def test_equal_graphs_need_no_layers_with_choices():
    graph = SimpleNamespace(layers={})
    assert exact_mapping(graph, Formula(), {}, budget=0.0) == {}
