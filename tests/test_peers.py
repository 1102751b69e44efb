"""benchmarks.peers: what an engine's process does, good or bad, becomes a row; what is known is not run again."""

import json
import os
import sys
import time

import numpy as np
import onnxruntime as ort
import pandas as pd
import psutil
import pytest
import torch

import nbs_lib as nbs
from benchmarks.peers import contest as contests
from benchmarks.peers import environment, in_process, record, worker
from benchmarks.peers.__main__ import main
from benchmarks.peers.catalogue import ENGINES, PEERS, Peer
from benchmarks.peers.contest import contest, parts
from benchmarks.peers.environment import PeerFailed
from benchmarks.peers.rounds import WARMUP, alternate
from benchmarks.peers.subject import NETWORKS, RATES, VARIANTS, Subject
from benchmarks.peers.worker import Worker
from nbs_lib.measure import cache, host, measure, schema

HEAD = """
PACKAGE, REQUIREMENTS, FORM = "numpy", "", "npy"
import os, sys, time
import numpy as np
"""
# Engines that multiply by two, or fail to: name -> the body of `load`, which returns what `infer` is.
ENGINE = {
    "good": "return lambda: np.load(model) * x",
    "crashes": "raise ValueError('no such operator: Conv')",
    "dies": "os._exit(3)",
    "hangs": "time.sleep(600)",
    "wrong": "return lambda: np.load(model) * x + 0.1",
    "nan": "return lambda: x * np.nan",
    "shape": "return lambda: x[:1]",
    "zeros": "return lambda: np.zeros((1, 10))",
    "talks": 'print(\'{"version": "9"}\', flush=True); return lambda: np.load(model) * x',
    "strays": "os.sched_setaffinity(0, range(os.cpu_count())); return lambda: np.load(model) * x",
    "dies later": "calls = iter([1, 1]); return lambda: np.load(model) * x * (next(calls, 0) or os._exit(4))",
    "hangs later": "calls = iter([1, 1]); return lambda: np.load(model) * x * (next(calls, 0) or time.sleep(600))",
}


@pytest.fixture
def peer(tmp_path):
    """Makes a Peer of one of ENGINE's bodies."""

    def make(name: str, **options) -> Peer:
        file = tmp_path / f"{name.replace(' ', '_')}.py"
        file.write_text(f"{HEAD}\n\ndef load(model, x, threads, cache, **options):\n    {ENGINE[name]}\n")
        return Peer(file, options=options)

    return make


@pytest.fixture
def model(tmp_path):
    np.save(tmp_path / "two.npy", np.float32(2))
    return tmp_path / "two.npy"


@pytest.fixture(autouse=True)
def short_limits(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(worker, "cache_dir", lambda: tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(worker, "LOAD_S", 90)
    monkeypatch.setattr(worker, "CALL_S", 3)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def children() -> list:
    return [child for child in psutil.Process().children(recursive=True) if "serve.py" in " ".join(child.cmdline())]


def test_an_engine_is_loaded_checked_and_timed_in_its_own_process(peer, model):
    with_it = Worker(peer("good"), model, X, 2 * X, threads=1)
    try:
        assert with_it.version == np.__version__ and with_it.settings == {} and with_it.difference == 0
        before = time.perf_counter()
        samples = [with_it.sample(1, 2) for _ in range(3)]
        assert all(0 < ms < (time.perf_counter() - before) * 1e3 for ms in samples) and with_it.idle_ms >= 0
        assert len(children()) == 1
    finally:
        with_it.close()
    assert not children()


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "crashes": r"crashed \(1\): ValueError: no such operator: Conv",
        "dies": r"crashed \(3\)",
        "wrong": r"void: Expected PyTorch's output, to 0.001. Got 0.01 apart",
        "nan": r"void: Expected PyTorch's output, to 0.001. Got nan apart",
        "shape": r"void: Expected an output of \(2, 3\). Got \(1, 3\)",
    }.items(),
)
def test_what_fails_says_why_on_one_line_and_leaves_no_process(peer, model, name, said):
    with pytest.raises(PeerFailed, match=said) as caught:
        Worker(peer(name), model, X, 2 * X)
    assert "\n" not in str(caught.value) and not children()


