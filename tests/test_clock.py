"""The clock: statistics of known samples, alternation's order, lock across processes, pinning. Never milliseconds."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nbs_lib import clock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    """Tests must not wait for a measurement that runs on this machine."""
    monkeypatch.setenv("NBS_LOCK", str(tmp_path / "measure.lock"))


class FakeTime:
    """A clock that stands still but for the cost of the calls made with it."""

    def __init__(self, monkeypatch):
        self.ns = 0
        self.log = []
        monkeypatch.setattr(clock, "perf_counter_ns", lambda: self.ns)

    def call(self, name, costs_ms):
        costs = iter(costs_ms)

        def fn():
            self.log.append(name)
            self.ns += round(next(costs) * 1e6)

        return fn


def forever(value):
    while True:
        yield value


def test_timing_of_known_samples():
    timing = clock.Timing([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (timing.n, timing.min_ms, timing.median_ms) == (6, 1.0, 3.5)
    assert timing.mean_ms == pytest.approx(115 / 6)
    assert timing.mad_ms == 1.5  # deviations 0.5 0.5 1.5 1.5 2.5 96.5
    assert timing.p10_ms == pytest.approx(1.5) and timing.p90_ms == pytest.approx(52.5)
    assert timing.cv == pytest.approx(np.std([1, 2, 3, 4, 5, 100], ddof=1) / (115 / 6))
    assert timing.row()["runs"] == 6 and timing.row()["median_ms"] == 3.5
    with pytest.raises(AttributeError):
        timing.samples_ms = None


def test_timing_of_one_sample_has_no_cv():
    timing = clock.Timing([2.0])
    assert (timing.median_ms, timing.mad_ms, timing.p90_ms) == (2.0, 0.0, 2.0)
    assert np.isnan(timing.cv)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_timing_refuses(samples):
    with pytest.raises(ValueError, match="Expected"):
        clock.Timing(samples)


def test_first_calls_never_count(monkeypatch):
    time = FakeTime(monkeypatch)
    fn = time.call("f", [1000.0, 500.0, *[2.0] * 50])
    assert clock.time_calls(fn, runs=10, warmup=2).samples_ms.tolist() == [2.0] * 10
    fn = time.call("f", [1000.0, *[2.0] * 50])
    assert clock.time_calls(fn, runs=10, warmup=0).samples_ms.tolist() == [2.0] * 10


def test_short_calls_are_batched(monkeypatch):
    time = FakeTime(monkeypatch)
    timing = clock.time_calls(time.call("f", forever(0.3)), runs=5, warmup=1, min_sample_ms=1.0)
    assert timing.samples_ms == pytest.approx([0.3] * 5)  # per call, though a sample is 4 calls
    assert len(time.log) == 1 + (1 + 2 + 4) + 5 * 4


def test_adaptive_stops_when_steady(monkeypatch):
    time = FakeTime(monkeypatch)
    assert clock.time_calls(time.call("f", forever(2.0)), runs=100, adaptive=True).n == 20
    assert clock.time_calls(time.call("f", forever(2.0)), runs=7, adaptive=True).n == 7
    restless = time.call("f", np.random.default_rng(0).uniform(1, 3, 200))
    assert clock.time_calls(restless, runs=100, adaptive=True).n == 100


def test_garbage_collector_rests_and_returns():
    seen = []
    clock.time_calls(lambda: seen.append(gc.isenabled()), runs=2, warmup=0, min_sample_ms=0)
    assert seen[-2:] == [False, False] and gc.isenabled()


def test_lock_is_freed_and_collector_returns_after_an_error():
    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        clock.time_calls(fails)
    assert gc.isenabled()
    assert holds_elsewhere(timeout=0).returncode == 0


def order(monkeypatch, names, rounds, settle=0):
    time = FakeTime(monkeypatch)
    clock.alternate({n: time.call(n, forever(2.0)) for n in names}, rounds, warmup=0, settle=settle)
    return "".join(time.log[len(names) :])  # the first call of each found its batch


def test_alternate_rotates_and_turns(monkeypatch):
    assert order(monkeypatch, "AB", 4) == "ABBA" + "BAAB"
    cycle = order(monkeypatch, "ABC", 6)
    rounds = [cycle[i : i + 3] for i in range(0, 18, 3)]
    assert sorted(rounds) == ["ABC", "ACB", "BAC", "BCA", "CAB", "CBA"]
    assert order(monkeypatch, "AB", 2, settle=1) == "AABBBBAA"


def test_alternate_pairs_samples_by_round(monkeypatch):
    time = FakeTime(monkeypatch)
    drift = [1.0, 2.0, 4.0, 8.0]
    slow = time.call("slow", [1.0, *(3 * d for d in drift)])
    fast = time.call("fast", [1.0, *drift])
    timed = clock.alternate({"slow": slow, "fast": fast}, rounds=4, warmup=0, settle=0)
    assert timed.timings["slow"].samples_ms.tolist() == [3.0, 6.0, 12.0, 24.0]
    # The machine slows down eightfold, yet in every pair the ratio is 3, and pairs stay together.
    ratio, lo, hi = timed.ratio("slow", "fast")
    assert (ratio, lo, hi) == (3.0, 3.0, 3.0)
    assert timed.ratio("fast", "slow")[0] == pytest.approx(1 / 3)
    assert timed.frame().name.tolist() == ["slow", "fast"] and timed.frame().median_ms.tolist() == [9.0, 3.0]


def comparison(rng, n, true_ratio):
    drift = rng.uniform(1, 2, n)
    a, b = (drift * rng.lognormal(0, 0.05, n) for _ in range(2))
    return clock.Comparison({"a": clock.Timing(true_ratio * a), "b": clock.Timing(b)})


def test_interval_covers_the_true_ratio():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(60):
        ratio, lo, hi = comparison(rng, 40, 2.5).ratio("a", "b", resamples=400)
        assert lo <= ratio <= hi
        inside.append(lo <= 2.5 <= hi)
    assert np.mean(inside) > 0.85  # nominal 0.95; never a hair's breadth around the wrong value


def test_interval_narrows_with_rounds_and_repeats_with_its_seed():
    few, many = (comparison(np.random.default_rng(0), n, 1.0) for n in (20, 500))
    width = [hi - lo for _, lo, hi in (few.ratio("a", "b"), many.ratio("a", "b"))]
    assert width[1] < width[0]
    assert few.ratio("a", "b") == few.ratio("a", "b") != few.ratio("a", "b", seed=1)


def holds_elsewhere(timeout) -> subprocess.CompletedProcess:
    code = f"from nbs_lib import clock\nwith clock.lock(timeout={timeout!r}): print('mine')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_lock_nests_and_shuts_others_out():
    with clock.lock():
        with clock.lock():
            pass
        other = holds_elsewhere(timeout=0.3)
        assert other.returncode != 0 and "Timeout" in other.stderr
        assert f"pid {os.getpid()} holds it" in other.stderr
    assert holds_elsewhere(timeout=0).stdout == "mine\n"


def test_lock_waits_for_its_turn():
    code = "from nbs_lib import clock\nprint('up', flush=True)\nwith clock.lock(): print('mine', flush=True)"
    with clock.lock():
        waiting = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "waiting for the measuring lock" in waiting.stderr.readline()
        assert waiting.poll() is None
    assert waiting.communicate(timeout=60)[0] == "up\nmine\n"


def test_a_wait_for_the_lock_shows_in_the_runners_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_WAITS", str(tmp_path / "waits"))
    (tmp_path / "waits").mkdir()
    code = "from nbs_lib import clock\nwith clock.lock(): print('mine')"
    with clock.lock():
        assert not list((tmp_path / "waits").iterdir())
        waiting = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert "waiting" in waiting.stderr.readline()
        while not list((tmp_path / "waits").glob(".waits*")):
            assert waiting.poll() is None
            time.sleep(0.01)
    waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and not list((tmp_path / "waits").iterdir())


def test_lock_is_freed_when_its_holder_is_killed():
    code = "from nbs_lib import clock\nimport time\nwith clock.lock(): print('mine', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    holder.kill()
    holder.communicate()
    with clock.lock(timeout=5):
        pass


def test_lock_shuts_out_other_threads_of_this_process():
    failures = []

    def enter():
        try:
            with clock.lock(timeout=0.1):
                failures.append("entered")
        except TimeoutError:
            pass

    with clock.lock():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_inherit_the_lock():
    with clock.lock():
        child = os.fork()
        if not child:
            try:
                with clock.lock(timeout=0.1):
                    os._exit(1)
            except TimeoutError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert holds_elsewhere(timeout=0).returncode != 0


needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")


@needs_affinity
def test_pin_binds_and_restores():
    allowed = os.sched_getaffinity(0)
    with clock.pin(1):
        assert len(os.sched_getaffinity(0)) == 1
        with pytest.raises(ValueError, match="Expected threads from 1 to 1"), clock.pin(2):
            pass
    with clock.pin(len(allowed)):
        assert os.sched_getaffinity(0) == allowed
    with pytest.raises(RuntimeError), clock.pin(1):
        raise RuntimeError
    assert os.sched_getaffinity(0) == allowed
    for wrong in (0, -1, len(allowed) + 1):
        with pytest.raises(ValueError, match=f"Got {wrong}"), clock.pin(wrong):
            pass


@needs_affinity
def test_pin_frees_threads_born_inside():
    allowed, seen, stop, started = os.sched_getaffinity(0), [], threading.Event(), threading.Event()

    def worker():
        seen.append(os.sched_getaffinity(0))
        started.set()
        stop.wait()
        seen.append(os.sched_getaffinity(0))

    with clock.pin(1):
        thread = threading.Thread(target=worker)
        thread.start()
        started.wait()
    stop.set()
    thread.join()
    assert len(seen[0]) == 1 and seen[1] == allowed


def test_pin_where_the_system_cannot(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.warns(UserWarning, match="cannot pin"), clock.pin(3):
        pass
