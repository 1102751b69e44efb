"""Measuring: the schema's rules, a cache that survives kills and garbage, devices. Never milliseconds."""

import functools
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nbs_lib.layers import Graph
from nbs_lib.measure import DEVICES, cache, compare, host, measure, schema
from nbs_lib.measure.simulated import ROOFLINES, Roofline

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_LOCK", str(tmp_path / "lock" / "measure.lock"))


class FakeNetwork:
    """What `compiler.Network` shows to a measurement: two layers, one of them block-punched."""

    engine, threads = "prunemap 0.1.0", 1
    macs, effective_macs, fallback_macs = 3000, 1000, 0

    def __init__(self, error=None):
        self.error = error
        self.example_inputs = (np.ones((2, 3, 4, 4), np.float32),)
        layer = dict(kind="conv", P=8, Q=3, Kh=3, Kw=3, groups=1, H=4, stride=(2, 2), params=216)
        layer |= dict(macs=1000, effective_macs=300)
        a, b = SimpleNamespace(name="a", W=4, nnz=27, **layer), SimpleNamespace(name="b", W=5, nnz=81, **layer)
        c = SimpleNamespace(**layer | {"name": "c", "W": 1, "nnz": 216, "kind": "linear"})
        self.mapping = {"a": SimpleNamespace(scheme=SimpleNamespace(name="block_punched", p=8, q=4), rate=8.0)}
        self.graph = Graph([], {"a": a, "b": b, "c": c}, (), (), None, {})

    def explain(self):
        columns = {"scheme": ["block_punched(8x4)", "", ""], "chosen": ["sparse", "dense", "copy"]}
        columns |= {"computed_macs": [2e6, 1e6, 0], "weight_bytes": [400, 800, 0]}
        return pd.DataFrame(columns | {"activation_bytes": [1e6, 1e3, 1e3]})

    def __call__(self, x):
        assert isinstance(x, np.ndarray)
        if self.error:
            raise self.error
        return x.sum()


def good_row(**values):
    known = {"device": "host", "engine": "test", "runs": 3, "median_ms": 1.5, "fingerprint": "abc"}
    return schema.make_row(**known | values)


# --- schema ---


def test_columns_are_those_of_the_contract():
    assert list(schema.COLUMNS)[:6] == ["schema", "device", "cpu", "cores", "threads", "engine"]
    assert list(schema.COLUMNS)[-5:] == ["seed", "utc", "fingerprint", "ok", "error"] and len(schema.COLUMNS) == 46
    assert {schema.COLUMNS[c] for c in ("P", "nnz", "runs", "seed")} == {"Int64"}
    assert {schema.COLUMNS[c] for c in ("rate", "p90_ms", "cv", "temperature_c")} == {"float64"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": ""},
        {"schema": 2},
        {"runs": 0},
        {"runs": None},
        {"median_ms": None},
        {"median_ms": -1},
        {"median_ms": float("inf")},
        {"ok": False},
        {"ok": "maybe"},
        {"ok": ""},
        {"P": "eight"},
        {"rate": "x"},
        {"engine": "roofline"},
        {"device": "simulated:phone"},
        {"fingerprint": "simulated:abc"},
        {"device": "simulated:phone", "engine": "roofline", "fingerprint": "simulated:abc"},  # with runs
    ],
)
def test_broken_rules_are_refused(wrong):
    with pytest.raises(ValueError, match="Expected"):
        good_row(**wrong)


def test_unknown_column_names_the_known():
    with pytest.raises(KeyError, match=r"reached_rate.*Got medain_ms"):
        good_row(medain_ms=1)


def test_text_becomes_one_printable_line():
    row = good_row(ok=False, error='ValueError: "a, b"\n\tline two\0\x1b[31m')
    assert row["error"] == 'ValueError: "a, b" line two [31m'


# --- cache ---