def test_an_engine_that_hangs_is_ended(peer, model, monkeypatch):
    monkeypatch.setattr(worker, "LOAD_S", 3)
    with pytest.raises(PeerFailed, match=r"hung: no answer in 3 s"):
        Worker(peer("hangs"), model, X, 2 * X)
    assert not children()


def test_what_an_engine_prints_is_no_answer(peer, model):
    talks = Worker(peer("talks"), model, X, 2 * X)
    assert talks.version == np.__version__ and talks.sample(0) > 0
    talks.close()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_an_engine_that_leaves_its_cpus_is_refused(peer, model):
    with nbs.clock.pin(1), pytest.raises(PeerFailed, match=r"numpy runs on other CPUs than"):
        Worker(peer("strays"), model, X, 2 * X, threads=1)


def test_who_fails_on_the_way_costs_nobody_else_a_sample(peer, model):
    names = ["good", "dies later", "hangs later"]
    workers = {name: Worker(peer(name), model, X, 2 * X) for name in names}
    try:
        comparison, errors = alternate({name: each.sample for name, each in workers.items()}, rounds=4)
    finally:
        for each in workers.values():
            each.close()
    assert set(comparison.timings) == {"good"} and comparison.timings["good"].n == 4
    assert errors["dies later"].startswith("crashed (4)") and errors["hangs later"] == "hung: no answer in 3 s"


def test_all_take_turns_in_rotating_order():
    turns, settled = [], []

    def sampler(name):
        def sample(settle):
            settled.append(settle)
            turns.append(name)
            return 1.0 + len(turns)

        return sample

    comparison, errors = alternate({name: sampler(name) for name in "abc"}, rounds=6, settle=2)
    assert not errors and all(comparison.timings[name].n == 6 for name in "abc")
    assert settled == [WARMUP] * 3 + [2] * 18
    rounds = ["".join(turns[at : at + 3]) for at in range(3, 21, 3)]
    assert all(sorted(each) == list("abc") for each in rounds) and len(set(rounds)) > 2


# The catalogue


@pytest.mark.parametrize("name", PEERS)
def test_a_peers_file_is_complete_and_pinned(name):
    before, module = set(sys.modules), PEERS[name].module
    assert PEERS[name].variant in VARIANTS and module.FORM in ("onnx", "pt2", "safetensors")
    assert all("==" in line for line in module.REQUIREMENTS.split()) and module.PACKAGE and callable(module.load)
    assert not {each for each in set(sys.modules) - before if not each.startswith("peer_")}  # no engine was imported
    json.dumps(dict(PEERS[name].options))


def test_every_engine_file_has_a_peer():
    assert {peer.file for peer in PEERS.values()} == set(ENGINES.glob("*.py"))


def test_rows_of_an_engine_change_with_its_pins_and_options(peer):
    good = peer("good")
    seals = {
        record.fingerprint("a", good),
        record.fingerprint("a", peer("good", tune_s=3)),
        record.fingerprint("b", good),
    }
    assert len(seals) == 3 and record.fingerprint("a", good) in seals


# The networks


def test_variants_of_a_network_are_pruned_at_its_rate(tmp_path):
    dense, punched = (Subject("resnet20", variant, tmp_path) for variant in ("dense", "block_punched"))
    assert punched.graph.rates().conv == pytest.approx(1.8, rel=0.03) and dense.graph.rates().conv == 1
    assert dense.x.shape == (1, 3, 32, 32) and torch.equal(dense.x, punched.x)
    kept = [weight != 0 for weight in punched.model.state_dict().values()]
    for was, now, keep in zip(
        dense.model.state_dict().values(), punched.model.state_dict().values(), kept, strict=True
    ):
        assert torch.equal(was * keep, now)
    with pytest.raises(ValueError, match="whose remaining MACs are stated. Got resnet20"):
        Subject("resnet20", "paper", tmp_path)
    with pytest.raises(KeyError, match="Expected one of dense, .*Got 'lottery'"):
        Subject("resnet20", "lottery", tmp_path)


