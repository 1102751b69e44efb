"""Tuning and its record: what is written, what is read again, what a search tries; times are made up."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from naive import agrees, same
from torch import nn

import nbs_lib as nbs
from nbs_lib import clock
from nbs_lib.compiler import compile, record, tune, tuning
from nbs_lib.compiler.packing import LARGEST, TILES
from nbs_lib.compiler.record import Fixed, Record, layer_key
from nbs_lib.compiler.steps import Tiling
from nbs_lib.compiler.tuning import COLUMNS, GENES, SEARCHES
from nbs_lib.kernels import jit

TUNED = Tiling(rows=min(TILES), vectors=2, block=4, fetch="tile", unroll=2, split="groups", dense=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes this machine's record, nor waits for its measuring lock."""
    torch.manual_seed(0)
    monkeypatch.setattr(record, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setenv("NBS_LOCK", str(tmp_path / "lock"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "record.json"


def entry(tiling: Tiling = TUNED, ms: float = 1.0, dense_ms: float = 2.0) -> dict:
    """What tuning writes for a layer."""
    trials = {json.dumps(asdict(tiling)): ms, json.dumps(asdict(Tiling(dense=True))): dense_ms}
    return {"tiling": asdict(tiling), "ms": ms, "default_ms": 3.0, "dense_ms": dense_ms, "trials": trials}


def pruned(*shape: int, rate: float = 3.0, **options) -> nn.Conv2d:
    layer = nn.Conv2d(*shape, **options)
    layer.weight.data *= torch.rand(layer.weight.shape[1:]) < 1 / rate
    return layer


@cache
def three() -> nn.Module:
    """Two convolutions that one tiling serves, a third, and a depthwise one that has none."""
    shared = [pruned(8, 8, 3, padding=1) for _ in range(2)]
    shared[1].weight.data = shared[0].weight.data.flip(0)
    model = (shared[0], nn.ReLU(), shared[1], nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1), nn.Flatten())
    return nn.Sequential(*model, nn.Linear(175, 3)).eval()


X = torch.randn(1, 8, 7, 9, generator=torch.Generator().manual_seed(0))


def key_of(layer: nn.Module, x: torch.Tensor, threads: int = 1) -> str:
    return layer_key(nbs.trace(layer, x).layers.popitem()[1], len(x), threads)


# -- the record --------------------------------------------------------------------------------------------------------


def test_record_round_trip(path):
    layer = pruned(8, 16, 3, padding=1)
    spec = nbs.trace(layer, X).layers.popitem()[1]
    empty = Record(path)
    assert not path.exists() and empty.entry(spec, 1, 1) is None and empty.tiling(spec, 1, 1) == Tiling()
    empty.save(layer_key(spec, 1, 1), entry())
    empty.save(layer_key(spec, 1, 2), entry(ms=3.0))
    for found in (empty, Record(path), Record(str(path))):
        assert found.entry(spec, 1, 1) == entry() and found.tiling(spec, 1, 1) == TUNED
        assert found.tiling(spec, 1, 2) == Tiling(dense=True)  # the dense one was faster
        assert found.entry(spec, 2, 1) is None and found.tiling(spec, 2, 1) == Tiling()
    assert json.loads(path.read_text()) == found.entries and {file.suffix for file in path.parent.glob(".*")} <= {
        ".lock"
    }


def test_a_record_keeps_what_others_have_written_since(path):
    one, two = Record(path), Record(path)
    one.save("a", entry())
    two.save("b", entry(ms=4.0))
    one.save("c", entry(ms=5.0))
    assert {key: value["ms"] for key, value in Record(path).entries.items()} == {"a": 1, "b": 4, "c": 5}
    two.save("b", entry(ms=6.0))
    assert Record(path).entries["b"]["ms"] == 6 and len(Record(path).entries) == 3


@pytest.mark.parametrize("content", [b"", b'{"a": {"til', b"[]", b'"text"', b"null", b"3", b"\xff\xfe{}"], ids=repr)
def test_broken_records_are_reported_and_skipped(content, path):
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"skipped in the tuning record .*record\.json: the file") as caught:
        found = Record(path)
    assert found.entries == {} and len(caught) == 1
    with pytest.warns(UserWarning, match="skipped"):
        net = agrees(pruned(8, 16, 3), X, tuning=path)
    assert not net.explain().timed.any()
    with pytest.warns(UserWarning, match="skipped"):
        found.save("a", entry())
    assert Record(path).entries == {"a": entry()}  # whole again, without a word


BROKEN = {
    "no dict": 3,
    "empty": {},
    "no tiling": {name: value for name, value in entry().items() if name != "tiling"},
    "no ms": {name: value for name, value in entry().items() if name != "ms"},
    "no trials": {name: value for name, value in entry().items() if name != "trials"},
    "no time": entry(ms=0.0),
    "negative": entry(dense_ms=-1.0),
    "infinite": entry(ms=math.inf),
    "nan": entry(dense_ms=math.nan),
    "text": entry() | {"default_ms": "1"},
    "list": entry() | {"trials": [1.0]},
    "null": entry() | {"tiling": None},
    "broken trial": entry() | {"trials": {"x": None}},
    "unknown field": entry() | {"tiling": asdict(TUNED) | {"order": "pixels"}},
}
VALUES = {
    "rows": [3, 0, "8", 8.0, None, [8]],
    "vectors": [0, -1, "3", 2.0, None],
    "block": [0, -1, 1.5, "2"],
    "fetch": ["rows", 1],
    "unroll": [0, -1, 2.0, None],
    "split": ["pixels", 2],
    "dense": ["no", 2],
}
BROKEN |= {
    f"{name} {value!r}": entry() | {"tiling": asdict(TUNED) | {name: value}}
    for name, values in VALUES.items()
    for value in values
}


def test_broken_entries_are_reported_and_skipped(path):
    """Each with a warning that names it; the others stay, and nothing a hand has spoilt reaches a kernel."""
    path.write_text(json.dumps({"first": entry()} | BROKEN | {"last": entry(ms=2.0)}))
    with pytest.warns(UserWarning) as caught:
        found = Record(path)
    told = [str(warning.message) for warning in caught]
    assert all(f"{path}: {name}, which" in line for name, line in zip(BROKEN, told, strict=True))
    assert found.entries == {"first": entry(), "last": entry(ms=2.0)}
    with pytest.warns(UserWarning):
        found.save("new", entry())
    assert list(Record(path).entries) == ["first", "last", "new"]


def test_more_than_tuning_writes_today_does_no_harm(path):
    """Fields that another hand has added to an entry, defaults that are not written out."""
    path.write_text(json.dumps({"a": entry() | {"note": "by hand"}, "b": entry() | {"tiling": {"block": 2}}}))
    found = Record(path)
    assert set(found.entries) == {"a", "b"} and Tiling(**found.entries["b"]["tiling"]) == Tiling(block=2)


def test_records_of_another_version_are_left_alone(monkeypatch, tmp_path):
    """Kernels that have changed are tuned anew: the file's name says what it was measured with."""
    layer = pruned(8, 16, 3)
    Record().save(key_of(layer, X), entry())
    assert Record().path.parent == tmp_path / "cache" / "tuning"
    assert compile(layer, X).explain().timed.any()
    monkeypatch.setattr(jit, "fingerprint", lambda: "another")
    assert Record().entries == {} and not compile(layer, X).explain().timed.any()
    Record().save("a", entry())
    monkeypatch.undo()
    assert len([*(tmp_path / "cache" / "tuning").glob("[!.]*")]) == 2


def test_records_of_another_register_width_are_left_alone(monkeypatch):
    Record().save("a", entry())
    monkeypatch.setenv("NBS_VECTOR_WIDTH", "4" if jit.width() != 4 else "8")
    assert Record().entries == {}


def test_one_entry_serves_layers_that_are_alike():
    """Equal in shape, window, threads and about in structure; the weights' values do not matter."""
    base = dict(kernel_size=3, padding=1)
    torch.manual_seed(1)
    mask = torch.rand(1, 16, 3, 3) < 0.25
    layers = [nn.Conv2d(16, 32, **base) for _ in range(3)]
    for layer in layers[:2]:
        layer.weight.data *= mask
    x = torch.randn(2, 16, 9, 9)
    assert key_of(layers[0], x) == key_of(layers[1], x)
    others = [key_of(layers[0], x), key_of(layers[2], x), key_of(layers[0], x, threads=2), key_of(layers[0], x[:1])]
    others.append(key_of(layers[0], x[:, :, 1:]))
    scattered = nn.Conv2d(16, 32, **base)
    scattered.weight.data.flatten()[torch.randperm(scattered.weight.numel())[int(mask.sum()) * 32 :]] = 0
    others.append(key_of(scattered, x))
    for change in (dict(kernel_size=5, padding=2), dict(groups=2), dict(stride=2), dict(dilation=2, padding=2)):
        others.append(key_of(nn.Conv2d(16, 32, **base | change), x))
    assert len(set(others)) == len(others)


# -- what compile makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_compile_takes_the_tiling_of_the_record(path, threads):
    layer = pruned(8, 16, 3, padding=1)
    Record(path).save(key_of(layer, X, threads), entry())
    net = agrees(layer, X, tuning=path, threads=threads)
    (row,) = net.explain().query("op == 'conv2d' and tile != ''").itertuples()
    assert row.timed and (row.sparse_ms, row.dense_ms, row.chosen) == (1.0, 2.0, "sparse")
    assert row.kernel.endswith("_tile_u2") and row.tile.startswith(f"{TUNED.rows}x")
    assert int(row.tile.split("x")[1].split()[0]) <= TUNED.vectors
    other = compile(layer, X, tuning=path, threads=3 - threads).explain()
    assert not other.timed.any() and other.timed.dtype == bool
    Record().save(key_of(layer, X, threads), entry(replace(TUNED, unroll=4)))
    kernels = [
        net.explain().kernel.iloc[-1] for net in (compile(layer, X, threads), compile(layer, X, threads, tuning=False))
    ]
    assert kernels[0].endswith("_tile_u4") and "_tile" not in kernels[1]


def test_the_faster_kernel_is_chosen(path):
    """What was timed overrules the cost model, both ways."""
    sparse, dense = pruned(16, 32, 3, padding=1, rate=8), nn.Conv2d(16, 32, 3, padding=1)
    dense.weight.data *= torch.rand_like(dense.weight) < 0.99
    x = torch.randn(1, 16, 7, 9)
    assert [compile(layer, x, tuning=False).explain().chosen.iloc[-1] for layer in (sparse, dense)] == [
        "sparse",
        "dense",
    ]
    Record(path).save(key_of(sparse, x), entry(ms=2.0, dense_ms=1.0))
    Record(path).save(key_of(dense, x), entry(ms=1.0, dense_ms=2.0))
    nets = [agrees(layer, x, tuning=path) for layer in (sparse, dense)]
    rows = [net.explain().iloc[-1] for net in nets]
    assert [row.chosen for row in rows] == ["dense", "sparse"] and all(row.timed for row in rows)
    assert [(row.dense_ms, row.sparse_ms) for row in rows] == [(1, 2), (2, 1)]
    assert rows[0].computed_macs == rows[0].macs and rows[1].computed_macs < rows[1].macs
    assert nets[0].bytes["packed"] == 4 * 16 * 32 * 9


# -- searching, with made-up times -------------------------------------------------------------------------------------


def made_up(tiling: Tiling) -> float:
    """Milliseconds that make one tiling of the whole space the best, and every other one worse."""
    best = {"rows": LARGEST, "vectors": 2, "block": 4, "fetch": "tile", "unroll": 2}
    return 1.0 + sum(getattr(tiling, name) != value for name, value in best.items()) + 4.0 * bool(tiling.dense)


@pytest.fixture
def timed(monkeypatch):
    """The tilings that were really timed, in order: (layer, tiling). `stop` after so many: Ctrl-C."""
    log = SimpleNamespace(tilings=[], stop=math.inf)

    class Pretended:
        def __init__(self, graph, inputs, threads, record: Fixed):
            self.layer, self.choice = next(iter(graph.layers)), record.choice
            self.steps = [SimpleNamespace(tiling=None), SimpleNamespace(tiling=self.choice)]

        def times(self, *inputs, runs, between):
            if len(log.tilings) >= log.stop:
                raise KeyboardInterrupt
            log.tilings.append((self.layer, self.choice))
            between()
            return np.tile([100.0, made_up(self.choice)], (runs, 1))  # another step's time is not the convolution's

    monkeypatch.setattr(tuning, "Network", Pretended)
    monkeypatch.setattr(nbs.Network, "times", lambda net, *inputs, runs: np.ones((runs, len(net.steps))))
    monkeypatch.setattr(tuning, "compile", lambda model, x, threads, tuning: compiled(model, threads))
    return log


@cache
def compiled(model: nn.Module, threads: int) -> nbs.Network:
    return compile(model, X, threads, tuning=False)


def search(path, model=None, **options):
    return tune(three() if model is None else model, X, path=path, progress=False, **{"budget_s": 1e6} | options)


@pytest.mark.parametrize("method", SEARCHES)
def test_what_tune_tells(method, timed, path):
    """A row per candidate, each timed once, the default first; layers that are alike are tuned once."""
    frame = search(path, method=method, evaluations=25)
    assert frame.columns.tolist() == COLUMNS and set(frame.method) == {method}
    assert set(frame.layer) <= {"0", "2", "4"} and frame.layer.nunique() == 2 and "4" in set(frame.layer)
    assert len(Record(path).entries) == 2
    for layer, rows in frame.groupby("layer"):
        assert rows.tiling.iloc[0] == Tiling(dense=False) and not rows.tiling.duplicated().any()
        assert rows.evaluation.tolist() == list(range(1, len(rows) + 1)) and 10 < len(rows) <= 25
        assert rows.ms.tolist() == [made_up(tiling) for tiling in rows.tiling]
        assert rows.best_ms.tolist() == np.minimum.accumulate(rows.ms).tolist()
        timed_here = [tiling for name, tiling in timed.tilings if name == layer]
        assert sorted(map(str, timed_here)) == sorted(map(str, [*rows.tiling, Tiling(dense=True)]))
        for tiling in rows.tiling.iloc[1:]:
            assert all(getattr(tiling, name) in values for name, values in GENES.items() if name != "split")
            assert tiling.vectors <= TILES[tiling.rows] and tiling.split is None and tiling.dense is False


def test_threads_are_shared_by_tiles_or_by_groups(timed, path):
    frame = search(path, threads=2, evaluations=20)
    assert set(frame.tiling[frame.evaluation > 1].map(lambda tiling: tiling.split)) == set(GENES["split"])
    assert all(key.endswith("t2") for key in Record(path).entries)


@pytest.mark.parametrize("method", SEARCHES)
def test_the_record_holds_the_best_of_what_was_tried(method, timed, path):
    frame = search(path, method=method, evaluations=40)
    for found in Record(path).entries.values():
        tried = {json.dumps(asdict(tiling)): made_up(tiling) for _, tiling in timed.tilings}
        assert found["trials"].items() <= tried.items() and len(found["trials"]) > 10
        assert (
            found["ms"]
            == made_up(Tiling(**found["tiling"]))
            == min(ms for name, ms in found["trials"].items() if not json.loads(name)["dense"])
        )
        assert found["default_ms"] == made_up(Tiling()) and found["dense_ms"] == made_up(Tiling(dense=True))
    assert frame.groupby("layer").best_ms.min().max() < made_up(Tiling())


def test_the_genetic_algorithm_learns(timed, path):
    """A tenth of all tilings is enough to find the one best."""
    frame = search(path, model=pruned(8, 8, 3, padding=1), evaluations=150)
    assert frame.best_ms.iloc[-1] == 1.0 and len(frame) == 150


@pytest.mark.parametrize("method", SEARCHES)
def test_equal_seeds_try_the_same(method, timed, tmp_path):
    runs = [search(tmp_path / f"{n}.json", method=method, evaluations=30, seed=s) for n, s in enumerate((0, 0, 1))]
    assert runs[0].equals(runs[1]) and not runs[0].tiling.equals(runs[2].tiling)
    entries = [Record(tmp_path / f"{n}.json").entries for n in range(2)]
    assert entries[0] == entries[1]


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("stop", [2, 7, 19, 30])
def test_killed_and_resumed(stop, method, timed, path, tmp_path):
    """The next call goes on from the last candidate: it times nothing again, and finds what an unbroken one finds."""
    timed.stop = stop
    with pytest.raises(KeyboardInterrupt):
        search(path, method=method, evaluations=24)
    before, timed.tilings, timed.stop = timed.tilings, [], math.inf
    trials = [json.loads(name) for found in Record(path).entries.values() for name in found["trials"]]
    assert len(before) == len(trials) == stop
    frame = search(path, method=method, evaluations=24)
    assert not {*map(str, before)} & {*map(str, timed.tilings)} and timed.tilings
    unbroken = search(tmp_path / "unbroken.json", method=method, evaluations=24)
    assert frame.drop(columns="layer").equals(unbroken.drop(columns="layer"))
    assert Record(path).entries == Record(tmp_path / "unbroken.json").entries
    timed.tilings = []
    assert search(path, method=method, evaluations=24).equals(frame) and timed.tilings == []


def test_no_time_at_all_still_times_the_default(timed, path):
    frame = search(path, budget_s=0)
    assert frame.tiling.tolist() == [Tiling(dense=False)] * 2 and frame.evaluation.tolist() == [1, 1]
    found = Record(path)
    assert (
        len(found.entries) == 2 and [Tiling(**one["tiling"]) for one in found.entries.values()] == frame.tiling.tolist()
    )
    assert all(one["ms"] == one["default_ms"] == 5.0 for one in found.entries.values())
    agrees(three(), X, tuning=path)


def test_the_budget_is_kept_and_shared_out(timed, path, monkeypatch):
    """By a clock on which every candidate takes a second; two layers that are alike get twice the time of one."""
    seconds = [0.0]
    times = tuning.Network.times

    def slow(net, *inputs, runs, between):
        seconds[0] += 1.0
        return times(net, *inputs, runs=runs, between=between)

    monkeypatch.setattr(tuning.Network, "times", slow)
    monkeypatch.setattr(tuning.time, "monotonic", lambda: seconds[0])
    sizes = search(path, budget_s=30).groupby("layer").size()
    assert 30 <= seconds[0] <= 32 and sizes["2"] == pytest.approx(19, abs=1) and sizes["4"] == pytest.approx(10, abs=1)


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_few_evaluations(evaluations, timed, path):
    assert search(path, evaluations=evaluations).groupby("layer").size().tolist() == [evaluations] * 2


def test_a_search_ends_where_nothing_new_is_left(timed, path, monkeypatch):
    monkeypatch.setattr(tuning, "GENES", {name: values[:1] for name, values in GENES.items()})
    monkeypatch.setattr(tuning, "START", Tiling(**{name: values[0] for name, values in GENES.items()}))
    for method in SEARCHES:
        assert search(path, method=method, evaluations=10**3).groupby("layer").size().tolist() == [2, 2]


def test_wrong_requests(path):
    with pytest.raises(ValueError, match="Expected a method among genetic, random. Got 'annealing'"):
        search(path, method="annealing")
    assert not path.exists()


def test_networks_without_convolutions(path):
    """Nothing to tune: a frame without rows, and no record."""
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(504, 3)), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()):
        frame = search(path, model)
        assert frame.columns.tolist() == COLUMNS and len(frame) == 0 and not path.exists()


