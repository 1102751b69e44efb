"""Settings and accuracies on record: keys, rows, failures as rows, rows from the record or from training."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import nbs_lib as nbs
from nbs_lib import trained
from nbs_lib.data import Batches
from nbs_lib.measure import cache
from nbs_lib.trained import TRAINED, Setting, accuracies

TINY = Setting(size=8, train_images=100, width=0.25, dense_epochs=1, conv="block_punched(4x4)", rate=2.0)
MAGNITUDE = replace(TINY, algorithm="magnitude", retrain_epochs=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_CACHE", str(tmp_path / "cache"))
    trained._data.cache_clear()


def test_a_row_has_the_setting_and_what_came_of_it():
    row = MAGNITUDE.run()
    frame = TRAINED.frame([row])
    assert frame.ok[0]
    assert {name: row[name] for name in asdict(MAGNITUDE)} == asdict(MAGNITUDE)
    model, masks = MAGNITUDE.prune()
    assert frame.accuracy[0] == nbs.evaluate(model, MAGNITUDE.data(), progress=False)
    assert frame.dense_accuracy[0] == nbs.evaluate(MAGNITUDE.dense(), MAGNITUDE.data(), progress=False)
    assert frame.test_images[0] == 360 and frame.total_epochs[0] == 1 and frame.classes[0] == 10
    rates = nbs.trace(model, torch.zeros(1, 3, 8, 8)).rates()
    assert frame.loc[0, ["conv_rate", "weight_rate", "mac_rate"]].tolist() == [rates.conv, rates.weights, rates.macs]
    summary = masks.summary().set_index("layer").rate
    assert {layer: rate for layer, (_, rate) in json.loads(frame.layer_rates[0]).items()} == summary.to_dict()
    assert trained._setting(frame.iloc[0]) == MAGNITUDE


def test_the_dense_network_is_trained_once_and_shared_by_what_differs_later(monkeypatch):
    first = TINY.dense()
    monkeypatch.setattr("nbs_lib.data.Batches.__iter__", lambda self: pytest.fail("trained again"))
    again = MAGNITUDE.dense()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def prune_to_be_killed(facts, threads, kill):
    """In a process of its own, which ends as by `kill -9` at its `kill`-th batch."""
    torch.set_num_threads(threads)
    setting, left, batches = Setting(**facts), iter(range(1, kill)), Batches.__iter__
    setting.dense()

    def counted(self):
        for batch in batches(self):
            if self.shuffle and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    Batches.__iter__ = counted
    setting.prune()


def test_a_killed_row_goes_on_to_the_same_result(tmp_path, monkeypatch):
    setting = replace(TINY, train_images=200, algorithm="magnitude", epochs=4, retrain_epochs=2)
    folder, here = tmp_path / "cache" / "trained", Path(__file__).resolve()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent)])}
    killed = f"import test_trained; test_trained.prune_to_be_killed({asdict(setting)}, {torch.get_num_threads()}, "
    batches, ended = Batches.__iter__, []
    for kill in (6, 11):  # of 2 batches an epoch: in the third of 4 epochs, and in retraining
        done = subprocess.run([sys.executable, "-c", f"{killed}{kill})"], env=environment)
        assert done.returncode == -signal.SIGKILL
        (phases,) = (entry for entry in folder.iterdir() if entry.is_dir())
        assert {file.name for file in phases.iterdir()} >= {"penalty.pt"}
        left = []
        with monkeypatch.context() as patch:
            counted = lambda self, left=left: (left.append(1) or batch for batch in batches(self))  # noqa: E731
            patch.setattr(Batches, "__iter__", counted)
            ended.append(setting.prune())
        assert len(left) == 12 - (kill - 1) // 2 * 2 + 2  # what whole epochs had left, and the batch norms' refreshing
        assert [entry.name for entry in folder.iterdir()] == [f"{setting.key()}.pt"]  # the dense network stays
    whole, other = setting.prune()
    for resumed, masks in ended:
        states = resumed.state_dict().values(), whole.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        assert masks.history.drop(columns="images_per_s").equals(other.history.drop(columns="images_per_s"))


def test_a_setting_is_traced_once(monkeypatch):
    traced, trace = [], trained.trace
    monkeypatch.setattr(trained, "trace", lambda *given: traced.append(1) or trace(*given))
    assert MAGNITUDE.run()["conv_rate"] > 1 and len(traced) == 1


def test_rates_of_layers_replace_the_uniform_one():
    layer = "layer1.0.conv1"
    setting = replace(MAGNITUDE, rates=json.dumps({layer: ["filter", 2.0]}))
    mapping = setting.mapping(setting.graph(setting.model()))
    assert {name: str(choice) for name, choice in mapping.items()} == {layer: "filter@2x"}
    model, masks = setting.prune()
    assert list(masks) == [layer]


def test_reweighted_rows_name_lambda_and_the_rates_around_tau():
    options = json.dumps({"target_rate": 2.0, "trials": 2})
    row = replace(TINY, algorithm="reweighted", epochs=2, retrain_epochs=1, options=options).run()
    assert row["lam"] > 0 and row["tau_rate_low"] <= row["tau_rate_high"] and row["total_epochs"] in (3, 5)
    assert row["reached_rate"] == pytest.approx(2.0, rel=0.05)


def test_what_is_not_on_record_is_a_row_that_says_so(tmp_path):
    rows = accuracies([TINY, MAGNITUDE], cache=tmp_path / "trained", progress=False)
    assert not rows.ok.any() and rows.error.str.contains("not on record").all()
    assert rows.algorithm.tolist() == ["dense", "magnitude"] and not (tmp_path / "trained").exists()


def test_rows_come_from_the_record_and_only_missing_ones_are_trained(tmp_path, monkeypatch):
    rows = [TRAINED.row(**asdict(s), accuracy=a, dense_accuracy=0.9) for s, a in ((TINY, 0.5), (MAGNITUDE, 0.4))]
    cache.append(tmp_path / "a.csv", rows[:1], TRAINED)
    cache.append(tmp_path / "b.csv", rows[1:] + [TRAINED.row(**asdict(TINY), ok=False, error="later failure")], TRAINED)
    other = replace(MAGNITUDE, seed=7)
    found = accuracies([MAGNITUDE, other, TINY, MAGNITUDE], cache=tmp_path, progress=False)
    assert found.accuracy[[0, 2, 3]].tolist() == [0.4, 0.5, 0.4] and found.ok.tolist() == [True, False, True, True]
    monkeypatch.setattr(trained, "ProcessPoolExecutor", lambda *a, **k: pytest.fail("trained what is on record"))
    accuracies([MAGNITUDE, TINY], live=True, cache=tmp_path, progress=False)


def test_live_rows_are_trained_in_processes_and_put_on_record(tmp_path):
    missing = replace(TINY, dataset=f"folder:{tmp_path / 'nothing'}")
    rows = accuracies([TINY, missing], live=True, record=True, jobs=1, cache=tmp_path / "trained", progress=False)
    assert rows.ok.tolist() == [True, False] and "FileNotFoundError" in rows.error[1]
    back = cache.read(tmp_path / "trained", TRAINED).sort_values("ok", ascending=False, ignore_index=True)
    pd.testing.assert_frame_equal(back, rows)
    again = accuracies([TINY], cache=tmp_path / "trained", progress=False)
    assert again.accuracy[0] == rows.accuracy[0] and sorted(f.name for f in (tmp_path / "trained").glob("*.csv"))


@pytest.mark.parametrize(
    "broken",
    [{"accuracy": 1.5}, {"accuracy": None}, {"dataset": ""}, {"ok": False, "error": ""}, {"dense_accuracy": -1}],
)
def test_rows_that_break_a_rule_are_refused(broken):
    with pytest.raises(ValueError, match="Expected"):
        TRAINED.row(**asdict(TINY) | {"accuracy": 0.5, "dense_accuracy": 0.5} | broken)
    with pytest.raises(KeyError, match="nonsense"):
        TRAINED.row(nonsense=1)


def test_committed_rows_are_whole_and_of_different_settings():
    folder = trained.paths.data_dir() / "trained"
    rows = cache.read(folder, TRAINED)
    assert rows.ok.all() and not rows.duplicated(trained.SETTINGS).any()
    assert (rows.reached_rate.dropna() <= 1.03 * rows.rate.clip(2.25)[rows.reached_rate.notna()]).all()