def test_round_trip_keeps_values_and_types(tmp_path):
    path = tmp_path / "new" / "folder" / "a.csv"
    rows = schema.frame(
        [
            good_row(P=8, rate=1 / 3, model='a "b", c', load1=0.1 + 0.2, nnz=2**60),
            good_row(ok=False, runs=0, median_ms=None, error="it, broke ünd so"),
        ]
    )
    cache.append(path, rows)
    cache.append(path, [good_row(seed=7)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = cache.read(path)
    assert back.dtypes.astype(str).to_dict() == rows.dtypes.astype(str).to_dict()
    pd.testing.assert_frame_equal(back, pd.concat([rows, schema.frame([good_row(seed=7)])], ignore_index=True))
    assert back.P.isna().tolist() == [False, True, True] and back.seed[2] == 7
    assert path.read_text().count("schema,") == 1  # one header


def skipped(path):
    """What `read` gives, and the numbers of the lines it reports."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = cache.read(path)
    texts = [str(warning.message) for warning in caught]
    assert all(text.startswith(f"{path}:") for text in texts)
    return rows, [int(text[len(str(path)) + 1 :].partition(":")[0]) for text in texts]


@pytest.fixture
def three(tmp_path):
    path = tmp_path / "three.csv"
    cache.append(path, [good_row(seed=seed) for seed in range(3)])
    return path


def test_torn_last_line_stays_and_a_new_row_starts_afresh(three):
    torn = three.read_bytes()[:-15]
    three.write_bytes(torn)
    rows, lines = skipped(three)
    assert rows.seed.tolist() == [0, 1] and lines == [4]
    cache.append(three, [good_row(seed=9)])
    assert three.read_bytes().startswith(torn + b"\n")
    rows, lines = skipped(three)
    assert rows.seed.tolist() == [0, 1, 9] and lines == [4]


def test_every_truncation_is_read(three):
    whole = three.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 7):
        three.write_bytes(whole[:cut])
        rows, lines = skipped(three)
        # A line that lacks nothing but its line break is whole.
        assert len(rows) == max(sum(end - 1 <= cut for end in ends) - 1, 0)
        assert len(lines) == (cut > 0 and cut not in ends and cut + 1 not in ends)


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello",
        b"\x00\xff\xfe\x80",
        b'1,"host',
        b"," * 47,
        b"," * 60,
        b"\0" * 300,
        b"1,host,cpu,eight" + b"," * 42,
        b" ",
    ],
)
def test_garbage_in_the_middle_spoils_its_own_line(three, garbage):
    lines = three.read_bytes().split(b"\n")
    three.write_bytes(b"\n".join([*lines[:2], garbage, *lines[2:]]))
    rows, wrong = skipped(three)
    assert rows.seed.tolist() == [0, 1, 2] and wrong == [3]
    cache.append(three, [good_row(seed=3)])
    assert garbage in three.read_bytes() and skipped(three)[0].seed.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "foreign", ["time,value\n1,2\n3,4\n", "schema,device\n1,host\n", "\n\n{}\n", "schema_version,x\n1,2", "\x89PNG\n"]
)
def test_foreign_file_is_reported_and_appended_to_under_our_header(tmp_path, foreign):
    path = tmp_path / "foreign.csv"
    path.write_text(foreign)
    rows, lines = skipped(path)
    assert rows.empty and len(lines) == 1 and rows.dtypes.astype(str).to_dict() == schema.COLUMNS
    cache.append(path, [good_row()])
    cache.append(path, [good_row()])
    assert path.read_text().startswith(foreign) and path.read_text().count(",".join(schema.COLUMNS)) == 1
    assert len(skipped(path)[0]) == 2


def test_another_schema_version_is_skipped(three):
    text = three.read_text()
    three.write_text(text + text.replace("\n1,", "\n2,") + "schema,device,new_column\n1,host,5\n")
    rows, lines = skipped(three)
    assert len(rows) == 3 and lines == [6, 7, 8, 9]


def test_empty_missing_and_crlf_files(tmp_path, three):
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert skipped(empty)[0].empty
    cache.append(empty, [good_row()])
    assert len(skipped(empty)[0]) == 1
    for missing in ("none.csv", "no/folder"):
        with pytest.raises(FileNotFoundError, match=f"Expected a CSV file of measurements.*Got .*{missing}"):
            cache.read(tmp_path / missing)
    three.write_bytes(three.read_bytes().replace(b"\n", b"\r\n"))
    cache.append(three, [good_row(seed=3)])
    rows, lines = skipped(three)
    assert rows.seed.tolist() == [0, 1, 2, 3] and not lines and three.read_text().count("schema") == 1


def test_folder_is_read_as_a_whole(tmp_path, three):
    cache.append(tmp_path / "deep" / "b.csv", [good_row(seed=5)])
    (tmp_path / ".three.csv.abc_1234").write_text("half a file of a killed writer")
    assert sorted(cache.read(tmp_path).seed) == [0, 1, 2, 5]
    cache.append(three, [good_row()])
    assert not (tmp_path / ".three.csv.abc_1234").exists()


def test_nothing_is_written_when_a_row_is_wrong(three):
    before = three.read_bytes()
    with pytest.raises(ValueError, match="runs"):
        cache.append(three, [good_row(), good_row() | {"runs": 0}])
    with pytest.raises(KeyError):
        cache.append(three, schema.frame([good_row()]).assign(extra=1))
    assert three.read_bytes() == before


APPEND = """
import sys
from nbs_lib.measure import cache, schema
first, last, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for seed in range(first, last):
    cache.append(path, [schema.make_row(device="host", engine="test", runs=3, median_ms=1.5, seed=seed)])
    print(seed, flush=True)
"""


def appender(first, last, path):
    command = [sys.executable, "-c", APPEND, str(first), str(last), str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_concurrent_appends_lose_nothing(tmp_path):
    path = tmp_path / "shared.csv"
    writers = [appender(15 * i, 15 * (i + 1), path) for i in range(4)]
    assert [writer.communicate(timeout=120) and writer.returncode for writer in writers] == [0] * 4
    rows, lines = skipped(path)
    assert sorted(rows.seed) == list(range(60)) and not lines


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "killed.csv"
    said = -1
    for i in range(4):
        writer = appender(1000 * i, 1000 * i + 1000, path)
        writer.stdout.readline()
        time.sleep(0.03 * (i + 1))
        os.kill(writer.pid, signal.SIGKILL)
        said += 1 + len(writer.communicate()[0].splitlines())
        rows, lines = skipped(path)
        assert not lines and len(rows) >= said + 1  # what was reported as written is there
    cache.append(path, [good_row(seed=9999)])
    assert cache.read(path).seed.iloc[-1] == 9999
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".killed.csv.") and not name.endswith(".lock")]


# --- host ---


def test_fingerprint_follows_the_engine():
    assert host.fingerprint("a 1") == host.fingerprint("a 1") != host.fingerprint("a 2")
    assert len(host.fingerprint("a 1")) == 12 and host.cpu_model()


def test_commit_outside_a_checkout_is_unknown(tmp_path, monkeypatch):
    git = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    monkeypatch.setenv("NBS_ROOT", str(tmp_path))
    for key in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(key, "t@example.org")

    def commit():
        host.commit.cache_clear()
        return host.commit()

    try:
        assert commit() == "unknown"
        git(["git", "init", str(tmp_path)])
        assert commit() == "unknown"  # nothing committed yet
        (tmp_path / "f").write_text("1")
        git(["git", "-C", str(tmp_path), "add", "f"])
        git(["git", "-C", str(tmp_path), "commit", "-m", "m"])
        head = git(["git", "-C", str(tmp_path), "rev-parse", "HEAD"]).stdout[:12]
        assert commit() == head
        (tmp_path / "f").write_text("2")
        assert commit() == f"{head}-dirty"
        (rows := tmp_path / "data/measured/rows.csv").parent.mkdir(parents=True)
        rows.write_text("1")
        git(["git", "-C", str(tmp_path), "add", "."])
        git(["git", "-C", str(tmp_path), "commit", "-m", "m"])
        rows.write_text("2")  # a row more: the code is the same
        assert commit() == git(["git", "-C", str(tmp_path), "rev-parse", "HEAD"]).stdout[:12]
        inside = tmp_path / "site-packages"
        inside.mkdir()
        monkeypatch.setenv("NBS_ROOT", str(inside))
        assert commit() == "unknown"  # not the commit of the repository around it
        monkeypatch.setenv("NBS_ROOT", str(tmp_path))
        monkeypatch.setenv("PATH", "")
        assert commit() == "unknown"
    finally:
        host.commit.cache_clear()


def test_measured_row_says_what_ran_and_where():
    rows = measure(FakeNetwork(), runs=4, warmup=1, model="fake", seed=3)
    assert list(rows.columns) == list(schema.COLUMNS) and len(rows) == 1
    row = rows.iloc[0]
    told = {"device": "host", "engine": "prunemap", "engine_version": "0.1.0", "model": "fake", "seed": 3, "threads": 1}
    told |= {"runs": 4, "warmup": 1, "batch": 2, "dtype": "float32", "ok": True, "error": "", "cpu": host.cpu_model()}
    told |= {"scheme": "block_punched", "block_p": 8, "block_q": 4, "rate": 8.0, "reached_rate": 4.0, "nnz": 324}
    told |= {
        "macs": 3000,
        "effective_macs": 1000,
        "fallback_macs": 0,
        "fingerprint": host.fingerprint("prunemap 0.1.0"),
    }
    told |= {"kind": "", "P": 8, "Q": 3, "Kh": 3, "stride": 2, "H": 4, "layer": ""}
    assert {name: row[name] for name in told} == told
    assert row.W is pd.NA  # the layers differ
    assert 0 < row.min_ms <= row.p10_ms <= row.median_ms <= row.p90_ms and row.mad_ms >= 0
    assert pd.Timestamp(row.utc).tzinfo and row.cores >= 1 and row.commit


def test_columns_given_win_and_plain_callables_count():
    row = measure(np.sum, x=np.ones(3), runs=2, warmup=0, layer="mine", scheme="filter").iloc[0]
    assert (row.engine, row.layer, row.scheme, row.batch, row["dtype"]) == ("python", "mine", "filter", 3, "float64")
    with pytest.raises(ValueError, match="example_inputs"):
        measure(np.sum)
    with pytest.raises(KeyError, match="host, simulated"):
        measure(np.sum, device="gameboy", x=np.ones(3))


@pytest.mark.parametrize("device", ["host", "simulated"])
def test_failing_target_becomes_a_row_and_is_cached(tmp_path, device):
    target = FakeNetwork(ValueError("Expected luck.\nGot none."))
    if device == "simulated":
        target.explain = target.__call__
    rows = measure(target, device=device, runs=2, cache=tmp_path / "a.csv")
    assert not rows.ok[0] and "Error: " in rows.error[0] and np.isnan(rows.median_ms[0])
    assert rows.device[0].startswith(device) and (device == "simulated" or rows.macs[0] == 3000)
    pd.testing.assert_frame_equal(cache.read(tmp_path / "a.csv"), rows)


def test_several_schemes_in_one_network_are_all_named():
    network = FakeNetwork()
    network.mapping["c"] = SimpleNamespace(scheme=SimpleNamespace(name="filter"), rate=8.0)
    row = measure(network, runs=1).iloc[0]
    assert (row.scheme, row.rate) == ("block_punched+filter", 8.0) and row.block_p is pd.NA


def test_the_room_is_its_function_too():
    import nbs_lib
    import nbs_lib.measure

    assert nbs_lib.measure(FakeNetwork(), runs=1).ok[0]
    assert nbs_lib.measure.schema is schema


def test_too_many_threads_are_a_failed_row():
    network = FakeNetwork()
    network.threads = 10_000
    assert "Expected threads from 1" in measure(network, runs=2).error[0]
    assert "Expected threads from 1" in measure(network, device="simulated").error[0]


def test_default_cache_and_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_ROOT", str(tmp_path))
    measure(FakeNetwork(), runs=1, model="res net/18", cache=True)
    measure(FakeNetwork(), device="simulated", cache=True)
    assert len(cache.read(tmp_path / "data/measured/host/res-net-18.csv")) == 1
    assert len(cache.read(tmp_path / "data/measured/simulated-phone/rows.csv")) == 1
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="measured, but not cached"):
        assert measure(FakeNetwork(), runs=1, cache=tmp_path / "file" / "a.csv").ok[0]


# --- compare ---


def test_compare_gives_a_row_each_with_its_ratio(tmp_path):
    targets = {"first": FakeNetwork(), "second": FakeNetwork(), "bad": FakeNetwork(RuntimeError("no"))}
    rows = compare(targets, rounds=4, warmup=1, model="fake", cache=tmp_path / "a.csv")
    assert rows.label.tolist() == ["first", "second", "bad"] and rows.ok.tolist() == [True, True, False]
    assert rows.runs[:2].tolist() == [4, 4] and set(rows.warmup) == {1} and set(rows.model) == {"fake"}
    assert rows.ratio[0] == rows.ratio_lo[0] == rows.ratio_hi[0] == 1.0
    assert rows.ratio[1] == pytest.approx(rows.median_ms[0] / rows.median_ms[1])
    assert rows.ratio_lo[1] <= rows.ratio[1] <= rows.ratio_hi[1] and np.isnan(rows.ratio[2])
    pd.testing.assert_frame_equal(cache.read(tmp_path / "a.csv"), rows[list(schema.COLUMNS)])


def test_compare_when_all_fail_and_when_threads_differ():
    rows = compare({"bad": FakeNetwork(RuntimeError("no"))}, rounds=4)
    assert not rows.ok.any() and rows.ratio.isna().all()
    other = FakeNetwork()
    other.threads = 2
    with pytest.raises(ValueError, match=r"one thread count.*\[1, 2\]"):
        compare({"one": FakeNetwork(), "two": other})


def test_compare_gives_each_target_its_own_inputs():
    seen = {}

    def target(name, *inputs):
        def run(*arrays):
            seen[name] = [array.sum() for array in arrays]

        run.example_inputs = inputs
        return run

    targets = {"ones": target("ones", np.ones((2, 3))), "twos": target("twos", 2 * np.ones((2, 3)))}
    assert compare(targets, rounds=2).ok.all() and seen == {"ones": [6], "twos": [12]}
    assert compare(targets, x=np.zeros(5), rounds=2).ok.all() and seen == {"ones": [0], "twos": [0]}
    targets["pair"] = target("pair", np.ones((2, 3)), np.ones(4))
    with pytest.raises(ValueError, match=r"same shapes. Got .*'pair': \[\(2, 3\), \(4,\)\]"):
        compare(targets)


# --- simulated ---


@pytest.mark.parametrize("device", [name for name in DEVICES if name != "host"])
def test_simulated_rows_are_never_taken_for_measured_ones(tmp_path, device):
    simulated = measure(FakeNetwork(), device=device, cache=tmp_path / "a.csv")
    measured = measure(FakeNetwork(), runs=2, cache=tmp_path / "a.csv")
    row = cache.read(tmp_path / "a.csv").iloc[0]
    assert row.device.startswith("simulated:") and row.engine == "roofline" and row.ok and row.median_ms > 0
    assert (row.runs, row.cpu) == (0, "") and np.isnan(row.mad_ms) and np.isnan(row.load1)
    assert set(simulated.fingerprint).isdisjoint(measured.fingerprint)
    assert cache.read(tmp_path).query("fingerprint == @host.fingerprint('prunemap 0.1.0')").device.tolist() == ["host"]
    with pytest.raises(ValueError, match="agree that a row is simulated"):
        schema.frame(simulated.assign(device="host"))


def test_roofline_by_hand(monkeypatch):
    device = Roofline("toy", peak_gmacs=1.0, bandwidth_gbs=1.0, cores=2, overhead_us=10.0, efficiency={1: 0.25, 8: 0.5})
    steps = FakeNetwork().explain()
    # 2e6 MACs at half of 1 GMAC/s, 1e6 MACs at half of it (dense), a copy of 1e3 bytes; 10 us each.
    assert device.steps_ms(steps) == pytest.approx([4 + 0.01, 2 + 0.01, 0.001 + 0.01])
    # Two threads share the memory: the first step is bound by its 1 000 400 bytes.
    assert device.steps_ms(steps.assign(computed_macs=[1e6, 1e6, 0]), threads=2) == pytest.approx([1.0104, 1.01, 0.011])
    share = device.steps_ms(steps.assign(scheme="unstructured"))[0]
    assert share == pytest.approx(8 + 0.01)
    assert device.steps_ms(steps.assign(scheme="filter"))[0] == pytest.approx(4 + 0.01)
    assert device.steps_ms(steps.assign(scheme="block_punched(64x4)"))[0] == pytest.approx(4 + 0.01)
    assert device.steps_ms(steps.assign(scheme=None))[0] == pytest.approx(8 + 0.01)
    monkeypatch.setitem(DEVICES, "simulated:toy", device)
    row = measure(FakeNetwork(), device="simulated:toy").iloc[0]
    assert row.device == "simulated:toy" and row.median_ms == pytest.approx(6.031)


def test_simulated_fingerprint_follows_its_parameters():
    phone = ROOFLINES["phone"]
    other = Roofline("phone", phone.peak_gmacs + 1, phone.bandwidth_gbs, phone.cores, phone.overhead_us)
    assert phone.provenance("x")["fingerprint"] != other.provenance("x")["fingerprint"]