def test_files_of_a_network_hold_what_it_computes(tmp_path):
    import onnxruntime

    subject = Subject("resnet20", "block_punched", tmp_path)
    session = onnxruntime.InferenceSession(subject.file("onnx"))
    assert np.abs(session.run(None, {"input": subject.x.numpy()})[0] - subject.wanted).max() < 1e-4
    exported = torch.export.load(subject.file("pt2")).module()
    assert np.abs(exported(subject.x).detach().numpy() - subject.wanted).max() < 1e-4
    written = subject.file("safetensors").stat().st_mtime_ns
    assert subject.file("safetensors").stat().st_mtime_ns == written  # once


def test_networks_are_known():
    assert set(RATES) <= set(NETWORKS) <= set(nbs.models.MODELS)


# A contest


def test_a_variant_that_a_network_cannot_have_is_a_row(tmp_path):
    peers = {name: PEERS[name] for name in ("prunemap", "prunemap-pattern")}
    rows = contest("mobilenet_v2_cifar", 1, tmp_path / "rows.csv", list(peers), 2, peers, list().append)
    assert rows.ok.tolist() == [True, False] and "pattern(8) can prune. Got none" in rows.error[1]


@pytest.mark.parametrize("keep", [True, False])
def test_a_notebook_gets_rows_of_now_or_on_record(keep, tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_ROOT", str(tmp_path))
    file = tmp_path / "data/measured/host/peers.csv"
    asked, seal = [], record.fingerprint("mnn", PEERS["mnn"])
    known = host.provenance("mnn") | {"turns": "a", "ok": False, "error": "hung", "fingerprint": seal}

    def run(network, threads, target, names, rounds):
        asked.append((network, threads, names, rounds))
        return record.append(target, [known | {"model": network, "threads": threads}])

    monkeypatch.setattr(contests, "contest", run)
    with pytest.raises(RuntimeError, match=r"Expected rows of \['a', 'b'\], 1 thread.*reproduce.sh peers"):
        contests.results(["a", "b"], 1, ["mnn"], 3, live=False, keep=keep)
    rows = contests.results(["a", "b"], 1, ["mnn"], 3, live=True, keep=keep)
    assert asked == [("a", 1, ["mnn"], 3), ("b", 1, ["mnn"], 3)] and rows.model.tolist() == ["a", "b"]
    assert rows.machine.eq("this machine").all() and file.exists() == keep
    if keep:
        assert contests.results(["b"], 1, [], 0, live=False, keep=False).model.tolist() == ["b"]


def test_contenders_leave_a_row_each(peer, tmp_path, monkeypatch):
    fakes = {"crashes": peer("crashes"), "hangs": peer("hangs", tune_s=-58), "wrong": peer("zeros")}  # 90 - 87 s
    for fake in fakes.values():
        fake.file.write_text(fake.file.read_text().replace('"npy"', '"onnx"'))
    peers = {"prunemap": PEERS["prunemap"], "prunemap-pattern": PEERS["prunemap-pattern"]} | fakes
    peers |= {"prunemap-paper": PEERS["prunemap-paper"]}
    said, file = [], tmp_path / "rows.csv"
    rows = contest("resnet20", 1, file, list(peers), 2, peers, said.append)
    peers.pop("prunemap-paper")  # there is no such variant
    assert rows["engine"].tolist() == list(peers) and rows["turns"].nunique() == 1
    good = rows.set_index("engine")
    assert good["ok"].to_dict() == dict.fromkeys(peers, False) | {"prunemap": True, "prunemap-pattern": True}
    assert good.loc["prunemap", "ratio"] == 1 and good.loc["prunemap-pattern", "scheme"] == "block+pattern"
    assert good.loc["prunemap", "runs"] == 2 and good.loc["prunemap-pattern", "effective_macs"] < good.macs["prunemap"]
    assert good.loc["crashes", "error"].startswith("crashed (1): ValueError") and "crashed" in "".join(said)
    assert good.loc["hangs", "error"].startswith("hung") and "void: Expected PyTorch's" in good.loc["wrong", "error"]
    pd.testing.assert_frame_equal(cache.read(file, schema.CONTENDED), rows)
    assert not record.missing(file, peers, "resnet20", 1)  # failures are known, too
    assert record.missing(file, peers, "resnet20", 2) == record.missing(file, peers, "vgg16", 1) == list(peers)
    assert record.missing(file, PEERS, "vgg16", 1) == [*PEERS] and "prunemap-paper" not in record.missing(
        file, PEERS, "resnet20", 1
    )


def test_parts_fit_into_memory_and_each_has_the_anchor():
    names = ["prunemap", *"abcdefg"]
    assert parts(names, 10**8, 2**36) == [names]
    small = parts(names, 10**9, 24 * 10**9)
    assert small == [["prunemap", "a", "b"], ["prunemap", "c", "d"], ["prunemap", "e", "f"], ["prunemap", "g"]]
    assert parts(["b"], 10**9, 0) == [["prunemap", "b"]]  # the anchor comes along even where its row is there
    assert parts(["prunemap"], 10**9, 0) == [["prunemap"]]


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "peers.csv", []
    seals = {name: record.fingerprint(name, PEERS[name]) for name in ("prunemap", "mnn")}
    known = host.provenance("mnn") | {"model": "resnet18", "threads": 1, "turns": "a", "ok": False, "error": "hung"}
    cache.append(file, [known | {"fingerprint": seals["mnn"]}], schema.CONTENDED)

    def run(network, threads, file, names, rounds, say):
        asked.append((network, threads, names, rounds))
        return schema.CONTENDED.frame([known])

    monkeypatch.setattr("benchmarks.peers.__main__.contest", run)
    common = [
        "peers",
        "--csv",
        str(file),
        "--peers",
        "prunemap",
        "mnn",
        "--networks",
        "resnet18",
        "--threads",
        "1",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*common, "--rounds", "3"])
    main()
    assert asked == [("resnet18", 1, ["prunemap"], 3), ("resnet18", 2, ["prunemap", "mnn"], 3)]
    monkeypatch.setattr(sys, "argv", [*common, "--list"])
    main()
    assert len(asked) == 2 and "resnet18, 1 thread(s): prunemap\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*common, "--again", "--threads", "1"])
    main()
    assert asked[2:] == [("resnet18", 1, ["prunemap", "mnn"], 15)]


