"""One engine in a process and an environment of its own: what `worker.py` starts. Needs NumPy and that engine.

    python serve.py ENGINE.py REQUEST.json

REQUEST: `model` (path), `input` and `output` (.npy), `threads`, `cpus`, `cache` (a folder that stays), `options`.
Loads the model in float32, runs it once and writes what came out to `output`. Then one line of JSON answers each line
on stdin: first `{"version", "settings"}`, then, for "SETTLE CALLS", the time of CALLS calls after SETTLE untimed ones,
taken here, around the calls alone: `{"ms", "idle_ms"}`, ms per call, and the CPU time that this process burnt since it
last answered. It sleeps in between, and ends with its stdin. Its working folder is the engine's to write to.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from timeit import Timer

if __name__ == "__main__":  # before any engine asks how many CPUs there are, or starts a thread
    request = json.loads(Path(sys.argv[2]).read_text())
    os.sched_setaffinity(0, request["cpus"])
    # Threads may spin between the layers of a call, but not for long after it; and nobody sends events.
    os.environ |= {"KMP_BLOCKTIME": "1", "GOMP_SPINCOUNT": "100000", "NM_DISABLE_ANALYTICS": "1"}
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(request["threads"]))
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]  # nothing here is for the engine

import numpy as np


def serve(file: str, request: dict) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints must not look like an answer
    engine = module_from_spec(spec := spec_from_file_location("engine", file))
    spec.loader.exec_module(engine)
    x, cpus, cache = np.load(request["input"]), set(request["cpus"]), Path(request["cache"])
    infer = engine.load(Path(request["model"]), x, request["threads"], cache, **request["options"])
    np.save(request["output"], np.asarray(infer()))
    for thread in os.listdir("/proc/self/task"):  # some engines bind their threads by themselves, anywhere
        if not os.sched_getaffinity(int(thread)) <= cpus:
            raise RuntimeError(f"{engine.PACKAGE} runs on other CPUs than {sorted(cpus)}")
    settings = getattr(infer, "settings", {})  # read now: what the first call found out is in it
    print(json.dumps({"version": version(engine.PACKAGE), "settings": settings}), file=replies)
    burnt = time.process_time()
    for line in sys.stdin:
        idle_ms = (time.process_time() - burnt) * 1e3
        settle, calls = map(int, line.split())
        for _ in range(settle):
            infer()
        ms = Timer(infer, timer=time.perf_counter_ns).timeit(calls) / calls / 1e6  # timeit turns the collector off
        print(json.dumps({"ms": ms, "idle_ms": idle_ms}), file=replies)
        burnt = time.process_time()


if __name__ == "__main__":
    serve(sys.argv[1], request)