# -- for real ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_tuned_networks_compute_the_same(path, threads, monkeypatch):
    """Really timed, with few candidates, one layer strided; every timing alone under the measuring lock."""
    held, times = [], nbs.Network.times
    lock = clock._file_lock(Path(os.environ["NBS_LOCK"]), os.getpid())

    def guarded(net, *inputs, **options):
        held.append(lock.is_locked)
        return times(net, *inputs, **options)

    monkeypatch.setattr(nbs.Network, "times", guarded)
    model = nn.Sequential(pruned(8, 16, 3, stride=2), nn.ReLU(), pruned(16, 13, 1), nn.BatchNorm2d(13)).eval()
    x = torch.randn(2, 8, 17, 19)
    frame = tune(model, x, threads, evaluations=3, path=path, progress=False)
    assert len(held) == 1 + 2 * 4 and all(held)
    assert set(frame.layer) == {"0", "2"} and (frame.ms > 0).all() and np.isfinite(frame.ms).all()
    net = agrees(model, x, tuning=path, threads=threads)
    same(net(x), compile(model, x, threads, tuning=False)(x), 1e-6)
    table = net.explain().query("op == 'conv2d'")
    assert table.timed.all() and len(table) == 2 and not net.explain().query("op != 'conv2d'").timed.any()
    for row in table.itertuples():
        assert row.sparse_ms == frame[frame.layer == row.layer].ms.min() and row.dense_ms > 0