def test_latest_rows_are_this_machines_if_it_has_any():
    seal = record.fingerprint("prunemap-block_punched", PEERS["prunemap-block_punched"])
    told = host.provenance("prunemap-block_punched") | {"runs": 3, "model": "vgg16", "threads": 1, "turns": "t"}
    told |= {"effective_macs": 200, "settings": '{"removed_macs": 30}', "fingerprint": seal}
    rows = [told | {"median_ms": 1.0, "cpu": "Other", "fingerprint": "other"}, told | {"median_ms": 2.0}]
    rows += [told | {"median_ms": 3.0}, told | {"median_ms": 4.0, "engine": "gone"}]
    rows += [told | {"median_ms": 5.0, "cpu": "Other", "fingerprint": "other", "model": "resnet18"}]
    shown = ["model", "median_ms", "machine", "weights", "removed_percent"]
    newest = record.latest(schema.CONTENDED.frame(rows))[shown].to_numpy().tolist()
    assert newest == [
        ["vgg16", 3.0, "this machine", "block_punched", 15.0],
        ["resnet18", 5.0, "Other", "block_punched", 15.0],
    ]
    assert record.latest(schema.CONTENDED.frame([])).empty


def test_what_could_not_be_installed_is_tried_again(tmp_path):
    known = host.provenance("mnn") | {"model": "resnet18", "threads": 1, "turns": "a", "ok": False}
    known |= {"fingerprint": record.fingerprint("mnn", PEERS["mnn"])}
    mnn = {"mnn": PEERS["mnn"]}
    cache.append(tmp_path / "rows.csv", [known | {"error": "not installed: no index"}], schema.CONTENDED)
    assert record.missing(tmp_path / "rows.csv", mnn, "resnet18", 1) == ["mnn"]
    cache.append(tmp_path / "rows.csv", [known | {"error": "hung"}], schema.CONTENDED)
    assert record.missing(tmp_path / "rows.csv", mnn, "resnet18", 1) == []


def test_a_contest_in_which_all_fail_leaves_their_rows(peer, tmp_path):
    fakes = {"prunemap": peer("crashes"), "dies": peer("dies")}
    for fake in fakes.values():
        fake.file.write_text(fake.file.read_text().replace('"npy"', '"onnx"'))
    rows = contest("resnet20", 1, tmp_path / "rows.csv", list(fakes), 2, fakes, list().append)
    assert not rows["ok"].any() and rows["error"].str.startswith("crashed").all() and rows["ratio"].isna().all()


