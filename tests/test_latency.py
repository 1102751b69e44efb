"""The latency model: its settings, its rows, and what it predicts from them; times come from a law, not a clock."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nbs_lib as nbs
from benchmarks import heldout
from nbs_lib.latency import LatencyModel, NoData, building, model
from nbs_lib.latency.settings import FAMILIES, LAYERS, TestModel, spread
from nbs_lib.latency.structure import conv, linear
from nbs_lib.measure import cache, host, schema
from nbs_lib.models import build

LAW = {"conv": (4e-7, 3e-8, 1e-8, 1e-3), "depthwise": (3e-7, 1e-7, 2e-8, 1e-5, 1e-3), "copy": (4e-8, 2e-3)}
LAW |= {"linear": (5e-8, 9e-8, 3e-8, 5e-8, 1e-6, 1e-3), "pool": (2e-8, 1e-8, 2e-3), "pointwise": (2e-8, 1e-3)}
LAW |= {
    "call": (0.02,),
    "result": (5e-8, 1e-3),
    "phases": (6e-8, 3e-3),
    "strided depthwise": (6e-7, 0, 3e-8, 0, 2e-3),
    "pytorch": (1e-7, 0.01),
}
# What a Gaussian process that was fitted once found (of exact laws it has nothing to learn): fitting takes seconds.
THETAS = {kind: [-7.0, *[1.0] * features, -7.0] for kind, features in (("conv", 7), ("depthwise", 4), ("linear", 5))}


def by_law(setting: TestModel) -> float:
    """ms of a run of a test model on a machine whose times are exactly a sum of the terms."""
    return sum(count * np.dot(work.terms, LAW[work.kind]) for work, count in model.row_works(setting))


def row(setting: TestModel, device="host", threads=1, **columns) -> pd.DataFrame:
    """A measured row as a build would write it, its time by the law."""
    values = host.provenance(f"prunemap {nbs.__version__}") | host.stamp() | setting.columns()
    values |= {"threads": threads, "model": building.MODEL, "median_ms": by_law(setting), "runs": 20} | columns
    return schema.frame([values])


@pytest.fixture(scope="module")
def lm() -> LatencyModel:
    return LatencyModel(pd.concat([row(setting) for setting in spread(256)]), THETAS)


@pytest.fixture(scope="module")
def graph():
    return nbs.trace(build("resnet20").eval(), torch.zeros(1, 3, 32, 32))


def test_settings_are_distinct_and_any_first_part_has_every_family():
    settings = spread(512)
    assert len(set(settings)) == len(settings) == 512
    assert {setting.family for setting in settings[:100]} == set(FAMILIES)
    assert {setting.family for setting in spread(64)} == set(FAMILIES)
    texts = {setting.scheme for setting in settings}
    assert {"dense", "unstructured", "pattern(8)", "block_punched(8x4)", "block(8x16)"} <= texts
    assert all(setting.scheme != "pattern(8)" or setting.rate >= 2.25 for setting in settings)


def test_a_row_says_which_setting_it_is():
    for setting in spread(200):
        assert TestModel.of(next(row(setting).itertuples())) == setting


@pytest.mark.parametrize(
    "family",
    [
        name
        for name, family in FAMILIES.items()
        if family[2] == 1 and name not in ("pointwise", "global_avg", "pytorch")
    ],
)
def test_a_test_model_computes_what_pytorch_does(family):
    """Its graph is written down, not traced; PyTorch runs the same layers with the same weights."""
    stem, deep = family.startswith("stem"), "depthwise" in family
    scheme = "dense" if stem or deep else "block(4x4)" if family == "linear" else "block_punched(4x4)"
    setting = TestModel(family, 12, 3 if stem else 1 if deep else 9, 1 if family == "linear" else 6, scheme, 2.0)
    net, k = setting.network(), setting.kernel
    layers = list(net.graph.layers.values())
    assert len(layers) == LAYERS and all(
        layer.rate == pytest.approx(1 if scheme == "dense" else 2, rel=0.2) for layer in layers
    )
    outputs, values = [], [x.clone() for x in net.example_inputs]
    for number, layer in enumerate(layers):
        x = values[number] if len(values) > 1 else values[0]
        weight, bias = torch.from_numpy(layer.weight), torch.from_numpy(layer.bias)
        if family == "linear":
            y = nn.functional.linear(x, weight, bias)
        else:
            y = nn.functional.conv2d(x, weight, bias, setting.stride, k // 2, groups=layer.groups)
        outputs.append(y.relu())
        if len(values) == 1:
            values = [outputs[-1]]
    made = net(*net.example_inputs)
    pairs = zip(made, outputs, strict=True) if isinstance(made, tuple) else [(made, outputs[-1])]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_build_measures_what_is_missing_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_CACHE", str(tmp_path))
    monkeypatch.setattr(building.paths, "data_dir", lambda: tmp_path / "data")
    asked = []
    monkeypatch.setattr(building, "_measure", lambda setting, *a: (asked.append(setting), row(setting))[1])
    first = building.rows(settings=40, progress=False)
    assert asked == spread(40) and len(first) == 40
    file = tmp_path / "measured" / "host" / "latency_model.csv"
    assert len(cache.read(file)) == 40
    with file.open("a") as broken:
        broken.write("not a row\n")
    with pytest.warns(UserWarning, match="skipped"):
        again = building.rows(settings=40, progress=False)
    assert len(asked) == 40
    pd.testing.assert_frame_equal(first, again)


def test_a_budget_ends_a_build_with_a_coarser_model(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_measure", lambda setting, *a: row(setting))
    monkeypatch.setattr(building.paths, "data_dir", lambda: tmp_path / "data")
    clock = iter(np.arange(0, 1e6, 10.0))
    monkeypatch.setattr(building.time, "monotonic", lambda: float(next(clock)))
    with pytest.warns(UserWarning, match="budget of 200 s was over after 19 of 64"):
        rows = building.rows(budget_s=200, settings=64, file=tmp_path / "rows.csv", progress=False)
    assert len(rows) == 19


def test_rows_of_another_cpu_engine_or_thread_count_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(building.paths, "data_dir", lambda: tmp_path / "data")
    file, settings, asked = tmp_path / "rows.csv", spread(20), []
    for columns in ({"fingerprint": "0" * 12}, {"threads": 2}, {"ok": False, "error": "no"}, {"model": "other"}):
        cache.append(file, row(settings[0], **columns))
    monkeypatch.setattr(building, "_measure", lambda setting, *a: (asked.append(setting), row(setting))[1])
    building.rows(settings=20, file=file, progress=False)
    assert asked == settings


def test_a_setting_that_fails_is_a_row_with_its_error(monkeypatch):
    monkeypatch.setattr(TestModel, "network", lambda *a: 1 / 0)
    failed = building._measure(spread(1)[0], "host", 1)
    assert not failed.ok[0] and "ZeroDivisionError" in failed.error[0]


@pytest.mark.parametrize("arguments", [{"budget_s": -1}, {"settings": 0}, {"budget_s": float("nan")}])
def test_a_build_needs_a_budget_and_settings(arguments):
    with pytest.raises(ValueError, match="Expected a budget of 0 s or more and a number of settings above 0"):
        building.rows(**arguments)


def test_an_unknown_device_names_the_known():
    with pytest.raises(KeyError, match="Expected a device among host"):
        LatencyModel.build(device="toaster")


def test_too_few_rows_are_no_model():
    with pytest.raises(NoData, match="Expected at least 16 measured settings. Got 3"):
        LatencyModel(pd.concat([row(setting) for setting in spread(3)]))


def test_it_finds_a_law_that_is_a_sum_of_its_terms(lm):
    """Settings that were never seen, within a per cent."""
    seen = set(spread(256))
    unseen = [setting for setting in spread(512) if setting not in seen and setting.kind == "conv"]
    errors = []
    for setting in unseen[:150]:
        works = [work for work, _ in model.row_works(setting) if work.kind == "conv"]
        try:
            errors.append(lm._times(works[:1])[0][0] / np.dot(works[0].terms, LAW["conv"]) - 1)
        except NoData:
            continue
    assert len(errors) > 100 and np.percentile(np.abs(errors), 90) < 0.01


def test_a_network_is_the_sum_of_its_steps(lm, graph):
    mapping = nbs.uniform_mapping(graph, 4.0)
    steps = lm.predict_layers(graph, mapping)
    assert lm.predict(graph, mapping) == pytest.approx(steps.ms.sum())
    assert (steps.low_ms <= steps.ms).all() and (steps.ms <= steps.high_ms).all() and (steps.ms >= 0).all()
    assert set(graph.layers) == set(steps.layer) - {""}
    low, high = lm.predict_range(graph, mapping)
    assert low == pytest.approx(steps.low_ms.sum()) and low < lm.predict(graph, mapping) < high
    net = nbs.compile(build("resnet20").eval(), torch.zeros(1, 3, 32, 32), tuning=False)
    assert len(steps) == len(net.steps) + 2  # the result's copy and the call
    assert lm.predict(graph, mapping) < lm.predict(graph, {})


def test_predicting_neither_compiles_nor_measures(lm, graph, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("compiled or measured")

    import nbs_lib.compiler.network as network
    from nbs_lib import clock
    from nbs_lib.kernels import jit

    for where, name in ((clock, "alternate"), (network, "Network"), (jit, "build")):
        monkeypatch.setattr(where, name, refuse)
    assert lm.predict(graph, nbs.uniform_mapping(graph, 3.0)) > 0


def test_whole_filters_leave_the_network(lm, graph):
    """A filter-pruned layer is predicted as the smaller dense layer it becomes, and so are those that read it."""
    layer = graph["layer2.1.conv1"]
    alone = lm.layer_ms(layer, [nbs.Choice(nbs.Filter(), 2.0), None])
    assert alone[0] < 0.65 * alone[1]
    steps = {
        r: lm.predict_layers(graph, {"layer2.1.conv1": nbs.Choice(nbs.Filter(), r)} if r > 1 else {})
        .set_index("layer")
        .ms
        for r in (1, 2)
    }
    for name in ("layer2.1.conv1", "layer2.1.conv2"):
        assert steps[2][name] < 0.7 * steps[1][name]
    assert steps[2]["layer3.0.conv1"] == pytest.approx(steps[1]["layer3.0.conv1"])


def test_higher_rates_and_larger_blocks_are_not_slower(lm, graph):
    layer = graph["layer3.1.conv1"]
    rates = lm.layer_ms(layer, [nbs.Choice(nbs.BlockPunched(8, 4), r) for r in (2.0, 4.0, 8.0)])
    assert (np.diff(rates) < 0).all()
    blocks = lm.layer_ms(layer, [nbs.Choice(nbs.BlockPunched(p, 4), 8.0) for p in (1, 4, 8)])
    assert (np.diff(blocks) < 0).all()


def test_structure_is_that_of_the_packing():
    whole = conv(None, 1.0, 64, 64, (3, 3))
    assert (whole.computed, whole.rows, whole.columns) == (1.0, 8, 1.0)
    punched = conv(nbs.BlockPunched(8, 4), 8.0, 512, 512, (3, 3))
    assert punched.computed == pytest.approx(1 / 8, rel=0.02) and punched.rows == 8
    assert conv(nbs.BlockPunched(4, 4), 8.0, 512, 512, (3, 3)).rows == pytest.approx(4, rel=0.1)
    assert conv(nbs.Unstructured(), 1.02, 64, 64, (3, 3)) == whole  # computing the zeros is faster
    share, read, _ = linear(nbs.Block(16, 16), 8.0, 1024, 1024)
    assert share < 0.6 and read < 6.1 * 1024 * 1024 * share


@pytest.mark.parametrize("columns", [{"fingerprint": "0" * 12}, {"threads": 2}, {"ok": False, "error": "no"}])
def test_rows_that_do_not_go_together_are_no_model(columns):
    rows = [row(setting) for setting in spread(20)]
    with pytest.raises(ValueError, match="Expected rows without errors, of one machine"):
        LatencyModel(pd.concat([*rows, row(spread(21)[20], **columns)]))


def test_sizes_beyond_the_settings_are_less_certain(lm):
    curve, far = lm.curves["conv"], model.row_works(spread(2)[0])[2][0]
    shifted = [model.Work("conv", "x", far.terms, tuple(curve.high + more)) for more in (0.0, 1.0)]
    near, beyond = curve(shifted)[1]
    assert beyond > near + 0.05


def test_it_refuses_by_name(lm, graph):
    with pytest.raises(NoData, match="on one vector"):
        lm.predict(nbs.trace(nn.Linear(16, 16), torch.zeros(4, 16)), {})
    with pytest.raises(KeyError, match="layer9"):
        lm.predict(graph, {"layer9": nbs.Choice(nbs.BlockPunched(8, 4), 2.0)})
    strange = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    with pytest.raises(NoData, match="gelu"):
        lm.predict(nbs.trace(strange, torch.zeros(1, 3, 32, 32)), {})
    huge = nbs.trace(nn.Conv2d(8, 8, 31, padding=15), torch.zeros(1, 8, 32, 32))
    with pytest.raises(NoData, match="within the sizes of the measured conv settings"):
        lm.predict(huge, {})


def test_a_model_survives_the_disk(lm, graph, tmp_path):
    mapping = nbs.uniform_mapping(graph, 4.0)
    other = LatencyModel.load(lm.save(tmp_path / "model.json"))
    assert other.predict(graph, mapping) == pytest.approx(lm.predict(graph, mapping), rel=1e-6)
    assert (other.device, other.engine, other.threads, len(other.rows)) == (lm.device, lm.engine, 1, len(lm.rows))


def test_a_model_of_another_machine_needs_a_word(lm, tmp_path):
    data = json.loads(lm.save(tmp_path / "model.json").read_text())
    for stored in data["rows"]:
        stored |= {"fingerprint": "f" * 12, "cpu": "Elsewhere 9000"}
    (tmp_path / "model.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="Expected a latency model of this machine .* Got one of Elsewhere 9000"):
        LatencyModel.load(tmp_path / "model.json")
    assert LatencyModel.load(tmp_path / "model.json", any_machine=True).cpu == "Elsewhere 9000"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 9, "rows": [], "thetas": {}}'])
def test_what_is_no_model_is_refused(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match="Expected a model written by LatencyModel.save"):
        LatencyModel.load(tmp_path / "model.json")


def test_scores_count_refusals_as_misses():
    rows = pd.DataFrame(
        {"network": ["a"] * 4, "predicted_ms": [1.0, 2.2, 3.0, np.nan], "measured_ms": [1.0, 2.0, 3.2, 4.0]}
    )
    scored = heldout.score(rows).loc["a"]
    assert (scored.predictions, scored.refused) == (4, 1)
    assert (scored.within_5, scored.within_10, scored.within_15) == (25, 50, 75)
    assert scored["rank"] == 1.0


def test_random_mappings_are_legal_and_reproducible(graph):
    drawn = [heldout.random_mapping(graph, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(choice.scheme.legal(graph[name])[0] for name, choice in drawn[0].items())
    assert "conv1" not in drawn[0] and len(drawn[0]) > 10
