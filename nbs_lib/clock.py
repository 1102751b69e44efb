"""The clock: one measuring lock for the machine, pinning, warm-up, medians, and A/B comparison by alternation.

All timing runs alone under `lock()` with the garbage collector off; times are ms per call. It takes plain callables.
"""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import perf_counter_ns
from timeit import Timer

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from nbs_lib.paths import write_atomic


@functools.cache
def _file_lock(path: Path, pid: int) -> FileLock:
    """One lock object per process, so that `lock()` nests; `pid` is in the key because a forked child needs its own."""
    return FileLock(path, mode=0o666, poll_interval=0.2)


@contextlib.contextmanager
def lock(timeout: float | None = None) -> Iterator[None]:
    """Hold the machine's measuring lock (`NBS_LOCK`, else /tmp/prunemap/measure.lock); nests within a thread.

    Says on stderr who holds it when it has to wait. TimeoutError after `timeout` seconds; None waits for ever."""
    path = Path(os.environ.get("NBS_LOCK") or "/tmp/prunemap/measure.lock")
    if not path.parent.exists():  # all users share it: no sticky bit, unlike the folder above
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o777)
    held = _file_lock(path, os.getpid())
    note = Path(f"{held.lock_file}.holder")
    try:
        held.acquire(timeout=0)
    except Timeout:
        who = note.read_text() if note.exists() else "another process"
        print(f"waiting for the measuring lock {held.lock_file}: {who} holds it", file=sys.stderr, flush=True)
        with NamedTemporaryFile(prefix=".waits", dir=os.environ.get("NBS_WAITS")):  # the notebooks' runner looks for it
            held.acquire(timeout=-1 if timeout is None else timeout)
    try:
        with contextlib.suppress(OSError):  # the note is a courtesy: the lock holds without it
            write_atomic(note, f"pid {os.getpid()}")
        yield
    finally:
        held.release()


def _is_hyper_thread(cpu: int) -> bool:
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.exists() and siblings.read_text().replace("-", ",").split(",")[0].strip() != str(cpu)


@contextlib.contextmanager
def pin(threads: int = 1) -> Iterator[None]:
    """Bind the calling thread to the first `threads` CPUs it may use, real cores before hyper-threads.

    Restored afterwards, for threads born inside too: a worker pool started under `pin(1)` must not stay on one CPU.
    ValueError for more threads than CPUs; where the OS cannot pin, a warning and nothing else."""
    if not hasattr(os, "sched_setaffinity"):
        warnings.warn("this system cannot pin threads: times may wander between cores", stacklevel=3)
        yield
        return
    allowed = os.sched_getaffinity(0)
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"Expected threads from 1 to {len(allowed)}, the CPUs this thread may use. Got {threads}.")
    older = set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, sorted(allowed, key=lambda cpu: (_is_hyper_thread(cpu), cpu))[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        for thread in set(os.listdir("/proc/self/task")) - older:
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(int(thread), allowed)


@dataclass(frozen=True, eq=False)
class Timing:
    """What `n` samples (n,) say, in ms per call. MAD is unscaled; cv = sample deviation / mean, NaN for one sample."""

    samples_ms: np.ndarray

    def __post_init__(self):
        if not np.size(self.samples_ms) or not np.isfinite(self.samples_ms).all():
            raise ValueError(f"Expected a list of finite times in ms. Got {self.samples_ms!r}.")
        object.__setattr__(self, "samples_ms", np.asarray(self.samples_ms, dtype=np.float64))

    n = property(lambda self: self.samples_ms.size)
    min_ms = property(lambda self: float(self.samples_ms.min()))
    p10_ms = property(lambda self: float(np.percentile(self.samples_ms, 10)))
    median_ms = property(lambda self: float(np.median(self.samples_ms)))
    mean_ms = property(lambda self: float(self.samples_ms.mean()))
    p90_ms = property(lambda self: float(np.percentile(self.samples_ms, 90)))
    mad_ms = property(lambda self: float(np.median(np.abs(self.samples_ms - self.median_ms))))
    cv = property(lambda self: float(self.samples_ms.std(ddof=1) / self.mean_ms) if self.n > 1 else float("nan"))
    steady = property(lambda self: self.mad_ms < 0.02 * self.median_ms)

    def row(self) -> dict:
        """The timing columns of a measured row."""
        names = ("min_ms", "p10_ms", "median_ms", "mean_ms", "p90_ms", "mad_ms", "cv")
        return {"runs": self.n} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Timings whose i-th samples were all taken in round i, so that they pair."""

    timings: dict[str, Timing]

    def ratio(self, a: str, b: str, confidence=0.95, resamples=2000, seed=0) -> tuple[float, float, float]:
        """median(a) / median(b), and its percentile bootstrap interval: whole rounds are drawn, with replacement."""
        a_ms, b_ms = self.timings[a].samples_ms, self.timings[b].samples_ms
        rounds = np.random.default_rng(seed).integers(a_ms.size, size=(resamples, a_ms.size))
        drawn = np.median(a_ms[rounds], axis=1) / np.median(b_ms[rounds], axis=1)
        lo, hi = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2)).tolist()
        return self.timings[a].median_ms / self.timings[b].median_ms, lo, hi

    def frame(self) -> pd.DataFrame:
        """One row of statistics per name."""
        return pd.DataFrame([{"name": name} | timing.row() for name, timing in self.timings.items()])


def _calls_per_sample(timer: Timer, warmup: int, min_sample_ms: float) -> int:
    """How many calls last `min_sample_ms`, found after `warmup` calls. The first call never counts."""
    timer.timeit(warmup)
    calls = 1
    while calls < 2**20 and timer.timeit(calls) < min_sample_ms * 1e6:
        calls *= 2
    return calls


def turn_order(names: list[str], turn: int) -> list[str]:
    """The order of round `turn`: it rotates every round and turns round after each cycle (ABBA for two)."""
    return np.roll(names, -turn)[:: -1 if turn // len(names) % 2 else 1].tolist()


def alternate(contenders: dict, rounds=20, warmup=3, min_sample_ms=1.0, settle=1, adaptive=False) -> Comparison:
    """Time several callables against each other, one sample each per round, so that drift hits all alike.

    A sample is as many calls as last `min_sample_ms`. The order is that of `turn_order`. `settle` untimed calls before
    each sample refill that contender's caches while the previous one's worker threads go to sleep. `adaptive`: from 20
    rounds on, stop as soon as every MAD is below 2 % of the median."""
    timers = {name: Timer(fn, timer=perf_counter_ns) for name, fn in contenders.items()}  # no garbage is collected
    names, samples = list(contenders), {name: [] for name in contenders}
    with lock():
        calls = {name: _calls_per_sample(timer, warmup, min_sample_ms) for name, timer in timers.items()}
        for turn in range(rounds):
            for name in turn_order(names, turn):
                timers[name].timeit(settle)
                samples[name].append(timers[name].timeit(calls[name]) / calls[name] / 1e6)
            if adaptive and turn >= 19 and all(Timing(values).steady for values in samples.values()):
                break
    return Comparison({name: Timing(values) for name, values in samples.items()})


def time_calls(fn: Callable, runs=100, warmup=10, min_sample_ms=1.0, adaptive=False) -> Timing:
    """Time `fn()` alone: `runs` samples after `warmup` calls; `min_sample_ms` and `adaptive` as in `alternate`."""
    return alternate({"fn": fn}, runs, warmup, min_sample_ms, settle=0, adaptive=adaptive).timings["fn"]