def test_an_export_that_fails_costs_only_those_who_need_it(peer, tmp_path, monkeypatch):
    monkeypatch.setattr(Subject, "_onnx", lambda self: {}["no such key"])
    needs = peer("good")
    needs.file.write_text(needs.file.read_text().replace('"npy"', '"onnx"'))
    peers = {"prunemap": PEERS["prunemap"], "needs": needs}
    rows = contest("resnet20", 1, tmp_path / "rows.csv", list(peers), 2, peers, list().append).set_index("engine")
    assert rows.ok["prunemap"] and rows.error["needs"] == "KeyError: 'no such key'"


# Two real engines, each in an environment of its own


@pytest.mark.parametrize("name", ["onnxruntime", "ncnn"])
def test_a_real_engine_is_installed_and_agrees(name, tmp_path):
    subject = Subject("mobilenet_v2_cifar", "dense", tmp_path)
    try:
        python = environment.python_of(PEERS[name])
    except PeerFailed as error:
        pytest.skip(f"no package index at hand: {error}")
    made = (python.parent.parent / "made.txt").stat().st_mtime_ns
    real = Worker(PEERS[name], subject.file("onnx"), subject.x.numpy(), subject.wanted)
    assert f"{PEERS[name].module.PACKAGE}=={real.version}" in PEERS[name].module.REQUIREMENTS
    assert real.sample(1) > 0 and real.difference < 1e-4 and real.settings
    real.close()
    assert environment.python_of(PEERS[name]) == python
    assert (python.parent.parent / "made.txt").stat().st_mtime_ns == made  # nothing was made again
    peers = {each: PEERS[each] for each in ("prunemap", name)}
    rows = contest("mobilenet_v2_cifar", 1, tmp_path / "rows.csv", [name], 3, peers, list().append)
    assert rows.ok.all() and rows.runs.eq(3).all() and rows.turns.nunique() == 1 and rows.ratio.gt(0).all()


def test_what_cannot_be_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    file = tmp_path / "absent.py"
    file.write_text('PACKAGE, REQUIREMENTS, FORM = "absent", "no-such-engine==1.0", "onnx"\n')
    with pytest.raises(PeerFailed, match=r"not installed: .*no-such-engine"):
        environment.python_of(Peer(file))
    file.write_text(file.read_text() + "NEWEST_PYTHON = 0\n")
    with pytest.raises(PeerFailed, match=r"not installed: Expected python3.0, the newest"):
        environment.python_of(Peer(file))
    assert not (tmp_path / "engines/absent/made.txt").exists() and contests.PEERS is PEERS


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Dropout(), nn.Conv2d(7, 9, 1))
    model[1].running_mean.uniform_(-1, 1)
    model[4].weight.data[0] = 1e-35
    return model.train(), torch.randn(2, 3, 9, 13)


@pytest.mark.parametrize("name", in_process.PEERS)
def test_peer_agrees_with_the_module_and_leaves_it_alone(name, cnn):
    model, x = cnn
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    peer = in_process.PEERS[name](model, x, threads=1)
    got = peer(x.numpy())
    assert model.training and torch.get_num_threads() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.inference_mode():
        wanted = model.eval()(x).numpy()
    model.train()
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    assert peer.engine == f"{name} {peer.version}" and peer.threads == 1
    row = measure(peer, runs=2, warmup=0).iloc[0]
    assert row.ok and (row.engine, row.engine_version) == (name, peer.version)


def test_peer_with_several_inputs_and_outputs():
    class Two(torch.nn.Module):
        def forward(self, a, b):
            return a + b, a * b

    inputs = (torch.full((2, 3), 2.0), torch.full((2, 3), 5.0))
    for make in in_process.PEERS.values():
        total, product = make(Two(), inputs)(*(value.numpy() for value in inputs))
        assert (total == 7).all() and (product == 10).all()


def test_peer_that_disagrees_is_refused(monkeypatch, cnn):

    class Liar(ort.InferenceSession):
        def run(self, names, feeds):
            return [output * 1.01 for output in super().run(names, feeds)]

    monkeypatch.setattr(ort, "InferenceSession", Liar)
    with pytest.raises(ValueError, match="agree with PyTorch"):
        in_process.onnxruntime(*cnn)
