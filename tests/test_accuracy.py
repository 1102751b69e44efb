"""What rows on record say of an accuracy; how a search's figure counts, names its source and answers a claim."""

import json

import pandas as pd
import pytest
from conftest import CLAIMS_HEADER

from nbs_lib.report import Claims, freshness
from nbs_lib.report.accuracy import drops
from nbs_lib.trained import TRAINED
from notebooks.beside import map_fig06_overview as overview

MAPPED = json.dumps({"a": ["block_punched(4x4)", 16.0], "b": ["pattern(8)", 4.0]})
ROW = {"dataset": "folder:cifar10-jpeg", "network": "vgg16_cifar", "algorithm": "magnitude", "rates": MAPPED}
ROW |= {"dense_accuracy": 0.94, "accuracy": 0.93, "conv_rate": 12.3, "dense_epochs": 40, "total_epochs": 20}
ROW |= {"size": 0, "train_images": 0, "width": 1.0}


def rows(*others):
    return pd.DataFrame([ROW | {"conv": "block_punched(8x4)", "linear": "", "ok": True} | other for other in others])


def test_a_drop_needs_a_mapping_of_the_whole_network_on_all_of_the_data_set():
    found, told = drops(rows({}), "vgg16_cifar", 12.38)
    assert found.tolist() == pytest.approx([1.0])
    for part in ("CIFAR-10 (JPEG), width 1", "1 x block_punched(4x4), 1 x pattern(8)", "4..16x", "12.3x", "20 epochs"):
        assert part in told
    for other in ({"width": 0.25}, {"train_images": 500}, {"rates": ""}, {"conv_rate": 8.0}, {"size": 16}):
        found, told = drops(rows(other), "vgg16_cifar", 12.38)
        assert found.empty and told.startswith("; other drops on record") and told.endswith(": 1.0")
    assert "block_punched(8x4) for all layers" in drops(rows({"rates": ""}), "vgg16_cifar", 12.38)[1]


@pytest.mark.parametrize("other", [{"dataset": "folder:cifar100-jpeg"}, {"dataset": "cifar100"}, {"ok": False}])
def test_other_data_sets_are_not_even_named(other):
    found, told = drops(rows(other), "vgg16_cifar", 12.38)
    assert found.empty and not told
    assert len(drops(rows(other, {"dataset": "cifar10"}), "vgg16_cifar", 12.38)[0]) == 1


def test_nothing_on_record_says_nothing():
    found, told = drops(TRAINED.frame([]), "vgg16_cifar", 12.38)
    assert found.empty and told == ""


def test_provenance_counts_what_is_new():
    table = pd.DataFrame({"utc": ["2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"]})
    for started, told in (
        ("2026-01-01T00:00:00+00:00", "all 2 settings measured now"),
        ("2026-01-01T12:00:00+00:00", "1 of 2 settings measured now, the others cached"),
        ("2026-01-03T00:00:00+00:00", "all 2 settings cached"),
    ):
        assert freshness(table, started) == told


def test_evaluations_are_counted_per_method_and_seed():
    counts = {("rl", 0): 3, ("rl", 1): 3, ("exact", 0): 2, ("exact", 1): 1, ("rule", 0): 1}
    table = pd.DataFrame([{"strategy": s, "seed": seed} for (s, seed), n in counts.items() for _ in range(n)])
    names = {"rl": "search", "random": "random search", "exact": "exact solver", "rule": "rule"}
    assert overview.evaluated(table, names) == "search: 3, exact solver: 1..2, rule: 1"


def test_a_tie_is_not_at_least_as_good(checkout):
    line = "bounds,mapping 5,Search is at least as good,here,reward - reward,,>=,0,reward,cifar,text\n"
    (checkout / "data" / "paper" / "claims.csv").write_text(CLAIMS_HEADER + line)
    claims = Claims("here")
    assert overview.judge_difference(claims, "bounds", 0.02, 0.01, 0.03, "n = 5") == "holds"
    for low, high, told in ((0.0, 0.0, "no difference found"), (-0.01, 0.05, "no difference"), (-0.2, -0.1, "below 0")):
        assert overview.judge_difference(claims, "bounds", (low + high) / 2, low, high, "n = 5") == "does not hold"
        assert told in claims.frame().note[0] and claims.frame().value[0] == pytest.approx((low + high) / 2)
